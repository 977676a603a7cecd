//! Settle: the new revalidators may delete and rewrite again, and do so twice; refused port deletions that are still
//! true are repeated; systemd owns the new daemon; the freeze ends.

use std::time::Duration;

use anyhow::Context;

use super::handover::wait_in_step;
use super::standby::finish_start;
use super::{by_hand, classes, database_disk, guard, log_levels, ports, Ended, Run, Step, Stop};
use crate::config::Config;
use crate::machine::{Event, Phase};

pub(super) struct Settle;

impl Step for Settle {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Settle)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        if run.host.datapath.is_armed() {
            run.host.datapath.refuse(classes::settling())?;
        }
        wait_in_step(run)?;
        log_levels::put_back(run);
        // `revalidator/wait` answers at the end of the dump under way, which may have begun before the refusals ended:
        // hence more than one.
        let patience = Duration::from_millis(run.config.settle.revalidate_wait_ms);
        for _ in 0..run.config.settle.revalidations {
            let until = run.deadline.min(run.now() + patience);
            let new = run.new_daemon()?.clone();
            run.host.daemons.command(&new, "revalidator/wait", &[], until).context("waiting for a revalidation")?;
            run.checkpoint()?;
        }
        repeat_port_deletions(run)?;
        finish_start(run)?;
        // ovs-ctl has added the managers by now, and systemd may have replaced ovsdb-server.
        by_hand::put_back(run);
        guard::widen(run);
        // A freeze that ended by itself is told; afterwards nobody can tell it from one that was lifted.
        run.checkpoint()?;
        run.host.datapath.thaw()?;
        database_disk::tidy(run);
        Ok(Event::Done)
    }
}

/// Hazards 7: a daemon does not repeat a refused VPORT_DEL. Only ports that no interface of the database stands for
/// are deleted.
fn repeat_port_deletions(run: &mut Run) -> Result<(), Stop> {
    let facts = run.host.database.facts(run.deadline)?;
    let ports = std::mem::take(&mut run.known.refused_ports);
    for name in run.host.datapath.delete_stale_ports(&ports, &ports::wanted(&facts))? {
        run.note(format!("{name}: deletion repeated, no interface of the database stands for it"));
    }
    run.checkpoint()
}

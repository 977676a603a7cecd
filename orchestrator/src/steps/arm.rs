//! Arm: nothing that a starting or stopping daemon would destroy can be destroyed any more; then ovsdb-server is
//! replaced, while the old ovs-vswitchd still forwards.

use std::time::Duration;

use anyhow::Context;

use super::{classes, guard, Ended, Host, Run, Step};
use crate::config::Config;
use crate::host::datapath::Lease;
use crate::host::real::ovsdb_server::replace;
use crate::machine::{Event, Phase};
use crate::report::Level;

pub(super) struct Arm;

impl Step for Arm {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Arm)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        if run.level == Level::Full {
            let lease = Lease { lease: run.lease(), end: run.config.freeze.end() };
            run.host.datapath.arm(classes::armed(), lease).context("arming the freeze")?;
            guard::begin(run);
            run.checkpoint()?;
        }
        if run.wish.ovsdb {
            replace_ovsdb_server(run)?;
        }
        Ok(Event::Done)
    }

    fn undo(&self, run: &mut Run) -> Ended {
        // The old daemon lives on and keeps its policies by itself.
        run.host.datapath.withdraw_guard(&run.id)?;
        run.report.conntrack.timeout_policies_guarded = 0;
        run.host.datapath.thaw()?;
        Ok(Event::Done)
    }
}

/// Hazards 17: before any standby, and the old ovs-vswitchd seen back in step before the run goes on.
fn replace_ovsdb_server(run: &mut Run) -> Result<(), super::Stop> {
    let Host { daemons, services, database, clock, .. } = &run.host;
    let old = daemons.find_ovsdb_server()?;
    replace(daemons.as_ref(), services.as_ref(), database.as_ref(), clock.as_ref(), &old, run.deadline)
        .context("replacing ovsdb-server")?;
    run.checkpoint()
}

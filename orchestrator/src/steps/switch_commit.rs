//! SwitchCommit, the point of no return: the standby wakes, the old daemon ends.

use std::time::Duration;

use anyhow::{anyhow, Context};

use super::back::make_room_for_probes;
use super::standby::{let_others_restart, others_done_for, start_has_not_failed, start_new_daemon};
use super::switch_prepare::{keep_parked, take_upcalls};
use super::{reload, tunnels, Ended, Run, Step, Stop};
use crate::config::Config;
use crate::control::Progress;
use crate::host::Signal;
use crate::machine::{Event, Phase};
use crate::report::Strategy;

pub(super) struct SwitchCommit;

/// Somebody else's command that has ended has ended the old daemon, or it was the wrong one.
const LATE_END: Duration = Duration::from_secs(5);

impl Step for SwitchCommit {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::SwitchCommit)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        run.control.tell(&Progress::PointOfNoReturn);
        let reloads = run.wish.reloads_module();
        if reloads {
            run.known.gap_began.get_or_insert(run.now());
        } else if run.known.gap_began.is_none() {
            // The old daemon has ended by itself before SwitchPrepare came to it.
            take_upcalls(run)?;
            keep_parked(run)?;
        }
        let old = run.old()?.clone();
        if run.known.standby_stopped {
            let new = run.new_daemon()?.id;
            run.host.daemons.signal(new, Signal::Continue).context("waking the standby")?;
            run.known.standby_stopped = false;
        }
        if run.known.new.is_none() {
            tunnels::hold_up(run);
        }
        if run.wish.elsewhere {
            let_others_restart(run)?;
        } else if run.host.daemons.is_alive(old.id) {
            run.known.old_told = true;
            // The standby looks whether meters work as soon as the old daemon has let go of the database.
            make_room(run);
            // Never `ovs-appctl exit`: it deletes rules while handlers still run (hazards 8).
            run.host.daemons.signal(old.id, Signal::Terminate).context("ending the old ovs-vswitchd")?;
        }
        wait_for_end(run)?;
        if !run.known.old_told {
            make_room(run);
        }
        if reloads {
            reload::reload(run)?;
        } else {
            run.host.datapath.read_left_over()?;
        }
        if run.wish.strategy != Strategy::Standby && run.known.new.is_none() {
            start_new_daemon(run)?;
        }
        let new = run.new_daemon()?.clone();
        run.host.daemons.settle_pid_file(&new).context("the PID file of the new ovs-vswitchd")?;
        if !reloads {
            run.host.datapath.choose_doomed_meanwhile()?;
        }
        Ok(Event::Done)
    }
}

fn make_room(run: &mut Run) {
    if let Some(warning) = make_room_for_probes(&mut run.host) {
        run.warn(warning);
    }
}

fn wait_for_end(run: &mut Run) -> Result<(), Stop> {
    let old = run.old()?.id;
    let patience = Duration::from_millis(run.config.switch.kill_after_ms);
    let told = run.now();
    let mut killed = false;
    run.wait_for("the old ovs-vswitchd to end", |run| {
        if !run.host.daemons.is_alive(old) {
            return Ok(true);
        }
        if run.wish.elsewhere {
            return others_are_at_it(run).map(|()| false);
        }
        if !killed && run.now().saturating_duration_since(told) >= patience {
            killed = true;
            run.warn("the old ovs-vswitchd did not end by SIGTERM and gets SIGKILL");
            run.host.daemons.signal(old, Signal::Kill)?;
        }
        Ok(false)
    })
}

/// The old daemon still lives: is there hope that whoever is to end it does?
fn others_are_at_it(run: &mut Run) -> Result<(), Stop> {
    start_has_not_failed(run)?;
    if others_done_for(run).is_some_and(|time| time >= LATE_END) {
        let pid = run.old()?.id.pid;
        return Err(
            anyhow!("the command is done, and ovs-vswitchd (process {pid}) still runs: was it the right one?").into()
        );
    }
    Ok(())
}

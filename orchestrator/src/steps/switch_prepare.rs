//! SwitchPrepare: the upcalls come to us, the old daemon finishes what it holds, and what it was told since the
//! snapshot is taken in. Everything here can be undone: the upcalls go back.

use std::time::{Duration, Instant};

use anyhow::Context;

use super::{classes, Ended, Run, Step, Stop};
use crate::config::Config;
use crate::machine::{Event, Phase};

pub(super) struct SwitchPrepare;

impl Step for SwitchPrepare {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::SwitchPrepare)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        let old = run.old()?.id;
        run.host.datapath.prepare_park(old).context("opening the parking sockets")?;
        take_upcalls(run)?;
        wait_until_drained(run)?;
        take_in_openflow_changes(run)?;
        run.checkpoint()?;
        // From here on `abort` is refused; who asked just before still gets what he asked for.
        if run.control.gate().commit().is_err() {
            run.tell_machine(Event::AbortRequested)?;
        }
        Ok(Event::Done)
    }

    fn undo(&self, run: &mut Run) -> Ended {
        run.host.datapath.return_upcalls()?;
        run.known.gap_began = None;
        if run.host.datapath.is_armed() {
            run.host.datapath.refuse(classes::armed())?;
        }
        Ok(Event::Done)
    }
}

/// From here on misses are parked, and nothing may be deleted that the new daemon will want.
pub(super) fn take_upcalls(run: &mut Run) -> Result<(), Stop> {
    if run.host.datapath.is_armed() {
        run.host.datapath.refuse(classes::switching())?;
    }
    run.known.gap_began = Some(run.now());
    run.host.datapath.take_upcalls().context("taking the upcalls over")?;
    Ok(())
}

fn wait_until_drained(run: &mut Run) -> Result<(), Stop> {
    // Hazards 9: two looks, this far apart.
    let apart = Duration::from_millis(run.config.switch.drain_poll_ms);
    let mut idle_since: Option<Instant> = None;
    run.wait_for("the old ovs-vswitchd to finish the upcalls it holds", |run| {
        if !run.host.datapath.is_drained()? {
            idle_since = None;
            return Ok(false);
        }
        let now = run.now();
        Ok(now.saturating_duration_since(*idle_since.get_or_insert(now)) >= apart)
    })
}

/// Hazards 22: rules deleted since the snapshot must not come back; what was learned until now must not be forgotten.
fn take_in_openflow_changes(run: &mut Run) -> Result<(), Stop> {
    let until = run.deadline;
    let bridges = run.known.facts.bridges.clone();
    if let Some(mut watch) = run.known.rule_watch.take() {
        let before = std::mem::take(&mut run.known.rules);
        run.known.rules = run.host.openflow.refresh(&bridges, &before, watch.as_mut(), until)?;
    }
    let old = run.old()?.clone();
    for bridge in &bridges {
        let learned = run.host.openflow.fdb(&old, &bridge.name, until).context("learned addresses")?;
        run.known.addresses.insert(bridge.name.clone(), learned);
    }
    run.checkpoint()
}

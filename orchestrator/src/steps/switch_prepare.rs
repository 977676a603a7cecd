//! SwitchPrepare: the upcalls come to us, the old daemon finishes what it holds, and what it was told since the
//! snapshot is taken in. Everything here can be undone: the upcalls go back.

use std::time::{Duration, Instant};

use anyhow::Context;

use super::standby::start_has_not_failed;
use super::{bridges, classes, database_disk, devices, notes, reload, restore, Ended, Host, Run, Step, Stop};
use crate::config::Config;
use crate::host::{Bridge, Daemon};
use crate::machine::{Event, Phase};

pub(super) struct SwitchPrepare;

/// How long the old daemon may take to carry changed rules into the kernel.
const CATCH_UP: Duration = Duration::from_secs(3);
/// So many bridges are asked within the gap for all that they know.
const FEW_BRIDGES: usize = 32;
/// How long systemd may take to have what is to be kept.
const KEEP_LIMIT: Duration = Duration::from_secs(3);

impl Step for SwitchPrepare {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::SwitchPrepare)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        database_disk::must_be_well(run)?;
        bridges::look_again(run)?;
        devices::look(run)?;
        if run.wish.reloads_module() {
            reload::remember(run)?;
            take_in_openflow_changes(run)?;
            return past_abort(run);
        }
        let_it_catch_up(run)?;
        let old = run.old()?.id;
        run.host.datapath.prepare_park(old).context("opening the parking sockets")?;
        keep_parked(run)?;
        take_upcalls(run)?;
        wait_until_drained(run)?;
        take_in_openflow_changes(run)?;
        past_abort(run)
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

/// From here on `abort` is refused; who asked just before still gets what he asked for.
fn past_abort(run: &mut Run) -> Ended {
    run.checkpoint()?;
    if run.wish.elsewhere {
        // Nobody would start the new daemon.
        start_has_not_failed(run)?;
    }
    if run.control.gate().commit().is_err() {
        run.tell_machine(Event::AbortRequested)?;
    }
    Ok(Event::Done)
}

/// Hazards 4: where rules were changed during the run, the old daemon does with its kernel flows what they ask for, as
/// long as it may. `revalidator/wait` answers at the end of the dump under way, which may be older than the change:
/// hence two.
fn let_it_catch_up(run: &mut Run) -> Result<(), Stop> {
    let Some(watch) = &mut run.known.rule_watch else { return Ok(()) };
    if watch.changed(run.deadline)?.is_empty() {
        return Ok(());
    }
    let old = run.old()?.clone();
    let until = run.deadline.min(run.now() + CATCH_UP);
    for _ in 0..2 {
        if let Err(error) = run.host.daemons.command(&old, "revalidator/wait", &[], until) {
            run.warn(format!("kernel flows may be older than the last change of rules until the run settles: {error}"));
            break;
        }
    }
    read_again(run)?;
    run.checkpoint()
}

/// Changed rules are read and proved now, as far as they have changed by now: the gap does not pay for it, and a rule that
/// cannot be put back ends the run before it.
fn read_again(run: &mut Run) -> Result<(), Stop> {
    let old = run.old()?.clone();
    let Some(watch) = &mut run.known.rule_watch else { return Ok(()) };
    let (bridges, until) = (&run.known.facts.bridges, run.deadline);
    run.known.rules = run.host.openflow.refresh(&old, bridges, &run.known.rules, watch.as_mut(), until)?;
    restore::prepare(run)
}

/// A supervisor that dies does not take along what it has parked. Where nobody keeps it, it does.
pub(super) fn keep_parked(run: &mut Run) -> Result<(), Stop> {
    let until = run.deadline.min(run.now() + KEEP_LIMIT);
    let Host { datapath, services, .. } = &mut run.host;
    let kept = datapath.kept().and_then(|kept| services.keep(&kept, until));
    if let Err(error) = kept {
        run.warn(format!("{error}: what is parked would be lost with the supervisor"));
    }
    run.checkpoint()
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
    let drained = run.wait_until(run.deadline, |run| {
        if !run.host.datapath.is_drained()? {
            idle_since = None;
            return Ok(false);
        }
        let now = run.now();
        Ok(now.saturating_duration_since(*idle_since.get_or_insert(now)) >= apart)
    })?;
    match drained {
        true => Ok(()),
        false => {
            let held = run.host.datapath.undrained();
            Err(Stop::TimedOut(format!("the old ovs-vswitchd to finish the upcalls it holds ({held})")))
        }
    }
}

/// What bridges know besides rules may have changed since the snapshot. Where there are hundreds of them, only those are
/// asked that go on learning it by themselves: packets wait meanwhile.
fn look_at_state_again(run: &mut Run, old: &Daemon) -> Result<(), Stop> {
    let (bridges, known) = (&run.known.facts.bridges, &mut run.known.state);
    let few = bridges.len() <= FEW_BRIDGES;
    let is_known = |bridge: &Bridge| known.iter().any(|state| state.bridge == bridge.name);
    let asked = bridges.iter().filter(|bridge| few || bridge.snoops || !is_known(bridge));
    let asked: Vec<Bridge> = asked.cloned().collect();
    let now = run.host.openflow.state(old, &asked, run.deadline).context("what bridges know besides rules")?;
    known.retain(|state| now.iter().all(|new| new.bridge != state.bridge));
    known.extend(now);
    Ok(())
}

/// Hazards 22: rules deleted since the snapshot must not come back; what was learned until now must not be forgotten.
fn take_in_openflow_changes(run: &mut Run) -> Result<(), Stop> {
    let until = run.deadline;
    let bridges = run.known.facts.bridges.clone();
    let old = run.old()?.clone();
    if let Some(mut watch) = run.known.rule_watch.take() {
        run.known.rules = run.host.openflow.refresh(&old, &bridges, &run.known.rules, watch.as_mut(), until)?;
        notes::rules_before(&mut run.report, &run.known.rules);
        restore::prepare(run)?;
    }
    let learned = run.host.openflow.fdb(&old, &bridges, until).context("learned addresses")?;
    look_at_state_again(run, &old)?;
    run.known.addresses.extend(bridges.into_iter().map(|bridge| bridge.name).zip(learned));
    run.checkpoint()
}

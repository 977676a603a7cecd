//! Handover: flow-restore-wait goes, what cannot survive goes, the upcalls come to the new daemon, and what was parked
//! is replayed.

use std::time::Duration;

use anyhow::Context;
use dpfreeze::freeze::Captured;
use dpfreeze::ovs::Dispatch;

use super::restore::restore_bridges_with_controllers;
use super::{classes, database_disk, notes, Ended, Run, Step, Stop};
use crate::config::Config;
use crate::host::datapath::DATAPATH;
use crate::host::Cleared;
use crate::machine::{Event, Phase};

pub(super) struct Handover;

/// A daemon that is in step says so within this, where nothing is wrong.
const TELLS_IT: Duration = Duration::from_secs(3);

impl Step for Handover {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Handover)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        match run.host.datapath.is_armed() {
            true => hand_over(run)?,
            false => let_it_bind(run)?,
        }
        Ok(Event::Done)
    }
}

/// The binding was refused and captured; it is carried out when everything is ready.
fn hand_over(run: &mut Run) -> Result<(), Stop> {
    clear_restore_wait(run)?;
    let captured = wait_until_captured(run)?;
    run.host.datapath.prepare_hand_over(&captured).context("the upcall sockets of the new ovs-vswitchd")?;
    restore_bridges_with_controllers(run)?;
    remove_doomed(run)?;
    if captured.dispatch == Dispatch::PerVport {
        let_it_bind_its_ports(run)?;
    }
    let until = run.deadline;
    let done = run.host.datapath.hand_over(&captured, until).context("binding the new ovs-vswitchd, and replaying")?;
    notes::gap_ended(&mut run.report, &mut run.known.gap_began, done.bound);
    notes::replay(&mut run.report, run.known.before.as_ref(), &run.host.datapath.park_stats(), &done.replay);
    run.host.datapath.refuse(classes::handed_over())?;
    run.checkpoint()
}

/// Its sockets were closed with the refusal, and it tries again, with others, as soon as its main loop turns: any
/// question to it sees to that, and is answered after the binding. What it would have flushed before stays, since it
/// does that at the first try only (`type_run`, `udpif_set_threads`).
fn let_it_bind_its_ports(run: &mut Run) -> Result<(), Stop> {
    run.host.datapath.refuse(classes::handed_over())?;
    let (new, until) = (run.new_daemon()?.clone(), run.deadline);
    run.host.daemons.command(&new, "version", &[], until).context("the new ovs-vswitchd at its binding")?;
    run.checkpoint()
}

/// Without a freeze the daemon binds and flushes by itself as soon as the flag goes.
pub(super) fn let_it_bind(run: &mut Run) -> Result<(), Stop> {
    let reloads = run.wish.reloads_module();
    if !reloads {
        remove_doomed(run)?;
    }
    clear_restore_wait(run)?;
    it_binds(run)
}

/// It has seen that the flag has gone: waits until it is bound, and gives it what was parked.
pub(super) fn it_binds(run: &mut Run) -> Result<(), Stop> {
    wait_in_step(run)?;
    let now = run.now();
    notes::gap_ended(&mut run.report, &mut run.known.gap_began, now);
    restore_bridges_with_controllers(run)?;
    if run.wish.reloads_module() {
        return run.checkpoint();
    }
    let (daemon, until) = (run.new_daemon()?.id, run.deadline);
    let replayed = run.host.datapath.replay_to(daemon, until).context("replaying the parked packets")?;
    notes::replay(&mut run.report, run.known.before.as_ref(), &run.host.datapath.park_stats(), &replayed);
    run.checkpoint()
}

pub(super) fn clear_restore_wait(run: &mut Run) -> Result<(), Stop> {
    run.restore_wait = None;
    let (id, until) = (run.id.clone(), run.deadline);
    match database_disk::write(run, until, |database| database.clear_restore_wait(&id, until))? {
        Cleared::Removed { next_cfg } => run.known.next_cfg = Some(next_cfg),
        Cleared::AlreadyGone => run.warn("somebody else removed flow-restore-wait before us"),
        Cleared::NotOurs => {}
    }
    run.checkpoint()
}

pub(super) fn wait_in_step(run: &mut Run) -> Result<(), Stop> {
    let Some(next_cfg) = run.known.next_cfg else { return run.checkpoint() };
    loop {
        let until = run.deadline.min(run.now() + TELLS_IT);
        match run.host.database.wait_in_step(next_cfg, until) {
            Err(error) if error.timed_out && until < run.deadline => {}
            ready => {
                ready.context("the new ovs-vswitchd without flow-restore-wait")?;
                return run.checkpoint();
            }
        }
        if database_disk::is_in_trouble(run) {
            // It says so by a transaction, and with the next change only.
            let until = run.deadline;
            database_disk::write(run, until, |database| database.bump(until))?;
        }
        run.checkpoint()?;
    }
}

fn wait_until_captured(run: &mut Run) -> Result<Captured, Stop> {
    let mut captured = None;
    run.wait_for("the new ovs-vswitchd to ask for its upcalls", |run| {
        captured = run.host.datapath.captured()?;
        Ok(captured.is_some())
    })?;
    Ok(captured.context("the upcall binding of the new ovs-vswitchd has vanished")?)
}

pub(super) fn remove_doomed(run: &mut Run) -> Result<(), Stop> {
    let removed = run.host.datapath.remove_doomed().context("removing the flows that cannot survive")?;
    notes::removal(&mut run.report, DATAPATH, removed);
    run.checkpoint()
}

//! Back: the program that ran before, on the database as it is, bound, and the parked packets replayed, after something
//! went wrong past the point of no return, or the old daemon died before it.

use std::time::{Duration, Instant};

use anyhow::{anyhow, Context};

use super::handover::let_it_bind;
use super::standby::{
    cancel_start, end_daemon, end_unseen_daemon, look_for_new_daemon, release_unit, start_new_daemon, wait_job,
    wait_until_it_listens,
};
use super::switch_prepare::keep_parked;
use super::{
    by_hand, classes, database_disk, devices, features, log_levels, notes, tunnels, Ended, Host, Run, Start, Stop,
};
use crate::control::HookCommand;
use crate::host::{Daemon, DaemonKind, Database, HostError, Job, JobKind, SavedProgram};
use crate::machine::Event;
use dpfreeze::freeze::Classes;

/// How long a daemon may take to end.
const END: Duration = Duration::from_secs(5);

/// Ends the daemon that did not come up and starts the old program in its place. May be done twice.
pub fn go_back(run: &mut Run) -> Ended {
    // An abort would bring about the same; who asked before gets it by this.
    let _asked_before = run.control.gate().commit();
    if run.host.datapath.is_armed() {
        // The one that is about to end may be about to bind: what is missed then would be nobody's.
        run.host.datapath.refuse(classes::switching())?;
    }
    run.host.datapath.adopted(Duration::ZERO)?;
    tunnels::hold_up(run);
    end_monitor_of_the_old(run)?;
    end_new_daemon(run)?;
    if run.host.datapath.is_armed() {
        // Whoever comes may bind; what it would flush or delete before it is ready stays.
        run.host.datapath.refuse(classes::switching() - Classes::UPCALL_BIND)?;
    }
    if stay(run)? {
        run.known.switch_lock = None;
        let old = run.old()?.clone();
        look_at_rules(run, &old);
        by_hand::tell(run);
        look_at_devices(run);
        return Ok(Event::Done);
    }
    // Hazards 1: it may have been bound already.
    if run.host.datapath.retake_upcalls().context("taking the upcalls back")? {
        run.known.gap_began = Some(run.now());
        keep_parked(run)?;
    }
    let until = run.deadline;
    let id = run.id.clone();
    database_disk::write(run, until, |database| {
        database.set_restore_wait(&id, until).or_else(|error| already_set(database, error, until))
    })?;
    start_again(run)?;
    wait_until_it_listens(run)?;
    tunnels::adopt(run)?;
    super::restore::restore(run)?;
    let_it_bind(run)?;
    finish(run)?;
    Ok(Event::Done)
}

/// There is no Verify on this way, and whoever reads the report asks first whether his rules are there.
fn look_at_rules(run: &mut Run, daemon: &Daemon) {
    match run.host.openflow.snapshot(daemon, &run.known.facts.bridges, run.deadline) {
        Ok(rules) => {
            notes::rules_after(&mut run.report, &run.known.rules, &rules, &run.known.refused);
            run.report.differences.append(&mut run.known.state_lost);
        }
        Err(error) => run.warn(format!("which OpenFlow rules are there now is not known: {error}")),
    }
}

fn look_at_devices(run: &mut Run) {
    match run.host.database.facts(run.deadline) {
        Ok(facts) => devices::compare(run, &facts),
        Err(error) => run.warn(format!("what is gone of devices is not known: {error}")),
    }
}

fn already_set(database: &dyn Database, error: HostError, until: Instant) -> Result<i64, HostError> {
    match database.facts(until)?.is_on("flow-restore-wait") {
        true => Ok(0),
        false => Err(error),
    }
}

/// Where the old daemon has crashed its monitor has started another already, which would be taken for the new one.
fn end_monitor_of_the_old(run: &mut Run) -> Result<(), Stop> {
    let old = run.old()?.clone();
    if old.monitor.is_none() || run.host.daemons.is_alive(old.id) {
        return Ok(());
    }
    end_daemon(run, &old, run.now() + END)
}

fn end_new_daemon(run: &mut Run) -> Result<(), Stop> {
    let Some(new) = run.known.new.clone() else { return end_unseen_daemon(run, run.now() + END) };
    end_daemon(run, &new, run.now() + END)?;
    run.known.standby_stopped = false;
    run.known.new = None;
    Ok(())
}

/// An old daemon that was never told to end goes on; one that was is seen to its end.
fn stay(run: &mut Run) -> Result<bool, Stop> {
    let old = run.old()?.clone();
    if run.known.old_told || !run.host.daemons.is_alive(old.id) {
        end_daemon(run, &old, run.now() + END)?;
        return Ok(false);
    }
    run.host.datapath.return_upcalls()?;
    cancel_start(run)?;
    run.host.daemons.settle_pid_file(&old)?;
    Ok(true)
}

/// The datapath as a daemon that starts should find it. To be called while none starts. Returns warnings where it may not
/// be.
pub(crate) fn make_ready_for_a_daemon(host: &mut Host) -> Vec<String> {
    [remove_left_probes(host), make_room_for_probes(host)].into_iter().flatten().collect()
}

/// What a daemon that was killed has left of its feature probes: the next one would take the datapath for one that can do
/// less, and forward less. Returns a warning where it may not have worked.
fn remove_left_probes(host: &mut Host) -> Option<String> {
    let error = host.datapath.remove_left_probes().or_else(|_| host.datapath.remove_left_probes()).err()?;
    Some(format!(
        "feature probes of an ovs-vswitchd that was killed may be left: {error}; remedy, where \
         `ovs-appctl dpif/show-dp-features BRIDGE` lacks a feature now: ovs-graceful restart"
    ))
}

/// An ovs-vswitchd that starts finds out whether meters work with two of its own. Returns a warning where there may be no
/// room for them.
pub(super) fn make_room_for_probes(host: &mut Host) -> Option<String> {
    let error = host.datapath.make_room_for_probes().or_else(|_| host.datapath.make_room_for_probes()).err()?;
    Some(format!("the next ovs-vswitchd may take more than 1,000 meters for broken: {error}"))
}

/// The program that ran before, in the cgroup of its unit, whose reload still waits; else the installed one, as its
/// unit or ovs-ctl would start it.
fn start_again(run: &mut Run) -> Result<(), Stop> {
    let old = run.old()?.clone();
    run.host.daemons.remove_stale_pid_files(&old)?;
    // The one that was ended may have been finding out what the datapath can do.
    make_ready_for_a_daemon(&mut run.host).into_iter().for_each(|warning| run.warn(warning));
    if let Some(saved) = run.known.saved.clone() {
        // A unit without a reload under way would not take a daemon for its own that it has not started.
        let started = match (run.known.owner.clone(), &run.known.start) {
            (Some(unit), start) if !matches!(start, Some(Start::Unit { .. })) => {
                start_saved_by_unit(run, &unit, &saved)
            }
            _ => start_saved(run, &saved),
        };
        match started {
            Err(Stop::Failed { error, .. }) => {
                run.warn(format!(
                    "the program that ran before was not started ({error:#}): starting the installed one"
                ));
            }
            started => return started,
        }
    }
    cancel_start(run)?;
    start_installed(run)
}

fn start_saved_by_unit(run: &mut Run, unit: &str, saved: &SavedProgram) -> Result<(), Stop> {
    run.known.unit = Some(unit.to_owned());
    let started = match run.host.services.prefer_program(unit, saved, run.deadline) {
        Ok(()) => start_installed(run),
        Err(error) => Err(error.into()),
    };
    // What cannot be removed now is at the end of the run.
    if let Err(Stop::Failed { error, .. }) = release_unit(run, unit, run.deadline) {
        run.warn(format!("{error:#}"));
    }
    started
}

fn start_saved(run: &mut Run, saved: &SavedProgram) -> Result<(), Stop> {
    let old = run.old()?.clone();
    // Nobody else is to start one any more.
    if matches!(run.known.start, Some(Start::Own(_) | Start::Elsewhere { .. })) {
        cancel_start(run)?;
    }
    run.known.back = Some(run.host.daemons.start_saved(&old, saved)?);
    let new = run.host.daemons.wait_pid_file(&old, run.deadline)?;
    if old.contained {
        run.warn(format!(
            "ovs-vswitchd runs outside of its container now, as process {0}; remedy, once there is a good image: \
             ovs-graceful restart --restart-command 'kill {0}; docker start NAME'",
            new.id.pid
        ));
    }
    run.known.new = Some(new);
    run.checkpoint()
}

/// What the unit, or ovs-ctl, starts.
fn start_installed(run: &mut Run) -> Result<(), Stop> {
    if matches!(run.known.start, Some(Start::Restart { .. })) && !run.known.start_ended {
        // The unit's restart waits for our word, and would keep another job waiting.
        match start_new_daemon(run) {
            // The word has reached it, or it has gone: then the unit is restarted as any other.
            Err(Stop::Failed { error, .. }) => run.warn(format!("{error:#}")),
            started => return started,
        }
    }
    let until = run.deadline;
    let old = run.old()?.clone();
    let Some(unit) = run.known.owner.clone() else {
        run.known.back = Some(run.host.daemons.start_like(&old)?);
        run.known.new = Some(run.host.daemons.wait_pid_file(&old, until)?);
        return run.checkpoint();
    };
    let mut job = run.host.services.start_job(&unit, JobKind::Restart, until)?;
    if run.known.switch_lock.is_some() {
        let_it_have_the_lock(run, job.as_mut())?;
    }
    match job.wait(until)?.as_deref() {
        Some("done") => {}
        other => return Err(bail_start(&unit, other).into()),
    }
    let started = run.host.services.unit(&unit, until)?.context("the unit has vanished")?;
    run.known.new = Some(run.host.daemons.describe(DaemonKind::OvsVswitchd, started.main_pid)?);
    run.checkpoint()
}

/// The unit's start ends when the daemon has taken over, for which it needs the lock.
fn let_it_have_the_lock(run: &mut Run, job: &mut dyn Job) -> Result<(), Stop> {
    let old = run.old()?.clone();
    run.wait_for("the PID file of ovs-vswitchd", |run| {
        run.known.new = look_for_new_daemon(run, &old)?;
        // A start that has failed is told by its job.
        Ok(run.known.new.is_some() || job.wait(run.now())?.is_some())
    })?;
    if run.known.new.is_none() {
        run.known.switch_lock = None;
        return Ok(());
    }
    wait_until_it_listens(run)?;
    tunnels::adopt(run)
}

fn bail_start(unit: &str, result: Option<&str>) -> anyhow::Error {
    anyhow!("starting {unit} again ended as `{}`; see `journalctl -u {unit}`", result.unwrap_or("not ended in time"))
}

/// The service manager owns the daemon, and nothing of the start is left. The daemon forwards already: what does not
/// work is told.
fn finish(run: &mut Run) -> Result<(), Stop> {
    let new = run.new_daemon()?.clone();
    let until = run.deadline;
    if let Err(error) = run.host.daemons.settle_pid_file(&new) {
        run.warn(format!("{error}"));
    }
    if let Some(mut start) = run.known.back.take() {
        match start.wait(until) {
            Ok(true) => {}
            Ok(false) => run.warn("the command that started ovs-vswitchd has not ended"),
            Err(error) => run.warn(format!("{error}")),
        }
    }
    if let Some(Start::Unit { unit, mut job, mut link }) = run.known.start.take() {
        let told = link.send(HookCommand::Finish).or_else(|_| link.send(HookCommand::Finish));
        let told = told.context("the reload hook has gone");
        let ended = told.and_then(|()| wait_job(run, job.as_mut(), &unit, until));
        release_unit(run, &unit, until)?;
        if let Err(error) = ended {
            run.warn(format!("{error:#}"));
        }
    }
    // One that was killed in between, and started by its unit again, may have left what misleads this one.
    for lost in features::lost(run) {
        run.warn(format!("{lost}; remedy: ovs-graceful restart"));
    }
    look_at_rules(run, &new);
    log_levels::put_back(run);
    by_hand::tell(run);
    look_at_devices(run);
    match run.host.daemons.is_alive(new.id) {
        true => Ok(()),
        false => Err(anyhow!("ovs-vswitchd (process {}) has ended", new.id.pid).into()),
    }
}

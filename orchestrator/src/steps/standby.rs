//! Standby: the new ovs-vswitchd is started while the old one forwards, reads the database, and is stopped before it
//! could take the lock.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context};

use super::arm::no_other_job;
use super::{database_disk, devices, tunnels, Ended, Run, Start, Step, Stop};
use crate::config::Config;
use crate::control::{Hook, HookCommand, HookEvent};
use crate::host::real::procfs::own_program;
use crate::host::{Daemon, HandOver, Job, JobKind, Signal};
use crate::machine::{Event, Phase};
use crate::report::Strategy;

/// A reload hook connects within this, if there is one.
const UNSEEN_HOOK: Duration = Duration::from_secs(1);
/// A daemon writes its PID file before it reads the database; TCG makes that half a second.
const UNSEEN: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Between two looks at the old daemon and at systemd's job while a hook is waited for.
const HOOK_LOOK: Duration = Duration::from_millis(20);
/// After the command that has started its container: a start script may have the database to convert first.
const LATE_START: Duration = Duration::from_secs(20);

pub(super) struct Standby;

impl Step for Standby {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Standby)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        let until = run.deadline;
        database_disk::keep_ballast(run)?;
        run.host.database.set_restore_wait(&run.id, until).context("setting flow-restore-wait")?;
        run.restore_wait = Some(run.host.database.watch_restore_wait(until)?);
        prepare_start(run)?;
        if run.wish.strategy == Strategy::Standby {
            start_new_daemon(run)?;
            let new = run.new_daemon()?.clone();
            run.host.daemons.wait_standby(&new, until).context("the standby to wait for the database's lock")?;
            run.host.daemons.signal(new.id, Signal::Stop).context("stopping the standby")?;
            run.known.standby_stopped = true;
            let stale = tunnels::takes_tunnels_for_stale(run.report.to.ovs.as_deref());
            let policed = devices::policers(run);
            if stale || !policed.is_empty() {
                let adopted = run.host.datapath.adopt(new.id, stale, &policed);
                if stale {
                    adopted.context("keeping the tunnel ports and the policing")?;
                } else if let Err(error) = adopted {
                    run.warn(format!("{error}: policing is made anew, and packets may be lost"));
                }
            }
        }
        run.checkpoint()?;
        Ok(Event::Done)
    }

    fn undo(&self, run: &mut Run) -> Ended {
        let until = run.now() + run.config.limits.undo();
        run.host.datapath.adopted(Duration::ZERO)?;
        let old = run.old()?.clone();
        if let Some(new) = run.known.new.clone() {
            end_daemon(run, &new, until)?;
            run.known.standby_stopped = false;
            run.known.new = None;
        }
        cancel_start(run)?;
        end_unseen_daemon(run, until)?;
        run.host.daemons.settle_pid_file(&old)?;
        run.restore_wait = None;
        let id = run.id.clone();
        database_disk::write(run, until, |database| database.clear_restore_wait(&id, until))?;
        database_disk::tidy(run);
        Ok(Event::Done)
    }
}

/// Sees a daemon to its end that is not wanted any more, if it lives.
pub(super) fn end_daemon(run: &Run, daemon: &Daemon, until: Instant) -> Result<(), Stop> {
    if run.host.daemons.is_alive(daemon.id) {
        run.host.daemons.signal(daemon.id, Signal::Kill)?;
        run.host.daemons.wait_end(daemon.id, until)?;
    }
    Ok(run.host.daemons.end_monitor(daemon, until)?)
}

/// Ends a daemon that was being started when the step ended, before its PID file told of it. Left alone it would wait
/// for the database's lock and destroy the bridges when it gets it (hazards 17). May be done twice.
pub(super) fn end_unseen_daemon(run: &mut Run, until: Instant) -> Result<(), Stop> {
    if !run.known.unseen {
        return Ok(());
    }
    let old = run.old()?.clone();
    let look = |until| run.host.daemons.wait_pid_file(&old, until);
    let found = match look(until.min(run.now() + UNSEEN)) {
        // A PID file that one has left which died, perhaps: asked once more, it says so again.
        Err(error) if !error.timed_out => look(until.min(run.now() + UNSEEN)),
        // The time may have passed without a look.
        Err(_) => look(run.now()),
        found => found,
    };
    if let Ok(new) = found {
        end_daemon(run, &new, until)?;
    }
    run.known.unseen = false;
    Ok(())
}

/// Gets a place to start the new daemon from: the unit's cgroup, by way of its reload hook.
fn prepare_start(run: &mut Run) -> Result<(), Stop> {
    let until = run.deadline;
    if run.wish.elsewhere {
        let link = wait_hook(run, "the starter of the new ovs-vswitchd to connect", None)?;
        run.known.start = Some(Start::Elsewhere { link, runs: false, done: None });
        return run.checkpoint();
    }
    let old = run.old()?.clone();
    let services = &run.host.services;
    let Some(unit) = services.owner(&old, until)? else { return Ok(()) };
    let called_by_it = run.wish.called_by.as_ref() == Some(&unit.name);
    if called_by_it && run.wish.strategy != Strategy::Standby {
        return prepare_restart(run, unit.name);
    }
    run.known.unit = Some(unit.name.clone());
    let hand_over = HandOver {
        unit: unit.name.clone(),
        pid_file: old.pid_file.clone(),
        hook: [own_program()?.as_str(), "hook", "reload", "--"].map(str::to_owned).to_vec(),
        limit_s: run.config.longest_run().as_secs() + 60,
    };
    services.prepare_hand_over(&hand_over, until).context("preparing the unit's reload")?;
    no_other_job(run)?;
    let mut job = match called_by_it {
        true => services.job_of(&unit.name, until)?.with_context(|| format!("{} is not being reloaded", unit.name))?,
        false => services.start_job(&unit.name, JobKind::Reload, until).context("asking systemd for a reload")?,
    };
    let what = format!("the reload hook of {} to connect; see `journalctl -u {}`", unit.name, unit.name);
    let link = wait_hook(run, &what, Some(job.as_mut()))?;
    run.known.start = Some(Start::Unit { unit: unit.name, job, link });
    run.checkpoint()
}

/// Waits for the process that the unit's `job` starts, as long as the old daemon lives and the job has not ended.
fn wait_hook(run: &mut Run, what: &str, mut job: Option<&mut dyn Job>) -> Result<Box<dyn Hook>, Stop> {
    let mut link = None;
    run.wait_for(what, |run| {
        link = run.control.wait_hook(run.now() + HOOK_LOOK);
        if let (None, Some(job)) = (&link, job.as_mut()) {
            if let Some(ended) = job.wait(run.now())? {
                // It may have connected just before its end.
                link = run.control.wait_hook(run.now());
                if link.is_none() {
                    return Err(anyhow!("systemd's job ended as {ended}, and nobody connected: {what}").into());
                }
            }
        }
        Ok(link.is_some())
    })?;
    Ok(link.context("the hook has vanished")?)
}

/// The unit is being restarted, and its ExecStop= waits for us.
fn prepare_restart(run: &mut Run, unit: String) -> Result<(), Stop> {
    let until = run.deadline;
    let mut job = run.host.services.job_of(&unit, until)?.with_context(|| format!("{unit} is not being restarted"))?;
    let link = wait_hook(run, &format!("ExecStop= of {unit} to connect"), Some(job.as_mut()))?;
    run.known.start = Some(Start::Restart { unit, job, link });
    run.checkpoint()
}

/// Starts the new daemon as its unit or ovs-ctl would, under the old one's PID file name.
pub(super) fn start_new_daemon(run: &mut Run) -> Result<(), Stop> {
    let old = run.old()?.clone();
    // A daemon that has ended has taken its PID file along.
    let beside_the_old = run.host.daemons.is_alive(old.id);
    if beside_the_old {
        run.host.daemons.set_aside_pid_file(&old)?;
    }
    run.known.unseen = true;
    match &mut run.known.start {
        Some(Start::Unit { link, .. } | Start::Restart { link, .. }) => link.send(HookCommand::Start)?,
        // He was told before the old one ended.
        Some(Start::Elsewhere { .. }) => {}
        _ => run.known.start = Some(Start::Own(run.host.daemons.start_like(&old)?)),
    }
    let new = wait_for_new_daemon(run, &old)?;
    run.known.new = Some(new.clone());
    run.known.unseen = false;
    run.host.datapath.watch_standby(new.id)?;
    if beside_the_old {
        run.host.daemons.swap_pid_file(&old, &new)?;
    }
    wait_until_it_listens(run)?;
    tunnels::adopt(run)
}

/// A daemon that has written its PID file has its control socket a moment later.
pub(super) fn wait_until_it_listens(run: &mut Run) -> Result<(), Stop> {
    let new = run.new_daemon()?.clone();
    run.wait_for("the new ovs-vswitchd to listen", |run| Ok(run.host.daemons.listens(&new)))
}

/// The new daemon's PID file tells of it; a start that has failed is not waited for.
fn wait_for_new_daemon(run: &mut Run, old: &Daemon) -> Result<Daemon, Stop> {
    let mut new = None;
    run.wait_for("the PID file of the new ovs-vswitchd", |run| {
        start_has_not_failed(run)?;
        if others_done_for(run).is_some_and(|time| time >= LATE_START) {
            return Err(anyhow!("the command is done, and no ovs-vswitchd has come up; see the container's log").into());
        }
        new = look_for_new_daemon(run, old)?;
        Ok(new.is_some())
    })?;
    Ok(new.context("the new ovs-vswitchd has vanished")?)
}

/// One look at the PID file, which tells of a daemon that is not `old`; our place before it is kept.
pub(super) fn look_for_new_daemon(run: &mut Run, old: &Daemon) -> Result<Option<Daemon>, Stop> {
    tunnels::keep_place(run);
    match run.host.daemons.wait_pid_file(old, run.now()) {
        Ok(daemon) => Ok(Some(daemon)),
        Err(error) if error.timed_out => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn start_has_not_failed(run: &mut Run) -> Result<(), Stop> {
    let now = run.now();
    match &mut run.known.start {
        Some(Start::Unit { link, .. }) => match link.recv(now) {
            Some(HookEvent::ChildExited { status: 0 }) => run.known.start_ended = true,
            Some(HookEvent::ChildExited { status }) => return Err(ended_badly(status).into()),
            Some(HookEvent::Closed) => return Err(anyhow!("the reload hook has gone").into()),
            Some(HookEvent::Connected { .. } | HookEvent::Spawned { .. }) | None => {}
        },
        // ExecStop= has ended well, or it would not have said so before it went.
        Some(Start::Restart { link, .. }) => match link.recv(now) {
            Some(HookEvent::ChildExited { status: 0 }) => run.known.start_ended = true,
            Some(HookEvent::Closed) if !run.known.start_ended => return Err(anyhow!("ExecStop= has gone").into()),
            _ => {}
        },
        Some(Start::Elsewhere { link, runs, done }) => match link.recv(now) {
            Some(HookEvent::Spawned { .. }) => *runs = true,
            Some(HookEvent::ChildExited { status: 0 }) => {
                run.known.start_ended = true;
                *done = runs.then_some(now);
            }
            Some(HookEvent::ChildExited { status }) => {
                return Err(
                    anyhow!("the command that was to start the new ovs-vswitchd ended with status {status}").into()
                )
            }
            // A command that runs goes on where whoever waits for its end has been interrupted.
            Some(HookEvent::Closed) if !run.known.start_ended && !*runs => {
                return Err(anyhow!("whoever was to start the new ovs-vswitchd has gone").into())
            }
            _ => {}
        },
        Some(Start::Own(start)) => {
            start.wait(now)?;
        }
        None => {}
    }
    Ok(())
}

/// Tells whoever restarts the daemons elsewhere that their time has come.
pub(super) fn let_others_restart(run: &mut Run) -> Result<(), Stop> {
    match &mut run.known.start {
        Some(Start::Elsewhere { link, .. }) => {
            Ok(link.send(HookCommand::Start).context("whoever was to restart ovs-vswitchd has gone")?)
        }
        _ => Err(anyhow!("nobody is there who restarts ovs-vswitchd").into()),
    }
}

/// For how long somebody else's command, where he has one, has been done.
pub(super) fn others_done_for(run: &Run) -> Option<Duration> {
    match &run.known.start {
        Some(Start::Elsewhere { done, .. }) => done.map(|done| run.now().saturating_duration_since(done)),
        _ => None,
    }
}

fn ended_badly(status: i32) -> anyhow::Error {
    anyhow!("ovs-ctl ended with status {status}; see its log and that of ovs-vswitchd")
}

/// Waits for the starting command to end well, so that the service manager owns the new daemon.
pub(super) fn finish_start(run: &mut Run) -> Result<(), Stop> {
    let until = run.deadline;
    match run.known.start.take() {
        Some(Start::Unit { unit, mut job, mut link }) => {
            let ended = end_start(run, job.as_mut(), link.as_mut(), &unit, until);
            // Whatever came of it, the unit goes back to what the package wrote.
            release_unit(run, &unit, until)?;
            ended?;
        }
        Some(Start::Restart { unit, mut job, .. }) => wait_job(run, job.as_mut(), &unit, until)?,
        Some(Start::Elsewhere { .. }) => learn_what_came(run)?,
        Some(Start::Own(mut start)) => {
            start.wait(until)?;
        }
        None => {}
    }
    Ok(())
}

/// Which version it would be was not known before.
fn learn_what_came(run: &mut Run) -> Result<(), Stop> {
    let new = run.new_daemon()?.clone();
    match run.host.daemons.running_version(&new, run.deadline) {
        Ok(version) => run.report.to.ovs = Some(version),
        Err(error) => run.warn(format!("which version runs now is not known: {error}")),
    }
    Ok(())
}

fn end_start(run: &mut Run, job: &mut dyn Job, link: &mut dyn Hook, unit: &str, until: Instant) -> Result<(), Stop> {
    wait_for_child(run, link)?;
    link.send(HookCommand::Finish)?;
    Ok(wait_job(run, job, unit, until)?)
}

pub(super) fn wait_job(run: &Run, job: &mut dyn Job, unit: &str, until: Instant) -> anyhow::Result<()> {
    match job.wait(until)?.as_deref() {
        Some("done") => Ok(()),
        // Whoever restarts the unit meanwhile makes a restart of our reload; where our own ExecStop= takes that back, the
        // unit's command still ends and hands over, job or no job.
        Some("canceled") => wait_owned(run, unit, until),
        Some(result) => bail!("the job of {unit} ended as `{result}`; see `journalctl -u {unit}`"),
        None => bail!("the job of {unit} has not ended in time"),
    }
}

fn wait_owned(run: &Run, unit: &str, until: Instant) -> anyhow::Result<()> {
    let new = run.known.new.as_ref().context("there is no new daemon")?;
    while run.now() < until {
        let now = run.host.services.unit(unit, until)?;
        if now.is_some_and(|unit| unit.active_state == "active" && unit.main_pid == new.id.pid) {
            return Ok(());
        }
        run.host.clock.sleep(LOOK_AGAIN);
    }
    bail!("the job of {unit} was taken back, and the unit does not own the new daemon; see `systemctl status {unit}`")
}

fn wait_for_child(run: &mut Run, link: &mut dyn Hook) -> Result<(), Stop> {
    if run.known.start_ended {
        return Ok(());
    }
    run.wait_for("ovs-ctl to end", |run| match link.recv(run.now()) {
        Some(HookEvent::ChildExited { status: 0 }) => Ok(true),
        Some(HookEvent::ChildExited { status }) => Err(ended_badly(status).into()),
        Some(HookEvent::Closed) => Err(anyhow!("the reload hook has gone").into()),
        Some(HookEvent::Connected { .. } | HookEvent::Spawned { .. }) | None => Ok(false),
    })
}

/// Ends a start that is not wanted any more.
pub(super) fn cancel_start(run: &mut Run) -> Result<(), Stop> {
    let until = run.now() + run.config.limits.undo();
    match run.known.start.take() {
        Some(Start::Unit { unit, mut job, mut link }) => {
            let _gone_is_fine = link.send(HookCommand::Cancel);
            job.wait(until)?;
            release_unit(run, &unit, until)?;
        }
        // It goes on when the run has ended.
        Some(restart @ Start::Restart { .. }) => run.known.start = Some(restart),
        Some(Start::Own(mut start)) => start.cancel(),
        Some(Start::Elsewhere { mut link, .. }) => {
            let _gone_is_fine = link.send(HookCommand::Cancel);
        }
        None => {
            if let Some(unit) = run.known.unit.clone() {
                // A reload may be under way whose beginning was not told.
                if let Some(mut link) = run.control.wait_hook(until.min(run.now() + UNSEEN_HOOK)) {
                    let _gone_is_fine = link.send(HookCommand::Cancel);
                }
                release_unit(run, &unit, until)?;
            }
        }
    }
    Ok(())
}

/// The unit goes back to what the package wrote.
pub(super) fn release_unit(run: &mut Run, unit: &str, until: Instant) -> Result<(), Stop> {
    run.host.services.end_hand_over(unit, until)?;
    run.known.unit = None;
    Ok(())
}

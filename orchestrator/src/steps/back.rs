//! Back: an ovs-vswitchd on the database as it is, bound, and the parked packets replayed, after something went wrong
//! past the point of no return.

use std::time::Duration;

use anyhow::Context;

use super::handover::let_it_bind;
use super::standby::cancel_start;
use super::{classes, Ended, Run, Start, Stop};
use crate::host::{DaemonKind, JobKind, Signal};
use crate::machine::Event;
use dpfreeze::freeze::Classes;

/// Ends the daemon that did not come up and starts one in its place. May be done twice.
pub fn go_back(run: &mut Run) -> Ended {
    if run.host.datapath.is_armed() {
        // Whoever comes may bind; what it would flush or delete before it is ready stays.
        run.host.datapath.refuse(classes::switching() - Classes::UPCALL_BIND)?;
    }
    end_new_daemon(run)?;
    // Hazards 1: it may have been bound already.
    if run.host.datapath.retake_upcalls().context("taking the upcalls back")? {
        run.known.gap_began = Some(Instant::now());
    }
    cancel_start(run)?;
    let until = run.deadline;
    run.host.database.set_restore_wait(&run.id, until).or_else(|error| already_set(run, error))?;
    start_again(run)?;
    super::restore::restore(run)?;
    let_it_bind(run)?;
    Ok(Event::Done)
}

fn already_set(run: &Run, error: crate::host::HostError) -> Result<i64, crate::host::HostError> {
    match run.host.database.facts(run.deadline)?.is_on("flow-restore-wait") {
        true => Ok(0),
        false => Err(error),
    }
}

fn end_new_daemon(run: &mut Run) -> Result<(), Stop> {
    let Some(new) = run.known.new.take() else { return Ok(()) };
    run.known.standby_stopped = false;
    if run.host.daemons.is_alive(new.id) {
        run.host.daemons.signal(new.id, Signal::Kill)?;
        run.host.daemons.wait_end(new.id, run.now() + Duration::from_secs(5))?;
    }
    Ok(())
}

/// As the service manager would, or as the old one was started.
fn start_again(run: &mut Run) -> Result<(), Stop> {
    let until = run.deadline;
    let old = run.old()?.clone();
    let Some(unit) = run.known.unit.clone() else {
        run.known.start = Some(Start::Own(run.host.daemons.start_like(&old)?));
        run.known.new = Some(run.host.daemons.wait_pid_file(&old, until)?);
        return run.checkpoint();
    };
    let services = &run.host.services;
    let mut job = services.start_job(&unit, JobKind::Restart, until)?;
    match job.wait(until)?.as_deref() {
        Some("done") => {}
        other => return Err(bail_start(&unit, other).into()),
    }
    let started = services.unit(&unit, until)?.context("the unit has vanished")?;
    run.known.new = Some(run.host.daemons.describe(DaemonKind::OvsVswitchd, started.main_pid)?);
    run.checkpoint()
}

fn bail_start(unit: &str, result: Option<&str>) -> anyhow::Error {
    anyhow::anyhow!(
        "starting {unit} again ended as `{}`; see `journalctl -u {unit}`",
        result.unwrap_or("not ended in time")
    )
}

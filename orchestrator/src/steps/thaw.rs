//! Thaw: whatever happened, nothing stays frozen, and no flag of ours stays in the database.

use anyhow::Context;

use super::handover::it_binds;
use super::standby::{cancel_start, release_unit, wait_job};
use super::{database_disk, Ended, Run, Start, Stop};
use crate::control::HookCommand;
use crate::host::{Cleared, Daemon, HostError};
use crate::machine::Event;

/// Lifts every freeze. May be done twice.
pub fn thaw(run: &mut Run) -> Ended {
    super::guard::widen(run);
    run.host.datapath.thaw()?;
    run.restore_wait = None;
    clear(run)?;
    if run.known.facts.has_ovn_wait() {
        if let Err(error) = run.host.database.return_ovn_wait(run.now() + run.config.limits.undo()) {
            run.warn(format!(
                "the flow-restore-wait of ovn-controller is not put back, which sets it by itself: {error}"
            ));
        }
    }
    database_disk::tidy(run);
    let_start_go(run)?;
    Ok(Event::Done)
}

/// The flag goes. Where the disk of the database does not let it, and the daemon that waits for that is the only one, it is
/// tried as long as that one lives: what is parked meanwhile stays parked, until it is bound.
fn clear(run: &mut Run) -> Result<(), Stop> {
    let mut told = false;
    let cleared = loop {
        let until = run.now() + run.config.limits.undo();
        let id = run.id.clone();
        match database_disk::write(run, until, |database| database.clear_all(&id, until)) {
            Err(Stop::Failed { error, .. }) if is_of_disk(&error) && nobody_is_bound(run) => {
                if !std::mem::replace(&mut told, true) {
                    run.warn(format!(
                        "{error:#}: nobody is bound; the upcalls stay parked until flow-restore-wait is gone"
                    ));
                }
            }
            cleared => break cleared?,
        }
    };
    if let (Cleared::Removed { next_cfg }, true) = (cleared, nobody_is_bound(run)) {
        run.known.next_cfg = Some(next_cfg);
        run.deadline = run.now() + run.config.limits.undo();
        match it_binds(run) {
            Err(Stop::Failed { error, .. }) => run.warn(format!("{error:#}")),
            Err(Stop::TimedOut(what)) => run.warn(format!("waited too long for {what}")),
            bound => bound?,
        }
    }
    Ok(())
}

fn is_of_disk(error: &anyhow::Error) -> bool {
    error.downcast_ref::<HostError>().is_some_and(|error| error.unwritable)
}

/// The upcalls are ours, and only the new daemon is there to take them over.
fn nobody_is_bound(run: &Run) -> bool {
    let lives = |daemon: &Option<Daemon>| daemon.as_ref().is_some_and(|one| run.host.daemons.is_alive(one.id));
    run.known.gap_began.is_some() && lives(&run.known.new) && !lives(&run.known.old)
}

/// A start that Settle did not come to end: where its daemon lives the service manager is to own it, and the unit goes
/// back to what the package wrote in any case.
fn let_start_go(run: &mut Run) -> Result<(), Stop> {
    let lives = |daemon: &Option<Daemon>| daemon.as_ref().is_some_and(|one| run.host.daemons.is_alive(one.id));
    if !lives(&run.known.new) || lives(&run.known.old) {
        return cancel_start(run);
    }
    let until = run.now() + run.config.limits.undo();
    let ended = match run.known.start.take() {
        Some(Start::Unit { unit, mut job, mut link }) => {
            let told = link.send(HookCommand::Finish).context("the reload hook has gone");
            told.and_then(|()| wait_job(run, job.as_mut(), &unit, until))
        }
        Some(Start::Restart { unit, mut job, .. }) => wait_job(run, job.as_mut(), &unit, until),
        Some(Start::Own(_) | Start::Elsewhere { .. }) | None => Ok(()),
    };
    if let Err(error) = ended {
        run.warn(format!("{error:#}"));
    }
    run.known.unit.clone().map_or(Ok(()), |unit| release_unit(run, &unit, until))
}

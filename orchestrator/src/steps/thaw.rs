//! Thaw: whatever happened, nothing stays frozen, and no flag of ours stays in the database.

use anyhow::Context;

use super::standby::{cancel_start, release_unit, wait_job};
use super::{Ended, Run, Start, Stop};
use crate::control::HookCommand;
use crate::host::Daemon;
use crate::machine::Event;

/// Lifts every freeze. May be done twice.
pub fn thaw(run: &mut Run) -> Ended {
    super::guard::widen(run);
    run.host.datapath.thaw()?;
    run.restore_wait = None;
    let until = run.now() + run.config.limits.undo();
    run.host.database.clear_all(&run.id, until)?;
    let_start_go(run)?;
    Ok(Event::Done)
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

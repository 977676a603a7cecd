//! Thaw: whatever happened, nothing stays frozen, and no flag of ours stays in the database.

use super::{Ended, Run};
use crate::machine::Event;

/// Lifts every freeze. May be done twice.
pub fn thaw(run: &mut Run) -> Ended {
    super::guard::widen(run);
    run.host.datapath.thaw()?;
    run.restore_wait = None;
    let until = run.now() + run.config.limits.undo();
    run.host.database.clear_restore_wait(&run.id, until)?;
    Ok(Event::Done)
}

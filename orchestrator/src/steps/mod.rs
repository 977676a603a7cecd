//! The steps of a run, one file each: what it does, how it is undone, and how long it may take.
//!
//! A step may be done twice and may be cut off half-done; an undo looks at what is there, not at what should be.

mod arm;
mod back;
mod bridges;
pub(crate) mod by_hand;
mod check;
mod classes;
mod database_disk;
mod devices;
mod features;
mod gates;
mod guard;
mod handover;
pub(crate) mod log_levels;
pub(crate) mod notes;
mod policies;
mod ports;
mod reload;
mod remembered;
mod restore;
mod run;
mod settle;
mod snapshot;
mod standby;
mod switch_commit;
mod switch_prepare;
mod thaw;
mod tunnels;
mod verify;

use std::time::Duration;

use crate::config::Config;
use crate::machine::Phase;

pub use back::go_back;
pub(crate) use back::make_ready_for_a_daemon;
pub(crate) use devices::{losses, mtus_put_back};
pub use run::{Ended, Host, Known, Run, Start, Stop, Wish};
pub use thaw::thaw;

/// One step: its do, its undo and its time limit.
pub trait Step {
    /// How long it may take.
    fn limit(&self, config: &Config) -> Duration;
    /// Does it.
    fn perform(&self, run: &mut Run) -> Ended;
    /// Undoes it, whatever part of it was done. Steps past the point of no return have nothing to undo.
    fn undo(&self, _run: &mut Run) -> Ended {
        Ok(crate::machine::Event::Done)
    }
}

/// The step of a phase.
pub fn step(phase: Phase) -> &'static dyn Step {
    match phase {
        Phase::Check => &check::Check,
        Phase::Snapshot => &snapshot::Snapshot,
        Phase::Arm => &arm::Arm,
        Phase::Standby => &standby::Standby,
        Phase::SwitchPrepare => &switch_prepare::SwitchPrepare,
        Phase::SwitchCommit => &switch_commit::SwitchCommit,
        Phase::Restore => &restore::Restore,
        Phase::Handover => &handover::Handover,
        Phase::Gates => &gates::Gates,
        Phase::Settle => &settle::Settle,
        Phase::Verify => &verify::Verify,
    }
}

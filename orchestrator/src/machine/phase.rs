//! The phases of a run, in their order.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A phase of the run, in the order of `design.md`, "The run".
///
/// The phase Switch is two here, because the point of no return lies inside it: everything up to and including
/// [`Phase::SwitchPrepare`] can be undone, everything from [`Phase::SwitchCommit`] on goes forward or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Can this host do it? Touches nothing.
    Check,
    /// What the datapath, conntrack and OpenFlow hold now.
    Snapshot,
    /// The freeze and its lease; ovsdb-server replaced if asked.
    Arm,
    /// flow-restore-wait set, the new ovs-vswitchd started, waiting for the lock, stopped by SIGSTOP.
    Standby,
    /// Upcalls bound to the supervisor, the old daemon's queues drained, OpenFlow changes taken in.
    SwitchPrepare,
    /// SIGCONT to the new daemon, SIGTERM to the old one.
    SwitchCommit,
    /// OpenFlow, meters, groups, TLV maps and FDB put into the new daemon.
    Restore,
    /// restore-wait removed, doomed flows removed, upcalls bound to the new daemon, parked packets replayed.
    Handover,
    /// Every bridge's rules are there; the operator's gate command.
    Gates,
    /// DEL and SET let go, two full revalidations, thaw.
    Settle,
    /// Before against after.
    Verify,
}

impl Phase {
    /// Every phase, first to last.
    pub const ALL: [Phase; 11] = [
        Phase::Check,
        Phase::Snapshot,
        Phase::Arm,
        Phase::Standby,
        Phase::SwitchPrepare,
        Phase::SwitchCommit,
        Phase::Restore,
        Phase::Handover,
        Phase::Gates,
        Phase::Settle,
        Phase::Verify,
    ];

    /// The phase after this one; `None` after Verify.
    pub fn next(self) -> Option<Phase> {
        Phase::ALL.get(self as usize + 1).copied()
    }

    /// The phase before this one; `None` before Check.
    pub fn previous(self) -> Option<Phase> {
        (self as usize).checked_sub(1).and_then(|i| Phase::ALL.get(i).copied())
    }

    /// True from the moment on when the old daemon may have been told to end.
    pub fn past_no_return(self) -> bool {
        self >= Phase::SwitchCommit
    }

    /// The name shown to people and written to the report: both halves of Switch are `switch`.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Check => "check",
            Phase::Snapshot => "snapshot",
            Phase::Arm => "arm",
            Phase::Standby => "standby",
            Phase::SwitchPrepare | Phase::SwitchCommit => "switch",
            Phase::Restore => "restore",
            Phase::Handover => "handover",
            Phase::Gates => "gates",
            Phase::Settle => "settle",
            Phase::Verify => "verify",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

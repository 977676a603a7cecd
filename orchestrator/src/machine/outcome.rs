//! How a run ended.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Phase;

/// The exit codes of `ovs-graceful` (design.md, "The command line"). Usage errors (2) are clap's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
#[repr(u8)]
pub enum ExitCode {
    /// Done.
    Done = 0,
    /// Check refused; nothing was touched.
    Refused = 10,
    /// Another run holds the lock.
    Busy = 11,
    /// Failed or aborted before the point of no return; undone; traffic untouched.
    Undone = 20,
    /// Failed after the point of no return; an ovs-vswitchd runs again, with its rules.
    Back = 21,
    /// Done, but verification found differences.
    Differences = 30,
    /// Needs a person.
    NeedsPerson = 40,
}

impl ExitCode {
    /// Every code, in order.
    pub const ALL: [ExitCode; 7] = [
        ExitCode::Done,
        ExitCode::Refused,
        ExitCode::Busy,
        ExitCode::Undone,
        ExitCode::Back,
        ExitCode::Differences,
        ExitCode::NeedsPerson,
    ];

    /// The number that the process exits with.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The word of the report's `result`.
    pub fn result(self) -> &'static str {
        match self {
            ExitCode::Done => "done",
            ExitCode::Refused => "refused",
            ExitCode::Busy => "busy",
            ExitCode::Undone => "undone",
            ExitCode::Back => "back",
            ExitCode::Differences => "differences",
            ExitCode::NeedsPerson => "needs-person",
        }
    }
}

impl From<ExitCode> for u8 {
    fn from(code: ExitCode) -> u8 {
        code.code()
    }
}

impl TryFrom<u8> for ExitCode {
    type Error = String;

    fn try_from(code: u8) -> Result<ExitCode, String> {
        let known = ExitCode::ALL.into_iter().find(|known| known.code() == code);
        known.ok_or_else(|| format!("exit code {code} is none of 0, 10, 11, 20, 21, 30, 40"))
    }
}

/// What turned the run from its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The step reported an error.
    Failed,
    /// The step did not end within its time limit.
    TimedOut,
    /// Somebody asked for it (Ctrl-C, `ovs-graceful abort`).
    Aborted,
    /// The freeze ran out before the run let go of it.
    LeaseLost,
    /// A process that is neither ours nor the standby bound the upcalls.
    BoundByOther,
    /// Somebody else removed flow-restore-wait.
    RestoreWaitRemoved,
    /// The new ovs-vswitchd died.
    NewDaemonDied,
    /// The old ovs-vswitchd died by itself.
    OldDaemonDied,
    /// Something is not as it was before.
    Differences,
    /// An undo failed.
    UndoFailed,
    /// The supervisor of the run was cut off; this one picked it up.
    Interrupted,
}

impl Cause {
    fn words(self) -> &'static str {
        match self {
            Cause::Failed => "failed",
            Cause::TimedOut => "did not end within its time limit",
            Cause::Aborted => "was aborted on request",
            Cause::LeaseLost => "saw the freeze end before it should",
            Cause::BoundByOther => "saw another process bind the upcalls",
            Cause::RestoreWaitRemoved => "saw somebody else remove flow-restore-wait",
            Cause::NewDaemonDied => "saw the new ovs-vswitchd die",
            Cause::OldDaemonDied => "saw the old ovs-vswitchd die by itself",
            Cause::Differences => "found differences",
            Cause::UndoFailed => "could not be undone",
            Cause::Interrupted => "was cut off",
        }
    }
}

/// A cause and the phase it came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Why {
    /// The phase under way.
    pub phase: Phase,
    /// What happened in it.
    pub cause: Cause,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.phase, self.cause.words())
    }
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Outcome {
    /// What the process exits with.
    pub exit_code: ExitCode,
    /// One sentence for people. The step's own error says more; the supervisor puts it beside this.
    pub reason: String,
}

//! The messages of the socket.

use std::io::{self, BufRead, Read, Write};
use std::time::Instant;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::machine::Phase;
use crate::report::{Level, Report};

/// The longest line that the supervisor takes from a client, in bytes. Requests are short.
pub(super) const REQUEST_LINE: u64 = 64 * 1024;

/// The longest line that a client takes from the supervisor, in bytes. A report can be long.
pub(super) const EVENT_LINE: u64 = 16 * 1024 * 1024;

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub(super) enum Request {
    Subscribe,
    Status,
    Abort,
    Thaw,
    Hook,
    Spawned { pid: i32 },
    ChildExited { status: i32 },
}

/// What the supervisor answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub(super) enum Reply {
    Status(Status),
    Accepted,
    Refused { why: String },
    Over,
}

/// What the run tells everybody who subscribed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Progress {
    /// The run is this one.
    Hello {
        /// The run's id.
        id: String,
        /// The supervisor's process.
        pid: u32,
    },
    /// A phase has begun.
    PhaseBegun {
        /// Which.
        phase: Phase,
        /// Milliseconds from the start of the run.
        at_ms: u64,
    },
    /// A phase has ended.
    PhaseEnded {
        /// Which.
        phase: Phase,
        /// Milliseconds it took.
        duration_ms: u64,
        /// True where it did what it should.
        ok: bool,
    },
    /// From here on the run cannot be undone.
    PointOfNoReturn,
    /// A phase is being undone.
    Undoing {
        /// Which.
        phase: Phase,
    },
    /// The run goes back to the old version.
    GoingBack {
        /// Why.
        why: String,
    },
    /// Something worth a line.
    Note {
        /// The line.
        text: String,
    },
    /// Something that went wrong without ending the run.
    Warning {
        /// What, and what can be done about it.
        text: String,
    },
    /// The run is over.
    Finished {
        /// What the command exits with.
        exit_code: u8,
        /// The report of the run.
        report: Box<Report>,
    },
}

/// What the run is doing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The run's id.
    pub id: String,
    /// The supervisor's process.
    pub pid: u32,
    /// The phase under way; `None` before the first.
    pub phase: Option<Phase>,
    /// In words what it is doing: `doing`, `undoing`, `going back`, `finished`.
    pub doing: String,
    /// Milliseconds since the start of the run.
    pub elapsed_ms: u64,
    /// True while `abort` would undo it.
    pub can_abort: bool,
    /// True from the point of no return on.
    pub committed: bool,
    /// Milliseconds since the phase under way (or its undo, or the way back) began.
    pub phase_ms: Option<u64>,
    /// How long that may take at most, in milliseconds.
    pub limit_ms: Option<u64>,
    /// What the host can do, once Check has said so.
    pub level: Option<Level>,
    /// Packets parked now.
    pub parked: u64,
    /// The most that were parked at once.
    pub most_parked: u64,
    /// Packets that found no room and are lost.
    pub overflowed: u64,
    /// Milliseconds until the freeze ends by itself; `None` where nothing is frozen.
    pub lease_ms: Option<u64>,
}

/// What changes while a phase is under way, as the run knows it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Vitals {
    /// What the host can do, once Check has said so.
    pub level: Option<Level>,
    /// Packets parked now.
    pub parked: u64,
    /// The most that were parked at once.
    pub most_parked: u64,
    /// Packets that found no room and are lost.
    pub overflowed: u64,
    /// When the freeze ends by itself; `None` where nothing is frozen.
    pub frozen_until: Option<Instant>,
    /// When the step under way must have ended.
    pub deadline: Option<Instant>,
}

/// What became of a request to abort.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AbortAnswer {
    /// The run is being undone.
    Accepted,
    /// It is not.
    Refused {
        /// Why.
        why: String,
    },
    /// There is nothing left to undo: the end is being told to those who follow the run.
    Over,
}

/// What the supervisor tells the process that ExecReload started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum HookCommand {
    /// Spawn the daemon's command now.
    Start,
    /// The new daemon owns the unit's PID file: exit with 0.
    Finish,
    /// The run is undone: exit with 1.
    Cancel,
}

/// What the hook tells the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookEvent {
    /// The hook is there and waits.
    Connected {
        /// Its process, as the kernel says (`SO_PEERCRED`).
        pid: i32,
    },
    /// It has spawned the command.
    Spawned {
        /// The command's process (of `ovs-ctl`, not of the daemon).
        pid: i32,
    },
    /// The command has ended.
    ChildExited {
        /// Its exit status; 128 + signal where a signal ended it.
        status: i32,
    },
    /// The hook has gone; nothing more will come.
    Closed,
}

/// Reads one line and parses it. `None` at the end of the stream.
pub(super) fn read_line<T: DeserializeOwned>(stream: &mut impl BufRead, limit: u64) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    let read = stream.take(limit).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        let why = if read as u64 == limit { "line too long" } else { "line cut off" };
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    serde_json::from_slice(&line).map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// One line of JSON.
pub(super) fn to_line(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// Writes one line.
pub(super) fn write_line(stream: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    stream.write_all(&to_line(value)?)
}

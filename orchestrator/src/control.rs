//! The supervisor's socket, `/run/ovs-graceful/run.sock`: newline-delimited JSON, root only.
//!
//! ```text
//! client                               supervisor
//!   {"op":"subscribe"}            ──▶   every progress event so far, then each as it comes
//!   {"op":"status"}               ──▶   {"reply":"status",…}
//!   {"op":"abort"}                ──▶   {"reply":"accepted"} or {"reply":"refused","why":…}
//!   {"op":"thaw"}                 ──▶   {"reply":"accepted"}
//! hook reload (in the unit's cgroup)
//!   {"op":"hook"}                 ──▶   {"command":"start"} … {"command":"finish"} or {"command":"cancel"}
//!   {"op":"spawned","pid":N}
//!   {"op":"child-exited","status":N}
//! ```
//!
//! Nothing a client does can hold the run up: each client has a thread of its own and a bounded queue, and one that
//! does not read is dropped.

mod client;
mod gate;
mod lock;
mod protocol;
mod server;
#[cfg(test)]
mod tests;

pub use client::{Connection, HookClient, HookReporter, Subscription};
pub use gate::{AbortGate, TooLate};
pub use lock::{Holder, LockError, RunLock};
pub use protocol::{AbortAnswer, HookCommand, HookEvent, Progress, Status};
pub use server::{HookLink, Server};

/// Where the supervisor listens.
pub const SOCKET: &str = "/run/ovs-graceful/run.sock";

/// The lock of the run under way.
pub const LOCK: &str = "/run/ovs-graceful/lock";

/// The directory of both.
pub const RUN_DIR: &str = "/run/ovs-graceful";

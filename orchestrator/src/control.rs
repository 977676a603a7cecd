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
pub use lock::{Holder, LockError, RunLock, PLAIN};
pub use protocol::{AbortAnswer, HookCommand, HookEvent, Progress, Status, Vitals};
pub use server::{HookLink, Server};

use std::io;
use std::time::{Duration, Instant};

/// Where the supervisor listens.
pub const SOCKET: &str = "/run/ovs-graceful/run.sock";

/// The lock of the run under way.
pub const LOCK: &str = "/run/ovs-graceful/lock";

/// The directory of both.
pub const RUN_DIR: &str = "/run/ovs-graceful";

/// The supervisor's end of its socket, as a run sees it.
pub trait Control: Send {
    /// Decides between abort and point of no return.
    fn gate(&self) -> &AbortGate;
    /// Tells everybody who listens. Never blocks.
    fn tell(&self, progress: &Progress);
    /// What `status` answers beyond what was [told](Control::tell). Never blocks.
    fn update(&self, vitals: &Vitals);
    /// Waits for a `hook reload` to connect; `None` where `until` passes first.
    fn wait_hook(&self, until: Instant) -> Option<Box<dyn Hook>>;
    /// Stops listening once all is told, after `patience` at the latest.
    fn close(self: Box<Self>, patience: Duration);
}

/// The `hook reload` process that waits in the unit's cgroup. One that nobody talks to any more ends.
pub trait Hook: Send {
    /// Tells it what to do. An error means that it has gone.
    fn send(&mut self, command: HookCommand) -> io::Result<()>;
    /// What it says next; `None` where `until` passes first.
    fn recv(&mut self, until: Instant) -> Option<HookEvent>;
}

impl Control for Server {
    fn gate(&self) -> &AbortGate {
        Server::gate(self)
    }

    fn tell(&self, progress: &Progress) {
        Server::tell(self, progress);
    }

    fn update(&self, vitals: &Vitals) {
        Server::update(self, vitals);
    }

    fn wait_hook(&self, until: Instant) -> Option<Box<dyn Hook>> {
        Server::wait_hook(self, until).map(|link| Box::new(link) as Box<dyn Hook>)
    }

    fn close(self: Box<Self>, patience: Duration) {
        Server::close(*self, patience);
    }
}

impl Hook for HookLink {
    fn send(&mut self, command: HookCommand) -> io::Result<()> {
        HookLink::send(self, command)
    }

    fn recv(&mut self, until: Instant) -> Option<HookEvent> {
        HookLink::recv(self, until)
    }
}

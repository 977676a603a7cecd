//! Time, and the boot that it counts from.

use std::time::{Duration, Instant};

use super::Result;

/// The clock of the host.
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> Instant;
    /// Lets this time pass.
    fn sleep(&self, time: Duration);
    /// The boot that this is (`/proc/sys/kernel/random/boot_id`).
    fn boot(&self) -> String;
    /// When this process was started, in clock ticks after boot.
    fn started(&self) -> Result<u64>;
}

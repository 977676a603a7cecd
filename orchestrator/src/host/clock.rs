//! Time, and the boot that it counts from.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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

/// Milliseconds since 1970-01-01 UTC, for what people and other programs read; 0 before that.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_millis() as u64).unwrap_or_default()
}

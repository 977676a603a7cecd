//! The clock of this machine.

use std::time::{Duration, Instant};

use crate::host::clock::Clock;
use crate::host::{Context, Result};

/// The clock of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealClock;

impl Clock for RealClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }

    fn boot(&self) -> String {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
    }

    fn started(&self) -> Result<u64> {
        Ok(dpfreeze::freeze::ProcessId::current().about("this process")?.start_time)
    }
}

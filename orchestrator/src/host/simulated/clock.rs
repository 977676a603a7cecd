//! The clock of the simulated host: time passes when somebody waits for it.

use std::time::{Duration, Instant};

use super::Sim;
use crate::host::clock::Clock;
use crate::host::Result;

pub(super) struct SimClock(pub(super) Sim);

impl Clock for SimClock {
    fn now(&self) -> Instant {
        self.0.now()
    }

    fn sleep(&self, time: Duration) {
        let mut world = self.0.look();
        let time = world.patience.next(time);
        world.pass(time);
    }

    fn boot(&self) -> String {
        format!("boot-{}", self.0.world().boot)
    }

    fn started(&self) -> Result<u64> {
        Ok(self.0.world().ticks())
    }
}

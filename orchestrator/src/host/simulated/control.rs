//! The supervisor's socket on the simulated host: who could listen does not exist, who could abort is a fault.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::world::Patience;
use super::Sim;
use crate::control::{AbortGate, Control, Hook, HookCommand, HookEvent, Progress, Vitals};

/// See the module.
pub struct SimControl {
    sim: Sim,
    gate: Arc<AbortGate>,
}

impl SimControl {
    /// The socket of a supervisor that starts now.
    pub fn new(sim: &Sim) -> SimControl {
        let gate = Arc::new(AbortGate::new());
        sim.world().gate = gate.clone();
        SimControl { sim: sim.clone(), gate }
    }
}

impl Control for SimControl {
    fn gate(&self) -> &AbortGate {
        &self.gate
    }

    fn tell(&self, progress: &Progress) {
        let mut world = self.sim.look();
        world.patience = Patience::default();
        if *progress == Progress::PointOfNoReturn {
            let lost = world.lost();
            world.lost_before_no_return.get_or_insert(lost);
        }
    }

    fn update(&self, _vitals: &Vitals) {}

    fn wait_hook(&self, until: Instant) -> Option<Box<dyn Hook>> {
        let id = self.sim.wait(until, |world| world.switch.hook.as_ref().filter(|hook| !hook.orphan).map(|h| h.id))?;
        Some(Box::new(SimHook { sim: self.sim.clone(), id, told: 0, acknowledged: false }))
    }

    fn close(self: Box<Self>, _patience: Duration) {}
}

/// The supervisor's end of the hook.
struct SimHook {
    sim: Sim,
    id: u64,
    told: u32,
    /// The hook of a unit that stops has said that it goes.
    acknowledged: bool,
}

impl Hook for SimHook {
    fn send(&mut self, command: HookCommand) -> io::Result<()> {
        let id = self.id;
        let sent = self.sim.operate("hook.send", None, |world| {
            if world.switch.hook.as_ref().is_none_or(|hook| hook.id != id) {
                return Err(crate::host::HostError::new("hook", "it has gone"));
            }
            world.order(command);
            Ok(world.variant.containers || world.switch.hook.as_ref().is_some_and(|hook| hook.stops))
        });
        let sent = sent.map(|stops| self.acknowledged |= stops && command == HookCommand::Start);
        sent.map_err(io::Error::other)
    }

    fn recv(&mut self, _until: Instant) -> Option<HookEvent> {
        if std::mem::take(&mut self.acknowledged) {
            return Some(HookEvent::ChildExited { status: 0 });
        }
        let world = self.sim.look();
        let Some(hook) = world.switch.hook.as_ref().filter(|hook| hook.id == self.id) else {
            return Some(HookEvent::Closed);
        };
        let started = hook.started;
        match (self.told, started) {
            (0, _) => {
                self.told = 1;
                Some(HookEvent::Connected { pid: 1 })
            }
            (1, Some(pid)) => {
                self.told = 2;
                Some(HookEvent::Spawned { pid })
            }
            (2, Some(pid)) => {
                let well = world.detached(pid)?;
                self.told = 3;
                Some(HookEvent::ChildExited { status: i32::from(!well) })
            }
            _ => None,
        }
    }
}

impl Drop for SimHook {
    fn drop(&mut self) {
        let mut world = self.sim.world();
        if let Some(hook) = world.switch.hook.as_mut().filter(|hook| hook.id == self.id) {
            hook.orphan = true;
        }
    }
}

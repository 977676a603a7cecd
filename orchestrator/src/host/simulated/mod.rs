//! A host of its own in memory, for tests of the whole run: the machine and the steps are the real ones, and what they
//! ask for goes to a model of the kernel's datapath, the daemons, the database, OpenFlow, systemd, a clock and a disk.
//!
//! Every operation that a run asks for is a place where a [`Fault`] can be put: it fails, it fails half-done, it hangs,
//! it is done twice, or the supervisor dies before, in the middle of or after it, or the machine does. Time passes only
//! in operations and waits, and traffic passes with it; so a run takes no time, and the same faults give the same run.
//!
//! What is modelled is what the steps rely on (docs/design-differences.md, docs/hazards.md), no more: what a kernel or
//! a daemon really does is shown in the VM.

mod clock;
mod control;
mod daemons;
mod database;
mod datapath;
mod devices;
mod disk;
mod fault;
mod module;
mod openflow;
mod services;
mod surroundings;
mod world;

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use control::SimControl;
pub use devices::{BY_HAND, SHAPED};
pub use disk::SimDisk;
pub use fault::{Crash, Fault, Place, Script};
pub use world::{addresses, state, DiskState, Odd, Program, Variant, World, MTU, ODD_RULE};

use crate::host::{HostError, Result};
use crate::steps::Host;

/// What every operation takes.
const OPERATION: Duration = Duration::from_millis(1);
/// How long an operation without a deadline hangs where it hangs.
const HANG: Duration = Duration::from_secs(45);
/// What a wait takes before it looks again for the first time.
const LOOK: Duration = Duration::from_millis(10);

/// The simulated host. Clones are the same host.
#[derive(Clone)]
pub struct Sim {
    base: Instant,
    world: Arc<Mutex<World>>,
}

impl Sim {
    /// A host with traffic, its daemons running, on which faults come as `script` says.
    pub fn new(variant: Variant, script: Script) -> Sim {
        Sim { base: Instant::now(), world: Arc::new(Mutex::new(World::new(variant, script))) }
    }

    /// The host as a supervisor that starts now sees it.
    pub fn host(&self) -> Host {
        Host {
            datapath: Box::new(datapath::SimDatapath::new(self)),
            daemons: Box::new(daemons::SimDaemons(self.clone())),
            database: Box::new(database::SimDatabase(self.clone())),
            openflow: Box::new(openflow::SimOpenFlow(self.clone())),
            services: Box::new(services::SimServices(self.clone())),
            surroundings: Box::new(surroundings::SimSurroundings(self.clone())),
            module: Box::new(module::SimModule(self.clone())),
            devices: Box::new(devices::SimDevices(self.clone())),
            clock: Arc::new(clock::SimClock(self.clone())),
        }
    }

    /// The world, to look at or to change, whoever lives.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time of the world as the product sees it.
    pub fn now(&self) -> Instant {
        self.base + self.world().time
    }

    /// A look of the supervisor at the world. The dead see nothing.
    fn look(&self) -> MutexGuard<'_, World> {
        let world = self.world();
        if !world.supervisor_lives {
            drop(world);
            resume_unwind(Box::new(Crash));
        }
        world
    }

    /// An operation of the supervisor, which may come to harm.
    fn operate<T>(
        &self,
        name: &'static str,
        until: Option<Instant>,
        effect: impl FnMut(&mut World) -> Result<T>,
    ) -> Result<T> {
        self.operate_in_parts(name, until, |_| {}, effect)
    }

    /// The same, with what is done of it where it is cut off in its middle.
    fn operate_in_parts<T>(
        &self,
        name: &'static str,
        until: Option<Instant>,
        half: impl FnOnce(&mut World),
        mut effect: impl FnMut(&mut World) -> Result<T>,
    ) -> Result<T> {
        let mut world = self.look();
        world.patience.operation(name);
        world.pass(OPERATION);
        let injected = |what: &str| HostError::new(name, format!("injected: {what}"));
        let Some(fault) = world.script.at(name) else { return effect(&mut world) };
        match fault {
            Fault::Error => return Err(injected("it fails")),
            Fault::ErrorAfter => {
                let _done = effect(&mut world);
                return Err(injected("it is done, and fails"));
            }
            Fault::Twice => {
                let _first = effect(&mut world);
            }
            Fault::Hang => {
                let left = until.map(|until| (until - self.base).saturating_sub(world.time));
                world.pass(left.unwrap_or(HANG));
                if until.is_some() {
                    return Err(HostError::timeout(name, "hanging (injected)"));
                }
            }
            Fault::CrashBefore => {}
            Fault::CrashHalf => half(&mut world),
            Fault::CrashAfter | Fault::Reboot => {
                let _done = effect(&mut world);
            }
            happening => world.happen(happening),
        }
        match fault {
            Fault::CrashBefore | Fault::CrashHalf | Fault::CrashAfter => world.kill_supervisor(),
            Fault::Reboot => world.reboot(),
            _ => return effect(&mut world),
        }
        drop(world);
        resume_unwind(Box::new(Crash))
    }

    /// Lets time pass until `done` has an answer, or `until`.
    fn wait<T>(&self, until: Instant, mut done: impl FnMut(&mut World) -> Option<T>) -> Option<T> {
        let mut step = LOOK;
        loop {
            let mut world = self.look();
            if let Some(answer) = done(&mut world) {
                return Some(answer);
            }
            if self.base + world.time >= until {
                return None;
            }
            world.pass(step);
            // Whoever waits long looks more and more rarely.
            step = (step * 3 / 2).min(Duration::from_secs(1));
        }
    }
}

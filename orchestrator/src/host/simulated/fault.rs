//! What goes wrong, and where.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

/// The end of a supervisor, thrown through it.
#[derive(Debug)]
pub struct Crash;

/// What may go wrong with an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// It fails, and nothing is done.
    Error,
    /// It is done, and fails.
    ErrorAfter,
    /// It is done twice.
    Twice,
    /// It hangs until its deadline and fails; without a deadline it takes long.
    Hang,
    /// The supervisor is killed before it.
    CrashBefore,
    /// The supervisor is killed while half of it is done.
    CrashHalf,
    /// The supervisor is killed after it.
    CrashAfter,
    /// The machine goes down after it.
    Reboot,
    /// Just before, somebody asks for an abort.
    Abort,
    /// Just before, the old ovs-vswitchd dies.
    OldDies,
    /// Just before, the new ovs-vswitchd dies.
    NewDies,
    /// Just before, somebody removes flow-restore-wait.
    FlagRemoved,
    /// Just before, the machine is suspended for longer than any lease.
    Suspend,
    /// Just before, somebody removes a bridge, whose socket closes (not for random schedules, as the next).
    BridgeRemoved,
    /// Just before, somebody lifts the freeze by hand.
    ThawedByHand,
    /// Just before, the disk becomes full (random schedules do without it: their seeds mean what they meant).
    DiskFull,
    /// Just before, the kernel begins to make its flow table anew: the next dump lacks flows (for dumps).
    TableMadeAnew,
    /// Just before, the disk of the database becomes full.
    DatabaseFull,
    /// Just before, it becomes read-only.
    DatabaseReadOnly,
    /// Just before, it becomes read-only, and the database cannot be served from memory either.
    DatabaseLost,
    /// Just before, a flow appears that is in the way of a daemon's feature probes.
    ProbeLeft,
    /// From here on for so long the new ovs-vswitchd is on its way to its binding, of which a capture is half written.
    BindsLate(Duration),
}

impl Fault {
    /// What can go wrong with the operation itself.
    pub const OPERATION: [Fault; 7] = [
        Fault::Error,
        Fault::ErrorAfter,
        Fault::Twice,
        Fault::Hang,
        Fault::CrashBefore,
        Fault::CrashHalf,
        Fault::CrashAfter,
    ];
    /// What else can happen meanwhile.
    pub const HAPPENING: [Fault; 5] =
        [Fault::Abort, Fault::OldDies, Fault::NewDies, Fault::FlagRemoved, Fault::Suspend];
}

/// An operation of a run: the how-many-eth of its name, in the supervisor's life (0) or in that of the n-th recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Which life.
    pub life: u32,
    /// The operation.
    pub name: &'static str,
    /// Counted from 0.
    pub nth: u32,
}

/// Faults thrown at random, the same for the same seed.
#[derive(Debug, Clone, Copy)]
struct Dice {
    seed: u64,
    one_in: u64,
    left: u32,
}

/// Where what goes wrong.
#[derive(Debug, Clone, Default)]
pub struct Script {
    faults: BTreeMap<Place, Fault>,
    dice: Option<Dice>,
    counts: HashMap<&'static str, u32>,
    life: u32,
    /// Every operation so far.
    pub trace: Vec<Place>,
    /// Every fault that came about.
    pub struck: Vec<(Place, Fault)>,
}

impl Script {
    /// Nothing goes wrong but this.
    pub fn of(faults: impl IntoIterator<Item = (Place, Fault)>) -> Script {
        Script { faults: faults.into_iter().collect(), ..Script::default() }
    }

    /// At most `most` faults, about one in so many operations.
    pub fn random(seed: u64, one_in: u64, most: u32) -> Script {
        Script { dice: Some(Dice { seed, one_in, left: most }), ..Script::default() }
    }

    /// Another supervisor or recovery starts.
    pub fn next_life(&mut self) {
        self.life += 1;
        self.counts.clear();
    }

    /// The fault of the operation that is about to be done.
    pub(super) fn at(&mut self, name: &'static str) -> Option<Fault> {
        let count = self.counts.entry(name).or_default();
        let place = Place { life: self.life, name, nth: *count };
        *count += 1;
        self.trace.push(place);
        let fault = self.faults.get(&place).copied().or_else(|| self.dice.as_mut()?.throw(place))?;
        self.struck.push((place, fault));
        Some(fault)
    }
}

impl Dice {
    fn throw(&mut self, place: Place) -> Option<Fault> {
        // The seeds of docs/simulation.md were thrown without it; every fault comes to it where each operation has its turn.
        if self.left == 0 || place.name == "openflow.learn" || place.name.starts_with("database_disk.") {
            return None;
        }
        let mut hasher = DefaultHasher::new();
        (self.seed, place).hash(&mut hasher);
        let throw = hasher.finish();
        if !throw.is_multiple_of(self.one_in) {
            return None;
        }
        self.left -= 1;
        let all: Vec<Fault> = Fault::OPERATION.into_iter().chain(Fault::HAPPENING).collect();
        let fault = all[(throw / self.one_in) as usize % all.len()];
        // Nobody writes one record twice: a repeated step writes another one.
        Some(fault).filter(|fault| *fault != Fault::Twice || place.name != "disk.append")
    }
}

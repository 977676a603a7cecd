//! Parking: the packets that no daemon can answer now are kept, and given back to the datapath when one can.
//!
//! The order of things: [`Park::open`]; bind the datapath's upcalls to [`Park::port_ids`]; [`DrainWatch::wait`] until
//! the old daemon has dealt with what it was sent; [`Park::adopt`] keeps what it had not (before it ends) and
//! [`Park::read_adopted`] takes it in (after); [`remove_doomed`]; bind the new daemon; [`Park::replay`].

pub mod binding;
mod bundle;
mod drain;
mod handlers;
mod plan;
mod reader;
mod receiver;
mod removal;
mod replay;
mod ring;
mod socket;
mod store;
mod successors;
mod undo;

pub use drain::{drained, DrainWatch};
pub use handlers::Handlers;
pub use plan::{Origins, Replay, Then, Unreplayable};
pub use removal::{
    doom_of, feature_probes, grace_period, remove_doomed, remove_doomed_from, remove_left_probes, suspicious_since,
    Chosen, Doom, FlowTable, Grace, RemovalReport,
};
pub use replay::{ReplayInput, ReplayReport};
pub use socket::{Duplicates, Queue, UpcallSocket};
pub use store::{ParkLimits, ParkStats, WhenFull};
pub use undo::Undone;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::error::{Error, Result};
use crate::ovs::Families;

/// `/sys/devices/system/cpu/possible` (Documentation/admin-guide/cputopology.rst)
const POSSIBLE_CPUS: &str = "/sys/devices/system/cpu/possible";
/// As many CPUs as port ids are given to the datapath (hazard 2).
const MOST_CPUS: usize = 4096;

/// Names of kept descriptors ([`Park::keep`]).
const KEPT_MEMORY: &str = "park-memory";
const KEPT_ADOPTED_MEMORY: &str = "park-adopted-memory";
const KEPT_RECEIVER: &str = "park-receiver";
const KEPT_SOCKETS: &str = "park-sockets";
const KEPT_ADOPTED_SOCKETS: &str = "park-adopted-sockets";

/// Sockets for upcalls, a thread that reads them, and the memory they are read into.
#[derive(Debug)]
pub struct Park {
    shared: Arc<reader::Shared>,
    limits: ParkLimits,
    own: Vec<Arc<UpcallSocket>>,
    adopted: Vec<Adopted>,
    lanes: Vec<replay::Lane>,
    /// Duplicates of the memory, by name, for [`Park::keep`].
    memory: Vec<(&'static str, OwnedFd)>,
    /// All sockets, by name, as of the last [`Park::keep`].
    packed: Vec<(&'static str, OwnedFd)>,
    reader: Option<JoinHandle<()>>,
}

/// A duplicate of a daemon's socket.
#[derive(Debug)]
struct Adopted {
    socket: Arc<UpcallSocket>,
    /// What it had dropped before we had it.
    drops_before: u32,
    is_read: bool,
}

impl Park {
    /// Opens one upcall socket for each CPU the datapath can dispatch from, and begins to read them. Nothing arrives
    /// until the datapath is bound to [`Park::port_ids`].
    ///
    /// # Errors
    /// No datapath in the kernel, missing `CAP_NET_ADMIN`, or no room for the sockets.
    pub fn open(limits: ParkLimits) -> Result<Self> {
        let own = (0..possible_cpus()?).map(|_| UpcallSocket::open(limits.socket_bytes)).collect::<Result<_>>()?;
        Self::start(limits, store::Store::new(limits)?, own, receiver::Receiver::new()?)
    }

    fn start(
        limits: ParkLimits,
        store: store::Store,
        own: Vec<UpcallSocket>,
        receiver: receiver::Receiver,
    ) -> Result<Self> {
        let shared = Arc::new(reader::Shared::new(store, Families::resolve()?.packet)?);
        shared.take_up(&receiver);
        let mut memory = vec![(KEPT_RECEIVER, duplicate(KEPT_RECEIVER, receiver.fd())?)];
        {
            let store = shared.store();
            memory.push((KEPT_MEMORY, duplicate(KEPT_MEMORY, store.own_ring().fd())?));
            if let Some(ring) = store.adopted_ring() {
                memory.push((KEPT_ADOPTED_MEMORY, duplicate(KEPT_ADOPTED_MEMORY, ring.fd())?));
            }
        }
        let own: Vec<Arc<UpcallSocket>> = own.into_iter().map(Arc::new).collect();
        for socket in &own {
            shared.read_from(store::Queue::Own, Arc::clone(socket))?;
        }
        let lanes = replay::open_lanes()?;
        let thread = Arc::clone(&shared);
        let reader = std::thread::Builder::new()
            .name("park-reader".into())
            .spawn(move || thread.run(receiver))
            .map_err(|e| Error::io("start the thread that reads parked packets", e))?;
        Ok(Park { shared, limits, own, adopted: Vec::new(), lanes, memory, packed: Vec::new(), reader: Some(reader) })
    }

    /// The port ids to bind the datapath's upcalls to, by CPU.
    pub fn port_ids(&self) -> Vec<u32> {
        self.own.iter().map(|s| s.port_id()).collect()
    }

    /// Takes duplicates of the upcall sockets of process `pid` and raises their buffers, so that nothing queued there
    /// is lost with the process. They are not read before [`Park::read_adopted`]. Returns the port ids that were found
    /// to be the process's.
    ///
    /// # Errors
    /// As [`Duplicates::of`] and [`UpcallSocket::raise_buffer`].
    pub fn adopt(&mut self, pid: u32, port_ids: &[u32]) -> Result<Vec<u32>> {
        self.adopt_duplicates(Duplicates::of(pid, port_ids)?)
    }

    /// [`Park::adopt`] of duplicates that were taken before: their process may have ended since.
    ///
    /// # Errors
    /// As [`UpcallSocket::raise_buffer`]; there is no memory for what is in them.
    pub fn adopt_duplicates(&mut self, found: Duplicates) -> Result<Vec<u32>> {
        found.raise_buffers(self.limits.socket_bytes)?;
        // Now, so that whoever keeps our descriptors need not do it again in the gap.
        self.expect_adopted()?;
        let known: HashSet<u32> = self.adopted.iter().map(|known| known.socket.port_id()).collect();
        let mut adopted = Vec::new();
        for socket in found.into_sockets() {
            adopted.push(socket.port_id());
            if !known.contains(&socket.port_id()) {
                let drops_before = socket.queue()?.drops;
                self.adopted.push(Adopted { socket: Arc::new(socket), drops_before, is_read: false });
            }
        }
        Ok(adopted)
    }

    fn expect_adopted(&mut self) -> Result<()> {
        let mut store = self.shared.store();
        store.expect_adopted()?;
        match store.adopted_ring() {
            Some(ring) if !self.memory.iter().any(|(name, _)| *name == KEPT_ADOPTED_MEMORY) => {
                self.memory.push((KEPT_ADOPTED_MEMORY, duplicate(KEPT_ADOPTED_MEMORY, ring.fd())?));
            }
            _ => {}
        }
        Ok(())
    }

    /// Packets unread in the adopted sockets, by memory: bytes taken.
    ///
    /// # Errors
    /// getsockopt(2) failed.
    pub fn adopted_bytes(&self) -> Result<u64> {
        self.adopted.iter().map(|adopted| Ok(u64::from(adopted.socket.queue()?.used))).sum()
    }

    /// Reads the adopted sockets from now on: only when the process they were taken from has ended, else both would
    /// read, each a part. What lay in them goes before all that came by our own.
    ///
    /// # Errors
    /// A socket cannot be watched; then it stays unread, and a second call tries again.
    pub fn read_adopted(&mut self) -> Result<()> {
        for adopted in self.adopted.iter_mut().filter(|adopted| !adopted.is_read) {
            self.shared.read_from(store::Queue::Adopted, Arc::clone(&adopted.socket))?;
            adopted.is_read = true;
        }
        Ok(())
    }

    /// Lets go of the adopted sockets, read or not: the process they were taken from lives on and has them to itself
    /// again. What was already read from them stays parked.
    pub fn release_adopted(&mut self) {
        for adopted in self.adopted.drain(..) {
            self.shared.stop_reading(&adopted.socket);
        }
    }

    /// What was parked so far.
    pub fn stats(&self) -> ParkStats {
        let mut stats = self.shared.store().snapshot();
        let drops = |socket: &UpcallSocket| socket.queue().map_or(0, |q| q.drops);
        let own: u64 = self.own.iter().map(|s| u64::from(drops(s))).sum();
        let since = |adopted: &Adopted| drops(&adopted.socket).saturating_sub(adopted.drops_before);
        let adopted: u64 = self.adopted.iter().map(|adopted| u64::from(since(adopted))).sum();
        stats.socket_drops = own + adopted;
        stats
    }

    /// Replays what is parked, and what still arrives until the sockets are silent. The new daemon has to be bound
    /// before: while the upcalls come to us, every replayed miss comes back.
    ///
    /// # Errors
    /// The parked packets cannot be read. What happens to single packets is in the report.
    pub fn replay(&mut self, input: &ReplayInput<'_>) -> Result<ReplayReport> {
        replay::replay(&self.shared, &mut self.lanes, input)
    }

    /// Everything that has to outlive a crash of this process, with names, to be kept where a crash does not reach
    /// (systemd's file descriptor store, with FDPOLL=0: a readable socket is no reason to drop it). They are a handful,
    /// however many sockets there are.
    ///
    /// # Errors
    /// No descriptor is free, or no memory.
    pub fn keep(&mut self) -> Result<Vec<(&'static str, BorrowedFd<'_>)>> {
        let own: Vec<BorrowedFd<'_>> = self.own.iter().map(|socket| socket.as_fd()).collect();
        let adopted: Vec<BorrowedFd<'_>> = self.adopted.iter().map(|adopted| adopted.socket.as_fd()).collect();
        self.packed = vec![(KEPT_SOCKETS, bundle::pack(&own)?), (KEPT_ADOPTED_SOCKETS, bundle::pack(&adopted)?)];
        Ok(self.memory.iter().chain(&self.packed).map(|(name, fd)| (*name, fd.as_fd())).collect())
    }

    /// Goes on with what [`Park::keep`] gave before a crash. Packets that were on their way to the datapath at the
    /// crash (at most 144 for each lane, and 64) are parked still, though some of them may have arrived.
    ///
    /// Adopted sockets are adopted again, and unread until [`Park::read_adopted`].
    ///
    /// # Errors
    /// A descriptor is missing or not what its name says; as [`Park::open`].
    pub fn resume(limits: ParkLimits, kept: Vec<(String, OwnedFd)>) -> Result<Self> {
        let mut memory = None;
        let mut adopted_memory = None;
        let mut in_hand = None;
        // What was kept more than once has some of them twice.
        let mut own = BTreeMap::new();
        let mut adopted = BTreeMap::new();
        let sockets = |fd: OwnedFd| -> Result<Vec<(u32, UpcallSocket)>> {
            let sockets = bundle::unpack(&fd)?.into_iter().map(UpcallSocket::from_fd);
            sockets.map(|socket| socket.map(|socket| (socket.port_id(), socket))).collect()
        };
        for (name, fd) in kept {
            if name == KEPT_MEMORY {
                memory = Some(fd);
            } else if name == KEPT_ADOPTED_MEMORY {
                adopted_memory = Some(fd);
            } else if name == KEPT_RECEIVER {
                in_hand = Some(fd);
            } else if name == KEPT_SOCKETS {
                own.extend(sockets(fd)?);
            } else if name == KEPT_ADOPTED_SOCKETS {
                adopted.extend(sockets(fd)?);
            }
        }
        let memory = memory.ok_or_else(|| Error::malformed("kept descriptors", format!("{KEPT_MEMORY} is missing")))?;
        let store = store::Store::reopen(limits, memory, adopted_memory)?;
        // A version before kept none.
        let receiver = in_hand.map_or_else(receiver::Receiver::new, receiver::Receiver::reopen)?;
        let mut park = Self::start(limits, store, own.into_values().collect(), receiver)?;
        for socket in adopted.into_values() {
            let drops_before = socket.queue()?.drops;
            park.adopted.push(Adopted { socket: Arc::new(socket), drops_before, is_read: false });
        }
        Ok(park)
    }
}

impl Drop for Park {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(reader) = self.reader.take() {
            // A thread that panicked has nothing more to say here: its socket errors are in the statistics.
            let _ = reader.join();
        }
    }
}

fn duplicate(name: &str, fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    fd.try_clone_to_owned().map_err(|e| Error::io(format!("duplicate {name}"), e))
}

/// So many CPUs the kernel may ever have: [`Park::open`] takes a socket for each.
///
/// # Errors
/// sysfs cannot be read.
pub fn possible_cpus() -> Result<usize> {
    let text = fs::read_to_string(POSSIBLE_CPUS).map_err(|e| Error::io(POSSIBLE_CPUS, e))?;
    highest_cpu(&text)
        .map(|highest| (highest + 1).min(MOST_CPUS))
        .ok_or_else(|| Error::malformed(POSSIBLE_CPUS, format!("{text:?} is no list of CPUs")))
}

/// The highest number in a list such as `0-3,8-11`.
fn highest_cpu(list: &str) -> Option<usize> {
    list.trim().rsplit([',', '-']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        assert_eq!(highest_cpu("0\n"), Some(0));
        assert_eq!(highest_cpu("0-3\n"), Some(3));
        assert_eq!(highest_cpu("0-3,8-11\n"), Some(11));
        assert_eq!(highest_cpu(""), None);
    }
}

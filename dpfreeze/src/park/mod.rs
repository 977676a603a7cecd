//! Parking: the packets that no daemon can answer now are kept, and given back to the datapath when one can.
//!
//! The order of things: [`Park::open`]; bind the datapath's upcalls to [`Park::port_ids`]; [`DrainWatch::wait`] until
//! the old daemon has dealt with what it was sent; [`Park::adopt`] keeps what it had not (before it ends) and
//! [`Park::read_adopted`] takes it in (after); [`remove_doomed`]; bind the new daemon; [`Park::replay`].

mod drain;
mod plan;
mod reader;
mod removal;
mod replay;
mod ring;
mod socket;
mod store;

pub use drain::{drained, DrainWatch};
pub use plan::{Origins, Replay, Unreplayable};
pub use removal::{
    doom_of, grace_period, remove_doomed, remove_doomed_from, suspicious_since, Doom, FlowTable, Grace, RemovalReport,
};
pub use replay::{ReplayInput, ReplayReport};
pub use socket::{Duplicates, Queue, UpcallSocket};
pub use store::{ParkLimits, ParkStats};

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::error::{Error, Result};
use crate::ovs::Families;

/// `/sys/devices/system/cpu/possible` (Documentation/admin-guide/cputopology.rst)
const POSSIBLE_CPUS: &str = "/sys/devices/system/cpu/possible";
/// As many CPUs as port ids are given to the datapath (hazard 2).
const MOST_CPUS: usize = 4096;

/// Sockets for upcalls, a thread that reads them, and the memory they are read into.
#[derive(Debug)]
pub struct Park {
    shared: Arc<reader::Shared>,
    limits: ParkLimits,
    own: Vec<Arc<UpcallSocket>>,
    adopted: Vec<(Arc<UpcallSocket>, u32)>,
    adopted_are_read: bool,
    lanes: Vec<replay::Lane>,
    reader: Option<JoinHandle<()>>,
}

impl Park {
    /// Opens one upcall socket for each CPU the datapath can dispatch from, and begins to read them. Nothing arrives
    /// until the datapath is bound to [`Park::port_ids`].
    ///
    /// # Errors
    /// No datapath in the kernel, missing `CAP_NET_ADMIN`, or no room for the sockets.
    pub fn open(limits: ParkLimits) -> Result<Self> {
        let families = Families::resolve()?;
        let shared = Arc::new(reader::Shared::new(store::Store::new(limits)?, families.packet)?);
        let mut own = Vec::new();
        for _ in 0..possible_cpus()? {
            let socket = Arc::new(UpcallSocket::open(limits.socket_bytes)?);
            shared.read_from(store::Queue::Own, Arc::clone(&socket))?;
            own.push(socket);
        }
        let lanes = replay::open_lanes()?;
        let thread = Arc::clone(&shared);
        let reader = std::thread::Builder::new()
            .name("park-reader".into())
            .spawn(move || thread.run())
            .map_err(|e| Error::io("start the thread that reads parked packets", e))?;
        Ok(Park { shared, limits, own, adopted: Vec::new(), adopted_are_read: false, lanes, reader: Some(reader) })
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
        let found = Duplicates::of(pid, port_ids)?;
        found.raise_buffers(self.limits.socket_bytes)?;
        let mut adopted = Vec::new();
        for socket in found.into_sockets() {
            adopted.push(socket.port_id());
            if !self.adopted.iter().any(|(s, _)| s.port_id() == socket.port_id()) {
                let drops = socket.queue()?.drops;
                self.adopted.push((Arc::new(socket), drops));
            }
        }
        Ok(adopted)
    }

    /// Packets unread in the adopted sockets, by memory: bytes taken.
    ///
    /// # Errors
    /// getsockopt(2) failed.
    pub fn adopted_bytes(&self) -> Result<u64> {
        self.adopted.iter().map(|(s, _)| Ok(u64::from(s.queue()?.used))).sum()
    }

    /// Reads the adopted sockets from now on: only when the process they were taken from has ended, else both would
    /// read, each a part. What lay in them goes before all that came by our own.
    ///
    /// # Errors
    /// There is no memory for it; then they stay unread, and a second call tries again.
    pub fn read_adopted(&mut self) -> Result<()> {
        if self.adopted_are_read {
            return Ok(());
        }
        self.shared.store().expect_adopted()?;
        for (socket, _) in &self.adopted {
            self.shared.read_from(store::Queue::Adopted, Arc::clone(socket))?;
        }
        self.adopted_are_read = true;
        Ok(())
    }

    /// Closes the duplicates without reading them: the process they were taken from lives on and has its sockets to
    /// itself again. Does nothing once they are read.
    pub fn release_adopted(&mut self) {
        if !self.adopted_are_read {
            self.adopted.clear();
        }
    }

    /// What was parked so far.
    pub fn stats(&self) -> ParkStats {
        let mut stats = self.shared.store().snapshot();
        let drops = |socket: &UpcallSocket| socket.queue().map_or(0, |q| q.drops);
        let own: u64 = self.own.iter().map(|s| u64::from(drops(s))).sum();
        let adopted: u64 = self.adopted.iter().map(|(s, before)| u64::from(drops(s).saturating_sub(*before))).sum();
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

    /// A duplicate of the memfd that holds the parked packets, to be kept somewhere a crash does not reach (systemd's
    /// file descriptor store). Its form is described in `ring.rs`.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn memory(&self) -> Result<OwnedFd> {
        let store = self.shared.store();
        store.own_ring().fd().try_clone_to_owned().map_err(|e| Error::io("duplicate the memfd of parked packets", e))
    }

    /// Duplicates of our own sockets, for the same purpose.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn socket_fds(&self) -> Result<Vec<OwnedFd>> {
        let clone = |s: &Arc<UpcallSocket>| {
            s.as_fd().try_clone_to_owned().map_err(|e| Error::io("duplicate an upcall socket", e))
        };
        self.own.iter().map(clone).collect()
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

fn possible_cpus() -> Result<usize> {
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

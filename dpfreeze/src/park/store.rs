//! What is parked, within its bounds, and what found no room.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use super::ring::{Batch, Record, Ring};
use crate::error::Result;
use crate::flow_key;
use crate::netlink::attr::Attrs;

/// `struct genlmsghdr` and `struct ovs_header`, before the attributes.
const HEADERS: usize = 8;
/// `OVS_PACKET_ATTR_KEY` (include/uapi/linux/openvswitch.h)
const OVS_PACKET_ATTR_KEY: u16 = 2;

/// Which packet is lost where there is no room for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The one that comes: those that wait longest may be those that were sent once and not again.
    #[default]
    DropNewest,
    /// The one that has waited longest: what is late may be worth nothing any more.
    DropOldest,
}

/// Bounds of what is parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParkLimits {
    /// Memory for parked packets, bytes; each takes its upcall message and 16 more.
    pub bytes: u64,
    /// Number of parked packets.
    pub packets: u64,
    /// What becomes of a packet that would exceed them.
    pub when_full: WhenFull,
    /// Receive buffer of each of our own upcall sockets and of each adopted one, bytes. It is a bound, taken only
    /// while messages wait to be read.
    pub socket_bytes: usize,
}

impl Default for ParkLimits {
    fn default() -> Self {
        ParkLimits { bytes: 256 << 20, packets: 1 << 20, when_full: WhenFull::default(), socket_bytes: 64 << 20 }
    }
}

/// What was parked so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParkStats {
    /// Packets taken in, replayed ones included.
    pub parked: u64,
    /// Packets that wait for their replay now.
    pub waiting: u64,
    /// Memory they take, bytes.
    pub bytes: u64,
    /// The most that waited at once.
    pub most_waiting: u64,
    /// The most memory that they took at once, bytes.
    pub most_bytes: u64,
    /// Packets that found no room. They are lost.
    pub overflowed: u64,
    /// Those by the number of the port they came in by (`u32::MAX` where none could be read).
    pub overflowed_by_port: BTreeMap<u32, u64>,
    /// Upcalls that found no room in the socket buffers, because they were not read fast enough. They are lost.
    pub socket_drops: u64,
    /// Messages that were not upcalls of the kernel. They were thrown away.
    pub foreign: u64,
    /// Messages longer than any upcall can be. They were thrown away.
    pub oversized: u64,
    /// What went wrong while sockets were read, by what it was; no packet is known to be lost by it.
    pub read_errors: BTreeMap<String, u64>,
}

/// Which ring a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queue {
    /// Came by our own sockets.
    Own,
    /// Lay in the old daemon's sockets: it is older than anything that came by ours.
    Adopted,
}

#[derive(Debug)]
pub(super) struct Store {
    limits: ParkLimits,
    own: Ring,
    adopted: Option<Ring>,
    batch: Batch,
    pub stats: ParkStats,
}

impl Store {
    pub fn new(limits: ParkLimits) -> Result<Self> {
        let own = Ring::new(c"ovs-graceful-parked", limits.bytes)?;
        Ok(Store { limits, own, adopted: None, batch: Batch::default(), stats: ParkStats::default() })
    }

    /// A store around the rings of an earlier one.
    pub fn reopen(limits: ParkLimits, own: OwnedFd, adopted: Option<OwnedFd>) -> Result<Self> {
        let own = Ring::reopen(own)?;
        let adopted = adopted.map(Ring::reopen).transpose()?;
        let mut store = Store { limits, own, adopted, batch: Batch::default(), stats: ParkStats::default() };
        store.stats.parked = store.waiting();
        (store.stats.most_waiting, store.stats.most_bytes) = (store.waiting(), store.used());
        Ok(store)
    }

    /// Makes room for what lay in the old daemon's sockets. It shares the bounds with the rest.
    pub fn expect_adopted(&mut self) -> Result<()> {
        if self.adopted.is_none() {
            self.adopted = Some(Ring::new(c"ovs-graceful-adopted", self.limits.bytes)?);
        }
        Ok(())
    }

    pub fn own_ring(&self) -> &Ring {
        &self.own
    }

    pub fn adopted_ring(&self) -> Option<&Ring> {
        self.adopted.as_ref()
    }

    /// Where the ring of `queue` ends: what is parked there moves it.
    pub fn tail(&mut self, queue: Queue) -> u64 {
        self.ring_of(queue).tail()
    }

    fn ring_of(&mut self, queue: Queue) -> &mut Ring {
        match (queue, &mut self.adopted) {
            (Queue::Adopted, Some(ring)) => ring,
            _ => &mut self.own,
        }
    }

    pub fn waiting(&self) -> u64 {
        self.own.waiting() + self.adopted.as_ref().map_or(0, Ring::waiting)
    }

    fn used(&self) -> u64 {
        self.own.used() + self.adopted.as_ref().map_or(0, Ring::used)
    }

    pub fn snapshot(&self) -> ParkStats {
        ParkStats { waiting: self.waiting(), bytes: self.used(), ..self.stats.clone() }
    }

    /// Takes `messages` (after the nlmsghdr) in; those that find no room are counted.
    pub fn park<'a>(&mut self, queue: Queue, source: u32, arrival: u64, messages: impl Iterator<Item = &'a [u8]>) {
        let mut batch = std::mem::take(&mut self.batch);
        batch.clear();
        let messages: Vec<&[u8]> = messages.collect();
        if self.limits.when_full == WhenFull::DropOldest {
            self.make_room(&messages);
        }
        let mut bytes: u64 = messages.iter().map(|message| Batch::cost(message)).sum();
        for (message, left) in messages.iter().zip((1..=messages.len() as u64).rev()) {
            let cost = Batch::cost(message);
            let has_room = match self.limits.when_full {
                WhenFull::DropNewest => self.has_room(batch.bytes() + cost, batch.packets() + 1),
                // Those behind it are newer: they come first.
                WhenFull::DropOldest => self.has_room(batch.bytes() + bytes, batch.packets() + left),
            };
            bytes -= cost;
            match has_room {
                true => batch.push(source, arrival, message),
                false => self.overflow(message),
            }
        }
        match self.ring_of(queue).push(&batch) {
            Ok(()) => self.stats.parked += batch.packets(),
            Err(e) => {
                self.stats.overflowed += batch.packets();
                *self.stats.overflowed_by_port.entry(u32::MAX).or_default() += batch.packets();
                *self.stats.read_errors.entry(format!("write to the memfd: {e}")).or_default() += 1;
            }
        }
        self.stats.most_waiting = self.stats.most_waiting.max(self.waiting());
        self.stats.most_bytes = self.stats.most_bytes.max(self.used());
        self.batch = batch;
    }

    fn has_room(&self, bytes: u64, packets: u64) -> bool {
        self.used() + bytes <= self.limits.bytes && self.waiting() + packets <= self.limits.packets
    }

    /// Drops what has waited longest until `messages` have room, or nothing is left to drop.
    fn make_room(&mut self, messages: &[&[u8]]) {
        let bytes = messages.iter().map(|message| Batch::cost(message)).sum();
        while !self.has_room(bytes, messages.len() as u64) {
            let Some(oldest) = self.drop_oldest() else { break };
            self.stats.parked = self.stats.parked.saturating_sub(1);
            self.overflow(&oldest.message);
        }
    }

    /// None where nothing waits, and while packets are on their way back to the datapath: what was taken out and not
    /// committed has its place before those that wait.
    fn drop_oldest(&mut self) -> Option<Record> {
        let rings = self.adopted.as_mut().into_iter().chain([&mut self.own]);
        let mut rings = rings.filter(|ring| ring.used() > 0);
        let ring = rings.next().filter(|ring| !ring.has_taken_out())?;
        let record = ring.pop(1).ok()?.pop()?;
        ring.commit().ok()?;
        Some(record)
    }

    fn overflow(&mut self, message: &[u8]) {
        self.stats.overflowed += 1;
        *self.stats.overflowed_by_port.entry(in_port_of(message).unwrap_or(u32::MAX)).or_default() += 1;
    }

    /// Takes up to `most` packets out, the oldest first. A crash brings them back until [`Store::commit`].
    pub fn pop(&mut self, most: usize) -> io::Result<Vec<Record>> {
        if let Some(ring) = &mut self.adopted {
            let records = ring.pop(most)?;
            if !records.is_empty() {
                return Ok(records);
            }
        }
        self.own.pop(most)
    }

    /// All packets that were taken out are done with.
    pub fn commit(&mut self) -> io::Result<()> {
        if let Some(ring) = &mut self.adopted {
            ring.commit()?;
        }
        self.own.commit()
    }
}

fn in_port_of(message: &[u8]) -> Option<u32> {
    let key = Attrs(message.get(HEADERS..)?).find(OVS_PACKET_ATTR_KEY).ok()??;
    flow_key::in_port(key.payload).ok()?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow_key::uapi::key;
    use crate::netlink::attr::AttrBuf;

    fn message(port: u32) -> Vec<u8> {
        let mut k = AttrBuf::new();
        k.push_u32(key::IN_PORT, port);
        let mut a = AttrBuf::new();
        a.push(1, &[0; 20]).push_nested(OVS_PACKET_ATTR_KEY, &k);
        [&[1u8, 1, 0, 0, 5, 0, 0, 0][..], a.as_bytes()].concat()
    }

    #[test]
    fn the_newest_is_dropped_and_counted_by_port() {
        let limits = ParkLimits { bytes: 1 << 20, packets: 3, ..ParkLimits::default() };
        let mut store = Store::new(limits).unwrap();
        let messages: Vec<Vec<u8>> = [1, 2, 3, 7, 7, 9].map(message).to_vec();
        store.park(Queue::Own, 0, 1, messages.iter().map(Vec::as_slice));
        let stats = store.snapshot();
        assert_eq!((stats.parked, stats.waiting, stats.overflowed), (3, 3, 3));
        assert_eq!(stats.overflowed_by_port, BTreeMap::from([(7, 2), (9, 1)]));
        let kept: Vec<Vec<u8>> = store.pop(10).unwrap().into_iter().map(|r| r.message).collect();
        assert_eq!(kept, messages[..3]);
    }

    #[test]
    fn the_oldest_is_dropped_where_that_is_wanted() {
        let limits = ParkLimits { packets: 3, when_full: WhenFull::DropOldest, ..ParkLimits::default() };
        let mut store = Store::new(limits).unwrap();
        store.expect_adopted().unwrap();
        let ports = |store: &mut Store, most| -> Vec<Option<u32>> {
            store.pop(most).unwrap().iter().map(|record| in_port_of(&record.message)).collect()
        };
        for (queue, arriving) in [(Queue::Own, &[2, 3][..]), (Queue::Adopted, &[1]), (Queue::Own, &[4, 5])] {
            let messages: Vec<Vec<u8>> = arriving.iter().copied().map(message).collect();
            store.park(queue, 0, 1, messages.iter().map(Vec::as_slice));
        }
        let stats = store.snapshot();
        assert_eq!((stats.parked, stats.waiting, stats.overflowed), (3, 3, 2));
        assert_eq!(stats.overflowed_by_port, BTreeMap::from([(1, 1), (2, 1)]));
        // What is on its way back is not dropped any more.
        assert_eq!(ports(&mut store, 1), [Some(3)]);
        let more = [6, 7].map(message);
        store.park(Queue::Own, 0, 1, more.iter().map(Vec::as_slice));
        assert_eq!(ports(&mut store, 9), [Some(4), Some(5), Some(7)]);
        store.commit().unwrap();
        // More at once than there is room for.
        let many: Vec<Vec<u8>> = (10..15).map(message).collect();
        store.park(Queue::Own, 0, 1, many.iter().map(Vec::as_slice));
        assert_eq!(ports(&mut store, 9), [Some(12), Some(13), Some(14)]);
        assert_eq!((store.stats.parked, store.stats.overflowed, store.stats.most_waiting), (7, 5, 3));
    }

    #[test]
    fn bytes_are_bounded_over_both_rings() {
        let one = Batch::cost(&message(1));
        let limits = ParkLimits { bytes: 2 * one + one / 2, packets: 100, ..ParkLimits::default() };
        let mut store = Store::new(limits).unwrap();
        store.expect_adopted().unwrap();
        for (queue, port) in [(Queue::Own, 1), (Queue::Adopted, 2), (Queue::Own, 3)] {
            store.park(queue, 0, 1, [message(port).as_slice()].into_iter());
        }
        assert_eq!((store.waiting(), store.stats.overflowed), (2, 1));
        let order: Vec<Option<u32>> = (0..2).map(|_| in_port_of(&store.pop(1).unwrap()[0].message)).collect();
        assert_eq!(order, [Some(2), Some(1)]);
    }

    #[test]
    fn what_has_no_port_is_counted_all_the_same() {
        let mut store = Store::new(ParkLimits { bytes: 1, packets: 1, ..ParkLimits::default() }).unwrap();
        store.park(Queue::Own, 0, 1, [&[1u8, 2, 3][..]].into_iter());
        assert_eq!(store.stats.overflowed_by_port, BTreeMap::from([(u32::MAX, 1)]));
    }
}

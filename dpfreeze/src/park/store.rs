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

/// Bounds of what is parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParkLimits {
    /// Memory for parked packets, bytes; each takes its upcall message and 16 more.
    pub bytes: u64,
    /// Number of parked packets.
    pub packets: u64,
    /// Receive buffer of each of our own upcall sockets and of each adopted one, bytes. It is a bound, taken only
    /// while messages wait to be read.
    pub socket_bytes: usize,
}

impl Default for ParkLimits {
    fn default() -> Self {
        ParkLimits { bytes: 256 << 20, packets: 1 << 20, socket_bytes: 64 << 20 }
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
        for message in messages {
            let bytes = self.used() + batch.bytes() + Batch::cost(message);
            let packets = self.waiting() + batch.packets() + 1;
            if bytes > self.limits.bytes || packets > self.limits.packets {
                self.overflow(message);
            } else {
                batch.push(source, arrival, message);
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
        self.batch = batch;
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
        let limits = ParkLimits { bytes: 1 << 20, packets: 3, socket_bytes: 0 };
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
    fn bytes_are_bounded_over_both_rings() {
        let one = Batch::cost(&message(1));
        let limits = ParkLimits { bytes: 2 * one + one / 2, packets: 100, socket_bytes: 0 };
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
        let mut store = Store::new(ParkLimits { bytes: 1, packets: 1, socket_bytes: 0 }).unwrap();
        store.park(Queue::Own, 0, 1, [&[1u8, 2, 3][..]].into_iter());
        assert_eq!(store.stats.overflowed_by_port, BTreeMap::from([(u32::MAX, 1)]));
    }
}

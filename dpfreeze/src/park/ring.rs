//! Parked packets in a memfd: bounded, in order of arrival, and readable by whoever holds the descriptor.
//!
//! ```text
//! 0     header   {u64 magic, u64 capacity, u64 head, u64 tail, u64 packets}
//! 4096  records  {u32 length of message, u32 source, u64 arrival ns of CLOCK_BOOTTIME, message}, one after the other
//! ```
//! `head` and `tail` count bytes since the beginning; a record's place is its offset modulo `capacity`, so that it may
//! wrap around the end. The header is written after the records: who reads it after a crash sees whole records only, and
//! with them those that were taken out and not yet said to be done with ([`Ring::commit`]).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{memfd_create, MFdFlags};

use crate::error::{Error, Result};

const MAGIC: u64 = 0x6f76_735f_7061_726b; // "ovs_park"
const RECORDS_AT: u64 = 4096;
const RECORD_HEADER: usize = 16;

/// One parked message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// Index of the socket it came by.
    pub source: u32,
    /// When it was read, nanoseconds of CLOCK_BOOTTIME.
    pub arrival: u64,
    /// The message after its nlmsghdr.
    pub message: Vec<u8>,
}

/// Records on their way into a ring, so that many go in with one write.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    packets: u64,
}

impl Batch {
    pub fn push(&mut self, source: u32, arrival: u64, message: &[u8]) {
        self.bytes.extend_from_slice(&(message.len() as u32).to_ne_bytes());
        self.bytes.extend_from_slice(&source.to_ne_bytes());
        self.bytes.extend_from_slice(&arrival.to_ne_bytes());
        self.bytes.extend_from_slice(message);
        self.packets += 1;
    }

    /// Bytes a message takes in a ring.
    pub fn cost(message: &[u8]) -> u64 {
        (RECORD_HEADER + message.len()) as u64
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn packets(&self) -> u64 {
        self.packets
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.packets = 0;
    }
}

#[derive(Debug)]
pub(super) struct Ring {
    file: File,
    capacity: u64,
    head: u64,
    tail: u64,
    /// From `head` on.
    packets: u64,
    /// Where the next record is taken out.
    read: u64,
    /// From `read` on.
    unread: u64,
}

impl Ring {
    pub fn new(name: &std::ffi::CStr, capacity: u64) -> Result<Self> {
        let fail = |e| Error::io(format!("memfd of {capacity} bytes for parked packets"), e);
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC).map_err(|e| fail(io::Error::from(e)))?;
        let file = File::from(fd);
        // Pages come with the first write: an empty ring takes no memory.
        file.set_len(RECORDS_AT + capacity).map_err(fail)?;
        let ring = Ring { file, capacity, head: 0, tail: 0, packets: 0, read: 0, unread: 0 };
        ring.write_header().map_err(fail)?;
        Ok(ring)
    }

    /// The ring in a memfd that another process may have made.
    pub fn reopen(fd: OwnedFd) -> Result<Self> {
        let file = File::from(fd);
        let fail = |e| Error::io("read the memfd of parked packets", e);
        let mut fields = [0u64; 5];
        for (i, field) in fields.iter_mut().enumerate() {
            let mut bytes = [0u8; 8];
            file.read_exact_at(&mut bytes, 8 * i as u64).map_err(fail)?;
            *field = u64::from_ne_bytes(bytes);
        }
        let [magic, capacity, head, tail, packets] = fields;
        let length = file.metadata().map_err(fail)?.len();
        let whole = capacity > 0
            && length.checked_sub(RECORDS_AT) == Some(capacity)
            && tail.checked_sub(head).is_some_and(|used| used <= capacity);
        if magic != MAGIC || !whole {
            return Err(Error::malformed("memfd of parked packets", "its header is not that of a ring"));
        }
        Ok(Ring { file, capacity, head, tail, packets, read: head, unread: packets })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes that were ever put in.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    pub fn used(&self) -> u64 {
        self.tail - self.head
    }

    pub fn free(&self) -> u64 {
        self.capacity - self.used()
    }

    /// Records that wait to be taken out.
    pub fn waiting(&self) -> u64 {
        self.unread
    }

    /// Takes the batch in; the caller has seen that it fits.
    pub fn push(&mut self, batch: &Batch) -> io::Result<()> {
        if batch.bytes() > self.free() {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let (first, rest) = batch.bytes.split_at(self.until_end(self.tail, batch.bytes.len()));
        self.file.write_all_at(first, self.place(self.tail))?;
        if !rest.is_empty() {
            self.file.write_all_at(rest, RECORDS_AT)?;
        }
        self.tail += batch.bytes();
        self.packets += batch.packets;
        self.unread += batch.packets;
        self.write_header()
    }

    /// Takes up to `most` records out, in order of arrival. They keep their place until [`Ring::commit`].
    pub fn pop(&mut self, most: usize) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        while records.len() < most && self.read < self.tail {
            let record = self.pop_one()?;
            records.push(record);
        }
        Ok(records)
    }

    /// Whether records were taken out that are not done with.
    pub fn has_taken_out(&self) -> bool {
        self.head != self.read
    }

    /// All that was taken out is done with: whoever reopens the ring does not see it again.
    pub fn commit(&mut self) -> io::Result<()> {
        if self.head == self.read {
            return Ok(());
        }
        (self.head, self.packets) = (self.read, self.unread);
        self.write_header()
    }

    fn pop_one(&mut self) -> io::Result<Record> {
        let mut header = [0u8; RECORD_HEADER];
        self.read_at(self.read, &mut header)?;
        let [l0, l1, l2, l3, s0, s1, s2, s3, arrival @ ..] = header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]);
        if u64::from(length) + RECORD_HEADER as u64 > self.tail - self.read {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a record longer than what is parked"));
        }
        let mut message = vec![0u8; length as usize];
        self.read_at(self.read + RECORD_HEADER as u64, &mut message)?;
        self.read += Batch::cost(&message);
        self.unread = self.unread.saturating_sub(1);
        Ok(Record { source: u32::from_ne_bytes([s0, s1, s2, s3]), arrival: u64::from_ne_bytes(arrival), message })
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let (first, rest) = into.split_at_mut(self.until_end(offset, into.len()));
        self.file.read_exact_at(first, self.place(offset))?;
        if rest.is_empty() {
            Ok(())
        } else {
            self.file.read_exact_at(rest, RECORDS_AT)
        }
    }

    fn place(&self, offset: u64) -> u64 {
        RECORDS_AT + offset % self.capacity
    }

    fn until_end(&self, offset: u64, len: usize) -> usize {
        len.min((self.capacity - offset % self.capacity) as usize)
    }

    fn write_header(&self) -> io::Result<()> {
        let fields = [MAGIC, self.capacity, self.head, self.tail, self.packets];
        let bytes: Vec<u8> = fields.iter().flat_map(|f| f.to_ne_bytes()).collect();
        self.file.write_all_at(&bytes, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    #[test]
    fn a_batch_that_does_not_fit_is_refused_whole() {
        let mut ring = Ring::new(c"test", 64).unwrap();
        let mut batch = Batch::default();
        batch.push(1, 2, &[7; 20]);
        batch.push(1, 3, &[8; 20]);
        assert!(ring.push(&batch).is_err());
        assert_eq!((ring.used(), ring.waiting()), (0, 0));
    }

    #[test]
    fn another_process_can_go_on_with_it() {
        let mut ring = Ring::new(c"test", 100).unwrap();
        let mut batch = Batch::default();
        batch.push(1, 2, &[7; 20]);
        for _ in 0..5 {
            ring.push(&batch).unwrap();
            ring.push(&batch).unwrap();
            assert_eq!(ring.pop(1).unwrap().len(), 1);
            let unfinished = Ring::reopen(ring.fd().try_clone_to_owned().unwrap()).unwrap();
            assert_eq!((unfinished.used(), unfinished.waiting()), (72, 2));
            ring.commit().unwrap();
            let mut again = Ring::reopen(ring.fd().try_clone_to_owned().unwrap()).unwrap();
            assert_eq!((again.used(), again.waiting()), (36, 1));
            assert_eq!(again.pop(9).unwrap(), [Record { source: 1, arrival: 2, message: vec![7; 20] }]);
            again.commit().unwrap();
            ring = again;
        }
    }

    #[test]
    fn what_was_taken_out_is_kept_until_it_is_done_with() {
        let mut ring = Ring::new(c"test", 200).unwrap();
        let mut batch = Batch::default();
        (1..=3).for_each(|n| batch.push(n, 2, &[7; 20]));
        ring.push(&batch).unwrap();
        for n in 1..=3 {
            assert_eq!(ring.pop(1).unwrap()[0].source, n);
        }
        let mut again = Ring::reopen(ring.fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(again.pop(9).unwrap().len(), 3);
    }

    #[test]
    fn what_is_no_ring_is_refused() {
        let file = |bytes: &[u8]| {
            let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
            file.write_all_at(bytes, 0).unwrap();
            OwnedFd::from(file)
        };
        assert!(Ring::reopen(file(&[])).is_err());
        assert!(Ring::reopen(file(&[0; 5000])).is_err());
        let header: Vec<u8> = [MAGIC, 904, 10, 9, 1].iter().flat_map(|f: &u64| f.to_ne_bytes()).collect();
        assert!(Ring::reopen(file(&[header, vec![0; 4960]].concat())).is_err());
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order(
            steps in proptest::collection::vec((proptest::collection::vec(0usize..60, 0..4), 0usize..4), 1..60),
        ) {
            let mut ring = Ring::new(c"test", 200).unwrap();
            let mut expected = VecDeque::new();
            let mut n = 0u64;
            for (lengths, pops) in steps {
                let mut batch = Batch::default();
                for length in lengths {
                    let message = vec![n as u8; length];
                    if batch.bytes() + Batch::cost(&message) <= ring.free() {
                        batch.push(n as u32, n, &message);
                        expected.push_back(Record { source: n as u32, arrival: n, message });
                        n += 1;
                    }
                }
                ring.push(&batch).unwrap();
                prop_assert_eq!(ring.waiting(), expected.len() as u64);
                for record in ring.pop(pops).unwrap() {
                    prop_assert_eq!(Some(record), expected.pop_front());
                }
                ring.commit().unwrap();
            }
            prop_assert_eq!(ring.pop(usize::MAX).unwrap(), expected.into_iter().collect::<Vec<_>>());
            ring.commit().unwrap();
            prop_assert_eq!((ring.used(), ring.waiting()), (0, 0));
        }
    }
}

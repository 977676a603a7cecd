//! Buffers for recvmmsg(2) in a memfd: what has left a socket and is not parked yet survives a crash as well.
//!
//! ```text
//! 0       words    {u64 magic, u64 receiving, u64 queue, u64 source, u64 tail}
//! 4096    C structures that recvmmsg fills: headers (with the lengths), senders
//! 65536   32 buffers of 128 KiB
//! ```
//! `receiving` is 1 from before the call until its messages are in the ring whose `tail` was noted then: with the tail
//! still there, whoever reopens it parks them; with the tail moved, they are parked.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};

use super::socket::UpcallSocket;
use super::store::Queue;
use crate::error::{Error, Result};

/// Messages taken with one recvmmsg.
pub(super) const MESSAGES: usize = 32;
/// Room for one: packet, key and user data are attributes of at most 64 KiB each, and only the packet is ever long.
const MESSAGE_BYTES: usize = 128 << 10;
/// `struct nlmsghdr` (include/uapi/linux/netlink.h)
const NLMSGHDR: usize = 16;

const MAGIC: u64 = 0x6f76_735f_7265_6376; // "ovs_recv"
const STRUCTURES_AT: usize = 4096;
const BUFFERS_AT: usize = 64 << 10;
const LENGTH: usize = BUFFERS_AT + MESSAGES * MESSAGE_BYTES;

/// The words at the beginning.
#[derive(Clone, Copy)]
enum Word {
    Magic,
    Receiving,
    Queue,
    Source,
    Tail,
}

/// What recvmmsg(2) fills besides the buffers. Only lengths, flags and senders are read again after a crash: the
/// pointers are those of the process that died.
#[repr(C)]
struct Structures {
    headers: [libc::mmsghdr; MESSAGES],
    vectors: [libc::iovec; MESSAGES],
    names: [libc::sockaddr_nl; MESSAGES],
}

const _: () = assert!(STRUCTURES_AT + size_of::<Structures>() <= BUFFERS_AT);

/// One message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received<'a> {
    /// An upcall, without its nlmsghdr.
    Upcall(&'a [u8]),
    /// Not from the kernel, or of another family (hazard 2).
    Foreign,
    /// Longer than any upcall.
    Oversized,
}

/// The messages that the process before had taken out of a socket and not parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InHand {
    /// The ring they belong to.
    pub queue: Queue,
    /// The tail of that ring before.
    pub tail: u64,
    /// Index of their socket.
    pub source: u32,
    /// How many.
    pub count: usize,
}

/// The buffers, mapped.
#[derive(Debug)]
pub(super) struct Receiver {
    fd: OwnedFd,
    map: NonNull<u8>,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl Send for Receiver {}

impl Receiver {
    pub fn new() -> Result<Self> {
        let fail = |e| Error::io(format!("memfd of {LENGTH} bytes for packets on their way"), e);
        let fd = memfd_create(c"ovs-graceful-receiver", MFdFlags::MFD_CLOEXEC).map_err(|e| fail(io::Error::from(e)))?;
        let file = File::from(fd);
        file.set_len(LENGTH as u64).map_err(fail)?;
        let receiver = Self::map(OwnedFd::from(file))?;
        receiver.set(Word::Magic, MAGIC);
        Ok(receiver)
    }

    /// The buffers of a process that died.
    pub fn reopen(fd: OwnedFd) -> Result<Self> {
        let malformed = |why: &str| Error::malformed("memfd of packets on their way", why);
        let file = File::from(fd);
        let length = file.metadata().map_err(|e| Error::io("memfd of packets on their way", e))?.len();
        if length != LENGTH as u64 {
            return Err(malformed("it has another length"));
        }
        let receiver = Self::map(OwnedFd::from(file))?;
        match receiver.get(Word::Magic) {
            MAGIC => Ok(receiver),
            _ => Err(malformed("its beginning is not that of ours")),
        }
    }

    fn map(fd: OwnedFd) -> Result<Self> {
        let length = NonZeroUsize::new(LENGTH).unwrap_or(NonZeroUsize::MIN);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // Populated: a page fault while a SIGKILL is pending fails, and takes the message with it that is being copied.
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a memfd that is LENGTH bytes long and that
        // nobody makes shorter.
        let map = unsafe { mmap(None, length, protection, flags, fd.as_fd(), 0) };
        let map = map.map_err(|e| Error::io("map the memfd of packets on their way", e))?;
        Ok(Receiver { fd, map: map.cast() })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn word(&self, word: Word) -> &AtomicU64 {
        // SAFETY: the mapping is aligned to a page, longer than all words, and lives as long as `self`; the words are
        // accessed as atomics only.
        unsafe { AtomicU64::from_ptr(self.map.as_ptr().cast::<u64>().add(word as usize)) }
    }

    fn get(&self, word: Word) -> u64 {
        self.word(word).load(Ordering::Acquire)
    }

    fn set(&self, word: Word, value: u64) {
        self.word(word).store(value, Ordering::Release);
    }

    fn structures(&self) -> *mut Structures {
        // SAFETY: within the mapping, and aligned: it begins at a page.
        unsafe { self.map.as_ptr().add(STRUCTURES_AT).cast() }
    }

    fn buffer(&self, i: usize) -> *mut u8 {
        // SAFETY: within the mapping for every i below MESSAGES.
        unsafe { self.map.as_ptr().add(BUFFERS_AT + i.min(MESSAGES - 1) * MESSAGE_BYTES) }
    }

    /// Takes messages out of `socket`, number `source` of those read. They are for `queue`, whose ring ends at `tail`,
    /// and count as in hand until [`Receiver::put_down`].
    pub fn receive(&mut self, socket: &UpcallSocket, queue: Queue, source: u32, tail: u64) -> nix::Result<usize> {
        // SAFETY: the structures lie in the mapping, which nobody else uses; zero is a valid value of them.
        let structures = unsafe {
            self.structures().write_bytes(0, 1);
            &mut *self.structures()
        };
        for i in 0..MESSAGES {
            structures.vectors[i] = libc::iovec { iov_base: self.buffer(i).cast(), iov_len: MESSAGE_BYTES };
            let header = &mut structures.headers[i].msg_hdr;
            header.msg_name = (&raw mut structures.names[i]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
            header.msg_iov = &raw mut structures.vectors[i];
            header.msg_iovlen = 1;
        }
        self.set(Word::Queue, queue as u64);
        self.set(Word::Source, source.into());
        self.set(Word::Tail, tail);
        self.set(Word::Receiving, 1);
        // The flag, not O_NONBLOCK: adopted sockets share their file status flags with the daemon.
        // SAFETY: every header points to one name and one vector of ours, every vector to a buffer of its length; all
        // of them live through the call.
        let answer = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                structures.headers.as_mut_ptr(),
                MESSAGES as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        match Errno::result(answer) {
            Ok(count) => Ok((count as usize).min(MESSAGES)),
            Err(errno) => {
                self.put_down();
                Err(errno)
            }
        }
    }

    /// What was received is parked.
    pub fn put_down(&self) {
        self.set(Word::Receiving, 0);
    }

    /// What the process that died had in its hands, if it was not parked: `tail_of` says where a ring ends.
    pub fn in_hand(&self, tail_of: impl Fn(Queue) -> u64) -> Option<InHand> {
        let queue = if self.get(Word::Queue) == Queue::Adopted as u64 { Queue::Adopted } else { Queue::Own };
        let tail = self.get(Word::Tail);
        if self.get(Word::Receiving) != 1 || tail_of(queue) != tail {
            return None;
        }
        let count = (0..MESSAGES).take_while(|i| self.length(*i) > 0).count();
        let source = u32::try_from(self.get(Word::Source)).unwrap_or_default();
        (count > 0).then_some(InHand { queue, tail, source, count })
    }

    fn length(&self, i: usize) -> usize {
        // SAFETY: the structures lie in the mapping; any bytes are valid for their integers, the only fields read.
        unsafe { (&raw const (*self.structures()).headers[i].msg_len).read() as usize }
    }

    /// The i-th message, if the kernel sent it and it is of `family` (hazard 2).
    pub fn upcall(&self, i: usize, family: u16) -> Received<'_> {
        let structures = self.structures();
        // SAFETY: as in `length`.
        let (flags, sender) = unsafe {
            let header = &raw const (*structures).headers[i].msg_hdr;
            ((&raw const (*header).msg_flags).read(), (&raw const (*structures).names[i].nl_pid).read())
        };
        if flags & libc::MSG_TRUNC != 0 {
            return Received::Oversized;
        }
        // SAFETY: within the i-th buffer, which nobody writes while `self` is borrowed.
        let message = unsafe { std::slice::from_raw_parts(self.buffer(i), self.length(i).min(MESSAGE_BYTES)) };
        match upcall_of(message, family) {
            Some(payload) if sender == 0 => Received::Upcall(payload),
            _ => Received::Foreign,
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`, which nothing refers to any more.
        let _ = unsafe { munmap(self.map.cast(), LENGTH) };
    }
}

/// What follows the nlmsghdr of a message of `family`.
fn upcall_of(message: &[u8], family: u16) -> Option<&[u8]> {
    let [l0, l1, l2, l3, k0, k1, ..] = *message.first_chunk::<NLMSGHDR>()?;
    let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
    if u16::from_ne_bytes([k0, k1]) != family {
        return None;
    }
    message.get(NLMSGHDR..length)
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{sendto, socket, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType};

    use super::*;

    const FAMILY: u16 = 33;

    #[test]
    fn only_whole_messages_of_the_family_are_upcalls() {
        let mut message = vec![0u8; 40];
        message[..4].copy_from_slice(&36u32.to_ne_bytes());
        message[4..6].copy_from_slice(&33u16.to_ne_bytes());
        assert_eq!(upcall_of(&message, 33).map(<[u8]>::len), Some(20));
        assert_eq!(upcall_of(&message, 34), None);
        assert_eq!(upcall_of(&message[..30], 33), None);
        assert_eq!(upcall_of(&message[..10], 33), None);
        message[..4].copy_from_slice(&3u32.to_ne_bytes());
        assert_eq!(upcall_of(&message, 33), None);
    }

    fn netlink() -> UpcallSocket {
        let kind = (AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkUserSock);
        let fd = socket(kind.0, kind.1, kind.2, kind.3).unwrap();
        nix::sys::socket::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).unwrap();
        UpcallSocket::from_fd(fd).unwrap()
    }

    /// Two messages for `to`. They come from a process, not from the kernel: foreign, but received.
    fn send_two(to: &UpcallSocket) {
        let from = netlink();
        let message = [&20u32.to_ne_bytes()[..], &FAMILY.to_ne_bytes(), &[0; 14]].concat();
        for _ in 0..2 {
            let to = NetlinkAddr::new(to.port_id(), 0);
            sendto(from.as_fd().as_raw_fd(), &message, &to, MsgFlags::empty()).unwrap();
        }
    }

    /// As the file descriptor store gives it to the next process.
    fn after_a_crash(receiver: Receiver) -> Receiver {
        let kept = receiver.fd().try_clone_to_owned().unwrap();
        std::mem::forget(receiver);
        Receiver::reopen(kept).unwrap()
    }

    #[test]
    fn what_was_in_hand_at_a_crash_is_found_again() {
        let (socket, mut receiver) = (netlink(), Receiver::new().unwrap());
        send_two(&socket);
        assert_eq!(receiver.receive(&socket, Queue::Adopted, 7, 100), Ok(2));
        let again = after_a_crash(receiver);
        let in_hand = InHand { queue: Queue::Adopted, tail: 100, source: 7, count: 2 };
        assert_eq!(again.in_hand(|queue| if queue == Queue::Adopted { 100 } else { 0 }), Some(in_hand));
        assert_eq!(again.upcall(1, FAMILY), Received::Foreign);
        assert_eq!(again.in_hand(|_| 164), None, "it was parked before the crash");
    }

    #[test]
    fn nothing_is_in_hand_once_it_is_put_down_or_nothing_came() {
        let (socket, mut receiver) = (netlink(), Receiver::new().unwrap());
        assert_eq!(receiver.receive(&socket, Queue::Own, 0, 0), Err(Errno::EAGAIN));
        assert_eq!(receiver.in_hand(|_| 0), None);
        send_two(&socket);
        assert_eq!(receiver.receive(&socket, Queue::Own, 0, 0), Ok(2));
        receiver.put_down();
        assert_eq!(receiver.receive(&socket, Queue::Own, 0, 0), Err(Errno::EAGAIN));
        assert_eq!(after_a_crash(receiver).in_hand(|_| 0), None);
    }

    #[test]
    fn what_is_no_receiver_is_refused() {
        let file = |length| {
            let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
            file.set_len(length).unwrap();
            OwnedFd::from(file)
        };
        assert!(Receiver::reopen(file(10)).is_err());
        assert!(Receiver::reopen(file(LENGTH as u64)).is_err());
    }
}

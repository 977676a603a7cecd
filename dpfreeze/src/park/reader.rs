//! The thread that empties upcall sockets into the store, as fast as it can.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::socket::UpcallSocket;
use super::store::{Queue, Store};
use crate::error::{Error, Result};

/// Messages taken with one recvmmsg.
const MESSAGES: usize = 32;
/// Room for one: packet, key and user data are attributes of at most 64 KiB each, and only the packet is ever long.
const MESSAGE_BYTES: usize = 128 << 10;
/// Calls in a row on one socket before the next has its turn.
const TURNS: usize = 8;
/// `struct nlmsghdr` (include/uapi/linux/netlink.h)
const NLMSGHDR: usize = 16;
/// Marks the eventfd among the epoll data, which are indexes of sockets otherwise.
const WAKE: u64 = u64::MAX;

/// A socket that is read, or the place of one that was.
type Slot = Option<(Queue, Arc<UpcallSocket>)>;

/// What the thread and the owner share.
#[derive(Debug)]
pub(super) struct Shared {
    store: Mutex<Store>,
    sockets: Mutex<Vec<Slot>>,
    /// The thread may hold messages that are no longer in a socket and not yet in the store.
    reading: AtomicBool,
    stop: AtomicBool,
    epoll: Epoll,
    wake: EventFd,
    /// Id of the family `ovs_packet`.
    family: u16,
}

impl Shared {
    pub fn new(store: Store, family: u16) -> Result<Self> {
        let fail = |errno: Errno| Error::io("set up the reader of parked packets", errno);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(fail)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(fail)?;
        epoll.add(wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, WAKE)).map_err(fail)?;
        Ok(Shared {
            store: Mutex::new(store),
            sockets: Mutex::new(Vec::new()),
            reading: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            epoll,
            wake,
            family,
        })
    }

    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sockets(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `socket` read from now on.
    pub fn read_from(&self, queue: Queue, socket: Arc<UpcallSocket>) -> Result<()> {
        let mut sockets = self.sockets();
        let event = EpollEvent::new(EpollFlags::EPOLLIN, sockets.len() as u64);
        self.epoll
            .add(socket.as_fd(), event)
            .map_err(|e| Error::io(format!("watch upcall socket {}", socket.port_id()), e))?;
        sockets.push(Some((queue, socket)));
        Ok(())
    }

    /// Has `socket` no longer read; returns when the thread does not hold it any more.
    pub fn stop_reading(&self, socket: &Arc<UpcallSocket>) {
        // It fails for a socket that was never read, and then there is nothing to stop.
        let _ = self.epoll.delete(socket.as_fd());
        // Others keep their place: the epoll data are indexes.
        self.sockets()
            .iter_mut()
            .filter(|slot| slot.as_ref().is_some_and(|(_, s)| Arc::ptr_eq(s, socket)))
            .for_each(|slot| *slot = None);
        while self.reading.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
    }

    /// Nothing is in a socket that is read, in the thread's hands, or in the store.
    pub fn is_empty(&self) -> bool {
        // In this order: what is not in a socket at first has left it, and what the thread had in its hands then is in
        // the store when it has put it down.
        let sockets_empty =
            self.sockets().iter().flatten().all(|(_, socket)| socket.queue().is_ok_and(|queue| queue.used == 0));
        sockets_empty && !self.reading.load(Ordering::SeqCst) && self.store().waiting() == 0
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        // It fails only if the counter is full, and then the thread wakes all the same.
        let _ = self.wake.write(1);
    }

    /// The thread.
    pub fn run(&self) {
        let mut receiver = Receiver::new();
        let mut events = [EpollEvent::empty(); 64];
        while !self.stop.load(Ordering::SeqCst) {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(n) => n,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    self.note_error("epoll_wait", errno);
                    return;
                }
            };
            self.reading.store(true, Ordering::SeqCst);
            for event in &events[..ready] {
                self.empty(event.data(), &mut receiver);
            }
            self.reading.store(false, Ordering::SeqCst);
        }
    }

    fn empty(&self, index: u64, receiver: &mut Receiver) {
        let Some((queue, socket)) = usize::try_from(index).ok().and_then(|i| self.sockets().get(i).cloned().flatten())
        else {
            return;
        };
        for _ in 0..TURNS {
            let count = match receiver.receive(&socket) {
                Ok(count) => count,
                Err(Errno::EAGAIN) => return,
                Err(errno) => {
                    self.note_error("recvmmsg", errno);
                    return;
                }
            };
            self.take(queue, index as u32, receiver, count);
            if count < MESSAGES {
                return;
            }
        }
    }

    fn take(&self, queue: Queue, source: u32, receiver: &Receiver, count: usize) {
        let arrival = boottime_ns();
        let mut upcalls: Vec<&[u8]> = Vec::with_capacity(count);
        let (mut foreign, mut oversized) = (0, 0);
        for i in 0..count {
            match receiver.upcall(i, self.family) {
                Received::Upcall(message) => upcalls.push(message),
                Received::Foreign => foreign += 1,
                Received::Oversized => oversized += 1,
            }
        }
        let mut store = self.store();
        store.stats.foreign += foreign;
        store.stats.oversized += oversized;
        store.park(queue, source, arrival, upcalls.into_iter());
    }

    fn note_error(&self, call: &str, errno: Errno) {
        *self.store().stats.read_errors.entry(format!("{call}: {errno}")).or_default() += 1;
    }
}

/// CLOCK_BOOTTIME in nanoseconds; 0 if the clock cannot be read, which it always can.
pub(super) fn boottime_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

enum Received<'a> {
    Upcall(&'a [u8]),
    Foreign,
    Oversized,
}

/// Buffers for recvmmsg(2).
struct Receiver {
    bytes: Vec<u8>,
    lengths: [usize; MESSAGES],
    flags: [libc::c_int; MESSAGES],
    senders: [u32; MESSAGES],
}

impl Receiver {
    fn new() -> Self {
        Receiver {
            bytes: vec![0; MESSAGES * MESSAGE_BYTES],
            lengths: [0; MESSAGES],
            flags: [0; MESSAGES],
            senders: [0; MESSAGES],
        }
    }

    fn receive(&mut self, socket: &UpcallSocket) -> nix::Result<usize> {
        // SAFETY: zero is a valid value of these C structures.
        let mut names: [libc::sockaddr_nl; MESSAGES] = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut vectors: [libc::iovec; MESSAGES] = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut headers: [libc::mmsghdr; MESSAGES] = unsafe { std::mem::zeroed() };
        for (i, buffer) in self.bytes.chunks_exact_mut(MESSAGE_BYTES).enumerate().take(MESSAGES) {
            vectors[i] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            headers[i].msg_hdr.msg_name = (&raw mut names[i]).cast();
            headers[i].msg_hdr.msg_namelen = std::mem::size_of::<libc::sockaddr_nl>() as libc::socklen_t;
            headers[i].msg_hdr.msg_iov = &raw mut vectors[i];
            headers[i].msg_hdr.msg_iovlen = 1;
        }
        // The flag, not O_NONBLOCK: adopted sockets share their file status flags with the daemon.
        // SAFETY: every header points to one name and one vector of ours, every vector to a buffer of its length; all
        // of them live through the call.
        let answer = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                headers.as_mut_ptr(),
                MESSAGES as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let count = Errno::result(answer)? as usize;
        for i in 0..count.min(MESSAGES) {
            self.lengths[i] = headers[i].msg_len as usize;
            self.flags[i] = headers[i].msg_hdr.msg_flags;
            self.senders[i] = names[i].nl_pid;
        }
        Ok(count.min(MESSAGES))
    }

    /// The i-th message, if the kernel sent it and it is of `family` (hazard 2).
    fn upcall(&self, i: usize, family: u16) -> Received<'_> {
        if self.flags[i] & libc::MSG_TRUNC != 0 {
            return Received::Oversized;
        }
        let start = i * MESSAGE_BYTES;
        let message = &self.bytes[start..start + self.lengths[i].min(MESSAGE_BYTES)];
        match upcall_of(message, family) {
            Some(payload) if self.senders[i] == 0 => Received::Upcall(payload),
            _ => Received::Foreign,
        }
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
    use super::*;

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
}

//! The thread that empties upcall sockets into the store, as fast as it can.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::receiver::{Received, Receiver, MESSAGES};
use super::socket::UpcallSocket;
use super::store::{Queue, Store};
use crate::error::{Error, Result};

/// Calls in a row on one socket before the next has its turn.
const TURNS: usize = 8;
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

    /// Parks what the process before had taken out of a socket and not parked when it died.
    pub fn take_up(&self, receiver: &Receiver) {
        if let Some(left) = receiver.in_hand(|queue| self.store().tail(queue)) {
            self.take(left.queue, left.source, receiver, left.count);
        }
        receiver.put_down();
    }

    /// The thread.
    pub fn run(&self, mut receiver: Receiver) {
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
            let tail = self.store().tail(queue);
            let count = match receiver.receive(&socket, queue, index as u32, tail) {
                Ok(count) => count,
                Err(Errno::EAGAIN) => return,
                Err(errno) => {
                    self.note_error("recvmmsg", errno);
                    return;
                }
            };
            self.take(queue, index as u32, receiver, count);
            receiver.put_down();
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

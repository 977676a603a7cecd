//! The upcall sockets of a daemon, where the kernel does not tell to whom it sends upcalls (Linux 5.15 to 6.0 take
//! `OVS_DP_ATTR_PER_CPU_PIDS` and never give it back): those that its handler threads wait for.
//!
//! A handler thread has one upcall socket, polls it, and polls no other netlink socket (lib/dpif-netlink.c,
//! `dpif_netlink_recv_wait_cpu_dispatch`). It begins to when the daemon has bound it (ofproto/ofproto-dpif-upcall.c).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::{Duration, Instant};

use super::drain::{handler_threads, polls, Polls};
use super::possible_cpus;
use crate::error::{Error, Result};
use crate::memory;
use crate::netlink::table;

/// Between two looks at a thread that was busy.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// More descriptors than a handler polls: its socket, a latch, and what it waits to change.
const MOST_POLLED: usize = 64;

/// What was seen of the handler threads of a daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handlers {
    /// The port ids of their upcall sockets.
    port_ids: Vec<u32>,
    /// The first thread that was not seen waiting for its own: it is busy.
    unseen: Option<u32>,
    pid: u32,
}

impl Handlers {
    /// Looks at the handler threads of process `pid` until each was seen waiting, for `patience` at the most.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn of(pid: u32, patience: Duration) -> Result<Handlers> {
        let until = Instant::now() + patience;
        let threads = handler_threads(pid)?;
        let mut seen: BTreeMap<u32, u32> = BTreeMap::new();
        loop {
            let sockets = generic_sockets(pid)?;
            for thread in &threads {
                if let (false, Some(port_id)) = (seen.contains_key(thread), port_id_of(pid, *thread, &sockets)?) {
                    seen.insert(*thread, port_id);
                }
            }
            let unseen = threads.iter().find(|thread| !seen.contains_key(thread)).copied();
            if unseen.is_none() || Instant::now() >= until {
                return Ok(Handlers { port_ids: seen.into_values().collect(), unseen, pid });
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// The port ids by CPU as the daemon binds them: handler after handler, again from the first where there are more CPUs.
    /// Any other order is as good, as every handler deals with every upcall. Empty where it has no handler threads: it has
    /// bound nothing.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where a handler was not seen waiting for its socket.
    pub fn all(self) -> Result<Vec<u32>> {
        match self.unseen {
            None => self.by_cpu(),
            Some(thread) => Err(Error::Unsupported {
                what: format!("handler thread {thread} of process {}", self.pid),
                why: "this kernel does not tell which sockets the upcalls go to, and the thread was not seen waiting for its \
                      own"
                .into(),
                remedy: "try again when there are fewer new flows, or use Linux 6.1 or later".into(),
            }),
        }
    }

    /// As [`Handlers::all`], of those that were seen: they can deal with the upcalls of all CPUs.
    ///
    /// # Errors
    /// As there, where none was.
    pub fn some(self) -> Result<Vec<u32>> {
        match self.port_ids.is_empty() {
            true => self.all(),
            false => self.by_cpu(),
        }
    }

    fn by_cpu(self) -> Result<Vec<u32>> {
        let cpus = if self.port_ids.is_empty() { 0 } else { possible_cpus()? };
        let wanted = cpus.max(self.port_ids.len());
        Ok(self.port_ids.into_iter().cycle().take(wanted).collect())
    }
}

/// The port ids of the generic netlink sockets, by inode.
fn generic_sockets(pid: u32) -> Result<HashMap<u64, u32>> {
    let rows = table::read_of(pid)?.into_iter().filter(|row| row.protocol == libc::NETLINK_GENERIC as u32);
    Ok(rows.map(|row| (row.inode, row.port_id)).collect())
}

/// The port id of the one among these sockets that a thread polls now; None where it does not poll, or none.
fn port_id_of(pid: u32, thread: u32, sockets: &HashMap<u64, u32>) -> Result<Option<u32>> {
    let Polls::Yes(text) = polls(pid, thread)? else { return Ok(None) };
    let Some((address, count)) = polled(&text) else { return Ok(None) };
    // It may go on while we look: then this is nothing, or not sockets.
    let Ok(bytes) = memory::read(thread as libc::pid_t, address, count * size_of::<libc::pollfd>()) else {
        return Ok(None);
    };
    let descriptors = bytes.as_chunks::<{ size_of::<libc::pollfd>() }>().0.iter();
    let descriptors = descriptors.filter_map(|entry| entry.first_chunk::<4>()).map(|fd| i32::from_ne_bytes(*fd));
    let inodes = descriptors.filter_map(|fd| table::socket_inode(Path::new(&format!("/proc/{pid}/fd/{fd}"))));
    let mut polled = inodes.filter_map(|inode| sockets.get(&inode).copied());
    Ok(match (polled.next(), polled.next()) {
        (Some(port_id), None) => Some(port_id),
        _ => None,
    })
}

/// Address and number of the pollfds in the line of `/proc/PID/task/TID/syscall` of a thread that polls
/// (Documentation/filesystems/proc.rst). A poll that was interrupted and goes on has the arguments that it had.
fn polled(text: &str) -> Option<(u64, usize)> {
    let mut words = text.split_whitespace();
    let number: libc::c_long = words.next()?.parse().ok()?;
    #[cfg(target_arch = "x86_64")]
    let kinds = [libc::SYS_poll, libc::SYS_ppoll, libc::SYS_restart_syscall];
    #[cfg(not(target_arch = "x86_64"))]
    let kinds = [libc::SYS_ppoll, libc::SYS_restart_syscall];
    let mut hex = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let (address, count) = (hex()?, usize::try_from(hex()?).ok()?);
    (kinds.contains(&number) && (1..=MOST_POLLED).contains(&count)).then_some((address, count))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::mpsc::channel;

    use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

    use super::*;
    use crate::park::UpcallSocket;

    #[test]
    fn only_poll_tells_what_a_thread_waits_for() {
        let poll = libc::SYS_ppoll;
        assert_eq!(polled(&format!("{poll} 0x7f10 0x2 0x0 0x0 0x0 0x0 0x7ffd 0x7f00")), Some((0x7f10, 2)));
        let interrupted = libc::SYS_restart_syscall;
        assert_eq!(polled(&format!("{interrupted} 0x7f10 0x2 0xffffffff")), Some((0x7f10, 2)));
        let other = libc::SYS_futex;
        for text in ["running", "-1 0x7ffd 0x7f00", &format!("{poll} 0x7f10 0x400 0x0"), &format!("{other} 0x7f10 0x2")]
        {
            assert_eq!(polled(text), None, "{text}");
        }
    }

    #[test]
    fn the_socket_that_a_handler_waits_for_is_its_own() {
        let socket = UpcallSocket::open(0).unwrap();
        let _another = UpcallSocket::open(0).unwrap();
        let (wake, woken) = nix::unistd::pipe().unwrap();
        let port_id = socket.port_id();
        let (say, said) = channel();
        let handler = std::thread::Builder::new().name("handler7".into()).spawn(move || {
            say.send(()).unwrap();
            let mut polled =
                [PollFd::new(wake.as_fd(), PollFlags::POLLIN), PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            poll(&mut polled, PollTimeout::NONE).unwrap();
        });
        said.recv().unwrap();
        let found = Handlers::of(std::process::id(), Duration::from_secs(5)).unwrap().all().unwrap();
        drop(woken);
        handler.unwrap().join().unwrap();
        assert!(!found.is_empty() && found.iter().all(|found| *found == port_id), "{found:?} {port_id}");
        assert_eq!(Handlers::of(std::process::id(), Duration::ZERO).unwrap().all().unwrap(), [0u32; 0]);
    }

    #[test]
    fn a_handler_that_is_busy_costs_the_others_nothing() {
        let busy = Handlers { port_ids: vec![7], unseen: Some(12), pid: 3 };
        let told = busy.clone().all().unwrap_err().to_string();
        assert!(told.contains("handler thread 12 of process 3"), "{told}");
        assert!(busy.some().unwrap().iter().all(|port_id| *port_id == 7));
        assert!(Handlers { port_ids: Vec::new(), unseen: Some(12), pid: 3 }.some().is_err());
    }
}

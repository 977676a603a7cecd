//! Whether a daemon has dealt with every upcall it was sent (hazard 9).

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::netlink::table;

/// How OVS names the threads that deal with upcalls (ofproto/ofproto-dpif-upcall.c, `udpif_start_threads`).
const HANDLER: &str = "handler";
/// Time between two looks that have to agree.
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);
/// System calls in which a thread sleeps until there is something to do.
#[cfg(target_arch = "x86_64")]
const SLEEPING_IN: [libc::c_long; 5] =
    [libc::SYS_poll, libc::SYS_ppoll, libc::SYS_epoll_wait, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2];
/// System calls in which a thread sleeps until there is something to do.
#[cfg(not(target_arch = "x86_64"))]
const SLEEPING_IN: [libc::c_long; 3] = [libc::SYS_ppoll, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2];

/// System calls of a thread that writes log files.
const WRITES_OR_WAITS: [libc::c_long; 3] = [libc::SYS_futex, libc::SYS_pwrite64, libc::SYS_write];

/// Watches a daemon whose upcalls go elsewhere by now, until its queues are empty and its handlers asleep.
#[derive(Debug)]
pub struct DrainWatch {
    pid: u32,
    port_ids: HashSet<u32>,
    handlers: BTreeSet<u32>,
}

impl DrainWatch {
    /// Watches process `pid`, whose upcall sockets have `port_ids`.
    pub fn new(pid: u32, port_ids: &[u32]) -> Self {
        let port_ids = port_ids.iter().copied().filter(|p| *p != 0).collect();
        DrainWatch { pid, port_ids, handlers: BTreeSet::new() }
    }

    /// One look: nothing is queued, and every handler thread is asleep in poll. A process that has ended has no
    /// handlers that could hold anything.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the threads' system calls cannot be seen; [`Error::Io`].
    pub fn idle(&mut self) -> Result<bool> {
        // The queues first: when they are empty and nobody fills them, a handler seen asleep after that holds nothing.
        Ok(self.queued()? == 0 && self.handlers_sleep()?)
    }

    /// Looks until two looks in a row, 5 ms apart, say idle, but not longer than `limit`. Returns whether they did.
    ///
    /// # Errors
    /// As [`DrainWatch::idle`].
    pub fn wait(&mut self, limit: Duration) -> Result<bool> {
        let start = Instant::now();
        let mut idle_before = false;
        loop {
            let idle = self.idle()?;
            if idle && idle_before {
                return Ok(true);
            }
            if start.elapsed() >= limit {
                return Ok(false);
            }
            idle_before = idle;
            std::thread::sleep(BETWEEN_LOOKS);
        }
    }

    /// What keeps the last look from being idle: how much is queued, and the handlers that are awake.
    pub fn held_up_by(&self) -> String {
        let queued = self.queued().unwrap_or_default();
        let state = |tid: &u32| {
            let folder = format!("/proc/{}/task/{tid}", self.pid);
            let read = |name: &str| fs::read_to_string(format!("{folder}/{name}")).unwrap_or_default();
            let number = read("syscall").split(' ').next().unwrap_or_default().trim().to_owned();
            format!("thread {tid}: system call {number}, waits in {}", read("wchan"))
        };
        let is_awake = |tid: &&u32| matches!(polls(self.pid, **tid), Ok(Polls::Not)) && !is_library_s(self.pid, **tid);
        let awake = self.handlers.iter().filter(is_awake).map(state).collect();
        [vec![format!("{queued} bytes are queued")], awake].concat().join("; ")
    }

    /// How many handler threads the last look saw.
    pub fn handlers(&self) -> usize {
        self.handlers.len()
    }

    /// Bytes that wait in the upcall sockets.
    fn queued(&self) -> Result<u64> {
        let is_its = |row: &table::NetlinkSocketRow| {
            row.protocol == libc::NETLINK_GENERIC as u32 && self.port_ids.contains(&row.port_id)
        };
        Ok(table::read()?.into_iter().filter(is_its).map(|row| row.rmem).sum())
    }

    fn handlers_sleep(&mut self) -> Result<bool> {
        self.find_handlers()?;
        for tid in &self.handlers {
            if matches!(polls(self.pid, *tid)?, Polls::Not) && !is_library_s(self.pid, *tid) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A handler keeps its name; another thread may be one that has not named itself yet.
    fn find_handlers(&mut self) -> Result<()> {
        let folder = format!("/proc/{}/task", self.pid);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if is_gone(&e) => {
                self.handlers.clear();
                return Ok(());
            }
            Err(e) => return Err(Error::io(folder, e)),
        };
        let mut alive = BTreeSet::new();
        for entry in entries.map_while(io::Result::ok) {
            let Some(tid) = entry.file_name().to_str().and_then(|s| s.parse::<u32>().ok()) else { continue };
            alive.insert(tid);
            if !self.handlers.contains(&tid)
                && fs::read_to_string(format!("{folder}/{tid}/comm")).is_ok_and(|name| name.starts_with(HANDLER))
            {
                self.handlers.insert(tid);
            }
        }
        self.handlers.retain(|tid| alive.contains(tid));
        Ok(())
    }
}

/// Is it one of the threads that the C library writes log files by (aio_write(3), lib/async-append-aio.c of Open vSwitch)?
/// Such a one has the name of the thread that logged when it was started, and waits in futex(2) for more to write, which
/// looks like a handler that works. The library starts it with all signals blocked (`__aio_create_helper_thread`,
/// sysdeps/unix/sysv/linux/aio_misc.h of glibc); a daemon's own threads block no more than its first one, but for the moment
/// in which one starts another: it neither waits nor writes then.
fn is_library_s(pid: u32, tid: u32) -> bool {
    let blocks_end = |tid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).ok()?;
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?;
        let blocked = u64::from_str_radix(blocked.trim(), 16).ok()?;
        Some([libc::SIGTERM, libc::SIGINT, libc::SIGSEGV].iter().all(|signal| blocked & (1 << (signal - 1)) != 0))
    };
    let call = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).unwrap_or_default();
    let call = call.split(' ').next().and_then(|number| number.trim().parse::<libc::c_long>().ok());
    call.is_some_and(|call| WRITES_OR_WAITS.contains(&call))
        && blocks_end(tid) == Some(true)
        && blocks_end(pid) == Some(false)
}

/// One look at process `pid` with upcall sockets `port_ids`: [`DrainWatch::idle`] without memory. The caller repeats it
/// after 5 ms, or uses [`DrainWatch::wait`].
///
/// # Errors
/// As [`DrainWatch::idle`].
pub fn drained(pid: u32, port_ids: &[u32]) -> Result<bool> {
    DrainWatch::new(pid, port_ids).idle()
}

/// The handler threads of process `pid`, in the order of their numbers; none where it has ended.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn handler_threads(pid: u32) -> Result<Vec<u32>> {
    let mut watch = DrainWatch::new(pid, &[]);
    watch.find_handlers()?;
    Ok(watch.handlers.into_iter().filter(|tid| !is_library_s(pid, *tid)).collect())
}

/// Whether a thread sleeps in poll or one of its kin.
pub(super) enum Polls {
    /// It does: the line of `/proc/PID/task/TID/syscall`.
    Yes(String),
    Not,
    /// The thread has ended.
    Gone,
}

/// What thread `tid` of process `pid` does now.
///
/// # Errors
/// [`Error::Unsupported`] where the kernel does not show it, [`Error::Io`].
pub(super) fn polls(pid: u32, tid: u32) -> Result<Polls> {
    let path = format!("/proc/{pid}/task/{tid}/syscall");
    match fs::read_to_string(&path) {
        Ok(text) => {
            let does = match sleep_of(&text) {
                Sleep::InPoll => true,
                Sleep::Not => false,
                // Where it waits in the kernel tells what was restarted: poll_schedule_timeout, do_poll, ep_poll.
                Sleep::InRestarted => {
                    fs::read_to_string(format!("/proc/{pid}/task/{tid}/wchan")).is_ok_and(|at| at.contains("poll"))
                }
            };
            Ok(if does { Polls::Yes(text) } else { Polls::Not })
        }
        Err(e) if is_gone(&e) => Ok(Polls::Gone),
        Err(e) if e.raw_os_error() == Some(libc::EPERM) || e.raw_os_error() == Some(libc::EACCES) => {
            Err(Error::Unsupported {
                what: path,
                why: "the kernel does not show what the daemon's threads wait for".into(),
                remedy: "run as root with CAP_SYS_PTRACE; lower kernel.yama.ptrace_scope below 3 (needs a reboot)"
                    .into(),
            })
        }
        Err(e) => Err(Error::io(path, e)),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Sleep {
    InPoll,
    /// In a system call that a signal interrupted and restart_syscall(2) goes on with: after SIGSTOP and SIGCONT, or
    /// a look by a debugger.
    InRestarted,
    Not,
}

/// `/proc/PID/task/TID/syscall` (Documentation/filesystems/proc.rst): `running`, or the number of the system call and
/// its arguments; -1 where the thread is blocked outside a system call.
fn sleep_of(text: &str) -> Sleep {
    match text.split_whitespace().next().and_then(|n| n.parse::<libc::c_long>().ok()) {
        Some(n) if SLEEPING_IN.contains(&n) => Sleep::InPoll,
        Some(libc::SYS_restart_syscall) => Sleep::InRestarted,
        _ => Sleep::Not,
    }
}

fn is_gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_poll_counts_as_sleep() {
        let poll = SLEEPING_IN[0];
        assert_eq!(sleep_of(&format!("{poll} 0x7f 0x1 0xffffffff 0x0 0x0 0x0 0x7ffd 0x7f00\n")), Sleep::InPoll);
        assert_eq!(sleep_of(&format!("{} 0x7f 0x1", libc::SYS_restart_syscall)), Sleep::InRestarted);
        for other in ["running\n", "-1 0x7ffd 0x7f00\n", "", &format!("{} 0x7f", libc::SYS_futex)] {
            assert_eq!(sleep_of(other), Sleep::Not);
        }
    }

    #[test]
    fn a_thread_that_works_is_not_drained_and_one_that_polls_is() {
        use std::os::fd::AsRawFd;
        let (mut stop, wait) = std::io::pipe().map(|(r, w)| (w, r)).unwrap();
        let sleeper = std::thread::Builder::new()
            .name("handler7".into())
            .spawn(move || {
                let mut poll = libc::pollfd { fd: wait.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one pollfd that lives through the call.
                unsafe { libc::poll(&mut poll, 1, 20_000) };
            })
            .unwrap();
        let mut watch = DrainWatch::new(std::process::id(), &[]);
        // The thread names itself after it has begun. Some sandboxes do not show system calls: nothing to test there.
        let start = Instant::now();
        while watch.idle().is_ok_and(|idle| !idle || watch.handlers() == 0) {
            assert!(start.elapsed() < Duration::from_secs(20), "the thread is never seen asleep");
        }
        // A thread of the C library's with a handler's name waits in futex(2), and holds no upcall.
        let mut all = nix::sys::signal::SigSet::all();
        let before = all.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK).unwrap();
        let (writes, written) = std::sync::mpsc::channel::<()>();
        let (begun, begins) = std::sync::mpsc::channel();
        let library_s = std::thread::Builder::new()
            .name("handler7".into())
            .spawn(move || {
                begun.send(()).unwrap();
                written.recv().unwrap_err()
            })
            .unwrap();
        all = before;
        all.thread_set_mask().unwrap();
        begins.recv().unwrap();
        // The first thread may be starting one just now.
        let start = Instant::now();
        while watch.idle().is_ok_and(|idle| !idle) {
            assert!(start.elapsed() < Duration::from_secs(20), "{}", watch.held_up_by());
        }
        assert!(watch.idle().is_err() || watch.handlers() == 2);
        drop(writes);
        library_s.join().unwrap();
        std::io::Write::write_all(&mut stop, b"x").unwrap();
        sleeper.join().unwrap();
        assert!(drained(u32::MAX >> 2, &[]).unwrap());
    }
}

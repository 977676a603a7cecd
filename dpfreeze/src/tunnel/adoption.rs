//! The thread that watches a starting daemon and turns its requests into questions.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libc::pid_t;

use super::message::{Change, Guard, Request};
use super::tracee::{Stop, Syscall, Tracee};
use crate::devices::policing::make_ingress_anew;
use crate::devices::{self, delete_ingress, Policer};
use crate::error::{Error, Result};
use crate::freeze::Halt;

/// No request of OVS for a port is longer: the change is in its first bytes, the name close behind.
const LOOKED_AT: usize = 4096;
/// `UIO_MAXIOV` (linux/uio.h)
const MAX_PARTS: usize = 1024;
/// `ERESTARTSYS` to `ERESTART_RESTARTBLOCK` (linux/errno.h of the kernel itself): only a tracer sees them.
const ERESTART: std::ops::RangeInclusive<i64> = 512..=516;
/// A daemon that deletes policing to make it anew goes on with that at once.
const UNPOLICED_AFTER: Duration = Duration::from_millis(20);
/// How often a tracing thread that should end is woken.
const KICK_EVERY: Duration = Duration::from_millis(2);

/// What became of the requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Ports whose number the daemon asked for in place of adding them: they are its own now. Devices whose policing it asked
    /// for in place of making it.
    pub adopted: Vec<String>,
    /// Ports that the daemon asked to delete and has not adopted. If the database has no such tunnel any more at the
    /// end of the run, the deletion is to be repeated; else the daemon is not done yet.
    pub stale: Vec<String>,
    /// Deletions of ports turned into questions.
    pub port_deletions: u64,
    /// Deletions of devices turned into questions.
    pub device_deletions: u64,
    /// Devices that the daemon asked not to police any more.
    pub unpoliced: Vec<String>,
    /// Requests that should have been changed and could not be.
    pub failed: Vec<String>,
    /// How long the daemon was watched.
    pub watched: Duration,
    /// How often its main thread was stopped for it.
    pub stops: u64,
}

impl Report {
    fn note(&mut self, request: Request, name: &str) {
        match request {
            Request::AddPort => {
                self.stale.retain(|n| n != name);
                push_once(&mut self.adopted, name);
            }
            Request::DeletePort => {
                self.port_deletions += 1;
                push_once(&mut self.stale, name);
            }
            Request::DeleteDevice => self.device_deletions += 1,
            Request::DeletePolicing => push_once(&mut self.unpoliced, name),
            // It was to be made anew, with what comes next; whether it does is not waited for.
            Request::AddPolicing => self.unpoliced.retain(|n| n != name),
            Request::Police | Request::PoliceOtherwise => {
                self.unpoliced.retain(|n| n != name);
                push_once(&mut self.adopted, name);
            }
        }
    }
}

fn push_once(names: &mut Vec<String>, name: &str) {
    if !names.iter().any(|n| n == name) {
        names.push(name.to_owned());
    }
}

#[derive(Default)]
struct Shared {
    report: Mutex<Report>,
    changed: Condvar,
    ended: AtomicBool,
    stop: AtomicBool,
}

impl Shared {
    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A daemon whose main thread is watched from [`Adoption::attach`] to [`Adoption::finish`], or until every guarded
/// port is its own. Dropping it lets the daemon go; so does the kernel if this process dies.
pub struct Adoption {
    shared: Arc<Shared>,
    wanted: usize,
    thread: Option<JoinHandle<()>>,
}

impl Adoption {
    /// Begins to watch process `pid`, which began at `start_time` (field 22 of /proc/PID/stat, clock ticks).
    ///
    /// The process may be stopped by SIGSTOP, and then stays so. It must not have begun to use the datapath: what it
    /// has done to its tunnel ports before is not undone.
    ///
    /// With `halt`, which must be for this process, it is stopped at its requests for ports only; without it at every
    /// system call, about 1,500 times while Open vSwitch 3.1 takes over.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the process must not or cannot be traced, with the remedy; [`Error::Io`] if it is gone
    /// or another one by now.
    pub fn attach(pid: i32, start_time: u64, guard: Guard, halt: Option<Halt>) -> Result<Self> {
        let wanted = guard.len();
        install_kick()?;
        let shared = Arc::new(Shared::default());
        let (tell, told) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("tunnel-ports".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || watch(pid, start_time, &guard, halt, &shared, &tell)
            })
            .map_err(|e| Error::io("thread for the tunnel ports", e))?;
        let adoption = Adoption { shared, wanted, thread: Some(thread) };
        match told.recv() {
            Ok(Ok(())) => Ok(adoption),
            Ok(Err(e)) => Err(e),
            Err(_) => Err(Error::io("thread for the tunnel ports", io::Error::other("it ended at once"))),
        }
    }

    /// Waits until the daemon has adopted every guarded port and device, but for those that it was asked not to police any
    /// more, for `limit` at most; true if it has. Also returns (false) when the daemon ends.
    pub fn wait(&self, limit: Duration) -> bool {
        let mut end = Instant::now() + limit;
        let mut others_since = None;
        let mut report = self.shared.report();
        loop {
            if report.adopted.len() >= self.wanted {
                return true;
            }
            let now = Instant::now();
            let all = report.adopted.len() + report.unpoliced.len() >= self.wanted;
            others_since = all.then(|| others_since.unwrap_or(now));
            if let Some(since) = others_since {
                end = end.min(since + UNPOLICED_AFTER);
            }
            let left = end.saturating_duration_since(now);
            if left.is_zero() || self.shared.ended.load(Ordering::Acquire) {
                return all;
            }
            let waited = self.shared.changed.wait_timeout(report, left);
            report = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What became of the requests up to now.
    pub fn report(&self) -> Report {
        self.shared.report().clone()
    }

    /// Lets the daemon go, and says what became of the requests.
    pub fn finish(mut self) -> Report {
        self.end();
        self.report()
    }

    /// The thread may be waiting in the kernel for the daemon's next stop: a signal gets it out of there. One that
    /// comes just before the wait is lost, so it is repeated.
    fn end(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.stop.store(true, Ordering::Release);
        while !thread.is_finished() {
            // SAFETY: the thread has not been joined, so its id is valid; the signal has a handler that does nothing.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
            std::thread::sleep(KICK_EVERY);
        }
        let _ = thread.join();
    }
}

impl Drop for Adoption {
    fn drop(&mut self) {
        self.end();
    }
}

/// A real-time signal that neither Rust's nor C's run-time uses.
fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 7
}

extern "C" fn kicked(_signal: i32) {}

fn install_kick() -> Result<()> {
    // SAFETY: an all-zero sigaction is valid: no flags (above all no SA_RESTART, so that waitpid returns), empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = kicked as extern "C" fn(i32) as usize;
    // SAFETY: the handler does nothing, which is async-signal-safe.
    match unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(Error::io("handler for the signal that ends the watch", io::Error::last_os_error())),
    }
}

/// Body of the thread: everything that ptrace asks of one and the same thread.
fn watch(
    pid: pid_t,
    start_time: u64,
    guard: &Guard,
    halt: Option<Halt>,
    shared: &Shared,
    tell: &mpsc::Sender<Result<()>>,
) {
    let begun = Instant::now();
    match take(pid, start_time) {
        Err(e) => drop(tell.send(Err(e))),
        Ok((tracee, first)) => {
            let _ = tell.send(Ok(()));
            let every_syscall = halt.is_none();
            let mut watch = Watch { tracee, guard, halt, every_syscall, sending: false, shared, pending: Vec::new() };
            if let Err(e) = watch.follow(first) {
                shared.report().failed.push(format!("process {pid}: {e}"));
            }
        }
    }
    shared.report().watched = begun.elapsed();
    shared.ended.store(true, Ordering::Release);
    shared.changed.notify_all();
}

/// Seizes the process, and returns when it is in its first stop.
fn take(pid: pid_t, start_time: u64) -> Result<(Tracee, Stop)> {
    let what = || format!("process {pid}");
    let tracee = Tracee::seize(pid).map_err(|e| refused(pid, e))?;
    let first = loop {
        match tracee.wait() {
            Ok(Some(stop)) => break stop,
            Ok(None) => return Err(Error::io(what(), io::Error::from_raw_os_error(libc::ESRCH))),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(what(), e)),
        }
    };
    match start_time_of(pid) {
        Ok(found) if found == start_time => Ok((tracee, first)),
        other => {
            let _ = tracee.detach(0);
            let why = other.map_or_else(|e| e.to_string(), |found| format!("began at {found}, not {start_time}"));
            Err(Error::io(what(), io::Error::other(format!("another process by now: {why}"))))
        }
    }
}

fn refused(pid: pid_t, error: io::Error) -> Error {
    if error.raw_os_error() != Some(libc::EPERM) {
        return Error::io(format!("tracing of process {pid}"), error);
    }
    Error::Unsupported {
        what: format!("tracing of process {pid} for its tunnel ports"),
        why: "refused (EPERM): another tracer (gdb, strace), kernel.yama.ptrace_scope=3 or SELinux's deny_ptrace"
            .into(),
        remedy: "end the other tracer, set ptrace_scope to 2 or less (3 needs a reboot), setsebool deny_ptrace off"
            .into(),
    }
}

/// Deletes this policing, if it is there as it was.
fn delete(policer: &Policer) -> Result<()> {
    let now = devices::read(&BTreeSet::from([policer.name.clone()]))?.remove(&policer.name);
    let now = now.map(|device| devices::policer(&device)).transpose()?.flatten();
    if now.as_ref() == Some(policer) {
        delete_ingress(policer.ifindex)?;
    }
    Ok(())
}

/// Field 22 of /proc/PID/stat.
fn start_time_of(pid: pid_t) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let behind_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    behind_name.split_whitespace().nth(19).and_then(|f| f.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

struct Watch<'a> {
    tracee: Tracee,
    guard: &'a Guard,
    halt: Option<Halt>,
    /// Stops at system calls: always without a halt, otherwise from its signal until the message is sent.
    every_syscall: bool,
    /// Is in `sendmsg`.
    sending: bool,
    shared: &'a Shared,
    /// Changes of the system call under way: they count when it has succeeded.
    pending: Vec<Change>,
}

impl Watch<'_> {
    fn follow(&mut self, first: Stop) -> io::Result<()> {
        let mut stop = first;
        self.wait_for_halt()?;
        loop {
            let mut signal = if let Stop::Signal(signal) = stop { signal } else { 0 };
            if stop == Stop::Syscall {
                self.syscall()?;
            } else if self.is_halt(stop)? {
                signal = 0;
            }
            if self.pending.is_empty() && self.done() {
                // While it is stopped: what it believes to be deleted it may make anew as soon as it runs.
                self.delete_policing();
                // A process that is stopped as a whole stays so: the kernel keeps that state apart from ours.
                return self.tracee.detach(signal);
            }
            match stop {
                Stop::Group => self.tracee.listen()?,
                _ if self.every_syscall => self.tracee.run_to_syscall(signal)?,
                _ => self.tracee.run(signal)?,
            }
            match self.next()? {
                Some(next) => stop = next,
                None => return Ok(()),
            }
        }
    }

    fn next(&mut self) -> io::Result<Option<Stop>> {
        loop {
            match self.tracee.wait() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    if self.shared.stop.load(Ordering::Acquire) {
                        self.tracee.interrupt()?;
                    }
                }
                Ok(stop) => {
                    self.shared.report().stops += 1;
                    return Ok(stop);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Back to the next request for a port, where a halt tells of it.
    fn wait_for_halt(&mut self) -> io::Result<()> {
        if let Some(halt) = &self.halt {
            halt.on().map_err(io::Error::other)?;
            self.every_syscall = false;
        }
        Ok(())
    }

    /// Is this the stop of a request for a port? Then that is sent again, and looked at on its way.
    fn is_halt(&mut self, stop: Stop) -> io::Result<bool> {
        let Some(halt) = self.halt.as_ref().filter(|_| stop == Stop::Signal(Halt::SIGNAL)) else { return Ok(false) };
        halt.off().map_err(io::Error::other)?;
        self.every_syscall = true;
        Ok(true)
    }

    fn done(&self) -> bool {
        self.shared.stop.load(Ordering::Acquire) || self.shared.report().adopted.len() >= self.guard.len()
    }

    fn syscall(&mut self) -> io::Result<()> {
        match self.tracee.syscall()? {
            Some(Syscall::Entry(number, arguments)) if number == libc::SYS_sendmsg as u64 => {
                self.sending = true;
                // What cannot be read is the daemon's own fault: the kernel will tell it EFAULT.
                if let Err(e) = self.sendmsg(arguments[1]) {
                    tracing::debug!("sendmsg of the watched daemon: {e}");
                }
            }
            Some(Syscall::Exit(value)) => {
                self.came_out(value);
                if std::mem::take(&mut self.sending) {
                    self.wait_for_halt()?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Changes the guarded requests among what this sendmsg is about to send.
    fn sendmsg(&mut self, message: u64) -> io::Result<()> {
        for (address, length) in self.parts(message)? {
            let bytes = self.tracee.read(address, length.min(LOOKED_AT))?;
            for change in self.guard.changes(&bytes) {
                if change.request == Request::PoliceOtherwise {
                    self.make_room_for_policing(&change);
                    self.pending.push(change);
                    continue;
                }
                match self.tracee.write(address + change.at as u64, &change.bytes) {
                    Ok(()) => self.pending.push(change),
                    Err(e) => self.failed(&change, &e.to_string()),
                }
            }
        }
        Ok(())
    }

    /// What was left to it of its deletions is done, where nobody else has put anything there.
    fn delete_policing(&self) {
        let unpoliced = self.shared.report().unpoliced.clone();
        for policer in self.guard.policed.iter().filter(|one| unpoliced.contains(&one.name)) {
            if let Err(error) = delete(policer) {
                self.shared.report().failed.push(format!("policing of {}: {error}", policer.name));
            }
        }
    }

    /// It has been told that the qdisc is new.
    fn make_room_for_policing(&self, change: &Change) {
        if let Err(error) = make_ingress_anew(self.guard.policed[change.of].ifindex) {
            self.failed(change, &error.to_string());
        }
    }

    /// `msg_iov` of the `struct msghdr` at `address`.
    fn parts(&self, address: u64) -> io::Result<Vec<(u64, usize)>> {
        let word = |bytes: &[u8], at: usize| {
            let word = bytes.get(at..).and_then(|b| b.first_chunk::<{ size_of::<usize>() }>());
            word.map(|w| usize::from_ne_bytes(*w)).ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))
        };
        let header = self.tracee.read(address, size_of::<libc::msghdr>())?;
        let list = word(&header, std::mem::offset_of!(libc::msghdr, msg_iov))? as u64;
        let count = word(&header, std::mem::offset_of!(libc::msghdr, msg_iovlen))?.min(MAX_PARTS);
        let list = self.tracee.read(list, count * size_of::<libc::iovec>())?;
        list.chunks_exact(size_of::<libc::iovec>())
            .map(|part| Ok((word(part, 0)? as u64, word(part, size_of::<usize>())?)))
            .collect()
    }

    fn came_out(&mut self, value: i64) {
        // Interrupted by a signal, it is sent again, by the kernel or by nl_sock_transact_multiple__, as changed.
        let sent = value >= 0 || value == -i64::from(libc::EINTR) || ERESTART.contains(&-value);
        for change in std::mem::take(&mut self.pending) {
            if !sent {
                self.failed(&change, &io::Error::from_raw_os_error(-value as i32).to_string());
            } else {
                let name = self.guard.name(&change);
                tracing::debug!("{name}: {:?} turned into a question", change.request);
                self.shared.report().note(change.request, name);
                self.shared.changed.notify_all();
            }
        }
    }

    fn failed(&self, change: &Change, why: &str) {
        let name = self.guard.name(change);
        self.shared.report().failed.push(format!("{:?} of {name}: {why}", change.request));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::fd::AsRawFd;
    use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

    use nix::sys::signal::{kill, Signal};
    use nix::sys::socket::{recv, sendmsg, socketpair, AddressFamily, MsgFlags, SockFlag, SockType};
    use nix::unistd::Pid;

    use super::super::Backer;
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);
    const DAEMON: &str = "tunnel::adoption::tests::stand_in_for_a_daemon";

    /// `OVS_VPORT_CMD_NEW` of vxlan_sys_4789 in datapath 7, as OVS 3.1 sends it; the family is 31.
    fn add_port() -> Vec<u8> {
        let mut m = vec![52, 0, 0, 0, 31, 0, 0x0d, 0, 1, 0, 0, 0, 9, 0, 0, 0, 1, 1, 0, 0, 7, 0, 0, 0];
        m.extend([19, 0, 3, 0]);
        m.extend(b"vxlan_sys_4789\0\0");
        m.extend([8, 0, 2, 0, 1, 0, 0, 0]);
        m
    }

    fn guard() -> Guard {
        let backers = vec![Backer { name: "vxlan_sys_4789".into(), port_no: 3 }];
        Guard { dp_ifindex: 7, vport_family: 31, backers, policed: Vec::new() }
    }

    /// Not a test: what the tests below trace. It says which thread to watch (the test harness keeps the main one for
    /// itself); for each line it reads, that thread sends the request and says what came out of the socket.
    #[test]
    #[ignore = "run by the other tests"]
    fn stand_in_for_a_daemon() {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::empty()).expect("socketpair");
        println!("\nready {}", nix::unistd::gettid());
        for _ in std::io::stdin().lock().lines() {
            let request = add_port();
            let (head, rest) = request.split_at(0);
            let parts = [std::io::IoSlice::new(head), std::io::IoSlice::new(rest)];
            sendmsg::<()>(a.as_raw_fd(), &parts, &[], MsgFlags::empty(), None).expect("sendmsg");
            let mut got = [0; 256];
            let length = recv(b.as_raw_fd(), &mut got, MsgFlags::empty()).expect("recv");
            println!("sent {:?}", &got[..length]);
        }
    }

    struct Daemon {
        child: Child,
        to: ChildStdin,
        from: BufReader<ChildStdout>,
        thread: i32,
    }

    impl Daemon {
        fn start() -> Self {
            let mut child = Command::new(std::env::current_exe().expect("own path"))
                .args(["--exact", DAEMON, "--ignored", "--nocapture", "--test-threads=1"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("the test binary");
            let (to, from) = (child.stdin.take().expect("pipe"), child.stdout.take().expect("pipe"));
            let mut daemon = Daemon { child, to, from: BufReader::new(from), thread: 0 };
            let ready = daemon.line("ready");
            daemon.thread = ready.rsplit(' ').next().and_then(|t| t.parse().ok()).expect("a thread id");
            daemon
        }

        fn line(&mut self, begin: &str) -> String {
            let mut line = String::new();
            while !line.starts_with(begin) {
                line.clear();
                assert_ne!(self.from.read_line(&mut line).expect("its output"), 0, "it ended early");
            }
            line.trim_end().to_owned()
        }

        fn wake(&mut self) {
            writeln!(self.to).expect("its input");
        }

        fn attach(&self, guard: Guard) -> Result<Adoption> {
            Adoption::attach(self.thread, start_time_of(self.thread).expect("/proc"), guard, None)
        }

        fn status(&self, field: &str) -> String {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.thread)).expect("/proc");
            let line = status.lines().find_map(|l| l.strip_prefix(field)).expect("field");
            line.trim_start_matches(':').trim().to_owned()
        }

        fn wait_for_status(&self, field: &str, begin: &str) {
            let end = Instant::now() + LIMIT;
            while !self.status(field).starts_with(begin) {
                assert!(Instant::now() < end, "{field} is {}, not {begin}", self.status(field));
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    impl Drop for Daemon {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    fn question() -> String {
        let mut question = add_port();
        question[16] = 3; // OVS_VPORT_CMD_GET
        format!("sent {question:?}")
    }

    #[test]
    fn a_waiting_daemon_is_watched_until_the_port_is_its_own() {
        let mut daemon = Daemon::start();
        let adoption = daemon.attach(guard()).expect("attach");
        daemon.wake();
        assert_eq!(daemon.line("sent"), question());
        assert!(adoption.wait(LIMIT));
        daemon.wait_for_status("TracerPid", "0");
        daemon.wake();
        assert_eq!(daemon.line("sent"), format!("sent {:?}", add_port()), "let go: no longer changed");
        let report = adoption.finish();
        assert_eq!((report.adopted, report.failed), (vec!["vxlan_sys_4789".to_owned()], vec![]));
    }

    #[test]
    fn policing_that_comes_again_is_not_to_be_deleted() {
        let mut report = Report::default();
        report.note(Request::DeletePolicing, "v1");
        assert_eq!(report.unpoliced, ["v1"]);
        report.note(Request::AddPolicing, "v1");
        assert_eq!(report.unpoliced, Vec::<String>::new(), "let go before the filter comes, it must find the qdisc");
        report.note(Request::Police, "v1");
        assert_eq!(report.adopted, ["v1"]);
    }

    #[test]
    fn a_device_that_is_not_policed_any_more_is_not_waited_for() {
        let adoption = Adoption { shared: Arc::default(), wanted: 2, thread: None };
        assert!(!adoption.wait(Duration::from_millis(5)));
        adoption.shared.report().note(Request::DeletePolicing, "v1");
        assert!(!adoption.wait(Duration::from_millis(5)), "one is still to come");
        adoption.shared.report().note(Request::AddPort, "vxlan_sys_4789");
        let begun = Instant::now();
        assert!(adoption.wait(LIMIT));
        assert!(begun.elapsed() < LIMIT / 2, "it was waited for: {:?}", begun.elapsed());
    }

    #[test]
    fn finish_lets_an_idle_daemon_go() {
        let mut daemon = Daemon::start();
        let adoption = daemon.attach(guard()).expect("attach");
        assert_ne!(daemon.status("TracerPid"), "0");
        assert!(!adoption.wait(Duration::from_millis(20)));
        assert_eq!(adoption.finish().adopted, Vec::<String>::new());
        assert_eq!(daemon.status("TracerPid"), "0");
        daemon.wake();
        assert_eq!(daemon.line("sent"), format!("sent {:?}", add_port()));
    }

    #[test]
    fn a_stopped_daemon_stays_stopped_and_is_watched_when_it_goes_on() {
        let mut daemon = Daemon::start();
        kill(Pid::from_raw(daemon.child.id() as i32), Signal::SIGSTOP).expect("SIGSTOP");
        daemon.wait_for_status("State", "T");
        drop(daemon.attach(guard()).expect("attach"));
        daemon.wait_for_status("TracerPid", "0");
        daemon.wait_for_status("State", "T (stopped)");
        let adoption = daemon.attach(guard()).expect("attach again");
        daemon.wake();
        assert!(!adoption.wait(Duration::from_millis(100)), "it must not run yet");
        kill(Pid::from_raw(daemon.child.id() as i32), Signal::SIGCONT).expect("SIGCONT");
        assert_eq!(daemon.line("sent"), question());
        assert!(adoption.wait(LIMIT));
    }

    #[test]
    fn another_process_of_that_number_is_let_go() {
        let daemon = Daemon::start();
        let start = start_time_of(daemon.thread).expect("/proc");
        let error = Adoption::attach(daemon.thread, start + 1, guard(), None).err().expect("an error").to_string();
        assert!(error.contains("another process by now"), "{error}");
        daemon.wait_for_status("TracerPid", "0");
    }

    #[test]
    fn a_second_tracer_is_told_why_and_what_to_do() {
        let daemon = Daemon::start();
        let _first = daemon.attach(guard()).expect("attach");
        let error = daemon.attach(guard()).err().expect("an error").to_string();
        assert!(error.contains("EPERM") && error.contains("end the other tracer"), "{error}");
    }

    #[test]
    fn the_end_of_the_daemon_ends_the_watch() {
        let mut daemon = Daemon::start();
        let adoption = daemon.attach(guard()).expect("attach");
        daemon.child.kill().expect("SIGKILL");
        assert!(!adoption.wait(LIMIT));
        assert!(adoption.shared.ended.load(Ordering::Acquire));
    }
}

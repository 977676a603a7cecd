//! The daemons of this host, found by what they own and held by pidfd.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dpfreeze::netlink::table::{self, NetlinkSocketRow};
use dpfreeze::netlink::Protocol;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::container::{self, Root};
use super::jsonrpc::{remaining, Connection};
use super::pid_file::PidFile;
use super::{command, process_tree, procfs, program, spawn, unixctl};
use crate::host::{
    Context, Daemon, DaemonKind, Daemons, HostError, ProcessId, Result, SavedProgram, Signal, Starting, Versions,
};

/// Where a program is looked for after the daemon's own PATH (`ovs-ctl` does so too).
const PROGRAM_DIRECTORIES: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin";
/// Where the loader looks first (ld.so(8)).
const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";
/// Between two looks at a file or a socket that somebody else makes.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// The daemons of this host.
#[derive(Debug)]
pub struct RealDaemons {
    database_socket: PathBuf,
    held: Mutex<BTreeMap<ProcessId, Arc<OwnedFd>>>,
    roots: Mutex<BTreeMap<ProcessId, Arc<Root>>>,
}

impl RealDaemons {
    /// The daemons around the database socket `database_socket`, usually `/run/openvswitch/db.sock`.
    pub fn new(database_socket: impl Into<PathBuf>) -> Self {
        RealDaemons { database_socket: database_socket.into(), held: Mutex::default(), roots: Mutex::default() }
    }

    /// The pidfd of this very process, opened now where it is not held yet.
    fn hold(&self, id: ProcessId) -> Result<Arc<OwnedFd>> {
        let object = format!("process {}", id.pid);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fd) = held.get(&id) {
            return Ok(fd.clone());
        }
        let fd = Arc::new(pidfd_open(id.pid).about(&object)?);
        // Looked at after the open: from here on the number cannot pass to another process unseen.
        if procfs::identity(id.pid).about(&object)? != id {
            return Err(HostError::new(object, "it has ended, and its number belongs to another process"));
        }
        held.insert(id, fd.clone());
        Ok(fd)
    }

    /// The files of the container that `daemon` runs in, held from now on.
    fn hold_root(&self, daemon: &Daemon) -> Result<Arc<Root>> {
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(root) = roots.get(&daemon.id) {
            return Ok(root.clone());
        }
        let object = format!("root directory of process {}", daemon.id.pid);
        let root = Arc::new(Root::of(daemon.id.pid).about(&object)?);
        if procfs::identity(daemon.id.pid).about(&object)? != daemon.id {
            return Err(HostError::new(object, "the process has ended"));
        }
        roots.insert(daemon.id, root.clone());
        Ok(root)
    }

    /// From now on programs that this host does not have are those of this daemon's container, where it runs in one.
    fn take_tools_of(&self, daemon: Daemon) -> Result<Daemon> {
        if daemon.contained {
            container::take_tools_from(self.hold_root(&daemon)?);
        }
        Ok(daemon)
    }

    /// The process of the program of `old` that has the PID file, another than that.
    fn holds_pid_file(old: &Daemon, file: &PidFile) -> Result<Option<i32>> {
        let is_it =
            |pid: &i32| procfs::runs(*pid, old.kind.program()) && procfs::identity(*pid).is_ok_and(|id| id != old.id);
        Ok(file.holder()?.filter(is_it))
    }

    /// The process behind the database socket, by its credentials.
    fn database_listener(&self) -> Result<i32> {
        let object = self.database_socket.display().to_string();
        let connection = Connection::connect(&self.database_socket)?;
        Ok(getsockopt(connection.stream(), PeerCredentials).about(object)?.pid())
    }
}

impl Daemons for RealDaemons {
    fn find_vswitchd(&self, upcall_port_ids: &[u32]) -> Result<Daemon> {
        let object = "ovs-vswitchd";
        let inodes = upcall_socket_inodes(upcall_port_ids).about("/proc/net/netlink")?;
        let owns = |pid: &i32| procfs::socket_inodes(*pid).is_ok_and(|own| !own.is_disjoint(&inodes));
        let candidates = procfs::pids().about("/proc")?.into_iter();
        // Our own parked duplicates share the sockets: only the program itself counts.
        let owners: Vec<i32> =
            candidates.filter(|pid| procfs::runs(*pid, DaemonKind::OvsVswitchd.program())).filter(owns).collect();
        match owners.as_slice() {
            [pid] => self.take_tools_of(self.describe(DaemonKind::OvsVswitchd, *pid)?),
            [] => Err(HostError::new(object, "no process of it owns the upcall sockets of the datapath")
                .remedy("`ovs-graceful recover`, where a run was cut off; else `systemctl restart ovs-vswitchd`")),
            many => Err(HostError::new(object, format!("processes {many:?} all own upcall sockets of the datapath"))
                .remedy("only one may run: stop the one that systemd or the PID file does not know")),
        }
    }

    fn find_ovsdb_server(&self) -> Result<Daemon> {
        let pid = self.database_listener()?;
        let kind = DaemonKind::OvsdbServer;
        if !procfs::runs(pid, kind.program()) {
            return Err(HostError::new(
                self.database_socket.display().to_string(),
                format!("process {pid} listens, which is not an {}", kind.program()),
            ));
        }
        self.describe(kind, pid)
    }

    fn find_all(&self, kind: DaemonKind) -> Result<Vec<Daemon>> {
        let pids = procfs::pids().about("/proc")?.into_iter().filter(|pid| procfs::runs(*pid, kind.program()));
        // One that ends while we look is no daemon any more.
        let all = pids.filter_map(|pid| self.describe(kind, pid).ok());
        let all: Vec<Daemon> = all.filter(|daemon| daemon.control.exists() && may_be_ours(daemon)).collect();
        if let [one] = all.as_slice() {
            self.take_tools_of(one.clone())?;
        }
        Ok(all)
    }

    fn describe(&self, kind: DaemonKind, pid: i32) -> Result<Daemon> {
        let object = format!("{} (pid {pid})", kind.program());
        let id = procfs::identity(pid).about(&object)?;
        self.hold(id)?;
        let daemon = describe(kind, id).about(object)?;
        if daemon.contained && may_be_ours(&daemon) {
            // As long as it lives: it may be too late when it is wanted.
            self.hold_root(&daemon)?;
        }
        Ok(daemon)
    }

    fn is_alive(&self, id: ProcessId) -> bool {
        self.wait_end(id, Instant::now()).is_ok_and(|ended| !ended)
    }

    fn signal(&self, id: ProcessId, signal: Signal) -> Result<()> {
        let number = match signal {
            Signal::Stop => libc::SIGSTOP,
            Signal::Continue => libc::SIGCONT,
            Signal::Terminate => libc::SIGTERM,
            Signal::Kill => libc::SIGKILL,
        };
        pidfd_send_signal(&*self.hold(id)?, number).about(format!("process {}: {signal:?}", id.pid))
    }

    fn end_monitor(&self, daemon: &Daemon, until: Instant) -> Result<()> {
        let Some(monitor) = daemon.monitor.filter(|monitor| self.is_alive(*monitor)) else { return Ok(()) };
        let object = format!("monitor of {} (pid {})", daemon.kind.program(), monitor.pid);
        for id in process_tree::end(monitor, until).about(&object)? {
            if !self.wait_end(id, until)? {
                return Err(HostError::timeout(object, format_args!("waiting for the end of process {}", id.pid)));
            }
        }
        Ok(())
    }

    fn started_since(&self, cgroup: &str, ticks: u64) -> Result<Vec<ProcessId>> {
        let inside = |pid: &i32| procfs::cgroup(*pid).is_ok_and(|own| own == cgroup);
        let hook =
            |pid: &i32| procfs::words(*pid, "cmdline").is_ok_and(|words| words.get(1).is_some_and(|w| w == "hook"));
        let all = procfs::pids().about("/proc")?.into_iter().filter(inside).filter(|pid| !hook(pid));
        Ok(all.filter_map(|pid| procfs::identity(pid).ok()).filter(|id| id.start_time >= ticks).collect())
    }

    fn listens(&self, daemon: &Daemon) -> bool {
        daemon.control.exists()
    }

    fn wait_end(&self, id: ProcessId, until: Instant) -> Result<bool> {
        let fd = match self.hold(id) {
            Ok(fd) => fd,
            Err(_) if procfs::identity(id.pid).ok() != Some(id) => return Ok(true),
            Err(error) => return Err(error),
        };
        readable(&*fd, until).about(format!("process {}", id.pid))
    }

    fn running_version(&self, daemon: &Daemon, until: Instant) -> Result<String> {
        version_in(daemon, &self.command(daemon, "version", &[], until)?)
    }

    fn versions(&self, daemon: &Daemon, until: Instant) -> Result<Versions> {
        let running = self.running_version(daemon, until)?;
        if daemon.contained {
            // What the next container brings is not known before it is there.
            return Ok(Versions { installed: running.clone(), running });
        }
        let program = installed_program(daemon)?;
        let text = command::run_well(&program.to_string_lossy(), &["--version"], None, until)?;
        Ok(Versions { installed: version_in(daemon, &text)?, running })
    }

    fn command(&self, daemon: &Daemon, command: &str, arguments: &[&str], until: Instant) -> Result<String> {
        unixctl::command(&daemon.control, command, arguments, until)
    }

    fn set_aside_pid_file(&self, old: &Daemon) -> Result<()> {
        PidFile::new(&old.pid_file).set_aside(old.own_pid)
    }

    fn wait_pid_file(&self, old: &Daemon, until: Instant) -> Result<Daemon> {
        let file = PidFile::new(&old.pid_file);
        loop {
            if let Some(own_pid) = file.pid()? {
                match Self::holds_pid_file(old, &file)? {
                    Some(pid) => return self.describe(old.kind, pid),
                    None if own_pid == old.own_pid => {}
                    None => {
                        return Err(HostError::new(
                            old.pid_file.display().to_string(),
                            format!("it names process {own_pid}, which is not an {}", old.kind.program()),
                        ))
                    }
                }
            }
            pause(until, old.pid_file.display(), "waiting for the new daemon's PID file")?;
        }
    }

    fn swap_pid_file(&self, old: &Daemon, new: &Daemon) -> Result<()> {
        PidFile::new(&old.pid_file).swap(old.own_pid, new.own_pid)
    }

    fn settle_pid_file(&self, owner: &Daemon) -> Result<()> {
        PidFile::new(&owner.pid_file).settle(owner.own_pid)
    }

    fn wait_standby(&self, standby: &Daemon, until: Instant) -> Result<()> {
        let object = format!("standby {} (pid {})", standby.kind.program(), standby.id.pid);
        loop {
            if !self.is_alive(standby.id) {
                return Err(HostError::new(object, "it ended").remedy(match &standby.log_file {
                    Some(log) => format!("see {}", log.display()),
                    None => String::new(),
                }));
            }
            // Until its control socket is there the answer is an error; that is part of starting.
            let memory = self.command(standby, "memory/show", &[], until).ok();
            match memory.map(|memory| unixctl::parse_memory(&memory, "idl-cells")) {
                Some(Some(cells)) if cells > 0 => return Ok(()),
                // Before 2.17 memory/show does not tell, and 2.15 answers with nothing: the line of bridge_run() does.
                Some(None) if says_it_waits(standby) => return Ok(()),
                _ => pause(until, &object, "waiting until it has read the database")?,
            }
        }
    }

    fn start_like(&self, model: &Daemon) -> Result<Box<dyn Starting>> {
        if model.contained {
            return Err(HostError::new(model.kind.program(), "it ran in a container, which is not ours to start")
                .remedy("start that container"));
        }
        spawn::start_like(model, &installed_program(model)?)
    }

    fn start_saved(&self, model: &Daemon, saved: &SavedProgram) -> Result<Box<dyn Starting>> {
        if model.contained {
            return spawn::start_in_container(self.hold_root(model)?, model, &saved.program);
        }
        let mut model = model.clone();
        if let Some(path) = saved.library_path(variable(&model.environment, LIBRARY_PATH)) {
            model.environment.retain(|(name, _)| name != LIBRARY_PATH);
            model.environment.push((LIBRARY_PATH.to_owned(), path));
        }
        spawn::start_like(&model, &saved.program)
    }

    fn replaced(&self, daemon: &Daemon) -> Result<Vec<String>> {
        self.hold(daemon.id)?;
        match daemon.contained {
            true => Ok(Vec::new()),
            false => program::replaced(daemon.id.pid).about(daemon.exe.display().to_string()),
        }
    }

    fn save_program(
        &self,
        daemon: &Daemon,
        version: &str,
        folders: &[PathBuf],
        until: Instant,
    ) -> Result<SavedProgram> {
        self.hold(daemon.id)?;
        if daemon.contained {
            return program::keep_in_container(&self.hold_root(daemon)?, daemon, version, until);
        }
        program::save(daemon, version, folders, until)
    }

    fn remove_stale_pid_files(&self, model: &Daemon) -> Result<()> {
        let running = self.find_all(model.kind)?;
        PidFile::new(&model.pid_file).remove_stale(|own_pid| running.iter().any(|one| one.own_pid == own_pid))
    }
}

/// The version in what a daemon or its program says of itself.
fn version_in(daemon: &Daemon, text: &str) -> Result<String> {
    let object = || format!("{} (pid {})", daemon.kind.program(), daemon.id.pid);
    unixctl::parse_version(text)
        .ok_or_else(|| HostError::new(object(), format!("cannot read a version out of {text:?}")))
}

/// Anybody may run a program of that name in namespaces of his own, where it has whichever number he likes.
fn may_be_ours(daemon: &Daemon) -> bool {
    let shares = |namespace: &str| procfs::shares(daemon.id.pid, namespace).unwrap_or(false);
    !daemon.contained || (shares("user") && shares("net"))
}

/// Sleeps a moment, or fails with a time-out of `object` where `until` has passed.
fn pause(until: Instant, object: impl ToString, doing: &str) -> Result<()> {
    match remaining(until) {
        Some(left) => std::thread::sleep(left.min(LOOK_AGAIN)),
        None => return Err(HostError::timeout(object.to_string(), doing)),
    }
    Ok(())
}

/// Reads all of [`Daemon`] from /proc.
pub(super) fn describe(kind: DaemonKind, id: ProcessId) -> std::io::Result<Daemon> {
    let pid = id.pid;
    let argv = procfs::words(pid, "cmdline")?;
    let environment: Vec<(String, String)> = procfs::words(pid, "environ")?
        .into_iter()
        .filter_map(|word| word.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())))
        .collect();
    let stat = procfs::stat(pid)?;
    let (exe, exe_deleted) = procfs::exe(pid)?;
    let (uid, gid) = procfs::owner(pid)?;
    let own_pid = procfs::own_pid(pid)?;
    let monitored = argv.iter().any(|a| a == "--monitor") && procfs::runs(stat.parent, kind.program());
    Ok(Daemon {
        kind,
        id,
        exe,
        exe_deleted,
        pid_file: run_path(&argv, &environment, "--pidfile", &format!("{}.pid", kind.program())),
        control: run_path(&argv, &environment, "--unixctl", &format!("{}.{own_pid}.ctl", kind.program())),
        log_file: log_file(&argv, &environment, kind),
        cwd: procfs::cwd(pid)?,
        comm: stat.comm,
        nice: stat.nice,
        limits: procfs::limits(pid)?,
        oom_score_adj: procfs::number(pid, "oom_score_adj")?,
        umask: procfs::umask(pid)?,
        uid,
        gid,
        cgroup: procfs::cgroup(pid)?,
        monitor: monitored.then(|| procfs::identity(stat.parent).ok()).flatten(),
        own_pid,
        contained: procfs::is_contained(pid)?,
        argv,
        environment,
    })
}

/// The value of option `name` in `argv`: `Some(None)` where it stands without one.
fn option<'a>(argv: &'a [String], name: &str) -> Option<Option<&'a str>> {
    argv.iter().rev().find_map(|word| match word.strip_prefix(name)? {
        "" => Some(None),
        rest => rest.strip_prefix('=').map(Some),
    })
}

fn variable<'a>(environment: &'a [(String, String)], name: &str) -> Option<&'a str> {
    environment.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

/// A file of the run directory that `option` may name (`abs_file_name` in `lib/util.c`), in canonical form: /var/run
/// is a link to /run.
fn run_path(argv: &[String], environment: &[(String, String)], name: &str, default: &str) -> PathBuf {
    let directory = Path::new(variable(environment, "OVS_RUNDIR").unwrap_or("/run/openvswitch"));
    let path = directory.join(option(argv, name).flatten().unwrap_or(default));
    match (path.parent().and_then(|parent| parent.canonicalize().ok()), path.file_name()) {
        (Some(parent), Some(file)) => parent.join(file),
        _ => path,
    }
}

fn log_file(argv: &[String], environment: &[(String, String)], kind: DaemonKind) -> Option<PathBuf> {
    let directory = Path::new(variable(environment, "OVS_LOGDIR").unwrap_or("/var/log/openvswitch"));
    let named = option(argv, "--log-file")?;
    Some(directory.join(named.map_or_else(|| format!("{}.log", kind.program()), str::to_owned)))
}

/// The program that a start would run now: `argv[0]` as the daemon's PATH finds it.
fn installed_program(daemon: &Daemon) -> Result<PathBuf> {
    let name = daemon.argv.first().map_or(daemon.kind.program(), String::as_str);
    if name.contains('/') {
        return Ok(PathBuf::from(name));
    }
    let own = variable(&daemon.environment, "PATH").unwrap_or_default();
    let directories = own.split(':').chain(PROGRAM_DIRECTORIES.split(':')).filter(|d| !d.is_empty());
    let mut programs = directories.map(|directory| Path::new(directory).join(name));
    programs
        .find(|path| path.is_file())
        .ok_or_else(|| HostError::new(name, "it is not installed").remedy("install the openvswitch package again"))
}

/// The inodes of the generic netlink sockets with these port ids.
fn upcall_socket_inodes(port_ids: &[u32]) -> dpfreeze::Result<BTreeSet<u64>> {
    let generic = |row: &NetlinkSocketRow| row.protocol == Protocol::Generic as u32;
    let rows = table::read()?.into_iter().filter(generic);
    Ok(rows.filter(|row| port_ids.contains(&row.port_id)).map(|row| row.inode).collect())
}

/// Does the end of the standby's log say that it waits for the lock (`bridge_run` in `vswitchd/bridge.c`)?
fn says_it_waits(standby: &Daemon) -> bool {
    let line = format!("disabling this process (pid {})", standby.own_pid);
    let end = standby.log_file.as_deref().and_then(|path| tail(path, 256 << 10).ok());
    end.is_some_and(|text| text.contains(&line))
}

/// The last `length` bytes of a file.
fn tail(path: &Path, length: u64) -> std::io::Result<String> {
    let mut file = fs::File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(length)))?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `pidfd_open(2)`; the descriptor is close-on-exec.
fn pidfd_open(pid: i32) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes two integers and returns a new descriptor or -1.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `pidfd_send_signal(2)`.
fn pidfd_send_signal(fd: &impl AsRawFd, signal: i32) -> nix::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is what the call documents for "as kill(2) would".
    Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal, no_info, 0) }).map(drop)
}

/// Waits until `fd` is readable; a pidfd is when its process has ended.
fn readable(fd: &impl AsFd, until: Instant) -> nix::Result<bool> {
    loop {
        let left = remaining(until).map_or(Duration::ZERO, |left| left + Duration::from_millis(1));
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) if remaining(until).is_none() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn files_of_a_daemon_follow_its_options() {
        let argv =
            words("ovs-vswitchd unix:/x --log-file=/var/log/openvswitch/v.log --pidfile=/nonexistent/v.pid --detach");
        assert_eq!(run_path(&argv, &[], "--pidfile", "ovs-vswitchd.pid"), Path::new("/nonexistent/v.pid"));
        let environment = [("OVS_RUNDIR".to_owned(), "/nonexistent-run".to_owned())];
        let control = run_path(&argv, &environment, "--unixctl", "ovs-vswitchd.7.ctl");
        assert_eq!(control, Path::new("/nonexistent-run/ovs-vswitchd.7.ctl"));
        assert_eq!(log_file(&argv, &[], DaemonKind::OvsVswitchd).unwrap(), Path::new("/var/log/openvswitch/v.log"));
        assert_eq!(option(&words("a --pidfile b"), "--pidfile"), Some(None));
        assert_eq!(option(&words("a --pidfilex=1"), "--pidfile"), None);
    }

    #[test]
    fn a_monitor_ends_with_what_it_has_started() {
        let daemons = RealDaemons::new("/nonexistent/db.sock");
        let until = Instant::now() + Duration::from_secs(10);
        // It starts one after the other, as a monitor does whose daemon crashes.
        let script = "while :; do sleep 30 & wait $!; done";
        let mut shell = std::process::Command::new("sh").args(["-c", script]).spawn().unwrap();
        let monitor = procfs::identity(shell.id() as i32).unwrap();
        let started = loop {
            match procfs::children(monitor.pid).unwrap().as_slice() {
                [one] => break *one,
                _ => std::thread::sleep(LOOK_AGAIN),
            }
        };
        let daemon = Daemon { monitor: None, ..describe(DaemonKind::OvsVswitchd, started).unwrap() };
        daemons.end_monitor(&daemon, until).unwrap();
        assert!(daemons.is_alive(started) && daemons.is_alive(monitor));
        let daemon = Daemon { monitor: Some(monitor), ..daemon };
        daemons.end_monitor(&daemon, until).unwrap();
        assert!(!daemons.is_alive(started) && !daemons.is_alive(monitor));
        daemons.end_monitor(&daemon, until).unwrap();
        shell.wait().unwrap();
    }

    #[test]
    fn a_process_is_held_signalled_and_seen_to_end() {
        let daemons = RealDaemons::new("/nonexistent/db.sock");
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let id = procfs::identity(child.id() as i32).unwrap();
        assert!(daemons.is_alive(id));
        let other = ProcessId { start_time: id.start_time + 1, ..id };
        assert!(!daemons.is_alive(other) && daemons.signal(other, Signal::Kill).is_err());
        assert!(!daemons.wait_end(id, Instant::now() + Duration::from_millis(20)).unwrap());
        daemons.signal(id, Signal::Terminate).unwrap();
        assert!(daemons.wait_end(id, Instant::now() + Duration::from_secs(5)).unwrap());
        child.wait().unwrap();
        assert!(!daemons.is_alive(id) && daemons.signal(id, Signal::Kill).is_err());
    }
}

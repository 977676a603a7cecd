//! The daemons of this host, found by what they own and held by pidfd.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dpfreeze::netlink::table::{self, NetlinkSocketRow};
use dpfreeze::netlink::Protocol;
use dpfreeze::park::Handlers;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use super::assemble::RUN_DIRECTORY;
use super::command::Question;
use super::container::{self, Root};
use super::credentials::Credentials;
use super::identity::{is_of_unit, the_likely, RunDirectory};
use super::jsonrpc::{remaining, Connection};
use super::listener::{self, Listener};
use super::pid_file::PidFile;
use super::{process_tree, procfs, program, server_state, spawn, trusted, unixctl, Systemd};
use crate::host::{
    Context, Daemon, DaemonKind, Daemons, HostError, Logs, ProcessId, Result, SavedProgram, ServerState,
    ServiceManager, Signal, Sources, Starting, Versions,
};

/// Its process, which stays the peer of a socket that it has begun to listen on (SO_PEERCRED, unix(7)).
const SYSTEMD: i32 = 1;
/// How long systemd may take to say what its unit starts.
const UNIT_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at a file or a socket that somebody else makes.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// The daemons of this host.
#[derive(Debug)]
pub struct RealDaemons {
    database_socket: PathBuf,
    held: Mutex<BTreeMap<ProcessId, Arc<OwnedFd>>>,
    roots: Mutex<BTreeMap<ProcessId, Arc<Root>>>,
    listeners: Mutex<BTreeMap<ProcessId, Vec<Listener>>>,
}

impl RealDaemons {
    /// The daemons around the database socket `database_socket`, usually `/run/openvswitch/db.sock`.
    pub fn new(database_socket: impl Into<PathBuf>) -> Self {
        RealDaemons {
            database_socket: database_socket.into(),
            held: Mutex::default(),
            roots: Mutex::default(),
            listeners: Mutex::default(),
        }
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

    /// The directory of the daemons' sockets and PID files.
    fn run_directory(&self) -> Result<RunDirectory> {
        RunDirectory::open(self.database_socket.parent().unwrap_or(Path::new("/")))
    }

    /// The process that has the PID file of `old`, another than that, where it can be a daemon in its place.
    fn holds_pid_file(&self, old: &Daemon, file: &PidFile) -> Result<Option<i32>> {
        let run_directory = self.run_directory()?;
        let is_it = |pid: &i32| {
            run_directory.admits(old.kind, *pid)
                && procfs::identity(*pid).is_ok_and(|id| id != old.id)
                && may_follow(old, *pid)
        };
        Ok(file.holder()?.filter(is_it))
    }

    /// The process that began to listen on the database socket (SO_PEERCRED, unix(7)). It may have ended since, where it
    /// handed the socket on.
    fn database_peer(&self) -> Result<i32> {
        Ok(Connection::connect(&self.database_socket)?.peer()?.pid())
    }

    /// The sockets at the database's path on which systemd listens.
    fn sockets_of_systemd(&self) -> io::Result<BTreeSet<u64>> {
        let mut inodes = procfs::listening(SYSTEMD, &self.database_socket)?;
        let own = procfs::socket_inodes(SYSTEMD)?;
        inodes.retain(|inode| own.contains(inode));
        Ok(inodes)
    }

    /// The process behind the database socket, by its credentials; where another has begun to listen, which is systemd or
    /// one that the server was started by, the one that this very socket was handed to.
    fn database_listener(&self) -> Result<i32> {
        let object = || self.database_socket.display().to_string();
        if self.would_start_database() {
            return Err(HostError::new(object(), ONLY_SYSTEMD));
        }
        let listener = self.database_peer()?;
        let (kind, run_directory) = (DaemonKind::OvsdbServer, self.run_directory()?);
        let of_systemd = listener == SYSTEMD;
        if !of_systemd && run_directory.admits(kind, listener) {
            return Ok(listener);
        }
        let systemds = if of_systemd { self.sockets_of_systemd().about(object())? } else { BTreeSet::new() };
        // One that systemd has made and let go of, as with `systemctl restart ovsdb-server.socket`, is the server's alone.
        let by_systemd = !systemds.is_empty();
        let inodes = match by_systemd {
            true => systemds,
            // It is in the network namespace of who began to listen, or in ours where that one has ended.
            false => procfs::listening(listener, &self.database_socket)
                .or_else(|_| procfs::listening(std::process::id().cast_signed(), &self.database_socket))
                .about(object())?,
        };
        let has_it = |pid: &i32| procfs::socket_inodes(*pid).is_ok_and(|own| !own.is_disjoint(&inodes));
        let known = |pid: &i32| by_systemd || run_directory.holds_pid_file(kind, *pid);
        let all = procfs::pids().about("/proc")?.into_iter();
        let owners = all.filter(|pid| run_directory.admits(kind, *pid)).filter(known).filter(has_it).collect();
        match the_one_with_a_lock(&run_directory, kind, owners).as_slice() {
            [pid] => Ok(*pid),
            [] if of_systemd => Err(HostError::new(object(), ONLY_SYSTEMD)),
            // What is wrong with it is told by who describes it.
            [] => Ok(listener),
            many => Err(HostError::new(object(), format!("processes {many:?} all have the socket behind it"))),
        }
    }
}

/// Who connects has systemd start the server.
const ONLY_SYSTEMD: &str = "systemd listens, and no ovsdb-server runs that has its socket";

/// Whose upcall sockets these are, among `owners`: a process that they were handed to, or that a daemon has forked, has
/// no PID file locked.
fn the_one_with_a_lock(run_directory: &RunDirectory, kind: DaemonKind, owners: Vec<i32>) -> Vec<i32> {
    let locked: Vec<i32> = owners.iter().copied().filter(|pid| run_directory.holds_pid_file(kind, *pid)).collect();
    match (owners.len(), locked.is_empty()) {
        (0 | 1, _) | (_, true) => owners,
        (_, false) => locked,
    }
}

/// A daemon whose user is not root and that is in its unit is followed by one in the same unit: only root puts a process
/// there.
fn may_follow(old: &Daemon, pid: i32) -> bool {
    let bound = !trusted::is_ours(old.uid) && !old.contained && is_of_unit(old.kind, &old.cgroup);
    !bound || procfs::cgroup(pid).is_ok_and(|cgroup| cgroup == old.cgroup)
}

/// Is the program of the kind in one of the places of packages?
pub fn is_program_installed(kind: DaemonKind) -> bool {
    container::search(container::directories(), kind.program(), trusted::program).is_ok()
}

/// The port ids of the upcall sockets that an ovs-vswitchd, another than `but`, has bound, by CPU, where the kernel does not
/// tell; none where none has handler threads.
///
/// # Errors
/// Where several have; as [`Handlers::all`], or where `some` will do as [`Handlers::some`].
pub(super) fn port_ids_of_handlers(but: Option<ProcessId>, some: bool, patience: Duration) -> Result<Vec<u32>> {
    let run_directory = RunDirectory::open(Path::new(RUN_DIRECTORY))?;
    let kind = DaemonKind::OvsVswitchd;
    let is_one = |pid: &i32| {
        run_directory.admits(kind, *pid)
            && run_directory.holds_pid_file(kind, *pid)
            && !but.is_some_and(|but| procfs::identity(*pid).is_ok_and(|id| id == but))
    };
    let pids = procfs::pids().about("/proc")?.into_iter().filter(is_one).filter_map(|pid| u32::try_from(pid).ok());
    let of_one = |pid| {
        let seen = Handlers::of(pid, patience)?;
        if some {
            seen.some()
        } else {
            seen.all()
        }
    };
    let of_each = pids.map(|pid| of_one(pid).about("ovs-vswitchd"));
    let mut found: Vec<Vec<u32>> = of_each.collect::<Result<_>>()?;
    found.retain(|port_ids| !port_ids.is_empty());
    match found.len() {
        0 | 1 => Ok(found.pop().unwrap_or_default()),
        many => Err(HostError::new("ovs-vswitchd", format!("{many} of them have sockets for upcalls"))
            .remedy("only one may run: stop the one that systemd or the PID file does not know")),
    }
}

/// The program of the kind that this host has installed, which the daemon itself has no say in: its unit's, where that
/// starts it without a script; that in one of the places of packages; where there is none the file that the kernel says
/// a daemon of root's runs. Nobody but root can have put it there.
fn installed_program(daemon: &Daemon, until: Instant) -> Result<PathBuf> {
    let name = daemon.kind.program();
    let of_unit =
        Systemd::default().owner(daemon, until).ok().flatten().and_then(|unit| unit.exec_start.into_iter().next());
    let of_unit = of_unit.map(PathBuf::from).filter(|program| program.ends_with(name));
    let folder = |path: &PathBuf| path.parent().map(Path::to_path_buf);
    let of_kernel = trusted::is_ours(daemon.uid).then(|| daemon.exe.clone()).filter(|program| program.ends_with(name));
    let folders = of_unit.as_ref().and_then(folder).into_iter().chain(container::directories());
    container::search(folders.chain(of_kernel.as_ref().and_then(folder)), name, trusted::program)
        .map_err(|e| HostError::new(name, e).remedy("install the openvswitch package again"))
}

impl Daemons for RealDaemons {
    fn find_vswitchd(&self, upcall_port_ids: &[u32]) -> Result<Daemon> {
        let object = "ovs-vswitchd";
        let kind = DaemonKind::OvsVswitchd;
        let run_directory = self.run_directory()?;
        let inodes = upcall_socket_inodes(upcall_port_ids).about("/proc/net/netlink")?;
        let owns = |pid: &i32| procfs::socket_inodes(*pid).is_ok_and(|own| !own.is_disjoint(&inodes));
        let candidates = procfs::pids().about("/proc")?.into_iter();
        // Our own parked duplicates share the sockets, and whoever has been handed one: only a daemon counts.
        let owners: Vec<i32> = candidates.filter(|pid| run_directory.admits(kind, *pid)).filter(owns).collect();
        match the_one_with_a_lock(&run_directory, kind, owners).as_slice() {
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
        if !self.run_directory()?.admits(kind, pid) {
            return Err(HostError::new(
                self.database_socket.display().to_string(),
                format!("process {pid} listens, which is not an {}", kind.program()),
            ));
        }
        self.describe(kind, pid)
    }

    fn would_start_database(&self) -> bool {
        let handed = self.sockets_of_systemd().unwrap_or_default();
        if handed.is_empty() {
            return false;
        }
        // After a reload by ovs-ctl the server's own socket lies over systemd's. Of other sockets the name says nothing.
        let all = procfs::listening(SYSTEMD, &self.database_socket).unwrap_or_default();
        let directory = self.run_directory().ok();
        let is_server = |pid: i32| directory.as_ref().is_some_and(|one| one.admits(DaemonKind::OvsdbServer, pid));
        let has =
            |pid: i32, sockets: &BTreeSet<u64>| procfs::socket_inodes(pid).is_ok_and(|own| !own.is_disjoint(sockets));
        let serves = |pid: i32| pid != SYSTEMD && has(pid, &handed) || has(pid, &all) && is_server(pid);
        !procfs::pids().into_iter().flatten().any(serves)
    }

    fn systemd_listens(&self) -> Result<bool> {
        let holds = || self.sockets_of_systemd().map(|sockets| !sockets.is_empty());
        Ok(self.database_peer()? == SYSTEMD && holds().about(self.database_socket.display().to_string())?)
    }

    fn keep_listening(&self, daemon: &Daemon) -> Result<()> {
        let held = listener::of(daemon, self.hold(daemon.id)?.as_fd());
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).insert(daemon.id, held);
        Ok(())
    }

    fn find_all(&self, kind: DaemonKind) -> Result<Vec<Daemon>> {
        let Ok(run_directory) = self.run_directory() else { return Ok(Vec::new()) };
        let is_one = |pid: &i32| run_directory.admits(kind, *pid) && run_directory.holds_pid_file(kind, *pid);
        let pids = procfs::pids().about("/proc")?.into_iter().filter(is_one);
        // One that ends while we look is no daemon any more.
        let all = pids.filter_map(|pid| self.describe(kind, pid).ok());
        let all = the_likely(all.filter(|daemon| daemon.control.exists() && may_be_ours(daemon)).collect());
        if let [one] = all.as_slice() {
            self.take_tools_of(one.clone())?;
        }
        Ok(all)
    }

    fn describe(&self, kind: DaemonKind, pid: i32) -> Result<Daemon> {
        let object = format!("{} (pid {pid})", kind.program());
        let id = procfs::identity(pid).about(&object)?;
        self.hold(id)?;
        let run_directory = self.run_directory()?;
        run_directory.expect(kind, pid)?;
        let before = face(pid).about(&object)?;
        let daemon = run_directory.believe(describe(kind, id).about(&object)?);
        // An exec keeps the number and all that is open, and changes the user where the program has the set-user-ID bit.
        run_directory.expect(kind, pid)?;
        if face(pid).about(&object)? != before || procfs::identity(pid).about(&object)? != id {
            return Err(HostError::new(object, "it runs another program, or as another user, than a moment ago"));
        }
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
        let all = procfs::pids().about("/proc")?.into_iter().filter(inside).filter(|pid| !is_our_hook(*pid));
        Ok(all.filter_map(|pid| procfs::identity(pid).ok()).filter(|id| id.start_time >= ticks).collect())
    }

    fn listens(&self, daemon: &Daemon) -> bool {
        unixctl::connect(daemon).is_ok()
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
        let question = Question {
            program: installed_program(daemon, until)?,
            root: None,
            folder: None,
            library_path: None,
            credentials: Credentials::of_question(daemon),
        };
        Ok(Versions { installed: version_in(daemon, &question.ask(until)?)?, running })
    }

    fn command(&self, daemon: &Daemon, command: &str, arguments: &[&str], until: Instant) -> Result<String> {
        unixctl::command(daemon, command, arguments, until)
    }

    fn set_aside_pid_file(&self, old: &Daemon) -> Result<()> {
        PidFile::new(&old.pid_file).set_aside(old.own_pid)
    }

    fn wait_pid_file(&self, old: &Daemon, until: Instant) -> Result<Daemon> {
        let file = PidFile::new(&old.pid_file);
        loop {
            if let Some(own_pid) = file.pid()? {
                match self.holds_pid_file(old, &file)? {
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
        let program = installed_program(model, Instant::now() + UNIT_LIMIT)?;
        let kept = self.listeners.lock().unwrap_or_else(PoisonError::into_inner).remove(&model.id).unwrap_or_default();
        let by_path = format!("punix:{}", self.database_socket.display());
        let model = Daemon { argv: listener::without_lost(&model.argv, &kept, &by_path), ..model.clone() };
        spawn::start_like(&model, &program, kept)
    }

    fn start_saved(&self, model: &Daemon, saved: &SavedProgram) -> Result<Box<dyn Starting>> {
        if model.contained {
            return spawn::start_in_container(self.hold_root(model)?, model, &saved.program);
        }
        spawn::start_saved(model, saved)
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

    fn server_state(&self, server: &Daemon, until: Instant) -> Result<ServerState> {
        self.hold(server.id)?;
        server_state::read(server, until)
    }

    fn logs(&self, daemon: &Daemon, until: Instant) -> Result<Logs> {
        server_state::logs(daemon, until)
    }

    fn sources(&self, server: &Daemon, options: &[PathBuf]) -> Sources {
        server_state::sources(server, options)
    }
}

/// The version in what a daemon or its program says of itself.
fn version_in(daemon: &Daemon, text: &str) -> Result<String> {
    let object = || format!("{} (pid {})", daemon.kind.program(), daemon.id.pid);
    unixctl::parse_version(text)
        .ok_or_else(|| HostError::new(object(), format!("cannot read a version out of {text:?}")))
}

/// Our reload hook, which systemd waits for: a process of root's that runs this very program.
fn is_our_hook(pid: i32) -> bool {
    let file = |pid: &str| fs::metadata(format!("/proc/{pid}/exe")).map(|exe| (exe.dev(), exe.ino()));
    let same = file(&pid.to_string()).is_ok_and(|theirs| file("self").is_ok_and(|own| own == theirs));
    let roots = procfs::users(pid).is_ok_and(|users| users.iter().all(|user| trusted::is_ours(*user)));
    same && roots && procfs::words(pid, "cmdline").is_ok_and(|words| words.get(1).is_some_and(|word| word == "hook"))
}

/// A container has the host's network, and no users of its own.
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
    let (groups, capabilities) = (procfs::groups(pid)?, procfs::capabilities(pid)?);
    let own_pid = procfs::own_pid(pid)?;
    // Looked at before and after: the number could have passed to another process.
    let parent = procfs::identity(stat.parent).ok();
    let monitored = argv.iter().any(|a| a == "--monitor")
        && is_monitor(stat.parent, pid)
        && procfs::identity(stat.parent).ok() == parent;
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
        groups,
        capabilities,
        cgroup: procfs::cgroup(pid)?,
        monitor: parent.filter(|_| monitored),
        own_pid,
        contained: procfs::is_contained(pid)?,
        argv,
        environment,
    })
}

/// The file that a process runs, and its users.
fn face(pid: i32) -> std::io::Result<((u64, u64), Vec<u32>)> {
    let exe = fs::metadata(format!("/proc/{pid}/exe"))?;
    Ok(((exe.dev(), exe.ino()), procfs::users(pid)?))
}

/// Has `pid` been forked by `parent` to be the daemon that it looks after? Then both run one file as one user.
fn is_monitor(parent: i32, pid: i32) -> bool {
    face(parent).is_ok_and(|theirs| face(pid).is_ok_and(|own| own == theirs))
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

/// The inodes of the generic netlink sockets with these port ids.
fn upcall_socket_inodes(port_ids: &[u32]) -> dpfreeze::Result<BTreeSet<u64>> {
    let generic = |row: &NetlinkSocketRow| row.protocol == Protocol::Generic as u32;
    let rows = table::read()?.into_iter().filter(generic);
    Ok(rows.filter(|row| port_ids.contains(&row.port_id)).map(|row| row.inode).collect())
}

/// Does the end of the standby's log say that it waits for the lock (`bridge_run` in `vswitchd/bridge.c`)?
fn says_it_waits(standby: &Daemon) -> bool {
    let line = format!("disabling this process (pid {})", standby.own_pid);
    let end = standby.log_file.as_deref().and_then(|path| tail(path, standby.uid, 256 << 10).ok());
    end.is_some_and(|text| text.contains(&line))
}

/// The last `length` bytes of a file of root's or of `owner`.
fn tail(path: &Path, owner: u32, length: u64) -> std::io::Result<String> {
    let mut file = trusted::open(path, owner)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(length)))?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `pidfd_open(2)`; the descriptor is close-on-exec.
pub(super) fn pidfd_open(pid: i32) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes two integers and returns a new descriptor or -1.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `pidfd_getfd(2)`; the descriptor is close-on-exec.
pub(super) fn pidfd_getfd(process: BorrowedFd<'_>, number: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes three integers and returns a new descriptor or -1.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })?;
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `pidfd_send_signal(2)`.
pub(super) fn pidfd_send_signal(fd: &impl AsRawFd, signal: i32) -> nix::Result<()> {
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

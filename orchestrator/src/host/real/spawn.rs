//! Starts a daemon as another one was started, where no service manager owns it.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{killpg, SigSet, Signal};
use nix::unistd::Pid;

use super::container::{Root, PROGRAM_DIRECTORIES};
use super::credentials::Credentials;
use super::jsonrpc::remaining;
use super::listener::Listener;
use super::program::{self, Folder};
use super::{process_tree, procfs, trusted};
use crate::host::{Context, Daemon, HostError, Limit, Result, SavedProgram, Starting};

/// Names in `/proc/PID/limits` (`lnames` in `fs/proc/base.c`) and the resources behind them.
const RESOURCES: &[(&str, libc::__rlimit_resource_t)] = &[
    ("Max cpu time", libc::RLIMIT_CPU),
    ("Max file size", libc::RLIMIT_FSIZE),
    ("Max data size", libc::RLIMIT_DATA),
    ("Max stack size", libc::RLIMIT_STACK),
    ("Max core file size", libc::RLIMIT_CORE),
    ("Max resident set", libc::RLIMIT_RSS),
    ("Max processes", libc::RLIMIT_NPROC),
    ("Max open files", libc::RLIMIT_NOFILE),
    ("Max locked memory", libc::RLIMIT_MEMLOCK),
    ("Max address space", libc::RLIMIT_AS),
    ("Max file locks", libc::RLIMIT_LOCKS),
    ("Max pending signals", libc::RLIMIT_SIGPENDING),
    ("Max msgqueue size", libc::RLIMIT_MSGQUEUE),
    ("Max nice priority", libc::RLIMIT_NICE),
    ("Max realtime priority", libc::RLIMIT_RTPRIO),
    ("Max realtime timeout", libc::RLIMIT_RTTIME),
];

/// Where the loader looks first (ld.so(8)).
const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";
/// How long processes may take to stop.
const STOPS: Duration = Duration::from_secs(1);

/// What the child makes of itself before it becomes the daemon; prepared before the fork, because between fork and
/// exec nothing may allocate.
struct Preparation {
    limits: Vec<(libc::__rlimit_resource_t, libc::rlimit)>,
    cgroup: Option<CString>,
    oom_score_adj: CString,
    nice: i32,
    umask: u32,
    user: User,
    root: Option<Arc<Root>>,
    program_folder: Option<Folder>,
    listeners: Vec<Listener>,
}

/// As whom the daemon starts.
enum User {
    /// As root, in this group.
    Root { gid: u32 },
    /// As the user that it ran as, in the folder that it had: that of root could be one that he may not enter.
    Own { credentials: Credentials, folder: CString },
}

impl Preparation {
    fn of(model: &Daemon, place: Place) -> Result<Self> {
        let object = model.kind.program();
        let user = match trusted::is_ours(model.uid) {
            true => User::Root { gid: model.gid },
            false => User::Own {
                credentials: Credentials::of_daemon(model),
                folder: CString::new(model.cwd.as_os_str().as_bytes()).about(object)?,
            },
        };
        // That of a session may be gone, and that of a container ends with it. In ours the daemon would end with us, in
        // the root's nobody ends it.
        let own = if model.contained { "" } else { model.cgroup.as_str() };
        let procs = [own, ""].map(|cgroup| format!("/sys/fs/cgroup{cgroup}/cgroup.procs"));
        let procs = procs.into_iter().find(|procs| !model.cgroup.is_empty() && Path::new(procs).exists());
        Ok(Preparation {
            limits: model.limits.iter().filter_map(resource).collect(),
            cgroup: procs.map(CString::new).transpose().about(object)?,
            oom_score_adj: CString::new(model.oom_score_adj.to_string()).about(object)?,
            nice: model.nice,
            umask: model.umask,
            user,
            root: place.root,
            program_folder: place.program_folder,
            listeners: place.listeners,
        })
    }

    /// Runs in the child between fork and exec: system calls only.
    fn apply(&self) -> io::Result<()> {
        if let Some(procs) = &self.cgroup {
            write(procs, c"0")?;
        }
        write(c"/proc/self/oom_score_adj", &self.oom_score_adj)?;
        if let Some(root) = &self.root {
            root.enter()?;
        }
        // Ours may block signals; a daemon that inherits that cannot be told to end.
        SigSet::empty().thread_set_mask()?;
        // SAFETY: each call takes integers and pointers to values that live through it.
        unsafe {
            for (resource, limit) in &self.limits {
                check(libc::setrlimit(*resource, limit))?;
            }
            check(libc::setpriority(libc::PRIO_PROCESS, 0, self.nice))?;
            libc::umask(self.umask);
        }
        self.program_folder.as_ref().map_or(Ok(()), Folder::keep_open)?;
        self.listeners.iter().try_for_each(Listener::hand_on)?;
        match &self.user {
            // SAFETY: as above.
            User::Root { gid } => match unsafe { libc::geteuid() == 0 } {
                true => check(unsafe { libc::setgid(*gid) }),
                false => Ok(()),
            },
            User::Own { credentials, folder } => {
                credentials.take_on()?;
                // SAFETY: as above. Where he may not enter it any more he is where he may be.
                check(unsafe { libc::chdir(folder.as_ptr()) }).or_else(|_| check(unsafe { libc::chdir(c"/".as_ptr()) }))
            }
        }
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Writes a text into a file of the kernel with system calls alone.
fn write(path: &std::ffi::CStr, text: &std::ffi::CStr) -> io::Result<()> {
    // SAFETY: both strings live through the calls; the descriptor is ours and closed here.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        check(fd)?;
        let written = libc::write(fd, text.as_ptr().cast(), text.to_bytes().len());
        let result = if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        libc::close(fd);
        result
    }
}

fn resource(limit: &Limit) -> Option<(libc::__rlimit_resource_t, libc::rlimit)> {
    let (_, resource) = RESOURCES.iter().find(|(name, _)| *name == limit.name)?;
    let value = |limit: Option<u64>| limit.unwrap_or(libc::RLIM_INFINITY);
    Some((*resource, libc::rlimit { rlim_cur: value(limit.soft), rlim_max: value(limit.hard) }))
}

/// Where a program is started from.
#[derive(Default)]
struct Place {
    /// The root directory, where that is not ours.
    root: Option<Arc<Root>>,
    /// The folder of the program, where not everybody can reach that.
    program_folder: Option<Folder>,
    /// Where its shared objects are, before all others.
    libraries: Option<PathBuf>,
    /// The sockets that it is handed.
    listeners: Vec<Listener>,
}

/// Starts `program` with the command line, environment, directory, limits, priorities, user and cgroup of `model`, and with
/// `listeners`.
///
/// What a daemon says of itself is its own memory. One that ran as another user than root is started as that user, with
/// the capabilities that it had and none besides: whatever it has written there, it gains nothing. Nor does it lead the
/// new one astray: that has the daemon's own name, and variables that name files are left out.
pub fn start_like(model: &Daemon, program: &Path, listeners: Vec<Listener>) -> Result<Box<dyn Starting>> {
    start_in(Place { listeners, ..Place::default() }, model, program, &model.cwd)
}

/// The same with a program that was kept.
pub fn start_saved(model: &Daemon, saved: &SavedProgram) -> Result<Box<dyn Starting>> {
    if trusted::is_ours(model.uid) {
        let place = Place { libraries: saved.libraries.clone(), ..Place::default() };
        return start_in(place, model, &saved.program, &model.cwd);
    }
    let reached = program::reach(saved).about(saved.program.display().to_string())?;
    let place = Place { program_folder: Some(reached.folder), libraries: reached.libraries, ..Place::default() };
    start_in(place, model, &reached.program, &model.cwd)
}

/// The same with the files of a container that has ended.
pub fn start_in_container(root: Arc<Root>, model: &Daemon, program: &Path) -> Result<Box<dyn Starting>> {
    start_in(Place { root: Some(root), ..Place::default() }, model, program, Path::new("/"))
}

fn start_in(place: Place, model: &Daemon, program: &Path, folder: &Path) -> Result<Box<dyn Starting>> {
    let object = model.kind.program();
    let Some((name, arguments)) = model.argv.split_first() else {
        return Err(HostError::new(object, "its command line is empty").remedy("did it end meanwhile?"));
    };
    let roots = trusted::is_ours(model.uid);
    let (name, arguments, environment) = match roots {
        true => (name.as_str(), arguments.to_vec(), model.environment.clone()),
        false => (object, without_user(arguments), plain_environment(&model.environment)),
    };
    let libraries = place.libraries.as_ref().map(|libraries| library_path(&environment, libraries));
    let preparation = Preparation::of(model, place)?;
    let mut command = Command::new(program);
    command.arg0(name).args(&arguments).process_group(0);
    if roots {
        command.current_dir(folder);
    }
    command.env_clear().envs(environment);
    command.envs(libraries.map(|path| (LIBRARY_PATH, path)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: `apply` makes system calls only and neither allocates nor locks.
    unsafe { command.pre_exec(move || preparation.apply()) };
    let child = command.spawn().map_err(|e| {
        HostError::new(program.display().to_string(), format!("cannot be started as pid {} was: {e}", model.id.pid))
    })?;
    let detaches = arguments.iter().any(|word| word == "--detach");
    Ok(Box::new(Started { child, object, detaches }))
}

/// A daemon that has become another user does not start as that with `--user`: only root can use it
/// (`daemon_set_new_user` in `lib/daemon-unix.c`).
fn without_user(arguments: &[String]) -> Vec<String> {
    let mut left = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--user" => drop(words.next()),
            word if word.starts_with("--user=") => {}
            word => left.push(word.to_owned()),
        }
    }
    left
}

/// An environment that leads a daemon neither to other files nor to another run directory than its package's.
fn plain_environment(environment: &[(String, String)]) -> Vec<(String, String)> {
    let leads = |name: &str| ["OVS_", "LD_"].iter().any(|prefix| name.starts_with(prefix)) || name == "PATH";
    let plain = environment.iter().filter(|(name, _)| !leads(name)).cloned();
    plain.chain([("PATH".to_owned(), PROGRAM_DIRECTORIES.to_owned())]).collect()
}

/// `LD_LIBRARY_PATH` with kept shared objects before those that it has itself.
fn library_path(environment: &[(String, String)], libraries: &Path) -> String {
    let own = environment.iter().find(|(name, _)| name == LIBRARY_PATH).map(|(_, value)| value.as_str());
    let libraries = libraries.display();
    own.filter(|own| !own.is_empty()).map_or(libraries.to_string(), |own| format!("{libraries}:{own}"))
}

/// The starting command: the daemon's own parent where it detaches, else the daemon.
struct Started {
    child: Child,
    object: &'static str,
    detaches: bool,
}

impl Starting for Started {
    fn wait(&mut self, until: Instant) -> Result<bool> {
        loop {
            match self.child.try_wait().about(self.object)? {
                Some(status) if status.success() && self.detaches => return Ok(true),
                Some(status) => {
                    return Err(HostError::new(self.object, format!("its start failed: {status}")).remedy("see its log"))
                }
                None if !self.detaches => return Ok(true),
                None if remaining(until).is_none() => return Ok(false),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn cancel(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // A daemon that is about to detach, and its monitor, have a session of their own; as long as this one waits for
        // them they are its children.
        let starter = self.child.id() as i32;
        let _ = procfs::identity(starter).and_then(|id| process_tree::end(id, Instant::now() + STOPS));
        let _ = killpg(Pid::from_raw(starter), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{DaemonKind, ProcessId};

    fn model() -> Daemon {
        Daemon {
            kind: DaemonKind::OvsVswitchd,
            id: ProcessId { pid: 1, start_time: 1 },
            exe: "/bin/sleep".into(),
            exe_deleted: false,
            argv: vec!["a-name".into(), "30".into()],
            environment: vec![("A".into(), "b=c d".into())],
            cwd: "/usr".into(),
            comm: "sleep".into(),
            nice: 7,
            limits: Vec::new(),
            oom_score_adj: 321,
            umask: 0o027,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            groups: Vec::new(),
            capabilities: 0,
            cgroup: String::new(),
            monitor: None,
            pid_file: "/nonexistent".into(),
            control: "/nonexistent".into(),
            log_file: None,
            own_pid: 1,
            contained: false,
        }
    }

    #[test]
    fn a_second_start_looks_like_the_first() {
        let pid = std::process::id() as i32;
        let mut limits = procfs::limits(pid).unwrap();
        limits.iter_mut().filter(|l| l.name == "Max core file size").for_each(|l| l.soft = Some(0));
        let model = Daemon { limits: limits.clone(), ..model() };
        let mut blocked = SigSet::empty();
        blocked.add(Signal::SIGTERM);
        blocked.thread_block().unwrap();
        let mut started = start_like(&model, Path::new("/bin/sleep"), Vec::new()).unwrap();
        assert!(started.wait(Instant::now() + Duration::from_secs(1)).unwrap());
        let child = procfs::pids().unwrap().into_iter().find(|p| {
            procfs::stat(*p).is_ok_and(|s| s.parent == pid)
                && procfs::words(*p, "cmdline").is_ok_and(|w| w == model.argv)
        });
        let child = child.unwrap();
        assert_eq!(procfs::words(child, "environ").unwrap(), ["A=b=c d"]);
        assert_eq!(procfs::limits(child).unwrap(), limits);
        assert_eq!(procfs::stat(child).unwrap().nice, 7);
        let status = std::fs::read_to_string(format!("/proc/{child}/status")).unwrap();
        assert!(status.contains("SigBlk:\t0000000000000000"), "{status}");
        assert_eq!(procfs::number(child, "oom_score_adj").unwrap(), 321);
        assert_eq!((procfs::umask(child).unwrap(), procfs::cwd(child).unwrap()), (0o027, "/usr".into()));
        started.cancel();
        assert!(procfs::stat(child).is_err());
    }

    /// Whatever a daemon that ran as another user has made of its command line and its environment.
    #[test]
    fn the_daemon_of_another_user_is_never_started_as_root() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let told = folder.path().join("told");
        std::os::unix::fs::chown(folder.path(), Some(4711), Some(4712)).unwrap();
        let script = format!(
            "(echo $TZ $LD_PRELOAD $OVS_RUNDIR; id -u; id -g; id -G; grep -E 'Cap(Eff|Amb)|NoNew' /proc/self/status; echo $*) > {}",
            told.display()
        );
        let words = ["sh", "-c", &script, "x", "--user", "root", "--user=root:root", "last"];
        let model = Daemon {
            argv: words.map(str::to_owned).to_vec(),
            environment: ["PATH", "LD_PRELOAD", "OVS_RUNDIR", "TZ"].map(|name| (name.into(), "/srv/x".into())).to_vec(),
            cwd: "/root".into(),
            uid: 4711,
            gid: 4712,
            groups: vec![4713],
            // CAP_NET_ADMIN, as far as this test has it.
            capabilities: 1 << 12,
            ..model()
        };
        let own = procfs::capabilities(std::process::id() as i32).unwrap() & 1 << 12;
        let ended = |mut started: Box<dyn Starting>| {
            while !std::fs::read_to_string(&told).is_ok_and(|text| text.ends_with("last\n")) {
                assert!(started.wait(Instant::now()).is_ok());
                std::thread::sleep(Duration::from_millis(10));
            }
            let text = std::fs::read_to_string(&told).unwrap();
            std::fs::remove_file(&told).unwrap();
            text
        };
        let as_it_was =
            format!("/srv/x\n4711\n4712\n4712 4713\nCapEff:\t{own:016x}\nCapAmb:\t{own:016x}\nNoNewPrivs:\t1\nlast\n");
        assert_eq!(ended(start_like(&model, Path::new("/bin/sh"), Vec::new()).unwrap()), as_it_was);
        let closed = folder.path().join("closed");
        std::fs::create_dir_all(closed.join("program/lib")).unwrap();
        std::fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        std::fs::copy("/bin/sh", closed.join("program/sh")).unwrap();
        let saved = SavedProgram { program: closed.join("program/sh"), libraries: Some(closed.join("program/lib")) };
        assert_eq!(ended(start_saved(&model, &saved).unwrap()), as_it_was);
    }

    #[test]
    fn a_start_that_is_cancelled_ends_with_what_it_waits_for() {
        let words = ["sh", "-c", "setsid sh -c 'sleep 31 & wait' & wait", "--detach"];
        let model = Daemon { argv: words.map(str::to_owned).to_vec(), ..model() };
        let mut started = start_like(&model, Path::new("/bin/sh"), Vec::new()).unwrap();
        let sleeper = || {
            let sleeps = |pid: &i32| procfs::words(*pid, "cmdline").is_ok_and(|words| words == ["sleep", "31"]);
            procfs::pids()
                .unwrap()
                .into_iter()
                .find(sleeps)
                .filter(|pid| procfs::stat(*pid).is_ok_and(|s| s.state != 'Z'))
        };
        while sleeper().is_none() {
            assert!(!started.wait(Instant::now() + Duration::from_millis(10)).unwrap());
        }
        started.cancel();
        let end = Instant::now() + Duration::from_secs(10);
        while sleeper().is_some() {
            assert!(Instant::now() < end, "what the command had started lives");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

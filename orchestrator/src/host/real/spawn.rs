//! Starts a daemon as another one was started, where no service manager owns it.

use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{killpg, SigSet, Signal};
use nix::unistd::Pid;

use super::container::Root;
use super::jsonrpc::remaining;
use super::{process_tree, procfs};
use crate::host::{Context, Daemon, HostError, Limit, Result, Starting};

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
    owner: Option<(u32, u32)>,
    root: Option<Arc<Root>>,
}

impl Preparation {
    fn of(model: &Daemon, root: Option<Arc<Root>>) -> Result<Self> {
        let object = model.kind.program();
        // That of a session may be gone, and that of a container ends with it. In ours the daemon would end with us, in
        // the root's nobody ends it.
        let own = if model.contained { "" } else { model.cgroup.as_str() };
        let procs = [own, ""].map(|cgroup| format!("/sys/fs/cgroup{cgroup}/cgroup.procs"));
        let procs = procs.into_iter().find(|procs| !model.cgroup.is_empty() && Path::new(procs).exists());
        let switches_user = model.argv.iter().any(|word| word.starts_with("--user"));
        Ok(Preparation {
            limits: model.limits.iter().filter_map(resource).collect(),
            cgroup: procs.map(CString::new).transpose().about(object)?,
            oom_score_adj: CString::new(model.oom_score_adj.to_string()).about(object)?,
            nice: model.nice,
            umask: model.umask,
            // With --user the daemon has to start as root and changes by itself.
            owner: (!switches_user).then_some((model.uid, model.gid)),
            root,
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
            if let Some((uid, gid)) = self.owner.filter(|_| libc::geteuid() == 0) {
                check(libc::setgid(gid))?;
                check(libc::setuid(uid))?;
            }
        }
        Ok(())
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

/// Starts `program` with the command line, environment, directory, limits, priorities, user and cgroup of `model`.
pub fn start_like(model: &Daemon, program: &Path) -> Result<Box<dyn Starting>> {
    start_in(None, model, program, &model.cwd)
}

/// The same with the files of a container that has ended.
pub fn start_in_container(root: Arc<Root>, model: &Daemon, program: &Path) -> Result<Box<dyn Starting>> {
    start_in(Some(root), model, program, Path::new("/"))
}

fn start_in(root: Option<Arc<Root>>, model: &Daemon, program: &Path, folder: &Path) -> Result<Box<dyn Starting>> {
    let object = model.kind.program();
    let Some((name, arguments)) = model.argv.split_first() else {
        return Err(HostError::new(object, "its command line is empty").remedy("did it end meanwhile?"));
    };
    let preparation = Preparation::of(model, root)?;
    let mut command = Command::new(program);
    command.arg0(name).args(arguments).current_dir(folder).process_group(0);
    command.env_clear().envs(model.environment.iter().map(|(k, v)| (k, v)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: `apply` makes system calls only and neither allocates nor locks.
    unsafe { command.pre_exec(move || preparation.apply()) };
    let child = command.spawn().map_err(|e| {
        HostError::new(program.display().to_string(), format!("cannot be started as pid {} was: {e}", model.id.pid))
    })?;
    let detaches = arguments.iter().any(|word| word == "--detach");
    Ok(Box::new(Started { child, object, detaches }))
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
        let mut started = start_like(&model, Path::new("/bin/sleep")).unwrap();
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

    #[test]
    fn a_start_that_is_cancelled_ends_with_what_it_waits_for() {
        let words = ["sh", "-c", "setsid sh -c 'sleep 31 & wait' & wait", "--detach"];
        let model = Daemon { argv: words.map(str::to_owned).to_vec(), ..model() };
        let mut started = start_like(&model, Path::new("/bin/sh")).unwrap();
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

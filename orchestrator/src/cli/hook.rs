//! `hook`: what units and the run itself call.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::output::complain;
use super::{containers, doors, exit_code, log, neighbours, upgrade, HookCommand};
use crate::control::{HookClient, HookCommand as Order, HookReporter, LockError, SOCKET};
use crate::guard;
use crate::host::real::Systemd;
use crate::journal::Runs;
use crate::machine::ExitCode;
use crate::recovery;
use crate::supervisor;

/// Variables that systemd gives to ExecReload= (systemd.exec(5), `service_spawn()` in src/core/service.c) and that
/// ExecStart= may lack. `PIDFILE` is there once our drop-in sets PIDFile=.
const RELOAD_ONLY: [&str; 8] = [
    "MAINPID",
    "MAINPIDFDID",
    "NOTIFY_SOCKET",
    "PIDFILE",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "MANAGERPID",
    "MANAGERPIDFDID",
];

/// Of the process that a reload meets: never right for the next one.
const OF_THE_OLD: [&str; 2] = ["MAINPID", "MAINPIDFDID"];

/// As much of the environment of a daemon is read, bytes.
const ENVIRONMENT_MAX: u64 = 8 << 20;

/// How long the hook of a run that was cut off waits for its recovery; systemd gives that 90 s.
const RECOVERY_LIMIT: Duration = Duration::from_secs(100);

/// How long it then waits for the command that it has started; the recovery waits for the hook for 10 s.
const CHILD_LIMIT: Duration = Duration::from_secs(8);

/// Does it and returns the exit code.
pub fn hook(config: &Path, command: HookCommand) -> u8 {
    match command {
        HookCommand::Supervise(mut args) => {
            let _log = log::init();
            args.config = config.to_path_buf();
            supervise_exit(supervisor::supervise(args))
        }
        HookCommand::Reload { command } => match reload(Path::new(SOCKET), &command, None) {
            Ok(code) => code,
            Err(error) => {
                complain(&format!("hook reload: {error:#}"));
                1
            }
        },
        HookCommand::UnitReload { unit, command } => doors::unit_reload(config, unit, &command),
        HookCommand::UnitStop { unit, command } => doors::unit_stop(config, unit, &command),
        HookCommand::Neighbours => neighbours::leave_alone(config),
        HookCommand::Generate { into, more: _ } => neighbours::generate(&into),
        HookCommand::ContainerStop => containers::stop(config),
        HookCommand::ContainerStarted => containers::started(),
        HookCommand::Policy { unit, action } => upgrade::policy(config, &unit, &action),
        HookCommand::Removed => upgrade::removed(),
        HookCommand::Upgraded { restart } => upgrade::upgraded(config, restart),
        HookCommand::Stopped => stopped(config),
        HookCommand::Guard { again } => match guarded(again) {
            Ok(()) => 0,
            Err(error) => {
                complain(&format!("hook guard: {error:#}"));
                1
            }
        },
        HookCommand::WriteBack => match recovery::write_back() {
            Ok(()) => 0,
            Err(error) => {
                complain(&format!("hook write-back: {error:#}"));
                1
            }
        },
        HookCommand::Canary => canary(),
    }
}

/// A supervisor that has died is started again by systemd, with what it had parked, and recovers by itself; one that
/// dies twice is not waited for. `SERVICE_RESULT` is systemd's (systemd.exec(5)): `success` also where somebody stopped
/// the unit.
fn stopped(config: &Path) -> u8 {
    let died = std::env::var("SERVICE_RESULT").is_ok_and(|result| result != "success");
    let runs = Runs::default();
    let interrupted = runs.interrupted().ok().flatten();
    if died && interrupted.is_some_and(|id| runs.note_restart(&id)) {
        return 0;
    }
    super::recover_and_tell(config, false)
}

fn supervise_exit(result: anyhow::Result<i32>) -> u8 {
    let error = match result {
        Ok(code) => return exit_code(code),
        Err(error) => error,
    };
    tracing::error!("{error:#}");
    match error.downcast_ref() {
        Some(LockError::Held { .. }) => ExitCode::Busy.code(),
        Some(LockError::Io { .. }) | None => ExitCode::NeedsPerson.code(),
    }
}

/// The last look ends the timer that has started it.
fn guarded(again: bool) -> anyhow::Result<()> {
    if again {
        return guard::look_for_ever();
    }
    match guard::look()? {
        true => Ok(()),
        false => guard::stop_looks(&Systemd::default()),
    }
}

/// [`std::process::ExitCode`] does not tell its number: the process ends here.
fn canary() -> u8 {
    let code = dpfreeze::freeze::canary_main();
    u8::from(code != std::process::ExitCode::SUCCESS)
}

/// The unit's main process, as systemd tells the commands of its ExecReload= and ExecStop=.
pub(super) fn main_process() -> Option<String> {
    std::env::var("MAINPID").ok().filter(|pid| pid.chars().all(|c| c.is_ascii_digit()))
}

/// Is there such a process?
pub(super) fn lives(pid: &str) -> bool {
    Path::new("/proc").join(pid).exists()
}

/// Waits for the supervisor's word, in the unit's cgroup; 0 makes systemd read the PID file again. `pid_file` is that
/// where systemd does not tell.
pub(super) fn reload(socket: &Path, command: &[OsString], pid_file: Option<PathBuf>) -> anyhow::Result<u8> {
    let old = main_process();
    let hook = HookClient::open(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
    let mut hook = hook.context(
        "no run of ovs-graceful is under way; remedy: `ovs-graceful restart` instead of reloading the unit by hand",
    )?;
    let mut started = None;
    while let Some(order) = hook.next_command()? {
        match order {
            Order::Start if started.is_some() => complain("hook reload: told to start twice; started once"),
            Order::Start => started = Some(report_on(spawn(command, old.as_deref()), hook.reporter()?)?),
            Order::Finish => return Ok(0),
            Order::Cancel => return Ok(1),
        }
    }
    complain("hook reload: the run went without a word");
    // The supervisor is gone. Where the old daemon is gone too, only a reload that succeeds makes systemd look for the
    // new one; a failed one would stop the unit with the new daemon in it. Who it is to be, the recovery decides.
    if let Some(child) = &started {
        let told = std::env::var_os("PIDFILE").map(PathBuf::from);
        wait_settled(told.or(pid_file), Instant::now() + RECOVERY_LIMIT);
        // systemd notices the end of a daemon only where it is its parent: after the end of the daemon's own.
        let until = Instant::now() + CHILD_LIMIT;
        while !child.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_millis(20));
        }
    }
    let old_is_gone = old.is_some_and(|pid| !lives(&pid));
    Ok(u8::from(!(started.is_some() && old_is_gone)))
}

/// Waits until the recovery has made the name of the PID file somebody's (`host::real::pid_file`): systemd reads it
/// when we end. Older systemds do not tell which it is.
fn wait_settled(pid_file: Option<PathBuf>, until: Instant) {
    let Some(pid_file) = pid_file else { return };
    let aside = [".ovsg-old", ".ovsg-new"].map(|suffix| {
        let mut name = pid_file.clone().into_os_string();
        name.push(suffix);
        PathBuf::from(name)
    });
    while Instant::now() < until && aside.iter().any(|path| path.exists()) {
        thread::sleep(Duration::from_millis(20));
    }
}

/// Tells the supervisor of a command that was spawned, and from a thread of its own of its end.
pub(super) fn report_on(spawned: anyhow::Result<Child>, mut reporter: HookReporter) -> anyhow::Result<JoinHandle<()>> {
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            // 127, as a shell says of a command that cannot be run.
            reporter.child_exited(127)?;
            return Err(error);
        }
    };
    reporter.spawned(child.id() as i32)?;
    Ok(thread::spawn(move || {
        let status = child.wait().map_or(-1, status_number);
        // A supervisor that has gone is seen by the thread that reads from it.
        let _ = reporter.child_exited(status);
    }))
}

fn spawn(command: &[OsString], old: Option<&str>) -> anyhow::Result<Child> {
    let (program, arguments) = command.split_first().context("no command after `--`")?;
    let mut child = Command::new(program);
    child.args(arguments).stdin(Stdio::null());
    let environ = old.map(|pid| PathBuf::from("/proc").join(pid).join("environ"));
    for name in reload_only(&environ.and_then(read).unwrap_or_default()) {
        child.env_remove(name);
    }
    // SAFETY: the closure does nothing between fork and exec. It is there because std then forks and execs instead of
    // calling posix_spawn(3), which leaves glibc's SIGCANCEL (32) ignored in the program (spawni.c): the daemon's
    // SigIgn would not be that of a stock start.
    unsafe {
        child.pre_exec(|| Ok(()));
    }
    child.spawn().with_context(|| format!("cannot run {}", program.display()))
}

fn read(path: PathBuf) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    // A process decides itself how much it says.
    std::fs::File::open(path).ok()?.take(ENVIRONMENT_MAX).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The variables that the reload has and the running daemon, which ExecStart= started, has not.
fn reload_only(environ: &[u8]) -> impl Iterator<Item = &'static str> + '_ {
    let daemon_has = |name: &str| {
        let is_it = |entry: &[u8]| entry.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.starts_with(b"="));
        environ.split(|byte| *byte == 0).any(is_it)
    };
    RELOAD_ONLY.into_iter().filter(move |name| OF_THE_OLD.contains(name) || !daemon_has(name))
}

fn status_number(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{HookEvent, Server};

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn words(command: &str) -> Vec<OsString> {
        ["sh", "-c", command].map(OsString::from).to_vec()
    }

    #[test]
    fn what_the_daemon_has_from_its_own_start_is_kept() {
        let removed = |environ: &[u8]| reload_only(environ).collect::<Vec<_>>();
        assert_eq!(removed(b""), RELOAD_ONLY);
        assert!(!removed(b"PATH=/bin\0PIDFILE=/run/x.pid\0").contains(&"PIDFILE"));
        assert!(removed(b"PIDFILEX=1\0").contains(&"PIDFILE"));
        assert!(removed(b"MAINPID=1\0").contains(&"MAINPID"));
        assert!(removed(b"MAINPIDFDID=1\0").contains(&"MAINPIDFDID"));
    }

    #[test]
    fn start_spawns_and_finish_ends_with_0_and_cancel_with_1() {
        for (last, code) in [(Order::Finish, 0), (Order::Cancel, 1)] {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("run.sock");
            let server = Server::bind(&socket, "run-1").unwrap();
            let path = socket.clone();
            let hook = thread::spawn(move || reload(&path, &words("exit 3"), None));
            let mut link = server.wait_hook(soon()).unwrap();
            assert!(matches!(link.recv(soon()), Some(HookEvent::Connected { .. })));
            link.send(Order::Start).unwrap();
            assert!(matches!(link.recv(soon()), Some(HookEvent::Spawned { pid }) if pid > 0));
            assert_eq!(link.recv(soon()), Some(HookEvent::ChildExited { status: 3 }));
            link.send(last).unwrap();
            assert_eq!(hook.join().unwrap().unwrap(), code);
        }
    }

    #[test]
    fn a_command_that_is_not_there_is_told_to_the_supervisor() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run.sock");
        let server = Server::bind(&socket, "run-1").unwrap();
        let path = socket.clone();
        let hook = thread::spawn(move || reload(&path, &[OsString::from("/nonexistent/ovs-ctl")], None));
        let mut link = server.wait_hook(soon()).unwrap();
        link.recv(soon());
        link.send(Order::Start).unwrap();
        assert_eq!(link.recv(soon()), Some(HookEvent::ChildExited { status: 127 }));
        assert!(format!("{:#}", hook.join().unwrap().unwrap_err()).contains("/nonexistent/ovs-ctl"));
    }

    #[test]
    fn the_hook_of_a_run_that_was_cut_off_waits_for_the_pid_file() {
        let dir = tempfile::tempdir().unwrap();
        let (name, aside) = (dir.path().join("d.pid"), dir.path().join("d.pid.ovsg-new"));
        std::fs::write(&aside, "1").unwrap();
        let begun = Instant::now();
        wait_settled(Some(name.clone()), begun + Duration::from_millis(100));
        assert!(begun.elapsed() >= Duration::from_millis(100));
        std::fs::rename(&aside, &name).unwrap();
        wait_settled(Some(name), soon());
        wait_settled(None, soon());
        assert!(begun.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn without_a_run_it_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = reload(&dir.path().join("run.sock"), &words("true"), None).unwrap_err();
        assert!(error.to_string().contains("no run"), "{error}");
    }
}

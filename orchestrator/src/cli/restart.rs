//! `restart`: the client of a run.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use atomic_write_file::AtomicWriteFile;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::ended::{answered, fail, DETACHED};
use super::launch::{launch, Launched};
use super::output::{complain, say, say_json};
use super::plain::restart_plainly;
use super::plan::{in_words, plan};
use super::progress::Display;
use super::{containers, load, RestartArgs, SuperviseArgs};
use crate::control::{AbortAnswer, Connection, Holder, Progress, RunLock, Subscription, LOCK, SOCKET};
use crate::journal::{new_id, Runs};
use crate::machine::ExitCode;
use crate::recovery::RECOVERY;
use crate::report::{summary, Report};

/// How long a supervisor that has closed its socket may take to write its report, and systemd to start a recovery in the
/// place of one that has died: it restarts no unit before all of its processes have ended.
const REPORT_LIMIT: Duration = Duration::from_secs(15);

/// How often is looked how far the phase under way is.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How long a supervisor may take to end once it has told the end of the run.
const GONE_LIMIT: Duration = Duration::from_secs(5);

/// What reaches the client.
enum Happening {
    Progress(Box<Progress>),
    /// The supervisor closed the connection.
    Closed,
    /// Ctrl-C, or somebody who ends us.
    Interrupted,
}

/// Replaces the daemons, or says what that would be; returns the exit code.
pub fn restart(config: &Path, args: RestartArgs) -> u8 {
    if args.plain {
        return restart_plainly();
    }
    if args.plan {
        return answered(args.json, print_plan(config, &args));
    }
    if let Some(code) = no_run_now(config, args.json) {
        return code;
    }
    let ready = supervise_args(config, &args).and_then(|supervise| {
        args.report.as_deref().map_or(Ok(()), can_be_written)?;
        Ok(supervise)
    });
    match ready {
        Ok(supervise) => follow_new_run(&supervise, &args),
        Err(error) => answered(args.json, Err(error)),
    }
}

/// Can the report be written there? The folder is tried as the report itself will be written; an older report stays, and
/// what is no file is not to be replaced by one.
fn can_be_written(report: &Path) -> anyhow::Result<()> {
    let is_free = match report.metadata() {
        Ok(there) if there.is_file() => Ok(()),
        Ok(_) => Err(io::Error::other("it is there, and is no regular file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    let tried = is_free.and_then(|()| AtomicWriteFile::open(report)).and_then(AtomicWriteFile::discard);
    tried.with_context(|| {
        format!(
            "the report {} cannot be written; remedy: name a file in a folder that root can write to",
            report.display()
        )
    })
}

/// Why no run can begin, told: the exit code.
pub(super) fn no_run_now(config: &Path, json: bool) -> Option<u8> {
    // The supervisor reads it again; a misspelt key should not cost a unit that fails.
    if let Err(error) = load(config) {
        return Some(answered(json, Err(error)));
    }
    match RunLock::holder(Path::new(LOCK)) {
        Ok(None) => None,
        Ok(Some(holder)) => Some(fail(json, ExitCode::Busy.code(), &busy(&holder))),
        Err(error) => Some(answered(json, Err(error.into()))),
    }
}

fn print_plan(config: &Path, args: &RestartArgs) -> anyhow::Result<ExitCode> {
    let mut config = load(config)?;
    let elsewhere = args.restart_command.is_some();
    if elsewhere {
        config.limits.with_restart_elsewhere();
    }
    let plan = plan(crate::supervisor::check(&config, args.chosen_strategy(), elsewhere)?, args, &config);
    match args.json {
        true => say_json(&plan),
        false => say(&in_words(&plan)),
    }
    Ok(plan.check.exit_code())
}

/// The supervisor runs in `/`: relative paths are ours.
fn supervise_args(config: &Path, args: &RestartArgs) -> anyhow::Result<SuperviseArgs> {
    Ok(SuperviseArgs {
        id: new_id(),
        strategy: args.chosen_strategy(),
        if_needed: args.if_needed,
        no_ovsdb: args.no_ovsdb || args.restart_command.is_some(),
        gate_command: args.gate_command.clone(),
        report: args.report.as_ref().map(std::path::absolute).transpose()?,
        called_by: args.called_by.clone(),
        elsewhere: args.restart_command.is_some(),
        config: std::path::absolute(config)?,
    })
}

/// What to tell who comes while another run is under way.
pub(super) fn busy(holder: &Holder) -> String {
    format!("{LOCK} is held: {holder}")
}

fn follow_new_run(supervise: &SuperviseArgs, args: &RestartArgs) -> u8 {
    let (sender, happenings) = mpsc::channel();
    // Before the supervisor is started, so that Ctrl-C from now on reaches it as a wish and never kills us half-way.
    if let Err(error) = watch_signals(sender.clone()) {
        return answered(args.json, Err(error));
    }
    match launch(supervise) {
        Ok(Launched::Over(report)) => end(&report, args.json),
        Ok(Launched::Running(events)) => {
            if let Some(command) = args.restart_command.clone() {
                if let Err(error) = containers::stand_by(command) {
                    complain(&format!("{error:#}"));
                }
            }
            thread::spawn(move || forward(events, &sender));
            let follow_it = Follow { json: args.json, only_waits: false };
            follow(Path::new(SOCKET), &supervise.id, follow_it, &happenings)
        }
        Err(error) => {
            // The lock tells whether it was another run that kept ours from starting.
            let busy = matches!(RunLock::holder(Path::new(LOCK)), Ok(Some(holder)) if holder.id != supervise.id);
            let code = if busy { ExitCode::Busy } else { ExitCode::Undone };
            fail(args.json, code.code(), &format!("{error:#}"))
        }
    }
}

/// Ctrl-C and SIGTERM become happenings; a lost terminal (SIGHUP) is nothing at all.
fn watch_signals(sender: Sender<Happening>) -> anyhow::Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    // Threads that are started later inherit it, and so do programs: see launch::start_session.
    set.thread_block()?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?;
    thread::spawn(move || {
        while let Ok(Some(signal)) = signals.read_signal() {
            if signal.ssi_signo != Signal::SIGHUP as u32 && sender.send(Happening::Interrupted).is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// How a run is followed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Follow {
    /// Its report is printed as JSON.
    pub(super) json: bool,
    /// Ctrl-C is the end of the following, and nothing to the run.
    pub(super) only_waits: bool,
}

/// Follows a run that is under way to its end.
pub(super) fn follow_to_the_end(id: &str, events: Subscription, how: Follow) -> u8 {
    let (sender, happenings) = mpsc::channel();
    if let Err(error) = watch_signals(sender.clone()) {
        return answered(how.json, Err(error));
    }
    thread::spawn(move || forward(events, &sender));
    follow(Path::new(SOCKET), id, how, &happenings)
}

fn forward(mut events: Subscription, sender: &Sender<Happening>) {
    loop {
        match events.next_event() {
            Ok(Some(progress)) => {
                if sender.send(Happening::Progress(Box::new(progress))).is_err() {
                    return;
                }
            }
            Ok(None) => break,
            Err(error) => {
                complain(&format!("the words of the supervisor are lost ({error}); its report is waited for"));
                break;
            }
        }
    }
    let _ = sender.send(Happening::Closed);
}

fn follow(socket: &Path, id: &str, how: Follow, happenings: &Receiver<Happening>) -> u8 {
    let mut display = Display::new();
    display.print(&format!("run {id}"));
    loop {
        match happenings.recv_timeout(LOOK_AGAIN) {
            Ok(Happening::Progress(progress)) => {
                display.show(&progress);
                if let Progress::Finished { report, .. } = *progress {
                    display.clear();
                    let code = end(&report, how.json);
                    wait_until_gone(id, happenings);
                    return code;
                }
            }
            Ok(Happening::Interrupted) if how.only_waits => {
                display.print(&format!("not waited for any more; {}", come_back(id)));
                display.clear();
                return DETACHED;
            }
            Ok(Happening::Interrupted) => {
                if let Some(code) = interrupt(socket, id, &display) {
                    display.clear();
                    return code;
                }
            }
            // One that does not answer is nothing to complain of here: its events say how it goes on.
            Err(RecvTimeoutError::Timeout) => {
                if let Ok(Some(Ok(status))) = Connection::open(socket).map(|run| run.map(|mut run| run.status())) {
                    display.wait(&status);
                }
            }
            Ok(Happening::Closed) | Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    display.clear();
    orphaned(id, how.json)
}

/// For whoever stops following a run.
fn come_back(id: &str) -> String {
    format!("the run goes on: see `ovs-graceful status`, or come back with `ovs-graceful wait {id}`")
}

/// The lock goes with the supervisor: whoever starts the next run right after us should not find it held.
fn wait_until_gone(id: &str, happenings: &Receiver<Happening>) {
    let until = Instant::now() + GONE_LIMIT;
    loop {
        match happenings.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Happening::Progress(_)) => {}
            Ok(Happening::Closed) => break,
            Ok(Happening::Interrupted) | Err(_) => return,
        }
    }
    wait_until_free(id, until);
}

fn wait_until_free(id: &str, until: Instant) {
    let held = || matches!(RunLock::holder(Path::new(LOCK)), Ok(Some(holder)) if holder.id == id);
    while held() && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
}

/// Before the point of no return Ctrl-C undoes the run, and we stay to see it; after it we detach.
fn interrupt(socket: &Path, id: &str, display: &Display) -> Option<u8> {
    let answer = match Connection::open(socket) {
        // The end of the run is on its way to us.
        Ok(None) => return None,
        Ok(Some(mut run)) => run.abort(),
        Err(error) => Err(error),
    };
    match answer {
        Ok(AbortAnswer::Accepted) => {
            display.print("aborting: the run is being undone");
            None
        }
        Ok(AbortAnswer::Refused { why }) => {
            display.print(&format!("not aborted: {why}. Detached; {}", come_back(id)));
            Some(DETACHED)
        }
        // Its end is on its way to us.
        Ok(AbortAnswer::Over) => None,
        Err(error) => {
            display.print(&format!("the supervisor does not answer ({error}). Detached; {}", come_back(id)));
            Some(DETACHED)
        }
    }
}

/// The connection broke before the end was told.
fn orphaned(id: &str, json: bool) -> u8 {
    match wait_for_report(id) {
        Some(report) => {
            let code = end(&report, json);
            wait_until_free(id, Instant::now() + GONE_LIMIT);
            code
        }
        None => fail(
            json,
            ExitCode::NeedsPerson.code(),
            &format!("the supervisor of run {id} went without a report; remedy: `ovs-graceful recover`"),
        ),
    }
}

/// That of a run whose supervisor has gone. systemd starts a recovery in its place, and that writes the report: it is
/// waited for as long as it takes, and for its beginning so long as systemd may need.
pub(super) fn wait_for_report(id: &str) -> Option<Report> {
    let runs = Runs::default();
    let holder = || RunLock::holder(Path::new(LOCK)).ok().flatten().map(|holder| holder.id);
    await_report(|| runs.report(id).ok(), || holder().is_some_and(|of| of == id || of == RECOVERY), REPORT_LIMIT)
}

fn await_report<T>(report: impl Fn() -> Option<T>, is_worked_on: impl Fn() -> bool, patience: Duration) -> Option<T> {
    let (mut until, mut told) = (Instant::now() + patience, false);
    loop {
        // In this order: what has been written before the lock was given back is found.
        let worked_on = is_worked_on();
        if let Some(report) = report() {
            return Some(report);
        }
        if worked_on {
            until = Instant::now() + patience;
        }
        if worked_on && !told {
            complain("the supervisor has gone; its run is being recovered");
            told = true;
        }
        if Instant::now() >= until {
            return None;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Tells how a run ended; returns its exit code.
pub(super) fn end(report: &Report, json: bool) -> u8 {
    match json {
        true => say_json(report),
        false => say(summary(report, io::stdout().is_terminal()).trim_end()),
    }
    report.exit_code.code()
}

#[cfg(test)]
mod tests {
    use super::super::ended::{code_of, FAILED};
    use super::*;
    use crate::control::Server;
    use crate::machine::{Outcome, Phase};
    use crate::report::Strategy;

    #[test]
    fn a_report_is_waited_for_as_long_as_a_recovery_works_on_it() {
        let began = Instant::now();
        let patience = Duration::from_millis(300);
        let since = |ms| began.elapsed() >= Duration::from_millis(ms);
        assert!(await_report(|| None::<()>, || false, patience).is_none());
        let began = Instant::now();
        let since_again = |ms| began.elapsed() >= Duration::from_millis(ms);
        let made = || since_again(900).then_some(());
        assert!(await_report(made, || !since_again(900), patience).is_some(), "longer than the patience");
        assert!(since(900));
    }

    struct Run {
        _dir: tempfile::TempDir,
        socket: std::path::PathBuf,
        server: Server,
        sender: Sender<Happening>,
        happenings: Receiver<Happening>,
    }

    fn run() -> Run {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run.sock");
        let server = Server::bind(&socket, "run-1").unwrap();
        let (sender, happenings) = mpsc::channel();
        let mut events = Connection::open(&socket).unwrap().unwrap().subscribe().unwrap();
        assert!(matches!(events.next_event(), Ok(Some(Progress::Hello { .. }))), "as launch() waits for it");
        let forwarder = sender.clone();
        thread::spawn(move || forward(events, &forwarder));
        Run { _dir: dir, socket, server, sender, happenings }
    }

    fn how() -> Follow {
        Follow::default()
    }

    fn finished(exit_code: ExitCode) -> Progress {
        let mut report = Report::new("run-1", Strategy::Standby, 0);
        report.finish(&Outcome { exit_code, reason: "told".into() }, 1);
        Progress::Finished { exit_code: exit_code.code(), report: Box::new(report) }
    }

    #[test]
    fn the_exit_code_is_the_run_s() {
        for code in ExitCode::ALL {
            let run = run();
            run.server.tell(&Progress::PhaseBegun { phase: Phase::Check, at_ms: 0 });
            run.server.tell(&finished(code));
            run.server.close(Duration::from_secs(5));
            assert_eq!(follow(&run.socket, "run-1", how(), &run.happenings), code.code());
        }
    }

    #[test]
    fn ctrl_c_before_the_point_of_no_return_undoes_the_run_and_stays_to_see_it() {
        let Run { _dir, socket, server, sender, happenings } = run();
        sender.send(Happening::Interrupted).unwrap();
        let client = thread::spawn(move || follow(&socket, "run-1", how(), &happenings));
        let until = Instant::now() + Duration::from_secs(10);
        while !server.gate().abort_requested() {
            assert!(Instant::now() < until, "no request to abort came");
            thread::sleep(Duration::from_millis(5));
        }
        assert!(!client.is_finished());
        server.tell(&finished(ExitCode::Undone));
        server.close(Duration::from_secs(5));
        assert_eq!(client.join().unwrap(), 20);
    }

    #[test]
    fn a_second_ctrl_c_that_finds_the_run_over_does_not_keep_us_from_hearing_how_it_ended() {
        let run = run();
        run.sender.send(Happening::Interrupted).unwrap();
        run.server.gate().request_abort().unwrap();
        run.server.tell(&finished(ExitCode::Undone));
        let (sender, happenings) = mpsc::channel();
        sender.send(Happening::Interrupted).unwrap();
        if let Progress::Finished { report, exit_code } = finished(ExitCode::Undone) {
            sender.send(Happening::Progress(Box::new(Progress::Finished { report, exit_code }))).unwrap();
        }
        drop(sender);
        assert_eq!(follow(&run.socket, "run-1", how(), &happenings), 20);
    }

    #[test]
    fn ctrl_c_after_the_point_of_no_return_only_detaches() {
        let run = run();
        run.server.gate().commit().unwrap();
        run.sender.send(Happening::Interrupted).unwrap();
        assert_eq!(follow(&run.socket, "run-1", how(), &run.happenings), 12);
        assert!(!run.server.gate().abort_requested());
    }

    #[test]
    fn ctrl_c_of_one_who_only_waits_leaves_the_run_alone() {
        let run = run();
        run.sender.send(Happening::Interrupted).unwrap();
        let how = Follow { only_waits: true, ..how() };
        assert_eq!(follow(&run.socket, "run-1", how, &run.happenings), 12);
        assert!(!run.server.gate().abort_requested());
    }

    #[test]
    fn a_report_that_cannot_be_written_is_told_before_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let error = can_be_written(&dir.path().join("none/report.json")).unwrap_err();
        assert!(format!("{error:#}").contains("none/report.json") && code_of(&error) == FAILED, "{error:#}");
        let path = dir.path().join("report.json");
        std::fs::write(&path, "older").unwrap();
        can_be_written(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "older");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_report_does_not_take_the_place_of_what_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let link = |name: &str, to: &Path| {
            let path = dir.path().join(name);
            std::os::unix::fs::symlink(to, &path).unwrap();
            path
        };
        let (lasting, ring) = (link("to-folder", dir.path()), dir.path().join("ring"));
        let ring = link("ring", &ring);
        for wrong in [dir.path(), Path::new("/dev/null"), &lasting, &ring] {
            let error = can_be_written(wrong).unwrap_err();
            let text = format!("{error:#}");
            assert!(code_of(&error) == FAILED && text.contains(&*wrong.to_string_lossy()), "{text}");
        }
        can_be_written(&link("to-nothing", &dir.path().join("none"))).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }
}

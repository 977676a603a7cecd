//! Server and client over a real socket.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::machine::Phase;
use crate::report::{Level, Report, Strategy};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

struct Run {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    server: Server,
}

fn run() -> Run {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/run.sock");
    let server = Server::bind(&path, "run-1").unwrap();
    Run { _dir: dir, path, server }
}

impl Run {
    fn client(&self) -> Connection {
        Connection::open(&self.path).unwrap().unwrap()
    }
}

#[test]
fn socket_and_directory_are_private() {
    let run = run();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&run.path), 0o600);
    assert_eq!(mode(run.path.parent().unwrap()), 0o700);
}

#[test]
fn nobody_listening_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.sock");
    assert!(Connection::open(&path).unwrap().is_none());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(Connection::open(&path).unwrap().is_none(), "a socket that a dead supervisor left");
    let server = Server::bind(&path, "next").unwrap();
    assert_eq!(Connection::open(&path).unwrap().unwrap().status().unwrap().id, "next");
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_run_that_is_over_at_once_waits_for_its_client() {
    let Run { _dir, path, server } = run();
    let report = Box::new(Report::new("run-1", Strategy::Standby, 0));
    server.tell(&Progress::Finished { exit_code: 10, report });
    let client = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        let mut events = Connection::open(&path).unwrap().unwrap().subscribe().unwrap();
        std::iter::from_fn(|| events.next_event().unwrap()).last()
    });
    server.close(Duration::from_secs(20));
    assert!(matches!(client.join().unwrap(), Some(Progress::Finished { exit_code: 10, .. })));
}

#[test]
fn a_late_subscriber_hears_everything_and_the_end() {
    let run = run();
    run.server.tell(&Progress::PhaseBegun { phase: Phase::Check, at_ms: 0 });
    let mut late = run.client().subscribe().unwrap();
    assert!(matches!(late.next_event().unwrap(), Some(Progress::Hello { id, .. }) if id == "run-1"));
    assert_eq!(late.next_event().unwrap(), Some(Progress::PhaseBegun { phase: Phase::Check, at_ms: 0 }));
    let mut report = Box::new(Report::new("run-1", Strategy::Standby, 0));
    // Of all that a report has, the one map whose keys are no text.
    report.conntrack.connections_before.insert(6, 1700);
    let finished = Progress::Finished { exit_code: 40, report };
    run.server.tell(&finished);
    run.server.close(Duration::from_secs(5));
    assert_eq!(late.next_event().unwrap(), Some(finished));
    assert_eq!(late.next_event().unwrap(), None);
}

#[test]
fn a_subscriber_that_does_not_read_does_not_hold_the_run_up() {
    let run = run();
    let _deaf = run.client().subscribe().unwrap();
    let began = Instant::now();
    for _ in 0..5000 {
        run.server.tell(&Progress::Note { text: "x".repeat(1000) });
    }
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert_eq!(run.client().status().unwrap().id, "run-1", "others are still served");
}

#[test]
fn status_says_the_phase_and_whether_abort_is_possible() {
    let run = run();
    run.server.tell(&Progress::PhaseBegun { phase: Phase::Arm, at_ms: 3 });
    run.server.update(&Vitals { parked: 7, ..Vitals::default() });
    let status = run.client().status().unwrap();
    assert_eq!((status.phase, status.parked, status.can_abort), (Some(Phase::Arm), 7, true));
    assert!(!status.committed);
    run.server.gate().commit().unwrap();
    let status = run.client().status().unwrap();
    assert!(!status.can_abort && status.committed);
}

#[test]
fn status_says_what_is_parked_and_how_long_freeze_and_phase_may_last() {
    let run = run();
    let status = run.client().status().unwrap();
    assert_eq!((status.phase_ms, status.limit_ms, status.lease_ms, status.level), (None, None, None, None));
    run.server.tell(&Progress::PhaseBegun { phase: Phase::Restore, at_ms: 3 });
    let now = Instant::now();
    run.server.update(&Vitals {
        level: Some(Level::Full),
        parked: 7,
        most_parked: 9,
        overflowed: 2,
        frozen_until: Some(now + Duration::from_secs(80)),
        deadline: Some(now + Duration::from_secs(60)),
    });
    let status = run.client().status().unwrap();
    assert_eq!((status.parked, status.most_parked, status.overflowed), (7, 9, 2));
    assert_eq!(status.level, Some(Level::Full));
    let near = |value: Option<u64>, seconds: u64| value.is_some_and(|ms| ms.abs_diff(seconds * 1000) < 20_000);
    assert!(near(status.lease_ms, 80) && near(status.limit_ms, 60) && near(status.phase_ms, 0), "{status:?}");
    run.server.tell(&Progress::Undoing { phase: Phase::Restore });
    assert_eq!(run.client().status().unwrap().limit_ms, None, "the limit of the phase is not that of its undo");
}

#[test]
fn abort_is_accepted_before_and_refused_after_the_point_of_no_return() {
    let first = run();
    assert_eq!(first.client().abort().unwrap(), AbortAnswer::Accepted);
    assert_eq!(first.client().abort().unwrap(), AbortAnswer::Accepted);
    assert!(first.server.gate().abort_requested());
    assert_eq!(first.server.gate().commit(), Err(TooLate));
    let second = run();
    second.server.gate().commit().unwrap();
    assert!(matches!(second.client().abort().unwrap(), AbortAnswer::Refused { .. }));
    assert!(!second.server.gate().abort_requested());
}

#[test]
fn abort_and_point_of_no_return_never_both_win() {
    for _ in 0..200 {
        let gate = AbortGate::new();
        let (aborted, committed) = std::thread::scope(|scope| {
            let abort = scope.spawn(|| gate.request_abort().is_ok());
            let commit = scope.spawn(|| gate.commit().is_ok());
            (abort.join().unwrap(), commit.join().unwrap())
        });
        assert!(aborted != committed);
    }
}

#[test]
fn thaw_reaches_the_supervisor() {
    let run = run();
    assert!(!run.server.gate().thaw_requested());
    run.client().thaw().unwrap();
    assert!(run.server.gate().thaw_requested());
}

#[test]
fn the_hook_connects_starts_and_finishes() {
    let run = run();
    assert!(run.server.wait_hook(Instant::now()).is_none());
    let mut hook = HookClient::open(&run.path).unwrap().unwrap();
    let mut link = run.server.wait_hook(soon()).unwrap();
    assert_eq!(link.recv(soon()), Some(HookEvent::Connected { pid: std::process::id() as i32 }));
    assert_eq!(link.recv(Instant::now()), None);
    link.send(HookCommand::Start).unwrap();
    assert_eq!(hook.next_command().unwrap(), Some(HookCommand::Start));
    let mut reporter = hook.reporter().unwrap();
    reporter.spawned(4711).unwrap();
    reporter.child_exited(0).unwrap();
    assert_eq!(link.recv(soon()), Some(HookEvent::Spawned { pid: 4711 }));
    assert_eq!(link.recv(soon()), Some(HookEvent::ChildExited { status: 0 }));
    link.send(HookCommand::Finish).unwrap();
    assert_eq!(hook.next_command().unwrap(), Some(HookCommand::Finish));
    drop((hook, reporter));
    assert_eq!(link.recv(soon()), Some(HookEvent::Closed));
}

#[test]
fn a_hook_whose_run_lets_go_sees_the_end() {
    let run = run();
    let mut hook = HookClient::open(&run.path).unwrap().unwrap();
    drop(run.server.wait_hook(soon()).unwrap());
    assert_eq!(hook.next_command().unwrap(), None);
}

#[test]
fn garbage_and_endless_lines_only_cost_their_sender_the_connection() {
    let run = run();
    for garbage in
        [b"{\"op\":\"explode\"}\n".to_vec(), b"{\"op\":\"spawned\",\"pid\":1}\n".to_vec(), vec![b'x'; 200_000]]
    {
        let mut stream = UnixStream::connect(&run.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        // The server may hang up before all of it is written.
        let _ = stream.write_all(&garbage);
        let end = std::io::Read::read(&mut stream, &mut [0; 16]);
        assert!(matches!(end, Ok(0)) || end.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    }
    assert_eq!(run.client().status().unwrap().id, "run-1");
}

#[test]
fn who_only_asks_for_the_holder_keeps_nobody_from_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let _ = RunLock::holder(&path);
                std::thread::sleep(Duration::from_micros(10));
            }
        });
        let me = Holder { id: "run-1".into(), pid: 42 };
        let refused = (0..500).filter(|_| RunLock::acquire(&path, &me).is_err()).count();
        over.store(true, Ordering::Relaxed);
        assert_eq!(refused, 0);
    });
}

#[test]
fn the_lock_names_its_holder_and_goes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/lock");
    assert_eq!(RunLock::holder(&path).unwrap(), None);
    let me = Holder { id: "run-1".into(), pid: 42 };
    let held = RunLock::acquire(&path, &me).unwrap();
    assert_eq!(RunLock::holder(&path).unwrap(), Some(me.clone()));
    let error = RunLock::acquire(&path, &Holder { id: "run-2".into(), pid: 43 }).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("run run-1 is under way (process 42)"), "{text}");
    assert!(text.contains("`ovs-graceful wait`") && !text.contains("status"), "{text}");
    assert!(matches!(error, LockError::Held { holder: Some(holder), .. } if holder == me));
    drop(held);
    assert_eq!(RunLock::holder(&path).unwrap(), None);
    RunLock::acquire(&path, &me).unwrap();
}

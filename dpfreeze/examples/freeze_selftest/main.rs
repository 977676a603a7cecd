//! Proves the freeze on a running kernel, for a throw-away VM: as root, with openvswitch and nfnetlink_cttimeout loaded
//! and with setpriv and unshare (util-linux). Prints `ok NAME` or `FAIL NAME why` for each test; exits 1 if one failed.
//! With an argument: only the tests whose name contains it. On a kernel locked down for confidentiality it tests that the freeze says so.

// A test: what is not as it should be panics, and is reported as FAIL.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod messages;
mod preempted;
mod sender;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use dpfreeze::devices::{INGRESS, ROOT};
use dpfreeze::freeze::{
    self, CanaryCommand, Classes, EventKind, Families, Freeze, Halt, Hook, KeptQdisc, PolicyGuard, Port, Refused,
    Renewal, Scope, Skipped, PIN_DIR,
};
use dpfreeze::ovs::{Dispatch, Ovs};
use dpfreeze::tunnel::{Adoption, Backer, Guard};
use nix::errno::Errno;

use messages::*;
use sender::{send, sender_main, Fate, Sender};

const LONG: Duration = Duration::from_secs(600);
const BUSY: Fate = Fate::Refused(Errno::EBUSY as i32);
const NO_DEVICE: Fate = Fate::Answered(Errno::ENODEV as i32);

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("canary") => return freeze::canary_main(),
        Some("sender") => return sender_main(),
        Some("hold") => return hold(),
        Some("busy") => return preempted::busy_main(),
        Some("canaries") => return preempted::canaries_main(),
        _ => {}
    }
    std::panic::set_hook(Box::new(|_| {}));
    let tests: &[(&str, fn())] = if freeze::environment().lockdown.as_deref() == Some("confidentiality") {
        &[("lockdown_is_said", lockdown_is_said)]
    } else {
        TESTS
    };
    let only = std::env::args().nth(1).unwrap_or_default();
    let mut failed = false;
    for (name, test) in tests.iter().filter(|(name, _)| name.contains(&only)) {
        match catch_unwind(AssertUnwindSafe(test)) {
            Ok(()) => println!("ok {name}"),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or_default();
                println!("FAIL {name} {}", text.replace('\n', " "));
                failed = true;
            }
        }
        freeze::thaw().unwrap();
    }
    ExitCode::from(u8::from(failed))
}

const TESTS: &[(&str, fn())] = &[
    ("environment", environment),
    ("canary_fmod_ret", || canary_on(Hook::FmodRet)),
    ("canary_lsm", || canary_on(Hook::Lsm)),
    ("canary_without_openvswitch", canary_without_openvswitch),
    ("load_proven", load_proven),
    ("proof_leaves_a_freeze_alone", proof_leaves_a_freeze_alone),
    ("each_class_alone", each_class_alone),
    ("disguised_flush", disguised_flush),
    ("names_count_as_datapaths", names_count_as_datapaths),
    ("probes_pass", probes_pass),
    ("messages_behind_others", messages_behind_others),
    ("more_than_64", more_than_64),
    ("timeout_policies", timeout_policies),
    ("guard_timeouts", guard_timeouts),
    ("policy_guard", policy_guard),
    ("other_datapath", other_datapath),
    ("other_namespace", other_namespace),
    ("unprivileged", unprivileged),
    ("exempt", exempt),
    ("capture", capture),
    ("forged_capture", forged_capture),
    ("capture_limits", capture_limits),
    ("binding_per_vport", binding_per_vport),
    ("bound_by_other", bound_by_other),
    ("vport_del_is_told", vport_del_is_told),
    ("halt_stops_a_traced_thread_for_ports", halt_stops_a_traced_thread_for_ports),
    ("qdiscs_of_others", qdiscs_of_others),
    ("lease_runs_out", lease_runs_out),
    ("end_is_not_moved", end_is_not_moved),
    ("held_by_another", held_by_another),
    ("loader_killed", loader_killed),
    ("meters_of_the_newer_probe", meters_of_the_newer_probe),
    ("take_over", take_over),
    ("thaw_removes_everything", thaw_removes_everything),
    ("real_flow_survives", real_flow_survives),
    ("preempted_fmod_ret", || preempted_on(Hook::FmodRet)),
    ("preempted_lsm", || preempted_on(Hook::Lsm)),
    ("preempted_with_one_copy", preempted_with_one_copy),
];

fn families() -> Families {
    let families = Families::resolve().unwrap();
    assert!(families.flow != 0 && families.meter != 0, "openvswitch is not loaded: {families:?}");
    families
}

fn ghost_scope() -> Scope {
    Scope {
        ifindexes: vec![GHOST],
        names: vec![GHOST_NAME.into()],
        ..Scope::here(&[], &[POLICY.into()], families()).unwrap()
    }
}

fn armed(classes: Classes) -> Freeze {
    let mut freeze = Freeze::load().unwrap();
    freeze.arm(&ghost_scope(), classes, LONG, LONG).unwrap();
    freeze
}

fn canary_command() -> CanaryCommand {
    CanaryCommand::own(&["canary"])
}

fn environment() {
    let environment = freeze::environment();
    assert!(environment.failures.is_empty(), "{:?}", environment.failures);
    assert_eq!(environment.hook, Some(usual_hook()));
    assert!(environment.pidfd_getfd);
    assert!(freeze::state().unwrap().is_none(), "looking left something pinned");
}

/// The one that is never passed over, where it works.
fn usual_hook() -> Hook {
    match bpf_is_an_lsm() {
        true => Hook::Lsm,
        false => Hook::FmodRet,
    }
}

fn canary_on(hook: Hook) {
    let mut freeze = Freeze::load_on(hook).unwrap();
    assert_eq!(freeze.hook(), hook);
    let report = freeze.canary(&canary_command(), families());
    assert!(!freeze.state().unwrap().armed);
    // Without `bpf` in the boot-time list of LSMs this hook takes the program and refuses nothing.
    if hook == Hook::Lsm && !bpf_is_an_lsm() {
        assert!(report.unwrap_err().to_string().contains("refuses nothing"));
        return;
    }
    let report = report.unwrap();
    assert!(report.with_openvswitch && report.passed_after_ms >= report.lease_ms, "{report:?}");
}

fn canary_without_openvswitch() {
    let mut freeze = Freeze::load().unwrap();
    assert!(!freeze.canary(&canary_command(), Families::default()).unwrap().with_openvswitch);
}

fn load_proven() {
    let (freeze, report) = Freeze::load_proven(&canary_command(), families()).unwrap();
    assert_eq!(freeze.hook(), usual_hook());
    assert!(report.with_openvswitch);
}

fn proof_leaves_a_freeze_alone() {
    let mut holder = start_holder(LONG);
    holder.kill().unwrap();
    holder.wait().unwrap();
    let (hook, report) = freeze::prove(&canary_command(), families()).unwrap();
    assert!(hook == usual_hook() && report.with_openvswitch);
    assert_eq!(Sender::root().send(&flow_flush(families(), GHOST)), BUSY);
    let pins: Vec<_> = fs::read_dir("/sys/fs/bpf").unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(pins, [PathBuf::from(PIN_DIR)]);
}

type Counter = fn(&Refused) -> u64;

/// Each message against each class: refused by its own and by no other, and counted where it belongs.
fn each_class_alone() {
    let f = families();
    let mut standby = Sender::root();
    let messages: [(Classes, Sendmsg, Counter); 8] = [
        (Classes::FLOW_FLUSH, flow_flush(f, GHOST), |r| r.flow_flush),
        (Classes::FLOW_DEL, flow_del(f, GHOST), |r| r.flow_del),
        (Classes::FLOW_SET, flow_set(f, GHOST), |r| r.flow_set),
        (Classes::DP_DEL, dp_del(f, GHOST), |r| r.dp_del),
        (Classes::VPORT_DEL, vport_del(f, GHOST, 1), |r| r.vport_del),
        (Classes::METER_DEL, meter_del(f, GHOST, 3), |r| r.meter_del),
        (Classes::CT_TIMEOUT_DEL, ct_timeout_del(POLICY), |r| r.ct_timeout_del),
        (Classes::UPCALL_BIND, dp_bind(f, GHOST, GHOST_NAME, 0, &[1]), |r| r.upcall_bind),
    ];
    let mut freeze = Freeze::load().unwrap();
    for class in Classes::all().iter() {
        freeze.arm(&ghost_scope(), class, LONG, LONG).unwrap();
        freeze.watch_standby(standby.pid(), standby.start_time()).unwrap();
        for (own, message, counter) in &messages {
            let before = freeze.refused().unwrap();
            let fate = standby.send(message);
            let after = freeze.refused().unwrap();
            if class == *own {
                assert_eq!(fate, BUSY, "{own:?}");
                assert_eq!(counter(&after), counter(&before) + 1, "{own:?}");
            } else {
                assert!(fate.passed(), "{own:?} under {class:?}: {fate:?}");
                assert_eq!(after, before, "{own:?} under {class:?} counted");
            }
        }
    }
}

fn disguised_flush() {
    let freeze = armed(Classes::FLOW_FLUSH);
    let mut sender = Sender::root();
    for message in flow_flush_in_disguise(families(), GHOST) {
        assert_eq!(sender.send(&message), BUSY, "{message:?}");
    }
    assert_eq!(freeze.refused().unwrap().flow_flush, 2);
}

fn names_count_as_datapaths() {
    let freeze = armed(Classes::DP_DEL);
    let mut sender = Sender::root();
    assert_eq!(sender.send(&dp_del_by_name(families(), GHOST_NAME)), BUSY);
    assert_eq!(sender.send(&dp_del_by_name(families(), "another")), NO_DEVICE);
    assert_eq!(freeze.refused().unwrap().dp_del, 1);
}

/// Hazard 6, and the messages whose refusal is fatal to the daemon.
fn probes_pass() {
    let f = families();
    let mut freeze = armed(Classes::all());
    let mut sender = Sender::root();
    freeze.watch_standby(sender.pid(), sender.start_time()).unwrap();
    for probe in [
        flow_del_probe(f, GHOST),
        meter_del(f, GHOST, 54_545_401),
        meter_del(f, GHOST, 54_545_402),
        dp_set_features(f, GHOST_NAME),
        flow_get(f, GHOST),
    ] {
        let fate = sender.send(&probe);
        assert!(fate.passed(), "{probe:?}: {fate:?}");
    }
    assert_eq!(freeze.refused().unwrap(), Refused::default());
    assert_eq!(freeze.captured().unwrap(), None);
}

/// The standby alone is told that there is nothing, and only of what is kept.
fn qdiscs_of_others() {
    let mut freeze = armed(Classes::QDISC_DEL);
    let (mut standby, mut other) = (Sender::root(), Sender::root());
    freeze.watch_standby(standby.pid(), standby.start_time()).unwrap();
    freeze.keep_qdiscs(&[(GHOST, KeptQdisc::Ingress), (OTHER_GHOST, KeptQdisc::Root)]).unwrap();
    let nothing = Fate::Refused(Errno::ENOENT as i32);
    assert_eq!(standby.send(&qdisc_del(GHOST, INGRESS)), nothing);
    assert_eq!(standby.send(&qdisc_del(OTHER_GHOST, ROOT)), nothing);
    for passes in [qdisc_del(GHOST, ROOT), qdisc_del(OTHER_GHOST, INGRESS), class_dump(GHOST)] {
        let fate = standby.send(&passes);
        assert!(fate.passed(), "{passes:?}: {fate:?}");
    }
    assert_eq!(other.send(&qdisc_del(GHOST, INGRESS)), NO_DEVICE);
    assert_eq!(freeze.refused().unwrap(), Refused { qdisc_del: 2, ..Refused::default() });
    freeze.keep_qdiscs(&[(GHOST, KeptQdisc::Classes)]).unwrap();
    assert_eq!(standby.send(&class_dump(GHOST)), nothing);
    assert!(other.send(&class_dump(GHOST)).passed());
    assert_eq!(standby.send(&qdisc_del(GHOST, INGRESS)), NO_DEVICE);
}

/// A controller's meters may have the ids of the newer probe: it deletes them only where nobody had them.
fn meters_of_the_newer_probe() {
    let f = families();
    let mut freeze = Freeze::load().unwrap();
    let mut sender = Sender::root();
    for nobody_s in [true, false] {
        let scope = Scope { probe_meters: nobody_s, ..ghost_scope() };
        freeze.arm(&scope, Classes::METER_DEL, LONG, LONG).unwrap();
        for id in freeze::PROBE_METERS {
            let fate = sender.send(&meter_del(f, GHOST, id));
            assert_eq!(fate.passed(), nobody_s, "{id}: {fate:?}");
        }
        assert_eq!(sender.send(&meter_del(f, GHOST, 1020)), BUSY);
        let counted = if nobody_s { 1 } else { 3 };
        assert_eq!(freeze.refused().unwrap(), Refused { meter_del: counted, ..Refused::default() });
    }
}

fn messages_behind_others() {
    let f = families();
    let freeze = armed(Classes::FLOW_FLUSH);
    let mut sender = Sender::root();
    assert_eq!(sender.send(&flow_get(f, GHOST).times(49).then(&flow_flush(f, GHOST))), BUSY);
    assert_eq!(sender.send(&flow_get(f, GHOST).times(63).then(&flow_flush(f, GHOST))), BUSY);
    assert_eq!(sender.send(&flow_get(f, GHOST).times(64)), NO_DEVICE);
    assert_eq!(freeze.refused().unwrap().flow_flush, 2);
}

fn more_than_64() {
    let f = families();
    let freeze = armed(Classes::FLOW_FLUSH);
    let mut sender = Sender::root();
    let many = flow_get(f, GHOST).times(65);
    assert_eq!(sender.send(&many), BUSY);
    assert_eq!(freeze.refused().unwrap(), Refused { too_many: 1, ..Refused::default() });
    let events = freeze.events().unwrap();
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0].kind, EventKind::TooManyMessages { bytes: many.bytes.len() as u64 });
    assert_eq!(events[0].sender.tgid, sender.pid().as_raw() as u32);
    // nft sends thousands of messages at once, behind a message that opens a batch.
    let batch = nft_batch_begin().then(&nft_batch_begin().times(99));
    assert!(sender.send(&batch).passed());
}

fn timeout_policies() {
    let mut freeze = armed(Classes::CT_TIMEOUT_DEL);
    let mut sender = Sender::root();
    assert_eq!(sender.send(&ct_timeout_del(POLICY)), BUSY);
    assert_eq!(sender.send(&ct_timeout_del_all()), BUSY);
    let unguarded = sender.send(&ct_timeout_del("ovs_tp_ghost_tcp6"));
    assert!(unguarded.passed(), "{unguarded:?}");
    assert_eq!(freeze.refused().unwrap().ct_timeout_del, 2);
    freeze.set_timeout_names(&["ovs_tp_ghost_tcp6".into()]).unwrap();
    assert!(sender.send(&ct_timeout_del(POLICY)).passed());
    assert_eq!(sender.send(&ct_timeout_del("ovs_tp_ghost_tcp6")), BUSY);
    assert_eq!(freeze.state().unwrap().timeout_names, ["ovs_tp_ghost_tcp6"]);
}

fn guard_timeouts() {
    let mut freeze = Freeze::load().unwrap();
    let mut sender = Sender::root();
    let short = Duration::from_millis(400);
    freeze.arm(&ghost_scope(), Classes::all(), short, short).unwrap();
    freeze.guard_timeouts(&["another".into()], LONG, LONG).unwrap();
    std::thread::sleep(short);
    assert_eq!(sender.send(&ct_timeout_del("another")), BUSY);
    assert!(sender.send(&ct_timeout_del(POLICY)).passed());
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), NO_DEVICE);
}

/// Hazard 30: apart from the freeze, beyond it, and ended by its own lease.
fn policy_guard() {
    PolicyGuard::release().unwrap();
    let freeze = armed(Classes::CT_TIMEOUT_DEL | Classes::FLOW_FLUSH);
    let mut guard = PolicyGuard::load(freeze.hook()).unwrap();
    let mut sender = Sender::root();
    guard.hold(&[POLICY.into(), "another".into()], LONG, LONG).unwrap();
    freeze.thaw().unwrap();
    assert_eq!(sender.send(&ct_timeout_del(POLICY)), BUSY);
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), NO_DEVICE);
    // It has nothing to say about generic netlink, however long.
    assert_eq!(sender.send(&flow_get(families(), GHOST).times(65)), NO_DEVICE);
    // Another process looks after it; what it lets go, goes.
    let mut again = PolicyGuard::open().unwrap().unwrap();
    again.keep(&["another".into()]).unwrap();
    assert!(sender.send(&ct_timeout_del(POLICY)).passed());
    assert_eq!(sender.send(&ct_timeout_del("another")), BUSY);
    assert_eq!(again.refused().unwrap(), 2);
    // A second run widens it without a gap and without a new counter.
    guard.hold(&[POLICY.into()], Duration::from_millis(300), LONG).unwrap();
    assert_eq!(sender.send(&ct_timeout_del(POLICY)), BUSY);
    assert_eq!(guard.refused().unwrap(), 3);
    std::thread::sleep(Duration::from_millis(400));
    assert!(sender.send(&ct_timeout_del(POLICY)).passed());
    assert_eq!(guard.renew(LONG).unwrap(), Renewal::Expired);
    PolicyGuard::release().unwrap();
    assert!(PolicyGuard::open().unwrap().is_none());
}

fn other_datapath() {
    let f = families();
    let freeze = armed(Classes::all());
    let mut sender = Sender::root();
    for message in [
        flow_flush(f, OTHER_GHOST),
        flow_del(f, OTHER_GHOST),
        flow_set(f, OTHER_GHOST),
        dp_del(f, OTHER_GHOST),
        vport_del(f, OTHER_GHOST, 1),
        meter_del(f, OTHER_GHOST, 3),
    ] {
        let fate = sender.send(&message);
        assert!(fate.passed(), "{message:?}: {fate:?}");
    }
    assert_eq!(freeze.refused().unwrap(), Refused::default());
}

/// Hazard 3.
fn other_namespace() {
    let freeze = armed(Classes::all());
    let mut sender = Sender::elsewhere();
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), NO_DEVICE);
    assert!(sender.send(&ct_timeout_del(POLICY)).passed());
    assert_eq!(freeze.refused().unwrap(), Refused::default());
}

/// Hazard 2: neither count, nor plant port ids, nor make an event, nor see the pins.
fn unprivileged() {
    let f = families();
    let mut freeze = armed(Classes::all());
    let exe = executable_by_all();
    for mut sender in [Sender::nobody(&exe), Sender::nobody_with_user_namespace(&exe)] {
        let ids = sender.bind(2);
        freeze.watch_standby(sender.pid(), sender.start_time()).unwrap();
        for message in [
            flow_flush(f, GHOST),
            vport_del(f, GHOST, 1),
            dp_bind(f, GHOST, GHOST_NAME, 0, &ids),
            flow_get(f, GHOST).times(65),
        ] {
            let fate = sender.send(&message);
            assert!(fate.passed(), "{message:?}: {fate:?}");
        }
        assert_eq!(sender.send(&flow_flush(f, GHOST)), Fate::Answered(Errno::EPERM as i32));
        assert!(!sender.reads_state(), "nobody can read the pins");
    }
    fs::remove_file(exe).unwrap();
    assert_eq!(freeze.refused().unwrap(), Refused::default());
    assert_eq!(freeze.events().unwrap(), []);
    assert_eq!(freeze.captured().unwrap(), None);
    let mode = fs::metadata(PIN_DIR).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

/// A copy of this program where nobody can reach it.
fn executable_by_all() -> PathBuf {
    let copy = PathBuf::from("/tmp/freeze_selftest_by_nobody");
    fs::copy("/proc/self/exe", &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    copy
}

fn exempt() {
    let f = families();
    let freeze = armed(Classes::all());
    assert_eq!(send(&flow_flush(f, GHOST)), NO_DEVICE);
    assert_eq!(send(&dp_bind(f, GHOST, GHOST_NAME, 0, &[1])), NO_DEVICE);
    // Every thread of it.
    let thread = std::thread::spawn(move || send(&vport_del(f, GHOST, 1)));
    assert_eq!(thread.join().unwrap(), NO_DEVICE);
    assert_eq!(freeze.refused().unwrap(), Refused::default());
    assert_eq!(freeze.events().unwrap(), []);
}

fn capture() {
    let f = families();
    let mut freeze = armed(Classes::UPCALL_BIND);
    let mut standby = Sender::root();
    let ids = standby.bind(2);
    let wanted = [ids[0], ids[1], ids[0]];
    let bind = dp_bind(f, GHOST, GHOST_NAME, 0x8, &wanted);
    // A process of this number, but not the one that was meant.
    freeze.watch_standby(standby.pid(), standby.start_time() + 1).unwrap();
    assert!(standby.send(&bind).passed());
    assert_eq!(freeze.captured().unwrap(), None);

    freeze.watch_standby(standby.pid(), standby.start_time()).unwrap();
    assert_eq!(standby.send(&bind), BUSY);
    let captured = freeze.captured().unwrap().unwrap();
    assert_eq!(captured.port_ids, wanted);
    assert_eq!((captured.features, captured.ifindex, captured.count), (Some(0x8), GHOST, 1));
    assert_eq!(captured.process.tgid, standby.pid().as_raw() as u32);
    assert_eq!(captured.process.start_time, standby.start_time());
    assert_eq!(freeze.refused().unwrap().upcall_bind, 1);
    let events = freeze.events().unwrap();
    assert_eq!(events.last().unwrap().kind, EventKind::Captured { port_ids: 3 });

    freeze.set_classes(Classes::FLOW_DEL).unwrap();
    assert!(standby.send(&bind).passed(), "from Handover on it may bind");
}

fn forged_capture() {
    let f = families();
    let mut freeze = armed(Classes::UPCALL_BIND);
    let mut standby = Sender::root();
    let mut other = Sender::root();
    let own = standby.bind(1)[0];
    let foreign = other.bind(1)[0];
    freeze.watch_standby(standby.pid(), standby.start_time()).unwrap();
    for ids in [[own, foreign], [own, 4_000_000_001]] {
        assert_eq!(standby.send(&dp_bind(f, GHOST, GHOST_NAME, 0, &ids)), BUSY);
        let error = freeze.captured().unwrap_err().to_string();
        assert!(error.contains(&ids[1].to_string()), "{error}");
    }
    assert_eq!(standby.send(&dp_bind(f, GHOST, GHOST_NAME, 0, &[own])), BUSY);
    assert!(freeze.captured().is_ok());
    drop(standby);
    assert!(freeze.captured().is_err(), "the standby has ended");
}

fn capture_limits() {
    let f = families();
    let mut freeze = armed(Classes::UPCALL_BIND);
    let mut standby = Sender::root();
    let own = standby.bind(1)[0];
    freeze.watch_standby(standby.pid(), standby.start_time()).unwrap();
    assert_eq!(standby.send(&dp_bind(f, GHOST, GHOST_NAME, 0, &[own; 4097])), BUSY);
    assert!(freeze.captured().unwrap_err().to_string().contains("4097"));
    assert_eq!(standby.send(&dp_bind(f, GHOST, GHOST_NAME, 0, &[own; 4096])), BUSY);
    assert_eq!(freeze.captured().unwrap().unwrap().port_ids.len(), 4096);
}

/// Hazard 16.
fn binding_per_vport() {
    let f = families();
    let mut freeze = armed(Classes::UPCALL_BIND);
    let (mut standby, mut other) = (Sender::root(), Sender::root());
    freeze.watch_standby(standby.pid(), standby.start_time()).unwrap();
    let bind = vport_set_upcall_pid(f, GHOST);
    assert_eq!(other.send(&bind), NO_DEVICE, "the old daemon may bind anew");
    assert_eq!(freeze.captured().unwrap(), None);
    for count in 1..3 {
        assert_eq!(standby.send(&bind), BUSY);
        let captured = freeze.captured().unwrap().unwrap();
        assert_eq!((captured.dispatch, captured.ifindex, captured.count), (Dispatch::PerVport, GHOST, count));
        assert_eq!(captured.process.tgid, standby.pid().as_raw() as u32);
        assert_eq!(captured.port_ids, []);
    }
    assert_eq!(freeze.refused().unwrap().upcall_bind, 2);
    freeze.set_classes(Classes::FLOW_DEL).unwrap();
    assert_eq!(standby.send(&bind), NO_DEVICE, "from Handover on it may bind");
}

/// Hazard 1.
fn bound_by_other() {
    let mut freeze = armed(Classes::all());
    let standby = Sender::root();
    let mut other = Sender::root();
    freeze.watch_standby(standby.pid(), standby.start_time()).unwrap();
    assert_eq!(other.send(&dp_bind(families(), GHOST, GHOST_NAME, 0, &[1, 2, 3])), NO_DEVICE);
    let events = freeze.events().unwrap();
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0].kind, EventKind::BoundByOther { port_ids: 3 });
    assert_eq!((events[0].sender.tgid, events[0].ifindex), (other.pid().as_raw() as u32, GHOST));
    assert_eq!(freeze.captured().unwrap(), None);
}

/// Hazard 7.
fn vport_del_is_told() {
    let freeze = armed(Classes::VPORT_DEL);
    let mut sender = Sender::root();
    for port_no in [7, 8] {
        assert_eq!(sender.send(&vport_del(families(), GHOST, port_no)), BUSY);
    }
    let told: Vec<EventKind> = freeze.events().unwrap().into_iter().map(|event| event.kind).collect();
    assert_eq!(told, [7, 8].map(|port_no| EventKind::VportDelRefused(Port::Number(port_no))));
    assert_eq!(freeze.events().unwrap(), []);
}

fn halt_stops_a_traced_thread_for_ports() {
    let freeze = armed(Classes::VPORT_DEL);
    let (f, mut sender) = (families(), Sender::root());
    let pid = sender.pid().as_raw();
    let tunnel = vport_new(f, GHOST, "vxlan_sys_4789");
    let halt = || Halt::of(&freeze, pid, f.vport).unwrap();
    let on = halt();
    on.on().unwrap();
    assert_eq!(sender.send(&tunnel), NO_DEVICE, "nobody traces it: it is let by");
    drop(on);

    let backer = |name: &str, port_no| Backer { name: name.into(), port_no };
    let backers = vec![backer("vxlan_sys_4789", 7), backer("gre_sys", 8)];
    let guard = Guard { dp_ifindex: GHOST, vport_family: f.vport, backers, policed: Vec::new() };
    let adoption = Adoption::attach(pid, sender.start_time(), guard, Some(halt())).unwrap();
    for _ in 0..100 {
        assert_eq!(sender.send(&flow_get(f, GHOST)), NO_DEVICE);
    }
    assert_eq!(adoption.report().stops, 0, "stopped for what is no port");
    assert_eq!(sender.send(&tunnel), NO_DEVICE);
    assert_eq!(adoption.report().adopted, ["vxlan_sys_4789"]);
    assert_eq!(sender.send(&vport_del(f, GHOST, 9)), BUSY, "not a guarded port: it is refused as it is");
    assert_eq!(sender.send(&vport_new(f, GHOST, "gre_sys")), NO_DEVICE);
    let report = adoption.finish();
    assert_eq!(report.adopted, ["vxlan_sys_4789", "gre_sys"]);
    assert!(report.failed.is_empty() && report.stops < 40, "{report:?}");
    assert_eq!(sender.send(&tunnel), NO_DEVICE, "let go");
}

fn lease_runs_out() {
    let mut freeze = Freeze::load().unwrap();
    let mut sender = Sender::root();
    let lease = Duration::from_millis(700);
    freeze.arm(&ghost_scope(), Classes::FLOW_FLUSH, lease, LONG).unwrap();
    let armed = Instant::now();
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), BUSY);
    assert!(matches!(freeze.renew(lease).unwrap(), Renewal::Held(left) if left <= lease));
    std::thread::sleep(Duration::from_millis(500));
    assert!(matches!(freeze.renew(lease).unwrap(), Renewal::Held(_)));
    std::thread::sleep(Duration::from_millis(400));
    assert!(armed.elapsed() > lease);
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), BUSY, "it was renewed");
    std::thread::sleep(lease);
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), NO_DEVICE);
    assert!(!freeze.state().unwrap().armed);
    assert_eq!(freeze.renew(lease).unwrap(), Renewal::Expired);
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), NO_DEVICE, "a lost lease stays lost");
    assert_eq!(freeze.renew(lease).unwrap(), Renewal::Expired);
}

fn end_is_not_moved() {
    let mut freeze = Freeze::load().unwrap();
    let mut sender = Sender::root();
    let end = Duration::from_millis(900);
    for renewed in [false, true] {
        freeze.arm(&ghost_scope(), Classes::FLOW_FLUSH, LONG, end).unwrap();
        if renewed {
            let Renewal::Held(left) = freeze.renew(LONG).unwrap() else { panic!("not held") };
            assert!(left <= end, "{left:?}");
        }
        assert_eq!(sender.send(&flow_flush(families(), GHOST)), BUSY);
        std::thread::sleep(end);
        assert_eq!(sender.send(&flow_flush(families(), GHOST)), NO_DEVICE, "renewed: {renewed}");
    }
    assert_eq!(freeze.renew(LONG).unwrap(), Renewal::Ended);
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), NO_DEVICE);
}

/// A process that loads, arms for the time given and waits.
fn hold() -> ExitCode {
    let lease = Duration::from_millis(std::env::args().nth(2).unwrap().parse().unwrap());
    let mut freeze = Freeze::load().unwrap();
    freeze.arm(&ghost_scope(), Classes::FLOW_FLUSH, lease, LONG).unwrap();
    println!("armed");
    std::thread::sleep(LONG);
    ExitCode::SUCCESS
}

fn start_holder(lease: Duration) -> std::process::Child {
    let mut child = Command::new("/proc/self/exe")
        .args(["hold", &lease.as_millis().to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "armed\n");
    child
}

fn held_by_another() {
    let mut holder = start_holder(LONG);
    let error = Freeze::load().unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", holder.id())), "{error}");
    let mut sender = Sender::root();
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), BUSY, "the try changed nothing");
    let mut own = Freeze::open().unwrap().unwrap();
    freeze::thaw().unwrap();
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), NO_DEVICE);
    assert_eq!(own.renew(LONG).unwrap(), Renewal::Thawed);
    holder.kill().unwrap();
    holder.wait().unwrap();
}

fn loader_killed() {
    let lease = Duration::from_millis(2500);
    let mut holder = start_holder(lease);
    let armed = Instant::now();
    holder.kill().unwrap();
    holder.wait().unwrap();
    let mut sender = Sender::root();
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), BUSY);
    let state = freeze::state().unwrap().unwrap();
    assert!(state.armed && !state.exempt_alive && state.refused.flow_flush == 1, "{state:?}");
    std::thread::sleep(lease.saturating_sub(armed.elapsed()));
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), NO_DEVICE);
    assert!(!freeze::state().unwrap().unwrap().armed);
    drop(Freeze::load().unwrap());
    assert_eq!(freeze::state().unwrap().unwrap().refused, Refused::default());
}

fn take_over() {
    let mut holder = start_holder(LONG);
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(send(&flow_flush(families(), GHOST)), BUSY);
    let mut freeze = Freeze::open().unwrap().unwrap();
    freeze.take_over().unwrap();
    assert_eq!(send(&flow_flush(families(), GHOST)), NO_DEVICE);
    assert_eq!(Sender::root().send(&flow_flush(families(), GHOST)), BUSY);
}

fn thaw_removes_everything() {
    let freeze = armed(Classes::all());
    assert!(programs() > 0);
    let mut sender = Sender::root();
    freeze.thaw().unwrap();
    assert_eq!(sender.send(&flow_flush(families(), GHOST)), NO_DEVICE);
    assert!(!PathBuf::from(PIN_DIR).exists());
    assert!(freeze::state().unwrap().is_none());
    let start = Instant::now();
    while programs() > 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the program is still loaded");
        std::thread::sleep(Duration::from_millis(20));
    }
    freeze::thaw().unwrap();
}

fn programs() -> usize {
    libbpf_rs::query::ProgInfoIter::default().filter(|info| info.name.to_string_lossy().starts_with("freeze_")).count()
}

/// A flow of a real datapath outlives a flush, a DEL and the end of the datapath, and not the thaw.
fn real_flow_survives() {
    const NAME: &str = "fzselftest";
    let f = families();
    let mut sender = Sender::root();
    assert_eq!(sender.send(&dp_new(f, NAME)), Fate::Answered(0));
    let mut ovs = Ovs::open().unwrap();
    let ifindex = ovs.datapath(NAME).unwrap().unwrap().ifindex;
    let mut freeze = Freeze::load().unwrap();
    let result = catch_unwind(AssertUnwindSafe(|| {
        assert_eq!(sender.send(&flow_new(f, ifindex)), Fate::Answered(0));
        let flows = ovs.flows(ifindex).unwrap();
        assert_eq!(flows.len(), 1);
        assert_eq!(ovs.flow_counts(ifindex).unwrap(), flows.into_iter().collect());
        let scope = Scope::here(&[ifindex], &[], f).unwrap();
        assert_eq!(scope.names, [NAME]);
        freeze.arm(&scope, Classes::all(), LONG, LONG).unwrap();
        for message in [flow_flush(f, ifindex), flow_del(f, ifindex), dp_del(f, ifindex), dp_del_by_name(f, NAME)] {
            assert_eq!(sender.send(&message), BUSY, "{message:?}");
        }
        assert_eq!(ovs.flows(ifindex).unwrap().len(), 1);
        freeze::thaw().unwrap();
        assert_eq!(sender.send(&flow_flush(f, ifindex)), Fate::Answered(0));
        assert_eq!(ovs.flows(ifindex).unwrap().len(), 0);
    }));
    freeze::thaw().unwrap();
    assert_eq!(sender.send(&dp_del(f, ifindex)), Fate::Answered(0));
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// The kernel passes over a program that a preempted task of the same CPU has begun: nothing may pass for that.
fn preempted_on(hook: Hook) {
    if hook == Hook::Lsm && !bpf_is_an_lsm() {
        return;
    }
    let _preemption = Preemption::begin();
    let freeze = armed_on(hook);
    for urgency in ["normal", "urgent"] {
        let found = preempted::disturbed(1, urgency);
        let skipped = freeze.skipped().unwrap();
        println!("note {hook}, {urgency}: {found:?}, {skipped:?}");
        assert_eq!(found.passed, 0, "messages passed unseen: {found:?}, {skipped:?}");
    }
    let skipped = freeze.skipped().unwrap();
    assert_eq!(skipped.unseen, 0, "{skipped:?}");
    if hook == Hook::Lsm && freeze::environment().kernel.split('.').next() > Some("5") {
        assert_eq!(skipped, Skipped::default(), "this hook is always called");
    }
    // More of them interrupt one another in both copies.
    let found = preempted::disturbed(6, "urgent");
    let skipped = freeze.skipped().unwrap();
    println!("note {hook}, six of them: {found:?}, {skipped:?}");
    assert!(found.passed <= skipped.unseen, "not counted: {found:?}, {skipped:?}");
}

/// What the second copy is for: without it messages pass, and the kernel's counter tells of each.
fn preempted_with_one_copy() {
    let Some(_preemption) = Preemption::begin() else { return };
    let freeze = armed_on(Hook::FmodRet);
    fs::remove_file(PathBuf::from(PIN_DIR).join("link_two")).unwrap();
    let found = preempted::disturbed(1, "urgent");
    let skipped = freeze.skipped().unwrap();
    println!("note one copy: {found:?}, {skipped:?}");
    assert!(found.passed > 0, "nothing was interrupted: the test shows nothing; {found:?}, {skipped:?}");
    assert!(found.passed <= skipped.unseen, "not counted: {found:?}, {skipped:?}");
}

fn armed_on(hook: Hook) -> Freeze {
    let mut freeze = Freeze::load_on(hook).unwrap();
    freeze.arm(&ghost_scope(), Classes::FLOW_FLUSH, LONG, LONG).unwrap();
    freeze
}

fn bpf_is_an_lsm() -> bool {
    freeze::environment().lsms.iter().any(|lsm| lsm == "bpf")
}

/// A kernel that can be told to preempt tasks in the kernel does so until this is dropped.
struct Preemption(String);

impl Preemption {
    const MODE: &str = "/sys/kernel/debug/sched/preempt";

    /// None where the kernel has no such choice.
    fn begin() -> Option<Preemption> {
        // `none (voluntary) full`
        let modes = fs::read_to_string(Self::MODE).ok()?;
        let (_, rest) = modes.split_once('(')?;
        let now = rest.split_once(')')?.0.to_owned();
        println!("note preemption: {}", modes.trim());
        if now != "lazy" {
            fs::write(Self::MODE, "full").unwrap();
        }
        Some(Preemption(now))
    }
}

impl Drop for Preemption {
    fn drop(&mut self) {
        let _ = fs::write(Self::MODE, &self.0);
    }
}

fn lockdown_is_said() {
    let environment = freeze::environment();
    assert_eq!(environment.hook, None);
    let fact = environment.failures.iter().find(|fact| fact.object == "BPF").unwrap();
    assert!(fact.cause.contains("confidentiality") && fact.remedy.contains("integrity"), "{fact:?}");
    let error = Freeze::load().unwrap_err().to_string();
    assert!(error.contains("confidentiality"), "{error}");
    assert!(freeze::state().unwrap().is_none());
}

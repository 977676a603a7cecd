//! Tries the real host on a machine that may be thrown away: `host_probe [systemd|plain]` prints `ok` and `FAIL` lines.
//!
//! It hands the switch over from one ovs-vswitchd to the next without a freeze, so it *does* disturb traffic.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use orchestrator::config::Config;
use orchestrator::host::real::check;
use orchestrator::host::real::{openflow, ovsdb_server, procfs, Ovsdb, RealClock, RealDaemons, RealOpenFlow, Systemd};
use orchestrator::host::surroundings::{CheckOptions, Known};
use orchestrator::host::{
    Cleared, Daemon, DaemonKind, Daemons, Database, HandOver, JobKind, OpenFlow, Result, ServiceManager, Signal,
    SupervisorUnit,
};
use orchestrator::report::Severity;

const SOCKET: &str = "/run/openvswitch/db.sock";
const RUN: &str = "/run/openvswitch";

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Counts what went wrong.
#[derive(Default)]
struct Tally {
    failed: u32,
}

impl Tally {
    fn check(&mut self, what: &str, good: bool) {
        println!("{} {what}", if good { "ok  " } else { "FAIL" });
        self.failed += u32::from(!good);
    }

    fn take<T>(&mut self, what: &str, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => {
                println!("ok   {what}");
                Some(value)
            }
            Err(error) => {
                println!("FAIL {what}: {error}");
                self.failed += 1;
                None
            }
        }
    }
}

fn shell(words: &str) -> String {
    let output = Command::new("sh").args(["-c", words]).stdin(Stdio::null()).output();
    output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("hook") => return hook(&arguments[3..]),
        Some("sleep") => {
            std::thread::sleep(Duration::from_secs(2));
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let mut tally = Tally::default();
    let rounds = if arguments.get(1).is_some_and(|a| a == "plain") { 1 } else { 2 };
    for round in 1..=rounds {
        println!("== round {round}");
        run(&mut tally, arguments.get(1).is_none_or(|a| a != "plain"));
    }
    println!("failed: {}", tally.failed);
    if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// What `ovs-graceful hook reload` does, with files in place of the socket.
fn hook(command: &[String]) -> ExitCode {
    let wait = |name: &str| {
        while !Path::new(name).exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = std::fs::remove_file(name);
    };
    wait("/run/probe.start");
    let child = Command::new(&command[0]).args(&command[1..]).env_remove("MAINPID").spawn();
    wait("/run/probe.finish");
    let good = child.is_ok_and(|mut child| child.wait().is_ok_and(|status| status.success()));
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(tally: &mut Tally, with_systemd: bool) {
    let daemons = RealDaemons::new(SOCKET);
    let database = Ovsdb::new(SOCKET);
    let bridges = RealOpenFlow::new(RUN);
    let systemd = Systemd::default();
    tally.check("systemd is running", systemd.is_running());

    let Some(facts) = tally.take("facts", database.facts(soon())) else { return };
    println!("     {facts:?}");
    let Some(server) = tally.take("find ovsdb-server", daemons.find_ovsdb_server()) else { return };
    tally.check("ovsdb-server's PID file", server.pid_file == Path::new("/run/openvswitch/ovsdb-server.pid"));
    let port_ids = dpfreeze::ovs::Ovs::open()
        .and_then(|mut ovs| ovs.datapath("ovs-system"))
        .ok()
        .flatten()
        .and_then(|datapath| datapath.per_cpu_pids)
        .unwrap_or_default();
    println!("     upcall port ids {port_ids:?}");
    let Some(old) = tally.take("find ovs-vswitchd by its upcall sockets", daemons.find_vswitchd(&port_ids)) else {
        return;
    };
    println!("     {old:?}");
    let all = daemons.find_all(DaemonKind::OvsVswitchd).unwrap_or_default();
    tally.check("find_all finds the same", all == [old.clone()]);
    tally.check("nobody owns foreign ports", daemons.find_vswitchd(&[1]).is_err());
    let versions = tally.take("versions", daemons.versions(&old, soon()));
    println!("     {versions:?}");
    for (command, arguments) in
        [("memory/show", vec![]), ("coverage/show", vec![]), ("dpif/show", vec![]), ("upcall/show", vec![])]
    {
        tally.take(command, daemons.command(&old, command, &arguments, soon()));
    }
    let folders = [PathBuf::from("/var/lib/probe/bin")];
    let running = versions.as_ref().map(|versions| versions.running.clone()).unwrap_or_default();
    let save = || daemons.save_program(&old, &running, &folders, soon());
    let saved = tally.take("save the program", save());
    tally.check("twice", save().ok() == saved);
    tally.take("upcall/set-flow-limit", daemons.command(&old, "upcall/set-flow-limit", &["200000"], soon()));
    let options = CheckOptions {
        elsewhere: false,
        replace_ovsdb: true,
        called_by: None,
        beside: true,
        upcall_sockets: 2,
        bridges: facts.bridges.len(),
        state_directory: "/var/lib/ovs-graceful".into(),
        run_directory: "/run/ovs-graceful".into(),
    };
    let found = Ok(old.clone());
    let known = Known { vswitchd: Some(&found), versions: versions.as_ref(), facts: None };
    for finding in check::findings(&daemons, &systemd, &known, &options, soon()) {
        println!("     {finding}");
        tally.check("finding", finding.severity == Severity::Ok);
    }
    let before = Instant::now();
    let replaced = ovsdb_server::replace(&daemons, &systemd, &database, &RealClock, &server, None, soon());
    if let Some(new) = tally.take("replace ovsdb-server", replaced) {
        println!("     after {:?}", before.elapsed());
        tally.check("it is another one", new.id != server.id && !daemons.is_alive(server.id));
        tally.check(
            "started the same",
            (&new.argv, &new.limits, new.nice) == (&server.argv, &server.limits, server.nice),
        );
        tally.check("the switch is the same", daemons.is_alive(old.id));
        let owner = |d: &Daemon| systemd.owner(d, soon()).ok().flatten().map(|u| (u.name, u.main_pid));
        println!("     {:?}", owner(&new));
    }
    let next = tally.take("bump", database.bump(soon())).unwrap_or_default();
    tally.take("the old daemon is in step", database.wait_in_step(next, soon()));

    let Some(before) = tally.take("snapshot", bridges.snapshot(&old, &facts.bridges, soon())) else { return };
    println!("     {:?}", before.iter().map(|r| (&r.bridge, &r.protocol, r.flows.len())).collect::<Vec<_>>());
    let Some(mut watch) = tally.take("watch", bridges.watch(&facts.bridges, soon())) else { return };
    tally.check("nothing changed yet", watch.changed(soon()).is_ok_and(|set| set.is_empty()));
    shell("ovs-ofctl add-flow br0 table=77,priority=3,actions=drop");
    let changed = watch.changed(soon()).unwrap_or_default();
    tally.check("the change was seen", changed.iter().eq(["br0"]));
    let small = watch.small_tables("br0");
    let same = small.as_ref().zip(before.iter().find(|r| r.bridge == "br0")).is_some_and(|(small, before)| {
        (&small.groups, &small.meters, &small.tlv_map, &small.protocol)
            == (&before.groups, &before.meters, &before.tlv_map, &before.protocol)
    });
    tally.check("small tables read through the open connection are the same", same);
    if !same {
        println!("     {small:?}");
    }
    let begin = Instant::now();
    let Some(before) = tally.take("refresh", bridges.refresh(&old, &facts.bridges, &before, &mut *watch, soon()))
    else {
        return;
    };
    println!("     after {:?}", begin.elapsed());
    let begin = Instant::now();
    tally.take("refresh without changes", bridges.refresh(&old, &facts.bridges[1..], &before, &mut *watch, soon()));
    println!("     after {:?}", begin.elapsed());
    let prepared = tally.take("prepare the restore", bridges.prepare_restore(&old, &before, soon()));
    tally.check("the refresh has the new rule", before.iter().any(|r| r.flows.iter().any(|f| f.contains("table=77"))));
    drop(watch);
    shell("ping -c1 -W1 10.1.1.2; ip netns exec a ping -c2 -i0.2 10.0.0.2");
    let learned = bridges.fdb(&old, &facts.bridges, soon()).unwrap_or_default();
    let fdb: Vec<_> = facts.bridges.iter().zip(learned).collect();
    println!("     {:?}", fdb.iter().map(|(b, e)| (&b.name, e.len())).collect::<Vec<_>>());

    let mut flag = tally.take("watch flow-restore-wait", database.watch_restore_wait(soon()));
    tally.take("set flow-restore-wait", database.set_restore_wait("probe-1", soon()));
    tally.check("set twice is refused", database.set_restore_wait("probe-2", soon()).is_err());
    std::thread::sleep(Duration::from_millis(20));
    tally.check("the watch sees it", flag.as_mut().is_some_and(|f| f.is_set().unwrap_or(false)));
    tally.check(
        "others cannot clear it",
        database.clear_restore_wait("probe-2", soon()).is_ok_and(|c| c == Cleared::NotOurs),
    );

    let owner = systemd.owner(&old, soon());
    println!("     {owner:?}");
    let mut job = None;
    let mut starting = None;
    tally.take("set the PID file aside", daemons.set_aside_pid_file(&old));
    if with_systemd {
        tally.check("systemd owns it", owner.is_ok_and(|o| o.is_some_and(|u| u.main_pid == old.id.pid)));
        let own = std::env::current_exe().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        let hand_over = HandOver {
            unit: "ovs-vswitchd.service".into(),
            pid_file: old.pid_file.clone(),
            hook: vec![own, "hook".into(), "--".into()],
            limit_s: 300,
        };
        tally.take("drop-in", systemd.prepare_hand_over(&hand_over, soon()));
        println!("{}", shell("cat /run/systemd/system/ovs-vswitchd.service.d/*"));
        job = tally.take("reload job", systemd.start_job("ovs-vswitchd.service", JobKind::Reload, soon()));
        let _ = std::fs::write("/run/probe.start", "");
    } else {
        tally.check("systemd does not own it", owner.is_ok_and(|o| o.is_none()));
        starting = tally.take("start like the old one", daemons.start_like(&old));
    }
    let begin = Instant::now();
    let Some(new) = tally.take("the new PID file", daemons.wait_pid_file(&old, soon())) else { return };
    println!("     after {:?}", begin.elapsed());
    tally.take("swap PID files", daemons.swap_pid_file(&old, &new));
    tally.check("appctl finds the old one", shell("ovs-appctl -t ovs-vswitchd ofproto/list").contains("br0"));
    tally.take("the standby has read the database", daemons.wait_standby(&new, soon()));
    println!("     after {:?}", begin.elapsed());
    tally.take("stop it", daemons.signal(new.id, Signal::Stop));
    std::thread::sleep(Duration::from_millis(300));
    tally.check("it is stopped", procfs::stat(new.id.pid).is_ok_and(|s| s.state == 'T'));
    tally.take("continue it", daemons.signal(new.id, Signal::Continue));
    let begin = Instant::now();
    tally.take("end the old one", daemons.signal(old.id, Signal::Terminate));
    tally.check("it has ended", daemons.wait_end(old.id, soon()).unwrap_or(false));
    println!("     after {:?}", begin.elapsed());
    tally.take("settle PID files", daemons.settle_pid_file(&new));
    tally.take(
        "bridges are ready",
        bridges.wait_ready(&new, &facts.bridges, Config::default().restore.flow_limit, soon()),
    );
    println!("     after {:?}", begin.elapsed());
    if let Some(prepared) = prepared {
        tally.check("every rule can be put back", prepared.refused.is_empty());
        tally.take("commit the prepared restore", prepared.restore.commit(&before, soon()));
    }
    println!("     after {:?}", begin.elapsed());
    tally.take("restore again", bridges.restore(&before, soon()));
    println!("     after {:?}", begin.elapsed());
    if let Some(after) = tally.take("snapshot after", bridges.snapshot(&new, &facts.bridges, soon())) {
        let differences = openflow::compare(&before, &after);
        tally.check("rules are the same", differences.is_empty());
        println!("     {differences:?}");
    }
    shell("(timeout 3 tcpdump -lni silent -w /run/silent.pcap & sleep 1; wait) >/dev/null 2>&1 &");
    std::thread::sleep(Duration::from_millis(1500));
    let quiet = shell("cat /sys/class/net/silent/statistics/rx_packets");
    for (bridge, entries) in &fdb {
        let begin = Instant::now();
        let report = tally.take("learn", bridges.learn(&new, bridge, entries, soon()));
        println!("     {report:?} after {:?}", begin.elapsed());
        tally.check("all are learned", report.is_some_and(|r| r.restored == entries.len() as u64));
        let show = daemons.command(&new, "fdb/show", &[&bridge.name], soon()).unwrap_or_default();
        println!("{}", show.lines().take(8).collect::<Vec<_>>().join("\n"));
    }
    std::thread::sleep(Duration::from_millis(200));
    tally.check("no port saw a frame", shell("cat /sys/class/net/silent/statistics/rx_packets") == quiet);
    let begin = Instant::now();
    if let Some(Cleared::Removed { next_cfg }) = tally.take("clear", database.clear_restore_wait("probe-1", soon())) {
        tally.take("in step", database.wait_in_step(next_cfg, soon()));
    }
    println!("     after {:?}", begin.elapsed());
    tally.check("clear twice", database.clear_restore_wait("probe-1", soon()).is_ok_and(|c| c == Cleared::NotOurs));
    tally.check("the watch saw it go", flag.as_mut().is_some_and(|f| f.is_set().is_ok_and(|set| !set)));
    if let Some(mut job) = job {
        let _ = std::fs::write("/run/probe.finish", "");
        let ended = tally.take("the reload ends", job.wait(soon()));
        tally.check("as done", ended == Some(Some("done".into())));
        let unit = systemd.owner(&new, soon()).ok().flatten().unwrap_or_default();
        tally.check("the unit is the new daemon's", unit.main_pid == new.id.pid && unit.active_state == "active");
        println!("     {unit:?}");
        tally.take("remove the drop-in", systemd.end_hand_over("ovs-vswitchd.service", soon()));
        let unit = systemd.owner(&new, soon()).ok().flatten().unwrap_or_default();
        tally.check("still, without the drop-in", unit.main_pid == new.id.pid && unit.pid_file.is_none());
    }
    if let Some(mut starting) = starting {
        tally.check("the start ended well", starting.wait(soon()).unwrap_or(false));
    }
    same_start(tally, &old, &new);
    tally.check("appctl by name", shell("ovs-appctl version").contains("vswitchd"));
    let leftovers = shell("ls /run/openvswitch | grep ovsg");
    tally.check("nothing is left over", leftovers.is_empty());
    tally.check("no shutdown queued", systemd.shutdown_queued(soon()).is_ok_and(|q| !q));
    supervisor(tally, &systemd);
}

/// The new daemon's start must look like the old one's.
fn same_start(tally: &mut Tally, old: &Daemon, new: &Daemon) {
    let Ok(new) = RealDaemons::new(SOCKET).describe(new.kind, new.id.pid) else {
        return tally.check("the new daemon lives", false);
    };
    tally.check("same command line", old.argv == new.argv);
    tally.check("same limits", old.limits == new.limits);
    tally.check("same nice", old.nice == new.nice);
    tally.check("same oom_score_adj", old.oom_score_adj == new.oom_score_adj);
    tally.check("same cgroup", old.cgroup == new.cgroup);
    tally.check("same directory and mask", (&old.cwd, old.umask) == (&new.cwd, new.umask));
    let differ: Vec<_> = old.environment.iter().filter(|v| !new.environment.contains(v)).collect();
    let more: Vec<_> = new.environment.iter().filter(|v| !old.environment.contains(v)).collect();
    println!("     environment: was {differ:?}, is {more:?}");
}

fn supervisor(tally: &mut Tally, systemd: &Systemd) {
    let own = std::env::current_exe().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
    let unit = SupervisorUnit {
        name: "ovs-graceful-probe.service".into(),
        description: "Probe".into(),
        command: vec![own, "sleep".into()],
        stop_post: vec!["/bin/touch".into(), "/run/probe.stop-post".into()],
        ends_with: vec![0],
        environment: vec![("PROBE".into(), "a b".into())],
        nice: -5,
    };
    tally.take("start the supervisor", systemd.start_supervisor(&unit, soon()));
    let running = systemd.unit(&unit.name, soon()).ok().flatten().unwrap_or_default();
    tally.check("it is running", running.active_state == "active" && running.main_pid > 0);
    let pid = running.main_pid;
    tally.check("oom_score_adj", procfs::number(pid, "oom_score_adj").is_ok_and(|n| n == -1000));
    tally.check("nice", procfs::stat(pid).is_ok_and(|s| s.nice == -5));
    let limits = procfs::limits(pid).unwrap_or_default();
    tally.check("memlock", limits.iter().any(|l| l.name == "Max locked memory" && l.soft.is_none()));
    std::thread::sleep(Duration::from_secs(3));
    tally.check("stop-post ran", std::fs::remove_file("/run/probe.stop-post").is_ok());
    tally.check("it is gone", systemd.unit(&unit.name, soon()).is_ok_and(|u| u.is_none()));
}

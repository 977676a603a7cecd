//! The guest agent: makes the scenario's network, runs traffic through it, replaces the daemons, judges.

pub mod attack;
pub mod busy;
pub mod controller;
pub mod facts;
pub mod inject;
mod netlink;
pub mod probe;
pub mod run;
pub mod verdict;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{anyhow, Context, Result};

use crate::command::{shell, shell_lenient, wait_until};
use crate::outcome::{Action, Job, Outcome, ProbeOutcome};
use crate::packages::Packages;
use crate::scenarios::{self, containers, doors, Scenario, Traffic};
use nix::sys::resource::{setrlimit, Resource};
use nix::time::{clock_settime, ClockId};

use facts::{Counters, Daemon, Flows, Promised};
use probe::{Running, Spec};

/// The kernel's flows as our gate command saw them.
const FLOWS_AT_GATES: &str = "flows-gates";
/// Where `ovs-graceful restart` leaves its report.
const REPORT: &str = "report.json";
const VSWITCHD_LOG: &str = "/var/log/openvswitch/ovs-vswitchd.log";

/// Everything the assertions look at.
pub struct Evidence {
    /// What was asked.
    pub job: Job,
    /// Bridges of the scenario.
    pub bridges: Vec<String>,
    /// Both daemons before, in the order of [`facts::DAEMONS`].
    pub daemons_before: [Vec<Daemon>; 2],
    /// Both daemons after.
    pub daemons_after: [Vec<Daemon>; 2],
    /// Flows about a second before the action.
    pub flows_earlier: Flows,
    /// Flows just before the action.
    pub flows_before: Flows,
    /// Flows just after the action.
    pub flows_after: Flows,
    /// Counters just before the action.
    pub counters_before: Counters,
    /// Counters when the traffic had ended.
    pub counters_after: Counters,
    /// New flows begun between the two.
    pub flows_begun: u64,
    /// Kinds of tracked connections before.
    pub connections_before: BTreeMap<String, u64>,
    /// The same when the traffic had ended.
    pub connections_after: BTreeMap<String, u64>,
    /// What should not change.
    pub promised_before: Promised,
    /// The same afterwards.
    pub promised_after: Promised,
    /// What the old daemon had found out about the datapath.
    pub features_before: facts::Features,
    /// What the new one has.
    pub features_after: facts::Features,
    /// Failed units before.
    pub failed_before: String,
    /// What ovs-vswitchd logged since the action's start.
    pub log: String,
    /// Exit code of the action.
    pub exit: Option<i32>,
    /// The report of our restart.
    pub report: Option<serde_json::Value>,
}

/// Entry of `lab guest agent JOB OUT`: each round's result is written in any case.
pub fn agent(job: &Path, out: &Path) -> Result<()> {
    let text = fs::read_to_string(job).with_context(|| format!("cannot read {}", job.display()))?;
    let job: Job = serde_json::from_str(&text).context("the job is not what this agent understands")?;
    // The stream of new flows keeps a socket a packet.
    setrlimit(Resource::RLIMIT_NOFILE, 65_536, 65_536)?;
    come_to_the_present(&job)?;
    probe::SLOWER.store(u64::from(job.load.slower), Ordering::Relaxed);
    let prepared = prepare(&job, out);
    let mut all_passed = true;
    for round in 1..=job.rounds {
        let out = round_folder(out, round, job.rounds);
        fs::create_dir_all(&out)?;
        let mut outcome = Outcome::new(&job.scenario, job.action);
        versions(&mut outcome);
        let ran = match &prepared {
            Ok(scenario) => run_round(&job, *scenario, &out, &mut outcome),
            Err(error) => Err(anyhow!("{error:#}")),
        };
        if let Err(error) = ran {
            outcome.error = Some(format!("{error:#}"));
            say(&format!("error: {error:#}"));
        }
        outcome.passed = outcome.error.is_none() && !outcome.checks.is_empty() && outcome.checks.iter().all(|c| c.pass);
        fs::write(out.join("result.json"), serde_json::to_string_pretty(&outcome)?)?;
        all_passed &= outcome.passed;
    }
    if job.load.keeps_logs || !all_passed {
        collect_logs(out);
    }
    Ok(())
}

/// Where a round leaves its results: `out` itself where there is only one.
pub fn round_folder(out: &Path, round: usize, rounds: usize) -> PathBuf {
    if rounds == 1 {
        out.to_owned()
    } else {
        out.join(format!("round-{round}"))
    }
}

/// A line on the console.
pub fn say(line: &str) {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let uptime = uptime.split(' ').next().unwrap_or_default().to_owned();
    let _ = writeln!(std::io::stdout(), "[lab {uptime}] {line}\r");
}

/// What all rounds share: running daemons, our files, the scenario's network.
fn prepare(job: &Job, out: &Path) -> Result<Scenario> {
    wait_for_daemons()?;
    outlive_the_first_seconds()?;
    wait_for_daemons()?;
    let scenario = scenarios::find(&job.scenario)?;
    if job.product && matches!(scenario.packages(), Packages::None | Packages::Layers(_)) {
        install_product()?;
    }
    if job.action.is_door() {
        doors::install_package(out)?;
    }
    if job.action == Action::DoorOvsCtl {
        doors::divert_ovs_ctl()?;
    }
    if job.action == Action::Container {
        containers::prepare()?;
    }
    if let Scenario::Traffic(traffic) = scenario {
        set_up(traffic, out)?;
    }
    Ok(scenario)
}

fn set_up(scenario: &dyn Traffic, out: &Path) -> Result<()> {
    say(&format!("{}: setting up", scenario.name()));
    scenarios::network::patient_veth()?;
    scenario.set_up().map_err(|error| {
        facts::save_everything(&out.join("before"), &scenario.bridges());
        let _ = facts::flows(&out.join("flows-before"));
        error.context(format!("setting up {}", scenario.name()))
    })
}

fn run_round(job: &Job, scenario: Scenario, out: &Path, outcome: &mut Outcome) -> Result<()> {
    match scenario {
        Scenario::Traffic(traffic) => run_traffic(job, traffic, out, outcome),
        Scenario::Custom(custom) => custom.run(job, out, outcome),
    }
}

fn versions(outcome: &mut Outcome) {
    for (name, script) in [
        ("kernel", "uname -rv"),
        ("ovs", "ovs-vswitchd --version | head -1"),
        ("systemd", "systemctl --version | head -1"),
        ("ovs-graceful", "[ -x /lab/bin/ovs-graceful ] && /lab/bin/ovs-graceful --version"),
    ] {
        outcome.versions.insert(name.to_owned(), shell_lenient(script).trim().to_owned());
    }
}

/// Waits until both daemons have been started and the database answers.
pub fn wait_for_daemons() -> Result<()> {
    let started = || !facts::systemd_runs() || shell("systemctl is-active -q ovsdb-server ovs-vswitchd").is_ok();
    let ready = || {
        started()
            && shell("timeout 5 ovs-vsctl show").is_ok()
            && facts::DAEMONS.iter().all(|name| !facts::daemons(name).is_empty())
    };
    wait_until("both OVS daemons run", Duration::from_secs(90), Duration::from_millis(300), ready)
}

/// A machine that was kept has the time and the random numbers of then, the same in every run.
fn come_to_the_present(job: &Job) -> Result<()> {
    let now = Duration::from_millis(job.unix_ms);
    let behind = now.saturating_sub(SystemTime::now().duration_since(UNIX_EPOCH)?);
    if behind > Duration::from_secs(60) {
        clock_settime(ClockId::CLOCK_REALTIME, now.into())?;
    }
    let mut random = fs::File::options().write(true).open("/dev/urandom")?;
    random.write_all(job.entropy.as_bytes())?;
    // SAFETY: the request has no argument.
    unsafe { reseed(random.as_raw_fd()) }.map(drop).context("cannot reseed the random number generator")
}

nix::ioctl_none_bad!(
    /// RNDRESEEDCRNG of linux/random.h.
    reseed,
    nix::request_code_none!(b'R', 0x07)
);

/// Starts OVS anew once the guest is older than 10 s.
///
/// `count_cpu_cores` (lib/ovs-thread.c of OVS 3.1) answers 0 in the first 10 s after boot; a daemon started then has
/// no upcall sockets and loses every new flow. Hosts do not boot that fast, VMs of a lab do.
fn outlive_the_first_seconds() -> Result<()> {
    // In USER_HZ, which is 100 on every architecture of Debian's.
    if facts::daemons("ovs-vswitchd").iter().all(|daemon| daemon.start_time > 11 * 100) {
        return Ok(());
    }
    let uptime = || fs::read_to_string("/proc/uptime").ok()?.split('.').next()?.parse::<u32>().ok();
    let old = || uptime().is_some_and(|s| s >= 11);
    wait_until("the guest is 11 s old", Duration::from_secs(30), Duration::from_millis(100), old)?;
    shell("systemctl restart openvswitch-switch").map(drop)
}

/// Puts our binaries where a package would.
pub fn install_product() -> Result<()> {
    for entry in fs::read_dir("/lab/bin").context("this action needs the product, and the input has no bin/")?.flatten()
    {
        let target = Path::new("/usr/bin").join(entry.file_name());
        fs::copy(entry.path(), &target)?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Probes under way, by name.
pub type Live = Vec<(String, Box<dyn Running>)>;

/// One round of a network that is set up: its traffic, the action, and the judgement.
pub fn run_traffic(job: &Job, scenario: &dyn Traffic, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let bridges = scenario.bridges();
    // New flows have the ports of the last round: its connections would make old ones of them.
    let _nothing_to_flush = shell_lenient("conntrack -F");
    scenario.before_traffic()?;
    // Not beside the traffic: it is a dozen processes.
    facts::save_everything(&out.join("before"), &bridges);
    let live = start_all(scenario.probes())?;
    say("traffic runs");
    std::thread::sleep(Duration::from_secs_f64(job.load.before_s));
    let mut evidence = before(job, &bridges, out)?;
    scenario.before_action(outcome)?;
    evidence.connections_before = facts::connections()?;
    std::thread::sleep(Duration::from_secs(1));
    evidence.flows_before = facts::flows(&out.join("flows-before"))?;
    evidence.counters_before = facts::counters()?;
    let begun_before: u64 = live.iter().map(|(_, probe)| probe.flows_begun()).sum();
    let log_from = fs::metadata(VSWITCHD_LOG).map(|m| m.len()).unwrap_or(0);
    live.iter().for_each(|(_, probe)| probe.action_begins());

    act(job, out, outcome)?;
    evidence.exit = outcome.action_exit;
    let now = facts::flows(&out.join("flows-after")).unwrap_or_default();
    // Ours: what was there when the new daemon was bound and deletions were not yet let go. Later its first
    // revalidation deletes adopted flows and makes them anew (docs/adoption.md).
    evidence.flows_after = facts::read_flows(&out.join(FLOWS_AT_GATES)).unwrap_or(now);
    std::thread::sleep(Duration::from_secs_f64(scenario.after_s().unwrap_or(job.load.after_s)));
    evidence.flows_begun = live.iter().map(|(_, probe)| probe.flows_begun()).sum::<u64>() - begun_before;
    outcome.probes = finish_all(live)?;
    say("traffic ended");
    after(&mut evidence, log_from, out)?;
    verdict::judge(&evidence, &scenario.expect(), outcome);
    scenario.judge(&evidence, outcome);
    if job.load.keeps_logs || outcome.checks.iter().any(|check| !check.pass) {
        facts::save_everything(&out.join("after"), &bridges);
    }
    if job.action.judged_as_ours() {
        verdict::judge_thawed(outcome);
    }
    Ok(())
}

fn before(job: &Job, bridges: &[String], out: &Path) -> Result<Evidence> {
    Ok(Evidence {
        job: job.clone(),
        bridges: bridges.to_vec(),
        daemons_before: facts::DAEMONS.map(facts::daemons),
        daemons_after: [Vec::new(), Vec::new()],
        connections_before: BTreeMap::new(),
        connections_after: BTreeMap::new(),
        promised_before: facts::promised(bridges),
        promised_after: Promised::default(),
        features_before: facts::features(bridges),
        features_after: facts::Features::default(),
        failed_before: facts::failed_units(),
        flows_earlier: facts::flows(&out.join("flows-earlier"))?,
        flows_before: Flows::new(),
        flows_after: Flows::new(),
        counters_before: Counters::default(),
        counters_after: Counters::default(),
        flows_begun: 0,
        log: String::new(),
        exit: None,
        report: None,
    })
}

fn after(evidence: &mut Evidence, log_from: u64, out: &Path) -> Result<()> {
    evidence.counters_after = facts::counters()?;
    evidence.daemons_after = facts::DAEMONS.map(facts::daemons);
    evidence.connections_after = facts::connections()?;
    evidence.promised_after = facts::promised(&evidence.bridges);
    evidence.features_after = facts::features(&evidence.bridges);
    let log = fs::read(VSWITCHD_LOG).unwrap_or_default();
    let from = usize::try_from(log_from).unwrap_or(0).min(log.len());
    evidence.log = String::from_utf8_lossy(log.get(from..).unwrap_or_default()).into_owned();
    let report = fs::read_to_string(out.join(REPORT)).ok();
    evidence.report = report.and_then(|text| serde_json::from_str(&text).ok());
    Ok(())
}

/// Starts all of them, in their order.
pub fn start_all(probes: Vec<(String, Spec)>) -> Result<Live> {
    let start = |(name, spec): (String, Spec)| {
        let probe = spec.start().with_context(|| format!("starting probe {name}"))?;
        Ok((name, probe))
    };
    probes.into_iter().map(start).collect()
}

/// Ends all of them at once and waits for what is under way.
pub fn finish_all(live: Live) -> Result<BTreeMap<String, ProbeOutcome>> {
    let joins: Vec<_> =
        live.into_iter().map(|(name, probe)| (name, std::thread::spawn(move || probe.finish()))).collect();
    let mut results = BTreeMap::new();
    for (name, join) in joins {
        let result = join.join().map_err(|_| anyhow!("probe {name} panicked"))?;
        results.insert(name.clone(), result.with_context(|| format!("probe {name}"))?);
    }
    Ok(results)
}

/// Runs the action, keeping its words, exit code and duration.
pub fn act(job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let report: PathBuf = out.join(REPORT);
    let mut command = match job.action {
        Action::StockReload => words("systemctl", &["reload", "openvswitch-switch"]),
        Action::StockRestart => words("systemctl", &["restart", "openvswitch-switch"]),
        Action::DoorReload => words("systemctl", &["reload", "openvswitch-switch"]),
        Action::DoorRestart => words("systemctl", &["restart", "openvswitch-switch"]),
        Action::DoorRestartSwitch => words("systemctl", &["restart", "ovs-vswitchd"]),
        Action::DoorOvsCtl => words("sh", &["-c", &doors::ovs_ctl_command("restart")]),
        Action::DoorUpgrade => words("sh", &["-c", &doors::upgrade_command()]),
        Action::Nothing => words("true", &[]),
        Action::Ours | Action::Container => {
            let mut command = words("ovs-graceful", &["restart", "--report"]);
            command.arg(&report).arg("--gate-command");
            command.arg(format!(
                "ovs-dpctl dump-flows -m > {} && [ $(sysctl -n net.ipv4.ipfrag_max_dist) = 0 ]",
                out.join(FLOWS_AT_GATES).display()
            ));
            if job.action == Action::Container {
                command.args(["--restart-command", "container restart switch new"]);
            }
            command.args(&job.extra_args);
            command
        }
    };
    say(&format!("action: {}", job.action.name()));
    let started = Instant::now();
    outcome.note("action_uptime_ms", probe::now() / 1_000_000);
    let status = command
        .stdin(Stdio::null())
        .stdout(fs::File::create(out.join("action-stdout"))?)
        .stderr(fs::File::create(out.join("action-stderr"))?)
        .status()
        .with_context(|| format!("cannot start the action {}", job.action.name()))?;
    if job.action.is_door() {
        doors::wait_and_fetch_report(&report)?;
    }
    outcome.action_ms = started.elapsed().as_secs_f64() * 1e3;
    outcome.action_exit = status.code();
    say(&format!("action ended with {status} after {:.0} ms", outcome.action_ms));
    Ok(())
}

fn words(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

fn collect_logs(out: &Path) {
    for (name, script) in [
        ("journalctl", "journalctl -b --no-pager -o short-monotonic"),
        ("dmesg", "dmesg"),
        ("all-reports.json", "cat /var/lib/ovs-graceful/runs/*/report.json 2>/dev/null"),
        ("run.log", "tail -n 1000 /run/ovs-graceful/run.log 2>/dev/null"),
    ] {
        let _ = fs::write(out.join(name), shell_lenient(script));
    }
    let _ = shell(&format!(
        "cp -r /var/log/openvswitch {0}/; cp -r /var/lib/ovs-graceful {0}/state 2>/dev/null || true",
        out.display()
    ));
}

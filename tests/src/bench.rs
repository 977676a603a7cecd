//! One run, seen from the host: builds what goes in, boots, judges what comes out, prints it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{bail, Context, Result};

use crate::command::run;
use crate::guest;
use crate::image;
use crate::outcome::{Action, Job, Load, Outcome, ProbeOutcome};
use crate::packages::{self, Packages};
use crate::places::{self, VmLock};
use crate::scenarios::{self, containers, Program, Scenario};
use crate::vm;

/// Where statically linked binaries are taken from instead of being built.
const BIN_DIR: &str = "LAB_BIN_DIR";
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PRODUCT: [&str; 2] = ["ovs-graceful", "dpfreeze"];
/// A scenario takes about a minute, `scale` three; TCG on a slow machine five times as much.
const LIMIT: Duration = Duration::from_secs(900);
/// What a further round in the same VM adds.
const ROUND_LIMIT: Duration = Duration::from_secs(400);
/// The same for a run of a scenario that makes several by itself.
const RUN_LIMIT: Duration = Duration::from_secs(150);

/// What to run.
#[derive(Debug, Clone)]
pub struct Request {
    /// Scenario.
    pub scenario: String,
    /// Action.
    pub action: Action,
    /// Debian suite of the image.
    pub suite: String,
    /// Where the results go; a folder under `target/lab/out` if none is named.
    pub out: Option<PathBuf>,
    /// More arguments for `ovs-graceful restart`.
    pub extra_args: Vec<String>,
    /// How much traffic.
    pub load: Load,
}

/// Folder with the static binaries, building them unless `$LAB_BIN_DIR` has them.
pub fn binaries(product: bool, programs: &[Program]) -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os(BIN_DIR) {
        let folder = PathBuf::from(folder);
        let mut wanted = vec!["lab"];
        wanted.extend(PRODUCT.iter().filter(|_| product));
        wanted.extend(programs.iter().map(|program| program.example));
        for name in wanted {
            if !folder.join(name).is_file() {
                bail!("{BIN_DIR} is {}, which has no {name}: put it there, or unset {BIN_DIR}", folder.display());
            }
        }
        return Ok(folder);
    }
    let packages: &[&str] = if product { &["lab", "orchestrator", "dpfreeze"] } else { &["lab"] };
    build(&packages.iter().flat_map(|package| ["-p", package]).collect::<Vec<_>>())?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| places::workspace().join("target"), PathBuf::from);
    let folder = target.join(TARGET).join("release");
    for program in programs {
        let Program { package, example, features } = program;
        build(&["-p", package, "--example", example, "--features", features])?;
        fs::copy(folder.join("examples").join(example), folder.join(example))?;
    }
    Ok(folder)
}

fn build(what: &[&str]) -> Result<()> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(places::workspace());
    command.args(["build", "--quiet", "--release", "--target", TARGET]).args(what);
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    // It would be stripped.
    command.env("CARGO_PROFILE_RELEASE_DEBUG", "false");
    run(&mut command).context("building the static binaries")
}

/// Makes one run. An error is a lab error; a failed assertion is an outcome.
pub fn one(request: &Request, lock: &VmLock) -> Result<(Outcome, PathBuf)> {
    rounds(request, 1, lock)?.pop().context("the guest made no round")
}

/// Boots once, while no other process has VMs, and makes `rounds` runs in a row in that VM.
pub fn rounds(request: &Request, rounds: usize, _lock: &VmLock) -> Result<Vec<(Outcome, PathBuf)>> {
    let scenario = scenarios::find(&request.scenario)?;
    let for_any = request.action.is_door() || request.action == Action::Container;
    if for_any && matches!(scenario, Scenario::Custom(_)) {
        bail!("{} makes its own runs: it takes no door", request.scenario);
    }
    if rounds != 1 && matches!(scenario, Scenario::Custom(_)) {
        bail!("{} makes its own runs: it takes no number of rounds", request.scenario);
    }
    let out = match &request.out {
        Some(out) => {
            fs::create_dir_all(out)?;
            fs::canonicalize(out)?
        }
        None => vm::fresh_output(&format!("{}-{}", request.scenario, request.action.name()))?,
    };
    let image = image::ensure(&request.suite)?;
    let input = tempfile::tempdir()?;
    let product = matches!(request.action, Action::Ours | Action::Container)
        || scenario.older_daemon().is_some()
        || matches!(scenario, Scenario::Custom(_));
    put_binaries(input.path(), product, scenario.programs())?;
    let packages = match request.action {
        Action::DoorUpgrade => Packages::OursAndNext,
        action if action.is_door() => Packages::Ours,
        Action::Container => containers::IMAGES,
        _ => scenario.packages(),
    };
    packages::put(packages, &request.suite, &input.path().join("packages"))?;
    if let Some(suite) = scenario.older_daemon() {
        image::put_vswitchd(suite, &input.path().join("older"))?;
    }
    let job = Job {
        scenario: request.scenario.clone(),
        action: request.action,
        product,
        load: request.load,
        rounds,
        unix_ms: SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64,
        entropy: fs::read_to_string("/proc/sys/kernel/random/uuid")?,
        extra_args: scenario.extra_args().iter().map(|a| (*a).to_owned()).chain(request.extra_args.clone()).collect(),
    };
    fs::write(input.path().join("job.json"), serde_json::to_string_pretty(&job)?)?;
    let more = ROUND_LIMIT * u32::try_from(rounds.saturating_sub(1)).unwrap_or(0);
    let boot = vm::Boot {
        image: &image,
        input: input.path(),
        output: &out,
        kernel_args: scenario.kernel_args(),
        cpus: scenario.cpus(),
        reboots: scenario.reboots(),
        limit: more + LIMIT + RUN_LIMIT * scenario.runs(&job.extra_args)?,
    };
    let ran = vm::boot(&boot)?;
    (1..=rounds)
        .map(|round| {
            let out = guest::round_folder(&out, round, rounds);
            Ok((finish_outcome(&out, &ran, &image.suite)?, out))
        })
        .collect()
}

/// What the guest finds in `/lab`.
fn put_binaries(input: &Path, product: bool, programs: &[Program]) -> Result<()> {
    let bin = binaries(product, programs)?;
    put_binary(&bin, "lab", input)?;
    if product {
        let folder = input.join("bin");
        fs::create_dir(&folder)?;
        for name in PRODUCT.into_iter().chain(programs.iter().map(|program| program.example)) {
            put_binary(&bin, name, &folder)?;
        }
    }
    Ok(())
}

/// Without what only a debugger wants: the guest copies it several times.
fn put_binary(from: &Path, name: &str, to: &Path) -> Result<()> {
    run(Command::new("strip").args(["--strip-debug", "-o"]).arg(to.join(name)).arg(from.join(name)))
        .with_context(|| format!("no static {name}"))
}

/// Reads what the guest left of a round and adds what only the host knows.
fn finish_outcome(out: &Path, ran: &vm::Ran, suite: &str) -> Result<Outcome> {
    let path = out.join("result.json");
    let text = fs::read_to_string(&path)
        .with_context(|| format!("the guest left no {} (a lab error): see its console", path.display()))?;
    let mut outcome: Outcome = serde_json::from_str(&text).context("the guest's result is not readable")?;
    outcome.versions.insert("qemu".to_owned(), ran.qemu.clone());
    outcome.versions.insert("suite".to_owned(), suite.to_owned());
    outcome.note("vm_seconds", ran.seconds);
    fs::write(&path, serde_json::to_string_pretty(&outcome)?)?;
    Ok(outcome)
}

/// Prints one outcome: probes, then assertions (failed ones with what was found).
pub fn print(outcome: &Outcome, out: &Path) {
    println!("{} / {}: {}", outcome.scenario, outcome.action.name(), if outcome.passed { "passed" } else { "FAILED" });
    if let Some(error) = &outcome.error {
        println!("  error: {error}");
    }
    let exit = outcome.action_exit.map_or("none".to_owned(), |c| c.to_string());
    println!("  action: exit {exit}, {:.0} ms", outcome.action_ms);
    for (name, probe) in &outcome.probes {
        println!("  {}", probe_line(name, probe));
    }
    let held = outcome.checks.iter().filter(|c| c.pass).count();
    println!("  {held} of {} assertions held", outcome.checks.len());
    for check in outcome.checks.iter().filter(|c| !c.pass) {
        let value = check.value.to_string();
        let short: String = value.chars().take(600).collect();
        println!("  FAILED: {}: {short}", check.name);
    }
    println!("  all of it: {}", out.display());
}

fn probe_line(name: &str, probe: &ProbeOutcome) -> String {
    match probe {
        ProbeOutcome::Udp(u) => {
            let side = |d: &crate::outcome::Direction| {
                format!(
                    "lost {} dup {} reord {} gap {:.0} ms lat p50 {:.1} p99 {:.1} max {:.0} worst {:.0} ms",
                    d.lost, d.duplicated, d.reordered, d.longest_lost_ms, d.p50_ms, d.p99_ms, d.max_ms, d.worst_ms
                )
            };
            format!(
                "{name}: sent {} of {} (late {:.0} ms); there: {}; back: {}",
                u.sent,
                u.due,
                u.sender_late_ms,
                side(&u.requests),
                side(&u.replies)
            )
        }
        ProbeOutcome::Tcp(t) => format!(
            "{name}: {:.0} s, verified {:?} of {:?}, retransmitted {}, time-outs {}, longest gap {:.0} ms{}",
            t.seconds,
            t.verified,
            t.written,
            t.retransmitted,
            t.timeouts,
            t.longest_gap_ms,
            t.error.as_ref().map_or(String::new(), |e| format!(", {e}"))
        ),
        ProbeOutcome::Connections(c) => format!(
            "{name}: {} of {} answered, longest {:.0} ms, errors {:?}",
            c.answered, c.begun, c.longest_ms, c.errors
        ),
        ProbeOutcome::Iperf(i) => format!(
            "{:.1} MB in {:.1} s, {} segments sent again, longest time without a byte {:.0} ms{}",
            i.bytes as f64 / 1e6,
            i.seconds,
            i.retransmitted,
            i.longest_silent_ms,
            i.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default()
        ),
        ProbeOutcome::Copies(c) => {
            let flows: Vec<String> =
                c.by_flow.iter().map(|(flow, n)| format!("{flow} {} dup {}", n.different, n.duplicated)).collect();
            format!("{name}: {}; uncounted {}", flows.join(", "), c.dropped)
        }
        ProbeOutcome::Silent(s) => format!(
            "{name}: unicast {} quiet, {} later; broadcast {} quiet, {} later",
            s.quiet_unicast, s.later_unicast, s.quiet_broadcast, s.later_broadcast
        ),
    }
}

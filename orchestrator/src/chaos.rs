//! Faults thrown into a real run, for tests: with the feature `chaos` only, which no shipped program has.
//!
//! `OVS_GRACEFUL_CHAOS=STEP:WHEN:FAULT` in the environment of `ovs-graceful restart`, for example
//! `restore:after:kill-new`. STEP is a phase of the journal, WHEN `before` or `after` its effect. A fault strikes once in
//! a run; a supervisor that is started again throws none. `OVS_GRACEFUL_FORGET=KIND` has the run forget a kind of state
//! (`inventory/forgotten.rs`).

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{anyhow, bail, Context};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::inventory::{is_forgotten, Kept};
use crate::machine::Phase;
use crate::steps::{Run, Stop};

/// Says what is to go wrong.
pub const VARIABLE: &str = "OVS_GRACEFUL_CHAOS";
/// How long a stopped daemon stays stopped, seconds.
const STOPPED_S: u32 = 5;
/// How long a stopped supervisor stays stopped, seconds: longer than the lease of the freeze.
const SUPERVISOR_STOPPED_S: u32 = 30;
/// What the fault `script` runs: whatever a test has put there.
const SCRIPT: &str = "/run/ovs-graceful-chaos";
/// Nothing hangs longer: tests want to end.
const LONGEST_HANG: Duration = Duration::from_secs(40);

static STRUCK: AtomicBool = AtomicBool::new(false);

/// `phase` is about to be done.
pub fn before(run: &mut Run, phase: Phase) -> Result<(), Stop> {
    for kept in Kept::ALL.iter().filter(|kept| phase == Phase::Check && is_forgotten(**kept)) {
        run.warn(format!("chaos: forgets {}", kept.word()));
    }
    strike(run, phase, "before")
}

/// It is done, and nobody has been told.
pub fn after(run: &mut Run, phase: Phase) -> Result<(), Stop> {
    strike(run, phase, "after")
}

fn strike(run: &mut Run, phase: Phase, when: &str) -> Result<(), Stop> {
    let Ok(wanted) = std::env::var(VARIABLE) else { return Ok(()) };
    let Some(fault) = wanted.strip_prefix(&format!("{}:{when}:", step(phase))) else { return Ok(()) };
    if STRUCK.swap(true, Ordering::SeqCst) {
        return Ok(());
    }
    run.warn(format!("chaos: {wanted}"));
    match fault {
        "fail" => Err(anyhow!("chaos: it fails").into()),
        "hang" => {
            let until = run.deadline.min(run.now() + LONGEST_HANG);
            run.host.clock.sleep(until.saturating_duration_since(run.now()));
            Ok(())
        }
        "script" => {
            let done = Command::new(SCRIPT).status().with_context(|| format!("cannot run {SCRIPT}"))?;
            match done.success() {
                true => Ok(()),
                false => Err(anyhow!("{SCRIPT}: {done}").into()),
            }
        }
        other => Ok(signal(run, other)?),
    }
}

/// The name of its step in the journal.
fn step(phase: Phase) -> &'static str {
    match phase {
        Phase::SwitchPrepare => "switch-prepare",
        Phase::SwitchCommit => "switch-commit",
        other => other.name(),
    }
}

/// `kill-` or `stop-`, and whom. One that is not there is spared.
fn signal(run: &Run, fault: &str) -> anyhow::Result<()> {
    let Some((what, whom)) = fault.split_once('-') else { bail!("{VARIABLE}: no fault {fault}") };
    let number = match whom {
        "supervisor" => i32::try_from(std::process::id()).ok(),
        "old" => run.known.old.as_ref().map(|old| old.id.pid),
        "new" => run.known.new.as_ref().map(|new| new.id.pid),
        "ovsdb" => run.host.daemons.find_ovsdb_server().ok().map(|server| server.id.pid),
        _ => bail!("{VARIABLE}: no fault {fault}"),
    };
    let Some(pid) = number.map(Pid::from_raw) else { return Ok(()) };
    match what {
        "kill" => {
            let _ended_by_itself = kill(pid, Signal::SIGKILL);
        }
        "stop" => {
            let seconds = if whom == "supervisor" { SUPERVISOR_STOPPED_S } else { STOPPED_S };
            // Not in the run's cgroup: systemd ends what is left in it with the run.
            let woken = Command::new("systemd-run")
                .args(["--quiet", &format!("--on-active={seconds}"), "--timer-property=AccuracySec=100ms", "--collect"])
                .args(["kill", "-CONT", &pid.to_string()])
                .status()
                .context("cannot start systemd-run")?;
            anyhow::ensure!(woken.success(), "systemd-run: {woken}");
            let _ended_by_itself = kill(pid, Signal::SIGSTOP);
        }
        _ => bail!("{VARIABLE}: no fault {fault}"),
    }
    Ok(())
}

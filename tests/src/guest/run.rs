//! A run of ours as a scenario follows it: by its journal, and by its lock.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::unistd::Pid;
use serde_json::Value;

use crate::command::{shell_lenient, wait_until};
use crate::guest::facts;

/// Where runs leave their journals and reports.
const RUNS: &str = "/var/lib/ovs-graceful/runs";

/// The ids of all runs so far.
pub fn known() -> Vec<String> {
    let entries = fs::read_dir(RUNS).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Where run `id` leaves its report.
pub fn report(id: &str) -> PathBuf {
    Path::new(RUNS).join(id).join("report.json")
}

/// Whether the journal of run `id`, on disk or in memory, has the intent of `phase`.
pub fn has_begun(id: &str, phase: &str) -> bool {
    let wanted = format!("\"phase\":\"{phase}\"");
    let journals = [format!("{RUNS}/{id}/journal"), format!("/run/ovs-graceful/journal.{id}")];
    journals
        .iter()
        .filter_map(|path| fs::read(path).ok())
        .any(|bytes| String::from_utf8_lossy(&bytes).contains(&wanted))
}

/// Waits until a run that is not among `known` begins `phase`; returns its id.
pub fn wait_for(phase: &str, known: &[String]) -> Result<String> {
    let end = Instant::now() + Duration::from_secs(240);
    while Instant::now() < end {
        if let Some(id) = self::known().into_iter().find(|id| !known.contains(id)) {
            if has_begun(&id, phase) {
                return Ok(id);
            }
            if report(&id).exists() {
                bail!("run {id} ended before it came to {phase}");
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!("no run came to {phase}")
}

/// The process that holds the run lock.
pub fn supervisor() -> Result<Pid> {
    let holder: Value = serde_json::from_slice(&fs::read("/run/ovs-graceful/lock")?)?;
    let pid = holder["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 1);
    pid.map(Pid::from_raw).with_context(|| format!("no supervisor in the lock: {holder}"))
}

/// Starts `ovs-graceful restart --no-ovsdb` with `arguments`; what it says goes to `log`.
pub fn start(arguments: &[&str], log: &Path) -> Result<Child> {
    let arguments: Vec<&str> = std::iter::once("--no-ovsdb").chain(arguments.iter().copied()).collect();
    start_with(&arguments, &[], log)
}

/// Starts `ovs-graceful restart` with `arguments` and `environment`; what it says goes to `log`.
pub fn start_with(arguments: &[&str], environment: &[(&str, &str)], log: &Path) -> Result<Child> {
    let log = fs::File::create(log)?;
    Command::new("ovs-graceful")
        .arg("restart")
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start ovs-graceful")
}

/// Waits until the supervisor's unit has ended, also the last time that systemd starts it again.
pub fn wait_until_unit_gone(patience: Duration) -> Result<()> {
    wait_until("the supervisor's unit has gone", patience, Duration::from_millis(100), || {
        facts::unit_property("ovs-graceful-run.service", "ActiveState") == "inactive"
    })
}

/// Waits until systemd has nothing left to do: it restarts ovs-vswitchd where ovsdb-server was killed.
pub fn wait_until_no_job(patience: Duration) -> Result<()> {
    wait_until("systemd has no job left", patience, Duration::from_millis(200), || {
        shell_lenient("systemctl list-jobs --no-legend").trim().is_empty()
    })
}

/// Waits until recover has written the report of run `id`; returns its path.
pub fn wait_for_recovery(id: &str) -> Result<PathBuf> {
    let report = report(id);
    let (patience, every) = (Duration::from_secs(100), Duration::from_millis(100));
    wait_until("recover has written its report", patience, every, || report.exists())?;
    Ok(report)
}

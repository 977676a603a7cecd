//! A whole run of ours under plain's traffic, with something that happens in the middle of it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{network, plain, Expect};
use crate::guest::{self, run, say, verdict};
use crate::outcome::Outcome;

/// [`traffic`] through a run that has to end with 0 and without a difference, and may lose nothing.
pub fn restart(
    arguments: &[&str],
    out: &Path,
    outcome: &mut Outcome,
    meanwhile: impl FnOnce(&[String], &mut Outcome) -> Result<()>,
) -> Result<Value> {
    let report = traffic(arguments, out, outcome, meanwhile)?;
    outcome.check("exit code 0", outcome.action_exit == Some(0) && report["exit_code"] == 0, &report["exit_code"]);
    let none = report["differences"].as_array().is_some_and(Vec::is_empty);
    outcome.check("report has no differences", none, &report["differences"]);
    verdict::no_losses(&Expect::default(), outcome);
    Ok(report)
}

/// Runs `ovs-graceful restart` with `arguments`; `meanwhile` is called as it begins, with the runs there were before.
/// Returns its report.
pub fn traffic(
    arguments: &[&str],
    out: &Path,
    outcome: &mut Outcome,
    meanwhile: impl FnOnce(&[String], &mut Outcome) -> Result<()>,
) -> Result<Value> {
    network::patient_veth()?;
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(3));
    live.iter().for_each(|(_, probe)| probe.action_begins());
    let known = run::known();
    let report = out.join("report.json");
    let mut client = Command::new("ovs-graceful")
        .args(["restart", "--report"])
        .arg(&report)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(fs::File::create(out.join("action-stdout"))?)
        .stderr(fs::File::create(out.join("action-stderr"))?)
        .spawn()
        .context("cannot start ovs-graceful")?;
    let happened = meanwhile(&known, outcome);
    outcome.action_exit = client.wait()?.code();
    say(&format!("the run ended with {:?}", outcome.action_exit));
    happened?;
    std::thread::sleep(Duration::from_secs(5));
    outcome.probes.extend(guest::finish_all(live)?);
    let report: Value = serde_json::from_str(&fs::read_to_string(report)?)?;
    outcome.note("report", &report);
    verdict::probes_sent(outcome);
    Ok(report)
}

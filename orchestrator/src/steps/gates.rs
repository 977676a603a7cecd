//! Gates: does the new daemon have what its owners gave the old one, and do they agree?

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use super::{notes, Ended, Run, Step, Stop};
use crate::config::Config;
use crate::host::datapath::DATAPATH;
use crate::machine::{Event, Phase};

pub(super) struct Gates;

impl Step for Gates {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Gates)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        let until = run.deadline;
        note_frozen_flows(run)?;
        let now = run.host.openflow.snapshot(&run.known.facts.bridges, until)?;
        let mut complete = true;
        for before in run.known.rules.clone() {
            let count = now.iter().find(|now| now.bridge == before.bridge).map_or(0, |now| now.flows.len());
            if count < before.flows.len() {
                complete = false;
                run.warn(format!("bridge {}: {count} OpenFlow flows, {} before", before.bridge, before.flows.len()));
            }
        }
        if !complete {
            return Ok(Event::DifferencesFound);
        }
        if let Some(command) = run.wish.gate_command.clone() {
            wait_for_command(run, &command)?;
        }
        Ok(Event::Done)
    }
}

/// Before deletions are let go: every flow that should have been kept is there.
fn note_frozen_flows(run: &mut Run) -> Result<(), Stop> {
    if !run.host.datapath.is_armed() {
        return Ok(());
    }
    let now = run.host.datapath.snapshot()?;
    if let (Some(removed), Some(before)) = (run.host.datapath.removed(), &run.known.before) {
        notes::frozen_flows(&mut run.report, DATAPATH, removed, before, &now);
    }
    run.checkpoint()
}

/// The operator's own test. It runs while flow deletions are still refused, with a time limit.
fn wait_for_command(run: &mut Run, command: &str) -> Result<(), Stop> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("starting the gate command {command:?}"))?;
    let waited = run.wait_for("the gate command to end", |_| {
        let Some(status) = child.try_wait().context("waiting for the gate command")? else { return Ok(false) };
        match status.success() {
            true => Ok(true),
            false => Err(anyhow::anyhow!("the gate command {command:?} ended with {status}").into()),
        }
    });
    if waited.is_err() {
        let _already_gone = child.kill();
        let _reaped = child.wait();
    }
    waited
}

//! Gates: does the new daemon have what its owners gave the old one, and do they agree?

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use dpfreeze::ovs::FlowCounts;

use super::{bridges, notes, restore, Ended, Run, Step, Stop};
use crate::config::Config;
use crate::host::datapath::DATAPATH;
use crate::host::real::openflow::is_timed;
use crate::machine::{Event, Phase};

pub(super) struct Gates;

/// A flow that so many dumps lack is gone.
const LOOKS: u32 = 3;

impl Step for Gates {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Gates)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        restore::teach_the_rest(run)?;
        note_frozen_flows(run)?;
        if !has_every_rule(run)? {
            return Ok(Event::DifferencesFound);
        }
        if let Some(command) = run.wish.gate_command.clone() {
            wait_for_command(run, &command)?;
        }
        Ok(Event::Done)
    }
}

/// By number only: Verify compares by meaning, and a dump of tens of thousands of rules takes seconds.
fn has_every_rule(run: &mut Run) -> Result<bool, Stop> {
    bridges::forget_removed_now(run)?;
    let now = bridges::despite_removals(run, |run| {
        run.host.openflow.count_flows(&run.known.rules, run.deadline).context("counting OpenFlow flows")
    })?;
    let mut lacking = Vec::new();
    for (before, now) in run.known.rules.iter().zip(now) {
        // Rules with a time-out may have gone rightly.
        // What could not be put back is told by Verify.
        let refused = |rule: &str| run.known.refused.iter().any(|no| no.bridge == before.bridge && no.rule == rule);
        let wanted = before.flows.iter().filter(|rule| !is_timed(rule) && !refused(rule)).count() as u64;
        if now < wanted {
            lacking.push(format!("bridge {}: {now} OpenFlow flows, {wanted} without a time-out before", before.bridge));
        }
    }
    let complete = lacking.is_empty();
    lacking.into_iter().for_each(|text| run.warn(text));
    run.checkpoint()?;
    Ok(complete)
}

/// Before deletions are let go: every flow that should have been kept is there. The kernel makes its table anew as it
/// grows, and every ten minutes (`flow_key_insert`, net/openvswitch/flow_table.c): a dump under way may then lack flows,
/// and cannot always tell while others are being added.
fn note_frozen_flows(run: &mut Run) -> Result<(), Stop> {
    if !run.host.datapath.is_armed() {
        return Ok(());
    }
    let mut seen = run.host.datapath.flow_counts()?;
    let mut gone = frozen_flows_gone(run, &seen);
    for _ in 1..LOOKS {
        if gone.is_none() {
            break;
        }
        seen.update(run.host.datapath.flow_counts()?);
        gone = frozen_flows_gone(run, &seen);
    }
    if let Some(gone) = gone {
        notes::flows_gone(&mut run.report, DATAPATH, gone);
    }
    run.checkpoint()
}

fn frozen_flows_gone(run: &mut Run, seen: &FlowCounts) -> Option<notes::Gone> {
    let before = run.known.before.as_ref()?.datapath(DATAPATH)?;
    let removed = run.host.datapath.removed()?;
    notes::frozen_flows(&mut run.report, DATAPATH, removed, &before.flows, seen)
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

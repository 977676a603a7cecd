//! Restore: the new daemon gets back what the old one had been told and had learned.

use std::time::Duration;

use anyhow::Context;

use super::{notes, Ended, Run, Step, Stop};
use crate::config::Config;
use crate::host::{Bridge, BridgeRules, LearnReport};
use crate::machine::{Event, Phase};

pub(super) struct Restore;

/// A daemon that has every bridge has its tunnel ports as well, but for this.
const TUNNEL_PATIENCE: Duration = Duration::from_millis(500);

impl Step for Restore {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Restore)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        restore(run).map_err(retryable)?;
        Ok(Event::Done)
    }
}

pub(super) fn restore(run: &mut Run) -> Result<(), Stop> {
    let until = run.deadline;
    let new = run.new_daemon()?.clone();
    let bridges = run.known.facts.bridges.clone();
    run.host.openflow.wait_ready(&new, &bridges, until).context("the new ovs-vswitchd with every bridge")?;
    run.checkpoint()?;
    for failed in run.host.datapath.tunnels_adopted(TUNNEL_PATIENCE)? {
        run.warn(format!("tunnel port not kept: {failed}"));
    }
    raise_flow_limit(run)?;
    let rules = run.known.rules.clone();
    restore_rules(run, &rules)?;
    teach_addresses(run, &bridges)
}

fn restore_rules(run: &mut Run, rules: &[BridgeRules]) -> Result<(), Stop> {
    let restored = run.host.openflow.restore(rules, run.deadline).context("restoring OpenFlow rules")?;
    notes::restored(&mut run.report, &restored);
    run.checkpoint()
}

/// Hazards 24: NORMAL would flood what it had learned to send to one port.
fn teach_addresses(run: &mut Run, bridges: &[Bridge]) -> Result<(), Stop> {
    let until = run.deadline;
    let new = run.new_daemon()?.clone();
    let mut learned = LearnReport::default();
    for bridge in bridges {
        let Some(entries) = run.known.addresses.get(&bridge.name) else { continue };
        let taught = run.host.openflow.learn(&new, bridge, entries, until).context("learned addresses")?;
        learned.restored += taught.restored;
        for (reason, count) in taught.skipped {
            *learned.skipped.entry(reason).or_default() += count;
        }
    }
    notes::learned(&mut run.report, &learned);
    run.checkpoint()
}

/// Hazards 24: the limit starts at 10,000; above it handlers do not install flows, far above it all are deleted.
fn raise_flow_limit(run: &mut Run) -> Result<(), Stop> {
    let until = run.deadline;
    let new = run.new_daemon()?.clone();
    let limit = run.config.restore.flow_limit.to_string();
    run.host.daemons.command(&new, "upcall/set-flow-limit", &[&limit], until).context("raising the flow limit")?;
    run.checkpoint()
}

/// A bridge with a controller loses its rules when flow-restore-wait goes: it takes the adding of the controllers,
/// held back until then, for a change of mind (ofproto_flush_flows).
pub(super) fn restore_bridges_with_controllers(run: &mut Run) -> Result<(), Stop> {
    let with_controllers: Vec<Bridge> =
        run.known.facts.bridges.iter().filter(|bridge| !bridge.controllers.is_empty()).cloned().collect();
    if with_controllers.is_empty() {
        return Ok(());
    }
    super::handover::wait_in_step(run)?;
    let rules: Vec<BridgeRules> = run
        .known
        .rules
        .iter()
        .filter(|rules| with_controllers.iter().any(|bridge| bridge.name == rules.bridge))
        .cloned()
        .collect();
    restore_rules(run, &rules)?;
    teach_addresses(run, &with_controllers)
}

fn retryable(stop: Stop) -> Stop {
    match stop {
        Stop::Failed { error, .. } => Stop::Failed { error, retryable: true },
        other => other,
    }
}

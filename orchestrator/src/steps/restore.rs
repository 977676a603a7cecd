//! Restore: the new daemon gets back what the old one had been told and had learned.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context};

use super::{notes, Ended, Host, Known, Run, Step, Stop};
use crate::config::Config;
use crate::host::{Bridge, BridgeRules, Daemon, FdbEntry, LearnReport, OpenFlow, PreparedRestore, RestoredRules};
use crate::machine::{Event, Phase};

pub(super) struct Restore;

/// A daemon that has every bridge has its tunnel ports as well, but for this.
const TUNNEL_PATIENCE: Duration = Duration::from_millis(500);

impl Step for Restore {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Restore)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        restore(run).map_err(Stop::retryable)?;
        Ok(Event::Done)
    }
}

pub(super) fn restore(run: &mut Run) -> Result<(), Stop> {
    let until = run.deadline;
    let new = run.new_daemon()?.clone();
    let bridges = run.known.facts.bridges.clone();
    let limit = run.config.restore.flow_limit;
    run.host.openflow.wait_ready(&new, &bridges, limit, until).context("the new ovs-vswitchd with every bridge")?;
    run.checkpoint()?;
    for failed in run.host.datapath.tunnels_adopted(TUNNEL_PATIENCE)? {
        run.warn(format!("tunnel port not kept: {failed}"));
    }
    let Known { rules, addresses, prepared, .. } = &mut run.known;
    let done = put_back(&run.host, &new, &bridges, rules, addresses, prepared.take(), until)?;
    note(run, done)
}

/// Rules and addresses, side by side: the one waits for the daemon's table, the other for its control socket.
fn put_back(
    host: &Host,
    new: &Daemon,
    bridges: &[Bridge],
    rules: &[BridgeRules],
    addresses: &BTreeMap<String, Vec<FdbEntry>>,
    prepared: Option<Box<dyn PreparedRestore>>,
    until: Instant,
) -> anyhow::Result<(Vec<RestoredRules>, LearnReport)> {
    thread::scope(|scope| {
        let openflow = host.openflow.as_ref();
        let learned = scope.spawn(move || teach_addresses(openflow, new, bridges, addresses, until));
        let restored = match prepared {
            Some(prepared) => prepared.commit(rules, until),
            None => openflow.restore(rules, until),
        };
        let learned = learned.join().unwrap_or_else(|_| bail!("teaching learned addresses panicked"));
        Ok((restored.context("restoring OpenFlow rules")?, learned.context("restoring learned addresses")?))
    })
}

/// Hazards 24: NORMAL would flood what it had learned to send to one port.
fn teach_addresses(
    openflow: &dyn OpenFlow,
    new: &Daemon,
    bridges: &[Bridge],
    addresses: &BTreeMap<String, Vec<FdbEntry>>,
    until: Instant,
) -> anyhow::Result<LearnReport> {
    let mut learned = LearnReport::default();
    for bridge in bridges {
        let Some(entries) = addresses.get(&bridge.name) else { continue };
        let taught = openflow.learn(new, bridge, entries, until)?;
        learned.restored += taught.restored;
        for (reason, count) in taught.skipped {
            *learned.skipped.entry(reason).or_default() += count;
        }
    }
    Ok(learned)
}

fn note(run: &mut Run, (restored, learned): (Vec<RestoredRules>, LearnReport)) -> Result<(), Stop> {
    notes::restored(&mut run.report, &restored);
    notes::learned(&mut run.report, &learned);
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
    let (new, until) = (run.new_daemon()?.clone(), run.deadline);
    let done = put_back(&run.host, &new, &with_controllers, &rules, &run.known.addresses, None, until)?;
    note(run, done)
}

//! Restore: the new daemon gets back what the old one had been told and had learned.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context};

use super::{bridges, notes, remembered, Ended, Host, Known, Run, Step, Stop};
use crate::config::Config;
use crate::host::{
    Bridge, BridgeRules, Daemon, FdbEntry, LearnReport, OpenFlow, Preparation, PreparedRestore, RestoredRules,
};
use crate::machine::{Event, Phase};

pub(super) struct Restore;

/// A daemon that has every bridge has its tunnel ports and their policing as well, but for this.
const TUNNEL_PATIENCE: Duration = Duration::from_millis(500);
/// Packets wait while addresses are taught: those that were seen last come first, and the rest comes when no packet waits.
const ADDRESSES_WHILE_PACKETS_WAIT: Duration = Duration::from_millis(500);
/// What is not taught in this time is told as not restored: the other gates come after it.
const ADDRESSES_AFTERWARDS: Duration = Duration::from_secs(120);
/// A bridge that the daemon does not have after this time may have been removed from the database.
const BRIDGE_PATIENCE: Duration = Duration::from_secs(2);

impl Step for Restore {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Restore)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        restore(run).map_err(Stop::retryable)?;
        Ok(Event::Done)
    }
}

/// Every rule can be put back, or the run ends here: nothing has been touched yet.
pub(super) fn prepare(run: &mut Run) -> Result<(), Stop> {
    let (old, until) = (run.old()?.clone(), run.deadline);
    let Known { rules, prepared, facts, .. } = &mut run.known;
    let refused = match prepared {
        Some(prepared) => prepared.update(&old, rules, until),
        None => run.host.openflow.prepare_restore(&old, rules, until).map(|Preparation { restore, refused }| {
            *prepared = Some(restore);
            refused
        }),
    };
    let refused = refused.context("preparing the restore of OpenFlow rules")?;
    if let Some(told) = notes::cannot_be_put_back(&refused, &facts.bridges) {
        return Err(anyhow!(told).into());
    }
    let unsure = notes::unsure(rules);
    for told in unsure {
        if !run.report.warnings.contains(&told) {
            run.warn(told);
        }
    }
    run.checkpoint()
}

pub(super) fn restore(run: &mut Run) -> Result<(), Stop> {
    let until = run.deadline;
    let new = run.new_daemon()?.clone();
    wait_for_bridges(run, &new)?;
    super::reload::put_limits_back(run)?;
    let bridges = run.known.facts.bridges.clone();
    for failed in run.host.datapath.adopted(TUNNEL_PATIENCE)? {
        run.warn(format!("tunnel port or policing not kept: {failed}"));
    }
    let Known { rules, addresses, prepared, .. } = &run.known;
    let done = put_back(&run.host, &new, &bridges, rules, addresses, prepared.as_deref(), until)?;
    note(run, done)?;
    give_state(run, &new, &bridges);
    super::devices::put_mtus_back(run)?;
    super::policies::make(run)?;
    super::reload::put_devices_back(run)
}

fn wait_for_bridges(run: &mut Run, new: &Daemon) -> Result<(), Stop> {
    let limit = run.config.restore.flow_limit;
    loop {
        let until = run.deadline.min(run.now() + BRIDGE_PATIENCE);
        match run.host.openflow.wait_ready(new, &run.known.facts.bridges, limit, until) {
            Err(error) if error.timed_out && until < run.deadline => bridges::forget_removed_now(run)?,
            ready => {
                ready.context("the new ovs-vswitchd with every bridge")?;
                return run.checkpoint();
            }
        }
    }
}

/// What became of the learned addresses of each bridge.
type Learned = BTreeMap<String, LearnReport>;

/// Rules and addresses, side by side: the one waits for the daemon's table, the other for its control socket.
fn put_back(
    host: &Host,
    new: &Daemon,
    bridges: &[Bridge],
    rules: &[BridgeRules],
    addresses: &BTreeMap<String, Vec<FdbEntry>>,
    prepared: Option<&dyn PreparedRestore>,
    until: Instant,
) -> anyhow::Result<(Vec<RestoredRules>, Learned)> {
    let openflow = host.openflow.as_ref();
    let rules = &*remembered::rules(rules);
    let (mut restored, mut learned) = (None, None);
    let mut restore = || {
        restored = Some(match prepared {
            Some(prepared) => prepared.commit(rules, until),
            None => openflow.restore(rules, until),
        });
    };
    let enough = until.min(host.clock.now() + ADDRESSES_WHILE_PACKETS_WAIT);
    openflow.both(&mut restore, &mut || learned = Some(teach_addresses(openflow, new, bridges, addresses, enough)));
    let ended_early = || anyhow!("putting rules and addresses back ended early; the log says why");
    Ok((
        restored.ok_or_else(ended_early)?.context("restoring OpenFlow rules")?,
        learned.ok_or_else(ended_early)?.context("restoring learned addresses")?,
    ))
}

/// Hazards 24: NORMAL would flood what it had learned to send to one port.
fn teach_addresses(
    openflow: &dyn OpenFlow,
    new: &Daemon,
    bridges: &[Bridge],
    addresses: &BTreeMap<String, Vec<FdbEntry>>,
    until: Instant,
) -> anyhow::Result<Learned> {
    let known = |bridge: &Bridge| addresses.get(&bridge.name).map(|entries| remembered::addresses(entries));
    let teach = |bridge: &Bridge| {
        let taught = openflow.learn(new, bridge, &known(bridge)?, until);
        Some(taught.map(|taught| (bridge.name.clone(), taught)))
    };
    Ok(bridges.iter().filter_map(teach).collect::<Result<_, _>>()?)
}

/// Addresses that there was no time for while packets waited. A bridge may have learned some of them by itself since, also
/// at another port.
pub(super) fn teach_the_rest(run: &mut Run) -> Result<(), Stop> {
    let lacks = |name: &str| run.known.learned.get(name).is_some_and(|learned| learned.unasked > 0);
    let bridges: Vec<Bridge> = run.known.facts.bridges.iter().filter(|one| lacks(&one.name)).cloned().collect();
    let (new, until) = (run.new_daemon()?.clone(), run.deadline.min(run.now() + ADDRESSES_AFTERWARDS));
    for bridge in bridges {
        let taught = teach_what_lacks(run, &new, &bridge, until);
        match taught {
            Ok(rest) => run.known.learned.entry(bridge.name).or_default().and_then(rest),
            Err(error) => run.warn(format!("bridge {}: learned addresses may be lost: {error}", bridge.name)),
        }
    }
    notes::learned(&mut run.report, run.known.learned.values());
    run.checkpoint()
}

fn teach_what_lacks(run: &Run, new: &Daemon, bridge: &Bridge, until: Instant) -> crate::host::Result<LearnReport> {
    let openflow = &run.host.openflow;
    let there = openflow.fdb(new, std::slice::from_ref(bridge), until)?.concat();
    let is_static = |entry: &FdbEntry| entry.age_s.is_none();
    let there: HashMap<_, _> = there.iter().map(|entry| ((entry.vlan, &*entry.mac), is_static(entry))).collect();
    let wanted =
        run.known.addresses.get(&bridge.name).map(|entries| remembered::addresses(entries)).unwrap_or_default();
    let lacking = wanted.iter().filter(|entry| match there.get(&(entry.vlan, &*entry.mac)) {
        Some(known_as_static) => is_static(entry) && !known_as_static,
        None => true,
    });
    openflow.learn(new, bridge, &lacking.cloned().collect::<Vec<_>>(), until)
}

/// No rule and no packet is given up for it: what is not taken is a difference in the end.
fn give_state(run: &mut Run, new: &Daemon, bridges: &[Bridge]) {
    let (openflow, wanted, until) = (run.host.openflow.as_ref(), &*remembered::state(&run.known.state), run.deadline);
    let given = openflow.give_state(new, bridges, wanted, until);
    let given = given.or_else(|_| openflow.give_state(new, bridges, wanted, until));
    run.known.state_lost =
        given.unwrap_or_else(|error| vec![format!("what bridges knew besides rules may be lost: {error}")]);
}

fn note(run: &mut Run, (restored, learned): (Vec<RestoredRules>, Learned)) -> Result<(), Stop> {
    notes::restored(&mut run.report, &restored);
    run.known.learned.extend(learned);
    let known = std::mem::take(&mut run.known.refused);
    let refused: Vec<_> = restored.iter().flat_map(|done| done.refused.clone()).collect();
    let news: Vec<_> = refused.iter().filter(|refused| !known.contains(refused)).cloned().collect();
    if let Some(told) = notes::not_put_back(&news) {
        run.warn(told);
    }
    let others = known.into_iter().filter(|rule| restored.iter().all(|done| done.bridge != rule.bridge));
    run.known.refused = others.chain(refused).collect();
    run.checkpoint()
}

/// A bridge with a controller loses its rules when flow-restore-wait goes: it takes the adding of the controllers,
/// held back until then, for a change of mind (ofproto_flush_flows).
pub(super) fn restore_bridges_with_controllers(run: &mut Run) -> Result<(), Stop> {
    let has_controllers = |bridge: &&Bridge| !bridge.controllers.is_empty();
    if !run.known.facts.bridges.iter().any(|bridge| has_controllers(&bridge)) {
        return Ok(());
    }
    super::handover::wait_in_step(run)?;
    bridges::forget_removed_now(run)?;
    let with_controllers: Vec<Bridge> = run.known.facts.bridges.iter().filter(has_controllers).cloned().collect();
    let rules: Vec<BridgeRules> = run
        .known
        .rules
        .iter()
        .filter(|rules| with_controllers.iter().any(|bridge| bridge.name == rules.bridge))
        .cloned()
        .collect();
    let (new, until) = (run.new_daemon()?.clone(), run.deadline);
    let Known { addresses, prepared, .. } = &run.known;
    let done = put_back(&run.host, &new, &with_controllers, &rules, addresses, prepared.as_deref(), until)?;
    note(run, done)?;
    wait_for_controllers(run, &new, with_controllers, &rules)
}

/// Packets whose rules ask a controller wait, parked, until it can be asked. Bridges that ask none do not wait for theirs.
fn wait_for_controllers(
    run: &mut Run,
    new: &Daemon,
    mut bridges: Vec<Bridge>,
    rules: &[BridgeRules],
) -> Result<(), Stop> {
    let asks = |rules: &BridgeRules| rules.flows.iter().any(|flow| flow.to_ascii_lowercase().contains("controller"));
    let asking: Vec<&str> = rules.iter().filter(|rules| asks(rules)).map(|rules| rules.bridge.as_str()).collect();
    bridges.retain(|bridge| !bridge.connected.is_empty() && asking.contains(&bridge.name.as_str()));
    if bridges.is_empty() {
        return Ok(());
    }
    let patience = Duration::from_millis(run.config.restore.controllers_wait_ms);
    let until = run.deadline.min(run.now() + patience);
    if let Err(error) = run.host.openflow.wait_for_controllers(new, &bridges, until) {
        run.warn(format!("packets for a controller may be lost: {error}"));
    }
    run.checkpoint()
}

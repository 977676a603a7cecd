//! The bridges of the simulated host.

use std::collections::BTreeSet;
use std::time::Instant;

use super::world::{Odd, Process, World, ODD_RULE};
use super::Sim;
use crate::host::messages::{Stream, HEADER};
use crate::host::{
    Bridge, BridgeRules, BridgeState, Daemon, FdbEntry, HostError, LearnReport, OpenFlow, Preparation, PreparedRestore,
    RefusedRule, RestoredRules, Result, RuleWatch,
};

#[derive(Clone)]
pub(super) struct SimOpenFlow(pub(super) Sim);

fn leader(world: &mut World) -> Result<&mut Process> {
    world.leader().ok_or_else(|| HostError::new("bridge br0", "nobody listens on its management socket"))
}

fn all_there<'a>(world: &World, mut names: impl Iterator<Item = &'a str>) -> Result<()> {
    match names.find(|name| Some(*name) == world.table.removed) {
        Some(name) => Err(HostError::new(format!("bridge {name}"), "failed to connect to socket")),
        None => Ok(()),
    }
}

fn put(world: &mut World, rules: &[BridgeRules]) -> Result<Vec<RestoredRules>> {
    let leader = leader(world)?;
    let taken = |rules: &BridgeRules| {
        // What is given is the bytes that were told: the words say nothing to a daemon.
        let flows = rules.messages.flows.each().map(flow_in).filter(|flow| flow != ODD_RULE).collect();
        told(BridgeRules { flows, ..rules.clone() })
    };
    leader.rules.extend(rules.iter().map(|rules| (rules.bridge.clone(), taken(rules))));
    let done = |rules: &BridgeRules| RestoredRules {
        bridge: rules.bridge.clone(),
        not_atomic: false,
        refused: odd(std::slice::from_ref(rules)),
    };
    Ok(rules.iter().map(done).collect())
}

/// The same, with the messages that add its flows: a header, and the words behind it.
pub(super) fn told(mut rules: BridgeRules) -> BridgeRules {
    let message = |flow: &String| {
        let length = u16::try_from(HEADER + flow.len()).unwrap_or(u16::MAX);
        [&[6, 14][..], &length.to_be_bytes(), &[0; 4], flow.as_bytes()].concat()
    };
    rules.messages.flows = Stream::new(rules.flows.iter().flat_map(message).collect());
    rules
}

fn flow_in(message: &[u8]) -> String {
    String::from_utf8_lossy(message.get(HEADER..).unwrap_or_default()).into_owned()
}

/// What no daemon takes.
fn odd(rules: &[BridgeRules]) -> Vec<RefusedRule> {
    let with_it = rules.iter().filter(|rules| rules.flows.iter().any(|flow| flow == ODD_RULE));
    let refused = |rules: &BridgeRules| RefusedRule {
        bridge: rules.bridge.clone(),
        kind: "flow".into(),
        rule: ODD_RULE.into(),
        reason: "OFPFMFC_TABLE_FULL".into(),
    };
    with_it.map(refused).collect()
}

impl SimOpenFlow {
    fn put(&self, name: &'static str, rules: &[BridgeRules], until: Instant) -> Result<Vec<RestoredRules>> {
        let half = |world: &mut World| {
            let _no_leader = put(world, rules.get(..1).unwrap_or_default());
        };
        self.0.operate_in_parts(name, Some(until), half, |world| put(world, rules))
    }

    /// The daemon that has the rules is asked.
    fn prove(&self, daemon: &Daemon, rules: &[BridgeRules], until: Instant) -> Result<Vec<RefusedRule>> {
        let pid = daemon.id.pid;
        self.0.operate("openflow.prepare_restore", Some(until), |world| match world.processes.contains_key(&pid) {
            true if world.variant.odd == Odd::Told => Ok(odd(rules)),
            true => Ok(Vec::new()),
            false => Err(HostError::new("ovs-vswitchd", "it has ended")),
        })
    }
}

impl OpenFlow for SimOpenFlow {
    fn snapshot(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<BridgeRules>> {
        self.0.operate("openflow.snapshot", Some(until), |world| {
            all_there(world, bridges.iter().map(|bridge| &*bridge.name))?;
            let leader = leader(world)?;
            // Its words are compared with what is told at the bridges' sockets, which are the leader's.
            if leader.id != daemon.id {
                return Err(HostError::new(
                    "bridge br0",
                    "it is another daemon's than the one that was asked about it",
                ));
            }
            let of = |bridge: &Bridge| {
                let empty = || BridgeRules { bridge: bridge.name.clone(), ..BridgeRules::default() };
                leader.rules.get(&bridge.name).cloned().unwrap_or_else(empty)
            };
            let rules = bridges.iter().map(of).collect();
            world.rules_read = true;
            Ok(rules)
        })
    }

    fn count_flows(&self, bridges: &[BridgeRules], until: Instant) -> Result<Vec<u64>> {
        self.0.operate("openflow.count_flows", Some(until), |world| {
            all_there(world, bridges.iter().map(|bridge| &*bridge.bridge))?;
            let leader = leader(world)?;
            let count = |bridge: &BridgeRules| leader.rules.get(&bridge.bridge).map_or(0, |rules| rules.flows.len());
            Ok(bridges.iter().map(|bridge| count(bridge) as u64).collect())
        })
    }

    fn refresh(
        &self,
        daemon: &Daemon,
        bridges: &[Bridge],
        _before: &[BridgeRules],
        _watch: &mut dyn RuleWatch,
        until: Instant,
    ) -> Result<Vec<BridgeRules>> {
        self.snapshot(daemon, bridges, until)
    }

    fn watch(&self, _bridges: &[Bridge], until: Instant) -> Result<Box<dyn RuleWatch>> {
        self.0.operate("openflow.watch", Some(until), |_| Ok(()))?;
        Ok(Box::new(SimRuleWatch))
    }

    fn wait_ready(&self, daemon: &Daemon, _bridges: &[Bridge], _flow_limit: u32, until: Instant) -> Result<()> {
        self.0.operate("openflow.wait_ready", Some(until), |_| Ok(()))?;
        let pid = daemon.id.pid;
        let ready = self.0.wait(until, |world| match world.processes.get(&pid) {
            Some(process) => (process.leads && !process.stopped).then_some(true),
            None => Some(false),
        });
        match ready {
            Some(true) => Ok(()),
            Some(false) => Err(HostError::new("ovs-vswitchd", "it has ended")),
            None => Err(HostError::timeout("ovs-vswitchd", "waiting for its bridges")),
        }
    }

    fn restore(&self, rules: &[BridgeRules], until: Instant) -> Result<Vec<RestoredRules>> {
        self.put("openflow.restore", rules, until)
    }

    fn prepare_restore(&self, daemon: &Daemon, rules: &[BridgeRules], until: Instant) -> Result<Preparation> {
        let refused = self.prove(daemon, rules, until)?;
        Ok(Preparation { restore: Box::new(SimPrepared(self.clone())), refused })
    }

    fn unreadable(&self, _daemon: &Daemon, _bridges: &[Bridge], _until: Instant) -> Result<Vec<RefusedRule>> {
        Ok(Vec::new())
    }

    fn fdb(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<Vec<FdbEntry>>> {
        self.0.operate("openflow.fdb", Some(until), |world| match world.processes.get(&daemon.id.pid) {
            Some(process) => {
                let of = |bridge: &Bridge| process.addresses.get(&bridge.name).cloned().unwrap_or_default();
                Ok(bridges.iter().map(of).collect())
            }
            None => Err(HostError::new("ovs-vswitchd", "it has ended")),
        })
    }

    fn learn(&self, daemon: &Daemon, bridge: &Bridge, entries: &[FdbEntry], until: Instant) -> Result<LearnReport> {
        self.0.operate("openflow.learn", Some(until), |world| match world.processes.get_mut(&daemon.id.pid) {
            Some(process) => {
                if entries.is_empty() {
                    return Ok(LearnReport::default());
                }
                // Of several there is time for the first alone.
                let taken = &entries[..entries.len().min(1)];
                let known = process.addresses.entry(bridge.name.clone()).or_default();
                known.retain(|entry| !taken.contains(entry));
                known.extend_from_slice(taken);
                let (restored, unasked) = (taken.len() as u64, (entries.len() - taken.len()) as u64);
                Ok(LearnReport { restored, unasked, ..LearnReport::default() })
            }
            None => Err(HostError::new("ovs-vswitchd", "it has ended")),
        })
    }

    fn state(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<BridgeState>> {
        self.0.operate("openflow.state", Some(until), |world| {
            all_there(world, bridges.iter().map(|bridge| &*bridge.name))?;
            let process = world.processes.get(&daemon.id.pid);
            let process = process.ok_or_else(|| HostError::new("ovs-vswitchd", "it has ended"))?;
            let items = |bridge: &Bridge| process.state.get(&bridge.name).cloned().unwrap_or_default();
            let state = bridges.iter().map(|bridge| BridgeState { bridge: bridge.name.clone(), items: items(bridge) });
            let state = state.collect();
            world.state_read = true;
            Ok(state)
        })
    }

    fn give_state(
        &self,
        daemon: &Daemon,
        _bridges: &[Bridge],
        wanted: &[BridgeState],
        until: Instant,
    ) -> Result<Vec<String>> {
        self.0.operate("openflow.give_state", Some(until), |world| {
            let removed = world.table.removed;
            let process = world.processes.get_mut(&daemon.id.pid);
            let process = process.ok_or_else(|| HostError::new("ovs-vswitchd", "it has ended"))?;
            let there = wanted.iter().filter(|state| Some(&*state.bridge) != removed && !state.items.is_empty());
            process.state.extend(there.map(|state| (state.bridge.clone(), state.items.clone())));
            Ok(Vec::new())
        })
    }

    fn wait_for_controllers(&self, daemon: &Daemon, _bridges: &[Bridge], until: Instant) -> Result<()> {
        self.0.operate("openflow.wait_for_controllers", Some(until), |world| {
            let lives = world.processes.contains_key(&daemon.id.pid);
            lives.then_some(()).ok_or_else(|| HostError::new("ovs-vswitchd", "it has ended"))
        })
    }

    /// In turn: the same faults give the same run.
    fn both(&self, one: &mut dyn FnMut(), other: &mut (dyn FnMut() + Send)) {
        one();
        other();
    }
}

struct SimPrepared(SimOpenFlow);

impl PreparedRestore for SimPrepared {
    fn update(&mut self, daemon: &Daemon, rules: &[BridgeRules], until: Instant) -> Result<Vec<RefusedRule>> {
        self.0.prove(daemon, rules, until)
    }

    fn commit(&self, rules: &[BridgeRules], until: Instant) -> Result<Vec<RestoredRules>> {
        self.0.put("openflow.commit", rules, until)
    }
}

/// Nobody changes a rule here.
struct SimRuleWatch;

impl RuleWatch for SimRuleWatch {
    fn changed(&mut self, _until: Instant) -> Result<BTreeSet<String>> {
        Ok(BTreeSet::new())
    }

    fn small_tables(&mut self, _bridge: &str) -> Option<BridgeRules> {
        None
    }
}

//! Before against after: what should have stayed and did not.

use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{DatapathSnapshot, Snapshot};
use crate::conntrack::{Meaning, TimeoutPolicy};
use crate::ovs::{Flow, FlowCounts, ZoneLimit, DEFAULT_ZONE};

/// Something that should have stayed as it was. What is only new is no difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "difference", rename_all = "kebab-case")]
pub enum Difference {
    /// A datapath is gone.
    DatapathGone {
        /// Its name.
        datapath: String,
    },
    /// A datapath was made anew: another interface index, so nothing in it is what it was.
    DatapathReplaced {
        /// Its name.
        datapath: String,
        /// Interface index before.
        before: u32,
        /// Interface index after.
        after: u32,
    },
    /// A counter of a datapath fell: it was made anew.
    CounterFell {
        /// The datapath's name.
        datapath: String,
        /// `hit`, `missed` or `lost`.
        counter: String,
        /// Before.
        before: u64,
        /// After.
        after: u64,
    },
    /// A port is gone.
    PortGone {
        /// The datapath's name.
        datapath: String,
        /// The port's name.
        port: String,
        /// Its number.
        port_no: u32,
    },
    /// A port has another number: flows that name the old one go elsewhere.
    PortRenumbered {
        /// The datapath's name.
        datapath: String,
        /// The port's name.
        port: String,
        /// Number before.
        before: u32,
        /// Number after.
        after: u32,
    },
    /// A port of the same name and number is another one now.
    PortChanged {
        /// The datapath's name.
        datapath: String,
        /// The port's name.
        port: String,
        /// What is different: `type`, `options` or `device` (its interface index).
        what: String,
    },
    /// A flow is gone.
    FlowGone {
        /// The datapath's name.
        datapath: String,
        /// [`Flow::name`].
        flow: String,
        /// Packets it had matched.
        packets: u64,
    },
    /// A flow's packet count fell: it was removed and made anew.
    FlowReplaced {
        /// The datapath's name.
        datapath: String,
        /// [`Flow::name`].
        flow: String,
        /// Packets before.
        before: u64,
        /// Packets after.
        after: u64,
    },
    /// A meter is gone.
    MeterGone {
        /// The datapath's name.
        datapath: String,
        /// The meter's id.
        meter: u32,
    },
    /// A meter has another number of bands: it was set anew. (The kernel does not tell rates.)
    MeterChanged {
        /// The datapath's name.
        datapath: String,
        /// The meter's id.
        meter: u32,
    },
    /// The connection limit of a zone is another one.
    ZoneLimit {
        /// The zone; -1 is the default.
        zone: i32,
        /// Before; the default's where the zone had none.
        before: u32,
        /// After; the default's where the zone has none.
        after: u32,
    },
    /// No timeout policy says what this one said.
    TimeoutPolicyGone {
        /// Its name.
        policy: String,
    },
    /// The timeout policy of this name says something else, and no other one says what it said.
    TimeoutPolicyChanged {
        /// Its name.
        policy: String,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Difference::*;
        match self {
            DatapathGone { datapath } => write!(f, "datapath {datapath} is gone"),
            DatapathReplaced { datapath, before, after } => {
                write!(f, "datapath {datapath} was made anew (interface index {before}, now {after})")
            }
            CounterFell { datapath, counter, before, after } => {
                write!(f, "datapath {datapath}: {counter} fell from {before} to {after}")
            }
            PortGone { datapath, port, port_no } => {
                write!(f, "datapath {datapath}: port {port} (number {port_no}) is gone")
            }
            PortRenumbered { datapath, port, before, after } => {
                write!(f, "datapath {datapath}: port {port} had number {before} and has {after}")
            }
            PortChanged { datapath, port, what } => {
                write!(f, "datapath {datapath}: port {port} has other {what}")
            }
            FlowGone { datapath, flow, packets } => {
                write!(f, "datapath {datapath}: flow {flow} ({packets} packets) is gone")
            }
            FlowReplaced { datapath, flow, before, after } => {
                write!(f, "datapath {datapath}: flow {flow} was made anew ({before} packets, now {after})")
            }
            MeterGone { datapath, meter } => write!(f, "datapath {datapath}: meter {meter} is gone"),
            MeterChanged { datapath, meter } => write!(f, "datapath {datapath}: meter {meter} was set anew"),
            ZoneLimit { zone: DEFAULT_ZONE, before, after } => {
                write!(f, "conntrack: the default limit of zones was {before} and is {after}")
            }
            ZoneLimit { zone, before, after } => {
                write!(f, "conntrack: the limit of zone {zone} was {before} and is {after}")
            }
            TimeoutPolicyGone { policy } => write!(f, "conntrack: no timeout policy says what {policy} said"),
            TimeoutPolicyChanged { policy } => {
                write!(f, "conntrack: timeout policy {policy} was changed, and no other says what it said")
            }
        }
    }
}

/// What of `before` is not so in `after`: ports by name and number, flows by UFID with packet counts that never fell,
/// timeout policies by meaning. Flows that were removed on purpose are told too; the caller knows which those are.
pub fn compare(before: &Snapshot, after: &Snapshot) -> Vec<Difference> {
    let mut found = Vec::new();
    for old in &before.datapaths {
        match after.datapath(&old.datapath.name) {
            Some(new) => compare_datapath(old, new, &mut found),
            None => found.push(Difference::DatapathGone { datapath: old.datapath.name.clone() }),
        }
    }
    compare_limits(&before.ct_limits, &after.ct_limits, &mut found);
    compare_policies(before, after, &mut found);
    found
}

/// How many flows of `before` are the same flow in `after`: there, with a packet count that did not fall.
pub fn kept_flows<'a>(before: impl IntoIterator<Item = &'a Flow>, after: &FlowCounts) -> usize {
    before.into_iter().filter(|flow| after.packets(flow).is_some_and(|packets| packets >= flow.packets)).count()
}

/// UFID, or key and mask.
type Identity<'a> = (&'a [u8], &'a [u8]);

fn identity(flow: &Flow) -> Identity<'_> {
    match &flow.ufid {
        Some(ufid) => (ufid, &[]),
        None => (&flow.key, &flow.mask),
    }
}

fn by_identity(flows: &[Flow]) -> HashMap<Identity<'_>, &Flow> {
    flows.iter().map(|flow| (identity(flow), flow)).collect()
}

fn compare_datapath(old: &DatapathSnapshot, new: &DatapathSnapshot, found: &mut Vec<Difference>) {
    let datapath = &old.datapath.name;
    let (before, after) = (old.datapath.ifindex, new.datapath.ifindex);
    if before != after {
        found.push(Difference::DatapathReplaced { datapath: datapath.clone(), before, after });
    }
    let (a, b) = (&old.datapath.stats, &new.datapath.stats);
    for (counter, before, after) in [("hit", a.hit, b.hit), ("missed", a.missed, b.missed), ("lost", a.lost, b.lost)] {
        if after < before {
            found.push(Difference::CounterFell { datapath: datapath.clone(), counter: counter.into(), before, after });
        }
    }
    compare_ports(old, new, found);
    compare_flows(old, new, found);
    compare_meters(old, new, found);
}

fn compare_ports(old: &DatapathSnapshot, new: &DatapathSnapshot, found: &mut Vec<Difference>) {
    let datapath = || old.datapath.name.clone();
    for port in &old.vports {
        let name = || port.name.clone();
        let Some(now) = new.vports.iter().find(|p| p.name == port.name) else {
            found.push(Difference::PortGone { datapath: datapath(), port: name(), port_no: port.port_no });
            continue;
        };
        if now.port_no != port.port_no {
            let (before, after) = (port.port_no, now.port_no);
            found.push(Difference::PortRenumbered { datapath: datapath(), port: name(), before, after });
        }
        let device_changed = matches!((port.ifindex, now.ifindex), (Some(a), Some(b)) if a != b);
        for (what, changed) in
            [("type", now.kind != port.kind), ("options", now.options != port.options), ("device", device_changed)]
        {
            if changed {
                found.push(Difference::PortChanged { datapath: datapath(), port: name(), what: what.into() });
            }
        }
    }
}

fn compare_flows(old: &DatapathSnapshot, new: &DatapathSnapshot, found: &mut Vec<Difference>) {
    let datapath = || old.datapath.name.clone();
    let now = by_identity(&new.flows);
    for flow in &old.flows {
        let name = || flow.name();
        match now.get(&identity(flow)) {
            None => found.push(Difference::FlowGone { datapath: datapath(), flow: name(), packets: flow.packets }),
            Some(new) if new.packets < flow.packets => found.push(Difference::FlowReplaced {
                datapath: datapath(),
                flow: name(),
                before: flow.packets,
                after: new.packets,
            }),
            Some(_) => {}
        }
    }
}

fn compare_meters(old: &DatapathSnapshot, new: &DatapathSnapshot, found: &mut Vec<Difference>) {
    let datapath = || old.datapath.name.clone();
    for meter in &old.meters {
        match new.meters.iter().find(|m| m.id == meter.id) {
            None => found.push(Difference::MeterGone { datapath: datapath(), meter: meter.id }),
            Some(now) if now.bands.len() != meter.bands.len() => {
                found.push(Difference::MeterChanged { datapath: datapath(), meter: meter.id });
            }
            Some(_) => {}
        }
    }
}

/// A zone without a limit of its own has the default's.
fn compare_limits(old: &[ZoneLimit], new: &[ZoneLimit], found: &mut Vec<Difference>) {
    let by_zone = |limits: &[ZoneLimit]| limits.iter().map(|l| (l.zone, l.limit)).collect::<HashMap<i32, u32>>();
    let of =
        |limits: &HashMap<i32, u32>, zone| limits.get(zone).or_else(|| limits.get(&DEFAULT_ZONE)).copied().unwrap_or(0);
    let (all_before, all_after) = (by_zone(old), by_zone(new));
    for ZoneLimit { zone, .. } in old {
        let (before, after) = (of(&all_before, zone), of(&all_after, zone));
        if before != after {
            found.push(Difference::ZoneLimit { zone: *zone, before, after });
        }
    }
}

fn compare_policies(before: &Snapshot, after: &Snapshot, found: &mut Vec<Difference>) {
    let meanings: HashSet<Meaning> = after.timeout_policies.iter().map(TimeoutPolicy::meaning).collect();
    let names: HashSet<&str> = after.timeout_policies.iter().map(|policy| policy.name.as_str()).collect();
    for old in &before.timeout_policies {
        if meanings.contains(&old.meaning()) {
            continue;
        }
        let policy = old.name.clone();
        found.push(if names.contains(old.name.as_str()) {
            Difference::TimeoutPolicyChanged { policy }
        } else {
            Difference::TimeoutPolicyGone { policy }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ovs::{Band, Datapath, DatapathStats, Meter, Vport};

    fn flow(id: u8, packets: u64) -> Flow {
        Flow { ufid: Some([id; 16]), key: vec![id], packets, ..Default::default() }
    }

    fn port(port_no: u32, name: &str) -> Vport {
        Vport { port_no, kind: 1, name: name.into(), ifindex: Some(10 + port_no), ..Default::default() }
    }

    fn policy(name: &str, seconds: u8) -> TimeoutPolicy {
        TimeoutPolicy {
            name: name.into(),
            l3: 2,
            l4: 17,
            data: vec![8, 0, 1, 0, 0, 0, 0, seconds],
            ..Default::default()
        }
    }

    fn limit(zone: i32, limit: u32) -> ZoneLimit {
        ZoneLimit { zone, limit, count: 3 }
    }

    fn snapshot() -> Snapshot {
        let stats = DatapathStats { hit: 100, missed: 20, lost: 1, flows: 3 };
        let meter = |id| Meter { id, bands: vec![Band::default()], ..Default::default() };
        Snapshot {
            datapaths: vec![DatapathSnapshot {
                datapath: Datapath {
                    ifindex: 2,
                    name: "ovs-system".into(),
                    user_features: 9,
                    stats,
                    ..Default::default()
                },
                vports: vec![port(0, "ovs-system"), port(1, "br0"), port(2, "v1")],
                flows: vec![flow(1, 10), flow(2, 0), Flow { ufid: None, ..flow(3, 7) }],
                meters: vec![meter(0), meter(1)],
            }],
            ct_limits: vec![limit(DEFAULT_ZONE, 0), limit(5, 60000), limit(6, 9)],
            timeout_policies: vec![policy("ovs_tp_1_udp4", 78), policy("mine", 5)],
        }
    }

    fn found(change: impl FnOnce(&mut Snapshot)) -> Vec<String> {
        let mut after = snapshot();
        change(&mut after);
        compare(&snapshot(), &after).iter().map(Difference::to_string).collect()
    }

    #[test]
    fn what_only_grew_or_came_new_is_no_difference() {
        let none = found(|s| {
            let d = &mut s.datapaths[0];
            d.datapath.stats.hit += 1;
            d.datapath.user_features = 1;
            d.datapath.per_cpu_pids = Some(vec![1, 2]);
            d.flows.iter_mut().for_each(|f| f.packets += 1);
            d.flows.insert(0, flow(9, 0));
            d.flows[1].actions = vec![8, 0, 1, 0, 1, 0, 0, 0];
            d.vports.push(port(7, "v7"));
            d.vports[2].stats.rx_packets = 5;
            d.meters[0].packets = 77;
            s.ct_limits.reverse();
            s.ct_limits[0].count = 0;
            s.timeout_policies.push(policy("new", 3));
            s.timeout_policies[0].name = "ovs_tp_2_udp4".into();
        });
        assert!(none.is_empty(), "{none:?}");
    }

    #[test]
    fn every_loss_is_told_once() {
        type Case = (&'static str, fn(&mut Snapshot));
        let cases: [Case; 17] = [
            ("datapath ovs-system is gone", |s| s.datapaths.clear()),
            ("datapath ovs-system was made anew (interface index 2, now 30)", |s| s.datapaths[0].datapath.ifindex = 30),
            ("datapath ovs-system: hit fell from 100 to 0", |s| s.datapaths[0].datapath.stats.hit = 0),
            ("datapath ovs-system: port v1 (number 2) is gone", |s| drop(s.datapaths[0].vports.pop())),
            ("datapath ovs-system: port v1 had number 2 and has 3", |s| s.datapaths[0].vports[2].port_no = 3),
            ("datapath ovs-system: port v1 has other type", |s| s.datapaths[0].vports[2].kind = 4),
            ("datapath ovs-system: port v1 has other options", |s| s.datapaths[0].vports[2].options = vec![1]),
            ("datapath ovs-system: port v1 has other device", |s| s.datapaths[0].vports[2].ifindex = Some(99)),
            ("datapath ovs-system: flow 01010101-0101-0101-0101-010101010101 (10 packets) is gone", |s| {
                drop(s.datapaths[0].flows.remove(0));
            }),
            ("datapath ovs-system: flow 03 (7 packets) is gone", |s| drop(s.datapaths[0].flows.pop())),
            ("datapath ovs-system: flow 01010101-0101-0101-0101-010101010101 was made anew (10 packets, now 9)", |s| {
                s.datapaths[0].flows[0].packets = 9;
            }),
            ("datapath ovs-system: meter 1 is gone", |s| drop(s.datapaths[0].meters.pop())),
            ("datapath ovs-system: meter 1 was set anew", |s| s.datapaths[0].meters[1].bands.clear()),
            ("conntrack: the limit of zone 5 was 60000 and is 0", |s| {
                s.ct_limits.remove(1);
            }),
            ("conntrack: the limit of zone 6 was 9 and is 8", |s| s.ct_limits[2].limit = 8),
            ("conntrack: no timeout policy says what mine said", |s| drop(s.timeout_policies.pop())),
            ("conntrack: timeout policy mine was changed, and no other says what it said", |s| {
                s.timeout_policies[1].data[7] = 6;
            }),
        ];
        for (expected, change) in cases {
            assert_eq!(found(change), [expected]);
        }
    }

    #[test]
    fn a_zone_without_a_limit_has_the_defaults() {
        assert_eq!(
            found(|s| s.ct_limits = vec![limit(DEFAULT_ZONE, 9)]),
            [
                "conntrack: the default limit of zones was 0 and is 9",
                "conntrack: the limit of zone 5 was 60000 and is 9"
            ]
        );
    }

    #[test]
    fn kept_flows_are_those_whose_count_never_fell() {
        let before = snapshot().datapaths.remove(0).flows;
        let counts = |flows: &[Flow]| flows.iter().cloned().collect::<FlowCounts>();
        assert_eq!(kept_flows(&before, &counts(&before)), 3);
        let mut after = before.clone();
        after[0].packets = 0;
        after[2].key = vec![9];
        assert_eq!(kept_flows(&before, &counts(&after)), 1);
    }

    #[test]
    fn a_snapshot_is_the_same_after_json() {
        let json = serde_json::to_string(&snapshot()).unwrap();
        assert_eq!(serde_json::from_str::<Snapshot>(&json).unwrap(), snapshot());
    }
}

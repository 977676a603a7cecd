//! Before against after: what should have stayed and did not.

use std::collections::HashMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{DatapathSnapshot, Snapshot};
use crate::ovs::{Flow, ZoneLimit, DEFAULT_ZONE};

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
                write!(f, "datapath {datapath}: port {port} has another {what}")
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
pub fn kept_flows(before: &DatapathSnapshot, after: &DatapathSnapshot) -> usize {
    let new = by_identity(&after.flows);
    before.flows.iter().filter(|f| new.get(&identity(f)).is_some_and(|n| n.packets >= f.packets)).count()
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
    let own = |limits: &[ZoneLimit], zone| limits.iter().find(|l| l.zone == zone).map(|l| l.limit);
    let of = |limits: &[ZoneLimit], zone| own(limits, zone).or_else(|| own(limits, DEFAULT_ZONE)).unwrap_or(0);
    for ZoneLimit { zone, .. } in old {
        let (before, after) = (of(old, *zone), of(new, *zone));
        if before != after {
            found.push(Difference::ZoneLimit { zone: *zone, before, after });
        }
    }
}

fn compare_policies(before: &Snapshot, after: &Snapshot, found: &mut Vec<Difference>) {
    for old in &before.timeout_policies {
        if after.timeout_policies.iter().any(|new| new.same_meaning(old)) {
            continue;
        }
        let policy = old.name.clone();
        found.push(if after.timeout_policies.iter().any(|new| new.name == old.name) {
            Difference::TimeoutPolicyChanged { policy }
        } else {
            Difference::TimeoutPolicyGone { policy }
        });
    }
}

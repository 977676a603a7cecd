//! What a bridge was told or has learned besides rules and unicast addresses, and that its ovs-vswitchd alone knows.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// One thing that a bridge knows at run time. What is as a bridge begins is no item.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum StateItem {
    /// Flags of a port (`ovs-ofctl mod-port`).
    PortFlags {
        /// The port's name.
        port: String,
        /// [`PORT_FLAGS`] that are set.
        flags: u32,
    },
    /// How fragments are handled (`ovs-ofctl set-frags`).
    Fragments {
        /// `OFPC_FRAG_*` (include/openflow/openflow-common.h).
        mode: u16,
    },
    /// Eviction and vacancy events of a table (`ovs-ofctl -O OpenFlow14 mod-table`).
    TableConfig {
        /// Its number.
        table: u8,
        /// `OFPTC14_*` (include/openflow/openflow-1.4.h).
        config: u32,
        /// The thresholds of its vacancy, down and up, percent, where events are on.
        vacancy: Option<(u8, u8)>,
    },
    /// What becomes of packets that no rule of a table matches (`ovs-ofctl -O OpenFlow11 mod-table`).
    TableMiss {
        /// Its number.
        table: u8,
        /// `OFPTC11_TABLE_MISS_*` (include/openflow/openflow-1.1.h).
        config: u32,
    },
    /// A multicast group that was joined at a port.
    MulticastGroup {
        /// OpenFlow port number, or `LOCAL`.
        port: String,
        /// VLAN; 0 is none.
        vlan: u16,
        /// The group.
        group: IpAddr,
        /// By which protocol it was joined, where the daemon tells it (3.3 and later): `IGMPv3`, `MLDv1` and so on.
        protocol: Option<String>,
    },
    /// A port behind which a multicast router is.
    MulticastRouter {
        /// OpenFlow port number, or `LOCAL`.
        port: String,
        /// VLAN; 0 is none.
        vlan: u16,
    },
}

/// Flags that OpenFlow sets on a port, as OpenFlow 1.0 numbers them, and as ovs-ofctl names them. Whether a port is down
/// is none of them: its device knows that.
pub const PORT_FLAGS: [(u32, &str); 6] = [
    (1 << 1, "no-stp"),
    (1 << 2, "no-receive"),
    (1 << 3, "no-receive-stp"),
    (1 << 4, "no-flood"),
    (1 << 5, "no-forward"),
    (1 << 6, "no-packet-in"),
];

/// `OFPTC11_TABLE_MISS_*` by their number.
const MISSES: [&str; 3] = ["controller", "continue", "drop"];
/// `OFPC_FRAG_*` by their number, as ovs-ofctl names them.
const FRAGMENTS: [&str; 4] = ["normal", "drop", "reassemble", "nx-match"];
/// `OFPTC14_EVICTION` and `OFPTC14_VACANCY_EVENTS`.
const EVICTION: u32 = 1 << 2;
const VACANCY: u32 = 1 << 3;

impl StateItem {
    /// The same, as daemons tell it that do not tell by which protocol a group was joined.
    fn without_protocol(&self) -> StateItem {
        match self.clone() {
            StateItem::MulticastGroup { port, vlan, group, .. } => {
                StateItem::MulticastGroup { port, vlan, group, protocol: None }
            }
            other => other,
        }
    }

    /// Was it learned from traffic, so that it comes and goes without anybody's word?
    pub fn is_learned(&self) -> bool {
        matches!(self, StateItem::MulticastGroup { .. } | StateItem::MulticastRouter { .. })
    }
}

impl fmt::Display for StateItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StateItem::PortFlags { port, flags } => {
                let set = PORT_FLAGS.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name);
                write!(f, "port {port} is {}", set.collect::<Vec<_>>().join(", "))
            }
            StateItem::Fragments { mode } => {
                write!(f, "fragments are handled as {}", FRAGMENTS.get(usize::from(*mode)).unwrap_or(&"?"))
            }
            StateItem::TableConfig { table, config, vacancy } => {
                let eviction = (config & EVICTION != 0).then(|| "eviction".to_owned());
                let events = vacancy.map(|(down, up)| format!("vacancy events at {down} and {up} %"));
                let events = events.or_else(|| (config & VACANCY != 0).then(|| "vacancy events".to_owned()));
                let what: Vec<String> = eviction.into_iter().chain(events).collect();
                write!(f, "table {table} has {}", what.join(" and "))
            }
            StateItem::TableMiss { table, config } => {
                let miss = usize::try_from(config & 3).ok().and_then(|miss| MISSES.get(miss)).unwrap_or(&"?");
                write!(f, "a miss in table {table} means {miss}")
            }
            StateItem::MulticastGroup { port, vlan, group, .. } => {
                write!(f, "multicast group {group} of VLAN {vlan} is at port {port}")
            }
            StateItem::MulticastRouter { port, vlan } => {
                write!(f, "a multicast router of VLAN {vlan} is at port {port}")
            }
        }
    }
}

/// What one bridge knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeState {
    /// Its name.
    pub bridge: String,
    /// What it knows.
    pub items: BTreeSet<StateItem>,
}

/// What `before` knew and `after` does not, in words. A bridge that `after` does not have has gone, with all it knew.
pub fn lost(before: &[BridgeState], after: &[BridgeState], counts: impl Fn(&StateItem) -> bool) -> Vec<String> {
    let mut lost = Vec::new();
    for (old, new) in before.iter().filter_map(|old| Some((old, after.iter().find(|new| new.bridge == old.bridge)?))) {
        let there: BTreeSet<StateItem> = new.items.iter().map(StateItem::without_protocol).collect();
        let missing = old.items.iter().filter(|item| counts(item) && !there.contains(&item.without_protocol()));
        lost.extend(missing.map(|item| format!("bridge {}: no longer true: {item}", old.bridge)));
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(bridge: &str, items: &[StateItem]) -> BridgeState {
        BridgeState { bridge: bridge.into(), items: items.iter().cloned().collect() }
    }

    #[test]
    fn what_is_lost_is_told_in_words_of_the_field() {
        let port = StateItem::PortFlags { port: "v1".into(), flags: 1 << 4 | 1 << 6 };
        let table = StateItem::TableConfig { table: 5, config: EVICTION | VACANCY, vacancy: Some((20, 80)) };
        let miss = StateItem::TableMiss { table: 3, config: 2 };
        let group = StateItem::MulticastGroup {
            port: "2".into(),
            vlan: 0,
            group: "239.1.1.1".parse().unwrap(),
            protocol: None,
        };
        let all = [port, StateItem::Fragments { mode: 3 }, table, miss, group];
        let told = lost(&[state("br0", &all), state("gone", &all)], &[state("br0", &[])], |_| true);
        assert_eq!(
            told.iter().map(|line| line.trim_start_matches("bridge br0: no longer true: ")).collect::<Vec<_>>(),
            [
                "port v1 is no-flood, no-packet-in",
                "fragments are handled as nx-match",
                "table 5 has eviction and vacancy events at 20 and 80 %",
                "a miss in table 3 means drop",
                "multicast group 239.1.1.1 of VLAN 0 is at port 2",
            ]
        );
        assert!(lost(&[state("br0", &all)], &[state("br0", &all)], |_| true).is_empty());
        // A daemon of 3.3 or later tells more of the same group.
        let group = StateItem::MulticastGroup {
            port: "2".into(),
            vlan: 0,
            group: "239.1.1.1".parse().unwrap(),
            protocol: Some("IGMPv2".into()),
        };
        let newer = [&all[..4], &[group]].concat();
        assert!(lost(&[state("br0", &all)], &[state("br0", &newer)], |_| true).is_empty());
        assert!(lost(&[state("br0", &newer)], &[state("br0", &all)], |_| true).is_empty());
        let told = lost(&[state("br0", &all)], &[state("br0", &all[..4])], |item| !item.is_learned());
        assert!(told.is_empty(), "{told:?}");
    }

    #[test]
    fn what_a_recovery_reads_is_what_was_written() {
        let item = StateItem::MulticastGroup {
            port: "LOCAL".into(),
            vlan: 7,
            group: "ff05::1".parse().unwrap(),
            protocol: None,
        };
        let state = state("br0", &[item, StateItem::TableConfig { table: 1, config: 4, vacancy: None }]);
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<BridgeState>(&text).unwrap(), state);
    }
}

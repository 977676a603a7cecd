//! Conntrack zones as OVSDB has them, and which timeout policies of the kernel stand for them.

use std::collections::{BTreeMap, BTreeSet};

use dpfreeze::conntrack::{limit, TimeoutPolicy};
use serde::{Deserialize, Serialize};

/// What OVSDB says about a zone of the kernel's datapath (`Datapath`, `CT_Zone`, `CT_Timeout_Policy`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CtZone {
    /// The zone.
    pub zone: u16,
    /// Its timeout policy by key (`tcp_established`, …), seconds; None where it has none.
    pub timeouts: Option<BTreeMap<String, u32>>,
    /// Its limit, where the schema has them (OVS 3.3) and it has one.
    pub limit: Option<u32>,
}

/// What all names of Open vSwitch's own policies begin with (lib/dpif-netlink.c, `NL_TP_NAME_PREFIX`).
const PREFIX: &str = "ovs_tp_";

/// The protocols that Open vSwitch makes a policy for, each for IPv4 and IPv6.
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// The kernel's limit for a key of `CT_Timeout_Policy:timeouts` in protocol `l4`; None where the kernel has none for it
/// (`udp_first`, `icmp_reply`), or it is another protocol's.
fn kernel_limit(key: &str, l4: u8) -> Option<u16> {
    match (key, l4) {
        ("tcp_syn_sent", TCP) => Some(limit::TCP_SYN_SENT),
        ("tcp_syn_recv", TCP) => Some(limit::TCP_SYN_RECV),
        ("tcp_established", TCP) => Some(limit::TCP_ESTABLISHED),
        ("tcp_fin_wait", TCP) => Some(limit::TCP_FIN_WAIT),
        ("tcp_close_wait", TCP) => Some(limit::TCP_CLOSE_WAIT),
        ("tcp_last_ack", TCP) => Some(limit::TCP_LAST_ACK),
        ("tcp_time_wait", TCP) => Some(limit::TCP_TIME_WAIT),
        ("tcp_close", TCP) => Some(limit::TCP_CLOSE),
        ("tcp_syn_sent2", TCP) => Some(limit::TCP_SYN_SENT2),
        ("tcp_retransmit", TCP) => Some(limit::TCP_RETRANS),
        ("tcp_unack", TCP) => Some(limit::TCP_UNACK),
        ("udp_single", UDP) => Some(limit::UDP_UNREPLIED),
        ("udp_multiple", UDP) => Some(limit::UDP_REPLIED),
        ("icmp_first", ICMP | ICMPV6) => Some(limit::ICMP),
        _ => None,
    }
}

/// The number in the name of one of Open vSwitch's own policies: those of one number stand for one row.
pub fn group_of(name: &str) -> Option<u32> {
    let (number, _protocol) = name.strip_prefix(PREFIX)?.split_once('_')?;
    number.parse().ok()
}

/// Whether the kernel's `policy` says what OVSDB's `timeouts` say. What they do not mention is the kernel's default.
pub fn says(policy: &TimeoutPolicy, timeouts: &BTreeMap<String, u32>) -> bool {
    let Ok(found) = policy.timeouts() else { return false };
    timeouts.iter().all(|(key, seconds)| match kernel_limit(key, policy.l4) {
        Some(kind) => found.get(&kind) == Some(seconds),
        None => true,
    })
}

/// The zones that each of Open vSwitch's own policies is, or may be, used in: those in which a flow names one of its
/// number, and those whose row says what all of its number say. Policies of other names are nobody's to delete.
pub fn zones_of_policies(
    policies: &[TimeoutPolicy],
    zones: &[CtZone],
    in_flows: &BTreeMap<String, BTreeSet<u16>>,
) -> BTreeMap<String, BTreeSet<u16>> {
    let mut groups: BTreeMap<u32, Vec<&TimeoutPolicy>> = BTreeMap::new();
    for policy in policies {
        if let Some(number) = group_of(&policy.name) {
            groups.entry(number).or_default().push(policy);
        }
    }
    let mut found = BTreeMap::new();
    for members in groups.values() {
        let mut used: BTreeSet<u16> = members.iter().filter_map(|p| in_flows.get(&p.name)).flatten().copied().collect();
        for zone in zones {
            if zone.timeouts.as_ref().is_some_and(|timeouts| members.iter().all(|policy| says(policy, timeouts))) {
                used.insert(zone.zone);
            }
        }
        for policy in members.iter().filter(|_| !used.is_empty()) {
            found.insert(policy.name.clone(), used.clone());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(name: &str, l4: u8, timeouts: &[(u16, u32)]) -> TimeoutPolicy {
        TimeoutPolicy { name: name.into(), l3: 2, l4, ..Default::default() }.with_timeouts(timeouts.iter().copied())
    }

    fn zone(zone: u16, timeouts: &[(&str, u32)]) -> CtZone {
        let timeouts = timeouts.iter().map(|(key, seconds)| ((*key).to_owned(), *seconds)).collect();
        CtZone { zone, timeouts: Some(timeouts), limit: None }
    }

    #[test]
    fn only_what_a_row_mentions_is_compared_and_only_with_its_protocol() {
        let udp = policy("ovs_tp_1_udp4", UDP, &[(1, 78), (2, 79)]);
        let timeouts = |list| zone(0, list).timeouts.unwrap();
        assert!(says(&udp, &timeouts(&[("udp_single", 78)])));
        assert!(says(&udp, &timeouts(&[("udp_first", 5), ("tcp_established", 9)])));
        assert!(!says(&udp, &timeouts(&[("udp_multiple", 78)])));
        assert!(!says(&TimeoutPolicy { data: vec![1], ..udp }, &timeouts(&[])));
    }

    #[test]
    fn a_zone_has_the_policies_of_a_number_that_all_say_so() {
        let policies = [
            policy("ovs_tp_1_udp4", UDP, &[(1, 78), (2, 79)]),
            policy("ovs_tp_1_tcp4", TCP, &[(3, 500)]),
            policy("ovs_tp_2_udp4", UDP, &[(1, 78), (2, 79)]),
            policy("ovs_tp_2_tcp4", TCP, &[(3, 501)]),
            policy("mine", UDP, &[(1, 78), (2, 79)]),
        ];
        let zones = [zone(5, &[("udp_single", 78), ("tcp_established", 500)]), zone(6, &[("udp_single", 1)])];
        let without = CtZone { zone: 7, ..CtZone::default() };
        let zones = [&zones[..], &[without]].concat();
        let found = zones_of_policies(&policies, &zones, &BTreeMap::new());
        assert_eq!(found.keys().collect::<Vec<_>>(), ["ovs_tp_1_tcp4", "ovs_tp_1_udp4"]);
        assert_eq!(found["ovs_tp_1_udp4"], BTreeSet::from([5]));
    }

    #[test]
    fn a_flow_that_names_one_of_a_number_speaks_for_all_of_it() {
        let policies = [policy("ovs_tp_3_udp4", UDP, &[]), policy("ovs_tp_3_tcp4", TCP, &[(3, 1)])];
        let flows = BTreeMap::from([("ovs_tp_3_udp4".to_owned(), BTreeSet::from([9]))]);
        let found = zones_of_policies(&policies, &[], &flows);
        assert_eq!(found["ovs_tp_3_tcp4"], BTreeSet::from([9]));
    }

    #[test]
    fn numbers_are_read_from_names() {
        assert_eq!(group_of("ovs_tp_12_icmpv6"), Some(12));
        assert_eq!((group_of("ovs_tp_x_udp4"), group_of("ovs_tp_1"), group_of("mine_1_udp4")), (None, None, None));
    }
}

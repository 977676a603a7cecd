//! Conntrack zones as OVSDB has them, and which timeout policies of the kernel stand for them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

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

/// Open vSwitch's own policies by number and by what they say, so that tens of thousands of zones are looked up without
/// comparing each with every policy.
#[derive(Debug)]
pub struct PolicyIndex<'a> {
    groups: BTreeMap<u32, Vec<&'a TimeoutPolicy>>,
    /// Numbers by layer 4 protocol, limit and seconds.
    saying: HashMap<(u8, u16, u32), BTreeSet<u32>>,
}

impl<'a> PolicyIndex<'a> {
    /// Of the kernel's policies; those of other names are left out.
    pub fn of(policies: &'a [TimeoutPolicy]) -> PolicyIndex<'a> {
        let mut index = PolicyIndex { groups: BTreeMap::new(), saying: HashMap::new() };
        for policy in policies {
            let Some(number) = group_of(&policy.name) else { continue };
            index.groups.entry(number).or_default().push(policy);
            for (kind, seconds) in policy.timeouts().unwrap_or_default() {
                index.saying.entry((policy.l4, kind, seconds)).or_default().insert(number);
            }
        }
        index
    }

    /// The numbers whose policies all say what `timeouts` say.
    pub fn saying(&self, timeouts: &BTreeMap<String, u32>) -> Vec<u32> {
        let all = |number: &u32| self.groups.get(number).is_some_and(|group| group.iter().all(|p| says(p, timeouts)));
        let limits = timeouts.iter().flat_map(|(key, seconds)| {
            [TCP, UDP, ICMP].into_iter().filter_map(move |l4| Some((l4, kernel_limit(key, l4)?, *seconds)))
        });
        // Whoever says all of it says the limit that the fewest say; a number may lack that protocol, but none of ours
        // does (six policies are made for each).
        let fewest = limits.map(|limit| self.saying.get(&limit)).min_by_key(|found| found.map_or(0, BTreeSet::len));
        match fewest {
            Some(found) => found.into_iter().flatten().filter(|number| all(number)).copied().collect(),
            None => self.groups.keys().filter(|number| all(number)).copied().collect(),
        }
    }
}

/// The zones that each of Open vSwitch's own policies is, or may be, used in: those in which a flow names one of its
/// number, and those whose row says what all of its number say. Policies of other names are nobody's to delete.
pub fn zones_of_policies(
    policies: &[TimeoutPolicy],
    zones: &[CtZone],
    in_flows: &BTreeMap<String, BTreeSet<u16>>,
) -> BTreeMap<String, BTreeSet<u16>> {
    let index = PolicyIndex::of(policies);
    let mut used: BTreeMap<u32, BTreeSet<u16>> = BTreeMap::new();
    for (policy, zones) in in_flows {
        if let Some(number) = group_of(policy) {
            used.entry(number).or_default().extend(zones);
        }
    }
    let mut rows: BTreeMap<&BTreeMap<String, u32>, Vec<u16>> = BTreeMap::new();
    for zone in zones {
        if let Some(timeouts) = &zone.timeouts {
            rows.entry(timeouts).or_default().push(zone.zone);
        }
    }
    for (timeouts, zones) in rows {
        for number in index.saying(timeouts) {
            used.entry(number).or_default().extend(&zones);
        }
    }
    let named = |(number, zones): (&u32, &BTreeSet<u16>)| {
        let group = index.groups.get(number).into_iter().flatten();
        group.map(|policy| (policy.name.clone(), zones.clone())).collect::<Vec<_>>()
    };
    used.iter().flat_map(named).collect()
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

    /// Each zone with a policy of its own: minutes, if every one were compared with every other.
    #[test]
    fn all_the_zones_there_can_be_are_looked_up() {
        let number = |zone: u16| u32::from(zone) + 1;
        let policies: Vec<_> = (0..=u16::MAX)
            .map(|z| policy(&format!("ovs_tp_{}_udp4", number(z)), UDP, &[(1, number(z)), (2, 9)]))
            .collect();
        let zones: Vec<_> =
            (0..=u16::MAX).map(|z| zone(z, &[("udp_single", number(z)), ("udp_multiple", 9)])).collect();
        let found = zones_of_policies(&policies, &zones, &BTreeMap::new());
        assert_eq!(found.len(), 65_536);
        assert_eq!(found["ovs_tp_65536_udp4"], BTreeSet::from([u16::MAX]));
    }

    /// Nothing in it has a limit of the kernel's: every policy may be meant.
    #[test]
    fn a_row_of_which_the_kernel_knows_nothing_is_everybodys() {
        let policies = [policy("ovs_tp_1_udp4", UDP, &[(1, 5)]), policy("ovs_tp_2_tcp4", TCP, &[(3, 5)])];
        let index = PolicyIndex::of(&policies);
        assert_eq!(index.saying(&zone(5, &[("udp_first", 7)]).timeouts.unwrap()), [1, 2]);
        assert!(index.saying(&zone(5, &[("udp_single", 7)]).timeouts.unwrap()).is_empty());
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

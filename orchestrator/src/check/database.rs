//! What the database alone tells.

use crate::host::{Bridge, DatabaseFacts};
use crate::recovery::MARK;
use crate::report::{Findings, Name};

/// For what no run keeps.
const PLAIN: &str = "none: an ordinary restart, in a maintenance window, is `ovs-graceful restart --plain`";

/// The ways in which a bond gives each flow a link of its own; without a word all flows take one (`bond_mode_from_string`,
/// ofproto/bond.c).
const SPREADS: [&str; 2] = ["balance-slb", "balance-tcp"];

/// Looks at what the database says of this host.
pub(super) fn look(facts: &DatabaseFacts, found: &mut Findings) {
    let mut odd = Findings::default();
    root(facts, &mut odd);
    facts.bridges.iter().for_each(|one| bridge(one, &mut odd));
    let odd = odd.into_inner();
    if odd.is_empty() {
        let cause = format!("{} bridges, nothing in them is outside the promise", facts.bridges.len());
        found.ok(Name::Bridges, "database", cause);
    }
    found.extend(odd);
}

/// The row of table Open_vSwitch.
fn root(facts: &DatabaseFacts, found: &mut Findings) {
    if facts.is_restore_wait_stuck() {
        let (whose, remedy) = match facts.external_ids.get(MARK) {
            Some(run) => (format!("by run {run}"), "`ovs-graceful recover`"),
            None => (
                "and not by us".to_owned(),
                "if nobody is restoring flows: `ovs-vsctl remove open_vswitch . other_config flow-restore-wait`",
            ),
        };
        let cause = format!("it is set, {whose}: ovs-vswitchd would start and forward nothing, even after a reboot");
        found.refuse(Name::RestoreWaitStuck, "other_config:flow-restore-wait", cause, remedy);
    }
    if facts.is_on("hw-offload") {
        found.refuse(
            Name::HwOffload,
            "other_config:hw-offload",
            "flows live in TC filters, which a freeze of the datapath does not reach",
            "`ovs-vsctl remove open_vswitch . other_config hw-offload`, then `ovs-graceful restart --plain`",
        );
    }
    let dpdk = facts.other_config.get("dpdk-init").is_some_and(|v| v == "true" || v == "try");
    if dpdk || facts.dpdk_initialized {
        let remedy = match facts.dpdk_initialized {
            true => PLAIN,
            false => {
                "DPDK has not been started; if it is not wanted: `ovs-vsctl remove open_vswitch . other_config dpdk-init`"
            }
        };
        found.refuse(Name::Dpdk, "other_config:dpdk-init", "DPDK starts only after the old daemon has gone", remedy);
    }
    for name in &facts.ignored_bridges {
        let cause = "ovs-vswitchd has not made it (its log says why), so there is nothing to keep";
        let remedy = format!("`ovs-vsctl del-br '{name}'`, or mend its row in the database");
        found.warn(Name::BridgeIgnored, format!("bridge {name}"), cause, &remedy);
    }
}

fn bridge(bridge: &Bridge, found: &mut Findings) {
    let object = format!("bridge {}", bridge.name);
    if !bridge.is_of_kernel() {
        let cause = format!("its datapath ({}) is not the kernel's and ends with the daemon", bridge.datapath_type);
        found.refuse(Name::NetdevBridge, &object, cause, PLAIN);
    }
    if bridge.stp || bridge.rstp {
        let name = if bridge.stp { "STP" } else { "RSTP" };
        let cause = format!("{name} is on: after a restart its ports listen for about 30 s");
        found.refuse(Name::SpanningTree, &object, cause, PLAIN);
    }
    controllers(bridge, found);
    for port in &bridge.ports {
        let object = format!("{object}, port {}", port.name);
        if port.interfaces.len() > 1 && port.bond_mode.as_deref().is_some_and(|mode| SPREADS.contains(&mode)) {
            let cause = "flows may go by another link after the restart: which link each takes is chosen anew";
            found.warn(Name::Bond, &object, cause, "none: each flow stays whole on its new link");
        }
        if port.lacp.is_some() {
            found.warn(
                Name::Lacp,
                &object,
                "LACP negotiates anew after the restart",
                "none: LACP fallback or slow timers at the partner make it short",
            );
        }
        for interface in &port.interfaces {
            let object = format!("{object}, interface {}", interface.name);
            if interface.lldp {
                let cause =
                    "LLDP forgets its neighbours, which are there again with their next frames, after 30 s or so";
                found.warn(Name::Lldp, &object, cause, "none: pause what acts on it for the time of the run");
            }
            for (on, name, word) in [(interface.bfd, Name::Bfd, "BFD"), (interface.cfm, Name::Cfm, "CFM")] {
                if on {
                    let cause =
                        format!("{word} starts again in state Down, and whatever was forced by hand is forgotten");
                    found.warn(name, &object, cause, "none: pause what acts on it for the time of the run");
                }
            }
        }
    }
    if bridge.sflow {
        found.warn(Name::Sampling, &object, "sFlow takes no sample of the packets of the gap", "none");
    }
    let of_flows = "IPFIX (of single flows, Flow_Sample_Collector_Set)";
    for (on, name) in [(bridge.ipfix, "IPFIX"), (bridge.flow_ipfix, of_flows), (bridge.netflow, "NetFlow")] {
        if on {
            let cause = format!(
                "the {name} records that the old ovs-vswitchd has not exported yet are lost with it (those of an active \
                 timeout), and the packets of the gap are not counted"
            );
            found.warn(Name::Sampling, &object, cause, "none");
        }
    }
}

/// What a bridge has agreed upon with its controllers, or does because none is there.
fn controllers(bridge: &Bridge, found: &mut Findings) {
    let object = format!("bridge {}", bridge.name);
    for target in &bridge.ranked {
        let cause = format!("controller {target} is primary or secondary, and begins as equal after the restart");
        found.warn(Name::Controller, &object, cause, "none: a controller asks for its role when it connects again");
    }
    // Whatever is not `secure` is standalone (`bridge_configure_remotes`, vswitchd/bridge.c).
    if !bridge.controllers.is_empty() && bridge.connected.is_empty() && bridge.fail_mode != "secure" {
        let cause = "it forwards by itself, since none of its controllers answers (fail-open): after the restart it \
                     forwards nothing until they have been waited for, about 15 s";
        let remedy =
            format!("see why none answers; or, if none is wanted: `ovs-vsctl del-controller '{}'`", bridge.name);
        found.warn(Name::Controller, &object, cause, &remedy);
    }
}

#[cfg(test)]
mod tests {
    use crate::host::OVN_MANAGED;
    use std::collections::BTreeMap;

    use super::*;
    use crate::host::{Interface, Port};
    use crate::report::{Finding, Severity};

    fn look(facts: &DatabaseFacts) -> Vec<Finding> {
        let mut found = Findings::default();
        super::look(facts, &mut found);
        found.into_inner()
    }

    fn names(facts: &DatabaseFacts) -> Vec<(Name, Severity)> {
        look(facts).into_iter().map(|f| (f.name, f.severity)).collect()
    }

    #[test]
    fn a_plain_host_is_fine() {
        let facts =
            DatabaseFacts { bridges: vec![Bridge { name: "br0".into(), ..Bridge::default() }], ..Default::default() };
        assert_eq!(names(&facts), [(Name::Bridges, Severity::Ok)]);
    }

    #[test]
    fn what_cannot_be_kept_is_refused() {
        let on = |key: &str| DatabaseFacts {
            other_config: BTreeMap::from([(key.to_owned(), "true".to_owned())]),
            ..DatabaseFacts::default()
        };
        let external_ids = BTreeMap::from([(OVN_MANAGED.to_owned(), "true".to_owned())]);
        let ovn_s = DatabaseFacts { external_ids, ..on("flow-restore-wait") };
        assert_eq!(names(&ovn_s), [(Name::Bridges, Severity::Ok)]);
        for (key, name) in
            [("flow-restore-wait", Name::RestoreWaitStuck), ("hw-offload", Name::HwOffload), ("dpdk-init", Name::Dpdk)]
        {
            assert_eq!(names(&on(key)), [(name, Severity::Refused)]);
        }
        let with = |bridge: Bridge| DatabaseFacts { bridges: vec![bridge], ..DatabaseFacts::default() };
        let netdev = with(Bridge { datapath_type: "netdev".into(), ..Bridge::default() });
        assert_eq!(names(&netdev), [(Name::NetdevBridge, Severity::Refused)]);
        let rstp = with(Bridge { rstp: true, ..Bridge::default() });
        assert_eq!(names(&rstp), [(Name::SpanningTree, Severity::Refused)]);
    }

    #[test]
    fn recover_is_the_remedy_of_our_own_flag_alone() {
        let other_config = BTreeMap::from([("flow-restore-wait".to_owned(), "true".to_owned())]);
        let foreign = DatabaseFacts { other_config, ..DatabaseFacts::default() };
        let remedy = |facts: &DatabaseFacts| look(facts).pop().unwrap().remedy;
        assert!(remedy(&foreign).contains("`ovs-vsctl remove") && !remedy(&foreign).contains("recover"));
        let external_ids = BTreeMap::from([(MARK.to_owned(), "run-7".to_owned())]);
        assert_eq!(remedy(&DatabaseFacts { external_ids, ..foreign }), "`ovs-graceful recover`");
    }

    #[test]
    fn what_is_outside_the_promise_is_named_by_interface() {
        let interface = Interface { name: "e0".into(), bfd: true, cfm: true, lldp: true, ..Interface::default() };
        let port = Port {
            name: "bond0".into(),
            lacp: Some("active".into()),
            bond_mode: Some("balance-tcp".into()),
            interfaces: vec![interface, Interface::default()],
            ..Port::default()
        };
        let bridge = Bridge { name: "br0".into(), ports: vec![port], ipfix: true, ..Bridge::default() };
        let found = look(&DatabaseFacts { bridges: vec![bridge], ..DatabaseFacts::default() });
        let seen: Vec<_> = found.iter().map(|f| (f.name.word(), f.severity, f.object.as_str())).collect();
        assert_eq!(
            seen,
            [
                ("bond", Severity::Warning, "bridge br0, port bond0"),
                ("lacp", Severity::Warning, "bridge br0, port bond0"),
                ("lldp", Severity::Warning, "bridge br0, port bond0, interface e0"),
                ("bfd", Severity::Warning, "bridge br0, port bond0, interface e0"),
                ("cfm", Severity::Warning, "bridge br0, port bond0, interface e0"),
                ("sampling", Severity::Warning, "bridge br0"),
            ]
        );
    }
    #[test]
    fn a_bridge_without_its_controllers_and_one_with_ranked_ones_are_warned_of() {
        let judged = |bridge: Bridge| names(&DatabaseFacts { bridges: vec![bridge], ..DatabaseFacts::default() });
        let one = || vec!["tcp:192.0.2.1".to_owned()];
        let alone = || Bridge { controllers: one(), ..Bridge::default() };
        assert_eq!(judged(alone()), [(Name::Controller, Severity::Warning)]);
        let fine = [(Name::Bridges, Severity::Ok)];
        assert_eq!(judged(Bridge { fail_mode: "secure".into(), ..alone() }), fine);
        assert_eq!(judged(Bridge { connected: one(), ..alone() }), fine);
        let ranked = Bridge { connected: one(), ranked: one(), ..alone() };
        assert_eq!(judged(ranked), [(Name::Controller, Severity::Warning)]);
    }

    #[test]
    fn a_bond_that_does_not_spread_and_one_link_are_fine() {
        let two = || vec![Interface::default(), Interface::default()];
        let mode = |mode: &str| Port { bond_mode: Some(mode.into()), interfaces: two(), ..Port::default() };
        let one = Port { interfaces: vec![Interface::default()], ..mode("balance-slb") };
        for port in [mode("active-backup"), Port { interfaces: two(), ..Port::default() }, one] {
            let bridge = Bridge { ports: vec![port], ..Bridge::default() };
            let facts = DatabaseFacts { bridges: vec![bridge], ..DatabaseFacts::default() };
            assert_eq!(names(&facts), [(Name::Bridges, Severity::Ok)]);
        }
    }

    #[test]
    fn ipfix_of_single_flows_is_warned_of() {
        let bridge = Bridge { flow_ipfix: true, ..Bridge::default() };
        let facts = DatabaseFacts { bridges: vec![bridge], ..DatabaseFacts::default() };
        assert_eq!(names(&facts), [(Name::Sampling, Severity::Warning)]);
    }
}

//! What most scenarios' networks have in common.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::command::{shell, wait_until};
use crate::guest::probe::{tcp, Place, Ports, Spec};
use crate::guest::Evidence;
use crate::outcome::Outcome;

/// The constant flow: a packet every 5 ms.
pub const CONSTANT_US: u64 = 5000;
/// The stream of new flows: a packet every 10 ms.
pub const EACH_NEW_US: u64 = 10_000;
/// Port of the constant flow.
pub const CONSTANT_PORT: u16 = 9000;
/// Port of the stream of new flows; rules make it need an upcall a packet.
pub const EACH_NEW_PORT: u16 = 9001;
/// Port of the TCP connection.
pub const TCP_PORT: u16 = 9002;

/// Actions that make every source port a megaflow of its own: what is copied must be matched exactly.
pub const UNWILDCARD: &str = "move:NXM_OF_UDP_SRC[]->NXM_NX_REG0[0..15]";

/// As [`UNWILDCARD`] where Open vSwitch knows no ports: what probes of other protocols vary from packet to packet.
pub const UNWILDCARD_TTL: &str = "move:NXM_NX_IP_TTL[]->NXM_NX_REG0[0..7],move:NXM_OF_IP_TOS[]->NXM_NX_REG0[8..15]";

/// A VM that stood still for seconds sends what is due at once: veth's per-CPU queue (1,000 packets) would drop it
/// before Open vSwitch sees it.
pub fn patient_veth() -> Result<()> {
    shell("sysctl -qw net.core.netdev_max_backlog=100000").map(drop)
}

/// Makes namespace `ns`, whose device `e-ns` is the other end of port `v-ns` of `bridge`.
///
/// In a slow VM a question for a neighbour may wait, parked, for longer than its asker does: the asker then drops what it has
/// to send (3 questions, one a second), and no switch ever sees it. So it asks for a minute.
///
/// IPv6 is off, so that a silent port hears nothing but what the switch sends it. Ports that nobody asks for by number come
/// from the end, so that a probe which takes each in turn finds them free.
pub fn attach(ns: &str, bridge: &str, address: &str, port_options: &str) -> Result<()> {
    let address = if address.is_empty() { String::new() } else { format!("ip -n {ns} addr add {address} dev e-{ns}") };
    shell(&format!(
        "ip netns add {ns}
         ip netns exec {ns} sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 \
            net.ipv4.ip_local_port_range='45000 65535'
         sysctl -qw net.ipv6.conf.default.disable_ipv6=1
         ip link add v-{ns} type veth peer name e-{ns}
         ip link set e-{ns} netns {ns}
         ip link set v-{ns} up
         ip -n {ns} link set lo up
         ip -n {ns} link set e-{ns} up
         ip netns exec {ns} sysctl -qw net.ipv4.neigh.e-{ns}.ucast_solicit=60 net.ipv4.neigh.e-{ns}.mcast_solicit=60 \
            net.ipv4.neigh.e-{ns}.unres_qlen_bytes=16777216
         {address}
         ovs-vsctl add-port {bridge} v-{ns} {port_options}"
    ))?;
    Ok(())
}

/// Namespace `ns` is told that `address` is at the device of namespace `at`.
pub fn neighbour(ns: &str, address: &str, at: &str) -> Result<()> {
    let mac = mac(at)?;
    shell(&format!("ip -n {ns} neigh replace {address} lladdr {mac} dev e-{ns} nud permanent")).map(drop)
}

/// The address of the device of namespace `ns`.
pub fn mac(ns: &str) -> Result<String> {
    shell(&format!("ip netns exec {ns} cat /sys/class/net/e-{ns}/address")).map(|mac| mac.trim().to_owned())
}

/// Some of the parked packets had to be undone by `what` (`parked.undone` of the report): else nothing was shown.
pub fn undone(evidence: &Evidence, outcome: &mut Outcome, what: &str) {
    if !evidence.job.action.judged_as_ours() {
        return;
    }
    let parked = evidence.report.as_ref().map(|report| report["parked"].clone()).unwrap_or_default();
    let count = parked["undone"][what].as_u64().unwrap_or(0);
    outcome.check(format!("parked packets were undone: {what}"), count > 0, json!(parked));
}

/// Replaces a bridge's rules.
pub fn rules(bridge: &str, flows: &str) -> Result<()> {
    let file = format!("/run/lab-rules-{bridge}");
    std::fs::write(&file, flows)?;
    shell(&format!("ovs-ofctl del-flows {bridge} && ovs-ofctl --bundle add-flows {bridge} {file}")).map(drop)
}

/// Waits until `address` answers a ping from `ns`.
pub fn ping(ns: &str, address: &str) -> Result<()> {
    let answers = || shell(&format!("ip netns exec {ns} ping -q -c 1 -W 1 {address}")).is_ok();
    wait_until(&format!("{address} answers {ns}"), Duration::from_secs(20), Duration::from_millis(100), answers)
}

/// The usual probes: `e`, `n` and `tcp`, from one place to another.
pub fn usual_probes(from: Place, to: Place, address: impl Into<IpAddr>) -> Vec<(String, Spec)> {
    probes(from, to, address.into(), 1, 1)
}

/// The usual probes with half as many new flows: where each of them needs several upcalls.
pub fn fewer_new_flows(from: Place, to: Place, address: impl Into<IpAddr>) -> Vec<(String, Spec)> {
    probes(from, to, address.into(), 1, 2)
}

/// The usual probes at half the rate: for pipelines of so many tables that an emulated CPU forwards no more.
pub fn gentle_probes(from: Place, to: Place, address: impl Into<IpAddr>) -> Vec<(String, Spec)> {
    probes(from, to, address.into(), 2, 2)
}

fn probes(from: Place, to: Place, address: IpAddr, slower: u64, slower_new: u64) -> Vec<(String, Spec)> {
    let udp = |port, interval_us, ports| Spec::udp(&from, &to, (address, port), interval_us, ports);
    vec![
        ("e".to_owned(), udp(CONSTANT_PORT, CONSTANT_US * slower, Ports::Constant)),
        ("n".to_owned(), udp(EACH_NEW_PORT, EACH_NEW_US * slower_new, Ports::EachNew)),
        (
            "tcp".to_owned(),
            Spec::Tcp { from: from.clone(), to: to.clone(), address, port: TCP_PORT, pace: tcp::MODEST },
        ),
    ]
}

/// The silent port in namespace `ns`.
pub fn silent(ns: &str) -> (String, Spec) {
    ("silent".to_owned(), Spec::Silent { place: Place::named(ns), device: format!("e-{ns}") })
}

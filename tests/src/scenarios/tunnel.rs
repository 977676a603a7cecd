//! Tunnels: VXLAN and Geneve whose other end is a plain kernel device in a namespace, and VXLAN between two bridges.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::network::{self, UNWILDCARD};
use super::Traffic;
use crate::command::shell;
use crate::guest::probe::{Place, Spec};

/// A tunnel from br0 to a kernel tunnel device in a namespace.
pub struct ToNamespace {
    /// Name of the scenario.
    pub name: &'static str,
    /// One line for the list.
    pub about: &'static str,
    /// OVS interface type.
    pub kind: &'static str,
    /// `ip link add` words for the other end.
    pub device: &'static str,
}

/// VXLAN to a namespace.
pub const VXLAN: ToNamespace = ToNamespace {
    name: "vxlan_ns",
    about: "a VXLAN tunnel whose other end is a kernel device in a namespace",
    kind: "vxlan",
    device: "type vxlan id 77 remote 172.16.0.1 dstport 4789",
};

/// Geneve to a namespace.
pub const GENEVE: ToNamespace = ToNamespace {
    name: "geneve_ns",
    about: "a Geneve tunnel whose other end is a kernel device in a namespace",
    kind: "geneve",
    device: "type geneve id 77 remote 172.16.0.1",
};

fn rules() -> String {
    format!("priority=10,actions=NORMAL\npriority=100,udp,tp_dst=9001,actions={UNWILDCARD},NORMAL\n")
}

impl Traffic for ToNamespace {
    fn name(&self) -> &'static str {
        self.name
    }

    fn by_hand(&self) -> bool {
        self.name == GENEVE.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn set_up(&self) -> Result<()> {
        shell(&format!(
            "ip netns add far
             ip netns exec far sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1
             ip link add u0 type veth peer name u1 netns far
             ip addr add 172.16.0.1/24 dev u0
             ip link set u0 up
             ip -n far addr add 172.16.0.2/24 dev u1
             ip -n far link set u1 up
             ip -n far link set lo up
             ip -n far link add tun77 {}
             ip -n far addr add 10.9.0.2/24 dev tun77
             ip -n far link set tun77 mtu 1400 up
             ovs-vsctl add-br br0 -- add-port br0 t0 \
               -- set interface t0 type={} options:remote_ip=172.16.0.2 options:key=77",
            self.device, self.kind
        ))?;
        network::attach("ns1", "br0", "10.9.0.1/24", "")?;
        network::attach("ns3", "br0", "", "")?;
        shell("ip -n ns1 link set e-ns1 mtu 1400")?;
        network::rules("br0", &rules())?;
        network::ping("ns1", "10.9.0.2")
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let mut probes = network::usual_probes(Place::named("ns1"), Place::named("far"), Ipv4Addr::new(10, 9, 0, 2));
        probes.push(network::silent("ns3"));
        probes
    }
}

/// VXLAN between two bridges of the same host.
pub struct VxlanBridges;

impl Traffic for VxlanBridges {
    fn name(&self) -> &'static str {
        "vxlan_bridges"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn about(&self) -> &'static str {
        "a VXLAN tunnel between two bridges of the host"
    }

    fn set_up(&self) -> Result<()> {
        shell(
            "ip addr add 172.16.0.1/32 dev lo
             ip addr add 172.16.0.2/32 dev lo
             ovs-vsctl add-br br0 -- add-br br1 \
               -- add-port br0 t0 -- set interface t0 type=vxlan options:key=77 \
                    options:local_ip=172.16.0.1 options:remote_ip=172.16.0.2 \
               -- add-port br1 t1 -- set interface t1 type=vxlan options:key=77 \
                    options:local_ip=172.16.0.2 options:remote_ip=172.16.0.1",
        )?;
        network::attach("ns1", "br0", "10.9.0.1/24", "")?;
        network::attach("ns2", "br1", "10.9.0.2/24", "")?;
        network::attach("ns3", "br1", "", "")?;
        shell("ip -n ns1 link set e-ns1 mtu 1400 && ip -n ns2 link set e-ns2 mtu 1400")?;
        network::rules("br0", &rules())?;
        network::rules("br1", "priority=10,actions=NORMAL\n")?;
        network::ping("ns1", "10.9.0.2")
    }

    fn bridges(&self) -> Vec<String> {
        vec!["br0".to_owned(), "br1".to_owned()]
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let mut probes = network::usual_probes(Place::named("ns1"), Place::named("ns2"), Ipv4Addr::new(10, 9, 0, 2));
        probes.push(network::silent("ns3"));
        probes
    }
}

//! VLAN 10 over two bridges that a patch port joins.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::network::{self, UNWILDCARD};
use super::Traffic;
use crate::command::shell;
use crate::guest::probe::{Place, Spec};

/// See the module.
pub struct VlanPatch;

impl Traffic for VlanPatch {
    fn name(&self) -> &'static str {
        "vlan_patch"
    }

    fn about(&self) -> &'static str {
        "a VLAN over two bridges with a patch port"
    }

    fn set_up(&self) -> Result<()> {
        shell(
            "ovs-vsctl add-br br0 -- add-br br1 \
               -- add-port br0 to1 -- set interface to1 type=patch options:peer=to0 \
               -- add-port br1 to0 -- set interface to0 type=patch options:peer=to1",
        )?;
        network::attach("ns1", "br0", "10.9.0.1/24", "tag=10")?;
        network::attach("ns2", "br1", "10.9.0.2/24", "tag=10")?;
        network::attach("ns3", "br1", "", "tag=10")?;
        let rules = format!("priority=10,actions=NORMAL\npriority=100,udp,tp_dst=9001,actions={UNWILDCARD},NORMAL\n");
        network::rules("br0", &rules)?;
        network::rules("br1", "cookie=0x77,priority=10,actions=NORMAL\n")?;
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

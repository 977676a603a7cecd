//! A bond of two links without LACP to a bridge that knows nothing of it, as to a plain switch.

use anyhow::Result;

use super::network::{self, UNWILDCARD};
use super::{plain, Traffic};
use crate::command::shell;
use crate::guest::probe::Spec;

/// See the module.
pub struct Bond;

impl Traffic for Bond {
    fn name(&self) -> &'static str {
        "bond"
    }

    fn about(&self) -> &'static str {
        "a bond of two links, no LACP, to a bridge that takes them for two ports"
    }

    fn set_up(&self) -> Result<()> {
        shell(
            "sysctl -qw net.ipv6.conf.default.disable_ipv6=1
             for link in a b; do
               ip link add ${link}0 type veth peer name ${link}1
               ip link set ${link}0 up
               ip link set ${link}1 up
             done
             ovs-vsctl add-br br0 -- add-br br1 \
               -- add-bond br0 bond0 a0 b0 bond_mode=balance-slb -- add-port br1 a1 -- add-port br1 b1",
        )?;
        network::attach("ns1", "br0", "10.9.0.1/24", "")?;
        network::attach("ns2", "br1", "10.9.0.2/24", "")?;
        network::attach("ns3", "br1", "", "")?;
        let rules = format!("priority=10,actions=NORMAL\npriority=100,udp,tp_dst=9001,actions={UNWILDCARD},NORMAL\n");
        network::rules("br0", &rules)?;
        network::ping("ns1", "10.9.0.2")
    }

    fn bridges(&self) -> Vec<String> {
        vec!["br0".to_owned(), "br1".to_owned()]
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        plain::gentle_probes()
    }
}

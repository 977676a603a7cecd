//! Jumbo frames with two tags, 802.1ad outside and 802.1Q inside: both are popped before connection tracking and pushed
//! again behind it.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::nat::UNWILDCARD_REPLY;
use super::network::{self, undone, UNWILDCARD};
use super::{Expect, Traffic};
use crate::command::shell;
use crate::guest::probe::{Place, Spec};
use crate::guest::Evidence;
use crate::outcome::Outcome;

/// See the module.
pub struct Qinq;

const MTU: u16 = 9000;
/// In one frame.
const LENGTH: usize = 8000;
/// Pushes what was popped.
const TAGS: &str = "push_vlan:0x8100,mod_vlan_vid:10,push_vlan:0x88a8,mod_vlan_vid:100";

/// Namespace `ns` behind two tags, at `address`.
fn attach(ns: &str, address: &str) -> Result<()> {
    network::attach(ns, "br0", "", "")?;
    shell(&format!(
        "ip link set v-{ns} mtu {MTU}
         ip -n {ns} link set e-{ns} mtu {MTU}
         ip -n {ns} link add link e-{ns} name outer type vlan proto 802.1ad id 100
         ip -n {ns} link set outer up
         ip -n {ns} link add link outer name inner type vlan id 10
         ip -n {ns} link set inner up
         ip -n {ns} addr add {address} dev inner"
    ))
    .map(drop)
}

impl Traffic for Qinq {
    fn name(&self) -> &'static str {
        "qinq"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn about(&self) -> &'static str {
        "jumbo frames with an 802.1ad and an 802.1Q tag, both popped before ct"
    }

    fn set_up(&self) -> Result<()> {
        // Both tags are looked at (by default the outer one only).
        shell("ovs-vsctl set open_vswitch . other_config:vlan-limit=2 -- add-br br0")?;
        attach("ns1", "10.9.0.1/24")?;
        attach("ns2", "10.9.0.2/24")?;
        network::attach("ns3", "br0", "", "")?;
        network::rules(
            "br0",
            &format!(
                "table=0,priority=50,arp,in_port=v-ns1,actions=output:v-ns2\n\
                 table=0,priority=50,arp,in_port=v-ns2,actions=output:v-ns1\n\
                 table=0,priority=50,ip,dl_vlan=100,actions=pop_vlan,resubmit(,10)\n\
                 table=10,priority=50,ip,dl_vlan=10,actions=pop_vlan,ct(table=1,zone=5)\n\
                 table=1,priority=100,udp,in_port=v-ns1,tp_dst=9001,\
                 actions={UNWILDCARD},ct(commit,zone=5),{TAGS},output:v-ns2\n\
                 table=1,priority=100,udp,in_port=v-ns2,tp_src=9001,actions={UNWILDCARD_REPLY},{TAGS},output:v-ns1\n\
                 table=1,priority=50,ip,in_port=v-ns1,actions=ct(commit,zone=5),{TAGS},output:v-ns2\n\
                 table=1,priority=50,ip,in_port=v-ns2,actions={TAGS},output:v-ns1\n"
            ),
        )?;
        network::ping("ns1", "10.9.0.2")
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let address = Ipv4Addr::new(10, 9, 0, 2);
        let mut probes = network::gentle_probes(Place::named("ns1"), Place::named("ns2"), address);
        for (_, probe) in &mut probes {
            if let Spec::Udp { length, .. } = probe {
                *length = LENGTH;
            }
        }
        probes.push(network::silent("ns3"));
        probes
    }

    fn expect(&self) -> Expect {
        Expect { keeps_flows: false, ..Expect::default() }
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        undone(evidence, outcome, "headers");
    }
}

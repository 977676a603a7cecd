//! Headers are changed before connection tracking, in both directions: a tag popped and the next hop set on the way
//! out, TOS and TTL changed on the way back, a tag pushed behind it.

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
pub struct SetField;

/// Address of the router that the bridge plays.
const ROUTER: &str = "02:00:00:00:99:99";

impl Traffic for SetField {
    fn name(&self) -> &'static str {
        "set_field"
    }

    fn about(&self) -> &'static str {
        "pop-vlan, set-field and dec_ttl before ct, misses behind it"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn set_up(&self) -> Result<()> {
        shell("ovs-vsctl add-br br0")?;
        network::attach("ns1", "br0", "", "")?;
        network::attach("ns2", "br0", "10.9.2.2/24", "")?;
        network::attach("ns3", "br0", "", "")?;
        // Two hosts in two networks, the one behind a tag; the bridge routes.
        shell(&format!(
            "ip -n ns1 link add link e-ns1 name vlan10 type vlan id 10
             ip -n ns1 link set vlan10 up
             ip -n ns1 addr add 10.9.1.1/24 dev vlan10
             ip -n ns1 neigh replace 10.9.1.254 lladdr {ROUTER} dev vlan10 nud permanent
             ip -n ns1 route add 10.9.2.0/24 via 10.9.1.254
             ip -n ns2 neigh replace 10.9.2.254 lladdr {ROUTER} dev e-ns2 nud permanent
             ip -n ns2 route add 10.9.1.0/24 via 10.9.2.254"
        ))?;
        let [one, two] = [network::mac("ns1")?, network::mac("ns2")?];
        let out = "output:v-ns2";
        let back = "mod_vlan_vid:10,output:v-ns1";
        network::rules(
            "br0",
            &format!(
                "table=0,priority=50,ip,in_port=v-ns1,dl_vlan=10,actions=strip_vlan,\
                 mod_dl_src:{ROUTER},mod_dl_dst:{two},dec_ttl,ct(table=1,zone=5)\n\
                 table=0,priority=50,ip,in_port=v-ns2,actions=mod_dl_src:{ROUTER},mod_dl_dst:{one},\
                 dec_ttl,mod_nw_tos:32,ct(table=1,zone=5)\n\
                 table=1,priority=100,udp,in_port=v-ns1,tp_dst=9001,actions={UNWILDCARD},ct(commit,zone=5),{out}\n\
                 table=1,priority=50,ip,in_port=v-ns1,actions=ct(commit,zone=5),{out}\n\
                 table=1,priority=100,udp,in_port=v-ns2,tp_src=9001,actions={UNWILDCARD_REPLY},{back}\n\
                 table=1,priority=50,ip,in_port=v-ns2,actions={back}\n"
            ),
        )?;
        network::ping("ns1", "10.9.2.2")
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let address = Ipv4Addr::new(10, 9, 2, 2);
        let mut probes = network::gentle_probes(Place::named("ns1"), Place::named("ns2"), address);
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

//! Two zones in a row with a translation in each, and a table behind both where packets miss.

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
pub struct TwoZones;

/// What clients call; zone 5 makes it ns2.
const SERVICE: &str = "10.9.0.200";
/// Where the calls seem to come from, by zone 6.
const OUTSIDE: &str = "10.9.0.100";

impl Traffic for TwoZones {
    fn name(&self) -> &'static str {
        "two_zones"
    }

    fn about(&self) -> &'static str {
        "DNAT in one zone, then SNAT in another, misses behind both"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn set_up(&self) -> Result<()> {
        shell("ovs-vsctl add-br br0")?;
        network::attach("ns1", "br0", "10.9.0.1/24", "")?;
        network::attach("ns2", "br0", "10.9.0.2/24", "")?;
        network::attach("ns3", "br0", "", "")?;
        network::neighbour("ns1", SERVICE, "ns2")?;
        network::neighbour("ns2", OUTSIDE, "ns1")?;
        network::rules(
            "br0",
            &format!(
                "table=0,priority=1,actions=NORMAL\n\
                 table=0,priority=50,ip,in_port=v-ns1,actions=ct(table=1,zone=5,nat)\n\
                 table=0,priority=50,ip,in_port=v-ns2,actions=ct(table=11,zone=6,nat)\n\
                 table=1,priority=50,ip,ct_state=+trk+new,actions=ct(commit,zone=5,nat(dst=10.9.0.2),table=2)\n\
                 table=1,priority=40,ip,ct_state=+trk,actions=resubmit(,2)\n\
                 table=2,priority=50,ip,actions=ct(table=3,zone=6,nat)\n\
                 table=3,priority=50,ip,ct_state=+trk+new,actions=ct(commit,zone=6,nat(src={OUTSIDE}),table=4)\n\
                 table=3,priority=40,ip,ct_state=+trk,actions=resubmit(,4)\n\
                 table=4,priority=100,udp,tp_dst=9001,actions={UNWILDCARD},NORMAL\n\
                 table=4,priority=1,actions=NORMAL\n\
                 table=11,priority=50,ip,actions=ct(table=12,zone=5,nat)\n\
                 table=12,priority=100,udp,tp_src=9001,actions={UNWILDCARD_REPLY},NORMAL\n\
                 table=12,priority=1,actions=NORMAL\n"
            ),
        )?;
        network::ping("ns1", SERVICE)
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let address = Ipv4Addr::new(10, 9, 0, 200);
        let mut probes = network::gentle_probes(Place::named("ns1"), Place::named("ns2"), address);
        probes.push(network::silent("ns3"));
        probes
    }

    fn expect(&self) -> Expect {
        Expect { keeps_flows: false, ..Expect::default() }
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        undone(evidence, outcome, "nat");
    }
}

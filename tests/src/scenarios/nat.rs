//! Address translation by ct(nat), and a table behind it where packets miss: their translation must be undone before
//! they can start again.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::network::{self, undone, UNWILDCARD};
use super::{Expect, Traffic};
use crate::command::shell;
use crate::guest::probe::{Place, Ports, Spec};
use crate::guest::Evidence;
use crate::outcome::Outcome;

/// See the module.
pub struct Nat;

/// What clients call; ns2 answers it.
const SERVICE: &str = "10.9.0.200";
/// Where calls to ns2's own address seem to come from, with a port of a range.
const OUTSIDE: &str = "10.9.0.100";
/// Calls to ns2's own address, each from a new port.
const MASQUERADED_PORT: u16 = 9004;

/// The reply's way to a megaflow of its own.
pub const UNWILDCARD_REPLY: &str = "move:NXM_OF_UDP_DST[]->NXM_NX_REG0[0..15]";

impl Traffic for Nat {
    fn name(&self) -> &'static str {
        "nat"
    }

    fn about(&self) -> &'static str {
        "SNAT with a port range and DNAT by ct(nat), misses behind the translation"
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
                 table=0,priority=50,ip,actions=ct(table=1,zone=5,nat)\n\
                 table=1,priority=100,ip,ct_state=+trk+new,nw_dst={SERVICE},\
                 actions=ct(commit,zone=5,nat(dst=10.9.0.2),table=2)\n\
                 table=1,priority=90,ip,ct_state=+trk+new,nw_src=10.9.0.1,udp,\
                 actions=ct(commit,zone=5,nat(src={OUTSIDE}:20000-60000),table=2)\n\
                 table=1,priority=50,ip,ct_state=+trk+new,actions=ct(commit,zone=5),resubmit(,2)\n\
                 table=1,priority=50,ip,ct_state=+trk+est,actions=resubmit(,2)\n\
                 table=2,priority=100,udp,tp_dst=9001,actions={UNWILDCARD},NORMAL\n\
                 table=2,priority=100,udp,tp_dst={MASQUERADED_PORT},actions={UNWILDCARD},NORMAL\n\
                 table=2,priority=100,udp,tp_src=9001,actions={UNWILDCARD_REPLY},NORMAL\n\
                 table=2,priority=100,udp,tp_src={MASQUERADED_PORT},actions={UNWILDCARD_REPLY},NORMAL\n\
                 table=2,priority=1,actions=NORMAL\n"
            ),
        )?;
        network::ping("ns1", "10.9.0.2")
    }

    fn bridges(&self) -> Vec<String> {
        vec!["br0".to_owned()]
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let (from, to) = (Place::named("ns1"), Place::named("ns2"));
        let mut probes = network::usual_probes(from.clone(), to.clone(), Ipv4Addr::new(10, 9, 0, 200));
        let (address, ports) = (Ipv4Addr::new(10, 9, 0, 2), Ports::EachNew);
        let interval_us = 2 * network::EACH_NEW_US;
        let masqueraded = Spec::Udp { from, to, address, port: MASQUERADED_PORT, interval_us, ports };
        probes.push(("masqueraded".to_owned(), masqueraded));
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

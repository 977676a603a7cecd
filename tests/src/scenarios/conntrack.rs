//! Connection tracking: ct, commit, two tables, zone 5 with a timeout policy and a limit.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::network::{self, UNWILDCARD};
use super::{Expect, Traffic};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::probe::{Place, Spec};
use crate::guest::Evidence;
use crate::outcome::Outcome;

/// See the module.
pub struct Conntrack;

/// `udp_multiple` of the policy: nothing else in the system has this value (the kernel's own is 120 s).
const UDP_MULTIPLE: u64 = 79;

/// Seconds left to the constant flow's connection, as `conntrack -L` prints them.
fn timer() -> Option<u64> {
    let text = shell_lenient("conntrack -L -p udp --dport 9000 2>/dev/null");
    text.lines().find(|l| l.contains("dport=9000"))?.split_whitespace().nth(2)?.parse().ok()
}

impl Traffic for Conntrack {
    fn name(&self) -> &'static str {
        "conntrack"
    }

    fn about(&self) -> &'static str {
        "ct and commit in zone 5 with a timeout policy and a limit, two tables"
    }

    fn set_up(&self) -> Result<()> {
        shell("ovs-vsctl add-br br0")?;
        // The policy first: connections made before it would not have it.
        shell(
            "ovs-vsctl -- --id=@d create Datapath datapath_version=0 -- set open_vswitch . datapaths:system=@d
             ovs-vsctl add-zone-tp system zone=5 udp_first=77 udp_single=78 udp_multiple=79",
        )?;
        // Open vSwitch 3.3 and later make the objects of a new zone when its policy changes (docs/conntrack.md).
        shell(
            "policy=$(ovs-vsctl --bare --columns=_uuid find CT_Timeout_Policy)
             ovs-vsctl set CT_Timeout_Policy $policy timeouts:icmp_reply=30
             ovs-vsctl remove CT_Timeout_Policy $policy timeouts icmp_reply",
        )?;
        network::attach("ns1", "br0", "10.9.0.1/24", "")?;
        network::attach("ns2", "br0", "10.9.0.2/24", "")?;
        network::attach("ns3", "br0", "", "")?;
        network::rules(
            "br0",
            &format!(
                "table=0,priority=1,actions=NORMAL\n\
                 table=0,priority=50,ip,actions=ct(table=1,zone=5)\n\
                 table=1,priority=100,udp,tp_dst=9001,ct_state=+trk+new,actions={UNWILDCARD},ct(commit,zone=5),NORMAL\n\
                 table=1,priority=50,ip,ct_state=+trk+new,actions=ct(commit,zone=5),NORMAL\n\
                 table=1,priority=50,ip,ct_state=+trk+est,actions=NORMAL\n"
            ),
        )?;
        shell("ovs-dpctl ct-set-limits default=0 zone=5,limit=60000")?;
        network::ping("ns1", "10.9.0.2")
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let mut probes = network::fewer_new_flows(Place::named("ns1"), Place::named("ns2"), Ipv4Addr::new(10, 9, 0, 2));
        probes.push(network::silent("ns3"));
        probes
    }

    fn expect(&self) -> Expect {
        Expect { refused: &["upcall_bind", "ct_timeout_del"], keeps_flows: false, ..Expect::default() }
    }

    fn before_action(&self, outcome: &mut Outcome) -> Result<()> {
        let governed = || timer().is_some_and(|t| (UDP_MULTIPLE - 9..=UDP_MULTIPLE).contains(&t));
        wait_until(
            "the policy governs the constant flow",
            Duration::from_secs(5),
            Duration::from_millis(200),
            governed,
        )
        .with_context(|| {
            shell_lenient("conntrack -L -p udp 2>&1 | head; ovs-vsctl list-zone-tp system; lsmod | grep ^nf")
        })?;
        outcome.note("timer before", timer());
        Ok(())
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        // The traffic has ended a few seconds ago: the timer has run down by as much.
        let after = timer();
        let governed = after.is_some_and(|t| (UDP_MULTIPLE - 30..=UDP_MULTIPLE).contains(&t));
        // Stock does not promise it (hazards 30, 31).
        match evidence.job.action.judged_as_ours() {
            true => outcome.check("the live connection is still under its policy", governed, after),
            false => outcome.note("timer after", after),
        }
    }
}

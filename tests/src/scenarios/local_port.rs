//! The LOCAL port br0 with an IP address: the host's own traffic, a TCP session of a minute over it.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::network::{self, UNWILDCARD};
use super::{Expect, Traffic};
use crate::command::shell;
use crate::guest::probe::{Place, Spec};
use crate::guest::Evidence;
use crate::outcome::{Outcome, ProbeOutcome};

/// See the module.
pub struct LocalPort;

/// How long the TCP session must have lived, s.
const SESSION_S: f64 = 60.0;

impl Traffic for LocalPort {
    fn name(&self) -> &'static str {
        "local_port"
    }

    fn about(&self) -> &'static str {
        "the host's own traffic through br0, a TCP session of a minute over it"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn after_s(&self) -> Option<f64> {
        Some(52.0)
    }

    fn set_up(&self) -> Result<()> {
        shell(
            "sysctl -qw net.ipv6.conf.default.disable_ipv6=1
             ovs-vsctl add-br br0
             ip addr add 10.9.0.1/24 dev br0
             ip link set br0 up",
        )?;
        network::attach("ns2", "br0", "10.9.0.2/24", "")?;
        network::attach("ns3", "br0", "", "")?;
        let rules = format!("priority=10,actions=NORMAL\npriority=100,udp,tp_dst=9001,actions={UNWILDCARD},NORMAL\n");
        network::rules("br0", &rules)?;
        network::ping("ns2", "10.9.0.1")
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let mut probes = network::usual_probes(Place::Host, Place::named("ns2"), Ipv4Addr::new(10, 9, 0, 2));
        probes.push(network::silent("ns3"));
        probes
    }

    fn expect(&self) -> Expect {
        Expect { no_timeouts: true, ..Expect::default() }
    }

    fn judge(&self, _evidence: &Evidence, outcome: &mut Outcome) {
        let seconds = match outcome.probes.get("tcp") {
            Some(ProbeOutcome::Tcp(tcp)) => tcp.seconds,
            _ => 0.0,
        };
        outcome.check("the TCP session lived a minute", seconds >= SESSION_S, seconds);
    }
}

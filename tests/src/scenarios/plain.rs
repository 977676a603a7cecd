//! Two namespaces on one bridge, explicit rules and NORMAL.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::network::{self, UNWILDCARD};
use super::Traffic;
use crate::command::shell;
use crate::guest::probe::{Place, Spec};
use crate::guest::{self, Live};

/// See the module.
pub struct Plain;

/// Makes the network; other scenarios vary it.
pub fn set_up() -> Result<()> {
    shell("ovs-vsctl add-br br0")?;
    network::attach("ns1", "br0", "10.9.0.1/24", "")?;
    network::attach("ns2", "br0", "10.9.0.2/24", "")?;
    network::attach("ns3", "br0", "", "")?;
    rules()?;
    network::ping("ns1", "10.9.0.2")
}

/// Its rules, which a restart that nobody cares for loses.
pub fn rules() -> Result<()> {
    network::rules(
        "br0",
        &format!(
            "cookie=0xabc,priority=10,actions=NORMAL\n\
             cookie=0xdef,priority=100,udp,tp_dst=9001,actions={UNWILDCARD},NORMAL\n"
        ),
    )
}

/// Its bridges.
pub fn bridges() -> Vec<String> {
    vec!["br0".to_owned()]
}

/// Its traffic.
pub fn probes() -> Vec<(String, Spec)> {
    let mut probes = network::usual_probes(Place::named("ns1"), Place::named("ns2"), Ipv4Addr::new(10, 9, 0, 2));
    probes.push(network::silent("ns3"));
    probes
}

/// The same at half the rate.
pub fn gentle_probes() -> Vec<(String, Spec)> {
    let mut probes = network::gentle_probes(Place::named("ns1"), Place::named("ns2"), Ipv4Addr::new(10, 9, 0, 2));
    probes.push(network::silent("ns3"));
    probes
}

/// Starts [`probes`].
pub fn start_probes() -> Result<Live> {
    guest::start_all(probes())
}

impl Traffic for Plain {
    fn name(&self) -> &'static str {
        "plain"
    }

    fn about(&self) -> &'static str {
        "two namespaces on a bridge, explicit rules and NORMAL"
    }
}

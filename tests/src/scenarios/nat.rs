//! Address translation by ct(nat), and a table behind it where packets miss: their translation must be undone before
//! they can start again.

use std::net::IpAddr;

use anyhow::Result;

use super::network::{self, undone, UNWILDCARD, UNWILDCARD_TTL};
use super::{Expect, Traffic};
use crate::command::shell;
use crate::guest::probe::{Place, Ports, Protocol, Spec};
use crate::guest::Evidence;
use crate::outcome::Outcome;

/// See the module.
pub struct Nat {
    name: &'static str,
    about: &'static str,
    /// `ip` or `ipv6`, as ovs-ofctl(8) calls it.
    ip: &'static str,
    /// What tells source and destination address in a rule.
    fields: [&'static str; 2],
    client: &'static str,
    server: &'static str,
    /// What clients call; the server answers it.
    service: &'static str,
    /// Where calls to the server's own address seem to come from, with a port of a range.
    outside: &'static str,
    /// Length of the prefix.
    prefix: u8,
}

/// IPv4.
pub static NAT: Nat = Nat {
    name: "nat",
    about: "SNAT with a port range and DNAT by ct(nat), misses behind the translation",
    ip: "ip",
    fields: ["nw_src", "nw_dst"],
    client: "10.9.0.1",
    server: "10.9.0.2",
    service: "10.9.0.200",
    outside: "10.9.0.100",
    prefix: 24,
};

/// IPv6.
pub static NAT6: Nat = Nat {
    name: "nat6",
    about: "nat with IPv6",
    ip: "ipv6",
    fields: ["ipv6_src", "ipv6_dst"],
    client: "fd00::1",
    server: "fd00::2",
    service: "fd00::200",
    outside: "fd00::100",
    prefix: 64,
};

/// Names of the pings to the service, and of those to the server's own address; on the wire they have identifiers only.
const PING_PORT: u16 = 9006;
const MASQUERADED_PING_PORT: u16 = 9007;
/// Calls to the server's own address, each from a new port.
const MASQUERADED_PORT: u16 = 9004;
/// TCP connections to the service, each new.
const CONNECTIONS_PORT: u16 = 9005;
/// Time between two of them, µs.
const CONNECTIONS_US: u64 = 50_000;

/// As [`UNWILDCARD`] for replies.
pub const UNWILDCARD_REPLY: &str = "move:NXM_OF_UDP_DST[]->NXM_NX_REG0[0..15]";

impl Nat {
    fn attach(&self, ns: &str, address: &str) -> Result<()> {
        network::attach(ns, "br0", "", "")?;
        // No address is looked for by multicast: all neighbours are told.
        shell(&format!(
            "ip netns exec {ns} sysctl -qw net.ipv6.conf.e-{ns}.disable_ipv6=0
             ip -n {ns} addr add {address}/{} dev e-{ns} {}",
            self.prefix,
            if address.contains(':') { "nodad" } else { "" }
        ))
        .map(drop)
    }

    fn rules(&self) -> String {
        let Nat { ip, service, server, outside, client, .. } = self;
        let [source, destination] = self.fields;
        let (udp, tcp, icmp) = if *ip == "ip" { ("udp", "tcp", "icmp") } else { ("udp6", "tcp6", "icmp6") };
        let (ask, answer) = if *ip == "ip" { (8, 0) } else { (128, 129) };
        // An IPv6 address with ports stands in brackets.
        let range = if *ip == "ip" { format!("{outside}:20000-60000") } else { format!("[{outside}]:20000-60000") };
        format!(
            "table=0,priority=1,actions=NORMAL\n\
             table=0,priority=70,{icmp},icmp_type={ask},actions=ct(table=1,zone=5,nat)\n\
             table=0,priority=70,{icmp},icmp_type={answer},actions=ct(table=1,zone=5,nat)\n\
             table=0,priority=60,icmp6,actions=NORMAL\n\
             table=0,priority=50,{ip},actions=ct(table=1,zone=5,nat)\n\
             table=1,priority=100,{ip},ct_state=+trk+new,{destination}={service},\
             actions=ct(commit,zone=5,nat(dst={server}),table=2)\n\
             table=1,priority=90,{udp},ct_state=+trk+new,{source}={client},\
             actions=ct(commit,zone=5,nat(src={range}),table=2)\n\
             table=1,priority=90,{icmp},ct_state=+trk+new,{source}={client},\
             actions=ct(commit,zone=5,nat(src={range}),table=2)\n\
             table=1,priority=50,{ip},ct_state=+trk+new,actions=ct(commit,zone=5),resubmit(,2)\n\
             table=1,priority=50,{ip},ct_state=+trk+est,actions=resubmit(,2)\n\
             table=2,priority=100,{udp},tp_dst=9001,actions={UNWILDCARD},NORMAL\n\
             table=2,priority=100,{udp},tp_dst={MASQUERADED_PORT},actions={UNWILDCARD},NORMAL\n\
             table=2,priority=100,{tcp},tp_dst={CONNECTIONS_PORT},\
             actions=move:NXM_OF_TCP_SRC[]->NXM_NX_REG0[0..15],NORMAL\n\
             table=2,priority=100,{tcp},tp_src={CONNECTIONS_PORT},\
             actions=move:NXM_OF_TCP_DST[]->NXM_NX_REG0[0..15],NORMAL\n\
             table=2,priority=100,{icmp},icmp_type={ask},actions={UNWILDCARD_TTL},NORMAL\n\
             table=2,priority=100,{udp},tp_src=9001,actions={UNWILDCARD_REPLY},NORMAL\n\
             table=2,priority=100,{udp},tp_src={MASQUERADED_PORT},actions={UNWILDCARD_REPLY},NORMAL\n\
             table=2,priority=1,actions=NORMAL\n"
        )
    }
}

impl Traffic for Nat {
    fn name(&self) -> &'static str {
        self.name
    }

    fn by_hand(&self) -> bool {
        self.name == NAT6.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn set_up(&self) -> Result<()> {
        shell("ovs-vsctl add-br br0")?;
        self.attach("ns1", self.client)?;
        self.attach("ns2", self.server)?;
        network::attach("ns3", "br0", "", "")?;
        for address in [self.service, self.server] {
            network::neighbour("ns1", address, "ns2")?;
        }
        for address in [self.outside, self.client] {
            network::neighbour("ns2", address, "ns1")?;
        }
        network::rules("br0", &self.rules())?;
        network::ping("ns1", self.server)
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let (from, to) = (Place::named("ns1"), Place::named("ns2"));
        let address = |text: &str| text.parse::<IpAddr>().ok();
        let (Some(service), Some(server)) = (address(self.service), address(self.server)) else { return Vec::new() };
        let mut probes = network::gentle_probes(from.clone(), to.clone(), service);
        // Beside the ports of the other new flows.
        let ports = Ports::Cycle { first: 41_000, count: 15_000 };
        let interval_us = 3 * network::EACH_NEW_US;
        let connections = Spec::Connections {
            from: from.clone(),
            to: to.clone(),
            address: service,
            port: CONNECTIONS_PORT,
            interval_us: CONNECTIONS_US,
        };
        probes.push(("connections".to_owned(), connections));
        let masqueraded = Spec::udp(&from, &to, (server, MASQUERADED_PORT), interval_us, ports);
        probes.push(("masqueraded".to_owned(), masqueraded));
        for (name, address, port) in [("ping", service, PING_PORT), ("ping_masqueraded", server, MASQUERADED_PING_PORT)]
        {
            let ports = Ports::Cycle { first: (port - PING_PORT) * 20_000 + 1, count: 20_000 };
            let mut ping = Spec::udp(&from, &to, (address, port), interval_us, ports);
            if let Spec::Udp { protocol, .. } = &mut ping {
                *protocol = Protocol::Echo;
            }
            probes.push((name.to_owned(), ping));
        }
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

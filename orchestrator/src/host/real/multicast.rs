//! Multicast snooping: read with `mdb/show`, taught with `ofproto/trace-packet-out`, as learned addresses are
//! ([`super::fdb`]).
//!
//! A group is taught by a made-up report at the port that joined it, a router by a query (RFC 2236, RFC 3376, RFC 2710,
//! RFC 3810). Open vSwitch looks at type, group and checksum (`update_mcast_snooping_table`,
//! ofproto/ofproto-dpif-xlate.c). The frame's source address is a multicast one, so that nothing is learned of it
//! (`mac_learning_may_learn`, lib/mac-learning.c).

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use serde_json::json;

use super::fdb::{frame_vlan, port_of, BATCH};
use super::unixctl;
use crate::host::{Bridge, Daemon, Result, StateItem};

/// A source address that no switch learns.
const NOBODY: [u8; 6] = [0x01, 0x00, 0x5e, 0x00, 0x00, 0x01];
/// The group of all hosts.
const ALL_HOSTS: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);
/// Whose query it is: Open vSwitch wants an address (RFC 4541, 2.1.1), and keeps none. TEST-NET-1 (RFC 5737).
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ICMPV6: u8 = 58;
const IGMP: u8 = 2;

/// The rows of `mdb/show`: port, VLAN, protocol from 3.3 on, group or `querier`, age.
pub(super) fn parse(text: Option<&str>) -> Vec<StateItem> {
    text.unwrap_or_default().lines().filter_map(row).collect()
}

fn row(line: &str) -> Option<StateItem> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (port, vlan, protocol, group) = match words[..] {
        [port, vlan, group, _age] => (port, vlan, None, group),
        [port, vlan, protocol, group, _age] => (port, vlan, Some(protocol), group),
        _ => return None,
    };
    let (port, vlan) = (port.to_owned(), vlan.parse().ok()?);
    match group {
        "querier" => Some(StateItem::MulticastRouter { port, vlan }),
        group => {
            let protocol = protocol.map(str::to_owned);
            Some(StateItem::MulticastGroup { port, vlan, group: group.parse().ok()?, protocol })
        }
    }
}

/// Teaches the daemon the groups and routers among `items`: groups first, as none is joined at a router's port
/// (`mcast_snooping_add_group`, lib/mcast-snooping.c).
pub(super) fn teach(daemon: &Daemon, bridge: &Bridge, items: &BTreeSet<StateItem>, until: Instant) -> Result<()> {
    let frames: Vec<(String, String)> = items.iter().filter_map(|item| frame(bridge, item)).collect();
    if frames.is_empty() {
        return Ok(());
    }
    let mut connection = unixctl::connect(daemon)?;
    for batch in frames.chunks(BATCH) {
        let calls: Vec<_> = batch
            .iter()
            .map(|(port, frame)| {
                ("ofproto/trace-packet-out", json!([bridge.name, format!("in_port={port}"), frame, "NORMAL"]))
            })
            .collect();
        for error in connection.call_many(&calls, until)?.into_iter().filter_map(|answer| answer.err()) {
            tracing::warn!("bridge {}: a multicast group is not taught: {error}", bridge.name);
        }
    }
    Ok(())
}

/// The port, and the frame that teaches the item, as hexadecimal digits. Items are in order: groups before routers.
fn frame(bridge: &Bridge, item: &StateItem) -> Option<(String, String)> {
    let (port, vlan, packet) = match item {
        StateItem::MulticastGroup { port, vlan, group, protocol } => {
            (port, *vlan, report(*group, protocol.as_deref().unwrap_or_default()))
        }
        StateItem::MulticastRouter { port, vlan } => (port, *vlan, query()),
        _ => return None,
    };
    let (destination, ether_type, payload) = packet;
    let tag = match frame_vlan(vlan, port_of(bridge, port)) {
        None => Vec::new(),
        Some(vlan) => [&[0x81, 0x00][..], &vlan.to_be_bytes()].concat(),
    };
    let bytes = [&destination[..], &NOBODY, &tag, &ether_type.to_be_bytes(), &payload].concat();
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _a_string_takes_it = write!(text, "{byte:02x}");
    }
    Some((port.clone(), text))
}

type Packet = ([u8; 6], u16, Vec<u8>);

fn report(group: IpAddr, protocol: &str) -> Packet {
    match group {
        IpAddr::V4(group) => {
            let octets = group.octets();
            let body = match protocol {
                "IGMPv1" => [&[0x12, 0, 0, 0][..], &octets].concat(),
                // One record: exclude no source.
                "IGMPv3" => [&[0x22, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0][..], &octets].concat(),
                _ => [&[0x16, 0, 0, 0][..], &octets].concat(),
            };
            ([1, 0, 0x5e, octets[1] & 0x7f, octets[2], octets[3]], 0x0800, igmp(Ipv4Addr::UNSPECIFIED, group, body))
        }
        IpAddr::V6(group) => {
            let octets = group.octets();
            let body = match protocol {
                "MLDv2" => [&[143, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0][..], &octets].concat(),
                _ => [&[131, 0, 0, 0, 0, 0, 0, 0][..], &octets].concat(),
            };
            ([0x33, 0x33, octets[12], octets[13], octets[14], octets[15]], 0x86dd, mld(group, body))
        }
    }
}

fn query() -> Packet {
    let body = [&[0x11, 100, 0, 0][..], &[0; 4]].concat();
    ([1, 0, 0x5e, 0, 0, 1], 0x0800, igmp(ROUTER, ALL_HOSTS, body))
}

/// An IPv4 packet (RFC 791) with router alert (RFC 2113) and this message of IGMP.
fn igmp(from: Ipv4Addr, to: Ipv4Addr, mut body: Vec<u8>) -> Vec<u8> {
    let sum = checksum(&body, &[]);
    put(&mut body, sum, 2);
    let length = (24 + body.len()) as u16;
    let mut header = [&[0x46, 0xc0][..], &length.to_be_bytes(), &[0, 0, 0, 0, 1, IGMP, 0, 0]].concat();
    header.extend_from_slice(&from.octets());
    header.extend_from_slice(&to.octets());
    header.extend_from_slice(&[0x94, 4, 0, 0]);
    let sum = checksum(&header, &[]);
    put(&mut header, sum, 10);
    [header, body].concat()
}

/// An IPv6 packet (RFC 8200) with this message of MLD.
fn mld(to: Ipv6Addr, mut body: Vec<u8>) -> Vec<u8> {
    let from = Ipv6Addr::UNSPECIFIED;
    let length = (body.len() as u32).to_be_bytes();
    let pseudo = [&from.octets()[..], &to.octets(), &length, &[0, 0, 0, ICMPV6]].concat();
    let sum = checksum(&pseudo, &body);
    put(&mut body, sum, 2);
    let header = [&[0x60, 0, 0, 0, length[2], length[3], ICMPV6, 1][..], &from.octets(), &to.octets()].concat();
    [header, body].concat()
}

fn put(bytes: &mut [u8], sum: u16, at: usize) {
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&sum.to_be_bytes());
    }
}

/// The Internet checksum (RFC 1071) of both, each of an even length.
fn checksum(first: &[u8], second: &[u8]) -> u16 {
    let (first, second) = (first.as_chunks().0, second.as_chunks().0);
    let sum: u32 = first.iter().chain(second).map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_old_and_new_versions() {
        let old = " port  VLAN  GROUP                Age\n    2     0  239.1.1.1           4\n    3     5  querier             11\n";
        let new = " port  VLAN  protocol  GROUP                Age\nLOCAL     0  MLDv2     ff05::1:3         200\n    3     5  UNKNOWN   querier             11\n";
        let group = |port: &str, group: &str, protocol: Option<&str>| StateItem::MulticastGroup {
            port: port.into(),
            vlan: 0,
            group: group.parse().unwrap(),
            protocol: protocol.map(str::to_owned),
        };
        let router = StateItem::MulticastRouter { port: "3".into(), vlan: 5 };
        assert_eq!(parse(Some(old)), [group("2", "239.1.1.1", None), router.clone()]);
        assert_eq!(parse(Some(new)), [group("LOCAL", "ff05::1:3", Some("MLDv2")), router]);
        assert!(parse(None).is_empty());
    }

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap()).collect()
    }

    fn taught(group: &str, protocol: Option<&str>) -> Vec<u8> {
        let item = StateItem::MulticastGroup {
            port: "2".into(),
            vlan: 7,
            group: group.parse().unwrap(),
            protocol: protocol.map(str::to_owned),
        };
        let (port, frame) = frame(&Bridge::default(), &item).unwrap();
        assert_eq!(port, "2");
        bytes(&frame)
    }

    #[test]
    fn a_report_is_one_that_a_switch_takes() {
        for (protocol, kind, length) in [(None, 0x16, 8), (Some("IGMPv1"), 0x12, 8), (Some("IGMPv3"), 0x22, 16)] {
            let frame = taught("239.129.2.3", protocol);
            assert_eq!(frame[..6], [1, 0, 0x5e, 1, 2, 3]);
            assert_eq!(frame[6] & 1, 1, "nobody learns the source");
            assert_eq!(frame[12..18], [0x81, 0, 0, 7, 8, 0]);
            let packet = &frame[18..];
            assert_eq!((packet[0], packet.len()), (0x46, 24 + length));
            assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet.len());
            assert_eq!((checksum(&packet[..24], &[]), checksum(&packet[24..], &[])), (0, 0));
            assert_eq!((packet[9], packet[24]), (IGMP, kind));
            assert_eq!(packet[packet.len() - 4..], [239, 129, 2, 3]);
        }
    }

    #[test]
    fn groups_of_ipv6_are_reported_by_mld() {
        for (protocol, kind, length) in [(Some("MLDv1"), 131, 24), (Some("MLDv2"), 143, 28)] {
            let frame = taught("ff05::1:3", protocol);
            assert_eq!(frame[..6], [0x33, 0x33, 0, 1, 0, 3]);
            let packet = &frame[18..];
            assert_eq!((packet.len(), packet[40]), (40 + length, kind));
            let pseudo = [&packet[8..40], &(length as u32).to_be_bytes(), &[0, 0, 0, ICMPV6]].concat();
            assert_eq!(checksum(&pseudo, &packet[40..]), 0);
        }
    }

    #[test]
    fn groups_are_taught_before_the_routers_that_would_keep_them_out() {
        let router = StateItem::MulticastRouter { port: "2".into(), vlan: 0 };
        let group = StateItem::MulticastGroup {
            port: "2".into(),
            vlan: 0,
            group: "239.1.1.1".parse().unwrap(),
            protocol: None,
        };
        let items: BTreeSet<StateItem> = [router.clone(), group.clone()].into();
        assert_eq!(items.into_iter().collect::<Vec<_>>(), [group, router.clone()]);
        let (_, frame) = frame(&Bridge::default(), &router).unwrap();
        let packet = &bytes(&frame)[14..];
        assert_eq!(packet[24], 0x11);
        assert_ne!(packet[12..16], [0, 0, 0, 0]);
    }
}

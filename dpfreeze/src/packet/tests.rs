use std::net::IpAddr;

use etherparse::checksum::Sum16BitWords;
use etherparse::{
    Icmpv4Type, Icmpv6Type, IpNumber, PacketBuilder, PacketHeaders, SlicedPacket, TransportSlice, UdpHeader,
};
use proptest::prelude::*;

use super::*;
use crate::conntrack::tuple::tests::tuple;
use crate::conntrack::{Transport, Tuple};

/// A whole packet with right checksums, made by another library, that has the tuple `tuple`.
pub(crate) fn packet_of(tuple: &Tuple, payload: &[u8]) -> Packet {
    let mut bytes = Vec::new();
    let eth = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = match (tuple.src, tuple.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => eth.ipv4(src.octets(), dst.octets(), 64),
        (IpAddr::V6(src), IpAddr::V6(dst)) => eth.ipv6(src.octets(), dst.octets(), 64),
        _ => unreachable!(),
    };
    match tuple.transport {
        Transport::Ports { src, dst } if tuple.protocol == 6 => {
            ip.tcp(src, dst, 77, 500).write(&mut bytes, payload).unwrap();
        }
        Transport::Ports { src, dst } if tuple.protocol == 17 => ip.udp(src, dst).write(&mut bytes, payload).unwrap(),
        Transport::Ports { src, dst } => {
            let head = [src.to_be_bytes(), dst.to_be_bytes()].concat();
            let mut sctp = [&head[..], &[0, 0, 0, 9, 0, 0, 0, 0], payload].concat();
            let sum = checksum::sctp(&sctp).to_le_bytes();
            sctp[8..12].copy_from_slice(&sum);
            ip.write(&mut bytes, IpNumber::SCTP, &sctp).unwrap();
        }
        Transport::Query { id, kind, code } => {
            let rest = [(id >> 8) as u8, id as u8, 0, 1];
            match tuple.protocol {
                1 => ip.icmpv4_raw(kind, code, rest).write(&mut bytes, payload).unwrap(),
                _ => ip.icmpv6_raw(kind, code, rest).write(&mut bytes, payload).unwrap(),
            }
        }
    }
    Packet::new(bytes)
}

/// Whether the other library finds every checksum right.
pub(crate) fn checksums_are_right(packet: &Packet) -> bool {
    let sliced = SlicedPacket::from_ethernet(packet.bytes()).unwrap();
    let headers = PacketHeaders::from_ethernet_slice(packet.bytes()).unwrap();
    let net = headers.net.unwrap();
    if let Some((ip, _)) = net.ipv4_ref() {
        if ip.calc_header_checksum() != ip.header_checksum {
            return false;
        }
    }
    let v4 = net.ipv4_ref().map(|(ip, _)| ip.clone());
    let v6 = net.ipv6_ref().map(|(ip, _)| ip.clone());
    match sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let header = tcp.to_header();
            let sum = match (&v4, &v6) {
                (Some(ip), _) => header.calc_checksum_ipv4(ip, tcp.payload()),
                (_, Some(ip)) => header.calc_checksum_ipv6(ip, tcp.payload()),
                _ => return false,
            };
            sum.unwrap() == header.checksum
        }
        Some(TransportSlice::Udp(udp)) => {
            let header: UdpHeader = udp.to_header();
            let sum = match (&v4, &v6) {
                (Some(ip), _) => header.calc_checksum_ipv4(ip, udp.payload()),
                (_, Some(ip)) => header.calc_checksum_ipv6(ip, udp.payload()),
                _ => return false,
            };
            sum.unwrap() == header.checksum
        }
        Some(TransportSlice::Icmpv4(icmp)) => Sum16BitWords::new().add_slice(icmp.slice()).ones_complement() == 0,
        Some(TransportSlice::Icmpv6(icmp)) => {
            let (src, dst) = v6.map(|ip| (ip.source, ip.destination)).unwrap();
            let length = (icmp.slice().len() as u16).to_be_bytes();
            let sum = Sum16BitWords::new().add_16bytes(src).add_16bytes(dst).add_2bytes(length).add_2bytes([0, 58]);
            sum.add_slice(icmp.slice()).ones_complement() == 0
        }
        // SCTP is not the library's: `checksum` has its check value.
        _ => true,
    }
}

/// An ICMP error about `inner`, from `from` to the sender of it.
fn error_about(inner: &Tuple, from: IpAddr, payload: &[u8]) -> Packet {
    let original = packet_of(inner, payload);
    let mut bytes = Vec::new();
    let eth = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    match (from, inner.src) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let kind = Icmpv4Type::TimeExceeded(etherparse::icmpv4::TimeExceededCode::TtlExceededInTransit);
            eth.ipv4(from.octets(), to.octets(), 64).icmpv4(kind).write(&mut bytes, &original.bytes()[14..]).unwrap();
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let kind = Icmpv6Type::PacketTooBig { mtu: 1280 };
            eth.ipv6(from.octets(), to.octets(), 64).icmpv6(kind).write(&mut bytes, &original.bytes()[14..]).unwrap();
        }
        _ => unreachable!(),
    }
    Packet::new(bytes)
}

/// Two tuples of one protocol and family.
fn pair() -> impl Strategy<Value = (Tuple, Tuple)> {
    (tuple(), any::<[u8; 16]>(), any::<[u8; 16]>(), any::<[u16; 2]>()).prop_map(|(a, src, dst, numbers)| {
        let address = |like: IpAddr, bytes: [u8; 16]| match like {
            IpAddr::V4(_) => IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]),
            IpAddr::V6(_) => IpAddr::from(bytes),
        };
        let transport = match a.transport {
            Transport::Ports { .. } => Transport::Ports { src: numbers[0], dst: numbers[1] },
            Transport::Query { kind, code, .. } => Transport::Query { id: numbers[0], kind, code },
        };
        let b = Tuple { src: address(a.src, src), dst: address(a.dst, dst), transport, ..a };
        (a, b)
    })
}

proptest! {
    #[test]
    fn a_translation_gives_the_packet_that_the_other_tuple_has((a, b) in pair(), payload in prop::collection::vec(any::<u8>(), 0..40)) {
        let original = packet_of(&a, &payload);
        prop_assert_eq!(original.tuple(), Some(a));
        let mut packet = original.clone();
        packet.translate(&b).unwrap();
        prop_assert_eq!(&packet, &packet_of(&b, &payload));
        prop_assert!(checksums_are_right(&packet));
        packet.translate(&a).unwrap();
        prop_assert_eq!(packet, original);
    }

    #[test]
    fn an_error_is_translated_inside_and_outside((a, b) in pair(), router: bool, payload in prop::collection::vec(any::<u8>(), 12..40)) {
        // An ICMP error is about a query, not about an answer.
        let elsewhere = match a.src {
            IpAddr::V4(_) => IpAddr::from([192, 0, 2, 77]),
            IpAddr::V6(_) => "2001:db8::77".parse().unwrap(),
        };
        let from = |tuple: &Tuple| if router { elsewhere } else { tuple.dst };
        let original = error_about(&a, from(&a), &payload);
        prop_assert_eq!((original.tuple(), original.embedded_tuple()), (None, Some(a)));
        prop_assume!(router || a.dst != elsewhere);
        let mut packet = original.clone();
        packet.translate_embedded(&b).unwrap();
        prop_assert_eq!(&packet, &error_about(&b, from(&b), &payload));
        prop_assert!(checksums_are_right(&packet));
        packet.translate_embedded(&a).unwrap();
        prop_assert_eq!(packet, original);
    }

    #[test]
    fn every_field_is_set_and_set_back(tuple in tuple(), values in any::<[u8; 40]>(), payload in prop::collection::vec(any::<u8>(), 0..20)) {
        let original = packet_of(&tuple, &payload);
        let mut packet = original.clone();
        for kind in [key::ETHERNET, key::IPV4, key::IPV6, key::TCP, key::UDP, key::SCTP] {
            let Some(old) = packet.field(kind) else {
                prop_assert_eq!(packet.set_field(kind, &values[..12]), None);
                continue;
            };
            let mut value = values[..old.len()].to_vec();
            for kept in match kind { key::IPV4 => &[8, 11][..], key::IPV6 => &[32, 36, 39][..], _ => &[] } {
                value[*kept] = old[*kept];
            }
            if kind == key::IPV6 {
                value[33] &= 0x0f;
            }
            let before = packet.clone();
            packet.set_field(kind, &value).unwrap();
            prop_assert_eq!(packet.field(kind).unwrap(), value);
            prop_assert!(checksums_are_right(&packet), "{}", kind);
            let mut back = packet.clone();
            back.set_field(kind, &old).unwrap();
            prop_assert_eq!(back, before);
        }
    }

    #[test]
    fn tags_and_labels_come_and_go(tuple in tuple(), tci in 0u16..0x1000, entry in any::<[u8; 4]>()) {
        let original = packet_of(&tuple, b"x");
        let mut packet = original.clone();
        packet.insert_tag(0x8100, tci).unwrap();
        packet.insert_tag(0x88a8, 7).unwrap();
        let tagged = packet.clone();
        let sliced = SlicedPacket::from_ethernet(tagged.bytes()).unwrap();
        prop_assert_eq!(sliced.vlan_ids().iter().map(|id| id.value()).collect::<Vec<_>>(), [7, tci & 0xfff]);
        prop_assert_eq!(packet.tuple(), Some(tuple));
        prop_assert_eq!(packet.remove_tag(), Some((0x88a8, 7)));
        prop_assert_eq!(packet.remove_tag(), Some((0x8100, tci)));
        prop_assert_eq!(packet.remove_tag(), None);
        let ethertype = packet.layout().unwrap().ethertype;
        packet.insert_label(entry, 0x8847).unwrap();
        prop_assert_eq!(packet.field(key::MPLS), Some(entry.to_vec()));
        prop_assert_eq!(packet.remove_label(ethertype), Some(entry));
        prop_assert_eq!(packet, original);
    }

    #[test]
    fn any_bytes_are_read_and_changed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..120), tuple in tuple(), ethertype in 0usize..5) {
        let mut bytes = bytes;
        let ethertypes = [[8, 0], [0x86, 0xdd], [0x81, 0], [0x88, 0x47], [8, 6]];
        if let Some(place) = bytes.get_mut(12..14) {
            place.copy_from_slice(&ethertypes[ethertype]);
        }
        let mut packet = Packet::new(bytes);
        let _ = (packet.translate(&tuple), packet.translate_embedded(&tuple), packet.raise_ttl(3));
        for kind in 0..34 {
            if let Some(value) = packet.field(kind) {
                let _ = packet.set_field(kind, &value);
            }
        }
        let _ = (packet.remove_tag(), packet.remove_label(0x0800));
        let _ = (packet.insert_tag(0x8100, 1), packet.insert_label([0; 4], 0x8847));
    }
}

#[test]
fn udp_without_a_checksum_keeps_none() {
    let address = |last| IpAddr::from([10, 0, 0, last]);
    let transport = Transport::Ports { src: 1, dst: 2 };
    let tuple = Tuple { src: address(1), dst: address(2), protocol: 17, transport };
    let mut bytes = packet_of(&tuple, b"payload").into_bytes();
    bytes[40..42].copy_from_slice(&[0, 0]);
    let mut packet = Packet::new(bytes);
    packet.translate(&Tuple { src: address(9), ..tuple }).unwrap();
    assert_eq!(packet.bytes()[40..42], [0, 0]);
    assert_eq!(packet.tuple().unwrap().src, address(9));
}

#[test]
fn a_wrong_checksum_stays_as_wrong_as_it_was() {
    let address = |last| IpAddr::from([10, 0, 0, last]);
    let transport = Transport::Ports { src: 1, dst: 2 };
    let tuple = Tuple { src: address(1), dst: address(2), protocol: 6, transport };
    let mut bytes = packet_of(&tuple, b"payload").into_bytes();
    bytes[50] ^= 0x55;
    let original = Packet::new(bytes);
    let mut packet = original.clone();
    packet.translate(&Tuple { src: address(9), ..tuple }).unwrap();
    assert!(!checksums_are_right(&packet));
    packet.translate(&tuple).unwrap();
    assert_eq!(packet, original);
}

#[test]
fn ttl_is_raised_with_its_checksum_and_never_over_the_top() {
    let transport = Transport::Ports { src: 1, dst: 2 };
    let (src, dst) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
    let mut packet = packet_of(&Tuple { src, dst, protocol: 17, transport }, b"");
    packet.raise_ttl(1).unwrap();
    assert_eq!(packet.field(key::IPV4).unwrap()[10], 65);
    assert!(checksums_are_right(&packet));
    assert_eq!(packet.raise_ttl(191), None);
}

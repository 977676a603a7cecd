//! What network address translation changes: addresses, ports, ICMP identifiers, and the packet inside an ICMP error.

use std::net::IpAddr;

use super::checksum;
use super::layout::{Fragment, Ip};
use super::Packet;
use crate::conntrack::tuple::{answering_type, protocol};
use crate::conntrack::{Transport, Tuple};

/// Bytes of an ICMP or ICMPv6 header in front of the packet that an error is about.
const ICMP_HEADER: usize = 8;

impl Packet {
    /// The tuple connection tracking knows the packet by; None for fragments, and for what has neither ports nor a
    /// query (then see [`Packet::embedded_tuple`]).
    pub fn tuple(&self) -> Option<Tuple> {
        self.tuple_at(&self.layout()?.ip?)
    }

    /// The tuple of the packet that this ICMP error is about, as that packet travelled.
    pub fn embedded_tuple(&self) -> Option<Tuple> {
        self.tuple_at(&self.embedded()?)
    }

    /// Changes the packet so that its tuple is `new`, which has the same protocol.
    pub fn translate(&mut self, new: &Tuple) -> Option<()> {
        let ip = self.layout()?.ip?;
        let old = self.tuple_at(&ip)?;
        self.translate_at(&ip, &old, new)
    }

    /// Changes an ICMP error so that the packet inside has the tuple `new`, and the error itself the addresses that
    /// belong to it: it goes to the sender of that packet, and comes from its receiver if it did before.
    pub fn translate_embedded(&mut self, new: &Tuple) -> Option<()> {
        let outer = self.layout()?.ip?;
        let inner = self.embedded()?;
        let old = self.tuple_at(&inner)?;
        let (from, _) = self.addresses(&outer)?;
        let from = if from == old.dst { new.dst } else { from };
        self.translate_at(&inner, &old, new)?;
        let addresses = bytes_of(from, new.src)?;
        self.set_addresses(&outer, &addresses);
        self.renew_icmp_checksum(&outer)
    }

    fn translate_at(&mut self, ip: &Ip, old: &Tuple, new: &Tuple) -> Option<()> {
        if (old.protocol, old.family()) != (new.protocol, new.family()) {
            return None;
        }
        let at = ip.transport?;
        let addresses = bytes_of(new.src, new.dst)?;
        match new.transport {
            Transport::Ports { src, dst } => {
                let ports = [src.to_be_bytes(), dst.to_be_bytes()].concat();
                self.set_addresses(ip, &addresses);
                self.set_ports(ip, ports.first_chunk::<4>()?)?;
            }
            Transport::Query { id, .. } => {
                self.set_addresses(ip, &addresses);
                let old = self.at::<2>(at + 4)?;
                self.patch_checksum(Some(at + 2), false, at + 4, &old, &id.to_be_bytes());
                self.put(at + 4, &id.to_be_bytes());
            }
        }
        Some(())
    }

    fn addresses(&self, ip: &Ip) -> Option<(IpAddr, IpAddr)> {
        Some(match ip.v6 {
            false => (IpAddr::from(self.at::<4>(ip.at + 12)?), IpAddr::from(self.at::<4>(ip.at + 16)?)),
            true => (IpAddr::from(self.at::<16>(ip.at + 8)?), IpAddr::from(self.at::<16>(ip.at + 24)?)),
        })
    }

    fn tuple_at(&self, ip: &Ip) -> Option<Tuple> {
        if ip.fragment != Fragment::No {
            return None;
        }
        let (src, dst) = self.addresses(ip)?;
        let at = ip.transport?;
        let transport = match ip.protocol {
            protocol::TCP | protocol::UDP | protocol::SCTP => {
                let [a, b, c, d] = self.at::<4>(at)?;
                Transport::Ports { src: u16::from_be_bytes([a, b]), dst: u16::from_be_bytes([c, d]) }
            }
            protocol::ICMP | protocol::ICMPV6 => {
                let [kind, code, _, _, a, b] = self.at::<6>(at)?;
                answering_type(ip.protocol, kind)?;
                Transport::Query { id: u16::from_be_bytes([a, b]), kind, code }
            }
            _ => return None,
        };
        Some(Tuple { src, dst, protocol: ip.protocol, transport })
    }

    /// The IP header inside an ICMP error.
    fn embedded(&self) -> Option<Ip> {
        let ip = self.layout()?.ip?;
        let at = ip.transport?;
        let [kind] = self.at::<1>(at)?;
        match (ip.v6, ip.protocol, kind) {
            // Unreachable, source quench, redirect, time exceeded, parameter problem (nf_conntrack_icmpv4_error).
            (false, protocol::ICMP, 3 | 4 | 5 | 11 | 12) => Ip::v4(&self.bytes, at + ICMP_HEADER),
            (true, protocol::ICMPV6, 0..=127) => Ip::v6(&self.bytes, at + ICMP_HEADER),
            _ => None,
        }
    }

    /// The kernel counts the checksum of an ICMP error anew when it has changed what is inside.
    fn renew_icmp_checksum(&mut self, outer: &Ip) -> Option<()> {
        let at = outer.transport?;
        self.put(at + 2, &[0, 0]);
        let mut covered = Vec::new();
        if outer.v6 {
            covered.extend_from_slice(&self.at::<32>(outer.at + 8)?);
            covered.extend_from_slice(&u32::try_from(outer.end.checked_sub(at)?).ok()?.to_be_bytes());
            covered.extend_from_slice(&[0, 0, 0, protocol::ICMPV6]);
        }
        covered.extend_from_slice(self.bytes.get(at..outer.end)?);
        let sum = checksum::over(&covered);
        self.put(at + 2, &sum.to_be_bytes());
        Some(())
    }
}

/// Both addresses one behind the other; None if they are of two families.
fn bytes_of(src: IpAddr, dst: IpAddr) -> Option<Vec<u8>> {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => Some([src.octets(), dst.octets()].concat()),
        (IpAddr::V6(src), IpAddr::V6(dst)) => Some([src.octets(), dst.octets()].concat()),
        _ => None,
    }
}

//! Packets as bytes: where their headers are, and changes to headers that keep every checksum as right, or as wrong,
//! as it was.
//!
//! Fields go by the key attributes of the datapath (`OVS_KEY_ATTR_*`), in the form that the kernel gives them.

mod checksum;
mod layout;
mod translate;

pub use layout::{Fragment, Ip, Layout};

use checksum::replace;

use crate::flow_key::uapi::key;

/// Offset of the outermost EtherType.
const ETHERTYPE_AT: usize = 12;
/// Bytes of a VLAN tag or an MPLS label stack entry.
const TAG: usize = 4;
/// EtherTypes of MPLS, unicast and multicast.
const MPLS: [u16; 2] = [0x8847, 0x8848];

/// An Ethernet packet that can be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    bytes: Vec<u8>,
}

impl Packet {
    /// From the start of the Ethernet header.
    pub fn new(bytes: Vec<u8>) -> Self {
        Packet { bytes }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, given away.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Where the headers are; None if it is shorter than an Ethernet header.
    pub fn layout(&self) -> Option<Layout> {
        Layout::of(&self.bytes)
    }

    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.get(offset..)?.first_chunk::<N>().copied()
    }

    /// The value of key attribute `kind`, as the kernel reads it from the packet; None where the packet has no such
    /// header or this library does not read it. `MPLS` is the topmost label stack entry alone.
    pub fn field(&self, kind: u16) -> Option<Vec<u8>> {
        let layout = self.layout()?;
        match kind {
            key::ETHERNET => Some([self.at::<6>(6)?, self.at::<6>(0)?].concat()),
            key::MPLS if MPLS.contains(&layout.ethertype) => Some(self.at::<TAG>(layout.network)?.to_vec()),
            key::IPV4 | key::IPV6 => self.ip_field(kind, &layout.ip?),
            key::TCP | key::UDP | key::SCTP | key::TCP_FLAGS | key::ICMP | key::ICMPV6 => {
                self.transport_field(kind, &layout.ip?)
            }
            _ => None,
        }
    }

    fn ip_field(&self, kind: u16, ip: &Ip) -> Option<Vec<u8>> {
        let fragment = ip.fragment as u8;
        if ip.v6 != (kind == key::IPV6) {
            return None;
        }
        if !ip.v6 {
            let [_, tos] = self.at::<2>(ip.at)?;
            let [ttl] = self.at::<1>(ip.at + 8)?;
            return Some([&self.at::<8>(ip.at + 12)?[..], &[ip.protocol, tos, ttl, fragment]].concat());
        }
        let head = u32::from_be_bytes(self.at::<4>(ip.at)?);
        let (class, label) = ((head >> 20) as u8, (head & 0xf_ffff).to_be_bytes());
        let [limit] = self.at::<1>(ip.at + 7)?;
        Some([&self.at::<32>(ip.at + 8)?[..], &label, &[ip.protocol, class, limit, fragment]].concat())
    }

    fn transport_field(&self, kind: u16, ip: &Ip) -> Option<Vec<u8>> {
        let l4 = ip.transport?;
        let protocol_of = |kind| match kind {
            key::TCP | key::TCP_FLAGS => 6,
            key::UDP => 17,
            key::SCTP => 132,
            key::ICMP => 1,
            _ => 58,
        };
        if ip.protocol != protocol_of(kind) || ip.v6 && kind == key::ICMP || !ip.v6 && kind == key::ICMPV6 {
            return None;
        }
        match kind {
            key::TCP_FLAGS => {
                let [a, b] = self.at::<2>(l4 + 12)?;
                Some(vec![a & 0x0f, b])
            }
            key::ICMP | key::ICMPV6 => Some(self.at::<2>(l4)?.to_vec()),
            _ => Some(self.at::<4>(l4)?.to_vec()),
        }
    }

    /// Gives key attribute `kind` the value `value`, as a `set` action does: what an action cannot set (protocol,
    /// fragment) stays. None, and an unchanged packet, where there is no such header or it is not one that is set.
    pub fn set_field(&mut self, kind: u16, value: &[u8]) -> Option<()> {
        let layout = self.layout()?;
        if self.field(kind)?.len() != value.len() {
            return None;
        }
        match kind {
            key::ETHERNET => {
                let (src, dst) = value.split_at(6);
                self.put(6, src);
                self.put(0, dst);
            }
            key::MPLS => self.put(layout.network, value),
            key::IPV4 => self.set_ipv4(&layout.ip?, value)?,
            key::IPV6 => self.set_ipv6(&layout.ip?, value)?,
            key::TCP | key::UDP | key::SCTP => {
                let ip = layout.ip?;
                self.set_ports(&ip, value.first_chunk::<4>()?)?;
            }
            _ => return None,
        }
        Some(())
    }

    fn set_ipv4(&mut self, ip: &Ip, value: &[u8]) -> Option<()> {
        let [addresses @ .., _, tos, ttl, _] = value.first_chunk::<12>()?;
        self.set_addresses(ip, addresses);
        self.put_in_ipv4_header(ip, ip.at + 1, &[*tos]);
        self.put_in_ipv4_header(ip, ip.at + 8, &[*ttl]);
        Some(())
    }

    fn set_ipv6(&mut self, ip: &Ip, value: &[u8]) -> Option<()> {
        let (addresses, rest) = value.split_first_chunk::<32>()?;
        let [a, b, c, d, _, class, limit, _] = *rest.first_chunk::<8>()?;
        self.set_addresses(ip, addresses);
        let label = u32::from_be_bytes([a, b, c, d]) & 0xf_ffff;
        let head = u32::from_be_bytes(self.at::<4>(ip.at)?) & 0xf000_0000 | u32::from(class) << 20 | label;
        self.put(ip.at, &head.to_be_bytes());
        self.put(ip.at + 7, &[limit]);
        Some(())
    }

    /// Source and destination address, one behind the other, with the checksums that cover them.
    fn set_addresses(&mut self, ip: &Ip, addresses: &[u8]) {
        let at = ip.at + if ip.v6 { 8 } else { 12 };
        let half = addresses.len() / 2;
        for (i, new) in addresses.chunks(half.max(1)).enumerate() {
            let at = at + i * half;
            let Some(old) = self.bytes.get(at..at + half).map(<[u8]>::to_vec) else { return };
            if !ip.v6 {
                self.patch_checksum(Some(ip.at + 10), false, at, &old, new);
            }
            // With a routing header the checksum covers the last address of that, not this destination.
            if !(ip.routed && i == 1) {
                let (sum, mangled) = self.pseudo_header_checksum(ip);
                self.patch_checksum(sum, mangled, at, &old, new);
            }
            self.put(at, new);
        }
    }

    /// Ports, source first, with the checksum.
    fn set_ports(&mut self, ip: &Ip, ports: &[u8; 4]) -> Option<()> {
        let at = ip.transport?;
        let old = self.at::<4>(at)?;
        if ip.protocol == 132 {
            return self.set_sctp_ports(at, ip.end, ports);
        }
        let (sum, mangled) = self.pseudo_header_checksum(ip);
        self.patch_checksum(sum, mangled, at, &old, ports);
        self.put(at, ports);
        Some(())
    }

    /// SCTP's checksum is a CRC over the whole packet: what it was wrong by it stays wrong by.
    fn set_sctp_ports(&mut self, at: usize, end: usize, ports: &[u8; 4]) -> Option<()> {
        let Some(old) = self.at::<4>(at + 8).map(u32::from_le_bytes) else {
            // Inside an ICMP error there may be no more of it than the ports.
            self.put(at, ports);
            return Some(());
        };
        let before = checksum::sctp(self.bytes.get(at..end)?);
        self.put(at, ports);
        let after = checksum::sctp(self.bytes.get(at..end)?);
        self.put(at + 8, &(old ^ before ^ after).to_le_bytes());
        Some(())
    }

    /// Where the checksum is that covers addresses and ports, and whether 0 means that there is none.
    fn pseudo_header_checksum(&self, ip: &Ip) -> (Option<usize>, bool) {
        let Some(l4) = ip.transport else { return (None, false) };
        let (at, length) = match ip.protocol {
            6 => (l4 + 16, 20),
            17 => (l4 + 6, 8),
            58 if ip.v6 => (l4 + 2, 4),
            _ => return (None, false),
        };
        let udp = ip.protocol == 17;
        let there = l4 + length <= self.bytes.len() && !(udp && self.at::<2>(at) == Some([0, 0]));
        (there.then_some(at), udp)
    }

    /// The checksum at `sum`, after `old` at offset `at` has become `new`.
    fn patch_checksum(&mut self, sum: Option<usize>, zero_means_none: bool, at: usize, old: &[u8], new: &[u8]) {
        let Some(sum) = sum else { return };
        let Some(was) = self.at::<2>(sum) else { return };
        let mut now = replace(u16::from_be_bytes(was), old, new, at);
        if zero_means_none && now == 0 {
            now = 0xffff;
        }
        self.put(sum, &now.to_be_bytes());
    }

    fn put_in_ipv4_header(&mut self, ip: &Ip, at: usize, new: &[u8]) {
        let Some(old) = self.bytes.get(at..at + new.len()).map(<[u8]>::to_vec) else { return };
        self.patch_checksum(Some(ip.at + 10), false, at, &old, new);
        self.put(at, new);
    }

    /// Overwrites bytes; nothing where the packet ends before them.
    fn put(&mut self, at: usize, new: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + new.len()) {
            place.copy_from_slice(new);
        }
    }

    /// Puts a VLAN tag in front of what follows the addresses.
    pub fn insert_tag(&mut self, tpid: u16, tci: u16) -> Option<()> {
        self.layout()?;
        let tag = [tpid.to_be_bytes(), tci.to_be_bytes()].concat();
        self.bytes.splice(ETHERTYPE_AT..ETHERTYPE_AT, tag);
        Some(())
    }

    /// Takes the outermost VLAN tag away: (TPID, TCI).
    pub fn remove_tag(&mut self) -> Option<(u16, u16)> {
        if self.layout()?.tags == 0 {
            return None;
        }
        let [a, b, c, d] = self.at::<TAG>(ETHERTYPE_AT)?;
        self.bytes.drain(ETHERTYPE_AT..ETHERTYPE_AT + TAG);
        Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
    }

    /// Puts a label stack entry in front of the network header, under `ethertype`.
    pub fn insert_label(&mut self, entry: [u8; TAG], ethertype: u16) -> Option<()> {
        let layout = self.layout()?;
        if layout.network > self.bytes.len() {
            return None;
        }
        self.bytes.splice(layout.network..layout.network, entry);
        self.put(layout.ethertype_at, &ethertype.to_be_bytes());
        Some(())
    }

    /// Takes the topmost label stack entry away; what it was in front of has `ethertype`.
    pub fn remove_label(&mut self, ethertype: u16) -> Option<[u8; TAG]> {
        let layout = self.layout()?;
        if !MPLS.contains(&layout.ethertype) {
            return None;
        }
        let entry = self.at::<TAG>(layout.network)?;
        self.bytes.drain(layout.network..layout.network + TAG);
        self.put(layout.ethertype_at, &ethertype.to_be_bytes());
        Some(entry)
    }

    /// Adds `by` to TTL or hop limit.
    pub fn raise_ttl(&mut self, by: u8) -> Option<()> {
        let ip = self.layout()?.ip?;
        let at = ip.at + if ip.v6 { 7 } else { 8 };
        let [ttl] = self.at::<1>(at)?;
        let raised = [ttl.checked_add(by)?];
        match ip.v6 {
            true => self.put(at, &raised),
            false => self.put_in_ipv4_header(&ip, at, &raised),
        }
        Some(())
    }
}

#[cfg(test)]
pub(crate) mod tests;

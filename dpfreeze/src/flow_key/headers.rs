//! The header part of a key, read from a packet.

use super::uapi::key;
use crate::error::Result;
use crate::netlink::attr::{AttrBuf, Attrs};
use crate::packet::Packet;

/// Fields that are read from the packet.
const READ: [u16; 9] =
    [key::MPLS, key::IPV4, key::IPV6, key::TCP, key::TCP_FLAGS, key::UDP, key::SCTP, key::ICMP, key::ICMPV6];
/// The bit of a TCI that a key uses to say that there is a tag (`VLAN_CFI_MASK`).
const TAG_PRESENT: u16 = 0x1000;

/// Whether `kind` holds what a packet has besides its bytes (port, priority, mark, tunnel, and what this library does
/// not know), and not what the pipeline gave it.
pub fn is_metadata(kind: u16) -> bool {
    matches!(kind, key::PRIORITY | key::IN_PORT | key::SKB_MARK | key::TUNNEL) || kind > key::IPV6_EXTHDRS
}

/// Appends the header attributes of `packet` to `to`. What this library does not read from packets (ARP, neighbour
/// discovery, NSH) is taken from `old`, the key of the same packet before header changes.
///
/// # Errors
/// `old` is malformed.
pub fn push_headers(to: &mut AttrBuf, packet: &Packet, old: &[u8]) -> Result<()> {
    let Some(layout) = packet.layout() else { return Ok(()) };
    let mut innermost = AttrBuf::new();
    innermost.push(key::ETHERTYPE, &layout.ethertype.to_be_bytes());
    for kind in READ {
        if let Some(value) = packet.field(kind) {
            innermost.push(kind, &value);
        }
    }
    push_unread(&mut innermost, old, 0)?;
    to.push(key::ETHERNET, &packet.field(key::ETHERNET).unwrap_or_default());
    for tag in (0..layout.tags).rev() {
        let Some([a, b, c, d]) = packet.bytes().get(12 + 4 * tag..).and_then(|tag| tag.first_chunk()) else { break };
        let tci = u16::from_be_bytes([*c, *d]) | TAG_PRESENT;
        let mut outer = AttrBuf::new();
        outer.push(key::ETHERTYPE, &[*a, *b]).push(key::VLAN, &tci.to_be_bytes());
        outer.push_nested(key::ENCAP, &innermost);
        innermost = outer;
    }
    for attr in Attrs(innermost.as_bytes()) {
        to.push_attr(&attr?);
    }
    Ok(())
}

fn push_unread(to: &mut AttrBuf, old: &[u8], depth: u32) -> Result<()> {
    for attr in Attrs(old) {
        let attr = attr?;
        match attr.kind {
            key::ENCAP if depth < 4 => push_unread(to, attr.payload, depth + 1)?,
            key::ARP | key::ND | key::NSH | key::IPV6_EXTHDRS => {
                to.push_attr(&attr);
            }
            _ => {}
        }
    }
    Ok(())
}

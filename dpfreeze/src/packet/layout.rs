//! Where the headers of a packet are (net/openvswitch/flow.c, `key_extract`).

/// TPIDs of VLAN tags: 802.1Q, 802.1ad.
const VLAN: [u16; 2] = [0x8100, 0x88a8];
/// Tags the datapath reads.
const MOST_TAGS: usize = 2;
/// Extension headers that are looked behind, at most.
const MOST_EXTENSIONS: usize = 16;

/// `enum ovs_frag_type`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// A whole packet.
    No = 0,
    /// The first fragment.
    First = 1,
    /// Another fragment: it has no transport header.
    Later = 2,
}

/// An IPv4 or IPv6 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Where it begins.
    pub at: usize,
    /// It is IPv6.
    pub v6: bool,
    /// `IPPROTO_*` as the key has it: behind extension headers; of later IPv6 fragments it is 44.
    pub protocol: u8,
    /// Whether it is a fragment.
    pub fragment: Fragment,
    /// Where the transport header begins, where there is one.
    pub transport: Option<usize>,
    /// There is an IPv6 routing header.
    pub routed: bool,
    /// Where the packet ends by its own length; padding may follow.
    pub end: usize,
}

/// Where the headers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// VLAN tags, two at most.
    pub tags: usize,
    /// Where the innermost EtherType is.
    pub ethertype_at: usize,
    /// That EtherType.
    pub ethertype: u16,
    /// Where the network header (or the label stack) begins.
    pub network: usize,
    /// The IP header, if it is IP.
    pub ip: Option<Ip>,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk::<2>().map(|b| u16::from_be_bytes(*b))
}

fn byte(bytes: &[u8], at: usize) -> Option<u8> {
    bytes.get(at).copied()
}

impl Layout {
    /// Reads it; None if there is no whole Ethernet header.
    pub fn of(bytes: &[u8]) -> Option<Layout> {
        let mut at = 12;
        let mut tags = 0;
        let mut ethertype = be16(bytes, at)?;
        while tags < MOST_TAGS && VLAN.contains(&ethertype) {
            let Some(inner) = be16(bytes, at + 4) else { break };
            (ethertype, at, tags) = (inner, at + 4, tags + 1);
        }
        let network = at + 2;
        let ip = match ethertype {
            0x0800 => Ip::v4(bytes, network),
            0x86dd => Ip::v6(bytes, network),
            _ => None,
        };
        Some(Layout { tags, ethertype_at: at, ethertype, network, ip })
    }
}

impl Ip {
    /// An IPv4 header at `at`.
    pub fn v4(bytes: &[u8], at: usize) -> Option<Ip> {
        let head = byte(bytes, at)?;
        let length = usize::from(head & 0x0f) * 4;
        if head >> 4 != 4 || length < 20 || at + length > bytes.len() {
            return None;
        }
        let end = (at + usize::from(be16(bytes, at + 2)?)).clamp(at + length, bytes.len());
        let flags = be16(bytes, at + 6)?;
        let fragment = match (flags & 0x1fff, flags & 0x2000) {
            (0, 0) => Fragment::No,
            (0, _) => Fragment::First,
            _ => Fragment::Later,
        };
        let transport = (fragment != Fragment::Later).then_some(at + length);
        Some(Ip { at, v6: false, protocol: byte(bytes, at + 9)?, fragment, transport, routed: false, end })
    }

    /// An IPv6 header at `at`, with what extends it.
    pub fn v6(bytes: &[u8], at: usize) -> Option<Ip> {
        if byte(bytes, at)? >> 4 != 6 || at + 40 > bytes.len() {
            return None;
        }
        let end = (at + 40 + usize::from(be16(bytes, at + 4)?)).min(bytes.len());
        let mut ip = Ip {
            at,
            v6: true,
            protocol: byte(bytes, at + 6)?,
            fragment: Fragment::No,
            transport: Some(at + 40),
            routed: false,
            end,
        };
        for _ in 0..MOST_EXTENSIONS {
            let Some(here) = ip.transport else { break };
            let length = match ip.protocol {
                // Hop-by-hop, routing, destination options, mobility; authentication; fragment.
                0 | 43 | 60 | 135 => 8 + 8 * usize::from(byte(bytes, here + 1)?),
                51 => 8 + 4 * usize::from(byte(bytes, here + 1)?),
                44 => 8,
                _ => break,
            };
            if ip.protocol == 44 {
                match be16(bytes, here + 2)? {
                    offset if offset & 0xfff8 != 0 => {
                        (ip.fragment, ip.transport) = (Fragment::Later, None);
                        break;
                    }
                    // An atomic fragment: the kernel calls it a first one (`parse_ipv6hdr`).
                    _ => ip.fragment = Fragment::First,
                }
            }
            ip.routed |= ip.protocol == 43;
            ip.protocol = byte(bytes, here)?;
            ip.transport = Some(here + length);
        }
        Some(ip)
    }
}

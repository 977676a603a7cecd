//! What a tunnel's packets say on the outside: kind, key and options, from a capture by tcpdump.

use std::collections::BTreeMap;

use anyhow::{bail, Result};

// linux/if_ether.h, linux/in.h
const ETH_IPV4: u16 = 0x0800;
const ETH_IPV6: u16 = 0x86dd;
const ETH_TEB: u16 = 0x6558;
const ETH_ERSPAN: u16 = 0x88be;
const ETH_ERSPAN2: u16 = 0x22eb;
const IPPROTO_GRE: u8 = 47;
const IPPROTO_UDP: u8 = 17;
const IPPROTO_DSTOPTS: u8 = 60;
/// Length of an Ethernet header without tags.
const ETHERNET: usize = 14;
// Flags of a GRE header (RFC 2890).
const GRE_CSUM: u16 = 0x8000;
const GRE_KEY: u16 = 0x2000;
const GRE_SEQ: u16 = 0x1000;
/// The flag of a VXLAN header that carries a group (draft-smith-vxlan-group-policy).
const VXLAN_GBP: u8 = 0x80;
/// A number that falls by so much, and to less than half, began anew; less is two CPUs that send at once, one of which may
/// have stood still.
const ANEW: u32 = 1000;

/// One packet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Outer {
    /// Protocol, key and options, for example `erspan v1 session=9 index=7`.
    words: String,
    /// Sequence number, where there is one.
    seq: Option<u32>,
}

/// A whole capture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Packets by what they say.
    pub kinds: BTreeMap<String, u64>,
    /// How often a device of the host began its sequence numbers anew.
    pub begun_anew: u64,
}

/// Reads a capture (pcap-savefile(5), as this machine writes it) of Ethernet frames.
///
/// # Errors
/// Where it is none.
pub fn read(capture: &[u8]) -> Result<Seen> {
    /// Magic number of captures in this machine's byte order with µs.
    const MAGIC: u32 = 0xa1b2_c3d4;
    const FILE_HEADER: usize = 24;
    const FRAME_HEADER: usize = 16;
    if capture.first_chunk().map(|magic| u32::from_ne_bytes(*magic)) != Some(MAGIC) {
        bail!("no capture: {} bytes that begin otherwise", capture.len());
    }
    let mut seen = Seen::default();
    let mut highest: BTreeMap<String, u32> = BTreeMap::new();
    let mut rest = capture.get(FILE_HEADER..).unwrap_or_default();
    // The last frame may be cut off.
    while let Some(length) = rest.get(8..).and_then(|bytes| bytes.first_chunk()) {
        let length = u32::from_ne_bytes(*length) as usize;
        let Some(frame) = rest.get(FRAME_HEADER..).and_then(|bytes| bytes.get(..length)) else { break };
        rest = rest.get(FRAME_HEADER + length..).unwrap_or_default();
        let Some(outer) = outer(frame) else { continue };
        *seen.kinds.entry(outer.words.clone()).or_default() += 1;
        let Some(seq) = outer.seq else { continue };
        // All tunnels of a kind share a device, and its numbers.
        let device = outer.words.split(' ').next().unwrap_or_default().to_owned();
        let known = highest.entry(device).or_insert(seq);
        if seq.saturating_add(ANEW) < *known && seq < *known / 2 {
            seen.begun_anew += 1;
            *known = seq;
        }
        *known = seq.max(*known);
    }
    Ok(seen)
}

/// None for what is no tunnel's.
fn outer(frame: &[u8]) -> Option<Outer> {
    let (_, packet) = frame.split_at_checked(ETHERNET)?;
    let (family, protocol, inner) = match short(frame, 12)? {
        ETH_IPV4 => ("", *packet.get(9)?, packet.get(usize::from(packet.first()? & 0x0f) * 4..)?),
        ETH_IPV6 => match *packet.get(6)? {
            // The limit of encapsulations (RFC 2473, 4.1.1) is before the GRE header.
            IPPROTO_DSTOPTS => {
                let length = 8 + usize::from(*packet.get(41)?) * 8;
                ("6", *packet.get(40)?, packet.get(40 + length..)?)
            }
            next => ("6", next, packet.get(40..)?),
        },
        _ => return None,
    };
    match protocol {
        IPPROTO_GRE => gre(family, inner),
        IPPROTO_UDP => vxlan(family, inner),
        _ => None,
    }
}

fn gre(family: &str, packet: &[u8]) -> Option<Outer> {
    let (flags, kind) = (short(packet, 0)?, short(packet, 2)?);
    let mut at = 4;
    let mut field = |flag: u16| {
        let present = flags & flag != 0;
        let value = present.then(|| word(packet, at));
        at += if present { 4 } else { 0 };
        value.flatten()
    };
    let (_checksum, key, seq) = (field(GRE_CSUM), field(GRE_KEY), field(GRE_SEQ));
    let header = packet.get(at..)?;
    let words = match kind {
        ETH_TEB => format!("gre{family} key={}", key?),
        // draft-foschiano-erspan: version and VLAN, flags and session, then what the version has.
        ETH_ERSPAN => format!("erspan{family} v1 session={} index={}", short(header, 2)? & 0x3ff, word(header, 4)?),
        ETH_ERSPAN2 => {
            let more = short(header, 10)?;
            let (hardware, direction) = (more >> 4 & 0x3f, more >> 3 & 1);
            format!("erspan{family} v2 session={} dir={direction} hwid={hardware}", short(header, 2)? & 0x3ff)
        }
        _ => return None,
    };
    Some(Outer { words, seq })
}

fn vxlan(family: &str, packet: &[u8]) -> Option<Outer> {
    let header = packet.get(8..)?;
    let port = short(packet, 2)?;
    let group = match header.first()? & VXLAN_GBP {
        0 => String::new(),
        _ => format!(" group={}", short(header, 2)?),
    };
    Some(Outer { words: format!("vxlan{family} port={port} vni={}{group}", word(header, 4)? >> 8), seq: None })
}

fn short(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip4(protocol: u8, inner: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; ETHERNET + 20];
        frame[12..14].copy_from_slice(&ETH_IPV4.to_be_bytes());
        (frame[ETHERNET], frame[ETHERNET + 9]) = (0x45, protocol);
        [&frame, inner].concat()
    }

    fn ip6(next: u8, inner: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; ETHERNET + 40];
        frame[12..14].copy_from_slice(&ETH_IPV6.to_be_bytes());
        frame[ETHERNET + 6] = next;
        [&frame, inner].concat()
    }

    fn words(frame: &[u8]) -> String {
        outer(frame).map(|outer| outer.words).unwrap_or_default()
    }

    fn erspan(seq: u32) -> Vec<u8> {
        let seq = seq.to_be_bytes();
        ip4(47, &[&[0x10, 0, 0x88, 0xbe][..], &seq, &[0x10, 0, 0x18, 9, 0, 0, 0, 7]].concat())
    }

    #[test]
    fn what_a_packet_says_on_the_outside() {
        let key = [0x20, 0, 0x65, 0x58, 0, 0, 0, 7];
        assert_eq!(words(&ip4(47, &key)), "gre key=7");
        let with_limit = [&[47, 0, 4, 1, 4, 1, 0, 0][..], &key].concat();
        assert_eq!((words(&ip6(60, &with_limit)), words(&ip6(47, &key))), ("gre6 key=7".into(), "gre6 key=7".into()));
        assert_eq!(
            outer(&erspan(300)).map(|o| (o.words, o.seq)),
            Some(("erspan v1 session=9 index=7".into(), Some(300)))
        );
        let second = [0x10, 0, 0x22, 0xeb, 0, 0, 0, 1, 0x20, 0, 0x18, 10, 0, 0, 0, 1, 0, 0, 0, 0x48];
        assert_eq!(words(&ip4(47, &second)), "erspan v2 session=10 dir=1 hwid=4");
        let udp = |flags: u8, group: u8| [0, 9, 0x12, 0xb5, 0, 0, 0, 0, flags, 0, 0, group, 0, 0, 11, 0];
        assert_eq!(words(&ip6(17, &udp(8, 0))), "vxlan6 port=4789 vni=11");
        assert_eq!(words(&ip4(17, &udp(0x88, 85))), "vxlan port=4789 vni=11 group=85");
        assert_eq!(words(&ip4(6, &key)), "");
        assert_eq!(words(&erspan(1)[..40]), "");
    }

    #[test]
    fn numbers_that_begin_anew_are_told_from_those_that_two_cpus_mix_up() {
        let capture = |seqs: &[u32]| {
            let mut bytes = 0xa1b2_c3d4_u32.to_ne_bytes().to_vec();
            bytes.resize(24, 0);
            for seq in seqs {
                let frame = erspan(*seq);
                bytes.extend([0; 8]);
                bytes.extend([(frame.len() as u32).to_ne_bytes(); 2].concat());
                bytes.extend(frame);
            }
            bytes.extend([0; 9]);
            bytes
        };
        let seen = read(&capture(&[4000, 4002, 4001, 4003])).unwrap();
        assert_eq!((seen.begun_anew, seen.kinds["erspan v1 session=9 index=7"]), (0, 4));
        assert_eq!(read(&capture(&[4000, 1, 2])).unwrap().begun_anew, 1);
        assert!(read(&[1; 40]).is_err());
    }
}

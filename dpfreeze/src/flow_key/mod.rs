//! What is in the keys, masks and actions of flows: read, compared, shown; never rewritten but for
//! [`without_pipeline`] and [`push_headers`].
//!
//! All of it works on runs of attributes as the kernel sent them. Malformed runs are an error of the function that
//! reads them, never a panic.

mod actions;
mod compare;
mod format;
mod headers;
mod known;
mod steps;
pub mod uapi;

pub use actions::{ActionSummary, Before, Cookie, Recirculation, Touched};
pub use compare::{FlatKey, Masked};
pub use format::{format_actions, format_key};
pub use headers::{is_metadata, push_headers};
pub use known::Known;
pub use steps::Step;

use crate::error::Result;
use crate::netlink::attr::Attrs;
use uapi::key;

/// `OVS_KEY_ATTR_RECIRC_ID` of a key; 0 where it is absent.
///
/// # Errors
/// The key is malformed.
pub fn recirc_id(key: &[u8]) -> Result<u32> {
    match Attrs(key).find(key::RECIRC_ID)? {
        Some(attr) => attr.u32(),
        None => Ok(0),
    }
}

/// `OVS_KEY_ATTR_IN_PORT` of a key: the number of the vport, None where it is absent.
///
/// # Errors
/// The key is malformed.
pub fn in_port(key: &[u8]) -> Result<Option<u32>> {
    Attrs(key).find(key::IN_PORT)?.map(|attr| attr.u32()).transpose()
}

/// Whether `kind` holds what the pipeline gave a packet (recirculation id, datapath hash, connection tracking), and
/// not what the packet arrived with.
pub fn is_pipeline(kind: u16) -> bool {
    matches!(kind, key::DP_HASH | key::RECIRC_ID | key::CT_STATE..=key::CT_ORIG_TUPLE_IPV6)
}

/// The key without the attributes that the pipeline gave the packet: what it had when it entered table 0.
///
/// The kernel takes such a key for EXECUTE: it reads metadata from it and parses the headers again from the packet
/// (net/openvswitch/flow.c, `ovs_flow_key_extract_userspace`).
///
/// # Errors
/// The key is malformed.
pub fn without_pipeline(key: &[u8]) -> Result<Vec<u8>> {
    let mut kept = crate::netlink::attr::AttrBuf::new();
    for attr in Attrs(key) {
        let attr = attr?;
        if !is_pipeline(attr.kind) {
            kept.push(attr.raw_kind, attr.payload);
        }
    }
    Ok(kept.as_bytes().to_vec())
}

/// A hash that is equal for packets of one flow in one direction: in port, addresses, protocol and, for whole
/// packets, transport ports. Of a malformed key: of what comes before the fault.
pub fn flow_hash(key: &[u8]) -> u64 {
    use std::hash::Hasher;
    let mut hasher = std::collections::hash_map::DefaultHasher::new();
    hash_headers(key, &mut hasher);
    hasher.finish()
}

fn hash_headers(run: &[u8], hasher: &mut impl std::hash::Hasher) {
    /// Addresses and protocol: not TOS, TTL and label, which may change within a flow.
    const IPV4_STABLE: usize = 9;
    const IPV6_STABLE: usize = 32;
    let mut fragment = false;
    for attr in Attrs(run).map_while(Result::ok) {
        let stable = match attr.kind {
            key::IN_PORT | key::ETHERNET | key::VLAN | key::ETHERTYPE => attr.payload,
            key::IPV4 => {
                fragment = attr.payload.get(11).is_some_and(|f| *f != 0);
                attr.payload.get(..IPV4_STABLE).unwrap_or_default()
            }
            key::IPV6 => {
                fragment = attr.payload.get(39).is_some_and(|f| *f != 0);
                attr.payload.get(..IPV6_STABLE).unwrap_or_default()
            }
            key::TCP | key::UDP | key::SCTP if !fragment => attr.payload,
            key::ENCAP => {
                hash_headers(attr.payload, hasher);
                continue;
            }
            _ => continue,
        };
        hasher.write_u16(attr.kind);
        hasher.write(stable);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attr::AttrBuf;
    use proptest::prelude::*;

    fn key_of(recirc: u32, ct_state: u32, src_port: u16) -> Vec<u8> {
        let mut k = AttrBuf::new();
        k.push_u32(key::RECIRC_ID, recirc).push_u32(key::DP_HASH, 7).push_u32(key::PRIORITY, 0);
        k.push_u32(key::IN_PORT, 3).push_u32(key::SKB_MARK, 0).push_u32(key::CT_STATE, ct_state);
        k.push(key::CT_ZONE, &5u16.to_ne_bytes()).push_u32(key::CT_MARK, 0).push(key::CT_LABELS, &[0; 16]);
        k.push(key::CT_ORIG_TUPLE_IPV4, &[0; 13]).push(key::ETHERNET, &[2; 12]);
        k.push(key::ETHERTYPE, &[8, 0]).push(key::IPV4, &[10, 0, 0, 1, 10, 0, 0, 2, 17, 0, 64, 0]);
        k.push(key::UDP, &[src_port.to_be_bytes(), 53u16.to_be_bytes()].concat());
        k.as_bytes().to_vec()
    }

    #[test]
    fn recirculation_id_and_port() {
        assert_eq!(recirc_id(&key_of(9, 0, 1)).unwrap(), 9);
        assert_eq!(recirc_id(&[]).unwrap(), 0);
        assert_eq!(in_port(&key_of(9, 0, 1)).unwrap(), Some(3));
        assert!(recirc_id(&[1, 0]).is_err());
    }

    #[test]
    fn the_pipeline_is_stripped_and_nothing_else() {
        let kinds = |run: &[u8]| Attrs(run).map(|a| a.unwrap().kind).collect::<Vec<_>>();
        let stripped = without_pipeline(&key_of(9, 0x21, 1)).unwrap();
        assert_eq!(
            kinds(&stripped),
            [key::PRIORITY, key::IN_PORT, key::SKB_MARK, key::ETHERNET, key::ETHERTYPE, key::IPV4, key::UDP]
        );
        assert_eq!(without_pipeline(&stripped).unwrap(), stripped);
    }

    #[test]
    fn a_flow_keeps_its_hash_through_the_pipeline() {
        assert_eq!(flow_hash(&key_of(0, 0, 1)), flow_hash(&key_of(9, 0x21, 1)));
        assert_ne!(flow_hash(&key_of(0, 0, 1)), flow_hash(&key_of(0, 0, 2)));
    }

    proptest! {
        #[test]
        fn readers_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = recirc_id(&bytes);
            let _ = in_port(&bytes);
            let _ = without_pipeline(&bytes);
            let _ = flow_hash(&bytes);
            let _ = format_key(&bytes);
            let _ = format_actions(&bytes);
            let _ = ActionSummary::of(&bytes);
            let _ = FlatKey::of(&bytes);
            let _ = Masked::of(&bytes, &bytes);
        }

        #[test]
        fn a_flow_matches_the_key_it_was_made_of(
            values in proptest::collection::vec((2u16..33, proptest::collection::vec(any::<u8>(), 4)), 1..12),
        ) {
            let (mut k, mut m) = (AttrBuf::new(), AttrBuf::new());
            let mut seen = std::collections::BTreeSet::new();
            for (kind, bytes) in values {
                if kind != key::TUNNEL && kind != key::NSH && seen.insert(kind) {
                    k.push(kind, &bytes);
                    m.push(kind, &[0xff; 4]);
                }
            }
            let flow = Masked::of(k.as_bytes(), m.as_bytes()).unwrap();
            prop_assert!(flow.matches(&FlatKey::of(k.as_bytes()).unwrap(), &Touched::default()));
        }
    }
}

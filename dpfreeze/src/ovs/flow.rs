//! Flows of a datapath: family `ovs_flow`.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::header;
use crate::bytes::hex;
use crate::error::{Error, Result};
use crate::netlink::attr::{AttrBuf, NLA_F_NESTED};

// enum ovs_flow_cmd
const VERSION: u8 = 1; // OVS_FLOW_VERSION
const CMD_DEL: u8 = 2;
const CMD_GET: u8 = 3;
// enum ovs_flow_attr
const ATTR_KEY: u16 = 1;
const ATTR_ACTIONS: u16 = 2;
const ATTR_STATS: u16 = 3;
const ATTR_TCP_FLAGS: u16 = 4;
const ATTR_USED: u16 = 5;
const ATTR_MASK: u16 = 7;
const ATTR_UFID: u16 = 9;
const ATTR_UFID_FLAGS: u16 = 10;
const ATTR_PAD: u16 = 11;
// OVS_UFID_F_OMIT_KEY | OVS_UFID_F_OMIT_MASK | OVS_UFID_F_OMIT_ACTIONS: the answer need not repeat them.
const UFID_OMIT_ALL: u32 = 7;

/// A flow (megaflow) of a datapath.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Unique identifier. None for a flow that was made without one, and for one that has not 16 octets (which is
    /// then in `unknown`); such flows are named by their key.
    #[serde(with = "ufid_serde")]
    pub ufid: Option<[u8; 16]>,
    /// `OVS_KEY_ATTR_*` run, as sent.
    #[serde(with = "hex")]
    pub key: Vec<u8>,
    /// `OVS_KEY_ATTR_*` run, as sent; a missing attribute is wildcarded. Empty too if the flow has no mask at all.
    #[serde(with = "hex")]
    pub mask: Vec<u8>,
    /// `OVS_ACTION_ATTR_*` run, as sent; empty drops.
    #[serde(with = "hex")]
    pub actions: Vec<u8>,
    /// Packets that matched.
    pub packets: u64,
    /// Bytes that matched.
    pub bytes: u64,
    /// When a packet last matched, milliseconds of the system's monotonic clock; None if none did.
    pub used_ms: Option<u64>,
    /// Every TCP flag seen, or'd.
    pub tcp_flags: u8,
    /// Attributes this library does not know, as sent.
    #[serde(with = "hex")]
    pub unknown: Vec<u8>,
}

impl Flow {
    /// Reads an `OVS_FLOW_CMD_NEW` message, `payload` being what follows the nlmsghdr.
    ///
    /// # Errors
    /// [`crate::Error::Malformed`] if the message is cut off.
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let mut flow = Flow::default();
        let mut unknown = AttrBuf::new();
        for attr in header::parse("ovs_flow", payload)?.attrs {
            let attr = attr?;
            match attr.kind {
                ATTR_KEY => flow.key = attr.payload.to_vec(),
                ATTR_ACTIONS => flow.actions = attr.payload.to_vec(),
                ATTR_STATS => [flow.packets, flow.bytes] = attr.u64s()?,
                ATTR_TCP_FLAGS => flow.tcp_flags = attr.u8()?,
                ATTR_USED => flow.used_ms = Some(attr.u64()?),
                ATTR_MASK => flow.mask = attr.payload.to_vec(),
                ATTR_PAD => {}
                ATTR_UFID if attr.payload.len() == 16 => flow.ufid = Some(attr.fixed()?),
                _ => {
                    unknown.push_attr(&attr);
                }
            }
        }
        flow.unknown = unknown.into_bytes();
        Ok(flow)
    }

    /// The UFID as Open vSwitch writes it ([`ufid_text`]), or the key in hexadecimal where there is none.
    pub fn name(&self) -> String {
        self.ufid.as_ref().map_or_else(|| crate::bytes::encode(&self.key), ufid_text)
    }
}

/// What the kernel tells a flow by: its UFID, or its key where it was made without one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Identity {
    Ufid([u8; 16]),
    Key(Vec<u8>),
}

/// How often each flow of a datapath has matched; nothing else of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowCounts(HashMap<Identity, u64>);

impl FlowCounts {
    /// The packets that `flow` has matched; None if it is not there.
    pub fn packets(&self, flow: &Flow) -> Option<u64> {
        let identity = flow.ufid.map_or_else(|| Identity::Key(flow.key.clone()), Identity::Ufid);
        self.0.get(&identity).copied()
    }

    /// Takes in a `later` look at the same flows.
    pub fn update(&mut self, later: FlowCounts) {
        self.0.extend(later.0);
    }
}

impl FromIterator<Flow> for FlowCounts {
    fn from_iter<I: IntoIterator<Item = Flow>>(flows: I) -> Self {
        let identity = |flow: Flow| flow.ufid.map_or(Identity::Key(flow.key), Identity::Ufid);
        FlowCounts(flows.into_iter().map(|flow| (flow.packets, flow)).map(|(n, flow)| (identity(flow), n)).collect())
    }
}

/// `OVS_FLOW_CMD_GET` of every flow.
pub(crate) fn dump_all(ifindex: u32) -> Vec<u8> {
    header::build(CMD_GET, VERSION, ifindex, &[])
}

/// `OVS_FLOW_CMD_GET` of the identity and the counters of every flow: a flow without a UFID still comes with its key.
pub(crate) fn dump_counts(ifindex: u32) -> Vec<u8> {
    let mut attrs = AttrBuf::new();
    attrs.push_u32(ATTR_UFID_FLAGS, UFID_OMIT_ALL);
    header::build(CMD_GET, VERSION, ifindex, attrs.as_bytes())
}

/// A UFID as `ovs-dpctl dump-flows -m` and the logs write it: four host-order words as a UUID (`odp_format_ufid`).
pub fn ufid_text(ufid: &[u8; 16]) -> String {
    let words: Vec<String> =
        ufid.chunks_exact(4).map(|w| format!("{:08x}", u32::from_ne_bytes([w[0], w[1], w[2], w[3]]))).collect();
    let digits = words.concat();
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

/// Reads what [`ufid_text`] wrote.
///
/// # Errors
/// [`Error::Malformed`] if it is no UUID.
pub fn parse_ufid(text: &str) -> Result<[u8; 16]> {
    let wrong = || Error::malformed("UFID", format!("{text:?} is no UUID"));
    let groups: Vec<usize> = text.split('-').map(str::len).collect();
    let digits: String = text.split('-').collect();
    if groups != [8, 4, 4, 4, 12] || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    let value = u128::from_str_radix(&digits, 16).map_err(|_| wrong())?;
    let mut ufid = [0; 16];
    for (bytes, word) in ufid.chunks_exact_mut(4).zip(value.to_be_bytes().chunks_exact(4)) {
        bytes.copy_from_slice(&u32::from_be_bytes([word[0], word[1], word[2], word[3]]).to_ne_bytes());
    }
    Ok(ufid)
}

/// `OVS_FLOW_CMD_DEL` of one flow by its UFID; the answer need not repeat the flow.
pub(crate) fn delete_ufid(ifindex: u32, ufid: &[u8; 16]) -> Vec<u8> {
    let mut attrs = AttrBuf::new();
    // The freeze and OVS look at the first attribute only: it is the UFID (dpif-netlink.c does the same).
    attrs.push(ATTR_UFID, ufid).push_u32(ATTR_UFID_FLAGS, UFID_OMIT_ALL);
    header::build(CMD_DEL, VERSION, ifindex, attrs.as_bytes())
}

/// `OVS_FLOW_CMD_DEL` of one flow by its key, for flows without a UFID.
///
/// The key attribute is always there, even if it is empty (which the kernel refuses): a DEL that names no flow at
/// all would empty the whole table.
pub(crate) fn delete_key(ifindex: u32, key: &[u8]) -> Result<Vec<u8>> {
    let mut attrs = AttrBuf::new();
    attrs.try_push(ATTR_KEY | NLA_F_NESTED, key)?;
    Ok(header::build(CMD_DEL, VERSION, ifindex, attrs.as_bytes()))
}

/// UFIDs in JSON, as Open vSwitch writes them.
mod ufid_serde {
    use serde::{de::Error as _, Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(ufid: &Option<[u8; 16]>, to: S) -> Result<S::Ok, S::Error> {
        match ufid {
            Some(ufid) => to.serialize_some(&super::ufid_text(ufid)),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<[u8; 16]>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| super::parse_ufid(&text)).transpose().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{bytes_of, mixed, unknown};
    use super::*;
    use crate::netlink::attr::Attrs;

    fn run() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..20)), 0..6)
            .prop_map(|a| bytes_of(&a))
    }

    proptest! {
        #[test]
        fn nothing_is_lost(ufid: Option<[u8; 16]>, key in run(), mask in run(), actions in run(), packets: u64, bytes: u64, used_ms: Option<u64>, tcp_flags: u8, other in unknown()) {
            let mut attrs = AttrBuf::new();
            ufid.map(|ufid| attrs.push(ATTR_UFID, &ufid).as_bytes().len());
            attrs.push(ATTR_KEY | NLA_F_NESTED, &key).push(ATTR_MASK | NLA_F_NESTED, &mask).push(ATTR_PAD, &[]);
            attrs.push(ATTR_STATS, &[packets, bytes].map(u64::to_ne_bytes).concat()).push(ATTR_TCP_FLAGS, &[tcp_flags]);
            used_ms.map(|ms| attrs.push(ATTR_USED, &ms.to_ne_bytes()).as_bytes().len());
            attrs.push(ATTR_ACTIONS | NLA_F_NESTED, &actions);
            let expected = Flow { ufid, key, mask, actions, packets, bytes, used_ms, tcp_flags, unknown: bytes_of(&other) };
            let read = Flow::parse(&mixed(1, 5, &attrs, &other)).unwrap();
            prop_assert_eq!(&read, &expected);
            let json = serde_json::to_string(&read).unwrap();
            prop_assert_eq!(serde_json::from_str::<Flow>(&json).unwrap(), expected);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..160)) {
            let _ = Flow::parse(&bytes);
        }

        #[test]
        fn ufids_are_read_as_written(ufid: [u8; 16]) {
            prop_assert_eq!(parse_ufid(&ufid_text(&ufid)).unwrap(), ufid);
        }

        #[test]
        fn any_text_is_read_as_ufid_without_panic(text in ".{0,40}") {
            let _ = parse_ufid(&text);
        }
    }

    /// From a VM: what `ovs-dpctl dump-flows -m` wrote, and the bytes of the kernel (little-endian).
    #[test]
    #[cfg(target_endian = "little")]
    fn ufids_are_written_as_open_vswitch_does() {
        let bytes = 0xc194c301_68491566_ec38c8b5_c88edaca_u128.to_be_bytes();
        assert_eq!(ufid_text(&bytes), "01c394c1-6615-4968-b5c8-38eccada8ec8");
        for wrong in ["", "01c394c1-6615-4968-b5c8-38eccada8ec", "01c394c1-6615-4968-b5c8-38eccada8ecg", "é"] {
            assert!(parse_ufid(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_short_ufid_is_kept_as_unknown() {
        let mut attrs = AttrBuf::new();
        attrs.push(ATTR_UFID, &[1, 2, 3, 4]);
        let flow = Flow::parse(&header::build(1, 1, 5, attrs.as_bytes())).unwrap();
        assert_eq!((flow.ufid, flow.unknown), (None, attrs.into_bytes()));
    }

    #[test]
    fn counts_are_found_by_ufid_and_else_by_key() {
        let named = Flow { ufid: Some([1; 16]), key: vec![7], packets: 3, ..Flow::default() };
        let keyed = Flow { ufid: None, key: vec![8], packets: 5, ..Flow::default() };
        // As the kernel answers a dump of counts: no key beside a UFID, no mask, no actions.
        let counts: FlowCounts = [Flow { key: vec![], ..named.clone() }, keyed.clone()].into_iter().collect();
        assert_eq!((counts.packets(&named), counts.packets(&Flow { mask: vec![1], ..keyed })), (Some(3), Some(5)));
        assert_eq!(counts.packets(&Flow { key: vec![7], ..Flow::default() }), None);
    }

    /// A DEL that names no flow empties the table.
    #[test]
    fn a_delete_always_names_a_flow() {
        let attrs = |message: &[u8]| -> Vec<u16> { Attrs(&message[header::LEN..]).map(|a| a.unwrap().kind).collect() };
        assert_eq!(attrs(&delete_ufid(5, &[0; 16])), [ATTR_UFID, ATTR_UFID_FLAGS]);
        assert_eq!(attrs(&delete_key(5, &[]).unwrap()), [ATTR_KEY]);
        assert!(delete_key(5, &vec![0; 70_000]).is_err());
    }
}

//! Packets on their way between kernel and user space: family `ovs_packet`.

use super::header;
use crate::error::{Error, Result};
use crate::netlink::attr::{AttrBuf, NLA_F_NESTED};

// enum ovs_packet_cmd
const VERSION: u8 = 1; // OVS_PACKET_VERSION
const CMD_MISS: u8 = 1;
const CMD_ACTION: u8 = 2;
const CMD_EXECUTE: u8 = 3;
// enum ovs_packet_attr
const ATTR_PACKET: u16 = 1;
const ATTR_KEY: u16 = 2;
const ATTR_ACTIONS: u16 = 3;
const ATTR_USERDATA: u16 = 4;
const ATTR_EGRESS_TUN_KEY: u16 = 5;
const ATTR_MRU: u16 = 9;
const ATTR_LEN: u16 = 10;
const ATTR_HASH: u16 = 11;

/// Why the kernel sent a packet up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UpcallKind {
    /// `OVS_PACKET_CMD_MISS`: no flow matched.
    Miss,
    /// `OVS_PACKET_CMD_ACTION`: a flow's `OVS_ACTION_ATTR_USERSPACE`.
    Action,
}

/// A packet the kernel sent up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upcall {
    /// Why.
    pub kind: UpcallKind,
    /// The datapath.
    pub ifindex: u32,
    /// From the start of the Ethernet header.
    pub packet: Vec<u8>,
    /// `OVS_KEY_ATTR_*` run, as sent.
    pub key: Vec<u8>,
    /// What the action put in `OVS_USERSPACE_ATTR_USERDATA` (the cookie of OVS).
    pub userdata: Option<Vec<u8>>,
    /// `OVS_ACTION_ATTR_*` run of the flow, where the action asked for it.
    pub actions: Option<Vec<u8>>,
    /// `OVS_TUNNEL_KEY_ATTR_*` run of the output tunnel, where the action asked for it.
    pub egress_tun_key: Option<Vec<u8>>,
    /// Longest fragment received, bytes; to be given back on execution.
    pub mru: Option<u16>,
    /// Length of the packet before it was truncated, bytes.
    pub len: Option<u32>,
    /// Hash of the packet; to be given back on execution.
    pub hash: Option<u64>,
    /// Attributes this library does not know, as sent.
    pub unknown: Vec<u8>,
}

impl Upcall {
    /// Reads a message from an upcall socket, `payload` being what follows the nlmsghdr. It may end unaligned
    /// (`OVS_DP_F_UNALIGNED`).
    ///
    /// # Errors
    /// [`Error::Malformed`] if it is cut off, is no upcall, or has no packet or key.
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let message = header::parse("ovs_packet", payload)?;
        let kind = match message.command {
            CMD_MISS => UpcallKind::Miss,
            CMD_ACTION => UpcallKind::Action,
            other => return Err(Error::malformed("ovs_packet", format!("command {other} is no upcall"))),
        };
        let (mut packet, mut key) = (None, None);
        let (mut userdata, mut actions, mut egress_tun_key) = (None, None, None);
        let (mut mru, mut len, mut hash) = (None, None, None);
        let mut unknown = AttrBuf::new();
        for attr in message.attrs {
            let attr = attr?;
            match attr.kind {
                ATTR_PACKET => packet = Some(attr.payload.to_vec()),
                ATTR_KEY => key = Some(attr.payload.to_vec()),
                ATTR_ACTIONS => actions = Some(attr.payload.to_vec()),
                ATTR_USERDATA => userdata = Some(attr.payload.to_vec()),
                ATTR_EGRESS_TUN_KEY => egress_tun_key = Some(attr.payload.to_vec()),
                ATTR_MRU => mru = Some(attr.u16()?),
                ATTR_LEN => len = Some(attr.u32()?),
                ATTR_HASH => hash = Some(attr.u64()?),
                _ => {
                    unknown.push_attr(&attr);
                }
            }
        }
        let missing = |name: &str| Error::malformed("ovs_packet", format!("no {name}"));
        Ok(Upcall {
            kind,
            ifindex: message.ifindex,
            packet: packet.ok_or_else(|| missing("packet"))?,
            key: key.ok_or_else(|| missing("key"))?,
            userdata,
            actions,
            egress_tun_key,
            mru,
            len,
            hash,
            unknown: unknown.into_bytes(),
        })
    }
}

/// `OVS_PACKET_CMD_EXECUTE`: actions to be applied to a packet. Metadata is taken from the key; the headers are
/// parsed again from the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Execute<'a> {
    /// From the start of the Ethernet header.
    pub packet: &'a [u8],
    /// `OVS_KEY_ATTR_*` run.
    pub key: &'a [u8],
    /// `OVS_ACTION_ATTR_*` run.
    pub actions: &'a [u8],
    /// As it came with the upcall.
    pub mru: Option<u16>,
    /// As it came with the upcall.
    pub hash: Option<u64>,
}

impl Execute<'_> {
    /// The message for datapath `ifindex`: what follows the nlmsghdr.
    ///
    /// # Errors
    /// [`Error::Malformed`] if packet, key or actions are longer than an attribute can be.
    pub fn build(&self, ifindex: u32) -> Result<Vec<u8>> {
        let mut attrs = AttrBuf::new();
        attrs.try_push(ATTR_PACKET, self.packet)?;
        attrs.try_push(ATTR_KEY | NLA_F_NESTED, self.key)?;
        attrs.try_push(ATTR_ACTIONS | NLA_F_NESTED, self.actions)?;
        if let Some(mru) = self.mru {
            attrs.push(ATTR_MRU, &mru.to_ne_bytes());
        }
        if let Some(hash) = self.hash {
            attrs.push(ATTR_HASH, &hash.to_ne_bytes());
        }
        Ok(header::build(CMD_EXECUTE, VERSION, ifindex, attrs.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{bytes_of, mixed, unknown};
    use super::*;

    fn payload() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..50)
    }

    proptest! {
        #[test]
        fn nothing_is_lost(action: bool, packet in payload(), key in payload(), userdata in prop::option::of(payload()), actions in prop::option::of(payload()), tunnel in prop::option::of(payload()), mru: Option<u16>, len: Option<u32>, hash: Option<u64>, other in unknown()) {
            let mut attrs = AttrBuf::new();
            attrs.push(ATTR_KEY | NLA_F_NESTED, &key);
            let optional = [
                (ATTR_USERDATA, userdata.clone()),
                (ATTR_ACTIONS | NLA_F_NESTED, actions.clone()),
                (ATTR_EGRESS_TUN_KEY | NLA_F_NESTED, tunnel.clone()),
                (ATTR_MRU, mru.map(|v| v.to_ne_bytes().to_vec())),
                (ATTR_LEN, len.map(|v| v.to_ne_bytes().to_vec())),
                (ATTR_HASH, hash.map(|v| v.to_ne_bytes().to_vec())),
            ];
            for (kind, payload) in &optional {
                payload.iter().for_each(|p| { attrs.push(*kind, p); });
            }
            attrs.push(ATTR_PACKET, &packet);
            let kind = if action { UpcallKind::Action } else { UpcallKind::Miss };
            let expected = Upcall {
                kind, ifindex: 5, packet: packet.clone(), key, userdata, actions, egress_tun_key: tunnel, mru, len, hash,
                unknown: bytes_of(&other),
            };
            let command = if action { CMD_ACTION } else { CMD_MISS };
            prop_assert_eq!(&Upcall::parse(&mixed(command, 5, &attrs, &other)).unwrap(), &expected);
            // With OVS_DP_F_UNALIGNED the kernel leaves out the padding behind the packet, which comes last.
            if other.is_empty() {
                let mut message = mixed(command, 5, &attrs, &other);
                message.truncate(message.len() - (4 - packet.len() % 4) % 4);
                prop_assert_eq!(&Upcall::parse(&message).unwrap(), &expected);
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..160)) {
            let _ = Upcall::parse(&bytes);
            if let Some(command) = bytes.first_mut() {
                *command = CMD_MISS;
            }
            let _ = Upcall::parse(&bytes);
        }

        #[test]
        fn an_execution_says_what_it_was_given(packet in payload(), key in payload(), actions in payload(), mru: Option<u16>, hash: Option<u64>) {
            let message = Execute { packet: &packet, key: &key, actions: &actions, mru, hash }.build(7).unwrap();
            let read = header::parse("it", &message).unwrap();
            prop_assert_eq!((read.command, read.ifindex), (CMD_EXECUTE, 7));
            let value = |kind| read.attrs.find(kind).unwrap();
            prop_assert_eq!(value(ATTR_PACKET).unwrap().payload, &packet[..]);
            prop_assert_eq!(value(ATTR_KEY).unwrap().payload, &key[..]);
            prop_assert_eq!(value(ATTR_ACTIONS).unwrap().payload, &actions[..]);
            prop_assert_eq!(value(ATTR_MRU).map(|a| a.u16().unwrap()), mru);
            prop_assert_eq!(value(ATTR_HASH).map(|a| a.u64().unwrap()), hash);
        }
    }

    #[test]
    fn an_execution_is_no_upcall_and_a_long_packet_no_execution() {
        let packet = vec![0; 70_000];
        let execute = Execute { packet: &packet[..60], key: &[], actions: &[], mru: None, hash: None };
        assert!(Upcall::parse(&execute.build(5).unwrap()).is_err());
        assert!(Execute { packet: &packet, ..execute }.build(5).is_err());
    }
}

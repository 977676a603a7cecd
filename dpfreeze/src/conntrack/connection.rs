//! Tracked connections, looked up one by one: nfnetlink subsystem 1 (include/uapi/linux/netfilter/nfnetlink_conntrack.h).

use nix::errno::Errno;

use super::tuple::Tuple;
use crate::error::{Error, Result};
use crate::netlink::attr::{AttrBuf, Attrs};
use crate::netlink::{Protocol, Socket};

const GET: u16 = 1 << 8 | 1; // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
                             // enum ctattr_type
const ATTR_TUPLE_ORIG: u16 = 1;
const ATTR_TUPLE_REPLY: u16 = 2;
const ATTR_STATUS: u16 = 3;
const ATTR_HELP: u16 = 5;
const ATTR_ID: u16 = 12;
const ATTR_SEQ_ADJ_ORIG: u16 = 15;
const ATTR_SEQ_ADJ_REPLY: u16 = 16;
const ATTR_ZONE: u16 = 18;

/// A connection as the kernel tracks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Packets in the direction of the first one, as they were before any translation.
    pub original: Tuple,
    /// Packets of the other direction, as they are before any translation.
    pub reply: Tuple,
    /// `CTA_ZONE`; the kernel leaves out zone 0.
    pub zone: u16,
    /// `CTA_STATUS`: `IPS_*` bits.
    pub status: u32,
    /// `CTA_ID`
    pub id: Option<u32>,
    /// A helper, or an adjustment of sequence numbers: packets may have been changed beyond their tuple.
    pub helped: bool,
    /// Attributes this library does not know, as sent.
    pub unknown: Vec<u8>,
}

impl Connection {
    /// Reads an `IPCTNL_MSG_CT_NEW` message, `payload` being what follows the nlmsghdr; None for a protocol that has
    /// no ports and no queries.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the message is cut off or lacks a tuple.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>> {
        let what = "conntrack entry";
        let (_, attrs) =
            payload.split_first_chunk::<4>().ok_or_else(|| Error::malformed(what, "shorter than struct nfgenmsg"))?;
        let (mut original, mut reply) = (None, None);
        let (mut zone, mut status, mut id, mut helped) = (0, 0, None, false);
        let mut unknown = AttrBuf::new();
        for attr in Attrs(attrs) {
            let attr = attr?;
            match attr.kind {
                ATTR_TUPLE_ORIG => original = Some(Tuple::parse(attr.payload)?),
                ATTR_TUPLE_REPLY => reply = Some(Tuple::parse(attr.payload)?),
                ATTR_STATUS => status = attr.be32()?,
                ATTR_ZONE => zone = attr.be16()?,
                ATTR_ID => id = Some(attr.be32()?),
                ATTR_HELP | ATTR_SEQ_ADJ_ORIG | ATTR_SEQ_ADJ_REPLY => {
                    helped = true;
                    unknown.push_attr(&attr);
                }
                _ => {
                    unknown.push_attr(&attr);
                }
            }
        }
        let missing = |name: &str| Error::malformed(what, format!("no {name} tuple"));
        let both = original.ok_or_else(|| missing("original"))?.zip(reply.ok_or_else(|| missing("reply"))?);
        Ok(both.map(|(original, reply)| {
            let unknown = unknown.into_bytes();
            Connection { original, reply, zone, status, id, helped, unknown }
        }))
    }

    /// The other direction of `tuple`, as it is before any translation; None if `tuple` is neither direction.
    pub fn opposite(&self, tuple: &Tuple) -> Option<Tuple> {
        match *tuple {
            t if t == self.reply => Some(self.original),
            t if t == self.original => Some(self.reply),
            _ => None,
        }
    }
}

/// Where connections are looked up: the kernel's table, or one of a test.
pub trait Connections {
    /// The connection of `zone` of which `tuple` is one direction.
    ///
    /// # Errors
    /// The table cannot be asked.
    fn find(&mut self, zone: u16, tuple: &Tuple) -> Result<Option<Connection>>;
}

/// The connections of this network namespace.
#[derive(Debug)]
pub struct KernelConnections(Socket);

impl KernelConnections {
    /// Opens a socket, and asks once, which makes the kernel load nf_conntrack_netlink where it is a module.
    ///
    /// # Errors
    /// As [`Socket::open`]; the errno of a kernel without connection tracking.
    pub fn open() -> Result<Self> {
        let mut connections = KernelConnections(Socket::open(Protocol::Netfilter)?);
        let nobody = std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        let transport = super::tuple::Transport::Ports { src: 0, dst: 0 };
        let tuple = Tuple { src: nobody, dst: nobody, protocol: super::tuple::protocol::UDP, transport };
        connections.find(0, &tuple)?;
        Ok(connections)
    }
}

impl Connections for KernelConnections {
    fn find(&mut self, zone: u16, tuple: &Tuple) -> Result<Option<Connection>> {
        match self.0.request("look-up of a connection", GET, 0, &question(zone, tuple)) {
            Ok(answers) => answers.first().map_or(Ok(None), |payload| Connection::parse(payload)),
            Err(Error::Netlink { errno: Errno::ENOENT, .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// The look-up finds a connection by either direction (`nf_conntrack_find_get`).
fn question(zone: u16, tuple: &Tuple) -> Vec<u8> {
    let mut attrs = AttrBuf::new();
    attrs.push_nested(ATTR_TUPLE_ORIG, &tuple.build());
    attrs.push(ATTR_ZONE, &zone.to_be_bytes());
    // struct nfgenmsg: family, NFNETLINK_V0, be16 resource id
    [&[tuple.family(), 0, 0, 0], attrs.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tuple::tests::tuple;
    use super::*;
    use crate::ovs::testing::{bytes_of, unknown};

    proptest! {
        #[test]
        fn nothing_is_lost(original in tuple(), reply in tuple(), zone: u16, status: u32, id: u32, other in unknown()) {
            let mut attrs = AttrBuf::new();
            attrs.push_nested(ATTR_TUPLE_ORIG, &original.build()).push_nested(ATTR_TUPLE_REPLY, &reply.build());
            attrs.push(ATTR_STATUS, &status.to_be_bytes()).push(ATTR_ID, &id.to_be_bytes());
            attrs.push(ATTR_ZONE, &zone.to_be_bytes());
            let message = [&[2, 0, 0, 0], attrs.as_bytes(), &bytes_of(&other)].concat();
            let expected = Connection {
                original, reply, zone, status, id: Some(id), helped: false, unknown: bytes_of(&other),
            };
            let read = Connection::parse(&message).unwrap().unwrap();
            prop_assert_eq!(&read, &expected);
            prop_assert_eq!(read.opposite(&reply), Some(original));
        }

        #[test]
        fn a_question_holds_tuple_and_zone(tuple in tuple(), zone: u16) {
            let message = question(zone, &tuple);
            let attrs = Attrs(&message[4..]);
            prop_assert_eq!(message[0], tuple.family());
            let nest = attrs.find(ATTR_TUPLE_ORIG).unwrap().unwrap();
            prop_assert_eq!(Tuple::parse(nest.payload).unwrap(), Some(tuple));
            prop_assert_eq!(attrs.find(ATTR_ZONE).unwrap().unwrap().be16().unwrap(), zone);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..160)) {
            let _ = Connection::parse(&bytes);
        }
    }
}

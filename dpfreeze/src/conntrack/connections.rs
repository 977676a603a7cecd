//! Lists of connections: nfnetlink subsystem 1 (include/uapi/linux/netfilter/nfnetlink_conntrack.h). Read, never
//! changed.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use super::tuple::Tuple;
use crate::error::{Error, Result};
use crate::netlink::attr::{AttrBuf, Attrs};
use crate::netlink::{Protocol, Socket};

const SUBSYSTEM: u16 = 1; // NFNL_SUBSYS_CTNETLINK, linux/netfilter/nfnetlink.h
const GET: u16 = SUBSYSTEM << 8 | 1; // IPCTNL_MSG_CT_GET

// enum ctattr_type
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOINFO: u16 = 4;
const TIMEOUT: u16 = 7;
const MARK: u16 = 8;
const ID: u16 = 12;
const ZONE: u16 = 18;
const LABELS: u16 = 22;
// enum ctattr_tuple, enum ctattr_l4proto
const TUPLE_PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
// enum ctattr_protoinfo, enum ctattr_protoinfo_tcp
const PROTOINFO_TCP: u16 = 1;
const TCP_STATE: u16 = 1;
/// `struct nfgenmsg`: u8 family (AF_UNSPEC: both), u8 version (NFNETLINK_V0), be16 resource id.
const NFGENMSG: [u8; 4] = [0; 4];

bitflags::bitflags! {
    /// `enum ip_conntrack_status` (include/uapi/linux/netfilter/nf_conntrack_common.h).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Status: u32 {
        /// Packets were seen in both directions.
        const SEEN_REPLY = 1 << 1;
        /// Not dropped early when the table is full.
        const ASSURED = 1 << 2;
        /// In the table.
        const CONFIRMED = 1 << 3;
        /// The source address is translated.
        const SRC_NAT = 1 << 4;
        /// The destination address is translated.
        const DST_NAT = 1 << 5;
        // Others are kept as they are.
        const _ = !0;
    }
}

/// A connection as a list of them tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedConnection {
    /// `CTA_ID`: stays the same as long as the connection lives.
    pub id: u32,
    /// Layer 3 protocol, an `AF_*` number (2 IPv4, 10 IPv6).
    pub l3: u16,
    /// Layer 4 protocol, an `IPPROTO_*` number.
    pub l4: u8,
    /// Its zone.
    pub zone: u16,
    /// What its first packet had; None for a protocol that has neither ports nor queries.
    pub original: Option<Tuple>,
    /// What answers have. Translated where it is not the inverse of `original`.
    pub reply: Option<Tuple>,
    /// Status bits.
    pub status: Status,
    /// Seconds until it is forgotten.
    pub timeout: Option<u32>,
    /// State of TCP (`enum tcp_conntrack`: 3 established).
    pub tcp_state: Option<u8>,
    /// Mark; 0 is none.
    pub mark: u32,
    /// Labels, as sent (16 bytes), empty where there are none.
    pub labels: Vec<u8>,
}

impl ListedConnection {
    /// Reads an `IPCTNL_MSG_CT_NEW` message, `payload` being what follows the nlmsghdr. Counters, timestamps and
    /// helpers are left out.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the message is cut off or has no tuple or id.
    pub fn parse(payload: &[u8]) -> Result<ListedConnection> {
        let attrs = body(payload)?;
        let l3 = payload.first().copied().unwrap_or_default().into();
        let mut read = Read { l3, ..Read::default() };
        for attr in attrs {
            let attr = attr?;
            match attr.kind {
                TUPLE_ORIG => {
                    read.l4 = Some(protocol(attr.nested())?);
                    read.original = Tuple::parse(attr.payload)?;
                }
                TUPLE_REPLY => read.reply = Tuple::parse(attr.payload)?,
                STATUS => read.status = Status::from_bits_retain(attr.be32()?),
                PROTOINFO => read.tcp_state = tcp_state(attr.nested())?,
                TIMEOUT => read.timeout = Some(attr.be32()?),
                MARK => read.mark = attr.be32()?,
                ID => read.id = Some(attr.be32()?),
                ZONE => read.zone = attr.be16()?,
                LABELS => read.labels = attr.payload.to_vec(),
                _ => {}
            }
        }
        read.whole()
    }

    /// Whether addresses or ports are translated.
    pub fn has_nat(&self) -> bool {
        self.status.intersects(Status::SRC_NAT | Status::DST_NAT)
    }
}

/// What has been read of a message.
#[derive(Default)]
struct Read {
    id: Option<u32>,
    l3: u16,
    l4: Option<u8>,
    zone: u16,
    original: Option<Tuple>,
    reply: Option<Tuple>,
    status: Status,
    timeout: Option<u32>,
    tcp_state: Option<u8>,
    mark: u32,
    labels: Vec<u8>,
}

impl Read {
    fn whole(self) -> Result<ListedConnection> {
        let missing = |what: &str| Error::malformed("connection", format!("has no {what}"));
        Ok(ListedConnection {
            id: self.id.ok_or_else(|| missing("id"))?,
            l3: self.l3,
            l4: self.l4.ok_or_else(|| missing("original tuple"))?,
            zone: self.zone,
            original: self.original,
            reply: self.reply,
            status: self.status,
            timeout: self.timeout,
            tcp_state: self.tcp_state,
            mark: self.mark,
            labels: self.labels,
        })
    }
}

fn body(payload: &[u8]) -> Result<Attrs<'_>> {
    let (_, attrs) = payload
        .split_first_chunk::<4>()
        .ok_or_else(|| Error::malformed("connection", "shorter than struct nfgenmsg"))?;
    Ok(Attrs(attrs))
}

/// The number of the layer 4 protocol in a tuple, which every tuple has.
fn protocol(tuple: Attrs<'_>) -> Result<u8> {
    let missing = || Error::malformed("connection", "its tuple has no protocol");
    tuple.find(TUPLE_PROTO)?.ok_or_else(missing)?.nested().find(PROTO_NUM)?.ok_or_else(missing)?.u8()
}

fn tcp_state(protoinfo: Attrs<'_>) -> Result<Option<u8>> {
    match protoinfo.find(PROTOINFO_TCP)? {
        Some(tcp) => tcp.nested().find(TCP_STATE)?.map(|attr| attr.u8()).transpose(),
        None => Ok(None),
    }
}

/// Goes through the connections of `zones` (of all zones where None) in this network namespace and gives each to
/// `each`, with a result that is made `fresh` for every try. Nothing else of the table is kept. What is made or ends
/// meanwhile may be seen or not; after a resize of the kernel's table meanwhile, so may be any.
///
/// # Errors
/// As [`Socket::dump`]; [`Error::Unsupported`] where the kernel does not tell; [`Error::Malformed`]; those of `each`.
pub fn for_each_connection<S>(
    zones: Option<&BTreeSet<u16>>,
    fresh: impl Fn() -> S,
    mut each: impl FnMut(&mut S, ListedConnection) -> Result<()>,
) -> Result<S> {
    let what = "dump of the connections";
    let answer = Socket::open(Protocol::Netfilter)?.dump_each(what, GET, &ask(zones), fresh, |result, payload| {
        if zones.is_some_and(|zones| !zones.contains(&zone_of(payload).unwrap_or_default())) {
            return Ok(());
        }
        each(result, ListedConnection::parse(payload)?)
    });
    answered(what, answer)
}

/// How many connections there are, by zone; zones without one are left out.
///
/// # Errors
/// As [`for_each_connection`].
pub fn count_by_zone() -> Result<BTreeMap<u16, u64>> {
    let what = "count of the connections";
    let fresh = BTreeMap::new;
    answered(
        what,
        Socket::open(Protocol::Netfilter)?.dump_each(what, GET, &ask(None), fresh, |counts, payload| {
            *counts.entry(zone_of(payload)?).or_default() += 1;
            Ok(())
        }),
    )
}

/// nfnetlink says EINVAL to a subsystem that it does not have and cannot load.
fn answered<T>(what: &str, answer: Result<T>) -> Result<T> {
    match answer {
        Err(Error::Netlink { errno: Errno::EINVAL, .. }) => Err(Error::Unsupported {
            what: what.into(),
            why: "the kernel has no nf_conntrack_netlink".into(),
            remedy: "load it with `modprobe nf_conntrack_netlink`".into(),
        }),
        answer => answer,
    }
}

/// Asks for one zone where it is one: Linux 6.8 and later then send no other, earlier ones ignore it.
fn ask(zones: Option<&BTreeSet<u16>>) -> Vec<u8> {
    let mut attrs = AttrBuf::new();
    if let Some(zone) = zones.filter(|zones| zones.len() == 1).and_then(|zones| zones.first()) {
        attrs.push(ZONE, &zone.to_be_bytes());
    }
    [&NFGENMSG, attrs.as_bytes()].concat()
}

/// The zone alone: most of a table is in others, and need not be read.
fn zone_of(payload: &[u8]) -> Result<u16> {
    body(payload)?.find(ZONE)?.map_or(Ok(0), |attr| attr.be16())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::super::tuple::tests::tuple;
    use super::super::tuple::Transport;
    use super::*;
    use crate::ovs::testing::{bytes_of, unknown};

    fn message(connection: &ListedConnection, original: &AttrBuf, reply: &AttrBuf) -> Vec<u8> {
        let mut attrs = AttrBuf::new();
        attrs.push_nested(TUPLE_ORIG, original).push_nested(TUPLE_REPLY, reply);
        attrs.push(STATUS, &connection.status.bits().to_be_bytes()).push(ID, &connection.id.to_be_bytes());
        attrs.push(MARK, &connection.mark.to_be_bytes());
        if connection.zone != 0 {
            attrs.push(ZONE, &connection.zone.to_be_bytes());
        }
        if let Some(timeout) = connection.timeout {
            attrs.push(TIMEOUT, &timeout.to_be_bytes());
        }
        if let Some(state) = connection.tcp_state {
            let mut tcp = AttrBuf::new();
            tcp.push(TCP_STATE, &[state]);
            let mut protoinfo = AttrBuf::new();
            protoinfo.push_nested(PROTOINFO_TCP, &tcp);
            attrs.push_nested(PROTOINFO, &protoinfo);
        }
        if !connection.labels.is_empty() {
            attrs.push(LABELS, &connection.labels);
        }
        [&[connection.l3 as u8, 0, 0, 0], attrs.as_bytes()].concat()
    }

    proptest! {
        #[test]
        fn what_the_kernel_tells_is_read(
            original in tuple(), numbers: (u32, u16, u32, u32), timeout: Option<u32>, tcp_state: Option<u8>,
            labels in prop_oneof![Just(vec![]), prop::collection::vec(any::<u8>(), 16)], other in unknown(),
        ) {
            let (id, zone, status, mark) = numbers;
            let reply = original.inverse();
            let expected = ListedConnection {
                id, l3: original.family().into(), l4: original.protocol, zone, original: Some(original),
                reply: Some(reply), status: Status::from_bits_retain(status), timeout, tcp_state, mark, labels,
            };
            let mut bytes = message(&expected, &original.build(), &reply.build());
            bytes.extend_from_slice(&bytes_of(&other));
            prop_assert_eq!(zone_of(&bytes).unwrap(), zone);
            prop_assert_eq!(ListedConnection::parse(&bytes).unwrap(), expected);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = ListedConnection::parse(&bytes);
            let _ = zone_of(&bytes);
        }
    }

    #[test]
    fn one_zone_is_asked_for_and_more_are_not() {
        assert_eq!(ask(None), NFGENMSG);
        assert_eq!(ask(Some(&BTreeSet::from([5, 6]))), NFGENMSG);
        assert_eq!(ask(Some(&BTreeSet::from([5]))), [0, 0, 0, 0, 6, 0, 18, 0, 0, 5, 0, 0]);
    }

    fn udp() -> (ListedConnection, Tuple) {
        let tuple = Tuple {
            src: Ipv4Addr::new(10, 0, 0, 1).into(),
            dst: Ipv4Addr::new(10, 0, 0, 2).into(),
            protocol: 17,
            transport: Transport::Ports { src: 1, dst: 2 },
        };
        let connection = ListedConnection {
            id: 7,
            l3: 2,
            l4: 17,
            zone: 5,
            original: Some(tuple),
            reply: Some(tuple.inverse()),
            status: Status::CONFIRMED,
            timeout: None,
            tcp_state: None,
            mark: 0,
            labels: Vec::new(),
        };
        (connection, tuple)
    }

    #[test]
    fn a_translated_connection_is_known_by_its_status() {
        let (connection, tuple) = udp();
        assert!(!connection.has_nat());
        let mut cut = message(&connection, &tuple.build(), &tuple.build());
        assert!(ListedConnection { status: Status::SRC_NAT, ..connection }.has_nat());
        cut.truncate(40);
        assert!(ListedConnection::parse(&cut).is_err());
    }

    /// Of GRE without a key and of everything generic the kernel sends addresses and a number.
    #[test]
    fn a_connection_without_ports_is_known_by_its_protocol() {
        let (mut connection, tuple) = udp();
        let mut proto = AttrBuf::new();
        proto.push(PROTO_NUM, &[47]);
        let mut nest = AttrBuf::new();
        for attr in Attrs(tuple.build().as_bytes()).map(|attr| attr.unwrap()) {
            match attr.kind {
                TUPLE_PROTO => nest.push_nested(TUPLE_PROTO, &proto),
                _ => nest.push_attr(&attr),
            };
        }
        (connection.l4, connection.original, connection.reply) = (47, None, None);
        assert_eq!(ListedConnection::parse(&message(&connection, &nest, &nest)).unwrap(), connection);
    }
}

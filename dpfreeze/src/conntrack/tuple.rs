//! The tuple by which connection tracking knows one direction of a connection.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::error::{Error, Result};
use crate::netlink::attr::{AttrBuf, Attrs};

// enum ctattr_tuple, enum ctattr_ip, enum ctattr_l4proto (include/uapi/linux/netfilter/nfnetlink_conntrack.h)
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const IP_V4_SRC: u16 = 1;
const IP_V4_DST: u16 = 2;
const IP_V6_SRC: u16 = 3;
const IP_V6_DST: u16 = 4;
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;
const PROTO_ICMP_ID: u16 = 4;
const PROTO_ICMP_TYPE: u16 = 5;
const PROTO_ICMP_CODE: u16 = 6;
const PROTO_ICMPV6_ID: u16 = 7;
const PROTO_ICMPV6_TYPE: u16 = 8;
const PROTO_ICMPV6_CODE: u16 = 9;

/// `IPPROTO_*` numbers whose packets can be rewritten.
pub mod protocol {
    #![allow(missing_docs)]
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
}

/// What tells the connections between two addresses apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Ports of TCP, UDP or SCTP.
    Ports {
        /// Source.
        src: u16,
        /// Destination.
        dst: u16,
    },
    /// A query of ICMP or ICMPv6, or its answer.
    Query {
        /// Identifier.
        id: u16,
        /// Type, for example 8 (echo request).
        kind: u8,
        /// Code.
        code: u8,
    },
}

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Where its packets come from.
    pub src: IpAddr,
    /// Where they go.
    pub dst: IpAddr,
    /// `IPPROTO_*`
    pub protocol: u8,
    /// Ports, or what ICMP has instead.
    pub transport: Transport,
}

/// Types of ICMP queries and of their answers (net/netfilter/nf_conntrack_proto_icmp.c, `invmap`).
const ICMP_PAIRS: [(u8, u8); 4] = [(8, 0), (13, 14), (15, 16), (17, 18)];
/// The same for ICMPv6 (net/netfilter/nf_conntrack_proto_icmpv6.c).
const ICMPV6_PAIRS: [(u8, u8); 2] = [(128, 129), (139, 140)];

/// The type that answers `kind`, or that `kind` answers; None where connection tracking knows no such query.
pub fn answering_type(protocol: u8, kind: u8) -> Option<u8> {
    let pairs: &[(u8, u8)] = match protocol {
        protocol::ICMP => &ICMP_PAIRS,
        protocol::ICMPV6 => &ICMPV6_PAIRS,
        _ => &[],
    };
    pairs.iter().find_map(|(query, answer)| match kind {
        k if k == *query => Some(*answer),
        k if k == *answer => Some(*query),
        _ => None,
    })
}

impl Tuple {
    /// The tuple of packets that go the other way.
    pub fn inverse(&self) -> Tuple {
        let transport = match self.transport {
            Transport::Ports { src, dst } => Transport::Ports { src: dst, dst: src },
            Transport::Query { id, kind, code } => {
                Transport::Query { id, kind: answering_type(self.protocol, kind).unwrap_or(kind), code }
            }
        };
        Tuple { src: self.dst, dst: self.src, protocol: self.protocol, transport }
    }

    /// `AF_INET` or `AF_INET6`
    pub fn family(&self) -> u8 {
        match self.src {
            IpAddr::V4(_) => libc::AF_INET as u8,
            IpAddr::V6(_) => libc::AF_INET6 as u8,
        }
    }

    /// Reads a `CTA_TUPLE_*` nest; None for a protocol that has no ports and no queries.
    ///
    /// # Errors
    /// [`Error::Malformed`] if addresses or the protocol's fields are missing.
    pub fn parse(nest: &[u8]) -> Result<Option<Tuple>> {
        let missing = |what: &str| Error::malformed("conntrack tuple", format!("no {what}"));
        let ip = Attrs(nest).find(TUPLE_IP)?.ok_or_else(|| missing("addresses"))?;
        let proto = Attrs(nest).find(TUPLE_PROTO)?.ok_or_else(|| missing("protocol"))?.nested();
        let address = |v4: u16, v6: u16| -> Result<IpAddr> {
            if let Some(attr) = ip.nested().find(v4)? {
                return Ok(Ipv4Addr::from(attr.fixed::<4>()?).into());
            }
            let attr = ip.nested().find(v6)?.ok_or_else(|| missing("address"))?;
            Ok(Ipv6Addr::from(attr.fixed::<16>()?).into())
        };
        let number = proto.find(PROTO_NUM)?.ok_or_else(|| missing("protocol"))?.u8()?;
        let be16 = |kind: u16| proto.find(kind)?.map(|a| a.be16()).transpose();
        let byte = |kind: u16| proto.find(kind)?.map(|a| a.u8()).transpose();
        let query = |id: u16, kind: u16, code: u16| -> Result<Option<Transport>> {
            Ok(match (be16(id)?, byte(kind)?, byte(code)?) {
                (Some(id), Some(kind), Some(code)) => Some(Transport::Query { id, kind, code }),
                _ => None,
            })
        };
        let transport = match number {
            protocol::ICMP => query(PROTO_ICMP_ID, PROTO_ICMP_TYPE, PROTO_ICMP_CODE)?,
            protocol::ICMPV6 => query(PROTO_ICMPV6_ID, PROTO_ICMPV6_TYPE, PROTO_ICMPV6_CODE)?,
            _ => match (be16(PROTO_SRC_PORT)?, be16(PROTO_DST_PORT)?) {
                (Some(src), Some(dst)) => Some(Transport::Ports { src, dst }),
                _ => None,
            },
        };
        let (src, dst) = (address(IP_V4_SRC, IP_V6_SRC)?, address(IP_V4_DST, IP_V6_DST)?);
        Ok(transport.map(|transport| Tuple { src, dst, protocol: number, transport }))
    }

    /// What goes into a `CTA_TUPLE_*` nest.
    pub fn build(&self) -> AttrBuf {
        let mut ip = AttrBuf::new();
        for (address, v4, v6) in [(self.src, IP_V4_SRC, IP_V6_SRC), (self.dst, IP_V4_DST, IP_V6_DST)] {
            match address {
                IpAddr::V4(a) => ip.push(v4, &a.octets()),
                IpAddr::V6(a) => ip.push(v6, &a.octets()),
            };
        }
        let mut proto = AttrBuf::new();
        proto.push(PROTO_NUM, &[self.protocol]);
        match self.transport {
            Transport::Ports { src, dst } => {
                proto.push(PROTO_SRC_PORT, &src.to_be_bytes()).push(PROTO_DST_PORT, &dst.to_be_bytes());
            }
            Transport::Query { id, kind, code } => {
                let kinds = match self.protocol {
                    protocol::ICMPV6 => [PROTO_ICMPV6_ID, PROTO_ICMPV6_TYPE, PROTO_ICMPV6_CODE],
                    _ => [PROTO_ICMP_ID, PROTO_ICMP_TYPE, PROTO_ICMP_CODE],
                };
                proto.push(kinds[0], &id.to_be_bytes()).push(kinds[1], &[kind]).push(kinds[2], &[code]);
            }
        }
        let mut nest = AttrBuf::new();
        nest.push_nested(TUPLE_IP, &ip).push_nested(TUPLE_PROTO, &proto);
        nest
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any tuple that the kernel could track.
    pub(crate) fn tuple() -> impl Strategy<Value = Tuple> {
        let ports = |protocol| {
            (any::<u16>(), any::<u16>()).prop_map(move |(src, dst)| (protocol, Transport::Ports { src, dst }))
        };
        let query = |protocol, kinds: &'static [u8]| {
            (any::<u16>(), prop::sample::select(kinds))
                .prop_map(move |(id, kind)| (protocol, Transport::Query { id, kind, code: 0 }))
        };
        let v4 = (
            any::<Ipv4Addr>().prop_map(IpAddr::V4),
            any::<Ipv4Addr>().prop_map(IpAddr::V4),
            prop_oneof![
                ports(protocol::TCP),
                ports(protocol::UDP),
                ports(protocol::SCTP),
                query(protocol::ICMP, &[0, 8])
            ],
        );
        let v6 = (
            any::<Ipv6Addr>().prop_map(IpAddr::V6),
            any::<Ipv6Addr>().prop_map(IpAddr::V6),
            prop_oneof![ports(protocol::TCP), ports(protocol::UDP), query(protocol::ICMPV6, &[128, 129])],
        );
        prop_oneof![v4.boxed(), v6.boxed()].prop_map(|(src, dst, (protocol, transport))| Tuple {
            src,
            dst,
            protocol,
            transport,
        })
    }

    proptest! {
        #[test]
        fn a_tuple_is_read_as_it_is_written_and_has_one_inverse(tuple in tuple()) {
            prop_assert_eq!(Tuple::parse(tuple.build().as_bytes()).unwrap(), Some(tuple));
            prop_assert_eq!(tuple.inverse().inverse(), tuple);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = Tuple::parse(&bytes);
        }
    }

    #[test]
    fn an_echo_request_is_answered_by_a_reply() {
        let answers =
            [(1, 8), (1, 14), (58, 129), (1, 3), (6, 8)].map(|(protocol, kind)| answering_type(protocol, kind));
        assert_eq!(answers, [Some(0), Some(13), Some(128), None, None]);
    }
}

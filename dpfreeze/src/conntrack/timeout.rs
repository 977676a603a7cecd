//! Timeout policies: nfnetlink subsystem 8 (include/uapi/linux/netfilter/nfnetlink_cttimeout.h).
//!
//! `CTA_TIMEOUT_USE` counts references from rules and flows (their ct() templates), not connections.

use std::collections::BTreeMap;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::bytes::hex;
use crate::error::{Error, Result};
use crate::netlink::attr::{AttrBuf, Attrs, NLA_F_NESTED};
use crate::netlink::message::{NLM_F_CREATE, NLM_F_EXCL};
use crate::netlink::{Protocol, Socket};

const SUBSYSTEM: u16 = 8; // NFNL_SUBSYS_CTNETLINK_TIMEOUT, linux/netfilter/nfnetlink.h
                          // enum ctnl_timeout_msg_types
const NEW: u16 = SUBSYSTEM << 8;
const GET: u16 = SUBSYSTEM << 8 | 1;
const DELETE: u16 = SUBSYSTEM << 8 | 2;
// enum ctattr_timeout
const ATTR_NAME: u16 = 1;
const ATTR_L3PROTO: u16 = 2;
const ATTR_L4PROTO: u16 = 3;
const ATTR_DATA: u16 = 4;
const ATTR_USE: u16 = 5;
/// `struct nfgenmsg`: u8 family (AF_UNSPEC), u8 version (NFNETLINK_V0), be16 resource id.
const NFGENMSG: [u8; 4] = [0; 4];
/// `CTNL_TIMEOUT_NAME_MAX`, its NUL included.
const NAME_MAX: usize = 32;

/// A timeout policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeoutPolicy {
    /// Name, for example `ovs_tp_1_udp4`.
    pub name: String,
    /// Layer 3 protocol: an `AF_*` number (2 IPv4, 10 IPv6).
    pub l3: u16,
    /// Layer 4 protocol: an `IPPROTO_*` number.
    pub l4: u8,
    /// `CTA_TIMEOUT_DATA`: the attributes in it, as sent; see [`TimeoutPolicy::timeouts`].
    #[serde(with = "hex")]
    pub data: Vec<u8>,
    /// References from rules and flows (`CTA_TIMEOUT_USE`); connections are not counted.
    pub use_count: Option<u32>,
    /// Attributes this library does not know, as sent.
    #[serde(with = "hex")]
    pub unknown: Vec<u8>,
}

impl TimeoutPolicy {
    /// Reads an `IPCTNL_MSG_TIMEOUT_NEW` message, `payload` being what follows the nlmsghdr.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the message is cut off or has no name.
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let what = "timeout policy";
        let (_, attrs) =
            payload.split_first_chunk::<4>().ok_or_else(|| Error::malformed(what, "shorter than struct nfgenmsg"))?;
        let mut policy = TimeoutPolicy::default();
        let mut unknown = AttrBuf::new();
        for attr in Attrs(attrs) {
            let attr = attr?;
            match attr.kind {
                ATTR_NAME => policy.name = attr.string(),
                ATTR_L3PROTO => policy.l3 = attr.be16()?,
                ATTR_L4PROTO => policy.l4 = attr.u8()?,
                ATTR_DATA => policy.data = attr.payload.to_vec(),
                ATTR_USE => policy.use_count = Some(attr.be32()?),
                _ => {
                    unknown.push_attr(&attr);
                }
            }
        }
        if policy.name.is_empty() {
            return Err(Error::malformed(what, "no name"));
        }
        policy.unknown = unknown.into_bytes();
        Ok(policy)
    }

    /// The time limits, seconds, by the attribute number that the protocol gives each (`CTA_TIMEOUT_TCP_*`, …).
    ///
    /// # Errors
    /// [`Error::Malformed`] if the data are no run of big-endian u32.
    pub fn timeouts(&self) -> Result<BTreeMap<u16, u32>> {
        Attrs(&self.data).map(|attr| attr.and_then(|a| Ok((a.kind, a.be32()?)))).collect()
    }

    /// Whether `other` says the same of the same protocol; names and references do not matter.
    pub fn same_meaning(&self, other: &TimeoutPolicy) -> bool {
        let timeouts = match (self.timeouts(), other.timeouts()) {
            (Ok(a), Ok(b)) => a == b,
            _ => self.data == other.data,
        };
        (self.l3, self.l4) == (other.l3, other.l4) && timeouts
    }

    fn create_message(&self) -> Result<Vec<u8>> {
        let mut attrs = AttrBuf::new();
        attrs.push_str(ATTR_NAME, checked(&self.name)?);
        attrs.push(ATTR_L3PROTO, &self.l3.to_be_bytes()).push(ATTR_L4PROTO, &[self.l4]);
        attrs.try_push(ATTR_DATA | NLA_F_NESTED, &self.data)?;
        Ok([&NFGENMSG, attrs.as_bytes()].concat())
    }
}

/// Every timeout policy of the network namespace. Asking makes the kernel load nfnetlink_cttimeout, as every start of
/// ovs-vswitchd does. Empty where the kernel has no such policies.
///
/// # Errors
/// As [`Socket::dump`]; [`Error::Malformed`].
pub fn timeout_policies() -> Result<Vec<TimeoutPolicy>> {
    match Socket::open(Protocol::Netfilter) {
        Ok(mut socket) => read_timeout_policies(&mut socket),
        Err(Error::Io { source, .. }) if source.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// As [`timeout_policies`], over a socket of [`Protocol::Netfilter`] that is already open.
///
/// # Errors
/// As [`timeout_policies`].
pub fn read_timeout_policies(socket: &mut Socket) -> Result<Vec<TimeoutPolicy>> {
    match socket.dump("dump of the conntrack timeout policies", GET, &NFGENMSG) {
        Ok(answers) => answers.iter().map(|payload| TimeoutPolicy::parse(payload)).collect(),
        // nfnetlink says EINVAL to a subsystem that it does not have and cannot load.
        Err(Error::Netlink { errno: Errno::EINVAL, .. }) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Makes a timeout policy; its references are the kernel's.
///
/// # Errors
/// As [`Socket::request`] (EEXIST: there is one of this name); [`Error::Malformed`] if the name is too long.
pub fn create_timeout_policy(policy: &TimeoutPolicy) -> Result<()> {
    let what = format!("making the conntrack timeout policy {}", policy.name);
    let body = policy.create_message()?;
    Socket::open(Protocol::Netfilter)?.request(&what, NEW, NLM_F_CREATE | NLM_F_EXCL, &body).map(drop)
}

/// Removes a timeout policy. From Linux 6.1 this takes it away from live connections too; before, one that is in use
/// is refused with EBUSY.
///
/// # Errors
/// As [`Socket::request`] (ENOENT: there is none of this name); [`Error::Malformed`] if the name is too long.
pub fn delete_timeout_policy(name: &str) -> Result<()> {
    let mut attrs = AttrBuf::new();
    attrs.push_str(ATTR_NAME, checked(name)?);
    let body = [&NFGENMSG, attrs.as_bytes()].concat();
    let what = format!("removing the conntrack timeout policy {name}");
    Socket::open(Protocol::Netfilter)?.request(&what, DELETE, 0, &body).map(drop)
}

/// A DELETE without a name removes *every* policy that nothing refers to, so the name is checked here.
fn checked(name: &str) -> Result<&str> {
    if name.is_empty() || name.len() >= NAME_MAX {
        return Err(Error::malformed(
            "name of a timeout policy",
            format!("{name:?} has {} bytes, 1 to {} belong", name.len(), NAME_MAX - 1),
        ));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ovs::testing::{bytes_of, unknown};

    fn data(timeouts: &[(u16, u32)]) -> Vec<u8> {
        bytes_of(&timeouts.iter().map(|(kind, s)| (*kind, s.to_be_bytes().to_vec())).collect::<Vec<_>>())
    }

    proptest! {
        #[test]
        fn nothing_is_lost(l3: u16, l4: u8, timeouts in prop::collection::vec((1u16..14, any::<u32>()), 0..12), uses: u32, other in unknown()) {
            let expected = TimeoutPolicy { name: "ovs_tp_1_udp4".into(), l3, l4, data: data(&timeouts), use_count: Some(uses), unknown: bytes_of(&other) };
            let mut message = expected.create_message().unwrap();
            message.extend_from_slice(&bytes_of(&[(ATTR_USE, uses.to_be_bytes().to_vec())]));
            message.extend_from_slice(&expected.unknown);
            let read = TimeoutPolicy::parse(&message).unwrap();
            prop_assert_eq!(&read, &expected);
            prop_assert_eq!(read.timeouts().unwrap(), timeouts.into_iter().collect());
            let json = serde_json::to_string(&read).unwrap();
            prop_assert_eq!(serde_json::from_str::<TimeoutPolicy>(&json).unwrap(), expected);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = TimeoutPolicy::parse(&bytes).map(|policy| policy.timeouts());
        }
    }

    #[test]
    fn meaning_is_protocol_and_limits_not_name_order_or_use() {
        let policy = TimeoutPolicy {
            name: "ovs_tp_1_udp4".into(),
            l3: 2,
            l4: 17,
            data: data(&[(1, 78), (2, 79)]),
            ..Default::default()
        };
        let renamed = TimeoutPolicy {
            name: "ovs_tp_2_udp4".into(),
            use_count: Some(9),
            data: data(&[(2, 79), (1, 78)]),
            ..policy.clone()
        };
        assert!(policy.same_meaning(&renamed));
        assert!(!policy.same_meaning(&TimeoutPolicy { data: data(&[(1, 78), (2, 80)]), ..policy.clone() }));
        assert!(!policy.same_meaning(&TimeoutPolicy { l3: 10, ..policy.clone() }));
        assert!(!policy.same_meaning(&TimeoutPolicy { l4: 6, ..policy.clone() }));
    }

    /// A DELETE without a name removes every policy.
    #[test]
    fn a_name_that_is_none_is_refused() {
        for name in ["", &"n".repeat(32)] {
            assert!(matches!(delete_timeout_policy(name), Err(Error::Malformed { .. })), "{name}");
            let policy = TimeoutPolicy { name: name.into(), ..Default::default() };
            assert!(create_timeout_policy(&policy).is_err());
        }
    }
}

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
const DEFAULT_SET: u16 = SUBSYSTEM << 8 | 3;
const DEFAULT_GET: u16 = SUBSYSTEM << 8 | 4;
// enum ctattr_timeout
const ATTR_NAME: u16 = 1;
const ATTR_L3PROTO: u16 = 2;
const ATTR_L4PROTO: u16 = 3;
const ATTR_DATA: u16 = 4;
const ATTR_USE: u16 = 5;
/// `struct nfgenmsg`: u8 family (AF_UNSPEC), u8 version (NFNETLINK_V0), be16 resource id.
const NFGENMSG: [u8; 4] = [0; 4];
const WHAT: &str = "timeout policy";
/// `CTNL_TIMEOUT_NAME_MAX`, its NUL included.
const NAME_MAX: usize = 32;

/// Numbers of the time limits within `CTA_TIMEOUT_DATA`: one enumeration for each protocol.
pub mod limit {
    #![allow(missing_docs)]
    // enum ctattr_timeout_generic
    pub const GENERIC: u16 = 1;
    // enum ctattr_timeout_tcp
    pub const TCP_SYN_SENT: u16 = 1;
    pub const TCP_SYN_RECV: u16 = 2;
    pub const TCP_ESTABLISHED: u16 = 3;
    pub const TCP_FIN_WAIT: u16 = 4;
    pub const TCP_CLOSE_WAIT: u16 = 5;
    pub const TCP_LAST_ACK: u16 = 6;
    pub const TCP_TIME_WAIT: u16 = 7;
    pub const TCP_CLOSE: u16 = 8;
    pub const TCP_SYN_SENT2: u16 = 9;
    pub const TCP_RETRANS: u16 = 10;
    pub const TCP_UNACK: u16 = 11;
    // enum ctattr_timeout_udp
    pub const UDP_UNREPLIED: u16 = 1;
    pub const UDP_REPLIED: u16 = 2;
    // enum ctattr_timeout_icmp, enum ctattr_timeout_icmpv6
    pub const ICMP: u16 = 1;
}

/// The name of time limit `kind` of layer 4 protocol `l4`, as nfct(8) writes it; None for protocols that have limits
/// this library does not name.
pub fn limit_name(l4: u8, kind: u16) -> Option<&'static str> {
    const TCP: [&str; 11] = [
        "syn_sent",
        "syn_recv",
        "established",
        "fin_wait",
        "close_wait",
        "last_ack",
        "time_wait",
        "close",
        "syn_sent2",
        "retrans",
        "unacknowledged",
    ];
    let names: &[&str] = match i32::from(l4) {
        libc::IPPROTO_TCP => &TCP,
        libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE => &["unreplied", "replied"],
        libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6 | libc::IPPROTO_RAW => &["timeout"],
        _ => return None,
    };
    names.get(usize::from(kind).checked_sub(1)?).copied()
}

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

/// What a timeout policy says ([`TimeoutPolicy::meaning`]).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Meaning {
    l3: u16,
    l4: u8,
    timeouts: std::result::Result<BTreeMap<u16, u32>, Vec<u8>>,
}

impl TimeoutPolicy {
    /// Reads an `IPCTNL_MSG_TIMEOUT_NEW` message, `payload` being what follows the nlmsghdr.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the message is cut off or has no name.
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let policy = Self::parse_nameless(payload)?;
        match policy.name.is_empty() {
            true => Err(Error::malformed(WHAT, "no name")),
            false => Ok(policy),
        }
    }

    /// The defaults of a protocol have no name.
    fn parse_nameless(payload: &[u8]) -> Result<Self> {
        let (_, attrs) =
            payload.split_first_chunk::<4>().ok_or_else(|| Error::malformed(WHAT, "shorter than struct nfgenmsg"))?;
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

    /// What it says of which protocol; names, references and order do not matter. Malformed data mean themselves.
    pub fn meaning(&self) -> Meaning {
        Meaning { l3: self.l3, l4: self.l4, timeouts: self.timeouts().map_err(|_| self.data.clone()) }
    }

    /// Whether `other` says the same of the same protocol.
    pub fn same_meaning(&self, other: &TimeoutPolicy) -> bool {
        self.meaning() == other.meaning()
    }

    /// The time limits, seconds, as [`TimeoutPolicy::timeouts`] gives them, in place of those it has.
    #[must_use]
    pub fn with_timeouts(mut self, timeouts: impl IntoIterator<Item = (u16, u32)>) -> Self {
        let mut data = AttrBuf::new();
        for (kind, seconds) in timeouts {
            data.push(kind, &seconds.to_be_bytes());
        }
        self.data = data.into_bytes();
        self
    }

    fn create_message(&self) -> Result<Vec<u8>> {
        let mut attrs = AttrBuf::new();
        attrs.push_str(ATTR_NAME, checked(&self.name)?);
        self.push_limits(attrs)
    }

    /// nfgenmsg, what stands before, and the limits of a protocol.
    fn push_limits(&self, mut attrs: AttrBuf) -> Result<Vec<u8>> {
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

/// The timeout policy of this name, or None.
///
/// # Errors
/// As [`Socket::request`]; [`Error::Malformed`], also if the name is too long.
pub fn timeout_policy(name: &str) -> Result<Option<TimeoutPolicy>> {
    let mut attrs = AttrBuf::new();
    attrs.push_str(ATTR_NAME, checked(name)?);
    let body = [&NFGENMSG, attrs.as_bytes()].concat();
    let what = format!("conntrack timeout policy {name}");
    match Socket::open(Protocol::Netfilter)?.request(&what, GET, 0, &body) {
        Ok(answers) => answers.first().map(|payload| TimeoutPolicy::parse(payload)).transpose(),
        Err(Error::Netlink { errno: Errno::ENOENT, .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The limits of connections without a policy: of layer 3 protocol `l3` (`AF_*`) and layer 4 protocol `l4`
/// (`IPPROTO_*`). The answer has no name; it may have another `l4`, `IPPROTO_RAW`, where the kernel has only generic
/// limits for this one.
///
/// # Errors
/// As [`Socket::request`]; [`Error::Malformed`].
pub fn default_timeouts(l3: u16, l4: u8) -> Result<TimeoutPolicy> {
    let mut attrs = AttrBuf::new();
    attrs.push(ATTR_L3PROTO, &l3.to_be_bytes()).push(ATTR_L4PROTO, &[l4]);
    let body = [&NFGENMSG, attrs.as_bytes()].concat();
    let what = format!("default timeouts of protocol {l4}");
    let answers = Socket::open(Protocol::Netfilter)?.request(&what, DEFAULT_GET, 0, &body)?;
    let payload = answers.first().ok_or_else(|| Error::malformed(what, "no answer"))?;
    TimeoutPolicy::parse_nameless(payload)
}

/// Sets the limits of connections without a policy, for the protocol of `policy`; its name does not matter, and limits
/// it does not have stay as they are.
///
/// # Errors
/// As [`Socket::request`].
pub fn set_default_timeouts(policy: &TimeoutPolicy) -> Result<()> {
    let what = format!("setting the default timeouts of protocol {}", policy.l4);
    let body = policy.push_limits(AttrBuf::new())?;
    Socket::open(Protocol::Netfilter)?.request(&what, DEFAULT_SET, 0, &body).map(drop)
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
    fn limits_have_the_names_of_their_protocol() {
        assert_eq!(limit_name(6, limit::TCP_ESTABLISHED), Some("established"));
        assert_eq!(limit_name(6, limit::TCP_UNACK), Some("unacknowledged"));
        assert_eq!(limit_name(17, limit::UDP_UNREPLIED), Some("unreplied"));
        assert_eq!(limit_name(58, limit::ICMP), Some("timeout"));
        assert_eq!((limit_name(6, 0), limit_name(6, 12), limit_name(132, 1)), (None, None, None));
    }

    /// As the kernel answers IPCTNL_MSG_TIMEOUT_DEFAULT_GET: no name. A dump has one in every entry.
    #[test]
    fn defaults_have_no_name_and_policies_do() {
        let udp = TimeoutPolicy { l3: 2, l4: 17, ..Default::default() }.with_timeouts([(1, 30), (2, 120)]);
        let message = udp.push_limits(AttrBuf::new()).unwrap();
        assert_eq!(TimeoutPolicy::parse_nameless(&message).unwrap(), udp);
        assert!(TimeoutPolicy::parse(&message).is_err());
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

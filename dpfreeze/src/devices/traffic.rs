//! One qdisc, class or filter: which it is, without its settings and counters.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::netlink::attr::Attrs;

// linux/rtnetlink.h
pub(super) const RTM_GETQDISC: u16 = 38;
pub(super) const RTM_GETTCLASS: u16 = 42;
pub(super) const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_CHAIN: u16 = 11;
/// `struct tcmsg {u8 family; u8 pad; u16 pad; int ifindex; u32 handle; u32 parent; u32 info}`
pub(super) const TCMSG: usize = 20;

// linux/pkt_sched.h
/// `TC_H_ROOT`: the parent of a root qdisc.
pub const ROOT: u32 = 0xffff_ffff;
/// `TC_H_INGRESS` and `TC_H_CLSACT`: the parent of an ingress or clsact qdisc.
pub const INGRESS: u32 = 0xffff_fff1;
/// `TC_H_MIN_INGRESS`: the parent of a filter on what comes in by a clsact qdisc.
pub const CLSACT_INGRESS: u32 = 0xffff_fff2;
/// `TC_H_MIN_EGRESS`: the parent of one on what goes out.
pub const CLSACT_EGRESS: u32 = 0xffff_fff3;

/// Qdiscs whose classes somebody makes. Those of others are queues, bands and flows, which come and go by themselves.
const WITH_CLASSES: [&str; 7] = ["htb", "hfsc", "drr", "qfq", "ets", "cbq", "atm"];

/// A qdisc, a class or a filter of a device. Handles and parents are `major << 16 | minor`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Traffic {
    /// A queueing discipline.
    Qdisc {
        /// For example `htb`.
        kind: String,
        /// Its handle, never 0.
        handle: u32,
        /// [`ROOT`], [`INGRESS`] or a class.
        parent: u32,
    },
    /// A class of one.
    Class {
        /// As that of its qdisc.
        kind: String,
        /// Its handle.
        handle: u32,
        /// The class above it, or [`ROOT`].
        parent: u32,
    },
    /// A filter of a qdisc or class.
    Filter {
        /// For example `u32`.
        kind: String,
        /// What it is attached to.
        parent: u32,
        /// Its chain.
        chain: u32,
        /// Its preference (priority).
        preference: u16,
        /// `ETH_P_*`, host order.
        protocol: u16,
        /// Its handle; 0 where several share a head, for that.
        handle: u32,
    },
}

impl Traffic {
    /// What its filters have for a parent.
    pub(super) fn filter_parents(&self) -> Vec<u32> {
        match self {
            Traffic::Qdisc { kind, .. } if kind == "clsact" => vec![CLSACT_INGRESS, CLSACT_EGRESS],
            Traffic::Qdisc { handle, .. } | Traffic::Class { handle, .. } => vec![*handle],
            Traffic::Filter { .. } => Vec::new(),
        }
    }

    /// The qdisc of its device that it stands or falls with: [`ROOT`] or [`INGRESS`].
    pub fn below(&self) -> u32 {
        let parent = match self {
            Traffic::Qdisc { parent, .. } => *parent,
            Traffic::Class { .. } => ROOT,
            Traffic::Filter { parent, .. } => *parent,
        };
        match (parent, parent >> 16) {
            (ROOT, _) => ROOT,
            // A filter of a block that several qdiscs share has the number of that for a parent.
            (_, 0xffff | 0) => INGRESS,
            _ => ROOT,
        }
    }
}

/// `MAJOR:MINOR` in hexadecimal, as `tc` prints it.
struct Id(u32);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0, self.0 >> 16, self.0 & 0xffff) {
            (ROOT, ..) => f.write_str("root"),
            (_, major, 0) => write!(f, "{major:x}:"),
            (_, major, minor) => write!(f, "{major:x}:{minor:x}"),
        }
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Traffic::Qdisc { kind, handle, parent: INGRESS } => write!(f, "qdisc {kind} {}", Id(*handle)),
            Traffic::Qdisc { kind, handle, parent: ROOT } => write!(f, "qdisc {kind} {} root", Id(*handle)),
            Traffic::Qdisc { kind, handle, parent } => {
                write!(f, "qdisc {kind} {} parent {}", Id(*handle), Id(*parent))
            }
            Traffic::Class { kind, handle, parent } => {
                write!(f, "class {kind} {} parent {}", Id(*handle), Id(*parent))
            }
            Traffic::Filter { kind, parent, chain, preference, protocol, handle } => {
                write!(f, "filter {kind} parent {} chain {chain} pref {preference}", Id(*parent))?;
                write!(f, " protocol {protocol:#06x} handle {handle:#x}")
            }
        }
    }
}

/// The body of a dump.
pub(super) fn request(ifindex: u32, parent: u32) -> Vec<u8> {
    [0, ifindex, 0, parent, 0].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect()
}

/// An entry of the dump `kind`, with the index of its device; None for what the kernel has made by itself.
pub(super) fn parse(kind: u16, payload: &[u8]) -> Result<Option<(u32, Traffic)>> {
    let short = || Error::malformed("traffic control", format!("{} bytes", payload.len()));
    let (head, attrs) = payload.split_first_chunk::<TCMSG>().ok_or_else(short)?;
    let word = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (ifindex, handle, parent, info) = (word(4), word(8), word(12), word(16));
    let (mut name, mut chain) = (String::new(), 0);
    for attr in Attrs(attrs) {
        let attr = attr?;
        match attr.kind {
            TCA_KIND => name = attr.string(),
            TCA_CHAIN => chain = attr.u32()?,
            _ => {}
        }
    }
    let kind_of = name;
    Ok(match kind {
        RTM_GETQDISC if handle == 0 => None,
        RTM_GETQDISC => Some((ifindex, Traffic::Qdisc { kind: kind_of, handle, parent })),
        RTM_GETTCLASS if !WITH_CLASSES.contains(&kind_of.as_str()) => None,
        RTM_GETTCLASS => Some((ifindex, Traffic::Class { kind: kind_of, handle, parent })),
        _ => {
            let (preference, protocol) = ((info >> 16) as u16, u16::from_be(info as u16));
            Some((ifindex, Traffic::Filter { kind: kind_of, parent, chain, preference, protocol, handle }))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attr::AttrBuf;
    use proptest::prelude::*;

    fn entry(handle: u32, parent: u32, info: u32, attrs: &AttrBuf) -> Vec<u8> {
        let head: Vec<u8> = [0, 9, handle, parent, info].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        [&head[..], attrs.as_bytes()].concat()
    }

    fn told(kind: u16, name: &str, handle: u32, parent: u32, info: u32) -> Option<String> {
        let mut attrs = AttrBuf::new();
        attrs.push_str(TCA_KIND, name).push_u32(3, 77).push_u32(TCA_CHAIN, 2);
        let found = parse(kind, &entry(handle, parent, info, &attrs)).unwrap();
        found.map(|(ifindex, one)| format!("{ifindex} {one}"))
    }

    #[test]
    fn what_somebody_has_made_is_told_as_tc_tells_it() {
        let qdisc = |name, handle, parent| told(RTM_GETQDISC, name, handle, parent, 0);
        assert_eq!(qdisc("tbf", 0x8001_0000, ROOT).as_deref(), Some("9 qdisc tbf 8001: root"));
        assert_eq!(qdisc("ingress", 0xffff_0000, INGRESS).as_deref(), Some("9 qdisc ingress ffff:"));
        assert_eq!(qdisc("sfq", 0x0020_0000, 0x0001_0010).as_deref(), Some("9 qdisc sfq 20: parent 1:10"));
        assert_eq!(qdisc("noqueue", 0, ROOT), None);
        let class = told(RTM_GETTCLASS, "htb", 0x0001_0010, 0x0001_fffe, 0);
        assert_eq!(class.as_deref(), Some("9 class htb 1:10 parent 1:fffe"));
        assert_eq!(told(RTM_GETTCLASS, "fq_codel", 0x0001_0010, 0x0001_0000, 0), None);
        let info = (49152 << 16) | u32::from(0x0800u16.to_be());
        let filter = told(RTM_GETTFILTER, "u32", 0x8000_0800, 0xffff_0000, info);
        let text = "9 filter u32 parent ffff: chain 2 pref 49152 protocol 0x0800 handle 0x80000800";
        assert_eq!(filter.as_deref(), Some(text));
    }

    #[test]
    fn everything_stands_or_falls_with_one_of_two_qdiscs() {
        let qdisc = |parent| Traffic::Qdisc { kind: "x".into(), handle: 1 << 16, parent }.below();
        assert_eq!([ROOT, INGRESS, 0x0001_0010].map(qdisc), [ROOT, INGRESS, ROOT]);
        let filter = |parent| {
            let (kind, chain, preference, protocol, handle) = ("u32".into(), 0, 1, 3, 0);
            Traffic::Filter { kind, parent, chain, preference, protocol, handle }.below()
        };
        assert_eq!([0xffff_0000, CLSACT_EGRESS, 0x0001_0000].map(filter), [INGRESS, INGRESS, ROOT]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(kind in 36u16..48, bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = parse(kind, &bytes);
        }
    }
}

//! The actions of a flow, walked through every nest.

use std::collections::{BTreeMap, BTreeSet};

use super::steps::Step;
use super::uapi::{self, action, cookie, ct, key};
use crate::error::Result;
use crate::netlink::attr::{Attr, Attrs};

/// How deep actions may nest: the kernel allows `OVS_COPY_ACTIONS_MAX_DEPTH` = 16 (net/openvswitch/flow_netlink.c).
const MAX_DEPTH: u32 = 24;

/// What a `userspace` action is for: the cookie that OVS puts in its user data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cookie {
    /// `USER_ACTION_COOKIE_UNSPEC`
    Unspec,
    /// A copy for sFlow.
    Sflow,
    /// The packet's only way on is through the daemon.
    SlowPath,
    /// A copy for the `sample` action of OpenFlow.
    FlowSample,
    /// A copy for IPFIX of the bridge.
    Ipfix,
    /// To a controller.
    Controller,
    /// A type this library does not know.
    Other(u16),
    /// There is no user data, or not enough for a type.
    None,
}

impl Cookie {
    /// Reads the type: the first u16, in host order.
    pub fn of(userdata: Option<&[u8]>) -> Self {
        let Some([a, b, ..]) = userdata else { return Cookie::None };
        match u16::from_ne_bytes([*a, *b]) {
            cookie::UNSPEC => Cookie::Unspec,
            cookie::SFLOW => Cookie::Sflow,
            cookie::SLOW_PATH => Cookie::SlowPath,
            cookie::FLOW_SAMPLE => Cookie::FlowSample,
            cookie::IPFIX => Cookie::Ipfix,
            cookie::CONTROLLER => Cookie::Controller,
            other => Cookie::Other(other),
        }
    }

    /// Whether the packet that goes up is a copy, made to be measured.
    pub fn is_sampling(self) -> bool {
        matches!(self, Cookie::Sflow | Cookie::FlowSample | Cookie::Ipfix)
    }
}

/// Parts of the packet that actions may have changed: the kinds of key attributes that can no longer be compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched(u64);

impl Touched {
    /// Everything that is read from the packet; not what is known from the port it came by.
    const HEADERS: Touched = Touched(
        !(1 << key::IN_PORT
            | 1 << key::TUNNEL
            | 1 << key::PRIORITY
            | 1 << key::SKB_MARK
            | 1 << key::RECIRC_ID
            | 1 << key::DP_HASH),
    );
    /// What stands in an Ethernet header and its tags.
    const ETHERNET: Touched = Touched(1 << key::ETHERNET | 1 << key::VLAN | 1 << key::ETHERTYPE | 1 << key::ENCAP);
    /// What NAT may rewrite.
    const NAT: Touched = Touched(
        1 << key::IPV4
            | 1 << key::IPV6
            | 1 << key::TCP
            | 1 << key::UDP
            | 1 << key::SCTP
            | 1 << key::ICMP
            | 1 << key::ICMPV6,
    );

    /// Everything that is read from the packet.
    pub fn headers() -> Self {
        Self::HEADERS
    }

    /// Whether the key attribute `kind` may differ from what the packet had before.
    pub fn has(self, kind: u16) -> bool {
        kind >= 64 || self.0 & 1 << kind != 0
    }

    fn add(&mut self, other: Touched) {
        self.0 |= other.0;
    }

    fn add_kind(&mut self, kind: u16) {
        self.0 |= if kind < 64 { 1 << kind } else { u64::MAX };
    }
}

/// What happens to a packet before it comes to a point of the action list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Before {
    /// A copy of the packet (or of a part of it) may have left: output, userspace, sample, clone, psample.
    pub copied: bool,
    /// Connection tracking with NAT.
    pub nat: bool,
    /// The packet or its metadata may have been changed otherwise: set, push, pop, TTL, truncation.
    pub changed: bool,
    /// Among the changes is one that [`Before::steps`] does not tell: Ethernet and NSH headers, push of MPLS by tunnel.
    pub untold: bool,
    /// An action this library does not know.
    pub unknown: bool,
    /// Which key attributes may have been changed.
    pub touched: Touched,
    /// The changes and connection tracking, in order.
    pub steps: Vec<Step>,
}

impl Before {
    /// Whether the packet is still what entered the flow and nobody got a copy: it may run through again.
    pub fn is_clean(&self) -> bool {
        !(self.copied || self.nat || self.changed || self.unknown)
    }
}

/// A recirculation found among actions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recirculation {
    /// Where the packet goes on.
    pub id: u32,
    /// What happened to it before.
    pub before: Before,
    /// What comes behind it in the list gives the packet away once more: `ct(table=1),output:2` does.
    pub beside: bool,
    /// It is inside a sample, clone, check_pkt_len or dec_ttl: a new daemon does not see it there and keeps the flow
    /// (OVS, `ukey_create_from_dpif_flow`).
    pub nested: bool,
}

/// A `userspace` action found among actions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Userspace {
    /// Its purpose.
    pub cookie: Cookie,
    /// The whole user data.
    pub userdata: Option<Vec<u8>>,
}

/// What the actions of a flow do, over all nests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActionSummary {
    /// Every recirculation, in order.
    pub recirculations: Vec<Recirculation>,
    /// Every `userspace` action, in order.
    pub userspace: Vec<Userspace>,
    /// Meter ids.
    pub meters: BTreeSet<u32>,
    /// Ports packets go out by.
    pub outputs: Vec<u32>,
    /// Names of the timeout policies that `ct` actions ask for, with the zones that they ask for them in.
    pub timeouts: BTreeMap<String, BTreeSet<u16>>,
    /// Something other than `userspace`, `meter`, `trunc` and the nests around them is done.
    pub other_work: bool,
    /// Number of actions, nests not counted.
    pub leaves: usize,
}

impl ActionSummary {
    /// Walks `actions`, an `OVS_ACTION_ATTR_*` run.
    ///
    /// # Errors
    /// The run is malformed, or nested deeper than the kernel allows.
    pub fn of(actions: &[u8]) -> Result<Self> {
        let mut summary = Self::default();
        summary.walk(actions, &mut Before::default(), 0)?;
        Ok(summary)
    }

    /// Whether a packet can get anywhere: to a port, to another flow, or to the daemon for more than a measurement
    /// (hazard 8: a flow that does not is a drop, and a wrong one is worse than a miss).
    pub fn forwards(&self) -> bool {
        !self.outputs.is_empty()
            || !self.recirculations.is_empty()
            || self.userspace.iter().any(|u| !u.cookie.is_sampling())
    }

    /// Whether all a packet gets is to be sent to the daemon, once.
    pub fn only_userspace(&self) -> bool {
        self.userspace.len() == 1 && self.outputs.is_empty() && self.recirculations.is_empty() && !self.other_work
    }

    /// Whether a `userspace` action for `cookie` is among the actions.
    pub fn has_cookie(&self, cookie: Cookie) -> bool {
        self.userspace.iter().any(|u| u.cookie == cookie)
    }

    fn walk(&mut self, actions: &[u8], before: &mut Before, depth: u32) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(crate::Error::malformed("flow actions", format!("nested deeper than {MAX_DEPTH}")));
        }
        let first = self.recirculations.len();
        for attr in Attrs(actions) {
            let attr = attr?;
            if gives_away(attr.kind) {
                self.recirculations.iter_mut().skip(first).for_each(|earlier| earlier.beside = true);
            }
            self.step(&attr, before, depth)?;
        }
        Ok(())
    }

    fn step(&mut self, attr: &Attr<'_>, before: &mut Before, depth: u32) -> Result<()> {
        match attr.kind {
            action::SAMPLE | action::CLONE | action::CHECK_PKT_LEN | action::DEC_TTL => {
                return self.nest(attr, before, depth);
            }
            _ => self.leaves += 1,
        }
        match attr.kind {
            action::OUTPUT => {
                self.outputs.push(attr.u32()?);
                before.copied = true;
            }
            action::USERSPACE => {
                let userdata = attr.nested().find(uapi::USERSPACE_ATTR_USERDATA)?.map(|a| a.payload.to_vec());
                self.userspace.push(Userspace { cookie: Cookie::of(userdata.as_deref()), userdata });
                before.copied = true;
            }
            action::RECIRC => {
                let (id, before) = (attr.u32()?, before.clone());
                self.recirculations.push(Recirculation { id, before, beside: false, nested: depth > 0 })
            }
            action::METER => {
                self.meters.insert(attr.u32()?);
            }
            // It shortens the copy that the next output or userspace makes, not the packet.
            action::TRUNC => {}
            _ => {
                self.other_work = true;
                self.work(attr, before)?;
            }
        }
        Ok(())
    }

    /// Actions that give the packet to nobody.
    fn work(&mut self, attr: &Attr<'_>, before: &mut Before) -> Result<()> {
        before.steps.extend(Step::of(attr)?);
        match attr.kind {
            action::CT => {
                let (mut zone, mut timeout) = (0, None);
                for inner in attr.nested() {
                    let inner = inner?;
                    match inner.kind {
                        ct::NAT => {
                            before.nat = true;
                            before.touched.add(Touched::NAT);
                        }
                        ct::ZONE => zone = inner.u16()?,
                        ct::TIMEOUT => timeout = Some(inner.string()),
                        _ => {}
                    }
                }
                if let Some(timeout) = timeout {
                    self.timeouts.entry(timeout).or_default().insert(zone);
                }
            }
            // They leave packet and metadata as they came: what they set is stripped when the packet starts again.
            action::HASH | action::CT_CLEAR | action::DROP => {}
            action::SET | action::SET_MASKED => {
                before.changed = true;
                for inner in attr.nested() {
                    before.touched.add_kind(inner?.kind);
                }
            }
            action::PUSH_VLAN | action::POP_VLAN | action::PUSH_MPLS | action::POP_MPLS => {
                before.changed = true;
                before.touched.add(Touched::HEADERS);
            }
            // What is behind the Ethernet header stays.
            action::PUSH_ETH | action::POP_ETH => {
                (before.changed, before.untold) = (true, true);
                before.touched.add(Touched::ETHERNET);
            }
            action::PUSH_NSH | action::POP_NSH | action::ADD_MPLS => {
                (before.changed, before.untold) = (true, true);
                before.touched.add(Touched::HEADERS);
            }
            action::PSAMPLE => before.copied = true,
            _ => {
                before.unknown = true;
                before.touched.add(Touched::HEADERS);
            }
        }
        Ok(())
    }

    fn nest(&mut self, attr: &Attr<'_>, before: &mut Before, depth: u32) -> Result<()> {
        match attr.kind {
            // A copy goes through the inner actions; the packet itself goes on unchanged.
            action::SAMPLE => {
                if let Some(inner) = attr.nested().find(uapi::SAMPLE_ATTR_ACTIONS)? {
                    self.walk(inner.payload, &mut before.clone(), depth + 1)?;
                }
                before.copied = true;
            }
            action::CLONE => {
                self.walk(attr.payload, &mut before.clone(), depth + 1)?;
                before.copied = true;
            }
            // One of the two branches, and the packet is gone after it.
            action::CHECK_PKT_LEN => {
                for kind in [uapi::CHECK_PKT_LEN_ATTR_GREATER, uapi::CHECK_PKT_LEN_ATTR_LESS_EQUAL] {
                    if let Some(branch) = attr.nested().find(kind)? {
                        self.walk(branch.payload, &mut before.clone(), depth + 1)?;
                    }
                }
                before.copied = true;
            }
            // The inner actions are for packets whose TTL ran out; the others have a changed header.
            _ => {
                if let Some(inner) = attr.nested().find(uapi::DEC_TTL_ATTR_ACTION)? {
                    self.walk(inner.payload, &mut before.clone(), depth + 1)?;
                }
                self.other_work = true;
                before.changed = true;
                before.steps.extend(Step::of(attr)?);
                before.touched.add_kind(key::IPV4);
                before.touched.add_kind(key::IPV6);
            }
        }
        Ok(())
    }
}

/// Whether an action of this kind lets something of the packet leave, or go on elsewhere.
fn gives_away(kind: u16) -> bool {
    !matches!(
        kind,
        action::SET
            | action::SET_MASKED
            | action::PUSH_VLAN..=action::POP_VLAN
            | action::HASH..=action::POP_MPLS
            | action::CT..=action::METER
            | action::ADD_MPLS..=action::DROP
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attr::AttrBuf;

    fn userspace(kind: u16) -> AttrBuf {
        let mut inner = AttrBuf::new();
        let mut userdata = [0u8; 48];
        userdata[..2].copy_from_slice(&kind.to_ne_bytes());
        inner.push_u32(1, 77).push(uapi::USERSPACE_ATTR_USERDATA, &userdata);
        let mut outer = AttrBuf::new();
        outer.push_nested(action::USERSPACE, &inner);
        outer
    }

    fn ct(nat: bool) -> AttrBuf {
        let mut inner = AttrBuf::new();
        inner.push(ct::COMMIT, &[]).push(ct::ZONE, &5u16.to_ne_bytes()).push_str(ct::TIMEOUT, "ovs_tp_1_udp4");
        if nat {
            inner.push_nested(ct::NAT, &AttrBuf::new());
        }
        inner
    }

    fn summary(build: impl FnOnce(&mut AttrBuf)) -> ActionSummary {
        let mut run = AttrBuf::new();
        build(&mut run);
        ActionSummary::of(run.as_bytes()).unwrap()
    }

    #[test]
    fn ct_without_nat_leaves_the_packet_alone() {
        let s = summary(|r| {
            r.push_nested(action::CT, &ct(false)).push_u32(action::RECIRC, 4);
        });
        assert!(s.recirculations[0].before.is_clean());
        assert_eq!((s.recirculations[0].id, s.recirculations[0].nested), (4, false));
        assert_eq!(s.timeouts, BTreeMap::from([("ovs_tp_1_udp4".to_owned(), BTreeSet::from([5]))]));
    }

    #[test]
    fn nat_sets_and_copies_are_seen() {
        let s = summary(|r| {
            r.push_nested(action::CT, &ct(true)).push_u32(action::RECIRC, 4);
        });
        assert!(s.recirculations[0].before.nat && s.recirculations[0].before.touched.has(key::IPV4));
        assert!(!s.recirculations[0].before.touched.has(key::ETHERNET));
        let s = summary(|r| {
            r.push_u32(action::OUTPUT, 2).push_u32(action::RECIRC, 4);
        });
        assert!(s.recirculations[0].before.copied);
        let s = summary(|r| {
            let mut set = AttrBuf::new();
            set.push(key::ETHERNET, &[0; 24]);
            r.push_nested(action::SET_MASKED, &set).push_u32(action::RECIRC, 4);
        });
        let before = &s.recirculations[0].before;
        assert!(before.changed && before.touched.has(key::ETHERNET) && !before.touched.has(key::IPV4));
        let s = summary(|r| {
            r.push(999, &[]).push_u32(action::RECIRC, 4);
        });
        assert!(s.recirculations[0].before.unknown);
    }

    #[test]
    fn another_ethernet_header_leaves_what_is_behind_it() {
        let s = summary(|r| {
            r.push(action::POP_ETH, &[]).push(action::PUSH_ETH, &[2; 12]).push_u32(action::RECIRC, 4);
        });
        let before = &s.recirculations[0].before;
        assert!(before.untold && before.touched.has(key::ETHERNET) && before.touched.has(key::ETHERTYPE));
        assert!(!before.touched.has(key::UDP) && !before.touched.has(key::IPV4));
    }

    #[test]
    fn what_comes_behind_a_recirculation_is_beside_it() {
        let beside = |build: fn(&mut AttrBuf)| {
            summary(|r| {
                r.push_nested(action::CT, &ct(false)).push_u32(action::RECIRC, 4);
                build(r);
            })
            .recirculations[0]
                .beside
        };
        assert!(!beside(|_| {}));
        assert!(!beside(|r| {
            r.push_nested(action::CT, &ct(false)).push(action::POP_VLAN, &[]);
        }));
        for kind in [action::OUTPUT, action::RECIRC] {
            let s = summary(|r| {
                r.push_u32(action::RECIRC, 4).push_u32(kind, 5);
            });
            assert!(s.recirculations[0].beside);
        }
        for kind in [action::CLONE, action::SAMPLE, action::CHECK_PKT_LEN, action::PSAMPLE, 999] {
            assert!(gives_away(kind));
        }
    }

    #[test]
    fn what_is_in_a_nest_is_found_and_does_not_touch_the_packet_outside() {
        let s = summary(|r| {
            let mut inner = AttrBuf::new();
            inner.push_u32(action::METER, 9).push(action::POP_VLAN, &[]).push_u32(action::RECIRC, 6);
            r.push_nested(action::CLONE, &inner).push_u32(action::RECIRC, 4);
        });
        assert_eq!(s.recirculations.iter().map(|r| (r.id, r.nested)).collect::<Vec<_>>(), [(6, true), (4, false)]);
        assert_eq!(s.meters.iter().collect::<Vec<_>>(), [&9]);
        assert!(s.recirculations[1].before.copied && !s.recirculations[1].before.changed);
    }

    #[test]
    fn forwarding_and_its_absence() {
        assert!(!summary(|_| {}).forwards());
        assert!(!summary(|r| {
            r.push_nested(action::CT, &ct(false));
        })
        .forwards());
        assert!(summary(|r| {
            r.push_u32(action::OUTPUT, 1);
        })
        .forwards());
        assert!(ActionSummary::of(userspace(cookie::SLOW_PATH).as_bytes()).unwrap().forwards());
        let mut sample = AttrBuf::new();
        sample.push_u32(1, 1000).push_nested(uapi::SAMPLE_ATTR_ACTIONS, &userspace(cookie::SFLOW));
        assert!(!summary(|r| {
            r.push_nested(action::SAMPLE, &sample);
        })
        .forwards());
    }

    #[test]
    fn a_metered_way_to_the_daemon_is_only_userspace() {
        let mut inner = AttrBuf::new();
        inner.push_u32(action::METER, 1);
        let inner = [inner.as_bytes(), userspace(cookie::CONTROLLER).as_bytes()].concat();
        let mut run = AttrBuf::new();
        run.push(action::CLONE, &inner);
        let s = ActionSummary::of(run.as_bytes()).unwrap();
        assert!(s.only_userspace() && s.has_cookie(Cookie::Controller) && s.meters.contains(&1));
        run.push_u32(action::OUTPUT, 1);
        assert!(!ActionSummary::of(run.as_bytes()).unwrap().only_userspace());
    }

    #[test]
    fn endless_nesting_is_refused() {
        let mut run = AttrBuf::new();
        for _ in 0..100 {
            let mut outer = AttrBuf::new();
            outer.push_nested(action::CLONE, &run);
            run = outer;
        }
        assert!(ActionSummary::of(run.as_bytes()).is_err());
    }
}

//! What becomes of a parked packet: started again, or counted under the reason why it must not (hazards 10 and 11).
//!
//! Pure: it decides by the upcall and by the flow table as it was before flows were removed.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::OnceLock;

use super::successors::{shape_of, Leg, Successors};
use super::undo::{Halt, Passage, Traveller, Undone};
use crate::conntrack::Connections;
use crate::error::Result;
use crate::flow_key::uapi::{action, USERSPACE_ATTR_PID, USERSPACE_ATTR_USERDATA};
use crate::flow_key::{self, ActionSummary, Cookie, FlatKey, Known, Masked, Recirculation, Step, Touched};
use crate::netlink::attr::AttrBuf;
use crate::ovs::{Flow, Upcall, UpcallKind};

/// How many recirculations a packet may have behind it: OVS stops at 4,096 resubmits, the kernel at a nesting of 4
/// or 10 deferred actions; a longer chain in the dump is a cycle of ids.
const MAX_CHAIN: usize = 16;

/// Why a packet is not replayed. The names are those of the report and stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unreplayable {
    /// A `ct` with NAT may have changed it before the recirculation, and the connection table cannot be asked.
    NatBeforeRecirc,
    /// A `ct` with NAT changed it before the recirculation, and its connection is no longer known.
    NatConnectionGone,
    /// A `ct` with NAT changed it before the recirculation, and perhaps its payload: the connection has a helper.
    NatHelper,
    /// A `ct` with NAT may have changed it before the recirculation, and it is of a protocol that is not taken back.
    NatProtocol,
    /// An action changed it before the recirculation in a way that is not taken back (Ethernet and NSH headers).
    HeaderChangeBeforeRecirc,
    /// An action changed it before the recirculation, and its flow does not match all that was changed.
    HeaderNotExact,
    /// A copy left before the recirculation (output, userspace, sample, clone): it would leave twice.
    CopyBeforeRecirc,
    /// Beside the recirculation the packet went on elsewhere: that would happen twice.
    CopyBesideRecirc,
    /// The recirculation is inside a clone, sample or check_pkt_len.
    NestedRecirc,
    /// An action this library does not know comes before the recirculation.
    UnknownActionBeforeRecirc,
    /// Flows that can have produced it differ in what they did to it.
    ParentsDisagree,
    /// No flow in the dump recirculates to the id in its key.
    NoParent,
    /// A copy for sFlow.
    ActionSflow,
    /// A copy for the `sample` action.
    ActionFlowSample,
    /// A copy for IPFIX.
    ActionIpfix,
    /// Sent up by an action without a cookie that says what for.
    ActionUnknownCookie,
    /// For a controller, by a flow that did something else with the packet as well.
    ControllerCopy,
    /// For a controller, by a flow that is not in the dump.
    ControllerNoFlow,
    /// The datapath cut it off before it was sent up.
    Truncated,
    /// Its key, or the upcall itself, could not be read.
    Malformed,
}

impl Unreplayable {
    /// The name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Unreplayable::NatBeforeRecirc => "nat_before_recirc",
            Unreplayable::NatConnectionGone => "nat_connection_gone",
            Unreplayable::NatHelper => "nat_helper",
            Unreplayable::NatProtocol => "nat_protocol",
            Unreplayable::HeaderChangeBeforeRecirc => "header_change_before_recirc",
            Unreplayable::HeaderNotExact => "header_change_not_exact",
            Unreplayable::CopyBeforeRecirc => "copy_before_recirc",
            Unreplayable::CopyBesideRecirc => "copy_beside_recirc",
            Unreplayable::NestedRecirc => "nested_recirc",
            Unreplayable::UnknownActionBeforeRecirc => "unknown_action_before_recirc",
            Unreplayable::ParentsDisagree => "parents_disagree",
            Unreplayable::NoParent => "no_parent",
            Unreplayable::ActionSflow => "action_sflow",
            Unreplayable::ActionFlowSample => "action_flow_sample",
            Unreplayable::ActionIpfix => "action_ipfix",
            Unreplayable::ActionUnknownCookie => "action_unknown_cookie",
            Unreplayable::ControllerCopy => "controller_copy",
            Unreplayable::ControllerNoFlow => "controller_no_flow",
            Unreplayable::Truncated => "truncated",
            Unreplayable::Malformed => "malformed",
        }
    }

    /// Whether the packet may go on where it was, if that place is found again: only a restart would do harm.
    pub(super) fn may_go_on(self) -> bool {
        matches!(self, Unreplayable::CopyBeforeRecirc | Unreplayable::CopyBesideRecirc | Unreplayable::NestedRecirc)
    }

    /// Whether it was a copy, so that no packet of a flow is lost with it.
    pub fn is_copy(self) -> bool {
        matches!(
            self,
            Unreplayable::ActionSflow
                | Unreplayable::ActionFlowSample
                | Unreplayable::ActionIpfix
                | Unreplayable::ControllerCopy
        )
    }
}

impl fmt::Display for Unreplayable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a packet is given back to the datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay<'a> {
    /// As it entered.
    pub packet: Cow<'a, [u8]>,
    /// `OVS_KEY_ATTR_*` run for EXECUTE.
    pub key: Cow<'a, [u8]>,
    /// What is done with it.
    pub then: Then,
    /// What was taken back of it.
    pub undone: Undone,
}

/// What is done with a packet that is given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// It is looked up as if it had just come to this recirculation id; 0 is the start.
    Recirc(u32),
    /// It is sent up again, with this user data.
    Userspace(Option<Vec<u8>>),
}

/// Port id of a `userspace` action: with dispatch per CPU the kernel asks for one and does not look at it.
const ANY_PORT_ID: u32 = 1;

impl Replay<'_> {
    /// The actions of the replay.
    pub fn actions(&self) -> Vec<u8> {
        let mut actions = AttrBuf::new();
        match &self.then {
            Then::Recirc(id) => actions.push_u32(action::RECIRC, *id),
            Then::Userspace(userdata) => {
                let mut inner = AttrBuf::new();
                inner.push_u32(USERSPACE_ATTR_PID, ANY_PORT_ID);
                if let Some(userdata) = userdata {
                    inner.push(USERSPACE_ATTR_USERDATA, userdata);
                }
                actions.push_nested(action::USERSPACE, &inner)
            }
        };
        actions.into_bytes()
    }
}

/// What the way back of a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// It is to start again.
    Restart,
    /// It is to go on in the flows of the new daemon: what has left of it on its way does no harm.
    GoOn,
}

/// A flow that recirculates, seen from the id it sends packets to.
#[derive(Debug)]
struct Parent<'a> {
    /// The id it is entered by.
    from: u32,
    /// The port it matches, if it matches one: ids may have thousands of parents, and most are another port's.
    port: Option<u32>,
    flow: Match<'a>,
    touched: Touched,
    steps: Vec<Step>,
    fault: Option<Unreplayable>,
    /// The steps do not tell all that it did.
    untold: bool,
}

impl Parent<'_> {
    /// Whether what it did to packets has to be taken back.
    fn changes_packets(&self) -> bool {
        self.steps.iter().any(|step| !matches!(step, Step::Ct { nat: false, .. } | Step::CtClear))
    }

    /// It as a leg of the way of `packet`, which came to it so and was sent on to `id`; None if it cannot be read.
    fn leg_to(&self, id: u32, packet: &Traveller<'_>) -> Option<Leg> {
        let (shape, ids) = shape_of(&self.flow.flow.actions).ok()?;
        let which = ids.iter().position(|to| *to == id)?;
        Some(Leg { key: packet.key().ok()?, shape, which })
    }

    fn translates(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Ct { nat: true, .. }))
    }
}

/// A flow that sends packets to a controller.
#[derive(Debug)]
struct ToController<'a> {
    flow: Match<'a>,
    userdata: Vec<u8>,
    alone: bool,
}

/// The match of a flow, taken apart when it is first needed: where all parents of an id agree it never is.
#[derive(Debug)]
struct Match<'a> {
    flow: &'a Flow,
    masked: OnceLock<Option<(Masked, Known)>>,
}

impl<'a> Match<'a> {
    fn of(flow: &'a Flow) -> Self {
        Match { flow, masked: OnceLock::new() }
    }

    /// The match, and what it says of packets; None if the flow cannot be read.
    fn read(&self) -> Option<&(Masked, Known)> {
        let (key, mask) = (&self.flow.key, &self.flow.mask);
        self.masked.get_or_init(|| Masked::of(key, mask).ok().zip(Known::of(key, mask).ok())).as_ref()
    }

    /// Whether the flow may have matched; one that cannot be read may have.
    fn may_have_matched(&self, key: &FlatKey, touched: &Touched) -> bool {
        self.read().is_none_or(|(masked, _)| masked.matches(key, touched))
    }
}

/// What the flows of a dump say about where packets come from. To be built before the gap begins, or while the flow
/// table stands still: it takes a few microseconds for each flow.
#[derive(Debug, Default)]
pub struct Origins<'a> {
    /// The daemon that made the flows is the one that packets are given back to.
    living: bool,
    parents: HashMap<u32, Vec<Parent<'a>>>,
    controllers: HashMap<u32, Vec<ToController<'a>>>,
    /// Verdicts of ids whose parents all agree, so that packets need not be compared with each of them.
    agreed: HashMap<u32, std::result::Result<(), Unreplayable>>,
    malformed: usize,
}

impl<'f> Origins<'f> {
    /// Reads the flow table as it was before flows were removed. Flows of earlier dumps may follow: a flow that the
    /// old daemon let go while packets were parked is then still known.
    pub fn of(flows: impl IntoIterator<Item = &'f Flow>) -> Self {
        let mut origins = Origins::default();
        for flow in flows {
            if origins.add(flow).is_err() {
                origins.malformed += 1;
            }
        }
        let ids: Vec<u32> = origins.parents.keys().copied().collect();
        for id in ids {
            if let Some(verdict) = origins.agreement(id, &mut BTreeSet::new()) {
                origins.agreed.insert(id, verdict);
            }
        }
        origins
    }

    /// For packets that go back to the daemon that made the flows: it knows its ids and its cookies.
    pub fn living() -> Self {
        Origins { living: true, ..Origins::default() }
    }

    /// Flows that could not be read.
    pub fn malformed(&self) -> usize {
        self.malformed
    }

    fn add(&mut self, flow: &'f Flow) -> Result<()> {
        let actions = ActionSummary::of(&flow.actions)?;
        let controller = actions.userspace.iter().find(|u| u.cookie == Cookie::Controller);
        if actions.recirculations.is_empty() && controller.is_none() {
            return Ok(());
        }
        let from = flow_key::recirc_id(&flow.key)?;
        if let Some(controller) = controller {
            let userdata = controller.userdata.clone().unwrap_or_default();
            let alone = actions.only_userspace();
            let entry = ToController { flow: Match::of(flow), userdata, alone };
            self.controllers.entry(from).or_default().push(entry);
        }
        for recirculation in actions.recirculations {
            let fault = fault(&recirculation);
            let before = recirculation.before;
            let untold = before.untold || before.unknown;
            let (port, flow, touched) = (matched_port(flow)?, Match::of(flow), before.touched);
            let parent = Parent { from, port, flow, touched, steps: before.steps, fault, untold };
            self.parents.entry(recirculation.id).or_default().push(parent);
        }
        Ok(())
    }

    /// What all parents of `id`, and theirs, agree upon; None if it takes the packet's key to tell.
    fn agreement(&self, id: u32, seen: &mut BTreeSet<u32>) -> Option<std::result::Result<(), Unreplayable>> {
        if !seen.insert(id) || seen.len() > MAX_CHAIN {
            return None;
        }
        let mut verdicts = Vec::new();
        let mut upwards = BTreeSet::new();
        for parent in self.parents.get(&id)? {
            match parent.fault {
                Some(reason) => verdicts.push(Err(reason)),
                None if parent.changes_packets() => return None,
                None if parent.from == 0 => verdicts.push(Ok(())),
                None => {
                    upwards.insert(parent.from);
                }
            }
        }
        for from in upwards {
            verdicts.push(self.agreement(from, &mut seen.clone())?);
        }
        let first = *verdicts.first()?;
        verdicts.iter().all(|v| *v == first).then_some(first)
    }

    /// The packet as it entered table 0, from how it is at recirculation `id`.
    fn trace<'a>(
        &self,
        id: u32,
        packet: Traveller<'a>,
        purpose: Purpose,
        chain: &mut Vec<u32>,
        connections: &mut dyn Connections,
    ) -> std::result::Result<Traveller<'a>, Unreplayable> {
        let agreed = match (id, purpose) {
            (0, _) => Some(Ok(())),
            (_, Purpose::Restart) => self.agreed.get(&id).copied(),
            (_, Purpose::GoOn) => None,
        };
        if let Some(verdict) = agreed {
            verdict?;
            // Its key tells of a translation, and no flow on this way translates: it came another way.
            return match packet.is_translated() {
                true => Err(Unreplayable::NoParent),
                false => Ok(packet),
            };
        }
        // A cycle of ids: no packet has come that way only, so it says nothing.
        if chain.contains(&id) || chain.len() >= MAX_CHAIN {
            return Err(Unreplayable::NoParent);
        }
        let key = packet.key().and_then(|key| FlatKey::of(&key)).map_err(|_| Unreplayable::Malformed)?;
        let in_port = packet.in_port();
        chain.push(id);
        let mut found = None;
        for parent in self.parents.get(&id).into_iter().flatten() {
            if parent.port.is_some_and(|port| in_port.is_some_and(|came_by| port != came_by)) {
                continue;
            }
            let touched = if packet.reassembled() { Touched::headers() } else { parent.touched };
            if !parent.flow.may_have_matched(&key, &touched) {
                continue;
            }
            let Some(verdict) = self.through(parent, (id, &packet), purpose, chain, connections) else { continue };
            match &found {
                None => found = Some(verdict),
                Some(other) if *other == verdict => {}
                Some(_) => {
                    found = Some(Err(Unreplayable::ParentsDisagree));
                    break;
                }
            }
        }
        chain.pop();
        found.unwrap_or(Err(Unreplayable::NoParent))
    }

    /// The packet as it entered table 0 if it came through `parent`; None if it cannot have.
    fn through<'a>(
        &self,
        parent: &Parent<'f>,
        (id, packet): (u32, &Traveller<'a>),
        purpose: Purpose,
        chain: &mut Vec<u32>,
        connections: &mut dyn Connections,
    ) -> Option<std::result::Result<Traveller<'a>, Unreplayable>> {
        if let Some(reason) = parent.fault {
            if purpose == Purpose::Restart || !reason.may_go_on() || parent.untold {
                return Some(Err(reason));
            }
        }
        let (masked, known) = match parent.flow.read() {
            Some(read) => read,
            None => return Some(Err(Unreplayable::Malformed)),
        };
        // Where two `ct` of a zone follow each other, either may have been the one that translated.
        for translated_before in [false, true] {
            let mut before = packet.clone();
            let passage = Passage { known, masked, steps: &parent.steps, translated_before };
            match before.back(&passage, connections) {
                Ok(()) => {
                    if purpose == Purpose::GoOn {
                        before.note(parent.leg_to(id, &before)?);
                    }
                    return Some(self.trace(parent.from, before, purpose, chain, connections));
                }
                Err(Halt::Cannot(reason)) => return Some(Err(reason)),
                Err(Halt::NotThisWay) if parent.translates() => {}
                Err(Halt::NotThisWay) => return None,
            }
        }
        None
    }

    /// Whether the flow that sent `upcall` to a controller did nothing else with the packet.
    fn controller_alone(&self, id: u32, key: &FlatKey, userdata: &[u8]) -> std::result::Result<(), Unreplayable> {
        let mut candidates: Vec<&ToController<'f>> =
            self.controllers.get(&id).into_iter().flatten().filter(|c| c.userdata == userdata).collect();
        if candidates.iter().any(|c| c.alone) && candidates.iter().any(|c| !c.alone) {
            // What is done beside the copy may have changed the packet: only the port it came by is compared there.
            candidates.retain(|c| {
                c.flow.may_have_matched(key, &if c.alone { Touched::default() } else { Touched::headers() })
            });
        }
        match candidates.as_slice() {
            [] => Err(Unreplayable::ControllerNoFlow),
            all if all.iter().all(|c| c.alone) => Ok(()),
            _ => Err(Unreplayable::ControllerCopy),
        }
    }

    /// Decides about one parked packet. Translations are looked up in `connections`.
    ///
    /// # Errors
    /// The reason why it must not be replayed.
    pub fn plan<'a>(
        &self,
        upcall: &'a Upcall,
        connections: &mut dyn Connections,
    ) -> std::result::Result<Replay<'a>, Unreplayable> {
        let malformed = |_| Unreplayable::Malformed;
        let id = flow_key::recirc_id(&upcall.key).map_err(malformed)?;
        if self.living && upcall.kind == UpcallKind::Action {
            return sent_up_again(upcall);
        }
        if upcall.kind == UpcallKind::Action {
            self.admit_action(id, upcall)?;
        }
        if upcall.len.is_some() {
            return Err(Unreplayable::Truncated);
        }
        if id == 0 || self.living {
            return Ok(unchanged(upcall, Then::Recirc(id), Undone::default()));
        }
        if !self.agreed.contains_key(&id) && !self.parents.contains_key(&id) {
            return Err(Unreplayable::NoParent);
        }
        let packet = Traveller::of(upcall).map_err(malformed)?;
        let start = self.trace(id, packet, Purpose::Restart, &mut Vec::new(), connections)?;
        let key = Cow::Owned(start.key().map_err(malformed)?);
        Ok(Replay { packet: start.packet(), key, then: Then::Recirc(0), undone: start.undone() })
    }

    /// The packet as it is, at the id that stands for its place in the new daemon's flows; None if there is none yet.
    /// For packets that [`Origins::plan`] does not let start again because something of them has left.
    pub(super) fn go_on<'a>(
        &self,
        upcall: &'a Upcall,
        successors: &Successors,
        connections: &mut dyn Connections,
    ) -> Option<Replay<'a>> {
        let id = flow_key::recirc_id(&upcall.key).ok()?;
        let packet = Traveller::of(upcall).ok()?;
        let start = self.trace(id, packet, Purpose::GoOn, &mut Vec::new(), connections).ok()?;
        let then = Then::Recirc(successors.id_behind(&start.into_legs())?);
        Some(unchanged(upcall, then, Undone { continued: true, ..Undone::default() }))
    }

    /// Passes the packets of `userspace` actions whose only fate was the daemon.
    fn admit_action(&self, id: u32, upcall: &Upcall) -> std::result::Result<(), Unreplayable> {
        match Cookie::of(upcall.userdata.as_deref()) {
            Cookie::SlowPath => Ok(()),
            Cookie::Controller => {
                let key = FlatKey::of(&upcall.key).map_err(|_| Unreplayable::Malformed)?;
                self.controller_alone(id, &key, upcall.userdata.as_deref().unwrap_or_default())
            }
            Cookie::Sflow => Err(Unreplayable::ActionSflow),
            Cookie::FlowSample => Err(Unreplayable::ActionFlowSample),
            Cookie::Ipfix => Err(Unreplayable::ActionIpfix),
            Cookie::Unspec | Cookie::Other(_) | Cookie::None => Err(Unreplayable::ActionUnknownCookie),
        }
    }
}

fn unchanged(upcall: &Upcall, then: Then, undone: Undone) -> Replay<'_> {
    let (packet, key) = (Cow::Borrowed(&upcall.packet[..]), Cow::Borrowed(&upcall.key[..]));
    Replay { packet, key, then, undone }
}

/// The packet of a `userspace` action once more, for the daemon whose cookie it is.
fn sent_up_again(upcall: &Upcall) -> std::result::Result<Replay<'_>, Unreplayable> {
    match Cookie::of(upcall.userdata.as_deref()) {
        _ if upcall.len.is_some() => Err(Unreplayable::Truncated),
        // The kernel would tell the actions and the tunnel of the replay.
        Cookie::Sflow if upcall.actions.is_some() || upcall.egress_tun_key.is_some() => Err(Unreplayable::ActionSflow),
        Cookie::FlowSample if upcall.egress_tun_key.is_some() => Err(Unreplayable::ActionFlowSample),
        Cookie::Ipfix if upcall.egress_tun_key.is_some() => Err(Unreplayable::ActionIpfix),
        _ => Ok(unchanged(upcall, Then::Userspace(upcall.userdata.clone()), Undone::default())),
    }
}

/// The port that a flow matches exactly.
fn matched_port(flow: &Flow) -> Result<Option<u32>> {
    let exact = flow.mask.is_empty() || flow_key::in_port(&flow.mask)? == Some(u32::MAX);
    Ok(flow_key::in_port(&flow.key)?.filter(|_| exact))
}

/// Why a packet that went this way may not start again, whatever it was; None if it may.
fn fault(way: &Recirculation) -> Option<Unreplayable> {
    if way.before.copied {
        Some(Unreplayable::CopyBeforeRecirc)
    } else if way.beside {
        Some(Unreplayable::CopyBesideRecirc)
    } else if way.nested {
        Some(Unreplayable::NestedRecirc)
    } else if way.before.untold {
        Some(Unreplayable::HeaderChangeBeforeRecirc)
    } else if way.before.unknown {
        Some(Unreplayable::UnknownActionBeforeRecirc)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::{Connection, Tuple};
    use crate::flow_key::uapi::{cookie, ct, key, USERSPACE_ATTR_USERDATA};
    use crate::netlink::attr::Attrs;
    use proptest::prelude::*;

    const EXACT: [u8; 4] = [0xff; 4];

    /// Nobody is tracked.
    struct Nobody;

    impl Connections for Nobody {
        fn find(&mut self, _: u16, _: &Tuple) -> Result<Option<Connection>> {
            Ok(None)
        }
    }

    fn tracked_key(recirc: u32, port: u32, state: u32) -> Vec<u8> {
        let mut k = AttrBuf::new();
        k.push_u32(key::RECIRC_ID, recirc).push_u32(key::DP_HASH, 0).push_u32(key::IN_PORT, port);
        k.push_u32(key::CT_STATE, state).push(key::CT_ZONE, &5u16.to_ne_bytes()).push(key::ETHERNET, &[2; 12]);
        k.as_bytes().to_vec()
    }

    fn key_of(recirc: u32, port: u32) -> Vec<u8> {
        tracked_key(recirc, port, if recirc == 0 { 0 } else { 0x21 })
    }

    fn copy_recirc(id: u32) -> AttrBuf {
        let mut a = AttrBuf::new();
        a.push_u32(action::OUTPUT, 9).push_u32(action::RECIRC, id);
        a
    }

    fn flow(recirc: u32, port: u32, actions: &AttrBuf) -> Flow {
        let mut m = AttrBuf::new();
        m.push(key::RECIRC_ID, &EXACT).push(key::IN_PORT, &EXACT);
        let actions = actions.as_bytes().to_vec();
        Flow { key: key_of(recirc, port), mask: m.as_bytes().to_vec(), actions, ..Flow::default() }
    }

    fn ct_recirc(nat: bool, id: u32) -> AttrBuf {
        let mut inner = AttrBuf::new();
        inner.push(ct::ZONE, &5u16.to_ne_bytes());
        if nat {
            inner.push_nested(ct::NAT, &AttrBuf::new());
        }
        let mut a = AttrBuf::new();
        a.push_nested(action::CT, &inner).push_u32(action::RECIRC, id);
        a
    }

    fn userspace(kind: u16) -> (AttrBuf, Vec<u8>) {
        let mut userdata = vec![0u8; 48];
        userdata[..2].copy_from_slice(&kind.to_ne_bytes());
        let mut inner = AttrBuf::new();
        inner.push_u32(1, 77).push(USERSPACE_ATTR_USERDATA, &userdata);
        let mut outer = AttrBuf::new();
        outer.push_nested(action::USERSPACE, &inner);
        (outer, userdata)
    }

    fn upcall(kind: UpcallKind, key: Vec<u8>, userdata: Option<Vec<u8>>) -> Upcall {
        Upcall {
            kind,
            ifindex: 5,
            packet: vec![0; 60],
            key,
            userdata,
            actions: None,
            egress_tun_key: None,
            mru: None,
            len: None,
            hash: None,
            unknown: Vec::new(),
        }
    }

    fn origins_of(flows: Vec<Flow>) -> Origins<'static> {
        Origins::of(&*flows.leak())
    }

    fn miss(recirc: u32, port: u32) -> Upcall {
        upcall(UpcallKind::Miss, key_of(recirc, port), None)
    }

    fn reason(origins: &Origins<'_>, upcall: &Upcall) -> Option<Unreplayable> {
        origins.plan(upcall, &mut Nobody).err()
    }

    #[test]
    fn a_miss_in_table_0_keeps_its_key() {
        let m = miss(0, 1);
        assert_eq!(Origins::default().plan(&m, &mut Nobody).unwrap().key, Cow::Borrowed(&m.key[..]));
    }

    #[test]
    fn a_miss_behind_ct_starts_again_without_the_pipeline() {
        let origins = origins_of(vec![flow(0, 1, &ct_recirc(false, 7)), flow(7, 1, &ct_recirc(false, 9))]);
        for id in [7, 9] {
            let m = miss(id, 1);
            let replay = origins.plan(&m, &mut Nobody).unwrap();
            let kinds: Vec<u16> = Attrs(&replay.key).map(|a| a.unwrap().kind).collect();
            assert_eq!(kinds, [key::IN_PORT, key::ETHERNET]);
        }
    }

    #[test]
    fn what_was_done_before_the_recirculation_decides() {
        let case = |build: &dyn Fn(&mut AttrBuf)| {
            let mut a = AttrBuf::new();
            build(&mut a);
            a.push_u32(action::RECIRC, 7);
            reason(&origins_of(vec![flow(0, 1, &a)]), &miss(7, 1))
        };
        assert_eq!(case(&|_| {}), None);
        assert_eq!(
            case(&|a| {
                a.push(action::HASH, &[0; 8]);
            }),
            None
        );
        assert_eq!(
            case(&|a| {
                a.push_u32(action::OUTPUT, 3);
            }),
            Some(Unreplayable::CopyBeforeRecirc)
        );
        assert_eq!(
            case(&|a| {
                *a = userspace(cookie::SFLOW).0;
            }),
            Some(Unreplayable::CopyBeforeRecirc)
        );
        assert_eq!(
            case(&|a| {
                a.push_nested(action::CLONE, &AttrBuf::new());
            }),
            Some(Unreplayable::CopyBeforeRecirc)
        );
        assert_eq!(
            case(&|a| {
                a.push_nested(action::SAMPLE, &AttrBuf::new());
            }),
            Some(Unreplayable::CopyBeforeRecirc)
        );
        assert_eq!(
            case(&|a| {
                a.push(action::POP_VLAN, &[]);
            }),
            Some(Unreplayable::HeaderNotExact)
        );
        assert_eq!(
            case(&|a| {
                a.push(action::PUSH_VLAN, &[0; 4]);
            }),
            Some(Unreplayable::HeaderNotExact)
        );
        assert_eq!(
            case(&|a| {
                a.push(200, &[]);
            }),
            Some(Unreplayable::UnknownActionBeforeRecirc)
        );
        assert_eq!(
            case(&|a| {
                a.push(action::PUSH_ETH, &[0; 12]);
            }),
            Some(Unreplayable::HeaderChangeBeforeRecirc)
        );
        let mut beside = ct_recirc(false, 7);
        beside.push_u32(action::OUTPUT, 3);
        assert_eq!(reason(&origins_of(vec![flow(0, 1, &beside)]), &miss(7, 1)), Some(Unreplayable::CopyBesideRecirc));
        let nat = origins_of(vec![flow(0, 1, &ct_recirc(true, 7))]);
        assert_eq!(reason(&nat, &miss(7, 1)), None);
        let translated = upcall(UpcallKind::Miss, tracked_key(7, 1, 0x61), None);
        assert_eq!(reason(&nat, &translated), Some(Unreplayable::NatProtocol));
        let mut inner = AttrBuf::new();
        inner.push_u32(action::RECIRC, 7);
        let mut clone = AttrBuf::new();
        clone.push_nested(action::CLONE, &inner);
        assert_eq!(reason(&origins_of(vec![flow(0, 1, &clone)]), &miss(7, 1)), Some(Unreplayable::NestedRecirc));
    }

    #[test]
    fn only_parents_that_match_the_packet_count() {
        let flows = [flow(0, 1, &ct_recirc(false, 7)), flow(0, 2, &copy_recirc(7))];
        let origins = origins_of(flows.to_vec());
        assert_eq!(reason(&origins, &miss(7, 1)), None);
        assert_eq!(reason(&origins, &miss(7, 2)), Some(Unreplayable::CopyBeforeRecirc));
        assert_eq!(reason(&origins, &miss(7, 3)), Some(Unreplayable::NoParent));
        assert_eq!(reason(&origins, &miss(8, 1)), Some(Unreplayable::NoParent));
        let both = origins_of(vec![flow(0, 1, &ct_recirc(false, 7)), flow(0, 1, &copy_recirc(7))]);
        assert_eq!(reason(&both, &miss(7, 1)), Some(Unreplayable::ParentsDisagree));
    }

    #[test]
    fn a_fault_anywhere_up_the_chain_counts() {
        let origins = origins_of(vec![flow(0, 1, &copy_recirc(7)), flow(7, 1, &ct_recirc(false, 9))]);
        assert_eq!(reason(&origins, &miss(9, 1)), Some(Unreplayable::CopyBeforeRecirc));
        let cycle = origins_of(vec![flow(7, 1, &ct_recirc(false, 9)), flow(9, 1, &ct_recirc(false, 7))]);
        assert_eq!(reason(&cycle, &miss(9, 1)), Some(Unreplayable::NoParent));
    }

    #[test]
    fn actions_are_replayed_only_where_the_daemon_was_the_only_fate() {
        let none = Origins::default();
        let sent = |kind: u16| upcall(UpcallKind::Action, key_of(0, 1), Some(userspace(kind).1));
        assert_eq!(reason(&none, &sent(cookie::SLOW_PATH)), None);
        assert_eq!(reason(&none, &sent(cookie::SFLOW)), Some(Unreplayable::ActionSflow));
        assert_eq!(reason(&none, &sent(cookie::IPFIX)), Some(Unreplayable::ActionIpfix));
        assert_eq!(reason(&none, &sent(cookie::FLOW_SAMPLE)), Some(Unreplayable::ActionFlowSample));
        assert_eq!(reason(&none, &sent(cookie::UNSPEC)), Some(Unreplayable::ActionUnknownCookie));
        assert_eq!(
            reason(&none, &upcall(UpcallKind::Action, key_of(0, 1), None)),
            Some(Unreplayable::ActionUnknownCookie)
        );
        assert_eq!(reason(&none, &sent(cookie::CONTROLLER)), Some(Unreplayable::ControllerNoFlow));
        let (only, _) = userspace(cookie::CONTROLLER);
        let mut more = only.clone();
        more.push_u32(action::OUTPUT, 2);
        let packet_in = sent(cookie::CONTROLLER);
        assert_eq!(reason(&origins_of(vec![flow(0, 1, &only)]), &packet_in), None);
        assert_eq!(reason(&origins_of(vec![flow(0, 1, &more)]), &packet_in), Some(Unreplayable::ControllerCopy));
        assert_eq!(reason(&origins_of(vec![flow(0, 1, &only), flow(0, 2, &more)]), &packet_in), None);
        assert_eq!(
            reason(&origins_of(vec![flow(0, 1, &only), flow(0, 1, &more)]), &packet_in),
            Some(Unreplayable::ControllerCopy)
        );
        let mut cut = sent(cookie::SLOW_PATH);
        cut.len = Some(1500);
        assert_eq!(reason(&none, &cut), Some(Unreplayable::Truncated));
    }

    #[test]
    fn names_are_stable_and_distinct() {
        let names = [
            Unreplayable::NatBeforeRecirc,
            Unreplayable::HeaderChangeBeforeRecirc,
            Unreplayable::CopyBeforeRecirc,
            Unreplayable::ParentsDisagree,
            Unreplayable::NoParent,
            Unreplayable::ActionSflow,
        ]
        .map(Unreplayable::name);
        assert_eq!(
            names,
            [
                "nat_before_recirc",
                "header_change_before_recirc",
                "copy_before_recirc",
                "parents_disagree",
                "no_parent",
                "action_sflow"
            ]
        );
    }

    proptest! {
        #[test]
        fn a_packet_behind_nat_or_a_copy_is_never_replayed(
            edges in proptest::collection::vec((0u32..5, 1u32..6, 1u32..4, 0u8..3), 1..25),
            at in 1u32..6,
            port in 1u32..4,
        ) {
            let flows: Vec<Flow> = edges
                .iter()
                .map(|(from, to, port, what)| {
                    let mut a = AttrBuf::new();
                    if *what == 2 {
                        a.push_u32(action::OUTPUT, 9);
                        a.push_u32(action::RECIRC, *to);
                    } else {
                        a = ct_recirc(*what == 1, *to);
                    }
                    flow(*from, *port, &a)
                })
                .collect();
            // Every way from table 0 to `at`, by exhaustive search with a bounded length.
            let mut reach = vec![(0u32, false)];
            let mut dirty = false;
            for _ in 0..6 {
                let mut next = Vec::new();
                for (id, spoiled) in &reach {
                    for (from, to, p, what) in &edges {
                        if from == id && *p == port {
                            next.push((*to, *spoiled || *what != 0));
                        }
                    }
                }
                next.sort();
                next.dedup();
                dirty |= next.iter().any(|(id, spoiled)| *id == at && *spoiled);
                reach = next;
            }
            // The key says that it was translated, and there is no connection to take that back by.
            let packet = upcall(UpcallKind::Miss, tracked_key(at, port, 0x61), None);
            let verdict = origins_of(flows.to_vec()).plan(&packet, &mut Nobody).is_ok();
            prop_assert!(!(verdict && dirty));
        }

        #[test]
        fn planning_never_panics(
            key in proptest::collection::vec(any::<u8>(), 0..80),
            actions in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let f = Flow { key: key.clone(), mask: key.clone(), actions, ..Flow::default() };
            let _ = origins_of(vec![f]).plan(&upcall(UpcallKind::Miss, key.clone(), None), &mut Nobody);
            let _ = Origins::default().plan(&upcall(UpcallKind::Action, key.clone(), Some(key)), &mut Nobody);
        }
    }
}

//! The way back of a packet through the actions of the flows it has passed, to what it was when it entered.
//!
//! Headers are given back what the flow's match says they were, where the match says so for every bit that the action
//! wrote. Translations are taken back as the connection table knows them. Whatever the way, the packet that comes out
//! has to fit the match of the flow it is said to have passed.

use std::borrow::Cow;

use super::plan::Unreplayable;
use super::successors::Leg;
use crate::conntrack::{Connections, Tuple};
use crate::error::Result;
use crate::flow_key::uapi::{ct_state, key};
use crate::flow_key::{self, FlatKey, Known, Masked, Step, Touched};
use crate::netlink::attr::{AttrBuf, Attrs};
use crate::ovs::Upcall;
use crate::packet::Packet;

/// Bytes of `struct ovs_key_ipv4` and `ovs_key_ipv6` that no action sets: protocol and fragment.
const UNSETTABLE_IPV4: [usize; 2] = [8, 11];
const UNSETTABLE_IPV6: [usize; 2] = [36, 39];
/// The bit of a TCI that a key uses to say that there is a tag (`VLAN_CFI_MASK`).
const TAG_PRESENT: u16 = 0x1000;

/// Why a step back was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Halt {
    /// The packet cannot have come this way.
    NotThisWay,
    /// It may have, but what it was before cannot be told.
    Cannot(Unreplayable),
}

use Halt::{Cannot, NotThisWay};

/// What was taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undone {
    /// Address translation.
    pub nat: bool,
    /// Other changes of headers or metadata.
    pub headers: bool,
    /// Nothing: it went on where it was, in the new daemon's flows.
    pub continued: bool,
}

impl Undone {
    /// The names in the report of what was taken back.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let all = [("nat", self.nat), ("headers", self.headers), ("continued", self.continued)];
        all.into_iter().filter(|(_, done)| *done).map(|(name, _)| name)
    }
}

/// `ct` actions of one zone in a row: the kernel translates once among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group {
    zone: u16,
    /// The translation is undone, or there was none.
    done: bool,
}

/// What the key says of connection tracking; true of the last `ct` only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tracked {
    state: u32,
    zone: u16,
}

/// A packet on its way back.
#[derive(Clone, Debug)]
pub(super) struct Traveller<'a> {
    upcall: &'a Upcall,
    packet: Packet,
    /// Attributes of the key that are not read from the packet, as they were before.
    metadata: AttrBuf,
    tracked: Option<Tracked>,
    group: Option<Group>,
    undone: Undone,
    /// It begins with an Ethernet header; a packet of a layer 3 port does not.
    ethernet: bool,
    /// The flows it has passed, the last one first, where it is asked for.
    legs: Vec<Leg>,
}

impl PartialEq for Traveller<'_> {
    /// Whether it is the same packet that would start again, and has gone the same way where that was noted.
    fn eq(&self, other: &Self) -> bool {
        self.packet == other.packet && self.metadata == other.metadata && self.legs == other.legs
    }
}

/// A flow on the way: its match, and what its actions did.
pub(super) struct Passage<'a> {
    pub known: &'a Known,
    pub masked: &'a Masked,
    pub steps: &'a [Step],
    /// The translation is one of an earlier `ct` of the same zone, not of this flow's.
    pub translated_before: bool,
}

impl<'a> Traveller<'a> {
    /// A packet where the datapath gave it up.
    pub fn of(upcall: &'a Upcall) -> Result<Self> {
        let mut metadata = AttrBuf::new();
        let (mut state, mut zone, mut ethernet) = (None, 0, false);
        for attr in Attrs(&upcall.key) {
            let attr = attr?;
            match attr.kind {
                key::CT_STATE => state = Some(attr.u32()?),
                key::CT_ZONE => zone = attr.u16()?,
                key::ETHERNET => ethernet = true,
                kind if flow_key::is_metadata(kind) => {
                    metadata.push_attr(&attr);
                }
                _ => {}
            }
        }
        let tracked = state.map(|state| Tracked { state, zone });
        let packet = Packet::new(upcall.packet.clone());
        Ok(Traveller {
            upcall,
            packet,
            metadata,
            tracked,
            group: None,
            undone: Undone::default(),
            ethernet,
            legs: Vec::new(),
        })
    }

    /// What has been undone so far.
    pub fn undone(&self) -> Undone {
        self.undone
    }

    /// Notes a flow it has passed, from the end to the beginning.
    pub fn note(&mut self, leg: Leg) {
        self.legs.push(leg);
    }

    /// The flows it has passed, the first one first.
    pub fn into_legs(self) -> Vec<Leg> {
        self.legs.into_iter().rev().collect()
    }

    /// The port it came by.
    pub fn in_port(&self) -> Option<u32> {
        flow_key::in_port(&self.upcall.key).ok().flatten()
    }

    /// Whether a translation that the key tells of is still in the packet.
    pub fn is_translated(&self) -> bool {
        self.group.is_some_and(|group| !group.done) && self.was_translated()
    }

    fn was_translated(&self) -> bool {
        self.tracked.is_some_and(|tracked| tracked.state & ct_state::NAT != 0)
    }

    /// The packet has been put together from fragments by `ct`.
    pub fn reassembled(&self) -> bool {
        self.upcall.mru.is_some()
    }

    /// The packet, changed or as it came.
    pub fn packet(&self) -> Cow<'a, [u8]> {
        match self.packet.bytes() == self.upcall.packet {
            true => Cow::Borrowed(&self.upcall.packet),
            false => Cow::Owned(self.packet.bytes().to_vec()),
        }
    }

    /// The key it has now: without what the pipeline gave it.
    pub fn key(&self) -> Result<Vec<u8>> {
        if self.undone == Undone::default() {
            return flow_key::without_pipeline(&self.upcall.key);
        }
        let mut attrs = self.metadata.clone();
        flow_key::push_headers(&mut attrs, &self.packet, &self.upcall.key)?;
        Ok(attrs.into_bytes())
    }

    /// Goes back through a flow.
    pub fn back(&mut self, flow: &Passage<'_>, connections: &mut dyn Connections) -> std::result::Result<(), Halt> {
        let malformed = |_| Cannot(Unreplayable::Malformed);
        let tracks = flow.steps.iter().any(|step| matches!(step, Step::Ct { .. } | Step::CtClear));
        if self.group.is_none() && !tracks && self.tracked.is_some() {
            // Nothing has tracked it between that flow and here.
            let tracking = FlatKey::of(&self.upcall.key).map_err(malformed)?;
            if !flow.masked.matches_tracking(&tracking) {
                return Err(NotThisWay);
            }
        }
        let mut known = vec![flow.known.clone()];
        for step in flow.steps {
            known.extend(known.last().map(|k| k.clone().after(step)));
        }
        for (step, before) in flow.steps.iter().zip(&known).rev() {
            self.undo(step, before, flow.translated_before, connections)?;
        }
        // A match on the fragments that it was does not fit the whole.
        let in_pieces = self.reassembled() && (tracks || self.group.is_some());
        let touched = if in_pieces { Touched::headers() } else { Touched::default() };
        let now = FlatKey::of(&self.key().map_err(malformed)?).map_err(malformed)?;
        match flow.masked.matches(&now, &touched) {
            true => Ok(()),
            false => Err(NotThisWay),
        }
    }

    fn undo(
        &mut self,
        step: &Step,
        before: &Known,
        translated_before: bool,
        connections: &mut dyn Connections,
    ) -> std::result::Result<(), Halt> {
        match step {
            Step::Ct { zone, nat, commit } => {
                self.enter(*zone)?;
                match *nat && !translated_before {
                    true => self.undo_translation(*zone, *commit, connections),
                    false => Ok(()),
                }
            }
            Step::CtClear => self.leave_tracking(),
            Step::Set { kind, mask, .. } => {
                self.undo_set(*kind, mask, before).ok_or(Cannot(Unreplayable::HeaderNotExact))
            }
            _ => self.undo_structure(step, before).ok_or(Cannot(Unreplayable::HeaderNotExact)),
        }
    }

    /// Comes to a `ct` of `zone` from behind.
    fn enter(&mut self, zone: u16) -> std::result::Result<(), Halt> {
        match self.group {
            Some(group) if group.zone == zone => return Ok(()),
            Some(_) => {
                if self.is_translated() {
                    return Err(NotThisWay);
                }
                self.tracked = None;
            }
            None => {
                if self.tracked.is_some_and(|t| t.zone != zone || t.state & ct_state::TRACKED == 0) {
                    return Err(NotThisWay);
                }
            }
        }
        let done = self.tracked.is_some() && !self.was_translated();
        self.group = Some(Group { zone, done });
        Ok(())
    }

    /// Comes to a `ct_clear` from behind: there is no trace of what was tracked before.
    fn leave_tracking(&mut self) -> std::result::Result<(), Halt> {
        if self.group.is_none() && self.tracked.is_some_and(|t| t.state != 0) || self.is_translated() {
            return Err(NotThisWay);
        }
        (self.tracked, self.group) = (None, None);
        Ok(())
    }

    fn undo_translation(
        &mut self,
        zone: u16,
        commit: bool,
        connections: &mut dyn Connections,
    ) -> std::result::Result<(), Halt> {
        if self.group.is_none_or(|group| group.done) {
            return Ok(());
        }
        if !self.ethernet {
            return Err(Cannot(Unreplayable::NatProtocol));
        }
        let plain = self.packet.tuple();
        // A packet is on its way to where the connection's other direction comes from; the packet inside an ICMP
        // error went that other direction itself.
        let question = match plain {
            Some(tuple) => tuple.inverse(),
            None => self.packet.embedded_tuple().ok_or(Cannot(Unreplayable::NatProtocol))?,
        };
        let found = connections.find(zone, &question).map_err(|_| Cannot(Unreplayable::NatBeforeRecirc))?;
        let Some(connection) = found else {
            return match self.was_translated() || commit {
                true => Err(Cannot(Unreplayable::NatConnectionGone)),
                // It was not translated by a `ct` that did not know it.
                false => Ok(()),
            };
        };
        let Some(opposite) = connection.opposite(&question) else {
            return Err(Cannot(Unreplayable::NatConnectionGone));
        };
        let original = if plain.is_some() { opposite } else { opposite.inverse() };
        let current = plain.unwrap_or(question);
        if original != current {
            if connection.helped {
                return Err(Cannot(Unreplayable::NatHelper));
            }
            self.translate(plain.is_some(), &original).ok_or(Cannot(Unreplayable::NatProtocol))?;
            self.undone.nat = true;
        }
        self.group = Some(Group { zone, done: true });
        Ok(())
    }

    fn translate(&mut self, plain: bool, original: &Tuple) -> Option<()> {
        match plain {
            true => self.packet.translate(original),
            false => self.packet.translate_embedded(original),
        }
    }

    /// Gives a field back what the match says it was.
    fn undo_set(&mut self, kind: u16, mask: &[u8], before: &Known) -> Option<()> {
        if kind == key::TUNNEL {
            return self.undo_tunnel(before);
        }
        let metadata = flow_key::is_metadata(kind);
        if !metadata && !self.ethernet {
            return None;
        }
        let mut value = match metadata {
            true => Attrs(self.metadata.as_bytes()).find(kind).ok()??.payload.to_vec(),
            false => self.packet.field(kind)?,
        };
        let (was, bits) = before.field(kind)?;
        let unsettable: &[usize] = match kind {
            key::IPV4 => &UNSETTABLE_IPV4,
            key::IPV6 => &UNSETTABLE_IPV6,
            _ => &[],
        };
        if was.len() < value.len() || mask.len() < value.len() {
            return None;
        }
        for (i, byte) in value.iter_mut().enumerate().filter(|(i, _)| !unsettable.contains(i)) {
            let (was, known, set) = (was.get(i)?, bits.get(i)?, mask.get(i)?);
            if set & !known != 0 {
                return None;
            }
            *byte = *byte & !set | was & set;
        }
        match metadata {
            true => self.replace_metadata(kind, Some(&value)),
            false => self.packet.set_field(kind, &value)?,
        }
        self.undone.headers = true;
        Some(())
    }

    /// The tunnel is set as a whole: before, there was none, or the one the match names bit by bit.
    fn undo_tunnel(&mut self, before: &Known) -> Option<()> {
        match before.field(key::TUNNEL) {
            None => self.replace_metadata(key::TUNNEL, None),
            // The mask of a nest is a nest: its headers are no mask. Only the fields of a flow without one are exact.
            Some((value, mask)) if mask.iter().all(|m| *m == 0xff) => {
                let value = value.to_vec();
                self.replace_metadata(key::TUNNEL, Some(&value));
            }
            Some(_) => return None,
        }
        self.undone.headers = true;
        Some(())
    }

    fn replace_metadata(&mut self, kind: u16, value: Option<&[u8]>) {
        let mut changed = AttrBuf::new();
        for attr in Attrs(self.metadata.as_bytes()).map_while(std::result::Result::ok) {
            match value {
                _ if attr.kind != kind => changed.push_attr(&attr),
                Some(value) => changed.push(attr.raw_kind, value),
                None => continue,
            };
        }
        self.metadata = changed;
    }

    /// Takes away what was pushed and pushes what was popped.
    fn undo_structure(&mut self, step: &Step, before: &Known) -> Option<()> {
        if !self.ethernet {
            return None;
        }
        match step {
            Step::PushVlan { .. } => drop(self.packet.remove_tag()?),
            Step::PopVlan => {
                let (tpid, tci) = before.tag()?;
                self.packet.insert_tag(tpid, tci & !TAG_PRESENT)?;
            }
            Step::PushMpls { .. } => drop(self.packet.remove_label(before.ethertype()?)?),
            Step::PopMpls { .. } => self.packet.insert_label(before.label()?, before.ethertype()?)?,
            Step::DecTtl => self.packet.raise_ttl(1)?,
            Step::Set { .. } | Step::Ct { .. } | Step::CtClear => return Some(()),
        }
        self.undone.headers = true;
        Some(())
    }
}

#[cfg(test)]
mod tests;

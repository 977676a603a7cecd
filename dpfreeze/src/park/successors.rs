//! Where a packet that must not start again goes on: the id that the new daemon's flows lead to in the same place.
//!
//! A copy that left before a recirculation would leave twice if the packet started again. But where the new daemon has
//! made a flow that matches the packet as the old one did, and does the same, its id means the same place of the
//! pipeline, and the packet can go on there as it is.

use std::collections::HashMap;

use crate::error::Result;
use crate::flow_key::uapi::{self, action, USERSPACE_ATTR_USERDATA};
use crate::flow_key::{self, FlatKey, Masked, Touched};
use crate::netlink::attr::{AttrBuf, Attrs};
use crate::ovs::Flow;

/// How deep actions may nest (net/openvswitch/flow_netlink.c, `OVS_COPY_ACTIONS_MAX_DEPTH`).
const MAX_DEPTH: u32 = 16;
/// Bytes of a cookie that say what it is for (`enum user_action_cookie_type`); what follows is of one process.
const COOKIE_TYPE: usize = 2;

/// What a flow does, without what is of one daemon only: recirculation ids, cookies, port ids, meter ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Shape(Vec<u8>);

/// The shape of actions, and the ids they recirculate to, in order.
///
/// # Errors
/// The actions are malformed.
pub(super) fn shape_of(actions: &[u8]) -> Result<(Shape, Vec<u32>)> {
    let mut ids = Vec::new();
    let shape = plain(actions, &mut ids, 0)?;
    Ok((Shape(shape.into_bytes()), ids))
}

fn plain(actions: &[u8], ids: &mut Vec<u32>, depth: u32) -> Result<AttrBuf> {
    let mut shape = AttrBuf::new();
    for attr in Attrs(actions) {
        let attr = attr?;
        match attr.kind {
            action::RECIRC => {
                ids.push(attr.u32()?);
                shape.push(action::RECIRC, &[]);
            }
            action::METER => {
                shape.push(action::METER, &[]);
            }
            action::USERSPACE => {
                let userdata = attr.nested().find(USERSPACE_ATTR_USERDATA)?.map(|a| a.payload).unwrap_or_default();
                shape.push(action::USERSPACE, userdata.get(..COOKIE_TYPE).unwrap_or_default());
            }
            action::CLONE if depth < MAX_DEPTH => {
                let inner = plain(attr.payload, ids, depth + 1)?;
                shape.push_nested(action::CLONE, &inner);
            }
            // Their actions are one level further down, behind what decides about them.
            action::SAMPLE | action::CHECK_PKT_LEN | action::DEC_TTL if depth < MAX_DEPTH => {
                let mut inner = AttrBuf::new();
                for part in attr.nested() {
                    let part = part?;
                    if holds_actions(attr.kind, part.kind) {
                        inner.push_nested(part.kind, &plain(part.payload, ids, depth + 1)?);
                    } else {
                        inner.push_attr(&part);
                    }
                }
                shape.push_nested(attr.kind, &inner);
            }
            _ => {
                shape.push(attr.kind, attr.payload);
            }
        }
    }
    Ok(shape)
}

/// Whether part `part` of an action of kind `kind` is a run of actions.
fn holds_actions(kind: u16, part: u16) -> bool {
    match kind {
        action::SAMPLE => part == uapi::SAMPLE_ATTR_ACTIONS,
        action::CHECK_PKT_LEN => {
            part == uapi::CHECK_PKT_LEN_ATTR_GREATER || part == uapi::CHECK_PKT_LEN_ATTR_LESS_EQUAL
        }
        _ => part == uapi::DEC_TTL_ATTR_ACTION,
    }
}

/// A flow that a packet has passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leg {
    /// The packet's key when it came to the flow.
    pub key: Vec<u8>,
    pub shape: Shape,
    /// Which of the flow's recirculations it took.
    pub which: usize,
}

struct Successor {
    masked: Masked,
    shape: Shape,
    ids: Vec<u32>,
}

/// The recirculating flows of a daemon.
#[derive(Default)]
pub(super) struct Successors(HashMap<u32, Vec<Successor>>);

impl Successors {
    /// From a flow table that no longer holds any flow of the old daemon that recirculates.
    pub fn of(flows: &[Flow]) -> Self {
        let mut successors = Successors::default();
        for flow in flows {
            let read = || -> Result<Option<(u32, Successor)>> {
                let (shape, ids) = shape_of(&flow.actions)?;
                if ids.is_empty() {
                    return Ok(None);
                }
                let masked = Masked::of(&flow.key, &flow.mask)?;
                Ok(Some((flow_key::recirc_id(&flow.key)?, Successor { masked, shape, ids })))
            };
            // A flow that cannot be read leads nowhere.
            if let Ok(Some((from, successor))) = read() {
                successors.0.entry(from).or_default().push(successor);
            }
        }
        successors
    }

    /// The id to which a packet comes that passes flows of these shapes, the first of them at id 0; None if there is
    /// none yet, or more than one.
    pub fn id_behind(&self, legs: &[Leg]) -> Option<u32> {
        let mut at = 0;
        for leg in legs {
            let key = FlatKey::of(&leg.key).ok()?;
            let mut ids = self
                .0
                .get(&at)?
                .iter()
                .filter(|s| s.shape == leg.shape && s.masked.matches(&key, &Touched::default()))
                .filter_map(|s| s.ids.get(leg.which).copied());
            let id = ids.next()?;
            if ids.any(|other| other != id) {
                return None;
            }
            at = id;
        }
        (at != 0).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow_key::uapi::key;

    fn key_of(recirc: u32, port: u32) -> Vec<u8> {
        let mut run = AttrBuf::new();
        run.push_u32(key::RECIRC_ID, recirc).push_u32(key::IN_PORT, port);
        run.into_bytes()
    }

    fn userspace(process: u8) -> AttrBuf {
        let mut inner = AttrBuf::new();
        inner.push_u32(1, u32::from(process)).push(USERSPACE_ATTR_USERDATA, &[1, 0, process, process]);
        inner
    }

    fn mirror(process: u8, id: u32) -> Vec<u8> {
        let (mut sample, mut copy) = (AttrBuf::new(), AttrBuf::new());
        copy.push_nested(action::USERSPACE, &userspace(process));
        sample.push_u32(1, 9).push_nested(flow_key::uapi::SAMPLE_ATTR_ACTIONS, &copy);
        let mut actions = AttrBuf::new();
        actions.push_nested(action::SAMPLE, &sample).push_u32(action::METER, u32::from(process));
        actions.push_u32(action::OUTPUT, 4).push_u32(action::RECIRC, id);
        actions.into_bytes()
    }

    fn flow(recirc: u32, port: u32, actions: Vec<u8>) -> Flow {
        Flow { key: key_of(recirc, port), actions, ..Flow::default() }
    }

    fn leg(recirc: u32, port: u32, actions: &[u8]) -> Leg {
        Leg { key: key_of(recirc, port), shape: shape_of(actions).unwrap().0, which: 0 }
    }

    #[test]
    fn ids_cookies_and_meters_are_no_part_of_the_shape() {
        assert_eq!(shape_of(&mirror(1, 7)).unwrap(), (shape_of(&mirror(2, 9)).unwrap().0, vec![7]));
        let mut other = AttrBuf::new();
        other.push_u32(action::OUTPUT, 5).push_u32(action::RECIRC, 7);
        assert_ne!(shape_of(&mirror(1, 7)).unwrap().0, shape_of(other.as_bytes()).unwrap().0);
    }

    #[test]
    fn a_packet_goes_on_where_the_same_flows_lead() {
        let table = [flow(0, 1, mirror(2, 90)), flow(90, 1, mirror(2, 91)), flow(0, 2, mirror(2, 92))];
        let successors = Successors::of(&table);
        let legs = [leg(3, 1, &mirror(1, 7)), leg(7, 1, &mirror(1, 8))];
        assert_eq!(successors.id_behind(&legs[..1]), Some(90));
        assert_eq!(successors.id_behind(&legs), Some(91));
        assert_eq!(successors.id_behind(&[leg(0, 3, &mirror(1, 7))]), None);
        assert_eq!(successors.id_behind(&[]), None);
        let mut other = AttrBuf::new();
        other.push_u32(action::OUTPUT, 5).push_u32(action::RECIRC, 7);
        assert_eq!(successors.id_behind(&[leg(0, 1, other.as_bytes())]), None);
    }

    #[test]
    fn two_answers_are_none() {
        let mut wide = flow(0, 0, mirror(2, 95));
        wide.mask = {
            let mut mask = AttrBuf::new();
            mask.push_u32(key::RECIRC_ID, u32::MAX);
            mask.into_bytes()
        };
        let table = [flow(0, 1, mirror(2, 90)), wide];
        assert_eq!(Successors::of(&table).id_behind(&[leg(0, 1, &mirror(1, 7))]), None);
        assert_eq!(Successors::of(&table).id_behind(&[leg(0, 2, &mirror(1, 7))]), Some(95));
    }
}

//! What a flow's actions do to a packet before it recirculates, step by step: enough to go the way back.

use super::uapi::{action, ct};
use crate::error::{Error, Result};
use crate::netlink::attr::Attr;

/// One action that changes a packet, or the connection it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// `set` or `set(masked)` of a key attribute.
    Set {
        /// `OVS_KEY_ATTR_*`
        kind: u16,
        /// What it becomes.
        value: Vec<u8>,
        /// Which of its bits; as long as the value.
        mask: Vec<u8>,
    },
    /// `push_vlan`
    PushVlan {
        /// Host order.
        tpid: u16,
        /// Host order.
        tci: u16,
    },
    /// `pop_vlan`
    PopVlan,
    /// `push_mpls`
    PushMpls {
        /// Label stack entry as on the wire.
        entry: [u8; 4],
        /// The packet's EtherType from then on, host order.
        ethertype: u16,
    },
    /// `pop_mpls`
    PopMpls {
        /// The packet's EtherType from then on, host order.
        ethertype: u16,
    },
    /// `dec_ttl`
    DecTtl,
    /// `ct`
    Ct {
        /// Zone.
        zone: u16,
        /// It may translate.
        nat: bool,
        /// It makes the connection known.
        commit: bool,
    },
    /// `ct_clear`
    CtClear,
}

impl Step {
    /// Reads an action; None for one that leaves packet and connection as they are, or whose effect this library
    /// cannot describe (then [`super::Before`] says so).
    ///
    /// # Errors
    /// The action is malformed.
    pub(super) fn of(attr: &Attr<'_>) -> Result<Option<Step>> {
        Ok(match attr.kind {
            action::SET | action::SET_MASKED => set(attr)?,
            action::PUSH_VLAN => {
                let [a, b, c, d] = attr.fixed::<4>()?;
                Some(Step::PushVlan { tpid: u16::from_be_bytes([a, b]), tci: u16::from_be_bytes([c, d]) })
            }
            action::POP_VLAN => Some(Step::PopVlan),
            action::PUSH_MPLS => {
                // struct ovs_action_push_mpls, padded to 8 bytes
                let short = || Error::malformed("push_mpls", format!("{} bytes", attr.payload.len()));
                let [e0, e1, e2, e3, a, b] = *attr.payload.first_chunk::<6>().ok_or_else(short)?;
                Some(Step::PushMpls { entry: [e0, e1, e2, e3], ethertype: u16::from_be_bytes([a, b]) })
            }
            action::POP_MPLS => Some(Step::PopMpls { ethertype: attr.be16()? }),
            action::DEC_TTL => Some(Step::DecTtl),
            action::CT => Some(ct_step(attr)?),
            action::CT_CLEAR => Some(Step::CtClear),
            _ => None,
        })
    }
}

fn set(attr: &Attr<'_>) -> Result<Option<Step>> {
    let Some(inner) = attr.nested().next().transpose()? else { return Ok(None) };
    let (value, mask) = match attr.kind {
        action::SET => (inner.payload, vec![0xff; inner.payload.len()]),
        _ => {
            let (value, mask) = inner.payload.split_at(inner.payload.len() / 2);
            (value, mask.to_vec())
        }
    };
    if value.len() != mask.len() {
        return Err(Error::malformed("masked set", format!("{} bytes are no value and mask", inner.payload.len())));
    }
    Ok(Some(Step::Set { kind: inner.kind, value: value.to_vec(), mask }))
}

fn ct_step(attr: &Attr<'_>) -> Result<Step> {
    let (mut zone, mut nat, mut commit) = (0, false, false);
    for inner in attr.nested() {
        let inner = inner?;
        match inner.kind {
            ct::ZONE => zone = inner.u16()?,
            ct::NAT => nat = true,
            ct::COMMIT | ct::FORCE_COMMIT => commit = true,
            _ => {}
        }
    }
    Ok(Step::Ct { zone, nat, commit })
}

#[cfg(test)]
mod tests {
    use super::super::uapi::key;
    use super::*;
    use crate::netlink::attr::{AttrBuf, Attrs};

    fn steps(build: impl FnOnce(&mut AttrBuf)) -> Vec<Option<Step>> {
        let mut run = AttrBuf::new();
        build(&mut run);
        Attrs(run.as_bytes()).map(|attr| Step::of(&attr.unwrap()).unwrap()).collect()
    }

    #[test]
    fn actions_become_steps() {
        let read = steps(|run| {
            let (mut whole, mut masked, mut inner) = (AttrBuf::new(), AttrBuf::new(), AttrBuf::new());
            whole.push(key::UDP, &[0, 1, 0, 2]);
            masked.push(key::TCP, &[0, 1, 0, 0, 0xff, 0xff, 0, 0]);
            inner.push(ct::COMMIT, &[]).push(ct::ZONE, &7u16.to_ne_bytes()).push_nested(ct::NAT, &AttrBuf::new());
            run.push_nested(action::SET, &whole).push_nested(action::SET_MASKED, &masked);
            run.push(action::PUSH_VLAN, &[0x81, 0, 0x10, 5]).push(action::POP_VLAN, &[]);
            run.push(action::PUSH_MPLS, &[1, 2, 3, 4, 0x88, 0x47, 0, 0]).push(action::POP_MPLS, &[8, 0]);
            run.push_nested(action::CT, &inner).push(action::CT_CLEAR, &[]).push_u32(action::RECIRC, 1);
        });
        let mask = vec![0xff, 0xff, 0, 0];
        assert_eq!(
            read,
            [
                Some(Step::Set { kind: key::UDP, value: vec![0, 1, 0, 2], mask: vec![0xff; 4] }),
                Some(Step::Set { kind: key::TCP, value: vec![0, 1, 0, 0], mask }),
                Some(Step::PushVlan { tpid: 0x8100, tci: 0x1005 }),
                Some(Step::PopVlan),
                Some(Step::PushMpls { entry: [1, 2, 3, 4], ethertype: 0x8847 }),
                Some(Step::PopMpls { ethertype: 0x0800 }),
                Some(Step::Ct { zone: 7, nat: true, commit: true }),
                Some(Step::CtClear),
                None,
            ]
        );
    }
}

//! What a flow's match says for certain about a packet, and what of it still holds after some of the flow's steps.

use std::collections::BTreeMap;

use super::steps::Step;
use super::uapi::key;
use crate::error::Result;
use crate::netlink::attr::Attrs;

/// ENCAP holds at most one more ENCAP (802.1ad).
const MAX_TAGS: usize = 2;
/// Bytes of a label stack entry.
const ENTRY: usize = 4;

/// Known bits of a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// By key attribute: value, and the bits of it that are known.
    fields: BTreeMap<u16, (Vec<u8>, Vec<u8>)>,
    /// VLAN tags from the outermost: (TPID, TCI); None for one whose value is not known.
    tags: Vec<Option<(u16, u16)>>,
    /// MPLS label stack entries from the topmost.
    labels: Vec<Option<[u8; ENTRY]>>,
    /// The innermost EtherType.
    ethertype: Option<u16>,
}

impl Known {
    /// From key and mask of a flow. An empty mask means that every attribute of the key is matched exactly.
    ///
    /// # Errors
    /// Key or mask are malformed.
    pub fn of(key: &[u8], mask: &[u8]) -> Result<Known> {
        let mut known = Known::default();
        known.take(key, (!mask.is_empty()).then_some(mask))?;
        Ok(known)
    }

    fn take(&mut self, run: &[u8], mask: Option<&[u8]>) -> Result<()> {
        let mask_of = |kind: u16, length: usize| -> Result<Vec<u8>> {
            let Some(mask) = mask else { return Ok(vec![0xff; length]) };
            let bits = Attrs(mask).find(kind)?.map(|m| m.payload.to_vec()).unwrap_or_default();
            Ok(if bits.len() == length { bits } else { vec![0; length] })
        };
        let exact = |kind: u16, value: &[u8]| -> Result<Option<u16>> {
            let known = mask_of(kind, value.len())?.iter().all(|m| *m == 0xff);
            Ok(value.first_chunk::<2>().filter(|_| known).map(|v| u16::from_be_bytes(*v)))
        };
        let (mut tpid, mut tci, mut inner) = (None, None, None);
        for attr in Attrs(run) {
            let attr = attr?;
            match attr.kind {
                key::ETHERTYPE => tpid = exact(key::ETHERTYPE, attr.payload)?,
                key::VLAN => tci = exact(key::VLAN, attr.payload)?,
                key::ENCAP => inner = Some(attr.payload),
                key::MPLS => {
                    let bits = mask_of(key::MPLS, attr.payload.len())?;
                    let entries = attr.payload.chunks_exact(ENTRY).zip(bits.chunks_exact(ENTRY));
                    self.labels = entries
                        .map(|(entry, bits)| entry.first_chunk().filter(|_| bits == [0xff; ENTRY]).copied())
                        .collect();
                    self.fields.insert(key::MPLS, (attr.payload.to_vec(), bits));
                }
                kind => {
                    self.fields.insert(kind, (attr.payload.to_vec(), mask_of(kind, attr.payload.len())?));
                }
            }
        }
        match inner {
            Some(inner) if self.tags.len() < MAX_TAGS => {
                self.tags.push(tpid.zip(tci));
                let mask = mask.map(|m| Attrs(m).find(key::ENCAP)).transpose()?;
                self.take(inner, mask.map(|found| found.map_or(&[][..], |m| m.payload)))
            }
            _ => {
                self.ethertype = tpid;
                Ok(())
            }
        }
    }

    /// Value and known bits of a key attribute; None where the packet need not have it.
    pub fn field(&self, kind: u16) -> Option<(&[u8], &[u8])> {
        self.fields.get(&kind).map(|(value, mask)| (value.as_slice(), mask.as_slice()))
    }

    /// TPID and TCI of the outermost tag, if they are known.
    pub fn tag(&self) -> Option<(u16, u16)> {
        self.tags.first().copied().flatten()
    }

    /// The topmost label stack entry, if it is known.
    pub fn label(&self) -> Option<[u8; ENTRY]> {
        self.labels.first().copied().flatten()
    }

    /// The innermost EtherType, if it is known.
    pub fn ethertype(&self) -> Option<u16> {
        self.ethertype
    }

    /// What is known after `step`.
    pub fn after(mut self, step: &Step) -> Known {
        match step {
            Step::Set { kind, value, mask } => self.set(*kind, value, mask),
            Step::PushVlan { tpid, tci } => self.tags.insert(0, Some((*tpid, *tci))),
            Step::PopVlan if !self.tags.is_empty() => drop(self.tags.remove(0)),
            Step::PushMpls { entry, ethertype } => {
                self.labels.insert(0, Some(*entry));
                self.fields.insert(key::MPLS, (entry.to_vec(), vec![0xff; ENTRY]));
                self.ethertype = Some(*ethertype);
            }
            Step::PopMpls { ethertype } => {
                if !self.labels.is_empty() {
                    self.labels.remove(0);
                }
                self.fields.remove(&key::MPLS);
                self.ethertype = Some(*ethertype);
            }
            Step::DecTtl => {
                self.forget(key::IPV4, 10..11);
                self.forget(key::IPV6, 38..39);
            }
            Step::Ct { nat: true, .. } => {
                self.forget(key::IPV4, 0..8);
                self.forget(key::IPV6, 0..32);
                [key::TCP, key::UDP, key::SCTP].into_iter().for_each(|kind| self.forget(kind, 0..4));
            }
            Step::PopVlan | Step::Ct { .. } | Step::CtClear => {}
        }
        self
    }

    fn set(&mut self, kind: u16, value: &[u8], mask: &[u8]) {
        let (known, bits) = self.fields.entry(kind).or_insert_with(|| (vec![0; value.len()], vec![0; value.len()]));
        if known.len() != value.len() {
            (*known, *bits) = (vec![0; value.len()], vec![0; value.len()]);
        }
        for ((known, bits), (value, mask)) in known.iter_mut().zip(bits.iter_mut()).zip(value.iter().zip(mask)) {
            *known = *known & !mask | value & mask;
            *bits |= mask;
        }
        if kind == key::MPLS {
            if let (Some(label), Some(entry)) = (self.labels.first_mut(), known.first_chunk::<ENTRY>()) {
                *label = bits.iter().take(ENTRY).all(|b| *b == 0xff).then_some(*entry);
            }
        }
    }

    fn forget(&mut self, kind: u16, bytes: std::ops::Range<usize>) {
        if let Some(bits) = self.fields.get_mut(&kind).and_then(|(_, bits)| bits.get_mut(bytes)) {
            bits.fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attr::AttrBuf;

    fn tagged(tci: &[u8], ip: &[u8]) -> Vec<u8> {
        let (mut inner, mut outer) = (AttrBuf::new(), AttrBuf::new());
        inner.push(key::ETHERTYPE, &[8, 0]).push(key::IPV4, ip);
        outer.push(key::ETHERTYPE, &[0x81, 0]).push(key::VLAN, tci).push_nested(key::ENCAP, &inner);
        outer.as_bytes().to_vec()
    }

    #[test]
    fn only_what_is_matched_is_known() {
        let value = tagged(&[0x10, 5], &[10; 12]);
        let known = Known::of(&value, &[]).unwrap();
        assert_eq!((known.tag(), known.ethertype()), (Some((0x8100, 0x1005)), Some(0x0800)));
        assert_eq!(known.field(key::IPV4), Some((&[10; 12][..], &[0xff; 12][..])));
        let mut inner = AttrBuf::new();
        inner.push(key::ETHERTYPE, &[0xff; 2]).push(key::IPV4, &[0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut mask = AttrBuf::new();
        mask.push(key::ETHERTYPE, &[0xff; 2]).push(key::VLAN, &[0x1f, 0xff]).push_nested(key::ENCAP, &inner);
        let known = Known::of(&value, mask.as_bytes()).unwrap();
        assert_eq!((known.tag(), known.ethertype()), (None, Some(0x0800)));
        assert_eq!(known.field(key::IPV4).unwrap().1, [0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn steps_add_to_and_take_from_what_is_known() {
        let known = Known::of(&tagged(&[0x10, 5], &[10; 12]), &[0xff; 0]).unwrap();
        let nat = Step::Ct { zone: 1, nat: true, commit: false };
        let ports = Step::Set { kind: key::UDP, value: vec![0, 1, 0, 2], mask: vec![0xff, 0xff, 0, 0] };
        let known = known.after(&nat).after(&ports).after(&Step::PopVlan);
        assert_eq!(known.field(key::IPV4).unwrap().1, [0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(known.field(key::UDP), Some((&[0, 1, 0, 0][..], &[0xff, 0xff, 0, 0][..])));
        assert_eq!(known.tag(), None);
        let known = known.after(&Step::PushMpls { entry: [1, 2, 3, 4], ethertype: 0x8847 });
        assert_eq!((known.label(), known.ethertype()), (Some([1, 2, 3, 4]), Some(0x8847)));
    }
}

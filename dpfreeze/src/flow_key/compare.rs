//! Whether a packet, known by its key, could have matched a flow.

use super::actions::Touched;
use super::is_pipeline;
use super::uapi::key;
use crate::error::Result;
use crate::netlink::attr::Attrs;

/// Nests inside a key that are attributes themselves: the inner header of a VLAN packet, the tunnel.
const NESTS: [u16; 2] = [key::ENCAP, key::TUNNEL];
/// ENCAP holds at most one more ENCAP (802.1ad).
const MAX_DEPTH: u32 = 4;

/// A key with its nests resolved: (kind at top level, path within nests, value), sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlatKey(Vec<Field>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Field {
    /// Kinds from the outermost to this one, one byte each: equal fields of two keys have equal paths.
    path: u64,
    /// The kind that decides whether it is compared: that of the field, or TUNNEL for all that is in a tunnel nest.
    kind: u16,
    value: Vec<u8>,
}

impl FlatKey {
    /// Takes a key apart.
    ///
    /// # Errors
    /// The key is malformed.
    pub fn of(key: &[u8]) -> Result<Self> {
        let mut fields = Vec::with_capacity(16);
        flatten(key, 0, None, 0, &mut fields)?;
        fields.sort();
        Ok(FlatKey(fields))
    }

    fn get(&self, path: u64) -> Option<&[u8]> {
        self.0.binary_search_by_key(&path, |f| f.path).ok().map(|i| self.0[i].value.as_slice())
    }
}

fn flatten(run: &[u8], path: u64, tunnel: Option<u16>, depth: u32, to: &mut Vec<Field>) -> Result<()> {
    for attr in Attrs(run) {
        let attr = attr?;
        // The kinds are small; +1 keeps kind 0 (OVS_TUNNEL_KEY_ATTR_ID) apart from nothing.
        let path = path << 8 | u64::from((attr.kind + 1) & 0xff);
        let in_tunnel = tunnel.or((attr.kind == key::TUNNEL).then_some(key::TUNNEL));
        if tunnel.is_none() && NESTS.contains(&attr.kind) && depth < MAX_DEPTH {
            flatten(attr.payload, path, in_tunnel, depth + 1, to)?;
        } else {
            to.push(Field { path, kind: in_tunnel.unwrap_or(attr.kind), value: attr.payload.to_vec() });
        }
    }
    Ok(())
}

/// The match of a flow, ready to be compared with many packets.
#[derive(Clone, Debug)]
pub struct Masked {
    fields: Vec<(Field, Vec<u8>)>,
}

impl Masked {
    /// From key and mask of a flow. An empty mask means that every attribute of the key is matched exactly.
    ///
    /// # Errors
    /// Key or mask are malformed.
    pub fn of(key: &[u8], mask: &[u8]) -> Result<Self> {
        let flat = FlatKey::of(key)?;
        let masks = if mask.is_empty() {
            FlatKey(flat.0.iter().map(|f| Field { value: vec![0xff; f.value.len()], ..f.clone() }).collect())
        } else {
            FlatKey::of(mask)?
        };
        let fields = masks
            .0
            .into_iter()
            .filter(|m| m.value.is_empty() || m.value.iter().any(|b| *b != 0))
            .map(|m| {
                let value = flat.get(m.path).map(<[u8]>::to_vec).unwrap_or_default();
                (Field { value, ..m.clone() }, m.value)
            })
            .collect();
        Ok(Masked { fields })
    }

    /// Whether a packet with `key` may have matched, before the fields in `touched` were changed and whatever the
    /// pipeline gave it (recirculation id, hash, connection tracking) was then.
    ///
    /// Fields whose form cannot be compared (another length) do not decide: the answer errs towards "may have".
    pub fn matches(&self, key: &FlatKey, touched: &Touched) -> bool {
        self.fields.iter().all(|(field, mask)| {
            is_pipeline(field.kind) || touched.has(field.kind) || value_matches(field, mask, key.get(field.path))
        })
    }

    /// Whether a packet with `key` may have matched, by what connection tracking gave it alone.
    pub fn matches_tracking(&self, key: &FlatKey) -> bool {
        let tracking = |field: &Field| (key::CT_STATE..=key::CT_ORIG_TUPLE_IPV6).contains(&field.kind);
        self.fields.iter().all(|(field, mask)| !tracking(field) || value_matches(field, mask, key.get(field.path)))
    }
}

fn value_matches(field: &Field, mask: &[u8], packet: Option<&[u8]>) -> bool {
    if mask.is_empty() {
        // A flag such as OVS_TUNNEL_KEY_ATTR_DONT_FRAGMENT: there or not. Keys do not always carry the flag where
        // the mask does, so that only its presence in the flow binds.
        return true;
    }
    // An attribute that is not there counts as zero: no VLAN is TCI 0.
    let at = |bytes: Option<&[u8]>, i: usize| bytes.and_then(|b| b.get(i)).copied().unwrap_or(0);
    let flow = (!field.value.is_empty()).then_some(field.value.as_slice());
    if let (Some(f), Some(p)) = (flow, packet) {
        if f.len() != p.len() {
            return true;
        }
    }
    mask.iter().enumerate().all(|(i, m)| (at(flow, i) ^ at(packet, i)) & m == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attr::AttrBuf;

    fn run(fields: &[(u16, &[u8])]) -> Vec<u8> {
        let mut buf = AttrBuf::new();
        for (kind, value) in fields {
            buf.push(*kind, value);
        }
        buf.as_bytes().to_vec()
    }

    fn may_match(key: &[u8], mask: &[u8], packet: &[u8], touched: Touched) -> bool {
        Masked::of(key, mask).unwrap().matches(&FlatKey::of(packet).unwrap(), &touched)
    }

    const IP: &[u8] = &[10, 0, 0, 1, 10, 0, 0, 2, 17, 0, 64, 0];

    #[test]
    fn wildcards_exact_bits_and_pipeline_fields() {
        let packet = run(&[(key::RECIRC_ID, &[1, 0, 0, 0]), (key::IN_PORT, &[3, 0, 0, 0]), (key::IPV4, IP)]);
        let flow = run(&[(key::RECIRC_ID, &[0; 4]), (key::IN_PORT, &[3, 0, 0, 0]), (key::IPV4, &[10; 12])]);
        let one = run(&[
            (key::RECIRC_ID, &[0xff; 4]),
            (key::IN_PORT, &[0xff; 4]),
            (key::IPV4, &[0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ]);
        assert!(may_match(&flow, &one, &packet, Touched::default()));
        let all = run(&[(key::IPV4, &[0xff; 12])]);
        assert!(!may_match(&flow, &all, &packet, Touched::default()));
        let other_port = run(&[(key::IN_PORT, &[4, 0, 0, 0]), (key::IPV4, IP)]);
        assert!(!may_match(&flow, &one, &other_port, Touched::default()));
    }

    #[test]
    fn what_a_parent_changed_is_not_compared() {
        let packet = run(&[(key::IN_PORT, &[3, 0, 0, 0]), (key::IPV4, IP)]);
        let flow = run(&[(key::IN_PORT, &[3, 0, 0, 0]), (key::IPV4, &[9; 12])]);
        let mask = run(&[(key::IN_PORT, &[0xff; 4]), (key::IPV4, &[0xff; 12])]);
        let mut nat = AttrBuf::new();
        nat.push_nested(super::super::uapi::ct::NAT, &AttrBuf::new());
        let mut actions = AttrBuf::new();
        actions.push_nested(super::super::uapi::action::CT, &nat).push_u32(super::super::uapi::action::RECIRC, 1);
        let summary = super::super::ActionSummary::of(actions.as_bytes()).unwrap();
        assert!(!may_match(&flow, &mask, &packet, Touched::default()));
        assert!(may_match(&flow, &mask, &packet, summary.recirculations[0].before.touched));
    }

    #[test]
    fn nests_are_compared_field_by_field() {
        let vlan = |id: u8, last: u8| {
            let mut ip = IP.to_vec();
            ip[7] = last;
            let inner = run(&[(key::ETHERTYPE, &[8, 0]), (key::IPV4, &ip)]);
            run(&[(key::ETHERTYPE, &[0x81, 0]), (key::VLAN, &[0x10, id]), (key::ENCAP, &inner)])
        };
        let inner = run(&[(key::IPV4, &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0, 0, 0])]);
        let mask = run(&[(key::VLAN, &[0xff, 0xff]), (key::ENCAP, &inner)]);
        assert!(may_match(&vlan(5, 2), &mask, &vlan(5, 9), Touched::default()));
        assert!(!may_match(&vlan(5, 2), &mask, &vlan(6, 2), Touched::default()));
        let untagged = run(&[(key::ETHERTYPE, &[8, 0]), (key::IPV4, IP)]);
        assert!(!may_match(&vlan(5, 2), &mask, &untagged, Touched::default()));
    }
}

//! Limits on the connections of a conntrack zone: family `ovs_ct_limit`. They belong to the network namespace, not to
//! a datapath, and vanish with the module.

use serde::{Deserialize, Serialize};

use super::header;
use crate::error::{Error, Result};
use crate::netlink::attr::{AttrBuf, NLA_F_NESTED};

// enum ovs_ct_limit_cmd
const VERSION: u8 = 1; // OVS_CT_LIMIT_VERSION
const CMD_SET: u8 = 1;
const CMD_DEL: u8 = 2;
const CMD_GET: u8 = 3;
// enum ovs_ct_limit_attr
const ATTR_ZONE_LIMIT: u16 = 1;
/// Bytes of `struct ovs_zone_limit`.
const ENTRY: usize = 12;

/// `OVS_ZONE_LIMIT_DEFAULT_ZONE`: the limit of every zone that has none of its own.
pub const DEFAULT_ZONE: i32 = -1;

/// `struct ovs_zone_limit`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZoneLimit {
    /// Zone, or [`DEFAULT_ZONE`].
    pub zone: i32,
    /// Highest number of connections; 0 is no limit.
    pub limit: u32,
    /// Connections that are counted now.
    pub count: u32,
}

/// Reads an answer to `OVS_CT_LIMIT_CMD_GET`, `payload` being what follows the nlmsghdr.
pub(crate) fn parse(payload: &[u8]) -> Result<Vec<ZoneLimit>> {
    let Some(nest) = header::parse("ovs_ct_limit", payload)?.attrs.find(ATTR_ZONE_LIMIT)? else {
        return Ok(Vec::new());
    };
    // The nest holds raw structures, padded to four bytes each, and no attributes.
    let entries = nest.payload.chunks_exact(ENTRY);
    if !entries.remainder().is_empty() {
        return Err(Error::malformed("ovs_ct_limit", format!("{} bytes are no whole entries", nest.payload.len())));
    }
    let word = |entry: &[u8], at: usize| [entry[at], entry[at + 1], entry[at + 2], entry[at + 3]];
    Ok(entries
        .map(|entry| ZoneLimit {
            zone: i32::from_ne_bytes(word(entry, 0)),
            limit: u32::from_ne_bytes(word(entry, 4)),
            count: u32::from_ne_bytes(word(entry, 8)),
        })
        .collect())
}

/// Asks for the limits that are set, default included.
pub(crate) fn ask_all() -> Vec<u8> {
    header::build(CMD_GET, VERSION, 0, &[])
}

/// Asks for these zones, whether they have limits of their own or not.
pub(crate) fn ask(zones: impl Iterator<Item = i32>) -> Vec<u8> {
    message(CMD_GET, zones.map(|zone| ZoneLimit { zone, ..Default::default() }))
}

/// Sets these limits.
pub(crate) fn set(limits: &[ZoneLimit]) -> Vec<u8> {
    message(CMD_SET, limits.iter().map(|limit| ZoneLimit { count: 0, ..*limit }))
}

/// Removes the limits of these zones.
pub(crate) fn remove(zones: &[i32]) -> Vec<u8> {
    message(CMD_DEL, zones.iter().map(|zone| ZoneLimit { zone: *zone, ..Default::default() }))
}

fn message(command: u8, limits: impl Iterator<Item = ZoneLimit>) -> Vec<u8> {
    let entries: Vec<u8> =
        limits.flat_map(|l| [l.zone.to_ne_bytes(), l.limit.to_ne_bytes(), l.count.to_ne_bytes()]).flatten().collect();
    let mut attrs = AttrBuf::new();
    attrs.push(ATTR_ZONE_LIMIT | NLA_F_NESTED, &entries);
    header::build(command, VERSION, 0, attrs.as_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn limits_are_read_as_written(limits in prop::collection::vec((-1i32..65536, any::<u32>()), 0..200)) {
            let limits: Vec<_> = limits.into_iter().map(|(zone, limit)| ZoneLimit { zone, limit, count: 0 }).collect();
            prop_assert_eq!(parse(&set(&limits)).unwrap(), limits);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = parse(&bytes);
        }
    }

    #[test]
    fn a_part_of_an_entry_is_an_error_and_no_answer_no_limit() {
        let mut attrs = AttrBuf::new();
        attrs.push(ATTR_ZONE_LIMIT, &[0; 13]);
        assert!(parse(&header::build(CMD_GET, VERSION, 0, attrs.as_bytes())).is_err());
        assert!(parse(&ask_all()).unwrap().is_empty());
    }
}

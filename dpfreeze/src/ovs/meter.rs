//! Meters of a datapath: family `ovs_meter`.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::header;
use crate::bytes::hex;
use crate::error::{Error, Result};
use crate::netlink::attr::{AttrBuf, Attrs};

// enum ovs_meter_cmd
const VERSION: u8 = 1; // OVS_METER_VERSION
const CMD_FEATURES: u8 = 1;
const CMD_DEL: u8 = 3;
const CMD_GET: u8 = 4;
// enum ovs_meter_attr
const ATTR_ID: u16 = 1;
const ATTR_STATS: u16 = 3;
const ATTR_BANDS: u16 = 4;
const ATTR_USED: u16 = 5;
const ATTR_MAX_METERS: u16 = 7;
const ATTR_MAX_BANDS: u16 = 8;
const ATTR_PAD: u16 = 9;
// enum ovs_band_attr
const BAND_STATS: u16 = 4;
const BAND_PAD: u16 = ATTR_PAD; // the kernel pads bands with the meter's own padding attribute

/// A band of a meter, as far as the kernel tells: `ovs_meter_cmd_reply_stats` leaves out type, rate and burst.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Band {
    /// Packets that exceeded the rate.
    pub packets: u64,
    /// Bytes that exceeded the rate.
    pub bytes: u64,
    /// Attributes this library does not know, as sent.
    #[serde(with = "hex")]
    pub unknown: Vec<u8>,
}

/// A meter, as far as the kernel tells: its rates are known to whoever set them only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meter {
    /// Number in the datapath.
    pub id: u32,
    /// Packets that went through.
    pub packets: u64,
    /// Bytes that went through.
    pub bytes: u64,
    /// When it was last used, milliseconds of the monotonic clock.
    pub used_ms: Option<u64>,
    /// The bands, in order.
    pub bands: Vec<Band>,
    /// Attributes this library does not know, as sent.
    #[serde(with = "hex")]
    pub unknown: Vec<u8>,
}

/// What a datapath can do with meters (`OVS_METER_CMD_FEATURES`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeterFeatures {
    /// Highest number of meters; ids are below it (kernel 5.8 or later; before, any u32).
    pub max_meters: u32,
    /// Highest number of bands of one meter.
    pub max_bands: u32,
}

impl Meter {
    /// Reads an answer to `OVS_METER_CMD_GET`, `payload` being what follows the nlmsghdr.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the message is cut off or has no id.
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let mut meter = Meter::default();
        let mut id = None;
        let mut unknown = AttrBuf::new();
        for attr in header::parse("ovs_meter", payload)?.attrs {
            let attr = attr?;
            match attr.kind {
                ATTR_ID => id = Some(attr.u32()?),
                ATTR_STATS => [meter.packets, meter.bytes] = attr.u64s()?,
                ATTR_BANDS => {
                    meter.bands = attr.nested().map(|band| parse_band(band?.nested())).collect::<Result<_>>()?
                }
                ATTR_USED => meter.used_ms = Some(attr.u64()?),
                ATTR_PAD => {}
                _ => {
                    unknown.push_attr(&attr);
                }
            }
        }
        meter.id = id.ok_or_else(|| Error::malformed("ovs_meter", "no id"))?;
        meter.unknown = unknown.into_bytes();
        Ok(meter)
    }
}

fn parse_band(attrs: Attrs<'_>) -> Result<Band> {
    let mut band = Band::default();
    let mut unknown = AttrBuf::new();
    for attr in attrs {
        let attr = attr?;
        match attr.kind {
            BAND_STATS => [band.packets, band.bytes] = attr.u64s()?,
            BAND_PAD => {}
            _ => {
                unknown.push_attr(&attr);
            }
        }
    }
    band.unknown = unknown.into_bytes();
    Ok(band)
}

pub(crate) fn parse_features(payload: &[u8]) -> Result<MeterFeatures> {
    let mut features = MeterFeatures::default();
    for attr in header::parse("ovs_meter", payload)?.attrs {
        let attr = attr?;
        match attr.kind {
            ATTR_MAX_METERS => features.max_meters = attr.u32()?,
            ATTR_MAX_BANDS => features.max_bands = attr.u32()?,
            _ => {}
        }
    }
    Ok(features)
}

/// The ids of lib/dpif-netlink.c, `probe_broken_meters__()`, before Open vSwitch 3.3.7, 3.4.5, 3.5.3, 3.6.1 and 3.7.
const PROBES: [u32; 2] = [54_545_401, 54_545_402];
/// The kernel's table of meters has so many slots, or this times a power of two (net/openvswitch/meter.h).
const LEAST_SLOTS: u32 = 1024;

/// The meters that may have the slot of a probe in the kernel's table (`meter_hash()`: the id, modulo its size), which holds
/// `max_meters` at the most. The probe then fails, and the daemon that asks takes all meters for broken.
pub(crate) fn in_place_of_probes(max_meters: u32) -> BTreeSet<u32> {
    let sizes = std::iter::successors(Some(LEAST_SLOTS), |slots| slots.checked_mul(2));
    let sizes = sizes.take_while(|slots| *slots / 2 <= max_meters);
    // Ids are given out from below, so each is below the size of the table that holds it.
    sizes.flat_map(|slots| PROBES.map(|id| id % slots)).collect()
}

pub(crate) fn delete(ifindex: u32, id: u32) -> Vec<u8> {
    let mut attrs = AttrBuf::new();
    attrs.push_u32(ATTR_ID, id);
    header::build(CMD_DEL, VERSION, ifindex, attrs.as_bytes())
}

pub(crate) fn ask_features(ifindex: u32) -> Vec<u8> {
    header::build(CMD_FEATURES, VERSION, ifindex, &[])
}

pub(crate) fn ask(ifindex: u32, id: u32) -> Vec<u8> {
    let mut attrs = AttrBuf::new();
    attrs.push_u32(ATTR_ID, id);
    header::build(CMD_GET, VERSION, ifindex, attrs.as_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{bytes_of, mixed, unknown};
    use super::*;
    use crate::netlink::attr::NLA_F_NESTED;

    #[test]
    fn the_slots_of_the_probes_are_known_for_every_size_of_the_table() {
        assert_eq!(in_place_of_probes(1000), BTreeSet::from([1017, 1018]));
        assert_eq!(in_place_of_probes(200_000), BTreeSet::from([1017, 1018, 3065, 3066, 19_449, 19_450]));
        assert!(in_place_of_probes(u32::MAX).len() > 6);
    }

    proptest! {
        #[test]
        fn nothing_is_lost(id: u32, stats: [u64; 2], used: u64, bands in prop::collection::vec((any::<[u64; 2]>(), unknown()), 0..4), other in unknown()) {
            let mut nest = AttrBuf::new();
            for (stats, other) in &bands {
                let mut band = AttrBuf::new();
                band.push(BAND_STATS, &stats.map(u64::to_ne_bytes).concat()).push(BAND_PAD, &[]);
                // The kernel gives bands the type OVS_BAND_ATTR_UNSPEC.
                nest.push(NLA_F_NESTED, &[band.as_bytes(), &bytes_of(other)].concat());
            }
            let mut attrs = AttrBuf::new();
            attrs.push_u32(ATTR_ID, id).push(ATTR_STATS, &stats.map(u64::to_ne_bytes).concat());
            attrs.push(ATTR_USED, &used.to_ne_bytes()).push_nested(ATTR_BANDS, &nest);
            let expected = Meter {
                id,
                packets: stats[0],
                bytes: stats[1],
                used_ms: Some(used),
                bands: bands.iter().map(|([packets, bytes], other)| Band { packets: *packets, bytes: *bytes, unknown: bytes_of(other) }).collect(),
                unknown: bytes_of(&other),
            };
            prop_assert_eq!(Meter::parse(&mixed(2, 5, &attrs, &other)).unwrap(), expected);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = Meter::parse(&bytes);
            let _ = parse_features(&bytes);
        }
    }
}

//! Datapaths: family `ovs_datapath`.

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use super::header;
use crate::bytes::hex;
use crate::error::{Error, Result};
use crate::netlink::attr::{Attr, AttrBuf};

// enum ovs_datapath_cmd
pub(crate) const VERSION: u8 = 2; // OVS_DATAPATH_VERSION
pub(crate) const CMD_GET: u8 = 3;
pub(crate) const CMD_SET: u8 = 4;
// enum ovs_datapath_attr
pub(crate) const ATTR_NAME: u16 = 1;
const ATTR_STATS: u16 = 3;
const ATTR_MEGAFLOW_STATS: u16 = 4;
pub(crate) const ATTR_USER_FEATURES: u16 = 5;
const ATTR_PAD: u16 = 6;
const ATTR_MASKS_CACHE_SIZE: u16 = 7;
pub(crate) const ATTR_PER_CPU_PIDS: u16 = 8;

bitflags! {
    /// `OVS_DP_F_*` of linux/openvswitch.h. Bits that are not named here are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u32 {
        /// `OVS_DP_F_UNALIGNED`: the last attribute of an upcall may be unpadded.
        const UNALIGNED = 1 << 0;
        /// `OVS_DP_F_VPORT_PIDS`: a port may have several port ids for its upcalls.
        const VPORT_PIDS = 1 << 1;
        /// `OVS_DP_F_TC_RECIRC_SHARING`: recirculation ids are shared with tc.
        const TC_RECIRC_SHARING = 1 << 2;
        /// `OVS_DP_F_DISPATCH_UPCALL_PER_CPU`: upcalls go to the port id of the CPU they happen on.
        const DISPATCH_UPCALL_PER_CPU = 1 << 3;
        const _ = !0;
    }
}

/// How the kernel chooses the socket that an upcall is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dispatch {
    /// One port id for each CPU, set on the datapath (kernel 5.15 and OVS 2.16, or later).
    PerCpu,
    /// Port ids set on each port, chosen among by the packet's hash.
    PerVport,
}

/// `struct ovs_dp_stats`: counts since the datapath was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatapathStats {
    /// Packets that matched a flow.
    pub hit: u64,
    /// Packets that matched none and became upcalls.
    pub missed: u64,
    /// Upcalls that could not be delivered.
    pub lost: u64,
    /// Flows that are there now.
    pub flows: u64,
}

/// A datapath of the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datapath {
    /// Interface index of the local port: what messages name the datapath by.
    pub ifindex: u32,
    /// Name, for example `ovs-system`.
    pub name: String,
    /// `OVS_DP_F_*` as they are set; see [`Datapath::features`].
    pub user_features: u32,
    /// Port ids that upcalls go to, by CPU (`OVS_DP_ATTR_PER_CPU_PIDS`). None where the kernel does not give the attribute:
    /// in per-vport mode, and on Linux 5.15 to 6.0, which take it and never give it back.
    #[serde(default)]
    pub per_cpu_pids: Option<Vec<u32>>,
    /// Counters.
    pub stats: DatapathStats,
    /// `struct ovs_dp_megaflow_stats` as sent; counters only.
    #[serde(with = "hex")]
    pub megaflow_stats: Vec<u8>,
    /// `OVS_DP_ATTR_MASKS_CACHE_SIZE`, entries (kernel 5.9 or later).
    pub masks_cache_size: Option<u32>,
    /// Attributes this library does not know, as sent.
    #[serde(with = "hex")]
    pub unknown: Vec<u8>,
}

impl Datapath {
    /// Reads an `OVS_DP_CMD_NEW` message, `payload` being what follows the nlmsghdr.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the message is cut off or has no name.
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let message = header::parse("ovs_datapath", payload)?;
        let mut datapath = Datapath { ifindex: message.ifindex, ..Default::default() };
        let mut unknown = AttrBuf::new();
        for attr in message.attrs {
            let attr = attr?;
            match attr.kind {
                ATTR_NAME => datapath.name = attr.string(),
                ATTR_STATS => datapath.stats = stats(&attr)?,
                ATTR_MEGAFLOW_STATS => datapath.megaflow_stats = attr.payload.to_vec(),
                ATTR_USER_FEATURES => datapath.user_features = attr.u32()?,
                ATTR_PAD => {}
                ATTR_MASKS_CACHE_SIZE => datapath.masks_cache_size = Some(attr.u32()?),
                ATTR_PER_CPU_PIDS => datapath.per_cpu_pids = Some(attr.u32s()?),
                _ => {
                    unknown.push_attr(&attr);
                }
            }
        }
        if datapath.name.is_empty() {
            return Err(Error::malformed("ovs_datapath", "no name"));
        }
        datapath.unknown = unknown.into_bytes();
        Ok(datapath)
    }

    /// The features as flags; unnamed bits are kept.
    pub fn features(&self) -> Features {
        Features::from_bits_retain(self.user_features)
    }

    /// The port ids that upcalls go to, by CPU; none where the kernel does not tell.
    pub fn cpu_port_ids(&self) -> &[u32] {
        self.per_cpu_pids.as_deref().unwrap_or_default()
    }

    /// How the upcalls of this datapath are dispatched.
    pub fn dispatch(&self) -> Dispatch {
        if self.features().contains(Features::DISPATCH_UPCALL_PER_CPU) {
            Dispatch::PerCpu
        } else {
            Dispatch::PerVport
        }
    }
}

fn stats(attr: &Attr<'_>) -> Result<DatapathStats> {
    let [hit, missed, lost, flows] = attr.u64s()?;
    Ok(DatapathStats { hit, missed, lost, flows })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{bytes_of, mixed, unknown};
    use super::*;

    proptest! {
        #[test]
        fn nothing_is_lost(pids in prop::option::of(prop::collection::vec(any::<u32>(), 0..9)), features: u32, stats: [u64; 4], cache: Option<u32>, other in unknown()) {
            let mut attrs = AttrBuf::new();
            attrs.push_str(ATTR_NAME, "ovs-system").push_u32(ATTR_USER_FEATURES, features);
            attrs.push(ATTR_STATS, &stats.map(u64::to_ne_bytes).concat());
            attrs.push(ATTR_MEGAFLOW_STATS, &[7; 32]).push(ATTR_PAD, &[]);
            cache.map(|entries| attrs.push_u32(ATTR_MASKS_CACHE_SIZE, entries).as_bytes().len());
            if let Some(pids) = &pids {
                attrs.push(ATTR_PER_CPU_PIDS, &pids.iter().flat_map(|p| p.to_ne_bytes()).collect::<Vec<_>>());
            }
            let [hit, missed, lost, flows] = stats;
            let expected = Datapath {
                ifindex: 5,
                name: "ovs-system".into(),
                user_features: features,
                per_cpu_pids: pids,
                stats: DatapathStats { hit, missed, lost, flows },
                megaflow_stats: vec![7; 32],
                masks_cache_size: cache,
                unknown: bytes_of(&other),
            };
            prop_assert_eq!(expected.features().bits(), features);
            let read = Datapath::parse(&mixed(1, 5, &attrs, &other)).unwrap();
            prop_assert_eq!(&read, &expected);
            let json = serde_json::to_string(&read).unwrap();
            prop_assert_eq!(serde_json::from_str::<Datapath>(&json).unwrap(), expected);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = Datapath::parse(&bytes);
        }
    }

    #[test]
    fn dispatch_follows_the_feature() {
        let datapath = |user_features| Datapath { user_features, ..Default::default() };
        assert_eq!(datapath(9).dispatch(), Dispatch::PerCpu);
        assert_eq!(datapath(3).dispatch(), Dispatch::PerVport);
    }

    /// The attributes of `ovs_dp_cmd_fill_info()` in the order of Linux 5.15; 6.1 puts the port ids behind them.
    fn message(features: Features, told: Option<&[u32]>) -> Vec<u8> {
        let mut attrs = AttrBuf::new();
        attrs.push_str(ATTR_NAME, "ovs-system").push(ATTR_STATS, &[0; 32]).push(ATTR_MEGAFLOW_STATS, &[0; 32]);
        attrs.push_u32(ATTR_USER_FEATURES, features.bits()).push_u32(ATTR_MASKS_CACHE_SIZE, 256);
        if let Some(pids) = told {
            attrs.push(ATTR_PER_CPU_PIDS, &pids.iter().flat_map(|p| p.to_ne_bytes()).collect::<Vec<_>>());
        }
        header::build(1, 2, 5, attrs.as_bytes())
    }

    #[test]
    fn a_kernel_that_does_not_tell_is_not_one_that_says_nobody() {
        let per_cpu = Features::UNALIGNED | Features::DISPATCH_UPCALL_PER_CPU;
        let told = |features, told| {
            let read = Datapath::parse(&message(features, told)).unwrap();
            (read.dispatch(), read.per_cpu_pids)
        };
        assert_eq!(told(per_cpu, None), (Dispatch::PerCpu, None));
        assert_eq!(told(per_cpu, Some(&[])), (Dispatch::PerCpu, Some(vec![])));
        assert_eq!(told(per_cpu, Some(&[7, 8])), (Dispatch::PerCpu, Some(vec![7, 8])));
        assert_eq!(told(Features::VPORT_PIDS, None), (Dispatch::PerVport, None));
    }

    #[test]
    fn a_datapath_without_a_name_is_an_error() {
        assert!(Datapath::parse(&header::build(1, 2, 5, &[])).is_err());
    }
}

//! Network devices of the simulated host: a port with a qdisc of somebody, which Open vSwitch polices, and a bridge's own
//! with an MTU set by hand.

use std::collections::{BTreeMap, BTreeSet};

use dpfreeze::devices::{Device, Policer, Traffic, INGRESS, ROOT};

use super::Sim;
use crate::host::devices::Devices;
use crate::host::Result;

/// The port with somebody's qdisc.
pub const SHAPED: &str = "v1";
/// Its index.
pub(super) const SHAPED_INDEX: u32 = 11;
/// The bridge whose own device has an MTU set by hand.
pub const BY_HAND: &str = "br0";

pub(super) struct SimDevices(pub(super) Sim);

impl Devices for SimDevices {
    fn read(&self, names: &BTreeSet<String>) -> Result<BTreeMap<String, Device>> {
        self.0.operate("devices.read", None, |world| {
            let tbf = Traffic::Qdisc { kind: "tbf".into(), handle: 0x8001_0000, parent: ROOT };
            let ingress = Traffic::Qdisc { kind: "ingress".into(), handle: 0xffff_0000, parent: INGRESS };
            let traffic: BTreeSet<Traffic> = world.kernel.shaped.then_some(tbf).into_iter().chain([ingress]).collect();
            let shaped = Device { name: SHAPED.into(), ifindex: SHAPED_INDEX, mtu: 1500, traffic };
            let by_hand = Device { name: BY_HAND.into(), ifindex: 12, mtu: world.kernel.mtu, traffic: BTreeSet::new() };
            let there = [shaped, by_hand].into_iter().filter(|device| names.contains(&device.name));
            Ok(there.map(|device| (device.name.clone(), device)).collect())
        })
    }

    fn policers(&self, devices: &BTreeMap<String, Device>) -> Result<Vec<Policer>> {
        self.0.operate("devices.policers", None, |_| {
            let policer =
                |device: &Device| Policer { name: device.name.clone(), ifindex: device.ifindex, rates: Vec::new() };
            Ok(devices.get(SHAPED).map(policer).into_iter().collect())
        })
    }

    fn set_mtu(&self, device: &Device, mtu: u32) -> Result<()> {
        self.0.operate("devices.set_mtu", None, |world| {
            if device.name == BY_HAND {
                world.kernel.mtu = mtu;
            }
            Ok(())
        })
    }
}

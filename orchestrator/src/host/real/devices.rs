//! Network devices of this machine, through rtnetlink.

use std::collections::{BTreeMap, BTreeSet};

use dpfreeze::devices::{self, Device, Policer};

use crate::host::devices::Devices;
use crate::host::{Context, Result};

/// The devices of this network namespace.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDevices;

impl Devices for RealDevices {
    fn read(&self, names: &BTreeSet<String>) -> Result<BTreeMap<String, Device>> {
        devices::read(names).about("devices of the ports")
    }

    fn policers(&self, devices: &BTreeMap<String, Device>) -> Result<Vec<Policer>> {
        let of = |device: &Device| devices::policer(device).about(format!("device {}", device.name)).transpose();
        devices.values().filter_map(of).collect()
    }

    fn set_mtu(&self, device: &Device, mtu: u32) -> Result<()> {
        devices::set_mtu(device.ifindex, mtu).about(format!("device {}", device.name))
    }
}

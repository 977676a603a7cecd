//! The kernel module of the simulated host.

use std::time::Instant;

use dpfreeze::snapshot::Snapshot;

use super::Sim;
use crate::host::module::{Device, KernelModule};
use crate::host::{HostError, Result};
use crate::report::Finding;

pub(super) struct SimModule(pub(super) Sim);

impl KernelModule for SimModule {
    fn obstacles(&self, _now: &Snapshot, until: Instant) -> Result<Vec<Finding>> {
        self.0.operate("module.obstacles", Some(until), |_| Ok(Vec::new()))
    }

    fn devices(&self, _names: &[String], until: Instant) -> Result<Vec<Device>> {
        let device = Device { name: "br0".into(), up: true, ..Device::default() };
        self.0.operate("module.devices", Some(until), |_| Ok(vec![device.clone()]))
    }

    fn reload(&self, until: Instant) -> Result<Vec<String>> {
        self.0.operate("module.reload", Some(until), |world| {
            if world.switches().any(|switch| switch.leads) {
                return Err(HostError::new("module openvswitch", "it is in use"));
            }
            world.lose_module();
            Ok(Vec::new())
        })
    }

    fn put_back(&self, devices: &[Device], until: Instant) -> Result<Vec<String>> {
        self.0.operate("module.put_back", Some(until), |world| {
            world.kernel.bare_devices &= devices.is_empty();
            Ok(Vec::new())
        })
    }
}

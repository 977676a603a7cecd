//! The kernel module, and the devices that are gone when it is.

use std::collections::BTreeMap;
use std::time::Instant;

use dpfreeze::snapshot::Snapshot;
use serde::{Deserialize, Serialize};

use super::Result;
use crate::report::Finding;

/// An internal device (a bridge's own, or a port of type `internal`) as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: String,
    /// Its MTU, bytes.
    pub mtu: u64,
    /// It was up.
    pub up: bool,
    /// Its addresses, each as the words after `ip address replace`, without the device.
    pub addresses: Vec<Vec<String>>,
    /// The routes through it that somebody made, each as the words after `ip route replace`, without the device.
    pub routes: Vec<Vec<String>>,
    /// The same of IPv6.
    pub routes6: Vec<Vec<String>>,
    /// Its files under /proc/sys/net, with what they say.
    pub settings: BTreeMap<String, String>,
}

/// The kernel module.
pub trait KernelModule: Send + Sync {
    /// What stands in the way of taking it out, or would be lost with it for good: a finding each.
    fn obstacles(&self, now: &Snapshot, until: Instant) -> Result<Vec<Finding>>;
    /// What these devices are.
    fn devices(&self, names: &[String], until: Instant) -> Result<Vec<Device>>;
    /// Deletes the datapath, unloads the module and loads it again, which is tried whatever becomes of the unloading.
    /// Returns its version (`srcversion`) before and after. May be done twice.
    fn reload(&self, until: Instant) -> Result<Vec<String>>;
    /// Makes devices that are there again what they were; returns what could not be done, in words. May be done twice.
    fn put_back(&self, devices: &[Device], until: Instant) -> Result<Vec<String>>;
}

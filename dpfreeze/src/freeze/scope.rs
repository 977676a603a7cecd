//! What a freeze covers.

use std::os::unix::fs::MetadataExt;

use libbpf_rs::{MapCore, MapFlags, MapHandle};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::freeze::abi;

/// Generic netlink family ids of openvswitch, 0 where the family is absent. They change when the module is reloaded:
/// resolve them anew for each run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Families {
    /// `ovs_datapath`
    pub datapath: u16,
    /// `ovs_vport`
    pub vport: u16,
    /// `ovs_flow`
    pub flow: u16,
    /// `ovs_meter`
    pub meter: u16,
}

impl Families {
    /// Asks the kernel; loads no module. All 0 where openvswitch is not in the kernel: then there is nothing to freeze
    /// but timeout policies, and the canary works all the same.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Netlink`].
    pub fn resolve() -> Result<Families> {
        let ids = crate::netlink::family::families()?;
        let id = |name: &str| ids.get(name).copied().unwrap_or_default();
        Ok(Families {
            datapath: id("ovs_datapath"),
            vport: id("ovs_vport"),
            flow: id("ovs_flow"),
            meter: id("ovs_meter"),
        })
    }
}

impl From<crate::ovs::Families> for Families {
    fn from(ids: crate::ovs::Families) -> Families {
        Families { datapath: ids.datapath, vport: ids.vport, flow: ids.flow, meter: ids.meter.unwrap_or_default() }
    }
}

/// What a freeze covers; anything else passes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// Inode of the network namespace (`/proc/PID/ns/net`).
    pub netns_inode: u64,
    /// `dp_ifindex` of each datapath.
    pub ifindexes: Vec<u32>,
    /// Name of each datapath: the kernel prefers it to the index where a message has both.
    pub names: Vec<String>,
    /// Names of the guarded timeout policies, at most 31 bytes each.
    pub timeout_names: Vec<String>,
    /// The family ids.
    pub families: Families,
    /// Whether the meters [`PROBE_METERS`] are nobody's. Their deletion passes then: an ovs-vswitchd that starts makes them
    /// for a moment to find out whether meters work, and only where neither is there.
    pub probe_meters: bool,
}

/// lib/dpif-netlink.c, `probe_broken_meters__()`, since Open vSwitch 3.3.7, 3.4.5, 3.5.3, 3.6.1 and 3.7.
pub const PROBE_METERS: [u32; 2] = [1021, 1022];

impl Scope {
    /// These datapaths and timeout policies, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Where an index has no device: the datapath is gone.
    pub fn here(ifindexes: &[u32], timeout_names: &[String], families: Families) -> Result<Scope> {
        let mut names = Vec::with_capacity(ifindexes.len());
        for index in ifindexes {
            let name = nix::net::if_::if_indextoname(*index)
                .map_err(|errno| Error::io(format!("name of the datapath with ifindex {index}"), errno))?;
            names.push(name.to_string_lossy().into_owned());
        }
        Ok(Scope {
            netns_inode: netns_inode()?,
            ifindexes: ifindexes.to_vec(),
            names,
            timeout_names: timeout_names.to_vec(),
            families,
            probe_meters: false,
        })
    }
}

/// Inode of the calling thread's network namespace.
pub fn netns_inode() -> Result<u64> {
    let path = "/proc/thread-self/ns/net";
    std::fs::metadata(path).map(|meta| meta.ino()).map_err(|error| Error::io(path, error))
}

/// A name as the key of a map: NUL to the end. A name too long for the kernel matches nothing.
pub fn padded(name: &str, len: usize) -> Vec<u8> {
    let mut key = name.as_bytes().to_vec();
    key.truncate(len - 1);
    key.resize(len, 0);
    key
}

/// Makes `keys` the keys of a hash map: adds first, then drops the others, so that a key in both is never away.
pub fn fill(map: &MapHandle, keys: impl Iterator<Item = Vec<u8>>) -> Result<()> {
    let what = || format!("map {} in {}", map.name().to_string_lossy(), super::PIN_DIR);
    let wanted: std::collections::HashSet<Vec<u8>> = keys.collect();
    let old: Vec<Vec<u8>> = map.keys().filter(|key| !wanted.contains(key)).collect();
    for key in &wanted {
        map.update(key, &1u32.to_ne_bytes(), MapFlags::ANY).map_err(|error| abi::bpf_error(what(), &error))?;
    }
    for key in &old {
        map.delete(key).map_err(|error| abi::bpf_error(what(), &error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fill_their_key_and_keep_a_nul() {
        assert_eq!(padded("abc", 5), b"abc\0\0");
        assert_eq!(padded("abcdef", 5), b"abcd\0");
    }
}

//! Network devices by name, and what traffic control has on them: qdiscs, classes and filters, as rtnetlink tells them.
//!
//! What the kernel has made by itself (handle 0: `noqueue`, `mq`, the default qdisc) is left out: nobody can delete it, and
//! it comes by itself.

pub(crate) mod policing;
mod traffic;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

pub use policing::{delete_ingress, policer, Policer, Rates};
pub use traffic::{Traffic, CLSACT_EGRESS, CLSACT_INGRESS, INGRESS, ROOT};

use crate::error::{Error, Result};
use crate::netlink::attr::{AttrBuf, Attrs};
use crate::netlink::{Protocol, Socket};
use traffic::{RTM_GETQDISC, RTM_GETTCLASS, RTM_GETTFILTER};

// linux/rtnetlink.h
pub(crate) const RTM_GETLINK: u16 = 18;
const RTM_NEWLINK: u16 = 16;
/// `struct ifinfomsg {u8 family; u8 pad; u16 type; int index; u32 flags; u32 change}`
pub(crate) const IFINFOMSG: usize = 16;
// linux/if_link.h
pub(crate) const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_EXT_MASK: u16 = 29;
/// `RTEXT_FILTER_SKIP_STATS`
const SKIP_STATS: u32 = 1 << 3;
/// More than this of all devices together is not kept in memory, and so not compared.
const MOST: usize = 100_000;

/// A device of this network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Qdiscs, classes and filters that somebody has put on it.
    pub traffic: BTreeSet<Traffic>,
}

/// Those of these names that are there, by name. Their classes and filters are read one device after the other: a change
/// meanwhile may be seen in part.
///
/// # Errors
/// [`Error::Unsupported`] where they have more than 100,000 qdiscs, classes and filters; else as [`Socket::dump`].
pub fn read(names: &BTreeSet<String>) -> Result<BTreeMap<String, Device>> {
    let mut socket = Socket::open(Protocol::Route)?;
    let mut devices = links(&mut socket, names)?;
    let by_index: BTreeMap<u32, String> = devices.values().map(|one| (one.ifindex, one.name.clone())).collect();
    let mut seen = 0;
    for (ifindex, qdisc) in list(&mut socket, "qdiscs", RTM_GETQDISC, 0, 0, MOST)? {
        if let Some(device) = by_index.get(&ifindex).and_then(|name| devices.get_mut(name)) {
            seen += usize::from(device.traffic.insert(qdisc));
        }
    }
    for device in devices.values_mut().filter(|device| !device.traffic.is_empty()) {
        seen += add_classes_and_filters(&mut socket, device, MOST.saturating_sub(seen))?;
    }
    Ok(devices)
}

/// Names, indices and MTUs.
fn links(socket: &mut Socket, names: &BTreeSet<String>) -> Result<BTreeMap<String, Device>> {
    let body = [&[0; IFINFOMSG][..], AttrBuf::new().push_u32(IFLA_EXT_MASK, SKIP_STATS).as_bytes()].concat();
    socket.dump_each("network devices", RTM_GETLINK, &body, BTreeMap::new, |devices, payload| {
        let device = link(payload)?;
        if names.contains(&device.name) {
            devices.insert(device.name.clone(), device);
        }
        Ok(())
    })
}

fn link(payload: &[u8]) -> Result<Device> {
    let short = || Error::malformed("network device", format!("{} bytes", payload.len()));
    let (head, attrs) = payload.split_first_chunk::<IFINFOMSG>().ok_or_else(short)?;
    let mut device = Device { ifindex: u32::from_ne_bytes([head[4], head[5], head[6], head[7]]), ..Device::default() };
    for attr in Attrs(attrs) {
        let attr = attr?;
        match attr.kind {
            IFLA_IFNAME => device.name = attr.string(),
            IFLA_MTU => device.mtu = attr.u32()?,
            _ => {}
        }
    }
    Ok(device)
}

/// Returns how many. Classes are those of its qdiscs, filters those of its qdiscs and classes.
fn add_classes_and_filters(socket: &mut Socket, device: &mut Device, most: usize) -> Result<usize> {
    let mut added = 0;
    for (_, class) in list(socket, "classes", RTM_GETTCLASS, device.ifindex, 0, most)? {
        added += usize::from(device.traffic.insert(class));
    }
    let parents: BTreeSet<u32> = device.traffic.iter().flat_map(Traffic::filter_parents).collect();
    for parent in parents {
        let left = most.saturating_sub(added);
        for (_, filter) in list(socket, "filters", RTM_GETTFILTER, device.ifindex, parent, left)? {
            added += usize::from(device.traffic.insert(filter));
        }
    }
    Ok(added)
}

/// What a dump tells, with the index of the device.
fn list(
    socket: &mut Socket,
    what: &str,
    kind: u16,
    ifindex: u32,
    parent: u32,
    most: usize,
) -> Result<Vec<(u32, Traffic)>> {
    socket.dump_each(what, kind, &traffic::request(ifindex, parent), Vec::new, |found, payload| {
        if let Some(one) = traffic::parse(kind, payload)? {
            if found.len() >= most {
                return Err(Error::Unsupported {
                    what: what.to_owned(),
                    why: format!("the devices have more than {MOST} qdiscs, classes and filters"),
                    remedy: "none: they are not looked at".into(),
                });
            }
            found.push(one);
        }
        Ok(())
    })
}

/// Sets the MTU of a device.
///
/// # Errors
/// As [`Socket::request`]: `EINVAL` for one that the device cannot have.
pub fn set_mtu(ifindex: u32, mtu: u32) -> Result<()> {
    let mut head = [0; IFINFOMSG];
    head[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    let body = [&head[..], AttrBuf::new().push_u32(IFLA_MTU, mtu).as_bytes()].concat();
    Socket::open(Protocol::Route)?.request("MTU", RTM_NEWLINK, 0, &body).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_tells_its_loopback() {
        let devices = read(&["lo", "no-such-device"].map(str::to_owned).into()).unwrap();
        assert_eq!(devices.keys().collect::<Vec<_>>(), ["lo"]);
        assert!(devices["lo"].ifindex > 0 && devices["lo"].mtu > 0);
    }

    #[test]
    fn a_device_is_read_from_its_attributes() {
        let mut head = [0; IFINFOMSG];
        head[4] = 7;
        let mut attrs = AttrBuf::new();
        attrs.push_str(IFLA_IFNAME, "v1").push_u32(99, 5).push_u32(IFLA_MTU, 1400);
        let told = link(&[&head[..], attrs.as_bytes()].concat()).unwrap();
        assert_eq!((told.name.as_str(), told.ifindex, told.mtu), ("v1", 7, 1400));
        assert!(link(&head[..8]).is_err());
    }
}

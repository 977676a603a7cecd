//! Tunnel ports across the start of an Open vSwitch before 3.2 (hazards 7).
//!
//! Such a daemon takes the backing device of every tunnel (`vxlan_sys_4789`, `genev_sys_6081`, `gre_sys`, …) for
//! stale: it deletes port and device, and adds both again a moment later. Every kernel flow that names the port loses
//! its packets meanwhile. Refusing the deletion alone is worse: the port is there, so adding it fails, and the daemon
//! then destroys the *device*.
//!
//! What OVS 3.2 does instead is to note the number of the port it finds. [`Adoption`] makes an older daemon do the
//! same: while the daemon starts, the requests that would delete or add a guarded port are turned into the question
//! for that very port, in the daemon's own buffer, before the kernel reads them. The answer to the question is the
//! answer the daemon expects: to `OVS_VPORT_CMD_NEW` the port with its number, to a deletion "done". The datapath is
//! not touched at all, so nothing has to be removed, held back or put in order again. See docs/tunnels.md.

mod adoption;
mod message;
mod tracee;

pub use adoption::{Adoption, Report};
pub use message::{Guard, Request};

use nix::errno::Errno;

use crate::devices::{IFINFOMSG, IFLA_IFNAME};
use crate::error::{Error, Result};
use crate::netlink::attr::AttrBuf;
use crate::netlink::{Protocol, Socket};
use crate::ovs::Vport;

/// A port of the datapath that Open vSwitch made for tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backer {
    /// Name of the port, which is that of its device.
    pub name: String,
    /// Number in the datapath.
    pub port_no: u32,
}

/// The tunnel classes of OVS's lib/netdev-vport.c: type of an interface; `dpif_port`, which the device is named, or
/// named with `_PORT` behind; and that port where an interface does not say it.
const CLASSES: [(&str, &str, Option<u16>); 10] = [
    ("geneve", "genev_sys", Some(6081)),
    ("gre", "gre_sys", None),
    ("vxlan", "vxlan_sys", Some(4789)),
    ("lisp", "lisp_sys", Some(4341)),
    ("stt", "stt_sys", Some(7471)),
    ("erspan", "erspan_sys", None),
    ("ip6erspan", "ip6erspan_sys", None),
    ("ip6gre", "ip6gre_sys", None),
    ("gtpu", "gtpu_sys", Some(2152)),
    ("bareudp", "udp_sys", Some(0)),
];

/// The tunnel ports among `vports`, told by their names as OVS itself tells them (`netdev_vport_type_from_name`).
pub fn backers(vports: &[Vport]) -> Vec<Backer> {
    vports.iter().filter(|v| is_backer(&v.name)).map(|v| Backer { name: v.name.clone(), port_no: v.port_no }).collect()
}

/// Is a port of this name a tunnel port of Open vSwitch?
pub fn is_backer(name: &str) -> bool {
    CLASSES.iter().any(|(_, known, _)| match name.strip_prefix(known) {
        Some("") => true,
        Some(rest) => rest.strip_prefix('_').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())),
        None => false,
    })
}

/// The tunnel port behind an interface of type `kind` with `options:dst_port` as given; None if that is no tunnel
/// (`netdev_vport_get_dpif_port`).
pub fn backer_of(kind: &str, dst_port: Option<&str>) -> Option<String> {
    let (_, name, usual) = CLASSES.iter().find(|(class, _, _)| *class == kind)?;
    let Some(usual) = usual else { return Some((*name).to_owned()) };
    // OVS reads it by atoi(): nothing that is a number is 0.
    let port = dst_port.map_or(*usual, |text| text.trim().parse().unwrap_or(0));
    Some(format!("{name}_{port}"))
}

/// Deletes the device of a tunnel port that was taken out of the datapath, as OVS does; false if it is not there.
///
/// # Errors
/// As [`Socket::request`].
pub fn delete_device(name: &str) -> Result<bool> {
    let mut attrs = AttrBuf::new();
    attrs.push_str(IFLA_IFNAME, name);
    let body = [&[0; IFINFOMSG], attrs.as_bytes()].concat();
    let what = format!("RTM_DELLINK of {name}");
    match Socket::open(Protocol::Route)?.request(&what, message::RTM_DELLINK, 0, &body) {
        Ok(_) => Ok(true),
        Err(Error::Netlink { errno: Errno::ENODEV, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backers_are_told_by_ovs_own_names() {
        for name in ["vxlan_sys_4789", "genev_sys_6081", "gre_sys", "ip6gre_sys", "udp_sys_6635", "erspan_sys"] {
            assert!(is_backer(name), "{name}");
        }
        for name in ["vxlan0", "gre_sysx", "vxlan_sys_", "vxlan_sys_a", "eth0", "xgre_sys", "br-int"] {
            assert!(!is_backer(name), "{name}");
        }
    }

    #[test]
    fn an_interface_stands_for_the_port_that_ovs_would_make_for_it() {
        for (kind, dst_port, name) in [
            ("vxlan", None, "vxlan_sys_4789"),
            ("vxlan", Some("8472"), "vxlan_sys_8472"),
            ("geneve", None, "genev_sys_6081"),
            ("gre", Some("7"), "gre_sys"),
            ("bareudp", Some("6635"), "udp_sys_6635"),
        ] {
            assert_eq!(backer_of(kind, dst_port).as_deref(), Some(name));
            assert!(is_backer(name));
        }
        assert!(backer_of("", None).is_none() && backer_of("internal", None).is_none());
    }

    #[test]
    fn backers_keep_number_and_name() {
        let port = |port_no, name: &str| Vport { port_no, name: name.into(), ..Default::default() };
        let found = backers(&[port(0, "ovs-system"), port(3, "gre_sys"), port(4, "veth1")]);
        assert_eq!(found, [Backer { name: "gre_sys".into(), port_no: 3 }]);
    }
}

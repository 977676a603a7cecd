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

use crate::ovs::Vport;

/// A port of the datapath that Open vSwitch made for tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backer {
    /// Name of the port, which is that of its device.
    pub name: String,
    /// Number in the datapath.
    pub port_no: u32,
}

/// `dpif_port` of each tunnel class in OVS's lib/netdev-vport.c: the device is named so, or so with `_PORT` behind.
const BACKER_NAMES: [&str; 10] = [
    "genev_sys",
    "gre_sys",
    "vxlan_sys",
    "lisp_sys",
    "stt_sys",
    "erspan_sys",
    "ip6erspan_sys",
    "ip6gre_sys",
    "gtpu_sys",
    "udp_sys", // bareudp
];

/// The tunnel ports among `vports`, told by their names as OVS itself tells them (`netdev_vport_type_from_name`).
pub fn backers(vports: &[Vport]) -> Vec<Backer> {
    vports
        .iter()
        .filter(|v| is_backer_name(&v.name))
        .map(|v| Backer { name: v.name.clone(), port_no: v.port_no })
        .collect()
}

fn is_backer_name(name: &str) -> bool {
    BACKER_NAMES.iter().any(|known| match name.strip_prefix(known) {
        Some("") => true,
        Some(rest) => rest.strip_prefix('_').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())),
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backers_are_told_by_ovs_own_names() {
        for name in ["vxlan_sys_4789", "genev_sys_6081", "gre_sys", "ip6gre_sys", "udp_sys_6635", "erspan_sys"] {
            assert!(is_backer_name(name), "{name}");
        }
        for name in ["vxlan0", "gre_sysx", "vxlan_sys_", "vxlan_sys_a", "eth0", "xgre_sys", "br-int"] {
            assert!(!is_backer_name(name), "{name}");
        }
    }

    #[test]
    fn backers_keep_number_and_name() {
        let port = |port_no, name: &str| Vport { port_no, name: name.into(), ..Default::default() };
        let found = backers(&[port(0, "ovs-system"), port(3, "gre_sys"), port(4, "veth1")]);
        assert_eq!(found, [Backer { name: "gre_sys".into(), port_no: 3 }]);
    }
}

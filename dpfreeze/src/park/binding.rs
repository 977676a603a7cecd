//! Who the upcalls of a datapath go to, in either mode of dispatch (hazard 16).

use std::collections::HashSet;

use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::ovs::{Datapath, Dispatch, Features, Ovs, Vport};

/// As many port ids as a port gets: the kernel's answer has them all, and an answer that does not fit into a page is a
/// BUG of the kernel (`ovs_vport_cmd_set`, net/openvswitch/datapath.c).
const MOST_PER_PORT: usize = 256;

/// Who the upcalls went to, to be put back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    features: u32,
    per_cpu_pids: Vec<u32>,
    /// Port ids by port; empty where upcalls are dispatched per CPU.
    ports: Vec<(u32, Vec<u32>)>,
}

impl Binding {
    /// The binding as it is.
    ///
    /// # Errors
    /// As [`Ovs::vports`]; [`Error::Unsupported`] where the kernel does not tell, as nothing could be put back then.
    pub fn of(ovs: &mut Ovs, datapath: &Datapath) -> Result<Binding> {
        let vports = match datapath.dispatch() {
            Dispatch::PerCpu if datapath.per_cpu_pids.is_none() => return Err(untold(&datapath.name)),
            Dispatch::PerCpu => Vec::new(),
            Dispatch::PerVport => ovs.vports(datapath.ifindex)?,
        };
        Ok(Binding {
            features: datapath.user_features,
            per_cpu_pids: datapath.cpu_port_ids().to_vec(),
            ports: vports.into_iter().map(|vport| (vport.port_no, vport.upcall_pids)).collect(),
        })
    }

    /// Every port id that upcalls go to, once.
    pub fn port_ids(&self) -> Vec<u32> {
        match self.ports.is_empty() {
            true => self.per_cpu_pids.clone(),
            false => distinct(self.ports.iter().flat_map(|(_, pids)| pids)),
        }
    }

    /// Makes it be so again. Ports that have gone since are left out; those that have come keep what they were given.
    ///
    /// # Errors
    /// As [`Ovs::set_vport_pids`] and [`Ovs::set_features`].
    pub fn put_back(&self, ovs: &mut Ovs, datapath: &Datapath) -> Result<()> {
        if self.ports.is_empty() {
            return ovs.set_per_cpu_pids(datapath, self.features, &self.per_cpu_pids);
        }
        for (port_no, pids) in &self.ports {
            bind_port(ovs, datapath.ifindex, *port_no, pids)?;
        }
        ovs.set_features(datapath, self.features)
    }
}

/// A kernel that takes the port ids by CPU and does not give them back (Linux 5.15 to 6.0).
fn untold(datapath: &str) -> Error {
    Error::Unsupported {
        what: datapath.into(),
        why: "this kernel does not tell which sockets the upcalls go to".into(),
        remedy: "use Linux 6.1 or later".into(),
    }
}

/// Binds every upcall to `port_ids`. Where the kernel can dispatch per CPU it does from now on: that covers ports that
/// are still to come, and a daemon of either kind that opens the datapath meanwhile. Where it cannot, each port is bound.
///
/// # Errors
/// As [`Ovs::set_per_cpu_pids`] and [`Ovs::set_vport_pids`].
pub fn take(ovs: &mut Ovs, datapath: &Datapath, port_ids: &[u32]) -> Result<()> {
    let features = datapath.features() | Features::DISPATCH_UPCALL_PER_CPU;
    match ovs.set_per_cpu_pids(datapath, features.bits(), port_ids) {
        // ovs_dp_change(): a kernel before 5.15 does not know the feature.
        Err(Error::Netlink { errno: Errno::EOPNOTSUPP | Errno::EINVAL, .. })
            if datapath.dispatch() == Dispatch::PerVport =>
        {
            bind_ports(ovs, datapath.ifindex, port_ids)
        }
        done => done,
    }
}

/// Gives the upcalls to the daemon that reads `port_ids`, in the mode that it is in: per vport if its ports are bound to
/// nobody else.
///
/// # Errors
/// As [`take`].
pub fn give(ovs: &mut Ovs, datapath: &Datapath, features: Option<u32>, port_ids: &[u32]) -> Result<()> {
    match datapath.dispatch() {
        Dispatch::PerCpu if features.is_none() && ports_are_bound_to(&ovs.vports(datapath.ifindex)?, port_ids) => {
            dispatch_per_vport(ovs, datapath)
        }
        Dispatch::PerVport if features.is_none() => bind_ports(ovs, datapath.ifindex, port_ids),
        _ => ovs.set_per_cpu_pids(datapath, features.unwrap_or(datapath.user_features), port_ids),
    }
}

/// Lets what each port is bound to hold.
///
/// # Errors
/// As [`Ovs::set_features`].
pub fn dispatch_per_vport(ovs: &mut Ovs, datapath: &Datapath) -> Result<()> {
    match datapath.dispatch() {
        Dispatch::PerVport => Ok(()),
        Dispatch::PerCpu => {
            let features = datapath.features() - Features::DISPATCH_UPCALL_PER_CPU;
            ovs.set_features(datapath, features.bits())
        }
    }
}

/// Are all of these ports bound, and to none but these port ids?
pub fn ports_are_bound_to(vports: &[Vport], port_ids: &[u32]) -> bool {
    let port_ids: HashSet<u32> = port_ids.iter().copied().filter(|pid| *pid != 0).collect();
    let is_bound =
        |vport: &Vport| !vport.upcall_pids.is_empty() && vport.upcall_pids.iter().all(|pid| port_ids.contains(pid));
    !vports.is_empty() && vports.iter().all(is_bound)
}

/// Each port id that one of these ports is bound to, once.
pub fn port_ids_of(vports: &[Vport]) -> Vec<u32> {
    distinct(vports.iter().flat_map(|vport| &vport.upcall_pids))
}

fn bind_ports(ovs: &mut Ovs, ifindex: u32, port_ids: &[u32]) -> Result<()> {
    let port_ids = port_ids.get(..MOST_PER_PORT).unwrap_or(port_ids);
    for vport in ovs.vports(ifindex)? {
        bind_port(ovs, ifindex, vport.port_no, port_ids)?;
    }
    Ok(())
}

fn bind_port(ovs: &mut Ovs, ifindex: u32, port_no: u32, pids: &[u32]) -> Result<()> {
    match ovs.set_vport_pids(ifindex, port_no, pids) {
        // It has gone since it was listed.
        Err(Error::Netlink { errno: Errno::ENODEV, .. }) => Ok(()),
        done => done,
    }
}

fn distinct<'a>(pids: impl Iterator<Item = &'a u32>) -> Vec<u32> {
    let mut ids: Vec<u32> = pids.copied().collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(port_no: u32, pids: &[u32]) -> Vport {
        Vport { port_no, upcall_pids: pids.to_vec(), ..Vport::default() }
    }

    #[test]
    fn a_port_bound_to_nobody_or_to_another_is_not_bound_to_us() {
        assert!(ports_are_bound_to(&[port(0, &[7]), port(1, &[8, 7])], &[7, 8]));
        for other in [&[][..], &[0], &[9], &[7, 9], &[7, 0]] {
            assert!(!ports_are_bound_to(&[port(0, &[7]), port(1, other)], &[7, 8]), "{other:?}");
        }
        assert!(!ports_are_bound_to(&[], &[7]));
    }

    #[test]
    fn port_ids_come_once() {
        assert_eq!(port_ids_of(&[port(0, &[7]), port(1, &[8, 7])]), [7, 8]);
        let by_port = Binding { ports: vec![(0, vec![9]), (1, vec![9])], per_cpu_pids: vec![1], features: 3 };
        assert_eq!(by_port.port_ids(), [9]);
        // By CPU their order and number matter.
        let by_cpu = Binding { ports: Vec::new(), per_cpu_pids: vec![5, 4, 5], features: 11 };
        assert_eq!(by_cpu.port_ids(), [5, 4, 5]);
    }
}

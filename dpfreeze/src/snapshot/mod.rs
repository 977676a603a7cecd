//! What the kernel knew: captured before a run, compared after it.

mod compare;

use serde::{Deserialize, Serialize};

use crate::conntrack::{timeout_policies, TimeoutPolicy};
use crate::error::Result;
use crate::ovs::{Datapath, Flow, Meter, Ovs, Vport, ZoneLimit};

pub use compare::{compare, kept_flows, Difference};

/// A datapath and all that is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatapathSnapshot {
    /// The datapath itself.
    pub datapath: Datapath,
    /// Its ports, by number.
    pub vports: Vec<Vport>,
    /// Its flows, as the kernel listed them.
    pub flows: Vec<Flow>,
    /// Its meters, by id.
    pub meters: Vec<Meter>,
}

/// What the kernel knows in one network namespace. It can be written as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The datapaths, by name.
    pub datapaths: Vec<DatapathSnapshot>,
    /// Connection limits of the conntrack zones, by zone.
    pub ct_limits: Vec<ZoneLimit>,
    /// Conntrack timeout policies, by name.
    pub timeout_policies: Vec<TimeoutPolicy>,
}

impl Snapshot {
    /// The datapath of this name.
    pub fn datapath(&self, name: &str) -> Option<&DatapathSnapshot> {
        self.datapaths.iter().find(|d| d.datapath.name == name)
    }
}

/// Reads all that the kernel knows. The parts are read one after the other: what changes meanwhile may be in one and
/// not yet in the other.
///
/// # Errors
/// The first that occurred; nothing is left out in silence.
pub fn capture(ovs: &mut Ovs) -> Result<Snapshot> {
    let mut datapaths = ovs.datapaths()?.into_iter().map(|d| capture_datapath(ovs, d)).collect::<Result<Vec<_>>>()?;
    datapaths.sort_by(|a, b| a.datapath.name.cmp(&b.datapath.name));
    let mut ct_limits = ovs.ct_limits()?;
    ct_limits.sort_by_key(|limit| limit.zone);
    let mut timeout_policies = timeout_policies()?;
    timeout_policies.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Snapshot { datapaths, ct_limits, timeout_policies })
}

/// Reads one datapath.
///
/// # Errors
/// As [`capture`].
pub fn capture_datapath(ovs: &mut Ovs, datapath: Datapath) -> Result<DatapathSnapshot> {
    let ifindex = datapath.ifindex;
    let mut vports = ovs.vports(ifindex)?;
    vports.sort_by_key(|vport| vport.port_no);
    Ok(DatapathSnapshot { datapath, vports, flows: ovs.flows(ifindex)?, meters: ovs.meters(ifindex)? })
}

//! The generic netlink families of the Open vSwitch kernel datapath (include/uapi/linux/openvswitch.h).
//!
//! Keys, masks and actions stay runs of attributes, byte for byte as the kernel sent them: this module knows the
//! messages, [`crate::flow_key`] knows what is in them. An attribute that is not known here is kept in `unknown`.

mod control;
mod ct_limit;
mod datapath;
mod flow;
mod header;
mod meter;
mod packet;
#[cfg(test)]
pub(crate) mod testing;
mod vport;

pub use control::{Families, Ovs};
pub use ct_limit::{ZoneLimit, DEFAULT_ZONE};
pub use datapath::{Datapath, DatapathStats, Dispatch, Features};
pub use flow::{parse_ufid, ufid_text, Flow, FlowCounts};
pub use meter::{Band, Meter, MeterFeatures};
pub use packet::{Execute, Upcall, UpcallKind};
pub use vport::{Vport, VportKind, VportStats};

//! The datapath side of ovs-graceful: knows the kernel; nothing about daemons, systemd or OVSDB.

mod bytes;
pub mod conntrack;
pub mod devices;
pub mod error;
pub mod flow_key;
pub mod freeze;
mod memory;
pub mod netlink;
pub mod ovs;
pub mod packet;
pub mod park;
pub mod snapshot;
pub mod tunnel;

pub use error::{Error, Result};

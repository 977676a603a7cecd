//! The datapath side of ovs-graceful: knows the kernel; nothing about daemons, systemd or OVSDB.

pub mod error;
pub mod netlink;

pub use error::{Error, Result};

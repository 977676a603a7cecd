//! Netlink: socket, attributes, families. Nothing here knows what Open vSwitch is.

pub mod attr;

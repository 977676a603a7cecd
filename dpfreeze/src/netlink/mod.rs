//! Netlink: socket, attributes, families, table. Nothing here knows what Open vSwitch is.

pub mod attr;
mod conversation;
pub mod family;
pub mod message;
pub mod socket;
pub mod table;

pub use conversation::Answer;
pub use socket::{Protocol, Socket};

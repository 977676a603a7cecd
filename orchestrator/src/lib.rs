//! The run: knows daemons, systemd, OVSDB and OpenFlow; asks dpfreeze for the datapath.

pub mod control;
pub mod host;
pub mod machine;
pub mod report;

//! The run: knows daemons, systemd, OVSDB and OpenFlow; asks dpfreeze for the datapath.

#[cfg(feature = "chaos")]
pub mod chaos;
pub mod check;
pub mod cli;
pub mod config;
pub mod conntrack;
pub mod control;
pub mod features;
pub mod guard;
pub mod host;
pub mod inventory;
pub mod journal;
pub mod machine;
pub mod recovery;
pub mod report;
pub mod steps;
pub mod supervisor;

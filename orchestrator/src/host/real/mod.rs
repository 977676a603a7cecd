//! The machine we run on.

pub mod assemble;
pub mod check;
pub mod command;
mod daemons;
mod datapath;
mod fdb;
pub mod jsonrpc;
pub mod openflow;
pub mod ovsdb;
pub mod ovsdb_server;
pub mod pid_file;
mod prepared;
pub mod procfs;
mod rule_watch;
mod spawn;
pub mod systemd;
pub mod unixctl;

pub use daemons::RealDaemons;
pub use openflow::RealOpenFlow;
pub use ovsdb::Ovsdb;
pub use systemd::Systemd;

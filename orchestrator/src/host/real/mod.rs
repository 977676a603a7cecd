//! The machine we run on.

pub mod assemble;
pub mod check;
mod clock;
pub mod command;
mod container;
mod controllers;
mod daemons;
mod database_file;
mod datapath;
mod disk;
mod fdb;
pub mod jsonrpc;
mod module;
pub mod openflow;
pub mod ovsdb;
pub mod ovsdb_server;
pub mod pid_file;
mod prepared;
mod process_tree;
pub mod procfs;
mod program;
mod recording;
mod rule_watch;
mod spawn;
mod surroundings;
pub mod systemd;
pub mod unixctl;

pub use clock::RealClock;
pub use daemons::RealDaemons;
pub use disk::RealDisk;
pub use module::RealModule;
pub use openflow::RealOpenFlow;
pub use ovsdb::Ovsdb;
pub use surroundings::RealSurroundings;
pub use systemd::Systemd;

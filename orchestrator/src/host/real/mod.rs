//! The machine we run on.

pub mod jsonrpc;
pub mod ovsdb;
pub mod unixctl;

//! Replaces the running Open vSwitch daemons of a host without losing a packet.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    ExitCode::from(orchestrator::cli::run(orchestrator::cli::Cli::parse()))
}

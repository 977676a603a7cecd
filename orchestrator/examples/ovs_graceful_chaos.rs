//! `ovs-graceful` with the feature `chaos`: for the lab's scenario of that name, and for nobody else.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    ExitCode::from(orchestrator::cli::run(orchestrator::cli::Cli::parse()))
}

//! The hand tool of the datapath side.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Freeze and look at the kernel datapath of Open vSwitch.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lift any freeze, whoever holds it.
    Thaw,
    /// Show what is frozen, until when, and what was refused.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say what this host can do.
    Environment,
    /// Send test messages from a process that is not exempt (started by the freeze itself).
    #[command(hide = true)]
    Canary,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("dpfreeze: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Canary => return Ok(dpfreeze::freeze::canary_main()),
        Command::Thaw => dpfreeze::freeze::thaw()?,
        Command::Status { .. } => println!("{}", serde_json::to_string_pretty(&dpfreeze::freeze::state()?)?),
        Command::Environment => {
            println!("{}", serde_json::to_string_pretty(&dpfreeze::freeze::environment())?);
        }
    }
    Ok(ExitCode::SUCCESS)
}

//! The lab: boots Debian in a VM, runs one scenario under traffic in it, and brings back what was measured.
//!
//! The same binary is the host's command line and, statically linked, the agent in the guest.

mod apt_sources;
mod bench;
mod campaign;
mod command;
mod compatibility;
mod guest;
mod image;
mod outcome;
mod packages;
mod places;
mod scenarios;
mod vm;
mod warm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use outcome::{Action, Load};

#[derive(Parser)]
#[command(about = "The test bench: scenarios under traffic in a throw-away VM", version)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Run one scenario once. Exit 0: every assertion held; 1: one did not; 3: the lab itself failed.
    Run {
        /// Name (see `lab list`)
        scenario: String,
        /// What replaces the daemons
        #[arg(long, value_enum, default_value = "ours")]
        action: Action,
        /// Where the results go [default: target/lab/out/SCENARIO-ACTION]
        #[arg(long)]
        out: Option<PathBuf>,
        /// Debian suite of the image
        #[arg(long, default_value = "bookworm")]
        suite: String,
        /// Its kernel is that of the suite's backports
        #[arg(long)]
        backports: bool,
        /// Its openvswitch module does not tell who the upcalls go to, as those of Linux 5.15 to 6.0 (bookworm)
        #[arg(long, conflicts_with = "backports")]
        untold: bool,
        /// Runs in a row in the same VM, each judged for itself
        #[arg(long, default_value_t = 1)]
        rounds: usize,
        /// So many times as long between two packets, for machines that are slow
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=20))]
        slower: u32,
        /// More arguments for `ovs-graceful restart`
        #[arg(last = true)]
        extra: Vec<String>,
    },
    /// Run every scenario once with ours, as cargo test would print it
    All {
        /// Only these
        scenarios: Vec<String>,
        /// Each traffic scenario several times, alternating with stock; medians go to docs/measured.md
        #[arg(long)]
        whole: bool,
        /// VMs at a time, where everything runs once [default: one for each core, four at most]
        #[arg(long, conflicts_with = "whole")]
        lanes: Option<usize>,
        /// Runs of each side with --whole
        #[arg(long, requires = "whole")]
        runs: Option<usize>,
        /// With --whole: so many times as long between two packets, where the machine carries no more
        #[arg(long, requires = "whole", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=20))]
        slower: u32,
        /// Debian suite of the image
        #[arg(long, default_value = "bookworm")]
        suite: String,
    },
    /// Doors of the distributions, by scenario, door and suite, and the scenarios that `all` leaves out
    Matrix {
        /// Only those with all of these words: scenario, action or suite
        only: Vec<String>,
        /// VMs at a time [default: one for each core, four at most]
        #[arg(long)]
        lanes: Option<usize>,
    },
    /// Stock and ours side by side in plain and conntrack
    Demo {
        /// Debian suite of the image
        #[arg(long, default_value = "bookworm")]
        suite: String,
    },
    /// List the scenarios
    List,
    /// Build the image if the cache has none
    Image {
        /// Debian suite (bullseye, bookworm, trixie, testing), or one with the kernel of its backports (bookworm+backports)
        #[arg(default_value = "bookworm")]
        suite: String,
    },
    /// Write what the results below FOLDERS show into docs/reference/compatibility.md
    Compatibility {
        /// Where runs have left a result.json
        #[arg(required = true)]
        folders: Vec<std::path::PathBuf>,
    },
    /// Say which Debian mirror this machine's apt uses
    Mirror,
    /// Build the static binaries and say where they are
    Binaries,
    /// What runs in the guest
    #[command(hide = true)]
    Guest {
        #[command(subcommand)]
        command: GuestCmd,
    },
}

#[derive(Subcommand)]
enum GuestCmd {
    /// Do what JOB says and leave the result in OUT
    Agent {
        /// Written by the host
        job: PathBuf,
        /// Folder
        out: PathBuf,
    },
    /// Try what an unprivileged user might, print the errno
    Attack {
        /// What to try
        #[arg(value_enum)]
        attack: guest::attack::Attack,
    },
    /// Hold a handler thread of ovs-vswitchd in a system call, as if it were busy, until this process ends
    HoldHandler {
        /// File that is made when the thread is held
        told: PathBuf,
    },
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(3)
        }
    }
}

fn dispatch(command: Cmd) -> anyhow::Result<bool> {
    match command {
        Cmd::Run { scenario, action, out, mut suite, backports, untold, rounds, slower, extra } => {
            if backports {
                suite.push_str(image::BACKPORTS);
            }
            if untold {
                suite.push_str(image::UNTOLD);
            }
            let load = Load::full(slower);
            let request = bench::Request { scenario, action, suite, out, extra_args: extra, load };
            let results = bench::rounds(&request, rounds, &places::vm_lock()?)?;
            results.iter().for_each(|(outcome, folder)| bench::print(outcome, folder));
            Ok(!results.is_empty() && results.iter().all(|(outcome, _)| outcome.passed))
        }
        Cmd::All { scenarios, whole: false, suite, lanes, .. } => campaign::all(&scenarios, &suite, lanes),
        Cmd::All { scenarios, whole: true, runs, slower, suite, .. } => {
            campaign::whole(&scenarios, &suite, runs, slower)
        }
        Cmd::Matrix { only, lanes } => campaign::matrix(&only, lanes),
        Cmd::Demo { suite } => campaign::demo(&suite),
        Cmd::Compatibility { folders } => compatibility::take_in(&folders),
        Cmd::Mirror => {
            println!("{}", apt_sources::mirror(&apt_sources::read_machine()?, &apt_sources::codename()?)?);
            Ok(true)
        }
        Cmd::List => {
            for scenario in scenarios::ALL {
                let matrix = if scenario.by_hand() { " (tests/matrix)" } else { "" };
                println!("{:19} {}{matrix}", scenario.name(), scenario.about());
            }
            Ok(true)
        }
        Cmd::Image { suite } => {
            println!("{}", image::ensure(&suite)?.disk.display());
            Ok(true)
        }
        Cmd::Binaries => {
            println!("{}", bench::binaries(true, &[])?.display());
            Ok(true)
        }
        Cmd::Guest { command: GuestCmd::Attack { attack } } => {
            println!("errno {}", guest::attack::attempt(attack)?);
            Ok(true)
        }
        Cmd::Guest { command: GuestCmd::HoldHandler { told } } => guest::busy::hold_handler(&told).map(|()| true),
        Cmd::Guest { command: GuestCmd::Agent { job, out } } => guest::agent(&job, &out).map(|()| true),
    }
}

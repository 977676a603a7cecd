//! What can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use dpfreeze::freeze::Classes;

/// Freeze and look at the kernel datapath of Open vSwitch.
///
/// Exit codes: 0 done; 1 `diff` found differences; 2 it could not be done, or wrong usage. All but `diff` needs root.
#[derive(Parser)]
#[command(name = "dpfreeze", version)]
pub struct Cli {
    #[command(subcommand)]
    /// What to do.
    pub command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    /// Refuse messages until the lease runs out; proves with a canary first that this works here.
    Freeze {
        /// What to refuse; may be given several times.
        #[arg(long = "class", required = true, value_enum)]
        classes: Vec<Class>,
        /// How long, in seconds. It ends by itself.
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..=86400))]
        lease: u64,
        /// The datapath; may be given several times. Without it: every kernel datapath.
        #[arg(long = "datapath")]
        datapaths: Vec<String>,
        /// A timeout policy to guard; may be given several times. Without it: every one there is.
        #[arg(long = "timeout-policy")]
        timeout_policies: Vec<String>,
    },
    /// Lift any freeze, whoever holds it.
    Thaw,
    /// Show what is frozen, until when, and what was refused.
    Status {
        /// As JSON; null where nothing is frozen.
        #[arg(long)]
        json: bool,
    },
    /// Show datapaths, ports, flows, meters and timeout policies.
    Dump {
        /// As JSON, as `snapshot` writes it.
        #[arg(long)]
        json: bool,
    },
    /// Write to a file, as JSON, what the kernel knows.
    Snapshot {
        /// The file.
        file: PathBuf,
    },
    /// Compare two snapshots: what of the first is not so in the second. Exits 1 where there is anything.
    Diff {
        /// The earlier snapshot.
        before: PathBuf,
        /// The later snapshot.
        after: PathBuf,
    },
    /// Show, as JSON, what this host can do.
    Environment,
    /// Send test messages from a process that is not exempt (started by `freeze`).
    #[command(hide = true)]
    Canary,
}

/// A class of messages that can be refused.
#[derive(Clone, Copy, ValueEnum)]
pub enum Class {
    /// Removal of all flows of a datapath.
    FlowFlush,
    /// Removal of a flow.
    FlowDel,
    /// Change of a flow.
    FlowSet,
    /// Removal of a datapath.
    DpDel,
    /// Removal of a port.
    VportDel,
    /// Removal of a meter.
    MeterDel,
    /// Removal of a conntrack timeout policy.
    CtTimeoutDel,
}

impl From<Class> for Classes {
    fn from(class: Class) -> Classes {
        match class {
            Class::FlowFlush => Classes::FLOW_FLUSH,
            Class::FlowDel => Classes::FLOW_DEL,
            Class::FlowSet => Classes::FLOW_SET,
            Class::DpDel => Classes::DP_DEL,
            Class::VportDel => Classes::VPORT_DEL,
            Class::MeterDel => Classes::METER_DEL,
            Class::CtTimeoutDel => Classes::CT_TIMEOUT_DEL,
        }
    }
}

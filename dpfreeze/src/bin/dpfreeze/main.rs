//! The hand tool of the datapath side: freeze, thaw, status, dump, snapshot, diff.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use dpfreeze::flow_key::{format_actions, format_key};
use dpfreeze::freeze::{self, CanaryCommand, Classes, Families, Freeze, Scope, State};
use dpfreeze::ovs::Ovs;
use dpfreeze::snapshot::{self, DatapathSnapshot, Snapshot};

mod args;

use args::{Cli, Command};

/// `diff` found differences, as with diff(1).
const DIFFERENT: u8 = 1;
/// Anything failed.
const TROUBLE: u8 = 2;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    if let Some(missing) = needs_root(&command) {
        eprintln_or_not(&missing);
        return ExitCode::from(TROUBLE);
    }
    // Held until the end: what it has to say must not panic where nobody reads it any more.
    let mut out = std::io::stdout().lock();
    let ended = run(command, &mut out).and_then(|code| Ok(out.flush().map(|()| code)?));
    match ended {
        Ok(code) => code,
        // A reader that has read enough.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln_or_not(&format!("{error:#}"));
            ExitCode::from(TROUBLE)
        }
    }
}

/// Standard error may be gone as well.
fn eprintln_or_not(text: &str) {
    let _ = writeln!(std::io::stderr(), "dpfreeze: {text}");
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let is_it = |error: &std::io::Error| error.kind() == std::io::ErrorKind::BrokenPipe;
    let json = |error: &serde_json::Error| error.io_error_kind() == Some(std::io::ErrorKind::BrokenPipe);
    error.downcast_ref().is_some_and(is_it) || error.downcast_ref().is_some_and(json)
}

/// All but the comparison of two files asks the kernel what it tells to root alone.
fn needs_root(command: &Command) -> Option<String> {
    let uid = nix::unistd::geteuid();
    let unprivileged = matches!(command, Command::Diff { .. } | Command::Canary | Command::Environment);
    (!uid.is_root() && !unprivileged)
        .then(|| format!("this needs root, and runs as uid {uid}; remedy: run it through sudo"))
}

fn run(command: Command, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    match command {
        Command::Freeze { classes, lease, datapaths, timeout_policies } => {
            let classes = classes.into_iter().map(Classes::from).fold(Classes::empty(), |all, class| all | class);
            freeze_now(classes, Duration::from_secs(lease), &datapaths, timeout_policies, out)?;
        }
        Command::Thaw => freeze::thaw()?,
        Command::Status { json: true } => json(&freeze::state()?, out)?,
        Command::Status { json: false } => print_state(freeze::state()?.as_ref(), out)?,
        Command::Dump { json: true } => json(&snapshot::capture(&mut Ovs::open()?)?, out)?,
        Command::Dump { json: false } => print_dump(&snapshot::capture(&mut Ovs::open()?)?, out)?,
        Command::Snapshot { file } => {
            let mut to = BufWriter::new(File::create(&file).with_context(|| file.display().to_string())?);
            serde_json::to_writer(&mut to, &snapshot::capture(&mut Ovs::open()?)?)
                .with_context(|| file.display().to_string())?;
            to.flush().with_context(|| file.display().to_string())?;
        }
        Command::Diff { before, after } => return diff(&before, &after, out),
        Command::Environment => json(&freeze::environment(), out)?,
        Command::Canary => return Ok(freeze::canary_main()),
    }
    Ok(ExitCode::SUCCESS)
}

fn json(value: &impl serde::Serialize, out: &mut impl Write) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    Ok(writeln!(out)?)
}

fn freeze_now(
    classes: Classes,
    lease: Duration,
    datapaths: &[String],
    mut timeout_policies: Vec<String>,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let families = Families::resolve()?;
    let ifindexes = if families.datapath == 0 { Vec::new() } else { chosen(datapaths)? };
    if timeout_policies.is_empty() && classes.contains(Classes::CT_TIMEOUT_DEL) {
        timeout_policies = dpfreeze::conntrack::timeout_policies()?.into_iter().map(|policy| policy.name).collect();
    }
    let scope = Scope::here(&ifindexes, &timeout_policies, families)?;
    let (mut freeze, _) = Freeze::load_proven(&CanaryCommand::own(&["canary"]), families)?;
    freeze.arm(&scope, classes, lease, lease)?;
    Ok(print_state(Some(&freeze.state()?), out)?)
}

fn chosen(names: &[String]) -> anyhow::Result<Vec<u32>> {
    let mut ovs = Ovs::open()?;
    if names.is_empty() {
        return Ok(ovs.datapaths()?.iter().map(|datapath| datapath.ifindex).collect());
    }
    names
        .iter()
        .map(|name| {
            let found = ovs.datapath(name)?;
            Ok(found.with_context(|| format!("there is no datapath {name}; see `dpfreeze dump`"))?.ifindex)
        })
        .collect()
}

fn print_state(state: Option<&State>, out: &mut impl Write) -> std::io::Result<()> {
    let Some(state) = state else { return writeln!(out, "nothing is frozen") };
    if !state.armed {
        writeln!(out, "loaded on {}, nothing is frozen (a lease that ran out, or not armed yet)", state.hook)?;
    } else {
        let names: Vec<String> = state.classes.iter_names().map(|(name, _)| name.to_lowercase()).collect();
        writeln!(out, "frozen: {} (on {})", names.join(", "), state.hook)?;
        writeln!(out, "until: {:.1} s from now, {:.1} s if renewed", ms(state.lease_left_ms), ms(state.end_left_ms))?;
    }
    let alive = if state.exempt_alive { "running" } else { "ended" };
    writeln!(out, "exempt: process {} ({alive})", state.exempt.tgid)?;
    let datapaths: Vec<String> = state.ifindexes.iter().map(u32::to_string).collect();
    let datapaths = if datapaths.is_empty() { "none".to_owned() } else { datapaths.join(", ") };
    writeln!(out, "datapaths (ifindex): {datapaths}; timeout policies: {}", state.timeout_names.len())?;
    writeln!(out, "refused: {}", state.refused)
}

fn ms(value: u64) -> f64 {
    Duration::from_millis(value).as_secs_f64()
}

fn print_dump(snapshot: &Snapshot, to: &mut impl Write) -> std::io::Result<()> {
    for datapath in &snapshot.datapaths {
        print_datapath(datapath, to)?;
    }
    for limit in &snapshot.ct_limits {
        writeln!(to, "conntrack limit {limit:?}")?;
    }
    for policy in &snapshot.timeout_policies {
        writeln!(
            to,
            "timeout policy {} l3 {} l4 {} references {:?}",
            policy.name, policy.l3, policy.l4, policy.use_count
        )?;
    }
    Ok(())
}

fn print_datapath(snapshot: &DatapathSnapshot, to: &mut impl Write) -> std::io::Result<()> {
    let datapath = &snapshot.datapath;
    let stats = &datapath.stats;
    writeln!(
        to,
        "datapath {} ifindex {} features {:#x} hit {} missed {} lost {} upcalls to {:?}",
        datapath.name,
        datapath.ifindex,
        datapath.user_features,
        stats.hit,
        stats.missed,
        stats.lost,
        datapath.cpu_port_ids()
    )?;
    for vport in &snapshot.vports {
        writeln!(to, "  port {} {} ({:?})", vport.port_no, vport.name, vport.kind())?;
    }
    for flow in &snapshot.flows {
        writeln!(
            to,
            "  flow {} packets {} bytes {} actions {}",
            format_key(&flow.key),
            flow.packets,
            flow.bytes,
            format_actions(&flow.actions)
        )?;
    }
    for meter in &snapshot.meters {
        writeln!(to, "  meter {meter:?}")?;
    }
    Ok(())
}

fn diff(before: &Path, after: &Path, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let read = |path: &Path| -> anyhow::Result<Snapshot> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        serde_json::from_reader(BufReader::new(file)).with_context(|| path.display().to_string())
    };
    let differences = snapshot::compare(&read(before)?, &read(after)?);
    for difference in &differences {
        writeln!(out, "{difference}")?;
    }
    Ok(if differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) })
}

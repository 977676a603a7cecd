//! The command line of design.md.

mod args;
mod containers;
mod ct;
mod doors;
mod hook;
mod launch;
mod log;
mod output;
mod plan;
mod progress;
mod restart;
mod runs;
mod status;
mod upgrade;

pub use args::{Cli, Command, CtCommand, HookCommand, RestartArgs, RunsCommand, SuperviseArgs};

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::config::Config;
use crate::control::{AbortAnswer, Connection, Progress, RunLock, LOCK, SOCKET};
use crate::journal::Runs;
use crate::machine::ExitCode;
use crate::recovery;
use crate::report::Strategy;
use crate::supervisor;
use output::{complain, say, say_json};

/// Does what the command line says and returns what the process exits with.
pub fn run(cli: Cli) -> u8 {
    if let Some(missing) = needs_root(&cli.command) {
        complain(&missing);
        return ExitCode::Refused.code();
    }
    let config = cli.config;
    match cli.command {
        Command::Check { json } => answered(check(&config, json)),
        Command::Restart(args) => restart::restart(&config, args),
        Command::Status { json } => answered(status::status(json)),
        Command::Abort => answered(abort()),
        Command::Recover => recover_and_tell(&config),
        Command::Thaw => needs_person(thaw(&config)),
        Command::Runs { command: None, json } => answered(runs::list(json)),
        Command::Runs { command: Some(RunsCommand::Show { id, json: inner }), json } => {
            answered(runs::show(&id, json || inner))
        }
        Command::Ct { command } => answered(ct::ct(command)),
        Command::Hook { command } => hook::hook(&config, command),
    }
}

/// Everything but help needs root: datapath, units and what was parked are nobody else's business.
fn needs_root(command: &Command) -> Option<String> {
    let uid = nix::unistd::geteuid();
    if uid.is_root() || matches!(command, Command::Hook { command: HookCommand::Canary }) {
        return None;
    }
    Some(format!("this needs root, and runs as uid {uid}; remedy: run it through sudo"))
}

fn load(config: &Path) -> anyhow::Result<Config> {
    Ok(Config::load(config)?)
}

/// A command that touches nothing: what fails in it is a refusal.
fn answered(result: anyhow::Result<ExitCode>) -> u8 {
    match result {
        Ok(code) => code.code(),
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::Refused.code()
        }
    }
}

/// A command that repairs: what fails in it needs a person.
fn needs_person(result: anyhow::Result<i32>) -> u8 {
    match result {
        Ok(code) => exit_code(code),
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::NeedsPerson.code()
        }
    }
}

/// An exit code that the design does not know is a bug, and a bug needs a person.
fn exit_code(code: i32) -> u8 {
    let known = u8::try_from(code).ok().and_then(|code| ExitCode::try_from(code).ok());
    known.unwrap_or(ExitCode::NeedsPerson).code()
}

fn check(config: &Path, json: bool) -> anyhow::Result<ExitCode> {
    // What is found in the middle of another run says nothing. Who may not look at the lock is told so by the check.
    if let Ok(Some(holder)) = RunLock::holder(Path::new(LOCK)) {
        complain(&restart::busy(&holder));
        return Ok(ExitCode::Busy);
    }
    let report = supervisor::check(&load(config)?, Strategy::Standby, false)?;
    match json {
        true => say_json(&report),
        false => say(report.to_string().trim_end()),
    }
    Ok(report.exit_code())
}

fn abort() -> anyhow::Result<ExitCode> {
    let Some(mut run) = connect()? else {
        anyhow::bail!("no run is under way: there is nothing to abort; see `ovs-graceful status`");
    };
    match run.abort().context("the supervisor does not answer")? {
        AbortAnswer::Accepted => {}
        AbortAnswer::Refused { why } => {
            anyhow::bail!("the run is not aborted: {why}; follow it with `ovs-graceful status`")
        }
        AbortAnswer::Over => anyhow::bail!("the run is over, it cannot be aborted any more; see `ovs-graceful runs`"),
    }
    say("abort: accepted, the run is being undone");
    let mut events = run.subscribe()?;
    while let Some(event) = events.next_event()? {
        if let Progress::Finished { exit_code, report } = event {
            say(&format!("run {}: {}", report.id, report.reason));
            let undone = exit_code == ExitCode::Undone.code();
            return Ok(if undone { ExitCode::Done } else { report.exit_code });
        }
    }
    anyhow::bail!("the supervisor went before it told the end of the run; look with `ovs-graceful status`")
}

fn recover_and_tell(config: &Path) -> u8 {
    needs_person(recover(config))
}

/// Also what systemd runs after every supervisor, so that nothing to do has to be cheap and 0.
fn recover(config: &Path) -> anyhow::Result<i32> {
    if let Some(holder) = RunLock::holder(Path::new(LOCK))? {
        complain(&format!("run {} (process {}) is under way: nothing to recover", holder.id, holder.pid));
        return Ok(i32::from(ExitCode::Busy.code()));
    }
    let runs = Runs::default();
    if runs.interrupted()?.is_none() && !recovery::is_marked() {
        runs.clear_left_over()?;
        let told = recovery::tidy()?;
        say(if told.is_empty() { "nothing to recover" } else { "no run was cut off" });
        told.iter().for_each(|line| say(line));
        return Ok(0);
    }
    supervisor::recover(&load(config)?)
}

/// A supervisor that lives does it; one that hangs is not waited for.
fn thaw(config: &Path) -> anyhow::Result<i32> {
    // An emergency does not stop for a misspelt key.
    let config = load(config).unwrap_or_else(|error| {
        complain(&format!("{error:#}; taking the defaults"));
        Config::default()
    });
    match connect().and_then(|run| run.map(|mut run| Ok(run.thaw()?)).transpose()) {
        Ok(None) => {}
        Ok(Some(())) if thawed(config.limits.thaw()) => {
            say("thaw: done by the supervisor of the run; see `ovs-graceful status`");
            return Ok(0);
        }
        Ok(Some(())) => complain("the supervisor has been told and does not thaw: thawing without it"),
        Err(error) => complain(&format!("the supervisor does not answer ({error:#}): thawing without it")),
    }
    supervisor::thaw(&config)
}

/// Waits until nothing is frozen; false where something still is after `limit`, or nobody can tell.
fn thawed(limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        match dpfreeze::freeze::state() {
            Ok(state) if !state.as_ref().is_some_and(|state| state.armed) => return true,
            Ok(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
            Ok(_) | Err(_) => return false,
        }
    }
}

fn connect() -> anyhow::Result<Option<Connection>> {
    Connection::open(Path::new(SOCKET)).with_context(|| format!("cannot connect to {SOCKET}"))
}

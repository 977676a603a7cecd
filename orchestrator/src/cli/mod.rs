//! The command line of design.md.

mod args;
mod containers;
mod ct;
mod doors;
mod ended;
mod hook;
mod launch;
mod log;
mod neighbours;
mod output;
mod patience;
mod plain;
mod plan;
mod progress;
mod restart;
mod runs;
mod status;
mod upgrade;
mod wait;

pub use args::{Cli, Command, CtCommand, HookCommand, RestartArgs, RunsCommand, SuperviseArgs};

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::config::Config;
use crate::control::{AbortAnswer, Connection, Holder, Progress, RunLock, LOCK, SOCKET};
use crate::inventory;
use crate::journal::Runs;
use crate::machine::ExitCode;
use crate::recovery;
use crate::report::Strategy;
use crate::supervisor;
use ended::{answered, fail, FAILED};
use output::{complain, say, say_json};

/// Does what the command line says and returns what the process exits with.
pub fn run(cli: Cli) -> u8 {
    let json = cli.command.wants_json();
    if let Some(missing) = needs_root(&cli.command) {
        return fail(json, FAILED, &missing);
    }
    let only_answers = cli.command.only_answers();
    let code = execute(cli, json);
    match output::lost().filter(|_| only_answers) {
        Some(why) => {
            complain(&why);
            if code == ExitCode::Done.code() {
                FAILED
            } else {
                code
            }
        }
        None => code,
    }
}

fn execute(cli: Cli, json: bool) -> u8 {
    let config = cli.config;
    match cli.command {
        Command::Check { lost, .. } => answered(json, check(&config, json, lost)),
        Command::Restart(args) => restart::restart(&config, args),
        Command::Status { .. } => status::status(&config, json),
        Command::Wait { id, .. } => wait::wait(id, json),
        Command::Abort => answered(json, abort()),
        Command::Recover => recover_and_tell(&config, true),
        Command::Thaw => needs_person(thaw(&config)),
        Command::Runs { command: None, .. } => answered(json, runs::list(json)),
        Command::Runs { command: Some(RunsCommand::Show { id, .. }), .. } => answered(json, runs::show(&id, json)),
        Command::Ct { command } => answered(json, ct::ct(command)),
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

/// The configuration of a command that must go on whatever the file says.
fn load_in_an_emergency(config: &Path) -> Config {
    let (config, error) = Config::load_or_default(config);
    if let Some(error) = error {
        complain(&format!("{error}: taking the defaults"));
    }
    config
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

fn check(config: &Path, json: bool, lost: bool) -> anyhow::Result<ExitCode> {
    // What is found in the middle of another run says nothing. Who may not look at the lock is told so by the check.
    if let Ok(Some(holder)) = RunLock::holder(Path::new(LOCK)) {
        return Ok(exit_code_of_busy(json, &holder));
    }
    let loaded = load(config)?;
    let report = supervisor::check(&loaded, Strategy::Standby, false)?;
    match json {
        true => say_json(&report),
        false => {
            say(&configuration_line(config));
            if lost {
                say(inventory::losses().trim_end());
            }
            say(report.to_string().trim_end());
        }
    }
    Ok(report.exit_code())
}

fn exit_code_of_busy(json: bool, holder: &Holder) -> ExitCode {
    fail(json, ExitCode::Busy.code(), &restart::busy(holder));
    ExitCode::Busy
}

/// Which file the configuration is from.
fn configuration_line(config: &Path) -> String {
    match config.exists() {
        true => format!("configuration: {}", config.display()),
        false => format!("configuration: all defaults ({} is not there)", config.display()),
    }
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

fn recover_and_tell(config: &Path, by_hand: bool) -> u8 {
    needs_person(recover(config, by_hand))
}

/// Also what systemd runs after every supervisor, so that nothing to do has to be cheap and 0. Only a person who types it
/// (`by_hand`) is asking whether the host is well again.
fn recover(config: &Path, by_hand: bool) -> anyhow::Result<i32> {
    if let Some(holder) = RunLock::holder(Path::new(LOCK))? {
        complain(&format!("run {} (process {}) is under way: nothing to recover", holder.id, holder.pid));
        return Ok(i32::from(ExitCode::Busy.code()));
    }
    let runs = Runs::default();
    let told = if runs.interrupted()?.is_some() || recovery::is_marked() {
        let code = supervisor::recover(&load_in_an_emergency(config))?;
        if code != 0 || !by_hand {
            return Ok(code);
        }
        Vec::new()
    } else {
        runs.clear_left_over()?;
        recovery::tidy()?
    };
    told.iter().for_each(|line| say(line));
    match runs.needs_person()?.filter(|_| by_hand) {
        Some(id) => look_after(&id, &runs, &load_in_an_emergency(config)),
        None => Ok(none_cut_off(&told, recovery::foreign_flag().filter(|_| by_hand))),
    }
}

/// No run was cut off. `flag` is what is told of a flow-restore-wait that is not ours to remove, as `thaw` tells it.
fn none_cut_off(told: &[String], flag: Option<&str>) -> i32 {
    say(if told.is_empty() { "nothing to recover" } else { "no run was cut off" });
    match flag {
        Some(flag) => {
            complain(flag);
            ExitCode::NeedsPerson.code().into()
        }
        None => 0,
    }
}

/// The last run ended with 40, and left nothing to recover: is the host well?
fn look_after(id: &str, runs: &Runs, config: &Config) -> anyhow::Result<i32> {
    let reason = runs.report(id).map_or_else(|_| "its report is gone".to_owned(), |report| report.reason);
    say(&format!("run {id} ended with exit 40: {reason}; see `ovs-graceful runs show {id}`"));
    let wrong = recovery::what_is_wrong(config);
    if wrong.is_empty() {
        runs.well_again()?;
        say(
            "the host is well now: one ovs-vswitchd is bound to the upcalls, nothing is frozen, flow-restore-wait is not \
             set; `ovs-graceful status` ends with 0 again",
        );
        return Ok(0);
    }
    wrong.iter().for_each(|what| complain(what));
    Ok(ExitCode::NeedsPerson.code().into())
}

/// A supervisor that lives does it; one that hangs is not waited for.
fn thaw(config: &Path) -> anyhow::Result<i32> {
    let config = load_in_an_emergency(config);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_that_recover_leaves_alone_needs_a_person() {
        assert_eq!(none_cut_off(&[], None), 0);
        assert_eq!(none_cut_off(&["tidied".to_owned()], Some("flow-restore-wait is set, and not by us")), 40);
    }
}

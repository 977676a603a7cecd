//! Starting the supervisor: as a transient unit, or in a session of its own where there is no systemd.

use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context};
use nix::sys::signal::SigSet;

use super::SuperviseArgs;
use crate::control::{Connection, Progress, Subscription, RUN_DIR, SOCKET};
use crate::host::real::procfs::own_program;
use crate::host::real::Systemd;
use crate::host::{ServiceManager, SupervisorUnit};
use crate::journal::Runs;
use crate::machine::ExitCode;
use crate::report::Report;

/// The unit that the supervisor runs in.
pub const UNIT: &str = "ovs-graceful-run.service";

/// How long systemd may take to start the supervisor.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How long the unit of the last run may take to go away.
const LAST_ONE_LIMIT: Duration = Duration::from_secs(10);

/// How long the supervisor may take until it listens.
const LISTEN_LIMIT: Duration = Duration::from_secs(15);

/// Where the supervisor writes its log when there is no journal.
const LOG: &str = "/run/ovs-graceful/run.log";

/// A supervisor that has been started.
pub enum Launched {
    /// It runs, and says what it does.
    Running(Subscription),
    /// It is over already.
    Over(Box<Report>),
}

enum Started {
    Unit(Systemd),
    Session(Child),
}

/// Starts the supervisor and waits until it says that it is there.
pub fn launch(args: &SuperviseArgs) -> anyhow::Result<Launched> {
    let program = own_program()?;
    let systemd = Systemd::default();
    let mut started = match systemd.is_running() {
        true => start_unit(systemd, args, &program)?,
        false => Started::Session(start_session(args, &program)?),
    };
    let until = Instant::now() + LISTEN_LIMIT;
    while Instant::now() < until {
        if let Some(launched) = look(&args.id) {
            return Ok(launched);
        }
        if let Some(end) = ended(&mut started) {
            // It may have written its report just before it ended.
            return look(&args.id).with_context(|| end);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("the supervisor does not listen on {SOCKET} after {} s; look at {}", LISTEN_LIMIT.as_secs(), log_of(&started))
}

fn start_unit(systemd: Systemd, args: &SuperviseArgs, program: &str) -> anyhow::Result<Started> {
    let words = args.command_line(program);
    let command: Result<Vec<String>, _> = words.into_iter().map(|word| word.into_string()).collect();
    let config = args.config.to_str().context("the path of the configuration is not UTF-8")?.to_string();
    wait_for_the_last_one(&systemd);
    let unit = SupervisorUnit {
        name: UNIT.to_string(),
        description: format!("ovs-graceful run {}", args.id),
        command: command.map_err(|word| anyhow::anyhow!("{} is not UTF-8", word.display()))?,
        // However the supervisor ends: a run that it left unfinished is finished or undone.
        stop_post: [program, "--config", &config, "hook", "stopped"].map(str::to_string).to_vec(),
        ends_with: ExitCode::ALL.into_iter().map(|code| code.code().into()).collect(),
        environment: environment(),
        nice: -10,
    };
    systemd.start_supervisor(&unit, Instant::now() + START_LIMIT).with_context(|| format!("cannot start {UNIT}"))?;
    Ok(Started::Unit(systemd))
}

/// The unit of a run that has just ended may still be on its way out; systemd refuses a second one of its name.
fn wait_for_the_last_one(systemd: &Systemd) {
    let until = Instant::now() + LAST_ONE_LIMIT;
    while Instant::now() < until {
        match systemd.unit(UNIT, until) {
            Ok(Some(unit)) if !matches!(unit.active_state.as_str(), "inactive" | "failed") => {
                std::thread::sleep(Duration::from_millis(20));
            }
            // What is wrong here is said by the start.
            Ok(_) | Err(_) => return,
        }
    }
}

/// What the supervisor takes over of our environment.
fn environment() -> Vec<(String, String)> {
    let names = [
        "OVS_GRACEFUL_LOG",
        #[cfg(feature = "chaos")]
        crate::chaos::VARIABLE,
        #[cfg(feature = "chaos")]
        crate::inventory::VARIABLE,
    ];
    names.into_iter().filter_map(|name| Some((name.to_string(), std::env::var(name).ok()?))).collect()
}

/// A session of its own: neither Ctrl-C nor the end of the terminal reaches it.
fn start_session(args: &SuperviseArgs, program: &str) -> anyhow::Result<Child> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(RUN_DIR)
        .with_context(|| format!("cannot create {RUN_DIR}"))?;
    let mut log = OpenOptions::new();
    let log = log.write(true).create(true).truncate(true).mode(0o600).open(LOG);
    let log = log.with_context(|| format!("cannot open {LOG}"))?;
    let mut command = Command::new(program);
    command.args(&args.command_line(program)[1..]).current_dir("/");
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // SAFETY: between fork and exec only setsid(2) and sigprocmask(2) are called, which are async-signal-safe and allocate
    // nothing.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            // The client blocks what it waits for: the daemons, who inherit it from the supervisor, could not be told to
            // end.
            Ok(SigSet::empty().thread_set_mask()?)
        });
    }
    command.spawn().with_context(|| format!("cannot start the supervisor {program}"))
}

/// The supervisor of run `id`, where it listens or has left a report.
fn look(id: &str) -> Option<Launched> {
    if let Ok(Some(connection)) = Connection::open(Path::new(SOCKET)) {
        let mut events = connection.subscribe().ok()?;
        if matches!(events.next_event(), Ok(Some(Progress::Hello { id: theirs, .. })) if theirs == id) {
            return Some(Launched::Running(events));
        }
    }
    let report = Runs::default().report(id).ok()?;
    Some(Launched::Over(Box::new(report)))
}

/// Why the supervisor is no more, where it is no more.
fn ended(started: &mut Started) -> Option<String> {
    match started {
        Started::Session(child) => {
            let status = child.try_wait().ok()??;
            Some(format!("the supervisor ended at once ({status}); its log is {LOG}"))
        }
        Started::Unit(systemd) => {
            let unit = systemd.unit(UNIT, Instant::now() + Duration::from_secs(5)).ok()?;
            let over = unit.is_none_or(|unit| matches!(unit.active_state.as_str(), "failed" | "inactive"));
            over.then(|| format!("{UNIT} ended at once; see `journalctl -u {UNIT}`"))
        }
    }
}

fn log_of(started: &Started) -> String {
    match started {
        Started::Session(_) => LOG.to_string(),
        Started::Unit(_) => format!("`journalctl -u {UNIT}`"),
    }
}

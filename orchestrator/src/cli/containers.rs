//! Daemons in containers (docs/containers.md): whoever runs the container ends the old daemon and starts the new one, in
//! the middle of a run.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context};
use nix::sys::signal::{killpg, Signal};
use nix::unistd::Pid;

use super::launch::{launch, Launched};
use super::output::{complain, say};
use super::restart::{follow_to_the_end, no_run_now};
use super::{answered, SuperviseArgs};
use crate::control::{Connection, HookClient, HookCommand, HookReporter, Progress, Subscription, SOCKET};
use crate::journal::Runs;
use crate::machine::ExitCode;
use crate::report::{summary, Report, Strategy};

/// How long a run that has just ended may take to leave its report.
const REPORT_LIMIT: Duration = Duration::from_secs(5);

/// `hook container-stop`: 0 once everything is parked; then the caller ends the old container and starts the new one.
pub(super) fn stop(config: &Path) -> u8 {
    if let Some(code) = no_run_now(config) {
        return code;
    }
    match wait_until_parked(config) {
        Ok(code) => code.code(),
        Err(error) => {
            complain(&format!("{error:#}: a restart of the container now loses what it loses without ovs-graceful"));
            ExitCode::Undone.code()
        }
    }
}

fn wait_until_parked(config: &Path) -> anyhow::Result<ExitCode> {
    let config = std::path::absolute(config)?;
    let args = SuperviseArgs { no_ovsdb: true, elsewhere: true, ..SuperviseArgs::new(Strategy::StopStart, config) };
    let over = |report: &Report| {
        complain(summary(report, false).trim_end());
        report.exit_code
    };
    match launch(&args)? {
        Launched::Running(_) => {}
        Launched::Over(report) => return Ok(over(&report)),
    }
    let hook = HookClient::open(Path::new(SOCKET))?;
    let order = match hook {
        Some(mut hook) => hook.next_command()?.map(|order| (order, hook)),
        None => None,
    };
    match order {
        Some((HookCommand::Start, hook)) => {
            hook.reporter()?.child_exited(0)?;
            say(&format!("run {}: everything is parked; restart the container now", args.id));
            Ok(ExitCode::Done)
        }
        Some((HookCommand::Finish | HookCommand::Cancel, _)) => bail!("run {} was cancelled", args.id),
        None => wait_for_report(&args.id).map(|report| over(&report)),
    }
}

/// `hook container-started`: the exit code of the run that is under way, or of the last one.
pub(super) fn started() -> u8 {
    match under_way() {
        Ok(Some((id, events))) => follow_to_the_end(&id, events),
        Ok(None) => match last_report() {
            Ok(report) => {
                say(summary(&report, false).trim_end());
                report.exit_code.code()
            }
            Err(error) => answered(Err(error)),
        },
        Err(error) => answered(Err(error)),
    }
}

fn under_way() -> anyhow::Result<Option<(String, Subscription)>> {
    let Some(connection) = Connection::open(Path::new(SOCKET))? else { return Ok(None) };
    let mut events = connection.subscribe()?;
    match events.next_event()? {
        Some(Progress::Hello { id, .. }) => Ok(Some((id, events))),
        _ => Ok(None),
    }
}

fn last_report() -> anyhow::Result<Report> {
    let runs = Runs::default();
    let id =
        runs.ids()?.into_iter().max().context("there was no run; remedy: `ovs-graceful hook container-stop` first")?;
    runs.report(&id)
}

fn wait_for_report(id: &str) -> anyhow::Result<Report> {
    let runs = Runs::default();
    let until = Instant::now() + REPORT_LIMIT;
    loop {
        match runs.report(id) {
            Ok(report) => return Ok(report),
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(50)),
            Err(error) => return Err(error).with_context(|| format!("run {id} has gone")),
        }
    }
}

/// `restart --restart-command`: connects to the run just started and waits, in a thread of its own, for the word to run
/// `command`.
pub(super) fn stand_by(command: String) -> anyhow::Result<()> {
    let hook = HookClient::open(Path::new(SOCKET))?.context("the run has gone")?;
    let reporter = hook.reporter()?;
    thread::spawn(move || {
        if let Err(error) = serve(hook, reporter, &command) {
            complain(&format!("`{command}`: {error:#}"));
        }
    });
    Ok(())
}

/// A command under way, by its process group.
type UnderWay = Arc<Mutex<Option<Pid>>>;

fn serve(mut hook: HookClient, reporter: HookReporter, command: &str) -> anyhow::Result<()> {
    let mut reporter = Some(reporter);
    let under_way = UnderWay::default();
    while let Some(order) = hook.next_command()? {
        match (order, reporter.take()) {
            (HookCommand::Start, Some(reporter)) => run(command, reporter, &under_way)?,
            (HookCommand::Start, None) => {}
            (HookCommand::Finish, _) => return Ok(()),
            (HookCommand::Cancel, _) => {
                // It must not end the daemon that goes on.
                if let Some(group) = under_way.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    let _has_ended = killpg(group, Signal::SIGTERM);
                }
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Runs it in a group of its own, which no Ctrl-C reaches; our standard output is for the report. Tells the supervisor of its end.
fn run(command: &str, mut reporter: HookReporter, under_way: &UnderWay) -> anyhow::Result<()> {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", command]).stdin(Stdio::null()).stdout(std::io::stderr()).process_group(0);
    let mut child = match shell.spawn() {
        Ok(child) => child,
        Err(error) => {
            reporter.child_exited(127)?;
            return Err(error).context("cannot run /bin/sh");
        }
    };
    let pid = child.id().cast_signed();
    *under_way.lock().unwrap_or_else(PoisonError::into_inner) = Some(Pid::from_raw(pid));
    reporter.spawned(pid)?;
    let under_way = under_way.clone();
    thread::spawn(move || {
        let status = child.wait().map_or(-1, super::hook::status_number);
        under_way.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A supervisor that has gone is seen by the thread that reads from it.
        let _ = reporter.child_exited(status);
    });
    Ok(())
}

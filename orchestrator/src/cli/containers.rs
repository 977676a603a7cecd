//! Daemons in containers (docs/containers.md): whoever runs the container ends the old daemon and starts the new one, in
//! the middle of a run.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{bail, Context};
use nix::sys::signal::{killpg, Signal};
use nix::unistd::Pid;

use super::ended::answered;
use super::hook::report_on;
use super::launch::{launch, Launched};
use super::output::{complain, complain_of, say};
use super::restart::{follow_to_the_end, no_run_now, wait_for_report, Follow};
use super::SuperviseArgs;
use crate::control::{Connection, HookClient, HookCommand, Progress, Subscription, SOCKET};
use crate::journal::Runs;
use crate::machine::ExitCode;
use crate::report::{summary, Report, Strategy};

/// `hook container-stop`: 0 once everything is parked; then the caller ends the old container and starts the new one.
pub(super) fn stop(config: &Path) -> u8 {
    if let Some(code) = no_run_now(config, false) {
        return code;
    }
    match wait_until_parked(config) {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("{error:#}: a restart of the container now loses what it loses without ovs-graceful"));
            ExitCode::Undone.code()
        }
    }
}

fn wait_until_parked(config: &Path) -> anyhow::Result<u8> {
    let config = std::path::absolute(config)?;
    let args = SuperviseArgs { no_ovsdb: true, elsewhere: true, ..SuperviseArgs::new(Strategy::StopStart, config) };
    match launch(&args)? {
        Launched::Running(_) => {}
        Launched::Over(report) => return Ok(complain_of(&report)),
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
            Ok(ExitCode::Done.code())
        }
        Some((HookCommand::Finish | HookCommand::Cancel, _)) => bail!("run {} was cancelled", args.id),
        None => Ok(complain_of(&wait_for_report(&args.id).with_context(|| format!("run {} has gone", args.id))?)),
    }
}

/// `hook container-started`: the exit code of the run that is under way, or of the last one.
pub(super) fn started() -> u8 {
    match under_way() {
        Ok(Some((id, events))) => follow_to_the_end(&id, events, Follow::default()),
        Ok(None) => match last_report() {
            Ok(report) => {
                say(summary(&report, false).trim_end());
                report.exit_code.code()
            }
            Err(error) => answered(false, Err(error)),
        },
        Err(error) => answered(false, Err(error)),
    }
}

pub(super) fn under_way() -> anyhow::Result<Option<(String, Subscription)>> {
    let Some(connection) = Connection::open(Path::new(SOCKET))? else { return Ok(None) };
    let mut events = connection.subscribe()?;
    match events.next_event()? {
        Some(Progress::Hello { id, .. }) => Ok(Some((id, events))),
        _ => Ok(None),
    }
}

fn last_report() -> anyhow::Result<Report> {
    let last = Runs::default().list()?.pop();
    let last = last.context("there was no run; remedy: `ovs-graceful hook container-stop` first")?;
    last.report.with_context(|| format!("run {} has left no report; remedy: `ovs-graceful recover`", last.id))
}

/// `restart --restart-command`: connects to the run just started and waits, in a thread of its own, for the word to run
/// `command`.
pub(super) fn stand_by(command: String) -> anyhow::Result<()> {
    let hook = HookClient::open(Path::new(SOCKET))?.context("the run has gone")?;
    thread::spawn(move || {
        if let Err(error) = serve(hook, &command) {
            complain(&format!("`{command}`: {error:#}"));
        }
    });
    Ok(())
}

fn serve(mut hook: HookClient, command: &str) -> anyhow::Result<()> {
    let mut started = None;
    while let Some(order) = hook.next_command()? {
        match order {
            HookCommand::Start if started.is_some() => {}
            HookCommand::Start => {
                let spawned = spawn(command);
                let group = spawned.as_ref().map_or(0, |child| child.id().cast_signed());
                started = Some((group, report_on(spawned, hook.reporter()?)?));
            }
            HookCommand::Finish => return Ok(()),
            HookCommand::Cancel => {
                // It must not end the daemon that goes on.
                if let Some((group, _)) = started.filter(|(_, end)| !end.is_finished()) {
                    let _has_ended = killpg(Pid::from_raw(group), Signal::SIGTERM);
                }
                return Ok(());
            }
        }
    }
    Ok(())
}

/// In a group of its own, which no Ctrl-C reaches; our standard output is for the report.
fn spawn(command: &str) -> anyhow::Result<Child> {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", command]).stdin(Stdio::null()).stdout(std::io::stderr()).process_group(0);
    shell.spawn().context("cannot run /bin/sh")
}

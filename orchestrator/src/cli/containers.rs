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
use super::restart::{no_run_now, wait_for_report};
use super::wait::wait;
use super::SuperviseArgs;
use crate::control::{Connection, Holder, HookClient, HookCommand, Progress, RunLock, Subscription, LOCK, SOCKET};
use crate::journal::Runs;
use crate::machine::ExitCode;
use crate::report::Strategy;

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
    let runs = Runs::default();
    runs.note_container_run(&args.id)?;
    match launch(&args).inspect_err(|_| runs.forget_container_run())? {
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

/// `hook container-started`: the exit code of the run that `hook container-stop` began, once it has ended.
pub(super) fn started() -> u8 {
    let runs = Runs::default();
    let holder = RunLock::holder(Path::new(LOCK)).ok().flatten();
    match begun_by_stop(&runs, holder.as_ref()) {
        Ok(id) => {
            let code = wait(Some(id.clone()), false);
            if runs.is_over(&id) {
                runs.forget_container_run();
            }
            code
        }
        Err(error) => answered(false, Err(error)),
    }
}

/// What another run came to says nothing of a container.
fn begun_by_stop(runs: &Runs, holder: Option<&Holder>) -> anyhow::Result<String> {
    match (runs.container_run()?, holder) {
        (Some(id), _) => Ok(id),
        (None, Some(holder)) => bail!("`hook container-stop` has begun no run: {holder}"),
        (None, None) => bail!(
            "`hook container-stop` has begun no run; remedy: `ovs-graceful hook container-stop` before the container is \
             restarted (past runs: `ovs-graceful runs`)"
        ),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_run_that_container_stop_began_is_answered_for() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs::at(&dir.path().join("state"), &dir.path().join("run"));
        runs.create("run-1", 20).unwrap();
        let told = |holder: Option<&Holder>| format!("{:#}", begun_by_stop(&runs, holder).unwrap_err());
        assert!(told(None).contains("remedy: `ovs-graceful hook container-stop`"), "{}", told(None));
        let other = Holder { id: "run-1".into(), pid: 7 };
        assert!(told(Some(&other)).contains("run run-1 is under way"), "{}", told(Some(&other)));
        runs.note_container_run("run-2").unwrap();
        assert_eq!(begun_by_stop(&runs, Some(&other)).unwrap(), "run-2");
        runs.forget_container_run();
        assert!(begun_by_stop(&runs, None).is_err());
        runs.forget_container_run();
    }
}

//! Check: can this host do it, and at which level? Touches nothing.

use std::time::Duration;

use super::{Ended, Run, Step, Stop};
use crate::check;
use crate::config::Config;
use crate::host::Daemon;
use crate::machine::{Event, Phase};
use crate::report::Severity;

pub(super) struct Check;

impl Step for Check {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Check)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        let checked = check::check(&mut run.host, &run.wish, run.deadline);
        run.level = checked.report.level;
        run.report.level = Some(run.level);
        run.report.findings = checked.report.findings.clone();
        if checked.report.severity() == Severity::Refused {
            return Err(Stop::Refused);
        }
        for finding in checked.report.findings.iter().filter(|finding| finding.severity == Severity::Warning) {
            run.warn(format!("{}: {}", finding.object, finding.cause));
        }
        take_in(run, checked)?;
        if !run.wish.if_needed {
            return Ok(Event::Done);
        }
        match needed_because(run)? {
            Some(why) => {
                run.note(format!("needed: {why}"));
                Ok(Event::Done)
            }
            None => Ok(Event::NothingToDo),
        }
    }
}

fn take_in(run: &mut Run, checked: check::Checked) -> Result<(), Stop> {
    let Some(old) = checked.vswitchd else {
        return Err(anyhow::anyhow!("ovs-vswitchd was not found although Check found nothing wrong").into());
    };
    if let Some(versions) = &checked.versions {
        run.report.from.ovs = Some(versions.running.clone());
        run.report.to.ovs = Some(versions.installed.clone());
    }
    run.known.facts = checked.facts.unwrap_or_default();
    keep_program(run, &old)?;
    if !run.wish.elsewhere {
        run.known.owner = run.host.services.owner(&old, run.deadline)?.map(|unit| unit.name);
    }
    run.known.old = Some(old);
    run.checkpoint()
}

/// The way back: what runs now may have been replaced on the disk, or be by the time that it is needed.
fn keep_program(run: &mut Run, old: &Daemon) -> Result<(), Stop> {
    let Some(version) = run.report.from.ovs.clone() else { return Ok(()) };
    let folders = run.runs.program_folders(&run.id);
    match run.host.daemons.save_program(old, &version, &folders, run.deadline) {
        Ok(saved) => run.known.saved = Some(saved),
        Err(error) if run.report.from == run.report.to => {
            run.warn(format!("{error}: going back would start the installed program, which is of the same version"));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Why a daemon that the run would replace is not the one that a start now would give: another version is installed, or
/// a file whose code it runs has been replaced.
fn needed_because(run: &mut Run) -> Result<Option<String>, Stop> {
    if run.report.from != run.report.to {
        let version = |known: &Option<String>| known.clone().unwrap_or_else(|| "an unknown version".to_owned());
        let (from, to) = (version(&run.report.from.ovs), version(&run.report.to.ovs));
        return Ok(Some(format!("ovs-vswitchd {from} runs, and {to} is installed")));
    }
    let mut daemons = vec![run.old()?.clone()];
    if run.wish.ovsdb {
        daemons.push(run.host.daemons.find_ovsdb_server()?);
    }
    for daemon in daemons {
        let replaced = run.host.daemons.replaced(&daemon)?;
        let first = replaced.first().cloned().or_else(|| daemon.exe_deleted.then(|| daemon.exe.display().to_string()));
        if let Some(file) = first {
            return Ok(Some(format!(
                "{} (process {}) runs {file}, which was replaced",
                daemon.kind.program(),
                daemon.id.pid
            )));
        }
        run.checkpoint()?;
    }
    Ok(None)
}

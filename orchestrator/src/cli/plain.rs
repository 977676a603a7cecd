//! `restart --plain`: an ordinary restart on purpose, where `systemctl restart` would be a run.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, Context};

use super::output::{complain, tell};
use crate::control::{Holder, LockError, RunLock, LOCK, PLAIN};
use crate::host::real::Systemd;
use crate::host::{ServiceManager, Unit, SWITCH_UNIT, UMBRELLAS};
use crate::machine::ExitCode;

/// How long systemd may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// Restarts Open vSwitch as without us and returns the exit code.
pub(super) fn restart_plainly() -> u8 {
    let lock = RunLock::acquire(Path::new(LOCK), &Holder { id: PLAIN.to_owned(), pid: std::process::id() });
    let _lock = match lock {
        Ok(lock) => lock,
        Err(error) => {
            complain(&error.to_string());
            return match error {
                LockError::Held { .. } => ExitCode::Busy.code(),
                LockError::Io { .. } => ExitCode::Refused.code(),
            };
        }
    };
    match restart() {
        Ok(true) => ExitCode::Done.code(),
        Ok(false) => ExitCode::NeedsPerson.code(),
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::Refused.code()
        }
    }
}

/// False where systemctl has failed, which says why by itself.
fn restart() -> anyhow::Result<bool> {
    let systemd = Systemd::default();
    if !systemd.is_running() {
        bail!("systemd does not run; remedy: `/etc/init.d/openvswitch-switch restart` is the ordinary restart here");
    }
    let unit = unit_of_all(&systemd)?;
    tell(&before(&unit));
    let status = Command::new("systemctl").args(["restart", &unit]).status().context("cannot run systemctl")?;
    tell(&after(&unit, status.success()));
    Ok(status.success())
}

/// Nobody should find out afterwards what it costs.
fn before(unit: &str) -> String {
    format!(
        "an ordinary restart of {unit}, without ovs-graceful: OpenFlow rules that no controller gives anew are lost, and \
         packets until there are rules again"
    )
}

fn after(unit: &str, well: bool) -> String {
    match well {
        true => format!("{unit} was restarted; OpenFlow rules that no controller gives are yours to put back now"),
        false => {
            format!("{unit} was not restarted; remedy: see `systemctl status {unit}`, then `systemctl start {unit}`")
        }
    }
}

/// The unit whose restart is that of both daemons: the one that is active, or else the one that is there.
fn unit_of_all(systemd: &Systemd) -> anyhow::Result<String> {
    let mut there = Vec::new();
    for name in UMBRELLAS.into_iter().chain([SWITCH_UNIT]) {
        there.extend(systemd.unit(name, Instant::now() + ANSWER_LIMIT)?.filter(|unit| unit.fragment.is_some()));
    }
    let active = |unit: &&Unit| unit.active_state == "active";
    let chosen = there.iter().find(active).or(there.first());
    chosen.map(|unit| unit.name.clone()).context("no unit of Open vSwitch is installed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_restart_says_what_it_costs_and_when_it_is_over() {
        let text = before(SWITCH_UNIT);
        assert!(text.contains(SWITCH_UNIT) && text.contains("rules") && text.contains("are lost"), "{text}");
        let text = after(SWITCH_UNIT, true);
        assert!(text.contains("was restarted") && text.contains("put back"), "{text}");
        let text = after(SWITCH_UNIT, false);
        assert!(text.contains("was not restarted; remedy") && text.contains("`systemctl start"), "{text}");
        assert!([before(SWITCH_UNIT), after(SWITCH_UNIT, true)].iter().all(|text| !text.contains('\n')));
    }
}

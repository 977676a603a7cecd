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
    tell(&format!("an ordinary restart of {unit}, without ovs-graceful"));
    let status = Command::new("systemctl").args(["restart", &unit]).status().context("cannot run systemctl")?;
    Ok(status.success())
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

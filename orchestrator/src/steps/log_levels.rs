//! Log levels that were set by hand, given to the daemon that comes after.

use std::time::Instant;

use super::Run;
use crate::host::logs::LogsByHand;
use crate::host::{Daemon, Daemons, Result};
use crate::inventory::{is_forgotten, Kept};

/// Gives the new ovs-vswitchd those of the old one. What does not work is a warning.
pub(super) fn put_back(run: &mut Run) {
    let (Some(kept), Some(new)) = (&run.known.kept, &run.known.new) else { return };
    if is_forgotten(Kept::SwitchLogs) {
        return;
    }
    let given = give_back(run.host.daemons.as_ref(), new, &kept.switch_logs, run.deadline);
    if let Err(error) = given {
        run.warn(format!("log levels that were set by hand: {error}"));
    }
}

/// Gives `daemon` what it lacks. May be done twice.
pub(crate) fn give_back(daemons: &dyn Daemons, daemon: &Daemon, logs: &LogsByHand, until: Instant) -> Result<()> {
    if logs.is_empty() {
        return Ok(());
    }
    for lack in logs.lacks(daemon.kind.program(), &daemons.logs(daemon, until)?) {
        let arguments: Vec<&str> = lack.arguments.iter().map(String::as_str).collect();
        daemons.command(daemon, &lack.command, &arguments, until)?;
    }
    Ok(())
}

/// What it lacks, in words.
pub(crate) fn lacks(daemons: &dyn Daemons, daemon: &Daemon, logs: &LogsByHand, until: Instant) -> Result<Vec<String>> {
    if logs.is_empty() {
        return Ok(Vec::new());
    }
    let lacks = logs.lacks(daemon.kind.program(), &daemons.logs(daemon, until)?);
    Ok(lacks.into_iter().map(|lack| lack.what).collect())
}

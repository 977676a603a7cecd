//! What was changed in the daemons at run time: read before the run ends either of them, given to those that come after,
//! and compared. A recovery does the same, with what the run had written down.

use std::time::Instant;

use anyhow::Context;

use super::{log_levels, remembered, Host, Run, Stop};
use crate::host::kept::{printable, Lack, MANAGERS};
use crate::host::real::ovsdb_server::row_options;
use crate::host::{Daemon, HostError, Kept, ProcessId, ServerState, Sources, SystemRow};
use crate::inventory::{self, is_forgotten};

/// A command that fails once may work the next time.
const TRIES: u32 = 2;

/// Reads it, and writes it down before anything is replaced. Where ovsdb-server stays, what cannot be read is not at stake.
pub(super) fn keep(run: &mut Run) -> Result<(), Stop> {
    if run.known.kept.is_some() {
        return Ok(());
    }
    match read(run).or_else(|_| read(run)) {
        Ok(kept) => {
            run.runs.keep_by_hand(&run.id, &kept).context("noting what was set at run time")?;
            run.known.kept = Some(kept);
            run.checkpoint()
        }
        Err(error) if run.wish.ovsdb => {
            Err(anyhow::Error::from(error).context("what was set in the daemons at run time").into())
        }
        Err(error) => {
            let told = format!(
                "what was set in the daemons at run time is not known, and not put back: {error}; \
                 remedy: set it again, where somebody did (log levels, remotes and databases of ovsdb-server)"
            );
            run.report.differences.push(told.clone());
            run.warn(told);
            Ok(())
        }
    }
}

fn read(run: &Run) -> Result<Kept, HostError> {
    let (daemons, until) = (&run.host.daemons, run.deadline);
    let server = daemons.find_ovsdb_server()?;
    let state = daemons.server_state(&server, until)?;
    let server_logs = daemons.logs(&server, until)?.by_hand(&server.argv);
    let switch_logs = match &run.known.old {
        Some(old) => daemons.logs(old, until)?.by_hand(&old.argv),
        None => Default::default(),
    };
    Ok(Kept {
        server: Some(server.id),
        by_hand: state.by_hand(),
        server_logs,
        switch_logs,
        row: SystemRow::of(&run.host.database.facts(until)?).without_own_rundir(&server.control),
        sources: sources(&run.host, &server, until),
    })
}

fn sources(host: &Host, server: &Daemon, until: Instant) -> Sources {
    let unit = host.services.owner(server, until).ok().flatten();
    host.daemons.sources(server, &unit.map(|unit| row_options(&unit)).unwrap_or_default())
}

/// Gives the ovsdb-server that runs now what the one before it had. Done once for each; later only the managers are looked
/// at, which every start of ovs-vswitchd by ovs-ctl adds. What does not work is a warning.
pub(super) fn put_back(run: &mut Run) {
    let Some(kept) = run.known.kept.clone() else { return };
    let until = run.deadline;
    let (server, told) = give_back(&run.host, &kept, run.known.given_back, until);
    run.known.given_back = server.or(run.known.given_back);
    told.into_iter().for_each(|told| run.warn(told));
}

/// As [`put_back`]: the server that has all of it now, and warnings. `done` is one that has it already.
pub(crate) fn give_back(
    host: &Host,
    kept: &Kept,
    done: Option<ProcessId>,
    until: Instant,
) -> (Option<ProcessId>, Vec<String>) {
    let mut told = Vec::new();
    for left in (0..TRIES).rev() {
        told.clear();
        match try_to_give_back(host, kept, done, until, &mut told) {
            Ok(server) if told.is_empty() || left == 0 => return (Some(server), told),
            Ok(_) => {}
            Err(error) => told.push(format!("what was set in ovsdb-server at run time is not put back: {error}")),
        }
    }
    (None, told)
}

fn try_to_give_back(
    host: &Host,
    kept: &Kept,
    done: Option<ProcessId>,
    until: Instant,
    told: &mut Vec<String>,
) -> Result<ProcessId, HostError> {
    let daemons = host.daemons.as_ref();
    let server = daemons.find_ovsdb_server()?;
    let state = daemons.server_state(&server, until)?;
    let is_new = kept.server != Some(server.id) && done != Some(server.id);
    for lack in remembered::lacks(lacks(kept, &state, is_new)) {
        if let Err(error) = mend(host, &server, &lack, until) {
            let command = format!("ovs-appctl -t ovsdb-server {} {}", lack.command, lack.arguments.join(" "));
            told.push(printable(&format!("{}: {error}; remedy: `{command}`", lack.what)));
        }
    }
    if is_new {
        if !is_forgotten(inventory::Kept::ServerLogs) {
            let given = log_levels::give_back(daemons, &server, &kept.server_logs, until);
            told.extend(given.err().map(|error| error.to_string()));
        }
        told.extend(put_row_back(host, kept, until).err().map(|error| format!("row of this host: {error}")));
    }
    Ok(server.id)
}

/// What the server lacks; of one that has had all of it only what comes by itself.
fn lacks(kept: &Kept, state: &ServerState, is_new: bool) -> Vec<Lack> {
    let mut lacks = kept.by_hand.lacks(state);
    lacks.retain(|lack| is_new || lack.command.ends_with("/remove-remote") && lack.arguments == [MANAGERS]);
    lacks
}

fn mend(host: &Host, server: &Daemon, lack: &Lack, until: Instant) -> Result<(), HostError> {
    if lack.arguments.first().is_some_and(String::is_empty) {
        return Err(HostError::new("its file", "not known, or moved or removed since"));
    }
    let arguments: Vec<&str> = lack.arguments.iter().map(String::as_str).collect();
    let answer = host.daemons.command(server, &lack.command, &arguments, until)?;
    match answer.trim() {
        "" => Ok(()),
        said => Err(HostError::new(&lack.command, said)),
    }
}

fn put_row_back(host: &Host, kept: &Kept, until: Instant) -> Result<(), HostError> {
    let now = SystemRow::of(&host.database.facts(until)?);
    let wanted = kept.row.wanted(&now, kept.sources);
    match wanted == now || is_forgotten(inventory::Kept::SystemRow) {
        true => Ok(()),
        false => host.database.write_row(&wanted, until),
    }
}

/// What is not as it was, in words; `switch` is the ovs-vswitchd that runs now.
pub(crate) fn differences(
    host: &Host,
    kept: &Kept,
    switch: Option<&Daemon>,
    until: Instant,
) -> Result<Vec<String>, HostError> {
    let daemons = host.daemons.as_ref();
    let server = daemons.find_ovsdb_server()?;
    let state = daemons.server_state(&server, until)?;
    let is_new = kept.server != Some(server.id);
    let mut found: Vec<String> = lacks(kept, &state, is_new).into_iter().map(|lack| lack.what).collect();
    if is_new {
        found.extend(log_levels::lacks(daemons, &server, &kept.server_logs, until)?);
        let now = SystemRow::of(&host.database.facts(until)?);
        found.extend(kept.row.wanted(&now, kept.sources).differences(&now));
    }
    if let Some(switch) = switch {
        found.extend(log_levels::lacks(daemons, switch, &kept.switch_logs, until)?);
    }
    Ok(found)
}

/// What is not as it was is a difference.
pub(super) fn compare(run: &mut Run) -> Result<(), Stop> {
    let Some(kept) = &run.known.kept else { return Ok(()) };
    let found = differences(&run.host, kept, run.known.new.as_ref(), run.deadline);
    run.report.differences.extend(found.context("what was set in the daemons at run time")?);
    Ok(())
}

/// A run that ends otherwise than by Verify: what its ovsdb-server lacks is told.
pub(super) fn tell(run: &mut Run) {
    let Some(kept) = run.known.kept.clone() else { return };
    put_back(run);
    match differences(&run.host, &kept, run.known.new.as_ref(), run.deadline) {
        Ok(found) => found.into_iter().for_each(|found| {
            if !run.report.differences.contains(&found) {
                run.report.differences.push(found);
            }
        }),
        Err(error) => run.warn(format!("what was set in the daemons at run time: {error}")),
    }
}

//! `wait`: for a client that detached, and for scripts.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context};

use super::containers::under_way;
use super::ended::answered;
use super::restart::{end, follow_to_the_end, wait_for_report, Follow};
use crate::control::{RunLock, LOCK};
use crate::journal::Runs;
use crate::recovery::RECOVERY;
use crate::report::Report;

/// Between two looks at a run that does not listen: it is being recovered, or about to end.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Waits for run `id`, or the one under way, and returns its exit code.
pub(super) fn wait(id: Option<String>, json: bool) -> u8 {
    match find(id) {
        Ok(Found::Running(id, events)) => follow_to_the_end(&id, events, Follow { json, only_waits: true }),
        Ok(Found::Over(id)) => match report_of(&id).with_context(|| no_report(&id)) {
            Ok(report) => end(&report, json),
            Err(error) => answered(json, Err(error)),
        },
        Err(error) => answered(json, Err(error)),
    }
}

enum Found {
    Running(String, crate::control::Subscription),
    Over(String),
}

/// That of a run that is over; one whose supervisor has just died is about to be recovered.
fn report_of(id: &str) -> Option<Report> {
    let runs = Runs::default();
    match runs.is_over(id) {
        true => runs.report(id).ok(),
        false => wait_for_report(id),
    }
}

fn no_report(id: &str) -> String {
    format!("run {id} has left no report; remedy: `ovs-graceful recover`")
}

fn find(id: Option<String>) -> anyhow::Result<Found> {
    let runs = Runs::default();
    if let Some(id) = &id {
        if !runs.ids()?.contains(id) && RunLock::holder(Path::new(LOCK))?.is_none_or(|holder| holder.id != *id) {
            bail!("there is no run {id}; `ovs-graceful runs` lists them");
        }
    }
    loop {
        if let Some((running, events)) = under_way()? {
            if id.as_ref().is_none_or(|id| *id == running) {
                return Ok(Found::Running(running, events));
            }
        }
        // A run that does not listen is beginning, has just ended, or is being recovered.
        let holder = RunLock::holder(Path::new(LOCK))?;
        let its_own = || holder.as_ref().map(|holder| holder.id.clone()).filter(|id| id != RECOVERY);
        let wanted = match id.clone().or_else(its_own) {
            Some(id) => id,
            None => runs.interrupted()?.with_context(|| none_under_way(&runs))?,
        };
        if runs.is_over(&wanted) || holder.is_none() {
            return Ok(Found::Over(wanted));
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn none_under_way(runs: &Runs) -> String {
    let last = runs.ids().ok().and_then(|mut ids| ids.pop());
    let last = last.map(|id| format!(" (the last one: `ovs-graceful wait {id}`)")).unwrap_or_default();
    format!("no run is under way{last}")
}

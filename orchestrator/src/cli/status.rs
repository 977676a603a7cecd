//! `status`: what is going on, from the supervisor's socket, the freeze's pins and the database. Touches nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use dpfreeze::freeze;
use serde::Serialize;

use super::connect;
use super::output::{say, say_json};
use crate::control::{Holder, RunLock, Status, LOCK};
use crate::guard;
use crate::host::real::assemble::DATABASE_SOCKET;
use crate::host::real::Ovsdb;
use crate::host::Database;
use crate::journal::Runs;
use crate::machine::ExitCode;

/// How long the database may take to answer.
const DATABASE_LIMIT: Duration = Duration::from_secs(3);

/// The answer of `status`.
#[derive(Debug, Serialize)]
struct Answer {
    /// The run under way, as its supervisor says.
    run: Option<Status>,
    /// Who holds the run lock.
    lock: Option<Holder>,
    /// A run that was cut off and has to be recovered.
    interrupted: Option<String>,
    /// The freeze, as its pins say.
    freeze: Option<freeze::State>,
    /// The timeout policies that are guarded for live connections, run or no run.
    guard: Option<guard::Status>,
    /// Whether flow-restore-wait is set; `null` where the database does not answer.
    flow_restore_wait: Option<bool>,
    /// What could not be found out.
    unknown: Vec<String>,
}

/// Prints what is going on.
pub fn status(json: bool) -> anyhow::Result<ExitCode> {
    let answer = ask();
    match json {
        true => say_json(&answer),
        false => say(in_words(&answer).trim_end()),
    }
    Ok(ExitCode::Done)
}

fn ask() -> Answer {
    let mut unknown = Vec::new();
    let run = known(&mut unknown, connect().and_then(|run| run.map(|mut run| Ok(run.status()?)).transpose()));
    let lock = known(&mut unknown, RunLock::holder(Path::new(LOCK)));
    let interrupted = match lock.is_some() {
        true => None,
        false => known(&mut unknown, Runs::default().interrupted()),
    };
    let freeze = known(&mut unknown, freeze::state());
    let guard = known(&mut unknown, guard::status());
    let facts = Ovsdb::new(DATABASE_SOCKET).facts(Instant::now() + DATABASE_LIMIT);
    let flow_restore_wait = known(&mut unknown, facts.map(|facts| Some(facts.is_on("flow-restore-wait"))));
    Answer { run, lock, interrupted, freeze, guard, flow_restore_wait, unknown }
}

fn known<T, E: Into<anyhow::Error>>(unknown: &mut Vec<String>, asked: Result<Option<T>, E>) -> Option<T> {
    asked.unwrap_or_else(|error| {
        unknown.push(format!("{:#}", error.into()));
        None
    })
}

fn in_words(answer: &Answer) -> String {
    let mut lines = vec![run_line(answer)];
    lines.extend(answer.interrupted.as_ref().map(|id| format!("run {id} was cut off; remedy: `ovs-graceful recover`")));
    lines.push(freeze_line(answer.freeze.as_ref()));
    lines.extend(answer.guard.as_ref().map(guard_lines));
    lines.push(match answer.flow_restore_wait {
        Some(true) if answer.lock.is_none() => {
            "flow-restore-wait is SET and no run is under way: ovs-vswitchd answers no misses; if nobody else set it, \
             remedy: `ovs-vsctl remove open_vswitch . other_config flow-restore-wait`"
                .to_string()
        }
        Some(true) => "flow-restore-wait is set".to_string(),
        Some(false) => "flow-restore-wait is not set".to_string(),
        None => "flow-restore-wait: unknown".to_string(),
    });
    lines.extend(answer.unknown.iter().map(|why| format!("unknown: {why}")));
    lines.join("\n")
}

fn run_line(answer: &Answer) -> String {
    match (&answer.run, &answer.lock) {
        (Some(run), _) => {
            let phase = run.phase.map_or_else(String::new, |phase| format!(" {phase}"));
            let abort = match (run.can_abort, run.doing.as_str()) {
                (_, "finished") => "its report is being delivered",
                (true, _) => "can be aborted",
                (false, _) => "past the point of no return, or being undone",
            };
            let seconds = run.elapsed_ms as f64 / 1000.0;
            format!("run {}: {}{phase}, {seconds:.1} s, {} packets parked; {abort}", run.id, run.doing, run.parked)
        }
        (None, Some(holder)) => {
            format!("run {} (process {}) holds the lock and does not listen", holder.id, holder.pid)
        }
        (None, None) => "no run is under way".to_string(),
    }
}

fn freeze_line(freeze: Option<&freeze::State>) -> String {
    match freeze {
        None => "nothing is frozen".to_string(),
        Some(state) if !state.armed => "nothing is frozen (the program is loaded, its lease is over)".to_string(),
        Some(state) => format!(
            "frozen for {:.1} s more, {:.0} s at most: {}",
            state.lease_left_ms as f64 / 1000.0,
            state.end_left_ms as f64 / 1000.0,
            state.classes.iter_names().map(|(name, _)| name.to_lowercase()).collect::<Vec<_>>().join(", ")
        ),
    }
}

fn guard_lines(guard: &guard::Status) -> String {
    if guard.lease_left_ms == 0 {
        return "no timeout policy is guarded (the program is loaded, its lease is over)".to_string();
    }
    let mut lines = vec![format!(
        "guarded for {:.0} s more unless renewed, {:.0} s at most; {} deletions refused:",
        guard.lease_left_ms as f64 / 1000.0,
        guard.end_left_ms as f64 / 1000.0,
        guard.refused
    )];
    lines.extend(guard.policies.iter().map(|policy| {
        let zones: Vec<String> = policy.zones.iter().map(u16::to_string).collect();
        format!(
            "  timeout policy {} (zone {}): {} connections left, for {} s",
            policy.policy,
            zones.join(", "),
            policy.connections,
            policy.age_s
        )
    }));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet() -> Answer {
        Answer {
            run: None,
            lock: None,
            interrupted: None,
            freeze: None,
            guard: None,
            flow_restore_wait: Some(false),
            unknown: vec![],
        }
    }

    #[test]
    fn a_quiet_host_is_said_to_be_quiet() {
        assert_eq!(in_words(&quiet()), "no run is under way\nnothing is frozen\nflow-restore-wait is not set");
    }

    #[test]
    fn a_guard_says_for_what_and_until_when() {
        let policy =
            guard::PolicyStatus { policy: "ovs_tp_1_udp4".into(), zones: [5, 6].into(), connections: 7, age_s: 90 };
        let guard =
            guard::Status { policies: vec![policy], refused: 3, lease_left_ms: 50_000, end_left_ms: 80_000_000 };
        let text = in_words(&Answer { guard: Some(guard.clone()), ..quiet() });
        for part in ["50 s", "80000 s", "3 deletions", "ovs_tp_1_udp4 (zone 5, 6): 7 connections left, for 90 s"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = in_words(&Answer { guard: Some(guard::Status { lease_left_ms: 0, ..guard }), ..quiet() });
        assert!(text.contains("lease is over"), "{text}");
    }

    #[test]
    fn a_flag_that_is_stuck_and_a_run_that_was_cut_off_come_with_their_remedies() {
        let answer = Answer { flow_restore_wait: Some(true), interrupted: Some("run-7".into()), ..quiet() };
        let text = in_words(&answer);
        assert!(text.contains("run-7") && text.contains("recover") && text.contains("ovs-vsctl remove"), "{text}");
        let holder = Holder { id: "run-8".into(), pid: 1 };
        let text = in_words(&Answer { flow_restore_wait: Some(true), lock: Some(holder), ..quiet() });
        assert!(!text.contains("remedy"), "{text}");
    }
}

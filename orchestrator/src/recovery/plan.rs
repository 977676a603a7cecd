//! What is to be done with a run that was cut off. Pure: from what it wrote down and from who lives.

use super::record::Mark;
use crate::journal::{Entry, StepState};
use crate::machine::Phase;

/// The step of going back, in the journal and the report.
pub const BACK: &str = "back";

/// Who lives, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alive {
    /// The machine has not been booted since.
    pub same_boot: bool,
    /// The ovs-vswitchd that was to be replaced.
    pub old: bool,
    /// One that was to take its place.
    pub new: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// The run had touched nothing.
    Nothing,
    /// The machine was booted since: only what is in the database can be left over.
    AfterReboot,
    /// The old daemon goes on as if nothing had been.
    Undo,
    /// The new daemon takes over, or whichever there is.
    Forward {
        /// Kernel flows that cannot survive may still be there.
        flush: bool,
    },
}

/// The last mark of the run.
pub fn last_mark(entries: &[Entry]) -> Option<Mark> {
    let marks = entries.iter().rev().filter(|entry| !entry.data.is_null());
    marks.filter_map(|entry| serde_json::from_value::<Mark>(entry.data.clone()).ok()).next()
}

/// Was the old daemon perhaps told to end?
pub fn past_no_return(entries: &[Entry]) -> bool {
    entries.iter().any(|entry| entry.phase.past_no_return() && entry.state == StepState::Intent)
}

/// Was everything of the run done but the looking back, and the run not on its way back?
pub fn had_settled(entries: &[Entry]) -> bool {
    let settled = entries.iter().any(|entry| entry.phase == Phase::Settle && entry.state == StepState::Done);
    settled && entries.iter().all(|entry| entry.step != BACK)
}

/// Decides.
pub fn plan(entries: &[Entry], mark: Option<&Mark>, alive: Alive) -> Plan {
    if mark.is_none_or(|mark| mark.old.is_none()) {
        return Plan::Nothing;
    }
    if !alive.same_boot {
        return Plan::AfterReboot;
    }
    let forward = Plan::Forward { flush: !is_handed_over(entries) };
    match (past_no_return(entries), alive.old, alive.new) {
        (false, true, _) => Plan::Undo,
        // It was not told to end, or has refused to; there is nobody to take its place.
        (true, true, false) => Plan::Undo,
        (_, false, _) | (true, true, true) => forward,
    }
}

/// Are the kernel's flows rid of all that belongs to another daemon than the one that was bound last? Going back
/// binds another one and has to remove such flows again.
fn is_handed_over(entries: &[Entry]) -> bool {
    let binds = |entry: &&Entry| entry.phase == Phase::Handover || entry.step == BACK;
    entries.iter().rev().find(binds).is_some_and(|entry| entry.state == StepState::Done)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::{json, Value};

    use super::*;
    use crate::host::{Daemon, DaemonKind, ProcessId};

    fn daemon(pid: i32) -> Daemon {
        Daemon {
            kind: DaemonKind::OvsVswitchd,
            id: ProcessId { pid, start_time: 7 },
            exe: PathBuf::new(),
            exe_deleted: false,
            argv: vec![],
            environment: vec![],
            cwd: PathBuf::new(),
            comm: String::new(),
            nice: 0,
            limits: vec![],
            oom_score_adj: 0,
            umask: 0,
            uid: 0,
            gid: 0,
            groups: vec![],
            capabilities: 0,
            cgroup: String::new(),
            monitor: None,
            pid_file: PathBuf::new(),
            control: PathBuf::new(),
            log_file: None,
            own_pid: pid,
            contained: false,
        }
    }

    fn mark(new: Option<i32>) -> Value {
        let mark = Mark { old: Some(daemon(1)), new: new.map(daemon), old_port_ids: vec![5], ..Mark::default() };
        json!(mark)
    }

    /// A journal that was cut off after the intent of `last`.
    fn until(last: Phase) -> Vec<Entry> {
        let mut entries = vec![Entry::intent(Phase::Check, "check", json!(Mark::default()))];
        for phase in Phase::ALL.into_iter().skip(1).filter(|phase| *phase <= last) {
            let before = phase.previous().unwrap_or(Phase::Check);
            entries.push(Entry::done(before, before.name(), Value::Null));
            let news = match phase {
                Phase::Snapshot => mark(None),
                Phase::SwitchPrepare => mark(Some(2)),
                _ => Value::Null,
            };
            entries.push(Entry::intent(phase, phase.name(), news));
        }
        entries
    }

    fn planned(entries: &[Entry], old: bool, new: bool) -> Plan {
        plan(entries, last_mark(entries).as_ref(), Alive { same_boot: true, old, new })
    }

    #[test]
    fn before_the_point_of_no_return_a_living_old_daemon_is_kept_whatever_else_lives() {
        for last in [Phase::Snapshot, Phase::Arm, Phase::Standby, Phase::SwitchPrepare] {
            for new in [false, true] {
                assert_eq!(planned(&until(last), true, new), Plan::Undo, "{last:?}");
            }
        }
    }

    #[test]
    fn without_the_old_daemon_it_goes_forward_in_every_phase() {
        for last in Phase::ALL.into_iter().skip(1) {
            let flush = last <= Phase::Handover;
            for new in [false, true] {
                assert_eq!(planned(&until(last), false, new), Plan::Forward { flush }, "{last:?}");
            }
        }
    }

    #[test]
    fn a_way_back_that_was_not_finished_leaves_flows_of_another_daemon() {
        let mut entries = until(Phase::Gates);
        assert_eq!(planned(&entries, false, true), Plan::Forward { flush: false });
        let phase = Phase::SwitchCommit;
        entries.push(Entry::intent(phase, BACK, Value::Null));
        assert_eq!(planned(&entries, false, true), Plan::Forward { flush: true });
        entries.push(Entry::intent(phase, BACK, Value::Null));
        entries.push(Entry::done(phase, BACK, Value::Null));
        assert_eq!(planned(&entries, false, true), Plan::Forward { flush: false });
    }

    #[test]
    fn a_run_that_turned_back_behind_settle_was_not_done() {
        let mut entries = until(Phase::Verify);
        assert!(had_settled(&entries));
        entries.push(Entry::intent(Phase::SwitchCommit, BACK, Value::Null));
        assert!(!had_settled(&entries));
    }

    #[test]
    fn a_way_back_before_the_hand_over_has_handed_over_once_it_is_done() {
        let mut entries = until(Phase::Restore);
        entries.push(Entry::intent(Phase::SwitchCommit, BACK, Value::Null));
        assert_eq!(planned(&entries, false, true), Plan::Forward { flush: true });
        entries.push(Entry::done(Phase::SwitchCommit, BACK, Value::Null));
        assert_eq!(planned(&entries, false, true), Plan::Forward { flush: false });
    }

    #[test]
    fn past_the_point_of_no_return_the_old_daemon_is_kept_only_where_nobody_else_lives() {
        let entries = until(Phase::SwitchCommit);
        assert_eq!(planned(&entries, true, true), Plan::Forward { flush: true });
        assert_eq!(planned(&entries, true, false), Plan::Undo);
    }

    #[test]
    fn an_undone_run_is_undone_again_and_not_taken_for_one_past_return() {
        let mut entries = until(Phase::Standby);
        entries.push(Entry::undone(Phase::Standby, "standby"));
        assert!(!past_no_return(&entries));
        assert_eq!(planned(&entries, true, false), Plan::Undo);
    }

    #[test]
    fn a_run_that_had_not_found_its_daemon_has_touched_nothing() {
        assert_eq!(planned(&[], true, false), Plan::Nothing);
        assert_eq!(planned(&until(Phase::Check), true, false), Plan::Nothing);
    }

    #[test]
    fn after_a_reboot_process_ids_mean_nothing() {
        for last in Phase::ALL.into_iter().skip(1) {
            let entries = until(last);
            let alive = Alive { same_boot: false, old: true, new: true };
            assert_eq!(plan(&entries, last_mark(&entries).as_ref(), alive), Plan::AfterReboot);
        }
    }

    #[test]
    fn the_last_mark_counts_and_entries_without_one_are_passed_over() {
        let found = last_mark(&until(Phase::Gates)).unwrap();
        assert_eq!(found.new.map(|new| new.id.pid), Some(2));
        assert_eq!(found.old_port_ids, [5]);
        assert_eq!(last_mark(&until(Phase::Arm)).unwrap().new, None);
    }
}

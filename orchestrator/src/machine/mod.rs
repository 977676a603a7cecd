//! The state machine of a run. It is pure: no clock, no socket, no file. It is told what happened ([`Event`]) and
//! answers what to do next ([`Action`]); the supervisor does it and reports back.
//!
//! ```text
//!            start()
//!  Idle ────────────▶ Check ▶ Snapshot ▶ Arm ▶ Standby ▶ SwitchPrepare
//!                       │        │        │       │          │   │
//!                       ▼        ▼        ▼       ▼          ▼   │ Done, or the old daemon died by itself
//!                     Undoing: the phase under way first,        │
//!                     then every phase before it                 │
//!                     0, 10, 20; an undo failed: Thaw, 40        │
//!  ═════════════════════════════ point of no return ═════════════▼════════════════════════════════
//!                                        SwitchCommit ▶ Restore ▶ Handover ▶ Gates ▶ Settle ▶ Verify
//!                                             │           │ ▲         │         │     │  │       │
//!                                             │           └─┘retry    │         │     │  │failed │
//!                                             ▼           ▼           ▼         ▼     ▼  ▼       ▼
//!                                          GoingBack ◀────┴───────────┴─────────┴─────┘ Thawing  0, 30
//!                                             │ always                                   │
//!                                             ▼                                          ▼
//!                                          Thawing ▶ 21, 40, GoingBack                  Verify ▶ 30
//! ```
//!
//! Two rules that the table (`tests.rs`) checks over every pair of state and event:
//! - before the point of no return whatever goes wrong is undone, in reverse order, the phase that failed included,
//!   because it may have been cut off half-done. But where the old daemon dies by itself there is nothing to return
//!   to: once its rules are known (Arm, Standby) the run goes back to a daemon that has them;
//! - after it nothing is undone: the run goes forward, or back to the old version, and in any case it thaws.
//!
//! Events that arrive while a step is still running (a watcher saw something) are given to [`Machine::on`] as soon
//! as they are known. [`Action::Continue`] and [`Action::RefuseAbort`] let the step go on; any other action means:
//! cut the step off at its next checkpoint, forget its result, and do this instead.

mod outcome;
mod phase;
#[cfg(test)]
mod tests;

pub use outcome::{Cause, ExitCode, Outcome, Why};
pub use phase::Phase;

use serde::{Deserialize, Serialize};

/// What happens when a gate fails or does not open in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GatePolicy {
    /// Go on; the run ends with exit code 30 at best.
    Proceed,
    /// Go back to the old version.
    Back,
}

/// What the machine has to know beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Options {
    /// What happens when a gate fails or does not open in time.
    pub gate_policy: GatePolicy,
    /// How often a phase after the point of no return that failed `retryable` is done again (Restore also when it
    /// timed out).
    pub retries: u32,
    /// How often an undo, a Back or a Thaw that failed `retryable` is done again (Back also when it timed out).
    pub undo_retries: u32,
}

impl Default for Options {
    fn default() -> Options {
        Options { gate_policy: GatePolicy::Proceed, retries: 2, undo_retries: 2 }
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The action asked for last has been done.
    Done,
    /// Check found that the daemons already are what they would be after the run (`--if-needed`).
    NothingToDo,
    /// The action asked for last failed.
    Failed {
        /// True if the same action may succeed when it is done again.
        retryable: bool,
    },
    /// The action asked for last did not end within its time limit.
    TimedOut,
    /// The user wants the run undone.
    AbortRequested,
    /// The freeze has run out.
    LeaseLost,
    /// A process that is neither the supervisor, the old daemon nor the standby bound the upcalls.
    BoundByOther,
    /// Somebody else removed flow-restore-wait.
    RestoreWaitRemoved,
    /// The new ovs-vswitchd has ended.
    NewDaemonDied,
    /// The old ovs-vswitchd has ended.
    OldDaemonDied,
    /// The action asked for last has been done, and found that something is not as it was.
    DifferencesFound,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Do this phase.
    Do(Phase),
    /// Undo this phase, which was begun, but not necessarily ended.
    Undo(Phase),
    /// Go back to the old version: its ovs-vswitchd on the database as it is, bound, and the parked packets replayed.
    Back,
    /// Lift every freeze now.
    Thaw,
    /// Nothing changes: go on with what is being done.
    Continue,
    /// Tell whoever asked that it is too late to abort, and go on.
    RefuseAbort,
    /// The run is over.
    Finish(Outcome),
}

/// Where the run is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum State {
    /// Not started.
    Idle,
    /// This phase is under way.
    Doing(Phase),
    /// This phase is being undone.
    Undoing {
        /// The phase being undone.
        phase: Phase,
        /// Why the run turned round; `None` when there was nothing to do.
        why: Option<Why>,
    },
    /// On the way back to the old version.
    GoingBack(Why),
    /// Thawing because Settle did not; Verify follows.
    ThawingToVerify,
    /// Thawing at the end of a run that failed.
    ThawingToFinish(Outcome),
    /// Over.
    Finished(Outcome),
}

/// The state machine of one run.
#[derive(Debug, Clone)]
pub struct Machine {
    options: Options,
    state: State,
    tries: u32,
    differences: Option<Why>,
    undo_failed: Option<Phase>,
    old_daemon_died: bool,
    /// Why the run went back.
    back_why: Option<Why>,
    /// How often the daemon that was started then has died before the end of the run.
    backs_died: u32,
}

impl Machine {
    /// A run that has not started.
    pub fn new(options: Options) -> Machine {
        Machine {
            options,
            state: State::Idle,
            tries: 0,
            differences: None,
            undo_failed: None,
            old_daemon_died: false,
            back_why: None,
            backs_died: 0,
        }
    }

    /// A run whose supervisor was cut off in `phase`, as its journal says. Before the point of no return it is undone;
    /// after it, it goes on where it was (steps may be done twice).
    pub fn resume(options: Options, phase: Phase) -> (Machine, Action) {
        let mut machine = Machine::new(options);
        if !phase.past_no_return() {
            let action = machine.turn(phase, Cause::Interrupted);
            return (machine, action);
        }
        machine.note(phase, Cause::Interrupted);
        let action = machine.begin(phase);
        (machine, action)
    }

    /// Starts the run. A machine that has been started only goes on with what it is doing.
    pub fn start(&mut self) -> Action {
        match &self.state {
            State::Idle => self.begin(Phase::Check),
            State::Doing(_)
            | State::Undoing { .. }
            | State::GoingBack(_)
            | State::ThawingToVerify
            | State::ThawingToFinish(_) => Action::Continue,
            State::Finished(outcome) => Action::Finish(outcome.clone()),
        }
    }

    /// Where the run is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// True while `abort` would still undo the run.
    pub fn can_abort(&self) -> bool {
        match &self.state {
            State::Idle => true,
            State::Doing(phase) => !phase.past_no_return(),
            State::Undoing { .. }
            | State::GoingBack(_)
            | State::ThawingToVerify
            | State::ThawingToFinish(_)
            | State::Finished(_) => false,
        }
    }

    /// Takes in an event and answers what to do next.
    pub fn on(&mut self, event: Event) -> Action {
        match self.state.clone() {
            State::Idle => Action::Continue,
            State::Doing(phase) => match phase {
                Phase::Check => self.on_check(event),
                Phase::Snapshot | Phase::Arm | Phase::Standby | Phase::SwitchPrepare => {
                    self.on_reversible(phase, event)
                }
                Phase::SwitchCommit | Phase::Restore | Phase::Handover => self.on_gap(phase, event),
                Phase::Gates => self.on_gates(event),
                Phase::Settle => self.on_settle(event),
                Phase::Verify => self.on_verify(event),
            },
            State::Undoing { phase, why } => self.on_undoing(phase, why, event),
            State::GoingBack(why) => self.on_going_back(why, event),
            State::ThawingToVerify => self.on_thawing(None, event),
            State::ThawingToFinish(outcome) => self.on_thawing(Some(outcome), event),
            State::Finished(outcome) => Action::Finish(outcome),
        }
    }

    /// Check touches nothing: there is no lease, no standby and no flag of ours yet.
    fn on_check(&mut self, event: Event) -> Action {
        match event {
            Event::Done => self.advance(Phase::Check),
            Event::NothingToDo => self.undo(Phase::Check, None),
            Event::Failed { retryable: true | false } => self.turn(Phase::Check, Cause::Failed),
            Event::TimedOut => self.turn(Phase::Check, Cause::TimedOut),
            Event::AbortRequested => self.turn(Phase::Check, Cause::Aborted),
            Event::OldDaemonDied => self.turn(Phase::Check, Cause::OldDaemonDied),
            Event::DifferencesFound => self.turn(Phase::Check, Cause::Differences),
            Event::LeaseLost | Event::BoundByOther | Event::RestoreWaitRemoved | Event::NewDaemonDied => {
                Action::Continue
            }
        }
    }

    /// Snapshot, Arm, Standby, SwitchPrepare: what goes wrong is undone.
    fn on_reversible(&mut self, phase: Phase, event: Event) -> Action {
        let armed = phase >= Phase::Arm;
        let standing_by = phase >= Phase::Standby;
        match event {
            Event::Done | Event::NothingToDo => self.advance(phase),
            Event::Failed { retryable: true | false } => self.turn(phase, Cause::Failed),
            Event::TimedOut => self.turn(phase, Cause::TimedOut),
            Event::AbortRequested => self.turn(phase, Cause::Aborted),
            Event::DifferencesFound => self.turn(phase, Cause::Differences),
            Event::LeaseLost if armed => self.turn(phase, Cause::LeaseLost),
            Event::BoundByOther if armed => self.turn(phase, Cause::BoundByOther),
            Event::RestoreWaitRemoved if standing_by => self.turn(phase, Cause::RestoreWaitRemoved),
            Event::NewDaemonDied if standing_by => self.turn(phase, Cause::NewDaemonDied),
            Event::LeaseLost | Event::BoundByOther | Event::RestoreWaitRemoved | Event::NewDaemonDied => {
                Action::Continue
            }
            Event::OldDaemonDied => self.old_daemon_died(phase),
        }
    }

    /// SwitchCommit, Restore, Handover: no daemon answers misses; forward as fast as can be, else back.
    fn on_gap(&mut self, phase: Phase, event: Event) -> Action {
        match event {
            Event::Done | Event::NothingToDo => self.advance(phase),
            Event::DifferencesFound => {
                self.note(phase, Cause::Differences);
                self.advance(phase)
            }
            Event::Failed { retryable: true } => self.again_or_back(phase, Cause::Failed),
            Event::Failed { retryable: false } => self.back(phase, Cause::Failed),
            Event::TimedOut if phase == Phase::Restore => self.again_or_back(phase, Cause::TimedOut),
            Event::TimedOut => self.back(phase, Cause::TimedOut),
            Event::AbortRequested => Action::RefuseAbort,
            Event::LeaseLost => self.degraded(phase),
            Event::BoundByOther => self.back(phase, Cause::BoundByOther),
            Event::NewDaemonDied => self.back(phase, Cause::NewDaemonDied),
            // With a freeze the bind that follows is refused and captured as it is at Handover; without one the daemon
            // is bound already, and the quickest way to rules in every bridge is the one we are on.
            Event::RestoreWaitRemoved => Action::Continue,
            // What SwitchCommit is for.
            Event::OldDaemonDied => Action::Continue,
        }
    }

    /// Gates: the new daemon forwards; the policy decides about what is missing.
    fn on_gates(&mut self, event: Event) -> Action {
        match event {
            Event::Done | Event::NothingToDo => self.advance(Phase::Gates),
            Event::Failed { retryable: true | false } => self.gate_shut(Cause::Failed),
            Event::TimedOut => self.gate_shut(Cause::TimedOut),
            Event::DifferencesFound => self.gate_shut(Cause::Differences),
            Event::AbortRequested => Action::RefuseAbort,
            Event::LeaseLost => self.degraded(Phase::Gates),
            Event::BoundByOther => self.back(Phase::Gates, Cause::BoundByOther),
            Event::NewDaemonDied => self.back(Phase::Gates, Cause::NewDaemonDied),
            Event::RestoreWaitRemoved | Event::OldDaemonDied => Action::Continue,
        }
    }

    /// Settle: thaw in any case.
    fn on_settle(&mut self, event: Event) -> Action {
        match event {
            Event::Done | Event::NothingToDo => self.advance(Phase::Settle),
            Event::DifferencesFound => {
                self.note(Phase::Settle, Cause::Differences);
                self.advance(Phase::Settle)
            }
            Event::Failed { retryable: true | false } => self.thaw_to_verify(Cause::Failed),
            Event::TimedOut => self.thaw_to_verify(Cause::TimedOut),
            Event::AbortRequested => Action::RefuseAbort,
            Event::LeaseLost => self.degraded(Phase::Settle),
            // Somebody (systemd, --monitor) started a daemon of the new version, and it forwards: leave it alone.
            Event::BoundByOther => self.thaw_to_person(Phase::Settle, Cause::BoundByOther),
            Event::NewDaemonDied => self.back(Phase::Settle, Cause::NewDaemonDied),
            Event::RestoreWaitRemoved | Event::OldDaemonDied => Action::Continue,
        }
    }

    /// Verify: nothing of ours holds anything any more; the daemon belongs to systemd or its monitor again. One that
    /// they start in place of one that dies now would have no rules: we still know them.
    fn on_verify(&mut self, event: Event) -> Action {
        match event {
            Event::Done | Event::NothingToDo => self.finish_forward(),
            Event::DifferencesFound => self.finish_noting(Cause::Differences),
            Event::Failed { retryable: true } => self.again_or_finish(Cause::Failed),
            Event::Failed { retryable: false } => self.finish_noting(Cause::Failed),
            Event::TimedOut => self.finish_noting(Cause::TimedOut),
            Event::AbortRequested => Action::RefuseAbort,
            Event::BoundByOther => self.thaw_to_person(Phase::Verify, Cause::BoundByOther),
            Event::NewDaemonDied => self.back(Phase::Verify, Cause::NewDaemonDied),
            Event::LeaseLost | Event::RestoreWaitRemoved | Event::OldDaemonDied => Action::Continue,
        }
    }

    fn on_undoing(&mut self, phase: Phase, why: Option<Why>, event: Event) -> Action {
        match event {
            Event::Done | Event::NothingToDo | Event::DifferencesFound => self.undone(phase, why),
            Event::Failed { retryable: true } if self.tries < self.options.undo_retries => {
                self.tries += 1;
                Action::Undo(phase)
            }
            Event::Failed { retryable: true | false } | Event::TimedOut => {
                self.undo_failed.get_or_insert(phase);
                self.undone(phase, why)
            }
            // Its rules are known.
            Event::OldDaemonDied if why.is_some_and(|why| why.phase >= Phase::Arm) => {
                self.back(phase, Cause::OldDaemonDied)
            }
            Event::OldDaemonDied => {
                self.old_daemon_died = true;
                Action::Continue
            }
            // It is being undone already; the undo itself lets the lease, the flag and the new daemon go.
            Event::AbortRequested
            | Event::LeaseLost
            | Event::BoundByOther
            | Event::RestoreWaitRemoved
            | Event::NewDaemonDied => Action::Continue,
        }
    }

    fn on_going_back(&mut self, why: Why, event: Event) -> Action {
        match event {
            Event::Done | Event::NothingToDo | Event::DifferencesFound => {
                self.thaw_to(outcome(ExitCode::Back, format!("{why}; back on the old version")))
            }
            Event::Failed { retryable: true } | Event::TimedOut if self.tries < self.options.undo_retries => {
                self.tries += 1;
                Action::Back
            }
            Event::Failed { retryable: true | false } | Event::TimedOut => {
                self.thaw_to(outcome(ExitCode::NeedsPerson, format!("{why}, and the way back failed as well")))
            }
            Event::AbortRequested => Action::RefuseAbort,
            // Going back stops the new daemon, starts the old version, binds it and gives everything up.
            Event::LeaseLost
            | Event::BoundByOther
            | Event::RestoreWaitRemoved
            | Event::NewDaemonDied
            | Event::OldDaemonDied => Action::Continue,
        }
    }

    /// `then`: the end of the run, or `None` for Verify, which sees by itself what has become of the daemons.
    fn on_thawing(&mut self, then: Option<Outcome>, event: Event) -> Action {
        match event {
            Event::Done | Event::NothingToDo | Event::DifferencesFound => match then {
                Some(outcome) => self.finish(outcome),
                None => self.begin(Phase::Verify),
            },
            Event::Failed { retryable: true } if self.tries < self.options.undo_retries => {
                self.tries += 1;
                Action::Thaw
            }
            Event::Failed { retryable: true | false } | Event::TimedOut => self.finish(thaw_failed(then)),
            Event::AbortRequested => Action::RefuseAbort,
            Event::NewDaemonDied => match (then, self.back_why) {
                (Some(end), Some(why)) if end.exit_code == ExitCode::Back => self.back_died(why),
                // Verify sees it, or a person is told anyway.
                _ => Action::Continue,
            },
            Event::LeaseLost | Event::BoundByOther | Event::RestoreWaitRemoved | Event::OldDaemonDied => {
                Action::Continue
            }
        }
    }

    /// Whoever starts the next one by himself does not have the rules.
    fn back_died(&mut self, why: Why) -> Action {
        if self.backs_died >= self.options.undo_retries {
            let reason = format!("{why}, and the ovs-vswitchd that was started then dies again and again");
            return self.thaw_to(outcome(ExitCode::NeedsPerson, reason));
        }
        self.backs_died += 1;
        self.back(why.phase, why.cause)
    }

    fn begin(&mut self, phase: Phase) -> Action {
        self.tries = 0;
        self.state = State::Doing(phase);
        Action::Do(phase)
    }

    fn advance(&mut self, phase: Phase) -> Action {
        match phase.next() {
            Some(next) => self.begin(next),
            None => self.finish_forward(),
        }
    }

    fn turn(&mut self, phase: Phase, cause: Cause) -> Action {
        self.undo(phase, Some(Why { phase, cause }))
    }

    fn undo(&mut self, phase: Phase, why: Option<Why>) -> Action {
        self.tries = 0;
        self.state = State::Undoing { phase, why };
        Action::Undo(phase)
    }

    fn undone(&mut self, phase: Phase, why: Option<Why>) -> Action {
        match phase.previous() {
            Some(previous) => self.undo(previous, why),
            None => self.finish_undone(why),
        }
    }

    /// In SwitchPrepare the new daemon stands by and misses are parked: the end of the old one is what SwitchCommit
    /// would bring about, so that is the shortest gap. Before, its rules are known since Snapshot, and whoever restarts
    /// it by himself does not have them.
    fn old_daemon_died(&mut self, phase: Phase) -> Action {
        match phase {
            Phase::SwitchPrepare => {
                self.note(phase, Cause::OldDaemonDied);
                self.begin(Phase::SwitchCommit)
            }
            Phase::Arm | Phase::Standby => self.back(phase, Cause::OldDaemonDied),
            _ => {
                self.old_daemon_died = true;
                self.turn(phase, Cause::OldDaemonDied)
            }
        }
    }

    fn again_or_back(&mut self, phase: Phase, cause: Cause) -> Action {
        if self.tries >= self.options.retries {
            return self.back(phase, cause);
        }
        self.tries += 1;
        Action::Do(phase)
    }

    fn again_or_finish(&mut self, cause: Cause) -> Action {
        if self.tries >= self.options.retries {
            return self.finish_noting(cause);
        }
        self.tries += 1;
        Action::Do(Phase::Verify)
    }

    fn back(&mut self, phase: Phase, cause: Cause) -> Action {
        let why = Why { phase, cause };
        self.tries = 0;
        self.back_why = Some(why);
        self.state = State::GoingBack(why);
        Action::Back
    }

    fn gate_shut(&mut self, cause: Cause) -> Action {
        match self.options.gate_policy {
            GatePolicy::Proceed => {
                self.note(Phase::Gates, cause);
                self.advance(Phase::Gates)
            }
            GatePolicy::Back => self.back(Phase::Gates, cause),
        }
    }

    fn thaw_to_verify(&mut self, cause: Cause) -> Action {
        self.note(Phase::Settle, cause);
        self.tries = 0;
        self.state = State::ThawingToVerify;
        Action::Thaw
    }

    fn thaw_to(&mut self, outcome: Outcome) -> Action {
        self.tries = 0;
        self.state = State::ThawingToFinish(outcome);
        Action::Thaw
    }

    fn thaw_to_person(&mut self, phase: Phase, cause: Cause) -> Action {
        self.thaw_to(outcome(ExitCode::NeedsPerson, Why { phase, cause }.to_string()))
    }

    /// The freeze went while the run still counted on it: go on, and say so at the end.
    fn degraded(&mut self, phase: Phase) -> Action {
        self.note(phase, Cause::LeaseLost);
        Action::Continue
    }

    /// The first cause is the one that is told; the report has them all.
    fn note(&mut self, phase: Phase, cause: Cause) {
        self.differences.get_or_insert(Why { phase, cause });
    }

    fn finish_noting(&mut self, cause: Cause) -> Action {
        self.note(Phase::Verify, cause);
        self.finish_forward()
    }

    fn finish_forward(&mut self) -> Action {
        let end = match self.differences {
            None => outcome(ExitCode::Done, "done".into()),
            Some(why) => outcome(ExitCode::Differences, format!("done, but {why}")),
        };
        self.finish(end)
    }

    fn finish_undone(&mut self, why: Option<Why>) -> Action {
        let told = why.map_or_else(|| "nothing to do".to_string(), |why| why.to_string());
        if let Some(phase) = self.undo_failed {
            let reason = format!("{told}, and {}", Why { phase, cause: Cause::UndoFailed });
            return self.thaw_to(outcome(ExitCode::NeedsPerson, reason));
        }
        if self.old_daemon_died {
            let reason = format!("{told}; everything of this run is undone, the old daemon's end was not its doing");
            return self.thaw_to(outcome(ExitCode::NeedsPerson, reason));
        }
        self.finish(undone_outcome(why, told))
    }

    fn finish(&mut self, outcome: Outcome) -> Action {
        self.tries = 0;
        self.state = State::Finished(outcome.clone());
        Action::Finish(outcome)
    }
}

fn outcome(exit_code: ExitCode, reason: String) -> Outcome {
    Outcome { exit_code, reason }
}

fn undone_outcome(why: Option<Why>, told: String) -> Outcome {
    match why {
        None => outcome(ExitCode::Done, told),
        Some(Why { phase: Phase::Check, cause: Cause::Aborted | Cause::Interrupted }) => {
            outcome(ExitCode::Undone, format!("{told}; nothing was touched"))
        }
        Some(Why { phase: Phase::Check, .. }) => outcome(ExitCode::Refused, format!("{told}; nothing was touched")),
        Some(_) => outcome(ExitCode::Undone, format!("{told}; undone, traffic untouched")),
    }
}

/// The lease and the absolute end still lift the freeze; a person has to know that nothing else did.
fn thaw_failed(then: Option<Outcome>) -> Outcome {
    let told = then.map_or_else(|| "settle failed".to_string(), |outcome| outcome.reason);
    outcome(ExitCode::NeedsPerson, format!("{told}; thaw failed too, the freeze ends with its lease"))
}

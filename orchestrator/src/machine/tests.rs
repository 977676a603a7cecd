//! The table over every pair of state and event, and the ways through it.

use super::*;

const EVENTS: [Event; 12] = [
    Event::Done,
    Event::NothingToDo,
    Event::Failed { retryable: true },
    Event::Failed { retryable: false },
    Event::TimedOut,
    Event::AbortRequested,
    Event::LeaseLost,
    Event::BoundByOther,
    Event::RestoreWaitRemoved,
    Event::NewDaemonDied,
    Event::OldDaemonDied,
    Event::DifferencesFound,
];

/// One letter an answer, in the order of `EVENTS`:
/// `>` the next phase, `@` the same again, `u` undo this phase, `p` undo the phase before, `.` continue, `x` abort
/// refused, `B` back, `T` thaw, `v` verify, `0` `1` `2` `3` `4` finish with 0, 10, 20, 30, 40, `b` with 21.
const TABLE: &str = "
    # state             Done Noth FaiR FaiN Time Abrt Leas Boun RwRm NewD OldD Diff
    idle                 .    .    .    .    .    .    .    .    .    .    .    .
    check                >    u    u    u    u    u    .    .    .    .    u    u
    snapshot             >    >    u    u    u    u    .    .    .    .    u    u
    arm                  >    >    u    u    u    u    u    u    .    .    B    u
    standby              >    >    u    u    u    u    u    u    u    u    B    u
    switch-prepare       >    >    u    u    u    u    u    u    u    u    >    u
    switch-commit        >    >    @    B    B    x    .    B    .    B    .    >
    switch-commit-last   >    >    B    B    B    x    .    B    .    B    .    >
    restore              >    >    @    B    @    x    .    B    .    B    .    >
    restore-last         >    >    B    B    B    x    .    B    .    B    .    >
    handover             >    >    @    B    B    x    .    B    .    B    .    >
    handover-last        >    >    B    B    B    x    .    B    .    B    .    >
    gates                >    >    >    >    >    x    .    B    .    B    .    >
    gates-back           >    >    B    B    B    x    .    B    .    B    .    B
    settle               >    >    T    T    T    x    .    T    .    B    .    >
    verify               0    0    @    3    3    x    .    T    .    B    .    3
    verify-last          0    0    3    3    3    x    .    T    .    B    .    3
    undo-check           1    1    @    T    T    .    .    .    .    .    .    1
    undo-check-last      1    1    T    T    T    .    .    .    .    .    .    1
    undo-snapshot        p    p    @    p    p    .    .    .    .    .    .    p
    undo-arm             p    p    @    p    p    .    .    .    .    .    .    p
    undo-standby         p    p    @    p    p    .    .    .    .    .    .    p
    undo-switch-prepare  p    p    @    p    p    .    .    .    .    .    .    p
    undo-arm-last        p    p    p    p    p    .    .    .    .    .    .    p
    back                 T    T    @    T    @    x    .    .    .    .    .    T
    back-last            T    T    T    T    T    x    .    .    .    .    .    T
    thaw-verify          v    v    @    4    4    x    .    .    .    .    .    v
    thaw-verify-last     v    v    4    4    4    x    .    .    .    .    .    v
    thaw-finish          b    b    @    4    4    x    .    .    .    B    .    b
    thaw-finish-last     b    b    4    4    4    x    .    .    .    @    .    b
    finished             0    0    0    0    0    0    0    0    0    0    0    0
";

fn phase_named(name: &str) -> Option<Phase> {
    Phase::ALL.into_iter().find(|phase| serde_json::to_value(phase).unwrap() == name)
}

fn machine_in(row: &str) -> Machine {
    let mut machine = Machine::new(Options::default());
    let last = row.strip_suffix("-last");
    machine.tries = if last.is_some() { machine.options.retries } else { 0 };
    let why = Why { phase: Phase::Check, cause: Cause::Failed };
    (machine.back_why, machine.backs_died) = (Some(why), machine.tries);
    let back = Outcome { exit_code: ExitCode::Back, reason: "back".into() };
    let done = Outcome { exit_code: ExitCode::Done, reason: "done".into() };
    let name = last.unwrap_or(row);
    machine.state = match name {
        "idle" => State::Idle,
        "back" => State::GoingBack(why),
        "thaw-verify" => State::ThawingToVerify,
        "thaw-finish" => State::ThawingToFinish(back),
        "finished" => State::Finished(done),
        "gates-back" => {
            machine.options.gate_policy = GatePolicy::Back;
            State::Doing(Phase::Gates)
        }
        other => match other.strip_prefix("undo-") {
            Some(phase) => State::Undoing { phase: phase_named(phase).unwrap(), why: Some(why) },
            None => State::Doing(phase_named(other).unwrap_or_else(|| panic!("no state {other}"))),
        },
    };
    machine
}

/// The letter of `answer` when it was given in `before`.
fn letter(before: &State, answer: &Action) -> char {
    match (answer, before) {
        (Action::Do(Phase::Verify), State::ThawingToVerify) => 'v',
        (Action::Do(next), State::Doing(phase)) if phase.next() == Some(*next) => '>',
        (Action::Do(same), State::Doing(phase)) if phase == same => '@',
        (Action::Undo(this), State::Doing(phase)) if phase == this => 'u',
        (Action::Undo(this), State::Undoing { phase, .. }) if phase == this => '@',
        (Action::Undo(this), State::Undoing { phase, .. }) if phase.previous() == Some(*this) => 'p',
        (Action::Back, State::GoingBack(_)) => '@',
        (Action::Thaw, State::ThawingToVerify | State::ThawingToFinish(_)) => '@',
        (Action::Back, _) => 'B',
        (Action::Thaw, _) => 'T',
        (Action::Continue, _) => '.',
        (Action::RefuseAbort, _) => 'x',
        (Action::Finish(outcome), _) => match outcome.exit_code {
            ExitCode::Done => '0',
            ExitCode::Refused => '1',
            ExitCode::Busy => '!',
            ExitCode::Undone => '2',
            ExitCode::Back => 'b',
            ExitCode::Differences => '3',
            ExitCode::NeedsPerson => '4',
        },
        (Action::Do(_) | Action::Undo(_), _) => '?',
    }
}

fn rows() -> Vec<(String, Vec<char>)> {
    let lines = TABLE.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next().unwrap().to_string();
            (name, words.map(|word| word.chars().next().unwrap()).collect())
        })
        .collect()
}

#[test]
fn every_pair_of_state_and_event_answers_as_the_table_says() {
    let mut wrong = Vec::new();
    for (row, expected) in rows() {
        assert_eq!(expected.len(), EVENTS.len(), "row {row}");
        for (event, want) in EVENTS.into_iter().zip(expected) {
            let mut machine = machine_in(&row);
            let before = machine.state.clone();
            let answer = machine.on(event);
            let got = letter(&before, &answer);
            if got != want {
                wrong.push(format!("{row} × {event:?}: {want} expected, {got} = {answer:?}"));
            }
            if matches!(answer, Action::Continue | Action::RefuseAbort) {
                assert_eq!(machine.state, before, "{row} × {event:?} says nothing changes, but the state did");
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_has_every_phase_and_every_undo() {
    let names: Vec<String> = rows().into_iter().map(|(name, _)| name).collect();
    for phase in Phase::ALL {
        let name = serde_json::to_value(phase).unwrap();
        assert!(names.iter().any(|row| *row == name), "no row for {name}");
        let undo = format!("undo-{}", name.as_str().unwrap());
        assert_eq!(names.contains(&undo), !phase.past_no_return(), "{undo}");
    }
}

/// Runs until the end, answering `Done` to everything but what `answer` says.
fn run(options: Options, mut answer: impl FnMut(&Action) -> Option<Event>) -> (Vec<Action>, Outcome) {
    let mut machine = Machine::new(options);
    let mut action = machine.start();
    let mut seen = Vec::new();
    for _ in 0..200 {
        if let Action::Finish(outcome) = action {
            return (seen, outcome);
        }
        let event = answer(&action).unwrap_or(Event::Done);
        if !matches!(action, Action::Continue | Action::RefuseAbort) {
            seen.push(action);
        }
        action = machine.on(event);
    }
    panic!("the run does not end: {seen:?}");
}

fn undos(from: Phase) -> Vec<Action> {
    let mut begun: Vec<Action> = Phase::ALL.into_iter().filter(|p| *p <= from).map(Action::Undo).collect();
    begun.reverse();
    begun
}

#[test]
fn a_run_without_trouble_does_every_phase_once_in_order() {
    let (seen, outcome) = run(Options::default(), |_| None);
    assert_eq!(seen, Phase::ALL.map(Action::Do));
    assert_eq!(outcome.exit_code, ExitCode::Done);
}

#[test]
fn every_failure_before_the_point_of_no_return_undoes_all_that_was_begun() {
    for failed in Phase::ALL.into_iter().filter(|phase| !phase.past_no_return()) {
        for event in [Event::Failed { retryable: true }, Event::TimedOut, Event::AbortRequested] {
            let (seen, outcome) = run(Options::default(), |a| (*a == Action::Do(failed)).then_some(event));
            let tail = seen.iter().skip_while(|a| matches!(a, Action::Do(_))).cloned().collect::<Vec<_>>();
            assert_eq!(tail, undos(failed), "{failed:?} {event:?}");
            let refused = failed == Phase::Check && event != Event::AbortRequested;
            let code = if refused { ExitCode::Refused } else { ExitCode::Undone };
            assert_eq!(outcome.exit_code, code, "{failed:?} {event:?}");
        }
    }
}

#[test]
fn an_undo_that_fails_does_not_keep_the_others_from_being_done() {
    for broken in Phase::ALL.into_iter().filter(|phase| !phase.past_no_return()) {
        let (seen, outcome) = run(Options::default(), |a| match a {
            Action::Do(Phase::SwitchPrepare) => Some(Event::TimedOut),
            Action::Undo(phase) if *phase == broken => Some(Event::Failed { retryable: false }),
            _ => None,
        });
        let tail = seen.iter().skip_while(|a| matches!(a, Action::Do(_))).cloned().collect::<Vec<_>>();
        let mut expected = undos(Phase::SwitchPrepare);
        expected.push(Action::Thaw);
        assert_eq!(tail, expected, "{broken:?}");
        assert_eq!(outcome.exit_code, ExitCode::NeedsPerson);
    }
}

#[test]
fn nothing_is_undone_after_the_point_of_no_return_and_going_back_always_thaws() {
    for failed in [Phase::SwitchCommit, Phase::Restore, Phase::Handover] {
        let (seen, outcome) =
            run(Options::default(), |a| (*a == Action::Do(failed)).then_some(Event::Failed { retryable: false }));
        assert!(!seen.iter().any(|a| matches!(a, Action::Undo(_))), "{seen:?}");
        assert_eq!(seen[seen.len() - 2..], [Action::Back, Action::Thaw]);
        assert_eq!(outcome.exit_code, ExitCode::Back);
    }
}

#[test]
fn restore_is_tried_again_a_bounded_number_of_times() {
    let options = Options { retries: 3, ..Options::default() };
    let (seen, outcome) = run(options, |a| (*a == Action::Do(Phase::Restore)).then_some(Event::TimedOut));
    assert_eq!(seen.iter().filter(|a| **a == Action::Do(Phase::Restore)).count(), 4);
    assert_eq!(outcome.exit_code, ExitCode::Back);
    let mut first = true;
    let (_, outcome) = run(options, |a| {
        let fails = *a == Action::Do(Phase::Restore) && std::mem::take(&mut first);
        fails.then_some(Event::Failed { retryable: true })
    });
    assert_eq!(outcome.exit_code, ExitCode::Done);
}

#[test]
fn abort_after_the_point_of_no_return_is_refused_and_the_run_goes_on() {
    let mut machine = Machine::new(Options::default());
    machine.start();
    while *machine.state() != State::Doing(Phase::SwitchCommit) {
        assert!(machine.can_abort());
        machine.on(Event::Done);
    }
    assert!(!machine.can_abort());
    assert_eq!(machine.on(Event::AbortRequested), Action::RefuseAbort);
    assert_eq!(machine.on(Event::Done), Action::Do(Phase::Restore));
}

#[test]
fn a_lost_lease_in_the_gap_goes_forward_and_ends_with_30() {
    let mut lost = false;
    let (seen, outcome) = run(Options::default(), |a| {
        let now = *a == Action::Do(Phase::Restore) && !std::mem::replace(&mut lost, true);
        now.then_some(Event::LeaseLost)
    });
    assert_eq!(seen, Phase::ALL.map(Action::Do));
    assert_eq!(outcome.exit_code, ExitCode::Differences);
    assert!(outcome.reason.contains("saw the freeze end"), "{}", outcome.reason);
}

#[test]
fn a_failed_settle_thaws_and_still_verifies() {
    let (seen, outcome) = run(Options::default(), |a| (*a == Action::Do(Phase::Settle)).then_some(Event::TimedOut));
    assert_eq!(seen[seen.len() - 2..], [Action::Thaw, Action::Do(Phase::Verify)]);
    assert_eq!(outcome.exit_code, ExitCode::Differences);
}

#[test]
fn nothing_to_do_ends_with_0_and_touches_nothing() {
    let (seen, outcome) = run(Options::default(), |a| (*a == Action::Do(Phase::Check)).then_some(Event::NothingToDo));
    assert_eq!(seen, [Action::Do(Phase::Check), Action::Undo(Phase::Check)]);
    assert_eq!(outcome.exit_code, ExitCode::Done);
}

#[test]
fn the_old_daemon_dying_by_itself_is_replaced_as_soon_as_its_rules_are_known() {
    let died = |during| move |a: &Action| (*a == Action::Do(during)).then_some(Event::OldDaemonDied);
    let (_, outcome) = run(Options::default(), died(Phase::Snapshot));
    assert_eq!(outcome.exit_code, ExitCode::NeedsPerson);
    for phase in [Phase::Arm, Phase::Standby] {
        let (seen, outcome) = run(Options::default(), died(phase));
        assert_eq!(seen[seen.len() - 2..], [Action::Back, Action::Thaw]);
        assert_eq!(outcome.exit_code, ExitCode::Back);
    }
    let (seen, outcome) = run(Options::default(), |a| match a {
        Action::Do(Phase::Standby) => Some(Event::TimedOut),
        Action::Undo(Phase::Arm) => Some(Event::OldDaemonDied),
        _ => None,
    });
    assert_eq!(seen[seen.len() - 2..], [Action::Back, Action::Thaw]);
    assert_eq!(outcome.exit_code, ExitCode::Back);
    let (seen, outcome) =
        run(Options::default(), |a| (*a == Action::Do(Phase::SwitchPrepare)).then_some(Event::OldDaemonDied));
    assert_eq!(seen, Phase::ALL.map(Action::Do));
    assert_eq!(outcome.exit_code, ExitCode::Differences);
}

#[test]
fn an_interrupted_run_is_undone_before_and_carried_on_after_the_point_of_no_return() {
    for phase in Phase::ALL {
        let (machine, action) = Machine::resume(Options::default(), phase);
        if phase.past_no_return() {
            assert_eq!(action, Action::Do(phase));
        } else {
            assert_eq!(action, Action::Undo(phase));
        }
        assert!(!machine.can_abort());
    }
}

#[test]
fn whatever_happens_the_run_ends() {
    // Every event in every phase, again and again: no pair of them makes the run go round for ever.
    for event in EVENTS {
        for stubborn in Phase::ALL {
            let mut left = 3;
            run(Options::default(), |a| {
                let hit = *a == Action::Do(stubborn) && left > 0;
                left -= i32::from(hit);
                hit.then_some(event)
            });
        }
    }
}

#[test]
fn exit_codes_are_those_of_the_design() {
    let codes: Vec<u8> = ExitCode::ALL.into_iter().map(ExitCode::code).collect();
    assert_eq!(codes, [0, 10, 11, 20, 21, 30, 40]);
    for code in ExitCode::ALL {
        assert_eq!(ExitCode::try_from(code.code()), Ok(code));
    }
    assert!(ExitCode::try_from(2).is_err());
}

//! The supervisor: does what the machine says, step by step, and tells it what became of it.

#[cfg(test)]
mod simulation;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context};

use crate::check::check_without_host;
use crate::cli::SuperviseArgs;
use crate::config::Config;
use crate::control::{Control, Holder, LockError, Progress, RunLock, Server, LOCK, SOCKET};
use crate::host::clock::{unix_ms, Clock};
use crate::host::real::limits::raise_descriptors;
use crate::host::real::systemd::inherited;
use crate::host::real::RealClock;
use crate::journal::{Runs, STATE_DIR};
use crate::machine::{Action, Event, ExitCode, Machine, Outcome, Phase};
use crate::recovery::{self, Recorder, BACK};
use crate::report::{CheckReport, Level, Report, Strategy};
use crate::steps::{go_back, step, Ended, Host, Known, Run, Stop, Wish};

#[cfg(feature = "chaos")]
use crate::chaos;

/// Nothing is thrown into a run but by tests.
#[cfg(not(feature = "chaos"))]
mod chaos {
    use super::{Phase, Run, Stop};

    pub fn before(_run: &mut Run, _phase: Phase) -> Result<(), Stop> {
        Ok(())
    }

    pub fn after(_run: &mut Run, _phase: Phase) -> Result<(), Stop> {
        Ok(())
    }
}

/// Does the run of `args` and returns its exit code.
///
/// # Errors
/// Only where the run could not even begin (lock, socket); what happens later is in the report.
pub fn supervise(args: SuperviseArgs) -> anyhow::Result<i32> {
    raise_descriptors();
    if let Some(code) = take_up(&args.id, &args.config)? {
        return Ok(code);
    }
    let mut config = Config::load(&args.config)?;
    let gate_command =
        args.gate_command.clone().or_else(|| Some(config.gates.command.clone())).filter(|command| !command.is_empty());
    let wish = Wish {
        strategy: args.strategy,
        ovsdb: !args.no_ovsdb,
        if_needed: args.if_needed,
        gate_command,
        called_by: args.called_by.clone(),
        elsewhere: args.elsewhere,
    };
    // systemd, too, may have ovsdb-server to start before.
    let by_its_unit = wish.called_by.is_some() && wish.strategy == Strategy::StopStart;
    if wish.elsewhere || by_its_unit {
        config.limits.with_restart_elsewhere();
    }
    let code = run_to_the_end(&args.id, wish, config, args.report)?;
    Ok(code.code().into())
}

/// systemd has started this process in place of a supervisor of this run that died: what that left is finished or
/// undone. `None` where the run has not begun.
fn take_up(id: &str, config: &Path) -> anyhow::Result<Option<i32>> {
    let runs = Runs::default();
    if !runs.ids()?.iter().any(|begun| begun == id) {
        return Ok(None);
    }
    if runs.is_over(id) {
        return Ok(Some(runs.report(id)?.exit_code.code().into()));
    }
    protect();
    // What is parked does not wait for a key to be spelt right.
    let (config, error) = Config::load_or_default(config);
    error.iter().for_each(|error| tracing::warn!("{error}: taking the defaults"));
    recovery::recover(&config, inherited()).map(Some)
}

/// Looks at the host; touches nothing.
///
/// # Errors
/// None today: what cannot be looked at is a finding.
pub fn check(config: &Config, strategy: Strategy, elsewhere: bool) -> anyhow::Result<CheckReport> {
    let mut host = match Host::real(config) {
        Ok(host) => host,
        Err(error) => return Ok(check_without_host(&error)),
    };
    let ovsdb = !elsewhere;
    let wish = Wish { strategy, ovsdb, if_needed: false, gate_command: None, called_by: None, elsewhere };
    let mut checked = crate::check::check(&mut host, &wish, Instant::now() + config.limits.of(Phase::Check));
    // A run does this in Snapshot, with the rules that it will put back.
    crate::check::check_rules(&host, &mut checked, Instant::now() + config.limits.of(Phase::Snapshot));
    Ok(checked.report)
}

/// Finishes or undoes an interrupted run and returns the exit code.
///
/// # Errors
/// As [`recovery::recover`].
pub fn recover(config: &Config) -> anyhow::Result<i32> {
    raise_descriptors();
    recovery::recover(config, Vec::new())
}

/// The emergency thaw where no supervisor lives; returns the exit code.
///
/// # Errors
/// As [`recovery::thaw`].
pub fn thaw(config: &Config) -> anyhow::Result<i32> {
    raise_descriptors();
    recovery::thaw(config)
}

fn run_to_the_end(id: &str, wish: Wish, config: Config, copy_to: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    let lock = RunLock::acquire(Path::new(LOCK), &Holder { id: id.to_owned(), pid: std::process::id() });
    let _lock = match lock {
        Ok(lock) => lock,
        Err(held @ LockError::Held { .. }) => {
            eprintln!("{held}");
            return Ok(ExitCode::Busy);
        }
        Err(error) => return Err(error.into()),
    };
    protect();
    let control = Server::bind(Path::new(SOCKET), id).with_context(|| format!("cannot listen on {SOCKET}"))?;
    let from = Beginning {
        id: id.to_owned(),
        wish,
        config,
        copy_to,
        runs: Runs::default(),
        control: Box::new(control),
        clock: Arc::new(RealClock),
    };
    Ok(whole_run(from, Host::real).0)
}

/// What a run begins with.
struct Beginning {
    id: String,
    wish: Wish,
    config: Config,
    /// Where the report goes besides the run's folder.
    copy_to: Option<PathBuf>,
    runs: Runs,
    control: Box<dyn Control>,
    clock: Arc<dyn Clock>,
}

/// The run, from opening its journal to telling its end.
fn whole_run(from: Beginning, host: impl FnOnce(&Config) -> anyhow::Result<Host>) -> (ExitCode, Report) {
    let Beginning { id, wish, config, copy_to, runs, control, clock } = from;
    let config_keep = config.run.keep;
    let started = clock.now();
    let mut report = Report::new(&id, wish.strategy, unix_ms());
    let opened = open_journal(&runs, &id, &config, clock.as_ref());
    let ready = opened.and_then(|journal| match host(&config) {
        Ok(host) => Ok((journal, host)),
        Err(error) => {
            // As `ovs-graceful check` lists it.
            report.findings = check_without_host(&error).findings;
            report.level = Some(Level::None);
            Err(error)
        }
    });
    let (outcome, control) = match ready {
        Ok((journal, host)) => {
            let mut run = new_run(&id, wish, config, host, report, control, runs.clone());
            let outcome = drive(&mut run, journal, started);
            report = run.report;
            (outcome, run.control)
        }
        Err(error) => (Outcome { exit_code: ExitCode::Refused, reason: format!("{error:#}") }, control),
    };
    report.finish(&outcome, clock.now().saturating_duration_since(started).as_millis() as u64);
    copy(copy_to.as_deref(), &mut report);
    keep(&runs, &id, &mut report);
    runs.note_end(&report);
    runs.retain(config_keep);
    if outcome.exit_code != ExitCode::NeedsPerson {
        runs.clear_memory(&id);
    }
    if !matches!(outcome.exit_code, ExitCode::NeedsPerson | ExitCode::Back) {
        runs.drop_program(&id);
    }
    control.tell(&Progress::Finished { exit_code: outcome.exit_code.code(), report: Box::new(report.clone()) });
    control.close(Duration::from_secs(5));
    (outcome.exit_code, report)
}

/// A run that cannot be written down cannot be recovered: it must not begin.
fn open_journal(runs: &Runs, id: &str, config: &Config, clock: &dyn Clock) -> anyhow::Result<Recorder> {
    runs.clear_left_over()?;
    if let Some(other) = runs.interrupted()? {
        return Err(anyhow!("run {other} was cut off and has to be undone or finished first; `ovs-graceful recover`"));
    }
    let opened = runs.create(id, config.run.keep).and_then(|_| Recorder::open(runs, id, clock));
    opened.map_err(|error| {
        // Without a journal there is nothing to recover.
        runs.forget(id);
        error.context(format!("no journal can be kept; make {STATE_DIR} writable and free some space there"))
    })
}

fn new_run(
    id: &str,
    wish: Wish,
    config: Config,
    host: Host,
    report: Report,
    control: Box<dyn Control>,
    runs: Runs,
) -> Run {
    let machine = Machine::new(config.machine_options());
    let now = host.clock.now();
    Run {
        id: id.to_owned(),
        wish,
        level: Level::None,
        config,
        runs,
        host,
        known: Known::default(),
        report,
        control,
        machine,
        restore_wait: None,
        deadline: now,
        looked: now,
    }
}

/// Does what the machine says until the run is over.
fn drive(run: &mut Run, mut journal: Recorder, started: Instant) -> Outcome {
    let mut action = run.machine.start();
    loop {
        action = match action {
            Action::Finish(outcome) => {
                note_refused(run);
                return outcome;
            }
            action => advance(run, &mut journal, action, started),
        };
    }
}

/// However the run has ended: what the freeze refused, and whether it can have missed any, is in its report.
fn note_refused(run: &mut Run) {
    match run.host.datapath.refused() {
        Ok(refused) => run.report.refused = refused,
        Err(error) => run.warn(format!("what the freeze refused is not known: {error}")),
    }
    let warning = match run.host.datapath.skipped() {
        Ok(skipped) => run.report.freeze_skipped(skipped),
        Err(error) => Some(format!("how often the kernel passed over the freeze is not known: {error}")),
    };
    if let Some(warning) = warning {
        run.warn(warning);
    }
}

/// Does what the machine says, and answers what it says next.
fn advance(run: &mut Run, journal: &mut Recorder, action: Action, started: Instant) -> Action {
    match action {
        Action::Finish(outcome) => Action::Finish(outcome),
        Action::Do(phase) => perform(run, journal, phase, started),
        Action::Undo(phase) => undo(run, journal, phase),
        Action::Back => back(run, journal, started),
        Action::Thaw => {
            let ended = crate::steps::thaw(run).map_err(Stop::retryable);
            // Its last look, where the run is not to end with Verify.
            let ended = ended.and_then(|event| run.checkpoint().map(|()| event));
            told(run, "thaw", ended)
        }
        // The machine answers these while a step is under way only; a step has just ended here.
        Action::Continue | Action::RefuseAbort => run.machine.on(Event::Failed { retryable: false }),
    }
}

fn perform(run: &mut Run, journal: &mut Recorder, phase: Phase, started: Instant) -> Action {
    let begun = run.now();
    let at_ms = begun.duration_since(started).as_millis() as u64;
    run.control.tell(&Progress::PhaseBegun { phase, at_ms });
    let step = step(phase);
    run.deadline = begun + step.limit(&run.config);
    let written = intent(run, journal, phase, phase.name());
    let ended = written
        .and_then(|()| run.checkpoint())
        .and_then(|()| chaos::before(run, phase))
        .and_then(|()| step.perform(run))
        .and_then(|event| chaos::after(run, phase).map(|()| event));
    done_if_well(run, journal, phase, phase.name(), &ended);
    let duration_ms = run.now().saturating_duration_since(begun).as_millis() as u64;
    run.report.phase(phase, at_ms, duration_ms);
    let ok = matches!(ended, Ok(Event::Done | Event::NothingToDo));
    run.control.tell(&Progress::PhaseEnded { phase, duration_ms, ok });
    told(run, phase.name(), ended)
}

/// What is not written down must not be done, unless not going on would be worse.
fn intent(run: &mut Run, journal: &mut Recorder, phase: Phase, step: &str) -> Result<(), Stop> {
    match journal.intent(run, phase, step) {
        Err(error) if !phase.past_no_return() => Err(error.into()),
        written => {
            unless_written(run, written);
            Ok(())
        }
    }
}

/// What failed is not written down as done: a recovery would build on it.
fn done_if_well(run: &mut Run, journal: &mut Recorder, phase: Phase, step: &str, ended: &Ended) {
    if ended.is_ok() {
        let written = journal.done(run, phase, step);
        unless_written(run, written);
    }
}

fn unless_written(run: &mut Run, written: anyhow::Result<()>) {
    if let Err(error) = written {
        run.warn(format!("journal: {error:#}"));
    }
}

fn undo(run: &mut Run, journal: &mut Recorder, phase: Phase) -> Action {
    run.control.tell(&Progress::Undoing { phase });
    run.deadline = run.now() + run.config.limits.undo();
    let ended = step(phase).undo(run).map_err(Stop::retryable);
    if ended.is_ok() {
        let written = journal.undone(phase);
        unless_written(run, written);
    }
    // Nothing else asks on the way back.
    if run.known.old.as_ref().is_some_and(|old| !run.host.daemons.is_alive(old.id)) {
        if let Err(Stop::CutOff(action)) = run.tell_machine(Event::OldDaemonDied) {
            return action;
        }
    }
    told(run, phase.name(), ended)
}

fn back(run: &mut Run, journal: &mut Recorder, started: Instant) -> Action {
    let begun = run.now();
    let why = run.report.warnings.last().cloned().unwrap_or_default();
    run.control.tell(&Progress::GoingBack { why });
    run.deadline = begun + run.config.limits.back();
    let written = journal.intent(run, Phase::SwitchCommit, BACK);
    unless_written(run, written);
    let ended = go_back(run).map_err(Stop::retryable);
    done_if_well(run, journal, Phase::SwitchCommit, BACK, &ended);
    run.report.phase_named(
        BACK,
        begun.duration_since(started).as_millis() as u64,
        run.now().saturating_duration_since(begun).as_millis() as u64,
    );
    told(run, BACK, ended)
}

/// Tells the machine how an action ended.
fn told(run: &mut Run, name: &str, ended: Ended) -> Action {
    match ended {
        Ok(event) => run.machine.on(event),
        Err(Stop::CutOff(action)) => action,
        Err(Stop::Refused) => because(run, Event::Failed { retryable: false }),
        Err(Stop::TimedOut(what)) => {
            run.warn(format!("{name}: waited too long for {what}"));
            because(run, Event::TimedOut)
        }
        Err(Stop::Failed { error, retryable }) => {
            run.warn(format!("{name}: {error:#}"));
            because(run, Event::Failed { retryable })
        }
    }
}

/// A step may fail because of what the machine would rather hear of itself, such as the end of a daemon.
fn because(run: &mut Run, event: Event) -> Action {
    match run.checkpoint() {
        Err(Stop::CutOff(action)) => action,
        Ok(()) | Err(Stop::Failed { .. } | Stop::TimedOut(_) | Stop::Refused) => run.machine.on(event),
    }
}

/// The copy that was asked for: where it cannot be written the run has ended as it has, and says so.
fn copy(to: Option<&Path>, report: &mut Report) {
    if let Some(Err(error)) = to.map(|to| report.write(to)) {
        tracing::warn!("{error:#}");
        report.warnings.push(format!("{error:#}; remedy: `ovs-graceful runs show {} --json`", report.id));
    }
}

/// The report must outlive this process; where it cannot be written, the client still gets it.
fn keep(runs: &Runs, id: &str, report: &mut Report) {
    let kept = runs.keep_report(id, report);
    if let Err(error) = kept {
        tracing::warn!("the report was not kept: {error:#}");
    }
}

/// Between Switch and Handover nothing may wait for a disk, and nobody may be killed for his memory.
fn protect() {
    protect_from_paging_and_oom();
    if let Err(errno) = forbid_core_dumps() {
        tracing::warn!("a core dump of this process would hold the parked packets ({errno})");
    }
}

/// What is parked are other people's packets: no core dump of this process may hold them, whatever its limit is and
/// wherever it would go. The daemons that are started from here get theirs again when they are executed.
fn forbid_core_dumps() -> nix::Result<()> {
    nix::sys::prctl::set_dumpable(false)
}

fn protect_from_paging_and_oom() {
    use nix::sys::mman::{mlockall, MlockAllFlags};
    if let Err(errno) = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE) {
        tracing::warn!("memory is not locked ({errno}); raise the limit of locked memory");
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!("not protected from the OOM killer: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gets_a_core_dump_of_what_is_parked() {
        forbid_core_dumps().unwrap();
        let dumpable = nix::sys::prctl::get_dumpable();
        nix::sys::prctl::set_dumpable(true).unwrap();
        assert_eq!(dumpable, Ok(false));
    }
}

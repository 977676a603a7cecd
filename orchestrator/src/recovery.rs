//! Finishes or undoes a run whose supervisor has gone: killed, crashed, or the machine went down.
//!
//! Each step collects its errors and goes on: at the end nothing is frozen, no flow-restore-wait of ours is set, and
//! one ovs-vswitchd that lives is bound to the upcalls, or the report says what is left to a person. All of it may be
//! done twice, and may itself be cut off.

mod plan;
mod record;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, Context};
use dpfreeze::freeze::{self, Captured, Classes};
use dpfreeze::ovs::Dispatch;
use dpfreeze::park::ReplayReport;

use crate::config::Config;
use crate::control::{Holder, LockError, RunLock, LOCK};
use crate::host::clock::{unix_ms, Clock};
use crate::host::database_disk;
use crate::host::real::assemble::DATABASE_SOCKET;
use crate::host::real::openflow::compare;
use crate::host::real::procfs::own_program;
use crate::host::real::{fragments, RealClock, RealDaemons, Systemd};
use crate::host::{
    complete_job, BridgeRules, Cleared, Daemon, DaemonKind, Daemons as _, Database, DatabaseFacts, GuardUnits, JobKind,
    ProcessId, RefusedRule, ServiceManager, Signal, DATABASE_UNIT, OVN_MANAGED_ASIDE, SWITCH_UNIT,
};
use crate::journal::{Entry, Runs};
use crate::machine::{ExitCode, Outcome};
use crate::report::{Report, Strategy};
use crate::steps::{by_hand, log_levels, losses, make_ready_for_a_daemon, mtus_put_back, notes, Host};

pub use plan::{plan, Alive, Plan, BACK};
pub use record::{Mark, Recorder};

/// What a recovery says of itself in the lock, where a run has its id.
pub const RECOVERY: &str = "recover";

/// Within what systemd gives an ExecStopPost= (90 s unless it was changed).
const LIMIT: Duration = Duration::from_secs(80);
/// How long a daemon may take to end when asked to.
const END_LIMIT: Duration = Duration::from_secs(3);
/// How long a daemon may take to have its bridges, or to be in step with the database.
const READY_LIMIT: Duration = Duration::from_secs(20);
/// How long a daemon that may bind its upcalls takes to do so.
const BIND_LIMIT: Duration = Duration::from_secs(3);
/// How long a daemon that is in step may take to say so, before it is asked once more.
const IN_STEP_LIMIT: Duration = Duration::from_secs(5);
/// How long the removal of flow-restore-wait is tried, without which nobody is bound.
const CLEAR_LIMIT: Duration = Duration::from_secs(30);
/// How long anything else may take.
const SHORT: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Finishes or undoes the run that was interrupted, if there is one; with what its supervisor had
/// [kept](crate::host::ServiceManager::keep), where that is at hand. Returns the exit code: 0 nothing to do, 11 a run
/// is under way, 20 undone, 21 gone forward, 30 the run was over but for its last look, 40 needs a person.
///
/// # Errors
/// Where the lock cannot be taken or past runs cannot be listed.
pub fn recover(config: &Config, kept: Vec<(String, OwnedFd)>) -> anyhow::Result<i32> {
    let runs = Runs::default();
    let lock = RunLock::acquire(Path::new(LOCK), &Holder { id: RECOVERY.to_owned(), pid: std::process::id() });
    let _lock = match lock {
        Ok(lock) => lock,
        Err(held @ LockError::Held { .. }) => {
            eprintln!("{held}");
            return Ok(ExitCode::Busy.code().into());
        }
        Err(error) => return Err(error.into()),
    };
    let database = Host::real_database();
    let recovered =
        recover_interrupted(&runs, config, Arc::new(RealClock), database.as_ref(), kept, || Host::real(config))?;
    if let Err(error) = fragments::come_as_before() {
        eprintln!("net.ipv4.ipfrag_max_dist is not put back: {error}");
    }
    // Whether or not there was a run: a flag of ours that nobody looks after any more goes.
    let tidied = tidy_database(database.as_ref(), &RealClock);
    let well = tidied.is_ok();
    match tidied {
        Ok(lines) => lines.iter().for_each(|line| println!("{line}")),
        Err(error) => eprintln!("{error:#}"),
    }
    let Some(report) = recovered else { return Ok(if well { 0 } else { ExitCode::NeedsPerson.code().into() }) };
    println!("run {} was cut off", report.id);
    let needs_person = report.exit_code == ExitCode::NeedsPerson;
    for line in report.warnings.iter().chain([&report.reason]) {
        match needs_person {
            true => eprintln!("{line}"),
            false => println!("{line}"),
        }
    }
    let code = if well { report.exit_code } else { ExitCode::NeedsPerson };
    Ok(code.code().into())
}

/// Why the host is not well, where no run is under way and none was cut off: something is frozen, flow-restore-wait is
/// set, or no single ovs-vswitchd is bound to the upcalls. Each with its remedy; touches nothing.
pub fn what_is_wrong(config: &Config) -> Vec<String> {
    let mut wrong = Vec::new();
    match freeze::state() {
        Ok(state) if state.as_ref().is_some_and(|state| state.armed) => {
            wrong.push("something is frozen without a run; remedy: `ovs-graceful thaw`".to_owned());
        }
        Ok(_) => {}
        Err(error) => wrong.push(format!("what is frozen is not known: {error}")),
    }
    match Host::real_database().facts(Instant::now() + SHORT) {
        Ok(facts) if facts.is_restore_wait_stuck() => wrong.push(FOREIGN_FLAG.to_owned()),
        Ok(_) => {}
        Err(error) => wrong.push(format!("the database does not answer: {error}")),
    }
    if let Err(error) = Host::real(config).and_then(|mut host| prove_bound(&mut host)) {
        wrong.push(format!("{error:#}; remedy: start Open vSwitch again (`systemctl restart openvswitch-switch`)"));
    }
    wrong
}

/// The ovs-vswitchd that the upcalls go to; none where no bridge was made, and nothing is to be bound.
fn bound_daemon(host: &mut Host) -> anyhow::Result<Option<Daemon>> {
    if !host.datapath.is_there()? {
        return Ok(None);
    }
    let bound = host.datapath.upcall_port_ids()?;
    Ok(Some(host.daemons.find_vswitchd(&bound)?))
}

/// It is bound, and the only one.
fn prove_bound(host: &mut Host) -> anyhow::Result<()> {
    bound_daemon(host)?;
    match host.daemons.find_all(DaemonKind::OvsVswitchd)?.len() {
        0 | 1 => Ok(()),
        several => bail!("{several} ovs-vswitchd run, and one may"),
    }
}

/// What is told of a flow-restore-wait without our mark.
const FOREIGN_FLAG: &str =
    "flow-restore-wait is set, and not by us: an ovs-vswitchd that starts with it answers no misses; \
     remedy, if nobody is restoring flows: `ovs-vsctl remove open_vswitch . other_config flow-restore-wait`";

/// Where systemd listens for ovsdb-server, which does not run, a question would start it. Nobody has asked for that.
fn would_start_database() -> bool {
    RealDaemons::new(DATABASE_SOCKET).would_start_database()
}

/// A flow-restore-wait that is somebody else's, in words; none where the database cannot be asked.
pub fn foreign_flag() -> Option<&'static str> {
    if would_start_database() {
        return None;
    }
    told_of_flag(&Host::real_database().facts(Instant::now() + SHORT).ok()?)
}

fn told_of_flag(facts: &DatabaseFacts) -> Option<&'static str> {
    (facts.is_restore_wait_stuck() && !facts.external_ids.contains_key(MARK)).then_some(FOREIGN_FLAG)
}

/// Is there a flow-restore-wait with our mark? False where the database cannot be asked.
pub fn is_marked() -> bool {
    let is_marked =
        |facts: DatabaseFacts| [MARK, OVN_MANAGED_ASIDE].iter().any(|key| facts.external_ids.contains_key(*key));
    !would_start_database() && Host::real_database().facts(Instant::now() + SHORT).is_ok_and(is_marked)
}

/// Finishes or undoes the run that has no report yet, if there is one: it is over once it has.
pub(crate) fn recover_interrupted(
    runs: &Runs,
    config: &Config,
    clock: Arc<dyn Clock>,
    database: &dyn Database,
    kept: Vec<(String, OwnedFd)>,
    host: impl FnOnce() -> anyhow::Result<Host>,
) -> anyhow::Result<Option<Report>> {
    let Some(id) = runs.interrupted()? else {
        runs.clear_left_over()?;
        return Ok(None);
    };
    let begun = clock.now();
    let mut recovery = Recovery { kept, ..Recovery::new(runs, &id, config, clock) };
    let outcome = recovery.run(database, host);
    let duration = recovery.clock.now().saturating_duration_since(begun);
    let mut report = recovery.report;
    report.warnings.extend(recovery.errors);
    // From the start of the run, not of its recovery: `started_ms` and this tell when it ended.
    let whole = unix_ms().saturating_sub(report.started_ms).max(duration.as_millis() as u64);
    report.finish(&outcome, whole);
    runs.keep_report(&id, &mut report)?;
    runs.note_end(&report);
    runs.clear_memory(&id);
    if report.exit_code == ExitCode::Undone {
        runs.drop_program(&id);
    }
    Ok(Some(report))
}

/// Removes a flow-restore-wait with our mark, whichever run it is of, and what lies beside the database; a database that
/// is served from memory goes back to its disk. Returns what was done. The caller has the run lock.
///
/// # Errors
/// Where something of it is left: a database that cannot be asked, a disk that cannot be written.
pub(crate) fn tidy_database(database: &dyn Database, clock: &dyn Clock) -> anyhow::Result<Vec<String>> {
    let until = clock.now() + SHORT;
    let mut told = Vec::new();
    if let Some(run) = database.facts(until).context("flow-restore-wait was not looked at")?.external_ids.get(MARK) {
        let mut measures = Vec::new();
        let cleared = database_disk::write(database, clock, until, &mut measures, || database.clear_all(run, until));
        told.extend(measures);
        match cleared.with_context(|| format!("flow-restore-wait of run {run} is not removed"))? {
            Cleared::Removed { .. } | Cleared::AlreadyGone => {
                told.push(format!("flow-restore-wait of run {run} is removed"));
            }
            Cleared::NotOurs => {}
        }
    }
    let returned = database.return_ovn_wait(until);
    if database.drop_ballast()? {
        told.push("the room that was kept beside the database is free again".into());
    }
    let written = database.write_back(until);
    if written.is_err() {
        told.push(database_disk::in_memory());
    }
    if written.with_context(|| told.join("; "))? {
        told.push("the database is on its disk again".into());
    }
    returned.context("the flow-restore-wait of ovn-controller is not put back")?;
    Ok(told)
}

/// What a run can leave in the database and beside it is removed, where this host has a database that answers. The lock
/// of runs is taken where there is something to do: this is also asked after every run, and a run may be about to begin.
///
/// # Errors
/// As there, and where the lock cannot be taken.
pub fn tidy() -> anyhow::Result<Vec<String>> {
    fragments::come_as_before().context("net.ipv4.ipfrag_max_dist is not put back")?;
    if would_start_database() {
        return Ok(Vec::new());
    }
    let database = Host::real_database();
    match database.has_left_over() {
        Err(error) if error.away => return Ok(Vec::new()),
        Ok(false) if !is_marked() => return Ok(Vec::new()),
        Ok(_) | Err(_) => {}
    }
    let _lock = RunLock::acquire(Path::new(LOCK), &Holder { id: RECOVERY.to_owned(), pid: std::process::id() })?;
    tidy_database(database.as_ref(), &RealClock)
}

/// The timer that looks whether the disk of a database in memory can be written, and its service.
const DATABASE_TIMER: &str = "ovs-graceful-database.timer";
const DATABASE_SERVICE: &str = "ovs-graceful-database.service";
/// From one look to the next.
const DATABASE_INTERVAL: Duration = Duration::from_secs(30);

/// Has the service manager try again and again to bring the database back to its disk. Where there is none, a person does
/// that (`ovs-graceful recover`).
pub(crate) fn look_after_database(services: &dyn ServiceManager) -> anyhow::Result<()> {
    if !services.is_running() {
        return Ok(());
    }
    let units = GuardUnits {
        timer: DATABASE_TIMER.to_owned(),
        service: DATABASE_SERVICE.to_owned(),
        command: vec![own_program()?, "hook".to_owned(), "write-back".to_owned()],
        interval: DATABASE_INTERVAL,
        limit: SHORT + SHORT,
        confined: false,
    };
    Ok(services.start_guard(&units, Instant::now() + SHORT)?)
}

/// `hook write-back`: one try, which ends the timer where there is nothing left to do.
///
/// # Errors
/// Where the database stays in memory, or a run or another recovery is under way.
pub fn write_back() -> anyhow::Result<()> {
    let _lock = RunLock::acquire(Path::new(LOCK), &Holder { id: RECOVERY.to_owned(), pid: std::process::id() })?;
    let database = Host::real_database();
    if database.write_back(Instant::now() + SHORT).with_context(database_disk::in_memory)? {
        println!("the database is on its disk again");
    }
    database.drop_ballast()?;
    Ok(Systemd::default().end_guard(DATABASE_TIMER, Instant::now() + SHORT)?)
}

/// The emergency thaw without a supervisor. Returns the exit code: 0 done, 40 needs a person.
///
/// # Errors
/// Where the freeze cannot be lifted.
pub fn thaw(config: &Config) -> anyhow::Result<i32> {
    let holder = RunLock::holder(Path::new(LOCK))?;
    if holder.is_none() && Runs::default().interrupted()?.is_some() {
        let code = recover(config, Vec::new())?;
        let well = [ExitCode::Undone, ExitCode::Back, ExitCode::Differences].map(|code| i32::from(code.code()));
        return Ok(if well.contains(&code) { 0 } else { code });
    }
    freeze::thaw()?;
    fragments::come_as_before().context("net.ipv4.ipfrag_max_dist is not put back")?;
    crate::guard::release()?;
    println!("thaw: nothing is frozen any more, and no timeout policy guarded");
    if holder.is_none() && freeze::Families::resolve()?.datapath == 0 {
        println!("thaw: the kernel has no Open vSwitch datapath: nothing is bound to it");
        return Ok(0);
    }
    if let Some(holder) = holder {
        bail!(
            "the supervisor of run {} (process {}) lives and does not answer; remedy: `kill -KILL {}`, and `ovs-graceful \
             recover` where systemd does not run it by itself",
            holder.id,
            holder.pid,
            holder.pid
        );
    }
    let mut host = Host::real(config)?;
    let until = Instant::now() + SHORT;
    let facts = host.database.facts(until)?;
    if facts.external_ids.contains_key(MARK) {
        tidy_database(host.database.as_ref(), &RealClock)?.iter().for_each(|line| println!("thaw: {line}"));
    }
    if let Some(told) = told_of_flag(&facts) {
        bail!(told);
    }
    match bound_daemon(&mut host)? {
        Some(daemon) => println!("thaw: ovs-vswitchd (process {}) is bound to the upcalls", daemon.id.pid),
        None => println!("thaw: there is no kernel datapath: nothing is bound to it"),
    }
    Ok(0)
}

/// The key of `external_ids` that says whose flow-restore-wait it is.
pub const MARK: &str = "ovs-graceful-run";

/// A recovery under way.
struct Recovery {
    runs: Runs,
    id: String,
    clock: Arc<dyn Clock>,
    /// When this attempt must have ended.
    end: Instant,
    /// `restore.flow_limit` of the configuration.
    flow_limit: u32,
    report: Report,
    errors: Vec<String>,
    /// What the dead supervisor had kept, until it is taken up.
    kept: Vec<(String, OwnedFd)>,
    /// Its parked packets are ours.
    parked: bool,
    /// Who took over.
    survivor: Option<ProcessId>,
    /// The run had settled: the daemon that took over had its rules, and they are its owners' since.
    settled: bool,
    /// Rules that could not be put back.
    refused: Vec<RefusedRule>,
    /// What a survivor had asked to be bound to when it was refused.
    captured: Option<Captured>,
    /// The ovsdb-server that has got back what was changed in the one before at run time.
    given_back: Option<ProcessId>,
    /// What of that is not there, as the report has it.
    lacking: Vec<String>,
}

impl Recovery {
    fn new(runs: &Runs, id: &str, config: &Config, clock: Arc<dyn Clock>) -> Recovery {
        let report = Report::new(id, Strategy::Standby, unix_ms());
        let end = clock.now() + LIMIT;
        let flow_limit = config.restore.flow_limit;
        let (runs, id) = (runs.clone(), id.to_owned());
        let (errors, kept) = (Vec::new(), Vec::new());
        let (parked, survivor, settled, refused, captured) = (false, None, false, Vec::new(), None);
        let (given_back, lacking) = (None, Vec::new());
        Recovery {
            runs,
            id,
            clock,
            end,
            flow_limit,
            report,
            errors,
            kept,
            parked,
            survivor,
            settled,
            refused,
            captured,
            given_back,
            lacking,
        }
    }

    /// `limit` from now, but not beyond the end of all.
    fn until(&self, limit: Duration) -> Instant {
        (self.clock.now() + limit).min(self.end)
    }

    /// The value, or its error kept for the report.
    fn keep<T, E: Into<anyhow::Error>>(&mut self, what: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.errors.push(format!("{what}: {:#}", error.into()))).ok()
    }

    fn told(&mut self, text: impl Into<String>) {
        self.report.warnings.push(text.into());
    }

    fn run(&mut self, database: &dyn Database, host: impl FnOnce() -> anyhow::Result<Host>) -> Outcome {
        let entries = self.runs.entries(&self.id);
        let known = self.keep("journal", entries);
        let entries = known.clone().unwrap_or_default();
        let mark = plan::last_mark(&entries);
        if let Some(last) = entries.last() {
            self.told(format!("cut off in {}, step `{}` {:?}", last.phase, last.step, last.state));
        }
        if let Some(mark) = mark.as_ref().filter(|mark| mark.boot != self.clock.boot()) {
            self.begin_as(mark);
            // At boot there may be no datapath yet, and nothing is to be done with it.
            self.report.details.insert("recovery".into(), format!("{:?}", Plan::AfterReboot).into());
            return match (&mark.old, self.after_reboot(database, &entries)) {
                (_, Err(error)) => needs_person(format!("{error:#}")),
                (None, Ok(_)) => nothing_touched(),
                (Some(_), Ok(outcome)) => outcome,
            };
        }
        let host = host();
        let Some(mut host) = self.keep("host", host) else {
            let thawed = freeze::thaw();
            self.keep("thaw", thawed);
            self.carry_journal();
            return needs_person("the datapath cannot be looked at; nothing is frozen any more".into());
        };
        self.take_up_park(&mut host);
        if known.is_none() {
            // Who was who is not known: what can be lifted without knowing it is lifted.
            self.leave_nothing(&mut host);
            self.carry_journal();
            return needs_person("what the run had done cannot be read; nothing is frozen any more".into());
        }
        let mark = mark.unwrap_or_default();
        self.begin_as(&mark);
        let mut outcome = self.carry_out(&mut host, database, &entries, &mark);
        if outcome.is_err() || !self.errors.is_empty() {
            let first = std::mem::take(&mut self.errors);
            let failed = outcome.err().map(|error| format!("{error:#}"));
            first.into_iter().chain(failed).for_each(|error| self.told(format!("{error}: all of it once more")));
            // The first may have used all the time up. Should systemd cut this one off, the next recovery goes on.
            self.end = self.clock.now() + LIMIT;
            outcome = self.carry_out(&mut host, database, &entries, &mark);
        }
        self.carry_journal();
        if let Some(gone) = self.survivor.filter(|survivor| !host.daemons.is_alive(*survivor)) {
            // Whoever starts the next one by himself does not have the rules.
            self.told(format!("ovs-vswitchd (process {}) has ended: all of it once more", gone.pid));
            self.end = self.clock.now() + LIMIT;
            outcome = self.carry_out(&mut host, database, &entries, &mark);
            if let Err(error) = &outcome {
                self.told(format!("{error:#}: all of it once more"));
                self.end = self.clock.now() + LIMIT;
                outcome = self.carry_out(&mut host, database, &entries, &mark);
            }
        }
        match host.datapath.refused() {
            Ok(refused) => self.report.refused = refused,
            Err(error) => self.told(format!("what the freeze refused is not known: {error}")),
        }
        let warning = match host.datapath.skipped() {
            Ok(skipped) => self.report.freeze_skipped(skipped),
            Err(error) => Some(format!("how often the kernel passed over the freeze is not known: {error}")),
        };
        if let Some(warning) = warning {
            self.told(warning);
        }
        match outcome {
            Ok(outcome) if !self.errors.is_empty() => {
                needs_person(format!("{}, but not all of it could be put right: see the warnings", outcome.reason))
            }
            Ok(outcome) if plan::had_settled(&entries) && outcome.exit_code == ExitCode::Back => Outcome {
                exit_code: ExitCode::Differences,
                reason: "done, but verify was cut off: nothing was compared".into(),
            },
            Ok(outcome) => outcome,
            Err(error) => needs_person(format!("{error:#}")),
        }
    }

    /// The report goes on from what the run had found out before it was cut off.
    fn begin_as(&mut self, mark: &Mark) {
        let Some(found) = mark.found.clone() else { return };
        let report = &mut self.report;
        report.started_ms = found.started_ms;
        (report.from, report.to) = (found.from, found.to);
        (report.level, report.strategy) = (found.level, found.strategy);
        report.conntrack = found.conntrack;
    }

    /// What is in memory goes to the disk, for whoever wants the whole story.
    fn carry_journal(&mut self) {
        let carried = self.runs.journal(&self.id);
        self.keep("journal", carried);
    }

    /// Does what is to be done. May be done twice.
    fn carry_out(
        &mut self,
        host: &mut Host,
        database: &dyn Database,
        entries: &[Entry],
        mark: &Mark,
    ) -> anyhow::Result<Outcome> {
        let (plan, survivor) = self.decide(host, entries, mark);
        self.settled = plan::had_settled(entries);
        self.report.details.insert("recovery".into(), format!("{plan:?}").into());
        let outcome = match (plan, mark.old.clone()) {
            (Plan::Undo, Some(old)) => self.undo(host, mark, &old),
            (Plan::Forward { flush }, Some(_)) => self.forward(host, mark, survivor, flush),
            (Plan::AfterReboot, _) => self.after_reboot(database, entries),
            (Plan::Nothing, _) | (_, None) => Ok(nothing_touched()),
        };
        self.leave_nothing(host);
        if matches!(plan, Plan::Undo | Plan::Forward { .. }) {
            self.look_at_by_hand(host, mark);
        }
        outcome
    }

    fn take_up_park(&mut self, host: &mut Host) {
        let kept = std::mem::take(&mut self.kept);
        if kept.is_empty() {
            return;
        }
        let taken = host.datapath.take_up_park(kept);
        self.parked = self.keep("parked packets", taken).is_some();
    }

    /// What became of them.
    fn replayed(&mut self, replay: anyhow::Result<ReplayReport>) {
        let Some(replay) = self.keep("parked packets", replay) else { return };
        let lost: u64 = replay.unreplayable.values().chain(replay.errors.values()).sum();
        self.told(format!("parked packets: {} replayed, {lost} not, {} left", replay.replayed, replay.left));
        self.report.parked.replayed += replay.replayed;
        for (reason, count) in replay.unreplayable {
            *self.report.parked.unreplayable.entry(reason).or_default() += count;
        }
    }

    /// Who lives, and so what is to be done; with the daemon that is to take over, where one lives.
    fn decide(&mut self, host: &Host, entries: &[Entry], mark: &Mark) -> (Plan, Option<Daemon>) {
        let same_boot = mark.boot == self.clock.boot();
        let old = mark.old.as_ref().filter(|_| same_boot).map(|old| old.id);
        let mut new = mark.new.clone().filter(|new| same_boot && host.daemons.is_alive(new.id));
        if new.is_none() {
            let found = host.daemons.find_all(DaemonKind::OvsVswitchd);
            let others = self.keep("running daemons", found).unwrap_or_default();
            new = newest_but(old, others);
        }
        if let (true, None, Some(old)) = (plan::past_no_return(entries), &new, old) {
            // It may be on its way out.
            let ended = host.daemons.wait_end(old, self.until(END_LIMIT));
            self.keep("the old ovs-vswitchd", ended);
        }
        let alive = Alive { same_boot, old: old.is_some_and(|old| host.daemons.is_alive(old)), new: new.is_some() };
        (plan(entries, Some(mark), alive), new)
    }

    /// Arm may have been cut off while ovsdb-server was replaced.
    fn database(&mut self, host: &Host, mark: &Mark) {
        let until = self.until(SHORT);
        if host.services.is_running() {
            let ended = host.services.end_hand_over(DATABASE_UNIT, until);
            self.keep(DATABASE_UNIT, ended);
        }
        let waited = self.until(Duration::from_secs(3));
        while host.database.facts(until).is_err() && self.clock.now() < waited {
            self.clock.sleep(LOOK_AGAIN);
        }
        if let Err(error) = host.database.facts(until) {
            self.told(format!("{error}"));
            if host.services.is_running() && !mark.is_contained() {
                let started = complete_job(host.services.as_ref(), DATABASE_UNIT, JobKind::Start, self.until(SHORT));
                self.keep(DATABASE_UNIT, started);
            }
        }
        self.give_back(host);
    }

    /// Gives the ovsdb-server that runs now what was changed in the one of before at run time.
    fn give_back(&mut self, host: &Host) {
        let kept = self.runs.by_hand(&self.id);
        let Some(Some(kept)) = self.keep("what was set in the daemons at run time", kept) else { return };
        let (server, told) = by_hand::give_back(host, &kept, self.given_back, self.until(SHORT));
        self.given_back = server.or(self.given_back);
        told.into_iter().for_each(|told| self.told(told));
    }

    /// At the end, when ovs-ctl has done what it does of itself: what is not as it was is a difference.
    fn look_at_by_hand(&mut self, host: &Host, mark: &Mark) {
        let Ok(Some(kept)) = self.runs.by_hand(&self.id) else { return };
        let until = self.until(SHORT);
        let old = mark.old.as_ref().map(|old| old.id);
        let all = || host.daemons.find_all(DaemonKind::OvsVswitchd);
        let all = all().or_else(|_| all()).unwrap_or_else(|error| {
            self.told(format!("what was set in the daemons at run time: {error}"));
            Vec::new()
        });
        let switch = newest_but(old, all);
        if let Some(switch) = &switch {
            let given = log_levels::give_back(host.daemons.as_ref(), switch, &kept.switch_logs, until);
            given.err().into_iter().for_each(|error| self.told(format!("log levels that were set by hand: {error}")));
        }
        self.give_back(host);
        match by_hand::differences(host, &kept, switch.as_ref(), until) {
            Ok(found) => {
                // An attempt before this one may have had less luck.
                self.report.differences.retain(|one| !self.lacking.contains(one));
                self.report.differences.extend(found.iter().cloned());
                self.lacking = found;
            }
            Err(error) => self.told(format!("what was set in the daemons at run time: {error}")),
        }
    }

    /// The old daemon goes on. First its upcalls: what is missed now is lost.
    fn undo(&mut self, host: &mut Host, mark: &Mark, old: &Daemon) -> anyhow::Result<Outcome> {
        let bound = bind_back(host, mark, old);
        // As long as the upcalls came to us, every packet would come back.
        if self.keep("binding the old ovs-vswitchd", bound).is_some() && self.parked {
            let returned = host.datapath.return_parked(old.id, self.until(SHORT));
            self.replayed(returned.map_err(Into::into));
        }
        self.database(host, mark);
        let ended = self.end_leftovers(host, mark, old);
        self.keep("ending what the run had started", ended);
        let settled = host.daemons.settle_pid_file(old);
        self.keep("PID file", settled);
        self.end_hand_over(host, mark);
        // It keeps its timeout policies by itself.
        let withdrawn = host.datapath.withdraw_guard(&self.id);
        self.keep("guard of timeout policies", withdrawn);
        let thawed = host.datapath.thaw();
        self.keep("thaw", thawed);
        let cleared = self.clear(host.database.as_ref(), SHORT);
        self.keep("flow-restore-wait", cleared);
        if !bound_to(host, old.id)? {
            bail!("ovs-vswitchd (process {}) is not bound to the upcalls; remedy: restart it", old.id.pid);
        }
        let reason = "the supervisor was cut off before the point of no return; undone".to_owned();
        Ok(Outcome { exit_code: ExitCode::Undone, reason })
    }

    /// Standby, its waiting parent and ovs-ctl: whatever the run has started in the unit's cgroup, and every other
    /// ovs-vswitchd.
    fn end_leftovers(&self, host: &Host, mark: &Mark, old: &Daemon) -> anyhow::Result<()> {
        self.kill_all(host, |host| {
            let mut left = started_since(host, mark, old)?;
            left.extend(every_switch(host)?.into_iter().filter(|id| *id != old.id));
            left.sort_unstable();
            left.dedup();
            Ok(left)
        })
    }

    /// SIGKILL, because a standby may be stopped; asked again, because one may be starting another.
    fn kill_all(&self, host: &Host, who: impl Fn(&Host) -> anyhow::Result<Vec<ProcessId>>) -> anyhow::Result<()> {
        let until = self.until(SHORT);
        let mut late = false;
        loop {
            let left = who(host)?;
            if left.is_empty() {
                return Ok(());
            }
            if late {
                bail!("processes {:?} do not end", left.iter().map(|id| id.pid).collect::<Vec<_>>());
            }
            for id in &left {
                // One that has ended by itself is what was wanted.
                let _ = host.daemons.signal(*id, Signal::Kill);
                host.daemons.wait_end(*id, until)?;
            }
            late = self.clock.now() >= until;
        }
    }

    /// The new daemon takes over, or whichever there is; if that fails, the unit is started anew.
    fn forward(
        &mut self,
        host: &mut Host,
        mark: &Mark,
        survivor: Option<Daemon>,
        flush: bool,
    ) -> anyhow::Result<Outcome> {
        self.database(host, mark);
        let mut how = "the new ovs-vswitchd was made to take over";
        let tried = match survivor {
            Some(survivor) => self.take_over(host, mark, &survivor, flush),
            None => Err(anyhow::anyhow!("no ovs-vswitchd lives")),
        };
        if let Err(error) = tried {
            how = "ovs-vswitchd was started anew";
            self.told(format!("{error:#}: starting it anew"));
            let started = self.start_anew(host, mark)?;
            self.take_over(host, mark, &started, true)?;
        }
        let parked = if self.parked { "what was parked was replayed" } else { "with losses" };
        let reason = format!("the supervisor was cut off past the point of no return; {how}, {parked}");
        Ok(Outcome { exit_code: ExitCode::Back, reason })
    }

    fn take_over(&mut self, host: &mut Host, mark: &Mark, survivor: &Daemon, flush: bool) -> anyhow::Result<()> {
        // Read while it is there: the freeze takes it along.
        let frozen = host.datapath.take_up_freeze();
        let captured = match self.keep("freeze", frozen) {
            Some(true) => {
                let captured = host.datapath.captured();
                self.keep("captured binding", captured).flatten()
            }
            Some(false) | None => None,
        };
        // An attempt before this one may have lifted the freeze that had it.
        let captured = captured.or_else(|| self.captured.take());
        self.captured = captured.clone();
        if self.parked {
            // Where packets on old recirculation ids came from: later these flows are gone.
            let chosen = host.datapath.choose_doomed();
            self.keep("kernel flows", chosen);
        }
        let woken = host.daemons.signal(survivor.id, Signal::Continue);
        self.keep("waking the new ovs-vswitchd", woken);
        let ended = self.end_old(host, mark, survivor);
        if self.keep("ending the old ovs-vswitchd", ended).is_some() && self.parked {
            let read = host.datapath.read_left_over();
            self.keep("what the old ovs-vswitchd left unread", read);
        }
        // The reload hook waits for this.
        let settled = host.daemons.settle_pid_file(survivor);
        self.keep("PID file", settled);
        let facts = host.database.facts(self.until(SHORT));
        let bridges = self.keep("database", facts).map(|facts| facts.bridges).unwrap_or_default();
        host.openflow.wait_ready(survivor, &bridges, self.flow_limit, self.until(READY_LIMIT))?;
        let restored = self.restore(host, mark, survivor);
        self.keep("OpenFlow rules", restored);
        let given = self.give_state(host, mark, survivor);
        self.keep("what bridges know besides rules", given);
        let put_back = self.put_devices_back(host);
        self.keep("internal devices", put_back);
        let put_back = self.put_mtus_back(host);
        self.keep("devices of the ports", put_back);
        let let_go = let_it_bind(host);
        self.keep("freeze", let_go);
        let cleared = self.clear(host.database.as_ref(), CLEAR_LIMIT);
        let next_cfg = match self.keep("flow-restore-wait", cleared) {
            Some(Cleared::Removed { next_cfg }) => next_cfg,
            _ => self.bump(host.database.as_ref())?,
        };
        self.wait_in_step(host.database.as_ref(), next_cfg)?;
        self.bind(host, survivor, captured)?;
        // Its flows were flushed, or will be: all that is established misses at once, and its sockets are as it made them.
        if let Err(error) = host.datapath.make_room(survivor.id) {
            self.told(format!("a burst of misses may find no room: {error}"));
        }
        let thawed = host.datapath.thaw();
        self.keep("thaw", thawed);
        // A bridge with a controller loses its rules when flow-restore-wait goes.
        let restored = self.restore(host, mark, survivor);
        self.keep("OpenFlow rules", restored);
        if flush {
            let flushed = host.daemons.command(survivor, "dpctl/del-flows", &[], self.until(SHORT));
            self.keep("flows that belong to the old ovs-vswitchd", flushed);
        }
        if self.parked {
            let replayed = host.datapath.replay_to(survivor.id, self.until(READY_LIMIT));
            self.replayed(replayed.map_err(Into::into));
        }
        if let Err(error) = self.look_at_rules(host, survivor) {
            self.told(format!("which OpenFlow rules are there now is not known: {error:#}"));
        }
        if let Err(error) = self.look_at_devices(host) {
            self.told(format!("what is gone of devices is not known: {error:#}"));
        }
        self.end_hand_over(host, mark);
        self.owned(host, mark, survivor);
        self.survivor = Some(survivor.id);
        match host.daemons.is_alive(survivor.id) {
            true => Ok(()),
            false => bail!("ovs-vswitchd (process {}) has ended", survivor.id.pid),
        }
    }

    fn end_old(&mut self, host: &Host, mark: &Mark, survivor: &Daemon) -> anyhow::Result<()> {
        let Some(old) = mark.old.as_ref().map(|old| old.id).filter(|old| *old != survivor.id) else { return Ok(()) };
        for signal in [Signal::Terminate, Signal::Kill] {
            if !host.daemons.is_alive(old) {
                return Ok(());
            }
            host.daemons.signal(old, signal)?;
            host.daemons.wait_end(old, self.until(END_LIMIT))?;
        }
        match host.daemons.is_alive(old) {
            true => bail!("process {} does not end", old.pid),
            false => Ok(()),
        }
    }

    /// The rules of the old daemon, where the survivor lacks one of them.
    fn restore(&mut self, host: &Host, mark: &Mark, survivor: &Daemon) -> anyhow::Result<()> {
        if self.settled && mark.new.as_ref().is_some_and(|new| new.id == survivor.id) {
            return Ok(());
        }
        let Some(wanted) = self.runs.rules(&self.id)? else { return Ok(()) };
        let facts = host.database.facts(self.until(SHORT))?;
        let now = host.openflow.snapshot(survivor, &facts.bridges, self.until(READY_LIMIT))?;
        let lacking: Vec<BridgeRules> = wanted
            .into_iter()
            // A bridge that has gone since is nobody's loss.
            .filter(|rules| now.iter().any(|now| now.bridge == rules.bridge && self.lacks(now, rules)))
            .collect();
        let (lacking, in_words): (Vec<_>, Vec<_>) = lacking.into_iter().partition(BridgeRules::has_messages);
        for rules in &in_words {
            self.cannot_restore(rules)?;
        }
        if lacking.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = lacking.iter().map(|rules| rules.bridge.clone()).collect();
        let restored = host.openflow.restore(&lacking, self.until(READY_LIMIT))?;
        self.told(format!("OpenFlow rules restored: {}", names.join(", ")));
        let refused: Vec<_> = restored.into_iter().flat_map(|done| done.refused).collect();
        let news: Vec<_> = refused.into_iter().filter(|refused| !self.refused.contains(refused)).collect();
        if let Some(told) = notes::not_put_back(&news) {
            self.told(told);
        }
        self.refused.extend(news);
        Ok(())
    }

    /// Rules of which another version of ovs-graceful has kept the words alone. The bridge goes on without them.
    fn cannot_restore(&mut self, rules: &BridgeRules) -> anyhow::Result<()> {
        let [groups, flows] = self.runs.keep_words(&self.id, rules)?;
        let BridgeRules { bridge, protocol, .. } = rules;
        let told = format!(
            "bridge {bridge}: its OpenFlow rules were kept in words alone, by another version of ovs-graceful, and are not put \
             back: it forwards without them as soon as flow-restore-wait is removed, which is now\nremedy:\n\
             `ovs-ofctl -O {protocol} add-groups {bridge} {}`\n`ovs-ofctl -O {protocol} add-flows {bridge} {}`",
            groups.display(),
            flows.display()
        );
        if !self.report.warnings.contains(&told) {
            self.told(told);
        }
        Ok(())
    }

    /// What bridges knew besides rules and addresses. What is not taken is told.
    fn give_state(&mut self, host: &Host, mark: &Mark, survivor: &Daemon) -> anyhow::Result<()> {
        if self.settled && mark.new.as_ref().is_some_and(|new| new.id == survivor.id) {
            return Ok(());
        }
        let state = self.runs.state(&self.id)?;
        let facts = host.database.facts(self.until(SHORT))?;
        let lost = host.openflow.give_state(survivor, &facts.bridges, &state, self.until(READY_LIMIT))?;
        lost.into_iter().for_each(|lost| self.told(lost));
        Ok(())
    }

    /// Is a rule not there that does not go by itself, and was not refused?
    fn lacks(&self, now: &BridgeRules, wanted: &BridgeRules) -> bool {
        let refused = |rule: &str| self.refused.iter().any(|no| no.bridge == wanted.bridge && no.rule == rule);
        let differences = compare(std::slice::from_ref(wanted), std::slice::from_ref(now));
        differences.iter().any(|it| it.missing && !it.timed && !refused(&it.rule))
    }

    /// There is no Verify on this way: what is not as it was is told.
    fn look_at_rules(&mut self, host: &Host, survivor: &Daemon) -> anyhow::Result<()> {
        let Some(mut wanted) = self.runs.rules(&self.id)? else { return Ok(()) };
        let facts = host.database.facts(self.until(SHORT))?;
        wanted.retain(|rules| facts.bridges.iter().any(|bridge| bridge.name == rules.bridge));
        let now = host.openflow.snapshot(survivor, &facts.bridges, self.until(READY_LIMIT))?;
        self.report.differences.clear();
        notes::rules_after(&mut self.report, &wanted, &now, &self.refused);
        Ok(())
    }

    /// Those that went with the kernel module, where it was being reloaded.
    fn put_devices_back(&mut self, host: &Host) -> anyhow::Result<()> {
        let devices = self.runs.devices(&self.id)?;
        for failed in host.module.put_back(&devices, self.until(SHORT))? {
            self.told(failed);
        }
        Ok(())
    }

    /// Those that were set by hand.
    fn put_mtus_back(&mut self, host: &Host) -> anyhow::Result<()> {
        let standing = self.runs.standing(&self.id)?;
        let facts = host.database.facts(self.until(SHORT))?;
        for failed in mtus_put_back(&standing, host.devices.as_ref(), &facts) {
            self.told(failed);
        }
        Ok(())
    }

    /// What others had put on devices, and is gone, is told.
    fn look_at_devices(&mut self, host: &Host) -> anyhow::Result<()> {
        let standing = self.runs.standing(&self.id)?;
        let facts = host.database.facts(self.until(SHORT))?;
        match losses(&standing, host.devices.as_ref(), &facts) {
            Ok(lost) => self.report.differences.extend(lost),
            Err(told) => self.told(told),
        }
        Ok(())
    }

    /// The survivor binds by itself as flow-restore-wait goes; one that was refused before does not try again.
    fn bind(&mut self, host: &mut Host, survivor: &Daemon, mut captured: Option<Captured>) -> anyhow::Result<()> {
        let until = self.until(BIND_LIMIT);
        loop {
            host.datapath.follow(survivor.id)?;
            let tells = host.datapath.tells_upcalls()?;
            if tells && bound_to(host, survivor.id)? {
                return Ok(());
            }
            if self.clock.now() >= until {
                bail!("ovs-vswitchd (process {}) does not bind the upcalls", survivor.id.pid);
            }
            if captured.is_none() {
                // It may have tried only now, where the freeze could not be told to let it.
                captured = host.datapath.captured().ok().flatten();
            }
            let own = captured.as_ref().filter(|captured| {
                // One that binds per vport tries again by itself.
                captured.dispatch == Dispatch::PerCpu
                    && captured.process.tgid == survivor.id.pid as u32
                    && captured.process.start_time == survivor.id.start_time
            });
            if let Some(captured) = own {
                host.datapath.bind_upcalls(captured.features, &captured.port_ids)?;
                self.told("the upcalls were bound to what the new ovs-vswitchd had asked for");
                if !tells {
                    return Ok(());
                }
            } else if !tells {
                // What cannot be seen is made so: once more what it was, where the daemon has bound it itself.
                match host.datapath.port_ids_waited_for(survivor.id) {
                    Ok(port_ids) if !port_ids.is_empty() => return Ok(host.datapath.bind_upcalls(None, &port_ids)?),
                    Ok(_) => {}
                    Err(error) if self.clock.now() >= until => return Err(error.into()),
                    // Its handlers are busy.
                    Err(_) => {}
                }
            }
            self.clock.sleep(LOOK_AGAIN);
        }
    }

    /// Stock behaviour: rather a restart than a host without anybody who answers.
    fn start_anew(&mut self, host: &mut Host, mark: &Mark) -> anyhow::Result<Daemon> {
        let thawed = host.datapath.thaw();
        self.keep("thaw", thawed);
        let until = self.until(Duration::from_secs(30));
        if mark.is_contained() {
            // Whoever runs its container may be about to start it.
            let old = mark.old.as_ref().map(|old| old.id);
            return self.wait_for_another(host, old, until, "no ovs-vswitchd runs; remedy: start its container");
        }
        if !host.services.is_running() {
            let old = mark.old.as_ref().context("how ovs-vswitchd was started is not known")?;
            // One that could not take over holds the lock of the database, as long as it lives.
            let ended = self.kill_all(host, every_switch);
            self.keep("ending what could not take over", ended);
            let removed = host.daemons.remove_stale_pid_files(old);
            self.keep("PID file", removed);
            self.report.warnings.extend(make_ready_for_a_daemon(host));
            host.daemons.start_like(old)?;
            return Ok(host.daemons.wait_pid_file(old, until)?);
        }
        let unit = mark.unit.clone().unwrap_or_else(|| SWITCH_UNIT.to_owned());
        let ended = host.services.end_hand_over(&unit, until);
        self.keep("drop-in", ended);
        self.report.warnings.extend(make_ready_for_a_daemon(host));
        complete_job(host.services.as_ref(), &unit, JobKind::Restart, until)?;
        self.wait_for_another(host, None, until, &format!("{unit} was started, and no ovs-vswitchd runs"))
    }

    /// The youngest ovs-vswitchd but `old`, as soon as there is one.
    fn wait_for_another(
        &self,
        host: &Host,
        old: Option<ProcessId>,
        until: Instant,
        nobody: &str,
    ) -> anyhow::Result<Daemon> {
        loop {
            let all = host.daemons.find_all(DaemonKind::OvsVswitchd)?.into_iter();
            match all.filter(|daemon| Some(daemon.id) != old).max_by_key(|daemon| daemon.id.start_time) {
                Some(daemon) => return Ok(daemon),
                None if self.clock.now() >= until => bail!("{nobody}"),
                None => self.clock.sleep(LOOK_AGAIN),
            }
        }
    }

    /// The drop-in goes once the reload has ended: it says where the PID file is.
    fn end_hand_over(&mut self, host: &Host, mark: &Mark) {
        let Some(unit) = mark.unit.clone().filter(|_| host.services.is_running()) else { return };
        let until = self.until(SHORT);
        while let Ok(Some(now)) = host.services.unit(&unit, until) {
            if now.active_state != "reloading" || self.clock.now() >= until {
                break;
            }
            self.clock.sleep(LOOK_AGAIN);
        }
        let ended = host.services.end_hand_over(&unit, self.until(SHORT));
        self.keep("drop-in", ended);
    }

    /// systemd has to know the survivor; where it does not, that is told: nothing it can be made to do is harmless.
    fn owned(&mut self, host: &Host, mark: &Mark, survivor: &Daemon) {
        let Some(unit) = mark.unit.clone().filter(|_| host.services.is_running()) else { return };
        let now = host.services.unit(&unit, self.until(SHORT));
        if let Some(Some(now)) = self.keep(&unit, now) {
            if now.main_pid != survivor.id.pid {
                self.errors.push(format!(
                    "{unit} is {} with main process {}, and ovs-vswitchd is process {}; remedy: `systemctl restart {unit}`",
                    now.active_state, now.main_pid, survivor.id.pid
                ));
            }
        }
    }

    /// Only the database outlives a boot.
    fn after_reboot(&mut self, database: &dyn Database, entries: &[Entry]) -> anyhow::Result<Outcome> {
        // The server may be on its way up.
        let waited = self.until(SHORT);
        let mut cleared = self.clear(database, SHORT);
        while cleared.is_err() && self.clock.now() < waited {
            self.clock.sleep(LOOK_AGAIN);
            cleared = self.clear(database, SHORT);
        }
        cleared.context("flow-restore-wait")?;
        self.tidy(database);
        let exit_code = if plan::past_no_return(entries) { ExitCode::Back } else { ExitCode::Undone };
        Ok(Outcome { exit_code, reason: "the machine was booted during the run; nothing of it is left".into() })
    }

    /// Whatever came before.
    fn leave_nothing(&mut self, host: &mut Host) {
        let thawed = host.datapath.thaw();
        self.keep("thaw", thawed);
        let cleared = self.clear(host.database.as_ref(), SHORT);
        self.keep("flow-restore-wait", cleared);
        if self.tidy(host.database.as_ref()) {
            let looked_after = look_after_database(host.services.as_ref());
            self.keep(DATABASE_TIMER, looked_after);
        }
    }

    /// The flag with its mark, and changed timeout policies, whatever the disk of the database does.
    fn clear(&mut self, database: &dyn Database, limit: Duration) -> crate::host::Result<Cleared> {
        let until = self.until(limit);
        let (id, clock) = (self.id.clone(), self.clock.clone());
        let told = &mut self.report.warnings;
        database_disk::write(database, clock.as_ref(), until, told, || database.clear_all(&id, until))
    }

    /// An ovs-vswitchd that is in step says so by a transaction, and once: where its disk did not take that, it is made to
    /// say so again.
    fn wait_in_step(&mut self, database: &dyn Database, next_cfg: i64) -> crate::host::Result<()> {
        match database.wait_in_step(next_cfg, self.until(IN_STEP_LIMIT)) {
            Err(error) if error.timed_out => {
                let next_cfg = self.bump(database)?;
                database.wait_in_step(next_cfg, self.until(READY_LIMIT))
            }
            waited => waited,
        }
    }

    fn bump(&mut self, database: &dyn Database) -> crate::host::Result<i64> {
        let until = self.until(SHORT);
        let clock = self.clock.clone();
        let told = &mut self.report.warnings;
        database_disk::write(database, clock.as_ref(), until, told, || database.bump(until))
    }

    /// What the run kept beside the database, and a database in memory; true where the disk keeps one of them there.
    fn tidy(&mut self, database: &dyn Database) -> bool {
        let mut left = false;
        match database.drop_ballast() {
            Err(error) if error.unwritable => {
                self.told(format!("{error}: it is removed once the disk can be written"));
                left = true;
            }
            dropped => drop(self.keep("room kept beside the database", dropped)),
        }
        match database.write_back(self.until(SHORT)) {
            Ok(false) => left,
            Ok(true) => {
                self.told("the database is on its disk again");
                left
            }
            Err(error) if error.unwritable => {
                self.told(format!("{error}; {}", database_disk::in_memory()));
                true
            }
            Err(error) => {
                self.errors.push(format!("database in memory: {error}"));
                true
            }
        }
    }
}

fn needs_person(reason: String) -> Outcome {
    Outcome { exit_code: ExitCode::NeedsPerson, reason }
}

/// The daemon that was started last, of all but the old one.
fn newest_but(old: Option<ProcessId>, all: Vec<Daemon>) -> Option<Daemon> {
    all.into_iter().filter(|daemon| Some(daemon.id) != old).max_by_key(|daemon| daemon.id.start_time)
}

fn nothing_touched() -> Outcome {
    Outcome { exit_code: ExitCode::Undone, reason: "the supervisor was cut off; nothing had been touched".into() }
}

/// As flow-restore-wait goes, the daemon flushes and binds: the first is refused until the second is done, or what is
/// established would miss with nobody to answer. A freeze whose lease is over stays so.
fn let_it_bind(host: &mut Host) -> anyhow::Result<()> {
    if host.datapath.take_up_freeze()? {
        host.datapath.refuse(Classes::FLOW_FLUSH | Classes::QDISC_DEL)?;
        let _over_is_over = host.datapath.renew(LIMIT);
    }
    Ok(())
}

/// Every ovs-vswitchd of this host.
fn every_switch(host: &Host) -> anyhow::Result<Vec<ProcessId>> {
    Ok(host.daemons.find_all(DaemonKind::OvsVswitchd)?.into_iter().map(|daemon| daemon.id).collect())
}

/// Is the datapath bound to sockets of this process?
fn bound_to(host: &mut Host, process: ProcessId) -> anyhow::Result<bool> {
    let bound = host.datapath.upcall_port_ids()?;
    Ok(host.daemons.find_vswitchd(&bound).is_ok_and(|daemon| daemon.id == process))
}

fn bind_back(host: &mut Host, mark: &Mark, old: &Daemon) -> anyhow::Result<()> {
    if host.datapath.tells_upcalls()? && bound_to(host, old.id)? {
        return Ok(());
    }
    // Port ids of sockets that have been closed since could be anybody's.
    if host.daemons.find_vswitchd(&mark.old_port_ids)?.id != old.id {
        bail!("port ids {:?} are not those of process {}", mark.old_port_ids, old.id.pid);
    }
    Ok(host.datapath.bind_upcalls(None, &mark.old_port_ids)?)
}

/// The processes in the unit's cgroup that are younger than the run: ovs-ctl and what it started. Our own reload hook
/// ends by itself, and has to: systemd waits for its word.
fn started_since(host: &Host, mark: &Mark, old: &Daemon) -> anyhow::Result<Vec<ProcessId>> {
    if mark.unit.as_ref().is_none_or(|unit| !old.cgroup.ends_with(unit.as_str())) {
        return Ok(Vec::new());
    }
    let young = host.daemons.started_since(&old.cgroup, mark.began)?;
    Ok(young.into_iter().filter(|id| *id != old.id).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::simulated::{Script, Sim, Variant};

    #[test]
    fn a_flag_without_our_mark_is_somebody_else_s() {
        let set = DatabaseFacts {
            other_config: [("flow-restore-wait".to_owned(), "true".to_owned())].into(),
            ..DatabaseFacts::default()
        };
        let told = told_of_flag(&set).unwrap();
        assert!(told.contains("not by us") && told.contains("`ovs-vsctl remove"), "{told}");
        let marked = DatabaseFacts { external_ids: [(MARK.to_owned(), "run-1".to_owned())].into(), ..set };
        assert_eq!((told_of_flag(&marked), told_of_flag(&DatabaseFacts::default())), (None, None));
    }

    #[test]
    fn where_no_bridge_was_made_nobody_has_to_be_bound() {
        let sim = Sim::new(Variant::USUAL, Script::default());
        assert!(bound_daemon(&mut sim.host()).unwrap().is_some());
        sim.world().kernel.no_datapath = true;
        sim.world().kernel.bound.clear();
        assert!(bound_daemon(&mut sim.host()).unwrap().is_none());
        prove_bound(&mut sim.host()).unwrap();
    }
}

//! The distribution's own commands, where our drop-ins are installed (`systemd/`): what systemd calls in place of the
//! package's commands, which it gives us to do where we do not.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context};

use super::ended::{FAILED, USAGE};
use super::hook::{self, lives, main_process};
use super::launch::{launch, Launched};
use super::neighbours;
use super::output::{complain, complain_of};
use super::patience;
use super::restart::{no_run_now, restart};
use super::{connect, RestartArgs, SuperviseArgs};
use crate::config::{Config, DoorsConfig, WhenRefused};
use crate::control::{Holder, HookClient, HookCommand, RunLock, Status, LOCK, PLAIN, SOCKET};
use crate::host::real::Systemd;
use crate::host::{JobKind, QueuedJob, ServiceManager, DATABASE_UNIT, SWITCH_UNIT};
use crate::journal::Runs;
use crate::machine::{ExitCode, Phase};
use crate::recovery::RECOVERY;
use crate::report::{Report, Strategy};

/// That of ovs-vswitchd, which its unit names only while a run is under way.
const PID_FILE: &str = "/run/openvswitch/ovs-vswitchd.pid";

/// From when the unit is the package's again to the end of Settle; and how long a run may take until it answers, or to
/// end when it does not any more.
const HANDED_OVER: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How long systemd may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// ExecReload= of the unit that stands for both daemons. A reload that was done is one that went well, with differences
/// or not: the report has them.
pub(super) fn unit_reload(config: &Path, unit: String, command: &[OsString]) -> u8 {
    patience::ask(longest_run(config));
    match doors(config) {
        Ok(doors) if unit == SWITCH_UNIT => switch_reload(config, unit, doors.reloads()),
        Ok(doors) if doors.reloads() => {
            well(restart(config, RestartArgs { called_by: Some(unit), ..RestartArgs::default() }))
        }
        Ok(_) => package_s_own(command),
        Err(code) => code,
    }
}

/// The unit of ovs-vswitchd alone is being reloaded: this process is the hook of the run, in the unit's cgroup, and the
/// job that waits for it the one by which systemd takes the new daemon over.
fn switch_reload(config: &Path, unit: String, graceful: bool) -> u8 {
    let start = match exec_start(&unit) {
        Ok(start) => start,
        Err(error) => {
            complain(&format!("{error:#}"));
            return FAILED;
        }
    };
    if !graceful {
        return package_s_own(&of_restart(&start));
    }
    match reload_in_a_run(config, unit, &start) {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::Undone.code()
        }
    }
}

fn reload_in_a_run(config: &Path, unit: String, start: &[OsString]) -> anyhow::Result<u8> {
    if let Some(code) = no_run_now(config, false) {
        return Ok(code);
    }
    let args = from_its_unit(config, unit, Strategy::Standby);
    match launch(&args)? {
        Launched::Running(_) => {}
        Launched::Over(report) => return Ok(complain_of(&report)),
    }
    match hook::reload(Path::new(SOCKET), start, Some(PID_FILE.into()))? {
        // The run goes on; systemd is to have the new daemon now.
        0 => Ok(0),
        _ => match Runs::default().report(&args.id) {
            Ok(report) => Ok(complain_of(&report)),
            // It waits for our end, and its own will tell.
            Err(_) => bail!("run {} is being undone; why is in `ovs-graceful runs show {}` then", args.id, args.id),
        },
    }
}

/// ExecStart= of a unit, with its variables, which this process has as well: it is a command of the same unit.
fn exec_start(unit: &str) -> anyhow::Result<Vec<OsString>> {
    let found = Systemd::default().unit(unit, soon())?.with_context(|| format!("there is no {unit}"))?;
    let words = expanded(&found.exec_start, |name| std::env::var(name).ok());
    match words.is_empty() {
        true => bail!("{unit} has no ExecStart="),
        false => Ok(words.into_iter().map(OsString::from).collect()),
    }
}

/// What systemd makes of a command line's variables (systemd.service(5), "Command lines"): a word `$NAME` becomes as many
/// words as its value has, `${NAME}` within a word its value, `$$` a dollar.
fn expanded(words: &[String], value: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let mut out = Vec::new();
    for word in words {
        match word.strip_prefix('$').filter(|name| is_name(name)) {
            Some(name) => out.extend(value(name).unwrap_or_default().split_whitespace().map(str::to_owned)),
            None => out.push(within(word, &value)),
        }
    }
    out
}

fn within(word: &str, value: &impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = word;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        match (after.strip_prefix('$'), after.strip_prefix('{').and_then(|after| after.split_once('}'))) {
            (Some(after), _) => {
                out.push('$');
                rest = after;
            }
            (None, Some((name, after))) => {
                out.push_str(&value(name).unwrap_or_default());
                rest = after;
            }
            (None, None) => {
                out.push('$');
                rest = after;
            }
        }
    }
    out + rest
}

/// What every package has as ExecReload= of this unit.
fn of_restart(start: &[OsString]) -> Vec<OsString> {
    start.iter().map(|word| if word == "start" { "restart".into() } else { word.clone() }).collect()
}

/// ExecStop= of the same unit, and of that of ovs-vswitchd: a run where the unit is being restarted.
pub(super) fn unit_stop(config: &Path, unit: String, command: &[OsString]) -> u8 {
    let doors = doors_or_keep(config);
    if !doors.restarts() || is_plain() {
        return package_s_own(command);
    }
    let systemd = Systemd::default();
    let jobs = match systemd.jobs(soon()) {
        Ok(jobs) => jobs,
        Err(error) => {
            complain(&format!("cannot ask systemd for its jobs ({error}): not a run of ovs-graceful"));
            return package_s_own(command);
        }
    };
    let restarts = jobs.iter().any(|job| job.unit == unit && job.kind == "restart" && job.running);
    if restarts {
        patience::ask(longest_run(config));
    }
    match restarts {
        true if unit == SWITCH_UNIT => switch_stop(config, unit, command),
        true => {
            let (code, restarts) = umbrella_stop(config, &unit, &systemd, &jobs);
            match (code, restarts) {
                (Some(code), _) if ![ExitCode::Refused.code(), FAILED, USAGE].contains(&code) => {
                    neighbours::forget();
                    well(code)
                }
                (None, _) => package_s_own(command),
                (Some(_), restarts) => {
                    refused(doors.refused, &unit, &systemd, &jobs, &restarts);
                    package_s_own(command)
                }
            }
        }
        false => package_s_own(command),
    }
}

/// systemd restarts both daemons with the unit that stands for them (`PartOf=`); where the run replaces them, their jobs,
/// which wait for us, are taken back before it begins. Where a run is under way already it is waited for; a restart of a
/// daemon's own unit goes on then, and is a run of its own.
///
/// The exit code of the run, where there was one, and the restarts that were taken back for it.
fn umbrella_stop(config: &Path, unit: &str, systemd: &Systemd, jobs: &[QueuedJob]) -> (Option<u8>, Vec<QueuedJob>) {
    let under_way = RunLock::holder(Path::new(LOCK)).ok().flatten();
    let restarts = match under_way.is_some() && status_now().as_ref().is_some_and(hands_over) {
        true => waiting_restarts(unit, jobs, 0),
        false => restarts_of_the_daemons(unit, jobs),
    };
    let Some(restarts) = restarts else {
        wait_while(longest_run(config), |_, _, _| true);
        return (None, Vec::new());
    };
    if let Err(error) = take_back(systemd, &restarts) {
        complain(&format!("cannot take back the restart of the daemons ({error}): not a run of ovs-graceful"));
        restart_as_asked(systemd, &restarts);
        return (None, Vec::new());
    }
    if let Some(holder) = &under_way {
        complain(&format!("run {} replaces the daemons", holder.id));
        wait_while(longest_run(config), |_, _, _| true);
    }
    // Done by that run, unless files have been replaced since.
    let if_needed = under_way.is_some_and(|holder| was_done(&holder.id));
    let args = RestartArgs { if_needed, called_by: Some(unit.to_owned()), ..RestartArgs::default() };
    (Some(restart(config, args)), restarts)
}

/// The run was refused. Either who asked for a restart gets the one that there would be without us, as after the upgrade of
/// a package nobody else would start the new daemons: what was taken back is queued again. Or the daemons stay, and the
/// restart of the unit is taken back as well, so that systemctl fails; the unit is started again, as it is being stopped.
fn refused(wish: WhenRefused, unit: &str, systemd: &Systemd, jobs: &[QueuedJob], restarts: &[QueuedJob]) {
    match wish {
        WhenRefused::Plain => {
            complain("refused, see above: the daemons are restarted as they are without ovs-graceful");
            restart_as_asked(systemd, restarts);
        }
        WhenRefused::Keep => {
            neighbours::forget();
            complain(&format!("refused, see above: the daemons stay as they are; the restart of {unit} is cancelled"));
            let own = jobs.iter().find(|job| job.unit == unit);
            let cancelled = own.map_or(Ok(()), |job| systemd.cancel_job(job.id, soon()));
            let started = systemd.start_job(unit, JobKind::Start, soon()).map(drop);
            if let Err(error) = cancelled.and(started) {
                complain(&format!("{error}; remedy: systemctl start {unit}"));
            }
        }
    }
}

/// The unit of ovs-vswitchd is being restarted, alone or with ovsdb-server. systemd will start the new daemon once this
/// command has ended and the old one as well; until then the run prepares what it can, and parks (strategy stop-start).
/// Ended for us or refused, the old daemon is stopped as the package does.
fn switch_stop(config: &Path, unit: String, command: &[OsString]) -> u8 {
    if Config::load(config).is_err() {
        // It was told above.
        complain("the daemon is restarted as it is without ovs-graceful: systemd ends it whatever we do");
        neighbours::restart_as_asked();
        return package_s_own(command);
    }
    // It may be the run under way that restarts the unit, as its last resort.
    let free = wait_while(longest_run(config), ends_without_us);
    match free.then(|| wait_for_the_word(config, unit)).transpose() {
        Ok(Some(())) => {
            neighbours::forget();
            0
        }
        _ if !main_process().is_some_and(|pid| lives(&pid)) => 0,
        Ok(None) => {
            neighbours::restart_as_asked();
            package_s_own(command)
        }
        Err(error) => {
            complain(&format!("{error:#}: the daemon is restarted as it is without ovs-graceful"));
            neighbours::restart_as_asked();
            package_s_own(command)
        }
    }
}

/// Waits for the end of the run under way, for `limit` at most and as long as `on` says so of what it is doing and of how long it has been doing
/// that. True where no run is under way any more.
fn wait_while(limit: Duration, on: impl Fn(&Holder, Option<&Status>, Duration) -> bool) -> bool {
    let begun = Instant::now();
    let mut stays = Stays(None);
    let mut told = false;
    while begun.elapsed() < limit {
        let holder = match RunLock::holder(Path::new(LOCK)) {
            Ok(Some(holder)) => holder,
            Ok(None) => return true,
            Err(_) => return false,
        };
        let run = status_now();
        let doing = run.as_ref().map(|run| (run.doing.clone(), run.phase));
        if !on(&holder, run.as_ref(), stays.at((holder.id.clone(), doing), Instant::now())) {
            return false;
        }
        if !std::mem::replace(&mut told, true) {
            complain(&format!("run {} is under way: waiting for its end", holder.id));
        }
        thread::sleep(LOOK_AGAIN);
    }
    false
}

/// How long something has been what it is.
struct Stays<T>(Option<(T, Instant)>);

impl<T: PartialEq> Stays<T> {
    /// It is `this` now.
    fn at(&mut self, this: T, now: Instant) -> Duration {
        let since = self.0.take().filter(|(last, _)| *last == this).map_or(now, |(_, since)| since);
        self.0 = Some((this, since));
        now.saturating_duration_since(since)
    }
}

/// Whether the run under way, which has been where it is for so `long`, will end while the restart of ovs-vswitchd's unit
/// waits; `None` where it does not answer.
fn ends_without_us(holder: &Holder, run: Option<&Status>, long: Duration) -> bool {
    // Before its first words, or after its last. A recovery may be the one that restarts the unit.
    let Some(run) = run else { return holder.id != RECOVERY && long < HANDED_OVER };
    match (run.doing.as_str(), run.phase) {
        _ if run.can_abort => true,
        ("undoing" | "finished", _) | ("doing", Some(Phase::Verify)) => true,
        // The unit may be the package's again.
        ("doing", Some(Phase::Settle)) => long < HANDED_OVER,
        // systemd refuses a restart by hand now, so this one is the run's own, which waits for it.
        _ => false,
    }
}

/// Whether the run under way may have the unit's reload queued, by which systemd takes the new daemon over.
fn hands_over(run: &Status) -> bool {
    match (run.doing.as_str(), run.phase) {
        ("starting" | "finished", _) | (_, None) => false,
        ("doing", Some(phase)) => (Phase::Standby..Phase::Verify).contains(&phase),
        _ => true,
    }
}

/// `None` where no run answers.
fn status_now() -> Option<Status> {
    connect().ok()??.status().ok()
}

/// Starts the run; returns when it has ended the old daemon and wants the new one.
fn wait_for_the_word(config: &Path, unit: String) -> anyhow::Result<()> {
    let args = from_its_unit(config, unit, Strategy::StopStart);
    let mut hook = match launch(&args)? {
        Launched::Running(_) => HookClient::open(Path::new(SOCKET))?.context("the run has gone")?,
        Launched::Over(report) => bail!("run {}: {}", report.id, report.reason),
    };
    match hook.next_command()?.with_context(|| how_it_ended(&args.id))? {
        HookCommand::Start => Ok(hook.reporter()?.child_exited(0)?),
        HookCommand::Finish => Ok(()),
        HookCommand::Cancel => bail!("run {} was cancelled", args.id),
    }
}

/// A run that a command of ovs-vswitchd's own unit begins.
fn from_its_unit(config: &Path, unit: String, strategy: Strategy) -> SuperviseArgs {
    let args = SuperviseArgs::new(strategy, config.to_path_buf());
    // systemd restarts ovsdb-server where that was asked for, before it starts the new ovs-vswitchd.
    SuperviseArgs { no_ovsdb: true, called_by: Some(unit), ..args }
}

fn how_it_ended(id: &str) -> String {
    match Runs::default().report(id) {
        Ok(report) => format!("run {id}: {}", report.reason),
        Err(_) => format!("run {id} has gone"),
    }
}

/// Until when a run has ended in any case.
fn longest_run(config: &Path) -> Duration {
    Config::load_or_default(config).0.longest_run()
}

fn doors(config: &Path) -> Result<DoorsConfig, u8> {
    let loaded = Config::load(config).map_err(|error| {
        complain(&format!("{error}"));
        USAGE
    })?;
    Ok(loaded.doors)
}

/// A configuration that cannot be read is told, and nothing is lost because of it.
pub(super) fn doors_or_keep(config: &Path) -> DoorsConfig {
    doors(config).unwrap_or_else(|_| DoorsConfig::unreadable())
}

/// Is `ovs-graceful restart --plain` under way?
pub(super) fn is_plain() -> bool {
    RunLock::holder(Path::new(LOCK)).ok().flatten().is_some_and(|holder| holder.id == PLAIN)
}

fn was_done(run: &str) -> bool {
    let done = |report: Report| matches!(report.exit_code, ExitCode::Done | ExitCode::Differences);
    Runs::default().report(run).is_ok_and(done)
}

fn well(code: u8) -> u8 {
    match code == ExitCode::Differences.code() {
        true => 0,
        false => code,
    }
}

fn package_s_own(command: &[OsString]) -> u8 {
    let Some((program, arguments)) = command.split_first() else { return 2 };
    let error = Command::new(program).args(arguments).exec();
    complain(&format!("cannot run {}: {error}", program.display()));
    1
}

fn soon() -> Instant {
    Instant::now() + ANSWER_LIMIT
}

/// The restarts of the daemons that wait for `unit`'s own; `None` where `unit` is not being restarted, or more is under
/// way than a restart: then the daemons are not ours to replace. Nor are they where it was one of them whose restart was
/// asked for, which systemd has passed on to `unit` (`Requires=`): who waits for that job would be told that it was
/// taken back. The job that was asked for is the first of those that come with it (src/core/transaction.c of systemd).
fn restarts_of_the_daemons(unit: &str, jobs: &[QueuedJob]) -> Option<Vec<QueuedJob>> {
    let asked_for = jobs.iter().find(|job| job.unit == unit)?.id;
    waiting_restarts(unit, jobs, asked_for)
}

/// As [`restarts_of_the_daemons`], of the jobs whose number is larger than `after`. During a run the reload by which it
/// hands over has become a restart, too, which would end the new daemon.
fn waiting_restarts(unit: &str, jobs: &[QueuedJob], after: u32) -> Option<Vec<QueuedJob>> {
    let of = |name: &str| jobs.iter().find(|job| job.unit == name);
    of(unit).filter(|job| job.kind == "restart" && job.running)?;
    let waits = |job: &&QueuedJob| job.kind == "restart" && !job.running && job.id > after;
    let switch = of(SWITCH_UNIT).filter(waits)?;
    let database = match of(DATABASE_UNIT) {
        None => None,
        Some(job) => Some(Some(job).filter(waits)?),
    };
    Some([Some(switch), database].into_iter().flatten().cloned().collect())
}

fn take_back(systemd: &Systemd, jobs: &[QueuedJob]) -> crate::host::Result<()> {
    jobs.iter().try_for_each(|job| systemd.cancel_job(job.id, soon()))
}

/// Not waited for: it waits for us. Up to Open vSwitch 3.x a restart of ovsdb-server is one of ovs-vswitchd as well
/// (`Requires=`); a second job might find the first one's work done, and do it again. From 4.0 on it is not.
fn restart_as_asked(systemd: &Systemd, jobs: &[QueuedJob]) {
    for unit in [DATABASE_UNIT, SWITCH_UNIT] {
        if !jobs.iter().any(|job| job.unit == unit) || is_restarted(systemd, unit) {
            continue;
        }
        if let Err(error) = systemd.queue_restart(unit, soon()) {
            complain(&format!("cannot restart {unit}: {error}; remedy: systemctl restart {unit}"));
        }
    }
    neighbours::restart_as_asked();
}

fn is_restarted(systemd: &Systemd, unit: &str) -> bool {
    let queued = |jobs: Vec<QueuedJob>| jobs.iter().any(|job| job.unit == unit && job.kind == "restart");
    systemd.jobs(soon()).is_ok_and(queued)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UMBRELLA: &str = "openvswitch-switch.service";

    fn job(id: u32, unit: &str, kind: &str, running: bool) -> QueuedJob {
        QueuedJob { id, unit: unit.into(), kind: kind.into(), running }
    }

    fn restart_of_all() -> Vec<QueuedJob> {
        vec![
            job(1, UMBRELLA, "restart", true),
            job(2, "ovs-record-hostname.service", "restart", false),
            job(3, SWITCH_UNIT, "restart", false),
            job(4, DATABASE_UNIT, "restart", false),
        ]
    }

    fn ids(jobs: &[QueuedJob]) -> Option<Vec<u32>> {
        let found = restarts_of_the_daemons(UMBRELLA, jobs)?;
        Some(found.iter().map(|job| job.id).collect())
    }

    #[test]
    fn variables_become_what_systemd_makes_of_them() {
        let value = |name: &str| match name {
            "OPTS" => Some("--a  --b=c".to_owned()),
            "EMPTY" => Some(String::new()),
            "DIR" => Some("/x y".to_owned()),
            _ => None,
        };
        let words = ["/ctl", "start", "$OPTS", "$EMPTY", "$NONE", "--d=${DIR}/${NONE}z", "a$b", "$$OPTS", "5$"];
        let words = expanded(&words.map(String::from), value);
        assert_eq!(words, ["/ctl", "start", "--a", "--b=c", "--d=/x y/z", "a$b", "$OPTS", "5$"]);
        let words: Vec<OsString> = words.into_iter().map(OsString::from).collect();
        assert_eq!(of_restart(&words)[1], "restart");
    }

    fn status(doing: &str, phase: Phase, can_abort: bool) -> Status {
        let (id, doing) = ("run-1".to_owned(), doing.to_owned());
        Status { id, pid: 7, phase: Some(phase), doing, can_abort, ..Status::default() }
    }

    #[test]
    fn a_restart_waits_for_a_run_that_does_not_wait_for_it() {
        let holder = |id: &str| Holder { id: id.to_owned(), pid: 7 };
        let waits = |run: &Status| ends_without_us(&holder("run-1"), Some(run), HANDED_OVER);
        assert!(waits(&status("doing", Phase::Arm, true)));
        assert!(waits(&status("undoing", Phase::Standby, false)));
        assert!(waits(&status("doing", Phase::Verify, false)));
        assert!(waits(&status("finished", Phase::Verify, false)));
        assert!(!waits(&status("doing", Phase::Restore, false)));
        assert!(!waits(&status("going back", Phase::Settle, false)));
        let settles = status("doing", Phase::Settle, false);
        let soon = Duration::from_secs(1);
        assert!(!waits(&settles) && ends_without_us(&holder("run-1"), Some(&settles), soon));
        assert!(ends_without_us(&holder("run-1"), None, soon) && !ends_without_us(&holder("run-1"), None, HANDED_OVER));
        assert!(!ends_without_us(&holder(RECOVERY), None, soon));
    }

    #[test]
    fn what_is_something_else_now_has_not_been_it_for_long() {
        let begun = Instant::now();
        let after = |s| begun + Duration::from_secs(s);
        let mut stays = Stays(None);
        let seen = ["arm", "arm", "gone", "gone", "arm"].iter().zip([0, 19, 20, 22, 23]);
        let long: Vec<u64> = seen.map(|(this, s)| stays.at(this, after(s)).as_secs()).collect();
        assert_eq!(long, [0, 19, 0, 2, 0]);
    }

    #[test]
    fn a_reload_is_queued_from_the_standby_until_the_end_of_settle() {
        assert!(!hands_over(&status("doing", Phase::Arm, true)) && hands_over(&status("doing", Phase::Standby, true)));
        assert!(
            hands_over(&status("doing", Phase::Settle, false)) && !hands_over(&status("doing", Phase::Verify, false))
        );
        assert!(
            hands_over(&status("undoing", Phase::Standby, true))
                && hands_over(&status("going back", Phase::Restore, false))
        );
        assert!(!hands_over(&status("finished", Phase::Verify, false)));
    }

    #[test]
    fn a_restart_takes_the_daemons_jobs_and_no_others() {
        assert_eq!(ids(&restart_of_all()), Some(vec![3, 4]));
        let without_database: Vec<_> = restart_of_all().into_iter().filter(|job| job.id != 4).collect();
        assert_eq!(ids(&without_database), Some(vec![3]));
    }

    #[test]
    fn whatever_is_not_a_restart_is_the_package_s() {
        for (at, kind, running) in
            [(0, "stop", true), (0, "restart", false), (2, "stop", false), (2, "restart", true), (3, "stop", false)]
        {
            let mut jobs = restart_of_all();
            jobs[at] = QueuedJob { kind: kind.into(), running, ..jobs[at].clone() };
            assert_eq!(ids(&jobs), None, "{kind} {running} of {}", jobs[at].unit);
        }
        for daemon in [2, 3] {
            let mut jobs = restart_of_all();
            jobs[daemon].id = 0;
            assert_eq!(ids(&jobs), None, "the restart of {} was asked for", jobs[daemon].unit);
        }
        let nothing_of_the_switch: Vec<_> = restart_of_all().into_iter().filter(|job| job.id != 3).collect();
        assert_eq!(ids(&nothing_of_the_switch), None);
        assert_eq!(ids(&[]), None);
    }
}

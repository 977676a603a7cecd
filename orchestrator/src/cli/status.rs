//! `status`: what is going on, how the last run ended and whether a person is needed, from the supervisor's socket, the
//! lock, past runs, the freeze's pins, the daemons and the database. Touches nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use dpfreeze::freeze;
use serde::Serialize;

use super::connect;
use super::ended::{FAILED, USAGE};
use super::output::{say, say_json};
use crate::check::START;
use crate::config::Config;
use crate::control::{Holder, RunLock, Status, LOCK, PLAIN};
use crate::guard;
use crate::host::clock::unix_ms;
use crate::host::real::assemble::DATABASE_SOCKET;
use crate::host::real::{is_program_installed, Ovsdb, RealDaemons, Systemd};
use crate::host::{Daemon, DaemonKind, Daemons, Database, DatabaseFacts, ServiceManager, SWITCH_UNIT};
use crate::journal::Runs;
use crate::machine::ExitCode;
use crate::recovery::{MARK, RECOVERY};
use crate::report::Report;

/// The schema of [`Answer`]: keys may be added, never renamed or removed.
const SCHEMA: u32 = 1;

/// How long the database may take to answer.
const DATABASE_LIMIT: Duration = Duration::from_secs(3);

/// How long systemd may take to answer.
const SYSTEMD_LIMIT: Duration = Duration::from_secs(3);

/// How long a daemon may take to say its version.
const VERSION_LIMIT: Duration = Duration::from_secs(3);

/// The answer of `status`.
#[derive(Debug, Default, Serialize)]
struct Answer {
    /// Always [`SCHEMA`].
    schema: u32,
    /// What the command exits with.
    exit_code: u8,
    /// The run under way, as its supervisor says.
    run: Option<Status>,
    /// Who holds the run lock.
    lock: Option<Holder>,
    /// A run that was cut off and has to be recovered.
    interrupted: Option<String>,
    /// A run that ended with 40, since when nothing has put the host right.
    needs_person: Option<String>,
    /// The last run that has a report.
    last_run: Option<LastRun>,
    /// The freeze, as its pins say.
    freeze: Option<freeze::State>,
    /// The timeout policies that are guarded for live connections, run or no run.
    guard: Option<guard::Status>,
    /// Whether flow-restore-wait is set; `null` where the database does not answer.
    flow_restore_wait: Option<bool>,
    /// The run whose mark is on that flag, or was left without it.
    flow_restore_wait_of: Option<String>,
    /// The daemons that run; none while a run is under way.
    daemons: Vec<RunningDaemon>,
    /// The daemons that are installed and do not run; none while a run is under way.
    not_running: Vec<&'static str>,
    /// The configuration.
    configuration: Configuration,
    /// What could not be found out.
    unknown: Vec<String>,
    /// Of that, what the exit code depends on.
    #[serde(skip)]
    undecided: bool,
}

/// How the last run ended.
#[derive(Debug, Clone, Serialize)]
struct LastRun {
    id: String,
    exit_code: u8,
    result: String,
    reason: String,
    /// Milliseconds since 1970-01-01 UTC.
    ended_ms: u64,
}

impl LastRun {
    fn of(report: &Report) -> LastRun {
        LastRun {
            id: report.id.clone(),
            exit_code: report.exit_code.code(),
            result: report.result.clone(),
            reason: report.reason.clone(),
            ended_ms: report.started_ms.saturating_add(report.duration_ms),
        }
    }
}

/// A daemon, against what a start now would give.
#[derive(Debug, Clone, Serialize)]
struct RunningDaemon {
    program: &'static str,
    pid: i32,
    running: Option<String>,
    installed: Option<String>,
    /// The files that it runs and that were replaced or removed since it started.
    replaced: Vec<String>,
    restart_needed: bool,
}

/// Where the configuration is from, and what is wrong with it.
#[derive(Debug, Clone, Default, Serialize)]
struct Configuration {
    file: String,
    /// `null` where it is well.
    error: Option<String>,
}

/// Prints what is going on; returns the exit code.
pub fn status(config: &Path, json: bool) -> u8 {
    let mut answer = ask(config);
    answer.exit_code = exit_code(&answer);
    match json {
        true => say_json(&answer),
        false => say(in_words(&answer, unix_ms()).trim_end()),
    }
    answer.exit_code
}

/// For monitoring: 0 quiet, 11 a run is under way, 40 needs a person, 1 that could not be found out or a daemon does not
/// run, 2 the configuration cannot be read.
fn exit_code(answer: &Answer) -> u8 {
    let stuck = answer.flow_restore_wait == Some(true);
    match answer.run.is_some() || answer.lock.is_some() {
        true => ExitCode::Busy.code(),
        false if answer.interrupted.is_some() || answer.needs_person.is_some() || stuck => ExitCode::NeedsPerson.code(),
        false if answer.undecided || !answer.not_running.is_empty() => FAILED,
        false if answer.configuration.error.is_some() => USAGE,
        false => ExitCode::Done.code(),
    }
}

fn ask(config: &Path) -> Answer {
    let mut unknown = Vec::new();
    let runs = Runs::default();
    let lock = known(&mut unknown, RunLock::holder(Path::new(LOCK)));
    let run = known(&mut unknown, connect().and_then(|run| run.map(|mut run| Ok(run.status()?)).transpose()));
    let quiet = lock.is_none() && run.is_none();
    let interrupted = if quiet { known(&mut unknown, runs.interrupted()) } else { None };
    let needs_person = known(&mut unknown, runs.needs_person());
    let last_run = known(&mut unknown, last_run(&runs));
    let mut undecided = !unknown.is_empty();
    let freeze = known(&mut unknown, freeze::state());
    let guard = known(&mut unknown, guard::status());
    // To ask is not to start: ovsdb-server is told as not running.
    let asks = !RealDaemons::new(DATABASE_SOCKET).would_start_database();
    let facts = asks.then(|| Ovsdb::new(DATABASE_SOCKET).facts(Instant::now() + DATABASE_LIMIT)).transpose();
    let facts = known(&mut unknown, facts);
    let flow_restore_wait = facts.as_ref().map(DatabaseFacts::is_restore_wait_stuck);
    // A host without ovsdb-server has no flag.
    undecided |= flow_restore_wait.is_none() && Path::new(DATABASE_SOCKET).exists();
    let flow_restore_wait_of = facts.and_then(|facts| facts.external_ids.get(MARK).cloned());
    let (daemons, not_running) = if quiet { daemons(&mut unknown, &mut undecided) } else { Default::default() };
    let error = Config::load(config).err().map(|error| error.to_string());
    let configuration = Configuration { file: config.display().to_string(), error };
    Answer {
        schema: SCHEMA,
        run,
        lock,
        interrupted,
        needs_person,
        last_run,
        freeze,
        guard,
        flow_restore_wait,
        flow_restore_wait_of,
        daemons,
        not_running,
        configuration,
        unknown,
        undecided,
        ..Answer::default()
    }
}

fn known<T, E: Into<anyhow::Error>>(unknown: &mut Vec<String>, asked: Result<Option<T>, E>) -> Option<T> {
    asked.unwrap_or_else(|error| {
        unknown.push(format!("{:#}", error.into()));
        None
    })
}

/// The last run that has a report; one that touched nothing counts where there is no other.
fn last_run(runs: &Runs) -> anyhow::Result<Option<LastRun>> {
    let reports: Vec<Report> = runs.list()?.into_iter().filter_map(|run| run.report).collect();
    let real = reports.iter().rev().find(|report| !report.touched_nothing());
    Ok(real.or(reports.last()).map(LastRun::of))
}

/// The daemons that run, and those that are installed and do not.
fn daemons(unknown: &mut Vec<String>, undecided: &mut bool) -> (Vec<RunningDaemon>, Vec<&'static str>) {
    let daemons = RealDaemons::new(DATABASE_SOCKET);
    // A host that has ovsdb-server alone has it for something else.
    let installed = is_installed();
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for kind in [DaemonKind::OvsVswitchd, DaemonKind::OvsdbServer] {
        match known(unknown, daemons.find_all(kind).map(Some)) {
            Some(all) if all.is_empty() && installed => missing.push(kind.program()),
            Some(all) => found.extend(all.iter().map(|daemon| running(&daemons, daemon, unknown))),
            None => *undecided |= installed,
        }
    }
    (found, missing)
}

/// Does this host have an ovs-vswitchd to start: its program, or its unit? One in a container is not this host's.
fn is_installed() -> bool {
    let systemd = Systemd::default();
    let unit =
        || systemd.is_running().then(|| systemd.unit(SWITCH_UNIT, Instant::now() + SYSTEMD_LIMIT).ok()).flatten();
    is_program_installed(DaemonKind::OvsVswitchd)
        // A drop-in alone is no unit.
        || unit().flatten().is_some_and(|unit| unit.fragment.is_some())
}

fn running(daemons: &RealDaemons, daemon: &Daemon, unknown: &mut Vec<String>) -> RunningDaemon {
    let versions = known(unknown, daemons.versions(daemon, Instant::now() + VERSION_LIMIT).map(Some));
    let replaced = known(unknown, daemons.replaced(daemon).map(Some)).unwrap_or_default();
    let other = versions.as_ref().is_some_and(|versions| versions.running != versions.installed);
    RunningDaemon {
        program: daemon.kind.program(),
        pid: daemon.id.pid,
        restart_needed: other || daemon.exe_deleted || !replaced.is_empty(),
        running: versions.as_ref().map(|versions| versions.running.clone()),
        installed: versions.map(|versions| versions.installed),
        replaced,
    }
}

fn in_words(answer: &Answer, now_ms: u64) -> String {
    let mut lines = vec![run_line(answer)];
    lines.extend(answer.interrupted.as_ref().map(|id| format!("run {id} was cut off; remedy: `ovs-graceful recover`")));
    lines.extend(answer.last_run.as_ref().map(|last| last_line(last, now_ms)));
    lines.extend(answer.needs_person.as_ref().map(|id| {
        format!("run {id} needs a person; remedy: `ovs-graceful recover` looks whether the host is well again")
    }));
    lines.push(freeze_line(answer.freeze.as_ref()));
    lines.extend(answer.guard.as_ref().map(guard_lines));
    lines.push(flag_line(answer));
    lines.extend(answer.daemons.iter().map(daemon_line));
    lines.extend(answer.not_running.iter().map(|program| format!("{program} does not run; remedy: {START}")));
    lines.extend(answer.configuration.error.as_ref().map(|error| {
        format!(
            "{error}\nuntil then no run begins: an upgrade leaves the daemons of Open vSwitch as they are, and a restart \
             of its unit fails"
        )
    }));
    lines.extend(answer.unknown.iter().map(|why| format!("unknown: {why}")));
    lines.join("\n")
}

fn last_line(last: &LastRun, now_ms: u64) -> String {
    let LastRun { id, exit_code, result, reason, ended_ms } = last;
    let ago = ago(now_ms.saturating_sub(*ended_ms) / 1000);
    format!("last run {id}: {result} (exit {exit_code}), {ago}: {reason}; see `ovs-graceful runs show {id}`")
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s ago"),
        120..=7_199 => format!("{} min ago", seconds / 60),
        7_200..=172_799 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

fn daemon_line(daemon: &RunningDaemon) -> String {
    let version = |known: &Option<String>| known.clone().unwrap_or_else(|| "of an unknown version".to_owned());
    let mut line = format!("{} {} (process {})", daemon.program, version(&daemon.running), daemon.pid);
    if !daemon.restart_needed {
        return line;
    }
    let mut why = Vec::new();
    if let Some(installed) = daemon.installed.as_ref().filter(|installed| Some(*installed) != daemon.running.as_ref()) {
        why.push(format!("{installed} is installed"));
    }
    if let Some(first) = daemon.replaced.first() {
        let more = match daemon.replaced.len() - 1 {
            0 => String::new(),
            1 => " and 1 more file".to_owned(),
            more => format!(" and {more} more files"),
        };
        why.push(format!("{first}{more} replaced since its start"));
    } else if why.is_empty() {
        why.push("its program was replaced since its start".to_owned());
    }
    line.push_str(&format!(": restart needed: {}; remedy: `ovs-graceful restart --if-needed`", why.join(", ")));
    line
}

fn flag_line(answer: &Answer) -> String {
    let under_way = answer.lock.is_some() || answer.run.is_some();
    match (answer.flow_restore_wait, &answer.flow_restore_wait_of) {
        (Some(true), _) if under_way => "flow-restore-wait is set".to_string(),
        (Some(true), Some(run)) => format!(
            "flow-restore-wait is SET by run {run}, which is over: an ovs-vswitchd that starts with it answers no misses; \
             remedy: `ovs-graceful recover`"
        ),
        (Some(true), None) => {
            "flow-restore-wait is SET and no run is under way: the next start of ovs-vswitchd will wait, and answer no \
             misses; remedy, if nobody is restoring flows: `ovs-vsctl remove open_vswitch . other_config flow-restore-wait`"
                .to_string()
        }
        (Some(false), _) => "flow-restore-wait is not set".to_string(),
        (None, _) => "flow-restore-wait: unknown".to_string(),
    }
}

fn run_line(answer: &Answer) -> String {
    match (&answer.run, &answer.lock) {
        (Some(run), _) => run_lines(run),
        (None, Some(holder)) if [RECOVERY, PLAIN].contains(&holder.id.as_str()) => holder.to_string(),
        (None, Some(holder)) => {
            format!("run {} (process {}) holds the lock and does not listen", holder.id, holder.pid)
        }
        (None, None) => "no run is under way".to_string(),
    }
}

fn run_lines(run: &Status) -> String {
    let seconds = |ms: u64| ms as f64 / 1000.0;
    let phase = run.phase.map_or_else(String::new, |phase| format!(" {phase}"));
    let since = run.phase_ms.map_or_else(String::new, |ms| format!(" for {:.1} s", seconds(ms)));
    let limit = run.limit_ms.map_or_else(String::new, |ms| format!(" of at most {} s", ms.div_ceil(1000)));
    let where_to = match run.doing.as_str() {
        "finished" => "its report is being delivered",
        "undoing" => "it is being undone",
        "going back" => "it is going back to the old version",
        _ if run.can_abort => "it can be aborted",
        _ if run.committed => "it is past the point of no return",
        _ => "it was asked to abort, and will be undone",
    };
    let level = run.level.map_or_else(|| "not known yet".to_owned(), |level| level.to_string());
    let mut text = format!(
        "run {}: {}{phase}{since}{limit}, {:.1} s in all; {where_to}\n  level {level}; {} packets parked now, {} at most, \
         {} found no room",
        run.id,
        run.doing,
        seconds(run.elapsed_ms),
        run.parked,
        run.most_parked,
        run.overflowed
    );
    if let Some(lease) = run.lease_ms {
        text.push_str(&format!("; the freeze ends by itself in {:.1} s unless renewed", seconds(lease)));
    }
    text
}

fn freeze_line(freeze: Option<&freeze::State>) -> String {
    match freeze {
        None => "nothing is frozen".to_string(),
        Some(state) if !state.armed => "nothing is frozen (the program is loaded, its lease is over)".to_string(),
        Some(state) => format!(
            "frozen for {:.1} s more, {:.0} s at most: {}; refused so far: {}{}",
            state.lease_left_ms as f64 / 1000.0,
            state.end_left_ms as f64 / 1000.0,
            state.classes.iter_names().map(|(name, _)| name.to_lowercase()).collect::<Vec<_>>().join(", "),
            state.refused,
            match state.skipped.unseen {
                0 => String::new(),
                unseen => format!("; not looked at: {unseen} messages at the most"),
            }
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
    use crate::control::LockError;

    fn quiet() -> Answer {
        Answer { flow_restore_wait: Some(false), ..Answer::default() }
    }

    /// A minute after 1970.
    const NOW: u64 = 60_000;

    #[test]
    fn a_quiet_host_is_said_to_be_quiet() {
        let text = in_words(&quiet(), NOW);
        assert_eq!(text, "no run is under way\nnothing is frozen\nflow-restore-wait is not set");
        assert_eq!(exit_code(&quiet()), 0);
    }

    fn last(exit_code: ExitCode) -> LastRun {
        let (id, result) = ("run-7".to_owned(), exit_code.result().to_owned());
        LastRun { id, exit_code: exit_code.code(), result, reason: "why".into(), ended_ms: 15_000 }
    }

    #[test]
    fn the_last_run_is_told_and_one_that_needs_a_person_is_an_exit_code() {
        let answer = Answer { last_run: Some(last(ExitCode::NeedsPerson)), ..quiet() };
        let text = in_words(&answer, NOW);
        let line = "last run run-7: needs-person (exit 40), 45 s ago: why; see `ovs-graceful runs show run-7`";
        assert!(text.contains(line), "{text}");
        assert_eq!(exit_code(&answer), 0, "somebody has looked after it");
        let answer = Answer { needs_person: Some("run-7".into()), ..answer };
        assert!(in_words(&answer, NOW).contains("`ovs-graceful recover`"));
        assert_eq!(exit_code(&answer), 40);
    }

    #[test]
    fn what_needs_a_person_is_40_but_not_during_a_run() {
        let lock = Some(Holder { id: "run-8".into(), pid: 1 });
        let all = [
            Answer { interrupted: Some("run-7".into()), ..quiet() },
            Answer { flow_restore_wait: Some(true), ..quiet() },
            Answer { needs_person: Some("run-7".into()), ..quiet() },
        ];
        for answer in all {
            assert_eq!(exit_code(&answer), 40, "{answer:?}");
            assert_eq!(exit_code(&Answer { lock: lock.clone(), ..answer }), 11);
        }
        assert_eq!(exit_code(&Answer { undecided: true, ..quiet() }), 1);
    }

    #[test]
    fn a_daemon_that_does_not_run_and_a_configuration_that_cannot_be_read_are_no_quiet_host() {
        let stopped = Answer { not_running: vec!["ovs-vswitchd"], ..quiet() };
        assert_eq!(exit_code(&stopped), 1);
        let text = in_words(&stopped, NOW);
        assert!(text.contains("ovs-vswitchd does not run; remedy: `systemctl start openvswitch-switch`"), "{text}");
        let error = Some("unknown field".to_owned());
        let unread =
            |answer| Answer { configuration: Configuration { error: error.clone(), ..Default::default() }, ..answer };
        assert_eq!(exit_code(&unread(quiet())), 2);
        // What is worse comes first.
        assert_eq!(exit_code(&unread(stopped)), 1);
        assert_eq!(exit_code(&unread(Answer { interrupted: Some("run-7".into()), ..quiet() })), 40);
    }

    #[test]
    fn a_recovery_is_told_as_one_that_can_be_waited_for() {
        let line = |id: &str| run_line(&Answer { lock: Some(Holder { id: id.into(), pid: 7 }), ..quiet() });
        let text = line(RECOVERY);
        assert!(text.contains("a recovery is under way (process 7); `ovs-graceful wait` waits"), "{text}");
        let unsaid = LockError::Held { path: LOCK.into(), holder: None }.to_string();
        assert!(unsaid.contains("a run is under way that has not said"), "{unsaid}");
        assert!(line(PLAIN).contains("an ordinary restart"), "{}", line(PLAIN));
        assert!(line("run-8").contains("does not listen"), "{}", line("run-8"));
    }

    #[test]
    fn a_run_says_what_is_parked_and_whether_it_is_undone_or_past_return() {
        use crate::machine::Phase;
        use crate::report::Level;
        let status = Status {
            id: "run-8".into(),
            phase: Some(Phase::Restore),
            doing: "doing".into(),
            committed: true,
            phase_ms: Some(1_500),
            limit_ms: Some(60_000),
            elapsed_ms: 9_000,
            level: Some(Level::Full),
            parked: 7,
            most_parked: 9,
            overflowed: 2,
            lease_ms: Some(78_000),
            ..Status::default()
        };
        let text = run_lines(&status);
        let parts = [
            "doing restore for 1.5 s of at most 60 s, 9.0 s in all; it is past the point of no return",
            "level full; 7 packets parked now, 9 at most, 2 found no room; the freeze ends by itself in 78.0 s",
        ];
        parts.iter().for_each(|part| assert!(text.contains(part), "{part}: {text}"));
        let undoing = run_lines(&Status { doing: "undoing".into(), committed: false, ..status.clone() });
        assert!(undoing.contains("it is being undone") && !undoing.contains("no return"), "{undoing}");
        let asked = run_lines(&Status { committed: false, ..status.clone() });
        assert!(asked.contains("asked to abort"), "{asked}");
        let open = run_lines(&Status { committed: false, can_abort: true, ..status });
        assert!(open.contains("it can be aborted"), "{open}");
    }

    #[test]
    fn a_daemon_that_is_not_the_installed_one_needs_a_restart() {
        let daemon = RunningDaemon {
            program: "ovs-vswitchd",
            pid: 7,
            running: Some("3.1.0".into()),
            installed: Some("3.1.0".into()),
            replaced: vec![],
            restart_needed: false,
        };
        assert_eq!(daemon_line(&daemon), "ovs-vswitchd 3.1.0 (process 7)");
        let replaced = vec!["/usr/lib/libssl.so.3".into(), "/usr/lib/libcrypto.so.3".into()];
        let text = daemon_line(&RunningDaemon { replaced, restart_needed: true, ..daemon.clone() });
        assert!(text.contains("restart needed: /usr/lib/libssl.so.3 and 1 more file replaced"), "{text}");
        let text = daemon_line(&RunningDaemon { installed: Some("3.5.0".into()), restart_needed: true, ..daemon });
        assert!(text.contains("restart needed: 3.5.0 is installed; remedy: `ovs-graceful restart --if"), "{text}");
    }

    #[test]
    fn a_configuration_that_cannot_be_read_says_what_follows() {
        let error = Config::parse("[park]\nmax_packet = 9\n", "/etc/x.toml").unwrap_err().to_string();
        let configuration = Configuration { file: "/etc/x.toml".into(), error: Some(error) };
        let text = in_words(&Answer { configuration, ..quiet() }, NOW);
        assert!(
            text.contains("max_packet") && text.contains("/etc/x.toml") && text.contains("no run begins"),
            "{text}"
        );
    }

    #[test]
    fn a_guard_says_for_what_and_until_when() {
        let policy =
            guard::PolicyStatus { policy: "ovs_tp_1_udp4".into(), zones: [5, 6].into(), connections: 7, age_s: 90 };
        let guard =
            guard::Status { policies: vec![policy], refused: 3, lease_left_ms: 50_000, end_left_ms: 80_000_000 };
        let text = in_words(&Answer { guard: Some(guard.clone()), ..quiet() }, NOW);
        for part in ["50 s", "80000 s", "3 deletions", "ovs_tp_1_udp4 (zone 5, 6): 7 connections left, for 90 s"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = in_words(&Answer { guard: Some(guard::Status { lease_left_ms: 0, ..guard }), ..quiet() }, NOW);
        assert!(text.contains("lease is over"), "{text}");
    }

    #[test]
    fn a_flag_that_is_stuck_and_a_run_that_was_cut_off_come_with_their_remedies() {
        let answer = Answer { flow_restore_wait: Some(true), interrupted: Some("run-7".into()), ..quiet() };
        let text = in_words(&answer, NOW);
        assert!(text.contains("run-7") && text.contains("recover") && text.contains("ovs-vsctl remove"), "{text}");
        assert!(text.contains("the next start of ovs-vswitchd will wait"), "{text}");
        let holder = Holder { id: "run-8".into(), pid: 1 };
        let text = in_words(&Answer { flow_restore_wait: Some(true), lock: Some(holder), ..quiet() }, NOW);
        assert!(!text.contains("remedy"), "{text}");
        let ours = Answer { flow_restore_wait: Some(true), flow_restore_wait_of: Some("run-7".into()), ..quiet() };
        let text = in_words(&ours, NOW);
        assert!(text.contains("`ovs-graceful recover`") && !text.contains("ovs-vsctl"), "{text}");
    }
}

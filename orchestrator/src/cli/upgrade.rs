//! What Debian's package manager asks and tells during an upgrade of Open vSwitch (`debian/`).
//!
//! The package's preinst stops both daemons and its postinst starts them again; in between, with other packages in the
//! same upgrade, minutes may pass. Maintainer scripts ask `/usr/sbin/policy-rc.d` before they do so
//! (deb-systemd-invoke(1p)): where a run will be possible the stop is forbidden, and the restart of the umbrella at the
//! end is a run by its drop-in ([`super::doors`]). Without systemd postinst has the init script restart them, which is
//! forbidden likewise, and the run is made when the upgrade has come to its end.

use std::env;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use dpfreeze::freeze;

use super::output::{complain, say};
use super::restart::restart;
use super::RestartArgs;
use crate::config::{Config, DoorsConfig, WhenRefused};
use crate::control::{RunLock, LOCK, RUN_DIR};
use crate::guard;
use crate::host::disk::Disk;
use crate::host::real::assemble::DATABASE_SOCKET;
use crate::host::real::{RealDaemons, RealDisk, Systemd};
use crate::host::{DaemonKind, Daemons, ServiceManager, DATABASE_UNIT, HOSTNAME_UNIT, SWITCH_UNIT, UMBRELLAS};
use crate::journal::Runs;
use crate::machine::ExitCode;
use crate::report::{CheckReport, Finding, Name, Report, Severity, Strategy};
use crate::supervisor;

/// The action is allowed (README.policy-rc.d of init-system-helpers).
const ALLOWED: u8 = 0;
/// The action is forbidden by policy.
const FORBIDDEN: u8 = 101;

/// The package whose scripts take the daemons away.
const PACKAGE: &str = "openvswitch-switch";
/// Of Open vSwitch 4.0. systemd cannot make it anew while its server runs: who restarts it closes it.
const SOCKET_UNIT: &str = "ovsdb-server.socket";
/// The script of System V's init.
const INIT_SCRIPT: &str = "openvswitch-switch";

/// An upgrade asks several times, and is to hear the same: this was the first answer.
const ANSWER: &str = "upgrade";
/// A script's restart of the umbrella was forbidden for what it had with it: our trigger makes the run.
const RUN_IS_OURS: &str = "upgrade-run";
/// As long as an upgrade may take, from the first question to the last.
const ANSWER_LASTS: Duration = Duration::from_secs(20 * 60);

/// How long a daemon may take to say its version.
const VERSION_LIMIT: Duration = Duration::from_secs(10);

/// `policy-rc.d UNIT ACTION`: may a maintainer script do that?
pub(super) fn policy(config: &Path, unit: &str, action: &str) -> u8 {
    let asks = |name: &str| env::var(name).unwrap_or_default();
    let (package, script) = (asks("DPKG_MAINTSCRIPT_PACKAGE"), asks("DPKG_MAINTSCRIPT_NAME"));
    let answer = match takes_the_daemons_away(&package, &script, unit, action) {
        true => answer(config),
        // The restart at the end: where the daemons are to stay, it is none.
        false if is_the_restart(&package, &script, unit, action) => {
            kept_answer(&Path::new(RUN_DIR).join(ANSWER)).filter(|answer| *answer == Answer::Keep)
        }
        false => None,
    };
    let why = match answer {
        None | Some(Answer::Plain) => return ALLOWED,
        Some(Answer::Graceful) => "not now; Open vSwitch is replaced when its packages have been unpacked",
        Some(Answer::Keep) => "not done; the daemons stay as they are, see above",
    };
    complain(&format!("{action} of {unit}: {why}"));
    if unit == SOCKET_UNIT && answer == Some(Answer::Graceful) {
        keep_answer(&Path::new(RUN_DIR).join(RUN_IS_OURS), Answer::Graceful);
    }
    FORBIDDEN
}

/// What an upgrade does to the daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// They are replaced in a run, at its end.
    Graceful,
    /// They are stopped and started as without us.
    Plain,
    /// They stay as they are.
    Keep,
}

impl Answer {
    const ALL: [Answer; 3] = [Answer::Graceful, Answer::Plain, Answer::Keep];

    /// As it is kept.
    fn word(self) -> &'static str {
        match self {
            Answer::Graceful => "graceful",
            Answer::Plain => "plain",
            Answer::Keep => "keep",
        }
    }
}

/// Of Debian 12 and later preinst stops the daemons; of Debian 11 postinst restarts them one after the other before it
/// restarts the umbrella. With Open vSwitch 4.0 it restarts their socket together with the umbrella: deb-systemd-invoke
/// does all that it is asked for, or nothing.
fn takes_the_daemons_away(package: &str, script: &str, unit: &str, action: &str) -> bool {
    let daemon = [SWITCH_UNIT, DATABASE_UNIT].contains(&unit);
    package == PACKAGE
        && match (script, action) {
            ("preinst", "stop") => daemon || [HOSTNAME_UNIT, SOCKET_UNIT].contains(&unit),
            // In parentheses: the script has no link in this runlevel.
            ("postinst", "restart" | "(restart)") => daemon || [INIT_SCRIPT, SOCKET_UNIT].contains(&unit),
            _ => false,
        }
}

/// At the end of an upgrade the script restarts the unit that stands for both daemons.
fn is_the_restart(package: &str, script: &str, unit: &str, action: &str) -> bool {
    package == PACKAGE && (script, action) == ("postinst", "restart") && UMBRELLAS.contains(&unit)
}

/// `None` where an upgrade is none of our business.
fn answer(config: &Path) -> Option<Answer> {
    let kept = Path::new(RUN_DIR).join(ANSWER);
    let loaded = Config::load(config);
    let doors = loaded.as_ref().map_or_else(|_| DoorsConfig::unreadable(), |config| config.doors.clone());
    // Who makes the run: the umbrella's restart, or else we.
    if !doors.upgrades() || booted_with_systemd() && !doors.restarts() {
        return None;
    }
    if let Some(answer) = kept_answer(&kept) {
        return Some(answer);
    }
    let why_not = match &loaded {
        Ok(config) => why_not(config),
        Err(error) => vec![error.to_string()],
    };
    let answer = answer_to(&why_not, doors.refused, daemons_run());
    tell_why(answer, &why_not);
    keep_answer(&kept, answer);
    Some(answer)
}

/// Daemons that do not run are not kept from anything.
fn answer_to(why_not: &[String], wish: WhenRefused, daemons_run: bool) -> Answer {
    match (why_not.is_empty(), wish) {
        (true, _) => Answer::Graceful,
        (false, WhenRefused::Keep) if daemons_run => Answer::Keep,
        (false, _) => Answer::Plain,
    }
}

/// Where daemons run and it is no run, why not is told.
fn tell_why(answer: Answer, why_not: &[String]) {
    let what = match answer {
        Answer::Graceful => return,
        Answer::Plain if !daemons_run() => return,
        Answer::Plain => "stops Open vSwitch as without us",
        Answer::Keep => "leaves the daemons of Open vSwitch as they are",
    };
    why_not.iter().for_each(|why| complain(&format!("this upgrade {what}: {why}")));
    if answer == Answer::Keep {
        complain("once that is mended: `ovs-graceful restart --if-needed`; or now `ovs-graceful restart --plain`");
    }
}

fn why_not(config: &Config) -> Vec<String> {
    match supervisor::check(config, Strategy::Standby, false) {
        Ok(report) => hindrances(&report),
        Err(error) => vec![format!("{error:#}")],
    }
}

fn daemons_run() -> bool {
    RealDaemons::new(DATABASE_SOCKET).find_all(DaemonKind::OvsVswitchd).is_ok_and(|found| !found.is_empty())
}

fn booted_with_systemd() -> bool {
    Systemd::default().is_running()
}

/// What refuses a run. Of the files some may be new and some old already, or gone: they are looked at again when the run
/// begins. What cannot be kept of the running program now, with the version that is to go, cannot be kept then.
fn hindrances(report: &CheckReport) -> Vec<String> {
    let about_files = [Name::Versions, Name::Tools, Name::Schema];
    let refuses = |one: &&Finding| match one.name {
        Name::OldBinary => one.severity != Severity::Ok,
        name => one.severity == Severity::Refused && !about_files.contains(&name),
    };
    let others = report.findings.iter().filter(refuses);
    others.map(|one| format!("{}: {} (remedy: {})", one.object, one.cause, one.remedy)).collect()
}

fn kept_answer(path: &Path) -> Option<Answer> {
    let age = SystemTime::now().duration_since(fs::metadata(path).ok()?.modified().ok()?).ok()?;
    let word = fs::read_to_string(path).ok().filter(|_| age < ANSWER_LASTS)?;
    Answer::ALL.into_iter().find(|answer| answer.word() == word)
}

/// Where it cannot be kept it is asked for again.
fn keep_answer(path: &Path, answer: Answer) {
    let folder = path.parent().map_or(Ok(()), |folder| RealDisk.make_folder(folder));
    let _kept = folder.and_then(|()| RealDisk.replace(path, answer.word().as_bytes()));
}

/// The package's files have changed (our trigger): what became of it, as the scripts throw systemd's words away.
/// RPM's packages leave the old daemons running: there the run is made here (`restarts`), and where we have forbidden a
/// script to restart them.
pub(super) fn upgraded(config: &Path, restarts: bool) -> u8 {
    let daemons = RealDaemons::new(DATABASE_SOCKET);
    let find = || daemons.find_all(DaemonKind::OvsVswitchd).unwrap_or_default();
    let kept = Path::new(RUN_DIR).join(ANSWER);
    let ours = Path::new(RUN_DIR).join(RUN_IS_OURS);
    let forbidden = if booted_with_systemd() { &ours } else { &kept };
    let restarts = restarts || kept_answer(forbidden) == Some(Answer::Graceful);
    // One that cannot be read is told by the restart.
    let upgrades = Config::load(config).map_or(true, |config| config.doors.upgrades());
    if restarts && !find().is_empty() && upgrades {
        restart(config, RestartArgs { if_needed: true, ..RestartArgs::default() });
    }
    for answer in [kept, ours] {
        let _gone_already = fs::remove_file(answer);
    }
    let running = find();
    let [daemon] = running.as_slice() else { return ALLOWED };
    let last = Runs::default().list().ok().and_then(|mut runs| runs.pop()?.report);
    let versions = daemons.versions(daemon, Instant::now() + VERSION_LIMIT);
    let old = match &versions {
        Ok(versions) => daemon.exe_deleted || versions.running != versions.installed,
        Err(_) => daemon.exe_deleted,
    };
    let installed = versions.map(|versions| versions.installed).unwrap_or_default();
    match (old, last) {
        (true, last) => complain(&still_old(&installed, last.as_ref())),
        (false, Some(last)) => {
            say(&format!("ovs-graceful: ovs-vswitchd is {installed}; the last run was {}", told(&last)))
        }
        (false, None) => {}
    }
    ALLOWED
}

/// This program is about to be removed: not while a run is under way or was cut off, as what finishes or undoes it is
/// here. What would go on without it, the guard of timeout policies, is ended; whether Open vSwitch is there or not.
pub(super) fn removed() -> u8 {
    match RunLock::holder(Path::new(LOCK)) {
        Ok(Some(_)) => return ExitCode::Busy.code(),
        Ok(None) if matches!(Runs::default().interrupted(), Ok(None)) => {}
        Ok(None) | Err(_) => return ExitCode::Refused.code(),
    }
    if let Err(error) = guard::stop_looks(&Systemd::default()) {
        complain(&format!("the guard of timeout policies ends by itself only: {error:#}"));
    }
    if let Err(error) = freeze::thaw() {
        complain(&error.to_string());
    }
    if let Err(error) = guard::release() {
        complain(&format!("{error:#}; timeout policies are guarded for guard.lease_ms at most"));
    }
    ALLOWED
}

fn still_old(installed: &str, last: Option<&Report>) -> String {
    let last = last.map(|report| format!("; the last run was {}", told(report))).unwrap_or_default();
    format!(
        "ovs-vswitchd {installed} is installed, and the one before it still runs{last}; \
         remedy: `ovs-graceful check`, then `ovs-graceful restart --if-needed`"
    )
}

fn told(report: &Report) -> String {
    let of_step = report.reason.split_once(" failed").map(|(step, _)| format!("{step}: "));
    let why = of_step.and_then(|step| report.warnings.iter().find(|warning| warning.starts_with(&step)));
    let why = why.and_then(|warning| warning.lines().next()).map(|line| format!(" ({line})")).unwrap_or_default();
    format!("{} (exit {}): {}{why}", report.id, report.exit_code.code(), report.reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Findings;

    #[test]
    fn what_an_upgrade_does_to_the_daemons_is_told_from_all_else() {
        let taken = |script, unit, action| takes_the_daemons_away(PACKAGE, script, unit, action);
        for unit in [SWITCH_UNIT, DATABASE_UNIT, HOSTNAME_UNIT, SOCKET_UNIT] {
            assert!(taken("preinst", unit, "stop"), "{unit}");
            assert!(!taken("prerm", unit, "stop"), "a removal stops {unit}");
            assert!(!takes_the_daemons_away("ovs-graceful", "preinst", unit, "stop"));
            assert!(!takes_the_daemons_away("", "", unit, "stop"), "a person stops {unit}");
        }
        assert!(taken("postinst", SWITCH_UNIT, "restart"));
        assert!(taken("postinst", SOCKET_UNIT, "restart"), "it is made anew only while its server is away");
        assert!(taken("postinst", INIT_SCRIPT, "restart") && taken("postinst", INIT_SCRIPT, "(restart)"));
        assert!(!taken("postinst", "openvswitch-switch.service", "restart"), "this one is the run");
        assert!(!taken("postinst", SWITCH_UNIT, "start"));
        assert!(!taken("prerm", "openvswitch-switch.service", "stop"));
    }

    #[test]
    fn daemons_stay_only_where_that_was_chosen_and_they_run() {
        let why = ["bridge br0: STP is on".to_owned()];
        assert_eq!(answer_to(&[], WhenRefused::Keep, true), Answer::Graceful);
        assert_eq!(answer_to(&why, WhenRefused::Plain, true), Answer::Plain);
        assert_eq!(answer_to(&why, WhenRefused::Keep, true), Answer::Keep);
        assert_eq!(answer_to(&why, WhenRefused::Keep, false), Answer::Plain);
        assert!(is_the_restart(PACKAGE, "postinst", "openvswitch-switch.service", "restart"));
        assert!(!is_the_restart(PACKAGE, "postinst", SWITCH_UNIT, "restart"));
        assert!(!is_the_restart("", "", "openvswitch-switch.service", "restart"), "a person restarts it");
    }

    #[test]
    fn a_program_that_cannot_be_kept_stops_no_upgrade_half_way() {
        let mut found = crate::report::Findings::default();
        found.warn(Name::OldBinary, "/usr/sbin/ovs-vswitchd", "noexec", "remount");
        found.warn(Name::Lacp, "port p1", "anew", "");
        let report = CheckReport { level: crate::report::Level::Full, findings: found.into_inner() };
        assert_eq!(hindrances(&report), ["/usr/sbin/ovs-vswitchd: noexec (remedy: remount)"]);
    }

    #[test]
    fn files_that_are_being_replaced_are_no_reason_to_stop_the_daemons() {
        let report = |names: &[Name]| {
            let mut found = Findings::default();
            names.iter().for_each(|name| found.refuse(*name, "x", "y", "z"));
            CheckReport { level: crate::report::Level::None, findings: found.into_inner() }
        };
        assert!(hindrances(&report(&[])).is_empty());
        assert!(hindrances(&report(&[Name::Versions, Name::Tools])).is_empty());
        assert_eq!(hindrances(&report(&[Name::Versions, Name::Dpdk])), ["x: y (remedy: z)"]);
    }

    #[test]
    fn an_answer_holds_for_the_length_of_an_upgrade() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(ANSWER);
        assert_eq!(kept_answer(&path), None);
        for answer in Answer::ALL {
            keep_answer(&path, answer);
            assert_eq!(kept_answer(&path), Some(answer));
        }
        let long_ago = SystemTime::now() - ANSWER_LASTS;
        fs::File::options().write(true).open(&path).unwrap().set_modified(long_ago).unwrap();
        assert_eq!(kept_answer(&path), None);
    }

    #[test]
    fn who_still_runs_is_told_with_the_remedy() {
        let text = still_old("3.5.0", None);
        assert!(text.contains("3.5.0") && text.contains("restart --if-needed"), "{text}");
    }
}

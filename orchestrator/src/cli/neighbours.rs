//! Units that hang on those of Open vSwitch (`Requires=`, `BindsTo=`, `PartOf=`): systemd restarts them with the umbrella
//! and with the daemons, before anything of ours is called, and a run is no reason to.
//!
//! Their jobs wait for that of our own unit [`GATE`], which systemd restarts as well (`PartOf=`) and has to stop first,
//! because it is ordered behind all of them (`host::real::unit_files`). In its ExecStop= they are taken back.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::doors::{doors_or_keep, is_plain};
use super::output::{complain, tell};
use crate::control::RUN_DIR;
use crate::host::disk::Disk;
use crate::host::real::unit_files::{self, UnitFiles};
use crate::host::real::{RealDisk, Systemd};
use crate::host::{HostError, Neighbour, QueuedJob, ServiceManager, GATE, UNITS};

/// How long systemd may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The units whose restart was taken back last.
const TAKEN_BACK: &str = "neighbours";

/// ExecStop= of [`GATE`]. What cannot be done is told: then systemd does what it does without us.
pub(super) fn leave_alone(config: &Path) -> u8 {
    forget();
    if !doors_or_keep(config).restarts() || is_plain() {
        return 0;
    }
    if let Err(error) = take_back(&Systemd::default()) {
        complain(&format!("units that hang on Open vSwitch are restarted with it: {error}"));
    }
    0
}

fn take_back(systemd: &Systemd) -> Result<(), HostError> {
    let jobs = systemd.jobs(soon())?;
    let Some(asked) = asked_for(&jobs) else { return Ok(()) };
    let unit = systemd.unit(&asked.unit, soon())?;
    // One that has ended by itself is started again by systemd: that is no run.
    if !unit.is_some_and(|unit| matches!(unit.active_state.as_str(), "active" | "deactivating")) {
        return Ok(());
    }
    let neighbours = systemd.neighbours(soon())?;
    let (waiting, late) = restarts_of(&neighbours, &jobs, asked.id);
    for job in late {
        complain(&format!("{} is being restarted already; see `ovs-graceful check`", job.unit));
    }
    if waiting.is_empty() {
        return Ok(());
    }
    keep(&waiting);
    for job in &waiting {
        systemd.cancel_job(job.id, soon())?;
    }
    let names: Vec<&str> = waiting.iter().map(|job| job.unit.as_str()).collect();
    tell(&format!("left as they are while {} is restarted: {}", asked.unit, names.join(", ")));
    Ok(())
}

/// The restart that somebody has asked for: it comes before those that systemd adds to it (src/core/transaction.c).
fn asked_for(jobs: &[QueuedJob]) -> Option<&QueuedJob> {
    let of_ours = jobs.iter().filter(|job| job.kind == "restart" && UNITS.contains(&job.unit.as_str()));
    of_ours.min_by_key(|job| job.id)
}

/// The restarts that have come with that of number `asked`: those that wait, and those that are under way. A restart that
/// was there before was asked for by somebody.
fn restarts_of<'a>(
    neighbours: &[Neighbour],
    jobs: &'a [QueuedJob],
    asked: u32,
) -> (Vec<&'a QueuedJob>, Vec<&'a QueuedJob>) {
    let hangs = |job: &&QueuedJob| neighbours.iter().any(|one| one.name == job.unit);
    let all = jobs.iter().filter(|job| job.kind == "restart" && job.id > asked).filter(hangs);
    all.partition(|job| !job.running)
}

/// For the case that the daemons are restarted plainly after all.
fn keep(jobs: &[&QueuedJob]) {
    let names: String = jobs.iter().map(|job| format!("{}\n", job.unit)).collect();
    let kept =
        RealDisk.make_folder(Path::new(RUN_DIR)).and_then(|()| RealDisk.replace(&taken_back(), names.as_bytes()));
    if let Err(error) = kept {
        complain(&format!("{}: {error}", taken_back().display()));
    }
}

/// The daemons are restarted as they are without us, and what hangs on them is to be restarted as well. Not waited for.
pub(super) fn restart_as_asked() {
    let names = fs::read_to_string(taken_back()).unwrap_or_default();
    forget();
    for unit in names.lines() {
        if let Err(error) = Systemd::default().queue_try_restart(unit, soon()) {
            complain(&format!("cannot restart {unit}: {error}; remedy: systemctl restart {unit}"));
        }
    }
}

/// The daemons were not restarted plainly, or have been.
pub(super) fn forget() {
    let _none_any_more = fs::remove_file(taken_back());
}

/// The generator.
pub(super) fn generate(into: &Path) -> u8 {
    let files = UnitFiles::read(&unit_files::FOLDERS.map(PathBuf::from));
    match unit_files::order(&files, into) {
        Ok(()) => 0,
        Err(error) => {
            complain(&format!("cannot put {GATE} behind what hangs on Open vSwitch: {}: {error}", into.display()));
            1
        }
    }
}

fn taken_back() -> PathBuf {
    Path::new(RUN_DIR).join(TAKEN_BACK)
}

fn soon() -> Instant {
    Instant::now() + ANSWER_LIMIT
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Gated, DATABASE_UNIT, SWITCH_UNIT};

    fn job(id: u32, unit: &str, kind: &str, running: bool) -> QueuedJob {
        QueuedJob { id, unit: unit.into(), kind: kind.into(), running }
    }

    #[test]
    fn what_has_come_with_the_restart_is_taken_back_and_nothing_else() {
        let hang = ["a.service", "b.service", "c.service", "d.service"];
        let neighbours = hang.map(|name| Neighbour {
            name: name.into(),
            hangs_on: SWITCH_UNIT.into(),
            state: "active".into(),
            gated: Gated::Yes,
        });
        let jobs = [
            job(9, GATE, "restart", true),
            job(8, DATABASE_UNIT, "restart", false),
            job(7, "a.service", "restart", false),
            job(6, "b.service", "restart", true),
            job(5, "other.service", "restart", false),
            job(4, "c.service", "start", false),
            job(3, "openvswitch-switch.service", "restart", false),
            job(2, "d.service", "restart", false),
        ];
        let asked = asked_for(&jobs).unwrap();
        assert_eq!(asked.id, 3);
        let (waiting, late) = restarts_of(&neighbours, &jobs, asked.id);
        assert_eq!((waiting, late), (vec![&jobs[2]], vec![&jobs[3]]));
    }

    #[test]
    fn a_stop_is_no_restart() {
        assert_eq!(asked_for(&[job(3, SWITCH_UNIT, "stop", false), job(4, "a.service", "restart", false)]), None);
    }
}

//! Arm: nothing that a starting or stopping daemon would destroy can be destroyed any more; then ovsdb-server is
//! replaced, while the old ovs-vswitchd still forwards.

use std::time::{Duration, Instant};

use anyhow::{anyhow, Context};

use super::{by_hand, classes, database_disk, devices, guard, Ended, Host, Run, Step, Stop};
use crate::config::Config;
use crate::host::datapath::Lease;
use crate::host::real::ovsdb_server::{replace, wait_in_step};
use crate::host::{QueuedJob, DATABASE_UNIT};
use crate::machine::{Event, Phase};
use crate::report::Level;

pub(super) struct Arm;

/// How long systemd may take to start ovsdb-server again, and to end what requires it.
const SERVICES_SETTLE: Duration = Duration::from_secs(15);
/// How long the ExecStop= of the unit that stands for both daemons may take to take their jobs back.
const TAKEN_BACK: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

impl Step for Arm {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Arm)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        // What comes next writes it, and an ovsdb-server whose disk is full or read-only does not start again.
        // The last block of the file may have room for one small transaction.
        database_disk::must_be_well(run)?;
        run.host.database.prove_writable(run.deadline).context("the disk of the database")?;
        if run.level == Level::Full {
            let lease = Lease { lease: run.lease(), end: run.config.freeze.end() };
            run.host.datapath.arm(classes::armed(), lease).context("arming the freeze")?;
            run.known.freeze_end = Some(run.now() + run.config.freeze.end());
            guard::begin(run);
            devices::keep(run)?;
            run.checkpoint()?;
        }
        if run.wish.ovsdb {
            no_other_job(run)?;
            replace_ovsdb_server(run)?;
        }
        Ok(Event::Done)
    }

    fn undo(&self, run: &mut Run) -> Ended {
        if is_ended_by_systemd(run) {
            // The way back follows, and wants the freeze.
            return Ok(Event::OldDaemonDied);
        }
        // The old daemon lives on and keeps its policies by itself.
        run.host.datapath.withdraw_guard(&run.id)?;
        run.report.conntrack.timeout_policies_guarded = 0;
        run.host.datapath.thaw()?;
        by_hand::tell(run);
        Ok(Event::Done)
    }
}

/// systemd ends ovs-vswitchd together with an ovsdb-server that failed (`Requires=`), when it starts that one again. A
/// run that was over by then could not give the next one its rules; as it is the run goes back. Waits where it looks
/// like that; true where the old daemon has ended.
fn is_ended_by_systemd(run: &Run) -> bool {
    let (Some(unit), Some(old)) = (run.known.owner.as_deref(), run.known.old.as_ref()) else { return false };
    let until = run.deadline.min(run.now() + SERVICES_SETTLE);
    while run.host.daemons.is_alive(old.id) && run.now() < until && is_being_restarted(run, unit, until) {
        run.host.clock.sleep(LOOK_AGAIN);
    }
    !run.host.daemons.is_alive(old.id)
}

/// What cannot be found out is not waited for.
fn is_being_restarted(run: &Run, unit: &str, until: Instant) -> bool {
    let services = run.host.services.as_ref();
    // A job that has called us waits for us.
    let ours = run.wish.called_by.as_deref() == Some(unit);
    let queued = !ours && services.jobs(until).is_ok_and(|jobs| jobs.iter().any(|job| job.unit == unit));
    let database = services.unit(DATABASE_UNIT, until).ok().flatten();
    queued || database.is_some_and(|unit| matches!(unit.active_state.as_str(), "activating" | "deactivating"))
}

/// Whoever restarts a daemon's own unit just now waits for the end of this run (`cli/doors.rs`), and what the run asks of
/// systemd would wait for him. Who restarts the unit that stands for both is content with this run, and takes the
/// daemons' jobs back.
pub(super) fn no_other_job(run: &Run) -> Result<(), Stop> {
    // What comes with the job that has called us, Check has looked at.
    let Some(owner) = run.known.owner.as_deref().filter(|_| run.wish.called_by.is_none()) else { return Ok(()) };
    let until = run.deadline.min(run.now() + TAKEN_BACK);
    let is_theirs = |job: &QueuedJob| [owner, DATABASE_UNIT].contains(&job.unit.as_str());
    while let Some(job) = run.host.services.jobs(run.deadline).unwrap_or_default().into_iter().find(is_theirs) {
        if run.now() >= until {
            return Err(anyhow!("somebody else's {} of {} has begun meanwhile", job.kind, job.unit).into());
        }
        run.host.clock.sleep(LOOK_AGAIN);
    }
    Ok(())
}

/// Hazards 17: before any standby, and the old ovs-vswitchd seen back in step before the run goes on.
fn replace_ovsdb_server(run: &mut Run) -> Result<(), Stop> {
    let Host { daemons, services, database, clock, .. } = &run.host;
    let old = daemons.find_ovsdb_server()?;
    let system_id = run.known.facts.external_ids.get("system-id");
    replace(daemons.as_ref(), services.as_ref(), database.as_ref(), clock.as_ref(), &old, system_id, run.deadline)
        .context("replacing ovsdb-server")?;
    // Whoever listens for its clients again asks first for what was there before.
    by_hand::put_back(run);
    wait_in_step(run.host.database.as_ref(), run.deadline).context("replacing ovsdb-server")?;
    run.checkpoint()
}

//! The units of the daemons, and their jobs.

use std::time::Instant;

use crate::host::real::ovsdb_server;
use crate::host::surroundings::CheckOptions;
use crate::host::{Daemon, QueuedJob, ServiceManager, Unit, SWITCH_UNIT, UNITS};
use crate::report::{Findings, Name};

pub(super) fn look(
    services: &dyn ServiceManager,
    vswitchd: &Daemon,
    server: &Daemon,
    options: &CheckOptions,
    until: Instant,
    found: &mut Findings,
) {
    if !services.is_running() {
        return found.ok(Name::Systemd, "systemd", "it does not run; daemons are started as they were");
    }
    match services.jobs(until) {
        Ok(jobs) => {
            if jobs.iter().any(|job| job.unit == "shutdown.target" && job.kind == "start") {
                found.refuse(
                    Name::Shutdown,
                    "shutdown.target",
                    "the machine is being stopped",
                    "wait for the next boot",
                );
            }
            for job in jobs.iter().filter(|job| UNITS.contains(&job.unit.as_str()) && !comes_with_us(job, options)) {
                let remedy = "wait until it has ended (systemctl list-jobs)";
                found.refuse(Name::UnitJob, &job.unit, format!("a {} job is queued for it", job.kind), remedy);
            }
        }
        Err(e) => {
            found.refuse(Name::Systemd, e.object, e.cause, "systemctl must work before daemons can be handed over")
        }
    }
    match services.owner(vswitchd, until) {
        Ok(Some(unit)) => owner_findings(&unit, options.called_by.as_deref() == Some(&unit.name), found),
        Ok(None) if options.elsewhere => {}
        Ok(None) => found.ok(Name::Unit, "ovs-vswitchd", "no unit owns it; it is started as it was"),
        Err(e) => found.refuse(Name::Unit, e.object, e.cause, "systemctl status ovs-vswitchd"),
    }
    if options.replace_ovsdb {
        if let Ok(Some(unit)) = services.owner(server, until) {
            for word in ovsdb_server::destructive_options(&unit) {
                let cause = format!("its options hold {word}, which is switched off for the run");
                found.warn(Name::OvsCtlOptions, &unit.name, cause, "take it out: every restart deletes configuration");
            }
        }
    }
}

/// The job that has called us, and where that is the restart of ovs-vswitchd, those of the units that are restarted with
/// it.
fn comes_with_us(job: &QueuedJob, options: &CheckOptions) -> bool {
    match options.called_by.as_deref() {
        _ if job.kind == "stop" => false,
        Some(SWITCH_UNIT) => true,
        Some(unit) => job.unit == unit,
        None => false,
    }
}

/// A unit that has called us is being reloaded, or restarted and about to stop its daemon.
fn owner_findings(unit: &Unit, called_us: bool, found: &mut Findings) {
    let is = |active: &str, sub: &str| unit.active_state == active && unit.sub_state == sub;
    let called = is("deactivating", "stop") || is("reloading", "reload");
    if !(is("active", "running") || called_us && called) {
        let cause = format!("it is {} ({})", unit.active_state, unit.sub_state);
        return found.refuse(Name::Unit, &unit.name, cause, "systemctl status; wait or restart it first");
    }
    if unit.exec_start.is_empty() {
        return found.refuse(Name::Unit, &unit.name, "it has no ExecStart=", "reinstall the openvswitch package");
    }
    let cause = match &unit.pid_file {
        Some(path) => format!("it owns the daemon and follows {}", path.display()),
        None => "it owns the daemon; PIDFile= is missing in it, a run writes that to /run/systemd/system".to_owned(),
    };
    found.ok(Name::Unit, &unit.name, cause);
}

//! The units of the daemons, and their jobs.

use std::time::Instant;

use super::options::judge_switch;
use crate::check::refuse;
use crate::host::real::ovsdb_server;
use crate::host::surroundings::CheckOptions;
use crate::host::{Daemon, QueuedJob, Result, ServiceManager, Unit, SWITCH_UNIT, UNITS};
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
    let queued = services.jobs(until);
    let answers = queued.is_ok();
    jobs(queued, options, found);
    if !answers {
        return;
    }
    match services.owner(vswitchd, until) {
        Ok(Some(unit)) => {
            owner_findings(&unit, options.called_by.as_deref() == Some(&unit.name), found);
            judge_switch(vswitchd, &unit, found);
        }
        Ok(None) if options.elsewhere => {}
        Ok(None) => found.ok(Name::Unit, "ovs-vswitchd", "no unit owns it; it is started as it was"),
        Err(error) => refuse(Name::Unit, &error, "look at `systemctl status ovs-vswitchd`", found),
    }
    if options.replace_ovsdb {
        if let Ok(Some(unit)) = services.owner(server, until) {
            for word in ovsdb_server::destructive_options(&unit) {
                let cause = format!("its options hold {word}, which is switched off for the run");
                found.warn(
                    Name::OvsCtlOptions,
                    &unit.name,
                    cause,
                    "take it out of the options of that unit: every restart deletes configuration",
                );
            }
        }
    }
}

fn jobs(jobs: Result<Vec<QueuedJob>>, options: &CheckOptions, found: &mut Findings) {
    let remedy = "see why `systemctl list-jobs` fails: daemons are handed over by systemd";
    let jobs = match jobs {
        Ok(jobs) => jobs,
        Err(error) => return refuse(Name::Systemd, &error, remedy, found),
    };
    if jobs.iter().any(|job| job.unit == "shutdown.target" && job.kind == "start") {
        let remedy = "none: wait for the next boot";
        found.refuse(Name::Shutdown, "shutdown.target", "the machine is being stopped", remedy);
    }
    for job in jobs.iter().filter(|job| UNITS.contains(&job.unit.as_str()) && !comes_with_us(job, options)) {
        let remedy = format!("wait for its end, or `systemctl cancel {}`", job.id);
        found.refuse(Name::UnitJob, &job.unit, format!("a {} job is queued for it", job.kind), &remedy);
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
        let remedy = format!("look at `systemctl status {0}`; it has to be active and running", unit.name);
        return found.refuse(Name::Unit, &unit.name, cause, &remedy);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostError;
    use crate::report::Severity;

    fn found(look: impl FnOnce(&mut Findings)) -> Vec<(Name, Severity)> {
        let mut found = Findings::default();
        look(&mut found);
        found.into_inner().into_iter().map(|one| (one.name, one.severity)).collect()
    }

    #[test]
    fn a_stop_of_the_machine_a_job_and_a_silent_systemd_are_refused() {
        let job = |unit: &str, kind: &str| QueuedJob { id: 7, unit: unit.into(), kind: kind.into(), running: true };
        let options = CheckOptions::default();
        let stop = vec![job("shutdown.target", "start"), job("ssh.service", "stop")];
        assert_eq!(found(|found| jobs(Ok(stop), &options, found)), [(Name::Shutdown, Severity::Refused)]);
        let reload = || vec![job(SWITCH_UNIT, "reload")];
        assert_eq!(found(|found| jobs(Ok(reload()), &options, found)), [(Name::UnitJob, Severity::Refused)]);
        let ours = CheckOptions { called_by: Some(SWITCH_UNIT.into()), ..CheckOptions::default() };
        assert_eq!(found(|found| jobs(Ok(reload()), &ours, found)), []);
        let silent = HostError::new("systemd", "no answer");
        assert_eq!(found(|found| jobs(Err(silent), &options, found)), [(Name::Systemd, Severity::Refused)]);
    }

    #[test]
    fn a_unit_that_is_not_running_is_refused() {
        let unit = |active: &str, sub: &str| Unit {
            name: SWITCH_UNIT.into(),
            active_state: active.into(),
            sub_state: sub.into(),
            exec_start: vec!["ovs-ctl".into()],
            ..Unit::default()
        };
        let judged = |unit: &Unit, called_us| found(|found| owner_findings(unit, called_us, found))[0];
        assert_eq!(judged(&unit("active", "running"), false), (Name::Unit, Severity::Ok));
        assert_eq!(judged(&unit("failed", "failed"), false), (Name::Unit, Severity::Refused));
        assert_eq!(judged(&unit("reloading", "reload"), false), (Name::Unit, Severity::Refused));
        assert_eq!(judged(&unit("reloading", "reload"), true), (Name::Unit, Severity::Ok));
        let empty = Unit { exec_start: Vec::new(), ..unit("active", "running") };
        assert_eq!(judged(&empty, false), (Name::Unit, Severity::Refused));
    }
}

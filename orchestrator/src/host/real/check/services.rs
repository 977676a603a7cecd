//! The units of the daemons, and their jobs.

use std::time::Instant;

use super::options::judge_switch;
use crate::check::refuse;
use crate::host::real::ovsdb_server;
use crate::host::surroundings::CheckOptions;
use crate::host::{Daemon, Gated, Neighbour, QueuedJob, Result, ServiceManager, Unit, GATE, SWITCH_UNIT, UNITS};
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
    let answer = queued.as_ref().ok().cloned();
    jobs(queued, options, found);
    let Some(queued) = answer else { return };
    match services.neighbours(until) {
        Ok(all) => all.iter().for_each(|one| neighbour(one, &queued, options, found)),
        Err(error) => found.warn(Name::Neighbour, &error.object, &error.cause, SEE_NEIGHBOURS),
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

/// A restart has become a start once its unit is stopped.
const RESTARTS: &[&str] = &["restart", "start"];
const SEE_NEIGHBOURS: &str =
    "see `systemctl list-dependencies --reverse` of Open vSwitch's units before you restart them";

/// Told is who would be restarted, by what, and who has been when we are called.
fn neighbour(one: &Neighbour, queued: &[QueuedJob], options: &CheckOptions, found: &mut Findings) {
    let Neighbour { name, hangs_on, state, gated } = one;
    let is = |job: &QueuedJob, unit: &str, kinds: &[&str]| job.unit == unit && kinds.contains(&job.kind.as_str());
    let queued = |unit: &str, kinds: &[&str]| queued.iter().any(|job| is(job, unit, kinds));
    let up = matches!(state.as_str(), "active" | "activating" | "reloading");
    let gated = if *gated == Gated::Inactive && queued(GATE, RESTARTS) { Gated::Yes } else { *gated };
    let comes_with_it = queued(name, RESTARTS) || up && gated != Gated::Yes;
    if comes_with_it && options.called_by.as_deref().is_some_and(|unit| queued(unit, &["restart"])) {
        let cause = format!("systemd restarts it together with {hangs_on}, and this run is part of that restart");
        let remedy = format!("none now; it runs again after the run. Next time: `systemctl reload {hangs_on}`");
        return found.warn(Name::Neighbour, name, cause, &remedy);
    }
    if !up {
        return;
    }
    let (why, remedy) = match gated {
        Gated::Yes => {
            return found.ok(Name::Neighbour, name, format!("it hangs on {hangs_on}, and a run leaves it alone"));
        }
        Gated::NoGate => {
            let remedy = format!("none: `ovs-graceful restart` and `systemctl reload {hangs_on}` leave it alone");
            (format!("{GATE} is not installed"), remedy)
        }
        Gated::Inactive => (format!("{GATE} is not active"), format!("`systemctl start {GATE}`")),
        Gated::NotOrdered => (format!("{GATE} does not know of it"), "`systemctl daemon-reload`".to_owned()),
    };
    let cause = format!(
        "it hangs on {hangs_on}: `systemctl restart {hangs_on}` and an upgrade restart it as well, because {why}"
    );
    found.warn(Name::Neighbour, name, cause, &remedy);
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

    const UMBRELLA: &str = "openvswitch-switch.service";

    /// What is told of a neighbour in this state, with these jobs; in a run that `called_by` has begun, or before one.
    fn of_neighbour(
        state: &str,
        gated: Gated,
        jobs: &[(&str, &str)],
        called_by: Option<&str>,
    ) -> Option<(Severity, String)> {
        let (name, hangs_on) = ("ipsec.service".into(), UMBRELLA.into());
        let one = Neighbour { name, hangs_on, state: state.into(), gated };
        let job = |(unit, kind): &(&str, &str)| QueuedJob {
            id: 3,
            unit: (*unit).into(),
            kind: (*kind).into(),
            running: false,
        };
        let queued: Vec<QueuedJob> = jobs.iter().map(job).collect();
        let options = CheckOptions { called_by: called_by.map(str::to_owned), ..CheckOptions::default() };
        let mut found = Findings::default();
        neighbour(&one, &queued, &options, &mut found);
        found.into_inner().pop().map(|one| (one.severity, one.remedy))
    }

    #[test]
    fn who_would_be_restarted_is_named_with_the_remedy() {
        let severity = |state, gated| of_neighbour(state, gated, &[], None).map(|told| told.0);
        assert_eq!(severity("active", Gated::Yes), Some(Severity::Ok));
        assert_eq!(severity("inactive", Gated::NoGate), None);
        for (gated, remedy) in [
            (Gated::NoGate, "systemctl reload openvswitch-switch.service"),
            (Gated::Inactive, "`systemctl start ovs-graceful-neighbours.service`"),
            (Gated::NotOrdered, "`systemctl daemon-reload`"),
        ] {
            let (severity, told) = of_neighbour("active", gated, &[], None).unwrap();
            assert!(severity == Severity::Warning && told.contains(remedy), "{told}");
        }
    }

    #[test]
    fn who_is_restarted_with_the_unit_that_has_called_is_named() {
        let restart = (UMBRELLA, "restart");
        let told = |state, gated, jobs: &[(&str, &str)]| of_neighbour(state, gated, jobs, Some(UMBRELLA));
        for (state, gated, job) in [
            ("inactive", Gated::NotOrdered, ("ipsec.service", "start")),
            ("deactivating", Gated::NoGate, ("ipsec.service", "restart")),
            // It was quicker than we.
            ("active", Gated::NotOrdered, ("other.service", "restart")),
        ] {
            let (severity, told) = told(state, gated, &[restart, job]).unwrap();
            assert!(severity == Severity::Warning && told.contains("runs again after the run"), "{told}");
        }
        // The gate itself is restarted, and has done its work.
        let gate = (GATE, "start");
        assert_eq!(told("active", Gated::Inactive, &[restart, gate]).unwrap().0, Severity::Ok);
        // A reload restarts nobody.
        let (_, told) = told("active", Gated::NotOrdered, &[(UMBRELLA, "reload")]).unwrap();
        assert!(told.contains("daemon-reload"), "{told}");
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

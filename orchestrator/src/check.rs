//! What `check` and the phase Check find out about this host. Touches nothing.

use std::time::Instant;

use dpfreeze::freeze::Fact;

use crate::control::RUN_DIR;
use crate::host::real::check::CheckOptions;
use crate::host::real::RealSurroundings;
use crate::host::surroundings::Surroundings;
use crate::host::{Daemon, DatabaseFacts, Versions};
use crate::journal::STATE_DIR;
use crate::report::{CheckReport, Finding, Level, Severity};
use crate::steps::{Host, Wish};

/// What was found, for the report and for the steps that follow.
#[derive(Debug)]
pub struct Checked {
    /// For the operator.
    pub report: CheckReport,
    /// The running ovs-vswitchd, where it was found.
    pub vswitchd: Option<Daemon>,
    /// What runs and what is installed.
    pub versions: Option<Versions>,
    /// What the database says.
    pub facts: Option<DatabaseFacts>,
}

/// The check of a host that cannot even be looked at: no root, no module, no datapath.
pub fn check_without_host(error: &anyhow::Error) -> CheckReport {
    let mut findings = Vec::new();
    let mut level = Level::None;
    judge_environment(&RealSurroundings, &mut findings, &mut level);
    if !findings.iter().any(|finding| finding.severity == Severity::Refused) {
        findings.push(refused("host", "Open vSwitch", format!("{error:#}"), "start Open vSwitch first"));
    }
    CheckReport { level: Level::None, findings }
}

/// Looks at everything that a run depends on.
pub fn check(host: &mut Host, wish: &Wish, until: Instant) -> Checked {
    let mut findings = Vec::new();
    let mut level = Level::None;
    judge_environment(host.surroundings.as_ref(), &mut findings, &mut level);
    if wish.reloads_module() {
        judge_module(host, &mut findings, &mut level, until);
    } else {
        prove_freeze(host, &mut findings, &mut level);
    }
    let vswitchd = find_vswitchd(host, level, wish.reloads_module(), &mut findings);
    let versions = vswitchd.as_ref().and_then(|daemon| {
        let versions = host.daemons.versions(daemon, until);
        keep(versions, "versions", "ovs-vswitchd", "does it answer `ovs-appctl version`?", &mut findings)
    });
    let facts = host.database.facts(until);
    let facts = keep(facts, "database", "ovsdb-server", "start ovsdb-server", &mut findings);
    let options = CheckOptions {
        replace_ovsdb: wish.ovsdb,
        called_by: wish.called_by.clone(),
        elsewhere: wish.elsewhere,
        state_directory: STATE_DIR.into(),
        run_directory: RUN_DIR.into(),
    };
    let Host { daemons, database, services, surroundings, .. } = &*host;
    let others = surroundings.findings(daemons.as_ref(), database.as_ref(), services.as_ref(), &options, until);
    findings.extend(others);
    Checked { report: CheckReport { level, findings }, vswitchd, versions, facts }
}

fn find_vswitchd(host: &mut Host, level: Level, reloads_module: bool, findings: &mut Vec<Finding>) -> Option<Daemon> {
    let remedy = "start ovs-vswitchd; `systemctl status ovs-vswitchd`";
    let ids = keep(host.datapath.upcall_port_ids(), "datapath", "kernel datapath", remedy, findings)?;
    match host.datapath.dispatches_per_cpu() {
        Ok(true) if nobody_bound(&ids) => {
            let cause = "ovs-vswitchd has bound no socket for its upcalls: every packet without a kernel flow is lost \
                         already (OVS 3.1 does so when it was started in the first 10 s after boot)";
            let remedy = "start Open vSwitch again without ovs-graceful (`systemctl restart openvswitch-switch`)";
            findings.push(refused("upcalls", "kernel datapath", cause.into(), remedy));
            return None;
        }
        Ok(true) => {}
        Ok(false) if level == Level::Full || reloads_module => {}
        Ok(false) => {
            // dpif_netlink_refresh_channels(): bound once for one thread, then by nobody, then for all threads.
            let cause =
                "it dispatches upcalls per vport: without a freeze the new ovs-vswitchd unbinds every port for a \
                         moment after it has bound it, and packets are lost";
            let remedy =
                "see to what keeps BPF from working (the warning above), or use OVS 2.16 on Linux 5.15 or later";
            findings.push(refused("dispatch", "kernel datapath", cause.into(), remedy));
        }
        Err(error) => findings.push(refused("dispatch", "kernel datapath", error.to_string(), remedy)),
    }
    keep(host.daemons.find_vswitchd(&ids), "vswitchd", "ovs-vswitchd", remedy, findings)
}

/// A port id of 0 takes no upcalls.
fn nobody_bound(port_ids: &[u32]) -> bool {
    port_ids.iter().all(|id| *id == 0)
}

/// Parking needs the sockets of another process; the freeze needs BPF on top.
fn judge_environment(surroundings: &dyn Surroundings, findings: &mut Vec<Finding>, level: &mut Level) {
    let environment = surroundings.environment();
    if !surroundings.is_root() {
        findings.push(refused("root", "this process", "it is not root".into(), "run it with sudo"));
    }
    for fact in &environment.failures {
        let severity = match fact.object.contains("BPF") {
            true => Severity::Warning,
            false => Severity::Refused,
        };
        findings.push(of_fact(fact, severity));
    }
    if environment.pidfd_getfd {
        *level = match environment.hook {
            Some(_) => Level::Full,
            None => Level::Park,
        };
    }
}

/// What would be lost with the kernel module and could not be put back.
fn judge_module(host: &mut Host, findings: &mut Vec<Finding>, level: &mut Level, until: Instant) {
    *level = Level::None;
    let cause = "everything that is switched is lost from the end of the old ovs-vswitchd until handover, \
                 and every kernel flow";
    findings.push(finding(Severity::Warning, "reload-module", "kernel module", cause.into(), "choose the hour"));
    let before = host.datapath.snapshot();
    let remedy = "see the log of the kernel (dmesg)";
    let Some(before) = keep(before, "datapath", "kernel datapath", remedy, findings) else { return };
    let obstacles = host.module.obstacles(&before, until);
    let remedy = "is the module openvswitch loaded, and `ip` installed?";
    let obstacles = keep(obstacles, "module", "kernel module", remedy, findings);
    findings.extend(obstacles.into_iter().flatten());
}

/// A hook that loads and attaches may still refuse nothing: only the canary proves it.
fn prove_freeze(host: &mut Host, findings: &mut Vec<Finding>, level: &mut Level) {
    if *level != Level::Full {
        return;
    }
    match host.datapath.prove_freeze() {
        Ok(()) => findings.push(ok("canary", "freeze", "the kernel refuses, and stops when the lease ends")),
        Err(error) => {
            *level = Level::Park;
            let remedy = "the run goes on at level park: kernel flows are flushed once, misses are parked";
            findings.push(finding(Severity::Warning, "canary", "freeze", error.to_string(), remedy));
        }
    }
}

fn keep<T, E: std::fmt::Display>(
    result: Result<T, E>,
    name: &str,
    object: &str,
    remedy: &str,
    findings: &mut Vec<Finding>,
) -> Option<T> {
    result.map_err(|error| findings.push(refused(name, object, error.to_string(), remedy))).ok()
}

fn of_fact(fact: &Fact, severity: Severity) -> Finding {
    let cause = format!("{}: {}", fact.cause, fact.reason);
    finding(severity, &fact.object.to_lowercase().replace(' ', "-"), &fact.object, cause, &fact.remedy)
}

fn ok(name: &str, object: &str, cause: &str) -> Finding {
    finding(Severity::Ok, name, object, cause.to_owned(), "")
}

fn refused(name: &str, object: &str, cause: String, remedy: &str) -> Finding {
    finding(Severity::Refused, name, object, cause, remedy)
}

fn finding(severity: Severity, name: &str, object: &str, cause: String, remedy: &str) -> Finding {
    Finding { name: name.into(), severity, object: object.into(), cause, remedy: remedy.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datapath_without_a_port_id_is_bound_to_nobody() {
        assert!(nobody_bound(&[]) && nobody_bound(&[0, 0]));
        assert!(!nobody_bound(&[0, 7]));
    }
}

//! What `check` and the phase Check find out about this host. Touches nothing.

mod database;
mod database_disk;

use std::collections::BTreeSet;
use std::time::Instant;

use dpfreeze::freeze::{Environment, Fact};

use crate::control::RUN_DIR;
use crate::host::real::RealSurroundings;
use crate::host::surroundings::{CheckOptions, Known, Surroundings};
use crate::host::{Daemon, DatabaseFacts, HostError, Versions};
use crate::journal::STATE_DIR;
use crate::report::{CheckReport, Findings, Level, Name, Severity, Strategy};
use crate::steps::notes::RULE_REMEDY;
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
    let mut found = Findings::default();
    judge_environment(&RealSurroundings, &mut found);
    if !found.refuses() {
        found.refuse(Name::Host, "Open vSwitch", format!("{error:#}"), "start Open vSwitch first");
    }
    CheckReport { level: Level::None, findings: found.into_inner() }
}

/// Looks at everything that a run depends on.
pub fn check(host: &mut Host, wish: &Wish, until: Instant) -> Checked {
    let mut found = Findings::default();
    let mut level = judge_environment(host.surroundings.as_ref(), &mut found);
    if wish.reloads_module() {
        level = Level::None;
        judge_module(host, &mut found, until);
    } else {
        prove_freeze(host, &mut found, &mut level);
    }
    let may_dispatch_per_vport = level == Level::Full || wish.reloads_module();
    let vswitchd = find_vswitchd(host, may_dispatch_per_vport, &mut found);
    let versions = vswitchd.as_ref().and_then(|daemon| daemon.as_ref().ok()).map(|daemon| {
        let versions = host.daemons.versions(daemon, until);
        keep(versions, Name::Versions, "the daemon may hang: see its log", &mut found)
    });
    let facts = keep(host.database.facts(until), Name::Database, "see the log of ovsdb-server", &mut found);
    if let Some(facts) = &facts {
        database::look(facts, &mut found);
        database_disk::look(host.database.look_at_disk(), &mut found);
    }
    let options = CheckOptions {
        replace_ovsdb: wish.ovsdb,
        called_by: wish.called_by.clone(),
        elsewhere: wish.elsewhere,
        beside: wish.strategy == Strategy::Standby && !wish.elsewhere && !wish.reloads_module(),
        upcall_sockets: upcall_sockets(host),
        bridges: facts.as_ref().map_or(0, |facts| facts.bridges.len()),
        state_directory: STATE_DIR.into(),
        run_directory: RUN_DIR.into(),
    };
    let versions = versions.flatten();
    let known = Known { vswitchd: vswitchd.as_ref(), versions: versions.as_ref() };
    let Host { daemons, services, surroundings, .. } = &*host;
    found.extend(surroundings.findings(daemons.as_ref(), services.as_ref(), &known, &options, until));
    let vswitchd = vswitchd.and_then(Result::ok);
    Checked { report: CheckReport { level, findings: found.into_inner() }, vswitchd, versions, facts }
}

/// Can every OpenFlow rule be put back? Asks the daemon that has them; changes nothing.
pub fn check_rules(host: &Host, checked: &mut Checked, until: Instant) {
    let (Some(daemon), Some(facts)) = (&checked.vswitchd, &checked.facts) else { return };
    let mut found = Findings::default();
    found.extend(std::mem::take(&mut checked.report.findings));
    let openflow = host.openflow.as_ref();
    let rules = openflow.snapshot(&facts.bridges, until);
    let refused = rules.and_then(|rules| Ok(openflow.prepare_restore(daemon, &rules, until)?.refused));
    let refused = keep(refused, Name::Rule, "see what `ovs-ofctl dump-flows` says of that bridge", &mut found);
    for rule in refused.unwrap_or_default() {
        let cause = format!("{} `{}` could not be put back as it is: {}", rule.kind, rule.rule, rule.reason);
        found.refuse(Name::Rule, format!("bridge {}", rule.bridge), cause, RULE_REMEDY);
    }
    checked.report.findings = found.into_inner();
}

/// The ovs-vswitchd that the upcalls go to; `None` where the datapath does not tell whose they are.
fn find_vswitchd(
    host: &mut Host,
    may_dispatch_per_vport: bool,
    found: &mut Findings,
) -> Option<Result<Daemon, HostError>> {
    let remedy = "start ovs-vswitchd; `systemctl status ovs-vswitchd`";
    let per_cpu = keep(host.datapath.dispatches_per_cpu(), Name::Datapath, remedy, found)?;
    let ids = keep(host.datapath.upcall_port_ids(), Name::Datapath, remedy, found)?;
    if per_cpu && nobody_bound(&ids) {
        let cause = "ovs-vswitchd has bound no socket for its upcalls: every packet without a kernel flow is lost \
                     already (OVS 3.1 does so when it was started in the first 10 s after boot)";
        let remedy = "start Open vSwitch again without ovs-graceful (`systemctl restart openvswitch-switch`)";
        found.refuse(Name::Upcalls, "kernel datapath", cause, remedy);
        return None;
    }
    if !per_cpu && !may_dispatch_per_vport {
        // dpif_netlink_refresh_channels(): bound once for one thread, then by nobody, then for all threads.
        let cause = "it dispatches upcalls per vport: without a freeze the new ovs-vswitchd unbinds every port for a \
                     moment after it has bound it, and packets are lost";
        let remedy = "see to what keeps BPF from working (the warning above), or use OVS 2.16 on Linux 5.15 or later";
        found.refuse(Name::Dispatch, "kernel datapath", cause, remedy);
    }
    Some(host.daemons.find_vswitchd(&ids))
}

/// Each once: several CPUs, or ports, may share one.
fn upcall_sockets(host: &mut Host) -> usize {
    let ids = host.datapath.upcall_port_ids().unwrap_or_default();
    ids.into_iter().filter(|id| *id != 0).collect::<BTreeSet<_>>().len()
}

/// A port id of 0 takes no upcalls.
fn nobody_bound(port_ids: &[u32]) -> bool {
    port_ids.iter().all(|id| *id == 0)
}

/// Parking needs the sockets of another process; the freeze needs BPF on top. Returns the level that they allow.
fn judge_environment(surroundings: &dyn Surroundings, found: &mut Findings) -> Level {
    let environment = surroundings.environment();
    if !surroundings.is_root() {
        found.refuse(Name::Root, "this process", "it is not root", "run it with sudo");
    }
    for fact in &environment.failures {
        of_fact(fact, found);
    }
    match environment {
        Environment { pidfd_getfd: false, .. } => Level::None,
        Environment { hook: Some(_), .. } => Level::Full,
        Environment { hook: None, .. } => Level::Park,
    }
}

/// What would be lost with the kernel module and could not be put back.
fn judge_module(host: &mut Host, found: &mut Findings, until: Instant) {
    let cause = "everything that is switched is lost from the end of the old ovs-vswitchd until handover, \
                 and every kernel flow";
    found.warn(Name::ReloadModule, "kernel module", cause, "choose the hour");
    let before = keep(host.datapath.snapshot(), Name::Datapath, "see the log of the kernel (dmesg)", found);
    let Some(before) = before else { return };
    let obstacles = host.module.obstacles(&before, until);
    let remedy = "is the module openvswitch loaded, and `ip` installed?";
    let obstacles = keep(obstacles, Name::Module, remedy, found);
    found.extend(obstacles.into_iter().flatten());
}

/// A hook that loads and attaches may still refuse nothing: only the canary proves it.
fn prove_freeze(host: &mut Host, found: &mut Findings, level: &mut Level) {
    if *level != Level::Full {
        return;
    }
    match host.datapath.prove_freeze() {
        Ok(()) => found.ok(Name::Canary, "freeze", "the kernel refuses, and stops when the lease ends"),
        Err(error) => {
            *level = Level::Park;
            let remedy = "the run goes on at level park: kernel flows are flushed once, misses are parked";
            found.warn(Name::Canary, error.object, error.cause, remedy);
        }
    }
}

/// The value; where there is none, its error is what a run refuses. `remedy` is for an error without one.
fn keep<T>(result: Result<T, HostError>, name: Name, remedy: &str, found: &mut Findings) -> Option<T> {
    result.map_err(|error| refuse(name, &error, remedy, found)).ok()
}

/// An error is what a run refuses.
pub fn refuse(name: Name, error: &HostError, remedy: &str, found: &mut Findings) {
    let remedy = if error.remedy.is_empty() { remedy } else { &error.remedy };
    found.refuse(name, &error.object, &error.cause, remedy);
}

fn of_fact(fact: &Fact, found: &mut Findings) {
    let (name, severity) = match fact.object.as_str() {
        "BPF" => (Name::Bpf, Severity::Warning),
        "pidfd_getfd" => (Name::PidfdGetfd, Severity::Refused),
        _ => (Name::Openvswitch, Severity::Refused),
    };
    found.add(severity, name, &fact.object, format!("{}: {}", fact.cause, fact.reason), &fact.remedy);
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

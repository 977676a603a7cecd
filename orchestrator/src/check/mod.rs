//! What `check` and the phase Check find out about this host. Touches nothing.

mod database;
mod database_disk;
mod devices;

use std::collections::BTreeSet;
use std::time::Instant;

use dpfreeze::freeze::{Environment, Fact};

use crate::control::RUN_DIR;
use crate::host::datapath::DATAPATH;
use crate::host::real::RealSurroundings;
use crate::host::surroundings::{CheckOptions, Known, Surroundings};
use crate::host::{Bridge, Daemon, DatabaseFacts, HostError, Versions};
use crate::journal::STATE_DIR;
use crate::report::{CheckReport, Finding, Findings, Level, Name, Severity, Strategy};
use crate::steps::notes::{self, rule_remedy, unread};
use crate::steps::{Host, Wish};

/// Starts both daemons.
pub(crate) const START: &str = "`systemctl start openvswitch-switch` (RHEL: openvswitch)";

/// A restart that loses what it loses without us.
const PLAIN: &str = "`ovs-graceful restart --plain`";

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
        found.refuse(Name::Datapath, DATAPATH, format!("{error:#}"), START);
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
    let is_there = keep(host.datapath.is_there(), Name::Datapath, START, &mut found);
    let vswitchd = match is_there {
        Some(true) => find_vswitchd(host, may_dispatch_per_vport, &mut found),
        Some(false) | None => None,
    };
    let versions = vswitchd.as_ref().and_then(|daemon| daemon.as_ref().ok()).map(|daemon| {
        let remedy =
            "install Open vSwitch's package again, if its ovs-vswitchd does not run; else look at the daemon's log";
        keep(host.daemons.versions(daemon, until), Name::Versions, remedy, &mut found)
    });
    // One that hangs leaves time to look at the rest.
    let soon = Instant::now() + until.saturating_duration_since(Instant::now()) / 3;
    let mut facts = match host.daemons.would_start_database() {
        true => Err(HostError::new("ovsdb-server", "it does not run, and systemd would start it for who asks")),
        false => host.database.facts(soon),
    };
    if let (Ok(facts), Some(Ok(daemon))) = (&mut facts, &vswitchd) {
        let made = host.daemons.command(daemon, "ofproto/list", &[], until);
        set_aside_ignored(facts, made.ok().as_deref());
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
    let known = Known { vswitchd: vswitchd.as_ref(), versions: versions.as_ref(), facts: facts.as_ref().ok() };
    let Host { daemons, services, surroundings, .. } = &*host;
    let others = surroundings.findings(daemons.as_ref(), services.as_ref(), &known, &options, until);
    let runs = !is_refused(&others, Name::OvsRunning);
    let facts = match facts {
        Ok(facts) => Some(facts),
        // A server that does not run is named as that.
        Err(error) if runs => keep(Err(error), Name::Database, "look at ovsdb-server and its log", &mut found),
        Err(_) => None,
    };
    if is_there == Some(false) {
        no_datapath(facts.as_ref(), &others, &mut found);
    }
    if let Some(facts) = &facts {
        database::look(facts, &mut found);
        database_disk::look(host.database.look_at_disk(), &mut found);
        devices::look(host, facts, level, wish, &mut found);
    }
    found.extend(others);
    let vswitchd = vswitchd.and_then(Result::ok);
    Checked { report: CheckReport { level, findings: found.into_inner() }, vswitchd, versions, facts }
}

/// Can every OpenFlow rule be put back? Asks the daemon that has them; changes nothing.
pub fn check_rules(host: &Host, checked: &mut Checked, until: Instant) {
    let (Some(daemon), Some(facts)) = (&checked.vswitchd, &checked.facts) else { return };
    // The tools are what rules are read with: said once.
    if is_refused(&checked.report.findings, Name::Tools) {
        return;
    }
    let no_memory = is_refused(&checked.report.findings, Name::Memory);
    let mut found = Findings::default();
    found.extend(std::mem::take(&mut checked.report.findings));
    if no_memory {
        let cause = "not looked at: the daemon would take memory for that, and has none to spare (memory)";
        found.warn(Name::Rule, "rules", cause, "the remedy of memory; then check again");
        checked.report.findings = found.into_inner();
        return;
    }
    let openflow = host.openflow.as_ref();
    let rules = openflow.snapshot(daemon, &facts.bridges, until);
    let rules = rules.map_err(|error| unread(openflow, daemon, &facts.bridges, error, until));
    for unsure in rules.iter().flatten().flat_map(|rules| &rules.unsure) {
        let remedy = format!("none where it is right; {}", notes::add_anew(unsure, &facts.bridges));
        found.warn(Name::Rule, format!("bridge {}", unsure.bridge), notes::unsure_cause(unsure), &remedy);
    }
    let refused = rules.and_then(|rules| Ok(openflow.prepare_restore(daemon, &rules, until)?.refused));
    let refused = keep(refused, Name::Rule, "see what `ovs-ofctl dump-flows` says of that bridge", &mut found);
    for rule in refused.unwrap_or_default() {
        let cause = format!("{} `{}` could not be put back as it is: {}", rule.kind, rule.rule, rule.reason);
        found.refuse(Name::Rule, format!("bridge {}", rule.bridge), cause, &rule_remedy(&rule, &facts.bridges));
    }
    checked.report.findings = found.into_inner();
}

/// A bridge that the running daemon has not made has no rules to be kept. `made` is its list, where it told it. One that
/// is still carrying out what it was asked for may make the bridge yet.
fn set_aside_ignored(facts: &mut DatabaseFacts, made: Option<&str>) {
    let Some(made) = made.filter(|_| facts.cur_cfg == facts.next_cfg) else { return };
    let made: Vec<&str> = made.lines().map(str::trim).collect();
    let (bridges, ignored): (Vec<_>, Vec<_>) =
        std::mem::take(&mut facts.bridges).into_iter().partition(|bridge| made.contains(&bridge.name.as_str()));
    facts.bridges = bridges;
    facts.ignored_bridges.extend(ignored.into_iter().map(|bridge| bridge.name));
}

/// The ovs-vswitchd that the upcalls go to; `None` where the datapath does not tell whose they are.
fn find_vswitchd(
    host: &mut Host,
    may_dispatch_per_vport: bool,
    found: &mut Findings,
) -> Option<Result<Daemon, HostError>> {
    let per_cpu = keep(host.datapath.dispatches_per_cpu(), Name::Datapath, START, found)?;
    let told = keep(host.datapath.tells_upcalls(), Name::Datapath, START, found)?;
    let name = if told { Name::Datapath } else { Name::UpcallsUntold };
    let ids = keep(host.datapath.upcall_port_ids(), name, START, found)?;
    let ids = bound_ids(ids, per_cpu, found)?;
    judge_dispatch(per_cpu || may_dispatch_per_vport, found);
    Some(host.daemons.find_vswitchd(&ids))
}

/// Does a finding of this name refuse a run?
fn is_refused(findings: &[Finding], name: Name) -> bool {
    findings.iter().any(|one| one.name == name && one.severity == Severity::Refused)
}

/// There is no kernel datapath. Where both daemons run, `others` say nothing else, and nothing started helps.
fn no_datapath(facts: Option<&DatabaseFacts>, others: &[Finding], found: &mut Findings) {
    let has_bridge = facts.is_some_and(|facts| facts.bridges.iter().any(Bridge::is_of_kernel));
    let (cause, remedy) = if is_refused(others, Name::OvsRunning) {
        ("there is no such datapath", START)
    } else if is_refused(others, Name::NetworkNamespace) {
        ("there is no such datapath in this network namespace", "that of network-namespace")
    } else if has_bridge {
        ("there is no such datapath: ovs-vswitchd has made none of its bridges (its log says why)", PLAIN)
    } else {
        ("there is no bridge of the kernel's datapath, so there is nothing to keep", PLAIN)
    };
    found.refuse(Name::Datapath, DATAPATH, cause, remedy);
}

/// The port ids that upcalls go to, where somebody is bound.
fn bound_ids(ids: Vec<u32>, per_cpu: bool, found: &mut Findings) -> Option<Vec<u32>> {
    if per_cpu && nobody_bound(&ids) {
        let cause = "ovs-vswitchd has bound no socket for its upcalls: every packet without a kernel flow is lost \
                     already (OVS 3.1 does so when it was started in the first 10 s after boot)";
        found.refuse(Name::Upcalls, DATAPATH, cause, PLAIN);
        return None;
    }
    Some(ids)
}

/// Without a freeze upcalls have to be dispatched per CPU.
fn judge_dispatch(is_safe: bool, found: &mut Findings) {
    if is_safe {
        return;
    }
    // dpif_netlink_refresh_channels(): bound once for one thread, then by nobody, then for all threads.
    let cause = "it dispatches upcalls per vport: without a freeze the new ovs-vswitchd unbinds every port for a \
                 moment after it has bound it, and packets are lost";
    let remedy =
        "see to what keeps BPF from working (the warning above), or use OVS 2.16 or later on Linux 6.1 or later";
    found.refuse(Name::Dispatch, DATAPATH, cause, remedy);
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
    found.warn(Name::ReloadModule, "kernel module", cause, "none: choose the hour");
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
            let remedy =
                "none: the run goes on at level park, where kernel flows are flushed once and misses are parked";
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
    use crate::host::simulated::{Script, Sim, Variant};

    #[test]
    fn a_datapath_without_sockets_for_its_upcalls_is_refused() {
        let told = |ids: Vec<u32>| {
            let mut found = Findings::default();
            bound_ids(ids, true, &mut found);
            found.into_inner().pop().map(|one| one.name)
        };
        assert_eq!(told(vec![0, 7]), None);
        assert_eq!(told(vec![0, 0]), Some(Name::Upcalls));
        assert_eq!(told(vec![]), Some(Name::Upcalls));
    }

    #[test]
    fn a_kernel_that_does_not_tell_is_refused_only_where_the_daemon_does_not_either() {
        let untold = Variant { untold: true, ..Variant::USUAL };
        let names = |variant: Variant, refused: bool| {
            let sim = Sim::new(variant, Script::default());
            if refused {
                // A second one with sockets for upcalls: whose they go to is not to be told.
                let mut world = sim.world();
                let second = world.processes.values().find(|one| !one.port_ids.is_empty()).cloned();
                if let Some(mut second) = second {
                    second.id.pid += 1000;
                    second.opened = true;
                    world.processes.insert(second.id.pid, second);
                }
            }
            let mut found = Findings::default();
            find_vswitchd(&mut sim.host(), true, &mut found);
            found.into_inner().into_iter().map(|one| (one.name, one.severity)).collect::<Vec<_>>()
        };
        assert_eq!(names(untold, false), []);
        assert_eq!(names(untold, true), [(Name::UpcallsUntold, Severity::Refused)]);
        assert_eq!(names(Variant::USUAL, true), []);
    }

    #[test]
    fn a_host_without_a_bridge_has_nothing_to_keep_and_is_not_told_to_start_what_runs() {
        let sim = Sim::new(Variant::USUAL, Script::default());
        sim.world().kernel.no_datapath = true;
        let mut host = sim.host();
        let until = host.clock.now() + std::time::Duration::from_secs(60);
        let wish = Wish {
            strategy: Strategy::Standby,
            ovsdb: true,
            if_needed: false,
            gate_command: None,
            called_by: None,
            elsewhere: false,
        };
        let report = check(&mut host, &wish, until).report;
        let all: Vec<_> = report.findings.iter().filter(|one| one.severity == Severity::Refused).collect();
        let [one] = all.as_slice() else { panic!("{report}") };
        assert_eq!((one.name, one.remedy.as_str()), (Name::Datapath, PLAIN));

        let told = |facts: Option<&DatabaseFacts>, others: &[Finding]| {
            let mut found = Findings::default();
            no_datapath(facts, others, &mut found);
            let [one] = found.into_inner().try_into().unwrap();
            (one.cause, one.remedy)
        };
        let none = DatabaseFacts::default();
        assert!(told(Some(&none), &[]).0.contains("there is no bridge"));
        let other = |name| {
            [Finding { name, severity: Severity::Refused, object: "o".into(), cause: "c".into(), remedy: "r".into() }]
        };
        assert_eq!(told(None, &other(Name::OvsRunning)).1, START);
        assert!(told(Some(&none), &other(Name::NetworkNamespace)).0.contains("namespace"));
    }

    #[test]
    fn a_bridge_that_the_daemon_has_not_made_is_set_aside() {
        let bridge = |name: &str| crate::host::Bridge { name: name.into(), ..Default::default() };
        let all = || DatabaseFacts { bridges: vec![bridge("br0"), bridge("br1")], ..Default::default() };
        let mut facts = all();
        set_aside_ignored(&mut facts, Some("br0\n"));
        assert_eq!(
            (facts.bridges.as_slice(), facts.ignored_bridges.as_slice()),
            (&[bridge("br0")][..], &["br1".to_owned()][..])
        );
        let mut facts = all();
        set_aside_ignored(&mut facts, None);
        assert_eq!(facts, all());
        let busy = || DatabaseFacts { next_cfg: 1, ..all() };
        let mut facts = busy();
        set_aside_ignored(&mut facts, Some("br0\n"));
        assert_eq!(facts, busy());
    }

    #[test]
    fn upcalls_per_vport_need_a_freeze() {
        let mut found = Findings::default();
        judge_dispatch(true, &mut found);
        assert!(!found.refuses());
        judge_dispatch(false, &mut found);
        let found = found.into_inner();
        assert_eq!((found.len(), found[0].name, found[0].severity), (1, Name::Dispatch, Severity::Refused));
    }

    #[test]
    fn a_datapath_without_a_port_id_is_bound_to_nobody() {
        assert!(nobody_bound(&[]) && nobody_bound(&[0, 0]));
        assert!(!nobody_bound(&[0, 7]));
    }
}

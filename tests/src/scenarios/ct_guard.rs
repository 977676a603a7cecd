//! The guard of timeout policies when things go wrong: the timer stopped, the age reached, our package removed,
//! supervisor and daemons killed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::ct_policies::{hold_udp, named_by_flows, policies, slack, timers, CtPolicies, UdpPairs, UDP};
use super::{killed, network, Custom, Traffic};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::{self, facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct CtGuard;

/// Looks every 2 s, a lease of 6 s, an age of 60 s.
const QUICK: &str = "[guard]\ninterval_ms = 2000\nlease_ms = 6000\nmax_age_s = 60\n";
/// The daemon tries to delete every 20 s; TCG is slow.
const DELETED: Duration = Duration::from_secs(45);

impl Custom for CtGuard {
    fn name(&self) -> &'static str {
        "ct_guard"
    }

    fn about(&self) -> &'static str {
        "the guard of timeout policies: timer stopped, age reached, removed, supervisor and daemons killed"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        CtPolicies.set_up()?;
        let pairs = hold_udp(&UDP)?;
        network::ping("ns1", "10.9.0.2")?;
        shell(&format!("mkdir -p /etc/ovs-graceful; printf '{QUICK}' > /etc/ovs-graceful/config.toml"))?;
        timer_stopped(&pairs, out, outcome).context("timer stopped")?;
        age_reached(&pairs, out, outcome).context("age reached")?;
        fs::remove_file("/etc/ovs-graceful/config.toml")?;
        removed(&pairs, out, outcome).context("removed")?;
        all_killed(&pairs, out, outcome).context("all killed")
    }
}

fn guard() -> Value {
    let status = shell_lenient("ovs-graceful status --json");
    serde_json::from_str::<Value>(&status).map(|status| status["guard"].clone()).unwrap_or(Value::Null)
}

fn guarded() -> BTreeSet<String> {
    let guard = guard();
    let policies = guard["policies"].as_array().into_iter().flatten();
    policies.filter_map(|policy| Some(policy["policy"].as_str()?.to_owned())).collect()
}

/// A run under traffic of nobody but the held connections. Returns the policies that they live under.
fn run(name: &str, pairs: &UdpPairs, out: &Path, outcome: &mut Outcome) -> Result<BTreeSet<String>> {
    say(name);
    pairs.talk()?;
    let old = named_by_flows();
    let report = out.join(format!("report-{name}.json"));
    let log = out.join(format!("run-{name}"));
    let text = shell_lenient(&format!(
        "timeout 180 ovs-graceful restart --no-ovsdb --report {} >{} 2>&1; echo exit=$?",
        report.display(),
        log.display()
    ));
    outcome.check(format!("{name}: exit 0"), text.trim() == "exit=0", text.trim());
    let now = guarded();
    outcome.check(format!("{name}: old policies are guarded"), !old.is_empty() && old.is_subset(&now), guard());
    Ok(old)
}

fn gone(name: &str, old: &BTreeSet<String>, outcome: &mut Outcome) {
    let deleted = wait_until("the old policies to go", DELETED, Duration::from_secs(1), || policies().is_disjoint(old));
    outcome.check(format!("{name}: the daemon deletes the old policies"), deleted.is_ok(), policies());
}

fn timer_stopped(pairs: &UdpPairs, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let old = run("timer", pairs, out, outcome)?;
    let confined = shell_lenient(
        "systemctl show ovs-graceful-guard.service -p NoNewPrivileges,ProtectSystem,CapabilityBoundingSet",
    );
    let right =
        ["NoNewPrivileges=yes", "ProtectSystem=strict", "cap_net_admin"].iter().all(|word| confined.contains(word));
    let right = right && !confined.contains("cap_sys_admin");
    outcome.check("timer: its service is confined", right, confined);
    shell("systemctl stop ovs-graceful-guard.timer")?;
    let ended = wait_until("the lease to end", Duration::from_secs(15), Duration::from_millis(200), || {
        guard()["lease_left_ms"] == 0
    });
    outcome.check("timer: without looks the lease ends the guard", ended.is_ok(), guard());
    gone("timer", &old, outcome);
    Ok(())
}

fn age_reached(pairs: &UdpPairs, out: &Path, outcome: &mut Outcome) -> Result<()> {
    // Those that have lost their policy are nobody's measure.
    shell("conntrack -F 2>&1")?;
    let old = run("age", pairs, out, outcome)?;
    let kept = old.is_subset(&policies());
    outcome.check("age: a second run guards the policies of now", kept, policies());
    let ended =
        wait_until("the guard to end of age", Duration::from_secs(90), Duration::from_secs(1), || guard().is_null());
    outcome.check("age: the guard ends though connections live", ended.is_ok(), guard());
    outcome.check("age: connections live", !timers(UDP.port).is_empty(), timers(UDP.port).len());
    gone("age", &old, outcome);
    Ok(())
}

/// Our package is removed, which asks the hook first: what it guards is given back to the daemon.
fn removed(pairs: &UdpPairs, out: &Path, outcome: &mut Outcome) -> Result<()> {
    shell("conntrack -F 2>&1")?;
    let old = run("removed", pairs, out, outcome)?;
    let said = shell_lenient("ovs-graceful hook removed 2>&1; echo exit=$?");
    outcome.check("removed: nothing to say", said.trim() == "exit=0", said);
    outcome.check("removed: nothing is guarded", guard().is_null(), guard());
    let timer = facts::unit_property("ovs-graceful-guard.timer", "ActiveState");
    outcome.check("removed: the timer has ended", timer == "inactive", timer);
    gone("removed", &old, outcome);
    Ok(())
}

/// As `killed`, past the point of no return, with every daemon.
fn all_killed(pairs: &UdpPairs, out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("all killed");
    shell("conntrack -F 2>&1")?;
    pairs.talk()?;
    std::thread::sleep(Duration::from_secs(3));
    pairs.talk()?;
    let old = named_by_flows();
    let known = run::known();
    let mut client = run::start(&[], &out.join("run-killed"))?;
    let id = killed::kill_all_in("restore", &known)?;
    run::wait_for_recovery(&id)?;
    client.wait()?;
    guest::wait_for_daemons()?;
    // Two tries of the daemon.
    std::thread::sleep(Duration::from_secs(45));
    let there = policies();
    outcome.check("killed: old policies are there after the recovery", old.is_subset(&there), &there);
    outcome.check("killed: they are guarded", old.is_subset(&guarded()), guard());
    pairs.talk()?;
    let timers = timers(UDP.port);
    let right = timers.iter().filter(|t| (UDP.timer - slack()..=UDP.timer).contains(t)).count();
    outcome.check("killed: live connections under their policy", right > 0 && right == timers.len(), &timers);
    shell("conntrack -F 2>&1")?;
    gone("killed", &old, outcome);
    let nothing = wait_until("the guard to end", Duration::from_secs(30), Duration::from_secs(1), || {
        guard().is_null() && facts::unit_property("ovs-graceful-guard.timer", "ActiveState") == "inactive"
    });
    outcome.check("killed: nothing of the guard is left", nothing.is_ok(), guard());
    let failed = facts::failed_units();
    outcome.check("no unit failed", failed.is_empty(), failed);
    Ok(())
}

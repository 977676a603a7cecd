//! What has to hold after whatever happened to a run: the host forwards, and nothing of it is left.

use anyhow::Result;
use serde_json::{json, Value};

use super::doors::OVS_CTL;
use super::plain;
use crate::command::shell_lenient;
use crate::guest::{self, facts, Live};
use crate::outcome::{Outcome, ProbeOutcome};

/// Nothing of a run that is over is left on the host.
pub fn nothing_left(case: &str, outcome: &mut Outcome) {
    let check = |what: &str| format!("{case}: {what}");
    let frozen = shell_lenient("dpfreeze status --json");
    let thawed = serde_json::from_str::<Value>(&frozen).is_ok_and(|s| s.is_null() || s["armed"] == false);
    outcome.check(check("nothing is frozen"), thawed, frozen);
    let distance = shell_lenient("sysctl -n net.ipv4.ipfrag_max_dist");
    outcome.check(check("fragments are put together as before"), distance.trim() == "64", distance);
    let flag = shell_lenient("ovs-vsctl get open_vswitch . other_config external_ids");
    let unset = !flag.contains("flow-restore-wait") && !flag.contains("ovs-graceful");
    outcome.check(check("no flow-restore-wait, no mark"), unset, flag);
    let files = shell_lenient("ls /run/openvswitch /run/ovs-graceful; ls /run/systemd/system/*.d 2>/dev/null");
    let clean = !["ovsg", "rules.", "devices.", "standing.", "journal.", "report.", "restarted.", "90-ovs-graceful"]
        .iter()
        .any(|word| files.contains(word));
    outcome.check(check("no file of the run is left"), clean, files);
    let status = shell_lenient("ovs-graceful status --json");
    let parsed: Value = serde_json::from_str(&status).unwrap_or(Value::Null);
    outcome.check(
        check("status: no run, none interrupted"),
        parsed["lock"].is_null() && parsed["interrupted"].is_null(),
        status,
    );
}

/// The unit owns the one ovs-vswitchd that lives; where systemd does not run, its monitor does.
pub fn owned(case: &str, outcome: &mut Outcome) {
    match facts::systemd_runs() {
        true => owned_by_its_unit(case, outcome),
        false => owned_by_its_monitor(case, outcome),
    }
    let by_name = shell_lenient("timeout 20 ovs-appctl -t ovs-vswitchd version");
    outcome.check(format!("{case}: ovs-appctl by name"), by_name.contains("Open vSwitch"), by_name);
}

fn owned_by_its_unit(case: &str, outcome: &mut Outcome) {
    let found = facts::daemons("ovs-vswitchd");
    let unit = "ovs-vswitchd.service";
    let state = facts::unit_property(unit, "ActiveState");
    let main = facts::unit_property(unit, "MainPID");
    let unknown = main == "0" && main_may_be_unknown();
    let right = matches!(found.as_slice(), [d] if main == d.pid.to_string() || unknown) && state == "active";
    let value = json!({ "state": state, "main_pid": main, "daemons": found });
    outcome.check(format!("{case}: the unit is active and owns its daemon"), right, value);
}

/// One monitor for each daemon, and no other.
fn owned_by_its_monitor(case: &str, outcome: &mut Outcome) {
    for name in facts::DAEMONS {
        let found = facts::daemons(name);
        let monitors = shell_lenient(&format!("pgrep -f '^{name}: monitoring'"));
        let parent = |daemon: &facts::Daemon| shell_lenient(&format!("ps -o ppid= -p {}", daemon.pid));
        let parents: Vec<String> = found.iter().map(parent).collect();
        let right = matches!(parents.as_slice(), [one] if !one.trim().is_empty() && one.trim() == monitors.trim());
        let value = json!({ "daemons": found, "parents": parents, "monitors": monitors });
        outcome.check(format!("{case}: {name} is under its monitor"), right, value);
    }
}

/// Debian 11's ovs-ctl leaves a process behind that notes the host's name; where systemd itself has run it, and looks while
/// that process lives, it does not know which is the main one of the unit, which names no PID file.
pub fn main_may_be_unknown() -> bool {
    !shell_lenient(&format!("grep -hx '    set_hostname &' {OVS_CTL} {OVS_CTL}.distrib 2>/dev/null")).is_empty()
}

/// What our package changes about these units, without what systemd tells of the last time.
pub fn commands(units: &[&str]) -> String {
    let show = "systemctl show -p ExecReload,ExecStop,DropInPaths,TimeoutStopUSec";
    shell_lenient(&format!("for unit in {}; do {show} $unit | sed 's/start_time=.*//'; done", units.join(" ")))
}

/// No unit is in the state `failed`.
pub fn no_unit_failed(outcome: &mut Outcome) {
    if !facts::systemd_runs() {
        return;
    }
    let failed = facts::failed_units();
    outcome.check("no unit failed", failed.is_empty(), failed);
}

/// Plain's bridge has the rules and ports that it had.
pub fn as_before(case: &str, rules: &facts::Promised, outcome: &mut Outcome) {
    let now = facts::promised(&plain::bridges());
    outcome.check(format!("{case}: rules and ports as before"), now == *rules, json!([rules, now]));
}

/// What a daemon that is killed while it starts leaves of its feature probes: a flow that matches whatever comes from
/// nowhere, of any Ethernet type (`check_add_mpls`, ofproto/ofproto-dpif.c).
pub const LEFT_PROBE: &str = "ovs-dpctl add-flow 'in_port(0),eth(src=00:00:00:00:00:00,dst=00:00:00:00:00:00)' ''";

/// Such a flow has misled nobody, and is gone.
pub fn sees_as_much(case: &str, before: &facts::Features, outcome: &mut Outcome) {
    let now = facts::features(&plain::bridges());
    outcome.check(format!("{case}: features of the datapath as before"), now == *before, json!([before, now]));
    let left = shell_lenient("ovs-dpctl dump-flows | grep 'in_port(0),eth(src=00:00:00:00:00:00,' || true");
    outcome.check(format!("{case}: no probe of a daemon that was killed is left"), left.trim().is_empty(), left);
}

/// What no kernel flow is there for passes as well.
pub fn new_traffic_passes(case: &str, outcome: &mut Outcome) {
    let ping = shell_lenient("ip netns exec ns1 ping -c 3 -i 0.2 -W 2 10.9.0.2");
    outcome.check(format!("{case}: new traffic passes"), ping.contains("3 received"), ping);
}

/// All of these, after whatever was to change nothing.
pub fn all_is_well(case: &str, rules: &facts::Promised, outcome: &mut Outcome) {
    nothing_left(case, outcome);
    owned(case, outcome);
    as_before(case, rules, outcome);
    new_traffic_passes(case, outcome);
}

/// Ends plain's probes; what `e` and `n` lost, which is nothing unless this case may lose something.
pub fn finish(case: &str, live: Live, may_lose: bool, outcome: &mut Outcome) -> Result<[u64; 2]> {
    let mut all_lost = [0; 2];
    for (probe, ended) in guest::finish_all(live)? {
        if let ProbeOutcome::Udp(udp) = &ended {
            let lost = udp.requests.lost + udp.replies.lost;
            all_lost[usize::from(probe == "n")] = lost;
            let good = udp.requests.received > 0 && (lost == 0 || may_lose);
            let value = json!({ "lost": lost, "beside the switch since boot": facts::dropped() });
            outcome.check(format!("{case}: {probe}: nothing lost"), good, value);
        }
        outcome.probes.insert(format!("{case} {probe}"), ended);
    }
    Ok(all_lost)
}

//! The assertions of "A run that did nothing must not pass" (design.md). Each is named and shows what it found.

use serde_json::{json, Value};

use super::facts::{self, Daemon, Flow};
use super::Evidence;
use crate::command::shell_lenient;
use crate::outcome::{Action, Outcome, ProbeOutcome, UdpOutcome};
use crate::scenarios::aftermath::main_may_be_unknown;
use crate::scenarios::Expect;

/// Share of the packets due that a probe must have sent: the rest is TCG being slow, not our business.
const SENT_SHARE: f64 = 0.97;

/// Packets between two dumps, a second from each other, of a flow that is in use. What has fewer (ARP, router
/// solicitations) may rightly expire before the freeze: a slow machine takes the 10 s of max-idle to get there.
const IN_USE: u64 = 5;

/// Words in ovs-vswitchd's log that mean that a packet met state of the old process.
const FORBIDDEN_LOG: [&str; 2] = ["could not find ofproto", "No recirculation context"];

/// Judges a run. Stock runs are not asked what only ours can fulfil.
pub fn judge(evidence: &Evidence, expect: &Expect, outcome: &mut Outcome) {
    daemons(evidence, expect, outcome);
    units(evidence, outcome);
    probes_sent(outcome);
    let before = evidence.counters_before;
    let after = evidence.counters_after;
    outcome.note("counters", json!({ "before": before, "after": after, "flows_begun": evidence.flows_begun }));
    outcome.note("kept_flows", kept_flows(evidence));
    if evidence.job.action.judged_as_ours() {
        // Not asked of stock, whose bridges without rules answer many flows with one wide megaflow.
        let missed = after.missed.saturating_sub(before.missed);
        let found = json!({ "missed": missed, "flows_begun": evidence.flows_begun });
        outcome.check("kernel missed rose by the new flows", missed >= evidence.flows_begun, found);
        report(evidence, expect, outcome);
        no_losses(expect, outcome);
        state_kept(evidence, expect, outcome);
        let lost = after.lost.saturating_sub(before.lost);
        outcome.check("kernel lost 0", lost == 0 || expect.overflow, lost);
    }
}

fn daemons(evidence: &Evidence, expect: &Expect, outcome: &mut Outcome) {
    let in_container = evidence.job.action == Action::Container;
    let keeps_database = in_container || evidence.job.extra_args.iter().any(|a| a == "--no-ovsdb");
    for (i, name) in facts::DAEMONS.iter().enumerate() {
        let (Some(before), Some(after)) = (evidence.daemons_before.get(i), evidence.daemons_after.get(i)) else {
            continue;
        };
        let found = json!({ "before": before, "after": after });
        let [old] = before.as_slice() else {
            outcome.check(format!("one {name} before"), false, found);
            continue;
        };
        let [new] = after.as_slice() else {
            outcome.check(format!("one {name} after"), false, found);
            continue;
        };
        let replaced = new.pid != old.pid && new.start_time > old.start_time;
        if *name == "ovsdb-server" && keeps_database {
            outcome.check(format!("{name} left alone"), new == old, found);
            continue;
        }
        outcome.check(format!("{name} is another process"), replaced, found);
        let package = shell_lenient(&format!("dpkg -S '{}'", new.executable));
        let ours = package.starts_with("openvswitch-");
        outcome.check(
            format!("{name} is the package's"),
            ours,
            json!({ "exe": new.executable, "dpkg": package.trim() }),
        );
        if expect.in_units && !in_container {
            in_its_unit(name, new, outcome);
        }
    }
}

fn in_its_unit(name: &str, daemon: &Daemon, outcome: &mut Outcome) {
    let unit = format!("{name}.service");
    let state = facts::unit_property(&unit, "ActiveState");
    let main = facts::unit_property(&unit, "MainPID");
    let cgroup = facts::unit_property(&unit, "ControlGroup");
    let is_main = main == daemon.pid.to_string() || (main == "0" && main_may_be_unknown());
    let right = state == "active" && is_main && cgroup == daemon.cgroup;
    let found = json!({ "state": state, "main_pid": main, "control_group": cgroup, "daemon": daemon });
    outcome.check(format!("{unit} owns it"), right, found);
}

fn units(evidence: &Evidence, outcome: &mut Outcome) {
    let failed = facts::failed_units();
    let system = shell_lenient("systemctl is-system-running");
    let found = json!({ "before": evidence.failed_before, "after": failed, "system": system.trim() });
    outcome.check("no unit failed by it", failed == evidence.failed_before, found);
}

/// Every probe sent what it should. A connection that does not live through a restart of stock's, which leaves bridges
/// without their rules, is what that costs.
pub fn probes_sent(outcome: &mut Outcome) {
    let mut checks = Vec::new();
    for (name, probe) in &outcome.probes {
        match probe {
            ProbeOutcome::Udp(udp) => {
                let share = udp.sent as f64 / udp.due.max(1) as f64;
                let found = json!({ "sent": udp.sent, "due": udp.due, "errors": udp.send_errors });
                checks.push((format!("{name} sent all it should"), udp.sent > 0 && share >= SENT_SHARE, found));
            }
            ProbeOutcome::Tcp(_) if outcome.action == Action::StockRestart => {}
            ProbeOutcome::Tcp(tcp) => {
                let alive = tcp.error.is_none() && tcp.written.iter().all(|w| *w > 0);
                checks.push((format!("{name} ran to its end"), alive, json!(tcp)));
            }
            ProbeOutcome::Connections(all) => {
                let share = all.begun as f64 / all.due.max(1) as f64;
                checks.push((format!("{name} began all it should"), all.begun > 0 && share >= SENT_SHARE, json!(all)));
            }
            ProbeOutcome::Iperf(iperf) => {
                let sent = iperf.error.is_none() && iperf.bytes > 0;
                checks.push((format!("{name} ran to its end"), sent, json!(iperf)));
            }
            ProbeOutcome::Silent(_) | ProbeOutcome::Copies(_) => {}
        }
    }
    for (name, pass, found) in checks {
        outcome.check(name, pass, found);
    }
}

/// No probe lost, doubled or spoiled anything.
pub fn no_losses(expect: &Expect, outcome: &mut Outcome) {
    outcome.note("dropped beside the switch since boot", facts::dropped());
    let mut checks = Vec::new();
    for (name, probe) in &outcome.probes {
        match probe {
            ProbeOutcome::Udp(udp) => {
                let lossless = udp.requests.lost == 0 && udp.replies.lost == 0;
                if !expect.overflow {
                    checks.push((format!("{name} lost 0"), lossless, losses(udp)));
                }
                let clean = [&udp.requests, &udp.replies].iter().all(|d| d.duplicated == 0 && d.corrupted == 0);
                checks.push((format!("{name} duplicated 0, corrupted 0"), clean, losses(udp)));
                checks.push((
                    format!("{name} no reply from a wrong address"),
                    udp.wrong_source == 0,
                    json!(udp.wrong_source),
                ));
            }
            ProbeOutcome::Tcp(tcp) => {
                let whole = tcp.written == tcp.verified && tcp.corrupted == 0;
                checks.push((format!("{name} arrived whole"), whole, json!(tcp)));
                if expect.no_timeouts {
                    checks.push((
                        format!("{name} no retransmission time-out"),
                        tcp.timeouts == 0 && tcp.backoff == 0,
                        json!(tcp),
                    ));
                }
            }
            ProbeOutcome::Connections(all) => {
                checks.push((format!("{name} were all answered"), all.answered == all.begun, json!(all)));
            }
            // TCP gets all bytes there or breaks, which is asked of every side.
            ProbeOutcome::Iperf(_) => {}
            // Judged by the scenario, which knows what is mirrored.
            ProbeOutcome::Copies(_) => {}
            ProbeOutcome::Silent(silent) => {
                let quiet = silent.later_unicast <= silent.quiet_unicast;
                checks.push((format!("{name} saw nothing flooded"), quiet, json!(silent)));
            }
        }
    }
    for (name, pass, found) in checks {
        outcome.check(name, pass, found);
    }
}

fn losses(udp: &UdpOutcome) -> Value {
    let side = |d: &crate::outcome::Direction| {
        json!({ "sent": d.sent, "lost": d.lost, "duplicated": d.duplicated, "corrupted": d.corrupted,
                "first_lost_ms": d.first_lost_ms, "last_lost_ms": d.last_lost_ms })
    };
    json!({ "requests": side(&udp.requests), "replies": side(&udp.replies) })
}

/// Flows that were in use before and hold nothing of the old process: present afterwards? Counts never fell?
fn kept_flows(evidence: &Evidence) -> Value {
    let in_use = |ufid: &String, flow: &Flow| {
        flow.may_be_kept()
            && !flow.covers_moving_ports()
            && evidence.flows_earlier.get(ufid).is_some_and(|earlier| flow.packets >= earlier.packets + IN_USE)
    };
    let mut kept = 0;
    let (mut missing, mut fallen) = (Vec::new(), Vec::new());
    for (ufid, before) in evidence.flows_before.iter().filter(|(u, f)| in_use(u, f)) {
        match evidence.flows_after.get(ufid) {
            None => missing.push(json!({ "ufid": ufid, "key": before.key, "actions": before.actions })),
            Some(after) if after.packets < before.packets => {
                fallen.push(json!({ "ufid": ufid, "before": before.packets, "after": after.packets }));
            }
            Some(_) => kept += 1,
        }
    }
    missing.truncate(5);
    json!({ "before": evidence.flows_before.len(), "after": evidence.flows_after.len(),
            "kept": kept, "missing": missing, "fallen": fallen })
}

/// Whether all tracked connections are of kinds that there were before: a packet replayed half translated, or once too
/// often, would have made another.
fn connections(evidence: &Evidence, outcome: &mut Outcome) {
    let (before, after) = (&evidence.connections_before, &evidence.connections_after);
    // Under a timeout policy Debian 11 (OVS 2.15, Linux 5.10) forgets TCP connections while they go on, and tracks them anew
    // by whichever side speaks next: with nothing done at all (`--action nothing`).
    let forgets = shell_lenient("uname -r").starts_with("5.10.")
        && !shell_lenient("ovs-vsctl --columns=_uuid list ct_timeout_policy").trim().is_empty();
    let known = |kind: &String| before.contains_key(kind) || forgets && is_untranslated_tcp(kind);
    let strays: Vec<&String> = after.keys().filter(|kind| !known(kind)).collect();
    let found = json!({ "strays": strays, "before": before, "after": after });
    outcome.check("no connection of a new kind", strays.is_empty(), found);
}

/// Whether the replies of a TCP connection are from where it went to.
fn is_untranslated_tcp(kind: &str) -> bool {
    let all = |name: &str| kind.split(' ').filter_map(|word| word.strip_prefix(name)).map(str::to_owned).collect();
    let (from, mut to): (Vec<String>, Vec<String>) = (all("src="), all("dst="));
    to.reverse();
    kind.starts_with("tcp ") && from.len() == 2 && from == to
}

/// A daemon whose probes of the datapath were disturbed does without what it did not find. Another version may look for
/// other features.
fn features(evidence: &Evidence, outcome: &mut Outcome) {
    let (before, after) = (&evidence.features_before, &evidence.features_after);
    if before.daemon != after.daemon {
        return;
    }
    let same = before.found.contains("Yes") && before.found == after.found;
    outcome.check("features of the datapath as before", same, json!({ "before": before, "after": after }));
}

fn state_kept(evidence: &Evidence, expect: &Expect, outcome: &mut Outcome) {
    connections(evidence, outcome);
    features(evidence, outcome);
    for (name, before) in &evidence.promised_before.0 {
        let after = evidence.promised_after.0.get(name).cloned().unwrap_or_default();
        let same = *before == after;
        let found = if same { json!(before.lines().count()) } else { json!({ "before": before, "after": after }) };
        outcome.check(format!("{name} as before"), same, found);
    }
    if expect.keeps_flows {
        let kept = kept_flows(evidence);
        let none_missing = kept["missing"].as_array().is_some_and(Vec::is_empty);
        let none_fallen = kept["fallen"].as_array().is_some_and(Vec::is_empty);
        outcome.check("kernel flows kept under their UFIDs", kept["kept"] != 0 && none_missing && none_fallen, kept);
    }
    let bad: Vec<&str> =
        evidence.log.lines().filter(|l| FORBIDDEN_LOG.iter().any(|word| l.contains(word))).take(5).collect();
    outcome.check("log free of lost contexts", bad.is_empty(), bad);
    let waiting = shell_lenient("ovs-vsctl --if-exists get open_vswitch . other_config:flow-restore-wait");
    outcome.check("flow-restore-wait is gone", waiting.trim().is_empty(), waiting.trim());
}

/// The report of our restart (design.md, "The report").
fn report(evidence: &Evidence, expect: &Expect, outcome: &mut Outcome) {
    outcome.check("exit code 0", evidence.exit == Some(0), evidence.exit);
    let Some(report) = &evidence.report else {
        outcome.check("a report was written", false, Value::Null);
        return;
    };
    outcome.note("report", report);
    outcome.check("report schema 1", report["schema"] == 1, &report["schema"]);
    outcome.check("report exit code 0", report["exit_code"] == 0, &report["exit_code"]);
    outcome.check("level as asked", report["level"] == expect.level, &report["level"]);
    let asked = evidence.job.extra_args.iter().position(|a| a == "--strategy");
    let strategy = match asked {
        _ if matches!(evidence.job.action, Action::DoorRestartSwitch | Action::Container) => "stop-start",
        Some(i) => evidence.job.extra_args.get(i + 1).map_or("", String::as_str),
        None => "standby",
    };
    outcome.check("strategy as asked", report["strategy"] == strategy, &report["strategy"]);
    if expect.level == "full" {
        for class in expect.refused {
            let count = &report["refused"][class];
            outcome.check(format!("refused {class}"), count.as_u64().unwrap_or(0) > 0, count);
        }
        skipped(&report["details"]["freeze_skipped"], outcome);
    }
    let parked = &report["parked"];
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let unreplayable = match &parked["unreplayable"] {
        Value::Object(reasons) => reasons.values().map(number).sum(),
        other => number(other),
    };
    let packets = number(&parked["packets"]);
    let sum = number(&parked["replayed"]) + number(&parked["overflowed"]) + unreplayable;
    outcome.check("packets were parked", packets > 0, parked);
    outcome.check("parked = replayed + overflowed + unreplayable", packets == sum, parked);
    if !expect.overflow {
        let copies: u64 = expect.thrown_away.iter().map(|reason| number(&parked["unreplayable"][reason])).sum();
        let replayed = number(&parked["replayed"]);
        outcome.check("all parked were replayed", replayed + copies == packets, parked);
    }
    let empty = Vec::new();
    let datapaths = report["datapaths"].as_array().unwrap_or(&empty);
    outcome.check("report names a datapath", !datapaths.is_empty(), datapaths.len());
    for datapath in datapaths.iter().filter(|_| !expect.overflow) {
        outcome.check("report lost_delta 0", datapath["lost_delta"] == 0, &datapath["lost_delta"]);
    }
    let differences = report["differences"].as_array().map_or(0, Vec::len);
    outcome.check("report has no differences", differences == 0, &report["differences"]);
}

/// The kernel has not passed over the freeze. One copy of it may be missed where the hook is `fmod_ret`.
fn skipped(counts: &Value, outcome: &mut Outcome) {
    let lsms = shell_lenient("cat /sys/kernel/security/lsm");
    let well = match lsms.trim().split(',').any(|lsm| lsm == "bpf") {
        true => counts.is_null(),
        false => counts.is_null() || counts["unseen_at_most"] == 0,
    };
    outcome.check("no message passed the freeze unseen", well, counts);
}

/// Nothing is frozen any more: our tool says so, and the kernel takes a flush again. Ends the run: flows are gone.
pub fn judge_thawed(outcome: &mut Outcome) {
    if outcome.action == Action::Ours {
        let text = shell_lenient("dpfreeze status --json");
        // null: nothing pinned. The guard of timeout policies may outlive the run (design, idea 6), nothing else may.
        let thawed = serde_json::from_str::<Value>(&text)
            .is_ok_and(|status| status.is_null() || status["armed"] == false || status["classes"] == "CT_TIMEOUT_DEL");
        outcome.check("dpfreeze says: not frozen", thawed, &text);
    }
    let flush = shell_lenient("ovs-dpctl del-flows && echo flushed");
    outcome.check("the kernel takes a flush again", flush.contains("flushed"), flush.trim());
    // A daemon before 3.3 goes on believing in flows that somebody else has flushed, and never makes them again.
    let _next_round_begins_anew = shell_lenient("ovs-appctl revalidator/purge");
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::guest::facts::{Counters, Flows, Promised};
    use crate::outcome::{Job, Load};

    fn evidence() -> Evidence {
        let flow = |packets| Flow { key: "recirc_id(0),in_port(1)".to_owned(), actions: "2".to_owned(), packets };
        let flows = |packets| Flows::from([("u1".to_owned(), flow(packets))]);
        let job = Job {
            scenario: "plain".to_owned(),
            action: Action::Ours,
            product: true,
            load: Load::full(1),
            rounds: 1,
            unix_ms: 0,
            entropy: String::new(),
            extra_args: Vec::new(),
        };
        let kinds = BTreeMap::from([("udp zone=5".to_owned(), 7)]);
        Evidence {
            job,
            bridges: Vec::new(),
            daemons_before: [Vec::new(), Vec::new()],
            daemons_after: [Vec::new(), Vec::new()],
            flows_earlier: flows(10),
            flows_before: flows(20),
            flows_after: flows(30),
            counters_before: Counters::default(),
            counters_after: Counters::default(),
            flows_begun: 0,
            connections_before: kinds.clone(),
            connections_after: kinds,
            promised_before: Promised::default(),
            promised_after: Promised::default(),
            features_before: facts::Features::default(),
            features_after: facts::Features::default(),
            failed_before: String::new(),
            log: String::new(),
            exit: Some(0),
            report: Some(json!({
                "schema": 1, "exit_code": 0, "level": "full", "strategy": "standby",
                "refused": { "flow_flush": 1, "upcall_bind": 1 },
                "parked": { "packets": 7, "replayed": 7, "overflowed": 0, "unreplayable": {} },
                "datapaths": [{ "name": "ovs-system", "lost_delta": 0 }], "differences": []
            })),
        }
    }

    /// The failed assertions about a report that was changed at one place.
    fn failures(pointer: &str, value: Value) -> Vec<String> {
        let mut evidence = evidence();
        if let Some(place) = evidence.report.as_mut().and_then(|r| r.pointer_mut(pointer)) {
            *place = value;
        }
        let mut outcome = Outcome::new("plain", Action::Ours);
        report(&evidence, &Expect::default(), &mut outcome);
        outcome.checks.into_iter().filter(|c| !c.pass).map(|c| c.name).collect()
    }

    #[test]
    fn a_translated_connection_is_seen_by_its_replies() {
        let plain = "tcp src=10.9.0.2 dst=10.9.0.1 sport=9002 src=10.9.0.1 dst=10.9.0.2 dport=9002 zone=5";
        assert!(is_untranslated_tcp(plain));
        assert!(!is_untranslated_tcp(&plain.replace("tcp", "udp")));
        assert!(!is_untranslated_tcp(
            "tcp src=10.9.0.1 dst=10.9.0.200 dport=9002 src=10.9.0.2 dst=10.9.0.1 sport=9002"
        ));
    }

    #[test]
    fn a_good_report_passes_and_each_change_of_it_does_not() {
        assert!(failures("/none", Value::Null).is_empty());
        assert_eq!(failures("/level", json!("park")), ["level as asked"]);
        assert_eq!(failures("/strategy", json!("stop-start")), ["strategy as asked"]);
        assert_eq!(failures("/refused/upcall_bind", json!(0)), ["refused upcall_bind"]);
        assert_eq!(failures("/datapaths/0/lost_delta", json!(3)), ["report lost_delta 0"]);
        assert_eq!(failures("/differences", json!(["x"])), ["report has no differences"]);
        let nothing_parked = json!({ "packets": 0, "replayed": 0, "overflowed": 0, "unreplayable": {} });
        assert_eq!(failures("/parked", nothing_parked), ["packets were parked"]);
        let two_gone = json!({ "packets": 7, "replayed": 5, "overflowed": 0, "unreplayable": {} });
        assert_eq!(failures("/parked", two_gone).len(), 2);
        let counted = json!({ "packets": 7, "replayed": 5, "overflowed": 0, "unreplayable": { "nat": 2 } });
        assert_eq!(failures("/parked", counted), ["all parked were replayed"]);
    }

    #[test]
    fn a_kept_flow_is_there_and_its_count_never_fell() {
        let mut evidence = evidence();
        assert_eq!(kept_flows(&evidence)["kept"], 1);
        evidence.flows_after.values_mut().for_each(|f| f.packets = 19);
        assert_eq!(kept_flows(&evidence)["fallen"].as_array().map(Vec::len), Some(1));
        evidence.flows_after.clear();
        assert_eq!(kept_flows(&evidence)["missing"].as_array().map(Vec::len), Some(1));
        // Hardly in use before: an idle flow may go.
        evidence.flows_earlier.values_mut().for_each(|f| f.packets = 16);
        assert_eq!(kept_flows(&evidence)["missing"].as_array().map(Vec::len), Some(0));
    }
}

//! What the steps found out, in the words of the report.

use std::time::Instant;

use dpfreeze::ovs::{Flow, FlowCounts};
use dpfreeze::park::{doom_of, feature_probes, suspicious_since, ParkStats, RemovalReport, ReplayReport};
use dpfreeze::snapshot::{compare, kept_flows, DatapathSnapshot, Difference, Snapshot};

use crate::host::datapath::DATAPATH;
use crate::host::real::faithful::{deletion, key};
use crate::host::real::openflow::{compare as compare_rules, first_field};
use crate::host::{
    Bridge, BridgeRules, Daemon, HostError, LearnReport, OpenFlow, RefusedRule, RestoredRules, RuleDifference,
};
use crate::report::{DatapathReport, OpenFlowReport, Parked, Report};

/// The state before, as far as the report wants it.
pub(super) fn before(report: &mut Report, before: &Snapshot) {
    report.datapaths = before.datapaths.iter().map(datapath).collect();
    report.conntrack.timeout_policies_before = before.timeout_policies.len() as u64;
    report.conntrack.zone_limits_before = before.ct_limits.len() as u64;
}

fn datapath(before: &DatapathSnapshot) -> DatapathReport {
    DatapathReport {
        name: before.datapath.name.clone(),
        flows_before: before.flows.len() as u64,
        ..DatapathReport::default()
    }
}

/// The end of a time without a daemon bound to the upcalls: a run that goes back after its hand-over has two.
pub(super) fn gap_ended(report: &mut Report, began: &mut Option<Instant>, ended: Instant) {
    if let Some(began) = began.take() {
        let gap = milliseconds(ended.saturating_duration_since(began));
        report.gap_ms = Some(report.gap_ms.unwrap_or_default() + gap);
    }
}

/// What was removed from datapath `name`, whose table held `removed.dump` just before.
pub(super) fn removal(report: &mut Report, name: &str, removed: &RemovalReport) {
    if let Some(datapath) = report.datapaths.iter_mut().find(|datapath| datapath.name == name) {
        datapath.flows_before = removed.dump.len() as u64;
        datapath.flows_removed = removed.by_reason();
    }
    report.details.insert("removal_ms".into(), milliseconds(removed.removal_time).into());
    for (errno, count) in &removed.errors {
        report.warnings.push(format!("{count} flows could not be removed: {errno}"));
    }
}

/// What was parked, in all, and what became of it in this replay.
pub(super) fn replay(report: &mut Report, before: Option<&Snapshot>, stats: &ParkStats, replayed: &ReplayReport) {
    report.parked.packets = stats.parked + stats.overflowed;
    (report.parked.most_packets, report.parked.most_bytes) = (stats.most_waiting, stats.most_bytes);
    overflow(&mut report.parked, before, stats);
    report.parked.replayed += replayed.replayed;
    for (name, count) in &replayed.undone {
        *report.parked.undone.entry(name.clone()).or_default() += count;
    }
    for (reason, count) in &replayed.unreplayable {
        *report.parked.unreplayable.entry(reason.clone()).or_default() += count;
    }
    report.parked.longest_ms = report.parked.longest_ms.max(replayed.longest_ms as f64);
    report.parked.p99_ms = report.parked.p99_ms.max(replayed.p99_ms as f64);
    for (errno, count) in &replayed.errors {
        report.warnings.push(format!("{count} parked packets were not taken back by the kernel: {errno}"));
    }
}

/// What found no room, by where and by port; ports by their names `before`.
fn overflow(parked: &mut Parked, before: Option<&Snapshot>, stats: &ParkStats) {
    parked.overflowed = stats.overflowed + stats.socket_drops;
    let reasons = [("park", stats.overflowed), ("sockets", stats.socket_drops)];
    let counted = reasons.into_iter().filter(|(_, count)| *count > 0);
    parked.overflowed_by_reason = counted.map(|(reason, count)| (reason.to_owned(), count)).collect();
    let vports = before.and_then(|before| before.datapath(DATAPATH)).map_or(&[][..], |datapath| &datapath.vports);
    let name = |number: u32| match vports.iter().find(|vport| vport.port_no == number) {
        Some(vport) => vport.name.clone(),
        None if number == u32::MAX => "unknown".to_owned(),
        None => format!("port {number}"),
    };
    parked.overflowed_by_port = stats.overflowed_by_port.iter().map(|(port, count)| (name(*port), *count)).collect();
}

/// So many flows that are gone are in the report, as they were.
const GONE_TOLD: usize = 4;

/// Flows that should have been kept, and are not.
pub(super) struct Gone {
    count: usize,
    /// The first of them.
    told: Vec<serde_json::Value>,
}

/// The flows of datapath `name` while nothing could delete them: those of the dump before the removal that were not
/// removed on purpose and are no probes must have been `seen`, under their UFID, with a packet count that never fell. Those that are not.
pub(super) fn frozen_flows(
    report: &mut Report,
    name: &str,
    removed: &RemovalReport,
    snapshot: &[Flow],
    seen: &FlowCounts,
) -> Option<Gone> {
    let entry = report.datapaths.iter_mut().find(|datapath| datapath.name == name)?;
    let survivors = survivors(removed, snapshot);
    let gone: Vec<&Flow> = survivors.iter().copied().filter(|flow| kept_flows([*flow], seen) == 0).collect();
    entry.flows_kept = (survivors.len() - gone.len()) as u64;
    if gone.is_empty() {
        return None;
    }
    let told = gone.iter().take(GONE_TOLD).filter_map(|flow| serde_json::to_value(flow).ok()).collect();
    Some(Gone { count: gone.len(), told })
}

/// What [`frozen_flows`] found is a difference.
pub(super) fn flows_gone(report: &mut Report, name: &str, gone: Gone) {
    let Gone { count, told } = gone;
    report.details.insert("flows_gone".into(), told.into());
    report.differences.push(format!("datapath {name}: {count} kernel flows that should have been kept are gone"));
}

fn survivors<'a>(removed: &'a RemovalReport, snapshot: &[Flow]) -> Vec<&'a Flow> {
    let mut others = feature_probes(snapshot, &removed.dump);
    others.extend(suspicious_since(snapshot, &removed.dump));
    let survives = |(i, flow): &(usize, &Flow)| !others.contains(i) && !matches!(doom_of(flow), Ok(Some(_)));
    removed.dump.iter().enumerate().filter(survives).map(|(_, flow)| flow).collect()
}

/// The state after: counters, and everything but flows (which may expire again by now) and ports that are not among
/// `wanted` any more: those were taken out of the database meanwhile. Where the module was `reloaded` the datapath is
/// another one, and only what it has to have counts.
pub(super) fn after(report: &mut Report, before: &Snapshot, after: &Snapshot, wanted: &[String], reloaded: bool) {
    for entry in &mut report.datapaths {
        let (Some(old), Some(new)) = (before.datapath(&entry.name), after.datapath(&entry.name)) else { continue };
        if reloaded {
            entry.flows_removed.insert("module_reloaded".into(), old.flows.len() as u64);
            continue;
        }
        entry.lost_delta = new.datapath.stats.lost as i64 - old.datapath.stats.lost as i64;
        entry.missed_delta = new.datapath.stats.missed as i64 - old.datapath.stats.missed as i64;
    }
    let wrong = |difference: &Difference| match difference {
        Difference::FlowGone { .. } | Difference::FlowReplaced { .. } => false,
        Difference::PortGone { port, .. } => wanted.contains(port),
        Difference::DatapathReplaced { .. }
        | Difference::CounterFell { .. }
        | Difference::PortRenumbered { .. }
        | Difference::PortChanged { .. } => !reloaded,
        _ => true,
    };
    let wrong = compare(before, after).into_iter().filter(wrong);
    report.differences.extend(wrong.map(|difference| difference.to_string()));
}

/// OpenFlow rules before.
pub(super) fn rules_before(report: &mut Report, rules: &[BridgeRules]) {
    report.openflow = rules
        .iter()
        .map(|rules| OpenFlowReport {
            bridge: rules.bridge.clone(),
            flows_before: rules.flows.len() as u64,
            groups_before: rules.groups.len() as u64,
            meters_before: rules.meters.len() as u64,
            ..OpenFlowReport::default()
        })
        .collect();
}

/// How the rules were restored.
pub(super) fn restored(report: &mut Report, restored: &[RestoredRules]) {
    for done in restored.iter().filter(|done| done.not_atomic) {
        if let Some(entry) = report.openflow.iter_mut().find(|entry| entry.bridge == done.bridge) {
            entry.not_atomic = true;
        }
    }
}

/// What became of learned addresses.
pub(super) fn learned<'a>(report: &mut Report, all: impl Iterator<Item = &'a LearnReport>) {
    let mut sum = LearnReport::default();
    for learned in all {
        let unasked = sum.unasked + learned.unasked;
        sum.and_then(learned.clone());
        sum.unasked = unasked;
    }
    report.details.insert("fdb_restored".into(), sum.restored.into());
    let unasked = (sum.unasked > 0).then(|| ("no time left".to_owned(), sum.unasked));
    for (reason, count) in sum.skipped.into_iter().chain(unasked) {
        report.warnings.push(format!("{count} learned addresses were not restored: {reason}"));
    }
}

/// So many rules are named where there are more of a kind.
const RULES_NAMED: usize = 20;

fn named(refused: &[RefusedRule]) -> String {
    let mut text: Vec<String> = refused.iter().take(RULES_NAMED).map(ToString::to_string).collect();
    if let Some(more) = refused.len().checked_sub(RULES_NAMED).filter(|more| *more > 0) {
        text.push(format!("and {more} more"));
    }
    text.join("\n")
}

/// Rules that a restore could not put back as they are, before anything was touched.
pub(super) fn cannot_be_put_back(refused: &[RefusedRule], bridges: &[Bridge]) -> Option<String> {
    let first: Vec<String> =
        refused.iter().take(RULES_NAMED).filter_map(|rule| deletion(rule, protocols(rule, bridges))).collect();
    let typed = first.iter().map(|command| format!("`{command}`")).collect::<Vec<_>>().join("\n");
    let told = || {
        let rules = named(refused);
        format!("OpenFlow rules that could not be put back as they are:\n{rules}\nremedy: delete each of them; {ANEW}:\n{typed}")
    };
    (!refused.is_empty()).then(told)
}

/// Why rules could not be read: where the installed version does not know one that runs, that one is named.
pub(crate) fn unread(
    openflow: &dyn OpenFlow,
    daemon: &Daemon,
    bridges: &[Bridge],
    error: HostError,
    until: Instant,
) -> HostError {
    let unreadable = openflow.unreadable(daemon, bridges, until).unwrap_or_default();
    let Some(first) = unreadable.first() else { return error };
    let others = if unreadable.len() > 1 { ", and others" } else { "" };
    let cause = format!(
        "the installed version cannot load {} `{}`, which the one that runs has: {}{others}",
        first.kind, first.rule, first.reason
    );
    HostError::new(format!("bridge {}", first.bridge), cause).remedy(
        "put the packages of the version that runs back, delete the rule with its ovs-ofctl, and install this version again",
    )
}

/// The versions that the rule's bridge speaks.
fn protocols<'a>(rule: &RefusedRule, bridges: &'a [Bridge]) -> &'a [String] {
    bridges.iter().find(|bridge| bridge.name == rule.bridge).map_or(&[], |bridge| &bridge.protocols)
}

/// What an operator can do about such a rule.
pub(crate) fn rule_remedy(rule: &RefusedRule, bridges: &[Bridge]) -> String {
    match deletion(rule, protocols(rule, bridges)) {
        Some(command) => format!("`{command}` deletes it; {ANEW}"),
        None => format!("delete it; {ANEW}"),
    }
}

/// A group that may come back as another, in words; without its bridge.
pub(crate) fn unsure_cause(rule: &RefusedRule) -> String {
    format!("{} `{}` may be put back as another: {}", rule.kind, rule.rule, rule.reason)
}

/// What makes sure of it.
pub(crate) fn add_anew(rule: &RefusedRule, bridges: &[Bridge]) -> String {
    let version = protocols(rule, bridges).iter().max().map_or("OpenFlow15", String::as_str);
    format!("else add it anew with `ovs-ofctl -O {version} mod-group {}`", rule.bridge)
}

/// The groups that may come back as others.
pub(super) fn unsure(rules: &[BridgeRules]) -> Vec<String> {
    let all = rules.iter().flat_map(|rules| &rules.unsure);
    all.map(|rule| format!("bridge {}: {}", rule.bridge, unsure_cause(rule))).collect()
}

/// The other half of the remedy.
const ANEW: &str =
    "where it is wanted, add it anew in a form that the bridge's highest OpenFlow version prints and takes \
                    alike";

/// Rules that a restore has not put back; all others are in place.
pub(crate) fn not_put_back(refused: &[RefusedRule]) -> Option<String> {
    let told = || format!("OpenFlow rules that were not put back; all others are in place:\n{}", named(refused));
    (!refused.is_empty()).then(told)
}

/// OpenFlow rules after, by meaning. Rules with a time-out may have gone, or been learned, rightly, unless they were
/// `refused`.
pub(crate) fn rules_after(report: &mut Report, before: &[BridgeRules], after: &[BridgeRules], refused: &[RefusedRule]) {
    for entry in &mut report.openflow {
        let Some(now) = after.iter().find(|now| now.bridge == entry.bridge) else { continue };
        entry.flows_after = now.flows.len() as u64;
        entry.groups_after = now.groups.len() as u64;
        entry.meters_after = now.meters.len() as u64;
    }
    // The new daemon has a rule that was none before, and that is told as another.
    let untold: Vec<&RefusedRule> = after.iter().flat_map(|now| &now.untold).collect();
    report.differences.extend(untold.iter().map(ToString::to_string));
    let is_told = |difference: &RuleDifference| {
        let same =
            |untold: &&&RefusedRule| (&*untold.bridge, &*untold.kind) == (&*difference.bridge, &*difference.kind);
        difference.missing
            && untold.iter().filter(same).any(|untold| is_same(&untold.kind, &untold.rule, &difference.rule))
    };
    for difference in compare_rules(before, after).into_iter().filter(|difference| !is_told(difference)) {
        let sign = if difference.missing { "missing" } else { "new" };
        let is_it =
            |refused: &&RefusedRule| (&*refused.bridge, &*refused.rule) == (&*difference.bridge, &*difference.rule);
        let refused = refused.iter().find(is_it).filter(|_| difference.missing);
        if difference.timed && refused.is_none() {
            continue;
        }
        let why = refused.map(|refused| format!(" (refused: {})", refused.reason)).unwrap_or_default();
        let RuleDifference { bridge, kind, rule, .. } = difference;
        report.differences.push(format!("bridge {bridge}: {sign} {kind}: {rule}{why}"));
    }
}

/// Are these two texts of one rule?
fn is_same(kind: &str, one: &str, other: &str) -> bool {
    match kind {
        "flow" => key(one) == key(other),
        _ => first_field(one) == first_field(other),
    }
}

fn milliseconds(duration: std::time::Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_that_cannot_be_put_back_is_told_with_a_command_in_the_version_of_its_bridge() {
        let rule = "reset_counts,priority=7,ip actions=strip_vlan";
        let (bridge, kind, reason) = ("br1".to_owned(), "flow".to_owned(), "OFPBAC_MATCH_INCONSISTENT".to_owned());
        let refused = RefusedRule { bridge: bridge.clone(), kind, rule: rule.to_owned(), reason };
        let bridges = [Bridge { name: bridge, protocols: vec!["OpenFlow13".to_owned()], ..Bridge::default() }];
        let command = "`ovs-ofctl -O OpenFlow13 --strict del-flows br1 'table=0,priority=7,ip'`";
        assert!(rule_remedy(&refused, &bridges).starts_with(command));
        let told = cannot_be_put_back(&[refused], &bridges).unwrap();
        for part in [rule, "OFPBAC_MATCH_INCONSISTENT", "bridge br1", command] {
            assert!(told.contains(part), "{part}: {told}");
        }
        assert_eq!(cannot_be_put_back(&[], &bridges), None);
    }

    #[test]
    fn a_rule_that_the_new_daemon_has_and_no_version_tells_is_a_difference_once() {
        let text = "cookie=0x5,priority=7,ip actions=mod_vlan_vid:5";
        let rules = |flows: &[&str], untold: &[&str]| BridgeRules {
            bridge: "br0".into(),
            flows: flows.iter().map(|flow| (*flow).to_owned()).collect(),
            untold: untold
                .iter()
                .map(|rule| RefusedRule {
                    bridge: "br0".into(),
                    kind: "flow".into(),
                    rule: (*rule).into(),
                    reason: "told as another".into(),
                })
                .collect(),
            ..BridgeRules::default()
        };
        let mut report = Report::new("r", crate::report::Strategy::Standby, 0);
        let after = rules(&[], &["priority=7,ip actions=mod_vlan_vid:5"]);
        rules_after(&mut report, &[rules(&[text, "priority=8 actions=drop"], &[])], &[after], &[]);
        let [untold, missing] = &report.differences[..] else { panic!("{:?}", report.differences) };
        assert!(untold.contains("told as another") && missing.contains("priority=8"), "{missing}");
    }
}

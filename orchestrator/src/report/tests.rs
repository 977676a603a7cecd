//! The keys, the file and the screen.

use std::os::unix::fs::PermissionsExt;

use super::*;

fn sample() -> Report {
    let mut report = Report::new("20261120-121700-42", Strategy::Standby, 1_795_177_020_000);
    report.level = Some(Level::Full);
    report.from.ovs = Some("3.1.0".into());
    report.to.ovs = Some("3.1.0".into());
    report.phase(Phase::Standby, 100, 20);
    report.phase(Phase::SwitchPrepare, 120, 10);
    report.phase(Phase::SwitchCommit, 131, 9);
    report.gap_ms = Some(45.25);
    report.parked.packets = 250;
    report.parked.replayed = 247;
    report.parked.unreplayable.insert("sampled".into(), 3);
    report.datapaths.push(DatapathReport { name: "ovs-system".into(), flows_before: 1520, ..Default::default() });
    report.openflow.push(OpenFlowReport {
        bridge: "br0".into(),
        flows_before: 4,
        flows_after: 4,
        ..Default::default()
    });
    report.finish(&Outcome { exit_code: ExitCode::Done, reason: "done".into() }, 1234);
    report
}

/// The paths of every key, arrays as `[]`.
fn keys(value: &serde_json::Value, prefix: &str, into: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                into.push(format!("{prefix}{key}"));
                keys(value, &format!("{prefix}{key}."), into);
            }
        }
        serde_json::Value::Array(values) => {
            if let Some(first) = values.first() {
                keys(first, prefix, into);
            }
        }
        _ => {}
    }
}

#[test]
fn every_key_of_the_design_is_there() {
    let design = "schema id result exit_code from.ovs to.ovs level strategy \
        phases phases.name phases.start_ms phases.duration_ms gap_ms \
        parked.packets parked.replayed parked.overflowed parked.unreplayable parked.longest_ms parked.p99_ms \
        datapaths.name datapaths.flows_before datapaths.flows_kept datapaths.flows_removed datapaths.lost_delta \
        datapaths.missed_delta refused.flow_flush refused.flow_del refused.flow_set refused.dp_del refused.vport_del \
        refused.meter_del refused.ct_timeout_del refused.upcall_bind conntrack.timeout_policies_before \
        conntrack.timeout_policies_guarded conntrack.zone_limits_before conntrack.zone_limits_restored \
        openflow.bridge openflow.flows_before openflow.flows_after openflow.groups_before openflow.groups_after \
        openflow.meters_before openflow.meters_after openflow.not_atomic differences";
    let value = serde_json::to_value(sample()).unwrap();
    let mut found = Vec::new();
    keys(&value, "", &mut found);
    for key in design.split_whitespace() {
        assert!(found.iter().any(|known| known == key), "{key} is missing of {found:?}");
    }
    assert_eq!(value["schema"], 1);
    assert_eq!(value["exit_code"], 0);
    assert_eq!(value["level"], "full");
    assert_eq!(value["parked"]["unreplayable"]["sampled"], 3);
}

#[test]
fn a_report_that_was_never_finished_does_not_look_well() {
    let report = Report::new("x", Strategy::StopStart, 0);
    assert_eq!(report.exit_code, ExitCode::NeedsPerson);
    assert_eq!(report.result, "needs-person");
}

#[test]
fn both_halves_of_switch_are_one_phase() {
    let report = sample();
    let switch = PhaseTime { name: "switch".into(), start_ms: 120, duration_ms: 20 };
    assert_eq!(report.phases[1..], [switch]);
}

#[test]
fn the_file_is_private_and_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    std::fs::write(&path, "old").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    sample().write(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(Report::parse(&std::fs::read(&path).unwrap()).unwrap(), sample());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
}

#[test]
fn a_report_that_cannot_be_written_says_where() {
    let error = sample().write(Path::new("/nonexistent/report.json")).unwrap_err();
    assert!(format!("{error:#}").contains("/nonexistent/report.json"), "{error:#}");
}

#[test]
fn the_summary_fits_a_screen_and_names_the_numbers() {
    let mut report = sample();
    report.differences = (0..40).map(|n| format!("difference {n}")).collect();
    report.warnings = (0..40).map(|n| format!("warning {n}")).collect();
    report.openflow = (0..40).map(|n| OpenFlowReport { bridge: format!("br{n}"), ..Default::default() }).collect();
    let text = summary(&report, false);
    assert!(text.lines().count() <= 40, "{text}");
    for part in ["45.2 ms", "250 packets", "247", "sampled 3", "1520 kernel flows", "br0", "difference 0", "(exit 0)"] {
        assert!(text.contains(part), "{part} missing in\n{text}");
    }
    assert!(!text.contains('\u{1b}'));
    assert!(summary(&report, true).contains('\u{1b}'));
}

#[test]
fn a_refusal_makes_check_end_with_10_and_says_what_to_do() {
    let finding = |severity| Finding {
        name: Name::HwOffload,
        severity,
        object: "Open_vSwitch other_config".into(),
        cause: "hw-offload is on".into(),
        remedy: "switch it off".into(),
    };
    let mut check = CheckReport { level: Level::Full, findings: vec![finding(Severity::Warning)] };
    assert_eq!(check.exit_code(), ExitCode::Done);
    check.findings.push(finding(Severity::Refused));
    check.findings.push(finding(Severity::Ok));
    assert_eq!(check.exit_code(), ExitCode::Refused);
    assert!(check.to_string().contains("remedy: switch it off"));
}

#[test]
fn a_run_that_was_refused_shows_why_and_no_zeros() {
    let mut report = Report::new("run-1", Strategy::Standby, 0);
    report.warnings.push("check: bridge br0 is of the userspace datapath".into());
    report.finish(&Outcome { exit_code: ExitCode::Refused, reason: "check failed; nothing was touched".into() }, 5);
    let text = summary(&report, false);
    assert!(text.contains("userspace") && text.contains("(exit 10)") && !text.contains("replayed"), "{text}");
    assert!(!text.contains("unknown"), "what was not found out is not worth a line: {text}");
    report.reason = format!("{}; nothing was touched", report.warnings[0]);
    assert_eq!(summary(&report, false).matches("userspace").count(), 1, "said once");
}

#[test]
fn a_refused_run_lists_what_check_lists_and_says_each_thing_once() {
    let mut found = Findings::default();
    found.ok(Name::Canary, "freeze", "it works");
    found.refuse(Name::NetdevBridge, "bridge br1", "it is of the userspace datapath", "none");
    found.warn(Name::Lacp, "port p1", "LACP negotiates anew", "");
    found.refuse(Name::Dpdk, "other_config:dpdk-init", "DPDK is on", "none");
    let check = CheckReport { level: Level::Full, findings: found.into_inner() };
    let mut report = Report::new("run-1", Strategy::Standby, 0);
    report.level = Some(check.level);
    report.findings = check.findings.clone();
    report.finish(&Outcome { exit_code: ExitCode::Refused, reason: "check failed; nothing was touched".into() }, 5);
    let text = summary(&report, false);
    assert!(text.ends_with(&check.to_string()), "{text}");
    for once in ["userspace datapath", "DPDK is on", "LACP negotiates", "(exit 10)"] {
        assert_eq!(text.matches(once).count(), 1, "{once} in\n{text}");
    }
    assert!(!text.contains("unknown") && report.reason == "netdev-bridge, dpdk; nothing was touched", "{text}");
}

#[test]
fn a_run_that_was_refused_before_it_looked_says_so_once() {
    let mut report = Report::new("run-1", Strategy::Standby, 0);
    report.finish(&Outcome { exit_code: ExitCode::Refused, reason: "no journal can be kept".into() }, 5);
    let text = summary(&report, false);
    assert_eq!(text.trim_end(), "run run-1: refused (exit 10): no journal can be kept");
}

#[test]
fn every_finding_is_explained_in_the_table_of_the_docs() {
    let docs = include_str!("../../../docs/operating.md");
    let table = docs.split("### Outside the promise").nth(1).and_then(|rest| rest.split("\n#").next()).unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| ") && line.contains('`'));
    let names: Vec<&str> = rows.filter_map(|row| row.split('`').nth(1)).collect();
    let mut explained = names.clone();
    explained.sort_unstable();
    explained.dedup();
    assert_eq!(explained.len(), names.len(), "one is explained twice: {names:?}");
    let mut all: Vec<&str> = Name::ALL.iter().map(|name| name.word()).collect();
    all.sort_unstable();
    assert_eq!(all, explained);
}

#[test]
fn what_was_found_is_not_found_twice() {
    let mut found = Findings::default();
    for _ in 0..2 {
        found.refuse(Name::Dpdk, "x", "y", "z");
        found.ok(Name::Dpdk, "x", "y");
    }
    assert_eq!(found.into_inner().len(), 2);
}

//! The closing summary: a report on one screen.

use std::collections::BTreeMap;
use std::fmt::Write;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use owo_colors::{OwoColorize, Style};

use super::{CheckReport, Level, OpenFlowReport, Report};
use crate::machine::ExitCode;

/// So many bridges, differences and warnings are shown; the rest is counted. Keeps the summary on one screen.
const SHOWN: usize = 6;

/// The report in words. `colour` puts ANSI colours on the result.
pub fn summary(report: &Report, colour: bool) -> String {
    let mut out = String::new();
    headline(&mut out, report, colour);
    if report.exit_code == ExitCode::Refused {
        refusal(&mut out, report);
        return out;
    }
    versions(&mut out, report);
    // A run that never came to Switch has no numbers, and zeros would look like some.
    if report.gap_ms.is_some() || report.parked.packets > 0 || report.exit_code == ExitCode::Done {
        numbers(&mut out, report);
        if report.exit_code != ExitCode::Undone {
            bridges(&mut out, &report.openflow);
        }
        list(&mut out, "differences", &report.differences);
    }
    list(&mut out, "warnings", &unsaid(report));
    out
}

/// The error that ended a run is a warning as well; where it is the reason it has been said.
fn unsaid(report: &Report) -> Vec<String> {
    let said = |warning: &&String| !report.reason.contains(warning.as_str());
    report.warnings.iter().filter(said).cloned().collect()
}

/// Writing to a `String` cannot fail.
fn line(out: &mut String, name: &str, text: &str) {
    let _ = writeln!(out, "  {name:<11} {text}");
}

fn headline(out: &mut String, report: &Report, colour: bool) {
    let style = match (colour, report.exit_code) {
        (false, _) => Style::new(),
        (true, ExitCode::Done) => Style::new().green().bold(),
        (true, ExitCode::Differences | ExitCode::Undone | ExitCode::Refused | ExitCode::Busy) => {
            Style::new().yellow().bold()
        }
        (true, ExitCode::Back | ExitCode::NeedsPerson) => Style::new().red().bold(),
    };
    let result = report.result.style(style);
    let _ = writeln!(out, "run {}: {result} (exit {}): {}", report.id, report.exit_code.code(), report.reason);
}

/// The list of `ovs-graceful check`; without one, what the reason does not say yet.
fn refusal(out: &mut String, report: &Report) {
    if !report.findings.is_empty() {
        let check = CheckReport { level: report.level.unwrap_or(Level::None), findings: report.findings.clone() };
        out.push_str(&check.to_string());
    }
    list(out, "warnings", &unsaid(report));
}

fn versions(out: &mut String, report: &Report) {
    let version = |known: &Option<String>| known.clone().unwrap_or_else(|| "unknown".to_string());
    if report.from.ovs.is_some() || report.to.ovs.is_some() {
        line(out, "versions", &format!("{} → {}", version(&report.from.ovs), version(&report.to.ovs)));
    }
    if let Some(level) = report.level {
        line(out, "level", &format!("{level}, strategy {}", report.strategy));
    }
}

fn numbers(out: &mut String, report: &Report) {
    let seconds = report.duration_ms as f64 / 1000.0;
    let gap = report.gap_ms.map_or_else(|| "none".to_string(), |gap| format!("{gap:.1} ms"));
    line(out, "gap", &format!("{gap} without a daemon bound to the upcalls; the run took {seconds:.1} s"));
    let parked = &report.parked;
    line(
        out,
        "parked",
        &format!(
            "{} packets, longest {:.1} ms, 99 of 100 below {:.1} ms",
            parked.packets, parked.longest_ms, parked.p99_ms
        ),
    );
    let lost: u64 = parked.unreplayable.values().sum();
    let replayed = format!("{}{}", parked.replayed, reasons(&parked.undone));
    line(out, "replayed", &format!("{replayed}, not replayed {lost}{}", reasons(&parked.unreplayable)));
    for datapath in &report.datapaths {
        let removed: u64 = datapath.flows_removed.values().sum();
        line(
            out,
            &format!("{:.11}", datapath.name),
            &format!(
                "{} kernel flows, kept {}, removed {removed}{}",
                datapath.flows_before,
                datapath.flows_kept,
                reasons(&datapath.flows_removed)
            ),
        );
    }
    let kernel: i64 = report.datapaths.iter().map(|datapath| datapath.lost_delta).sum();
    line(out, "lost", &format!("kernel {kernel}, park overflow {}", parked.overflowed));
}

fn reasons(counted: &BTreeMap<String, u64>) -> String {
    let named: Vec<String> =
        counted.iter().filter(|(_, count)| **count > 0).map(|(reason, count)| format!("{reason} {count}")).collect();
    if named.is_empty() {
        return String::new();
    }
    format!(" ({})", named.join(", "))
}

fn bridges(out: &mut String, openflow: &[OpenFlowReport]) {
    if openflow.is_empty() {
        return;
    }
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["  bridge", "OpenFlow flows", "groups", "meters", ""]);
    let before_after = |before: u64, after: u64| match before == after {
        true => before.to_string(),
        false => format!("{before} → {after}"),
    };
    for bridge in openflow.iter().take(SHOWN) {
        table.add_row([
            format!("  {}", bridge.bridge),
            before_after(bridge.flows_before, bridge.flows_after),
            before_after(bridge.groups_before, bridge.groups_after),
            before_after(bridge.meters_before, bridge.meters_after),
            if bridge.not_atomic { "not atomic".to_string() } else { String::new() },
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let _ = writeln!(out, "{}", table.trim_fmt());
    if openflow.len() > SHOWN {
        let _ = writeln!(out, "  … and {} more bridges", openflow.len() - SHOWN);
    }
}

fn list(out: &mut String, name: &str, entries: &[String]) {
    if entries.is_empty() {
        if name == "differences" {
            line(out, name, "none");
        }
        return;
    }
    line(out, name, &entries.len().to_string());
    for entry in entries.iter().take(SHOWN) {
        let _ = writeln!(out, "    {entry}");
    }
    if entries.len() > SHOWN {
        let _ = writeln!(out, "    … and {} more: see the report", entries.len() - SHOWN);
    }
}

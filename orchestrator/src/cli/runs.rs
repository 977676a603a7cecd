//! `runs`: past runs and their reports.

use std::io::{self, IsTerminal};

use comfy_table::presets::NOTHING;
use comfy_table::Table;

use super::output::{say, say_json};
use crate::journal::{PastRun, Runs};
use crate::machine::ExitCode;
use crate::report::{summary, Report};

/// Lists them, oldest first.
pub fn list(json: bool) -> anyhow::Result<ExitCode> {
    let runs = Runs::default().list()?;
    if json {
        let entries: Vec<_> =
            runs.iter().map(|run| serde_json::json!({ "id": run.id, "report": run.report })).collect();
        say_json(&entries);
    } else if runs.is_empty() {
        say("no runs yet");
    } else {
        say(&table(&runs));
    }
    Ok(ExitCode::Done)
}

/// The report of one.
pub fn show(id: &str, json: bool) -> anyhow::Result<ExitCode> {
    let runs = Runs::default();
    if !runs.ids()?.iter().any(|known| known == id) {
        anyhow::bail!("there is no run {id}; `ovs-graceful runs` lists them");
    }
    let report = runs
        .report(id)
        .map_err(|error| error.context(format!("run {id} has no report; if it was cut off: `ovs-graceful recover`")))?;
    match json {
        true => say_json(&report),
        false => say(summary(&report, io::stdout().is_terminal()).trim_end()),
    }
    Ok(ExitCode::Done)
}

fn table(runs: &[PastRun]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["ID", "RESULT", "EXIT", "VERSIONS", "GAP", "PARKED", "REASON"]);
    for run in runs {
        match &run.report {
            Some(report) => table.add_row(row(report)),
            None => table.add_row([&run.id, "under way, or cut off"]),
        };
    }
    table.trim_fmt()
}

fn row(report: &Report) -> [String; 7] {
    let version = |known: &Option<String>| known.clone().unwrap_or_else(|| "?".to_string());
    [
        report.id.clone(),
        report.result.clone(),
        report.exit_code.code().to_string(),
        format!("{} → {}", version(&report.from.ovs), version(&report.to.ovs)),
        report.gap_ms.map_or_else(|| "none".to_string(), |gap| format!("{gap:.1} ms")),
        report.parked.packets.to_string(),
        report.reason.clone(),
    ]
}

//! `docs/reference/compatibility.md`: on which kernels, Open vSwitch and systemd which scenarios have run, and when, from the
//! `result.json` of the runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use comfy_table::{presets::ASCII_MARKDOWN, Table};

use crate::command::capture;
use crate::outcome::{Action, Outcome};
use crate::places;

const PAGE: &str = "docs/reference/compatibility.md";
/// The table stands between these.
const BEGIN: &str = "<!-- lab compatibility: begin -->";
const END: &str = "<!-- lab compatibility: end -->";
const HEADER: [&str; 7] = ["Linux", "Open vSwitch", "systemd", "machine", "image", "all assertions held", "not held"];
/// Results lie in the folder of a run, which may lie in that of a campaign.
const DEPTH: usize = 3;

/// What ran where: the first five columns.
type Host = [String; 5];

/// Each scenario that ran there, with the day and whether it passed: the last run counts.
type Rows = BTreeMap<Host, BTreeMap<String, (String, bool)>>;

/// Takes the results below `folders` into the page.
pub fn take_in(folders: &[PathBuf]) -> Result<bool> {
    let page = places::workspace().join(PAGE);
    let text = fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("{} has no {BEGIN}", page.display()))?;
    let (table, after) = rest.split_once(END).with_context(|| format!("{} has no {END}", page.display()))?;
    let mut rows = read(table);
    for folder in folders {
        collect(folder, DEPTH, &mut rows)?;
    }
    fs::write(&page, format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", written(&rows)))?;
    Ok(true)
}

fn collect(folder: &Path, depth: usize, rows: &mut Rows) -> Result<()> {
    let result = folder.join("result.json");
    if result.is_file() {
        if let Ok(outcome) = serde_json::from_slice::<Outcome>(&fs::read(&result)?) {
            note(&outcome, &day(&result)?, rows);
        }
        return Ok(());
    }
    if depth == 0 {
        return Ok(());
    }
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders.iter().try_for_each(|folder| collect(folder, depth - 1, rows))
}

fn note(outcome: &Outcome, day: &str, rows: &mut Rows) {
    let ours = outcome.action.judged_as_ours() && outcome.action != Action::Nothing;
    // A run of which the lab knows nothing says nothing.
    if !ours || outcome.error.is_some() {
        return;
    }
    let version = |name: &str, word: usize| {
        let text = outcome.versions.get(name).map(String::as_str).unwrap_or_default();
        text.split_whitespace().nth(word).unwrap_or("?").to_owned()
    };
    let ovs = outcome.versions.get("ovs").and_then(|text| text.split_whitespace().last()).unwrap_or("?").to_owned();
    let host = [version("kernel", 0), ovs, version("systemd", 1), "x86-64".to_owned(), version("suite", 0)];
    let name = match outcome.action {
        Action::Ours => outcome.scenario.clone(),
        door => format!("{} {}", outcome.scenario, door.name()),
    };
    let known = rows.entry(host).or_default();
    let is_news = known.get(&name).is_none_or(|(last, _)| last.as_str() <= day);
    if is_news {
        known.insert(name, (day.to_owned(), outcome.passed));
    }
}

fn day(file: &Path) -> Result<String> {
    let text = capture(Command::new("date").args(["-u", "+%Y-%m-%d", "-r"]).arg(file))?;
    Ok(text.trim().to_owned())
}

fn written(rows: &Rows) -> String {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(HEADER);
    for (host, scenarios) in rows {
        let cell = |passed: bool| {
            let days: BTreeSet<&str> =
                scenarios.values().filter(|(_, held)| *held == passed).map(|(day, _)| day.as_str()).collect();
            let of = |day: &&str| {
                let here = scenarios.iter().filter(|(_, (last, held))| last == day && *held == passed);
                format!("{day}: {}", here.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", "))
            };
            days.iter().rev().map(of).collect::<Vec<_>>().join("; ")
        };
        table.add_row(host.iter().cloned().chain([cell(true), cell(false)]));
    }
    table.to_string()
}

/// The rows of a table that [`written`] has made.
fn read(table: &str) -> Rows {
    let mut rows = Rows::new();
    for line in table.lines().filter(|line| line.starts_with('|')) {
        let cells: Vec<String> = line.trim().trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
        let [linux, ovs, systemd, machine, image, held, not_held] = cells.as_slice() else { continue };
        if linux == HEADER[0] || linux.starts_with('-') {
            continue;
        }
        let host = [linux, ovs, systemd, machine, image].map(Clone::clone);
        let scenarios = rows.entry(host).or_default();
        for (cell, passed) in [(held, true), (not_held, false)] {
            for (day, names) in cell.split("; ").filter_map(|part| part.split_once(": ")) {
                scenarios.extend(names.split(", ").map(|name| (name.to_owned(), (day.to_owned(), passed))));
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(scenario: &str, passed: bool) -> Outcome {
        let versions = [
            ("kernel", "6.1.0-50-cloud-amd64 #1 SMP"),
            ("ovs", "ovs-vswitchd (Open vSwitch) 3.1.0"),
            ("systemd", "systemd 252 (252.39-1)"),
            ("suite", "bookworm"),
        ];
        Outcome {
            passed,
            versions: versions.map(|(name, text)| (name.to_owned(), text.to_owned())).into(),
            ..Outcome::new(scenario, Action::Ours)
        }
    }

    #[test]
    fn the_last_run_of_a_scenario_counts_and_a_written_table_is_read_again() {
        let mut rows = Rows::new();
        note(&outcome("plain", false), "2026-11-29", &mut rows);
        note(&outcome("nat", true), "2026-11-29", &mut rows);
        note(&outcome("killed", false), "2026-11-30", &mut rows);
        note(&outcome("plain", true), "2026-11-30", &mut rows);
        note(&outcome("plain", false), "2026-11-28", &mut rows);
        note(&Outcome { action: Action::Nothing, ..outcome("group", true) }, "2026-11-30", &mut rows);
        let table = written(&rows);
        assert!(table.contains("2026-11-30: plain; 2026-11-29: nat"), "{table}");
        assert!(table.contains("| 2026-11-30: killed"), "{table}");
        assert!(!table.contains("group"));
        assert_eq!(read(&table), rows);
    }
}

//! The page and the table say the same.

use std::collections::BTreeSet;

use super::*;

const PAGE: &str = include_str!("../../../docs/reference/state.md");

/// The tables of the page: what a row is about, and what it says that a run does.
fn page() -> Vec<(&'static str, &'static str)> {
    let tables = PAGE.split("\n## ").filter(|part| part.contains("| state |"));
    let lines = tables.flat_map(|part| part.lines().filter(|line| line.starts_with("| ")));
    let cells = lines.map(|line| line.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>());
    let rows = cells.filter(|cells| cells[0] != "state");
    rows.map(|cells| {
        assert_eq!(cells.len(), 5, "{cells:?}");
        (cells[0], cells[3])
    })
    .collect()
}

/// What stands between `mark`s.
fn between<'a>(text: &'a str, mark: &str) -> Vec<&'a str> {
    text.split(mark).skip(1).step_by(2).collect()
}

#[test]
fn each_row_of_the_page_has_its_entry_with_the_same_fate() {
    let page: Vec<(&str, &str)> = page()
        .into_iter()
        .map(|(state, said)| (state, said.strip_prefix("**").and_then(|rest| rest.split("**").next()).unwrap_or("")))
        .collect();
    let table: Vec<(&str, &str)> = ROWS.iter().map(|row| (row.state, row.fate.word())).collect();
    for (one, other) in page.iter().zip(&table) {
        assert_eq!(one, other);
    }
    assert_eq!(page.len(), table.len());
    let words: BTreeSet<&str> = ROWS.iter().map(|row| row.fate.word()).collect();
    for word in words {
        assert!(PAGE.contains(&format!("\n| **{word}** | ")), "{word} is not explained");
    }
}

#[test]
fn a_row_names_the_findings_that_the_page_names() {
    for (row, (_, said)) in ROWS.iter().zip(page()) {
        let said: BTreeSet<&str> = between(said, "`").into_iter().collect();
        let known = |word: &&&str| Name::ALL.iter().any(|name| name.word() == **word);
        let said: BTreeSet<&str> = said.iter().filter(known).copied().collect();
        let ours: BTreeSet<&str> = row.findings.iter().map(|name| name.word()).collect();
        assert_eq!(said, ours, "{}", row.state);
        if matches!(row.fate, Fate::Refused | Fate::Warned) {
            assert!(!ours.is_empty(), "{}: which finding?", row.state);
        }
    }
}

#[test]
fn what_is_lost_has_its_cost() {
    for row in ROWS {
        if let Fate::Lost { cost, .. } = row.fate {
            assert!(cost.len() > 10, "{}", row.state);
            assert!(row.findings.is_empty(), "{}: what has a finding is warned of", row.state);
            assert!(losses().contains(&format!("lost     {}: {cost}\n", row.state)));
        }
    }
}

#[test]
fn what_is_kept_is_kept_by_one_row_and_its_word_is_its_own() {
    let rows: Vec<Kept> =
        ROWS.iter().filter_map(|row| if let Fate::Kept(kept) = row.fate { Some(kept) } else { None }).collect();
    let each: BTreeSet<Kept> = rows.iter().copied().collect();
    assert_eq!(each.len(), rows.len(), "two rows are kept by one");
    assert_eq!(each, Kept::ALL.iter().copied().collect());
    let words: BTreeSet<&str> = Kept::ALL.iter().map(|kept| kept.word()).collect();
    assert_eq!(words.len(), Kept::ALL.len());
}

#[test]
fn what_is_kept_is_compared_behind_its_phase_and_shown_by_a_scenario_or_is_not_tried() {
    let scenarios = scenarios();
    for (row, (_, said)) in ROWS.iter().zip(page()) {
        let Fate::Kept(kept) = row.fate else { continue };
        let (phase, compared_in) = (kept.phase(), kept.comparison().phase());
        assert!(phase <= compared_in, "{}: compared in {compared_in:?}, kept in {phase:?}", row.state);
        assert!(compared(compared_in).contains(&kept.comparison()));
        assert_eq!(kept.scenarios().is_empty(), said.contains("read, not tried"), "{}", row.state);
        for name in kept.scenarios() {
            assert!(scenarios.contains(*name), "{}: there is no scenario {name}", row.state);
        }
    }
}

/// Names that the lab's sources give to scenarios.
fn scenarios() -> BTreeSet<String> {
    let mut folders = vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/src/scenarios"))];
    let mut names = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let text = std::fs::read(path).unwrap();
                    let text = String::from_utf8_lossy(&text);
                    let lines = text.lines().map(str::trim);
                    // `fn name` returns it in a line of its own, as one of two; or it is a field.
                    let words = lines.filter_map(|line| {
                        let before = ["name: ", "true => ", "false => "];
                        let word = before.iter().find_map(|word| line.strip_prefix(word)).unwrap_or(line);
                        word.strip_prefix('"')?.trim_end_matches(',').strip_suffix('"')
                    });
                    names.extend(words.map(str::to_owned));
                }
            }
        }
    }
    names
}

#[test]
fn verify_compares_all_that_the_table_wants_compared_there() {
    use Comparison::{Bridges, ByHand, Conntrack, Devices, Features, Kernel, Rules};
    assert_eq!(
        compared(Phase::Verify),
        [Conntrack, Kernel, Rules, Bridges, Features, ByHand, Devices],
        "in this order: limits that were lost are set again before the kernel's state is compared"
    );
    assert_eq!(compared(Phase::Gates), [Comparison::Flows]);
}

//! For each kind of state that a run keeps (`rows.rs`): where its keeping is switched off, somebody notices. The product
//! with the feature `chaos` forgets the kind that OVS_GRACEFUL_FORGET names; then the run ends with a difference, or what is
//! looked at is another thing than before. With words: those kinds alone.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use super::chaos::PROGRAM;
use super::pairs::restart;
use super::rows::{self, Row, ROWS};
use super::{aftermath, is_chosen, Custom, Program};
use crate::guest::say;
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct KeptOrTold;

/// Says which kind is forgotten (orchestrator/src/inventory/forgotten.rs).
const VARIABLE: &str = "OVS_GRACEFUL_FORGET";

/// What a starting daemon leaves alone as often as not: which of several devices it changes is a matter of the order in which
/// it finds them (`update_mtu_ofproto`).
const BY_CHANCE: [&str; 1] = ["mtu"];

fn chosen(arguments: &[String]) -> impl Iterator<Item = &'static Row> + '_ {
    ROWS.iter().filter(|row| is_chosen(row.kept, arguments, true, &[]))
}

impl Custom for KeptOrTold {
    fn name(&self) -> &'static str {
        "kept_or_told"
    }

    fn about(&self) -> &'static str {
        "each kind of state that is kept, with its keeping switched off: somebody notices"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn programs(&self) -> &'static [Program] {
        &[Program { package: "orchestrator", example: PROGRAM, features: "orchestrator/chaos" }]
    }

    fn runs(&self, arguments: &[String]) -> Result<u32> {
        Ok(chosen(arguments).count() as u32)
    }

    fn run(&self, job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        rows::set_up()?;
        fs::copy(format!("/usr/bin/{PROGRAM}"), "/usr/bin/ovs-graceful")?;
        for row in chosen(&job.extra_args) {
            say(&format!("kept_or_told: {}", row.kept));
            one(row, out, outcome).with_context(|| format!("kept_or_told: {}", row.kept))?;
        }
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

fn one(row: &Row, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let case = row.kept;
    let before = row.set_and_see()?;
    let (exit, report) = restart(&format!("{VARIABLE}={case}"), out, case);
    let after = row.look();
    let differences = &report["differences"];
    let is_told = exit == "exit=30" && differences.as_array().is_some_and(|all| !all.is_empty());
    outcome.note(format!("{case}: the report tells it"), is_told);
    let noticed = is_told || before != after;
    let value = json!([exit, report["reason"], differences, before, after]);
    match BY_CHANCE.contains(&case) {
        true => outcome.note(format!("{case}: that it is not kept is noticed"), json!([noticed, value])),
        false => outcome.check(format!("{case}: that it is not kept is noticed"), noticed, value),
    }
    // Else another thing was noticed than what was switched off.
    let ended = ["exit=0", "exit=30"].contains(&exit.as_str());
    outcome.check(format!("{case}: the run goes through"), ended, json!([exit, report["reason"]]));
    let warned = report["warnings"].to_string().contains(&format!("forgets {case}"));
    outcome.check(format!("{case}: it was switched off"), warned, &report["warnings"]);
    aftermath::nothing_left(case, outcome);
    row.tidy()
}

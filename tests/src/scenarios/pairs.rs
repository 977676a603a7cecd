//! Any two kinds of state that a run keeps (`rows.rs`), chosen by a seed and set in one network under traffic: one restart,
//! which ends with 0, and both are as before. `lab run pairs -- seed=7` takes another pair than that of every run of the
//! tests, `seeds=5` the first five, and `NAME NAME` these two; `pairs_whole` takes twenty.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{json, Value};

use super::rows::{self, Row, ROWS};
use super::{aftermath, plain, Custom};
use crate::command::shell_lenient;
use crate::guest::say;
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Pairs {
    seeds: u64,
}

/// For every `tests/all`.
pub const SAMPLE: Pairs = Pairs { seeds: 1 };
/// Most kinds are among these.
pub const WHOLE: Pairs = Pairs { seeds: 20 };

/// Two rows, never the same.
fn pair(seed: u64) -> [&'static Row; 2] {
    let mut hasher = DefaultHasher::new();
    seed.hash(&mut hasher);
    let (dice, all) = (hasher.finish(), ROWS.len() as u64);
    let first = dice % all;
    let second = (first + 1 + dice / all % (all - 1)) % all;
    [first, second].map(|at| &ROWS[at as usize])
}

/// What the arguments ask for, by name.
fn chosen(arguments: &[String], seeds: u64) -> Result<Vec<(String, [&'static Row; 2])>> {
    let number = |key: &str| arguments.iter().find_map(|word| word.strip_prefix(key)).map(str::parse::<u64>);
    let seeded = |seed: u64| (format!("seed {seed}"), pair(seed));
    if let Some(seed) = number("seed=") {
        return Ok(vec![seeded(seed?)]);
    }
    if let [one, other] = arguments {
        return Ok(vec![("named".to_owned(), [rows::find(one)?, rows::find(other)?])]);
    }
    Ok((1..=number("seeds=").transpose()?.unwrap_or(seeds)).map(seeded).collect())
}

impl Pairs {
    fn is_whole(&self) -> bool {
        self.seeds > SAMPLE.seeds
    }
}

impl Custom for Pairs {
    fn name(&self) -> &'static str {
        if self.is_whole() {
            "pairs_whole"
        } else {
            "pairs"
        }
    }

    fn about(&self) -> &'static str {
        match self.is_whole() {
            true => "twenty of pairs, by seed",
            false => "any two kinds of state at once, by seed, through one restart under traffic",
        }
    }

    fn by_hand(&self) -> bool {
        self.is_whole()
    }

    fn runs(&self, arguments: &[String]) -> Result<u32> {
        Ok(chosen(arguments, self.seeds)?.len() as u32)
    }

    fn run(&self, job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        let pairs = chosen(&job.extra_args, self.seeds)?;
        rows::set_up()?;
        for (name, pair) in pairs {
            let case = format!("{name}: {} and {}", pair[0].kept, pair[1].kept);
            say(&format!("pairs: {case}"));
            one(&case, pair, out, outcome).with_context(|| format!("pairs: {case}"))?;
        }
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

fn one(case: &str, pair: [&'static Row; 2], out: &Path, outcome: &mut Outcome) -> Result<()> {
    // What is not seen to be set is an error: nothing would be shown.
    pair.iter().try_for_each(|row| row.set_and_see().map(drop))?;
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(2));
    let before = pair.map(Row::look);
    let (exit, report) = restart("", out, case);
    let told = json!([exit, report["reason"], report["differences"], report["warnings"]]);
    outcome.check(format!("{case}: exit 0"), exit == "exit=0" && report["exit_code"] == 0, told);
    let none = report["differences"].as_array().is_some_and(Vec::is_empty);
    outcome.check(format!("{case}: no difference"), none, &report["differences"]);
    for (row, was) in pair.iter().zip(before) {
        let now = row.look();
        outcome.check(format!("{case}: {} as before", row.kept), now == was, json!([was, now]));
    }
    std::thread::sleep(Duration::from_secs(2));
    aftermath::finish(case, live, false, outcome)?;
    aftermath::nothing_left(case, outcome);
    pair.iter().try_for_each(|row| row.tidy())
}

/// One run with `environment`: how it ended, and its report.
pub(super) fn restart(environment: &str, out: &Path, case: &str) -> (String, Value) {
    let file = out.join(case.replace([':', ' '], "-"));
    let file = file.display();
    shell_lenient(&format!("rm -f {file}.json"));
    let exit = shell_lenient(&format!(
        "{environment} timeout 150 ovs-graceful restart --report {file}.json > {file}.log 2>&1; echo exit=$?"
    ));
    let told = serde_json::from_str(&shell_lenient(&format!("cat {file}.json"))).unwrap_or(Value::Null);
    (exit.trim().to_owned(), told)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_is_always_the_same_two_and_the_list_has_most_kinds() {
        let names = |seed: u64| pair(seed).map(|row| row.kept);
        let mut all = BTreeSet::new();
        for seed in 1..=1000 {
            let [one, other] = names(seed);
            assert_ne!(one, other);
            all.extend([one, other]);
        }
        assert_eq!(all.len(), ROWS.len());
        let listed: BTreeSet<&str> = (1..=WHOLE.seeds).flat_map(names).collect();
        assert!(listed.len() * 4 > ROWS.len() * 3, "{listed:?}");
    }

    #[test]
    fn arguments_are_a_seed_a_number_of_them_or_two_names() {
        let names = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            chosen(&words, WHOLE.seeds).map(|all| all.into_iter().map(|(name, _)| name).collect::<Vec<_>>())
        };
        assert_eq!(names(&["seed=7"]).unwrap(), ["seed 7"]);
        assert_eq!(names(&["seeds=2"]).unwrap(), ["seed 1", "seed 2"]);
        assert_eq!(names(&["meters", "mtu"]).unwrap(), ["named"]);
        assert_eq!(names(&[]).unwrap().len() as u64, WHOLE.seeds);
        assert!(names(&["meters", "nothing"]).is_err() && names(&["seed=x"]).is_err());
    }
}

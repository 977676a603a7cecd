//! Faults are thrown into real runs under traffic: at every step, before and after its effect, something fails, hangs, is
//! killed or stopped. `lab run chaos` takes a sample (`-- seed=N` names another), `lab run chaos -- CASE…` these, and
//! `lab run chaos -- part=K/N` the K-th of N parts of the whole list. `lab run chaos -- soak=100` restarts so often in a
//! row, in two of three runs somebody is killed. Each run leaves a line in `table.md`.

use std::fmt::Write;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{ensure, Context, Result};
use serde_json::Value;

use super::{aftermath, network, plain, Custom, Program};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Chaos;

/// The product with the feature `chaos`.
pub const PROGRAM: &str = "ovs_graceful_chaos";
/// Cases of a sample.
const SAMPLE: usize = 5;
/// The steps of a run, in their order.
pub const STEPS: [&str; 11] = [
    "check",
    "snapshot",
    "arm",
    "standby",
    "switch-prepare",
    "switch-commit",
    "restore",
    "handover",
    "gates",
    "settle",
    "verify",
];
/// What can be thrown (orchestrator/src/chaos.rs).
const FAULTS: [&str; 10] = [
    "fail",
    "hang",
    "kill-supervisor",
    "kill-old",
    "kill-new",
    "kill-ovsdb",
    "stop-supervisor",
    "stop-old",
    "stop-new",
    "stop-ovsdb",
];

/// A fault and where it strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Case {
    step: usize,
    after: bool,
    fault: &'static str,
}

impl Case {
    fn parse(text: &str) -> Option<Case> {
        all().into_iter().find(|case| case.name() == text)
    }

    fn name(self) -> String {
        format!("{}:{}:{}", STEPS[self.step], if self.after { "after" } else { "before" }, self.fault)
    }

    /// Is there somebody to be hit?
    fn makes_sense(self) -> bool {
        let place = (self.step, self.after);
        match self.fault {
            // Before its rules are known nobody but its service manager can help it, and he has none.
            "kill-old" => place >= (at("arm"), false) && place <= (at("switch-commit"), false),
            "stop-old" => place <= (at("switch-commit"), false),
            "kill-new" | "stop-new" => place >= (at("standby"), true),
            _ => true,
        }
    }

    /// The daemon that is bound dies, with what it has in hand and until another one is. With an ovsdb-server that fails
    /// systemd restarts ovs-vswitchd as well, with or without us (`Requires=`).
    fn may_lose(self) -> bool {
        match self.fault {
            "kill-old" | "kill-ovsdb" => true,
            "kill-new" => self.step >= at("handover"),
            _ => false,
        }
    }

    /// Does the run give a daemon that dies its rules back? Before it knows them and after its end only the service
    /// manager starts another one, which then has none, with or without us.
    fn keeps_rules(self) -> bool {
        let dies = matches!(self.fault, "kill-ovsdb" | "kill-new");
        let place = (self.step, self.after);
        !dies || (place >= (at("snapshot"), true) && place < (at("verify"), true))
    }

    /// What the report may say. Where systemd replaced the old daemon before its rules were known a person is asked for:
    /// nobody can say what they were.
    fn ends(self) -> &'static [u64] {
        match (self.step, self.after) < (at("snapshot"), true) {
            true if !self.keeps_rules() => &[10, 20, 40],
            _ => &[0, 10, 20, 21, 30],
        }
    }
}

/// One run.
struct Round {
    name: String,
    /// What happens to it.
    case: Option<Case>,
}

/// The place of a step in [`STEPS`].
fn at(step: &str) -> usize {
    STEPS.iter().position(|name| *name == step).unwrap_or(0)
}

fn all() -> Vec<Case> {
    let places = (0..STEPS.len()).flat_map(|step| [false, true].map(|after| (step, after)));
    let cases = places.flat_map(|(step, after)| FAULTS.map(|fault| Case { step, after, fault }));
    cases.filter(|case| case.makes_sense()).collect()
}

fn sample(seed: u64) -> Vec<Case> {
    let mut cases = all();
    cases.sort_by_key(|case| {
        let mut hasher = DefaultHasher::new();
        (seed, case.name()).hash(&mut hasher);
        hasher.finish()
    });
    cases.truncate(SAMPLE);
    cases
}

/// So many runs in a row, random kills in two of three.
fn soak(seed: u64, runs: u64) -> Vec<Round> {
    let kills: Vec<Case> = all().into_iter().filter(|case| case.fault.starts_with("kill")).collect();
    let round = |n: u64| {
        let mut hasher = DefaultHasher::new();
        (seed, n).hash(&mut hasher);
        let dice = hasher.finish() as usize;
        let case = (!dice.is_multiple_of(3)).then(|| kills[dice / 3 % kills.len()]);
        let what = case.map_or_else(|| "undisturbed".to_owned(), Case::name);
        Round { name: format!("{n:03} {what}"), case }
    };
    (1..=runs).map(round).collect()
}

/// What the arguments ask for.
fn chosen(arguments: &[String]) -> Result<Vec<Round>> {
    if let Some(runs) = value(arguments, "soak=") {
        return Ok(soak(value(arguments, "seed=").map_or(Ok(1), str::parse)?, runs.parse()?));
    }
    let cases = cases(arguments)?;
    Ok(cases.into_iter().map(|case| Round { name: case.name(), case: Some(case) }).collect())
}

/// What stands behind `key`.
fn value<'a>(arguments: &'a [String], key: &str) -> Option<&'a str> {
    arguments.iter().find_map(|argument| argument.strip_prefix(key))
}

fn cases(arguments: &[String]) -> Result<Vec<Case>> {
    if let Some((part, parts)) = value(arguments, "part=").and_then(|part| part.split_once('/')) {
        let (part, parts): (usize, usize) = (part.parse()?, parts.parse()?);
        ensure!((1..=parts).contains(&part), "part=K/N: K from 1 to N");
        return Ok(all().into_iter().skip(part - 1).step_by(parts).collect());
    }
    let named: Vec<&String> = arguments.iter().filter(|argument| argument.contains(':')).collect();
    if !named.is_empty() {
        return named.iter().map(|name| Case::parse(name).with_context(|| format!("no case {name}"))).collect();
    }
    let days = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs() / 86_400;
    Ok(sample(value(arguments, "seed=").map_or(Ok(days), str::parse)?))
}

impl Custom for Chaos {
    fn name(&self) -> &'static str {
        "chaos"
    }

    fn about(&self) -> &'static str {
        "something fails, hangs, is killed or stopped at a step of the run (a sample)"
    }

    fn programs(&self) -> &'static [Program] {
        &[Program { package: "orchestrator", example: PROGRAM, features: "orchestrator/chaos" }]
    }

    fn runs(&self, arguments: &[String]) -> Result<u32> {
        Ok(chosen(arguments)?.len() as u32)
    }

    fn run(&self, job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        fs::copy(format!("/usr/bin/{PROGRAM}"), "/usr/bin/ovs-graceful")?;
        let mut table = String::new();
        for round in chosen(&job.extra_args)? {
            say(&format!("chaos: {}", round.name));
            let row = one(&round, out, outcome).with_context(|| format!("chaos: {}", round.name))?;
            writeln!(table, "{row}")?;
            fs::write(out.join("table.md"), &table)?;
        }
        aftermath::no_unit_failed(outcome);
        // `run.keep` of the configuration.
        let kept = run::known().len();
        outcome.check("old runs are not kept for ever", kept <= 20, kept);
        Ok(())
    }
}

fn one(Round { name, case }: &Round, out: &Path, outcome: &mut Outcome) -> Result<String> {
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(2));
    let rules = facts::promised(&plain::bridges());
    let known = run::known();
    let log = out.join(format!("run-{}", name.replace([':', ' '], "-")));
    let fault = case.map(Case::name).unwrap_or_default();
    let environment = [("OVS_GRACEFUL_CHAOS", fault.as_str())];
    let mut client = run::start_with(&[], if case.is_some() { &environment } else { &[] }, &log)?;
    client.wait()?;
    let id = run::known().into_iter().find(|id| !known.contains(id)).context("there was no run")?;
    let report: Value = serde_json::from_str(&fs::read_to_string(run::wait_for_recovery(&id)?)?)?;
    run::wait_until_unit_gone(Duration::from_secs(60))?;
    run::wait_until_no_job(Duration::from_secs(60))?;
    std::thread::sleep(Duration::from_secs(2));
    let exit = report["exit_code"].as_u64().unwrap_or(u64::MAX);
    let check = |what: &str| format!("{name}: {what}");
    let ends: &[u64] = match case {
        Some(case) => {
            let struck = report["warnings"].to_string().contains("chaos:") || case.fault.ends_with("supervisor");
            outcome.check(check("the fault has struck"), struck, &report["warnings"]);
            case.ends()
        }
        None => &[0],
    };
    outcome.check(check("ended by itself"), ends.contains(&exit), &report);
    let found = facts::daemons("ovs-vswitchd");
    outcome.check(check("one ovs-vswitchd"), found.len() == 1, &found);
    aftermath::nothing_left(name, outcome);
    aftermath::owned(name, outcome);
    if case.is_none_or(Case::keeps_rules) {
        aftermath::as_before(name, &rules, outcome);
    }
    aftermath::new_traffic_passes(name, outcome);
    let [e, n] = aftermath::finish(name, live, case.is_some_and(Case::may_lose), outcome)?;
    let gap = report["gap_ms"].as_f64().map_or_else(|| "-".to_owned(), |gap| format!("{gap:.0}"));
    let reason = report["reason"].as_str().unwrap_or_default();
    Ok(format!("| {name} | {exit} | {e} / {n} | {gap} | {reason} |"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_has_its_cases_and_together_they_are_all() {
        let part = |part: usize| chosen(&[format!("part={part}/7")]).unwrap();
        let together: usize = (1..=7).map(|k| part(k).len()).sum();
        assert_eq!(together, all().len());
        assert!(all().len() > 100);
        assert!(chosen(&["part=8/7".into()]).is_err());
    }

    #[test]
    fn a_case_is_found_by_its_name_and_a_sample_by_its_seed() {
        let named = chosen(&["restore:after:kill-new".into()]).unwrap();
        assert_eq!(named.iter().map(|round| round.name.as_str()).collect::<Vec<_>>(), ["restore:after:kill-new"]);
        assert!(chosen(&["check:before:kill-new".into()]).is_err());
        let seeded = chosen(&["seed=3".into()]).unwrap();
        assert_eq!(seeded.iter().filter_map(|round| round.case).collect::<Vec<_>>(), sample(3));
        assert_ne!(sample(3), sample(4));
        assert_eq!(sample(3).len(), SAMPLE);
    }

    #[test]
    fn a_soak_is_the_same_again_from_its_seed_and_kills_in_most_runs() {
        let names = |seed: &str| {
            let rounds = chosen(&["soak=100".into(), seed.into()]).unwrap();
            rounds.into_iter().map(|round| round.name).collect::<Vec<_>>()
        };
        assert_eq!(names("seed=1"), names("seed=1"));
        assert_ne!(names("seed=1"), names("seed=2"));
        let undisturbed = names("seed=1").iter().filter(|name| name.ends_with("undisturbed")).count();
        assert!((20..50).contains(&undisturbed), "{undisturbed}");
    }
}

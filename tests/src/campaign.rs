//! Many runs: everything once, the two sides by side, the long lists with their medians.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::fmt::Write;
use std::fs;
use std::num::NonZero;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{bail, Context, Result};
use comfy_table::{presets::ASCII_MARKDOWN, Table};

use crate::bench::{self, Request};
use crate::command::capture;
use crate::image;
use crate::outcome::{Action, Direction, Load, Outcome, ProbeOutcome, UdpOutcome};
use crate::places::{self, VmLock};
use crate::scenarios::{self, Scenario};

/// Longest delay of a new flow's packet, as a share of stock's longest gap, at most.
const NEW_FLOW_SHARE: f64 = 0.4;
/// The constant flow's worst latency, as a multiple of stock's, at most.
const CONSTANT_SHARE: f64 = 1.25;
/// VMs beside each other where everything runs once, which is about what is lost, not about times. A VM has two CPUs
/// and is busy with one of them half of its time.
const MOST_LANES: usize = 4;
/// Runs of each side in the long list.
const LONG_RUNS: usize = 5;

fn request(scenario: &str, action: Action, suite: &str, out: Option<String>) -> Request {
    let out = out.map(|name| places::workspace().join("target/lab/out").join(name));
    Request {
        scenario: scenario.to_owned(),
        action,
        suite: suite.to_owned(),
        out,
        extra_args: Vec::new(),
        load: Load::full(1),
    }
}

/// What runs in a row in one VM came to, each with its folder.
type Ended = Result<Vec<(Outcome, PathBuf)>>;

/// Says how each run went in cargo test's manner. A lab error counts as failed, and says so.
fn tell(request: &Request, ended: Ended) -> Option<Vec<Outcome>> {
    let mut name = format!("lab::{}::{}", request.scenario, request.action.name());
    if request.suite != "bookworm" {
        name = format!("{name}::{}", request.suite);
    }
    match ended {
        Ok(results) => {
            for (outcome, folder) in &results {
                println!("test {name} ... {}", if outcome.passed { "ok" } else { "FAILED" });
                if !outcome.passed {
                    bench::print(outcome, folder);
                }
            }
            Some(results.into_iter().map(|(outcome, _)| outcome).collect())
        }
        Err(error) => {
            println!("test {name} ... FAILED\n  lab error, neither pass nor loss: {error:#}");
            None
        }
    }
}

fn closing(passed: usize, failed: usize, started: Instant) -> bool {
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out; finished in {:.2}s",
        started.elapsed().as_secs_f64()
    );
    failed == 0
}

/// Every scenario once with ours, in so many VMs at a time; `only` narrows it down, with a suite of its own where a name is
/// `NAME:SUITE`.
pub fn all(only: &[String], suite: &str, lanes: Option<usize>) -> Result<bool> {
    let started = Instant::now();
    let lock = places::vm_lock()?;
    let lanes = lanes.unwrap_or_else(lanes_of_this_machine);
    let chosen = chosen(only, suite)?;
    println!("\nrunning {} tests", chosen.len());
    let (alone, beside): (Vec<_>, Vec<_>) = chosen.iter().copied().partition(|(scenario, _)| scenario.alone());
    let mut passed = 0;
    for (scenarios, lanes) in [(beside, lanes), (alone, 1)] {
        let requests = longest_first(scenarios)?.into_iter().map(|(scenario, suite)| once(scenario, suite)).collect();
        passed += told_in_lanes(requests, lanes, &lock);
    }
    Ok(closing(passed, chosen.len() - passed, started))
}

/// Each with its suite.
fn chosen<'a>(only: &'a [String], suite: &'a str) -> Result<Vec<(Scenario, &'a str)>> {
    if only.is_empty() {
        let all = scenarios::ALL.iter().copied().filter(|scenario| !scenario.by_hand());
        return Ok(all.map(|scenario| (scenario, suite)).collect());
    }
    let one = |words: &'a String| {
        let (name, suite) = words.split_once(':').unwrap_or((words, suite));
        Ok((scenarios::find(name)?, suite))
    };
    only.iter().map(one).collect()
}

/// A VM for each core.
fn lanes_of_this_machine() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get).min(MOST_LANES)
}

/// Makes these runs, so many at a time, tells how each ended, and returns how many passed.
fn told_in_lanes(requests: Vec<Request>, lanes: usize, lock: &VmLock) -> usize {
    let mut passed = 0;
    in_lanes(requests, lanes, lock, |request, ended| {
        passed += usize::from(tell(request, ended).is_some_and(|o| o.iter().all(|o| o.passed)));
    });
    passed
}

/// Scenarios of the matrix that make their own runs, where they run besides Debian 12.
const ELSEWHERE: [(&str, &str); 42] = [
    ("bad_upgrade", "trixie"),
    ("back", "bookworm+backports"),
    ("back", "bookworm+untold"),
    ("back", "testing"),
    ("ct_policies", "bookworm+backports"),
    ("ct_policies", "trixie+backports"),
    ("database_disk", "bullseye"),
    ("database_disk", "trixie"),
    ("doors", "testing"),
    ("doors_whole", "bullseye"),
    ("doors_whole", "trixie"),
    ("killed", "bookworm+backports"),
    ("killed", "bookworm+untold"),
    ("killed", "testing"),
    ("killed", "trixie+backports"),
    ("many_meters", "testing"),
    ("many_meters", "trixie"),
    ("many_groups", "testing"),
    ("many_addresses", "testing"),
    ("many_ports", "bullseye"),
    ("odd_rules_whole", "bullseye"),
    ("odd_rules_whole", "trixie"),
    ("other_init", "bullseye"),
    ("ovn", "testing"),
    ("ovn", "trixie"),
    ("refusals", "bookworm+untold"),
    ("rpm", "bullseye"),
    ("rpm", "trixie"),
    ("rule_corpus", "testing"),
    ("rule_corpus", "trixie"),
    ("selftest", "bookworm+backports"),
    ("selftest", "testing"),
    ("selftest", "trixie+backports"),
    ("upgrade", "testing"),
    ("upgrade", "trixie"),
    ("upgrade_both", "bullseye"),
    ("upgrade_chain", "bullseye"),
    ("upgrade_chain", "trixie"),
    ("upgrade_stock", "bullseye"),
    ("upgrade_within", "bullseye"),
    ("upgrade_within", "testing"),
    ("upgrade_within", "trixie"),
];

/// What every traffic scenario of the matrix goes through: the doors, and a stock restart beside them.
const MATRIX_ACTIONS: [Action; 6] = [
    Action::DoorReload,
    Action::DoorRestart,
    Action::DoorRestartSwitch,
    Action::DoorOvsCtl,
    Action::DoorUpgrade,
    Action::StockRestart,
];

/// The scenarios that are run by hand; then the doors of the distributions, each with plain rules, conntrack, NAT and a
/// tunnel, in the images of all three suites. The names of `only` narrow it down: of scenarios, actions or suites.
pub fn matrix(only: &[String], lanes: Option<usize>) -> Result<bool> {
    let started = Instant::now();
    let lock = places::vm_lock()?;
    let cell = |scenario: &str, action: Action, suite: &str| {
        let out = format!("matrix/{scenario}-{}-{suite}", action.name());
        Request { load: Load::BRIEF, ..request(scenario, action, suite, Some(out)) }
    };
    // The long ones first, so that no lane has one to itself at the end.
    let by_hand = scenarios::ALL.iter().copied().filter(|scenario| scenario.by_hand());
    let mut requests: Vec<Request> = by_hand.map(|scenario| once(scenario, "bookworm")).collect();
    requests.extend(ELSEWHERE.iter().map(|(scenario, suite)| cell(scenario, Action::Ours, suite)));
    // OVS 3.5 makes no timeout policy that is set before its first restart, which `conntrack` asks for.
    let tracked = |suite: &str| if ["trixie", "testing"].contains(&suite) { "ct_policies" } else { "conntrack" };
    for suite in ["bookworm", "trixie", "testing", "bullseye"] {
        for scenario in ["plain", tracked(suite), "nat", "vxlan_ns"] {
            requests.extend(MATRIX_ACTIONS.map(|action| cell(scenario, action, suite)));
        }
    }
    // Other kernels are nothing to the doors.
    for suite in ["bookworm+backports", "trixie+backports", "bookworm+untold"] {
        let base = image::suite_of(suite);
        requests.extend(["plain", tracked(base), "nat", "vxlan_ns"].map(|name| cell(name, Action::Ours, suite)));
    }
    let contained = ["plain", "conntrack", "nat", "vxlan_ns"];
    requests.extend(contained.map(|scenario| cell(scenario, Action::Container, "bookworm")));
    let named = |r: &Request| [r.scenario.as_str(), r.action.name(), &r.suite].map(str::to_owned);
    requests.retain(|request| only.iter().all(|word| named(request).contains(word)));
    if requests.is_empty() {
        bail!("nothing in the matrix is {}", only.join(" and "));
    }
    println!("\nrunning {} tests", requests.len());
    let all = requests.len();
    let passed = told_in_lanes(requests, lanes.unwrap_or_else(lanes_of_this_machine), &lock);
    Ok(closing(passed, all - passed, started))
}

fn once(scenario: Scenario, suite: &str) -> Request {
    let out = (suite != "bookworm").then(|| format!("{}-{suite}", scenario.name()));
    Request { load: Load::BRIEF, ..request(scenario.name(), Action::Ours, suite, out) }
}

/// So that no lane has one to itself at the end.
fn longest_first(scenarios: Vec<(Scenario, &str)>) -> Result<Vec<(Scenario, &str)>> {
    let mut known = scenarios.into_iter().map(|one| Ok((one.0.runs(&[])?, one))).collect::<Result<Vec<_>>>()?;
    known.sort_by_key(|(runs, _)| Reverse(*runs));
    Ok(known.into_iter().map(|(_, one)| one).collect())
}

/// Makes these runs, so many at a time, and hands on how each ended.
fn in_lanes(requests: Vec<Request>, lanes: usize, lock: &VmLock, mut ended: impl FnMut(&Request, Ended)) {
    let queue = Mutex::new(VecDeque::from(requests));
    let (say, said) = channel();
    std::thread::scope(|scope| {
        for _ in 0..lanes.max(1) {
            let (queue, say) = (&queue, say.clone());
            scope.spawn(move || {
                let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                while let Some(request) = next() {
                    let result = bench::rounds(&request, 1, lock);
                    // Nobody listens only where the whole is over.
                    let _ = say.send((request, result));
                }
            });
        }
        drop(say);
        said.iter().for_each(|(request, result)| ended(&request, result));
    });
}

fn udp<'a>(outcome: &'a Outcome, name: &str) -> Option<&'a UdpOutcome> {
    match outcome.probes.get(name) {
        Some(ProbeOutcome::Udp(udp)) => Some(udp),
        _ => None,
    }
}

fn lost(outcome: &Outcome, name: &str) -> u64 {
    udp(outcome, name).map_or(0, |u| u.requests.lost + u.replies.lost)
}

/// Over all UDP probes and both directions.
fn sum(outcome: &Outcome, what: fn(&Direction) -> u64) -> u64 {
    let udp = outcome.probes.values().filter_map(|probe| match probe {
        ProbeOutcome::Udp(udp) => Some(udp),
        _ => None,
    });
    udp.map(|udp| what(&udp.requests) + what(&udp.replies)).sum()
}

fn duplicated(outcome: &Outcome) -> u64 {
    sum(outcome, |direction| direction.duplicated)
}

/// Packets of the constant flow that arrived behind later ones.
fn reordered(outcome: &Outcome) -> u64 {
    udp(outcome, "e").map_or(0, |u| u.requests.reordered + u.replies.reordered)
}

/// Longest time that new flows went unanswered: the row of lost requests, ms.
fn gap(outcome: &Outcome, name: &str) -> f64 {
    udp(outcome, name).map_or(0.0, |u| u.requests.longest_lost_ms)
}

/// Worst delay of a request, a lost one counting as the time to the next one received, ms.
fn worst(outcome: &Outcome, name: &str) -> f64 {
    udp(outcome, name).map_or(0.0, |u| u.requests.worst_ms)
}

fn timeouts(outcome: &Outcome) -> String {
    match outcome.probes.get("tcp") {
        Some(ProbeOutcome::Tcp(tcp)) => tcp.timeouts.to_string(),
        _ => "-".to_owned(),
    }
}

/// Stock and ours side by side, one run each, as a table of what this invocation measured.
pub fn demo(suite: &str) -> Result<bool> {
    let lock = places::vm_lock()?;
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header([
        "scenario",
        "what replaced the daemons",
        "established flow: lost",
        "new flows: lost",
        "duplicated",
        "longest gap of new flows",
        "worst delay, established",
        "worst delay, new",
        "TCP time-outs",
        "took",
    ]);
    let mut good = true;
    let mut versions = None;
    for scenario in ["plain", "conntrack"] {
        for action in [Action::StockRestart, Action::StockReload, Action::Ours] {
            println!("lab: {scenario}, {} (about a minute)", words(action));
            let (outcome, folder) = bench::one(&request(scenario, action, suite, None), &lock)?;
            if let Some(error) = &outcome.error {
                bail!("{scenario}, {}: {error}; see {}", action.name(), folder.display());
            }
            if !outcome.passed {
                bench::print(&outcome, &folder);
                good = false;
            }
            let ms = |v: f64| format!("{v:.0} ms");
            table.add_row([
                scenario.to_owned(),
                words(action).to_owned(),
                lost(&outcome, "e").to_string(),
                lost(&outcome, "n").to_string(),
                duplicated(&outcome).to_string(),
                ms(gap(&outcome, "n")),
                ms(worst(&outcome, "e")),
                ms(worst(&outcome, "n")),
                timeouts(&outcome),
                format!("{:.1} s", outcome.action_ms / 1e3),
            ]);
            versions = Some(outcome.versions);
        }
    }
    println!("\nMeasured by this invocation, packets lost counted in both directions:\n\n{table}\n");
    for (name, version) in versions.unwrap_or_default() {
        println!("{name}: {version}");
    }
    Ok(good)
}

fn words(action: Action) -> &'static str {
    match action {
        Action::Ours => "ovs-graceful restart",
        Action::StockReload => "systemctl reload openvswitch-switch",
        Action::StockRestart => "systemctl restart openvswitch-switch",
        Action::Nothing => "nothing",
        door => door.name(),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.len() % 2, sorted.get(middle.wrapping_sub(1)), sorted.get(middle)) {
        (1, _, Some(value)) => *value,
        (0, Some(low), Some(high)) => (low + high) / 2.0,
        _ => 0.0,
    }
}

/// Both sides of one scenario, measured several times.
#[derive(Default)]
struct Sides {
    ours: Vec<Outcome>,
    stock: Vec<Outcome>,
    lab_errors: usize,
}

impl Sides {
    fn take(&mut self, action: Action, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            match action {
                _ if outcome.error.is_some() => self.lab_errors += 1,
                Action::Ours => self.ours.push(outcome),
                _ => self.stock.push(outcome),
            }
        }
    }

    fn row(&self, name: &str) -> (Vec<String>, bool) {
        let of = |side: &[Outcome], what: fn(&Outcome, &str) -> f64, probe: &str| -> f64 {
            median(&side.iter().map(|o| what(o, probe)).collect::<Vec<_>>())
        };
        let list = |side: &[Outcome], what: &dyn Fn(&Outcome) -> u64| -> String {
            side.iter().map(|o| what(o).to_string()).collect::<Vec<_>>().join(", ")
        };
        let all_lost = |o: &Outcome| sum(o, |direction| direction.lost);
        let (stock_gap, ours_new) = (of(&self.stock, gap, "n"), of(&self.ours, worst, "n"));
        let (stock_constant, ours_constant) = (of(&self.stock, worst, "e"), of(&self.ours, worst, "e"));
        let quick = ours_new <= NEW_FLOW_SHARE * stock_gap;
        let steady = ours_constant <= CONSTANT_SHARE * stock_constant;
        let passed = self.ours.iter().filter(|o| o.passed).count();
        let good = quick && steady && passed == self.ours.len() && passed > 0 && self.lab_errors == 0;
        let row = vec![
            name.to_owned(),
            list(&self.stock, &all_lost),
            list(&self.ours, &all_lost),
            list(&self.ours, &duplicated),
            list(&self.stock, &reordered),
            list(&self.ours, &reordered),
            format!("{stock_gap:.0} ms"),
            format!("{ours_new:.0} ms ({:.2})", ours_new / stock_gap.max(1.0)),
            format!("{stock_constant:.0} ms"),
            format!("{ours_constant:.0} ms ({:.2})", ours_constant / stock_constant.max(1.0)),
            format!("{passed} of {}", self.ours.len()),
            if good { "yes" } else { "NO" }.to_owned(),
        ];
        (row, good)
    }
}

/// The VMs of one scenario's long list: which side, and how many runs in a row. The side that begins also ends, and
/// alternates from scenario to scenario, so that a machine that gets slower or faster favours neither.
///
/// Where `stock_spoils` a VM, each of its runs gets one of its own.
fn shifts(runs: usize, ours_first: bool, stock_spoils: bool) -> Vec<(Action, usize)> {
    let (first, second) =
        if ours_first { (Action::Ours, Action::StockReload) } else { (Action::StockReload, Action::Ours) };
    let shifts = [(first, runs.div_ceil(2)), (second, runs), (first, runs / 2)];
    let vms = |(action, runs)| match action {
        Action::StockReload if stock_spoils => vec![(action, 1); runs],
        _ => vec![(action, runs)],
    };
    shifts.into_iter().filter(|(_, runs)| *runs > 0).flat_map(vms).collect()
}

/// The long list: each traffic scenario five times with stock's reload and five times with ours, order alternated.
/// The table goes to `docs/measured.md`: a scenario's row is replaced when it has been measured, the others stay.
pub fn whole(only: &[String], suite: &str, runs: Option<usize>, slower: u32) -> Result<bool> {
    let started = Instant::now();
    let lock = places::vm_lock()?;
    let runs = runs.unwrap_or(LONG_RUNS);
    for name in only {
        scenarios::find(name)?;
    }
    let (mut passed, mut failed) = (0, 0);
    let chosen = scenarios::ALL.iter().filter(|s| only.is_empty() || only.iter().any(|o| o == s.name()));
    for (index, scenario) in chosen.enumerate() {
        let Scenario::Traffic(traffic) = scenario else { continue };
        let mut sides = Sides::default();
        let shifts = shifts(runs, index % 2 == 0, traffic.stock_spoils());
        for (shift, (action, runs)) in shifts.into_iter().enumerate() {
            let out = format!("whole/{}-{suite}-{shift}-{}", traffic.name(), action.name());
            let request = Request { load: Load::full(slower), ..request(traffic.name(), action, suite, Some(out)) };
            match tell(&request, bench::rounds(&request, runs, &lock)) {
                Some(outcomes) => sides.take(action, outcomes),
                None => sides.lab_errors += 1,
            }
        }
        let traffic_of = if slower == 1 { String::new() } else { format!(", traffic 1/{slower}") };
        let (row, good) = sides.row(&format!("{}, {suite}{traffic_of}", traffic.name()));
        if good {
            passed += 1;
        } else {
            failed += 1;
        }
        write_table(row)?;
    }
    Ok(closing(passed, failed, started))
}

const HEADER: [&str; 14] = [
    "scenario, Debian",
    "stock: lost",
    "ours: lost",
    "ours: duplicated",
    "reordered in the constant flow, stock",
    "reordered in the constant flow, ours",
    "stock: longest gap",
    "ours: longest delay of a new flow (share of it)",
    "stock: worst of the constant flow",
    "ours: worst of the constant flow (share)",
    "ours: passed",
    "within the limits",
    "commit",
    "date",
];

/// The rows of an earlier table, by their first cell.
fn earlier_rows(text: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| line.trim().trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect::<Vec<_>>();
    let is_row = |row: &Vec<String>| row.len() == HEADER.len() && row[0] != HEADER[0] && !row[0].starts_with("--");
    text.lines().filter(|l| l.starts_with('|')).map(cells).filter(is_row).collect()
}

fn write_table(mut row: Vec<String>) -> Result<()> {
    let git = |args: &[&str]| {
        let text = capture(Command::new("git").current_dir(places::workspace()).args(args));
        text.map(|t| t.trim().to_owned()).unwrap_or_default()
    };
    row.extend([git(&["rev-parse", "--short", "HEAD"]), today()]);
    let path = places::workspace().join("docs/measured.md");
    let mut rows = earlier_rows(&fs::read_to_string(&path).unwrap_or_default());
    match rows.iter_mut().find(|r| r[0] == row[0]) {
        Some(old) => *old = row,
        None => rows.push(row),
    }
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(HEADER);
    table.add_rows(rows);
    let mut text = String::from("# What was measured\n\n");
    let _ = writeln!(
        text,
        "Command: `tests/all --whole` (`lab all --whole NAME` measures one scenario and replaces its row). Stock is \
         `systemctl reload openvswitch-switch`; {LONG_RUNS} runs of each side under qemu TCG with two CPUs, those of stock in \
         VMs of their own, several in a row in one VM, order alternated (3 of one side, 5 of the other, 2 of the first). \
         Times are medians, and TCG's: compare them with each other only. Losses are listed run by run, \
         requests and replies of all UDP probes together. Limits: longest delay of a new flow at most {NEW_FLOW_SHARE} \
         of stock's longest gap; worst latency of the constant flow at most {CONSTANT_SHARE} of stock's. Other runs: \
         [measured-single.md](measured-single.md).\n"
    );
    let _ = writeln!(text, "{table}");
    println!("\n{table}\n");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn today() -> String {
    capture(Command::new("date").args(["-u", "+%Y-%m-%d"])).map(|t| t.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(action: Action, lost: u64, gap_ms: f64, worst_ms: f64) -> Outcome {
        let requests = Direction { lost, longest_lost_ms: gap_ms, worst_ms, ..Direction::default() };
        let udp = ProbeOutcome::Udp(Box::new(UdpOutcome { requests, ..UdpOutcome::default() }));
        let mut outcome = Outcome::new("plain", action);
        outcome.probes.insert("n".to_owned(), udp.clone());
        outcome.probes.insert("e".to_owned(), udp);
        outcome.passed = true;
        outcome
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn both_sides_get_their_runs_and_neither_begins_always() {
        let ours = Action::Ours;
        let stock = Action::StockReload;
        assert_eq!(shifts(5, true, false), [(ours, 3), (stock, 5), (ours, 2)]);
        assert_eq!(shifts(5, false, false), [(stock, 3), (ours, 5), (stock, 2)]);
        assert_eq!(shifts(1, true, false), [(ours, 1), (stock, 1)]);
        assert_eq!(shifts(3, true, true), [(ours, 2), (stock, 1), (stock, 1), (stock, 1), (ours, 1)]);
    }

    #[test]
    fn rows_of_an_earlier_table_are_found_again() {
        let row = |name: &str| -> Vec<String> {
            std::iter::once(name).chain(HEADER[1..].iter().map(|_| "1 ms (0.2)")).map(str::to_owned).collect()
        };
        let mut table = Table::new();
        table.load_style(ASCII_MARKDOWN);
        table.set_header(HEADER);
        table.add_rows([row("plain, bookworm"), row("scale, bookworm")]);
        let text = format!("# Title\n\nwords\n\n{table}\n");
        assert_eq!(earlier_rows(&text), [row("plain, bookworm"), row("scale, bookworm")]);
        assert!(earlier_rows("# none\n| a | b |\n").is_empty());
    }

    #[test]
    fn a_scenario_is_within_the_limits_or_not() {
        let stock = vec![outcome(Action::StockReload, 200, 2000.0, 2000.0)];
        let quick = Sides { stock: stock.clone(), ours: vec![outcome(Action::Ours, 0, 0.0, 790.0)], lab_errors: 0 };
        assert!(quick.row("plain").1);
        let slow = Sides { stock: stock.clone(), ours: vec![outcome(Action::Ours, 0, 0.0, 810.0)], lab_errors: 0 };
        assert!(!slow.row("plain").1);
        let broken = Sides { stock, ours: vec![outcome(Action::Ours, 0, 0.0, 790.0)], lab_errors: 1 };
        assert!(!broken.row("plain").1);
    }
}

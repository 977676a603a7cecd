//! Every action and every match field that ovs-ofctl knows, in every version of OpenFlow, comes back as it was: the
//! daemon's own words are equal, groups and meters are, and so is the way that packets take through some of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::scope;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde_json::json;

use super::{aftermath, meanwhile, plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::say;
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct RuleCorpus;

/// See the files.
const MATCHES: &str = include_str!("rule_corpus/matches.txt");
const ACTIONS: &str = include_str!("rule_corpus/actions.txt");
const SMALL: &str = include_str!("rule_corpus/small.txt");
/// A match is encoded in these versions in different ways; an action in each of them.
const MATCH_VERSIONS: [u32; 4] = [10, 12, 13, 15];
const VERSIONS: [u32; 6] = [10, 11, 12, 13, 14, 15];
/// At least so many rules ovs-ofctl and the daemon must have taken, of about 2,500.
const FLOOR: usize = 2000;
/// Rules for actions are in a table of their own for each version, this far behind those for matches.
const ACTION_TABLES: u32 = 20;
/// Ports by which a trace enters a table.
const TRACE_PORT: u32 = 200;
const PACKETS: [&str; 5] = [
    "tcp,nw_src=10.8.0.1,nw_dst=10.9.0.1,tcp_src=443,tcp_dst=444",
    "udp,nw_src=10.4.0.1,nw_dst=224.0.0.5,udp_src=53,udp_dst=4096,dl_vlan=10",
    "arp,arp_op=1,arp_spa=10.7.0.2,arp_tpa=10.7.1.2",
    "icmp6,ipv6_src=fd02::1,ipv6_dst=fd03::1,icmpv6_type=135,nd_target=fd04::1",
    "dl_type=0x8847,mpls_label=1000,mpls_tc=5,mpls_bos=1,mpls_ttl=64",
];

impl Custom for RuleCorpus {
    fn name(&self) -> &'static str {
        "rule_corpus"
    }

    fn about(&self) -> &'static str {
        "every action and match of every OpenFlow version comes back as it was"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        load(out, outcome)?;
        let ends = timed()?;
        let before = Seen::now()?;
        before.write(&out.join("before"))?;
        let count = [before.flows.len(), before.heads.len()];
        outcome.check("there is much to be kept", count.iter().all(|count| *count > FLOOR), json!(count));
        let report = meanwhile::restart(&[], out, outcome, |_, _| Ok(()))?;
        let after = Seen::now()?;
        after.write(&out.join("after"))?;
        before.compare(&after, outcome);
        let mut warnings = report["warnings"].as_array().into_iter().flatten().filter_map(|warning| warning.as_str());
        let none = !warnings.any(|warning| warning.contains("rule"));
        outcome.check("no rule is warned of", none, &report["warnings"]);
        ended_in_time(&ends, outcome);
        aftermath::nothing_left("rule_corpus", outcome);
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

/// Gives br0 all of it. What ovs-ofctl or the daemon refuses is told with its word.
fn load(out: &Path, outcome: &mut Outcome) -> Result<()> {
    for line in lines(SMALL) {
        let mut words = line.splitn(4, ' ');
        let mut word = || words.next().context("a short line");
        let (version, command, bridge, rule) = (word()?, word()?, word()?, word()?);
        let said = ofctl(version, &[command, bridge, rule])?;
        outcome.note(format!("{command} {rule}"), said);
    }
    let mut rules: Vec<(u32, String)> = Vec::new();
    for matched in lines(MATCHES) {
        rules.extend(MATCH_VERSIONS.map(|version| (version, format!("table={version},{matched},actions=drop"))));
    }
    for line in lines(ACTIONS) {
        let (matched, actions) = line.split_once('|').context("a line without `|`")?;
        let comma = if matched.is_empty() { "" } else { "," };
        let rule = |version| format!("table={},{matched}{comma}actions={actions}", version + ACTION_TABLES);
        rules.extend(VERSIONS.map(|version| (version, rule(version))));
    }
    say(&format!("rule_corpus: {} rules", rules.len()));
    // Each has a priority and a cookie of its own: none replaces another.
    let numbered: Vec<(u32, String)> = rules
        .into_iter()
        .zip(100..)
        .map(|((version, rule), number)| (version, format!("priority={number},cookie={},{rule}", 0x77_0000 + number)))
        .collect();
    let refused = scope(|scope| -> Result<Vec<String>> {
        let some = numbered.len().div_ceil(2);
        let threads: Vec<_> = numbered.chunks(some).map(|some| scope.spawn(|| add(some))).collect();
        let mut refused = Vec::new();
        for thread in threads {
            refused.extend(thread.join().unwrap_or_else(|_| bail!("a thread panicked"))?);
        }
        Ok(refused)
    })?;
    fs::write(out.join("refused"), refused.join("\n"))?;
    let taken = numbered.len() - refused.len();
    outcome.note("rules: tried, taken", json!([numbered.len(), taken]));
    outcome.check("most rules are taken", taken >= FLOOR, json!([taken, FLOOR]));
    for table in MATCH_VERSIONS.into_iter().chain(VERSIONS.map(|version| version + ACTION_TABLES)) {
        let port = TRACE_PORT + table;
        shell(&format!("ovs-ofctl add-flow br0 'cookie=0x778,priority=7,in_port={port},actions=resubmit(,{table})'"))?;
    }
    Ok(())
}

fn add(rules: &[(u32, String)]) -> Result<Vec<String>> {
    let mut refused = Vec::new();
    for (version, rule) in rules {
        let said = ofctl(&format!("OpenFlow{version}"), &["add-flow", "br0", rule])?;
        refused.extend(said.map(|said| format!("OpenFlow{version} {rule}: {said}")));
    }
    Ok(refused)
}

/// What it says where it does not end well.
fn ofctl(version: &str, words: &[&str]) -> Result<Option<String>> {
    let output = Command::new("ovs-ofctl").args(["-O", version]).args(words).stdin(Stdio::null()).output()?;
    Ok((!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

fn lines(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Rules that end by themselves, and when: one as it was made, and one that was changed later.
fn timed() -> Result<BTreeMap<&'static str, Instant>> {
    let (made, changed) = (Duration::from_secs(400), Duration::from_secs(600));
    shell("ovs-ofctl add-flow br0 cookie=0x779,table=90,priority=1,hard_timeout=400,actions=drop")?;
    let mut ends = BTreeMap::from([("cookie=0x779", Instant::now() + made)]);
    shell("ovs-ofctl add-flow br0 cookie=0x77a,table=90,priority=2,hard_timeout=600,actions=drop")?;
    std::thread::sleep(Duration::from_secs(8));
    shell("ovs-ofctl mod-flows br0 table=90,cookie=0x77a/-1,actions=output:2")?;
    ends.insert("cookie=0x77a", Instant::now() + changed);
    Ok(ends)
}

/// What is left of each is what was left: by the daemon's word, so that nobody has to wait for it.
fn ended_in_time(ends: &BTreeMap<&'static str, Instant>, outcome: &mut Outcome) {
    for (cookie, end) in ends {
        let told = shell_lenient(&format!("ovs-ofctl dump-flows br0 {cookie}/-1"));
        let number = |name: &str| {
            let rest = told.split_once(name)?.1;
            rest.split([',', 's', ' ']).next()?.parse::<f64>().ok()
        };
        let left = number("hard_timeout=").zip(number("duration=")).map(|(whole, passed)| whole - passed);
        let wanted = end.saturating_duration_since(Instant::now()).as_secs_f64();
        // Whole seconds are told, and rules are given whole seconds.
        let right = left.is_some_and(|left| (left - wanted).abs() < 2.5);
        outcome.check(format!("{cookie} ends when it would have ended"), right, json!([left, wanted, told]));
    }
}

/// What there is.
struct Seen {
    flows: Vec<String>,
    heads: Vec<String>,
    small: Vec<String>,
    traces: Vec<String>,
}

impl Seen {
    fn now() -> Result<Self> {
        let own = shell("ovs-appctl bridge/dump-flows br0")?;
        let counters = ["duration=", "n_packets=", "n_bytes=", "n_offload_"];
        let words = |line: &str| {
            let words = line.split(", ").filter(|word| !counters.iter().any(|counter| word.starts_with(counter)));
            // "No tag" has two spellings, of which OpenFlow 1.1 and later tell one.
            words.collect::<Vec<_>>().join(", ").replace("vlan_tci=0x0000/0x1fff", "vlan_tci=0x0000")
        };
        let mut flows: Vec<String> = own.lines().map(words).collect();
        flows.sort();
        let mut small = Vec::new();
        for dump in ["-O OpenFlow15 dump-groups", "-O OpenFlow13 dump-meters", "dump-tlv-map"] {
            let told = shell(&format!("ovs-ofctl {dump} br0"))?;
            // A meter's bands are lines of their own, behind it; the daemon tells meters in any order.
            let told = told.replace("\ntype=", " type=");
            let mut lines: Vec<String> = told.lines().skip(1).map(|line| line.trim().to_owned()).collect();
            lines.sort();
            small.extend(lines);
        }
        // The daemon's own words have no cookie, flags, importance and time-outs. What is left of a `hard_timeout` is
        // another matter, and `reset_counts` says nothing of a rule that is there.
        let told = shell("ovs-ofctl -O OpenFlow15 --no-stats dump-flows br0")?;
        let lines = told.lines().filter(|line| line.contains("actions=") && !is_timed(line));
        let mut heads: Vec<String> = lines.map(|line| line.trim().replace("reset_counts ", "")).collect();
        heads.sort();
        let mut traces = Vec::new();
        for table in MATCH_VERSIONS.into_iter().chain(VERSIONS.map(|version| version + ACTION_TABLES)) {
            for packet in PACKETS {
                let flow = format!("in_port={},{packet}", TRACE_PORT + table);
                let trace = shell_lenient(&format!("ovs-appctl ofproto/trace br0 {flow}"));
                traces.push(format!("{flow}\n{}", without_counts(&trace)));
            }
        }
        Ok(Seen { flows, heads, small, traces })
    }

    fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        let kinds = [("flows", &self.flows), ("heads", &self.heads), ("small", &self.small), ("traces", &self.traces)];
        for (name, lines) in kinds {
            fs::write(folder.join(name), lines.join("\n"))?;
        }
        Ok(())
    }

    fn compare(&self, after: &Seen, outcome: &mut Outcome) {
        let kinds = [
            ("every flow is in the daemon's words what it was", &self.flows, &after.flows),
            ("cookies, flags, importance and idle time-outs are what they were", &self.heads, &after.heads),
            ("groups, meters and TLV map are what they were", &self.small, &after.small),
            ("packets are traced as they were", &self.traces, &after.traces),
        ];
        for (what, before, after) in kinds {
            let missing: Vec<&String> = before.iter().filter(|line| !after.contains(line)).take(20).collect();
            let new: Vec<&String> = after.iter().filter(|line| !before.contains(line)).take(20).collect();
            outcome.check(what, before == after, json!([missing, new]));
        }
    }
}

/// Has the rule a `hard_timeout`? What is in its actions is about other rules.
fn is_timed(rule: &str) -> bool {
    rule.split("actions=").next().is_some_and(|head| head.contains("hard_timeout="))
}

/// A trace's lines but those that say how often.
fn without_counts(trace: &str) -> String {
    trace.lines().filter(|line| !line.contains("duration=")).collect::<Vec<_>>().join("\n")
}

//! The bridges: read and given what they had in OpenFlow of our own, and put into words by the installed ovs-ofctl, which
//! is of the version of the package, whatever that is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::giving::{code, Giving};
use super::jsonrpc::remaining;
use super::messages::{answer, ERROR, HEADER};
use super::parallel::side_by_side;
use super::prepared::Prepared;
use super::rule_watch::Watch;
use super::{command, controllers, faithful, fdb, groups, reading, small, state, unixctl};
use crate::host::state::lost;
use crate::host::{
    Bridge, BridgeRules, BridgeState, Daemon, FdbEntry, HostError, LearnReport, OpenFlow, Preparation, PreparedRestore,
    RefusedRule, RestoredRules, Result, RuleDifference, RuleWatch,
};

pub(super) const OVS_OFCTL: &str = "ovs-ofctl";
/// All versions there are; the bridge takes the highest that it speaks.
pub(super) const ANY_VERSION: &str = "OpenFlow10,OpenFlow11,OpenFlow12,OpenFlow13,OpenFlow14,OpenFlow15";
/// Over so many connections the daemon is asked about its bridges.
const FDB_CONNECTIONS: usize = 16;
/// Of the flows that cannot be read so many are looked for in a bridge: the first is named, and whether there are others.
const MOST_UNREADABLE: usize = 2;
/// Between two looks at a daemon that starts.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(3);

/// The bridges of this host.
#[derive(Debug, Clone)]
pub struct RealOpenFlow {
    run_directory: PathBuf,
}

impl RealOpenFlow {
    /// The bridges whose management sockets are in `run_directory`, usually `/run/openvswitch`.
    pub fn new(run_directory: impl Into<PathBuf>) -> Self {
        RealOpenFlow { run_directory: run_directory.into() }
    }

    /// Where control sockets of programs are, too.
    pub(super) fn run_directory(&self) -> &Path {
        &self.run_directory
    }

    pub(super) fn socket(&self, bridge: &str) -> PathBuf {
        self.run_directory.join(format!("{bridge}.mgmt"))
    }

    /// The management socket as ovs-ofctl takes it. Never the bare name, which may mean another thing to it.
    pub(super) fn target(&self, bridge: &str) -> String {
        format!("unix:{}", self.socket(bridge).display())
    }

    /// Runs `ovs-ofctl -O PROTOCOL ARGUMENTS`.
    pub(super) fn ofctl(
        &self,
        protocol: &str,
        arguments: &[&str],
        input: Option<&str>,
        until: Instant,
    ) -> Result<String> {
        let mut words = vec!["--no-names", "-O", protocol];
        words.extend(arguments);
        command::run_well(OVS_OFCTL, &words, input.map(str::as_bytes), until)
    }

    /// The same, however it ends.
    pub(super) fn ofctl_output(
        &self,
        protocol: &str,
        arguments: &[&str],
        input: Option<&str>,
        until: Instant,
    ) -> Result<command::Output> {
        let mut words = vec!["--no-names", "-O", protocol];
        words.extend(arguments);
        command::run(OVS_OFCTL, &words, input.map(str::as_bytes), until)
    }

    /// The messages of a stream as ovs-ofctl prints them.
    pub(super) fn print(&self, stream: &[u8], until: Instant) -> Result<String> {
        command::run_well(OVS_OFCTL, &["--no-names", "ofp-parse", "-"], Some(stream), until)
    }

    /// The names of error messages, such as `OFPBAC_MATCH_INCONSISTENT`, by their [`code`].
    pub(super) fn names_of<'a>(
        &self,
        errors: impl Iterator<Item = &'a Vec<u8>>,
        until: Instant,
    ) -> BTreeMap<Vec<u8>, String> {
        let distinct: BTreeMap<&[u8], &Vec<u8>> = errors.map(|error| (code(error), error)).collect();
        let name = |(code, error): (&[u8], &Vec<u8>)| {
            let short = answer(error.get(..HEADER + code.len())?, ERROR);
            let printed = self.print(&short, until).ok()?;
            let name = printed.lines().next()?.split_once("): ")?.1.trim();
            Some((code.to_owned(), name.to_owned()))
        };
        distinct.into_iter().filter_map(name).collect()
    }

    /// Makes a bridge's rules `rules`. Nothing is deleted before what is to be there is there, or comes with it.
    fn restore_one(&self, rules: &BridgeRules, until: Instant) -> Result<RestoredRules> {
        let about =
            |error: HostError| HostError { object: format!("bridge {}: {}", rules.bridge, error.object), ..error };
        self.give(rules, until).map_err(about)
    }

    fn give(&self, rules: &BridgeRules, until: Instant) -> Result<RestoredRules> {
        let socket = self.socket(&rules.bridge);
        // Flows need meters and TLV map.
        let mut refused = small::put(self, rules, &socket, until)?;
        let at_once = Giving::new(rules)?.put(self, &socket, &mut refused, until)?;
        Ok(RestoredRules { bridge: rules.bridge.clone(), not_atomic: !at_once, refused })
    }

    /// Those of `flows` that ovs-ofctl cannot parse, as it says why; [`MOST_UNREADABLE`] at most.
    pub(super) fn unreadable_of(
        &self,
        bridge: &str,
        mut flows: Vec<String>,
        until: Instant,
    ) -> Result<Vec<RefusedRule>> {
        let mut found = Vec::new();
        while found.len() < MOST_UNREADABLE {
            let read = self.ofctl_output(ANY_VERSION, &["parse-flows", "-"], Some(&lines(&flows)), until)?;
            let Some((number, reason)) = parse_mistake(&read.stderr).filter(|_| !read.status.success()) else { break };
            if number == 0 || number > flows.len() {
                break;
            }
            let rule = flows.remove(number - 1);
            found.push(RefusedRule { bridge: bridge.to_owned(), kind: "flow".to_owned(), rule, reason });
        }
        Ok(found)
    }
}

impl OpenFlow for RealOpenFlow {
    fn snapshot(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<BridgeRules>> {
        side_by_side(bridges, |bridge| reading::bridge(self, daemon, bridge, None, until))
    }

    fn count_flows(&self, bridges: &[BridgeRules], until: Instant) -> Result<Vec<u64>> {
        side_by_side(bridges, |rules| {
            let words = ["dump-aggregate", &self.target(&rules.bridge)];
            let answer = self.ofctl(&rules.protocol, &words, None, until)?;
            parse_flow_count(&answer).ok_or_else(|| {
                HostError::new(
                    format!("bridge {}", rules.bridge),
                    format!("`ovs-ofctl dump-aggregate` says {answer:?}"),
                )
            })
        })
    }

    fn refresh(
        &self,
        daemon: &Daemon,
        bridges: &[Bridge],
        before: &[BridgeRules],
        watch: &mut dyn RuleWatch,
        until: Instant,
    ) -> Result<Vec<BridgeRules>> {
        let changed = watch.changed(until)?;
        let mut work = Vec::new();
        for bridge in bridges {
            let small = watch.small_tables(&bridge.name);
            let known = before.iter().find(|rules| rules.bridge == bridge.name && !changed.contains(&bridge.name));
            work.push((bridge, known, small));
        }
        side_by_side(&work, |(bridge, known, small)| match (known, small) {
            // Nothing has to be asked, and nothing started, while packets wait.
            (Some(known), Some(small)) if is_small_part(small, known) => Ok((*known).clone()),
            (known, _) => reading::bridge(self, daemon, bridge, *known, until),
        })
    }

    fn watch(&self, bridges: &[Bridge], until: Instant) -> Result<Box<dyn RuleWatch>> {
        Watch::start(self, bridges, until).map(|watch| Box::new(watch) as _)
    }

    fn wait_ready(&self, daemon: &Daemon, bridges: &[Bridge], flow_limit: u32, until: Instant) -> Result<()> {
        let object = format!("{} (pid {})", daemon.kind.program(), daemon.id.pid);
        // The limit is that of the bridges' datapath, so it is set after the list was made; with the list, because while
        // it takes over it answers late, and both in one turn of its main loop.
        let questions = [("ofproto/list", json!([])), ("upcall/set-flow-limit", json!([flow_limit.to_string()]))];
        loop {
            let list = match unixctl::commands(daemon, &questions, until) {
                // One that has just begun to listen knows its commands a moment later.
                Err(error) if error.cause.contains("is not a valid command") => String::new(),
                answers => answers?.into_iter().next().unwrap_or_default(),
            };
            let there: BTreeSet<&str> = list.lines().map(str::trim).collect();
            // Its main loop answers only between two turns: a bridge in the list has its management socket too.
            let ready = |bridge: &Bridge| there.contains(bridge.name.as_str()) && self.socket(&bridge.name).exists();
            let missing: Vec<&str> = bridges.iter().filter(|b| !ready(b)).map(|b| b.name.as_str()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            let Some(left) = remaining(until) else {
                let doing = format!("waiting for it to set up bridges {}", missing.join(", "));
                return Err(HostError::timeout(object, doing).remedy("see its log"));
            };
            std::thread::sleep(left.min(LOOK_AGAIN));
        }
    }

    fn restore(&self, rules: &[BridgeRules], until: Instant) -> Result<Vec<RestoredRules>> {
        side_by_side(rules, |rules| self.restore_one(rules, until))
    }

    fn prepare_restore(&self, daemon: &Daemon, rules: &[BridgeRules], until: Instant) -> Result<Preparation> {
        let mut restore = Box::new(Prepared::new(self));
        let refused = restore.update(daemon, rules, until)?;
        Ok(Preparation { restore, refused })
    }

    fn unreadable(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<RefusedRule>> {
        let found = side_by_side(bridges, |bridge| {
            let own = unixctl::command(daemon, "bridge/dump-flows", &[&bridge.name], until)?;
            self.unreadable_of(&bridge.name, faithful::own_flows(&own), until)
        })?;
        Ok(found.into_iter().flatten().collect())
    }

    fn fdb(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<Vec<FdbEntry>>> {
        // A turn of the daemon's main loop, long where there are hundreds of bridges, answers one question of a connection.
        let some: Vec<&[Bridge]> = bridges.chunks(bridges.len().div_ceil(FDB_CONNECTIONS).max(1)).collect();
        let answers = side_by_side(&some, |some| {
            let questions: Vec<_> = some.iter().map(|bridge| ("fdb/show", json!([bridge.name]))).collect();
            unixctl::commands(daemon, &questions, until)
        })?;
        let answers = answers.into_iter().flatten();
        let latest_first = |text: String| {
            let mut entries = fdb::parse(&text);
            entries.sort_by_key(|entry| entry.age_s);
            entries
        };
        Ok(answers.map(latest_first).collect())
    }

    fn learn(&self, daemon: &Daemon, bridge: &Bridge, entries: &[FdbEntry], until: Instant) -> Result<LearnReport> {
        fdb::learn(daemon, bridge, entries, until)
    }

    fn state(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<BridgeState>> {
        state::read(self, daemon, bridges, until)
    }

    fn give_state(
        &self,
        daemon: &Daemon,
        bridges: &[Bridge],
        wanted: &[BridgeState],
        until: Instant,
    ) -> Result<Vec<String>> {
        state::give(self, daemon, bridges, wanted, until)?;
        // By what it has now, not by what it was told.
        let asked = |bridge: &&Bridge| wanted.iter().any(|one| one.bridge == bridge.name && !one.items.is_empty());
        let asked: Vec<Bridge> = bridges.iter().filter(asked).cloned().collect();
        Ok(lost(wanted, &state::read(self, daemon, &asked, until)?, |_| true))
    }

    fn wait_for_controllers(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<()> {
        let targets: Vec<String> = bridges.iter().flat_map(|bridge| bridge.connected.clone()).collect();
        controllers::wait(daemon, &targets, until)
    }

    fn both(&self, one: &mut dyn FnMut(), other: &mut (dyn FnMut() + Send)) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(other);
            one();
            if thread.join().is_err() {
                tracing::error!("a thread of ours panicked: what it was to do is not done");
            }
        });
    }
}

/// Line and reason in `ovs-ofctl: -:3: unknown keyword reg20` (`parse_ofp_flow_mod_file`, lib/ofp-flow.c).
fn parse_mistake(said: &str) -> Option<(usize, String)> {
    let (number, reason) = said.lines().find_map(|line| line.split_once("ovs-ofctl: -:"))?.1.split_once(": ")?;
    Some((number.parse().ok()?, reason.trim().to_owned()))
}

/// Are TLV map, meters and groups surely those of `rules`?
fn is_small_part(small: &BridgeRules, rules: &BridgeRules) -> bool {
    let part = |rules: &BridgeRules| {
        (rules.protocol.clone(), rules.tlv_map.clone(), rules.meters.clone(), rules.groups.clone())
    };
    part(small) == part(rules) && !groups::may_be_others(rules)
}

/// 10 for `OpenFlow10` and so on.
pub(super) fn version_number(protocol: &str) -> u32 {
    protocol.strip_prefix("OpenFlow").and_then(|number| number.parse().ok()).unwrap_or(10)
}

/// One flow of a dump, as `add-flows` takes it.
pub(super) fn flow(line: &str) -> String {
    let (head, actions) = line.split_once("actions=").unwrap_or((line, ""));
    let counters = ["idle_age=", "hard_age=", "duration=", "n_packets=", "n_bytes="];
    let fields: Vec<String> = head
        .split([',', ' '])
        .filter(|field| !field.is_empty() && !counters.iter().any(|counter| field.starts_with(counter)))
        .map(readable)
        .collect();
    format!("{} actions={actions}", fields.join(","))
}

/// A field of a match, as ovs-ofctl takes it where it cannot read its own word.
pub(super) fn readable(field: &str) -> String {
    match field.split_once('=') {
        Some(("igmp_type", value)) => format!("tp_src={value}"),
        Some(("igmp_code", value)) => format!("tp_dst={value}"),
        None if field == "igmp" => "ip,nw_proto=2".to_owned(),
        _ => field.to_owned(),
    }
}

/// The number of flows in an aggregate reply.
fn parse_flow_count(reply: &str) -> Option<u64> {
    reply.split_whitespace().find_map(|word| word.strip_prefix("flow_count="))?.parse().ok()
}

/// Does the rule go by itself? What is in its actions (`learn`) is about other rules.
pub fn is_timed(rule: &str) -> bool {
    let own = rule.split("actions=").next().unwrap_or(rule);
    own.contains("idle_timeout=") || own.contains("hard_timeout=")
}

pub(super) fn parse_groups(dump: &str) -> Vec<String> {
    dump.lines().map(str::trim).filter(|line| line.starts_with("group_id=")).map(str::to_owned).collect()
}

/// A meter and its bands are a line each.
pub(super) fn parse_meters(dump: &str) -> Vec<String> {
    let mut meters: Vec<String> = Vec::new();
    for line in dump.lines().map(str::trim) {
        match (line.starts_with("meter="), line.starts_with("type="), meters.last_mut()) {
            (true, _, _) => meters.push(line.to_owned()),
            (_, true, Some(meter)) => {
                let space = if meter.ends_with('=') { "" } else { " " };
                *meter = format!("{meter}{space}{line}");
            }
            _ => {}
        }
    }
    meters
}

/// Rows `0xffff 0x0 4 tun_metadata0` of the mapping table.
pub(super) fn parse_tlv_map(dump: &str) -> Vec<String> {
    let row = |line: &str| match line.split_whitespace().collect::<Vec<_>>()[..] {
        [class, kind, length, field] if class.starts_with("0x") => {
            Some(format!("{{class={class},type={kind},len={length}}}->{field}"))
        }
        _ => None,
    };
    dump.lines().filter_map(row).collect()
}

/// A group's `group_id=5`.
pub fn first_field(rule: &str) -> &str {
    rule.split([',', ' ']).next().unwrap_or(rule)
}

fn lines(rules: &[String]) -> String {
    rules.iter().flat_map(|rule| [rule.as_str(), "\n"]).collect()
}

/// The rules that one of the two has more often than the other. Order is no part of the meaning.
pub fn compare(before: &[BridgeRules], after: &[BridgeRules]) -> Vec<RuleDifference> {
    let bridges: BTreeSet<&str> = before.iter().chain(after).map(|rules| rules.bridge.as_str()).collect();
    let mut differences = Vec::new();
    for bridge in bridges {
        let side = |rules: &[BridgeRules]| rules.iter().find(|r| r.bridge == bridge).cloned().unwrap_or_default();
        let (before, after) = (side(before), side(after));
        let kinds = [
            ("flow", before.flows, after.flows),
            ("group", before.groups, after.groups),
            ("meter", before.meters, after.meters),
            ("tlv-map", before.tlv_map, after.tlv_map),
        ];
        for (kind, before, after) in kinds {
            differences.extend(count(&before, &after).into_iter().map(|(rule, missing)| RuleDifference {
                bridge: bridge.to_owned(),
                kind: kind.to_owned(),
                missing,
                timed: is_timed(&rule),
                rule,
            }));
        }
    }
    differences
}

/// What occurs more often on one side, and whether that is the first.
fn count(before: &[String], after: &[String]) -> Vec<(String, bool)> {
    let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
    before.iter().for_each(|rule| *counts.entry(rule).or_default() += 1);
    after.iter().for_each(|rule| *counts.entry(rule).or_default() -= 1);
    counts.into_iter().filter(|(_, n)| *n != 0).map(|(rule, n)| (rule.to_owned(), n > 0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_ovs_ofctl_cannot_parse_is_found() {
        let said = "2026-11-30T13:36:45Z|00001|ofp|WARN|something\novs-ofctl: -:12: unknown keyword reg20\n";
        assert_eq!(parse_mistake(said), Some((12, "unknown keyword reg20".to_owned())));
        for other in ["", "ovs-ofctl: -:x: y", "ovs-ofctl: /tmp/f: open: No such file or directory"] {
            assert_eq!(parse_mistake(other), None, "{other}");
        }
    }

    #[test]
    fn versions_are_numbers() {
        assert_eq!((version_number("OpenFlow13"), version_number("")), (13, 10));
    }

    #[test]
    fn flows_lose_counters_and_keep_actions_as_they_are() {
        let dump = " cookie=0x5, duration=3.1s, table=1, n_packets=0, n_bytes=0, idle_age=3, hard_age=9, idle_timeout=60, \
            priority=7,ct_state=+trk,ip,nw_dst=10.0.0.0/8 actions=ct(commit,zone=5,nat(src=1.1.1.1)),learn(table=2, idle_timeout=1,actions=drop)\n \
            cookie=0x0, priority=1,igmp,igmp_type=17 actions=drop\n";
        let flows: Vec<String> = dump.lines().map(flow).collect();
        assert_eq!(
            flows[0],
            "cookie=0x5,table=1,idle_timeout=60,priority=7,ct_state=+trk,ip,nw_dst=10.0.0.0/8 \
             actions=ct(commit,zone=5,nat(src=1.1.1.1)),learn(table=2, idle_timeout=1,actions=drop)"
        );
        assert_eq!(flows[1], "cookie=0x0,priority=1,ip,nw_proto=2,tp_src=17 actions=drop");
        assert_eq!(flows.len(), 2);
    }

    #[test]
    fn flows_are_counted_in_aggregate_replies_of_every_version() {
        let old = "NXST_AGGREGATE reply (xid=0x4): packet_count=7 byte_count=0 flow_count=5000\n";
        let new = "OFPST_AGGREGATE reply (OF1.5) (xid=0x2): packet_count=7 byte_count=0 flow_count=3\n";
        assert_eq!((parse_flow_count(old), parse_flow_count(new)), (Some(5000), Some(3)));
        assert_eq!(parse_flow_count("OFPT_ERROR (OF1.5) (xid=0x2): OFPBRC_BAD_TYPE"), None);
    }

    #[test]
    fn a_rule_that_learns_rules_with_a_time_out_stays_itself() {
        assert!(is_timed("cookie=0x5,idle_timeout=60,priority=7 actions=drop"));
        assert!(!is_timed("priority=7 actions=learn(table=2,idle_timeout=1,actions=drop)"));
    }

    #[test]
    fn meters_and_tlv_maps_become_what_adds_them() {
        let dump = "OFPST_METER_CONFIG reply (OF1.3) (xid=0x2):\nmeter=1 kbps bands=\ntype=drop rate=1000\n\
                    meter=2 pktps burst bands=\ntype=drop rate=9 burst_size=5\ntype=dscp_remark rate=3 prec_level=1\n";
        assert_eq!(
            parse_meters(dump),
            [
                "meter=1 kbps bands=type=drop rate=1000",
                "meter=2 pktps burst bands=type=drop rate=9 burst_size=5 type=dscp_remark rate=3 prec_level=1"
            ]
        );
        let dump = "NXT_TLV_TABLE_REPLY (xid=0x4):\n max option space=256 max fields=64\n mapping table:\n  \
                    class\ttype\tlength\tmatch field\n ------\t----\t------\t--------------\n \
                    0xffff\t0x0\t4\ttun_metadata0\n";
        assert_eq!(parse_tlv_map(dump), ["{class=0xffff,type=0x0,len=4}->tun_metadata0"]);
    }

    #[test]
    fn comparison_is_by_meaning_and_counts() {
        let rules = |flows: &[&str]| BridgeRules {
            bridge: "br0".into(),
            flows: flows.iter().map(|f| f.to_string()).collect(),
            ..BridgeRules::default()
        };
        assert!(compare(&[rules(&["a", "b"])], &[rules(&["b", "a"])]).is_empty());
        let differences = compare(&[rules(&["a", "a", "idle_timeout=3 b"])], &[rules(&["a", "c"])]);
        let seen: Vec<_> = differences.iter().map(|d| (d.rule.as_str(), d.missing, d.timed)).collect();
        assert_eq!(seen, [("a", true, false), ("c", false, false), ("idle_timeout=3 b", true, true)]);
        assert_eq!(compare(&[rules(&["a"])], &[]).len(), 1);
    }
}

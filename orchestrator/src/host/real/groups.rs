//! Which version tells a bridge's groups as the daemon has them.
//!
//! A group is checked against no match, so from OpenFlow 1.1 on `mod_vlan_vid` of 1.0 is told as `push_vlan`, which pushes
//! a tag onto one that is there; 1.0 does not tell a `push_vlan` at all (`encode_SET_VLAN_VID`, `encode_PUSH_VLAN`,
//! lib/ofp-actions.c). No text and no message says which of the two a bucket has. The daemon prints it where it carries the
//! bucket out: `ofproto/trace-packet-out` sends a packet that is none through the group. All buckets of an `all` or
//! `indirect` group are carried out; of a `select` group one for each packet, so many packets are traced; of a fast-failover
//! group the first live one.
//!
//! OpenFlow 1.1 to 1.4 besides tell neither how a bucket is selected nor the numbers of the buckets; 1.0, where groups are
//! an extension, tells both.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::faithful::{same_meaning, UNTAGGED};
use super::giving::version_of;
use super::messages::{OF10, OF11, OF15};
use super::openflow::first_field;
use super::reading::in_words;
use crate::host::messages::Stream;
use crate::host::{BridgeRules, RefusedRule, Result};

/// So many packets are traced for each group at first, and for a `select` group that has not shown all its buckets after
/// it.
const PACKETS: [u32; 4] = [1, 31, 96, 128];
/// Of a bridge so many traces are asked for at most, beyond one for each group.
const MOST_TRACES: usize = 4096;
/// Of so many traces the text is in memory at a time.
const AT_ONCE: usize = 16;
/// How far a trace indents the buckets of the group that it was asked for, and their actions.
const BUCKET_INDENT: usize = 4;
const ACTION_INDENT: usize = 12;

/// A packet and a group, as `ofproto/trace-packet-out` takes them.
pub type Question = (String, String);

/// Takes each of the bridge's groups as the daemon has it. `older` are its groups in OpenFlow 1.0, where it speaks that;
/// `trace` has the daemon answer questions, an answer each.
pub fn settle(
    rules: &mut BridgeRules,
    older: impl FnOnce() -> Result<Option<BridgeRules>>,
    trace: impl FnMut(&[Question]) -> Result<Vec<String>>,
) -> Result<()> {
    let version = version_of(&rules.protocol);
    let is_doubtful = |group: &String| buckets(group).any(|bucket| is_doubtful(version, bucket));
    if !rules.groups.iter().any(|group| tells_part(version) || is_doubtful(group)) {
        return Ok(());
    }
    let older = if version > OF10 { older()?.unwrap_or_default() } else { BridgeRules::default() };
    let older: HashMap<&str, (&str, &[u8])> = older
        .groups
        .iter()
        .zip(older.messages.groups.each())
        .map(|(text, message)| (first_field(text), (text.as_str(), message)))
        .collect();
    let mut doubts: BTreeMap<usize, Doubt> = BTreeMap::new();
    for (at, group) in rules.groups.iter().enumerate().filter(|&(_, group)| is_doubtful(group)) {
        let numbered = older.get(first_field(group)).map_or(group.as_str(), |(text, _)| *text);
        doubts.insert(at, Doubt::new(version, group, numbered));
    }
    look(&mut doubts, trace)?;
    let mut whole = Vec::new();
    for (at, group) in rules.groups.iter_mut().enumerate() {
        let (doubt, older) = (doubts.get(&at), older.get(first_field(group)));
        let about = |reason: String| RefusedRule {
            bridge: rules.bridge.clone(),
            kind: "group".to_owned(),
            rule: group.clone(),
            reason,
        };
        let is_unsure = doubt.is_some_and(|doubt| !doubt.is_shown());
        match judge(version, group, older.map(|(text, _)| *text), doubt) {
            Verdict::Another(reason) => rules.untold.push(about(reason)),
            verdict => {
                let told = if verdict == Verdict::Older { OF10 } else { version };
                let unsure = doubt.filter(|_| is_unsure).map(|doubt| about(doubt.unsure(told)));
                rules.unsure.extend(unsure);
                if let (Verdict::Older, Some((text, message))) = (verdict, older) {
                    group.clear();
                    group.push_str(text);
                    whole.extend_from_slice(message);
                }
            }
        }
    }
    rules.messages.whole_groups = Stream::new(whole);
    Ok(())
}

/// Can the same texts be told of other groups? Then they say not that nothing has changed.
pub fn may_be_others(rules: &BridgeRules) -> bool {
    let version = version_of(&rules.protocol);
    let is_doubtful = |group: &String| buckets(group).any(|bucket| is_doubtful(version, bucket));
    rules.groups.iter().any(is_doubtful)
}

/// Does this version tell a part of a group only?
fn tells_part(version: u8) -> bool {
    (OF11..OF15).contains(&version)
}

/// Is there something in a group that versions without it would make anew in another way? They count buckets from 0.
fn tells_more(group: &str) -> bool {
    group.contains("selection_method=")
        || numbers(group).enumerate().any(|(at, number)| usize::try_from(number) != Ok(at))
}

/// The buckets of a group's text.
fn buckets(group: &str) -> impl Iterator<Item = &str> {
    group.split(",bucket=").skip(1)
}

/// The numbers of its buckets: where they are not told, those that the daemon counted.
fn numbers(group: &str) -> impl Iterator<Item = u32> + '_ {
    let number = |bucket: &str| bucket.strip_prefix("bucket_id:")?.split(',').next()?.parse().ok();
    buckets(group).zip(0..).map(move |(bucket, at)| number(bucket).unwrap_or(at))
}

/// Could this be the telling of another bucket?
fn is_doubtful(version: u8, bucket: &str) -> bool {
    bucket.contains(if version == OF10 { "mod_vlan_" } else { "push_vlan:" })
}

/// What is told of a group.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The bridge's highest version tells it.
    Highest,
    /// OpenFlow 1.0 tells it.
    Older,
    /// None does, for this reason.
    Another(String),
}

fn judge(version: u8, told: &str, older: Option<&str>, doubt: Option<&Doubt>) -> Verdict {
    let fits = |version| doubt.is_none_or(|doubt| doubt.fits(version));
    let is_whole = !tells_part(version) || !older.is_some_and(tells_more);
    // Pushing a tag is another matter, of which the daemon's word counts.
    let means_the_same = older.is_some_and(|older| same_meaning(UNTAGGED, told, older));
    let name = in_words(version);
    match (is_whole && fits(version), means_the_same && fits(OF10)) {
        (true, _) => Verdict::Highest,
        (false, true) => Verdict::Older,
        (false, false) if !is_whole => Verdict::Another(format!(
            "{name} tells neither the numbers of its buckets nor how one is selected, and OpenFlow 1.0 tells other actions"
        )),
        (false, false) if version == OF10 => Verdict::Another(format!("{name} does not tell its push_vlan")),
        (false, false) => Verdict::Another(format!("{name} tells its mod_vlan_vid as push_vlan, which is another group")),
    }
}

/// A group that could be another than the one that is told.
struct Doubt {
    group: String,
    is_select: bool,
    /// The numbers of the buckets that matter.
    wanted: BTreeSet<u32>,
    /// The actions of the buckets that the daemon has carried out.
    shown: BTreeMap<u32, Vec<String>>,
}

impl Doubt {
    /// `numbered` is a text of the same group that has the numbers of its buckets.
    fn new(version: u8, group: &str, numbered: &str) -> Self {
        let wanted = buckets(group).zip(numbers(numbered)).filter(|(bucket, _)| is_doubtful(version, bucket));
        Doubt {
            group: first_field(group).replacen("group_id=", "group:", 1),
            is_select: group.contains(",type=select"),
            wanted: wanted.map(|(_, number)| number).collect(),
            shown: BTreeMap::new(),
        }
    }

    fn is_shown(&self) -> bool {
        self.wanted.iter().all(|number| self.shown.contains_key(number))
    }

    /// Does this version tell the buckets that were shown? They are of one message usually, which says enough of the others.
    fn fits(&self, version: u8) -> bool {
        let other = if version == OF10 { "push_vlan:" } else { "mod_vlan_" };
        !self.shown.values().flatten().any(|action| action.starts_with(other))
    }

    fn unsure(&self, version: u8) -> String {
        let hidden = self.wanted.iter().filter(|number| !self.shown.contains_key(number));
        let hidden = hidden.map(u32::to_string).collect::<Vec<_>>().join(", ");
        format!(
            "the daemon does not show whether bucket {hidden} pushes a tag onto a packet that has one; it is put back as {} tells it",
            in_words(version)
        )
    }

    /// Takes the buckets of the group itself from a trace; what they call is indented further, or by less.
    fn take(&mut self, trace: &str) {
        let mut bucket = None;
        for line in trace.lines() {
            let text = line.trim_start();
            match line.len() - text.len() {
                BUCKET_INDENT => {
                    bucket = text.strip_prefix("bucket ").and_then(|number| number.trim_end().parse::<u32>().ok());
                    if let Some(number) = bucket {
                        self.shown.entry(number).or_default();
                    }
                }
                ACTION_INDENT => {
                    if let Some(actions) = bucket.and_then(|number| self.shown.get_mut(&number)) {
                        actions.push(text.to_owned());
                    }
                }
                less if less < ACTION_INDENT => bucket = None,
                _ => {}
            }
        }
    }
}

/// Has the daemon show the buckets.
fn look(doubts: &mut BTreeMap<usize, Doubt>, mut trace: impl FnMut(&[Question]) -> Result<Vec<String>>) -> Result<()> {
    let (mut from, mut left) = (1, MOST_TRACES);
    for count in PACKETS {
        let pending = doubts.iter().filter(|(_, doubt)| !doubt.is_shown() && (from == 1 || doubt.is_select));
        let questions = pending.flat_map(|(at, doubt)| {
            (from..from + count).map(move |number| (*at, (packet(number), doubt.group.clone())))
        });
        let mut questions: Vec<(usize, Question)> = questions.collect();
        if from > 1 {
            questions.truncate(left);
            left -= questions.len();
        }
        for some in questions.chunks(AT_ONCE) {
            let asked: Vec<Question> = some.iter().map(|(_, question)| question.clone()).collect();
            for ((at, _), answer) in some.iter().zip(trace(&asked)?) {
                doubts.entry(*at).and_modify(|doubt| doubt.take(&answer));
            }
        }
        from += count;
    }
    Ok(())
}

/// A packet that groups tell from others by whatever they look at.
fn packet(number: u32) -> String {
    let [_, _, high, low] = number.to_be_bytes();
    format!(
        "in_port=LOCAL,dp_hash={number:#x},tcp,dl_src=02:00:00:00:{high:02x}:{low:02x},dl_dst=02:00:00:01:{high:02x}:{low:02x},\
         nw_src=10.1.{high}.{low},nw_dst=10.2.{high}.{low},nw_ttl=64,tp_src={},tp_dst={}",
        1024 + number,
        4096 + number
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::messages::Messages;

    const PUSHED: &str = "push_vlan:0x8100,set_field:4106->vlan_vid,output:2";

    /// As `ovs-appctl ofproto/trace-packet-out` of OVS 3.1.0 says it: two buckets, of which the first goes on in a table
    /// whose rule uses another group.
    fn trace(first: &str, second: &str) -> String {
        format!(
            "Flow: dp_hash=0x5,tcp,in_port=LOCAL,vlan_tci=0x0000\n\nbridge(\"br0\")\n-------------\n    group:7\n    \
             bucket 0\n            {first}\n            resubmit(,20)\n        20. priority 32768\n            \
             push_vlan:0x88a8\n            group:1\n            bucket 0\n                    mod_vlan_vid:10\n    \
             bucket 1\n            {second}\n            output:3\n\nFinal flow: unchanged\nDatapath actions: drop\n"
        )
    }

    fn bridge(version: &str, groups: &[String]) -> BridgeRules {
        let message = |number: usize| vec![version.as_bytes()[9] - b'0' + 1, 15, 0, 8, 0, 0, 0, number as u8];
        BridgeRules {
            bridge: "br0".into(),
            protocol: version.into(),
            groups: groups.to_vec(),
            messages: Messages {
                groups: Stream::new((0..groups.len()).flat_map(message).collect()),
                ..Messages::default()
            },
            ..BridgeRules::default()
        }
    }

    /// What becomes of one group: its text, how many are given by 1.0, and what is told of it.
    fn settled(
        version: &str,
        told: &str,
        older: Option<&str>,
        trace: &str,
    ) -> (String, usize, Vec<String>, Vec<String>) {
        let mut rules = bridge(version, &[told.to_owned()]);
        let older = older.map(|text| bridge("OpenFlow10", &[text.to_owned()]));
        settle(&mut rules, || Ok(older), |asked| Ok(vec![trace.to_owned(); asked.len()])).unwrap();
        let reasons = |refused: &[RefusedRule]| refused.iter().map(|it| it.reason.clone()).collect();
        let whole = rules.messages.whole_groups.each().count();
        (rules.groups.remove(0), whole, reasons(&rules.untold), reasons(&rules.unsure))
    }

    fn told(numbered: bool, kind: &str) -> String {
        let id = |number| if numbered { format!("bucket_id:{number},") } else { String::new() };
        format!("group_id=7,type={kind},bucket={}actions={PUSHED},bucket={}actions=output:3", id(0), id(1))
    }

    const OLDER: &str =
        "group_id=7,type=all,bucket=bucket_id:0,actions=mod_vlan_vid:10,output:2,bucket=bucket_id:1,actions=output:3";

    #[test]
    fn a_group_is_the_one_whose_buckets_the_daemon_carries_out() {
        let (implicit, explicit) = (trace("mod_vlan_vid:10", "output:3"), trace("push_vlan:0x8100", "output:3"));
        let new = told(true, "all");
        let none = || (Vec::<String>::new(), Vec::<String>::new());
        let (text, whole, untold, unsure) = settled("OpenFlow15", &new, Some(OLDER), &implicit);
        assert_eq!((text.as_str(), whole, (untold, unsure)), (OLDER, 1, none()));
        let (text, whole, untold, unsure) = settled("OpenFlow15", &new, Some(OLDER), &explicit);
        assert_eq!((text, whole, (untold, unsure)), (new.clone(), 0, none()));
        // 1.3, which has no numbers.
        let old = told(false, "all");
        assert_eq!(settled("OpenFlow13", &old, Some(OLDER), &implicit).0, OLDER);
        assert_eq!(settled("OpenFlow13", &old, Some(OLDER), &explicit).0, old);
        // Without 1.0 there is nobody who tells it; and 1.0 alone does not tell a push.
        let (text, _, untold, _) = settled("OpenFlow15", &new, None, &implicit);
        assert_eq!(text, new);
        assert_eq!(untold, ["OpenFlow 1.5 tells its mod_vlan_vid as push_vlan, which is another group"]);
        assert_eq!(settled("OpenFlow10", OLDER, None, &explicit).2, ["OpenFlow 1.0 does not tell its push_vlan"]);
        assert_eq!(settled("OpenFlow10", OLDER, None, &implicit).2, [""; 0]);
        // Some of both.
        let both = trace("push_vlan:0x8100", "mod_vlan_vid:10");
        assert_eq!(settled("OpenFlow15", &new, Some(OLDER), &both).2.len(), 1);
    }

    #[test]
    fn a_bucket_that_the_daemon_does_not_show_is_warned_of() {
        let new = told(true, "ff").replace("actions=output:3", "actions=push_vlan:0x8100,output:3");
        let one =
            "    group:7\n     -> using bucket 0\n    bucket 0\n            mod_vlan_vid:10\n            output:2\n";
        let older = OLDER.replace("type=all", "type=ff");
        let (text, whole, untold, unsure) = settled("OpenFlow15", &new, Some(&older), one);
        assert_eq!((text, whole, untold.len()), (older.clone(), 1, 0));
        assert!(unsure.len() == 1 && unsure[0].contains("bucket 1 pushes a tag"), "{unsure:?}");
        assert!(unsure[0].ends_with("put back as OpenFlow 1.0 tells it"), "{unsure:?}");
        let (text, whole, untold, unsure) = settled("OpenFlow15", &new, Some(&older), "     -> no live bucket\n");
        assert_eq!((text, whole, untold.len()), (new, 0, 0));
        assert!(unsure[0].contains("bucket 0, 1 pushes") && unsure[0].ends_with("OpenFlow 1.5 tells it"), "{unsure:?}");
    }

    #[test]
    fn a_select_group_is_asked_with_packets_until_it_has_shown_every_bucket() {
        let new = told(true, "select").replace("actions=output:3", "actions=push_vlan:0x8100,output:3");
        let mut rules = bridge("OpenFlow15", std::slice::from_ref(&new));
        let mut asked = Vec::new();
        let show = |questions: &[Question]| {
            asked.extend(questions.to_vec());
            let bucket = u8::from(asked.len() > 20);
            Ok(vec![format!("    bucket {bucket}\n            push_vlan:0x8100\n"); questions.len()])
        };
        settle(&mut rules, || Ok(None), show).unwrap();
        assert_eq!((rules.untold.len(), rules.unsure.len()), (0, 0));
        assert_eq!(asked.len(), 32);
        assert!(asked.iter().all(|(_, group)| group == "group:7"));
        assert_eq!(asked.iter().map(|(packet, _)| packet).collect::<BTreeSet<_>>().len(), 32);
        // One bucket that never shows itself costs so many packets.
        let mut count = 0;
        let hide = |questions: &[Question]| {
            count += questions.len();
            Ok(vec![String::new(); questions.len()])
        };
        settle(&mut bridge("OpenFlow15", &[new]), || Ok(None), hide).unwrap();
        assert_eq!(count, 256);
    }

    #[test]
    fn a_group_is_told_whole_where_its_buckets_are_not_counted_or_not_selected_as_usual() {
        // As `ovs-ofctl dump-groups` of OVS 3.1.0 prints them, over OpenFlow 1.0.
        let plain = "group_id=5,type=all,bucket=bucket_id:0,actions=output:1,bucket=bucket_id:1,actions=output:2";
        assert!(!tells_more(plain) && !tells_more("group_id=7,type=all"));
        let other = plain.replace("bucket_id:1", "bucket_id:7");
        let select = "group_id=3,type=select,selection_method=hash,bucket=bucket_id:0,weight:5,actions=output:1";
        assert!(tells_more(&other) && tells_more(select));
        let new = "group_id=5,type=all,bucket=actions=output:1,bucket=actions=output:2";
        assert_eq!(settled("OpenFlow13", new, Some(&other), ""), (other, 1, vec![], vec![]));
        assert_eq!(settled("OpenFlow13", new, Some(plain), "").0, new);
    }

    #[test]
    fn a_group_of_which_no_version_tells_all_is_named() {
        let hash = "group_id=1,type=select,selection_method=hash,bucket=bucket_id:1,actions=mod_vlan_vid:10,output:2";
        let new = format!("group_id=1,type=select,bucket=actions={PUSHED}");
        let shown = |action: &str| format!("    bucket 1\n            {action}\n");
        assert_eq!(
            settled("OpenFlow13", &new, Some(hash), &shown("mod_vlan_vid:10")),
            (hash.to_owned(), 1, vec![], vec![])
        );
        let (text, whole, untold, _) = settled("OpenFlow13", &new, Some(hash), &shown("push_vlan:0x8100"));
        assert_eq!((text, whole), (new.clone(), 0));
        assert!(untold.len() == 1 && untold[0].contains("nor how one is selected"), "{untold:?}");
        // 1.0 has left something out.
        let other = hash.replace("output:2", "group:9");
        assert_eq!(settled("OpenFlow13", &new, Some(&other), &shown("mod_vlan_vid:10")).2.len(), 1);
    }

    #[test]
    fn what_is_untold_already_stays() {
        let mut rules = bridge("OpenFlow15", &[told(true, "all")]);
        rules.untold.push(RefusedRule {
            bridge: "br0".into(),
            kind: "flow".into(),
            rule: "x".into(),
            reason: "y".into(),
        });
        settle(&mut rules, || Ok(None), |asked| Ok(vec![trace("mod_vlan_vid:10", "drop"); asked.len()])).unwrap();
        assert_eq!(rules.untold.len(), 2);
    }
}

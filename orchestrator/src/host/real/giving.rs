//! Gives a bridge what it is to have: messages that a bridge has told, sent in one piece.
//!
//! The rules of the bridge's highest version come first: with bundles as one atomic bundle that replaces everything, and
//! without them one after the other. Rules that only another version tells follow over connections of that version,
//! before anything depends on them. The daemon answers each message that it refuses, and a bundle's other messages still
//! count: what is left of it can be committed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::time::Instant;

use super::connection::Connection;
use super::messages::{
    self, add_or_modify, barrier, bundle_control, extension, header, in_bundle, in_words, kind, numbered,
    without_effect, xid, Bundle, BUFFER_UNKNOWN, ERROR, HEADER, OF10, OF13,
};
use super::openflow::{first_field, RealOpenFlow};
use super::reading::{monotonic_ms, number_of};
use super::told::{self, Head};
use crate::host::{BridgeRules, Context, HostError, RefusedRule, Result};

/// As many rules the daemon is given at a time where they are only tried: less than a MB of its memory.
const BUNDLE_RULES: usize = 500;
/// A commit tells of one message that it refuses: after so many, the rules are added without a bundle.
const ROUNDS: usize = 16;
/// Transaction ids of what is not a rule; those of rules count from 1.
const OTHER: u32 = 0xff00_0000;
/// NXT_SET_FLOW_FORMAT with NXFF_NXM, NXT_FLOW_MOD_TABLE_ID with 1 (include/openflow/nicira-ext.h).
const SET_FLOW_FORMAT: (u32, [u8; 4]) = (12, [0, 0, 0, 2]);
const FLOW_MOD_TABLE_ID: (u32, [u8; 8]) = (15, [1, 0, 0, 0, 0, 0, 0, 0]);

/// A rule by its place in [`BridgeRules`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Item {
    Group(usize),
    Flow(usize),
}

impl Item {
    fn text(self, rules: &BridgeRules) -> &str {
        match self {
            Item::Group(at) => rules.groups.get(at),
            Item::Flow(at) => rules.flows.get(at),
        }
        .map_or("", String::as_str)
    }

    fn refused(self, rules: &BridgeRules, reason: String) -> RefusedRule {
        let kind = match self {
            Item::Group(_) => "group",
            Item::Flow(_) => "flow",
        };
        RefusedRule { bridge: rules.bridge.clone(), kind: kind.into(), rule: self.text(rules).into(), reason }
    }
}

/// A rule and what adds it; its transaction id is its place, counted from 1.
struct Given<'a> {
    item: Item,
    message: &'a [u8],
}

/// What one bridge is given.
pub struct Giving<'a> {
    rules: &'a BridgeRules,
    version: u8,
    all: Vec<Given<'a>>,
}

/// How messages are sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// In one bundle, which begins by deleting all that is there.
    Bundle,
    /// One after the other.
    Singly,
    /// The same with those that are longer than what a bundle holds.
    LongOnes,
    /// So that the daemon judges them and changes nothing.
    Trial,
}

/// What a bridge answered.
#[derive(Debug)]
struct Played {
    /// The rules that it refused, by their transaction id, with its answers.
    errors: BTreeMap<u32, Vec<u8>>,
    /// False where the bundle as a whole was refused: nothing has changed then.
    carried_out: bool,
}

/// The first byte of messages of `OpenFlow15`, that of OpenFlow 1.0 where no version is named.
pub fn version_of(protocol: &str) -> u8 {
    number_of(protocol).unwrap_or(OF10)
}

impl<'a> Giving<'a> {
    /// All groups and flows of a bridge.
    ///
    /// # Errors
    /// Where there is not a message for each of them.
    pub fn new(rules: &'a BridgeRules) -> Result<Self> {
        let groups = rules.messages.groups.each().enumerate();
        let groups = groups.map(|(at, message)| Given { item: Item::Group(at), message });
        let flows = rules.messages.flows.each().enumerate();
        let flows = flows.map(|(at, message)| Given { item: Item::Flow(at), message });
        let mut all: Vec<Given<'a>> = groups.chain(flows).collect();
        if !rules.has_messages() {
            let wanted = rules.groups.len() + rules.flows.len();
            let cause = format!("its rules were kept with {} messages for {wanted} groups and flows", all.len());
            return Err(HostError::new(format!("bridge {}", rules.bridge), cause));
        }
        // Again, whole: rules of the highest version need the group before.
        let places: HashMap<_, _> = rules.messages.groups.each().map(told::group_id).zip(0..).collect();
        let whole = rules.messages.whole_groups.each();
        let place = |message: &[u8]| places.get(&told::group_id(message)).copied();
        all.extend(whole.filter_map(|message| Some(Given { item: Item::Group(place(message)?), message })));
        // What must not overlap with what is there comes before that is there.
        let last = |given: &Given<'_>| match given.item {
            Item::Group(_) => 0,
            Item::Flow(_) if Head::of(given.message).is_some_and(|head| head.flags & told::CHECK_OVERLAP != 0) => 1,
            Item::Flow(_) => 2,
        };
        all.sort_by_key(last);
        Ok(Giving { rules, version: version_of(&rules.protocol), all })
    }

    /// Has the bridge behind `socket` judge all of it and change nothing. What it refuses.
    pub fn try_out(&self, openflow: &RealOpenFlow, socket: &Path, until: Instant) -> Result<Vec<RefusedRule>> {
        let mut refused = Vec::new();
        for version in self.versions() {
            let mut played = self.play(version, Way::Trial, &BTreeSet::new(), socket, until)?;
            played.errors.retain(|_, error| error.get(HEADER..HEADER + 4) != Some(&BUFFER_UNKNOWN));
            let names = openflow.names_of(played.errors.values(), until);
            refused.extend(played.errors.iter().filter_map(|(xid, error)| self.refused(*xid, name(&names, error))));
        }
        Ok(refused)
    }

    /// Gives it to the bridge behind `socket`. A rule that the bridge refuses, and one that needs a rule that is refused
    /// (first of all those in `refused`), is left out and added to `refused`: all others are there afterwards, and nothing
    /// else. Returns false where some rules were given one after the other.
    pub fn put(
        &self,
        openflow: &RealOpenFlow,
        socket: &Path,
        refused: &mut Vec<RefusedRule>,
        until: Instant,
    ) -> Result<bool> {
        let mut left_out = BTreeSet::new();
        self.leave_out_dependents(refused, &mut left_out);
        let bundled = self.version >= OF13 && self.put_bundled(openflow, socket, refused, &mut left_out, until)?;
        if !bundled {
            self.put_singly((self.version, Way::Singly), openflow, socket, refused, &mut left_out, until)?;
            self.remove_others(socket, until)?;
        }
        let mut others = self.versions();
        others.retain(|version| *version != self.version);
        let alone = others.is_empty() && !self.has_long();
        for version in others {
            self.put_singly((version, Way::Singly), openflow, socket, refused, &mut left_out, until)?;
        }
        if self.has_long() && bundled {
            self.put_singly((self.version, Way::LongOnes), openflow, socket, refused, &mut left_out, until)?;
        }
        Ok(bundled && alone)
    }

    fn put_bundled(
        &self,
        openflow: &RealOpenFlow,
        socket: &Path,
        refused: &mut Vec<RefusedRule>,
        left_out: &mut BTreeSet<u32>,
        until: Instant,
    ) -> Result<bool> {
        for _ in 0..ROUNDS {
            let played = self.play(self.version, Way::Bundle, left_out, socket, until)?;
            let known = left_out.len();
            self.leave_out(openflow, &played, refused, left_out, until);
            if played.carried_out {
                return Ok(true);
            }
            if left_out.len() == known {
                break;
            }
        }
        Ok(false)
    }

    fn put_singly(
        &self,
        (version, way): (u8, Way),
        openflow: &RealOpenFlow,
        socket: &Path,
        refused: &mut Vec<RefusedRule>,
        left_out: &mut BTreeSet<u32>,
        until: Instant,
    ) -> Result<()> {
        let played = self.play(version, way, left_out, socket, until)?;
        self.leave_out(openflow, &played, refused, left_out, until);
        Ok(())
    }

    /// The versions of the messages; the highest first, which is there even where it has none.
    fn versions(&self) -> Vec<u8> {
        let all: BTreeSet<u8> = self.all.iter().filter_map(|given| given.message.first().copied()).collect();
        let others = all.into_iter().rev().filter(|version| *version != self.version);
        std::iter::once(self.version).chain(others).collect()
    }

    /// Is there a rule that is longer than what a bundle holds?
    fn has_long(&self) -> bool {
        self.all.iter().any(|given| given.message.first() == Some(&self.version) && is_long(given.message))
    }

    fn refused(&self, xid: u32, reason: String) -> Option<RefusedRule> {
        let given = self.all.get(usize::try_from(xid).ok()?.checked_sub(1)?)?;
        Some(given.item.refused(self.rules, reason))
    }

    fn leave_out(
        &self,
        openflow: &RealOpenFlow,
        played: &Played,
        refused: &mut Vec<RefusedRule>,
        left_out: &mut BTreeSet<u32>,
        until: Instant,
    ) {
        if played.errors.is_empty() {
            return;
        }
        let names = openflow.names_of(played.errors.values(), until);
        for (xid, error) in &played.errors {
            if left_out.insert(*xid) {
                refused.extend(self.refused(*xid, name(&names, error)));
            }
        }
        self.leave_out_dependents(refused, left_out);
    }

    /// The rules that name a group or a meter that is refused, and those that name their groups.
    fn leave_out_dependents(&self, refused: &mut Vec<RefusedRule>, left_out: &mut BTreeSet<u32>) {
        let mut looked = 0;
        while let Some(needed) = refused.get(looked).map(id) {
            looked += 1;
            // Nothing needs a flow.
            let Some(needed) = needed else { continue };
            for (given, xid) in self.all.iter().zip(1..) {
                if names_id(given.item.text(self.rules), &needed) && left_out.insert(xid) {
                    let reason = format!("it needs `{needed}`, which is refused");
                    refused.push(given.item.refused(self.rules, reason));
                }
            }
        }
    }

    /// What a bridge has besides, where it was given its rules one after the other, goes now.
    fn remove_others(&self, socket: &Path, until: Instant) -> Result<()> {
        let mut connection = Connection::open(socket, &[self.version], until)?;
        let of_version = |given: &&Given<'_>| given.message.first() == Some(&self.version);
        let wanted: BTreeSet<_> =
            self.all.iter().filter(of_version).filter_map(|given| told::identity(given.message)).collect();
        let there = told::flows(&mut connection, until)?;
        let others = there.iter().filter(|told| told::identity(&told.message).is_some_and(|it| !wanted.contains(&it)));
        let mut stream: Vec<u8> = others.flat_map(|other| told::deletion(&other.message)).collect();
        let wanted: BTreeSet<[u8; 4]> = self.rules.messages.groups.each().filter_map(told::group_id).collect();
        let there = told::groups(&mut connection, until).unwrap_or_default();
        for id in there.iter().filter_map(|group| told::group_id(group)).filter(|id| !wanted.contains(id)) {
            stream.extend(told::delete_groups(self.version, Some(id), OTHER).unwrap_or_default());
        }
        if stream.is_empty() {
            return Ok(());
        }
        let head = if self.version == OF10 { self.formats() } else { Vec::new() };
        let all = [head, stream, header(self.version, barrier(self.version).0, OTHER)].concat();
        connection.exchange(&all, "removing what is not wanted", until, |message| match kind(message) {
            Some(ERROR) => Err(in_words(message)),
            _ => Ok(messages::is_barrier_reply(message)),
        })
    }

    /// OpenFlow 1.0 with Nicira's matches, in all tables.
    fn formats(&self) -> Vec<u8> {
        let format = extension(OF10, SET_FLOW_FORMAT.0, OTHER, &[&SET_FLOW_FORMAT.1]);
        let tables = extension(OF10, FLOW_MOD_TABLE_ID.0, OTHER, &[&FLOW_MOD_TABLE_ID.1]);
        [format.unwrap_or_default(), tables.unwrap_or_default()].concat()
    }

    /// Sends the messages of a version and waits until all of it is done or refused.
    fn play(&self, version: u8, way: Way, left_out: &BTreeSet<u32>, socket: &Path, until: Instant) -> Result<Played> {
        let object = socket.display().to_string();
        let mut connection = Connection::open(socket, &[version], until)?;
        let (stream, last) = self.stream(version, way, left_out);
        let count = u32::try_from(self.all.len()).unwrap_or(OTHER);
        let mut played = Played { errors: BTreeMap::new(), carried_out: true };
        let mut failed = None;
        let doing = "giving the bridge its rules";
        connection.exchange(&stream, doing, until, |message| {
            let xid = xid(message).unwrap_or_default();
            match kind(message) {
                Some(ERROR) if (1..=count).contains(&xid) => drop(played.errors.insert(xid, message.to_vec())),
                Some(ERROR) if xid == last && way == Way::Bundle => {
                    played.carried_out = false;
                    return Ok(true);
                }
                Some(ERROR) => {
                    failed = Some(in_words(message));
                    return Ok(true);
                }
                // Its answer has the number of the request.
                _ => {
                    return Ok(xid == last && (messages::is_barrier_reply(message) || bundle_control(message).is_some()))
                }
            }
            Ok(false)
        })?;
        match failed {
            None => Ok(played),
            Some(error) => Err(error).about(&object),
        }
    }

    /// The messages of a version, and the transaction id of the last one, which is answered.
    fn stream(&self, version: u8, way: Way, left_out: &BTreeSet<u32>) -> (Vec<u8>, u32) {
        let bundles = version >= OF13 && matches!(way, Way::Bundle | Way::Trial);
        let mut others = OTHER..;
        let mut next = || others.next().unwrap_or(OTHER);
        let mut stream = if version == OF10 { self.formats() } else { Vec::new() };
        if bundles {
            stream.extend(messages::control(version, Bundle::Open, next()).unwrap_or_default());
        }
        if way == Way::Bundle {
            for delete in [told::delete_all_flows(version, next()), told::delete_groups(version, None, next())] {
                stream.extend(delete.and_then(|delete| in_bundle(&delete)).unwrap_or_default());
            }
        }
        let now_ms = monotonic_ms();
        let mut inside = 0;
        for (given, xid) in self.all.iter().zip(1..) {
            let other_way = match way {
                Way::Bundle | Way::Trial => bundles && is_long(given.message),
                Way::LongOnes => !is_long(given.message),
                Way::Singly => false,
            };
            if given.message.first() != Some(&version) || left_out.contains(&xid) || other_way {
                continue;
            }
            let message = self.given_now(given, xid, now_ms);
            if !bundles {
                match (way, given.item) {
                    (Way::Trial, Item::Flow(_)) => stream.extend(without_effect(&message)),
                    // There is no way to try a group.
                    (Way::Trial, Item::Group(_)) => {}
                    _ => stream.extend(add_or_modify(&message)),
                }
                continue;
            }
            if way == Way::Trial && inside == BUNDLE_RULES {
                // The daemon keeps what is in a bundle beside its rules, and may live under a limit of memory.
                for what in [Bundle::Discard, Bundle::Open] {
                    stream.extend(messages::control(version, what, next()).unwrap_or_default());
                }
                inside = 0;
            }
            inside += 1;
            stream.extend(in_bundle(&message).unwrap_or_default());
        }
        let last = next();
        stream.extend(match (bundles, way) {
            (true, Way::Bundle) => messages::control(version, Bundle::Commit, last).unwrap_or_default(),
            (true, _) => messages::control(version, Bundle::Discard, last).unwrap_or_default(),
            (false, _) => header(version, barrier(version).0, last),
        });
        (stream, last)
    }

    /// The message with its number, and with what is left of a `hard_timeout`: a second at least, begun ones count.
    fn given_now(&self, given: &Given<'_>, xid: u32, now_ms: u64) -> Vec<u8> {
        let mut message = numbered(given.message, xid);
        let Item::Flow(at) = given.item else { return message };
        if let Some(end_ms) = self.rules.messages.ends.get(&at) {
            let left_s = end_ms.saturating_sub(now_ms).div_ceil(1000).max(1);
            told::set_hard_timeout(&mut message, u16::try_from(left_s).unwrap_or(u16::MAX));
        }
        message
    }
}

/// Is the message longer than what a bundle holds? 24 bytes come around it at most.
fn is_long(message: &[u8]) -> bool {
    message.len() + 24 > usize::from(u16::MAX)
}

/// How the actions of others name a group or a meter.
fn id(refused: &RefusedRule) -> Option<String> {
    let (_, number) = first_field(&refused.rule).split_once('=')?;
    matches!(refused.kind.as_str(), "group" | "meter").then(|| format!("{}:{number}", refused.kind))
}

/// Does the text name this group or meter (`group:5`), and not one whose number begins with it?
fn names_id(text: &str, id: &str) -> bool {
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_digit());
    text.match_indices(id).any(|(at, _)| text.get(at + id.len()..).is_some_and(ends))
}

/// An error's name, as ovs-ofctl knows it.
pub fn name(names: &BTreeMap<Vec<u8>, String>, error: &[u8]) -> String {
    names.get(code(error)).cloned().unwrap_or_else(|| in_words(error))
}

/// What of an error says which it is: type and code; from OpenFlow 1.2 on the experimenter's number behind 0xffff, before
/// it that and his type and code behind NXET_VENDOR (include/openflow/nicira-ext.h).
pub fn code(error: &[u8]) -> &[u8] {
    let length = match error.get(HEADER..HEADER + 2) {
        Some(&[0xff, 0xff]) => 8,
        Some(&[0xb0, 0xc2]) => 12,
        _ => 4,
    };
    error.get(HEADER..(HEADER + length).min(error.len())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::messages::{
        inner, is_commit, message, Inbox, BUNDLE_ADD, BUNDLE_CONTROL, EXPERIMENTER, FLOW_MOD, GROUP_MOD, HELLO, OF15,
    };
    use super::*;
    use crate::host::messages::{each, Messages, Stream};
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// A FLOW_MOD of this version, for a rule of this priority.
    fn flow(version: u8, priority: u8, flags: u8) -> Vec<u8> {
        let head = [&[0; 16][..], &[3, 0, 0, 60, 0, 60, 0, priority], &[0xff; 12], &[0, flags, 0, 0]].concat();
        let matched = [0, 1, 0, 4, 0, 0, 0, 0];
        match version {
            OF10 => {
                let body = [&[0; 8][..], &[3, 0, 0, 60, 0, 60, 0, priority], &[0xff; 6], &[0, flags], &[0; 8]];
                extension(OF10, messages::FLOW_MOD_SUBTYPE, 0, &body).unwrap()
            }
            _ => message(version, FLOW_MOD, 0, &[&head, &matched]).unwrap(),
        }
    }

    fn group(id: u8) -> Vec<u8> {
        message(OF15, GROUP_MOD, 0, &[&[0, 0, 0, 0, 0, 0, 0, id], &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]]).unwrap()
    }

    /// Two groups and three flows, of which the second needs the first group and the last is of OpenFlow 1.0.
    fn rules() -> BridgeRules {
        let text = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect();
        BridgeRules {
            bridge: "br0".into(),
            protocol: "OpenFlow15".into(),
            groups: text(&["group_id=1,type=all", "group_id=12,type=all"]),
            flows: text(&["priority=1 actions=drop", "priority=2 actions=group:1", "priority=3 actions=group:12"]),
            messages: Messages {
                groups: Stream::new([group(1), group(12)].concat()),
                flows: Stream::new([flow(OF15, 1, 0), flow(OF15, 2, 0), flow(OF10, 3, 0)].concat()),
                ..Messages::default()
            },
            ..BridgeRules::default()
        }
    }

    /// What was carried out, and the priorities of what was deleted.
    type Done = (Vec<u32>, Vec<u8>);

    /// A bridge that refuses some messages, when they come or when their bundle is committed. It has a flow of priority 9
    /// that nobody wants. Returns, for each connection, the transaction ids of the rules that were carried out, and the
    /// priorities of what was deleted.
    fn stubborn(
        listener: UnixListener,
        at_once: &'static [u32],
        at_commit: &'static [u32],
        without_name: bool,
        connections: usize,
    ) -> std::thread::JoinHandle<Vec<Done>> {
        let error = |version: u8, xid: u32| message(version, ERROR, xid, &[&[0, 5, 0, 1]]).unwrap();
        std::thread::spawn(move || {
            let mut all = Vec::new();
            for _ in 0..connections {
                let (mut stream, _) = listener.accept().unwrap();
                let (mut inbox, mut bundle, mut done, mut deleted) =
                    (Inbox::default(), Vec::new(), Vec::new(), Vec::new());
                while inbox.read(&mut stream).is_ok_and(|read| read != Some(0)) {
                    while let Some(said) = inbox.next().unwrap() {
                        let (version, xid) = (said[0], xid(&said).unwrap());
                        let is_rule = xid < OTHER;
                        let is_old_flow = said[1] == EXPERIMENTER && said.len() >= 48;
                        let answers = match said[1] {
                            HELLO => vec![said.clone()],
                            BUNDLE_ADD if at_once.contains(&xid) => vec![error(version, xid)],
                            FLOW_MOD | GROUP_MOD if is_rule && at_commit.contains(&xid) => vec![error(version, xid)],
                            FLOW_MOD if said[25] == 4 => {
                                deleted.push(said[31]);
                                vec![]
                            }
                            FLOW_MOD | GROUP_MOD => {
                                done.push(xid);
                                vec![]
                            }
                            EXPERIMENTER if is_old_flow => {
                                done.push(xid);
                                vec![]
                            }
                            EXPERIMENTER => vec![],
                            BUNDLE_ADD => {
                                bundle.push(xid);
                                vec![]
                            }
                            // All flows: one that nobody wants, and one that is there already.
                            18 if version == OF15 && said[9] == 1 => {
                                let entry = |priority: u8| {
                                    let head = [0, 40, 0, 0, 3, 0, 0, priority, 0, 60, 0, 60, 0, 0, 0, 0];
                                    [&head[..], &[0; 8], &[0, 1, 0, 4, 0, 0, 0, 0], &[0, 0, 0, 4, 0, 0, 0, 0]].concat()
                                };
                                let reply = [&[0, 1, 0, 0, 0, 0, 0, 0][..], &entry(9), &entry(1)].concat();
                                vec![message(version, 19, xid, &[&reply]).unwrap()]
                            }
                            18 if version == OF15 => vec![message(version, 19, xid, &[&said[8..16]]).unwrap()],
                            _ if is_commit(&said) => match bundle.iter().find(|xid| at_commit.contains(xid)) {
                                Some(_) if without_name => vec![error(version, xid)],
                                Some(bad) => vec![error(version, *bad), error(version, xid)],
                                None => {
                                    done = std::mem::take(&mut bundle);
                                    vec![messages::answer(&said, BUNDLE_CONTROL)]
                                }
                            },
                            BUNDLE_CONTROL => vec![messages::answer(&said, BUNDLE_CONTROL)],
                            _ if messages::is_barrier(&said) => vec![messages::answer(&said, barrier(version).1)],
                            _ => vec![],
                        };
                        for answer in answers {
                            let _gone = stream.write_all(&answer);
                        }
                    }
                }
                done.retain(|xid| *xid < OTHER);
                all.push((done, deleted));
            }
            all
        })
    }

    fn put(
        at_once: &'static [u32],
        at_commit: &'static [u32],
        without_name: bool,
        connections: usize,
    ) -> (bool, Vec<String>, Vec<Done>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("br0.mgmt");
        let bridge = stubborn(UnixListener::bind(&path).unwrap(), at_once, at_commit, without_name, connections);
        let (rules, mut refused) = (rules(), Vec::new());
        let openflow = RealOpenFlow::new(dir.path());
        let bundled = Giving::new(&rules).unwrap().put(&openflow, &path, &mut refused, soon()).unwrap();
        let refused = refused.iter().map(|refused| format!("{}: {}", refused.rule, refused.reason)).collect();
        (bundled, refused, bridge.join().unwrap())
    }

    #[test]
    fn rules_of_another_version_follow_the_bundle() {
        let (bundled, refused, done) = put(&[], &[], false, 2);
        assert!(!bundled && refused.is_empty(), "{refused:?}");
        // What the bundle deletes has no number of a rule.
        assert_eq!(done, [(vec![1, 2, 3, 4], vec![]), (vec![5], vec![])]);
    }

    #[test]
    fn a_rule_that_is_refused_as_it_comes_costs_no_other() {
        let (_, refused, done) = put(&[3], &[], false, 2);
        assert!(refused.len() == 1 && refused[0].starts_with("priority=1 actions=drop: "), "{refused:?}");
        assert_eq!(done, [(vec![1, 2, 4], vec![]), (vec![5], vec![])]);
    }

    #[test]
    fn a_rule_that_the_commit_refuses_is_left_out_with_those_that_need_it() {
        let (_, refused, done) = put(&[], &[1], false, 3);
        let [group, flow] = &refused[..] else { panic!("{refused:?}") };
        assert!(group.starts_with("group_id=1,type=all: "), "{group}");
        assert!(flow.starts_with("priority=2 actions=group:1: it needs `group:1`"), "{flow}");
        assert_eq!(done, [(vec![], vec![]), (vec![2, 3], vec![]), (vec![5], vec![])]);
    }

    #[test]
    fn a_bundle_that_is_refused_for_no_message_of_its_own_is_added_singly_and_what_else_is_there_goes() {
        let (bundled, refused, done) = put(&[], &[4], true, 4);
        assert!(!bundled);
        assert!(refused.len() == 1 && refused[0].starts_with("priority=2 actions=group:1: "), "{refused:?}");
        assert_eq!(done, [(vec![], vec![]), (vec![1, 2, 3], vec![]), (vec![], vec![9]), (vec![5], vec![])]);
    }

    #[test]
    fn what_is_tried_is_thrown_away_a_few_rules_at_a_time() {
        let count = 2 * BUNDLE_RULES + 1;
        let rules = BridgeRules {
            protocol: "OpenFlow15".into(),
            flows: vec![String::new(); count],
            messages: Messages { flows: Stream::new(flow(OF15, 1, 0).repeat(count)), ..Messages::default() },
            ..BridgeRules::default()
        };
        let (tried, last) = Giving::new(&rules).unwrap().stream(OF15, Way::Trial, &BTreeSet::new());
        let (mut inside, mut most, mut added, mut kinds) = (0, 0, 0, Vec::new());
        for message in each(&tried) {
            if let Some(at) = bundle_control(message) {
                kinds.push(message[at]);
                inside = 0;
            }
            inside += usize::from(inner(message).is_some());
            added += usize::from(inner(message).is_some());
            most = most.max(inside);
        }
        // Opened (0) and thrown away (6) in turn.
        assert_eq!(kinds, [0, 6, 0, 6, 0, 6]);
        assert_eq!((most, added), (BUNDLE_RULES, count));
        assert_eq!(each(&tried).last().and_then(xid), Some(last));
    }

    #[test]
    fn what_must_not_overlap_is_given_before_what_may() {
        let rules = BridgeRules {
            protocol: "OpenFlow15".into(),
            flows: vec!["a".into(), "b".into()],
            messages: Messages {
                flows: Stream::new([flow(OF15, 1, 0), flow(OF15, 2, 2)].concat()),
                ..Messages::default()
            },
            ..BridgeRules::default()
        };
        let giving = Giving::new(&rules).unwrap();
        let (stream, _) = giving.stream(OF15, Way::Singly, &BTreeSet::new());
        let given: Vec<u16> =
            each(&stream).filter(|it| it[1] == FLOW_MOD).map(|it| Head::of(it).unwrap().priority).collect();
        assert_eq!(given, [2, 1]);
        assert_eq!(giving.refused(1, String::new()).unwrap().rule, "b");
    }

    #[test]
    fn a_hard_timeout_is_what_is_left_of_it_when_the_rule_is_given() {
        let now = monotonic_ms();
        let mut rules = rules();
        rules.messages.ends = BTreeMap::from([(0, now + 41_500), (1, now.saturating_sub(5_000)), (2, now + 7_000)]);
        let giving = Giving::new(&rules).unwrap();
        let left = |version: u8| -> Vec<u16> {
            let (stream, _) = giving.stream(version, Way::Singly, &BTreeSet::new());
            let flows = each(&stream).filter(|message| messages::is_flow_mod(message));
            flows.map(|flow| Head::of(flow).unwrap().hard_timeout).collect()
        };
        // A second is begun; what has ended meanwhile gets one.
        assert_eq!((left(OF15), left(OF10)), (vec![42, 1], vec![7]));
    }

    #[test]
    fn a_group_that_the_highest_version_does_not_tell_whole_is_given_again() {
        let mut rules = rules();
        let whole = extension(OF10, messages::GROUP_MOD_SUBTYPE, 0, &[&[0, 0, 1, 0, 0, 0, 0, 12], &[0; 8]]).unwrap();
        rules.messages.whole_groups = Stream::new(whole);
        let giving = Giving::new(&rules).unwrap();
        let (stream, _) = giving.stream(OF10, Way::Singly, &BTreeSet::new());
        let given: Vec<&[u8]> = each(&stream).filter(|message| xid(message) < Some(OTHER)).collect();
        // The group first, added or changed; then the flow of that version.
        assert_eq!((given.len(), &given[0][16..18]), (2, &[0x80, 0][..]));
        assert_eq!(giving.refused(xid(given[0]).unwrap(), String::new()).unwrap().rule, "group_id=12,type=all");
    }

    #[test]
    fn a_message_for_each_rule_or_nothing() {
        let mut rules = rules();
        rules.flows.pop();
        assert!(Giving::new(&rules).is_err());
    }

    #[test]
    fn a_rule_that_is_too_long_for_a_bundle_is_given_beside_it() {
        let long = message(OF15, FLOW_MOD, 0, &[&flow(OF15, 1, 0)[8..], &vec![0; 0xffff - 64]]).unwrap();
        let rules = BridgeRules {
            protocol: "OpenFlow15".into(),
            flows: vec!["a".into(), "b".into()],
            messages: Messages { flows: Stream::new([flow(OF15, 2, 0), long].concat()), ..Messages::default() },
            ..BridgeRules::default()
        };
        let giving = Giving::new(&rules).unwrap();
        assert!(giving.has_long());
        let (stream, _) = giving.stream(OF15, Way::Bundle, &BTreeSet::new());
        assert_eq!(each(&stream).filter_map(inner).filter(|inner| xid(inner) < Some(OTHER)).count(), 1);
        // The other is not given twice.
        let (stream, _) = giving.stream(OF15, Way::LongOnes, &BTreeSet::new());
        let numbers: Vec<_> = each(&stream).filter_map(xid).filter(|xid| *xid < OTHER).collect();
        assert_eq!(numbers, [2]);
    }

    #[test]
    fn an_error_is_known_by_its_code_whoever_has_defined_it() {
        // As OVS 3.1 sends them: OFPBAC_BAD_OUT_GROUP and NXFMFC_INVALID_TLV_FIELD, each with the message behind it.
        let standard = [6, 1, 0, 16, 0, 0, 0, 0x13, 0, 2, 0, 9, 6, 34, 0, 88];
        let nicira = [6, 1, 0, 20, 0, 0, 0, 0x15, 0xff, 0xff, 0, 0x25, 0, 0, 0x23, 0x20, 6, 34, 0, 80];
        assert_eq!(code(&standard), [0, 2, 0, 9]);
        assert_eq!(code(&nicira), [0xff, 0xff, 0, 0x25, 0, 0, 0x23, 0x20]);
        assert_eq!(code(&standard[..9]), [0]);
    }

    #[test]
    fn a_group_is_needed_by_its_whole_number() {
        assert!(names_id("actions=group:1,output:2", "group:1") && names_id("actions=group:1", "group:1"));
        assert!(!names_id("actions=group:12", "group:1"));
    }
}

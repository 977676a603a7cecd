//! Reads what a bridge has: as bytes, in the version in which it tells each flow as it has it.
//!
//! A flow that one version of OpenFlow has added another may tell as another flow, or with other words (see
//! [`super::faithful`]). So the daemon's own text is asked for as well, and each flow is taken from the highest version
//! whose message `ovs-ofctl` prints in the daemon's own words. Where no version does, the highest counts that means the
//! same. What is left cannot be put back.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::Instant;

use nix::time::{clock_gettime, ClockId};

use super::connection::Connection;
use super::faithful::{self, actions, key, same_meaning};
use super::groups;
use super::messages::{OF10, OF13, OF14, OF15};
use super::openflow::{parse_groups, parse_meters, parse_tlv_map, RealOpenFlow};
use super::printed::{self, Printed};
use super::told::{self, set_flags, Head, Told, CHECK_OVERLAP, RESET_COUNTS};
use super::unixctl;
use crate::host::messages::{Messages, Stream};
use crate::host::{Bridge, BridgeRules, Daemon, HostError, RefusedRule, Result};

/// Rules that change while they are compared look as if they were told wrongly: they are compared so often.
const COMPARISONS: u32 = 3;
/// What a bridge that has no groups, as it knows no such message, may say (OFPBRC_BAD_TYPE, _BAD_STAT, _BAD_SUBTYPE).
const UNKNOWN: [&str; 3] = [" type 1 code 1", " type 1 code 2", " type 1 code 4"];

/// The versions that a bridge may speak, as the first byte of their messages.
pub fn versions(bridge: &Bridge) -> Vec<u8> {
    let known = OF10..=OF15;
    match bridge.protocols.is_empty() {
        true => known.collect(),
        false => bridge.protocols.iter().filter_map(|name| number_of(name)).filter(|one| known.contains(one)).collect(),
    }
}

/// 6 for `OpenFlow15`: the first byte of its messages.
pub fn number_of(name: &str) -> Option<u8> {
    name.strip_prefix("OpenFlow1")?.parse::<u8>().ok()?.checked_add(OF10)
}

/// `OpenFlow15` for 6.
pub fn name_of(version: u8) -> String {
    format!("OpenFlow1{}", version.saturating_sub(OF10))
}

/// `OpenFlow 1.5` for 6.
pub fn in_words(version: u8) -> String {
    format!("OpenFlow 1.{}", version.saturating_sub(OF10))
}

/// Reads one bridge of `daemon`; its flows only where `known` does not have them.
pub fn bridge(
    openflow: &RealOpenFlow,
    daemon: &Daemon,
    bridge: &Bridge,
    known: Option<&BridgeRules>,
    until: Instant,
) -> Result<BridgeRules> {
    let socket = openflow.socket(&bridge.name);
    let mut connection = Connection::open(&socket, &versions(bridge), until)?;
    let mut rules = small_tables(openflow, &mut connection, &bridge.name, until)?;
    let look = Look { openflow, daemon, bridge, socket: &socket, until };
    groups::settle(&mut rules, || look.old_groups(), |questions| look.traces(questions))?;
    if let Some(known) = known {
        rules.flows.clone_from(&known.flows);
        rules.untold.extend(known.untold.iter().filter(|untold| untold.kind == "flow").cloned());
        rules.messages.flows = known.messages.flows.clone();
        rules.messages.ends.clone_from(&known.messages.ends);
        return Ok(rules);
    }
    let mut found = look.flows(&mut connection)?;
    for _ in 1..COMPARISONS {
        if found.untold.is_empty() {
            break;
        }
        let before = std::mem::take(&mut found.untold);
        found = look.flows(&mut connection)?;
        found.untold.retain(|rule| before.iter().any(|before| before.rule == rule.rule));
    }
    look.must_be_readable(&found.untold)?;
    rules.flows = found.texts;
    rules.untold.extend(found.untold);
    (rules.messages.flows, rules.messages.ends) = (Stream::new(found.messages), found.ends);
    Ok(rules)
}

/// Groups, meters and TLV map.
fn small_tables(
    openflow: &RealOpenFlow,
    connection: &mut Connection,
    bridge: &str,
    until: Instant,
) -> Result<BridgeRules> {
    let unknown = |error: &HostError| UNKNOWN.iter().any(|word| error.cause.ends_with(word));
    let groups = match told::groups(connection, until) {
        Err(error) if connection.version() == OF10 && unknown(&error) => Vec::new(),
        groups => groups?,
    };
    let (meters, tlv_map) = (told::meters(connection, until)?, told::tlv_map(connection, until)?);
    let all = [&groups, &meters, &tlv_map];
    let printed = match all.iter().all(|messages| messages.is_empty()) {
        true => String::new(),
        // The words of dumps: `OFPT_METER_MOD (OF1.5) (xid=0x2): ADD meter=3 kbps bands=`, ` ADD group_id=3,type=all`.
        false => openflow
            .print(&all.map(|messages| messages.concat()).concat(), until)?
            .replace("): ADD meter=", "):\nmeter=")
            .replace(" ADD group_id=", " group_id="),
    };
    let rules = BridgeRules {
        bridge: bridge.to_owned(),
        protocol: name_of(connection.version()),
        groups: parse_groups(&printed),
        meters: parse_meters(&printed),
        tlv_map: parse_tlv_map(&printed),
        ..BridgeRules::default()
    };
    let told = [
        ("groups", groups.len(), rules.groups.len()),
        ("meters", meters.len(), rules.meters.len()),
        ("mappings of the TLV map", tlv_map.len(), rules.tlv_map.len()),
    ];
    if let Some((what, told, read)) = told.into_iter().find(|(_, told, read)| told != read) {
        let cause = format!("it tells {told} {what}, of which the installed ovs-ofctl can read {read}");
        return Err(connection.error(cause).remedy("install the version of Open vSwitch that runs"));
    }
    let stream = |messages: Vec<Vec<u8>>| Stream::new(messages.concat());
    let messages =
        Messages { groups: stream(groups), meters: stream(meters), tlv_map: stream(tlv_map), ..Messages::default() };
    Ok(BridgeRules { messages, ..rules })
}

/// One look at a bridge.
struct Look<'a> {
    openflow: &'a RealOpenFlow,
    daemon: &'a Daemon,
    bridge: &'a Bridge,
    socket: &'a Path,
    until: Instant,
}

/// The flows as they are told faithfully.
#[derive(Default)]
struct Found {
    texts: Vec<String>,
    messages: Vec<u8>,
    ends: BTreeMap<usize, u64>,
    untold: Vec<RefusedRule>,
}

/// What a version tells.
struct Telling {
    version: u8,
    /// CLOCK_MONOTONIC, milliseconds, when it was told.
    at_ms: u64,
    told: Vec<Told>,
    printed: printed::All,
    /// By a hash of the key of their rule, in the order of it.
    by_key: Vec<(u64, usize)>,
    /// Those that are a flow of the daemon's already.
    taken: Vec<bool>,
}

impl Look<'_> {
    /// Its groups in OpenFlow 1.0, where it speaks that.
    fn old_groups(&self) -> Result<Option<BridgeRules>> {
        if !versions(self.bridge).contains(&OF10) {
            return Ok(None);
        }
        let connection = Connection::open_if_spoken(self.socket, &[OF10], self.until)?;
        connection.map(|mut it| small_tables(self.openflow, &mut it, &self.bridge.name, self.until)).transpose()
    }

    /// What the daemon does to packets in groups. What it does not trace shows nothing.
    fn traces(&self, questions: &[groups::Question]) -> Result<Vec<String>> {
        let asked = questions
            .iter()
            .map(|(packet, group)| ("ofproto/trace-packet-out", serde_json::json!([self.bridge.name, packet, group])));
        match unixctl::commands(self.daemon, &asked.collect::<Vec<_>>(), self.until) {
            Err(error) if error.away || error.timed_out => Err(error),
            Err(error) => {
                tracing::warn!("tracing groups of bridge {}: {error}", self.bridge.name);
                Ok(vec![String::new(); questions.len()])
            }
            answers => answers,
        }
    }

    fn flows(&self, connection: &mut Connection) -> Result<Found> {
        let highest = self.telling(connection, |_| true)?;
        // Asked afterwards: what went meanwhile is in neither, and what came is looked for again.
        let own = unixctl::command(self.daemon, "bridge/dump-flows", &[&self.bridge.name], self.until)?;
        let mut choice = Choice::new(&own, highest);
        let mut others: Vec<u8> = versions(self.bridge);
        others.retain(|version| *version < connection.version());
        others.sort_by_key(|version| rank(*version));
        for version in others {
            let wanted = choice.wanted(version);
            if wanted.is_empty() {
                continue;
            }
            let other = Connection::open_if_spoken(self.socket, &[version], self.until)?;
            let Some(mut connection) = other else { continue };
            let is_wanted = |head: &Head| wanted.contains(&(head.table, head.priority, head.cookie));
            choice.add(self.telling(&mut connection, is_wanted)?);
        }
        Ok(choice.made(&self.bridge.name))
    }

    /// Asks for all flows; those that are `wanted` are looked at.
    fn telling(&self, connection: &mut Connection, wanted: impl Fn(&Head) -> bool) -> Result<Telling> {
        let mut told = told::flows(connection, self.until)?;
        let at_ms = monotonic_ms();
        told.retain(|told| Head::of(&told.message).is_some_and(|head| wanted(&head)));
        let printed = printed::flows(self.openflow, told.iter().map(|told| &*told.message), self.until)?;
        // Whose they are, their match says alone.
        let undecoded = told.iter().enumerate().filter(|(at, _)| matches!(printed.get(*at), Printed::Not(_)));
        let bare: Vec<Vec<u8>> = undecoded.map(|(_, told)| told::without_instructions(&told.message)).collect();
        let bare = printed::flows(self.openflow, bare.iter().map(Vec::as_slice), self.until)?;
        Ok(Telling::new(connection.version(), at_ms, told, printed, &bare))
    }

    /// Flows that the installed ovs-ofctl does not know are another matter than those that no version tells.
    fn must_be_readable(&self, untold: &[RefusedRule]) -> Result<()> {
        let rules: Vec<String> = untold.iter().map(|untold| untold.rule.clone()).collect();
        if rules.is_empty() {
            return Ok(());
        }
        match self.openflow.unreadable_of(&self.bridge.name, rules, self.until)?.into_iter().next() {
            None => Ok(()),
            Some(refused) => Err(HostError::new(
                format!("bridge {}", refused.bridge),
                format!("ovs-ofctl cannot read {} `{}`: {}", refused.kind, refused.rule, refused.reason),
            )),
        }
    }
}

/// In this order other versions are asked: 1.4 and 1.3 tell most of what 1.5 says with other words (`load`, which comes
/// back as `set_field`), and 1.0 what no later version has.
fn rank(version: u8) -> u8 {
    match version {
        OF14 => 0,
        OF10 => 1,
        other => 8 - other,
    }
}

/// Milliseconds of the clock that the daemon counts time-outs by.
pub fn monotonic_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).ok();
    now.and_then(|now| u64::try_from(now.tv_sec() * 1000 + now.tv_nsec() / 1_000_000).ok()).unwrap_or_default()
}

/// Which telling of each flow is taken.
struct Choice<'a> {
    own: Vec<Own<'a>>,
    /// The highest version first.
    tellings: Vec<Telling>,
}

/// A flow in the daemon's own words.
struct Own<'a> {
    line: &'a str,
    /// The hash of its key.
    key: u64,
    /// The telling, and the place in it, whose words are the same.
    exact: Option<(usize, usize)>,
}

/// Tens of thousands of keys are kept: none is a text. Two flows that share a hash have other words.
fn hash(key: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

/// Does a match, and do these actions, say what is looked for?
type Means<'a> = dyn Fn(&str, &str) -> bool + 'a;

impl<'a> Choice<'a> {
    /// Of the flows in the daemon's text.
    fn new(own: &'a str, highest: Telling) -> Self {
        let own = faithful::own_lines(own).map(|(line, key)| Own { line, key: hash(&key), exact: None }).collect();
        let mut choice = Choice { own, tellings: Vec::new() };
        choice.add(highest);
        choice
    }

    fn add(&mut self, mut telling: Telling) {
        let number = self.tellings.len();
        // Of flows that share a key each gets first the one with its own option: another's would be told twice.
        for with_options in [true, false] {
            for own in self.own.iter_mut().filter(|own| own.exact.is_none()) {
                let (words, tag) = (actions(own.line), faithful::tag(own.line));
                let is_it = |matched: &str, said: &str| {
                    said == words
                        && faithful::tag(matched) == tag
                        && (!with_options || faithful::same_options(own.line, matched))
                };
                own.exact = telling.take(own.key, is_it).map(|at| (number, at));
            }
        }
        self.tellings.push(telling);
    }

    /// Table, priority and cookie of the flows that this version should tell: those that the highest tells in other words,
    /// and for the time of their last change those with a `hard_timeout`. A flow that the highest does not tell at all has
    /// come since.
    fn wanted(&self, version: u8) -> BTreeSet<(u8, u16, u64)> {
        let Some(highest) = self.tellings.first() else { return BTreeSet::new() };
        let pending = self.own.iter().filter(|own| own.exact.is_none());
        let pending: BTreeSet<(u8, u16)> = pending.map(|own| faithful::place(own.line)).collect();
        let is_wanted = |head: &Head, taken: bool| {
            let other = !taken && pending.contains(&(head.table, head.priority));
            other || head.hard_timeout != 0 && version == OF10
        };
        let told = highest.told.iter().zip(&highest.taken);
        let heads = told.filter_map(|(told, taken)| Some((Head::of(&told.message)?, *taken)));
        let wanted = heads.filter(|(head, taken)| is_wanted(head, *taken));
        wanted.map(|(head, _)| (head.table, head.priority, head.cookie)).collect()
    }

    fn made(mut self, bridge: &str) -> Found {
        let own = std::mem::take(&mut self.own);
        let beside = self.tellings.first().map(Telling::beside).unwrap_or_default();
        let mut found = Found::default();
        for own in own {
            let exact = own.exact.and_then(|(telling, at)| self.taken(&own, telling, at, &beside));
            match exact.or_else(|| self.alike(&own, &beside)) {
                Some(Taken { text, message, end_ms }) => {
                    found.ends.extend(end_ms.map(|end| (found.texts.len(), end)));
                    found.texts.push(text);
                    found.messages.extend(message);
                }
                None => {
                    let reason = self.reason(&own);
                    let (bridge, kind) = (bridge.to_owned(), "flow".to_owned());
                    found.untold.push(RefusedRule { bridge, kind, rule: faithful::own_flow(own.line), reason });
                }
            }
        }
        found
    }

    /// A telling with other words of the same meaning.
    fn alike(&mut self, own: &Own<'_>, beside: &Beside) -> Option<Taken> {
        let words = actions(own.line);
        let key = key(&faithful::own_flow(own.line));
        let own_options = |matched: &str| faithful::same_options(own.line, matched);
        let same = |said: &str| said == words;
        let means_the_same = |said: &str| same_meaning(&key, words, said);
        let ways: [&Means<'_>; 4] = [
            &|matched, said| same(said) && own_options(matched),
            &|matched, said| means_the_same(said) && own_options(matched),
            &|_, said| same(said),
            &|_, said| means_the_same(said),
        ];
        let count = self.tellings.len();
        for (way, number) in ways.iter().flat_map(|way| (0..count).map(move |number| (way, number))) {
            let at = self.tellings.get_mut(number).and_then(|telling| telling.take(own.key, way));
            let taken = at.and_then(|at| self.taken(own, number, at, beside));
            if taken.is_some() {
                return taken;
            }
        }
        None
    }

    /// The flow as the telling has it; `None` where its version has not all that belongs to it.
    fn taken(&self, own: &Own<'_>, telling: usize, at: usize, beside: &Beside) -> Option<Taken> {
        let (highest, from) = (self.tellings.first()?, self.tellings.get(telling)?);
        let told = from.told.get(at)?;
        let mut message = told.message.clone();
        // Flags are told from 1.3 on, importance from 1.4 on.
        if from.version < highest.version && highest.version >= OF13 {
            let (flags, importance) = highest.flags(own.key, &Head::of(&message)?, beside)?;
            // What must not overlap comes first, which rules of other versions do not.
            if flags & CHECK_OVERLAP != 0 || !set_flags(&mut message, flags, importance) {
                return None;
            }
        }
        let head = Head::of(&message)?;
        let Printed::Flow { matched, actions } = from.printed.get(at) else { return None };
        let end_ms = (head.hard_timeout != 0).then(|| {
            let age_ms = self.age_ms(own, from, told);
            from.at_ms.saturating_sub(age_ms) + 1000 * u64::from(head.hard_timeout)
        });
        Some(Taken { text: printed::text(&head, matched, actions), message, end_ms })
    }

    /// How long the flow is unchanged, by the clock at which `from` was told. 1.0 tells that in seconds; how long it is
    /// there, all tell.
    fn age_ms(&self, own: &Own<'_>, from: &Telling, told: &Told) -> u64 {
        let made_ms = |telling: &Telling, told: &Told| telling.at_ms.saturating_sub(told.duration_ms);
        let old = self.tellings.iter().find(|telling| telling.version == OF10);
        let same = old.into_iter().flat_map(|old| {
            let all = old.of_key(own.key);
            all.filter_map(move |at| Some((old, old.told.get(at)?)))
        });
        let same = same.min_by_key(|(old, other)| made_ms(old, other).abs_diff(made_ms(from, told)));
        let Some((old, age_s)) = same.and_then(|(old, told)| Some((old, told.hard_age_s?))) else {
            return told.duration_ms;
        };
        let passed_ms = old.at_ms.saturating_sub(from.at_ms);
        let age_ms = (1000 * age_s).saturating_sub(passed_ms);
        // Unchanged since it was made: that is told to the millisecond.
        if told.duration_ms.abs_diff(age_ms) <= 1100 {
            told.duration_ms
        } else {
            age_ms
        }
    }

    /// Why no version's telling is taken, as the highest has it.
    fn reason(&self, own: &Own<'_>) -> String {
        let Some(highest) = self.tellings.first() else { return String::new() };
        let version = in_words(highest.version);
        let said = highest.of_key(own.key).next().map(|at| highest.printed.get(at));
        let told = match said {
            Some(Printed::Flow { actions, .. }) => {
                format!("{version} tells it as `actions={actions}`, which is another rule")
            }
            Some(Printed::Not(error)) => format!("{version} does not take what it tells: {error}"),
            None => match highest.unreadable_at(faithful::place(own.line)) {
                Some(error) => format!("{version} does not take what it tells: {error}"),
                None => format!("{version} cannot tell its match"),
            },
        };
        let words = actions(own.line);
        let others = self.tellings.iter().skip(1);
        let mut others = others.filter(|other| other.of_key(own.key).any(|at| other.says(at, words)));
        match others.next() {
            Some(other) => {
                format!("{told}; {} tells it, and {}", in_words(other.version), highest.why_not_flags(own.key))
            }
            None => told,
        }
    }
}

/// Flags and importance of a flow.
type Flags = (u16, u16);
/// They, by their [`looks`], of the flows that the highest version tells with other words; `None` where there are several.
type Beside = HashMap<Looks, Option<Flags>>;
/// Table, priority, cookie and time-outs: what all versions tell alike.
type Looks = (u8, u16, u64, u16, u16);

fn looks(head: &Head) -> Looks {
    (head.table, head.priority, head.cookie, head.idle_timeout, head.hard_timeout)
}

/// Those that all have. `reset_counts` changes nothing of a rule that is there, and 1.0 gives it to each: it does not count.
fn in_common(mut all: impl Iterator<Item = Option<Flags>>) -> Option<Flags> {
    let first = all.next()??;
    let alike = |other: Option<Flags>| {
        other.is_some_and(|other| (other.0 ^ first.0) & !RESET_COUNTS == 0 && other.1 == first.1)
    };
    all.all(alike).then_some(first)
}

/// A flow that can be put back.
struct Taken {
    text: String,
    message: Vec<u8>,
    end_ms: Option<u64>,
}

impl Telling {
    /// `bare` are those that ovs-ofctl cannot decode, in their order, without their instructions.
    fn new(version: u8, at_ms: u64, told: Vec<Told>, printed: printed::All, bare: &printed::All) -> Self {
        let mut undecoded = 0..;
        let hashed = |(at, told): (usize, &Told)| {
            let said = match printed.get(at) {
                Printed::Not(_) => bare.get(undecoded.next()?),
                said @ Printed::Flow { .. } => said,
            };
            match (said, Head::of(&told.message)) {
                (Printed::Flow { matched, .. }, Some(head)) => {
                    Some((hash(&key(&printed::text(&head, matched, ""))), at))
                }
                _ => None,
            }
        };
        let mut by_key: Vec<(u64, usize)> = told.iter().enumerate().filter_map(hashed).collect();
        by_key.sort_unstable();
        Telling { version, at_ms, taken: vec![false; told.len()], told, printed, by_key }
    }

    /// The flows of this key.
    fn of_key(&self, key: u64) -> impl Iterator<Item = usize> + '_ {
        let from = self.by_key.partition_point(|(other, _)| *other < key);
        let rest = self.by_key.get(from..).unwrap_or_default();
        rest.iter().take_while(move |(other, _)| *other == key).map(|(_, at)| *at)
    }

    /// Those of them that are not taken.
    fn free(&self, key: u64) -> impl Iterator<Item = usize> + '_ {
        self.of_key(key).filter(|at| !self.taken.get(*at).copied().unwrap_or(true))
    }

    /// Takes the first flow of this key whose match and actions are right.
    fn take(&mut self, key: u64, is_it: impl Fn(&str, &str) -> bool) -> Option<usize> {
        let said = |at: &usize| match self.printed.get(*at) {
            Printed::Flow { matched, actions } => is_it(matched, actions),
            Printed::Not(_) => false,
        };
        let at = self.free(key).find(said)?;
        *self.taken.get_mut(at)? = true;
        Some(at)
    }

    /// Does it tell the flow in this place with these actions?
    fn says(&self, at: usize, words: &str) -> bool {
        matches!(self.printed.get(at), Printed::Flow { actions, .. } if actions == words)
    }

    fn flags_at(&self, at: usize) -> Option<Flags> {
        Head::of(&self.told.get(at)?.message).map(|head| (head.flags, head.importance))
    }

    /// Those of the flow of this key; where that is not told, or several are meant, those of all that look as it does.
    fn flags(&self, key: u64, head: &Head, beside: &Beside) -> Option<Flags> {
        let of_key = in_common(self.free(key).map(|at| self.flags_at(at)));
        of_key.or_else(|| beside.get(&looks(head)).copied()?)
    }

    fn beside(&self) -> Beside {
        let mut beside = Beside::new();
        for (told, _) in self.told.iter().zip(&self.taken).filter(|(_, taken)| !**taken) {
            let Some(head) = Head::of(&told.message) else { continue };
            let found = Some((head.flags, head.importance));
            let known = beside.entry(looks(&head)).or_insert(found);
            *known = in_common([*known, found].into_iter());
        }
        beside
    }

    /// Why a flow of this key cannot have its flags in another version.
    fn why_not_flags(&self, key: u64) -> String {
        let Some((flags, importance)) = in_common(self.free(key).map(|at| self.flags_at(at))) else {
            return "which flags it has is not known".to_owned();
        };
        let mut names: Vec<String> = told::names_of(flags & !RESET_COUNTS).map(str::to_owned).collect();
        names.extend((importance != 0).then(|| format!("importance={importance}")));
        match names.is_empty() {
            true => "not all that belongs to it".to_owned(),
            false => format!("not its {}", names.join(", ")),
        }
    }

    /// What ovs-ofctl says of the first flow of this table and priority that it cannot decode.
    fn unreadable_at(&self, place: (u8, u16)) -> Option<&str> {
        let here = |told: &Told| Head::of(&told.message).is_some_and(|head| (head.table, head.priority) == place);
        let mut errors = self.told.iter().enumerate().filter(|(_, told)| here(told));
        errors.find_map(|(at, _)| match self.printed.get(at) {
            Printed::Not(error) => Some(error),
            Printed::Flow { .. } => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::messages::{message, FLOW_MOD};
    use super::*;

    const OF11: u8 = 2;

    /// A flow as it is told: cookie, `hard_timeout` and flags of the message; table 0.
    fn told(
        version: u8,
        priority: u16,
        flags: u8,
        hard_timeout: u16,
        duration_ms: u64,
        hard_age_s: Option<u64>,
    ) -> Told {
        let timeouts = [&[0, 0][..], &hard_timeout.to_be_bytes(), &priority.to_be_bytes()].concat();
        let message = match version {
            OF10 => super::super::messages::extension(
                OF10,
                super::super::messages::FLOW_MOD_SUBTYPE,
                0,
                &[&[0; 8], &[0, 0], &timeouts, &[0xff; 6], &[0; 10]],
            ),
            _ => message(
                version,
                FLOW_MOD,
                0,
                &[&[0; 16], &[0, 0], &timeouts, &[0xff; 12], &[0, flags, 0, 0], &[0, 1, 0, 4, 0, 0, 0, 0]],
            ),
        };
        Told { message: message.unwrap(), duration_ms, hard_age_s }
    }

    fn telling(version: u8, flows: &[Said<'_>]) -> Telling {
        let line = |(number, (_, said)): (usize, &Said<'_>)| match said {
            Ok((matched, actions)) => format!("NXT_FLOW_MOD (xid={number:#x}): ADD {matched} actions={actions}\n"),
            Err(error) => {
                let error = error.split(' ').next().unwrap();
                format!("NXT_FLOW_MOD (xid={number:#x}): ***decode error: {error}***\n")
            }
        };
        let said: String = flows.iter().enumerate().map(line).collect();
        let undecoded = flows.iter().filter_map(|(_, said)| said.err()).enumerate();
        let bare = undecoded.filter_map(|(number, error)| Some((number, error.split_once(' ')?.1)));
        let bare =
            bare.map(|(number, matched)| format!("NXT_FLOW_MOD (xid={number:#x}): ADD {matched} actions=drop\n"));
        let bare = printed::All::new(bare.collect(), flows.len());
        let told: Vec<Told> = flows.iter().map(|(told, _)| told.clone()).collect();
        let printed = printed::All::new(said, told.len());
        Telling::new(version, 1_000_000, told, printed, &bare)
    }

    /// Match and actions, or the error, and behind it the match where that alone can be read.
    type Said<'a> = (Told, std::result::Result<(&'a str, &'a str), &'a str>);

    /// Text and version.
    type Chosen = Vec<(String, u8)>;

    /// Of the daemon's own flows and what each version tells: the text and the version of what is taken, and what is not.
    fn choose(own: &[&str], tellings: &[(u8, &[Said<'_>])]) -> (Chosen, Vec<String>, BTreeMap<usize, u64>) {
        let mut tellings = tellings.iter().map(|(version, flows)| telling(*version, flows));
        let own = own.join("\n");
        let mut choice = Choice::new(&own, tellings.next().unwrap());
        tellings.for_each(|telling| choice.add(telling));
        let found = choice.made("br0");
        let versions = crate::host::messages::each(&found.messages).map(|message| message[0]);
        let taken = found.texts.into_iter().zip(versions).collect();
        (taken, found.untold.iter().map(|untold| format!("{}: {}", untold.rule, untold.reason)).collect(), found.ends)
    }

    fn plain(version: u8) -> Told {
        told(version, 5, 0, 0, 0, None)
    }

    #[test]
    fn each_flow_is_taken_from_the_highest_version_that_has_the_daemons_words() {
        let own = [
            "priority=5,ip actions=dec_ttl,output:1",
            "priority=5,udp actions=load:0x5->NXM_NX_REG0[]",
            "priority=5,in_port=1 actions=mod_vlan_vid:10",
            "priority=5,in_port=2 actions=strip_vlan",
        ];
        let highest = [
            (plain(OF15), Ok(("priority=5,udp", "set_field:0x5->reg0"))),
            (plain(OF15), Ok(("priority=5,ip", "dec_ttl,output:1"))),
            (plain(OF15), Ok(("priority=5,in_port=1", "push_vlan:0x8100,set_field:4106->vlan_vid"))),
            (plain(OF15), Err("OFPBAC_MATCH_INCONSISTENT")),
        ];
        let next = [(plain(OF14), Ok(("priority=5,udp", "load:0x5->NXM_NX_REG0[]")))];
        let old = [
            (plain(OF10), Ok(("priority=5,in_port=2", "strip_vlan"))),
            (plain(OF10), Ok(("priority=5,in_port=1", "mod_vlan_vid:10"))),
        ];
        let (taken, untold, _) = choose(&own, &[(OF15, &highest), (OF14, &next), (OF10, &old)]);
        assert_eq!(taken.iter().map(|(_, version)| *version).collect::<Vec<_>>(), [OF15, OF14, OF10, OF10]);
        assert!(taken.iter().zip(own).all(|((text, _), own)| text == own), "{taken:?}");
        assert_eq!(untold, [""; 0]);
        // Where no other version is spoken, the same meaning is taken, and what is another rule is not.
        let (taken, untold, _) = choose(&own, &[(OF15, &highest)]);
        assert_eq!(taken.len(), 2, "{taken:?}");
        let [tag, strip] = &untold[..] else { panic!("{untold:?}") };
        assert!(tag.ends_with(
            "OpenFlow 1.5 tells it as `actions=push_vlan:0x8100,set_field:4106->vlan_vid`, which is another rule"
        ));
        assert!(strip.ends_with("OpenFlow 1.5 does not take what it tells: OFPBAC_MATCH_INCONSISTENT"), "{strip}");
    }

    #[test]
    fn other_versions_are_asked_about_what_the_highest_tells_in_other_words_and_about_time() {
        let wanted = |own: &[&str], highest: &[Said<'_>]| {
            let own = own.join("\n");
            let choice = Choice::new(&own, telling(OF15, highest));
            (choice.wanted(OF14), choice.wanted(OF10))
        };
        let (none, one) = (BTreeSet::new(), BTreeSet::from([(0, 5, 0)]));
        let same = [(plain(OF15), Ok(("priority=5,ip", "drop")))];
        assert_eq!(wanted(&["priority=5,ip actions=drop"], &same), (none.clone(), none.clone()));
        // One that has come since, and one that is told with other words.
        assert_eq!(
            wanted(&["priority=5,ip actions=drop", "priority=5,udp actions=drop"], &same),
            (none.clone(), none.clone())
        );
        assert_eq!(wanted(&["priority=5,ip actions=dec_ttl"], &same), (one.clone(), one.clone()));
        let timed = [(told(OF15, 5, 0, 60, 0, None), Ok(("priority=5,ip", "drop")))];
        assert_eq!(wanted(&["priority=5,ip actions=drop"], &timed), (none, one));
        // Of two in one place only the one that is told with other words.
        let with_cookie = |cookie: u64| {
            let mut told = plain(OF15);
            told.message[8..16].copy_from_slice(&cookie.to_be_bytes());
            told
        };
        let two = [
            (with_cookie(7), Ok(("priority=5,ip", "drop"))),
            (with_cookie(9), Ok(("priority=5,udp", "set_field:5->reg0"))),
        ];
        let own = ["priority=5,ip actions=drop", "priority=5,udp actions=load:0x5->NXM_NX_REG0[]"];
        let other = BTreeSet::from([(0, 5, 9)]);
        assert_eq!(wanted(&own, &two), (other.clone(), other));
    }

    #[test]
    fn a_match_that_the_highest_version_tells_as_another_is_never_taken() {
        let own = ["priority=5,vlan_tci=0x3000/0x3000 actions=drop"];
        let highest: [Said<'_>; 1] = [(plain(OF15), Ok(("priority=5,dl_vlan_pcp=1", "drop")))];
        let old: [Said<'_>; 1] = [(plain(OF10), Ok(("priority=5,vlan_tci=0x3000/0x3000", "drop")))];
        let (taken, untold, _) = choose(&own, &[(OF15, &highest)]);
        assert_eq!((taken.len(), untold.len()), (0, 1));
        assert!(untold[0].ends_with("OpenFlow 1.5 cannot tell its match"), "{untold:?}");
        let (taken, untold, _) = choose(&own, &[(OF15, &highest), (OF10, &old)]);
        assert_eq!((taken[0].1, untold.len()), (OF10, 0));
    }

    #[test]
    fn no_tag_is_taken_in_the_daemons_words_where_a_version_has_them() {
        let own = ["priority=5,vlan_tci=0x0000 actions=drop"];
        let highest: [Said<'_>; 1] = [(plain(OF15), Ok(("priority=5,vlan_tci=0x0000/0x1fff", "drop")))];
        let old: [Said<'_>; 1] = [(plain(OF10), Ok(("priority=5,vlan_tci=0x0000", "drop")))];
        assert_eq!(choose(&own, &[(OF15, &highest), (OF10, &old)]).0[0].1, OF10);
        assert_eq!(choose(&own, &[(OF15, &highest)]).0[0].1, OF15);
    }

    #[test]
    fn flags_are_those_that_the_highest_version_tells() {
        let own = ["priority=5,in_port=2 actions=strip_vlan"];
        let old: [Said<'_>; 1] = [(plain(OF10), Ok(("priority=5,in_port=2", "strip_vlan")))];
        let told = |flags| [(told(OF15, 5, flags, 0, 0, None), Err("OFPBAC_MATCH_INCONSISTENT"))];
        let (taken, ..) = choose(&own, &[(OF15, &told(1 | 4)), (OF10, &old)]);
        assert_eq!(taken, [("send_flow_rem,priority=5,in_port=2 actions=strip_vlan".to_owned(), OF10)]);
        // What must not overlap would come too late; 1.0 cannot say that nothing is counted; and where two flows could be meant, neither is.
        for flags in [2, 8] {
            assert_eq!(choose(&own, &[(OF15, &told(flags)), (OF10, &old)]).1.len(), 1);
        }
        let two = [told(0), told(1)].concat();
        let untold = choose(&own, &[(OF15, &two), (OF10, &old)]).1;
        assert!(untold[0].ends_with("; OpenFlow 1.0 tells it, and which flags it has is not known"), "{untold:?}");
        // What 1.0 gives to each says nothing.
        let two = [told(1), told(1 | 4)].concat();
        assert_eq!(choose(&own, &[(OF15, &two), (OF10, &old)]).0.len(), 1);
    }

    #[test]
    fn flags_are_those_of_the_flow_with_the_same_match() {
        let own = ["priority=5,in_port=2 actions=strip_vlan", "priority=5,in_port=3 actions=strip_vlan"];
        let old: [Said<'_>; 2] = [
            (plain(OF10), Ok(("priority=5,in_port=2", "strip_vlan"))),
            (plain(OF10), Ok(("priority=5,in_port=3", "strip_vlan"))),
        ];
        let told = |flags, matched| (told(OF15, 5, flags, 0, 0, None), Err(matched));
        let highest = [told(1, "E priority=5,in_port=3"), told(8, "E"), told(4, "E priority=5,in_port=2")];
        let (taken, untold, _) = choose(&own, &[(OF15, &highest), (OF10, &old)]);
        let texts: Vec<&str> = taken.iter().map(|(text, _)| text.as_str()).collect();
        assert_eq!(texts, [own[0], "send_flow_rem,priority=5,in_port=3 actions=strip_vlan"], "{untold:?}");
        let highest = [told(8, "E priority=5,in_port=3"), told(4, "E priority=5,in_port=2")];
        let untold = choose(&own, &[(OF15, &highest), (OF10, &old)]).1;
        assert!(untold[0].contains("in_port=3") && untold[0].ends_with("and not its no_packet_counts"), "{untold:?}");
    }

    #[test]
    fn flows_that_differ_in_a_tunnel_option_alone_come_back_each_once() {
        let own = ["priority=5,tun_metadata0=0x2 actions=drop", "priority=5,tun_metadata0=0x1 actions=drop"];
        // The highest cannot decode one of them.
        let highest: [Said<'_>; 2] =
            [(plain(OF15), Ok(("priority=5,tun_metadata0=0x1", "drop"))), (plain(OF15), Err("OFPBAC_X"))];
        let old: [Said<'_>; 2] = [
            (plain(OF10), Ok(("priority=5,tun_metadata0=0x1", "drop"))),
            (plain(OF10), Ok(("priority=5,tun_metadata0=0x2", "drop"))),
        ];
        let (mut taken, untold, _) = choose(&own, &[(OF15, &highest), (OF10, &old)]);
        taken.sort();
        assert_eq!((taken[0].0.as_str(), taken[1].0.as_str()), (own[1], own[0]), "{untold:?}");
    }

    #[test]
    fn a_hard_timeout_ends_by_the_age_that_1_0_tells() {
        let own = ["priority=5,ip actions=drop"];
        let flow = |version, duration, age| [(told(version, 5, 0, 60, duration, age), Ok(("priority=5,ip", "drop")))];
        let ends = |told: &[(u8, &[Said<'_>])]| choose(&own, told).2;
        // 20.5 s old; changed 7 s ago, which 1.0 alone tells; not changed.
        let highest = flow(OF15, 20_500, None);
        assert_eq!(ends(&[(OF15, &highest)]), BTreeMap::from([(0, 1_039_500)]));
        let changed = flow(OF10, 20_500, Some(7));
        assert_eq!(ends(&[(OF15, &highest), (OF10, &changed)]), BTreeMap::from([(0, 1_053_000)]));
        let unchanged = flow(OF10, 20_500, Some(20));
        assert_eq!(ends(&[(OF15, &highest), (OF10, &unchanged)]), BTreeMap::from([(0, 1_039_500)]));
    }

    /// The bridge br0 of an Open vSwitch of one's own, with a dummy datapath, loses all that it has and gets it back.
    #[test]
    #[ignore = "asks for OVS_RUNDIR (with ovs-vswitchd.pid), its ovs-ofctl in PATH, and PROTOCOLS, which may be empty"]
    fn a_bridge_of_a_daemon_comes_back() {
        use super::super::{daemons, procfs};
        use crate::host::{DaemonKind, OpenFlow};
        let directory = std::path::PathBuf::from(std::env::var("OVS_RUNDIR").unwrap());
        let pid = std::fs::read_to_string(directory.join("ovs-vswitchd.pid")).unwrap().trim().parse().unwrap();
        let daemon = daemons::describe(DaemonKind::OvsVswitchd, procfs::identity(pid).unwrap()).unwrap();
        let openflow = RealOpenFlow::new(directory);
        let soon = || Instant::now() + std::time::Duration::from_secs(120);
        let protocols = std::env::var("PROTOCOLS").unwrap_or_default();
        let protocols = protocols.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        let br0 = Bridge { name: "br0".into(), protocols, ..Bridge::default() };
        let read = || bridge(&openflow, &daemon, &br0, None, soon()).unwrap();
        let own = || {
            let said = unixctl::command(&daemon, "bridge/dump-flows", &["br0"], soon()).unwrap();
            let mut own: Vec<String> = faithful::own_lines(&said).map(|(line, _)| faithful::own_flow(line)).collect();
            own.sort();
            own
        };
        let began = Instant::now();
        let (before, own_before) = (read(), own());
        let mut of_version = BTreeMap::<u8, usize>::new();
        before.messages.flows.each().for_each(|message| *of_version.entry(message[0]).or_default() += 1);
        let again = before.messages.whole_groups.each().count();
        println!("{} flows {of_version:?}, {} groups, {again} again", before.flows.len(), before.groups.len());
        println!("read in {:?}\nuntold {:#?}\nunsure {:#?}", began.elapsed(), before.untold, before.unsure);
        let refused = openflow.prepare_restore(&daemon, std::slice::from_ref(&before), soon()).unwrap().refused;
        println!("refused {refused:#?}");
        let version = before.protocol.as_str();
        for command in ["del-flows", "del-groups"] {
            openflow.ofctl(version, &[command, &openflow.target("br0")], None, soon()).unwrap();
        }
        assert!(own().is_empty());
        let began = Instant::now();
        let restored = openflow.restore(std::slice::from_ref(&before), soon()).unwrap();
        println!("given in {:?}: {restored:?}", began.elapsed());
        let differences = super::super::openflow::compare(&[before], &[read()]);
        assert!(differences.is_empty(), "{differences:#?}");
        assert_eq!(own_before, own());
    }

    #[test]
    fn the_versions_of_a_bridge_are_those_of_the_database() {
        let bridge = |protocols: &[&str]| Bridge {
            protocols: protocols.iter().map(|name| (*name).to_owned()).collect(),
            ..Bridge::default()
        };
        assert_eq!(versions(&bridge(&[])), [1, 2, 3, 4, 5, 6]);
        assert_eq!(versions(&bridge(&["OpenFlow11", "OpenFlow13", "OpenFlow16", "x"])), [OF11, OF13]);
        assert_eq!((name_of(OF10), name_of(OF15)), ("OpenFlow10".into(), "OpenFlow15".into()));
    }
}

//! What ovs-ofctl says to a bridge to give it its rules, recorded before the bridge is there: it talks to a socket of
//! ours that acknowledges as a bridge does. Later the recording is sent in one piece; a message at a time, as ovs-ofctl
//! sends them, costs it and the daemon a system call each just while packets wait.
//!
//! Versions with bundles get one atomic bundle that replaces everything; others get their flows one after the other.
//! The daemon answers each message that it refuses, and a bundle's other messages still count: what is left of it can
//! be committed.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags};

use super::command::poll_timeout;
use super::jsonrpc::remaining;
use super::messages::{
    self, add_or_modify, answer, barrier, bundle_control, header, in_words, inner, kind, some, without_effect, xid,
    Inbox, BUFFER_UNKNOWN, ECHO_REPLY, ECHO_REQUEST, ERROR, HEADER, HELLO,
};
use super::openflow::{first_field, has_bundles, RealOpenFlow, LOOK_AGAIN, OVS_OFCTL};
use super::{container, trusted};
use crate::host::{BridgeRules, Context, HostError, RefusedRule, Result};

/// Who speaks while we record.
const OBJECT: &str = "ovs-ofctl";
/// A recording may be as long as this, bytes: 20,000 rules are about 2 MB.
const RECORDING_MAX: usize = 256 << 20;
/// More rules of one bridge that ovs-ofctl does not take are not looked for: each costs a start of it.
const UNREADABLE_MAX: usize = 200;
/// As many rules the daemon is given at a time where they are only tried: less than a MB of its memory.
const BUNDLE_RULES: usize = 500;
/// Lines of a bundle before the first rule.
const DELETE_ALL: [&str; 2] = ["flow delete", "group delete"];

/// `dec_ttl()` asks no controller, and ovs-ofctl prints it and has no word for it (`parse_DEC_TTL`,
/// lib/ofp-actions.c): it is told of one controller of this number, and the number of controllers is set to none.
const NO_CONTROLLER: (&str, &str) = ("dec_ttl()", "dec_ttl(65279)");
/// NXAST_DEC_TTL_CNT_IDS with one controller, 65279, and with none (include/openflow/nicira-ext.h).
const ONE_CONTROLLER_ACTION: [u8; 24] =
    [0xff, 0xff, 0, 24, 0, 0, 0x23, 0x20, 0, 21, 0, 1, 0, 0, 0, 0, 0xfe, 0xff, 0, 0, 0, 0, 0, 0];
const NO_CONTROLLER_ACTION: [u8; 24] =
    [0xff, 0xff, 0, 24, 0, 0, 0x23, 0x20, 0, 21, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

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

/// The messages for one bridge.
#[derive(Debug, Clone)]
pub struct Recording {
    stream: Vec<u8>,
    /// So many of them are acknowledged, where all goes well.
    acknowledged: usize,
    /// The messages that add a rule, by their transaction id.
    items: BTreeMap<u32, Item>,
}

/// What a bridge answered.
#[derive(Debug)]
struct Played {
    /// The messages that it refused, with its answers.
    errors: BTreeMap<u32, Vec<u8>>,
    /// False where the bundle as a whole was refused: nothing has changed then.
    carried_out: bool,
}

impl Recording {
    /// Has ovs-ofctl say what makes a bridge's rules `rules`, without those that it cannot read, which are returned with
    /// its words. It finds us at a socket in a folder that only we can enter, which is gone afterwards.
    pub fn make(openflow: &RealOpenFlow, rules: &BridgeRules, until: Instant) -> Result<(Self, Vec<RefusedRule>)> {
        let folder = Folder::for_bridge(openflow, &rules.bridge)?;
        let socket = folder.path.join(format!("{}.recording", rules.bridge));
        let groups = if has_bundles(rules) { rules.groups.len() } else { 0 };
        let mut items: Vec<Item> = (0..groups).map(Item::Group).chain((0..rules.flows.len()).map(Item::Flow)).collect();
        let mut unreadable = Vec::new();
        loop {
            match record_items(openflow, rules, &items, &socket, until)? {
                Recorded::All(recording) => return Ok((recording, unreadable)),
                Recorded::Unusable { reason } => {
                    let tell = |some: &[Item]| record_items(openflow, rules, some, &socket, until);
                    let (at, reason) = find_unusable(&items, tell)?
                        .filter(|_| unreadable.len() < UNREADABLE_MAX)
                        .ok_or_else(|| HostError::new(format!("bridge {}: {OBJECT}", rules.bridge), reason))?;
                    unreadable.push(items.remove(at).refused(rules, reason));
                }
                Recorded::Unreadable { at, reason } if unreadable.len() < UNREADABLE_MAX && at < items.len() => {
                    unreadable.push(items.remove(at).refused(rules, reason));
                }
                Recorded::Unreadable { reason, .. } => return Err(HostError::new(OBJECT, reason)),
            }
        }
    }

    /// What ovs-ofctl reads in the messages is what `rules` say, or the rule would come back as another. The rules for
    /// which that is not so.
    pub fn misread(&self, rules: &BridgeRules, openflow: &RealOpenFlow, until: Instant) -> Result<Vec<RefusedRule>> {
        let said = openflow.print(&self.stream, until)?;
        let flows = said.lines().filter_map(flow_said).filter_map(|(xid, said)| Some((self.items.get(&xid)?, said)));
        let other = flows.filter(|(item, said)| actions(item.text(rules)) != *said);
        let reason = |said: &str| format!("ovs-ofctl would make it `actions={said}`");
        Ok(other.map(|(item, said)| item.refused(rules, reason(said))).collect())
    }

    /// Says it to the bridge behind `socket` so that it judges all of it and changes nothing. What it refuses.
    pub fn try_out(
        &self,
        rules: &BridgeRules,
        openflow: &RealOpenFlow,
        socket: &Path,
        until: Instant,
    ) -> Result<Vec<RefusedRule>> {
        let mut played = self.without_effect().play(socket, until)?;
        played.errors.retain(|_, error| error.get(HEADER..HEADER + 4) != Some(&BUFFER_UNKNOWN));
        let names = openflow.names_of(played.errors.values(), until);
        let of = |(xid, error): (&u32, &Vec<u8>)| Some(self.items.get(xid)?.refused(rules, name(&names, error)));
        Ok(played.errors.iter().filter_map(of).collect())
    }

    /// Says it to the bridge behind `socket`. A rule that the bridge refuses, and one that needs a rule that is refused
    /// (first of all those in `refused`), is left out and added to `refused`: all others are there afterwards. Returns
    /// false where some rules were given to the bridge one after the other and nothing was deleted; what is there
    /// besides is then the caller's to remove.
    pub fn put(
        &self,
        rules: &BridgeRules,
        openflow: &RealOpenFlow,
        socket: &Path,
        refused: &mut Vec<RefusedRule>,
        until: Instant,
    ) -> Result<bool> {
        let mut left_out = BTreeSet::new();
        self.leave_out_dependents(rules, refused, &mut left_out);
        for _ in 0..ROUNDS {
            let played = match left_out.is_empty() {
                true => self.play(socket, until),
                false => self.without(&left_out).play(socket, until),
            }?;
            let known = left_out.len();
            self.leave_out(rules, openflow, &played, refused, &mut left_out, until);
            if played.carried_out {
                return Ok(has_bundles(rules));
            }
            if left_out.len() == known {
                break;
            }
        }
        let played = self.without(&left_out).singly().play(socket, until)?;
        self.leave_out(rules, openflow, &played, refused, &mut left_out, until);
        Ok(false)
    }

    fn leave_out(
        &self,
        rules: &BridgeRules,
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
            if let (Some(item), true) = (self.items.get(xid), left_out.insert(*xid)) {
                refused.push(item.refused(rules, name(&names, error)));
            }
        }
        self.leave_out_dependents(rules, refused, left_out);
    }

    /// The rules that name a group or a meter that is refused, and those that name their groups.
    fn leave_out_dependents(&self, rules: &BridgeRules, refused: &mut Vec<RefusedRule>, left_out: &mut BTreeSet<u32>) {
        let mut looked = 0;
        while let Some(needed) = refused.get(looked).map(id) {
            if needed.is_none() {
                // A flow: nothing needs it.
                looked += 1;
                continue;
            }
            let needs = |item: &Item| needed.as_ref().is_some_and(|needed| names_id(item.text(rules), needed));
            let more = self.items.iter().filter(|(xid, item)| !left_out.contains(xid) && needs(item));
            let more: Vec<(u32, Item)> = more.map(|(xid, item)| (*xid, *item)).collect();
            for (xid, item) in more {
                left_out.insert(xid);
                let needed = needed.clone().unwrap_or_default();
                refused.push(item.refused(rules, format!("it needs `{needed}`, which is refused")));
            }
            looked += 1;
        }
    }

    /// The same, so that it changes nothing; in several bundles, each thrown away before the next one begins: the daemon
    /// keeps what is in a bundle beside its rules, and may live under a limit of memory.
    fn without_effect(&self) -> Recording {
        let harmless: Vec<Vec<u8>> = messages::each(&self.stream).map(without_effect).collect();
        let mut controls = harmless.iter().filter(|message| bundle_control(message).is_some());
        let (open, discard) = (controls.next(), controls.next_back());
        let (mut stream, mut acknowledged, mut inside) = (Vec::new(), self.acknowledged, 0);
        for message in &harmless {
            if let (true, true, Some(open), Some(discard)) =
                (inside == BUNDLE_RULES, inner(message).is_some(), open, discard)
            {
                stream.extend_from_slice(discard);
                stream.extend_from_slice(open);
                acknowledged += 2;
                inside = 0;
            }
            inside += usize::from(inner(message).is_some());
            stream.extend_from_slice(message);
        }
        Recording { stream, acknowledged, items: self.items.clone() }
    }

    /// The same without some of its messages.
    fn without(&self, left_out: &BTreeSet<u32>) -> Recording {
        let stays = |message: &&[u8]| xid(message).is_none_or(|xid| !left_out.contains(&xid));
        let stream = messages::each(&self.stream).filter(stays).collect::<Vec<_>>().concat();
        Recording { stream, ..self.clone() }
    }

    /// The same without a bundle, and without what is deleted first.
    fn singly(&self) -> Recording {
        let Some(hello) = messages::each(&self.stream).next() else { return self.clone() };
        let is_item = |message: &&[u8]| xid(message).is_some_and(|xid| self.items.contains_key(&xid));
        let bundled = messages::each(&self.stream).filter(is_item).filter_map(inner);
        let (version, last) =
            (hello.first().copied().unwrap_or(1), self.items.keys().last().map_or(1, |last| last + 1));
        let single: Vec<u8> = bundled.flat_map(add_or_modify).collect();
        match single.is_empty() {
            true => self.clone(),
            false => {
                let stream = [hello, &single, &header(version, barrier(version).0, last)].concat();
                Recording { stream, acknowledged: 1, items: self.items.clone() }
            }
        }
    }

    /// Says it to the bridge behind `socket` and waits until all of it is done or refused.
    fn play(&self, socket: &Path, until: Instant) -> Result<Played> {
        let object = socket.display().to_string();
        let mut stream = UnixStream::connect(socket).about(&object)?;
        stream.set_nonblocking(true).about(&object)?;
        let commit = messages::each(&self.stream).find(|message| messages::is_commit(message)).and_then(xid);
        let (mut sent, mut acknowledged, mut inbox) = (0, 0, Inbox::default());
        let mut played = Played { errors: BTreeMap::new(), carried_out: true };
        while acknowledged < self.acknowledged {
            let unsent = self.stream.get(sent..).unwrap_or_default();
            if !wait(&stream, !unsent.is_empty(), until).about(&object)? {
                return Err(HostError::timeout(&object, "giving the bridge its rules"));
            }
            sent += some(stream.write(unsent)).about(&object)?.unwrap_or(0);
            if inbox.read(&mut stream).about(&object)? == Some(0) {
                return Err(HostError::away(&object, "the daemon closed the connection"));
            }
            while let Some(message) = inbox.next().about(&object)? {
                match (kind(&message), xid(&message)) {
                    (Some(ERROR), Some(of)) if self.items.contains_key(&of) => drop(played.errors.insert(of, message)),
                    (Some(ERROR), of) if of.is_some() && of == commit => {
                        played.carried_out = false;
                        acknowledged += 1;
                    }
                    (Some(ERROR), _) => return Err(HostError::new(&object, in_words(&message))),
                    // Small, and the bridge reads: it fits. One asks only where nothing was heard for seconds.
                    (Some(ECHO_REQUEST), _) if sent == self.stream.len() => {
                        let _unanswered = some(stream.write(&answer(&message, ECHO_REPLY))).about(&object)?;
                    }
                    _ if messages::is_barrier_reply(&message) => acknowledged += 1,
                    _ => acknowledged += usize::from(bundle_control(&message).is_some()),
                }
            }
        }
        Ok(played)
    }
}

/// The folder of our socket, which nobody else may enter.
struct Folder {
    path: PathBuf,
    /// Made for this bridge, and removed with it.
    own: bool,
}

impl Folder {
    /// An ovs-ofctl of this host finds us in our own folder. One in the daemons' container sees no more of this host than
    /// their run directory: there, where that is root's.
    fn for_bridge(openflow: &RealOpenFlow, bridge: &str) -> Result<Self> {
        let (_, root) = container::of_program(OVS_OFCTL).about(OVS_OFCTL)?;
        let folder = match root {
            None => Folder { path: openflow.private_directory().to_owned(), own: false },
            Some(_) => {
                let run = openflow.run_directory();
                let object = run.display().to_string();
                if !trusted::only_ours(&std::fs::metadata(run).about(&object)?) {
                    let cause = "others than root may write there, and this host has no ovs-ofctl of its own";
                    return Err(HostError::new(object, cause).remedy("install Open vSwitch's ovs-ofctl on this host"));
                }
                Folder { path: run.join(format!(".ovs-graceful.{bridge}")), own: true }
            }
        };
        // `check` may be the first that needs it; one that was killed may have left it.
        match std::fs::DirBuilder::new().mode(0o700).create(&folder.path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                Err(HostError::new(folder.path.display().to_string(), error))
            }
            _ => Ok(folder),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.own {
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}

/// A commit tells of one message that it refuses: after so many, the rules are added without a bundle.
const ROUNDS: usize = 16;

/// The transaction id and the actions of a flow that is added, as `ovs-ofctl ofp-parse` prints it:
/// `OFPT_FLOW_MOD (OF1.5) (xid=0x4): ADD priority=4 actions=drop`. One that it cannot decode it does not print so.
fn flow_said(line: &str) -> Option<(u32, &str)> {
    let (head, said) = line.split_once("): ADD ")?;
    let xid = head.rsplit_once("(xid=0x")?.1;
    Some((u32::from_str_radix(xid, 16).ok()?, actions(said)))
}

/// The text behind `actions=`.
fn actions(rule: &str) -> &str {
    rule.split_once("actions=").map_or("", |(_, actions)| actions.trim_end())
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
fn name(names: &BTreeMap<Vec<u8>, String>, error: &[u8]) -> String {
    names.get(code(error)).cloned().unwrap_or_else(|| in_words(error))
}

/// What of an error says which it is: type and code; from OpenFlow 1.2 on the experimenter's number behind 0xffff, before
/// it that and his type and code behind NXET_VENDOR (include/openflow/nicira-ext.h).
pub(super) fn code(error: &[u8]) -> &[u8] {
    let length = match error.get(HEADER..HEADER + 2) {
        Some(&[0xff, 0xff]) => 8,
        Some(&[0xb0, 0xc2]) => 12,
        _ => 4,
    };
    error.get(HEADER..(HEADER + length).min(error.len())).unwrap_or_default()
}

/// A rule that ovs-ofctl cannot tell in the bridge's version by itself, where one of `items` is the reason that it cannot
/// tell all of them; found by halves.
fn find_unusable(items: &[Item], tell: impl Fn(&[Item]) -> Result<Recorded>) -> Result<Option<(usize, String)>> {
    let (mut from, mut to) = (0, items.len());
    while to - from > 1 {
        let middle = from + (to - from) / 2;
        match tell(items.get(from..middle).unwrap_or_default())? {
            Recorded::Unusable { .. } => to = middle,
            _ => from = middle,
        }
    }
    match tell(items.get(from..to).unwrap_or_default())? {
        Recorded::Unusable { reason } => Ok(Some((from, reason))),
        _ => Ok(None),
    }
}

enum Recorded {
    All(Recording),
    /// One of the rules, or all of them together, cannot be told in the bridge's version: ovs-ofctl does not say which.
    Unusable {
        reason: String,
    },
    /// ovs-ofctl could not read one of the rules.
    Unreadable {
        at: usize,
        reason: String,
    },
}

/// The text of `items` for ovs-ofctl, its command, and how many lines come before the first of them.
fn to_say(rules: &BridgeRules, items: &[Item]) -> (&'static str, String, usize) {
    let bundled = has_bundles(rules);
    let mut text = if bundled { DELETE_ALL.map(|line| format!("{line}\n")).concat() } else { String::new() };
    for item in items {
        let word = match (bundled, item) {
            (false, _) => "",
            (true, Item::Group(_)) => "group add ",
            (true, Item::Flow(_)) => "flow add ",
        };
        text.extend([word, &item.text(rules).replace(NO_CONTROLLER.0, NO_CONTROLLER.1), "\n"]);
    }
    match bundled {
        true => ("bundle", text, DELETE_ALL.len()),
        false => ("add-flows", text, 0),
    }
}

fn record_items(
    openflow: &RealOpenFlow,
    rules: &BridgeRules,
    items: &[Item],
    socket: &Path,
    until: Instant,
) -> Result<Recorded> {
    let object = || socket.display().to_string();
    // Left behind by one that was killed.
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).about(object())?;
    let ended = AtomicBool::new(false);
    let (command, text, before) = to_say(rules, items);
    let recorded = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let stream = accept(&listener, &ended, until)?;
            let _ = std::fs::remove_file(socket);
            record(stream, until)
        });
        let target = format!("unix:{}", socket.display());
        let said = openflow.ofctl_output(&rules.protocol, &[command, &target, "-"], Some(&text), until);
        ended.store(true, Ordering::Release);
        let recorded = thread.join().unwrap_or_else(|_| Err(HostError::new(object(), "a thread of ours panicked")));
        let said = said?;
        if said.status.success() {
            return recorded.and_then(|made| with_items(made, items)).map(Recorded::All);
        }
        match unreadable(&said.stderr) {
            Some((line, reason)) if line > before => Ok(Recorded::Unreadable { at: line - before - 1, reason }),
            _ if said.stderr.contains(NO_FORMAT) => Ok(Recorded::Unusable { reason: last_line(&said.stderr) }),
            _ => Err(HostError::new(format!("{OVS_OFCTL} {command}"), said.stderr.trim())),
        }
    });
    let _ = std::fs::remove_file(socket);
    recorded
}

/// What ovs-ofctl says where its file as a whole is of no version that it may use (utilities/ovs-ofctl.c).
const NO_FORMAT: &str = "is among the allowed flow formats";

fn last_line(said: &str) -> String {
    said.lines().last().map(|line| line.trim_start_matches("ovs-ofctl: ")).unwrap_or_default().to_owned()
}

/// The line that ovs-ofctl could not read, counted from 1, and why: `ovs-ofctl: -:12: REASON`.
fn unreadable(said: &str) -> Option<(usize, String)> {
    said.lines().find_map(|line| {
        let (number, reason) = line.strip_prefix("ovs-ofctl: -:")?.split_once(": ")?;
        Some((number.parse().ok()?, reason.to_owned()))
    })
}

/// Which message is which rule: they come in the order of the text, behind those that delete.
fn with_items(made: Recording, items: &[Item]) -> Result<Recording> {
    let adds = |message: &&[u8]| inner(message).is_some() || messages::is_flow_mod(message);
    let mut xids: Vec<u32> = messages::each(&made.stream).filter(adds).filter_map(xid).collect();
    if messages::each(&made.stream).any(messages::is_commit) {
        xids.drain(..DELETE_ALL.len().min(xids.len()));
    }
    let all: BTreeMap<u32, Item> = xids.iter().copied().zip(items.iter().copied()).collect();
    if xids.len() != items.len() || all.len() != items.len() || (made.acknowledged == 0 && !items.is_empty()) {
        let cause = format!("it sent {} messages that add a rule, of {} rules", xids.len(), items.len());
        return Err(HostError::new(OBJECT, cause));
    }
    let mut stream = made.stream;
    ask_no_controller(&mut stream);
    Ok(Recording { stream, items: all, ..made })
}

/// See [`NO_CONTROLLER`].
fn ask_no_controller(stream: &mut [u8]) {
    let size = ONE_CONTROLLER_ACTION.len();
    let mut at = 0;
    while let Some(window) = stream.get_mut(at..at + size) {
        if window == ONE_CONTROLLER_ACTION {
            window.copy_from_slice(&NO_CONTROLLER_ACTION);
        }
        at += 1;
    }
}

/// Takes ovs-ofctl's one connection, unless it has `ended`.
fn accept(listener: &UnixListener, ended: &AtomicBool, until: Instant) -> Result<UnixStream> {
    listener.set_nonblocking(true).about(OBJECT)?;
    loop {
        // In this order: one that connected before it ended is still found.
        let last = ended.load(Ordering::Acquire) || remaining(until).is_none();
        match some(listener.accept()).about(OBJECT)? {
            Some((stream, _)) => return Ok(stream),
            None if last => return Err(HostError::new(OBJECT, "it did not connect")),
            None => std::thread::sleep(LOOK_AGAIN),
        }
    }
}

/// Keeps what ovs-ofctl sends until it closes, and acknowledges what it asks for.
fn record(mut stream: UnixStream, until: Instant) -> Result<Recording> {
    stream.set_nonblocking(true).about(OBJECT)?;
    let mut recording = Recording { stream: Vec::new(), acknowledged: 0, items: BTreeMap::new() };
    let mut inbox = Inbox::default();
    loop {
        if !wait(&stream, false, until).about(OBJECT)? {
            return Err(HostError::timeout(OBJECT, "recording what it sends"));
        }
        if inbox.read(&mut stream).about(OBJECT)? == Some(0) {
            return Ok(recording);
        }
        while let Some(message) = inbox.next().about(OBJECT)? {
            recording.stream.extend_from_slice(&message);
            if recording.stream.len() > RECORDING_MAX {
                return Err(HostError::new(OBJECT, format!("it sends more than {RECORDING_MAX} bytes")));
            }
            let Some(reply) = reply(&message) else { continue };
            recording.acknowledged += usize::from(kind(&reply) != Some(HELLO));
            // It waits for each of them: the socket is empty.
            stream.write_all(&reply).about(OBJECT)?;
        }
    }
}

/// What a bridge that is content answers.
fn reply(message: &[u8]) -> Option<Vec<u8>> {
    match kind(message)? {
        // The header alone offers the sender's own version.
        HELLO => Some(answer(message.get(..HEADER)?, HELLO)),
        _ if messages::is_barrier(message) => Some(answer(message, barrier(*message.first()?).1)),
        kind => {
            let at = bundle_control(message)?;
            let mut reply = answer(message, kind);
            // Each reply's type follows its request's.
            *reply.get_mut(at)? += 1;
            Some(reply)
        }
    }
}

/// Waits until the stream can be read, or written to where that is wanted; false where `until` passes first.
fn wait(stream: &UnixStream, write: bool, until: Instant) -> nix::Result<bool> {
    let flags = if write { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
    loop {
        let Some(left) = remaining(until) else { return Ok(false) };
        match poll(&mut [PollFd::new(stream.as_fd(), flags)], poll_timeout(left)) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::messages::{BUNDLE_ADD, BUNDLE_CONTROL, EXPERIMENTER, FLOW_MOD, GROUP_MOD};
    use super::*;
    use std::io::Read;
    use std::time::Duration;

    const ONF_BUNDLE_CONTROL: [u8; 8] = [0x4f, 0x4e, 0x46, 0, 0, 0, 0x08, 0xfc];

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(HEADER + body.len()).unwrap().to_be_bytes();
        [&[6, kind, length[0], length[1], 0, 0, 0, 7], body].concat()
    }

    /// Type 0 asks to open, 2 to close, 4 to commit.
    fn control(kind: u8) -> Vec<u8> {
        message(BUNDLE_CONTROL, &[0, 0, 0, 9, 0, kind, 0, 3])
    }

    #[test]
    fn replies_are_those_of_a_bridge() {
        assert_eq!(reply(&message(HELLO, &[0, 1, 0, 8, 0, 0, 0, 0x40])).unwrap(), message(HELLO, &[]));
        assert_eq!(reply(&control(4)).unwrap(), control(5));
        assert_eq!(reply(&message(20, &[])).unwrap(), message(21, &[]));
        assert_eq!(reply(&header(1, 18, 5)).unwrap(), header(1, 19, 5));
        assert!(reply(&header(6, 18, 5)).is_none());
        let onf = |kind| message(EXPERIMENTER, &[&ONF_BUNDLE_CONTROL[..], &[0, 0, 0, 9, 0, kind, 0, 3]].concat());
        assert_eq!(reply(&onf(0)).unwrap(), onf(1));
        // Added to the bundle, and cut short.
        assert!(reply(&message(34, &[0; 40])).is_none());
        assert!(reply(&message(EXPERIMENTER, &[0; 24])).is_none());
        assert!(reply(&message(BUNDLE_CONTROL, &[0; 4])).is_none() && reply(&[]).is_none());
    }

    /// A bridge that answers every message with `answer`, for one connection; returns what it was sent.
    fn bridge(listener: UnixListener, answer: fn(&[u8]) -> Option<Vec<u8>>) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut inbox, mut all) = (Inbox::default(), Vec::new());
            while inbox.read(&mut stream).is_ok_and(|read| read != Some(0)) {
                while let Some(message) = inbox.next().unwrap() {
                    all.extend_from_slice(&message);
                    if let Some(reply) = answer(&message) {
                        let _gone = stream.write_all(&reply);
                    }
                }
            }
            all
        })
    }

    #[test]
    fn what_is_tried_is_thrown_away_a_few_rules_at_a_time() {
        let add = message(BUNDLE_ADD, &[&[0, 0, 0, 9, 0, 0, 0, 3][..], &message(FLOW_MOD, &[0; 40])].concat());
        let adds = add.repeat(2 * BUNDLE_RULES + 1);
        let stream = [message(HELLO, &[]), control(0), adds, control(2), control(4)].concat();
        let made = Recording { stream, acknowledged: 3, items: BTreeMap::new() };
        let tried = made.without_effect();
        let (mut inside, mut most, mut added, mut kinds) = (0, 0, 0, Vec::new());
        for message in messages::each(&tried.stream) {
            if let Some(at) = bundle_control(message) {
                kinds.push(message[at]);
                inside = 0;
            }
            inside += usize::from(inner(message).is_some());
            added += usize::from(inner(message).is_some());
            most = most.max(inside);
        }
        // Opened (0) and thrown away (6) in turn; the last one is closed (2) first, as ovs-ofctl does.
        assert_eq!(kinds, [0, 6, 0, 6, 0, 2, 6]);
        assert_eq!((most, added, tried.acknowledged), (BUNDLE_RULES, 2 * BUNDLE_RULES + 1, 7));
    }

    #[test]
    fn what_was_recorded_is_played_whole_and_an_error_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("br0.mgmt");
        let listener = UnixListener::bind(&path).unwrap();
        // More than a socket holds.
        let said =
            [vec![message(HELLO, &[]), control(0)], vec![message(34, &[7; 8000]); 200], vec![control(4)]].concat();
        let speaker = {
            let (path, said) = (path.clone(), said.concat());
            std::thread::spawn(move || {
                let mut stream = UnixStream::connect(path).unwrap();
                stream.write_all(&said).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                stream.read_to_end(&mut Vec::new()).unwrap();
            })
        };
        let stream = accept(&listener, &AtomicBool::new(false), soon()).unwrap();
        let recording = record(stream, soon()).unwrap();
        speaker.join().unwrap();
        assert_eq!((recording.stream.len(), recording.acknowledged), (said.concat().len(), 2));

        listener.set_nonblocking(false).unwrap();
        let content = bridge(listener, reply);
        let played = recording.play(&path, soon()).unwrap();
        assert!(played.carried_out && played.errors.is_empty());
        assert_eq!(content.join().unwrap(), said.concat());

        std::fs::remove_file(&path).unwrap();
        let angry = bridge(UnixListener::bind(&path).unwrap(), |message| {
            (message[1] == 34).then(|| numbered(self::message(ERROR, &[0, 17, 0, 4]), 9))
        });
        let error = recording.play(&path, soon()).unwrap_err();
        assert!(error.cause.contains("type 17 code 4"), "{error}");
        angry.join().unwrap();
    }

    #[test]
    fn nobody_who_connects_is_no_recording() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let error = accept(&listener, &AtomicBool::new(true), soon()).unwrap_err();
        assert!(error.cause.contains("did not connect"), "{error}");
        let error = accept(&listener, &AtomicBool::new(false), Instant::now()).unwrap_err();
        assert!(error.cause.contains("did not connect"), "{error}");
    }

    /// A message of a bundle that holds another.
    fn add(xid: u8, kind: u8) -> Vec<u8> {
        let inner = [&[6, kind, 0, 16, 0, 0, 0, xid][..], &[0; 8]].concat();
        let mut add = message(BUNDLE_ADD, &[&[0, 0, 0, 9, 0, 0, 0, 3][..], &inner].concat());
        add[7] = xid;
        add
    }

    fn numbered(mut message: Vec<u8>, xid: u8) -> Vec<u8> {
        message[7] = xid;
        message
    }

    /// Two groups and three flows, of which the second needs the first group.
    fn recorded() -> (BridgeRules, Recording) {
        let text = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect();
        let rules = BridgeRules {
            bridge: "br0".into(),
            protocol: "OpenFlow15".into(),
            groups: text(&["group_id=1,type=all", "group_id=12,type=all"]),
            flows: text(&["priority=1 actions=drop", "priority=2 actions=group:1", "priority=3 actions=group:12"]),
            ..BridgeRules::default()
        };
        let adds = [(1, FLOW_MOD), (2, GROUP_MOD), (3, GROUP_MOD), (4, GROUP_MOD)];
        let adds = adds.into_iter().chain([(5, FLOW_MOD), (6, FLOW_MOD), (7, FLOW_MOD)]);
        let adds: Vec<Vec<u8>> = adds.map(|(xid, kind)| add(xid, kind)).collect();
        let ends = [numbered(message(20, &[]), 40), numbered(control(4), 41)];
        let stream = [message(HELLO, &[]), numbered(control(0), 42), adds.concat(), ends.concat()].concat();
        let items = [Item::Group(0), Item::Group(1), Item::Flow(0), Item::Flow(1), Item::Flow(2)];
        let made = Recording { stream, acknowledged: 3, items: BTreeMap::new() };
        (rules, with_items(made, &items).unwrap())
    }

    /// A bridge that refuses some messages, when they come or when their bundle is committed. Returns, for each
    /// connection, the transaction ids of what was carried out.
    fn stubborn(
        listener: UnixListener,
        at_once: &'static [u8],
        at_commit: &'static [u8],
        without_name: bool,
        connections: usize,
    ) -> std::thread::JoinHandle<Vec<Vec<u8>>> {
        let error = |xid: u8| numbered(message(ERROR, &[0, 5, 0, 1]), xid);
        std::thread::spawn(move || {
            let mut all = Vec::new();
            for _ in 0..connections {
                let (mut stream, _) = listener.accept().unwrap();
                let (mut inbox, mut bundle, mut done) = (Inbox::default(), Vec::new(), Vec::new());
                while inbox.read(&mut stream).is_ok_and(|read| read != Some(0)) {
                    while let Some(message) = inbox.next().unwrap() {
                        let xid = message[7];
                        let answers = match kind(&message).unwrap() {
                            BUNDLE_ADD | FLOW_MOD | GROUP_MOD if at_once.contains(&xid) => vec![error(xid)],
                            FLOW_MOD | GROUP_MOD if at_commit.contains(&xid) => vec![error(xid)],
                            FLOW_MOD | GROUP_MOD => {
                                done.push(xid);
                                vec![]
                            }
                            BUNDLE_ADD => {
                                bundle.push(xid);
                                vec![]
                            }
                            _ if messages::is_commit(&message) => {
                                match bundle.iter().find(|xid| at_commit.contains(xid)) {
                                    Some(_) if without_name => vec![error(41)],
                                    Some(bad) => vec![error(*bad), error(41)],
                                    None => {
                                        done = std::mem::take(&mut bundle);
                                        vec![reply(&message).unwrap()]
                                    }
                                }
                            }
                            _ => reply(&message).into_iter().collect(),
                        };
                        for answer in answers {
                            let _gone = stream.write_all(&answer);
                        }
                    }
                }
                all.push(done);
            }
            all
        })
    }

    fn put(
        at_once: &'static [u8],
        at_commit: &'static [u8],
        without_name: bool,
        connections: usize,
    ) -> (bool, Vec<String>, Vec<Vec<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("br0.mgmt");
        let bridge = stubborn(UnixListener::bind(&path).unwrap(), at_once, at_commit, without_name, connections);
        let (rules, recording) = recorded();
        let mut refused = Vec::new();
        let openflow = RealOpenFlow::new(dir.path(), dir.path());
        let bundled = recording.put(&rules, &openflow, &path, &mut refused, soon()).unwrap();
        let refused = refused.iter().map(|refused| format!("{}: {}", refused.rule, refused.reason)).collect();
        (bundled, refused, bridge.join().unwrap())
    }

    #[test]
    fn a_rule_that_is_refused_as_it_comes_costs_no_other() {
        let (bundled, refused, done) = put(&[5], &[], false, 1);
        assert!(bundled);
        assert!(refused.len() == 1 && refused[0].starts_with("priority=1 actions=drop: "), "{refused:?}");
        assert_eq!(done, [[1, 2, 3, 4, 6, 7]]);
    }

    #[test]
    fn a_rule_that_the_commit_refuses_is_left_out_with_those_that_need_it() {
        let (bundled, refused, done) = put(&[], &[3], false, 2);
        assert!(bundled);
        let [group, flow] = &refused[..] else { panic!("{refused:?}") };
        assert!(group.starts_with("group_id=1,type=all: "), "{group}");
        assert!(flow.starts_with("priority=2 actions=group:1: it needs `group:1`"), "{flow}");
        assert_eq!(done, [vec![], vec![1, 2, 4, 5, 7]]);
    }

    #[test]
    fn a_bundle_that_is_refused_for_no_message_of_its_own_is_added_singly_and_nothing_is_deleted() {
        let (bundled, refused, done) = put(&[], &[6], true, 2);
        assert!(!bundled);
        assert!(refused.len() == 1 && refused[0].starts_with("priority=2 actions=group:1: "), "{refused:?}");
        assert_eq!(done, [vec![], vec![3, 4, 5, 7]]);
    }

    #[test]
    fn what_is_tried_out_is_not_committed() {
        let (_, recording) = recorded();
        let tried: Vec<u8> = messages::each(&recording.stream).flat_map(without_effect).collect();
        assert_eq!(tried.len(), recording.stream.len());
        assert!(!messages::each(&tried).any(messages::is_commit));
        let kinds = |stream: &[u8]| messages::each(stream).filter_map(bundle_control).count();
        assert_eq!(kinds(&tried), kinds(&recording.stream));
    }

    #[test]
    fn the_line_that_ovs_ofctl_cannot_read_is_found_among_its_warnings() {
        let said = "2026-11-30T00:41:35Z|00001|ofp_actions|WARN|set_field ip_src lacks correct prerequisites\n\
                    ovs-ofctl: -:13: actions are invalid with specified match (OFPBAC_MATCH_INCONSISTENT)\n";
        let (line, reason) = unreadable(said).unwrap();
        assert_eq!((line, &*reason), (13, "actions are invalid with specified match (OFPBAC_MATCH_INCONSISTENT)"));
        assert_eq!(unreadable("ovs-ofctl: br0: failed to connect to socket"), None);
    }

    #[test]
    fn a_rule_that_no_allowed_version_tells_is_found_among_the_others() {
        let items: Vec<Item> = (0..9).map(Item::Flow).collect();
        for bad in 0..9 {
            let tell = |some: &[Item]| match some.contains(&Item::Flow(bad)) {
                true => Ok(Recorded::Unusable { reason: "none".into() }),
                false => Err(HostError::new("ovs-ofctl", "it did not connect")),
            };
            // What can be told is recorded; here that is an end of its own.
            let told = |some: &[Item]| {
                tell(some).or(Ok(Recorded::All(Recording {
                    stream: Vec::new(),
                    acknowledged: 0,
                    items: BTreeMap::new(),
                })))
            };
            assert_eq!(find_unusable(&items, told).unwrap(), Some((bad, "none".to_owned())));
        }
        let nothing = |_: &[Item]| Ok(Recorded::Unreadable { at: 0, reason: String::new() });
        assert_eq!(find_unusable(&items, nothing).unwrap(), None);
    }

    #[test]
    fn a_flow_is_what_ovs_ofctl_prints_of_its_message() {
        let line = "OFPT_FLOW_MOD (OF1.5) (xid=0x1b): ADD table:3 priority=4 reset_counts actions=dec_ttl,output:1";
        assert_eq!(flow_said(line), Some((27, "dec_ttl,output:1")));
        assert_eq!(flow_said("OFPT_FLOW_MOD (OF1.5) (xid=0x2): DEL table:255 actions=drop"), None);
    }

    #[test]
    fn a_time_to_live_that_asks_no_controller_asks_none() {
        let mut stream = [vec![1, 2, 3], ONE_CONTROLLER_ACTION.to_vec(), vec![4]].concat();
        ask_no_controller(&mut stream);
        assert_eq!(stream, [vec![1, 2, 3], NO_CONTROLLER_ACTION.to_vec(), vec![4]].concat());
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

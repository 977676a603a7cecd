//! One `ovs-ofctl monitor` for each bridge: it prints every change of a flow on its standard error, and through its
//! control socket it takes requests for its open connection, so that nothing has to be started while misses are parked.

use std::collections::BTreeSet;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use serde_json::{json, Value};

use super::jsonrpc::remaining;
use super::openflow::{
    parse_groups, parse_meters, parse_tlv_map, version_number, RealOpenFlow, ANY_VERSION, LOOK_AGAIN, OVS_OFCTL,
};
use super::parallel::STACK;
use super::unixctl::Asked;
use super::{command, unixctl};
use crate::host::{Bridge, BridgeRules, Context, Result, RuleWatch};

/// More text than this is not kept: the bridge then counts as changed.
const TEXT_MAX: usize = 32 << 20;
/// An error is a line; the answer of a bridge that is watched has no more, because no rules are asked for.
const FIRST_MAX: usize = 64 << 10;
/// A monitor that an older daemon refuses waits for ever (ovs-ofctl 3.1 and ovs-vswitchd 2.15: "bad flags 0xffff"). So long
/// is waited for the first, and after each for the next: hundreds of them take longer.
const ESTABLISHED_WITHIN: Duration = Duration::from_secs(10);
/// The version that every Open vSwitch can watch rules in; 2.15 can in no other ("OFPBRC_BAD_VERSION").
const OLDEST: &str = "OpenFlow10";
/// What the monitor prints when a barrier has come back.
const BARRIER: &str = "OFPT_BARRIER_REPLY";

/// The watchers of all bridges.
pub struct Watch(Vec<Watcher>);

impl Watch {
    /// Starts one for each bridge and waits until they are established, or have failed.
    pub fn start(openflow: &RealOpenFlow, bridges: &[Bridge], until: Instant) -> Result<Self> {
        let (mut watch, refused) = Self::start_some(openflow, bridges, None, until)?;
        let may = |bridge: &Bridge| bridge.protocols.is_empty() || bridge.protocols.iter().any(|p| p == OLDEST);
        let again: Vec<Bridge> = bridges.iter().filter(|b| refused.contains(&b.name) && may(b)).cloned().collect();
        if !again.is_empty() {
            watch.0.retain(|watcher| again.iter().all(|bridge| bridge.name != watcher.bridge));
            watch.0.extend(Self::start_some(openflow, &again, Some(OLDEST), until)?.0 .0);
        }
        Ok(watch)
    }

    /// Also returns the bridges that refused to be watched.
    fn start_some(
        openflow: &RealOpenFlow,
        bridges: &[Bridge],
        version: Option<&str>,
        until: Instant,
    ) -> Result<(Self, BTreeSet<String>)> {
        let mut watch = Watch(Vec::new());
        let mut pipes = Vec::new();
        for bridge in bridges {
            let (watcher, pipe) = Watcher::start(openflow, bridge, version)?;
            pipes.extend(pipe.map(|pipe| Pipe { pipe, printed: watcher.printed.clone(), rest: Vec::new() }));
            watch.0.push(watcher);
        }
        let thread = std::thread::Builder::new().name("rules".into()).stack_size(STACK);
        thread.spawn(move || follow_all(pipes)).about(OVS_OFCTL)?;
        let (mut last, mut refused) = (Instant::now(), BTreeSet::new());
        for watcher in &mut watch.0 {
            match watcher.establish(until.min(last + ESTABLISHED_WITHIN)) {
                Established::Yes => last = Instant::now(),
                Established::Refused => drop(refused.insert(watcher.bridge.clone())),
                Established::No => {}
            }
        }
        Ok((watch, refused))
    }
}

impl RuleWatch for Watch {
    fn changed(&mut self, until: Instant) -> Result<BTreeSet<String>> {
        // First all are asked, then the answers are waited for: each takes a turn of the daemon's main loop.
        let asked: Vec<bool> = self.0.iter_mut().map(|watcher| watcher.ask(until)).collect();
        let answers = self.0.iter_mut().zip(asked).filter_map(|(watcher, asked)| {
            watcher.complete = asked && watcher.answered(until);
            let unchanged = watcher.complete && !watcher.text().changed;
            (!unchanged).then(|| watcher.bridge.clone())
        });
        Ok(answers.collect())
    }

    fn small_tables(&mut self, bridge: &str) -> Option<BridgeRules> {
        self.0.iter().find(|watcher| watcher.bridge == bridge)?.small_tables()
    }
}

/// What the child has printed, filled by a thread: a child whose pipe is full answers no more.
#[derive(Default)]
struct Printed {
    text: Mutex<Text>,
    more: Condvar,
}

impl Printed {
    fn end(&self) {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        self.more.notify_all();
    }
}

#[derive(Default)]
struct Text {
    text: String,
    barriers: usize,
    changed: bool,
    ended: bool,
}

impl Text {
    /// Takes in whole lines.
    fn take(&mut self, lines: &str) {
        self.barriers += lines.matches(BARRIER).count();
        self.changed |= lines.contains("event=") || self.text.len() + lines.len() > TEXT_MAX;
        if self.text.len() + lines.len() <= TEXT_MAX {
            self.text.push_str(lines);
        }
    }
}

fn is_readable(pipe: &ChildStdout) -> bool {
    let mut looked = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    poll(&mut looked, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Established {
    Yes,
    No,
    /// The bridge does not tell of changes in the connection's version.
    Refused,
}

struct Watcher {
    bridge: String,
    child: Child,
    control: PathBuf,
    /// What the bridge says to the request itself, before anything else is asked (`dump_transaction`).
    first: Option<ChildStdout>,
    printed: Arc<Printed>,
    barriers: usize,
    /// What its control socket was asked and has not answered: a barrier is answered when the bridge has.
    asked: Option<Asked>,
    /// The last question was answered.
    complete: bool,
    /// Where in the text the answers to the last [`Watcher::ask`] begin, if it asked for tables.
    answers_at: Option<usize>,
}

impl Watcher {
    /// With this OpenFlow version only, or any that the bridge speaks.
    fn start(openflow: &RealOpenFlow, bridge: &Bridge, version: Option<&str>) -> Result<(Self, Option<ChildStderr>)> {
        let spoken = if bridge.protocols.is_empty() { ANY_VERSION.into() } else { bridge.protocols.join(",") };
        let versions = version.map_or(spoken, str::to_owned);
        let target = openflow.target(&bridge.name);
        let words = ["--no-names", "-O", &versions, "monitor", &target, "watch:!initial"];
        let mut child = command::start(OVS_OFCTL, &words, Stdio::null())?;
        let (first, pipe) = (child.stdout.take(), child.stderr.take());
        let control = openflow.run_directory().join(format!("{OVS_OFCTL}.{}.ctl", child.id()));
        let (bridge, printed) = (bridge.name.clone(), Arc::default());
        Ok((
            Watcher {
                bridge,
                child,
                control,
                first,
                printed,
                barriers: 0,
                asked: None,
                complete: false,
                answers_at: None,
            },
            pipe,
        ))
    }

    /// It is established once a barrier has passed and nothing was refused; one that cannot watch has ended by then, or
    /// is ended, and counts as changed.
    fn establish(&mut self, until: Instant) -> Established {
        while !(self.barrier(until) && self.answered(until)) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return Established::No;
            }
            let Some(left) = remaining(until) else {
                self.end();
                return Established::No;
            };
            std::thread::sleep(left.min(LOOK_AGAIN));
        }
        // Then it stays all the same, and its barriers are answered.
        if self.was_refused() {
            self.end();
            return Established::Refused;
        }
        Established::Yes
    }

    /// Reads what there is and closes the pipe: nothing more is wanted from it.
    fn was_refused(&mut self) -> bool {
        let Some(mut first) = self.first.take() else { return false };
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        while text.len() < FIRST_MAX && is_readable(&first) {
            match first.read(&mut chunk) {
                Ok(n) if n > 0 => text.extend_from_slice(chunk.get(..n).unwrap_or_default()),
                _ => break,
            }
        }
        String::from_utf8_lossy(&text).contains("OFPT_ERROR")
    }

    fn end(&mut self) {
        command::end(&mut self.child);
        // Killed, it leaves its socket behind.
        let _ = std::fs::remove_file(&self.control);
    }

    fn text(&self) -> MutexGuard<'_, Text> {
        self.printed.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a barrier.
    fn barrier(&mut self, until: Instant) -> bool {
        self.send(Vec::new(), until)
    }

    /// Sends the requests for the small tables, where the connection's version has them all, and a barrier behind them.
    fn ask(&mut self, until: Instant) -> bool {
        let requests = self.protocol().and_then(requests);
        let from = self.text().text.len();
        self.answers_at = requests.is_some().then_some(from);
        self.send(requests.iter().map(|requests| ("ofctl/send", json!(requests))).collect(), until)
    }

    fn send(&mut self, mut commands: Vec<(&'static str, Value)>, until: Instant) -> bool {
        commands.push(("ofctl/barrier", json!([])));
        let exists = Path::new(&self.control).exists();
        self.asked = exists.then(|| unixctl::ask(&self.control, commands, until).ok()).flatten();
        self.asked.is_some()
    }

    /// When it returns true, all that came before what was [asked](Self::ask) last is in `printed`, and the answers to it.
    fn answered(&mut self, until: Instant) -> bool {
        let Some(asked) = self.asked.take() else { return false };
        let Ok(answers) = asked.wait(until) else { return false };
        self.barriers += usize::from(answers.last().is_some_and(Result::is_ok));
        if answers.iter().any(Result::is_err) {
            return false;
        }
        let mut text = self.text();
        while text.barriers < self.barriers && !text.ended {
            let Some(left) = remaining(until) else { return false };
            text = self.printed.more.wait_timeout(text, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        !text.ended
    }

    /// What the last question was answered, if it was.
    fn small_tables(&self) -> Option<BridgeRules> {
        let number = self.protocol().filter(|_| self.complete)?;
        let text = self.text();
        let answers = text.text.get(self.answers_at?..)?;
        // All three must have been answered, and none with an error.
        let answered = ["OFPST_GROUP_DESC reply", "OFPST_METER_CONFIG reply", "NXT_TLV_TABLE_REPLY"];
        if answers.contains("OFPT_ERROR") || !answered.iter().all(|reply| answers.contains(reply)) {
            return None;
        }
        Some(BridgeRules {
            bridge: self.bridge.clone(),
            protocol: format!("OpenFlow{number}"),
            tlv_map: parse_tlv_map(answers),
            meters: parse_meters(answers),
            groups: parse_groups(answers),
            ..BridgeRules::default()
        })
    }

    /// The version of the connection, as its barriers were printed: `OFPT_BARRIER_REPLY (OF1.5) (xid=...):`.
    fn protocol(&self) -> Option<u32> {
        let text = self.text();
        let (_, rest) = text.text.split_once(BARRIER)?;
        let minor = rest.strip_prefix(" (OF1.")?.split(')').next()?;
        Some(version_number(&format!("OpenFlow1{minor}"))).filter(|number| *number >= 13)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.end();
    }
}

/// What a child prints on.
struct Pipe {
    pipe: ChildStderr,
    printed: Arc<Printed>,
    /// The beginning of a line.
    rest: Vec<u8>,
}

/// Reads what all of them print, until all have ended: a thread for each of hundreds would take memory.
fn follow_all(mut pipes: Vec<Pipe>) {
    let mut chunk = vec![0; 65536];
    while !pipes.is_empty() {
        let mut looked: Vec<PollFd<'_>> =
            pipes.iter().map(|pipe| PollFd::new(pipe.pipe.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut looked, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                tracing::error!("watching rules: {errno}");
                return pipes.iter().for_each(|pipe| pipe.printed.end());
            }
        }
        let mut ready = looked.iter().map(|fd| fd.any().unwrap_or(false)).collect::<Vec<_>>().into_iter();
        pipes.retain_mut(|pipe| !ready.next().unwrap_or(false) || pipe.read(&mut chunk));
    }
}

impl Pipe {
    /// Reads once and takes in whole lines; false at the end.
    fn read(&mut self, chunk: &mut [u8]) -> bool {
        let n = match self.pipe.read(chunk) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => return true,
            Err(_) => 0,
        };
        self.rest.extend_from_slice(chunk.get(..n).unwrap_or_default());
        let whole = self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines: Vec<u8> = self.rest.drain(..whole).collect();
        let mut text = self.printed.text.lock().unwrap_or_else(PoisonError::into_inner);
        text.take(&String::from_utf8_lossy(&lines));
        text.ended |= n == 0;
        self.printed.more.notify_all();
        n > 0
    }
}

/// Requests for all groups, all meters and the TLV map, as hexadecimal text for `ofctl/send`.
/// OpenFlow 1.3 to 1.5, A.3.5 (multipart); `include/openflow/nicira-ext.h` (NXT_TLV_TABLE_REQUEST).
fn requests(number: u32) -> Option<[String; 3]> {
    // ofp_version: 4 is OpenFlow 1.3.
    let version = u8::try_from(number.checked_sub(13)? + 4).ok()?;
    let message = |kind: u8, xid: u32, body: &[u8]| {
        let length = u16::try_from(8 + body.len()).unwrap_or(u16::MAX);
        let header = [&[version, kind][..], &length.to_be_bytes(), &xid.to_be_bytes()].concat();
        header.iter().chain(body).map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    const MULTIPART_REQUEST: u8 = 18;
    const EXPERIMENTER: u8 = 4;
    // Type, no flags, padding; then, from 1.5 on for groups, OFPG_ALL; for meters OFPM_ALL.
    let mut groups = vec![0, 7, 0, 0, 0, 0, 0, 0];
    if number >= 15 {
        groups.extend([0xff, 0xff, 0xff, 0xfc, 0, 0, 0, 0]);
    }
    let meters = [0, 10, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
    let tlv_map = [0, 0, 0x23, 0x20, 0, 0, 0, 25];
    Some([
        message(MULTIPART_REQUEST, 0x0f67_0001, &groups),
        message(MULTIPART_REQUEST, 0x0f67_0002, &meters),
        message(EXPERIMENTER, 0x0f67_0003, &tlv_map),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_their_version_and_length() {
        let [groups, meters, tlv_map] = requests(15).unwrap();
        assert_eq!(groups, "061200180f6700010007000000000000fffffffc00000000");
        assert_eq!(meters, "061200180f670002000a000000000000ffffffff00000000");
        assert_eq!(tlv_map, "060400100f6700030000232000000019");
        assert_eq!(requests(13).unwrap()[0], "041200100f6700010007000000000000");
        assert!(requests(10).is_none());
    }

    #[test]
    fn changes_and_barriers_are_counted_and_text_is_bounded() {
        let mut text = Text::default();
        text.take("OFPT_BARRIER_REPLY (OF1.5) (xid=0x3):\n");
        assert_eq!((text.barriers, text.changed), (1, false));
        text.take(" event=ADDED table=0\n");
        assert!(text.changed);
        let mut text = Text { text: "x".repeat(TEXT_MAX), ..Text::default() };
        text.take("y\n");
        assert!(text.changed && text.text.len() == TEXT_MAX);
    }
}

//! Giving parked packets back to the datapath: in order within a flow, from every CPU, no faster than the daemon reads.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::time::{Duration, Instant};

use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
use nix::unistd::Pid;

use super::plan::{Origins, Replay, Unreplayable};
use super::reader::{boottime_ns, Shared};
use super::removal::grace_period;
use super::ring::Record;
use super::socket::Duplicates;
use super::successors::Successors;
use super::undo::Undone;
use crate::conntrack::{Connection, Connections, KernelConnections, Tuple};
use crate::error::{Error, Result};
use crate::flow_key;
use crate::ovs::{Execute, Ovs, Upcall};

/// More lanes than this do not make the daemon faster.
const MOST_LANES: usize = 16;
/// Packets executed with one request, at most: few, because each makes the daemon's handler run, on this very CPU, and
/// packets of a batch that come late hold up the next look at the daemon's queues.
const BATCH: usize = 16;
/// Packets taken out of memory at once.
const CHUNK: usize = 64;
/// Packets that are put in order before the first is given back.
const ORDERED: usize = 4096;
/// How long the first packets of flows that go on are waited for, at most.
const FIRST_PATIENCE: Duration = Duration::from_millis(50);
/// What a daemon needs to make a kernel flow of an upcall it has read.
const FIRST_FLOWS: Duration = Duration::from_millis(2);
/// Packets that wait in front of a lane.
const LANE_QUEUE: usize = 128;
/// How long to wait where there is no room or nothing to do.
const PAUSE: Duration = Duration::from_micros(200);
/// How long the new daemon's flows are waited for by packets that can only go on in them.
const GO_ON_PATIENCE: Duration = Duration::from_secs(1);
/// Time between two looks at its flows.
const GO_ON_POLL: Duration = Duration::from_millis(20);
/// Parked times are counted in steps of a millisecond up to a minute.
const HISTOGRAM_MS: usize = 60_000;

/// What a replay needs to know.
#[derive(Debug)]
pub struct ReplayInput<'a> {
    /// Where packets on old recirculation ids come from.
    pub origins: &'a Origins<'a>,
    /// The upcall sockets of the daemon that is bound now: no faster than half of each buffer stays free. Without any,
    /// packets are given back as fast as they can.
    pub daemon: &'a Duplicates,
    /// When to stop waiting for the daemon and for stragglers. Packets not yet taken out then stay parked.
    pub limit: Duration,
}

/// What a replay did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReplayReport {
    /// Packets the datapath took.
    pub replayed: u64,
    /// Of them, those of which something was taken back before they started again: `nat` (address translation),
    /// `headers` (set, push, pop, TTL). A packet with both counts in both. And `continued`: those that went on where
    /// they were, because they could not start again.
    pub undone: BTreeMap<String, u64>,
    /// Packets that must not be replayed, by [`Unreplayable::name`].
    pub unreplayable: BTreeMap<String, u64>,
    /// Packets the datapath did not take, by errno.
    pub errors: BTreeMap<String, u64>,
    /// Packets that are still parked, because the limit came first.
    pub left: u64,
    /// Longest time from a packet's arrival to its execution, ms.
    pub longest_ms: u64,
    /// 99 of 100 packets waited no longer, ms.
    pub p99_ms: u64,
    /// Threads that replayed.
    pub lanes: usize,
    /// Time spent waiting for room in the daemon's sockets, over all lanes.
    pub paused: Duration,
    /// How long the replay took.
    pub duration: Duration,
}

/// A thread's own handle and CPU.
#[derive(Debug)]
pub(super) struct Lane {
    ovs: Ovs,
    connections: Tracking,
    cpu: Option<usize>,
}

/// The connection table; a kernel without one answers every question with the error it gave at the opening.
#[derive(Debug)]
struct Tracking(std::result::Result<KernelConnections, String>);

impl Connections for Tracking {
    fn find(&mut self, zone: u16, tuple: &Tuple) -> Result<Option<Connection>> {
        match &mut self.0 {
            Ok(table) => table.find(zone, tuple),
            Err(why) => Err(Error::Unsupported {
                what: "connection table".into(),
                why: why.clone(),
                remedy: "load nf_conntrack_netlink".into(),
            }),
        }
    }
}

/// One lane for each CPU this process may use: the port id an upcall goes to comes from the CPU it is made on, so that
/// one thread would fill one handler's socket (hazard 13).
pub(super) fn open_lanes() -> Result<Vec<Lane>> {
    let cpus: Vec<usize> = sched_getaffinity(Pid::from_raw(0)).map_or_else(
        |_| Vec::new(),
        |set| (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect(),
    );
    let wanted: Vec<Option<usize>> =
        if cpus.is_empty() { vec![None] } else { cpus.into_iter().take(MOST_LANES).map(Some).collect() };
    let open = |cpu| {
        let connections = Tracking(KernelConnections::open().map_err(|e| e.to_string()));
        Ok(Lane { ovs: Ovs::open()?, connections, cpu })
    };
    wanted.into_iter().map(open).collect()
}

#[derive(Clone, Debug)]
struct Parked {
    arrival: u64,
    upcall: Upcall,
}

impl Parked {
    /// Memory its upcall will take in the daemon's socket, bytes: the kernel rounds up to powers of two and adds the
    /// sk_buff.
    fn room(&self) -> usize {
        2 * (self.upcall.packet.len() + self.upcall.key.len() + 256) + 1024
    }
}

/// Replays everything that is parked, and what still arrives until the sockets are silent.
pub(super) fn replay(shared: &Shared, lanes: &mut [Lane], input: &ReplayInput<'_>) -> Result<ReplayReport> {
    let start = Instant::now();
    let deadline = start + input.limit;
    let count = lanes.len();
    let done = AtomicU64::new(0);
    let mut tally = Tally::default();
    let outcome = std::thread::scope(|scope| {
        let mut senders = Vec::with_capacity(count);
        let mut workers = Vec::with_capacity(count);
        for lane in lanes.iter_mut() {
            let (sender, receiver) = sync_channel(LANE_QUEUE);
            senders.push(sender);
            let work = Work { input, deadline, lanes: count, done: &done };
            workers.push(scope.spawn(move || work.run(lane, &receiver)));
        }
        let work = Work { input, deadline, lanes: count, done: &done };
        let outcome = dispatch(shared, &mut Lanes { lanes: &senders, sent: 0 }, &work, &mut tally);
        drop(senders);
        for worker in workers {
            match worker.join() {
                Ok(part) => tally.add(part),
                Err(_) => tally.error("replay thread ended early", 1),
            }
        }
        outcome
    });
    outcome?;
    let late = std::mem::take(&mut tally.late);
    match lanes.first_mut() {
        Some(lane) => Work { input, deadline, lanes: 1, done: &done }.go_on(lane, late, &mut tally),
        None => late.iter().for_each(|(_, reason)| tally.unreplayable(*reason)),
    }
    commit(shared)?;
    let mut report = tally.report;
    report.left = shared.store().waiting();
    report.p99_ms = tally.waits.percentile(99);
    report.longest_ms = tally.waits.longest;
    report.lanes = count;
    report.duration = start.elapsed();
    Ok(report)
}

/// A crash before this brings packets back that have been given back already; after it none that has not.
fn commit(shared: &Shared) -> Result<()> {
    shared.store().commit().map_err(|e| crate::Error::io("write to the memfd of parked packets", e))
}

/// Where packets go, all of a flow to the same lane.
struct Lanes<'a> {
    lanes: &'a [SyncSender<Parked>],
    sent: u64,
}

impl Lanes<'_> {
    fn send(&mut self, parked: Parked, tally: &mut Tally) {
        let lane = flow_key::flow_hash(&parked.upcall.key) % self.lanes.len().max(1) as u64;
        match self.lanes.get(lane as usize).is_some_and(|to| to.send(parked).is_ok()) {
            true => self.sent += 1,
            false => tally.error("replay thread ended early", 1),
        }
    }
}

/// Takes up to `most` packets out of memory.
fn take(shared: &Shared, most: usize, tally: &mut Tally) -> Result<Vec<Parked>> {
    let records = shared.store().pop(most).map_err(|e| crate::Error::io("read parked packets", e))?;
    let parse = |record: Record| match Upcall::parse(&record.message) {
        Ok(upcall) => Some(Parked { arrival: record.arrival, upcall }),
        Err(_) => {
            tally.unreplayable(Unreplayable::Malformed);
            None
        }
    };
    Ok(records.into_iter().filter_map(parse).collect())
}

/// The first packet of each flow that has several, and all others, the rest of these flows before the single ones.
/// Within a flow the order stays.
fn in_order(parked: Vec<Parked>) -> (Vec<Parked>, Vec<Parked>) {
    let mut packets: HashMap<u64, usize> = HashMap::new();
    let named: Vec<(u64, Parked)> =
        parked.into_iter().map(|parked| (flow_key::flow_hash(&parked.upcall.key), parked)).collect();
    named.iter().for_each(|(flow, _)| *packets.entry(*flow).or_default() += 1);
    let (several, single): (Vec<_>, Vec<_>) = named.into_iter().partition(|(flow, _)| packets[flow] > 1);
    let mut begun = HashSet::new();
    let (first, next): (Vec<_>, Vec<_>) = several.into_iter().partition(|(flow, _)| begun.insert(*flow));
    let plain = |named: Vec<(u64, Parked)>| named.into_iter().map(|(_, parked)| parked);
    (plain(first).collect(), plain(next).chain(plain(single)).collect())
}

/// Hands packets out to the lanes until there are none. Flows that go on come first, one packet of each: as long as the
/// daemon has made no kernel flow of it, each of their packets, parked or new, is an upcall that keeps it from the next.
fn dispatch(shared: &Shared, lanes: &mut Lanes<'_>, work: &Work<'_>, tally: &mut Tally) -> Result<()> {
    let (first, next) = in_order(take(shared, ORDERED, tally)?);
    first.into_iter().for_each(|parked| lanes.send(parked, tally));
    if lanes.sent > 0 {
        work.wait_for_flows(lanes.sent);
    }
    next.into_iter().for_each(|parked| lanes.send(parked, tally));
    let mut silent_before = false;
    while Instant::now() < work.deadline {
        if work.is_done_with(lanes.sent) {
            commit(shared)?;
        }
        let parked = take(shared, CHUNK, tally)?;
        if parked.is_empty() {
            if !shared.is_empty() {
                std::thread::sleep(PAUSE);
            } else if silent_before {
                return Ok(());
            } else {
                // A CPU may still be about to queue an upcall for the port id it read before the change.
                grace_period();
                silent_before = true;
            }
            continue;
        }
        parked.into_iter().for_each(|parked| lanes.send(parked, tally));
    }
    Ok(())
}

/// What a lane does.
struct Work<'a> {
    input: &'a ReplayInput<'a>,
    deadline: Instant,
    lanes: usize,
    /// Packets that will not be looked at again.
    done: &'a AtomicU64,
}

impl Work<'_> {
    fn run(&self, lane: &mut Lane, from: &Receiver<Parked>) -> Tally {
        if let Some(cpu) = lane.cpu {
            let mut set = CpuSet::new();
            // A CPU that went offline leaves the thread where it is: slower, not wrong.
            let _ = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
        }
        let mut tally = Tally::default();
        let mut waiting: VecDeque<Parked> = VecDeque::new();
        loop {
            if waiting.is_empty() {
                let Ok(first) = from.recv() else { return tally };
                waiting.push_back(first);
            }
            while waiting.len() < BATCH {
                let Ok(next) = from.try_recv() else { break };
                waiting.push_back(next);
            }
            let room = self.wait_for_room(waiting.front().map_or(0, Parked::room), &mut tally);
            let batch = take_while_it_fits(&mut waiting, room);
            self.execute(lane, &batch, &mut tally);
        }
    }

    /// Are the lanes done with all that they were given?
    fn is_done_with(&self, sent: u64) -> bool {
        self.done.load(Ordering::SeqCst) == sent
    }

    /// Until the daemon has taken what the lanes were given, and a moment more for the kernel flows that it makes of it.
    fn wait_for_flows(&self, sent: u64) {
        let until = self.deadline.min(Instant::now() + FIRST_PATIENCE);
        while Instant::now() < until && !(self.is_done_with(sent) && self.input.daemon.is_idle()) {
            std::thread::sleep(PAUSE);
        }
        std::thread::sleep(FIRST_FLOWS.min(until.saturating_duration_since(Instant::now())));
    }

    /// Bytes this lane may fill in the daemon's sockets now: its share of the fullest one's free half.
    fn wait_for_room(&self, needed: usize, tally: &mut Tally) -> usize {
        let start = Instant::now();
        loop {
            // A daemon whose sockets cannot be asked is not waited for.
            let Ok(room) = self.input.daemon.headroom() else { return usize::MAX };
            let share = room / self.lanes.max(1);
            if share >= needed || self.input.daemon.is_idle() || Instant::now() >= self.deadline {
                tally.report.paused += start.elapsed();
                return share;
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn execute(&self, lane: &mut Lane, batch: &[Parked], tally: &mut Tally) {
        let late_before = tally.late.len();
        let mut planned: Vec<(&Parked, Replay<'_>, Vec<u8>)> = Vec::with_capacity(batch.len());
        for parked in batch {
            match self.input.origins.plan(&parked.upcall, &mut lane.connections) {
                Ok(replay) => {
                    let actions = replay.actions();
                    planned.push((parked, replay, actions));
                }
                Err(reason) if reason.may_go_on() => tally.late.push((parked.clone(), reason)),
                Err(reason) => tally.unreplayable(reason),
            }
        }
        self.give_back(lane, &planned, tally);
        let late = tally.late.len() - late_before;
        self.done.fetch_add((batch.len() - late) as u64, Ordering::SeqCst);
    }

    /// Packets that cannot start again go on where they were, once the new daemon's flows tell where that is.
    fn go_on(&self, lane: &mut Lane, mut late: Vec<(Parked, Unreplayable)>, tally: &mut Tally) {
        let until = self.deadline.min(Instant::now() + GO_ON_PATIENCE);
        while !late.is_empty() {
            let mut successors: BTreeMap<u32, Successors> = BTreeMap::new();
            for (parked, _) in &late {
                let ifindex = parked.upcall.ifindex;
                // A table that cannot be read is asked again.
                successors
                    .entry(ifindex)
                    .or_insert_with(|| Successors::of(&lane.ovs.flows(ifindex).unwrap_or_default()));
            }
            let mut later = Vec::new();
            for (parked, reason) in late {
                let found = successors
                    .get(&parked.upcall.ifindex)
                    .and_then(|table| self.input.origins.go_on(&parked.upcall, table, &mut lane.connections));
                match found {
                    Some(replay) => {
                        self.wait_for_room(parked.room(), tally);
                        let actions = replay.actions();
                        self.give_back(lane, &[(&parked, replay, actions)], tally);
                    }
                    None => later.push((parked, reason)),
                }
            }
            late = later;
            if Instant::now() >= until {
                break;
            }
            std::thread::sleep(GO_ON_POLL);
        }
        late.iter().for_each(|(_, reason)| tally.unreplayable(*reason));
    }

    fn give_back(&self, lane: &mut Lane, planned: &[(&Parked, Replay<'_>, Vec<u8>)], tally: &mut Tally) {
        for run in planned.chunk_by(|(a, ..), (b, ..)| a.upcall.ifindex == b.upcall.ifindex) {
            let Some((first, ..)) = run.first() else { continue };
            let requests: Vec<Execute<'_>> = run
                .iter()
                .map(|(parked, replay, actions)| Execute {
                    packet: &replay.packet,
                    key: &replay.key,
                    actions,
                    mru: parked.upcall.mru,
                    hash: parked.upcall.hash,
                })
                .collect();
            match lane.ovs.execute(first.upcall.ifindex, &requests) {
                Ok(answers) => {
                    let now = boottime_ns();
                    for ((parked, replay, _), answer) in run.iter().zip(answers) {
                        tally.executed(now.saturating_sub(parked.arrival), replay.undone, answer);
                    }
                }
                Err(e) => tally.error(&e.to_string(), run.len() as u64),
            }
        }
    }
}

/// The packets that fit into `room` bytes, at least one, at most a batch.
fn take_while_it_fits(waiting: &mut VecDeque<Parked>, room: usize) -> Vec<Parked> {
    let mut batch = Vec::new();
    let mut used = 0usize;
    while batch.len() < BATCH {
        let Some(next) = waiting.front() else { break };
        used = used.saturating_add(next.room());
        if used > room && !batch.is_empty() {
            break;
        }
        batch.extend(waiting.pop_front());
    }
    batch
}

/// Counts of a lane, added up in the end.
#[derive(Debug, Default)]
struct Tally {
    report: ReplayReport,
    waits: Waits,
    /// What can only go on where it was.
    late: Vec<(Parked, Unreplayable)>,
}

impl Tally {
    fn unreplayable(&mut self, reason: Unreplayable) {
        *self.report.unreplayable.entry(reason.name().to_owned()).or_default() += 1;
    }

    fn error(&mut self, what: &str, packets: u64) {
        *self.report.errors.entry(what.to_owned()).or_default() += packets;
    }

    fn executed(&mut self, waited_ns: u64, undone: Undone, answer: Option<nix::errno::Errno>) {
        match answer {
            None => {
                self.report.replayed += 1;
                for what in undone.names() {
                    *self.report.undone.entry(what.to_owned()).or_default() += 1;
                }
                self.waits.count(waited_ns / 1_000_000);
            }
            Some(errno) => self.error(&format!("{errno:?}"), 1),
        }
    }

    fn add(&mut self, other: Tally) {
        self.report.replayed += other.report.replayed;
        self.report.paused += other.report.paused;
        for (what, n) in other.report.undone {
            *self.report.undone.entry(what).or_default() += n;
        }
        for (reason, n) in other.report.unreplayable {
            *self.report.unreplayable.entry(reason).or_default() += n;
        }
        for (what, n) in other.report.errors {
            self.error(&what, n);
        }
        self.waits.add(&other.waits);
        self.late.extend(other.late);
    }
}

/// How long packets waited, in a memory that does not grow with their number.
#[derive(Debug, Default)]
struct Waits {
    by_ms: BTreeMap<u64, u64>,
    longest: u64,
}

impl Waits {
    fn count(&mut self, ms: u64) {
        *self.by_ms.entry(ms.min(HISTOGRAM_MS as u64)).or_default() += 1;
        self.longest = self.longest.max(ms);
    }

    fn add(&mut self, other: &Waits) {
        for (ms, n) in &other.by_ms {
            *self.by_ms.entry(*ms).or_default() += n;
        }
        self.longest = self.longest.max(other.longest);
    }

    /// The least time that `percent` of the packets did not exceed, ms; 0 without packets.
    fn percentile(&self, percent: u64) -> u64 {
        let all: u64 = self.by_ms.values().sum();
        let rank = (all * percent).div_ceil(100);
        let mut seen = 0;
        for (ms, n) in &self.by_ms {
            seen += n;
            if seen >= rank {
                return *ms;
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attr::AttrBuf;
    use crate::ovs::UpcallKind;

    fn parked(bytes: usize) -> Parked {
        let upcall = Upcall {
            kind: UpcallKind::Miss,
            ifindex: 1,
            packet: vec![0; bytes],
            key: Vec::new(),
            userdata: None,
            actions: None,
            egress_tun_key: None,
            mru: None,
            len: None,
            hash: None,
            unknown: Vec::new(),
        };
        Parked { arrival: 0, upcall }
    }

    #[test]
    fn a_batch_fits_the_room_but_is_never_empty() {
        let mut waiting: VecDeque<Parked> = (0..10).map(|_| parked(100)).collect();
        let one = waiting[0].room();
        assert_eq!(take_while_it_fits(&mut waiting, 3 * one + 1).len(), 3);
        assert_eq!(take_while_it_fits(&mut waiting, 0).len(), 1);
        assert_eq!(take_while_it_fits(&mut waiting, usize::MAX).len(), 6);
        assert!(take_while_it_fits(&mut waiting, usize::MAX).is_empty());
        let mut many: VecDeque<Parked> = (0..200).map(|_| parked(1)).collect();
        assert_eq!(take_while_it_fits(&mut many, usize::MAX).len(), BATCH);
    }

    #[test]
    fn flows_that_go_on_come_first_and_none_is_put_out_of_order() {
        let of = |port: u32, arrival: u64| {
            let mut key = AttrBuf::new();
            key.push_u32(flow_key::uapi::key::IN_PORT, port);
            let mut parked = parked(60);
            parked.upcall.key = key.as_bytes().to_vec();
            parked.arrival = arrival;
            parked
        };
        let arrivals = [(1, 1), (2, 2), (3, 3), (2, 4), (4, 5), (3, 6), (2, 7)].map(|(port, at)| of(port, at));
        let (first, next) = in_order(arrivals.to_vec());
        let when = |parked: &[Parked]| parked.iter().map(|parked| parked.arrival).collect::<Vec<_>>();
        assert_eq!(when(&first), [2, 3]);
        assert_eq!(when(&next), [4, 6, 7, 1, 5]);
    }

    #[test]
    fn percentiles_of_waits() {
        let mut waits = Waits::default();
        assert_eq!((waits.percentile(99), waits.longest), (0, 0));
        (1..=100).for_each(|ms| waits.count(ms));
        assert_eq!((waits.percentile(99), waits.percentile(50), waits.longest), (99, 50, 100));
        waits.count(10 * HISTOGRAM_MS as u64);
        assert_eq!(waits.longest, 10 * HISTOGRAM_MS as u64);
    }
}

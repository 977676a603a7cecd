//! Removal of the flows that a new daemon cannot keep, in an order that strands no packet.
//!
//! A new daemon knows neither the recirculation ids nor the cookies nor the meter ids of the old one. Flows that use
//! them go while misses are parked: their packets then miss, and are replayed to the new daemon (hazards 8, 11, 12).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::flow_key::uapi::key;
use crate::flow_key::{self, ActionSummary, Cookie};
use crate::netlink::attr::Attrs;
use crate::ovs::{Flow, Ovs};

/// How long to wait for readers in the kernel where membarrier(2) is refused (hazard 12).
const GRACE_SLEEP: Duration = Duration::from_millis(20);
/// `MEMBARRIER_CMD_GLOBAL` (include/uapi/linux/membarrier.h): returns after an RCU grace period of every CPU.
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// The Ethernet type that `check_ufid` asks the datapath about.
const UFID_PROBE: u16 = 0x1234;

/// Why a flow cannot survive. In the order in which reasons are tried: a flow is counted under the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Doom {
    /// Entered with recirculation id 0, sends packets on to an old id, at any depth. (Nested in sample or
    /// check_pkt_len the new daemon would even keep it, and the id would come to mean something else.)
    Root,
    /// Matches an old recirculation id.
    Child,
    /// Has a cookie of the old daemon for the slow path.
    SlowPath,
    /// Has a cookie of the old daemon for a controller.
    Controller,
    /// Uses a meter, whose id will be given out anew.
    Metered,
    /// Has a cookie of the old daemon for sFlow, IPFIX or a flow sample. A daemon that gets a copy with the cookie of a
    /// bridge that is no more puts in an exact flow that drops (`recv_upcalls`, ofproto-dpif-upcall.c): once its
    /// revalidators have deleted the flow that was kept, that one eats the packets.
    Sampled,
    /// Appeared after the snapshot and forwards nothing.
    Drop,
}

/// Why `flow` cannot survive; None if it can. [`Doom::Drop`] is not decided here: see [`suspicious_since`].
///
/// # Errors
/// Key or actions are malformed.
pub fn doom_of(flow: &Flow) -> Result<Option<Doom>> {
    if flow_key::recirc_id(&flow.key)? != 0 {
        return Ok(Some(Doom::Child));
    }
    let actions = ActionSummary::of(&flow.actions)?;
    Ok(if !actions.recirculations.is_empty() {
        Some(Doom::Root)
    } else if actions.has_cookie(Cookie::SlowPath) {
        Some(Doom::SlowPath)
    } else if actions.has_cookie(Cookie::Controller) {
        Some(Doom::Controller)
    } else if !actions.meters.is_empty() {
        Some(Doom::Metered)
    } else if actions.userspace.iter().any(|u| u.cookie.is_sampling()) {
        Some(Doom::Sampled)
    } else {
        None
    })
}

/// The flows of `now` (their indexes) by which a daemon that starts finds out what the datapath can do: those that
/// appeared without a UFID since `before`, as no flow does that a daemon forwards with, and that for UFIDs itself. Each is
/// put in, asked for and deleted by its key within a moment, and so is the next one of the same key
/// (`dpif_probe_feature`, lib/dpif.c). Deleted in between by us, that feature would be missing to the daemon for its
/// whole life (hazard 6). So they are let alone, and nobody waits for them.
pub fn feature_probes(before: &[Flow], now: &[Flow]) -> HashSet<usize> {
    let known: HashSet<&[u8]> = before.iter().filter(|flow| flow.ufid.is_none()).map(|flow| &flow.key[..]).collect();
    let probes = |flow: &Flow| match flow.ufid {
        Some(_) => probes_ufid(flow),
        None => !known.contains(&flow.key[..]),
    };
    now.iter().enumerate().filter(|(_, flow)| probes(flow)).map(|(i, _)| i).collect()
}

/// Whether it is the flow of `check_ufid` (ofproto/ofproto-dpif.c): no actions, for an Ethernet type that nothing has.
fn probes_ufid(flow: &Flow) -> bool {
    let ethertype = Attrs(&flow.key).find(key::ETHERTYPE).ok().flatten();
    flow.actions.is_empty() && ethertype.is_some_and(|attr| attr.payload == UFID_PROBE.to_be_bytes())
}

/// Probes as in [`feature_probes`] of a daemon that is no more: between addresses that are all zero and from port 0, the
/// datapath's own device, where nothing comes from.
fn left_probes(flows: &[Flow]) -> impl Iterator<Item = &Flow> {
    flows.iter().filter(|flow| (flow.ufid.is_none() || probes_ufid(flow)) && is_from_nowhere(&flow.key))
}

fn is_from_nowhere(key: &[u8]) -> bool {
    let all_zero = |attr| Attrs(key).find(attr).ok().flatten().is_some_and(|attr| attr.payload.iter().all(|b| *b == 0));
    all_zero(key::ETHERNET) && all_zero(key::IN_PORT)
}

/// Removes from datapath `ifindex` what a daemon that was killed while it found out what the datapath can do has left of
/// that, and returns how many flows it were. Such a flow need not match the Ethernet type: a daemon that starts while it is
/// there cannot put its own probes beside it (ENOENT) and goes on, for its whole life, as if the datapath could not
/// recirculate (`check_support`, ofproto/ofproto-dpif.c; one that is not told to wait for its rules flushes first). To be
/// called while no daemon starts.
///
/// # Errors
/// The dump failed, or one of them could not be deleted.
pub fn remove_left_probes(ovs: &mut Ovs, ifindex: u32) -> Result<u64> {
    let mut table = KernelTable { ovs, ifindex };
    let dump = table.dump()?;
    let left: Vec<&Flow> = left_probes(&dump).collect();
    if left.is_empty() {
        return Ok(0);
    }
    let failed = table.delete(&left)?.into_iter().flatten().find(|errno| *errno != Errno::ENOENT);
    match failed {
        Some(errno) => Err(Error::io("deleting what a daemon has left of its feature probes", errno)),
        None => Ok(left.len() as u64),
    }
}

/// The flows of `now` (their indexes) that forward nothing and did not stand so in `before`: made by an old daemon
/// that was already losing its rules (hazard 8). Sampling copies are no forwarding.
pub fn suspicious_since(before: &[Flow], now: &[Flow]) -> Vec<usize> {
    let drops = |flow: &Flow| ActionSummary::of(&flow.actions).is_ok_and(|a| !a.forwards());
    fn name(flow: &Flow) -> (Option<[u8; 16]>, &[u8]) {
        match flow.ufid {
            Some(ufid) => (Some(ufid), &[]),
            None => (None, &flow.key),
        }
    }
    let known: HashMap<_, &Flow> = before.iter().map(|f| (name(f), f)).collect();
    let stood_so = |flow: &Flow| known.get(&name(flow)).is_some_and(|old| drops(old));
    now.iter().enumerate().filter(|(_, flow)| drops(flow) && !stood_so(flow)).map(|(i, _)| i).collect()
}

/// What is done to a flow table during the removal; the kernel's, or one of a test.
pub trait FlowTable {
    /// Every flow.
    ///
    /// # Errors
    /// The dump failed or stayed incomplete.
    fn dump(&mut self) -> Result<Vec<Flow>>;
    /// Deletes `flows`, and says of each in order whether and why it failed.
    ///
    /// # Errors
    /// The requests could not be sent or answered at all.
    fn delete(&mut self, flows: &[&Flow]) -> Result<Vec<Option<Errno>>>;
    /// Returns when no packet is under way any more that has seen the table as it was before.
    fn grace(&mut self) -> Grace;
}

/// How the grace period was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grace {
    /// membarrier(2)
    Membarrier,
    /// A sleep of 20 ms, because membarrier(2) was refused (nohz_full, seccomp).
    Slept,
}

/// Waits until every CPU has left the RCU read section it may be in: packets on their way through the flow table.
pub fn grace_period() -> Grace {
    // SAFETY: membarrier(2) takes three integers and touches no memory of ours.
    let answer = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if answer == 0 {
        return Grace::Membarrier;
    }
    std::thread::sleep(GRACE_SLEEP);
    Grace::Slept
}

struct KernelTable<'a> {
    ovs: &'a mut Ovs,
    ifindex: u32,
}

impl FlowTable for KernelTable<'_> {
    fn dump(&mut self) -> Result<Vec<Flow>> {
        self.ovs.flows(self.ifindex)
    }

    fn delete(&mut self, flows: &[&Flow]) -> Result<Vec<Option<Errno>>> {
        let mut answers = vec![None; flows.len()];
        let (named, keyed): (Vec<usize>, Vec<usize>) = (0..flows.len()).partition(|i| flows[*i].ufid.is_some());
        let ufids: Vec<[u8; 16]> = named.iter().filter_map(|i| flows[*i].ufid).collect();
        if !ufids.is_empty() {
            for (i, answer) in named.iter().zip(self.ovs.flow_del_ufids(self.ifindex, &ufids)?) {
                answers[*i] = answer;
            }
        }
        let keys: Vec<Vec<u8>> = keyed.iter().map(|i| flows[*i].key.clone()).collect();
        if !keys.is_empty() {
            for (i, answer) in keyed.iter().zip(self.ovs.flow_del_keys(self.ifindex, &keys)?) {
                answers[*i] = answer;
            }
        }
        Ok(answers)
    }

    fn grace(&mut self) -> Grace {
        grace_period()
    }
}

/// What the removal did.
#[derive(Clone, Debug, Default)]
pub struct RemovalReport {
    /// The table as it was before anything was removed. The replay needs it.
    pub dump: Vec<Flow>,
    /// Flows removed, by reason.
    pub roots: u64,
    /// See [`Doom::Child`].
    pub children: u64,
    /// See [`Doom::SlowPath`].
    pub slow_path: u64,
    /// See [`Doom::Controller`].
    pub controller: u64,
    /// See [`Doom::Metered`].
    pub metered: u64,
    /// See [`Doom::Sampled`].
    pub sampled: u64,
    /// See [`Doom::Drop`].
    pub drops: u64,
    /// Of them, how many were already gone when their turn came (ENOENT).
    pub already_gone: u64,
    /// Deletions that failed otherwise, by errno. Such a flow is still there and is not counted above.
    pub errors: BTreeMap<String, u64>,
    /// Flows whose key or actions could not be read; they were left.
    pub malformed: u64,
    /// Whether membarrier(2) was refused and a sleep took its place.
    pub slept: bool,
    /// How long the dump took.
    pub dump_time: Duration,
    /// How long the deletions and the grace period took.
    pub removal_time: Duration,
}

impl RemovalReport {
    /// All flows removed.
    pub fn removed(&self) -> u64 {
        self.roots + self.children + self.slow_path + self.controller + self.metered + self.sampled + self.drops
    }

    /// Flows removed by reason, under the names of the report.
    pub fn by_reason(&self) -> BTreeMap<String, u64> {
        [
            ("recirculation_root", self.roots),
            ("recirculation_child", self.children),
            ("slow_path", self.slow_path),
            ("controller", self.controller),
            ("metered", self.metered),
            ("sampled", self.sampled),
            ("suspicious_drop", self.drops),
        ]
        .into_iter()
        .filter(|(_, n)| *n > 0)
        .map(|(reason, n)| (reason.to_owned(), n))
        .collect()
    }

    fn count(&mut self, doom: Doom, answer: Option<Errno>) {
        match answer {
            None => {}
            Some(Errno::ENOENT) => self.already_gone += 1,
            Some(errno) => {
                *self.errors.entry(format!("{errno:?}")).or_default() += 1;
                return;
            }
        }
        *match doom {
            Doom::Root => &mut self.roots,
            Doom::Child => &mut self.children,
            Doom::SlowPath => &mut self.slow_path,
            Doom::Controller => &mut self.controller,
            Doom::Metered => &mut self.metered,
            Doom::Sampled => &mut self.sampled,
            Doom::Drop => &mut self.drops,
        } += 1;
    }
}

/// A flow table, and which of its flows cannot survive.
#[derive(Debug)]
pub struct Chosen {
    dump: Vec<Flow>,
    dump_time: Duration,
    /// Roots, then what else a packet meets in table 0.
    first: Batch,
    children: Batch,
    malformed: u64,
}

impl Chosen {
    /// Dumps datapath `ifindex` and chooses. `snapshot` are the flows as they were while the old daemon was whole: what
    /// has become a drop since goes as well.
    ///
    /// # Errors
    /// The dump failed or stayed incomplete.
    pub fn now(ovs: &mut Ovs, ifindex: u32, snapshot: &[Flow]) -> Result<Chosen> {
        Chosen::of(&mut KernelTable { ovs, ifindex }, snapshot)
    }

    fn of(table: &mut impl FlowTable, snapshot: &[Flow]) -> Result<Chosen> {
        let start = Instant::now();
        let dump = table.dump()?;
        let dump_time = start.elapsed();
        let probes = feature_probes(snapshot, &dump);
        let mut doomed: BTreeMap<usize, Doom> = BTreeMap::new();
        let mut malformed = 0;
        for (i, flow) in dump.iter().enumerate().filter(|(i, _)| !probes.contains(i)) {
            match doom_of(flow) {
                Ok(Some(doom)) => {
                    doomed.insert(i, doom);
                }
                Ok(None) => {}
                Err(_) => malformed += 1,
            }
        }
        for i in suspicious_since(snapshot, &dump) {
            if !probes.contains(&i) && doom_of(&dump[i]).is_ok() {
                doomed.entry(i).or_insert(Doom::Drop);
            }
        }
        let (children, mut first): (Batch, Batch) = doomed.into_iter().partition(|(_, doom)| *doom == Doom::Child);
        first.sort_by_key(|(_, doom)| *doom);
        Ok(Chosen { dump, dump_time, first, children, malformed })
    }

    /// The flow table that it was chosen from.
    pub fn dump(&self) -> &[Flow] {
        &self.dump
    }
}

/// Removes from datapath `ifindex` every flow that cannot survive. To be called while misses are parked and no
/// daemon changes flows, from the dump for `chosen` on.
///
/// # Errors
/// A whole batch failed; what was removed until then stays removed, and a second call finishes it.
pub fn remove_doomed(ovs: &mut Ovs, ifindex: u32, chosen: Chosen) -> Result<RemovalReport> {
    remove_doomed_from(&mut KernelTable { ovs, ifindex }, chosen)
}

/// [`remove_doomed`] on any table.
///
/// # Errors
/// As there.
pub fn remove_doomed_from(table: &mut impl FlowTable, chosen: Chosen) -> Result<RemovalReport> {
    let Chosen { dump, dump_time, first, children, malformed } = chosen;
    let mut report = RemovalReport { dump_time, malformed, ..RemovalReport::default() };
    let start = Instant::now();
    // First whatever a packet meets in table 0: from then on no packet starts towards a child. Only when those
    // already on their way have arrived may the children go, else they would miss on an id nobody knows. Then no packet
    // is under way that has seen a child: recirculation does not leave the RCU section that the packet came in with
    // (process_deferred_actions, net/openvswitch/actions.c).
    if !first.is_empty() || !children.is_empty() {
        delete(table, &dump, &first, &mut report)?;
        report.slept = table.grace() == Grace::Slept;
        delete(table, &dump, &children, &mut report)?;
    }
    report.removal_time = start.elapsed();
    report.dump = dump;
    Ok(report)
}

type Batch = Vec<(usize, Doom)>;

fn delete(table: &mut impl FlowTable, dump: &[Flow], batch: &Batch, report: &mut RemovalReport) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    let flows: Vec<&Flow> = batch.iter().map(|(i, _)| &dump[*i]).collect();
    for ((_, doom), answer) in batch.iter().zip(table.delete(&flows)?) {
        report.count(*doom, answer);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow_key::uapi::{action, cookie, SAMPLE_ATTR_ACTIONS, USERSPACE_ATTR_USERDATA};
    use crate::netlink::attr::AttrBuf;

    fn flow(id: u8, recirc: u32, build: impl FnOnce(&mut AttrBuf)) -> Flow {
        let mut k = AttrBuf::new();
        k.push_u32(key::RECIRC_ID, recirc).push_u32(key::IN_PORT, u32::from(id));
        let mut a = AttrBuf::new();
        build(&mut a);
        let (key, actions) = (k.as_bytes().to_vec(), a.as_bytes().to_vec());
        Flow { ufid: Some([id; 16]), key, actions, ..Flow::default() }
    }

    fn userspace(kind: u16) -> AttrBuf {
        let mut inner = AttrBuf::new();
        inner.push_u32(1, 77).push(USERSPACE_ATTR_USERDATA, &[&kind.to_ne_bytes()[..], &[0; 46]].concat());
        let mut outer = AttrBuf::new();
        outer.push_nested(action::USERSPACE, &inner);
        outer
    }

    fn table() -> Vec<Flow> {
        vec![
            flow(1, 0, |a| {
                a.push_u32(action::OUTPUT, 2);
            }),
            flow(2, 7, |a| {
                a.push_u32(action::OUTPUT, 2);
            }),
            flow(3, 0, |a| *a = userspace(cookie::SLOW_PATH)),
            flow(4, 0, |a| {
                a.push(action::CT, &[]).push_u32(action::RECIRC, 7);
            }),
            flow(5, 0, |a| *a = userspace(cookie::CONTROLLER)),
            flow(6, 0, |a| {
                let mut inner = AttrBuf::new();
                inner.push_u32(action::METER, 1);
                a.push_nested(action::CLONE, &inner).push_u32(action::OUTPUT, 2);
            }),
            flow(7, 0, |a| {
                let mut sample = AttrBuf::new();
                sample.push_u32(1, 9).push_nested(SAMPLE_ATTR_ACTIONS, &userspace(cookie::SFLOW));
                a.push_nested(action::SAMPLE, &sample).push_u32(action::OUTPUT, 2);
            }),
            flow(8, 0, |_| {}),
        ]
    }

    #[derive(Default)]
    struct Recorded {
        flows: Vec<Flow>,
        log: Vec<String>,
        answer: HashMap<u8, Errno>,
    }

    impl FlowTable for Recorded {
        fn dump(&mut self) -> Result<Vec<Flow>> {
            Ok(self.flows.clone())
        }
        fn delete(&mut self, flows: &[&Flow]) -> Result<Vec<Option<Errno>>> {
            let ids: Vec<u8> = flows.iter().map(|f| f.ufid.unwrap()[0]).collect();
            self.log.push(format!("delete {ids:?}"));
            Ok(ids.iter().map(|id| self.answer.get(id).copied()).collect())
        }
        fn grace(&mut self) -> Grace {
            self.log.push("grace".into());
            Grace::Membarrier
        }
    }

    fn removed(table: &mut Recorded, snapshot: &[Flow]) -> RemovalReport {
        let chosen = Chosen::of(table, snapshot).unwrap();
        remove_doomed_from(table, chosen).unwrap()
    }

    #[test]
    fn roots_first_children_after_a_grace_period() {
        let mut t = Recorded { flows: table(), ..Recorded::default() };
        let report = removed(&mut t, &table());
        assert_eq!(t.log, ["delete [4, 3, 5, 6, 7]", "grace", "delete [2]"]);
        assert_eq!(
            (report.roots, report.children, report.slow_path, report.controller, report.metered, report.drops),
            (1, 1, 1, 1, 1, 0)
        );
        assert_eq!(report.dump, table());
        assert_eq!((report.sampled, report.removed()), (1, 6));
    }

    #[test]
    fn drops_that_appeared_since_go_and_old_ones_stay() {
        let new_drop = flow(9, 0, |_| {});
        let turned = flow(1, 0, |a| {
            a.push(action::CT, &[]);
        });
        let now = vec![turned, table()[7].clone(), new_drop];
        assert_eq!(suspicious_since(&table(), &now), [0, 2]);
        let mut t = Recorded { flows: now, ..Recorded::default() };
        let report = removed(&mut t, &table());
        assert_eq!((report.drops, report.removed()), (2, 2));
    }

    #[test]
    fn what_a_daemon_probes_the_datapath_with_is_let_alone() {
        let probe = |id, recirc| Flow { ufid: None, ..flow(id, recirc, |_| {}) };
        let old = probe(9, 7);
        let mut named = flow(12, 0, |_| {});
        named.key = AttrBuf::new().push(key::ETHERTYPE, &[0x12, 0x34]).as_bytes().to_vec();
        let now = [table(), vec![probe(10, 0), probe(11, 7), old.clone(), named]].concat();
        let before = [table(), vec![old]].concat();
        assert_eq!(feature_probes(&before, &now), HashSet::from([8, 9, 11]));
        let chosen = Chosen::of(&mut Recorded { flows: now, ..Recorded::default() }, &before).unwrap();
        let indexes: Vec<usize> = chosen.first.iter().chain(&chosen.children).map(|(i, _)| *i).collect();
        assert_eq!(indexes, [3, 2, 4, 5, 6, 1, 10]);
    }

    #[test]
    fn what_a_killed_daemon_has_left_of_its_probes_is_found() {
        let from = |ufid, port, address: [u8; 12], ethertype: Option<u16>| {
            let mut key = AttrBuf::new();
            key.push_u32(key::IN_PORT, port).push(key::ETHERNET, &address);
            if let Some(ethertype) = ethertype {
                key.push(key::ETHERTYPE, &ethertype.to_be_bytes());
            }
            Flow { key: key.as_bytes().to_vec(), ufid, ..Flow::default() }
        };
        let (nowhere, somewhere, ufid) = ([0; 12], [2; 12], Some([1; 16]));
        let left = [
            from(None, 0, nowhere, None),
            from(None, 0, nowhere, Some(0x8847)),
            from(ufid, 0, nowhere, Some(UFID_PROBE)),
        ];
        let others = [
            from(None, 1, nowhere, None),
            from(None, 0, somewhere, None),
            from(ufid, 0, nowhere, None),
            Flow::default(),
        ];
        let all = [&others[..], &left[..]].concat();
        assert_eq!(left_probes(&all).collect::<Vec<_>>(), left.iter().collect::<Vec<_>>());
    }

    #[test]
    fn a_recirculation_in_a_nest_makes_a_root() {
        let nested = flow(1, 0, |a| {
            let mut inner = AttrBuf::new();
            inner.push_u32(action::RECIRC, 3);
            a.push_nested(action::CLONE, &inner);
        });
        assert_eq!(doom_of(&nested).unwrap(), Some(Doom::Root));
    }

    #[test]
    fn what_fails_is_counted_and_what_was_gone_is_gone() {
        let mut t = Recorded { flows: table(), ..Recorded::default() };
        t.answer = HashMap::from([(2, Errno::EPERM), (4, Errno::ENOENT)]);
        let report = removed(&mut t, &table());
        assert_eq!((report.roots, report.children, report.already_gone), (1, 0, 1));
        assert_eq!(report.errors, BTreeMap::from([("EPERM".to_owned(), 1)]));
    }

    #[test]
    fn a_malformed_flow_is_left_and_counted() {
        let bad = Flow { ufid: Some([9; 16]), key: vec![1, 0], ..Flow::default() };
        let mut t = Recorded { flows: vec![bad], ..Recorded::default() };
        let report = removed(&mut t, &[]);
        assert_eq!((report.malformed, report.removed(), t.log.len()), (1, 0, 0));
    }
}

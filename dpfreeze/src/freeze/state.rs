//! What a freeze is doing, read from its pins by any root process.

use libbpf_rs::{MapCore, MapHandle};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::freeze::{abi, process, Classes, Freeze, Hook, ProcessId};

/// How many messages of each class were refused since the arming. A sendmsg counts once, under the class of the first
/// message in it that is refused; senders without CAP_NET_ADMIN are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Refused {
    pub flow_flush: u64,
    pub flow_del: u64,
    pub flow_set: u64,
    pub dp_del: u64,
    pub vport_del: u64,
    pub meter_del: u64,
    pub ct_timeout_del: u64,
    pub upcall_bind: u64,
    /// More than 64 messages in one sendmsg.
    pub too_many: u64,
}

impl Refused {
    pub(super) fn read(map: &MapHandle) -> Result<Refused> {
        let count = |class: u32| -> Result<u64> {
            let bytes = abi::lookup(map, "refused", class)?;
            let [count] = abi::words("refused", &bytes)?;
            Ok(count)
        };
        Ok(Refused {
            flow_flush: count(0)?,
            flow_del: count(1)?,
            flow_set: count(2)?,
            dp_del: count(3)?,
            vport_del: count(4)?,
            meter_del: count(5)?,
            ct_timeout_del: count(6)?,
            upcall_bind: count(7)?,
            too_many: count(8)?,
        })
    }
}

/// What a freeze is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Is anything refused right now?
    pub armed: bool,
    /// Where the program sits.
    pub hook: Hook,
    /// What is refused, while `armed`.
    pub classes: Classes,
    /// The lease's remaining time, ms; 0 where it has run out.
    pub lease_left_ms: u64,
    /// Time to the absolute end, ms; 0 where it has come.
    pub end_left_ms: u64,
    /// The process that nothing is refused to.
    pub exempt: ProcessId,
    /// Does that process still run?
    pub exempt_alive: bool,
    /// The process whose upcall binding is captured.
    pub standby: Option<ProcessId>,
    /// The network namespace's inode.
    pub netns_inode: u64,
    /// `dp_ifindex` of each datapath in the scope.
    pub ifindexes: Vec<u32>,
    /// The guarded timeout policies.
    pub timeout_names: Vec<String>,
    /// The counters.
    pub refused: Refused,
    /// How often the standby's binding was captured.
    pub captured: u64,
}

/// The state of the pinned freeze, None where nothing is pinned.
pub fn state() -> Result<Option<State>> {
    Freeze::open()?.as_ref().map(State::read).transpose()
}

impl State {
    pub(super) fn read(freeze: &Freeze) -> Result<State> {
        let config = freeze.read_config()?;
        let now = super::nanos(process::boottime()?);
        let left = |until: u64| until.saturating_sub(now) / 1_000_000;
        let exempt = ProcessId { tgid: config.exempt_tgid as u32, start_time: config.exempt_start };
        let standby = (config.standby_tgid != 0)
            .then_some(ProcessId { tgid: config.standby_tgid as u32, start_time: config.standby_start });
        Ok(State {
            armed: config.classes != 0 && now < config.lease_ns && now < config.end_ns,
            hook: freeze.hook,
            classes: Classes::from_bits_retain(config.classes),
            lease_left_ms: left(config.lease_ns.min(config.end_ns)),
            end_left_ms: left(config.end_ns),
            exempt,
            exempt_alive: exempt.alive(),
            standby,
            netns_inode: config.netns,
            ifindexes: ifindexes(&freeze.datapaths)?,
            timeout_names: freeze.timeouts.keys().map(|key| name(&key)).collect(),
            refused: freeze.refused()?,
            captured: abi::capture_count(&freeze.captured)?,
        })
    }
}

fn ifindexes(map: &MapHandle) -> Result<Vec<u32>> {
    map.keys()
        .map(|key| {
            let bytes = key.try_into().map_err(|_| Error::malformed("map datapaths", "a key is not 4 bytes long"))?;
            Ok(u32::from_ne_bytes(bytes))
        })
        .collect()
}

fn name(key: &[u8]) -> String {
    let end = key.iter().position(|byte| *byte == 0).unwrap_or(key.len());
    String::from_utf8_lossy(&key[..end]).into_owned()
}

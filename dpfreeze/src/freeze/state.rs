//! What a freeze is doing, read from its pins by any root process.

use std::fmt;

use libbpf_rs::{MapCore, MapHandle};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::freeze::{abi, process, Classes, Freeze, Hook, ProcessId};

/// Defines [`Refused`] from one table: the field, which is the class's name in reports and commands, and its index in the
/// BPF program's map `refused` (`enum class` in `bpf/freeze.bpf.c`).
macro_rules! refused {
    ($($(#[$doc:meta])* $field:ident = $index:literal,)*) => {
        /// How many messages of each class were refused since the arming. A sendmsg counts once, under the class of the
        /// first message in it that is refused; senders without CAP_NET_ADMIN are not counted.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Refused {
            $($(#[$doc])* pub $field: u64,)*
        }

        impl Refused {
            /// The index of each class in the map, and its name.
            #[cfg(test)]
            const TABLE: &[(u32, &str)] = &[$(($index, stringify!($field)),)*];

            pub(super) fn read(map: &MapHandle) -> Result<Refused> {
                // A guard that was pinned by an earlier version has fewer classes.
                let count = |class: u32| -> Result<u64> {
                    if class >= map.max_entries() {
                        return Ok(0);
                    }
                    let bytes = abi::lookup(map, "refused", class)?;
                    let [count] = abi::words("refused", &bytes)?;
                    Ok(count)
                };
                Ok(Refused { $($field: count($index)?,)* })
            }

            /// Each class's name and count, in the order of the BPF program.
            pub fn by_class(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field),)*]
            }

            /// These and `others`: a freeze that was armed again counts from 0.
            pub fn plus(self, others: Refused) -> Refused {
                Refused { $($field: self.$field.saturating_add(others.$field),)* }
            }
        }
    };
}

refused! {
    /// `OVS_FLOW_CMD_DEL` without a key or UFID.
    flow_flush = 0,
    /// `OVS_FLOW_CMD_DEL` of one flow.
    flow_del = 1,
    /// `OVS_FLOW_CMD_SET`.
    flow_set = 2,
    /// `OVS_DP_CMD_DEL`.
    dp_del = 3,
    /// `OVS_VPORT_CMD_DEL`.
    vport_del = 4,
    /// `OVS_METER_CMD_DEL`.
    meter_del = 5,
    /// `IPCTNL_MSG_TIMEOUT_DELETE`.
    ct_timeout_del = 6,
    /// `OVS_DP_CMD_SET` with `PER_CPU_PIDS`, or `OVS_VPORT_CMD_SET` with `UPCALL_PID`.
    upcall_bind = 7,
    /// `RTM_DELQDISC` of what others have put on a port, and lists of classes that others have added to.
    qdisc_del = 8,
    /// A sendmsg of more messages than the program can look at (64): refused unseen, whatever the classes.
    too_many = 9,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted: Vec<String> = self
            .by_class()
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(class, count)| format!("{class} {count}"))
            .collect();
        match counted.is_empty() {
            true => f.write_str("nothing"),
            false => f.write_str(&counted.join(", ")),
        }
    }
}

/// How often the kernel passed over the program, whoever had sent a message, since the program was loaded.
///
/// Since Linux 5.12 it does not call a tracing program on a CPU where another task was preempted in that program: the
/// message then meets the second copy alone. Programs of LSM hooks are always called since Linux 6.2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Skipped {
    /// The first copy.
    pub first: u64,
    /// The second copy.
    pub second: u64,
    /// This many messages at the most met neither copy, and passed unseen.
    pub unseen: u64,
}

impl Skipped {
    pub(super) fn of(first: u64, second: u64) -> Skipped {
        Skipped { first, second, unseen: first.min(second) }
    }

    /// This and that of another freeze.
    pub fn plus(self, other: Skipped) -> Skipped {
        Skipped {
            first: self.first.saturating_add(other.first),
            second: self.second.saturating_add(other.second),
            unseen: self.unseen.saturating_add(other.unseen),
        }
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
    /// How often the kernel passed over the program.
    #[serde(default)]
    pub skipped: Skipped,
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
            skipped: freeze.skipped()?,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_its_counter_under_its_bit_and_name() {
        let classes: Vec<(u32, String)> = Classes::all()
            .iter_names()
            .map(|(name, class)| (class.bits().trailing_zeros(), name.to_lowercase()))
            .collect();
        let (counted, others) = Refused::TABLE.split_at(classes.len());
        let counted: Vec<(u32, String)> = counted.iter().map(|(index, name)| (*index, (*name).to_owned())).collect();
        assert_eq!(counted, classes);
        assert_eq!(others, [(9, "too_many")]);
    }

    #[test]
    fn only_what_both_copies_missed_can_have_passed() {
        assert_eq!(Skipped::of(7, 0).unseen, 0);
        assert_eq!(Skipped::of(7, 2).unseen, 2);
        let both = Skipped::of(7, 0).plus(Skipped::of(0, 7));
        assert_eq!((both.first, both.second, both.unseen), (7, 7, 0), "two freezes, each with a copy that saw all");
    }

    #[test]
    fn counters_are_told_by_name_and_added() {
        let refused = Refused { flow_del: 3, too_many: 1, ..Refused::default() };
        assert_eq!(refused.to_string(), "flow_del 3, too_many 1");
        assert_eq!(Refused::default().to_string(), "nothing");
        assert_eq!(refused.plus(refused).flow_del, 6);
        let old: Refused = serde_json::from_str(r#"{"flow_del":2}"#).unwrap();
        assert_eq!((old.flow_del, old.too_many), (2, 0), "a report of before has fewer classes");
    }
}

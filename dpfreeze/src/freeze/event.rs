//! What the BPF program tells beyond its counters.

use std::time::Duration;

use libbpf_rs::{MapHandle, RingBufferBuilder};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::freeze::{abi, ProcessId, PIN_DIR};

const WORDS: usize = 7;

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, as time since boot (CLOCK_BOOTTIME).
    pub at: Duration,
    /// Who sent the message.
    pub sender: ProcessId,
    /// The datapath that the message names, 0 where it names none.
    pub ifindex: u32,
    /// What happened.
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventKind {
    /// A VPORT_DEL was refused. The daemon does not try again: at Settle it is to be repeated for ports that are
    /// still not wanted (hazard 7).
    VportDelRefused(Port),
    /// A process that is neither exempt nor the standby bound the upcalls; the message has passed (hazard 1).
    BoundByOther {
        /// How many port ids it bound.
        port_ids: u64,
    },
    /// One sendmsg with more than 64 messages was refused unseen.
    TooManyMessages {
        /// Its length.
        bytes: u64,
    },
    /// The standby's binding was captured and refused.
    Captured {
        /// How many port ids the message has.
        port_ids: u64,
    },
    /// Of a kind that this version does not know.
    Unknown(u64),
}

/// The port of a refused VPORT_DEL, as the message names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Port {
    /// By number.
    Number(u32),
    /// By name.
    Name(String),
}

/// Everything in the ring buffer, oldest first.
pub fn drain(map: &MapHandle) -> Result<Vec<Event>> {
    let what = || format!("map events in {PIN_DIR}");
    let mut events = Vec::new();
    let mut builder = RingBufferBuilder::new();
    builder
        .add(map, |bytes| {
            events.extend(decode(bytes));
            0
        })
        .map_err(|error| abi::bpf_error(what(), &error))?;
    let ring = builder.build().map_err(|error| abi::bpf_error(what(), &error))?;
    ring.consume().map_err(|error| abi::bpf_error(what(), &error))?;
    drop(ring);
    Ok(events)
}

/// `struct event`
fn decode(bytes: &[u8]) -> Option<Event> {
    let (head, name) = bytes.split_at_checked(WORDS * 8)?;
    let [kind, at, tgid, start, ifindex, port_no, count] = abi::words::<WORDS>("events", head).ok()?;
    let kind = match kind {
        1 => EventKind::VportDelRefused(match u32::try_from(port_no) {
            Ok(number) => Port::Number(number),
            Err(_) => Port::Name(text(name)),
        }),
        2 => EventKind::BoundByOther { port_ids: count },
        3 => EventKind::TooManyMessages { bytes: count },
        4 => EventKind::Captured { port_ids: count },
        other => EventKind::Unknown(other),
    };
    let sender = ProcessId { tgid: tgid as u32, start_time: start };
    Some(Event { at: Duration::from_nanos(at), sender, ifindex: ifindex as u32, kind })
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(kind: u64, port_no: u64, name: &[u8; 16]) -> Vec<u8> {
        let words = [kind, 5, 42, 99, 7, port_no, 3];
        words.iter().flat_map(|word| word.to_ne_bytes()).chain(*name).collect()
    }

    #[test]
    fn a_port_is_known_by_number_or_name() {
        let by_number = decode(&bytes(1, 4, &[0; 16])).unwrap();
        assert_eq!(by_number.kind, EventKind::VportDelRefused(Port::Number(4)));
        assert_eq!((by_number.sender.tgid, by_number.ifindex), (42, 7));
        let by_name = decode(&bytes(1, u64::MAX, b"vxlan_sys_4789\0\0")).unwrap();
        assert_eq!(by_name.kind, EventKind::VportDelRefused(Port::Name("vxlan_sys_4789".into())));
    }

    #[test]
    fn short_and_unknown_events_do_no_harm() {
        assert_eq!(decode(&[1, 2, 3]), None);
        assert_eq!(decode(&bytes(77, 0, &[0; 16])).unwrap().kind, EventKind::Unknown(77));
    }
}

//! Meters over one connection to the bridge: no bundle takes them, and a process for each of hundreds would take seconds
//! just while packets wait.
//!
//! OpenFlow 1.3 to 1.5: header (A.1), METER_MOD (A.3.4.5), ERROR (A.4.4), BARRIER. Numbers in network order.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use super::jsonrpc::remaining;
use super::openflow::version_number;
use crate::host::{BridgeRules, Context, HostError, Result};

const HELLO: u8 = 0;
const ERROR: u8 = 1;
const BARRIER_REQUEST: u8 = 20;
const BARRIER_REPLY: u8 = 21;
const METER_MOD: u8 = 29;
const ADD: u16 = 0;
const MODIFY: u16 = 1;
/// Length of a header, bytes.
const HEADER: usize = 8;
/// `OFPET_METER_MOD_FAILED` with `OFPMMFC_METER_EXISTS` or `OFPMMFC_UNKNOWN_METER` (A.4.4).
const FAILED: u16 = 12;
const ALREADY_THERE: u16 = 1;
const UNKNOWN: u16 = 3;
/// So many meters before what was answered is read: an error for each of them fits into a socket.
const MOST_UNREAD: usize = 200;

/// Gives the bridge behind `socket` the meters of `rules`, whether it has them already or not. Returns those that are not
/// understood here, or that the bridge refuses.
pub(super) fn put<'a>(socket: &Path, rules: &'a BridgeRules, until: Instant) -> Result<Vec<&'a str>> {
    // ofp_version: 4 is OpenFlow 1.3.
    let version = version_number(&rules.protocol).checked_sub(13).and_then(|n| u8::try_from(n + 4).ok());
    let Some(version) = version else { return Ok(rules.meters.iter().map(String::as_str).collect()) };
    let object = format!("meters of bridge {}", rules.bridge);
    let mut stream = UnixStream::connect(socket).about(&object)?;
    let mut first = message(version, HELLO, 0, &[]);
    let mut left = Vec::new();
    for some in rules.meters.chunks(MOST_UNREAD) {
        let mut bytes = std::mem::take(&mut first);
        let mut given = BTreeMap::new();
        for (text, xid) in some.iter().zip(1u32..) {
            let Some(meter) = meter(text) else {
                left.push(text.as_str());
                continue;
            };
            given.insert(xid, text.as_str());
            // One of the two fails: that one is there, or not yet.
            bytes.extend(message(version, METER_MOD, xid, &[&MODIFY.to_be_bytes()[..], &meter].concat()));
            bytes.extend(message(version, METER_MOD, xid, &[&ADD.to_be_bytes()[..], &meter].concat()));
        }
        bytes.extend(message(version, BARRIER_REQUEST, u32::MAX, &[]));
        stream.set_write_timeout(remaining(until)).about(&object)?;
        stream.write_all(&bytes).about(&object)?;
        let refused = refused_until_barrier(&mut stream, &object, until)?;
        left.extend(refused.iter().filter_map(|xid| given.get(xid)));
    }
    Ok(left)
}

/// The xids of what the bridge refuses for another reason than that the meter is there, or not yet.
fn refused_until_barrier(stream: &mut UnixStream, object: &str, until: Instant) -> Result<BTreeSet<u32>> {
    let mut refused = BTreeSet::new();
    loop {
        let Some(left) = remaining(until) else { return Err(HostError::timeout(object, "giving them to the bridge")) };
        stream.set_read_timeout(Some(left)).about(object)?;
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).about(object)?;
        let [_, kind, high, low, xid @ ..] = header;
        let rest = usize::from(u16::from_be_bytes([high, low])).checked_sub(HEADER);
        let mut body = vec![0; rest.ok_or_else(|| HostError::new(object, "a message shorter than its header"))?];
        stream.read_exact(&mut body).about(object)?;
        match (kind, body.as_slice()) {
            (BARRIER_REPLY, _) => return Ok(refused),
            (ERROR, [a, b, c, d, ..]) => {
                let (kind, code) = (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]));
                if kind != FAILED || !matches!(code, ALREADY_THERE | UNKNOWN) {
                    tracing::warn!("{object}: OFPT_ERROR type {kind} code {code}");
                    refused.insert(u32::from_be_bytes(xid));
                }
            }
            _ => {}
        }
    }
}

fn message(version: u8, kind: u8, xid: u32, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(HEADER + body.len()).unwrap_or(u16::MAX);
    [&[version, kind][..], &length.to_be_bytes(), &xid.to_be_bytes(), body].concat()
}

/// What follows the command in a METER_MOD, of a meter as `ovs-ofctl dump-meters` writes it:
/// `meter=1 kbps burst bands=type=drop rate=1000 burst_size=5`.
fn meter(text: &str) -> Option<Vec<u8>> {
    let (head, bands) = text.split_once(" bands=")?;
    let mut words = head.split_whitespace();
    let id: u32 = match words.next()?.strip_prefix("meter=")? {
        "slowpath" => 0xffff_fffd,
        "controller" => 0xffff_fffe,
        number => number.parse().ok()?,
    };
    let mut flags = 0u16;
    for word in words {
        flags |= match word {
            "kbps" => 1,
            "pktps" => 2,
            "burst" => 4,
            "stats" => 8,
            _ => return None,
        };
    }
    let mut bytes = [&flags.to_be_bytes()[..], &id.to_be_bytes()].concat();
    let mut all: Vec<Vec<&str>> = Vec::new();
    for word in bands.split_whitespace() {
        match (word.starts_with("type="), all.last_mut()) {
            (true, _) => all.push(vec![word]),
            (false, Some(band)) => band.push(word),
            (false, None) => return None,
        }
    }
    for words in all {
        bytes.extend(band(&words)?);
    }
    Some(bytes)
}

/// `struct ofp_meter_band_drop` or `ofp_meter_band_dscp_remark`.
fn band(words: &[&str]) -> Option<Vec<u8>> {
    let (mut kind, mut rate, mut burst, mut level) = (0u16, 0u32, 0u32, 0u8);
    for word in words {
        match word.split_once('=')? {
            ("type", "drop") => kind = 1,
            ("type", "dscp_remark") => kind = 2,
            ("rate", value) => rate = value.parse().ok()?,
            ("burst_size", value) => burst = value.parse().ok()?,
            ("prec_level", value) => level = value.parse().ok()?,
            _ => return None,
        }
    }
    let bytes = [&kind.to_be_bytes()[..], &16u16.to_be_bytes(), &rate.to_be_bytes(), &burst.to_be_bytes()].concat();
    Some([bytes, vec![level, 0, 0, 0]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    #[test]
    fn meters_are_encoded_as_the_specification_has_them() {
        let hex = |text: &str| meter(text).map(|bytes| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>());
        assert_eq!(
            hex("meter=2 pktps burst stats bands=type=drop rate=9 burst_size=5 type=dscp_remark rate=3 prec_level=1")
                .unwrap(),
            "000e00000002".to_owned() + "00010010000000090000000500000000" + "00020010000000030000000001000000"
        );
        assert_eq!(hex("meter=controller kbps bands=type=drop rate=1000").unwrap()[4..12], *"fffffffe");
        assert_eq!(hex("meter=1 kbps bands=").unwrap(), "000100000001");
        for odd in ["meter=x kbps bands=", "meter=1 kbps", "meter=1 new bands=", "meter=1 kbps bands=type=other rate=1"]
        {
            assert_eq!(meter(odd), None, "{odd}");
        }
    }

    /// A bridge that keeps meters as Open vSwitch does; meter 13 it refuses. Returns what it has.
    fn bridge(
        listener: UnixListener,
        mut meters: BTreeMap<u32, Vec<u8>>,
    ) -> std::thread::JoinHandle<BTreeMap<u32, Vec<u8>>> {
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut header = [0; HEADER];
            while stream.read_exact(&mut header).is_ok() {
                let mut body = vec![0; usize::from(u16::from_be_bytes([header[2], header[3]])) - HEADER];
                stream.read_exact(&mut body).unwrap();
                let xid = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                // The numbers of the specification (OpenFlow 1.3.5, A.4.4): 1 METER_EXISTS, 3 UNKNOWN_METER, 11 OUT_OF_BANDS.
                let error = |code: u16| message(6, ERROR, xid, &[12u16.to_be_bytes(), code.to_be_bytes()].concat());
                let answer = match header[1] {
                    BARRIER_REQUEST => message(6, BARRIER_REPLY, 9, &[]),
                    METER_MOD => {
                        let id = u32::from_be_bytes([body[4], body[5], body[6], body[7]]);
                        match (body[1], meters.contains_key(&id)) {
                            (1, false) => error(3),
                            _ if id == 113 => error(11),
                            (0, true) => error(1),
                            _ => {
                                meters.insert(id, body[2..].to_vec());
                                continue;
                            }
                        }
                    }
                    _ => continue,
                };
                if stream.write_all(&answer).is_err() {
                    break;
                }
            }
            meters
        })
    }

    #[test]
    fn all_meters_come_by_one_connection_and_what_is_refused_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("br0.mgmt");
        let text = |id: u32| format!("meter={id} kbps bands=type=drop rate={id}");
        let rules = |ids: Vec<u32>| BridgeRules {
            protocol: "OpenFlow15".into(),
            meters: ids.into_iter().map(text).collect(),
            ..BridgeRules::default()
        };
        let until = Instant::now() + Duration::from_secs(20);
        let ids: Vec<u32> = (100..700).collect();
        let there = BTreeMap::from([(100, Vec::new()), (650, vec![1])]);
        let listening = bridge(UnixListener::bind(&socket).unwrap(), there);
        let mut all = rules(ids.clone());
        all.meters.push("meter=9 new bands=".into());
        // What is not understood, and what the bridge refuses.
        assert_eq!(put(&socket, &all, until).unwrap(), [&text(113), "meter=9 new bands="]);
        let taken = ids.into_iter().filter(|id| *id != 113);
        let wanted: BTreeMap<u32, Vec<u8>> = taken.map(|id| (id, meter(&text(id)).unwrap())).collect();
        assert_eq!(listening.join().unwrap(), wanted);

        let old = BridgeRules { protocol: "OpenFlow10".into(), ..rules(vec![1]) };
        assert_eq!(put(&socket, &old, until).unwrap(), [text(1)]);
    }
}

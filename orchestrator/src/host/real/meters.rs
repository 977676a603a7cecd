//! Meters over one connection to the bridge: no bundle takes them, and a process for each of hundreds would take seconds
//! just while packets wait.
//!
//! OpenFlow 1.3 to 1.5: header (A.1), METER_MOD (A.3.4.5), ERROR (A.4.4), BARRIER. Numbers in network order.

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
/// `OFPET_METER_MOD_FAILED` with `OFPMMFC_METER_EXISTS` or `OFPMMFC_UNKNOWN_METER`.
const FAILED: u16 = 12;
const ALREADY_THERE: u16 = 1;
const UNKNOWN: u16 = 2;
/// So many meters before what was answered is read: an error for each of them fits into a socket.
const MOST_UNREAD: usize = 200;

/// Gives the bridge behind `socket` the meters of `rules`, whether it has them already or not. False where one of them, or
/// the version, is not understood here.
pub(super) fn put(socket: &Path, rules: &BridgeRules, until: Instant) -> Result<bool> {
    // ofp_version: 4 is OpenFlow 1.3.
    let version = version_number(&rules.protocol).checked_sub(13).and_then(|n| u8::try_from(n + 4).ok());
    let meters: Option<Vec<Vec<u8>>> = rules.meters.iter().map(|text| meter(text)).collect();
    let (Some(version), Some(meters)) = (version, meters) else { return Ok(false) };
    let object = format!("meters of bridge {}", rules.bridge);
    let mut stream = UnixStream::connect(socket).about(&object)?;
    let mut first = message(version, HELLO, 0, &[]);
    for some in meters.chunks(MOST_UNREAD) {
        let mut bytes = std::mem::take(&mut first);
        for (meter, xid) in some.iter().zip(1..) {
            // One of the two fails: that one is there, or not yet.
            bytes.extend(message(version, METER_MOD, xid, &[&MODIFY.to_be_bytes()[..], meter].concat()));
            bytes.extend(message(version, METER_MOD, xid, &[&ADD.to_be_bytes()[..], meter].concat()));
        }
        bytes.extend(message(version, BARRIER_REQUEST, u32::MAX, &[]));
        stream.set_write_timeout(remaining(until)).about(&object)?;
        stream.write_all(&bytes).about(&object)?;
        wait_for_barrier(&mut stream, &object, until)?;
    }
    Ok(true)
}

fn wait_for_barrier(stream: &mut UnixStream, object: &str, until: Instant) -> Result<()> {
    loop {
        let Some(left) = remaining(until) else { return Err(HostError::timeout(object, "giving them to the bridge")) };
        stream.set_read_timeout(Some(left)).about(object)?;
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).about(object)?;
        let [_, kind, high, low, ..] = header;
        let rest = usize::from(u16::from_be_bytes([high, low])).checked_sub(HEADER);
        let mut body = vec![0; rest.ok_or_else(|| HostError::new(object, "a message shorter than its header"))?];
        stream.read_exact(&mut body).about(object)?;
        match (kind, body.as_slice()) {
            (BARRIER_REPLY, _) => return Ok(()),
            (ERROR, [a, b, c, d, ..]) => {
                let (kind, code) = (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]));
                if kind != FAILED || !matches!(code, ALREADY_THERE | UNKNOWN) {
                    return Err(HostError::new(object, format!("OFPT_ERROR type {kind} code {code}")));
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
    use std::collections::BTreeMap;
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
                let error =
                    |kind: u16, code: u16| message(6, ERROR, 1, &[kind.to_be_bytes(), code.to_be_bytes()].concat());
                let answer = match header[1] {
                    BARRIER_REQUEST => message(6, BARRIER_REPLY, 9, &[]),
                    METER_MOD => {
                        let id = u32::from_be_bytes([body[4], body[5], body[6], body[7]]);
                        match (body[1], meters.contains_key(&id)) {
                            _ if id == 13 => error(FAILED, 12),
                            (0, true) => error(FAILED, ALREADY_THERE),
                            (1, false) => error(FAILED, UNKNOWN),
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
    fn all_meters_come_by_one_connection_those_that_are_there_too() {
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
        assert!(put(&socket, &rules(ids.clone()), until).unwrap());
        let wanted: BTreeMap<u32, Vec<u8>> = ids.into_iter().map(|id| (id, meter(&text(id)).unwrap())).collect();
        assert_eq!(listening.join().unwrap(), wanted);

        std::fs::remove_file(&socket).unwrap();
        let listening = bridge(UnixListener::bind(&socket).unwrap(), BTreeMap::new());
        let error = put(&socket, &rules(vec![13]), until).unwrap_err();
        assert!(error.cause.contains("type 12 code 12"), "{error}");
        listening.join().unwrap();

        assert!(!put(&socket, &BridgeRules { protocol: "OpenFlow10".into(), ..rules(vec![1]) }, until).unwrap());
    }
}

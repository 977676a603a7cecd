//! The values that the BPF program and this library share: see the structures of the same names in `bpf/freeze.bpf.c`.

use std::time::{Duration, Instant};

use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::error::{Error, Result};
use crate::freeze::pins::PIN_DIR;
use crate::ovs::Dispatch;

/// `IFNAMSIZ`, linux/if.h
pub const IFNAMSIZ: usize = 16;
/// `CTNL_TIMEOUT_NAME_MAX`, linux/netfilter/nfnetlink_cttimeout.h
pub const TIMEOUT_NAME_LEN: usize = 32;
/// `MAX_PIDS`
const MAX_PIDS: usize = 4096;
const CAPTURED_WORDS: usize = 10;
/// A capture is written within microseconds of its CPU's time; a torn read repeats.
const CAPTURE_SETTLES: Duration = Duration::from_secs(1);
const CAPTURE_AGAIN: Duration = Duration::from_millis(1);

/// `struct config`, word for word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    pub classes: u64,
    pub lease_ns: u64,
    pub end_ns: u64,
    pub netns: u64,
    pub exempt_tgid: u64,
    pub exempt_start: u64,
    pub standby_tgid: u64,
    pub standby_start: u64,
    pub fam_datapath: u64,
    pub fam_vport: u64,
    pub fam_flow: u64,
    pub fam_meter: u64,
    pub timeout_names: u64,
    pub armed_ns: u64,
    pub probe_meters: u64,
}

impl Config {
    const WORDS: usize = 15;

    pub fn encode(&self) -> Vec<u8> {
        let words: [u64; Self::WORDS] = [
            self.classes,
            self.lease_ns,
            self.end_ns,
            self.netns,
            self.exempt_tgid,
            self.exempt_start,
            self.standby_tgid,
            self.standby_start,
            self.fam_datapath,
            self.fam_vport,
            self.fam_flow,
            self.fam_meter,
            self.timeout_names,
            self.armed_ns,
            self.probe_meters,
        ];
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    pub fn decode(bytes: &[u8]) -> Result<Config> {
        let w: [u64; Self::WORDS] = words("config", bytes)?;
        Ok(Config {
            classes: w[0],
            lease_ns: w[1],
            end_ns: w[2],
            netns: w[3],
            exempt_tgid: w[4],
            exempt_start: w[5],
            standby_tgid: w[6],
            standby_start: w[7],
            fam_datapath: w[8],
            fam_vport: w[9],
            fam_flow: w[10],
            fam_meter: w[11],
            timeout_names: w[12],
            armed_ns: w[13],
            probe_meters: w[14],
        })
    }
}

/// `struct captured`, before anything is proved about it.
#[derive(Debug, PartialEq, Eq)]
pub struct RawCaptured {
    pub count: u64,
    pub tgid: u32,
    pub start: u64,
    pub ifindex: u32,
    pub features: Option<u32>,
    pub port_ids: Vec<u32>,
    pub dispatch: Dispatch,
}

impl RawCaptured {
    /// None where nothing was captured.
    fn decode(bytes: &[u8]) -> Result<Option<RawCaptured>> {
        let (head, pids) = bytes.split_at(bytes.len().min(CAPTURED_WORDS * 8));
        let w: [u64; CAPTURED_WORDS] = words("captured", head)?;
        let [_, count, tgid, start, _, ifindex, has_features, features, wanted, per_vport] = w;
        if count == 0 {
            return Ok(None);
        }
        let dispatch = if per_vport == 0 { Dispatch::PerCpu } else { Dispatch::PerVport };
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        if (wanted == 0 && per_vport == 0) || wanted > MAX_PIDS || wanted * 4 > pids.len() {
            return Err(Error::Unsupported {
                what: format!("upcall binding of process {tgid}"),
                why: format!("it names {wanted} port ids, and 1 to {MAX_PIDS} can be kept"),
                remedy: "run at level park, without a freeze".into(),
            });
        }
        let port_ids = pids.as_chunks::<4>().0.iter().take(wanted).map(|bytes| u32::from_ne_bytes(*bytes)).collect();
        Ok(Some(RawCaptured {
            count,
            tgid: tgid as u32,
            start,
            ifindex: ifindex as u32,
            features: (has_features != 0).then_some(features as u32),
            port_ids,
            dispatch,
        }))
    }
}

/// The capture, read until no write fell into the reading. The writer may have been preempted in the middle of it, with its
/// CPU where that is a virtual one: tens of milliseconds are nothing unusual then, so it is time that is given, not tries.
pub fn read_captured(map: &MapHandle) -> Result<Option<RawCaptured>> {
    let read = || lookup(map, "captured", 0);
    RawCaptured::decode(&settled(read, CAPTURE_SETTLES)?)
}

/// What `read` returns twice in a row with an even sequence in its first word.
fn settled(mut read: impl FnMut() -> Result<Vec<u8>>, patience: Duration) -> Result<Vec<u8>> {
    let until = Instant::now() + patience;
    let mut tries = 0;
    loop {
        tries += 1;
        let (first, second) = (read()?, read()?);
        let sequence = first.first_chunk::<8>().map(|bytes| u64::from_ne_bytes(*bytes));
        if first == second && sequence.is_some_and(|n| n % 2 == 0) {
            return Ok(first);
        }
        if Instant::now() >= until {
            let (what, why) = (format!("map captured in {PIN_DIR}"), "the standby keeps writing".into());
            return Err(Error::IncompleteDump { what, tries, why });
        }
        std::thread::sleep(CAPTURE_AGAIN);
    }
}

/// How often the standby's binding was captured.
pub fn capture_count(map: &MapHandle) -> Result<u64> {
    let bytes = lookup(map, "captured", 0)?;
    let (head, _) = bytes.split_at(bytes.len().min(CAPTURED_WORDS * 8));
    words::<CAPTURED_WORDS>("captured", head).map(|words| words[1])
}

/// A value that is all words, of exactly `N` of them.
pub fn words<const N: usize>(what: &str, bytes: &[u8]) -> Result<[u64; N]> {
    let (chunks, rest) = bytes.as_chunks::<8>();
    if chunks.len() != N || !rest.is_empty() {
        return Err(Error::malformed(
            format!("map {what} in {PIN_DIR}"),
            format!("{} bytes where {} belong (pinned by another version?)", bytes.len(), N * 8),
        ));
    }
    let mut words = [0; N];
    for (word, chunk) in words.iter_mut().zip(chunks) {
        *word = u64::from_ne_bytes(*chunk);
    }
    Ok(words)
}

/// Entry `index` of an array map.
pub fn lookup(map: &MapHandle, name: &str, index: u32) -> Result<Vec<u8>> {
    let what = || format!("map {name} in {PIN_DIR}");
    map.lookup(&index.to_ne_bytes(), MapFlags::ANY)
        .map_err(|error| bpf_error(what(), &error))?
        .ok_or_else(|| Error::malformed(what(), format!("has no entry {index}")))
}

/// Sets entry `index` of an array map.
pub fn update(map: &MapHandle, name: &str, index: u32, value: &[u8]) -> Result<()> {
    map.update(&index.to_ne_bytes(), value, MapFlags::ANY)
        .map_err(|error| bpf_error(format!("map {name} in {PIN_DIR}"), &error))
}

/// An error of libbpf with the whole chain of its causes.
pub fn bpf_error(what: impl Into<String>, error: &libbpf_rs::Error) -> Error {
    Error::io(what, std::io::Error::other(format!("{error:#}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_survives_the_trip() {
        let config = Config {
            classes: 1,
            lease_ns: 2,
            end_ns: 3,
            netns: 4,
            armed_ns: 14,
            probe_meters: 15,
            ..Config::default()
        };
        assert_eq!(Config::decode(&config.encode()).unwrap(), config);
        assert!(Config::decode(&config.encode()[8..]).is_err());
    }

    #[test]
    fn a_writer_that_is_preempted_is_waited_for() {
        let since = Instant::now();
        let word = |sequence: u64| sequence.to_ne_bytes().to_vec();
        let read = || Ok(word(if since.elapsed() < Duration::from_millis(30) { 1 } else { 2 }));
        assert_eq!(settled(read, CAPTURE_SETTLES).unwrap(), word(2));
        let never = settled(|| Ok(word(3)), Duration::from_millis(5));
        assert!(matches!(never, Err(Error::IncompleteDump { .. })));
        let mut turn = 0;
        let changes = || {
            turn += 2;
            Ok(word(turn))
        };
        assert!(settled(changes, Duration::from_millis(5)).is_err());
    }

    fn captured_bytes(wanted: u64, pids: &[u32]) -> Vec<u8> {
        let head = [2u64, 1, 77, 1234, 5, 9, 1, 0x8, wanted, 0];
        let mut bytes: Vec<u8> = head.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(pids.iter().flat_map(|pid| pid.to_ne_bytes()));
        bytes.resize(CAPTURED_WORDS * 8 + MAX_PIDS * 4, 0);
        bytes
    }

    #[test]
    fn captured_port_ids_are_those_of_the_message() {
        let raw = RawCaptured::decode(&captured_bytes(2, &[11, 12, 13])).unwrap().unwrap();
        assert_eq!(raw.port_ids, [11, 12]);
        assert_eq!((raw.tgid, raw.start, raw.ifindex, raw.features), (77, 1234, 9, Some(8)));
    }

    #[test]
    fn a_binding_per_vport_has_no_port_ids() {
        let mut bytes = captured_bytes(0, &[]);
        bytes[9 * 8] = 1;
        let raw = RawCaptured::decode(&bytes).unwrap().unwrap();
        assert_eq!((raw.dispatch, raw.port_ids.len(), raw.tgid), (Dispatch::PerVport, 0, 77));
        let per_cpu = RawCaptured::decode(&captured_bytes(1, &[11])).unwrap().unwrap();
        assert_eq!(per_cpu.dispatch, Dispatch::PerCpu);
    }

    #[test]
    fn too_many_port_ids_are_an_error_not_a_cut() {
        assert!(RawCaptured::decode(&captured_bytes(4097, &[])).is_err());
        assert!(RawCaptured::decode(&captured_bytes(0, &[])).is_err());
    }
}

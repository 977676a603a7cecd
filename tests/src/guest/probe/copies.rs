//! Copies of the packets of the UDP probes, by name: at a mirror's port, or in what a collector of sFlow or IPFIX is sent.

use std::collections::{BTreeMap, HashMap};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{anyhow, Context, Result};
use nix::sys::socket::{setsockopt, sockopt};

use super::ipfix::Ipfix;
use super::{measure_first, silent, udp, Export, Place, Running};
use crate::outcome::{CopiesOutcome, CopyCount, ProbeOutcome};

/// Copies of a burst of replayed packets fit, bytes.
const RECEIVE_BUFFER: usize = 32 << 20;

/// Counting under way.
pub struct Copies {
    stop: Arc<AtomicBool>,
    arrived: Arc<AtomicU64>,
    counter: JoinHandle<Result<CopiesOutcome>>,
}

/// Whose packet it is: the probe's port, whether it is a request, and its number. IPFIX tells no number: there it is the
/// other port.
type Name = (u16, bool, u32);

/// Where copies come from.
trait Source {
    /// Hands the names of the next ones among those of `ports` to `each`; returns after 100 ms without any.
    fn next(&mut self, ports: &[u16], each: &mut dyn FnMut(Name));
    /// Copies that this end has lost: then the count is worth nothing.
    fn dropped(&self) -> Result<u64>;
}

/// Starts to count on `device`, the other end of a mirror's port; `ports` are those of the probes.
pub fn on_device(place: &Place, device: &str, ports: &[u16]) -> Result<Copies> {
    let (place, device) = (place.clone(), device.to_owned());
    start(ports, move || {
        place.enter()?;
        let socket = silent::listen(&device)?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
        Ok(Device(socket))
    })
}

/// Starts to count in the datagrams of `export` that come to `port` of the host; `ports` are those of the probes.
pub fn in_exports(export: Export, port: u16, ports: &[u16]) -> Result<Copies> {
    start(ports, move || {
        let socket = UdpSocket::bind(("127.0.0.1", port)).with_context(|| format!("cannot collect on port {port}"))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
        let ipfix = TOLD.lock().ok().and_then(|mut told| told.take()).unwrap_or_default();
        Ok(Collector { socket, export, ipfix })
    })
}

fn start<S: Source>(ports: &[u16], open: impl FnOnce() -> Result<S> + Send + 'static) -> Result<Copies> {
    let (stop, arrived) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (ready, is_ready) = channel();
    let counter = {
        let (ports, stop, arrived) = (ports.to_vec(), stop.clone(), arrived.clone());
        std::thread::spawn(move || {
            let mut source = open()?;
            measure_first(0);
            let _ = ready.send(());
            let mut seen: HashMap<Name, u32> = HashMap::new();
            while !stop.load(Ordering::Relaxed) {
                source.next(&ports, &mut |name| {
                    *seen.entry(name).or_default() += 1;
                    arrived.fetch_add(1, Ordering::Relaxed);
                });
            }
            Ok(CopiesOutcome { by_flow: sum(&seen), dropped: source.dropped()? })
        })
    };
    if is_ready.recv().is_err() {
        return Err(counter.join().map_err(|_| anyhow!("panicked"))?.err().unwrap_or(anyhow!("no counter")));
    }
    Ok(Copies { stop, arrived, counter })
}

/// So many missing numbers of a flow are told.
const MISSING_MAX: usize = 60;

struct Device(OwnedFd);

impl Source for Device {
    fn next(&mut self, ports: &[u16], each: &mut dyn FnMut(Name)) {
        let mut buffer = [0u8; 256];
        // SAFETY: the buffer lives through the call and its true size is given.
        let got = unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        if let Some(bytes) = usize::try_from(got).ok().and_then(|length| buffer.get(..length)) {
            name_of(bytes, ports).into_iter().for_each(each);
        }
    }

    fn dropped(&self) -> Result<u64> {
        dropped(&self.0)
    }
}

struct Collector {
    socket: UdpSocket,
    export: Export,
    ipfix: Ipfix,
}

/// A daemon tells its templates at its start: the collector of a later round has them from the one before.
static TOLD: Mutex<Option<Ipfix>> = Mutex::new(None);

impl Drop for Collector {
    fn drop(&mut self) {
        if let Ok(mut told) = TOLD.lock() {
            *told = Some(std::mem::take(&mut self.ipfix));
        }
    }
}

impl Source for Collector {
    fn next(&mut self, ports: &[u16], each: &mut dyn FnMut(Name)) {
        let mut buffer = [0u8; 2048];
        let Ok(length) = self.socket.recv(&mut buffer) else { return };
        let datagram = buffer.get(..length).unwrap_or_default();
        match self.export {
            Export::Sflow => {
                let frames = sampled(Words(datagram)).unwrap_or_default();
                frames.iter().filter_map(|frame| name_of(frame.get(ETHERNET..)?, ports)).for_each(each);
            }
            Export::Ipfix => {
                for record in self.ipfix.records(datagram).unwrap_or_default() {
                    let name = name_of_ports(record.ports, ports, u32::from);
                    (0..record.packets).filter_map(|_| name).for_each(&mut *each);
                }
            }
        }
    }

    /// Its datagrams are few, and have all of the buffer.
    fn dropped(&self) -> Result<u64> {
        Ok(0)
    }
}

/// Bytes of an Ethernet header without tags.
const ETHERNET: usize = 14;
// Of sFlow version 5 (sflow_version_5.txt, 5): samples and records are numbered by enterprise (0) and format.
const FLOW_SAMPLE: u32 = 1;
const RAW_PACKET_HEADER: u32 = 1;

/// The frames sampled in an sFlow datagram; None if it is malformed.
fn sampled(mut datagram: Words<'_>) -> Option<Vec<&[u8]>> {
    let [_version, kind] = [datagram.word()?, datagram.word()?];
    datagram.take(if kind == 1 { 4 } else { 16 })?;
    let [_agent, _number, _uptime, samples] = [datagram.word()?, datagram.word()?, datagram.word()?, datagram.word()?];
    let mut frames = Vec::new();
    for _ in 0..samples {
        let (format, mut sample) = datagram.structure()?;
        if format != FLOW_SAMPLE {
            continue;
        }
        // Number, source, rate, pool, drops, input, output.
        sample.take(7 * 4)?;
        for _ in 0..sample.word()? {
            let (format, mut record) = sample.structure()?;
            if format == RAW_PACKET_HEADER {
                // Protocol, length of the frame, bytes stripped.
                record.take(3 * 4)?;
                let length = record.word()?;
                frames.push(record.take(length as usize)?.0);
            }
        }
    }
    Some(frames)
}

/// XDR: words of four bytes, in network order.
#[derive(Clone, Copy)]
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    fn take(&mut self, length: usize) -> Option<Words<'a>> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(Words(head))
    }

    fn word(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.0.try_into().ok()?))
    }

    /// A format, a length, and so many bytes.
    fn structure(&mut self) -> Option<(u32, Words<'a>)> {
        let (format, length) = (self.word()?, self.word()?);
        Some((format, self.take(length as usize)?))
    }
}

/// Reads a packet from its IPv4 header on; None if it is no probe's.
fn name_of(bytes: &[u8], ports: &[u16]) -> Option<Name> {
    let header = usize::from(bytes.first()? & 0x0f) * 4;
    if bytes.first()? >> 4 != 4 || *bytes.get(9)? != libc::IPPROTO_UDP as u8 {
        return None;
    }
    let udp = bytes.get(header..)?;
    let port = |at: usize| Some(u16::from_be_bytes(*udp.get(at..)?.first_chunk()?));
    let number = u32::from_be_bytes(*udp.get(8..)?.first_chunk()?);
    name_of_ports([port(0)?, port(2)?], ports, |_| number)
}

/// The name of a packet by its source and destination port; `number` of the port that is not the probe's.
fn name_of_ports([src, dst]: [u16; 2], ports: &[u16], number: impl Fn(u16) -> u32) -> Option<Name> {
    if ports.contains(&dst) {
        Some((dst, true, number(src)))
    } else if ports.contains(&src) {
        Some((src, false, number(dst)))
    } else {
        None
    }
}

/// Of one direction of a probe: how often each number was seen.
fn count(times: &BTreeMap<u32, u32>) -> CopyCount {
    let gaps = times.keys().zip(times.keys().skip(1)).flat_map(|(number, next)| number + 1..*next);
    CopyCount {
        different: times.len() as u64,
        duplicated: times.values().map(|times| u64::from(times - 1)).sum(),
        missing: gaps.take(MISSING_MAX).collect(),
    }
}

fn sum(seen: &HashMap<Name, u32>) -> BTreeMap<String, CopyCount> {
    let mut flows: BTreeMap<String, BTreeMap<u32, u32>> = BTreeMap::new();
    for ((port, request, number), times) in seen {
        let direction = if *request { "requests" } else { "replies" };
        flows.entry(format!("{port} {direction}")).or_default().insert(*number, *times);
    }
    flows.into_iter().map(|(flow, times)| (flow, count(&times))).collect()
}

/// Frames that found no room in the socket: then the count is worth nothing.
fn dropped(socket: &OwnedFd) -> Result<u64> {
    // struct tpacket_stats of linux/if_packet.h: packets, drops.
    let mut stats = [0u32; 2];
    let mut length = size_of_val(&stats) as u32;
    // SAFETY: `stats` lives through the call and its true size is given.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            stats.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    match failed {
        0 => Ok(u64::from(stats[1])),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

impl Running for Copies {
    fn finish(self: Box<Self>) -> Result<ProbeOutcome> {
        udp::wait_for_stragglers(&self.arrived);
        self.stop.store(true, Ordering::Relaxed);
        Ok(ProbeOutcome::Copies(self.counter.join().map_err(|_| anyhow!("the counter panicked"))??))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(src: u16, dst: u16, number: u32) -> Vec<u8> {
        let mut bytes = vec![0u8; 20];
        (bytes[0], bytes[9]) = (0x45, 17);
        bytes.extend(src.to_be_bytes());
        bytes.extend(dst.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(number.to_be_bytes());
        bytes
    }

    #[test]
    fn frames_are_found_in_an_sflow_datagram() {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>();
        let frame = [&[0u8; ETHERNET], &packet(5, 9001, 77)[..], &[0; 2]].concat();
        assert_eq!(frame.len() % 4, 0);
        let record = [words(&[1, 16 + frame.len() as u32, 1, 64, 4, frame.len() as u32]), frame.clone()].concat();
        let sample = [words(&[7, 3, 1, 9, 0, 1, 2, 2]), words(&[1001, 4, 0]), record].concat();
        let counters = words(&[2, 8, 0, 0]);
        let mut datagram = words(&[5, 1, 0x7f00_0001, 0, 1, 1000, 2]);
        datagram.extend(counters);
        datagram.extend([words(&[1, sample.len() as u32]), sample].concat());
        assert_eq!(sampled(Words(&datagram)), Some(vec![&frame[..]]));
        assert_eq!(sampled(Words(&datagram[..datagram.len() - 1])), None);
    }

    #[test]
    fn packets_are_known_by_port_direction_and_number() {
        let ports = [9000, 9001];
        assert_eq!(name_of(&packet(5, 9001, 77), &ports), Some((9001, true, 77)));
        assert_eq!(name_of(&packet(9000, 5, 78), &ports), Some((9000, false, 78)));
        assert_eq!(name_of(&packet(5, 6, 78), &ports), None);
        assert_eq!(name_of(&packet(5, 9001, 77)[..30], &ports), None);
        let seen = HashMap::from([((9001, true, 1), 1), ((9001, true, 2), 3)]);
        assert_eq!(sum(&seen)["9001 requests"], CopyCount { different: 2, duplicated: 2, missing: Vec::new() });
    }
}

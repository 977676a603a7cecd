//! A mirror's port: every packet of the UDP probes has to be seen there exactly once.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{anyhow, Result};
use nix::sys::socket::{setsockopt, sockopt};

use super::{measure_first, silent, udp, Place, Running};
use crate::outcome::{CopiesOutcome, CopyCount, ProbeOutcome};

/// Copies of a burst of replayed packets fit, bytes.
const RECEIVE_BUFFER: usize = 32 << 20;

/// Counting under way.
pub struct Copies {
    stop: Arc<AtomicBool>,
    arrived: Arc<AtomicU64>,
    counter: JoinHandle<Result<CopiesOutcome>>,
}

/// Whose packet it is: the probe's port, whether it is a request, and its number.
type Name = (u16, bool, u32);

/// Starts to count on `device`; `ports` are those of the probes.
pub fn start(place: &Place, device: &str, ports: &[u16]) -> Result<Copies> {
    let (stop, arrived) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (ready, is_ready) = channel();
    let counter = {
        let (place, device, ports) = (place.clone(), device.to_owned(), ports.to_vec());
        let (stop, arrived) = (stop.clone(), arrived.clone());
        std::thread::spawn(move || {
            place.enter()?;
            measure_first(0);
            let socket = silent::listen(&device)?;
            setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
            let _ = ready.send(());
            let seen = count(&socket, &ports, &stop, &arrived);
            Ok(CopiesOutcome { by_flow: sum(&seen), dropped: dropped(&socket)? })
        })
    };
    if is_ready.recv().is_err() {
        return Err(counter.join().map_err(|_| anyhow!("panicked"))?.err().unwrap_or(anyhow!("no counter")));
    }
    Ok(Copies { stop, arrived, counter })
}

fn count(socket: &OwnedFd, ports: &[u16], stop: &AtomicBool, arrived: &AtomicU64) -> HashMap<Name, u32> {
    let mut seen = HashMap::new();
    let mut buffer = [0u8; 256];
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: the buffer lives through the call and its true size is given.
        let got = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let Ok(length) = usize::try_from(got) else { continue };
        if let Some(name) = buffer.get(..length).and_then(|bytes| name_of(bytes, ports)) {
            *seen.entry(name).or_default() += 1;
            arrived.fetch_add(1, Ordering::Relaxed);
        }
    }
    seen
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
    match (port(0)?, port(2)?) {
        (_, dst) if ports.contains(&dst) => Some((dst, true, number)),
        (src, _) if ports.contains(&src) => Some((src, false, number)),
        _ => None,
    }
}

fn sum(seen: &HashMap<Name, u32>) -> BTreeMap<String, CopyCount> {
    let mut all: BTreeMap<String, CopyCount> = BTreeMap::new();
    for ((port, request, _), times) in seen {
        let direction = if *request { "requests" } else { "replies" };
        let count = all.entry(format!("{port} {direction}")).or_default();
        count.different += 1;
        count.duplicated += u64::from(times - 1);
    }
    all
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
    fn packets_are_known_by_port_direction_and_number() {
        let ports = [9000, 9001];
        assert_eq!(name_of(&packet(5, 9001, 77), &ports), Some((9001, true, 77)));
        assert_eq!(name_of(&packet(9000, 5, 78), &ports), Some((9000, false, 78)));
        assert_eq!(name_of(&packet(5, 6, 78), &ports), None);
        assert_eq!(name_of(&packet(5, 9001, 77)[..30], &ports), None);
        let seen = HashMap::from([((9001, true, 1), 1), ((9001, true, 2), 3)]);
        assert_eq!(sum(&seen)["9001 requests"], CopyCount { different: 2, duplicated: 2 });
    }
}

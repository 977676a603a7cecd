//! A port that nobody talks to: unicast frames that reach it were flooded.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{anyhow, Context, Result};

use super::{Place, Running};
use crate::outcome::{ProbeOutcome, SilentOutcome};

/// Counting under way.
pub struct SilentPort {
    acting: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    counter: JoinHandle<Result<SilentOutcome>>,
}

/// Starts to count frames on `device`.
pub fn start(place: &Place, device: &str) -> Result<SilentPort> {
    let (acting, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (ready, is_ready) = channel();
    let counter = {
        let (place, device, acting, stop) = (place.clone(), device.to_owned(), acting.clone(), stop.clone());
        std::thread::spawn(move || {
            place.enter()?;
            let socket = listen(&device)?;
            let _ = ready.send(());
            Ok(count(&socket, &acting, &stop))
        })
    };
    if is_ready.recv().is_err() {
        return Err(counter.join().map_err(|_| anyhow!("panicked"))?.err().unwrap_or(anyhow!("no counter")));
    }
    Ok(SilentPort { acting, stop, counter })
}

pub(super) fn listen(device: &str) -> Result<OwnedFd> {
    let index = nix::net::if_::if_nametoindex(device).with_context(|| format!("no device {device}"))?;
    // ETH_P_ALL of linux/if_ether.h, in network order as packet(7) wants it.
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: plain system call; the descriptor is checked and owned at once.
    let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, i32::from(protocol)) };
    if raw < 0 {
        return Err(std::io::Error::last_os_error()).context("cannot open a packet socket");
    }
    // SAFETY: `raw` was just given to us and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: all zeroes is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = i32::try_from(index)?;
    let time_limit = libc::timeval { tv_sec: 0, tv_usec: 100_000 };
    // SAFETY: both structures live through the calls and their true sizes are given.
    let failed = unsafe {
        libc::bind(raw, (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32) != 0
            || libc::setsockopt(
                raw,
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const time_limit).cast(),
                size_of::<libc::timeval>() as u32,
            ) != 0
    };
    if failed {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("cannot listen on {device}"));
    }
    Ok(socket)
}

fn count(socket: &OwnedFd, acting: &AtomicBool, stop: &AtomicBool) -> SilentOutcome {
    let mut outcome = SilentOutcome::default();
    let mut buffer = [0u8; 256];
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: all zeroes is a valid sockaddr_ll.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut length = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: buffer and address live through the call and their true sizes are given.
        let got = unsafe {
            libc::recvfrom(
                socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
                (&raw mut from).cast(),
                &raw mut length,
            )
        };
        if got < 0 {
            continue;
        }
        let counter = match (from.sll_pkttype, acting.load(Ordering::Relaxed)) {
            (libc::PACKET_OUTGOING, _) => continue,
            (libc::PACKET_BROADCAST | libc::PACKET_MULTICAST, false) => &mut outcome.quiet_broadcast,
            (libc::PACKET_BROADCAST | libc::PACKET_MULTICAST, true) => &mut outcome.later_broadcast,
            (_, false) => &mut outcome.quiet_unicast,
            (_, true) => &mut outcome.later_unicast,
        };
        *counter += 1;
    }
    outcome
}

impl Running for SilentPort {
    fn action_begins(&self) {
        self.acting.store(true, Ordering::Relaxed);
    }

    fn finish(self: Box<Self>) -> Result<ProbeOutcome> {
        self.stop.store(true, Ordering::Relaxed);
        Ok(ProbeOutcome::Silent(self.counter.join().map_err(|_| anyhow!("the counter panicked"))??))
    }
}

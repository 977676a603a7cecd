//! Numbered UDP requests from A, echoed by B; arrivals counted at both ends. The same with UDP-Lite, and with pings,
//! which B's kernel answers.

use std::collections::{BTreeMap, VecDeque};
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context, Result};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{bind, setsockopt, sockopt, SockaddrStorage};

use super::stats::{judge, Arrival};
use super::{anywhere, measure_first, now, Place, Ports, Protocol, Running};
use crate::outcome::{ProbeOutcome, UdpOutcome};

/// Bytes of a usual probe packet.
pub const LENGTH: usize = 64;
/// Room for the longest packet.
const BUFFER: usize = 65_536;
/// Source sockets kept open for replies: 80 s of the new-flow stream at 10 ms. A reply that comes later would count as
/// lost, and a slow machine has had 14 s at 5 ms.
const KEPT_SOCKETS: usize = 8192;
/// Source port of a constant flow, plus the last digits of its destination port.
const CONSTANT_FIRST: u16 = 62_000;
/// Once sending has stopped: no arrival for so long means that there will be none.
const GRACE: Duration = Duration::from_secs(4);
/// A guest that is too slow for its traffic has this long to work off what waits in its sockets.
const PATIENCE: Duration = Duration::from_secs(60);
/// Buffers that a burst of replayed packets does not fill, bytes.
const RECEIVE_BUFFER: usize = 8 << 20;
/// A parked packet is charged to the socket that sent it until it is delivered: with the system's 208 KiB the constant
/// flow's sender would get EAGAIN after some hundred parked packets, bytes.
const SEND_BUFFER: usize = 32 << 20;

/// Builds packet `sequence` of `length` bytes: number, filling that depends on it, checksum.
fn packet(sequence: u32, length: usize) -> Vec<u8> {
    let mut bytes = sequence.to_be_bytes().to_vec();
    let mut filling = sequence.wrapping_mul(2_654_435_761);
    bytes.resize_with(length - 4, || {
        filling = filling.rotate_left(5).wrapping_add(0x9e37_79b9);
        filling as u8
    });
    let sum = checksum(&bytes);
    bytes.extend(sum.to_be_bytes());
    bytes
}

/// FNV-1a: enough to see a damaged payload that UDP's own checksum let through.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// The number of a whole packet of `length` bytes; None for a damaged one.
fn sequence_of(bytes: &[u8], length: usize) -> Option<u32> {
    let (body, sum) = bytes.split_at_checked(length - 4)?;
    if bytes.len() != length || checksum(body).to_be_bytes() != sum {
        return None;
    }
    Some(u32::from_be_bytes(body.get(..4)?.try_into().ok()?))
}

#[derive(Clone, Default)]
struct Log {
    arrivals: Vec<Arrival>,
    corrupted: u64,
    wrong_source: u64,
}

#[derive(Default)]
struct Flags {
    stop_sending: AtomicBool,
    stop_listening: AtomicBool,
    sent: AtomicU64,
    arrived: AtomicU64,
}

struct Sent {
    at: Vec<u64>,
    late_ns: u64,
    due: u64,
    errors: BTreeMap<String, u64>,
}

/// What a UDP probe sends.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    /// Where requests go.
    pub target: SocketAddr,
    /// Time between two of them, µs.
    pub interval_us: u64,
    /// Source ports.
    pub ports: Ports,
    /// Bytes of each; more than the MTU leaves in fragments.
    pub length: usize,
    /// Their protocol.
    pub protocol: Protocol,
}

impl Stream {
    fn interval_ns(&self) -> u64 {
        self.interval_us * 1000
    }

    /// A socket at `port` of every address.
    fn bind(&self, port: u16) -> std::io::Result<UdpSocket> {
        let address = SocketAddr::new(anywhere(self.target), port);
        match (self.protocol, address) {
            (Protocol::Udp, _) => UdpSocket::bind(address),
            (Protocol::UdpLite, _) => datagrams(address, libc::IPPROTO_UDPLITE),
            (Protocol::Echo, SocketAddr::V4(_)) => datagrams(address, libc::IPPROTO_ICMP),
            (Protocol::Echo, SocketAddr::V6(_)) => datagrams(address, libc::IPPROTO_ICMPV6),
        }
    }

    /// What stands before the payload in what a socket sends and receives: the kernel fills in identifier and checksum.
    fn header(&self) -> &'static [u8] {
        match (self.protocol, self.target) {
            (Protocol::Echo, SocketAddr::V4(_)) => &[8, 0, 0, 0, 0, 0, 0, 0],
            (Protocol::Echo, SocketAddr::V6(_)) => &[128, 0, 0, 0, 0, 0, 0, 0],
            _ => &[],
        }
    }

    /// Whether a packet from `sender` is an answer.
    fn is_from(&self, sender: SocketAddr) -> bool {
        // A member of a group answers with its own address.
        let its = sender.ip() == self.target.ip() || self.target.ip().is_multicast();
        its && (self.protocol == Protocol::Echo || sender.port() == self.target.port())
    }
}

/// A UDP probe under way.
pub struct UdpProbe {
    flags: Arc<Flags>,
    stream: Stream,
    sender: JoinHandle<Result<Sent>>,
    echo: JoinHandle<Result<Log>>,
    collector: JoinHandle<Result<Log>>,
}

/// Starts requests from `from`, answered in `to`.
pub fn start(from: &Place, to: &Place, stream: Stream) -> Result<UdpProbe> {
    let flags = Arc::new(Flags::default());
    let (ready, is_ready) = channel();
    let echo = {
        let (flags, to) = (flags.clone(), to.clone());
        std::thread::spawn(move || echo(&to, stream, &flags, &ready))
    };
    if is_ready.recv().is_err() {
        return Err(echo.join().map_err(|_| anyhow!("the echo thread panicked"))?.err().unwrap_or(anyhow!("no echo")));
    }
    let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
    let (hand_over, sockets) = channel();
    let collector = {
        let (flags, epoll) = (flags.clone(), epoll.clone());
        std::thread::spawn(move || collect(stream, &flags, &epoll, &sockets))
    };
    let sender = {
        let (flags, from) = (flags.clone(), from.clone());
        let hand_over = HandOver { sockets: hand_over, epoll, next_id: 0 };
        std::thread::spawn(move || send(&from, stream, &flags, hand_over))
    };
    Ok(UdpProbe { flags, stream, sender, echo, collector })
}

fn echo(place: &Place, stream: Stream, flags: &Flags, ready: &Sender<()>) -> Result<Log> {
    let target = stream.target;
    place.enter()?;
    if stream.protocol == Protocol::Echo {
        // The kernel answers.
        let _ = ready.send(());
        return Ok(Log::default());
    }
    measure_first(target.port());
    let socket = stream.bind(target.port()).context("cannot bind the echo socket")?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let _ = ready.send(());
    let mut log = Log::default();
    let mut buffer = vec![0u8; BUFFER];
    while !flags.stop_listening.load(Ordering::Relaxed) {
        let Ok((length, sender)) = socket.recv_from(&mut buffer) else { continue };
        let bytes = buffer.get(..length).unwrap_or_default();
        match sequence_of(bytes, stream.length) {
            None => log.corrupted += 1,
            Some(sequence) => {
                log.arrivals.push(Arrival { sequence, at: now() });
                flags.arrived.fetch_add(1, Ordering::Relaxed);
                // A reply that the kernel refuses shows as a lost reply.
                let _ = socket.send_to(bytes, sender);
            }
        }
    }
    Ok(log)
}

/// Gives sockets to the collector, who hears of replies from then on.
struct HandOver {
    sockets: Sender<UdpSocket>,
    epoll: Arc<Epoll>,
    next_id: u64,
}

impl HandOver {
    fn give(&mut self, socket: &UdpSocket) -> Result<()> {
        let socket = socket.try_clone()?;
        self.epoll.add(socket.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, self.next_id))?;
        self.next_id += 1;
        self.sockets.send(socket).map_err(|_| anyhow!("the collector is gone"))
    }
}

fn collect(stream: Stream, flags: &Flags, epoll: &Epoll, sockets: &Receiver<UdpSocket>) -> Result<Log> {
    measure_first(stream.target.port());
    // In the order of their ids.
    let mut open: VecDeque<UdpSocket> = VecDeque::new();
    let mut oldest = 0u64;
    // A port that comes round must be free again.
    let kept = match stream.ports {
        Ports::Cycle { count, .. } => KEPT_SOCKETS.min(usize::from(count) / 2),
        Ports::Constant | Ports::EachNew => KEPT_SOCKETS,
    };
    let mut log = Log::default();
    let mut events = [EpollEvent::empty(); 128];
    let mut buffer = vec![0u8; BUFFER];
    while !flags.stop_listening.load(Ordering::Relaxed) {
        let count = epoll.wait(&mut events, EpollTimeout::from(100u8))?;
        while let Ok(socket) = sockets.try_recv() {
            open.push_back(socket);
            if open.len() > kept {
                open.pop_front();
                oldest += 1;
            }
        }
        for event in events.iter().take(count) {
            let index = event.data().checked_sub(oldest).and_then(|i| usize::try_from(i).ok());
            if let Some(socket) = index.and_then(|i| open.get(i)) {
                receive_all(socket, stream, &mut buffer, &mut log);
                flags.arrived.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    Ok(log)
}

fn receive_all(socket: &UdpSocket, stream: Stream, buffer: &mut [u8], log: &mut Log) {
    while let Ok((length, sender)) = socket.recv_from(buffer) {
        if !stream.is_from(sender) {
            log.wrong_source += 1;
            continue;
        }
        match sequence_of(buffer.get(stream.header().len()..length).unwrap_or_default(), stream.length) {
            None => log.corrupted += 1,
            Some(sequence) => log.arrivals.push(Arrival { sequence, at: now() }),
        }
    }
}

fn source_socket(stream: Stream, port: u16) -> Result<UdpSocket> {
    let socket = stream.bind(port).with_context(|| format!("cannot bind source port {port}"))?;
    socket.set_nonblocking(true)?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER)?;
    if stream.protocol != Protocol::Udp {
        // What varies with the port is what Open vSwitch can match: 64 times 64 flows in turn.
        let (ttl, class) = (64 + i32::from(port % 64), i32::from(port / 64 % 64 * 4));
        match stream.target {
            SocketAddr::V4(_) => {
                setsockopt(&socket, sockopt::Ipv4Ttl, &ttl)?;
                setsockopt(&socket, sockopt::Ipv4Tos, &class)?;
            }
            SocketAddr::V6(_) => {
                setsockopt(&socket, sockopt::Ipv6Ttl, &ttl)?;
                setsockopt(&socket, sockopt::Ipv6TClass, &class)?;
            }
        }
    }
    Ok(socket)
}

impl Protocol {
    /// Does this kernel have UDP-Lite?
    pub fn udp_lite_is_known() -> bool {
        datagrams(SocketAddr::from(([127, 0, 0, 1], 0)), libc::IPPROTO_UDPLITE).is_ok()
    }
}

/// A datagram socket of `protocol`, bound to `address`.
fn datagrams(address: SocketAddr, protocol: i32) -> std::io::Result<UdpSocket> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: plain system call; the descriptor is checked and owned at once.
    let raw = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, protocol) };
    if raw < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: `raw` was just given to us and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket.into())
}

fn send(place: &Place, stream: Stream, flags: &Flags, mut hand_over: HandOver) -> Result<Sent> {
    let Stream { target, ports, .. } = stream;
    let interval_ns = stream.interval_ns();
    place.enter()?;
    measure_first(target.port());
    if stream.protocol == Protocol::Echo {
        // Of this network namespace, IPv6 included (ip-sysctl.rst): sockets for pings are nobody's at first.
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0")?;
    }
    let mut sent = Sent { at: Vec::with_capacity(1 << 16), late_ns: 0, due: 0, errors: BTreeMap::new() };
    // Fixed, so that it never takes a port that another probe needs.
    let constant = source_socket(stream, CONSTANT_FIRST + target.port() % 1000)?;
    hand_over.give(&constant)?;
    let begin = now();
    let mut sequence = 0u32;
    while !flags.stop_sending.load(Ordering::Relaxed) {
        let due_at = begin + u64::from(sequence) * interval_ns;
        let early = due_at.saturating_sub(now());
        if early > 0 {
            std::thread::sleep(Duration::from_nanos(early));
        }
        let result = match ports.source(sequence) {
            None => transmit(&constant, sequence, stream, &mut sent),
            Some(port) => {
                let socket = source_socket(stream, port)?;
                // The collector must know the socket before a reply can come.
                hand_over.give(&socket)?;
                transmit(&socket, sequence, stream, &mut sent)
            }
        };
        if let Err(error) = result {
            *sent.errors.entry(error.to_string()).or_default() += 1;
        }
        sent.late_ns = sent.late_ns.max(sent.at.last().copied().unwrap_or(due_at).saturating_sub(due_at));
        sequence += 1;
        flags.sent.store(u64::from(sequence), Ordering::Relaxed);
    }
    sent.due = (now() - begin) / interval_ns;
    Ok(sent)
}

fn transmit(socket: &UdpSocket, sequence: u32, stream: Stream, sent: &mut Sent) -> std::io::Result<()> {
    let packet = [stream.header(), &packet(sequence, stream.length)].concat();
    sent.at.push(now());
    loop {
        match socket.send_to(&packet, stream.target) {
            // It has not left: a full buffer delays the packet, the network did not lose it.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], PollTimeout::from(100u8))?;
            }
            result => return result.map(drop),
        }
    }
}

/// Waits until nothing arrives any more.
pub(super) fn wait_for_stragglers(arrived: &AtomicU64) {
    let end = Instant::now() + PATIENCE;
    let (mut before, mut quiet_since) = (arrived.load(Ordering::Relaxed), Instant::now());
    while quiet_since.elapsed() < GRACE && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
        let now = arrived.load(Ordering::Relaxed);
        if now != before {
            (before, quiet_since) = (now, Instant::now());
        }
    }
}

impl Running for UdpProbe {
    fn flows_begun(&self) -> u64 {
        match self.stream.ports {
            Ports::Constant | Ports::Cycle { .. } => 0,
            Ports::EachNew => self.flags.sent.load(Ordering::Relaxed),
        }
    }

    fn stop_sending(&self) {
        self.flags.stop_sending.store(true, Ordering::Relaxed);
    }

    fn finish(self: Box<Self>) -> Result<ProbeOutcome> {
        self.stop_sending();
        let sent = self.sender.join().map_err(|_| anyhow!("the sender panicked"))??;
        wait_for_stragglers(&self.flags.arrived);
        self.flags.stop_listening.store(true, Ordering::Relaxed);
        let there = self.echo.join().map_err(|_| anyhow!("the echo panicked"))??;
        let back = self.collector.join().map_err(|_| anyhow!("the collector panicked"))??;
        // Who asks a kernel knows of the requests by their answers only.
        let there = if self.stream.protocol == Protocol::Echo { back.clone() } else { there };
        let mut answered = vec![false; sent.at.len()];
        for arrival in &there.arrivals {
            if let Some(slot) = answered.get_mut(arrival.sequence as usize) {
                *slot = true;
            }
        }
        let all = vec![true; sent.at.len()];
        Ok(ProbeOutcome::Udp(Box::new(UdpOutcome {
            due: sent.due,
            sent: sent.at.len() as u64,
            sender_late_ms: sent.late_ns as f64 / 1e6,
            send_errors: sent.errors,
            requests: judge(&sent.at, &all, &there.arrivals, there.corrupted, self.stream.interval_ns()),
            replies: judge(&sent.at, &answered, &back.arrivals, back.corrupted, self.stream.interval_ns()),
            wrong_source: back.wrong_source,
        })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_knows_its_number_and_its_damage() {
        let mut bytes = packet(70_000, 64);
        assert_eq!(sequence_of(&bytes, 64), Some(70_000));
        assert_ne!(packet(1, 64)[4..20], packet(2, 64)[4..20]);
        assert_eq!(sequence_of(&packet(5, 4000), 4000), Some(5));
        bytes[17] ^= 1;
        assert_eq!(sequence_of(&bytes, 64), None);
        assert_eq!(sequence_of(&bytes[..40], 64), None);
        assert_eq!(sequence_of(&[], 64), None);
    }

    #[test]
    fn over_loopback_everything_arrives() {
        let target = "127.0.0.1:39001".parse().unwrap();
        // RcvBufForce needs CAP_NET_ADMIN.
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let protocol = Protocol::Udp;
        let stream = Stream { target, interval_us: 5000, ports: Ports::EachNew, length: LENGTH, protocol };
        let probe = start(&Place::Host, &Place::Host, stream).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let ProbeOutcome::Udp(outcome) = Box::new(probe).finish().unwrap() else { panic!() };
        assert!(outcome.sent > 20, "{outcome:?}");
        assert_eq!((outcome.requests.lost, outcome.replies.lost, outcome.replies.duplicated), (0, 0, 0));
        assert_eq!(outcome.replies.received, outcome.sent);
    }
}

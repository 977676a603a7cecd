//! The traffic probes: threads that live in network namespaces and count what arrives.

pub mod connections;
pub mod copies;
pub mod iperf;
mod ipfix;
pub mod silent;
pub mod stats;
pub mod tcp;
pub mod udp;

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use nix::sched::{setns, CloneFlags};

use crate::outcome::ProbeOutcome;

/// Where a probe's end lives: a named network namespace, or the host's own.
#[derive(Debug, Clone)]
pub enum Place {
    /// `ip netns` name.
    Namespace(String),
    /// The initial namespace.
    Host,
}

impl Place {
    /// A named namespace.
    pub fn named(name: &str) -> Self {
        Place::Namespace(name.to_owned())
    }

    /// Moves the calling thread there.
    pub fn enter(&self) -> Result<()> {
        let Place::Namespace(name) = self else { return Ok(()) };
        let path = format!("/run/netns/{name}");
        let file = File::open(&path).with_context(|| format!("cannot open the namespace {path}"))?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter the namespace {path}"))
    }
}

/// What a UDP probe varies from packet to packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// One flow.
    Constant,
    /// Every packet from a new source port.
    EachNew,
    /// Source ports in turn, so that as many flows stay in use.
    Cycle {
        /// The first of them.
        first: u16,
        /// How many.
        count: u16,
    },
}

impl Ports {
    /// Source port of packet `sequence`; None for the one socket of a constant flow.
    pub fn source(self, sequence: u32) -> Option<u16> {
        match self {
            Ports::Constant => None,
            Ports::EachNew => Some(FIRST_NEW + (sequence % NEW_PORTS) as u16),
            Ports::Cycle { first, count } => Some(first + (sequence % u32::from(count)) as u16),
        }
    }
}

/// What a UDP probe sends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Protocol {
    /// UDP.
    #[default]
    Udp,
    /// UDP-Lite (RFC 3828): connection tracking knows its ports, Open vSwitch does not.
    UdpLite,
    /// ICMP or ICMPv6 echo requests. The source port is the identifier, the destination port only names the probe.
    Echo,
}

/// The intervals of all probes are so many times as long: what a slow machine carries.
pub static SLOWER: AtomicU64 = AtomicU64::new(1);

/// Source ports of [`Ports::EachNew`]: enough for minutes, and below those of [`Ports::Cycle`] and of constant flows.
const FIRST_NEW: u16 = 10_000;
const NEW_PORTS: u32 = 30_000;

/// What a collector is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Export {
    /// sFlow version 5.
    Sflow,
    /// IPFIX (RFC 7011).
    Ipfix,
}

/// A probe to run.
#[derive(Debug, Clone)]
pub enum Spec {
    /// Numbered requests and their echoes.
    Udp {
        /// Where requests come from.
        from: Place,
        /// Where they are answered.
        to: Place,
        /// The address they are sent to.
        address: IpAddr,
        /// Destination port.
        port: u16,
        /// Time between two requests, µs.
        interval_us: u64,
        /// One flow or many.
        ports: Ports,
        /// Bytes of a packet.
        length: usize,
        /// UDP, as a rule.
        protocol: Protocol,
    },
    /// One long-lived connection with checked payload both ways.
    Tcp {
        /// The client.
        from: Place,
        /// The server.
        to: Place,
        /// The server's address.
        address: IpAddr,
        /// The server's port.
        port: u16,
        /// What is written at once.
        pace: tcp::Pace,
    },
    /// TCP connections, each new.
    Connections {
        /// The client.
        from: Place,
        /// The server.
        to: Place,
        /// The server's address.
        address: IpAddr,
        /// The server's port.
        port: u16,
        /// Time between two connections, µs.
        interval_us: u64,
    },
    /// iperf3 over TCP.
    Iperf {
        /// The client, which sends.
        from: Place,
        /// The server.
        to: Place,
        /// The server's address.
        address: IpAddr,
        /// How much, bits per second.
        bits_per_second: u64,
    },
    /// Counts the copies that a mirror makes of the packets of UDP probes.
    Copies {
        /// Where its port is.
        place: Place,
        /// The device there.
        device: String,
        /// Ports of the probes.
        ports: Vec<u16>,
    },
    /// Counts the packets of UDP probes that a collector is told of.
    Exports {
        /// In which format.
        export: Export,
        /// Port of the host that they come to.
        port: u16,
        /// Ports of the probes.
        ports: Vec<u16>,
    },
    /// Counts frames on a device that nobody talks to.
    Silent {
        /// Where it is.
        place: Place,
        /// Its name there.
        device: String,
    },
}

/// A probe under way.
pub trait Running: Send {
    /// New flows begun so far.
    fn flows_begun(&self) -> u64 {
        0
    }
    /// The quiet window has ended, the action begins.
    fn action_begins(&self) {}
    /// Sends no more; it goes on listening.
    fn stop_sending(&self) {}
    /// Stops sending, waits for what is on its way, and judges.
    fn finish(self: Box<Self>) -> Result<ProbeOutcome>;
}

impl Spec {
    /// UDP packets of the usual length to `target`.
    pub fn udp(from: &Place, to: &Place, target: impl Into<SocketAddr>, interval_us: u64, ports: Ports) -> Self {
        let target = target.into();
        Spec::Udp {
            from: from.clone(),
            to: to.clone(),
            address: target.ip(),
            port: target.port(),
            interval_us,
            ports,
            length: udp::LENGTH,
            protocol: Protocol::Udp,
        }
    }

    /// Starts it.
    pub fn start(&self) -> Result<Box<dyn Running>> {
        let slower = SLOWER.load(Ordering::Relaxed);
        Ok(match self {
            Spec::Udp { from, to, address, port, interval_us, ports, length, protocol } => {
                let (target, interval_us) = (SocketAddr::new(*address, *port), *interval_us * slower);
                let stream = udp::Stream { target, interval_us, ports: *ports, length: *length, protocol: *protocol };
                Box::new(udp::start(from, to, stream)?)
            }
            Spec::Tcp { from, to, address, port, pace } => {
                Box::new(tcp::start(from, to, SocketAddr::new(*address, *port), *pace)?)
            }
            Spec::Connections { from, to, address, port, interval_us } => {
                Box::new(connections::start(from, to, SocketAddr::new(*address, *port), *interval_us * slower)?)
            }
            Spec::Iperf { from, to, address, bits_per_second } => {
                Box::new(iperf::start(from, to, *address, *bits_per_second / slower)?)
            }
            Spec::Copies { place, device, ports } => Box::new(copies::on_device(place, device, ports)?),
            Spec::Exports { export, port, ports } => Box::new(copies::in_exports(*export, *port, ports)?),
            Spec::Silent { place, device } => Box::new(silent::start(place, device)?),
        })
    }
}

/// The address that listens on all of `target`'s family.
pub fn anywhere(target: SocketAddr) -> IpAddr {
    match target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The monotonic clock, ns: the same in every namespace of the guest.
pub fn now() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    time.map(|t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64).unwrap_or(0)
}

/// Lets the calling thread run before everything else in the guest: a measuring thread that waits for a CPU would
/// measure its own waiting (6 s of it for 500 packets a second, on a slow machine). It stays on one CPU, by `number`:
/// moved between two packets it would make the reordering that it measures.
pub fn measure_first(number: u16) {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut cpu = nix::sched::CpuSet::new();
    let pinned = cpu
        .set(usize::from(number) % cpus)
        .and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpu));
    let thread = nix::unistd::gettid().to_string();
    let first = std::process::Command::new("chrt").args(["--rr", "--pid", "1", &thread]).status();
    if pinned.is_err() || !first.as_ref().is_ok_and(std::process::ExitStatus::success) {
        eprintln!("a probe competes for CPUs, its latencies include its own waiting: {pinned:?}, {first:?}");
    }
}

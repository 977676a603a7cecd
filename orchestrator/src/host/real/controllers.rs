//! Whether a daemon is connected to its controllers: its own word in the database is up to 5 s old
//! (`refresh_controller_status`, vswitchd/bridge.c), so its sockets are looked at.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use super::jsonrpc::remaining;
use super::{procfs, unixctl};
use crate::host::{Daemon, HostError, Result};

/// OFP_PORT (include/openflow/openflow-common.h).
const DEFAULT_PORT: u16 = 6653;
/// TCP_ESTABLISHED (include/net/tcp_states.h), as `/proc/net/tcp` has it.
const ESTABLISHED: &str = "01";
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// A connection is there before the controller has greeted: the daemon has that read after so many turns of its loop.
const TURNS: u32 = 2;

/// Waits until `daemon` has a connection to each of `targets` that it opens over TCP or TLS.
pub(super) fn wait(daemon: &Daemon, targets: &[String], until: Instant) -> Result<()> {
    let wanted: BTreeSet<Target> = targets.iter().filter_map(|target| Target::parse(target)).collect();
    let object = || format!("{} (pid {})", daemon.kind.program(), daemon.id.pid);
    loop {
        let there = peers(daemon.id.pid).map_err(|error| HostError::new(object(), format!("its sockets: {error}")))?;
        let Some(missing) = wanted.iter().find(|target| !there.iter().any(|peer| target.is(peer))) else { break };
        let Some(left) = remaining(until) else {
            return Err(HostError::timeout(object(), format!("waiting for its connection to {missing:?}")));
        };
        std::thread::sleep(left.min(LOOK_AGAIN));
    }
    (0..TURNS).try_for_each(|_| unixctl::command(daemon, "version", &[], until).map(drop))
}

/// Where a controller is; a name may be any address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    address: Option<IpAddr>,
    port: u16,
}

impl Target {
    /// None for one that connects to the daemon (`ptcp:`), and for `unix:`, whose connection is made at once.
    fn parse(target: &str) -> Option<Target> {
        let rest = target.strip_prefix("tcp:").or_else(|| target.strip_prefix("ssl:"))?;
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port.parse().ok()?),
            _ => (rest, DEFAULT_PORT),
        };
        Some(Target { address: host.trim_matches(['[', ']']).parse().ok(), port })
    }

    fn is(&self, peer: &SocketAddr) -> bool {
        self.port == peer.port() && self.address.is_none_or(|address| address == peer.ip().to_canonical())
    }
}

/// The other ends of the TCP connections of process `pid`, in its own network namespace.
fn peers(pid: i32) -> std::io::Result<Vec<SocketAddr>> {
    let own = procfs::socket_inodes(pid)?;
    let mut peers = Vec::new();
    for table in ["tcp", "tcp6"] {
        // A kernel without IPv6 has no tcp6.
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        peers.extend(
            text.lines().skip(1).filter_map(established).filter(|(inode, _)| own.contains(inode)).map(|(_, p)| p),
        );
    }
    Ok(peers)
}

/// Inode and other end of an established connection, from a line of `/proc/net/tcp` or `tcp6`.
fn established(line: &str) -> Option<(u64, SocketAddr)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    if fields.get(3) != Some(&ESTABLISHED) {
        return None;
    }
    let (address, port) = fields.get(2)?.split_once(':')?;
    let peer = SocketAddr::new(address_of(address)?, u16::from_str_radix(port, 16).ok()?);
    Some((fields.get(9)?.parse().ok()?, peer))
}

/// The kernel prints each 32 bits of an address as a number of the machine's byte order.
fn address_of(digits: &str) -> Option<IpAddr> {
    if !digits.len().is_multiple_of(8) {
        return None;
    }
    let words = digits.as_bytes().chunks(8).map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok());
    let bytes: Vec<u8> = words.collect::<Option<Vec<u32>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)).to_canonical()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_as_open_vswitch_does() {
        let target = |text: &str| Target::parse(text).map(|t| (t.address.map(|a| a.to_string()), t.port));
        assert_eq!(target("tcp:127.0.0.1:6633"), Some((Some("127.0.0.1".into()), 6633)));
        assert_eq!(target("ssl:192.0.2.1"), Some((Some("192.0.2.1".into()), 6653)));
        assert_eq!(target("tcp:[2001:db8::1]:7000"), Some((Some("2001:db8::1".into()), 7000)));
        assert_eq!(target("tcp:[2001:db8::1]"), Some((Some("2001:db8::1".into()), 6653)));
        assert_eq!(target("tcp:controller.example:6653"), Some((None, 6653)));
        assert_eq!(target("ptcp:6653"), None);
        assert_eq!(target("unix:/run/controller"), None);
        assert_eq!(target("tcp:127.0.0.1:port"), None);
    }

    #[test]
    fn lines_of_the_kernel_are_read() {
        let of = |address: &str, port: u16| {
            let port = format!("{port:04X}");
            established(&format!("0: 0100007F:D431 {address}:{port} 01 00:00 00:00 0 0 0 4711 1 x"))
        };
        let v4 = u32::from_ne_bytes([127, 0, 0, 1]);
        assert_eq!(of(&format!("{v4:08X}"), 6653), Some((4711, "127.0.0.1:6653".parse().unwrap())));
        let mapped = format!("{:08X}{:08X}{:08X}{v4:08X}", 0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]));
        assert_eq!(of(&mapped, 6653), Some((4711, "127.0.0.1:6653".parse().unwrap())));
        assert_eq!(of("7F", 6653), None);
        assert_eq!(established("0: 0100007F:D431 0100007F:19FD 02 00:00 00:00 0 0 0 4711 1 x"), None);
        assert_eq!(established(""), None);
    }

    #[test]
    fn a_connection_of_this_process_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let pid = std::process::id().cast_signed();
        assert!(!peers(pid).unwrap().contains(&address));
        let _connection = std::net::TcpStream::connect(address).unwrap();
        assert!(peers(pid).unwrap().contains(&address));
    }
}

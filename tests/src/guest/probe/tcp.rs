//! One long-lived TCP connection: both ends write a known stream at a modest rate and check what they read.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context, Result};

use super::{anywhere, Place, Running};
use crate::outcome::{ProbeOutcome, TcpOutcome};

/// What is written at once.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Bytes of a write: with more than a segment has, the datapath gets packets of many segments (GSO).
    pub chunk: usize,
    /// Time between two writes, ms.
    pub every_ms: u64,
}

/// 50 kB/s each way, in segments.
pub const MODEST: Pace = Pace { chunk: 1000, every_ms: 20 };
/// 650 kB/s each way, 64 KiB at once.
pub const BULKY: Pace = Pace { chunk: 1 << 16, every_ms: 100 };
/// How long the reader waits for the last bytes.
const GRACE: Duration = Duration::from_secs(4);

/// Byte `position` of the stream; a shift by any power of two shows.
fn byte_at(position: u64) -> u8 {
    (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

#[derive(Default)]
struct End {
    written: u64,
    verified: u64,
    corrupted: u64,
    retransmitted: u64,
    backoff: u64,
    timeouts: u64,
    longest_gap: Duration,
    error: Option<String>,
}

/// A connection under way.
pub struct TcpProbe {
    stop: Arc<AtomicBool>,
    started: Instant,
    server: JoinHandle<Result<End>>,
    client: JoinHandle<Result<End>>,
}

/// A connection that takes longer is awaited with the rest of the traffic under way: its end will tell.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Connects `from` to `target`, which listens in `to`.
pub fn start(from: &Place, to: &Place, target: SocketAddr, pace: Pace) -> Result<TcpProbe> {
    let stop = Arc::new(AtomicBool::new(false));
    let (ready, is_ready) = channel();
    let server = {
        let (stop, to) = (stop.clone(), to.clone());
        std::thread::spawn(move || {
            to.enter()?;
            let listener = TcpListener::bind((anywhere(target), target.port())).context("cannot listen")?;
            let _ = ready.send(());
            let (stream, _) = listener.accept().context("cannot accept")?;
            talk(stream, pace, &stop)
        })
    };
    if is_ready.recv().is_err() {
        return Err(server.join().map_err(|_| anyhow!("the server panicked"))?.err().unwrap_or(anyhow!("no server")));
    }
    let (connected, is_connected) = channel();
    let client = {
        let (stop, from) = (stop.clone(), from.clone());
        std::thread::spawn(move || {
            from.enter()?;
            let stream = TcpStream::connect(target).with_context(|| format!("cannot connect to {target}"))?;
            let _ = connected.send(());
            talk(stream, pace, &stop)
        })
    };
    // Whoever looks at connections from now on finds it among them.
    let _too_slow_or_failed = is_connected.recv_timeout(CONNECT_LIMIT);
    Ok(TcpProbe { stop, started: Instant::now(), server, client })
}

fn talk(stream: TcpStream, pace: Pace, stop: &AtomicBool) -> Result<End> {
    let before = timeouts();
    let mut writer = stream.try_clone()?;
    writer.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut end = std::thread::scope(|scope| {
        let writing = scope.spawn(|| write_stream(&mut writer, pace, stop));
        let mut end = read_stream(&stream);
        match writing.join() {
            Ok(Ok(written)) => end.written = written,
            Ok(Err(error)) => end.error = Some(format!("write: {error}")),
            Err(_) => end.error = Some("the writer panicked".to_owned()),
        }
        end
    });
    let (retransmitted, backoff) = tcp_info(&stream);
    end.retransmitted = retransmitted;
    end.backoff = end.backoff.max(backoff);
    end.timeouts = timeouts().saturating_sub(before);
    Ok(end)
}

fn write_stream(stream: &mut TcpStream, pace: Pace, stop: &AtomicBool) -> std::io::Result<u64> {
    let mut position = 0u64;
    let mut next = Instant::now();
    let mut chunk = vec![0u8; pace.chunk];
    while !stop.load(Ordering::Relaxed) {
        for byte in &mut chunk {
            *byte = byte_at(position);
            position += 1;
        }
        stream.write_all(&chunk)?;
        next += Duration::from_millis(pace.every_ms);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    Ok(position)
}

/// Reads until the other end closes its direction.
fn read_stream(mut stream: &TcpStream) -> End {
    let mut end = End::default();
    let mut buffer = [0u8; 16_384];
    let mut last = Instant::now();
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return end,
            Ok(count) => {
                end.longest_gap = end.longest_gap.max(last.elapsed());
                last = Instant::now();
                for byte in buffer.iter().take(count) {
                    if *byte == byte_at(end.verified + end.corrupted) {
                        end.verified += 1;
                    } else {
                        end.corrupted += 1;
                    }
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                end.backoff = end.backoff.max(tcp_info(stream).1);
                if last.elapsed() > Duration::from_secs(60) {
                    end.error = Some("nothing arrived for 60 s".to_owned());
                    return end;
                }
            }
            Err(error) => {
                end.error = Some(format!("read: {error}"));
                return end;
            }
        }
    }
}

/// Retransmitted segments and the present back-off (`struct tcp_info` of linux/tcp.h).
fn tcp_info(stream: &TcpStream) -> (u64, u64) {
    // SAFETY: all zeroes is a valid tcp_info.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as u32;
    // SAFETY: `info` lives through the call and its true size is given.
    let failed = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut length)
    };
    if failed != 0 {
        return (0, 0);
    }
    (u64::from(info.tcpi_total_retrans), u64::from(info.tcpi_backoff))
}

/// `TcpExt TCPTimeouts` of the calling thread's namespace.
fn timeouts() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap_or_default();
    counter(&text, "TcpExt:", "TCPTimeouts")
}

/// A counter of /proc/net/netstat: a line of names, then a line of values with the same prefix.
fn counter(text: &str, prefix: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter(|l| l.starts_with(prefix));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else { return 0 };
    let index = names.split_whitespace().position(|n| n == name);
    index.and_then(|i| values.split_whitespace().nth(i)).and_then(|v| v.parse().ok()).unwrap_or(0)
}

impl Running for TcpProbe {
    fn finish(self: Box<Self>) -> Result<ProbeOutcome> {
        let seconds = self.started.elapsed().as_secs_f64();
        self.stop.store(true, Ordering::Relaxed);
        let limit = Instant::now() + GRACE;
        while !(self.client.is_finished() && self.server.is_finished()) && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(20));
        }
        if !(self.client.is_finished() && self.server.is_finished()) {
            let error = Some("the connection did not end within the grace time".to_owned());
            return Ok(ProbeOutcome::Tcp(TcpOutcome { seconds, error, ..TcpOutcome::default() }));
        }
        let client = self.client.join().map_err(|_| anyhow!("the client panicked"))??;
        let server = self.server.join().map_err(|_| anyhow!("the server panicked"))??;
        Ok(ProbeOutcome::Tcp(TcpOutcome {
            written: [client.written, server.written],
            verified: [server.verified, client.verified],
            corrupted: client.corrupted + server.corrupted,
            retransmitted: client.retransmitted + server.retransmitted,
            backoff: client.backoff.max(server.backoff),
            timeouts: client.timeouts + server.timeouts,
            longest_gap_ms: client.longest_gap.max(server.longest_gap).as_secs_f64() * 1e3,
            seconds,
            error: client.error.or(server.error),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn netstat_counters_by_name() {
        let text = "TcpExt: A TCPTimeouts B\nTcpExt: 1 23 4\nIpExt: A\nIpExt: 9\n";
        assert_eq!(counter(text, "TcpExt:", "TCPTimeouts"), 23);
        assert_eq!(counter(text, "TcpExt:", "Nothing"), 0);
    }

    #[test]
    fn the_stream_is_checked_over_loopback() {
        let probe = start(&Place::Host, &Place::Host, "127.0.0.1:39002".parse().unwrap(), MODEST).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let ProbeOutcome::Tcp(outcome) = Box::new(probe).finish().unwrap() else { panic!() };
        assert_eq!(outcome.error, None);
        assert_eq!(outcome.written, outcome.verified);
        assert!(outcome.written[0] >= 5 * MODEST.chunk as u64);
        assert_eq!(outcome.corrupted, 0);
    }
}

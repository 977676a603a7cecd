//! TCP connections one after the other, each new: a request, its answer, and the end.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context, Result};

use super::{anywhere, measure_first, Place, Running};
use crate::outcome::{ConnectionsOutcome, ProbeOutcome};

/// Bytes of a request and of its answer.
const LENGTH: usize = 64;
/// How long a connection may take as a whole: longer than the retransmissions of a busy VM.
const PATIENCE: Duration = Duration::from_secs(15);

/// Connections under way.
pub struct Connections {
    stop: Arc<AtomicBool>,
    stop_serving: Arc<AtomicBool>,
    begun: Arc<AtomicU64>,
    server: JoinHandle<Result<()>>,
    client: JoinHandle<Result<ConnectionsOutcome>>,
}

/// Connects from `from` to `target`, which listens in `to`, every `interval_us` µs.
pub fn start(from: &Place, to: &Place, target: SocketAddr, interval_us: u64) -> Result<Connections> {
    let (stop, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let stop_serving = Arc::new(AtomicBool::new(false));
    let (ready, is_ready) = channel();
    let server = {
        let (stop_serving, to) = (stop_serving.clone(), to.clone());
        std::thread::spawn(move || {
            to.enter()?;
            let listener = TcpListener::bind((anywhere(target), target.port())).context("cannot listen")?;
            listener.set_nonblocking(true)?;
            let _ = ready.send(());
            serve(&listener, &stop_serving);
            Ok(())
        })
    };
    if is_ready.recv().is_err() {
        return Err(server.join().map_err(|_| anyhow!("the server panicked"))?.err().unwrap_or(anyhow!("no server")));
    }
    let client = {
        let (stop, begun, from) = (stop.clone(), begun.clone(), from.clone());
        std::thread::spawn(move || {
            from.enter()?;
            measure_first(target.port());
            Ok(connect(target, Duration::from_micros(interval_us), &stop, &begun))
        })
    };
    Ok(Connections { stop, stop_serving, begun, server, client })
}

fn serve(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => drop(std::thread::spawn(move || answer(stream))),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut bytes = [0u8; LENGTH];
    stream.read_exact(&mut bytes)?;
    stream.write_all(&bytes)
}

fn connect(target: SocketAddr, interval: Duration, stop: &AtomicBool, begun: &AtomicU64) -> ConnectionsOutcome {
    let begin = Instant::now();
    let mut running = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let number = begun.fetch_add(1, Ordering::Relaxed);
        running.push(std::thread::spawn(move || one(target, number)));
        let due = interval * u32::try_from(number + 1).unwrap_or(u32::MAX);
        std::thread::sleep(due.saturating_sub(begin.elapsed()));
    }
    let due = (begin.elapsed().as_micros() / interval.as_micros().max(1)) as u64;
    let mut outcome = ConnectionsOutcome { due, begun: running.len() as u64, ..ConnectionsOutcome::default() };
    for connection in running {
        match connection.join() {
            Ok(Ok(took)) => {
                outcome.answered += 1;
                outcome.longest_ms = outcome.longest_ms.max(took.as_secs_f64() * 1e3);
            }
            Ok(Err(error)) => count(&mut outcome.errors, error.to_string()),
            Err(_) => count(&mut outcome.errors, "panicked".to_owned()),
        }
    }
    outcome
}

fn count(errors: &mut BTreeMap<String, u64>, error: String) {
    *errors.entry(error).or_default() += 1;
}

/// One connection; how long it took.
fn one(target: SocketAddr, number: u64) -> std::io::Result<Duration> {
    let begin = Instant::now();
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = [0x5a_u8; LENGTH];
    request[..8].copy_from_slice(&number.to_be_bytes());
    stream.write_all(&request)?;
    let mut reply = [0u8; LENGTH];
    stream.read_exact(&mut reply)?;
    match reply == request {
        true => Ok(begin.elapsed()),
        false => Err(std::io::Error::other("wrong answer")),
    }
}

impl Running for Connections {
    fn flows_begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    fn finish(self: Box<Self>) -> Result<ProbeOutcome> {
        self.stop.store(true, Ordering::Relaxed);
        let outcome = self.client.join().map_err(|_| anyhow!("the client panicked"));
        // Not earlier: what was begun before the stop is still answered.
        self.stop_serving.store(true, Ordering::Relaxed);
        let outcome = outcome??;
        self.server.join().map_err(|_| anyhow!("the server panicked"))??;
        Ok(ProbeOutcome::Connections(outcome))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_loopback_every_connection_is_answered_and_nobody_listening_is_seen() {
        let target = "127.0.0.1:39003".parse().unwrap();
        assert!(one(target, 1).is_err());
        let (stop, begun) = (Arc::new(AtomicBool::new(false)), AtomicU64::new(0));
        let listener = TcpListener::bind(target).unwrap();
        listener.set_nonblocking(true).unwrap();
        let server = {
            let stop = stop.clone();
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((stream, _)) = listener.accept() {
                        let _ = answer(stream);
                    }
                }
            })
        };
        assert!(one(target, 7).is_ok());
        stop.store(true, Ordering::Relaxed);
        server.join().unwrap();
        let outcome = connect(target, Duration::from_millis(5), &stop, &begun);
        assert_eq!((outcome.begun, outcome.answered), (0, 0));
    }
}

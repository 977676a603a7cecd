//! JSON-RPC 1.0 over a Unix stream socket, as OVSDB (RFC 7047, section 4) and unixctl (`lib/unixctl.c`) speak it:
//! values follow each other without a delimiter.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{connect, getsockopt, socket, AddressFamily, SockFlag, SockType, UnixAddr, UnixCredentials};
use serde_json::{json, Value};

use crate::host::error::{Context, HostError, Result};

/// No single message may be longer, bytes: the reply to a dump of 20,000 rules is about 4 MB.
const MESSAGE_MAX: usize = 256 << 20;

/// How long a place in the backlog of a socket is waited for: who listens may never take anybody out of it.
const BACKLOG_LIMIT: Duration = Duration::from_secs(5);

/// Finds the end of one JSON value in a stream, in one pass over the bytes however they are cut.
#[derive(Debug, Default)]
struct Framer {
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl Framer {
    /// Takes in `bytes`; the answer is the length up to and with the end of the value, if it is among them.
    fn feed(&mut self, bytes: &[u8]) -> Option<usize> {
        for (at, byte) in bytes.iter().enumerate() {
            if self.escaped {
                self.escaped = false;
                continue;
            }
            match (self.in_string, byte) {
                (true, b'\\') => self.escaped = true,
                (_, b'"') => self.in_string = !self.in_string,
                (false, b'{' | b'[') => self.depth += 1,
                (false, b'}' | b']') => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(at + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    path: PathBuf,
    received: Vec<u8>,
    scanned: usize,
    framer: Framer,
    next_id: u64,
    /// Notifications that came while an answer was waited for.
    pending: Vec<Value>,
}

impl Connection {
    /// Connects to the socket at `path`. A Unix socket connects at once or fails, except where its backlog is full.
    pub fn connect(path: &Path) -> Result<Self> {
        let object = path.display().to_string();
        let stream = connected(path)
            .map_err(|e| HostError::away(&object, format!("cannot connect: {e}")).remedy("is the daemon running?"))?;
        Ok(Connection {
            stream,
            path: path.to_owned(),
            received: Vec::new(),
            scanned: 0,
            framer: Framer::default(),
            next_id: 0,
            pending: Vec::new(),
        })
    }

    /// The name of this connection in errors.
    fn object(&self) -> String {
        self.path.display().to_string()
    }

    /// Who called listen(2) on the other end (`SO_PEERCRED`).
    pub fn peer(&self) -> Result<UnixCredentials> {
        getsockopt(&self.stream, PeerCredentials).about(self.object())
    }

    /// Calls `method` and waits for its result. An `error` member that is not null is an error.
    pub fn call(&mut self, method: &str, params: Value, until: Instant) -> Result<Value> {
        let id = self.next_id;
        self.next_id += 1;
        self.send(&json!({"method": method, "params": params, "id": id}), until)?;
        self.answer(method, id, until)?
    }

    /// Waits for the answer to request `id`: the outer error is the connection's, the inner one the daemon's.
    fn answer(&mut self, method: &str, id: u64, until: Instant) -> Result<Result<Value>> {
        loop {
            let Some(mut message) = self.receive(until)? else {
                return Err(HostError::timeout(self.object(), method));
            };
            if message.get("method").is_some() {
                self.pending.push(message);
                continue;
            }
            if message.get("id") != Some(&json!(id)) {
                continue;
            }
            return Ok(match message.get("error") {
                None | Some(Value::Null) => Ok(message.get_mut("result").map(Value::take).unwrap_or(Value::Null)),
                Some(Value::String(text)) => Err(HostError::new(self.object(), format!("{method}: {}", text.trim()))),
                Some(other) => Err(HostError::new(self.object(), format!("{method}: {other}"))),
            });
        }
    }

    /// Makes all `calls` (method, parameters) before the first answer is waited for. Keep the list short: what is sent
    /// has to fit into the socket.
    pub fn call_many(&mut self, calls: &[(&str, Value)], until: Instant) -> Result<Vec<Result<Value>>> {
        let first = self.ask_many(calls, until)?;
        self.answers(calls, first, until)
    }

    /// The first half of [`Connection::call_many`]: waits for no answer, and returns what [`Connection::answers`] wants to
    /// know.
    pub fn ask_many(&mut self, calls: &[(&str, Value)], until: Instant) -> Result<u64> {
        let first = self.next_id;
        for (method, params) in calls {
            self.send(&json!({"method": method, "params": params, "id": self.next_id}), until)?;
            self.next_id += 1;
        }
        Ok(first)
    }

    /// The answers to `calls`, which [`Connection::ask_many`] has sent as `first` and so on.
    pub fn answers(&mut self, calls: &[(&str, Value)], first: u64, until: Instant) -> Result<Vec<Result<Value>>> {
        calls.iter().zip(first..).map(|((method, _), id)| self.answer(method, id, until)).collect()
    }

    /// The next notification, or `None` where `until` passes first.
    pub fn notification(&mut self, until: Instant) -> Result<Option<Value>> {
        if !self.pending.is_empty() {
            return Ok(Some(self.pending.remove(0)));
        }
        loop {
            match self.receive(until)? {
                Some(message) if message.get("method").is_some() => return Ok(Some(message)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    fn send(&mut self, message: &Value, until: Instant) -> Result<()> {
        let object = self.object();
        let left = remaining(until).ok_or_else(|| HostError::timeout(&object, "sending"))?;
        self.stream.set_write_timeout(Some(left)).about(&object)?;
        self.stream.write_all(message.to_string().as_bytes()).map_err(|e| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => HostError::timeout(&object, "sending"),
            _ => HostError::away(&object, format!("cannot send: {e}")),
        })
    }

    /// The next message that is not an `echo` request (those are answered here: RFC 7047, 4.1.11).
    fn receive(&mut self, until: Instant) -> Result<Option<Value>> {
        loop {
            let Some(message) = self.receive_any(until)? else { return Ok(None) };
            if message.get("method") != Some(&json!("echo")) {
                return Ok(Some(message));
            }
            let answer = json!({"result": message["params"], "error": null, "id": message["id"]});
            self.send(&answer, Instant::now() + Duration::from_secs(1))?;
        }
    }

    fn receive_any(&mut self, until: Instant) -> Result<Option<Value>> {
        let object = self.object();
        loop {
            if let Some(length) = self.framer.feed(&self.received[self.scanned..]) {
                let end = self.scanned + length;
                let value = serde_json::from_slice(&self.received[..end]).about(&object)?;
                self.received.drain(..end);
                self.scanned = 0;
                return Ok(Some(value));
            }
            self.scanned = self.received.len();
            if self.scanned > MESSAGE_MAX {
                return Err(HostError::new(&object, format!("a message longer than {MESSAGE_MAX} bytes")));
            }
            if !self.fill(until, &object)? {
                return Ok(None);
            }
        }
    }

    /// Reads what there is; false where `until` passes first. With `until` in the past it looks once.
    fn fill(&mut self, until: Instant, object: &str) -> Result<bool> {
        let left = remaining(until).unwrap_or(Duration::from_micros(1));
        self.stream.set_read_timeout(Some(left)).about(object)?;
        let mut chunk = [0; 65536];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(HostError::away(object, "the daemon closed the connection")),
                Ok(n) => {
                    self.received.extend_from_slice(&chunk[..n]);
                    return Ok(true);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(false),
                Err(e) => return Err(HostError::away(object, format!("cannot receive: {e}"))),
            }
        }
    }
}

/// Connects; where the backlog is full it waits no longer than [`BACKLOG_LIMIT`].
pub(super) fn connected(path: &Path) -> std::io::Result<UnixStream> {
    let until = Instant::now() + BACKLOG_LIMIT;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let address = UnixAddr::new(path)?;
    loop {
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EAGAIN) if Instant::now() < until => std::thread::sleep(Duration::from_millis(2)),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// The time left to `until`; `None` where it is over (a socket time limit of zero would mean "for ever").
pub(crate) fn remaining(until: Instant) -> Option<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    (!left.is_zero()).then_some(left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::net::UnixListener;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn strings_and_escapes_do_not_end_a_value() {
        let text = br#"{"a":"}\"]","b":[1,{"c":"\\"}]}{"d":1}"#;
        assert_eq!(Framer::default().feed(text), Some(text.len() - 7));
    }

    proptest! {
        #[test]
        fn framing_does_not_depend_on_how_the_stream_is_cut(words in proptest::collection::vec(".{0,20}", 1..8), cut in 1usize..40) {
            let value = json!({"words": words, "n": [1, {"x": null}]});
            let text = format!("{value}{value}");
            let mut framer = Framer::default();
            let (mut ends, mut at) = (Vec::new(), 0);
            for chunk in text.as_bytes().chunks(cut) {
                let mut rest = chunk;
                while let Some(n) = framer.feed(rest) {
                    ends.push(at + n);
                    at += n;
                    rest = &rest[n..];
                }
                at += rest.len();
            }
            prop_assert_eq!(ends, vec![text.len() / 2, text.len()]);
        }
    }

    #[test]
    fn a_call_answers_echo_keeps_notifications_and_reports_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut buffer = [0; 4096];
            let _ = peer.read(&mut buffer).unwrap();
            peer.write_all(
                br#"{"method":"echo","params":["x"],"id":"echo"}{"method":"update","params":[1],"id":null}"#,
            )
            .unwrap();
            let n = peer.read(&mut buffer).unwrap();
            let echo: Value = serde_json::from_slice(&buffer[..n]).unwrap();
            assert_eq!(echo["result"], json!(["x"]));
            peer.write_all(br#"{"id":0,"result":"yes","error":null}"#).unwrap();
            let _ = peer.read(&mut buffer).unwrap();
            peer.write_all(br#"{"id":1,"result":null,"error":"no such thing\n"}"#).unwrap();
            let _ = peer.read(&mut buffer);
        });
        let mut connection = Connection::connect(&path).unwrap();
        assert_eq!(connection.call("one", json!([]), soon()).unwrap(), json!("yes"));
        assert_eq!(connection.notification(soon()).unwrap().unwrap()["params"], json!([1]));
        let error = connection.call("two", json!([]), soon()).unwrap_err();
        assert!(error.to_string().contains("two: no such thing"), "{error}");
        assert!(connection.notification(Instant::now()).unwrap().is_none());
        drop(connection);
        server.join().unwrap();
    }

    #[test]
    fn who_takes_nobody_out_of_his_backlog_is_not_waited_for_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let _listener = UnixListener::bind(&path).unwrap();
        nix::sys::socket::listen(&_listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let begun = Instant::now();
        let mut held = Vec::new();
        let error = loop {
            match Connection::connect(&path) {
                Ok(connection) => held.push(connection),
                Err(error) => break error,
            }
        };
        assert!(error.away && begun.elapsed() < BACKLOG_LIMIT * 2, "{error}");
        assert_eq!(held[0].peer().unwrap().pid(), std::process::id() as i32);
    }

    #[test]
    fn a_silent_daemon_is_a_time_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut connection = Connection::connect(&path).unwrap();
        let error = connection.call("version", json!([]), Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert!(error.timed_out, "{error}");
    }
}

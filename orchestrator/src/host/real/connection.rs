//! A connection to a bridge's management socket, in OpenFlow of our own.
//!
//! OpenFlow 1.0 to 1.5: HELLO with its bitmap of versions (1.3.1, A.5.1), multipart messages (A.3.5; statistics in 1.0),
//! ECHO (A.5.2), ERROR (A.4.4).

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags};

use super::command::poll_timeout;
use super::jsonrpc::{connected, remaining};
use super::messages::{
    self, answer, in_words, kind, message, some, xid, Inbox, ECHO_REPLY, ECHO_REQUEST, ERROR, HEADER, HELLO,
    NX_VENDOR_ID, OF10, OF15,
};
use super::reading::name_of;
use crate::host::{Context, HostError, Result};

/// A bridge may tell so much about itself, bytes: 100,000 rules are about 20 MB.
const TOLD_MAX: usize = 256 << 20;
/// Type of a multipart message of an experimenter.
const EXPERIMENTER_STATS: u16 = 0xffff;
/// OFPET_HELLO_FAILED.
const HELLO_FAILED: [u8; 2] = [0, 0];
/// More of the reply follows.
const MORE: u8 = 1;

/// A connection whose version is settled.
pub struct Connection {
    stream: UnixStream,
    inbox: Inbox,
    object: String,
    version: u8,
    last_xid: u32,
}

/// What is asked by a multipart message.
pub enum Question {
    /// By its type.
    Standard(u16),
    /// By Nicira's subtype.
    Nicira(u32),
}

impl Connection {
    /// Connects in the highest of `versions` that the bridge speaks too.
    pub fn open(socket: &Path, versions: &[u8], until: Instant) -> Result<Self> {
        let none = || {
            let names = versions.iter().map(|version| name_of(*version)).collect::<Vec<_>>().join(", ");
            let cause = format!("it speaks none of the versions {names}");
            HostError::new(socket.display().to_string(), cause)
                .remedy("see column `protocols` of table Bridge, which may have changed meanwhile; then try again")
        };
        Self::open_if_spoken(socket, versions, until)?.ok_or_else(none)
    }

    /// The same; `None` where it speaks none of them.
    pub fn open_if_spoken(socket: &Path, versions: &[u8], until: Instant) -> Result<Option<Self>> {
        let object = socket.display().to_string();
        let stream = connected(socket).about(&object)?;
        stream.set_nonblocking(true).about(&object)?;
        let ours = versions.iter().fold(0_u32, |bits, version| bits | 1 << u32::from(*version));
        let highest = versions.iter().copied().max().unwrap_or(OF10);
        let bitmap = [&[0, 1, 0, 8][..], &ours.to_be_bytes()].concat();
        let hello = message(highest, HELLO, 0, &[&bitmap]).unwrap_or_default();
        let mut connection = Connection { stream, inbox: Inbox::default(), object, version: highest, last_xid: 0 };
        let mut theirs = 0;
        connection.exchange(&hello, "settling the version", until, |message| match kind(message) {
            Some(HELLO) => {
                theirs = versions_in(message);
                Ok(true)
            }
            // It has read ours, and not said its own: it speaks none of them.
            Some(ERROR) if message.get(HEADER..HEADER + 2) == Some(&HELLO_FAILED) => Ok(true),
            Some(ERROR) => Err(in_words(message)),
            _ => Ok(false),
        })?;
        let settled = (ours & theirs).checked_ilog2();
        Ok(settled.map(|version| Connection { version: u8::try_from(version).unwrap_or(OF15), ..connection }))
    }

    /// The first byte of each message.
    pub fn version(&self) -> u8 {
        self.version
    }

    /// An error of this connection.
    pub fn error(&self, cause: impl std::fmt::Display) -> HostError {
        HostError::new(&self.object, cause)
    }

    /// A transaction id that was not used here before.
    pub fn next_xid(&mut self) -> u32 {
        // Those of rules count from 1.
        self.last_xid = self.last_xid.wrapping_sub(1);
        self.last_xid
    }

    /// Asks a question of many parts and returns all messages of the answer: one that is cut off is an error.
    pub fn multipart(&mut self, question: &Question, body: &[u8], until: Instant) -> Result<Vec<Vec<u8>>> {
        let xid = self.next_xid();
        let head = head(self.version, question);
        let types = if self.version == OF10 { (16, 17) } else { (18, 19) };
        let request = message(self.version, types.0, xid, &[&head, body]);
        let request = request.ok_or_else(|| self.error("a question that is too long"))?;
        let (mut told, mut length) = (Vec::new(), 0);
        self.exchange(&request, "reading what the bridge has", until, |message| {
            if messages::xid(message) != Some(xid) {
                return Ok(false);
            }
            if kind(message) == Some(ERROR) {
                return Err(in_words(message));
            }
            let said = message.get(HEADER..HEADER + head.len()).unwrap_or_default();
            let same = |from: usize, to: usize| said.get(from..to) == head.get(from..to);
            // Behind the type are the flags.
            if kind(message) != Some(types.1) || !same(0, 2) || !same(4, head.len()) {
                return Err("an answer to another question".to_owned());
            }
            length += message.len();
            if length > TOLD_MAX {
                return Err(format!("it tells more than {TOLD_MAX} bytes"));
            }
            told.push(message.to_vec());
            Ok(said.get(3).is_some_and(|flags| flags & MORE == 0))
        })?;
        told.iter_mut().for_each(|message| drop(message.drain(..HEADER + head.len())));
        Ok(told)
    }

    /// Sends a request and returns the one message that answers it.
    pub fn ask(&mut self, request: &[u8], until: Instant) -> Result<Vec<u8>> {
        let (wanted, mut reply) = (xid(request), Vec::new());
        self.exchange(request, "an answer", until, |message| match (kind(message), xid(message) == wanted) {
            (_, false) => Ok(false),
            (Some(ERROR), _) => Err(in_words(message)),
            _ => {
                reply = message.to_vec();
                Ok(true)
            }
        })?;
        Ok(reply)
    }

    /// Sends `bytes`, which may be more than the socket holds, and hands on each message that comes, until one is said to
    /// be the last.
    pub fn exchange(
        &mut self,
        bytes: &[u8],
        doing: &str,
        until: Instant,
        mut take: impl FnMut(&[u8]) -> std::result::Result<bool, String>,
    ) -> Result<()> {
        let (mut sent, mut owed, mut ended) = (0, Vec::new(), false);
        while !ended || sent < bytes.len() {
            if sent == bytes.len() && !owed.is_empty() {
                // Small, and the bridge reads: it fits. One asks only where nothing was heard for seconds.
                let _unanswered = some(self.stream.write(&std::mem::take(&mut owed))).about(&self.object)?;
            }
            let unsent = bytes.get(sent..).unwrap_or_default();
            if !wait(&self.stream, !unsent.is_empty(), until).about(&self.object)? {
                return Err(HostError::timeout(&self.object, doing));
            }
            // Nothing is written where nothing is left: a socket that was closed would be an error.
            let written = if unsent.is_empty() { Ok(None) } else { some(self.stream.write(unsent)) };
            let closed = self.inbox.read(&mut self.stream).about(&self.object)? == Some(0);
            while let Some(message) = self.inbox.next().about(&self.object)? {
                match kind(&message) {
                    Some(ECHO_REQUEST) => owed.extend(answer(&message, ECHO_REPLY)),
                    _ => ended |= take(&message).about(&self.object)?,
                }
            }
            if closed && !ended {
                return Err(HostError::away(&self.object, "the daemon closed the connection"));
            }
            sent += written.about(&self.object)?.unwrap_or(0);
        }
        Ok(())
    }
}

/// What stands behind the header of a question, and of each part of its answer: type, flags, and what pads them.
fn head(version: u8, question: &Question) -> Vec<u8> {
    let padding: &[u8] = if version == OF10 { &[] } else { &[0; 4] };
    match question {
        Question::Standard(kind) => [&kind.to_be_bytes()[..], &[0, 0], padding].concat(),
        // In 1.0 the subtype is padded instead.
        Question::Nicira(subtype) => {
            let vendor = [NX_VENDOR_ID.to_be_bytes(), subtype.to_be_bytes()].concat();
            let end: &[u8] = if version == OF10 { &[0; 4] } else { &[] };
            [&EXPERIMENTER_STATS.to_be_bytes()[..], &[0, 0], padding, &vendor, end].concat()
        }
    }
}

/// The versions that a HELLO offers, a bit each: those of its bitmap, or all up to its own.
fn versions_in(hello: &[u8]) -> u32 {
    let mut rest = hello.get(HEADER..).unwrap_or_default();
    while let Some(&[kind_high, kind, length_high, length]) = rest.first_chunk::<4>() {
        let length = usize::from(u16::from_be_bytes([length_high, length]));
        if let ([0, 1], Some(&[a, b, c, d])) = ([kind_high, kind], rest.get(4..8)) {
            return u32::from_be_bytes([a, b, c, d]);
        }
        rest = rest.get(length.max(4).next_multiple_of(8)..).unwrap_or_default();
    }
    let own = hello.first().copied().unwrap_or(OF10).min(30);
    (2 << u32::from(own)) - 2
}

/// Waits until the stream can be read, or written to where that is wanted; false where `until` passes first.
fn wait(stream: &UnixStream, write: bool, until: Instant) -> nix::Result<bool> {
    let flags = if write { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
    loop {
        let Some(left) = remaining(until) else { return Ok(false) };
        match poll(&mut [PollFd::new(stream.as_fd(), flags)], poll_timeout(left)) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// A bridge that says `hello`, and answers the next message with `parts`, by their flags; then it asks for an echo and
    /// closes.
    fn bridge(
        hello: Vec<u8>,
        parts: &'static [(u8, &'static [u8])],
    ) -> (tempfile::TempDir, std::thread::JoinHandle<usize>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut inbox, mut received) = (Inbox::default(), 0);
            stream.write_all(&hello).unwrap();
            while inbox.read(&mut stream).is_ok_and(|read| read != Some(0)) {
                while let Some(said) = inbox.next().unwrap() {
                    received += said.len();
                    if said[1] == 18 {
                        for (flags, body) in parts {
                            let head = [0, 1, 0, *flags, 0, 0, 0, 0];
                            stream
                                .write_all(&message(said[0], 19, xid(&said).unwrap(), &[&head, body]).unwrap())
                                .unwrap();
                        }
                        return received;
                    }
                }
            }
            received
        });
        (dir, thread)
    }

    fn hello(version: u8, bitmap: u8) -> Vec<u8> {
        message(version, HELLO, 9, &[&[0, 1, 0, 8, 0, 0, 0, bitmap]]).unwrap()
    }

    proptest::proptest! {
        #[test]
        fn no_hello_makes_us_fall_over(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..60)) {
            let _versions = versions_in(&bytes);
        }
    }

    #[test]
    fn the_version_is_the_highest_that_both_speak() {
        let settle = |hello: Vec<u8>, versions: &[u8]| {
            let (dir, thread) = bridge(hello, &[]);
            let version = Connection::open(&dir.path().join("s"), versions, soon()).map(|it| it.version());
            thread.join().unwrap();
            version
        };
        assert_eq!(settle(hello(6, 0b111_1110), &[1, 4, 5]).unwrap(), 5);
        assert_eq!(settle(hello(4, 0b001_0010), &[1, 2, 3, 4, 5, 6]).unwrap(), 4);
        // Without a bitmap all up to its own.
        assert_eq!(settle(message(3, HELLO, 9, &[]).unwrap(), &[1, 2, 6]).unwrap(), 2);
        assert!(settle(hello(4, 0b001_0010), &[6]).is_err());
        let failed = message(4, ERROR, 9, &[&[0, 0, 0, 0]]).unwrap();
        assert!(settle(failed, &[6]).unwrap_err().cause.contains("none of the versions OpenFlow15"));
        let other = message(4, ERROR, 9, &[&[0, 1, 0, 5]]).unwrap();
        assert!(settle(other, &[6]).unwrap_err().cause.contains("type 1 code 5"));
    }

    #[test]
    fn a_bridge_that_takes_no_more_connections_is_not_waited_for_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = nix::sys::socket::UnixAddr::new(&path).unwrap();
        let (family, kind) = (nix::sys::socket::AddressFamily::Unix, nix::sys::socket::SockType::Stream);
        let socket = nix::sys::socket::socket(family, kind, nix::sys::socket::SockFlag::empty(), None).unwrap();
        nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &address).unwrap();
        nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let _waits = UnixStream::connect(&path).unwrap();
        assert!(Connection::open(&path, &[6], soon()).is_err());
    }

    #[test]
    fn an_answer_in_parts_is_whole_or_none() {
        let ask = |parts| {
            let (dir, thread) = bridge(hello(6, 0b100_0000), parts);
            let mut connection = Connection::open(&dir.path().join("s"), &[6], soon()).unwrap();
            let told = connection.multipart(&Question::Standard(1), &[7; 8], soon());
            // HELLO, and header, head and body of the question.
            assert_eq!(thread.join().unwrap(), 16 + 8 + 8 + 8);
            told
        };
        assert_eq!(ask(&[(1, b"one"), (1, b""), (0, b"two")]).unwrap(), [&b"one"[..], b"", b"two"]);
        let error = ask(&[(1, b"one"), (1, b"two")]).unwrap_err();
        assert!(error.away, "{error}");
        assert!(ask(&[]).is_err());
    }
}

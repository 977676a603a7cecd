//! What `ovs-ofctl bundle` says to a bridge, recorded before the bridge is there: it talks to a socket of ours that
//! acknowledges as a bridge does. Later the recording is sent in one piece; a message at a time, as ovs-ofctl sends
//! them, costs it and the daemon a system call each just while packets wait.
//!
//! OpenFlow 1.3 to 1.5: header (A.1), HELLO (A.5.1), ERROR (A.4.4), BARRIER, bundle messages (1.4, A.3.9); for 1.3 those
//! of the ONF extension EXT-230. Numbers in network order.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags};

use super::command::poll_timeout;
use super::jsonrpc::remaining;
use super::openflow::{bundle_text, RealOpenFlow, LOOK_AGAIN};
use crate::host::{BridgeRules, Context, HostError, Result};

/// Who speaks while we record.
const OBJECT: &str = "ovs-ofctl bundle";
/// A recording may be as long as this, bytes: 20,000 rules are about 2 MB.
const RECORDING_MAX: usize = 256 << 20;

const HELLO: u8 = 0;
const ERROR: u8 = 1;
const ECHO_REQUEST: u8 = 2;
const ECHO_REPLY: u8 = 3;
const EXPERIMENTER: u8 = 4;
const BARRIER_REQUEST: u8 = 20;
const BARRIER_REPLY: u8 = 21;
const BUNDLE_CONTROL: u8 = 33;
/// Length of a header, bytes.
const HEADER: usize = 8;
/// Experimenter ONF_VENDOR_ID and its message ONFT_BUNDLE_CONTROL, behind the header.
const ONF_BUNDLE_CONTROL: [u8; 8] = [0x4f, 0x4e, 0x46, 0, 0, 0, 0x08, 0xfc];

/// The messages for one bridge.
pub struct Recording {
    stream: Vec<u8>,
    /// So many of them are acknowledged, where all goes well.
    acknowledged: usize,
}

impl Recording {
    /// Has ovs-ofctl say what makes a bridge's rules `rules`. `socket` is where it finds us, in a folder that only we can
    /// enter; it is gone afterwards.
    pub fn make(openflow: &RealOpenFlow, rules: &BridgeRules, socket: &Path, until: Instant) -> Result<Self> {
        let object = || socket.display().to_string();
        // Left behind by one that was killed.
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).about(object())?;
        let ended = AtomicBool::new(false);
        let recorded = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let stream = accept(&listener, &ended, until)?;
                let _ = std::fs::remove_file(socket);
                record(stream, until)
            });
            let target = format!("unix:{}", socket.display());
            let said = openflow.ofctl(&rules.protocol, &["bundle", &target, "-"], Some(&bundle_text(rules)), until);
            ended.store(true, Ordering::Release);
            let recorded = thread.join().unwrap_or_else(|_| Err(HostError::new(object(), "a thread of ours panicked")));
            let nothing = || HostError::new(object(), "ovs-ofctl sent nothing that a bridge acknowledges");
            said.and(recorded).and_then(|made| (made.acknowledged > 0).then_some(made).ok_or_else(nothing))
        });
        let _ = std::fs::remove_file(socket);
        recorded
    }

    /// Says it to the bridge behind `socket` and waits until all of it is done.
    pub fn play(&self, socket: &Path, until: Instant) -> Result<()> {
        let object = socket.display().to_string();
        let mut stream = UnixStream::connect(socket).about(&object)?;
        stream.set_nonblocking(true).about(&object)?;
        let (mut sent, mut acknowledged, mut inbox) = (0, 0, Inbox::default());
        while acknowledged < self.acknowledged {
            let unsent = self.stream.get(sent..).unwrap_or_default();
            if !wait(&stream, !unsent.is_empty(), until).about(&object)? {
                return Err(HostError::timeout(&object, "giving the bridge its rules"));
            }
            sent += some(stream.write(unsent)).about(&object)?.unwrap_or(0);
            if inbox.read(&mut stream).about(&object)? == Some(0) {
                return Err(HostError::away(&object, "the daemon closed the connection"));
            }
            while let Some(message) = inbox.next().about(&object)? {
                match message.get(1).copied() {
                    Some(ERROR) => return Err(HostError::new(&object, in_words(&message))),
                    // Small, and the bridge reads: it fits. One asks only where nothing was heard for seconds.
                    Some(ECHO_REQUEST) if sent == self.stream.len() => {
                        let _unanswered = some(stream.write(&answer(&message, ECHO_REPLY))).about(&object)?;
                    }
                    Some(BARRIER_REPLY) => acknowledged += 1,
                    _ => acknowledged += usize::from(bundle_control(&message).is_some()),
                }
            }
        }
        Ok(())
    }
}

/// Takes ovs-ofctl's one connection, unless it has `ended`.
fn accept(listener: &UnixListener, ended: &AtomicBool, until: Instant) -> Result<UnixStream> {
    listener.set_nonblocking(true).about(OBJECT)?;
    loop {
        // In this order: one that connected before it ended is still found.
        let last = ended.load(Ordering::Acquire) || remaining(until).is_none();
        match some(listener.accept()).about(OBJECT)? {
            Some((stream, _)) => return Ok(stream),
            None if last => return Err(HostError::new(OBJECT, "it did not connect")),
            None => std::thread::sleep(LOOK_AGAIN),
        }
    }
}

/// Keeps what ovs-ofctl sends until it closes, and acknowledges what it asks for.
fn record(mut stream: UnixStream, until: Instant) -> Result<Recording> {
    stream.set_nonblocking(true).about(OBJECT)?;
    let (mut recording, mut inbox) = (Recording { stream: Vec::new(), acknowledged: 0 }, Inbox::default());
    loop {
        if !wait(&stream, false, until).about(OBJECT)? {
            return Err(HostError::timeout(OBJECT, "recording what it sends"));
        }
        if inbox.read(&mut stream).about(OBJECT)? == Some(0) {
            return Ok(recording);
        }
        while let Some(message) = inbox.next().about(OBJECT)? {
            recording.stream.extend_from_slice(&message);
            if recording.stream.len() > RECORDING_MAX {
                return Err(HostError::new(OBJECT, format!("it sends more than {RECORDING_MAX} bytes")));
            }
            let Some(reply) = reply(&message) else { continue };
            recording.acknowledged += usize::from(reply.get(1) != Some(&HELLO));
            // It waits for each of them: the socket is empty.
            stream.write_all(&reply).about(OBJECT)?;
        }
    }
}

/// What a bridge that is content answers.
fn reply(message: &[u8]) -> Option<Vec<u8>> {
    match *message.get(1)? {
        // The header alone offers the sender's own version.
        HELLO => Some(answer(message.get(..HEADER)?, HELLO)),
        BARRIER_REQUEST => Some(answer(message, BARRIER_REPLY)),
        kind => {
            let at = bundle_control(message)?;
            let mut reply = answer(message, kind);
            // Each reply's type follows its request's.
            *reply.get_mut(at)? += 1;
            Some(reply)
        }
    }
}

/// The message as it came with another type in its header.
fn answer(message: &[u8], kind: u8) -> Vec<u8> {
    let mut answer = message.to_vec();
    let length = u16::try_from(answer.len()).unwrap_or(u16::MAX).to_be_bytes();
    for (byte, value) in answer.iter_mut().skip(1).zip([kind, length[0], length[1]]) {
        *byte = value;
    }
    answer
}

/// Where in a bundle control message the low byte of its type is: behind the bundle's id, the low byte of 16 bits.
fn bundle_control(message: &[u8]) -> Option<usize> {
    let body = match *message.get(1)? {
        BUNDLE_CONTROL => HEADER,
        EXPERIMENTER if message.get(HEADER..HEADER + 8) == Some(&ONF_BUNDLE_CONTROL) => HEADER + 8,
        _ => return None,
    };
    (message.len() >= body + 8).then_some(body + 5)
}

/// An error message: type and code behind the header.
fn in_words(message: &[u8]) -> String {
    match message.get(HEADER..HEADER + 4) {
        Some(&[a, b, c, d]) => {
            format!("OFPT_ERROR type {} code {}", u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
        }
        _ => "OFPT_ERROR without a type".into(),
    }
}

/// What has come and is not yet a whole message.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    taken: usize,
}

impl Inbox {
    /// Reads once; `None` where nothing is there, 0 at the end.
    fn read(&mut self, stream: &mut UnixStream) -> std::io::Result<Option<usize>> {
        let mut chunk = [0; 65536];
        let read = some(stream.read(&mut chunk))?;
        self.bytes.drain(..std::mem::take(&mut self.taken));
        self.bytes.extend_from_slice(&chunk[..read.unwrap_or(0)]);
        Ok(read)
    }

    /// The next whole message.
    fn next(&mut self) -> std::result::Result<Option<Vec<u8>>, String> {
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some(&[_, _, high, low]) = rest.first_chunk::<4>() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length < HEADER {
            return Err(format!("an OpenFlow message that says it has {length} bytes"));
        }
        let message = rest.get(..length).map(<[u8]>::to_vec);
        self.taken += message.as_ref().map_or(0, Vec::len);
        Ok(message)
    }
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

/// `None` where it would have to wait.
fn some<T>(result: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(HEADER + body.len()).unwrap().to_be_bytes();
        [&[6, kind, length[0], length[1], 0, 0, 0, 7], body].concat()
    }

    /// Type 0 asks to open, 2 to close, 4 to commit.
    fn control(kind: u8) -> Vec<u8> {
        message(BUNDLE_CONTROL, &[0, 0, 0, 9, 0, kind, 0, 3])
    }

    #[test]
    fn replies_are_those_of_a_bridge() {
        assert_eq!(reply(&message(HELLO, &[0, 1, 0, 8, 0, 0, 0, 0x40])).unwrap(), message(HELLO, &[]));
        assert_eq!(reply(&control(4)).unwrap(), control(5));
        assert_eq!(reply(&message(BARRIER_REQUEST, &[])).unwrap(), message(BARRIER_REPLY, &[]));
        let onf = |kind| message(EXPERIMENTER, &[&ONF_BUNDLE_CONTROL[..], &[0, 0, 0, 9, 0, kind, 0, 3]].concat());
        assert_eq!(reply(&onf(0)).unwrap(), onf(1));
        // Added to the bundle, and cut short.
        assert!(reply(&message(34, &[0; 40])).is_none());
        assert!(reply(&message(EXPERIMENTER, &[0; 24])).is_none());
        assert!(reply(&message(BUNDLE_CONTROL, &[0; 4])).is_none() && reply(&[]).is_none());
    }

    #[test]
    fn messages_are_found_however_the_stream_is_cut() {
        let stream = [control(0), message(34, &[5; 300]), control(4)].concat();
        for cut in 1..stream.len() {
            let mut inbox = Inbox::default();
            let mut found = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                inbox.bytes.extend_from_slice(part);
                while let Some(message) = inbox.next().unwrap() {
                    found.push(message);
                }
            }
            assert_eq!(found.concat(), stream);
            assert_eq!(found.len(), 3);
        }
        assert!(Inbox { bytes: vec![6, 0, 0, 7], taken: 0 }.next().is_err());
    }

    /// A bridge that answers every message with `answer`, for one connection; returns what it was sent.
    fn bridge(listener: UnixListener, answer: fn(&[u8]) -> Option<Vec<u8>>) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut inbox, mut all) = (Inbox::default(), Vec::new());
            while inbox.read(&mut stream).is_ok_and(|read| read != Some(0)) {
                while let Some(message) = inbox.next().unwrap() {
                    all.extend_from_slice(&message);
                    if let Some(reply) = answer(&message) {
                        let _gone = stream.write_all(&reply);
                    }
                }
            }
            all
        })
    }

    #[test]
    fn what_was_recorded_is_played_whole_and_an_error_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("br0.mgmt");
        let listener = UnixListener::bind(&path).unwrap();
        // More than a socket holds.
        let said =
            [vec![message(HELLO, &[]), control(0)], vec![message(34, &[7; 8000]); 200], vec![control(4)]].concat();
        let speaker = {
            let (path, said) = (path.clone(), said.concat());
            std::thread::spawn(move || {
                let mut stream = UnixStream::connect(path).unwrap();
                stream.write_all(&said).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                stream.read_to_end(&mut Vec::new()).unwrap();
            })
        };
        let stream = accept(&listener, &AtomicBool::new(false), soon()).unwrap();
        let recording = record(stream, soon()).unwrap();
        speaker.join().unwrap();
        assert_eq!((recording.stream.len(), recording.acknowledged), (said.concat().len(), 2));

        listener.set_nonblocking(false).unwrap();
        let content = bridge(listener, reply);
        recording.play(&path, soon()).unwrap();
        assert_eq!(content.join().unwrap(), said.concat());

        std::fs::remove_file(&path).unwrap();
        let angry = bridge(UnixListener::bind(&path).unwrap(), |message| {
            (message[1] == 34).then(|| self::message(ERROR, &[0, 17, 0, 4]))
        });
        let error = recording.play(&path, soon()).unwrap_err();
        assert!(error.cause.contains("type 17 code 4"), "{error}");
        angry.join().unwrap();
    }

    #[test]
    fn nobody_who_connects_is_no_recording() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let error = accept(&listener, &AtomicBool::new(true), soon()).unwrap_err();
        assert!(error.cause.contains("did not connect"), "{error}");
        let error = accept(&listener, &AtomicBool::new(false), Instant::now()).unwrap_err();
        assert!(error.cause.contains("did not connect"), "{error}");
    }
}

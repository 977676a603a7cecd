//! A short conversation with a bridge in one version of OpenFlow: requests, a barrier, and all that comes before its reply.
//!
//! HELLO with a bitmap of versions (OpenFlow 1.3.1, A.5.1), which Open vSwitch reads in every version
//! (`ofputil_decode_hello`, lib/ofp-msgs.c): the bridge agrees to this version or to none.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use super::jsonrpc::remaining;
use super::messages::{answer, barrier, header, ECHO_REPLY, ECHO_REQUEST, ERROR, HEADER, HELLO};
use crate::host::{Context, HostError, Result};

/// So much a bridge may answer to the requests of one conversation, bytes: 65,280 ports are 4 MB.
const MOST: usize = 64 << 20;

/// What a bridge answered.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// Messages that are no errors, in order.
    pub messages: Vec<Vec<u8>>,
    /// What it refused, by transaction id.
    pub errors: BTreeMap<u32, Vec<u8>>,
}

/// One message; its transaction id is its place among the requests, from 1 on, once it is sent.
pub(super) struct Request {
    /// Type of the message.
    pub kind: u8,
    /// What follows the header.
    pub body: Vec<u8>,
}

/// Says `requests` to the bridge behind `socket` and waits until it has done them. `None` where it does not speak
/// `version` (1 is OpenFlow 1.0, 6 is 1.5).
pub(super) fn exchange(socket: &Path, version: u8, requests: &[Request], until: Instant) -> Result<Option<Answers>> {
    let object = socket.display().to_string();
    let mut stream = UnixStream::connect(socket).about(&object)?;
    let mut bytes = hello(version);
    for (request, xid) in requests.iter().zip(1u32..) {
        let length = u16::try_from(HEADER + request.body.len()).about(&object)?;
        bytes.extend_from_slice(&[version, request.kind]);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&xid.to_be_bytes());
        bytes.extend_from_slice(&request.body);
    }
    bytes.extend(header(version, barrier(version).0, u32::MAX));
    stream.set_write_timeout(Some(left(until, &object)?)).about(&object)?;
    stream.write_all(&bytes).about(&object)?;
    let (mut answers, mut taken) = (Answers::default(), 0);
    loop {
        let message = read(&mut stream, &object, until)?;
        taken += message.len();
        if taken > MOST {
            return Err(HostError::new(object, "the bridge answers more than 64 MB"));
        }
        match message.get(1).copied() {
            // OFPET_HELLO_FAILED; and a bridge of another version closes or speaks that.
            Some(ERROR) if message.get(HEADER..HEADER + 2) == Some(&[0, 0]) => return Ok(None),
            _ if message.first() != Some(&version) && message.get(1) != Some(&HELLO) => return Ok(None),
            Some(HELLO) => {}
            Some(ECHO_REQUEST) => stream.write_all(&answer(&message, ECHO_REPLY)).about(&object)?,
            Some(ERROR) => drop(super::messages::xid(&message).map(|of| answers.errors.insert(of, message))),
            Some(kind) if kind == barrier(version).1 => return Ok(Some(answers)),
            _ => answers.messages.push(message),
        }
    }
}

/// HELLO of a peer that speaks this version alone.
fn hello(version: u8) -> Vec<u8> {
    // OFPHET_VERSIONBITMAP (1), 8 bytes long.
    let bitmap = 1u32 << version;
    [&[version, HELLO, 0, 16, 0, 0, 0, 0, 0, 1, 0, 8][..], &bitmap.to_be_bytes()].concat()
}

fn left(until: Instant, object: &str) -> Result<std::time::Duration> {
    remaining(until).ok_or_else(|| HostError::timeout(object, "asking the bridge"))
}

fn read(stream: &mut UnixStream, object: &str, until: Instant) -> Result<Vec<u8>> {
    stream.set_read_timeout(Some(left(until, object)?)).about(object)?;
    let mut message = vec![0; HEADER];
    stream.read_exact(&mut message).about(object)?;
    let length = match message.get(2..4) {
        Some(&[high, low]) => usize::from(u16::from_be_bytes([high, low])),
        _ => 0,
    };
    if length < HEADER {
        return Err(HostError::new(object, format!("an OpenFlow message that says it has {length} bytes")));
    }
    message.resize(length, 0);
    if let Some(rest) = message.get_mut(HEADER..) {
        stream.read_exact(rest).about(object)?;
    }
    Ok(message)
}

//! A short conversation with a bridge in one version of OpenFlow: requests, a barrier, and all that comes before its reply.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::connection::Connection;
use super::messages::{barrier, header, kind, message, xid, ERROR};
use crate::host::Result;

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
    let Some(mut connection) = Connection::open_if_spoken(socket, &[version], until)? else { return Ok(None) };
    let mut bytes = Vec::new();
    for (request, xid) in requests.iter().zip(1..) {
        let message = message(version, request.kind, xid, &[&request.body]);
        bytes.extend(message.ok_or_else(|| connection.error("a request that is too long"))?);
    }
    bytes.extend(header(version, barrier(version).0, u32::MAX));
    let (mut answers, mut taken) = (Answers::default(), 0);
    connection.exchange(&bytes, "asking the bridge", until, |message| {
        taken += message.len();
        if taken > MOST {
            return Err(format!("the bridge answers more than {MOST} bytes"));
        }
        match kind(message) {
            Some(ERROR) => drop(xid(message).map(|of| answers.errors.insert(of, message.to_vec()))),
            Some(kind) if kind == barrier(version).1 => return Ok(true),
            _ => answers.messages.push(message.to_vec()),
        }
        Ok(false)
    })?;
    Ok(Some(answers))
}

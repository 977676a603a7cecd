//! OpenFlow messages as bytes: headers, the messages of bundles, and a stream cut into messages.
//!
//! OpenFlow 1.0 to 1.5: header (A.1), HELLO (A.5.1), ERROR (A.4.4), BARRIER, FLOW_MOD (A.3.4.1), GROUP_MOD (A.3.4.2),
//! bundle messages (1.4, A.3.9); for 1.3 those of the ONF extension EXT-230; NXT_FLOW_MOD as in
//! include/openflow/nicira-ext.h. Numbers in network order.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;

pub use crate::host::messages::HEADER;

pub const HELLO: u8 = 0;
pub const ERROR: u8 = 1;
pub const ECHO_REQUEST: u8 = 2;
pub const ECHO_REPLY: u8 = 3;
pub const EXPERIMENTER: u8 = 4;
pub const FLOW_MOD: u8 = 14;
pub const BUNDLE_CONTROL: u8 = 33;
pub const BUNDLE_ADD: u8 = 34;
/// Type of a group message from OpenFlow 1.1 on.
pub const GROUP_MOD: u8 = 15;
/// Type of a meter message from OpenFlow 1.3 on.
pub const METER_MOD: u8 = 29;
/// `ofp_version` of OpenFlow 1.0, 1.1 and 1.3: the first byte of each message.
pub const OF10: u8 = 1;
pub const OF11: u8 = 2;
pub const OF13: u8 = 4;
pub const OF14: u8 = 5;
pub const OF15: u8 = 6;
/// Experimenter ONF_VENDOR_ID and its messages ONFT_BUNDLE_CONTROL and ONFT_BUNDLE_ADD_MESSAGE, behind the header.
const ONF_BUNDLE_CONTROL: [u8; 8] = [0x4f, 0x4e, 0x46, 0, 0, 0, 0x08, 0xfc];
const ONF_BUNDLE_ADD: [u8; 8] = [0x4f, 0x4e, 0x46, 0, 0, 0, 0x08, 0xfd];
/// NX_VENDOR_ID (include/openflow/nicira-ext.h).
pub const NX_VENDOR_ID: u32 = 0x2320;
/// NXT_FLOW_MOD and NXT_GROUP_MOD, of OpenFlow 1.0.
pub const FLOW_MOD_SUBTYPE: u32 = 13;
pub const GROUP_MOD_SUBTYPE: u32 = 31;
/// NX_VENDOR_ID and NXT_FLOW_MOD.
const NXT_FLOW_MOD: [u8; 8] = [0, 0, 0x23, 0x20, 0, 0, 0, 13];
const NXT_GROUP_MOD: [u8; 8] = [0, 0, 0x23, 0x20, 0, 0, 0, 31];
/// Types of bundle control messages.
const COMMIT_REQUEST: u8 = 4;
const DISCARD_REQUEST: u8 = 6;
/// OFPGC_ADD_OR_MOD of Open vSwitch, in all versions (include/openflow/openflow-1.1.h).
const GROUP_ADD_OR_MODIFY: [u8; 2] = [0x80, 0];
/// OFPET_BAD_REQUEST, OFPBRC_BUFFER_UNKNOWN.
pub const BUFFER_UNKNOWN: [u8; 4] = [0, 1, 0, 8];

/// The types of a barrier and of its reply in messages of this version (the first byte of each message).
pub fn barrier(version: u8) -> (u8, u8) {
    match version {
        1 => (18, 19),
        _ => (20, 21),
    }
}

/// Is this a barrier?
#[cfg(test)]
pub fn is_barrier(message: &[u8]) -> bool {
    message.first().is_some_and(|version| kind(message) == Some(barrier(*version).0))
}

/// Is this what comes back where a barrier was?
pub fn is_barrier_reply(message: &[u8]) -> bool {
    message.first().is_some_and(|version| kind(message) == Some(barrier(*version).1))
}

/// The type of a message.
pub fn kind(message: &[u8]) -> Option<u8> {
    message.get(1).copied()
}

/// The transaction id of a message.
pub fn xid(message: &[u8]) -> Option<u32> {
    message.get(4..8)?.try_into().ok().map(u32::from_be_bytes)
}

/// The message as it came with another type in its header.
pub fn answer(message: &[u8], kind: u8) -> Vec<u8> {
    let mut answer = message.to_vec();
    let length = u16::try_from(answer.len()).unwrap_or(u16::MAX).to_be_bytes();
    for (byte, value) in answer.iter_mut().skip(1).zip([kind, length[0], length[1]]) {
        *byte = value;
    }
    answer
}

/// Where in a bundle control message the low byte of its type is: behind the bundle's id, the low byte of 16 bits.
pub fn bundle_control(message: &[u8]) -> Option<usize> {
    let body = match kind(message)? {
        BUNDLE_CONTROL => HEADER,
        EXPERIMENTER if message.get(HEADER..HEADER + 8) == Some(&ONF_BUNDLE_CONTROL) => HEADER + 8,
        _ => return None,
    };
    (message.len() >= body + 8).then_some(body + 5)
}

/// Does the message ask for a bundle to be committed?
pub fn is_commit(message: &[u8]) -> bool {
    bundle_control(message).and_then(|at| message.get(at)) == Some(&COMMIT_REQUEST)
}

/// The message that a bundle is to take in: behind its id, two bytes of padding and its flags.
#[cfg(test)]
pub fn inner(message: &[u8]) -> Option<&[u8]> {
    match kind(message)? {
        BUNDLE_ADD => message.get(HEADER + 8..),
        EXPERIMENTER if message.get(HEADER..HEADER + 8) == Some(&ONF_BUNDLE_ADD) => message.get(HEADER + 16..),
        _ => None,
    }
}

/// Where the id of a packet's buffer is in a message that changes a flow, outside of a bundle.
fn buffer_id(message: &[u8]) -> Option<usize> {
    match (kind(message)?, message.first()?) {
        // Match (40 bytes), cookie, command, time-outs, priority.
        (FLOW_MOD, 1) => Some(HEADER + 40 + 16),
        // Cookie and mask, table and command, time-outs, priority.
        (FLOW_MOD, _) => Some(HEADER + 24),
        // Cookie, command, time-outs, priority.
        (EXPERIMENTER, _) if message.get(HEADER..HEADER + 8) == Some(&NXT_FLOW_MOD) => Some(HEADER + 8 + 16),
        _ => None,
    }
}

/// Does the message change a flow, outside of a bundle?
#[cfg(test)]
pub fn is_flow_mod(message: &[u8]) -> bool {
    buffer_id(message).is_some()
}

/// The same message, so that a switch decodes and judges it and changes nothing: a bundle is thrown away instead of
/// committed, and a flow refers to a packet that no switch keeps ([`BUFFER_UNKNOWN`]; Open vSwitch keeps none since 2.7,
/// and says so after all else: `ofproto_flow_mod_init`, ofproto/ofproto.c).
pub fn without_effect(message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    if is_commit(&message) {
        if let Some(kind) = bundle_control(&message).and_then(|at| message.get_mut(at)) {
            *kind = DISCARD_REQUEST;
        }
    } else if let Some(at) = buffer_id(&message) {
        if let Some(id) = message.get_mut(at..at + 4) {
            id.copy_from_slice(&1_u32.to_be_bytes());
        }
    }
    message
}

/// A message that adds a group, made one that adds or changes it; others as they are.
pub fn add_or_modify(message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    let command = match kind(&message) {
        Some(GROUP_MOD) if message.first() > Some(&OF10) => HEADER,
        Some(EXPERIMENTER) if message.get(HEADER..HEADER + 8) == Some(&NXT_GROUP_MOD) => HEADER + 8,
        _ => return message,
    };
    if let Some(command) = message.get_mut(command..command + 2) {
        command.copy_from_slice(&GROUP_ADD_OR_MODIFY);
    }
    message
}

/// A header alone.
pub fn header(version: u8, kind: u8, xid: u32) -> Vec<u8> {
    [&[version, kind, 0, 8][..], &xid.to_be_bytes()].concat()
}

/// A message: header and body. One that is longer than its header can say is none (`None`).
pub fn message(version: u8, kind: u8, xid: u32, body: &[&[u8]]) -> Option<Vec<u8>> {
    let length = HEADER + body.iter().map(|part| part.len()).sum::<usize>();
    let mut message = Vec::with_capacity(length);
    message.extend([version, kind]);
    message.extend(u16::try_from(length).ok()?.to_be_bytes());
    message.extend(xid.to_be_bytes());
    body.iter().for_each(|part| message.extend_from_slice(part));
    Some(message)
}

/// A message of an extension of Nicira's, by its `subtype`.
pub fn extension(version: u8, subtype: u32, xid: u32, body: &[&[u8]]) -> Option<Vec<u8>> {
    let head = [NX_VENDOR_ID.to_be_bytes(), subtype.to_be_bytes()].concat();
    message(version, EXPERIMENTER, xid, &[&[&head[..]], body].concat())
}

/// The message with this transaction id.
pub fn numbered(message: &[u8], xid: u32) -> Vec<u8> {
    let mut message = message.to_vec();
    if let Some(place) = message.get_mut(4..HEADER) {
        place.copy_from_slice(&xid.to_be_bytes());
    }
    message
}

/// The bundle of a connection has this number, and is atomic and ordered.
const BUNDLE: [u8; 4] = [0, 0, 0, 1];
const ATOMIC_ORDERED: [u8; 2] = [0, 3];

/// What a bundle can be asked.
#[derive(Debug, Clone, Copy)]
pub enum Bundle {
    Open = 0,
    Commit = 4,
    Discard = 6,
}

/// A message about the bundle. From OpenFlow 1.4 on the specification has it, for 1.3 an extension.
pub fn control(version: u8, what: Bundle, xid: u32) -> Option<Vec<u8>> {
    let body = [&BUNDLE[..], &[0, what as u8], &ATOMIC_ORDERED].concat();
    match version {
        OF13 => message(version, EXPERIMENTER, xid, &[&ONF_BUNDLE_CONTROL, &body]),
        _ => message(version, BUNDLE_CONTROL, xid, &[&body]),
    }
}

/// Adds a message to the bundle; its transaction id is that of the message. `None` where it is too long for that.
pub fn in_bundle(inner: &[u8]) -> Option<Vec<u8>> {
    let head = [&BUNDLE[..], &[0, 0], &ATOMIC_ORDERED].concat();
    match *inner.first()? {
        OF13 => message(OF13, EXPERIMENTER, xid(inner)?, &[&ONF_BUNDLE_ADD, &head, inner]),
        version => message(version, BUNDLE_ADD, xid(inner)?, &[&head, inner]),
    }
}

/// An error message: type and code behind the header.
pub fn in_words(message: &[u8]) -> String {
    match message.get(HEADER..HEADER + 4) {
        Some(&[a, b, c, d]) => {
            format!("OFPT_ERROR type {} code {}", u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
        }
        _ => "OFPT_ERROR without a type".into(),
    }
}

/// What has come and is not yet a whole message.
#[derive(Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    taken: usize,
}

impl Inbox {
    /// Reads once; `None` where nothing is there, 0 at the end.
    pub fn read(&mut self, stream: &mut UnixStream) -> std::io::Result<Option<usize>> {
        let mut chunk = [0; 65536];
        let read = some(stream.read(&mut chunk))?;
        self.bytes.drain(..std::mem::take(&mut self.taken));
        self.bytes.extend_from_slice(&chunk[..read.unwrap_or(0)]);
        Ok(read)
    }

    /// The next whole message.
    pub fn next(&mut self) -> std::result::Result<Option<Vec<u8>>, String> {
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

/// `None` where it would have to wait.
pub fn some<T>(result: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_however_the_stream_is_cut() {
        let stream = [
            header(6, BUNDLE_CONTROL, 1),
            [vec![6, BUNDLE_ADD, 1, 52, 0, 0, 0, 7], vec![5; 300]].concat(),
            header(6, BUNDLE_CONTROL, 2),
        ]
        .concat();
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

    #[test]
    fn the_buffer_of_a_flow_is_where_each_version_has_it() {
        // As ovs-ofctl 3.1 sends them, shortened behind the buffer.
        let changed = |message: &[u8]| {
            let after = without_effect(message);
            let at = message.iter().zip(&after).position(|(before, after)| before != after);
            (at, after.len())
        };
        let mut old = vec![1, FLOW_MOD, 0, 72, 0, 0, 0, 1];
        old.extend([0; 56]);
        old.extend([0xff; 4]);
        assert_eq!(changed(&old), (Some(64), 68));
        let mut new = vec![2, FLOW_MOD, 0, 56, 0, 0, 0, 1];
        new.extend([0; 24]);
        new.extend([0xff; 4]);
        assert_eq!(changed(&new), (Some(32), 36));
        let mut extended = vec![1, EXPERIMENTER, 0, 48, 0, 0, 0, 1];
        extended.extend(NXT_FLOW_MOD);
        extended.extend([0; 16]);
        extended.extend([0xff; 4]);
        assert_eq!(changed(&extended), (Some(32), 36));
        assert_eq!(changed(&header(1, 18, 5)), (None, 8));
    }

    #[test]
    fn a_group_is_added_or_changed_and_a_flow_is_left_as_it_is() {
        assert_eq!(add_or_modify(&[6, GROUP_MOD, 0, 10, 0, 0, 0, 1, 0, 0])[8..], GROUP_ADD_OR_MODIFY);
        assert_eq!(add_or_modify(&[6, FLOW_MOD, 0, 10, 0, 0, 0, 1, 0, 0])[8..], [0, 0]);
    }

    #[test]
    fn a_bundle_holds_the_message_under_its_own_number() {
        for version in [OF13, OF14, OF15] {
            let flow = message(version, FLOW_MOD, 7, &[&[0; 48]]).unwrap();
            let added = in_bundle(&flow).unwrap();
            assert_eq!((inner(&added), xid(&added)), (Some(&flow[..]), Some(7)));
            assert_eq!(usize::from(u16::from_be_bytes([added[2], added[3]])), added.len());
            let commit = control(version, Bundle::Commit, 9).unwrap();
            assert!(is_commit(&commit) && !is_commit(&control(version, Bundle::Open, 9).unwrap()));
        }
        let long = message(OF15, FLOW_MOD, 7, &[&vec![0; 0xffff - HEADER]]).unwrap();
        assert_eq!(in_bundle(&long), None);
        assert_eq!(message(OF15, FLOW_MOD, 7, &[&long]), None);
    }
}

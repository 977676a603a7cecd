//! Netlink messages (`struct nlmsghdr` and `struct nlmsgerr`, include/uapi/linux/netlink.h).

use nix::errno::Errno;

use super::attr::{align, Attrs};
use crate::error::{Error, Result};

/// `NLMSG_NOOP`
pub const NLMSG_NOOP: u16 = 1;
/// `NLMSG_ERROR`: an error, or with errno 0 an acknowledgement.
pub const NLMSG_ERROR: u16 = 2;
/// `NLMSG_DONE`: the end of a dump.
pub const NLMSG_DONE: u16 = 3;
/// `NLMSG_OVERRUN`: data was lost.
pub const NLMSG_OVERRUN: u16 = 4;

/// `NLM_F_REQUEST`
pub const NLM_F_REQUEST: u16 = 1;
/// `NLM_F_ACK`
pub const NLM_F_ACK: u16 = 4;
/// `NLM_F_ECHO`
pub const NLM_F_ECHO: u16 = 8;
/// `NLM_F_DUMP_INTR`: what is dumped changed meanwhile; the dump may lack entries.
pub const NLM_F_DUMP_INTR: u16 = 0x10;
/// `NLM_F_DUMP`
pub const NLM_F_DUMP: u16 = 0x300;
/// `NLM_F_CREATE`
pub const NLM_F_CREATE: u16 = 0x400;
/// `NLM_F_EXCL`
pub const NLM_F_EXCL: u16 = 0x200;
/// `NLM_F_CAPPED`: the acknowledgement does not repeat the request.
pub const NLM_F_CAPPED: u16 = 0x100;
/// `NLM_F_ACK_TLVS`: extended acknowledgement attributes follow.
pub const NLM_F_ACK_TLVS: u16 = 0x200;

const NLMSGERR_ATTR_MSG: u16 = 1;
/// Bytes of `struct nlmsghdr`.
pub const HEADER: usize = 16;

/// One message of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// `nlmsg_type`
    pub kind: u16,
    /// `nlmsg_flags`
    pub flags: u16,
    /// `nlmsg_seq`
    pub seq: u32,
    /// `nlmsg_pid`: port id of the socket that asked.
    pub port_id: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

/// The messages of a datagram, in order.
#[derive(Clone, Copy, Debug)]
pub struct Messages<'a>(pub &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = std::mem::take(&mut self.0);
        if bytes.is_empty() {
            return None;
        }
        let Some((head, _)) = bytes.split_first_chunk::<HEADER>() else {
            return Some(Err(Error::malformed("netlink datagram", format!("{} bytes at its end", bytes.len()))));
        };
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, p0, p1, p2, p3] = *head;
        let len = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        if len < HEADER || len > bytes.len() {
            return Some(Err(Error::malformed(
                "netlink message",
                format!("says {len} bytes, {} are there", bytes.len()),
            )));
        }
        self.0 = &bytes[align(len).min(bytes.len())..];
        Some(Ok(Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            seq: u32::from_ne_bytes([s0, s1, s2, s3]),
            port_id: u32::from_ne_bytes([p0, p1, p2, p3]),
            payload: &bytes[HEADER..len],
        }))
    }
}

/// Appends a message to a datagram; the kernel fills in the port id.
pub fn append(datagram: &mut Vec<u8>, kind: u16, flags: u16, seq: u32, body: &[u8]) {
    let len = (HEADER + body.len()) as u32;
    datagram.extend_from_slice(&len.to_ne_bytes());
    datagram.extend_from_slice(&kind.to_ne_bytes());
    datagram.extend_from_slice(&flags.to_ne_bytes());
    datagram.extend_from_slice(&seq.to_ne_bytes());
    datagram.extend_from_slice(&0u32.to_ne_bytes());
    datagram.extend_from_slice(body);
    datagram.resize(align(datagram.len()), 0);
}

/// What an `NLMSG_ERROR` or `NLMSG_DONE` message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// None: it went well.
    pub errno: Option<Errno>,
    /// `NLMSGERR_ATTR_MSG`, where there is one.
    pub text: Option<String>,
}

/// Reads the errno and the extended acknowledgement of `message`.
///
/// # Errors
/// [`Error::Malformed`] if the message is too short for an errno. Unreadable attributes are only left out: they are
/// words for people.
pub fn verdict(message: &Message<'_>) -> Result<Verdict> {
    let Some((code, rest)) = message.payload.split_first_chunk::<4>() else {
        // A plain end of a dump may carry nothing at all.
        return match message.kind {
            NLMSG_DONE => Ok(Verdict { errno: None, text: None }),
            _ => Err(Error::malformed("netlink acknowledgement", "no errno")),
        };
    };
    let code = i32::from_ne_bytes(*code);
    // NLMSG_DONE of a dump carries a length or 0 when it went well; only negative values are errors.
    let errno = (code < 0).then(|| Errno::from_raw(code.saturating_neg()));
    let text = (message.flags & NLM_F_ACK_TLVS != 0).then(|| extended(message, rest)).flatten();
    Ok(Verdict { errno, text })
}

fn extended(message: &Message<'_>, rest: &[u8]) -> Option<String> {
    let attributes = if message.kind == NLMSG_DONE {
        rest
    } else {
        // The header of the request is repeated; its body only if the acknowledgement is not capped.
        let repeated = u32::from_ne_bytes(*rest.first_chunk::<4>()?) as usize;
        let skip = if message.flags & NLM_F_CAPPED != 0 { HEADER } else { align(repeated.max(HEADER)) };
        rest.get(skip..)?
    };
    Some(Attrs(attributes).find(NLMSGERR_ATTR_MSG).ok()??.string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::attr::AttrBuf;
    use super::*;

    proptest! {
        #[test]
        fn what_is_appended_is_read(messages in prop::collection::vec((any::<u16>(), any::<u16>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..50)), 0..8)) {
            let mut datagram = Vec::new();
            for (kind, flags, seq, body) in &messages {
                append(&mut datagram, *kind, *flags, *seq, body);
            }
            let read: Vec<_> = Messages(&datagram)
                .map(|m| m.map(|m| (m.kind, m.flags, m.seq, m.payload.to_vec())).unwrap())
                .collect();
            prop_assert_eq!(read, messages);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), flags in any::<u16>()) {
            for message in Messages(&bytes).flatten() {
                let _ = verdict(&message);
            }
            for kind in [NLMSG_ERROR, NLMSG_DONE] {
                let _ = verdict(&Message { kind, flags, seq: 1, port_id: 1, payload: &bytes });
            }
        }
    }

    fn acknowledgement(errno: i32, repeated: &[u8], text: &str) -> Vec<u8> {
        let mut payload = (-errno).to_ne_bytes().to_vec();
        payload.extend_from_slice(repeated);
        payload.extend_from_slice(AttrBuf::new().push_u32(2, 20).push_str(1, text).as_bytes());
        payload
    }

    #[test]
    fn the_kernels_words_are_found_behind_the_request() {
        let mut request = Vec::new();
        append(&mut request, 34, NLM_F_REQUEST, 7, &[1, 2, 3, 4, 5]);
        let whole = acknowledgement(libc::EINVAL, &request, "no such thing");
        let capped = acknowledgement(libc::EINVAL, &request[..HEADER], "no such thing");
        for (payload, flags) in [(whole, NLM_F_ACK_TLVS), (capped, NLM_F_ACK_TLVS | NLM_F_CAPPED)] {
            let said = verdict(&Message { kind: NLMSG_ERROR, flags, seq: 7, port_id: 1, payload: &payload }).unwrap();
            assert_eq!(said, Verdict { errno: Some(Errno::EINVAL), text: Some("no such thing".into()) });
        }
    }

    #[test]
    fn only_a_negative_number_is_an_error() {
        let said = |kind, code: i32| {
            verdict(&Message { kind, flags: 0, seq: 1, port_id: 1, payload: &code.to_ne_bytes() }).unwrap().errno
        };
        assert_eq!(said(NLMSG_ERROR, 0), None);
        assert_eq!(said(NLMSG_DONE, 12), None);
        assert_eq!(said(NLMSG_DONE, -libc::ENODEV), Some(Errno::ENODEV));
        assert!(said(NLMSG_ERROR, i32::MIN).is_some());
        assert!(verdict(&Message { kind: NLMSG_ERROR, flags: 0, seq: 1, port_id: 1, payload: &[] }).is_err());
    }
}

//! Requests, dumps and batches over anything that carries datagrams: the rules, apart from the system calls.
//!
//! What makes an answer unusable is decided here: a datagram that was cut off, a receive queue that ran over, a dump
//! that the kernel marks as interrupted. Such an answer is never returned in part.

use std::collections::HashMap;
use std::io;

use nix::errno::Errno;

use super::message::{
    append, verdict, Message, Messages, Verdict, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, NLM_F_ACK,
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
};
use crate::error::{Error, Result};

/// How often an incomplete dump is asked for before it is an error.
const DUMP_TRIES: u32 = 8;
/// Messages in one sendmsg. The freeze's BPF program looks at 64 at most, and every one may be answered with an
/// error that must fit into the receive buffer.
const BATCH_MESSAGES: usize = 64;
/// Bytes in one sendmsg, unless a single message is longer.
const BATCH_BYTES: usize = 64 << 10;

/// A datagram from the kernel.
#[derive(Clone, Debug)]
pub(crate) struct Datagram {
    pub bytes: Vec<u8>,
    /// It was longer than the buffer.
    pub truncated: bool,
}

/// What carries datagrams to the kernel and back.
pub(crate) trait Wire {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()>;
    /// The next datagram *of the kernel*; those of other senders are left out. ENOBUFS tells that some were lost.
    fn recv(&mut self) -> io::Result<Datagram>;
}

/// What the kernel said to one message of a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// None: it went well.
    pub errno: Option<Errno>,
    /// The kernel's own words, where it had some.
    pub text: Option<String>,
    /// Payloads (after nlmsghdr) of what it answered.
    pub payloads: Vec<Vec<u8>>,
}

/// One side of a conversation with the kernel.
#[derive(Debug)]
pub(crate) struct Conversation<W> {
    pub wire: W,
    seq: u32,
}

impl<W: Wire> Conversation<W> {
    pub fn new(wire: W) -> Self {
        Self { wire, seq: 0 }
    }

    fn next_seq(&mut self) -> u32 {
        // 0 is what the kernel puts into messages that nobody asked for.
        self.seq = self.seq.checked_add(1).unwrap_or(1);
        self.seq
    }

    /// One acknowledged request; payloads of the answers.
    pub fn request(&mut self, what: &str, kind: u16, flags: u16, body: &[u8]) -> Result<Vec<Vec<u8>>> {
        let answer = self.exchange(what, kind, flags, &[body])?.pop().unwrap_or_default();
        match answer.errno {
            None => Ok(answer.payloads),
            Some(errno) => Err(Error::Netlink { what: what.into(), errno, text: answer.text }),
        }
    }

    /// A whole dump, or an error.
    pub fn dump(&mut self, what: &str, kind: u16, body: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut why = "";
        for _ in 0..DUMP_TRIES {
            match self.dump_once(what, kind, body)? {
                Dump::Whole(payloads) => return Ok(payloads),
                Dump::Unusable(reason) => why = reason,
            }
        }
        Err(Error::IncompleteDump { what: what.into(), tries: DUMP_TRIES, why: why.into() })
    }

    fn dump_once(&mut self, what: &str, kind: u16, body: &[u8]) -> Result<Dump> {
        let seq = self.next_seq();
        let mut datagram = Vec::new();
        append(&mut datagram, kind, NLM_F_REQUEST | NLM_F_DUMP, seq, body);
        self.wire.send(&datagram).map_err(|e| Error::io(what, e))?;
        let mut payloads = Vec::new();
        let mut unusable = None;
        // Read to the end even of a dump that is already unusable: the kernel runs one dump per socket, and the rest
        // of this one would stand before the next.
        loop {
            let datagram = match self.wire.recv() {
                Ok(datagram) => datagram,
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                    unusable = Some("the receive queue ran over");
                    continue;
                }
                Err(e) => return Err(Error::io(what, e)),
            };
            if datagram.truncated {
                unusable = Some("a datagram was longer than the buffer");
            }
            for message in Messages(&datagram.bytes) {
                let message = match message {
                    Ok(message) => message,
                    Err(_) if datagram.truncated => break,
                    Err(e) => return Err(e),
                };
                if message.seq != seq {
                    continue;
                }
                if message.flags & NLM_F_DUMP_INTR != 0 && message.kind != NLMSG_ERROR {
                    unusable = Some("the kernel's tables changed meanwhile");
                }
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        refused(what, verdict(&message)?)?;
                        return Ok(unusable.map_or(Dump::Whole(payloads), Dump::Unusable));
                    }
                    NLMSG_OVERRUN => unusable = Some("the kernel reported an overrun"),
                    NLMSG_NOOP => {}
                    _ => payloads.push(message.payload.to_vec()),
                }
            }
        }
    }

    /// Many messages of one kind; the answer to each, in order. A sendmsg that fails as a whole (for example because
    /// it is refused) gives its errno to every message in it.
    pub fn exchange<B: AsRef<[u8]>>(&mut self, what: &str, kind: u16, flags: u16, bodies: &[B]) -> Result<Vec<Answer>> {
        let mut answers = Vec::with_capacity(bodies.len());
        let mut rest = bodies;
        while !rest.is_empty() {
            let (chunk, later) = rest.split_at(chunk_len(rest));
            answers.append(&mut self.exchange_chunk(what, kind, flags, chunk)?);
            rest = later;
        }
        Ok(answers)
    }

    fn exchange_chunk<B: AsRef<[u8]>>(
        &mut self,
        what: &str,
        kind: u16,
        flags: u16,
        chunk: &[B],
    ) -> Result<Vec<Answer>> {
        let mut datagram = Vec::new();
        let mut place = HashMap::with_capacity(chunk.len());
        let mut last = 0;
        for (index, body) in chunk.iter().enumerate() {
            last = self.next_seq();
            place.insert(last, index);
            // Errors come back unasked. An acknowledgement of the last message alone tells that all were worked off,
            // and leaves the receive queue to the errors.
            let ack = if index + 1 == chunk.len() { NLM_F_ACK } else { 0 };
            append(&mut datagram, kind, NLM_F_REQUEST | flags | ack, last, body.as_ref());
        }
        let mut answers = vec![Answer::default(); chunk.len()];
        if let Err(e) = self.wire.send(&datagram) {
            let errno = e.raw_os_error().map(Errno::from_raw).ok_or_else(|| Error::io(what, e))?;
            answers.iter_mut().for_each(|answer| answer.errno = Some(errno));
            return Ok(answers);
        }
        loop {
            let datagram = self.wire.recv().map_err(|e| Error::io(format!("{what}: answers lost"), e))?;
            if datagram.truncated {
                return Err(Error::malformed(what, "an answer was longer than the buffer"));
            }
            for message in Messages(&datagram.bytes) {
                let message = message?;
                let Some(answer) = place.get(&message.seq).and_then(|index| answers.get_mut(*index)) else { continue };
                if take(answer, &message)? && message.seq == last {
                    return Ok(answers);
                }
            }
        }
    }
}

enum Dump {
    Whole(Vec<Vec<u8>>),
    Unusable(&'static str),
}

/// Puts `message` into `answer`; true if it was the acknowledgement.
fn take(answer: &mut Answer, message: &Message<'_>) -> Result<bool> {
    match message.kind {
        NLMSG_ERROR | NLMSG_DONE => {
            Verdict { errno: answer.errno, text: answer.text } = verdict(message)?;
            return Ok(true);
        }
        NLMSG_NOOP => {}
        _ => answer.payloads.push(message.payload.to_vec()),
    }
    Ok(false)
}

fn refused(what: &str, verdict: Verdict) -> Result<()> {
    match verdict.errno {
        None => Ok(()),
        Some(errno) => Err(Error::Netlink { what: what.into(), errno, text: verdict.text }),
    }
}

/// How many of `bodies` go into the next sendmsg: at least one.
fn chunk_len<B: AsRef<[u8]>>(bodies: &[B]) -> usize {
    let mut bytes = 0;
    let fitting = bodies.iter().take(BATCH_MESSAGES).take_while(|body| {
        bytes += super::message::HEADER + body.as_ref().len() + 3;
        bytes <= BATCH_BYTES
    });
    fitting.count().max(1)
}

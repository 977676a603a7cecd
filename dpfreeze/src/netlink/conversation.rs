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
        self.dump_each(what, kind, body, Vec::new, |payloads, payload| {
            payloads.push(payload.to_vec());
            Ok(())
        })
    }

    /// A whole dump, folded entry by entry: what is not kept by `each` is not kept at all. Each try begins with a
    /// `fresh` result.
    pub fn dump_each<S>(
        &mut self,
        what: &str,
        kind: u16,
        body: &[u8],
        fresh: impl Fn() -> S,
        mut each: impl FnMut(&mut S, &[u8]) -> Result<()>,
    ) -> Result<S> {
        let mut why = "";
        for _ in 0..DUMP_TRIES {
            let mut result = fresh();
            match self.dump_once(what, kind, body, &mut |payload| each(&mut result, payload))? {
                None => return Ok(result),
                Some(reason) => why = reason,
            }
        }
        Err(Error::IncompleteDump { what: what.into(), tries: DUMP_TRIES, why: why.into() })
    }

    /// Gives each entry to `each`; why the dump is unusable, where it is.
    fn dump_once(
        &mut self,
        what: &str,
        kind: u16,
        body: &[u8],
        each: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Option<&'static str>> {
        let seq = self.next_seq();
        let mut datagram = Vec::new();
        append(&mut datagram, kind, NLM_F_REQUEST | NLM_F_DUMP, seq, body);
        self.wire.send(&datagram).map_err(|e| Error::io(what, e))?;
        let mut unusable = None;
        let mut failed = Ok(());
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
                        // Of a dump that does not count, neither do the entries.
                        return match unusable {
                            None => failed.map(|()| None),
                            unusable => Ok(unusable),
                        };
                    }
                    NLMSG_OVERRUN => unusable = Some("the kernel reported an overrun"),
                    NLMSG_NOOP => {}
                    _ if failed.is_ok() && unusable.is_none() => failed = each(message.payload),
                    _ => {}
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::super::attr::AttrBuf;
    use super::super::message::{HEADER, NLM_F_ACK_TLVS, NLM_F_CAPPED};
    use super::*;

    type Received = io::Result<Datagram>;

    /// A kernel that answers each sendmsg with what the test's function gives for its messages.
    struct Fake<F> {
        kernel: F,
        sent: Vec<Vec<(u16, u32)>>,
        waiting: VecDeque<Received>,
    }

    impl<F: FnMut(usize, &[(u16, u32)]) -> io::Result<Vec<Received>>> Wire for Fake<F> {
        fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
            let messages: Vec<(u16, u32)> = Messages(datagram).map(|m| m.unwrap()).map(|m| (m.flags, m.seq)).collect();
            let answer = (self.kernel)(self.sent.len(), &messages);
            self.sent.push(messages);
            self.waiting.extend(answer?);
            Ok(())
        }

        fn recv(&mut self) -> Received {
            self.waiting.pop_front().unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
        }
    }

    fn talk<F: FnMut(usize, &[(u16, u32)]) -> io::Result<Vec<Received>>>(kernel: F) -> Conversation<Fake<F>> {
        Conversation::new(Fake { kernel, sent: Vec::new(), waiting: VecDeque::new() })
    }

    fn message(kind: u16, flags: u16, seq: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        append(&mut bytes, kind, flags, seq, body);
        bytes
    }

    fn datagram(messages: &[Vec<u8>]) -> Received {
        Ok(Datagram { bytes: messages.concat(), truncated: false })
    }

    fn entry(seq: u32, body: &[u8]) -> Vec<u8> {
        message(40, 2, seq, body)
    }

    fn end(kind: u16, seq: u32, errno: i32) -> Vec<u8> {
        message(kind, 0, seq, &[&(-errno).to_ne_bytes()[..], &[0; HEADER]].concat())
    }

    fn enobufs() -> Received {
        Err(io::Error::from_raw_os_error(libc::ENOBUFS))
    }

    #[test]
    fn a_request_gives_what_was_answered_before_its_acknowledgement() {
        let mut talk = talk(|_, sent| {
            let seq = sent[0].1;
            Ok(vec![
                datagram(&[entry(seq + 77, b"left over from before"), entry(seq, b"mine")]),
                datagram(&[end(NLMSG_ERROR, seq + 77, libc::EBUSY)]),
                datagram(&[end(NLMSG_ERROR, seq, 0)]),
            ])
        });
        assert_eq!(talk.request("it", 40, 0, b"").unwrap(), [b"mine"]);
        assert_eq!(talk.wire.sent[0][0].0, NLM_F_REQUEST | NLM_F_ACK);
    }

    #[test]
    fn a_refusal_says_what_why_and_the_kernels_words() {
        let mut talk = talk(|_, sent| {
            let mut body = (-libc::EPERM).to_ne_bytes().to_vec();
            body.extend_from_slice(&[0; HEADER]);
            body.extend_from_slice(AttrBuf::new().push_str(1, "frozen").as_bytes());
            Ok(vec![datagram(&[message(NLMSG_ERROR, NLM_F_ACK_TLVS | NLM_F_CAPPED, sent[0].1, &body)])])
        });
        let error = talk.request("OVS_FLOW_CMD_DEL", 40, 0, b"").unwrap_err();
        assert!(matches!(error, Error::Netlink { errno: Errno::EPERM, .. }));
        let text = error.to_string();
        assert!(text.contains("OVS_FLOW_CMD_DEL") && text.contains("EPERM") && text.contains("(frozen)"), "{text}");
    }

    #[test]
    fn silence_is_an_error() {
        assert!(matches!(talk(|_, _| Ok(vec![])).request("it", 40, 0, b""), Err(Error::Io { .. })));
        assert!(matches!(talk(|_, _| Ok(vec![])).dump("it", 40, b""), Err(Error::Io { .. })));
    }

    #[test]
    fn a_whole_dump_is_returned_in_order() {
        let mut talk = talk(|_, sent| {
            let seq = sent[0].1;
            Ok(vec![
                datagram(&[entry(seq, b"1"), entry(seq, b"2")]),
                datagram(&[entry(seq - 1, b"of another"), entry(seq, b"3"), message(NLMSG_NOOP, 0, seq, b"")]),
                datagram(&[end(NLMSG_DONE, seq, 0)]),
            ])
        });
        assert_eq!(talk.dump("it", 40, b"").unwrap(), [b"1", b"2", b"3"]);
        assert_eq!(talk.wire.sent.len(), 1);
        assert_eq!(talk.wire.sent[0][0].0, NLM_F_REQUEST | NLM_F_DUMP);
    }

    /// Every way in which a dump can be incomplete: read to its end, thrown away, asked for again.
    #[test]
    fn an_incomplete_dump_is_repeated_and_never_used() {
        type Spoil = fn(u32) -> Vec<Received>;
        let spoils: [(&str, Spoil); 6] = [
            ("interrupted", |seq| vec![datagram(&[message(40, 2 | NLM_F_DUMP_INTR, seq, b"half")])]),
            ("interrupted at the end", |seq| {
                vec![datagram(&[entry(seq, b"half"), message(NLMSG_DONE, NLM_F_DUMP_INTR, seq, &[0; 4])])]
            }),
            ("overrun", |seq| vec![datagram(&[entry(seq, b"half")]), enobufs()]),
            ("overrun twice", |seq| vec![enobufs(), datagram(&[entry(seq, b"half")]), enobufs()]),
            ("truncated", |seq| {
                let mut bytes = entry(seq, b"this one is cut off");
                bytes.truncate(bytes.len() - 6);
                vec![Ok(Datagram { bytes, truncated: true })]
            }),
            ("overrun message", |seq| vec![datagram(&[entry(seq, b"half"), message(NLMSG_OVERRUN, 0, seq, b"")])]),
        ];
        for (name, spoil) in spoils {
            let mut talk = talk(|tries, sent| {
                let seq = sent[0].1;
                let mut answer = if tries < 2 { spoil(seq) } else { vec![datagram(&[entry(seq, b"whole")])] };
                answer.push(datagram(&[end(NLMSG_DONE, seq, 0)]));
                Ok(answer)
            });
            assert_eq!(talk.dump("it", 40, b"").unwrap(), [b"whole"], "{name}");
            assert_eq!(talk.wire.sent.len(), 3, "{name}");
        }
    }

    #[test]
    fn an_entry_that_is_refused_fails_the_dump_at_its_end() {
        let mut talk = talk(|_, sent| {
            let seq = sent[0].1;
            let all = [entry(seq, b"1"), entry(seq, b"bad"), entry(seq, b"3")];
            Ok(vec![datagram(&all), datagram(&[end(NLMSG_DONE, seq, 0)])])
        });
        let mut seen = 0;
        let read = talk.dump_each(
            "it",
            40,
            b"",
            || (),
            |(), payload| {
                seen += 1;
                if payload == b"bad" {
                    Err(Error::malformed("entry", "bad"))
                } else {
                    Ok(())
                }
            },
        );
        assert!(matches!(read, Err(Error::Malformed { .. })));
        assert_eq!(seen, 2);
        // Nothing of it is left for the next one.
        assert!(talk.wire.waiting.is_empty());
    }

    #[test]
    fn a_dump_that_stays_incomplete_is_an_error() {
        let mut talk = talk(|_, sent| {
            let seq = sent[0].1;
            Ok(vec![datagram(&[message(40, NLM_F_DUMP_INTR, seq, b"half"), end(NLMSG_DONE, seq, 0)])])
        });
        assert!(matches!(talk.dump("it", 40, b""), Err(Error::IncompleteDump { tries: DUMP_TRIES, .. })));
        assert_eq!(talk.wire.sent.len(), DUMP_TRIES as usize);
    }

    #[test]
    fn an_error_in_or_at_the_end_of_a_dump_is_the_result() {
        for kind in [NLMSG_ERROR, NLMSG_DONE] {
            let mut talk =
                talk(|_, sent| Ok(vec![datagram(&[entry(sent[0].1, b"half"), end(kind, sent[0].1, libc::ENODEV)])]));
            assert!(matches!(talk.dump("it", 40, b""), Err(Error::Netlink { errno: Errno::ENODEV, .. })));
        }
    }

    #[test]
    fn a_malformed_datagram_is_an_error() {
        let bytes = vec![1, 2, 3];
        let mut talk = talk(|_, _| Ok(vec![Ok(Datagram { bytes: bytes.clone(), truncated: false })]));
        assert!(matches!(talk.dump("it", 40, b""), Err(Error::Malformed { .. })));
    }

    #[test]
    fn a_batch_asks_for_one_acknowledgement_and_finds_the_errors_by_number() {
        let mut talk = talk(|_, sent| {
            // The second of each sendmsg fails, as netlink_rcv_skb answers: errors unasked, the rest in silence.
            let mut answer = vec![datagram(&[end(NLMSG_ERROR, sent[1].1, libc::ENOENT)])];
            let last = sent.last().unwrap();
            assert!(last.0 & NLM_F_ACK != 0);
            answer.push(datagram(&[end(NLMSG_ERROR, last.1, 0)]));
            Ok(answer)
        });
        let bodies = vec![vec![0; 30]; 150];
        let answers = talk.exchange("it", 40, 0, &bodies).unwrap();
        let failed: Vec<usize> = (0..150).filter(|i| answers[*i].errno == Some(Errno::ENOENT)).collect();
        assert_eq!(failed, [1, 65, 129]);
        assert_eq!(talk.wire.sent.iter().map(Vec::len).collect::<Vec<_>>(), [64, 64, 22]);
        assert_eq!(talk.wire.sent.iter().flatten().filter(|m| m.0 & NLM_F_ACK != 0).count(), 3);
    }

    #[test]
    fn the_last_of_a_batch_may_fail_and_each_gets_its_own_payload() {
        let mut talk = talk(|_, sent| {
            let answer = sent.iter().map(|m| entry(m.1, &m.1.to_ne_bytes())).collect::<Vec<_>>();
            Ok(vec![datagram(&answer), datagram(&[end(NLMSG_ERROR, sent[2].1, libc::EINVAL)])])
        });
        let answers = talk.exchange("it", 40, 0, &[b"a", b"b", b"c"]).unwrap();
        assert_eq!(answers.iter().map(|a| a.errno).collect::<Vec<_>>(), [None, None, Some(Errno::EINVAL)]);
        let payloads: Vec<Vec<u8>> = answers.into_iter().flat_map(|a| a.payloads).collect();
        assert_eq!(payloads, [1u32, 2, 3].map(|seq| seq.to_ne_bytes().to_vec()));
    }

    #[test]
    fn a_refused_sendmsg_fails_all_in_it_and_only_those() {
        let mut talk = talk(|n, sent| match n {
            1 => Err(io::Error::from_raw_os_error(libc::EPERM)),
            _ => Ok(vec![datagram(&[end(NLMSG_ERROR, sent.last().unwrap().1, 0)])]),
        });
        let answers = talk.exchange("it", 40, 0, &vec![vec![0; 8]; 130]).unwrap();
        let failed: Vec<usize> = (0..130).filter(|i| answers[*i].errno == Some(Errno::EPERM)).collect();
        assert_eq!(failed, (64..128).collect::<Vec<_>>());
    }

    #[test]
    fn lost_answers_of_a_batch_are_an_error_not_a_success() {
        let mut talk = talk(|_, _| Ok(vec![enobufs()]));
        assert!(matches!(talk.exchange("it", 40, 0, &[b"a", b"b"]), Err(Error::Io { .. })));
    }

    #[test]
    fn a_sendmsg_is_bounded_in_bytes_but_takes_at_least_one() {
        assert_eq!(chunk_len(&[vec![0; 200_000], vec![0; 10]]), 1);
        assert_eq!(chunk_len(&vec![vec![0; 30_000]; 5]), 2);
        assert_eq!(chunk_len(&vec![vec![0; 10]; 500]), BATCH_MESSAGES);
    }

    #[test]
    fn sequence_numbers_skip_zero() {
        let mut talk = talk(|_, sent| Ok(vec![datagram(&[end(NLMSG_ERROR, sent[0].1, 0)])]));
        talk.seq = u32::MAX;
        talk.request("it", 40, 0, b"").unwrap();
        assert_eq!(talk.seq, 1);
    }
}

//! A netlink socket: requests, dumps and batches, none of them ever half-used.

use std::io;
use std::os::fd::AsRawFd;

use netlink_sys::SocketAddr;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::conversation::{Answer, Conversation, Datagram, Wire};
use crate::error::{Error, Result};

/// The kernel's dumps use at most 32 KiB a datagram (net/netlink/af_netlink.c); one message can be longer.
const RECEIVE: usize = 128 << 10;
/// Receive and send buffer, bytes.
const BUFFER: usize = 4 << 20;
/// The kernel answers while it is asked; silence of this length, seconds, is an error and not patience.
const SILENCE_S: i64 = 10;

/// The netlink protocols in use (include/uapi/linux/netlink.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// `NETLINK_ROUTE`
    Route = 0,
    /// `NETLINK_NETFILTER`
    Netfilter = 12,
    /// `NETLINK_GENERIC`
    Generic = 16,
}

/// A bound netlink socket, closed on exec. It listens to the kernel alone.
#[derive(Debug)]
pub struct Socket {
    conversation: Conversation<Kernel>,
    port_id: u32,
}

impl Socket {
    /// Opens and binds a socket, with extended and capped acknowledgements and a large receive buffer.
    ///
    /// # Errors
    /// [`Error::Io`], for example where the kernel lacks the protocol.
    pub fn open(protocol: Protocol) -> Result<Self> {
        let failed = |e: io::Error| Error::io(format!("netlink socket ({protocol:?})"), e);
        let mut socket = netlink_sys::Socket::new(protocol as isize).map_err(failed)?;
        let port_id = socket.bind_auto().map_err(failed)?.port_number();
        socket.set_ext_ack(true).map_err(failed)?;
        socket.set_cap_ack(true).map_err(failed)?;
        // Without CAP_NET_ADMIN the system's limit has to do: an overrun is noticed, not hidden.
        if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &BUFFER).map_err(|e| failed(e.into()))?;
        }
        if setsockopt(&socket, sockopt::SndBufForce, &BUFFER).is_err() {
            setsockopt(&socket, sockopt::SndBuf, &BUFFER).map_err(|e| failed(e.into()))?;
        }
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(SILENCE_S)).map_err(|e| failed(e.into()))?;
        Ok(Self { conversation: Conversation::new(Kernel { socket }), port_id })
    }

    /// The port id the kernel gave this socket.
    pub fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Sends one request (`NLM_F_REQUEST | NLM_F_ACK | flags`) and waits for its acknowledgement. `what` names it in
    /// errors. Returns the payloads (after nlmsghdr) of what the kernel answered besides, for example to `NLM_F_ECHO`.
    ///
    /// # Errors
    /// [`Error::Netlink`] with the kernel's errno and words (a refusal by the freeze has no words); [`Error::Io`] if the
    /// answer was lost or nothing was heard for 10 s.
    pub fn request(&mut self, what: &str, kind: u16, flags: u16, body: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.conversation.request(what, kind, flags, body)
    }

    /// Dumps, and returns the payload (after nlmsghdr) of every entry. A dump that was interrupted, truncated or
    /// overrun is asked for again, up to eight times.
    ///
    /// # Errors
    /// [`Error::IncompleteDump`] after that; [`Error::Netlink`] and [`Error::Io`] as for [`Socket::request`].
    pub fn dump(&mut self, what: &str, kind: u16, body: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.conversation.dump(what, kind, body)
    }

    /// As [`Socket::dump`], but each entry is given to `each` as it comes, with a result that is made `fresh` for every
    /// try: for tables too large to be kept.
    ///
    /// # Errors
    /// As [`Socket::dump`], and the first of `each`.
    pub fn dump_each<S>(
        &mut self,
        what: &str,
        kind: u16,
        body: &[u8],
        fresh: impl Fn() -> S,
        each: impl FnMut(&mut S, &[u8]) -> Result<()>,
    ) -> Result<S> {
        self.conversation.dump_each(what, kind, body, fresh, each)
    }

    /// Sends many requests of one kind in few sendmsg calls (at most 64 messages and 64 KiB each) and returns the
    /// errno of each, in order; None: it went well. Messages of a sendmsg that was refused as a whole all get its
    /// errno.
    ///
    /// # Errors
    /// [`Error::Io`] if answers were lost or nothing was heard for 10 s: then it is not known which requests went
    /// well.
    pub fn batch(&mut self, what: &str, kind: u16, bodies: &[Vec<u8>]) -> Result<Vec<Option<Errno>>> {
        Ok(self.exchange(what, kind, 0, bodies)?.into_iter().map(|answer| answer.errno).collect())
    }

    /// As [`Socket::batch`], with flags, and with the payloads the kernel answered to each request.
    ///
    /// # Errors
    /// As [`Socket::batch`].
    pub fn exchange(&mut self, what: &str, kind: u16, flags: u16, bodies: &[Vec<u8>]) -> Result<Vec<Answer>> {
        self.conversation.exchange(what, kind, flags, bodies)
    }
}

/// The kernel at the other end of a socket.
#[derive(Debug)]
struct Kernel {
    socket: netlink_sys::Socket,
}

impl Wire for Kernel {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        loop {
            match self.socket.send_to(datagram, &SocketAddr::new(0, 0), 0) {
                Ok(sent) if sent == datagram.len() => return Ok(()),
                Ok(sent) => {
                    return Err(io::Error::other(format!("{sent} of {} bytes sent", datagram.len())));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn recv(&mut self) -> io::Result<Datagram> {
        let mut bytes = Vec::with_capacity(RECEIVE);
        loop {
            bytes.clear();
            let (len, from) = match self.socket.recv_from(&mut bytes, libc::MSG_TRUNC) {
                Ok(received) => received,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("no answer in {SILENCE_S} s (socket {})", self.socket.as_raw_fd()),
                    ));
                }
                Err(e) => return Err(e),
            };
            // Any process may send to our port id; only the kernel has port id 0.
            if from.port_number() == 0 {
                return Ok(Datagram { truncated: len > bytes.len(), bytes });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attr::{AttrBuf, Attrs};
    use crate::netlink::{family, message, table};

    const NLCTRL: u16 = 16; // GENL_ID_CTRL
    const CTRL_CMD_GETFAMILY: u8 = 3;
    const CTRL_ATTR_FAMILY_ID: u16 = 1;
    const CTRL_ATTR_FAMILY_NAME: u16 = 2;

    fn get_family(name: &str) -> Vec<u8> {
        [&[CTRL_CMD_GETFAMILY, 1, 0, 0], AttrBuf::new().push_str(CTRL_ATTR_FAMILY_NAME, name).as_bytes()].concat()
    }

    #[test]
    fn the_running_kernel_answers_dumps_requests_and_batches() {
        let mut socket = Socket::open(Protocol::Generic).unwrap();
        let all = socket.dump("families", NLCTRL, &[CTRL_CMD_GETFAMILY, 1, 0, 0]).unwrap();
        assert!(!all.is_empty());
        let answers = socket.request("nlctrl", NLCTRL, 0, &get_family("nlctrl")).unwrap();
        let id = Attrs(&answers[0][4..]).find(CTRL_ATTR_FAMILY_ID).unwrap().unwrap().u16().unwrap();
        assert_eq!(id, NLCTRL);
        let absent = socket.request("no-such", NLCTRL, 0, &get_family("no-such")).unwrap_err();
        assert!(matches!(absent, Error::Netlink { errno: Errno::ENOENT, .. }), "{absent}");

        let mut bodies = vec![get_family("nlctrl"); 200];
        bodies[70] = get_family("no-such");
        let answers = socket.exchange("many", NLCTRL, 0, &bodies).unwrap();
        let failed: Vec<usize> = (0..200).filter(|i| answers[*i].errno.is_some()).collect();
        assert_eq!(failed, [70]);
        assert!(answers.iter().enumerate().all(|(i, a)| a.payloads.len() == usize::from(i != 70)));
    }

    #[test]
    fn the_socket_is_in_the_table_under_its_port_id() {
        let socket = Socket::open(Protocol::Route).unwrap();
        let rows = table::read().unwrap();
        let row = rows.iter().find(|row| row.protocol == 0 && row.port_id == socket.port_id()).unwrap();
        assert_eq!((row.rmem, row.drops), (0, 0));
        assert_eq!(table::read_of(std::process::id()).unwrap().iter().filter(|r| r.inode == row.inode).count(), 1);
    }

    #[test]
    fn families_are_found_by_name() {
        let families = family::families().unwrap();
        assert_eq!(families.get("nlctrl"), Some(&NLCTRL));
        assert!(!families.contains_key("no-such"));
    }

    /// Another process may send to our port id where it has CAP_NET_ADMIN; what it sends must not count.
    #[test]
    fn only_the_kernel_is_believed() {
        let mut socket = Socket::open(Protocol::Generic).unwrap();
        let liar = netlink_sys::Socket::new(Protocol::Generic as isize).unwrap();
        let mut lie = Vec::new();
        let refusal = [&(-libc::EPERM).to_ne_bytes()[..], &[0; message::HEADER]].concat();
        message::append(&mut lie, message::NLMSG_ERROR, 0, 1, &refusal);
        match liar.send_to(&lie, &SocketAddr::new(socket.port_id(), 0), 0) {
            Ok(_) => {
                let rows = table::read().unwrap();
                assert!(rows.iter().any(|r| r.port_id == socket.port_id() && r.rmem > 0), "the lie did not arrive");
            }
            // Without the capability the kernel itself refuses the lie.
            Err(e) => assert!(matches!(e.raw_os_error(), Some(libc::EPERM | libc::ECONNREFUSED)), "{e}"),
        }
        assert_eq!(socket.request("nlctrl", NLCTRL, 0, &get_family("nlctrl")).unwrap().len(), 1);
    }
}

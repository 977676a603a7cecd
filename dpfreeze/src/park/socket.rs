//! Upcall sockets: our own, and duplicates of those of a daemon.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::resource::{getrlimit, Resource};
use nix::sys::socket::{self, AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType};

use crate::error::{Error, Result};
use crate::netlink::table;

/// `SOL_NETLINK` (include/linux/socket.h)
const SOL_NETLINK: libc::c_int = 270;
/// `NETLINK_NO_ENOBUFS` (include/uapi/linux/netlink.h): an overrun socket does not stop taking messages until it is
/// empty (hazard 15).
const NETLINK_NO_ENOBUFS: libc::c_int = 5;
/// `SO_MEMINFO` (include/uapi/asm-generic/socket.h)
const SO_MEMINFO: libc::c_int = 55;
/// `SK_MEMINFO_VARS` and the indexes in it (include/uapi/linux/sock_diag.h)
const SK_MEMINFO_VARS: usize = 9;
const SK_MEMINFO_RMEM_ALLOC: usize = 0;
const SK_MEMINFO_RCVBUF: usize = 1;
const SK_MEMINFO_DROPS: usize = 8;

/// What the kernel says of a socket's receive queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Memory taken by unread messages, bytes, the kernel's overhead included.
    pub used: u32,
    /// How much it may take, bytes.
    pub limit: u32,
    /// Messages that found no room, ever.
    pub drops: u32,
}

/// A netlink socket that receives upcalls.
#[derive(Debug)]
pub struct UpcallSocket {
    fd: OwnedFd,
    port_id: u32,
}

impl UpcallSocket {
    /// Opens a socket that takes messages from the kernel alone, with room for `buffer` bytes of them (the kernel
    /// grants twice that).
    ///
    /// # Errors
    /// The socket cannot be made or bound, or its buffer not raised: that takes `CAP_NET_ADMIN`.
    pub fn open(buffer: usize) -> Result<Self> {
        let fail = |step: &'static str| {
            move |errno: Errno| match errno {
                Errno::EMFILE => too_many(format!("upcall socket: {step}")),
                errno => Error::io(format!("upcall socket: {step}"), errno),
            }
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkGeneric;
        let fd = socket::socket(AddressFamily::Netlink, SockType::Raw, flags, protocol).map_err(fail("socket"))?;
        socket::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(fail("bind"))?;
        // A connected netlink socket refuses what others than its peer, port id 0, send it (hazard 2).
        socket::connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(fail("connect to the kernel"))?;
        set_option(&fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, 1).map_err(fail("NETLINK_NO_ENOBUFS"))?;
        let socket = UpcallSocket::from_fd(fd)?;
        socket.raise_buffer(buffer)?;
        Ok(socket)
    }

    /// A socket that was opened before, by this process or another.
    ///
    /// # Errors
    /// The descriptor is no netlink socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let address = socket::getsockname::<NetlinkAddr>(fd.as_raw_fd())
            .map_err(|e| Error::io("upcall socket: its address cannot be read, it may be no netlink socket", e))?;
        Ok(UpcallSocket { fd, port_id: address.pid() })
    }

    /// Its netlink port id.
    pub fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Makes room for `buffer` bytes of messages, beyond the system's limit; never less than there was.
    ///
    /// # Errors
    /// `CAP_NET_ADMIN` is missing.
    pub fn raise_buffer(&self, buffer: usize) -> Result<()> {
        // The kernel keeps twice the value; an int must hold that.
        let wanted = buffer.min(1 << 30) as libc::c_int;
        if self.queue()?.limit / 2 >= wanted as u32 {
            return Ok(());
        }
        set_option(&self.fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, wanted).map_err(|e| {
            Error::io(format!("SO_RCVBUFFORCE of upcall socket {} (needs CAP_NET_ADMIN)", self.port_id), e)
        })
    }

    /// The state of its receive queue.
    ///
    /// # Errors
    /// getsockopt(2) failed.
    pub fn queue(&self) -> Result<Queue> {
        let mut info = [0u32; SK_MEMINFO_VARS];
        let mut len = std::mem::size_of_val(&info) as libc::socklen_t;
        // SAFETY: `info` is writable for `len` bytes, and both live through the call.
        let answer = unsafe {
            libc::getsockopt(self.fd.as_raw_fd(), libc::SOL_SOCKET, SO_MEMINFO, info.as_mut_ptr().cast(), &mut len)
        };
        Errno::result(answer).map_err(|e| Error::io(format!("SO_MEMINFO of upcall socket {}", self.port_id), e))?;
        Ok(Queue { used: info[SK_MEMINFO_RMEM_ALLOC], limit: info[SK_MEMINFO_RCVBUF], drops: info[SK_MEMINFO_DROPS] })
    }
}

impl AsFd for UpcallSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn set_option(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> nix::Result<()> {
    let len = std::mem::size_of_val(&value) as libc::socklen_t;
    // SAFETY: the option value is an int that lives through the call.
    let answer = unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const value).cast(), len) };
    Errno::result(answer).map(drop)
}

/// Duplicates of a process's netlink sockets: the sockets live on, with what is queued in them, when the process ends.
#[derive(Debug, Default)]
pub struct Duplicates {
    sockets: Vec<UpcallSocket>,
}

impl Duplicates {
    /// Duplicates those sockets of process `pid` that have one of `port_ids`. Port ids that are not the process's are
    /// left out: compare [`Duplicates::port_ids`] (hazard 2).
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel or a security policy refuses pidfd_getfd(2); [`Error::Io`] where the
    /// process is gone.
    pub fn of(pid: u32, port_ids: &[u32]) -> Result<Self> {
        let what = || format!("sockets of process {pid}");
        let process = open_process(pid)?;
        // Thousands of ports may have a socket each.
        let place: HashMap<u32, usize> = port_ids.iter().enumerate().rev().map(|(i, port_id)| (*port_id, i)).collect();
        let wanted: HashMap<u64, u32> = table::read_of(pid)?
            .into_iter()
            .filter(|row| row.protocol == libc::NETLINK_GENERIC as u32 && place.contains_key(&row.port_id))
            .map(|row| (row.inode, row.port_id))
            .collect();
        let mut sockets: Vec<UpcallSocket> = Vec::new();
        let mut found = HashSet::new();
        let folder = format!("/proc/{pid}/fd");
        for entry in fs::read_dir(&folder).map_err(|e| Error::io(what(), e))? {
            let entry = entry.map_err(|e| Error::io(what(), e))?;
            let Some(port_id) = table::socket_inode(&entry.path()).and_then(|inode| wanted.get(&inode)).copied() else {
                continue;
            };
            let Some(number) = entry.file_name().to_str().and_then(|s| s.parse().ok()) else { continue };
            // The same socket may be open twice, and a descriptor may be closed between the two looks.
            if found.contains(&port_id) {
                continue;
            }
            match duplicate(&process, number) {
                Ok(fd) => {
                    sockets.push(UpcallSocket { fd, port_id });
                    found.insert(port_id);
                }
                Err(Errno::EBADF) => {}
                Err(errno) => return Err(refused(pid, errno)),
            }
        }
        sockets.retain(UpcallSocket::is_what_it_should_be);
        sockets.sort_by_key(|s| place.get(&s.port_id).copied());
        Ok(Duplicates { sockets })
    }

    /// The port ids that were found, in the order in which they were asked for.
    pub fn port_ids(&self) -> Vec<u32> {
        self.sockets.iter().map(UpcallSocket::port_id).collect()
    }

    /// The sockets.
    pub fn sockets(&self) -> &[UpcallSocket] {
        &self.sockets
    }

    /// Raises the receive buffer of each to `buffer` bytes.
    ///
    /// # Errors
    /// As [`UpcallSocket::raise_buffer`].
    pub fn raise_buffers(&self, buffer: usize) -> Result<()> {
        self.sockets.iter().try_for_each(|s| s.raise_buffer(buffer))
    }

    /// The room that is left in the fullest, up to half of its buffer; `usize::MAX` without any socket.
    pub(super) fn headroom(&self) -> Result<usize> {
        let mut least = usize::MAX;
        for socket in &self.sockets {
            let queue = socket.queue()?;
            least = least.min((queue.limit / 2).saturating_sub(queue.used) as usize);
        }
        Ok(least)
    }

    /// Whether every queue is empty.
    pub(super) fn is_idle(&self) -> bool {
        self.sockets.iter().all(|s| s.queue().is_ok_and(|q| q.used == 0))
    }

    pub(super) fn into_sockets(self) -> Vec<UpcallSocket> {
        self.sockets
    }
}

impl UpcallSocket {
    /// Whether the descriptor still is the socket that was looked up: between the look and the duplication the process
    /// may have closed it and opened something else under its number.
    fn is_what_it_should_be(&self) -> bool {
        socket::getsockname::<NetlinkAddr>(self.fd.as_raw_fd()).is_ok_and(|a| a.pid() == self.port_id)
    }
}

fn open_process(pid: u32) -> Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers.
    let answer = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    let fd = Errno::result(answer).map_err(|e| Error::io(format!("pidfd_open of process {pid}"), e))?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn duplicate(process: &OwnedFd, number: libc::c_int) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_getfd(2) takes three integers.
    let answer = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    let fd = Errno::result(answer)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn refused(pid: u32, errno: Errno) -> Error {
    let what = format!("pidfd_getfd of process {pid}");
    match errno {
        Errno::EPERM | Errno::EACCES => Error::Unsupported {
            what,
            why: "the kernel refuses to duplicate another process's descriptors".into(),
            remedy: "run as root with CAP_SYS_PTRACE; lower kernel.yama.ptrace_scope below 3 (needs a reboot); \
                     set the SELinux boolean deny_ptrace off"
                .into(),
        },
        Errno::ENOSYS => {
            Error::Unsupported { what, why: "the kernel is older than 5.6".into(), remedy: "use a newer kernel".into() }
        }
        Errno::EMFILE => too_many(what),
        other => Error::io(what, io::Error::from(other)),
    }
}

/// This process has as many descriptors as it may have.
fn too_many(what: String) -> Error {
    let most = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    Error::Unsupported {
        what,
        why: format!("this process may have {most} descriptors, and has them"),
        remedy: "raise its limit of open files (`ulimit -n`, LimitNOFILE=), and fs.nr_open where that is lower".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_but_the_kernel_can_send_to_an_upcall_socket() {
        let Ok(ours) = UpcallSocket::open(1 << 16) else { return };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let other = socket::socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkGeneric).unwrap();
        socket::bind(other.as_raw_fd(), &NetlinkAddr::new(0, 0)).unwrap();
        let message = [&20u32.to_ne_bytes()[..], &[33, 0, 0, 0], &[0; 12]].concat();
        let to = NetlinkAddr::new(ours.port_id(), 0);
        let sent = socket::sendto(other.as_raw_fd(), &message, &to, socket::MsgFlags::empty());
        assert!(sent.is_err(), "{sent:?}");
        assert_eq!(ours.queue().unwrap().used, 0);
    }

    #[test]
    fn duplicates_of_our_own_sockets_are_found_by_port_id() {
        // As another user than root the buffer cannot be forced: then there is nothing to test with.
        let (Ok(a), Ok(b)) = (UpcallSocket::open(1 << 16), UpcallSocket::open(1 << 16)) else { return };
        let queue = a.queue().unwrap();
        assert_eq!((queue.used, queue.drops), (0, 0));
        assert!(queue.limit >= 1 << 16);
        let ours = std::process::id();
        match Duplicates::of(ours, &[b.port_id(), 1, a.port_id()]) {
            Ok(found) => {
                assert_eq!(found.port_ids(), [b.port_id(), a.port_id()]);
                found.raise_buffers(1 << 20).unwrap();
                assert_eq!(a.queue().unwrap().limit, 2 << 20);
                found.raise_buffers(1 << 10).unwrap();
                assert_eq!(a.queue().unwrap().limit, 2 << 20);
                assert_eq!(found.headroom().unwrap(), 1 << 20);
            }
            // Some sandboxes have no pidfd_getfd.
            Err(e) => assert!(matches!(e, Error::Unsupported { .. } | Error::Io { .. }), "{e}"),
        }
    }
}

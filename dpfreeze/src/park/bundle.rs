//! Many descriptors as one: in the receive queue of a socket that nobody reads until they are wanted again. systemd's file
//! descriptor store compares each descriptor that it is given with each that it has (kcmp(2)), and hands them on by name in
//! one variable of the environment: a thousand sockets, one by one, keep it busy for seconds.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    recvmsg, sendmsg, socketpair, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
};

use crate::error::{Error, Result};

/// `SCM_MAX_FD` (include/net/scm.h)
const MOST_IN_MESSAGE: usize = 253;

/// A socket that holds duplicates of `fds`, in their order, until [`unpack`].
///
/// # Errors
/// No socket can be made, or its buffer is full.
pub(super) fn pack(fds: &[BorrowedFd<'_>]) -> Result<OwnedFd> {
    let fail = |errno: Errno| Error::io(format!("keep {} sockets in one", fds.len()), errno);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (from, to) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).map_err(fail)?;
    for some in fds.chunks(MOST_IN_MESSAGE) {
        let raw: Vec<RawFd> = some.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(from.as_raw_fd(), &[IoSlice::new(b"+")], &rights, MsgFlags::MSG_NOSIGNAL, None).map_err(fail)?;
    }
    Ok(to)
}

/// Takes out what [`pack`] has put in.
///
/// # Errors
/// It is no such socket.
pub(super) fn unpack(from: &OwnedFd) -> Result<Vec<OwnedFd>> {
    let fail = |errno: Errno| Error::io("take kept sockets out of the one that holds them", errno);
    let mut all = Vec::new();
    loop {
        let mut byte = [0u8; 1];
        let mut room = nix::cmsg_space!([RawFd; MOST_IN_MESSAGE]);
        let mut into = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<()>(from.as_raw_fd(), &mut into, Some(&mut room), flags) {
            Ok(message) => message,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(fail(errno)),
        };
        for control in message.cmsgs().map_err(fail)? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel has just given us these descriptors.
                all.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        // The other end is closed: that was all.
        if message.bytes == 0 {
            return Ok(all);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn hundreds_of_descriptors_come_out_in_their_order_after_those_who_put_them_in_have_closed_theirs() {
        let files: Vec<File> = (0..600u32)
            .map(|i| {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(&i.to_ne_bytes()).unwrap();
                file
            })
            .collect();
        let packed = pack(&files.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
        drop(files);
        let numbers: Vec<u32> = unpack(&packed)
            .unwrap()
            .into_iter()
            .map(|fd| {
                let (mut file, mut bytes) = (File::from(fd), [0; 4]);
                file.rewind().unwrap();
                file.read_exact(&mut bytes).unwrap();
                u32::from_ne_bytes(bytes)
            })
            .collect();
        assert_eq!(numbers, (0..600).collect::<Vec<_>>());
        assert!(unpack(&packed).unwrap().is_empty());
        assert!(unpack(&pack(&[]).unwrap()).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_socket_is_an_error() {
        assert!(unpack(&OwnedFd::from(tempfile::tempfile().unwrap())).is_err());
    }
}

//! Raw generic netlink, so that no tool's own checks, ours least of all, stand between a scenario and the kernel.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{bail, Context, Result};

// linux/genetlink.h
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
// linux/openvswitch.h
pub(super) const OVS_FLOW_VERSION: u8 = 1;
// linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const HEADER: usize = 16;

/// An attribute, padded.
pub(super) fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = ((data.len() + 4) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A request that asks for an acknowledgement.
pub(super) fn message(family: u16, command: u8, version: u8, body: &[u8]) -> Vec<u8> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let mut bytes = ((HEADER + 4 + body.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend(family.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(1u32.to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend([command, version, 0, 0]);
    bytes.extend(body);
    bytes
}

/// A generic netlink socket.
pub(super) struct Socket(std::fs::File);

impl Socket {
    /// A new one, with a port id of the kernel's choice.
    pub fn open() -> Result<Self> {
        // SAFETY: plain system call; the descriptor is checked and owned at once.
        let raw = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_GENERIC) };
        if raw < 0 {
            return Err(std::io::Error::last_os_error()).context("cannot open a netlink socket");
        }
        // SAFETY: `raw` was just given to us and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: all zeroes is a valid sockaddr_nl, and asks the kernel for a port id.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as u16;
        // SAFETY: `address` lives through the call and its true size is given.
        let failed = unsafe {
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_nl>() as u32)
        };
        if failed != 0 {
            return Err(std::io::Error::last_os_error()).context("cannot bind a netlink socket");
        }
        Ok(Socket(socket.into()))
    }

    /// Its port id.
    pub fn port_id(&self) -> Result<u32> {
        // SAFETY: all zeroes is a valid sockaddr_nl.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        let mut length = size_of::<libc::sockaddr_nl>() as u32;
        // SAFETY: `address` lives through the call and its true size is given.
        let failed = unsafe { libc::getsockname(self.0.as_raw_fd(), (&raw mut address).cast(), &raw mut length) };
        if failed != 0 {
            return Err(std::io::Error::last_os_error()).context("getsockname");
        }
        Ok(address.nl_pid)
    }

    /// Sends a message; the first answer, or the error that sending gave (a refusal by a security hook shows there).
    pub fn ask(&mut self, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
        self.0.write_all(bytes)?;
        let mut answer = vec![0; 8192];
        let length = self.0.read(&mut answer)?;
        answer.truncate(length);
        Ok(answer)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// errno of an acknowledgement; 0 is success.
fn errno(answer: &[u8]) -> Option<i32> {
    if u16_at(answer, 4)? != NLMSG_ERROR {
        return None;
    }
    Some(-i32::from_ne_bytes(answer.get(HEADER..HEADER + 4)?.try_into().ok()?))
}

/// The id of generic netlink family `name`.
pub(super) fn family_id(socket: &mut Socket, name: &str) -> Result<u16> {
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    let body = attribute(CTRL_ATTR_FAMILY_NAME, &text);
    let answer = socket.ask(&message(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1, &body))?;
    // The acknowledgement is a second message that this socket still has to take.
    let mut rest = [0u8; 8192];
    let _ = socket.0.read(&mut rest)?;
    let mut at = HEADER + 4;
    while let (Some(length), Some(kind)) = (u16_at(&answer, at), u16_at(&answer, at + 2)) {
        if kind == CTRL_ATTR_FAMILY_ID {
            return u16_at(&answer, at + 4).context("a family id without a value");
        }
        if length < 4 {
            break;
        }
        at += usize::from(length).next_multiple_of(4);
    }
    bail!("no generic netlink family {name}")
}

/// Asks `socket`; the errno of the acknowledgement, or the one that sending gave; 0 is success.
pub(super) fn outcome(socket: &mut Socket, bytes: &[u8]) -> Result<i32> {
    match socket.ask(bytes) {
        Ok(answer) => errno(&answer).context("the kernel's answer is no acknowledgement"),
        Err(error) => error.raw_os_error().context("sending failed without an errno"),
    }
}

/// `struct ovs_header` of a message to the datapath `ovs-system`: its index.
pub(super) fn datapath() -> Vec<u8> {
    nix::net::if_::if_nametoindex("ovs-system").unwrap_or(3).to_ne_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_answers() {
        let bytes = message(0x1a, 4, 2, &attribute(8, &[1, 2, 3, 4, 5]));
        assert_eq!(bytes.len(), 16 + 4 + 12);
        assert_eq!(bytes[..4], 32u32.to_ne_bytes());
        let mut refused = message(NLMSG_ERROR, 0, 0, &[]);
        refused[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        assert_eq!(errno(&refused), Some(1));
        assert_eq!(errno(&bytes), None);
    }
}

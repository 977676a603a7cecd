//! `struct genlmsghdr` (linux/genetlink.h) and `struct ovs_header` (linux/openvswitch.h), which open every message.

use crate::error::{Error, Result};
use crate::netlink::attr::Attrs;

/// Bytes before the attributes: genlmsghdr {u8 cmd, u8 version, u16 reserved} and ovs_header {int dp_ifindex}.
pub(crate) const LEN: usize = 8;

/// A message of an OVS family, taken apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    /// `OVS_*_CMD_*`
    pub command: u8,
    /// The datapath: interface index of its local port, 0 where none is meant.
    pub ifindex: u32,
    pub attrs: Attrs<'a>,
}

/// Takes `payload` (what follows the nlmsghdr) apart.
pub(crate) fn parse<'a>(what: &str, payload: &'a [u8]) -> Result<Message<'a>> {
    let Some((head, attrs)) = payload.split_first_chunk::<LEN>() else {
        return Err(Error::malformed(what, format!("{} bytes, at least {LEN} belong", payload.len())));
    };
    let [command, _version, _, _, i0, i1, i2, i3] = *head;
    Ok(Message { command, ifindex: u32::from_ne_bytes([i0, i1, i2, i3]), attrs: Attrs(attrs) })
}

/// The bytes of a message: `attrs` behind the two headers.
pub(crate) fn build(command: u8, version: u8, ifindex: u32, attrs: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(LEN + attrs.len());
    bytes.extend_from_slice(&[command, version, 0, 0]);
    bytes.extend_from_slice(&ifindex.to_ne_bytes());
    bytes.extend_from_slice(attrs);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_taken_apart_as_it_was_built() {
        let bytes = build(3, 2, 0x01020304, &[4, 0, 9, 0]);
        let message = parse("it", &bytes).unwrap();
        assert_eq!((message.command, message.ifindex, message.attrs.0), (3, 0x01020304, &[4, 0, 9, 0][..]));
        assert!(parse("it", &bytes[..7]).is_err());
    }
}

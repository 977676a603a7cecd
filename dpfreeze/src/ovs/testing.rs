//! What the tests of the messages share.

use proptest::prelude::*;

use super::header;
use crate::netlink::attr::AttrBuf;

/// Attributes whose types no family of the datapath knows.
pub(crate) fn unknown() -> impl Strategy<Value = Vec<(u16, Vec<u8>)>> {
    prop::collection::vec((40u16..0x4000, prop::collection::vec(any::<u8>(), 0..20)), 0..5)
}

/// The bytes of `attrs`, in order.
pub(crate) fn bytes_of(attrs: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut buf = AttrBuf::new();
    for (kind, payload) in attrs {
        buf.push(*kind, payload);
    }
    buf.into_bytes()
}

/// A message of the kernel: `known` attributes with `unknown` ones before, between and behind them.
pub(crate) fn mixed(command: u8, ifindex: u32, known: &AttrBuf, unknown: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let known: Vec<_> = crate::netlink::attr::Attrs(known.as_bytes()).map(|a| a.expect("ours")).collect();
    let mut buf = AttrBuf::new();
    let mut others = unknown.iter();
    for attr in &known {
        if let Some((kind, payload)) = others.next() {
            buf.push(*kind, payload);
        }
        buf.push_attr(attr);
    }
    for (kind, payload) in others {
        buf.push(*kind, payload);
    }
    header::build(command, 1, ifindex, buf.as_bytes())
}

//! Short forms of keys and actions for logs, near to what `ovs-dpctl dump-flows` prints.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::actions::Cookie;
use super::uapi::{action, key, SAMPLE_ATTR_ACTIONS, USERSPACE_ATTR_USERDATA};
use crate::netlink::attr::{Attr, Attrs};

/// How deep nests are shown.
const MAX_DEPTH: u32 = 8;

/// A key on one line. What is not known or malformed is shown as such.
pub fn format_key(run: &[u8]) -> String {
    join(run, 0, key_attr)
}

/// Actions on one line. What is not known or malformed is shown as such; no actions are `drop`.
pub fn format_actions(run: &[u8]) -> String {
    if run.is_empty() {
        return "drop".into();
    }
    join(run, 0, action_attr)
}

fn join(run: &[u8], depth: u32, show: fn(&Attr<'_>, u32) -> String) -> String {
    if depth > MAX_DEPTH {
        return "...".into();
    }
    let parts: Vec<String> = Attrs(run)
        .map(|attr| attr.map_or_else(|_| "malformed".into(), |a| show(&a, depth)))
        .filter(|s| !s.is_empty())
        .collect();
    parts.join(",")
}

fn number(attr: &Attr<'_>) -> String {
    match *attr.payload {
        [a] => a.to_string(),
        [a, b] => u16::from_ne_bytes([a, b]).to_string(),
        [a, b, c, d] => u32::from_ne_bytes([a, b, c, d]).to_string(),
        _ => hex(attr.payload),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(32).fold(String::from("0x"), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

fn mac(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":")
}

fn ports(name: &str, attr: &Attr<'_>) -> String {
    match *attr.payload {
        [a, b, c, d] => format!("{name}({}->{})", u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])),
        _ => format!("{name}({})", hex(attr.payload)),
    }
}

fn ip(attr: &Attr<'_>) -> String {
    if let Ok([s0, s1, s2, s3, d0, d1, d2, d3, proto, _, _, frag]) = attr.fixed::<12>() {
        let (src, dst) = (Ipv4Addr::new(s0, s1, s2, s3), Ipv4Addr::new(d0, d1, d2, d3));
        return format!("ipv4({src}->{dst},proto={proto}{})", if frag == 0 { "" } else { ",frag" });
    }
    let side = |range: std::ops::Range<usize>| -> Option<Ipv6Addr> {
        Some(Ipv6Addr::from(<[u8; 16]>::try_from(attr.payload.get(range)?).ok()?))
    };
    match (side(0..16), side(16..32), attr.payload.get(36)) {
        (Some(src), Some(dst), Some(proto)) => format!("ipv6({src}->{dst},proto={proto})"),
        _ => hex(attr.payload),
    }
}

fn key_attr(attr: &Attr<'_>, depth: u32) -> String {
    match attr.kind {
        key::RECIRC_ID => format!("recirc_id({})", number(attr)),
        key::IN_PORT => format!("in_port({})", number(attr)),
        key::DP_HASH | key::PRIORITY | key::SKB_MARK | key::CT_MARK if attr.payload == [0; 4] => String::new(),
        key::DP_HASH => format!("dp_hash({})", hex(attr.payload)),
        key::PRIORITY => format!("skb_priority({})", number(attr)),
        key::SKB_MARK => format!("skb_mark({})", number(attr)),
        key::CT_STATE => format!("ct_state({})", number(attr)),
        key::CT_ZONE => format!("ct_zone({})", number(attr)),
        key::CT_MARK => format!("ct_mark({})", number(attr)),
        key::CT_LABELS if attr.payload.iter().all(|b| *b == 0) => String::new(),
        key::CT_LABELS => format!("ct_label({})", hex(attr.payload)),
        key::CT_ORIG_TUPLE_IPV4 => format!("ct_tuple4({})", hex(attr.payload)),
        key::CT_ORIG_TUPLE_IPV6 => format!("ct_tuple6({})", hex(attr.payload)),
        key::ETHERNET if attr.payload.len() == 12 => {
            format!("eth({}->{})", mac(&attr.payload[..6]), mac(&attr.payload[6..]))
        }
        key::ETHERTYPE => format!("eth_type({})", hex(attr.payload)),
        key::VLAN => match *attr.payload {
            [a, b] => format!("vlan({})", u16::from_be_bytes([a, b]) & 0x0fff),
            _ => format!("vlan({})", hex(attr.payload)),
        },
        key::ENCAP => format!("encap({})", join(attr.payload, depth + 1, key_attr)),
        key::TUNNEL => {
            format!("tunnel({})", join(attr.payload, depth + 1, |a, _| format!("{}={}", a.kind, hex(a.payload))))
        }
        key::IPV4 | key::IPV6 => ip(attr),
        key::TCP => ports("tcp", attr),
        key::UDP => ports("udp", attr),
        key::SCTP => ports("sctp", attr),
        key::TCP_FLAGS => format!("tcp_flags({})", hex(attr.payload)),
        key::ICMP => format!("icmp({})", hex(attr.payload)),
        key::ICMPV6 => format!("icmpv6({})", hex(attr.payload)),
        key::ARP => format!("arp({})", hex(attr.payload)),
        key::ND => "nd".into(),
        other => format!("key{other}({})", hex(attr.payload)),
    }
}

fn action_attr(attr: &Attr<'_>, depth: u32) -> String {
    let nested = |a: &Attr<'_>| join(a.payload, depth + 1, action_attr);
    match attr.kind {
        action::OUTPUT => number(attr),
        action::USERSPACE => {
            let data = attr.nested().find(USERSPACE_ATTR_USERDATA).ok().flatten();
            format!("userspace({:?})", Cookie::of(data.map(|d| d.payload)))
        }
        action::SET | action::SET_MASKED => {
            let kind = attr.nested().next().and_then(Result::ok).map(|a| a.kind);
            format!("set(key{})", kind.map_or_else(|| "?".into(), |k| k.to_string()))
        }
        action::PUSH_VLAN => "push_vlan".into(),
        action::POP_VLAN => "pop_vlan".into(),
        action::SAMPLE => {
            let inner = attr.nested().find(SAMPLE_ATTR_ACTIONS).ok().flatten();
            format!("sample({})", inner.map_or_else(String::new, |a| nested(&a)))
        }
        action::RECIRC => format!("recirc({})", number(attr)),
        action::HASH => "hash".into(),
        action::CT => ct(attr),
        action::TRUNC => format!("trunc({})", number(attr)),
        action::CT_CLEAR => "ct_clear".into(),
        action::METER => format!("meter({})", number(attr)),
        action::CLONE => format!("clone({})", nested(attr)),
        action::CHECK_PKT_LEN => "check_pkt_len".into(),
        action::DROP => "drop".into(),
        other => format!("action{other}"),
    }
}

fn ct(attr: &Attr<'_>) -> String {
    use super::uapi::ct;
    let parts: Vec<String> = attr
        .nested()
        .map_while(Result::ok)
        .filter_map(|a| match a.kind {
            ct::COMMIT | ct::FORCE_COMMIT => Some("commit".into()),
            ct::ZONE => Some(format!("zone={}", number(&a))),
            ct::NAT => Some("nat".into()),
            ct::TIMEOUT => Some(format!("timeout={}", a.string())),
            _ => None,
        })
        .collect();
    if parts.is_empty() {
        "ct".into()
    } else {
        format!("ct({})", parts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attr::AttrBuf;

    #[test]
    fn short_and_legible() {
        let mut k = AttrBuf::new();
        k.push_u32(key::RECIRC_ID, 0).push_u32(key::SKB_MARK, 0).push_u32(key::IN_PORT, 2);
        k.push(key::IPV4, &[10, 0, 0, 1, 10, 0, 0, 2, 17, 0, 64, 0]).push(key::UDP, &[0, 9, 0, 53]);
        assert_eq!(format_key(k.as_bytes()), "recirc_id(0),in_port(2),ipv4(10.0.0.1->10.0.0.2,proto=17),udp(9->53)");
        let mut zone = AttrBuf::new();
        zone.push(super::super::uapi::ct::COMMIT, &[]).push(super::super::uapi::ct::ZONE, &5u16.to_ne_bytes());
        let mut a = AttrBuf::new();
        a.push_nested(action::CT, &zone).push_u32(action::RECIRC, 3);
        assert_eq!(format_actions(a.as_bytes()), "ct(commit,zone=5),recirc(3)");
        assert_eq!(format_actions(&[]), "drop");
    }
}

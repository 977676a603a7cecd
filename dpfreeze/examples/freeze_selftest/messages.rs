//! The messages of the test, as the OVS daemons send them (linux/openvswitch.h, nfnetlink_cttimeout.h).

use dpfreeze::freeze::Families;
use dpfreeze::netlink::attr::AttrBuf;
use dpfreeze::netlink::Protocol;

/// No device has it: a message that passes is answered with ENODEV and harms nothing.
pub const GHOST: u32 = i32::MAX as u32 - 1;
/// In the scope as little as in the kernel.
pub const OTHER_GHOST: u32 = i32::MAX as u32 - 2;
pub const GHOST_NAME: &str = "ghost";
/// A guarded timeout policy that does not exist.
pub const POLICY: &str = "ovs_tp_ghost_tcp4";

/// One sendmsg.
#[derive(Clone, Debug)]
pub struct Sendmsg {
    pub protocol: Protocol,
    pub bytes: Vec<u8>,
}

impl Sendmsg {
    /// This one and then `other`, in one sendmsg.
    pub fn then(mut self, other: &Sendmsg) -> Sendmsg {
        self.bytes.extend_from_slice(&other.bytes);
        self
    }

    pub fn times(&self, count: usize) -> Sendmsg {
        Sendmsg { protocol: self.protocol, bytes: self.bytes.repeat(count) }
    }
}

fn message(protocol: Protocol, kind: u16, head: &[u8], attrs: &AttrBuf) -> Sendmsg {
    const NLM_F_REQUEST_ACK: u16 = 1 | 4;
    let body = [head, attrs.as_bytes()].concat();
    let mut bytes = Vec::new();
    bytes.extend((16 + body.len() as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    Sendmsg { protocol, bytes }
}

fn ovs(family: u16, command: u8, ifindex: u32, attrs: &AttrBuf) -> Sendmsg {
    let mut head = vec![command, 2, 0, 0];
    head.extend(ifindex.to_ne_bytes());
    message(Protocol::Generic, family, &head, attrs)
}

fn attrs(fill: impl FnOnce(&mut AttrBuf) -> &mut AttrBuf) -> AttrBuf {
    let mut attrs = AttrBuf::new();
    fill(&mut attrs);
    attrs
}

/// OVS_FLOW_ATTR_KEY of a frame of a made-up protocol: OVS_KEY_ATTR_{IN_PORT, ETHERNET, ETHERTYPE}.
fn flow_key() -> AttrBuf {
    attrs(|a| a.push_u32(3, 0).push(4, &[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]).push(6, &0x1234u16.to_be_bytes()))
}

const UFID: [u8; 16] = *b"freeze self-test";

pub fn flow_flush(f: Families, ifindex: u32) -> Sendmsg {
    ovs(f.flow, 2, ifindex, &AttrBuf::new())
}

/// No key and no UFID, but not empty: a flush as well.
pub fn flow_flush_in_disguise(f: Families, ifindex: u32) -> [Sendmsg; 2] {
    let flags_only = attrs(|a| a.push_u32(10, 7));
    let ufid_too_long = attrs(|a| a.push(9, &[1; 17]));
    [ovs(f.flow, 2, ifindex, &flags_only), ovs(f.flow, 2, ifindex, &ufid_too_long)]
}

pub fn flow_del(f: Families, ifindex: u32) -> Sendmsg {
    let attrs = attrs(|a| a.push(9, &UFID).push_u32(10, 7));
    ovs(f.flow, 2, ifindex, &attrs)
}

/// A probe's deletion: the UFID first, the key after it.
pub fn flow_del_probe(f: Families, ifindex: u32) -> Sendmsg {
    let attrs = attrs(|a| a.push(9, &UFID).push_nested(1, &flow_key()));
    ovs(f.flow, 2, ifindex, &attrs)
}

/// A probe's deletion with as many attributes before the key as the program looks at.
pub fn flow_del_long(f: Families, ifindex: u32) -> Sendmsg {
    let attrs = attrs(|a| {
        for _ in 0..15 {
            a.push(11, &[0; 4]);
        }
        a.push_nested(1, &flow_key())
    });
    ovs(f.flow, 2, ifindex, &attrs)
}

pub fn flow_set(f: Families, ifindex: u32) -> Sendmsg {
    flow_put(f, 4, ifindex)
}

pub fn flow_new(f: Families, ifindex: u32) -> Sendmsg {
    flow_put(f, 1, ifindex)
}

fn flow_put(f: Families, command: u8, ifindex: u32) -> Sendmsg {
    let attrs = attrs(|a| a.push(9, &UFID).push_nested(1, &flow_key()).push_nested(2, &AttrBuf::new()));
    ovs(f.flow, command, ifindex, &attrs)
}

pub fn dp_new(f: Families, name: &str) -> Sendmsg {
    let attrs = attrs(|a| a.push_str(1, name).push_u32(2, 0));
    ovs(f.datapath, 1, 0, &attrs)
}

pub fn dp_del(f: Families, ifindex: u32) -> Sendmsg {
    ovs(f.datapath, 2, ifindex, &AttrBuf::new())
}

pub fn dp_del_by_name(f: Families, name: &str) -> Sendmsg {
    ovs(f.datapath, 2, 0, &attrs(|a| a.push_str(1, name)))
}

/// What the daemon sends at its start: features, no port ids.
pub fn dp_set_features(f: Families, name: &str) -> Sendmsg {
    let attrs = attrs(|a| a.push_str(1, name).push_u32(5, 1));
    ovs(f.datapath, 4, 0, &attrs)
}

/// The binding of the upcalls as dpif_netlink_set_handler_pids() sends it.
pub fn dp_bind(f: Families, ifindex: u32, name: &str, features: u32, port_ids: &[u32]) -> Sendmsg {
    let ids: Vec<u8> = port_ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
    let attrs = attrs(|a| a.push_str(1, name).push_u32(5, features).push(8, &ids));
    ovs(f.datapath, 4, ifindex, &attrs)
}

/// Of a tunnel port, in the version that OVS uses.
pub fn vport_new(f: Families, ifindex: u32, name: &str) -> Sendmsg {
    let mut message = ovs(f.vport, 1, ifindex, &attrs(|a| a.push_u32(2, 4).push_str(3, name).push_u32(5, 0)));
    message.bytes[17] = 1;
    message
}

pub fn vport_del(f: Families, ifindex: u32, port_no: u32) -> Sendmsg {
    ovs(f.vport, 2, ifindex, &attrs(|a| a.push_u32(1, port_no)))
}

pub fn vport_set_upcall_pid(f: Families, ifindex: u32) -> Sendmsg {
    let attrs = attrs(|a| a.push_u32(1, 1).push_u32(5, 0));
    ovs(f.vport, 4, ifindex, &attrs)
}

pub fn meter_del(f: Families, ifindex: u32, id: u32) -> Sendmsg {
    ovs(f.meter, 3, ifindex, &attrs(|a| a.push_u32(1, id)))
}

pub fn ct_timeout_del(name: &str) -> Sendmsg {
    message(Protocol::Netfilter, 8 << 8 | 2, &[2, 0, 0, 0], &attrs(|a| a.push_str(1, name)))
}

/// Without a name: every policy that is not in use. Only ever sent while it is refused.
pub fn ct_timeout_del_all() -> Sendmsg {
    message(Protocol::Netfilter, 8 << 8 | 2, &[2, 0, 0, 0], &AttrBuf::new())
}

/// NFNL_MSG_BATCH_BEGIN, as nft sends it before any number of messages.
pub fn nft_batch_begin() -> Sendmsg {
    message(Protocol::Netfilter, 16, &[0, 0, 0, 10], &AttrBuf::new())
}

/// RTM_DELQDISC of the ingress (TC_H_INGRESS) or root (TC_H_ROOT) qdisc.
pub fn qdisc_del(ifindex: u32, parent: u32) -> Sendmsg {
    message(Protocol::Route, 37, &tcmsg(ifindex, parent), &attrs(|a| a.push_str(1, "ingress")))
}

/// RTM_GETTCLASS for all classes of a device.
pub fn class_dump(ifindex: u32) -> Sendmsg {
    const NLM_F_REQUEST_ACK_DUMP: u16 = 1 | 4 | 0x300;
    let mut message = message(Protocol::Route, 42, &tcmsg(ifindex, 0), &AttrBuf::new());
    message.bytes[6..8].copy_from_slice(&NLM_F_REQUEST_ACK_DUMP.to_ne_bytes());
    message
}

fn tcmsg(ifindex: u32, parent: u32) -> Vec<u8> {
    [0, ifindex, 0, parent, 0].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect()
}

/// Nothing is deleted by it: OVS_FLOW_CMD_GET of one flow.
pub fn flow_get(f: Families, ifindex: u32) -> Sendmsg {
    ovs(f.flow, 3, ifindex, &attrs(|a| a.push(9, &UFID)))
}

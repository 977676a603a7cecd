//! Packets that root gives to the datapath with actions of the scenario's choice (OVS_PACKET_CMD_EXECUTE): the kernel then
//! sends up what no rule of Open vSwitch makes it send up at the moment that is wanted. And a flow for them: ovs-dpctl
//! would be too slow.

use std::fmt::Display;

use anyhow::{bail, Result};

use super::netlink::{attribute, datapath, family_id, message, outcome, Socket, OVS_FLOW_VERSION};

// linux/openvswitch.h
const OVS_PACKET_VERSION: u8 = 1;
const OVS_PACKET_CMD_EXECUTE: u8 = 3;
const OVS_PACKET_ATTR_PACKET: u16 = 1;
const OVS_PACKET_ATTR_KEY: u16 = 2;
const OVS_PACKET_ATTR_ACTIONS: u16 = 3;
const OVS_FLOW_CMD_NEW: u8 = 1;
const OVS_FLOW_ATTR_KEY: u16 = 1;
const OVS_FLOW_ATTR_ACTIONS: u16 = 2;
const OVS_FLOW_ATTR_MASK: u16 = 7;
const OVS_FLOW_ATTR_UFID: u16 = 9;
const OVS_KEY_ATTR_IN_PORT: u16 = 3;
const OVS_KEY_ATTR_ETHERNET: u16 = 4;
const OVS_KEY_ATTR_ETHERTYPE: u16 = 6;
const OVS_KEY_ATTR_IPV4: u16 = 7;
const OVS_KEY_ATTR_RECIRC_ID: u16 = 20;
const OVS_ACTION_ATTR_USERSPACE: u16 = 2;
const OVS_ACTION_ATTR_RECIRC: u16 = 7;
const OVS_ACTION_ATTR_SET_MASKED: u16 = 11;
const OVS_ACTION_ATTR_TRUNC: u16 = 13;
const OVSP_LOCAL: u32 = 0;
const OVS_USERSPACE_ATTR_PID: u16 = 1;
const OVS_USERSPACE_ATTR_USERDATA: u16 = 2;
// linux/netlink.h
const NLA_F_NESTED: u16 = 1 << 15;

/// What the kernel is to do with the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injected {
    /// It goes on at this recirculation id.
    Recirculate(u32),
    /// It goes up with a cookie of this type (`enum user_action_cookie_type` of OVS), cut off to so many bytes.
    Userspace {
        /// Its type.
        cookie: u16,
        /// Bytes; 0 leaves it whole.
        cut_to: u32,
    },
}

impl Injected {
    fn actions(self) -> Vec<u8> {
        match self {
            Injected::Recirculate(id) => attribute(OVS_ACTION_ATTR_RECIRC, &id.to_ne_bytes()),
            Injected::Userspace { cookie, cut_to: 0 } => to_userspace(cookie),
            Injected::Userspace { cookie, cut_to } => {
                [attribute(OVS_ACTION_ATTR_TRUNC, &cut_to.to_ne_bytes()), to_userspace(cookie)].concat()
            }
        }
    }
}

fn to_userspace(cookie: u16) -> Vec<u8> {
    // struct user_action_cookie: the type comes first.
    let mut userdata = cookie.to_ne_bytes().to_vec();
    userdata.resize(32, 0);
    // With dispatch per CPU the kernel asks for a port id and does not look at it.
    let nest =
        [attribute(OVS_USERSPACE_ATTR_PID, &1u32.to_ne_bytes()), attribute(OVS_USERSPACE_ATTR_USERDATA, &userdata)];
    attribute(OVS_ACTION_ATTR_USERSPACE | NLA_F_NESTED, &nest.concat())
}

/// `struct ovs_key_ipv4`: source, destination; protocol, TOS, TTL, fragment.
fn ipv4(destination: [u8; 4], tos: u8, fragment: u8) -> Vec<u8> {
    [[0; 4], destination, [0, tos, 0, fragment]].concat()
}

/// A flow of IPv4 packets of the host itself to 10.9.0.99, which changes the TOS that it does not match, and goes on at
/// recirculation id `to`.
pub fn add_flow(to: u32) -> Result<()> {
    let matched = |recirc: u32, port: u32, ethertype: u16, ip: &[u8]| {
        [
            attribute(OVS_KEY_ATTR_RECIRC_ID, &recirc.to_ne_bytes()),
            attribute(OVS_KEY_ATTR_IN_PORT, &port.to_ne_bytes()),
            attribute(OVS_KEY_ATTR_ETHERNET, &[0; 12]),
            attribute(OVS_KEY_ATTR_ETHERTYPE, &ethertype.to_be_bytes()),
            attribute(OVS_KEY_ATTR_IPV4, ip),
        ]
        .concat()
    };
    let tos = [ipv4([0; 4], 4, 0), ipv4([0; 4], 0xfc, 0)].concat();
    let actions = [
        attribute(OVS_ACTION_ATTR_SET_MASKED | NLA_F_NESTED, &attribute(OVS_KEY_ATTR_IPV4, &tos)),
        attribute(OVS_ACTION_ATTR_RECIRC, &to.to_ne_bytes()),
    ];
    let key = matched(0, OVSP_LOCAL, 0x0800, &ipv4([10, 9, 0, 99], 0, 0));
    let mask = matched(u32::MAX, u32::MAX, u16::MAX, &ipv4([0xff; 4], 0, 0xff));
    let body = [
        datapath(),
        attribute(OVS_FLOW_ATTR_KEY | NLA_F_NESTED, &key),
        attribute(OVS_FLOW_ATTR_MASK | NLA_F_NESTED, &mask),
        attribute(OVS_FLOW_ATTR_ACTIONS | NLA_F_NESTED, &actions.concat()),
        // As every flow that a daemon forwards with.
        attribute(OVS_FLOW_ATTR_UFID, &[9; 16]),
    ];
    let mut socket = Socket::open()?;
    let family = family_id(&mut socket, "ovs_flow")?;
    let bytes = message(family, OVS_FLOW_CMD_NEW, OVS_FLOW_VERSION, &body.concat());
    accepted(&mut socket, &bytes, "the flow")
}

fn accepted(socket: &mut Socket, bytes: &[u8], what: impl Display) -> Result<()> {
    match outcome(socket, bytes)? {
        0 => Ok(()),
        errno => bail!("the kernel refuses {what}: {}", std::io::Error::from_raw_os_error(errno)),
    }
}

/// A UDP packet of 100 bytes that nobody waits for.
fn packet() -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 9, 9, 2, 0, 0, 0, 9, 8, 8, 0];
    bytes.extend([0x45, 0, 0, 86, 0, 1, 0, 0, 64, 17, 0, 0, 10, 9, 0, 98, 10, 9, 0, 99]);
    bytes.extend([0x30, 0x39, 0x30, 0x3a, 0, 66, 0, 0]);
    bytes.resize(100, 0);
    bytes
}

/// Injects `count` packets as if they had come from the host itself.
pub fn inject(what: Injected, count: u64) -> Result<()> {
    let mut socket = Socket::open()?;
    let family = family_id(&mut socket, "ovs_packet")?;
    let body = [
        datapath(),
        attribute(OVS_PACKET_ATTR_PACKET, &packet()),
        attribute(OVS_PACKET_ATTR_KEY | NLA_F_NESTED, &attribute(OVS_KEY_ATTR_IN_PORT, &OVSP_LOCAL.to_ne_bytes())),
        attribute(OVS_PACKET_ATTR_ACTIONS | NLA_F_NESTED, &what.actions()),
    ];
    let bytes = message(family, OVS_PACKET_CMD_EXECUTE, OVS_PACKET_VERSION, &body.concat());
    (0..count).try_for_each(|_| accepted(&mut socket, &bytes, format_args!("to execute {what:?}")))
}

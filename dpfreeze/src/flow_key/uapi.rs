//! Numbers of include/uapi/linux/openvswitch.h, and of OVS's own userspace cookies (lib/odp-util.h).

/// `enum ovs_key_attr`
pub mod key {
    #![allow(missing_docs)] // The names are those of the header.
    pub const ENCAP: u16 = 1;
    pub const PRIORITY: u16 = 2;
    pub const IN_PORT: u16 = 3;
    pub const ETHERNET: u16 = 4;
    pub const VLAN: u16 = 5;
    pub const ETHERTYPE: u16 = 6;
    pub const IPV4: u16 = 7;
    pub const IPV6: u16 = 8;
    pub const TCP: u16 = 9;
    pub const UDP: u16 = 10;
    pub const ICMP: u16 = 11;
    pub const ICMPV6: u16 = 12;
    pub const ARP: u16 = 13;
    pub const ND: u16 = 14;
    pub const SKB_MARK: u16 = 15;
    pub const TUNNEL: u16 = 16;
    pub const SCTP: u16 = 17;
    pub const TCP_FLAGS: u16 = 18;
    pub const DP_HASH: u16 = 19;
    pub const RECIRC_ID: u16 = 20;
    pub const MPLS: u16 = 21;
    pub const CT_STATE: u16 = 22;
    pub const CT_ZONE: u16 = 23;
    pub const CT_MARK: u16 = 24;
    pub const CT_LABELS: u16 = 25;
    pub const CT_ORIG_TUPLE_IPV4: u16 = 26;
    pub const CT_ORIG_TUPLE_IPV6: u16 = 27;
    pub const NSH: u16 = 28;
    pub const IPV6_EXTHDRS: u16 = 32;
}

/// `enum ovs_action_attr` (DROP and PSAMPLE from kernels 6.6 and 6.11)
pub mod action {
    #![allow(missing_docs)]
    pub const OUTPUT: u16 = 1;
    pub const USERSPACE: u16 = 2;
    pub const SET: u16 = 3;
    pub const PUSH_VLAN: u16 = 4;
    pub const POP_VLAN: u16 = 5;
    pub const SAMPLE: u16 = 6;
    pub const RECIRC: u16 = 7;
    pub const HASH: u16 = 8;
    pub const PUSH_MPLS: u16 = 9;
    pub const POP_MPLS: u16 = 10;
    pub const SET_MASKED: u16 = 11;
    pub const CT: u16 = 12;
    pub const TRUNC: u16 = 13;
    pub const PUSH_ETH: u16 = 14;
    pub const POP_ETH: u16 = 15;
    pub const CT_CLEAR: u16 = 16;
    pub const PUSH_NSH: u16 = 17;
    pub const POP_NSH: u16 = 18;
    pub const METER: u16 = 19;
    pub const CLONE: u16 = 20;
    pub const CHECK_PKT_LEN: u16 = 21;
    pub const ADD_MPLS: u16 = 22;
    pub const DEC_TTL: u16 = 23;
    pub const DROP: u16 = 24;
    pub const PSAMPLE: u16 = 25;
}

/// `enum ovs_ct_attr`
pub mod ct {
    #![allow(missing_docs)]
    pub const COMMIT: u16 = 1;
    pub const ZONE: u16 = 2;
    pub const NAT: u16 = 6;
    pub const FORCE_COMMIT: u16 = 7;
    pub const TIMEOUT: u16 = 9;
}

/// `OVS_CS_F_*`: bits of `OVS_KEY_ATTR_CT_STATE`
pub mod ct_state {
    #![allow(missing_docs)]
    pub const TRACKED: u32 = 0x20;
    pub const SRC_NAT: u32 = 0x40;
    pub const DST_NAT: u32 = 0x80;
    /// Either translation was done by the last `ct`.
    pub const NAT: u32 = SRC_NAT | DST_NAT;
}

/// `OVS_SAMPLE_ATTR_ACTIONS`
pub const SAMPLE_ATTR_ACTIONS: u16 = 2;
/// `OVS_USERSPACE_ATTR_PID`
pub const USERSPACE_ATTR_PID: u16 = 1;
/// `OVS_USERSPACE_ATTR_USERDATA`
pub const USERSPACE_ATTR_USERDATA: u16 = 2;
/// `OVS_CHECK_PKT_LEN_ATTR_ACTIONS_IF_GREATER`
pub const CHECK_PKT_LEN_ATTR_GREATER: u16 = 2;
/// `OVS_CHECK_PKT_LEN_ATTR_ACTIONS_IF_LESS_EQUAL`
pub const CHECK_PKT_LEN_ATTR_LESS_EQUAL: u16 = 3;
/// `OVS_DEC_TTL_ATTR_ACTION`
pub const DEC_TTL_ATTR_ACTION: u16 = 1;

/// `enum user_action_cookie_type` of OVS 2.13 to 3.7 (lib/odp-util.h): the first u16 of a cookie.
pub mod cookie {
    #![allow(missing_docs)]
    pub const UNSPEC: u16 = 0;
    pub const SFLOW: u16 = 1;
    pub const SLOW_PATH: u16 = 2;
    pub const FLOW_SAMPLE: u16 = 3;
    pub const IPFIX: u16 = 4;
    pub const CONTROLLER: u16 = 5;
}

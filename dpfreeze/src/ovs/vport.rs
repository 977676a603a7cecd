//! Ports of a datapath: family `ovs_vport`.

use serde::{Deserialize, Serialize};

use super::header;
use crate::bytes::hex;
use crate::error::{Error, Result};
use crate::netlink::attr::{Attr, AttrBuf};

// enum ovs_vport_cmd
pub(crate) const VERSION: u8 = 1; // OVS_VPORT_VERSION
pub(crate) const CMD_DEL: u8 = 2;
pub(crate) const CMD_GET: u8 = 3;
pub(crate) const CMD_SET: u8 = 4;
// enum ovs_vport_attr
pub(crate) const ATTR_PORT_NO: u16 = 1;
const ATTR_TYPE: u16 = 2;
const ATTR_NAME: u16 = 3;
const ATTR_OPTIONS: u16 = 4;
pub(crate) const ATTR_UPCALL_PID: u16 = 5;
const ATTR_STATS: u16 = 6;
const ATTR_PAD: u16 = 7;
const ATTR_IFINDEX: u16 = 8;
const ATTR_NETNSID: u16 = 9;

/// `enum ovs_vport_type` by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VportKind {
    /// A network device.
    Netdev,
    /// A device the datapath implements itself.
    Internal,
    /// A GRE tunnel.
    Gre,
    /// A VXLAN tunnel.
    Vxlan,
    /// A Geneve tunnel.
    Geneve,
    /// Another kind, by its number.
    Other(u32),
}

/// `struct ovs_vport_stats`: counts since the port was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are the header's own
pub struct VportStats {
    pub rx_packets: u64,
    pub tx_packets: u64,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub rx_errors: u64,
    pub tx_errors: u64,
    pub rx_dropped: u64,
    pub tx_dropped: u64,
}

/// A port of a datapath.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vport {
    /// The datapath.
    pub dp_ifindex: u32,
    /// Number in the datapath.
    pub port_no: u32,
    /// `OVS_VPORT_TYPE_*`; see [`Vport::kind`].
    #[serde(rename = "type")]
    pub kind: u32,
    /// Name; for a port made of a network device, the name of that device.
    pub name: String,
    /// Port ids its upcalls go to in per-vport mode; `[0]` means none.
    pub upcall_pids: Vec<u32>,
    /// Counters.
    pub stats: VportStats,
    /// `OVS_VPORT_ATTR_OPTIONS`: the attributes in it, as sent (tunnels only).
    #[serde(with = "hex")]
    pub options: Vec<u8>,
    /// Interface index of the device, where the kernel tells it.
    pub ifindex: Option<u32>,
    /// Network namespace of the device, where it is another one.
    pub netnsid: Option<i32>,
    /// Attributes this library does not know, as sent.
    #[serde(with = "hex")]
    pub unknown: Vec<u8>,
}

impl Vport {
    /// Reads an `OVS_VPORT_CMD_NEW` message, `payload` being what follows the nlmsghdr.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the message is cut off or has no name or number.
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let message = header::parse("ovs_vport", payload)?;
        let mut vport = Vport { dp_ifindex: message.ifindex, ..Default::default() };
        let mut unknown = AttrBuf::new();
        let mut port_no = None;
        for attr in message.attrs {
            let attr = attr?;
            match attr.kind {
                ATTR_PORT_NO => port_no = Some(attr.u32()?),
                ATTR_TYPE => vport.kind = attr.u32()?,
                ATTR_NAME => vport.name = attr.string(),
                ATTR_OPTIONS => vport.options = attr.payload.to_vec(),
                ATTR_UPCALL_PID => vport.upcall_pids = attr.u32s()?,
                ATTR_STATS => vport.stats = stats(&attr)?,
                ATTR_PAD => {}
                ATTR_IFINDEX => vport.ifindex = Some(attr.u32()?),
                ATTR_NETNSID => vport.netnsid = Some(i32::from_ne_bytes(attr.fixed()?)),
                _ => {
                    unknown.push_attr(&attr);
                }
            }
        }
        vport.port_no = port_no.ok_or_else(|| Error::malformed("ovs_vport", "no port number"))?;
        if vport.name.is_empty() {
            return Err(Error::malformed("ovs_vport", "no name"));
        }
        vport.unknown = unknown.into_bytes();
        Ok(vport)
    }

    /// The kind by name.
    pub fn kind(&self) -> VportKind {
        match self.kind {
            1 => VportKind::Netdev,
            2 => VportKind::Internal,
            3 => VportKind::Gre,
            4 => VportKind::Vxlan,
            5 => VportKind::Geneve,
            other => VportKind::Other(other),
        }
    }
}

fn stats(attr: &Attr<'_>) -> Result<VportStats> {
    let [rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped] = attr.u64s()?;
    Ok(VportStats { rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{bytes_of, mixed, unknown};
    use super::*;

    proptest! {
        #[test]
        fn nothing_is_lost(port_no: u32, kind: u32, pids in prop::collection::vec(any::<u32>(), 1..9), n: [u64; 8], netnsid: i32, other in unknown()) {
            let mut attrs = AttrBuf::new();
            attrs.push_u32(ATTR_PORT_NO, port_no).push_u32(ATTR_TYPE, kind).push_str(ATTR_NAME, "vxlan_sys_4789");
            attrs.push(ATTR_OPTIONS, &[6, 0, 1, 0, 0xb5, 0x12, 0, 0]);
            attrs.push(ATTR_UPCALL_PID, &pids.iter().flat_map(|p| p.to_ne_bytes()).collect::<Vec<_>>());
            attrs.push(ATTR_STATS, &n.map(u64::to_ne_bytes).concat()).push(ATTR_PAD, &[]);
            attrs.push_u32(ATTR_IFINDEX, 8).push(ATTR_NETNSID, &netnsid.to_ne_bytes());
            let expected = Vport {
                dp_ifindex: 5,
                port_no,
                kind,
                name: "vxlan_sys_4789".into(),
                upcall_pids: pids,
                stats: VportStats { rx_packets: n[0], tx_packets: n[1], rx_bytes: n[2], tx_bytes: n[3], rx_errors: n[4], tx_errors: n[5], rx_dropped: n[6], tx_dropped: n[7] },
                options: vec![6, 0, 1, 0, 0xb5, 0x12, 0, 0],
                ifindex: Some(8),
                netnsid: Some(netnsid),
                unknown: bytes_of(&other),
            };
            let read = Vport::parse(&mixed(1, 5, &attrs, &other)).unwrap();
            prop_assert_eq!(&read, &expected);
            let json = serde_json::to_string(&read).unwrap();
            prop_assert_eq!(serde_json::from_str::<Vport>(&json).unwrap(), expected);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = Vport::parse(&bytes);
        }
    }

    #[test]
    fn a_port_without_number_or_name_is_an_error() {
        let mut attrs = AttrBuf::new();
        assert!(Vport::parse(&header::build(1, 1, 5, attrs.push_str(ATTR_NAME, "v1").as_bytes())).is_err());
        let mut attrs = AttrBuf::new();
        assert!(Vport::parse(&header::build(1, 1, 5, attrs.push_u32(ATTR_PORT_NO, 1).as_bytes())).is_err());
    }
}

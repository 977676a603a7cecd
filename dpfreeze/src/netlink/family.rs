//! Ids of generic netlink families.
//!
//! The ids are dynamic and change when a module is loaded again. They are taken from a dump of *all* families, because
//! a question for one name makes the kernel load the module behind it (`ctrl_getfamily`), and a look must change
//! nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use netlink_packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_generic::ctrl::{nlas::GenlCtrlAttrs, GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::GenlMessage;

use crate::error::{Error, Result};

const WHAT: &str = "CTRL_CMD_GETFAMILY";
/// The kernel answers at once; netlink-proto is silent about an answer it cannot read.
const LIMIT: Duration = Duration::from_secs(5);

/// Every generic family that is registered, by name.
///
/// # Errors
/// [`Error::Io`] if there is no answer within 5 s or it cannot be read.
pub fn families() -> Result<BTreeMap<String, u16>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|e| Error::io(WHAT, e))?;
    runtime.block_on(async {
        tokio::time::timeout(LIMIT, dump())
            .await
            .map_err(|_| Error::io(WHAT, std::io::Error::from(std::io::ErrorKind::TimedOut)))?
    })
}

async fn dump() -> Result<BTreeMap<String, u16>> {
    let other = |e: &dyn std::fmt::Display| Error::io(WHAT, std::io::Error::other(e.to_string()));
    let (connection, mut handle, _unsolicited) = genetlink::new_connection().map_err(|e| Error::io(WHAT, e))?;
    let connection = tokio::spawn(connection);
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let ask = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![] });
    let mut answers = handle.request(NetlinkMessage::new(header, ask.into())).await.map_err(|e| other(&e))?;
    let mut found = BTreeMap::new();
    while let Some(answer) = answers.next().await {
        match answer.map_err(|e| other(&e))?.payload {
            NetlinkPayload::InnerMessage(message) => found.extend(name_and_id(&message.payload.nlas)),
            NetlinkPayload::Error(e) => return Err(Error::io(WHAT, e.to_io())),
            _ => {}
        }
    }
    connection.abort();
    Ok(found)
}

fn name_and_id(attributes: &[GenlCtrlAttrs]) -> Option<(String, u16)> {
    let name = attributes.iter().find_map(|a| match a {
        GenlCtrlAttrs::FamilyName(name) => Some(name.clone()),
        _ => None,
    })?;
    let id = attributes.iter().find_map(|a| match a {
        GenlCtrlAttrs::FamilyId(id) => Some(*id),
        _ => None,
    })?;
    Some((name, id))
}

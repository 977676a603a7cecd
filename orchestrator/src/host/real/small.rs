//! Meters and TLV map, which no bundle takes, over one connection to the bridge: a process for each of hundreds would take
//! seconds just while packets wait.
//!
//! OpenFlow 1.3 to 1.5: METER_MOD (A.3.4.5), ERROR (A.4.4); NXT_TLV_TABLE_MOD as in include/openflow/nicira-ext.h.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::connection::Connection;
use super::giving::{code, name, version_of};
use super::messages::{self, barrier, header, kind, numbered, xid, ERROR, HEADER};
use super::openflow::RealOpenFlow;
use super::told;
use crate::host::{BridgeRules, RefusedRule, Result};

/// OFPMC_MODIFY.
const MODIFY: [u8; 2] = [0, 1];
/// `OFPET_METER_MOD_FAILED` with `OFPMMFC_METER_EXISTS` or `OFPMMFC_UNKNOWN_METER` (A.4.4).
const ALREADY_THERE: [u8; 4] = [0, 12, 0, 1];
const NOT_YET_THERE: [u8; 4] = [0, 12, 0, 3];

/// Gives the bridge behind `socket` the meters and the TLV map of `rules`, whether it has them already or not. Returns those
/// that it refuses.
pub fn put(openflow: &RealOpenFlow, rules: &BridgeRules, socket: &Path, until: Instant) -> Result<Vec<RefusedRule>> {
    let messages = &rules.messages;
    if messages.meters.each().next().is_none() && messages.tlv_map.each().next().is_none() {
        return Ok(Vec::new());
    }
    let mut connection = Connection::open(socket, &[version_of(&rules.protocol)], until)?;
    let there = match messages.tlv_map.each().next() {
        Some(_) => told::tlv_map(&mut connection, until)?,
        None => Vec::new(),
    };
    let (mut stream, mut texts) = (Vec::new(), Vec::new());
    for (message, text) in messages.meters.each().zip(&rules.meters) {
        texts.push(("meter", text));
        let add = numbered(message, number(texts.len()));
        let mut modify = add.clone();
        modify.get_mut(HEADER..HEADER + MODIFY.len()).into_iter().for_each(|command| command.copy_from_slice(&MODIFY));
        // One of the two fails: the meter is there, or not yet.
        stream.extend([modify, add].concat());
    }
    for (message, text) in messages.tlv_map.each().zip(&rules.tlv_map) {
        texts.push(("tlv-map", text));
        if there.iter().all(|there| there.get(HEADER..) != message.get(HEADER..)) {
            stream.extend(numbered(message, number(texts.len())));
        }
    }
    let last = connection.next_xid();
    stream.extend(header(connection.version(), barrier(connection.version()).0, last));
    let mut errors: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    connection.exchange(&stream, "giving it meters and TLV map", until, |message| {
        match (kind(message), xid(message)) {
            (Some(ERROR), Some(xid)) if ![ALREADY_THERE, NOT_YET_THERE].iter().any(|code_| code(message) == code_) => {
                errors.insert(xid, message.to_vec());
            }
            _ => return Ok(messages::is_barrier_reply(message)),
        }
        Ok(false)
    })?;
    let names = openflow.names_of(errors.values(), until);
    let refused = errors.iter().filter_map(|(xid, error)| {
        let (kind, rule) = texts.get(usize::try_from(*xid).ok()?.checked_sub(1)?)?;
        let (bridge, kind, rule) = (rules.bridge.clone(), (*kind).to_owned(), (*rule).clone());
        Some(RefusedRule { bridge, kind, rule, reason: name(&names, error) })
    });
    Ok(refused.collect())
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

//! What bridges know besides rules and addresses: read from one ovs-vswitchd, given to another.
//!
//! Port flags (`OFPT_PORT_MOD`), fragments (`OFPT_SET_CONFIG`) and tables (`OFPT_TABLE_MOD`) over the management socket;
//! structures as in include/openflow/openflow-1.0.h to openflow-1.5.h, numbers in network order. Multicast groups by
//! `mdb/show`, and taught by reports (see [`super::multicast`]).

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde_json::{json, Value};

use super::exchange::{exchange, Request};
use super::messages::in_words;
use super::openflow::RealOpenFlow;
use super::parallel::side_by_side;
use super::{multicast, unixctl};
use crate::host::{Bridge, BridgeState, Daemon, Result, StateItem, PORT_FLAGS};

/// `OFPT_GET_CONFIG_REQUEST`, `OFPT_GET_CONFIG_REPLY`, `OFPT_SET_CONFIG`.
const GET_CONFIG: u8 = 7;
const CONFIG: u8 = 8;
const SET_CONFIG: u8 = 9;
/// `OFPC_FRAG_MASK`.
const FRAGMENTS: u16 = 3;
/// `OFPT_TABLE_MOD` from OpenFlow 1.1 on.
const TABLE_MOD: u8 = 17;
/// `OFPMP_TABLE`, `OFPMP_PORT_DESC`, `OFPMP_TABLE_DESC`.
const TABLES: u16 = 3;
const PORTS: u16 = 13;
const TABLE_DESC: u16 = 14;
/// `OFPTC11_TABLE_MISS_MASK`.
const MISS: u32 = 3;
/// `OFPTMPT14_VACANCY`.
const VACANCY: u16 = 3;
/// `OFPPC_NO_RECV`, `OFPPC_NO_FWD` and `OFPPC_NO_PACKET_IN`, which alone are in OpenFlow 1.1 and later.
const LATER_FLAGS: u32 = 1 << 2 | 1 << 5 | 1 << 6;
/// All that OpenFlow sets on a port.
fn all_flags() -> u32 {
    PORT_FLAGS.iter().fold(0, |all, (bit, _)| all | bit)
}

/// What the body of a reply tells.
type Parse = fn(&[u8]) -> Vec<StateItem>;
/// The body of the message that makes an item true.
type Encode = fn(&StateItem) -> Option<Vec<u8>>;

/// A port as a bridge describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PortDesc {
    number: u32,
    address: [u8; 6],
    name: String,
    config: u32,
}

/// What each of `bridges` knows, in their order, as `daemon` has it.
pub(super) fn read(
    openflow: &RealOpenFlow,
    daemon: &Daemon,
    bridges: &[Bridge],
    until: Instant,
) -> Result<Vec<BridgeState>> {
    let mut groups = groups(daemon, bridges, until)?;
    let told = side_by_side(bridges, |bridge| told(openflow, bridge, until))?;
    let state = |(bridge, told): (&Bridge, Vec<StateItem>)| BridgeState {
        bridge: bridge.name.clone(),
        items: told.into_iter().chain(groups.remove(&bridge.name).unwrap_or_default()).collect(),
    };
    Ok(bridges.iter().zip(told).map(state).collect())
}

/// Gives `daemon` what the bridges of `wanted` knew.
pub(super) fn give(
    openflow: &RealOpenFlow,
    daemon: &Daemon,
    bridges: &[Bridge],
    wanted: &[BridgeState],
    until: Instant,
) -> Result<()> {
    let of = |state: &BridgeState| bridges.iter().find(|bridge| bridge.name == state.bridge);
    let known: Vec<(&Bridge, &BridgeState)> =
        wanted.iter().filter(|state| !state.items.is_empty()).filter_map(|state| Some((of(state)?, state))).collect();
    side_by_side(&known, |(bridge, state)| tell(openflow, bridge, state, until))?;
    for (bridge, state) in known {
        multicast::teach(daemon, bridge, &state.items, until)?;
    }
    Ok(())
}

/// Does the bridge speak this version, as far as the database says?
fn speaks(bridge: &Bridge, version: u8) -> bool {
    let name = format!("OpenFlow1{}", version.saturating_sub(1));
    bridge.protocols.is_empty() || bridge.protocols.contains(&name)
}

/// The first of `versions` that the bridge speaks.
fn first_spoken(bridge: &Bridge, versions: &[u8]) -> Option<u8> {
    versions.iter().copied().find(|version| speaks(bridge, *version))
}

/// Flags that OpenFlow 1.0 alone knows are told by it alone.
const FOR_PORTS: [u8; 6] = [1, 6, 5, 4, 3, 2];
/// Since 1.4 tables have eviction and vacancy.
const FOR_TABLES: [u8; 2] = [6, 5];
/// Misses are configured in 1.1 and 1.2; what a bridge tells in 1.1 is not what it takes
/// (`ofputil_put_ofp11_table_stats`, lib/ofp-table.c).
const FOR_MISSES: [u8; 1] = [3];

/// The groups and routers of those bridges that snoop, by name.
fn groups(daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<BTreeMap<String, Vec<StateItem>>> {
    let snooping: Vec<&Bridge> = bridges.iter().filter(|bridge| bridge.snoops).collect();
    if snooping.is_empty() {
        return Ok(BTreeMap::new());
    }
    let questions: Vec<_> = snooping.iter().map(|bridge| ("mdb/show", json!([bridge.name]))).collect();
    let answers = unixctl::connect(daemon)?.call_many(&questions, until)?;
    // One that has just been told to snoop may not do it yet, and says so as an error.
    let of = |answer: Result<Value>| multicast::parse(answer.ok().as_ref().and_then(Value::as_str));
    Ok(snooping.into_iter().map(|bridge| bridge.name.clone()).zip(answers.into_iter().map(of)).collect())
}

fn told(openflow: &RealOpenFlow, bridge: &Bridge, until: Instant) -> Result<Vec<StateItem>> {
    let socket = openflow.socket(&bridge.name);
    let mut items = Vec::new();
    if let Some(version) = first_spoken(bridge, &FOR_PORTS) {
        let requests = [Request { kind: GET_CONFIG, body: Vec::new() }, ports_request(version)];
        if let Some(answers) = exchange(&socket, version, &requests, until)? {
            items.extend(answers.messages.iter().filter_map(|message| fragments(message)));
            items.extend(ports(version, &answers.messages).into_iter().filter_map(|port| port.flags(version)));
        }
    }
    let parsers: [(&[u8], u16, Parse); 2] =
        [(&FOR_TABLES, TABLE_DESC, table_configs), (&FOR_MISSES, TABLES, table_misses)];
    for (versions, what, parse) in parsers {
        let Some(version) = first_spoken(bridge, versions) else { continue };
        if let Some(answers) = exchange(&socket, version, &[multipart(version, what, &[])], until)? {
            items.extend(bodies(version, what, &answers.messages).flat_map(parse));
        }
    }
    Ok(items)
}

/// Says to a bridge what it is to know. What it refuses is seen when it is asked again.
fn tell(openflow: &RealOpenFlow, bridge: &Bridge, state: &BridgeState, until: Instant) -> Result<()> {
    let socket = openflow.socket(&bridge.name);
    let flags: BTreeMap<&str, u32> = state.items.iter().filter_map(port_flags).collect();
    let ports_version = first_spoken(bridge, &FOR_PORTS);
    if let (Some(version), false) = (ports_version, flags.is_empty()) {
        let answers = exchange(&socket, version, &[ports_request(version)], until)?;
        let there = answers.map(|answers| ports(version, &answers.messages)).unwrap_or_default();
        let mods = there.iter().filter_map(|port| Some(port_mod(version, port, *flags.get(port.name.as_str())?)));
        say(&socket, version, mods.collect(), until)?;
    }
    let mode = state.items.iter().find_map(|item| match item {
        StateItem::Fragments { mode } => Some(*mode),
        _ => None,
    });
    if let (Some(version), Some(mode)) = (ports_version, mode) {
        // How many bytes of a missed packet a connection gets is of this connection alone.
        let body = [mode.to_be_bytes(), [0, 0]].concat();
        say(&socket, version, vec![Request { kind: SET_CONFIG, body }], until)?;
    }
    let encoders: [(&[u8], Encode); 2] = [(&FOR_TABLES, table_mod), (&FOR_MISSES, miss_mod)];
    for (versions, encode) in encoders {
        let mods: Vec<Request> =
            state.items.iter().filter_map(encode).map(|body| Request { kind: TABLE_MOD, body }).collect();
        if let (Some(version), false) = (first_spoken(bridge, versions), mods.is_empty()) {
            say(&socket, version, mods, until)?;
        }
    }
    Ok(())
}

fn say(socket: &Path, version: u8, requests: Vec<Request>, until: Instant) -> Result<()> {
    if requests.is_empty() {
        return Ok(());
    }
    if let Some(answers) = exchange(socket, version, &requests, until)? {
        for error in answers.errors.values() {
            tracing::warn!("{}: {}", socket.display(), in_words(error));
        }
    }
    Ok(())
}

fn port_flags(item: &StateItem) -> Option<(&str, u32)> {
    match item {
        StateItem::PortFlags { port, flags } => Some((port, *flags)),
        _ => None,
    }
}

/// A multipart request: `OFPT_STATS_REQUEST` before OpenFlow 1.3.
fn multipart(version: u8, what: u16, body: &[u8]) -> Request {
    let kind = if version == 1 { 16 } else { 18 };
    let pad: &[u8] = if version == 1 { &[] } else { &[0; 4] };
    Request { kind, body: [&what.to_be_bytes()[..], &[0, 0], pad, body].concat() }
}

fn ports_request(version: u8) -> Request {
    // OFPP_ANY: from OpenFlow 1.5 on a port is named.
    let body: &[u8] = if version >= 6 { &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0] } else { &[] };
    multipart(version, PORTS, body)
}

/// The bodies of multipart replies about `what`.
fn bodies(version: u8, what: u16, messages: &[Vec<u8>]) -> impl Iterator<Item = &[u8]> {
    let (kind, header) = if version == 1 { (17, 12) } else { (19, 16) };
    messages.iter().filter_map(move |message| {
        let is_it = message.get(1) == Some(&kind) && number16(message, 8) == Some(what);
        is_it.then(|| message.get(header..)).flatten()
    })
}

fn number16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes)
}

fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes)
}

fn fragments(message: &[u8]) -> Option<StateItem> {
    if message.get(1) != Some(&CONFIG) {
        return None;
    }
    let mode = number16(message, 8)? & FRAGMENTS;
    (mode != 0).then_some(StateItem::Fragments { mode })
}

/// The ports of `OFPMP_PORT_DESC` replies.
fn ports(version: u8, messages: &[Vec<u8>]) -> Vec<PortDesc> {
    bodies(version, PORTS, messages).flat_map(|body| ports_of(version, body)).collect()
}

fn ports_of(version: u8, mut body: &[u8]) -> Vec<PortDesc> {
    let mut found = Vec::new();
    while let Some((port, length)) = port(version, body) {
        found.push(port);
        match body.get(length..) {
            Some(rest) => body = rest,
            None => break,
        }
    }
    found
}

/// The first port, and how long its description is: `struct ofp10_phy_port`, `ofp11_port`, `ofp14_port`.
fn port(version: u8, body: &[u8]) -> Option<(PortDesc, usize)> {
    let (number, address_at, length) = match version {
        1 => (u32::from(number16(body, 0)?), 2, 48),
        2..=4 => (number32(body, 0)?, 8, 64),
        _ => (number32(body, 0)?, 8, usize::from(number16(body, 4)?)),
    };
    let name_at = if version == 1 { 8 } else { 16 };
    let least = if version == 1 { 48 } else { 40 };
    if length < least || body.len() < length {
        return None;
    }
    let name = body.get(name_at..name_at + 16)?.split(|byte| *byte == 0).next()?;
    let port = PortDesc {
        number,
        address: body.get(address_at..address_at + 6)?.try_into().ok()?,
        name: String::from_utf8_lossy(name).into_owned(),
        config: number32(body, name_at + 16)?,
    };
    Some((port, length))
}

impl PortDesc {
    fn flags(&self, version: u8) -> Option<StateItem> {
        let flags = self.config & if version == 1 { all_flags() } else { LATER_FLAGS };
        (flags != 0).then(|| StateItem::PortFlags { port: self.name.clone(), flags })
    }
}

/// `struct ofp10_port_mod`, `ofp11_port_mod` or `ofp14_port_mod` that sets these flags and clears none.
fn port_mod(version: u8, port: &PortDesc, flags: u32) -> Request {
    let flags = flags & if version == 1 { all_flags() } else { LATER_FLAGS };
    let set = [flags.to_be_bytes(), flags.to_be_bytes()].concat();
    let number = port.number.to_be_bytes();
    match version {
        // Features, advertised; padding.
        1 => Request { kind: 15, body: [&number[2..], &port.address, &set, &[0; 8]].concat() },
        _ => {
            let rest: &[u8] = if version <= 4 { &[0; 8] } else { &[] };
            Request { kind: 16, body: [&number[..], &[0; 4], &port.address, &[0; 2], &set, rest].concat() }
        }
    }
}

/// `struct ofp14_table_desc` with its properties, as far as they are not as a table begins.
fn table_configs(mut body: &[u8]) -> Vec<StateItem> {
    let mut found = Vec::new();
    while let (Some(length), Some(table), Some(config)) =
        (number16(body, 0).map(usize::from), body.get(2).copied(), number32(body, 4))
    {
        let (Some(properties), true) = (body.get(8..length), length >= 8) else { break };
        if config != 0 {
            found.push(StateItem::TableConfig { table, config, vacancy: vacancy(properties) });
        }
        body = body.get(length..).unwrap_or_default();
    }
    found
}

/// Thresholds, down and up, of the vacancy property (`struct ofp14_table_mod_prop_vacancy`).
fn vacancy(mut properties: &[u8]) -> Option<(u8, u8)> {
    loop {
        let (kind, length) = (number16(properties, 0)?, usize::from(number16(properties, 2)?));
        if kind == VACANCY {
            return Some((*properties.get(4)?, *properties.get(5)?));
        }
        // Padded to 64 bits.
        properties = properties.get(length.max(4).next_multiple_of(8)..)?;
    }
}

/// `struct ofp14_table_mod`; what of it a switch alone decides (the flags of eviction) is left out.
fn table_mod(item: &StateItem) -> Option<Vec<u8>> {
    let StateItem::TableConfig { table, config, vacancy } = item else { return None };
    let property = vacancy.map(|(down, up)| [&VACANCY.to_be_bytes()[..], &[0, 8, down, up, 0, 0]].concat());
    Some([&[*table, 0, 0, 0][..], &config.to_be_bytes(), &property.unwrap_or_default()].concat())
}

/// `struct ofp12_table_stats`, where a miss is not what it is without a word.
fn table_misses(body: &[u8]) -> Vec<StateItem> {
    let tables = body.chunks_exact(128).filter_map(|table| Some((*table.first()?, number32(table, 100)? & MISS)));
    // OFPTC11_TABLE_MISS_CONTROLLER is 0: what a table does that nobody configured.
    tables.filter(|(_, config)| *config != 0).map(|(table, config)| StateItem::TableMiss { table, config }).collect()
}

/// `struct ofp11_table_mod`.
fn miss_mod(item: &StateItem) -> Option<Vec<u8>> {
    let StateItem::TableMiss { table, config } = item else { return None };
    Some([&[*table, 0, 0, 0][..], &config.to_be_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A multipart reply of this version.
    fn reply(version: u8, what: u16, body: &[u8]) -> Vec<u8> {
        let request = multipart(version, what, body);
        let kind = request.kind + 1;
        let length = u16::try_from(8 + request.body.len()).unwrap().to_be_bytes();
        [&[version, kind][..], &length, &[0, 0, 0, 1], &request.body].concat()
    }

    fn name(name: &str) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        bytes
    }

    #[test]
    fn ports_are_read_as_each_version_describes_them() {
        let address = [2, 0, 0, 0, 0, 9];
        let flags = (1u32 << 4 | 1 << 6 | 1).to_be_bytes();
        let old = [&[0, 2][..], &address, &name("v2"), &flags, &[0; 20]].concat();
        let middle = [&[0, 0, 0, 2, 0, 0, 0, 0][..], &address, &[0, 0], &name("v2"), &flags, &[0; 28]].concat();
        let new = [&[0, 0, 0, 2, 0, 72, 0, 0][..], &address, &[0, 0], &name("v2"), &flags, &[0; 36]].concat();
        for (version, one) in [(1, &old), (4, &middle), (6, &new)] {
            let two = [one.as_slice(), one].concat();
            let found = ports(version, &[reply(version, PORTS, &two), reply(version, TABLES, &two)]);
            let port = PortDesc { number: 2, address, name: "v2".into(), config: 1 << 4 | 1 << 6 | 1 };
            assert_eq!(found, [port.clone(), port], "{version}");
            // Down is the device's; only 1.0 tells no-flood.
            let told = if version == 1 { 1 << 4 | 1 << 6 } else { 1 << 6 };
            assert_eq!(found[0].flags(version), Some(StateItem::PortFlags { port: "v2".into(), flags: told }));
            // One that is cut off is no port.
            assert_eq!(ports_of(version, &two[..two.len() - 1]).len(), 1);
        }
        assert_eq!(port_mod(1, &ports_of(1, &old)[0], 1 << 4).body.len(), 24);
        assert_eq!(port_mod(4, &ports_of(4, &middle)[0], 1 << 6).body.len(), 32);
        assert_eq!(port_mod(6, &ports_of(6, &new)[0], 1 << 6).body.len(), 24);
    }

    #[test]
    fn tables_are_read_and_given_back_without_what_a_switch_decides() {
        let eviction = [0, 2, 0, 8, 0, 0, 0, 5];
        let plain = [&[0, 16, 3, 0, 0, 0, 0, 0][..], &eviction].concat();
        let evicts = [&[0, 16, 4, 0, 0, 0, 0, 4][..], &eviction].concat();
        let both = [&[0, 24, 5, 0, 0, 0, 0, 12][..], &eviction, &[0, 3, 0, 8, 20, 80, 99, 0]].concat();
        let found = table_configs(&[plain, evicts, both].concat());
        assert_eq!(
            found,
            [
                StateItem::TableConfig { table: 4, config: 4, vacancy: None },
                StateItem::TableConfig { table: 5, config: 12, vacancy: Some((20, 80)) },
            ]
        );
        assert_eq!(table_mod(&found[0]).unwrap(), [4, 0, 0, 0, 0, 0, 0, 4]);
        assert_eq!(table_mod(&found[1]).unwrap(), [5, 0, 0, 0, 0, 0, 0, 12, 0, 3, 0, 8, 20, 80, 0, 0]);
        for odd in [&[0, 0, 1, 0, 0, 0, 0, 4][..], &[0, 9, 1, 0, 0, 0, 0, 4], &[0]] {
            assert!(table_configs(odd).is_empty(), "{odd:?}");
        }
    }

    #[test]
    fn misses_are_read_where_somebody_configured_them() {
        let table = |number: u8, config: u32| {
            let mut bytes = vec![0; 128];
            bytes[0] = number;
            bytes[100..104].copy_from_slice(&config.to_be_bytes());
            bytes
        };
        let found = table_misses(&[table(0, 0), table(7, 2)].concat());
        assert_eq!(found, [StateItem::TableMiss { table: 7, config: 2 }]);
        assert_eq!(miss_mod(&found[0]).unwrap(), [7, 0, 0, 0, 0, 0, 0, 2]);
    }

    #[test]
    fn fragments_are_an_item_where_they_are_not_handled_as_usual() {
        let config = |flags: u16| [&[1, CONFIG, 0, 12, 0, 0, 0, 1][..], &flags.to_be_bytes(), &[0, 0]].concat();
        assert_eq!(fragments(&config(3)), Some(StateItem::Fragments { mode: 3 }));
        // Invalid TTLs to the controller are a wish of the connection.
        assert_eq!(fragments(&config(4)), None);
        assert_eq!(fragments(&[1, 9, 0, 12, 0, 0, 0, 1, 0, 3, 0, 0]), None);
    }

    #[test]
    fn a_bridge_is_asked_in_a_version_that_it_speaks() {
        let bridge = |versions: &[&str]| Bridge {
            protocols: versions.iter().map(|version| version.to_string()).collect(),
            ..Bridge::default()
        };
        assert_eq!(first_spoken(&bridge(&[]), &FOR_PORTS), Some(1));
        assert_eq!(first_spoken(&bridge(&["OpenFlow13", "OpenFlow14"]), &FOR_PORTS), Some(5));
        assert_eq!(first_spoken(&bridge(&["OpenFlow13"]), &FOR_TABLES), None);
    }
}

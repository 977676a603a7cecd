//! Learned MAC addresses: read with `fdb/show`, taught with `ofproto/trace-packet-out`.
//!
//! `ofproto/trace-packet-out ... -generate NORMAL` translates a made-up frame *with side effects* (`xlate_in_init` in
//! `ofproto/ofproto-dpif-xlate.c`: a packet is there) and executes nothing in the datapath: the source address is
//! learned as if the frame had come in, and no port sees a frame. A real packet-out would flood instead: it learns only
//! after its own look-up (`packet_xlate`). `fdb/add` makes entries that never age: those that were static.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use serde_json::json;

use super::jsonrpc::remaining;
use super::unixctl;
use crate::host::{Bridge, Daemon, FdbEntry, LearnReport, Port, Result};

/// IEEE 802 local experimental EtherType 1: nothing looks into such a frame.
const ETHER_TYPE: &str = "0x88b5";

/// So many commands of a connection are under way at once: a daemon takes ten of each in a turn of its main loop.
pub(super) const BATCH: usize = 40;
/// So many commands of a connection does a turn take (`run_connection`, lib/unixctl.c). A turn in which an address was
/// learned ends with a wait for all threads (`xlate_txn_commit`, ofproto/ofproto-dpif-xlate.c): few turns are better than
/// few connections.
const IN_A_TURN: usize = 10;
/// So many connections teach addresses.
const CONNECTIONS: usize = 100;
/// A table of 50,000 addresses is shown in 0.2 s by a daemon that has nothing else to do.
const SHOWN_WITHIN: Duration = Duration::from_secs(5);

/// The rows of `fdb/show`: port, VLAN, MAC, age.
pub fn parse(text: &str) -> Vec<FdbEntry> {
    let row = |line: &str| match line.split_whitespace().collect::<Vec<_>>()[..] {
        [port, vlan, mac, age] => Some(FdbEntry {
            port: port.to_owned(),
            vlan: vlan.parse().ok()?,
            mac: (mac.len() == 17).then(|| mac.to_owned())?,
            age_s: age.parse().ok(),
        }),
        _ => None,
    };
    text.lines().filter_map(row).collect()
}

/// Teaches the daemon the addresses.
pub fn learn(daemon: &Daemon, bridge: &Bridge, entries: &[FdbEntry], until: Instant) -> Result<LearnReport> {
    let mut report = LearnReport::default();
    if entries.is_empty() {
        // Each question costs a turn of the daemon's main loop, and hundreds of bridges may have learned nothing.
        return Ok(report);
    }
    let mut skip = |reason: &str| *report.skipped.entry(reason.to_owned()).or_default() += 1;
    let mut connections = Vec::new();
    for _ in 0..entries.len().div_ceil(IN_A_TURN).min(CONNECTIONS) {
        connections.push(unixctl::connect(daemon)?);
    }
    // Static ones first: nothing that is learned takes their place.
    let (learned, fixed): (Vec<&FdbEntry>, Vec<&FdbEntry>) = entries.iter().partition(|entry| entry.age_s.is_some());
    let all: Vec<&FdbEntry> = fixed.into_iter().chain(learned).collect();
    for some in all.chunks(IN_A_TURN * CONNECTIONS) {
        if remaining(until).is_none() {
            report.unasked += some.len() as u64;
            continue;
        }
        // What was sent is waited for: it may be taken, and the connection goes on.
        let answered_within = Instant::now() + SHOWN_WITHIN;
        let mut asked = Vec::new();
        for (connection, batch) in connections.iter_mut().zip(some.chunks(IN_A_TURN)) {
            let calls: Vec<_> = batch.iter().map(|entry| call(bridge, entry)).collect();
            let first = connection.ask_many(&calls, answered_within)?;
            asked.push((connection, calls, first));
        }
        for (connection, calls, first) in asked {
            match connection.answers(&calls, first, answered_within) {
                Ok(answers) => answers.into_iter().filter_map(|one| one.err()).for_each(|error| skip(&error.cause)),
                Err(error) if error.timed_out => calls.iter().for_each(|_| skip("the daemon does not answer in time")),
                Err(error) => return Err(error),
            }
        }
    }
    let Some(connection) = connections.first_mut() else { return Ok(report) };
    // Counted by what is in the table, not by what was asked for.
    let table = connection.call("fdb/show", json!([bridge.name]), Instant::now() + SHOWN_WITHIN)?;
    let there = parse(table.as_str().unwrap_or_default());
    report.restored = among(entries, &there);
    let skipped: u64 = report.skipped.values().sum();
    let refused = (entries.len() as u64).saturating_sub(report.restored + report.unasked + skipped);
    if refused > 0 {
        report.skipped.insert("the port does not take such a frame".to_owned(), refused);
    }
    Ok(report)
}

/// How many of `entries` are `there`, at the same port and static or learned as before.
fn among(entries: &[FdbEntry], there: &[FdbEntry]) -> u64 {
    fn key(entry: &FdbEntry) -> (&str, u16, &str, bool) {
        (&entry.port, entry.vlan, &entry.mac, entry.age_s.is_none())
    }
    let there: HashSet<_> = there.iter().map(key).collect();
    entries.iter().filter(|entry| there.contains(&key(entry))).count() as u64
}

/// The command that makes the entry.
fn call(bridge: &Bridge, entry: &FdbEntry) -> (&'static str, serde_json::Value) {
    match entry.age_s {
        None => {
            // It takes the name of an interface, and not its number.
            let name = interface_of(bridge, &entry.port).unwrap_or(&entry.port);
            ("fdb/add", json!([bridge.name, name, entry.vlan.to_string(), entry.mac]))
        }
        Some(_) => {
            let frame = frame(entry, port_of(bridge, &entry.port));
            ("ofproto/trace-packet-out", json!([bridge.name, frame, "-generate", "NORMAL"]))
        }
    }
}

/// The port that the database has under this OpenFlow number; `LOCAL` has the bridge's name.
pub(super) fn port_of<'a>(bridge: &'a Bridge, number: &str) -> Option<&'a Port> {
    if number == "LOCAL" {
        return bridge.ports.iter().find(|port| port.name == bridge.name);
    }
    let number: i64 = number.parse().ok()?;
    bridge.ports.iter().find(|port| port.interfaces.iter().any(|interface| interface.ofport == Some(number)))
}

/// The name of the interface with this OpenFlow number.
fn interface_of<'a>(bridge: &'a Bridge, number: &str) -> Option<&'a str> {
    if number == "LOCAL" {
        return Some(&bridge.name);
    }
    let number: i64 = number.parse().ok()?;
    let mut interfaces = bridge.ports.iter().flat_map(|port| &port.interfaces);
    interfaces.find(|interface| interface.ofport == Some(number)).map(|interface| interface.name.as_str())
}

/// The tag of a frame that comes in by `port` and belongs to `vlan`; none where it has none.
pub(super) fn frame_vlan(vlan: u16, port: Option<&Port>) -> Option<u16> {
    let tunnelled = port.filter(|port| port.vlan_mode.as_deref() == Some("dot1q-tunnel"));
    if let Some(port) = tunnelled {
        // The VLAN is the port's, and frames keep a tag of their own, one that the port takes.
        return port.cvlans.first().and_then(|cvlan| u16::try_from(*cvlan).ok()).filter(|cvlan| *cvlan != 0);
    }
    let own = port.and_then(|port| port.tag) == Some(i64::from(vlan));
    (vlan != 0 && !own).then_some(vlan)
}

/// A frame of the entry's address to itself, as the port expects it: without a tag where the VLAN is the port's own.
fn frame(entry: &FdbEntry, port: Option<&Port>) -> String {
    let tag = frame_vlan(entry.vlan, port).map_or_else(String::new, |vlan| format!(",dl_vlan={vlan}"));
    let FdbEntry { port, mac, .. } = entry;
    format!("in_port={port},dl_src={mac},dl_dst={mac},dl_type={ETHER_TYPE}{tag}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Interface;

    #[test]
    fn rows_of_fdb_show() {
        let text = " port  VLAN  MAC                Age\nLOCAL     0  aa:bb:cc:dd:ee:00   12\n    2     5  aa:bb:cc:dd:ee:01  static\n";
        let entries = parse(text);
        assert_eq!((entries[0].port.as_str(), entries[0].vlan, entries[0].age_s), ("LOCAL", 0, Some(12)));
        assert_eq!((entries[1].port.as_str(), entries[1].vlan, entries[1].age_s), ("2", 5, None));
        assert_eq!(entries.len(), 2);
    }

    #[test]
    fn many_addresses_are_counted_at_once() {
        let entry = |number: u32, age_s| FdbEntry {
            port: "2".into(),
            vlan: 0,
            mac: format!("02:00:00:{:02x}:{:02x}:{:02x}", number >> 16, number >> 8 & 255, number & 255),
            age_s,
        };
        let all: Vec<_> = (0..50_000).map(|number| entry(number, Some(3))).collect();
        let there: Vec<_> = (10..60_000).map(|number| entry(number, (number != 20).then_some(0))).collect();
        let begun = Instant::now();
        assert_eq!(among(&all, &there), 49_989);
        assert!(begun.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_static_entry_is_added_at_the_interface_that_had_it() {
        let interface = |name: &str, ofport| Interface { name: name.into(), ofport, ..Interface::default() };
        let bond = vec![interface("eth0", Some(1)), interface("eth1", Some(2))];
        let ports = vec![Port { name: "bond0".into(), interfaces: bond, ..Port::default() }];
        let bridge = Bridge { name: "br0".into(), ports, ..Bridge::default() };
        let entry = |port: &str, age_s| FdbEntry { port: port.into(), vlan: 7, mac: "aa:bb:cc:dd:ee:01".into(), age_s };
        assert_eq!(call(&bridge, &entry("2", None)).1, json!(["br0", "eth1", "7", "aa:bb:cc:dd:ee:01"]));
        assert_eq!(call(&bridge, &entry("LOCAL", None)).1[1], "br0");
        assert_eq!(call(&bridge, &entry("2", Some(3))).0, "ofproto/trace-packet-out");
    }

    #[test]
    fn frames_of_local_and_of_tunnel_ports_are_tagged_as_these_expect() {
        let local = Port { name: "br0".into(), tag: Some(100), ..Port::default() };
        let bridge = Bridge { name: "br0".into(), ports: vec![local], ..Bridge::default() };
        assert_eq!(frame_vlan(100, port_of(&bridge, "LOCAL")), None);
        let tunnel = |cvlans: &[i64]| Port {
            tag: Some(9),
            vlan_mode: Some("dot1q-tunnel".into()),
            cvlans: cvlans.to_vec(),
            ..Port::default()
        };
        assert_eq!(frame_vlan(9, Some(&tunnel(&[7, 8]))), Some(7));
        assert_eq!(frame_vlan(9, Some(&tunnel(&[]))), None);
    }

    #[test]
    fn frames_are_tagged_as_their_port_expects() {
        let port = |tag| Port {
            tag,
            interfaces: vec![Interface { ofport: Some(2), ..Interface::default() }],
            ..Port::default()
        };
        let entry = |vlan| FdbEntry { port: "2".into(), vlan, mac: "aa:bb:cc:dd:ee:01".into(), age_s: Some(1) };
        let bridge = Bridge { ports: vec![port(Some(5))], ..Bridge::default() };
        assert!(!frame(&entry(5), port_of(&bridge, "2")).contains("dl_vlan"));
        assert!(frame(&entry(6), port_of(&bridge, "2")).ends_with(",dl_vlan=6"));
        assert!(!frame(&entry(0), Some(&port(None))).contains("dl_vlan"));
        assert!(frame(&entry(7), None).starts_with("in_port=2,dl_src=aa:bb:cc:dd:ee:01,dl_dst=aa:bb:cc:dd:ee:01,"));
    }
}

//! What is given back, without the kind that a test has the run forget: all of it in every shipped program.

use std::borrow::Cow;

use dpfreeze::freeze::KeptQdisc;

use crate::host::kept::Lack;
use crate::host::messages::Stream;
use crate::host::state::{BridgeState, StateItem};
use crate::host::{BridgeRules, FdbEntry};
use crate::inventory::{forgets, is_forgotten, Kept};

/// Rules, groups, meters and TLV maps.
pub(super) fn rules(all: &[BridgeRules]) -> Cow<'_, [BridgeRules]> {
    if !forgets() {
        return Cow::Borrowed(all);
    }
    let mut all = all.to_vec();
    for BridgeRules { flows, groups, meters, tlv_map, messages, .. } in &mut all {
        let kinds: [(Kept, &mut Vec<String>, &mut Stream); 4] = [
            (Kept::Rules, flows, &mut messages.flows),
            (Kept::Groups, groups, &mut messages.groups),
            (Kept::Meters, meters, &mut messages.meters),
            (Kept::TlvMap, tlv_map, &mut messages.tlv_map),
        ];
        for (kept, texts, stream) in kinds {
            if is_forgotten(kept) {
                texts.clear();
                *stream = Stream::default();
            }
        }
        if is_forgotten(Kept::Groups) || is_forgotten(Kept::GroupProperties) {
            messages.whole_groups = Stream::default();
        }
    }
    Cow::Owned(all)
}

/// What bridges know besides.
pub(super) fn state(all: &[BridgeState]) -> Cow<'_, [BridgeState]> {
    if !forgets() {
        return Cow::Borrowed(all);
    }
    let mut all = all.to_vec();
    all.iter_mut().for_each(|bridge| bridge.items.retain(|item| !is_forgotten(kind_of(item))));
    Cow::Owned(all)
}

fn kind_of(item: &StateItem) -> Kept {
    match item {
        StateItem::PortFlags { .. } => Kept::PortFlags,
        StateItem::Fragments { .. } => Kept::Fragments,
        StateItem::TableConfig { .. } => Kept::Tables,
        StateItem::TableMiss { .. } => Kept::Misses,
        StateItem::MulticastGroup { .. } => Kept::MulticastGroups,
        StateItem::MulticastRouter { .. } => Kept::MulticastRouters,
    }
}

/// Learned and static addresses.
pub(super) fn addresses(all: &[FdbEntry]) -> Cow<'_, [FdbEntry]> {
    if !forgets() {
        return Cow::Borrowed(all);
    }
    let kind = |entry: &FdbEntry| if entry.age_s.is_none() { Kept::StaticAddresses } else { Kept::Addresses };
    Cow::Owned(all.iter().filter(|entry| !is_forgotten(kind(entry))).cloned().collect())
}

/// Traffic control of others.
pub(super) fn qdiscs(mut all: Vec<(u32, KeptQdisc)>) -> Vec<(u32, KeptQdisc)> {
    all.retain(|(_, what)| {
        !is_forgotten(match what {
            KeptQdisc::Root => Kept::RootQdisc,
            KeptQdisc::Ingress => Kept::IngressQdisc,
            KeptQdisc::Classes => Kept::Classes,
            KeptQdisc::Policing => Kept::Policing,
        })
    });
    all
}

/// What was set by hand in ovsdb-server.
pub(super) fn lacks(mut all: Vec<Lack>) -> Vec<Lack> {
    if forgets() {
        all.retain(|lack| kind_of_command(&lack.command).is_none_or(|kept| !is_forgotten(kept)));
    }
    all
}

fn kind_of_command(command: &str) -> Option<Kept> {
    match command.strip_prefix("ovsdb-server/")? {
        "add-remote" => Some(Kept::RemotesAdded),
        "remove-remote" => Some(Kept::RemotesRemoved),
        "add-db" | "remove-db" => Some(Kept::Databases),
        "set-active-ovsdb-server" | "set-sync-exclude-tables" => Some(Kept::ActiveBackup),
        "set-active-ovsdb-server-probe-interval" | "set-relay-source-probe-interval" => Some(Kept::Probes),
        "tlog-set" => Some(Kept::ServerLogs),
        _ => None,
    }
}

#[cfg(all(test, not(feature = "chaos")))]
mod tests {
    use super::*;

    #[test]
    fn a_program_without_the_feature_forgets_nothing() {
        assert!(!forgets());
        let entry = FdbEntry { port: "1".into(), vlan: 0, mac: "02:00:00:00:00:01".into(), age_s: None };
        assert!(matches!(addresses(std::slice::from_ref(&entry)), Cow::Borrowed([one]) if *one == entry));
        let kept = vec![(7, KeptQdisc::Root), (7, KeptQdisc::Policing)];
        assert_eq!(qdiscs(kept.clone()), kept);
    }
}

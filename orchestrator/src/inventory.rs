//! Everything that Open vSwitch's daemons and the devices of its bridges know at run time, one entry a kind: the table of
//! docs/reference/state.md in code. A test holds the two together, row by row.
//!
//! What is kept has a [`Kept`], which says in which phase it is given back and what compares it: Verify does what the
//! table names ([`compared`]), so that nothing can be called kept without being compared.

mod forgotten;
mod table;
#[cfg(test)]
mod tests;

#[cfg(feature = "chaos")]
pub use forgotten::VARIABLE;
pub use forgotten::{forgets, is_forgotten};
pub use table::ROWS;

use crate::machine::Phase;
use crate::report::Name;

/// A kind of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// What it is: the first cell of its row on the page.
    pub state: &'static str,
    /// What a run does with it.
    pub fate: Fate,
    /// The findings of `check` that are about it.
    pub findings: &'static [Name],
}

/// What a run does with a kind of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is there afterwards, and what is not is in the report.
    Kept(Kept),
    /// It is left alone or made anew alike, and nothing compares it.
    Left,
    /// A run ends before it touches anything.
    Refused,
    /// `check` and the report name it beforehand.
    Warned,
    /// The report says afterwards what was lost.
    Told,
    /// It is lost, and neither `check` nor the report says so.
    Lost {
        /// What that costs, and for how long.
        cost: &'static str,
        /// Why `check` has no finding for it.
        unnamed: Unnamed,
    },
    /// A restart does not reach it.
    Untouched,
}

impl Fate {
    /// Its word on the page.
    pub fn word(self) -> &'static str {
        match self {
            Fate::Kept(_) => "kept",
            Fate::Left => "left",
            Fate::Refused => "refused",
            Fate::Warned => "warned",
            Fate::Told => "told",
            Fate::Lost { .. } => "lost",
            Fate::Untouched => "untouched",
        }
    }
}

/// Why `check` does not name what is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unnamed {
    /// Every host has it: it would be named everywhere.
    Everywhere,
    /// Nothing tells whether it is there.
    Untold,
    /// It is known only once the run is under way.
    Later,
    /// Finding it would take a look at every rule, flow or group.
    Costly,
}

/// What compares a kind of state with what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Comparison {
    /// Zones of conntrack by meaning; limits that were lost are set again.
    Conntrack,
    /// The kernel's datapath: counters, ports, timeout policies.
    Kernel,
    /// Rules, groups, meters and TLV maps by their text.
    Rules,
    /// What bridges know besides.
    Bridges,
    /// What ovs-vswitchd found that the datapath can do.
    Features,
    /// What was set at run time in the daemons, and the row of this host.
    ByHand,
    /// Qdiscs, classes, filters and MTUs.
    Devices,
    /// Learned and static addresses, counted in the new daemon's table when they were given.
    Addresses,
    /// Kernel flows by UFID and count, while nothing can delete them.
    Flows,
    /// Packets that were parked: replayed, or counted by reason.
    Packets,
}

impl Comparison {
    /// The phase that makes it.
    pub fn phase(self) -> Phase {
        match self {
            Comparison::Addresses => Phase::Restore,
            Comparison::Packets => Phase::Handover,
            Comparison::Flows => Phase::Gates,
            Comparison::Conntrack
            | Comparison::Kernel
            | Comparison::Rules
            | Comparison::Bridges
            | Comparison::Features
            | Comparison::ByHand
            | Comparison::Devices => Phase::Verify,
        }
    }
}

/// What the table wants compared in `phase`, each once, in the order in which it is done.
pub fn compared(phase: Phase) -> Vec<Comparison> {
    let kept = ROWS.iter().filter_map(|row| if let Fate::Kept(kept) = row.fate { Some(kept) } else { None });
    let mut all: Vec<Comparison> = kept.map(Kept::comparison).filter(|one| one.phase() == phase).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// What is lost and has no finding, with its cost, a line each.
pub fn losses() -> String {
    let line = |row: &Row| match row.fate {
        Fate::Lost { cost, .. } => Some(format!("lost     {}: {cost}\n", row.state)),
        _ => None,
    };
    ROWS.iter().filter_map(line).collect()
}

/// How a kind of state is kept, and what shows it.
macro_rules! kept {
    ($($(#[$doc:meta])* $name:ident = $word:literal, $phase:ident, $comparison:ident, $scenarios:expr;)*) => {
        /// A kind of state that is kept.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kept {
            $($(#[$doc])* $name,)*
        }

        impl Kept {
            /// Every one.
            pub const ALL: &[Kept] = &[$(Kept::$name),*];

            /// Its word.
            pub fn word(self) -> &'static str {
                match self {
                    $(Kept::$name => $word,)*
                }
            }

            /// The phase that gives it back, or keeps it from going.
            pub fn phase(self) -> Phase {
                match self {
                    $(Kept::$name => Phase::$phase,)*
                }
            }

            /// What compares it afterwards.
            pub fn comparison(self) -> Comparison {
                match self {
                    $(Kept::$name => Comparison::$comparison,)*
                }
            }

            /// The lab's scenarios that show it; none where nobody has tried it.
            pub fn scenarios(self) -> &'static [&'static str] {
                match self {
                    $(Kept::$name => &$scenarios,)*
                }
            }
        }
    };
}

kept! {
    /// Flow rules.
    Rules = "rules", Restore, Rules, ["rule_corpus"];
    /// Rules that change while the run is under way.
    RulesMeanwhile = "rules-meanwhile", SwitchPrepare, Rules, ["rule_change"];
    /// Groups.
    Groups = "groups", Restore, Rules, ["rule_corpus", "group", "pairs"];
    /// Whether buckets push a tag onto another.
    GroupTags = "group-tags", Restore, Rules, ["rule_corpus"];
    /// Properties of groups that OpenFlow 1.0 alone tells.
    GroupProperties = "group-properties", Restore, Rules, ["pairs"];
    /// Meters.
    Meters = "meters", Restore, Rules, ["rule_corpus", "many_meters", "pairs"];
    /// TLV maps.
    TlvMap = "tlv-map", Restore, Rules, ["rule_corpus", "pairs"];
    /// Flags of ports.
    PortFlags = "port-flags", Restore, Bridges, ["switch_state", "pairs"];
    /// How fragments are handled.
    Fragments = "fragments", Restore, Bridges, ["switch_state", "pairs"];
    /// Eviction and vacancy of tables.
    Tables = "tables", Restore, Bridges, ["switch_state", "pairs"];
    /// What a miss in a table means.
    Misses = "misses", Restore, Bridges, ["switch_state", "pairs"];
    /// Learned addresses.
    Addresses = "addresses", Restore, Addresses, ["plain", "switch_state"];
    /// Static addresses.
    StaticAddresses = "static-addresses", Restore, Addresses, ["switch_state", "pairs"];
    /// Multicast groups.
    MulticastGroups = "multicast-groups", Restore, Bridges, ["switch_state", "pairs"];
    /// Ports of multicast routers.
    MulticastRouters = "multicast-routers", Restore, Bridges, ["switch_state", "pairs"];
    /// The datapath.
    Datapath = "datapath", Arm, Kernel, ["plain"];
    /// Its ports.
    Ports = "ports", Arm, Kernel, ["plain"];
    /// Its flows.
    KernelFlows = "kernel-flows", Arm, Flows, ["plain"];
    /// Packets that wait for a daemon.
    Packets = "packets", SwitchPrepare, Packets, ["plain"];
    /// What the datapath can do, as the daemon sees it.
    Features = "features", Standby, Features, ["sees_less"];
    /// Ports and devices of tunnels.
    Tunnels = "tunnels", Standby, Kernel, ["vxlan_ns", "geneve_ns", "vxlan_bridges"];
    /// Limits of conntrack zones.
    ZoneLimits = "zone-limits", Verify, Conntrack, ["conntrack", "ct_policies"];
    /// Timeout policies of live connections.
    GuardedPolicies = "guarded-policies", Arm, Kernel, ["ct_policies", "ct_guard"];
    /// Timeout policies of zones.
    ZonePolicies = "zone-policies", Restore, Conntrack, ["ct_policies", "ct_zones"];
    /// Timeout policies of others.
    OthersPolicies = "others-policies", Arm, Kernel, ["ct_policies"];
    /// MTUs set by hand.
    Mtu = "mtu", Restore, Devices, ["qdiscs", "pairs"];
    /// Root qdiscs of others.
    RootQdisc = "root-qdisc", Arm, Devices, ["qdiscs", "pairs"];
    /// Ingress qdiscs of others.
    IngressQdisc = "ingress-qdisc", Arm, Devices, ["qdiscs", "pairs"];
    /// Policing by Open vSwitch.
    Policing = "policing", Standby, Devices, ["qdiscs", "pairs"];
    /// Classes that others have added.
    Classes = "classes", Arm, Devices, ["qdiscs"];
    /// Logging of ovs-vswitchd.
    SwitchLogs = "switch-logs", Settle, ByHand, ["server_state", "pairs"];
    /// Remotes that were added.
    RemotesAdded = "remotes-added", Arm, ByHand, ["server_state", "pairs"];
    /// Remotes that were removed.
    RemotesRemoved = "remotes-removed", Arm, ByHand, ["server_state"];
    /// Databases that were added or removed.
    Databases = "databases", Arm, ByHand, ["server_state"];
    /// Active-backup: source and excluded tables.
    ActiveBackup = "active-backup", Arm, ByHand, ["server_state"];
    /// Probe intervals of other servers.
    Probes = "probes", Arm, ByHand, [];
    /// Logging of ovsdb-server.
    ServerLogs = "server-logs", Arm, ByHand, ["server_state", "pairs"];
    /// What ovs-ctl writes into the row of this host.
    SystemRow = "system-row", Arm, ByHand, ["server_state"];
}

//! The scenarios, one file each.

pub mod aftermath;
mod alternative;
mod back;
mod bad_upgrade;
mod bond;
mod chaos;
mod conntrack;
pub mod containers;
mod controller;
mod ct_guard;
mod ct_policies;
mod ct_zones;
mod database_clients;
mod database_disk;
mod dependents;
mod dispatch_modes;
mod disturbed;
pub mod doors;
mod findings;
mod group;
mod hostile;
mod kept_or_told;
mod killed;
mod large;
mod learn;
mod local_port;
mod many;
mod meanwhile;
mod memory_limit;
mod mirror;
mod more_tunnels;
mod nat;
pub mod network;
mod new_dies;
mod no_systemd;
mod odd_rules;
mod other_init;
mod ovn;
mod package;
mod pairs;
mod park_level;
mod park_limit;
mod plain;
mod port_removed;
mod qdiscs;
mod qinq;
mod reboot;
mod refusals;
mod reload_module;
mod rows;
mod rpm;
mod rule_change;
mod rule_corpus;
mod rule_speed;
mod sampling;
mod scale;
mod scale_ct;
mod sees_less;
mod selftest;
mod server_state;
mod set_field;
mod switch_state;
mod systemd;
mod told;
mod tunnel;
mod two_zones;
mod unprivileged;
mod unreplayable;
mod upgrade;
mod vlan_patch;

use std::path::Path;

use anyhow::{bail, Result};

use crate::guest::probe::Spec;
use crate::guest::Evidence;
use crate::outcome::{Job, Outcome};
use crate::packages::Packages;
use crate::vm;

/// What our restart has to fulfil in a scenario, beyond what holds everywhere.
#[derive(Debug, Clone)]
pub struct Expect {
    /// `full`, `park` or `none`.
    pub level: &'static str,
    /// Classes of messages that must have been refused at least once.
    pub refused: &'static [&'static str],
    /// Whether flows are in use that hold nothing of the old process.
    pub keeps_flows: bool,
    /// Whether the park is meant to overflow.
    pub overflow: bool,
    /// Reason for which parked copies of packets are thrown away, with samples on.
    pub thrown_away: Option<&'static str>,
    /// Whether systemd units own the daemons.
    pub in_units: bool,
    /// Whether TCP must come through without a retransmission time-out.
    pub no_timeouts: bool,
}

impl Default for Expect {
    fn default() -> Self {
        Expect {
            level: "full",
            refused: &["upcall_bind"],
            keeps_flows: true,
            overflow: false,
            thrown_away: None,
            in_units: true,
            no_timeouts: false,
        }
    }
}

/// A scenario with traffic through a restart. What it does not say is as in [`plain`].
pub trait Traffic: Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;
    /// One line for the list.
    fn about(&self) -> &'static str;
    /// More words for the kernel's command line.
    fn kernel_args(&self) -> &'static str {
        ""
    }
    /// The CPUs of its machine, in the words of qemu's `-smp`.
    fn cpus(&self) -> &'static str {
        vm::CPUS
    }
    /// Whether `tests/all` leaves it out: it takes long, and is part of `tests/matrix`.
    fn by_hand(&self) -> bool {
        false
    }
    /// More arguments for `ovs-graceful restart`.
    fn extra_args(&self) -> &'static [&'static str] {
        &[]
    }
    /// The suite whose ovs-vswitchd it finds in `/lab/older`, with the libraries that later suites do not have.
    fn older_daemon(&self) -> Option<&'static str> {
        None
    }
    /// Seconds of traffic after the action's end, where they have to be so many.
    fn after_s(&self) -> Option<f64> {
        None
    }
    /// Whether it needs all of the machine: nothing runs beside it.
    fn alone(&self) -> bool {
        false
    }
    /// Whether a stock run leaves something behind that the next one in the same VM would begin with.
    fn stock_spoils(&self) -> bool {
        false
    }
    /// Makes the network.
    fn set_up(&self) -> Result<()> {
        plain::set_up()
    }
    /// Before the traffic of every round: several are made in a row in one VM.
    fn before_traffic(&self) -> Result<()> {
        Ok(())
    }
    /// Its bridges.
    fn bridges(&self) -> Vec<String> {
        plain::bridges()
    }
    /// Its traffic.
    fn probes(&self) -> Vec<(String, Spec)> {
        plain::probes()
    }
    /// What is asked of our restart.
    fn expect(&self) -> Expect {
        Expect::default()
    }
    /// Looks at something just before the action.
    fn before_action(&self, _outcome: &mut Outcome) -> Result<()> {
        Ok(())
    }
    /// Assertions of its own.
    fn judge(&self, _evidence: &Evidence, _outcome: &mut Outcome) {}
}

/// Is the case `name` among those that `arguments` ask for by words of it, or without arguments among the whole or the
/// sample?
fn is_chosen(name: &str, arguments: &[String], whole: bool, sampled: &[&str]) -> bool {
    match arguments {
        [] => whole || sampled.contains(&name),
        words => words.iter().any(|word| name.contains(word.as_str())),
    }
}

/// An example of one of the packages.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// The package.
    pub package: &'static str,
    /// The example, and the name of the program.
    pub example: &'static str,
    /// Its features, in cargo's words.
    pub features: &'static str,
}

/// A scenario that is not traffic through one restart.
pub trait Custom: Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;
    /// One line for the list.
    fn about(&self) -> &'static str;
    /// More words for the kernel's command line.
    fn kernel_args(&self) -> &'static str {
        ""
    }
    /// Programs that go into the VM beside the product.
    fn programs(&self) -> &'static [Program] {
        &[]
    }
    /// Debian packages that go into the VM, which has nothing of the product then but what they bring.
    fn packages(&self) -> Packages {
        Packages::None
    }
    /// About how many runs it makes.
    ///
    /// # Errors
    /// Where `arguments` ask for what there is not.
    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(4)
    }
    /// Whether it boots its VM anew: `run` is called in each boot.
    fn reboots(&self) -> bool {
        false
    }
    /// Whether `tests/all` leaves it out: it takes long, and is part of `tests/matrix`.
    fn by_hand(&self) -> bool {
        false
    }
    /// Does everything.
    fn run(&self, job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()>;
}

/// Either kind.
#[derive(Clone, Copy)]
pub enum Scenario {
    /// Traffic through a restart.
    Traffic(&'static dyn Traffic),
    /// Anything else; only meaningful with our product.
    Custom(&'static dyn Custom),
}

impl Scenario {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Scenario::Traffic(s) => s.name(),
            Scenario::Custom(s) => s.name(),
        }
    }

    /// One line for the list.
    pub fn about(self) -> &'static str {
        match self {
            Scenario::Traffic(s) => s.about(),
            Scenario::Custom(s) => s.about(),
        }
    }

    /// The suite whose ovs-vswitchd goes into the VM.
    pub fn older_daemon(self) -> Option<&'static str> {
        match self {
            Scenario::Traffic(s) => s.older_daemon(),
            Scenario::Custom(_) => None,
        }
    }

    /// More arguments for `ovs-graceful restart`.
    pub fn extra_args(self) -> &'static [&'static str] {
        match self {
            Scenario::Traffic(s) => s.extra_args(),
            Scenario::Custom(_) => &[],
        }
    }

    /// Programs that go into the VM beside the product.
    pub fn programs(self) -> &'static [Program] {
        match self {
            Scenario::Traffic(_) => &[],
            Scenario::Custom(s) => s.programs(),
        }
    }

    /// Debian packages that go into the VM.
    pub fn packages(self) -> Packages {
        match self {
            Scenario::Traffic(_) => Packages::None,
            Scenario::Custom(s) => s.packages(),
        }
    }

    /// About how many runs a scenario makes by itself, beside that of [`Scenario::Traffic`].
    ///
    /// # Errors
    /// Where `arguments` ask for what there is not.
    pub fn runs(self, arguments: &[String]) -> Result<u32> {
        match self {
            Scenario::Traffic(_) => Ok(0),
            Scenario::Custom(s) => s.runs(arguments),
        }
    }

    /// Whether it boots its VM anew.
    pub fn reboots(self) -> bool {
        match self {
            Scenario::Traffic(_) => false,
            Scenario::Custom(s) => s.reboots(),
        }
    }

    /// Whether `tests/all` leaves it out.
    pub fn by_hand(self) -> bool {
        match self {
            Scenario::Traffic(s) => s.by_hand(),
            Scenario::Custom(s) => s.by_hand(),
        }
    }

    /// Whether it needs all of the machine.
    pub fn alone(self) -> bool {
        match self {
            Scenario::Traffic(s) => s.alone(),
            Scenario::Custom(_) => false,
        }
    }

    /// More words for the kernel's command line.
    pub fn kernel_args(self) -> &'static str {
        match self {
            Scenario::Traffic(s) => s.kernel_args(),
            Scenario::Custom(s) => s.kernel_args(),
        }
    }

    /// The CPUs of its machine, in the words of qemu's `-smp`.
    pub fn cpus(self) -> &'static str {
        match self {
            Scenario::Traffic(s) => s.cpus(),
            Scenario::Custom(_) => vm::CPUS,
        }
    }
}

/// Every scenario, in the order of `tests/all`.
pub const ALL: &[Scenario] = &[
    Scenario::Traffic(&plain::Plain),
    Scenario::Traffic(&conntrack::Conntrack),
    Scenario::Traffic(&ct_policies::CtPolicies),
    Scenario::Traffic(&nat::NAT),
    Scenario::Traffic(&nat::NAT6),
    Scenario::Traffic(&two_zones::TwoZones),
    Scenario::Traffic(&set_field::SetField),
    Scenario::Traffic(&qinq::Qinq),
    Scenario::Traffic(&mirror::Mirror),
    Scenario::Traffic(&large::Large),
    Scenario::Traffic(&group::Group),
    Scenario::Traffic(&learn::Learn),
    Scenario::Traffic(&switch_state::SwitchState),
    Scenario::Traffic(&sampling::SFLOW),
    Scenario::Traffic(&sampling::IPFIX),
    Scenario::Traffic(&sampling::FLOW_SAMPLE),
    Scenario::Traffic(&controller::ATTENDED),
    Scenario::Traffic(&controller::REACTIVE),
    Scenario::Traffic(&vlan_patch::VlanPatch),
    Scenario::Traffic(&bond::Bond),
    Scenario::Traffic(&tunnel::VXLAN),
    Scenario::Traffic(&tunnel::GENEVE),
    Scenario::Traffic(&tunnel::VxlanBridges),
    Scenario::Traffic(&local_port::LocalPort),
    Scenario::Traffic(&dispatch_modes::DOWN),
    Scenario::Traffic(&dispatch_modes::UP),
    Scenario::Traffic(&scale::Scale),
    Scenario::Traffic(&scale_ct::ScaleCt),
    Scenario::Traffic(&many::CPUS),
    Scenario::Traffic(&many::PORTS),
    Scenario::Traffic(&many::BRIDGES),
    Scenario::Traffic(&many::METERS),
    Scenario::Traffic(&many::GROUPS),
    Scenario::Traffic(&many::ADDRESSES),
    Scenario::Traffic(&many::OLD_RULES),
    Scenario::Traffic(&park_limit::NEWEST),
    Scenario::Traffic(&park_limit::OLDEST),
    Scenario::Traffic(&park_level::ParkLevel),
    Scenario::Traffic(&no_systemd::StopStart),
    Scenario::Traffic(&no_systemd::NoSystemd),
    Scenario::Traffic(&alternative::Alternative),
    Scenario::Custom(&unreplayable::Unreplayable),
    Scenario::Custom(&rule_change::RuleChange),
    Scenario::Custom(&rule_corpus::RuleCorpus),
    Scenario::Custom(&rule_speed::RuleSpeed),
    Scenario::Custom(&odd_rules::SAMPLE),
    Scenario::Custom(&odd_rules::WHOLE),
    Scenario::Custom(&port_removed::PortRemoved),
    Scenario::Custom(&qdiscs::Qdiscs),
    Scenario::Custom(&pairs::SAMPLE),
    Scenario::Custom(&pairs::WHOLE),
    Scenario::Custom(&kept_or_told::KeptOrTold),
    Scenario::Custom(&more_tunnels::MoreTunnels),
    Scenario::Custom(&new_dies::NewDies),
    Scenario::Custom(&sees_less::SeesLess),
    Scenario::Custom(&systemd::Systemd),
    Scenario::Custom(&told::Told),
    Scenario::Custom(&doors::SAMPLE),
    Scenario::Custom(&dependents::Dependents),
    Scenario::Custom(&doors::WHOLE),
    Scenario::Custom(&package::Package),
    Scenario::Custom(&other_init::OtherInit),
    Scenario::Custom(&upgrade::ONE),
    Scenario::Custom(&containers::SAMPLE),
    Scenario::Custom(&containers::WHOLE),
    Scenario::Custom(&bad_upgrade::BadUpgrade),
    Scenario::Custom(&rpm::Rpm),
    Scenario::Custom(&upgrade::BOTH),
    Scenario::Custom(&upgrade::WITHIN),
    Scenario::Custom(&upgrade::STOCK),
    Scenario::Custom(&upgrade::CHAIN),
    Scenario::Custom(&killed::Killed),
    Scenario::Custom(&ct_guard::CtGuard),
    Scenario::Custom(&ct_zones::CtZones),
    Scenario::Custom(&back::Back { tunnel: false }),
    Scenario::Custom(&back::Back { tunnel: true }),
    Scenario::Custom(&disturbed::SAMPLE),
    Scenario::Custom(&disturbed::WHOLE),
    Scenario::Custom(&database_clients::DatabaseClients),
    Scenario::Custom(&server_state::SAMPLE),
    Scenario::Custom(&server_state::WHOLE),
    Scenario::Custom(&database_disk::SAMPLE),
    Scenario::Custom(&database_disk::WHOLE),
    Scenario::Custom(&reboot::Reboot),
    Scenario::Custom(&reload_module::ReloadModule),
    Scenario::Custom(&chaos::Chaos),
    Scenario::Custom(&ovn::Ovn),
    Scenario::Custom(&refusals::Refusals),
    Scenario::Custom(&memory_limit::MemoryLimit),
    Scenario::Custom(&unprivileged::Unprivileged),
    Scenario::Custom(&hostile::Hostile),
    Scenario::Custom(&selftest::SelfTest),
];

/// The scenario of that name.
pub fn find(name: &str) -> Result<Scenario> {
    match ALL.iter().find(|s| s.name() == name) {
        Some(scenario) => Ok(*scenario),
        None => {
            let names: Vec<&str> = ALL.iter().map(|s| s.name()).collect();
            bail!("no scenario {name}: there are {}", names.join(", "))
        }
    }
}

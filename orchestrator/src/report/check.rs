//! The report of `ovs-graceful check`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Level;
use crate::machine::ExitCode;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// A run works, but something is outside the promise.
    Warning,
    /// A run refuses.
    Refused,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Severity::Ok => "ok",
            Severity::Warning => "warning",
            Severity::Refused => "refused",
        })
    }
}

/// Defines [`Name`] with its words, so that [`Name::ALL`] lacks none.
macro_rules! names {
    ($($(#[$doc:meta])* $name:ident = $word:literal,)*) => {
        /// What was looked at. The words are stable: they are read by machines, and docs/operating.md explains each.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Name {
            $($(#[$doc])* #[serde(rename = $word)] $name,)*
        }

        impl Name {
            /// Every name.
            pub const ALL: &[Name] = &[$(Name::$name),*];

            /// Its word.
            pub fn word(self) -> &'static str {
                match self {
                    $(Name::$name => $word,)*
                }
            }
        }
    };
}

names! {
    /// The kernel module.
    Openvswitch = "openvswitch-module",
    /// Taking sockets over from another process.
    PidfdGetfd = "pidfd_getfd",
    /// BPF, which the freeze needs.
    Bpf = "bpf",
    /// The freeze, tried.
    Canary = "canary",
    /// The kernel datapath.
    Datapath = "datapath",
    /// How the datapath dispatches upcalls.
    Dispatch = "dispatch",
    /// Who the upcalls go to.
    Upcalls = "upcalls",
    /// A kernel that does not tell who the upcalls go to.
    UpcallsUntold = "upcalls-untold",
    /// A reload of the kernel module, which was asked for.
    ReloadModule = "reload-module",
    /// What a reload of the kernel module would lose.
    Module = "module",
    /// Both daemons, each once.
    OvsRunning = "ovs-running",
    /// The network namespace of ovs-vswitchd.
    NetworkNamespace = "network-namespace",
    /// The container that ovs-vswitchd runs in.
    Container = "container",
    /// What runs and what is installed.
    Versions = "versions",
    /// The running program, for the way back.
    OldBinary = "old-binary",
    /// The package's command line tools.
    Tools = "tools",
    /// The database.
    Database = "database",
    /// The disk of the database.
    DatabaseDisk = "database-disk",
    /// What was set in ovsdb-server at run time, or on its command line alone.
    OvsdbServer = "ovsdb-server",
    /// The schema of the database and that of the installed package.
    Schema = "schema",
    /// `other_config:flow-restore-wait`.
    RestoreWaitStuck = "restore-wait-stuck",
    /// `other_config:hw-offload`.
    HwOffload = "hw-offload",
    /// DPDK.
    Dpdk = "dpdk",
    /// All bridges together.
    Bridges = "bridges",
    /// A bridge that ovs-vswitchd does not make.
    BridgeIgnored = "bridge-ignored",
    /// Rules that end at a given time.
    HardTimeout = "hard-timeout",
    /// Somebody else's ingress qdisc on a port.
    IngressQdisc = "ingress-qdisc",
    /// Somebody else's root qdisc or classes on a port.
    Qdisc = "qdisc",
    /// A bridge of the userspace datapath.
    NetdevBridge = "netdev-bridge",
    /// STP and RSTP.
    SpanningTree = "spanning-tree",
    /// LACP.
    Lacp = "lacp",
    /// BFD.
    Bfd = "bfd",
    /// CFM.
    Cfm = "cfm",
    /// sFlow, IPFIX and NetFlow.
    Sampling = "sampling",
    /// What a bridge has agreed upon with its controllers, or does because there are none.
    Controller = "controller",
    /// A bond whose flows may change links.
    Bond = "bond",
    /// LLDP.
    Lldp = "lldp",
    /// What was set in ovs-vswitchd at run time, or on its command line alone.
    OvsVswitchd = "ovs-vswitchd",
    /// Sockets whose mode or owner was changed.
    Sockets = "sockets",
    /// The service manager.
    Systemd = "systemd",
    /// A stop of the machine.
    Shutdown = "shutdown",
    /// A job that is queued for a unit of Open vSwitch.
    UnitJob = "unit-job",
    /// Units that systemd restarts with those of Open vSwitch.
    Neighbour = "neighbour",
    /// The unit of ovs-vswitchd.
    Unit = "unit",
    /// The options of the units.
    OvsCtlOptions = "ovs-ctl-options",
    /// Free space.
    Space = "space",
    /// Open files of the supervisor.
    Descriptors = "descriptors",
    /// Memory of the unit and of the host, for a second ovs-vswitchd.
    Memory = "memory",
    /// Tasks of the unit, for the same.
    Tasks = "tasks",
    /// An OpenFlow rule, or all of them.
    Rule = "rule",
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at.
    pub name: Name,
    /// How much it matters.
    pub severity: Severity,
    /// The object it was found on, for example `bridge br0`.
    pub object: String,
    /// What was found.
    pub cause: String,
    /// What the operator can do; empty where there is nothing to be done.
    pub remedy: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {}: {}: {}", self.severity, self.name, self.object, self.cause)?;
        if self.remedy.is_empty() {
            return Ok(());
        }
        write!(f, "\n         remedy: {}", self.remedy)
    }
}

/// Collects findings. What was found already is not found a second time.
#[derive(Debug, Default)]
pub struct Findings(Vec<Finding>);

impl Findings {
    /// Adds one.
    pub fn add(&mut self, severity: Severity, name: Name, object: impl ToString, cause: impl ToString, remedy: &str) {
        let (object, cause, remedy) = (object.to_string(), cause.to_string(), remedy.to_owned());
        self.push(Finding { name, severity, object, cause, remedy });
    }

    /// Adds one that was made elsewhere.
    pub fn push(&mut self, finding: Finding) {
        if !self.0.contains(&finding) {
            self.0.push(finding);
        }
    }

    /// What is as it should be.
    pub fn ok(&mut self, name: Name, object: impl ToString, cause: impl ToString) {
        self.add(Severity::Ok, name, object, cause, "");
    }

    /// What is outside the promise.
    pub fn warn(&mut self, name: Name, object: impl ToString, cause: impl ToString, remedy: &str) {
        self.add(Severity::Warning, name, object, cause, remedy);
    }

    /// What a run refuses.
    pub fn refuse(&mut self, name: Name, object: impl ToString, cause: impl ToString, remedy: &str) {
        self.add(Severity::Refused, name, object, cause, remedy);
    }

    /// The value; where there is none, its error is what a run refuses.
    pub fn keep<T, E: fmt::Display>(
        &mut self,
        result: Result<T, E>,
        name: Name,
        object: impl ToString,
        remedy: &str,
    ) -> Option<T> {
        result.map_err(|error| self.refuse(name, object, error, remedy)).ok()
    }

    /// Does anything refuse a run?
    pub fn refuses(&self) -> bool {
        self.0.iter().any(|finding| finding.severity == Severity::Refused)
    }

    /// All of them, in the order in which they were found.
    pub fn into_inner(self) -> Vec<Finding> {
        self.0
    }
}

impl Extend<Finding> for Findings {
    fn extend<I: IntoIterator<Item = Finding>>(&mut self, findings: I) {
        findings.into_iter().for_each(|finding| self.push(finding));
    }
}

/// Can this host do it, at which level, and what would be lost?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// How much of the promise this host can keep.
    pub level: Level,
    /// All that was looked at.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// The worst severity found.
    pub fn severity(&self) -> Severity {
        self.findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
    }

    /// 10 where a run would refuse, else 0.
    pub fn exit_code(&self) -> ExitCode {
        match self.severity() {
            Severity::Ok | Severity::Warning => ExitCode::Done,
            Severity::Refused => ExitCode::Refused,
        }
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        let answer = match self.severity() {
            Severity::Ok => "nothing known stands in the way",
            Severity::Warning => "a run works; the warnings name what is outside its promise",
            Severity::Refused => "a run would refuse",
        };
        writeln!(f, "level {}: {answer}", self.level)
    }
}

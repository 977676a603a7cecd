//! The host as the steps see it: its daemons, its database, its bridges and its service manager.
//!
//! Everything here blocks and takes its deadline as an [`Instant`]; nothing waits longer. The traits are what a step
//! may ask for; [`real`] asks the machine we run on.

pub mod clock;
pub mod database_disk;
pub mod datapath;
pub mod devices;
pub mod disk;
pub mod error;
pub mod kept;
pub mod logs;
pub mod messages;
pub mod module;
pub mod real;
#[cfg(test)]
pub mod simulated;
pub mod state;
pub mod surroundings;
pub mod zones;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use database_disk::DatabaseDisk;
pub use error::{Context, HostError, Result};
pub use kept::{Kept, ServerState, Sources, SystemRow};
pub use logs::Logs;
pub use messages::Messages;
pub use state::{BridgeState, StateItem, PORT_FLAGS};
pub use zones::CtZone;

/// A process that no later process can be mistaken for: its number and when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    /// The process id in our pid namespace.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`: clock ticks after boot.
    pub start_time: u64,
}

/// The two daemons of Open vSwitch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DaemonKind {
    /// The switch.
    OvsVswitchd,
    /// The database server.
    OvsdbServer,
}

impl DaemonKind {
    /// The program's name, as in its PID file, control socket and unit.
    pub fn program(self) -> &'static str {
        match self {
            DaemonKind::OvsVswitchd => "ovs-vswitchd",
            DaemonKind::OvsdbServer => "ovsdb-server",
        }
    }

    /// The names that the program's file may have: Debian's package openvswitch-switch-dpdk has one of its own, to which
    /// update-alternatives(1) links [`DaemonKind::program`].
    pub fn file_names(self) -> &'static [&'static str] {
        match self {
            DaemonKind::OvsVswitchd => &["ovs-vswitchd", "ovs-vswitchd-dpdk"],
            DaemonKind::OvsdbServer => &["ovsdb-server"],
        }
    }
}

/// A soft and a hard limit of a process, as `/proc/PID/limits` shows them; `None` is unlimited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// The name in `/proc/PID/limits`, for example `Max open files`.
    pub name: String,
    /// The soft limit.
    pub soft: Option<u64>,
    /// The hard limit.
    pub hard: Option<u64>,
}

/// A running daemon and all that makes a second start of it the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Daemon {
    /// Which daemon.
    pub kind: DaemonKind,
    /// Its process.
    pub id: ProcessId,
    /// The executable, without the kernel's ` (deleted)`.
    pub exe: PathBuf,
    /// True where the package has replaced or removed that file since the start.
    pub exe_deleted: bool,
    /// The command line.
    pub argv: Vec<String>,
    /// The environment, as bytes made readable.
    pub environment: Vec<(String, String)>,
    /// The working directory.
    pub cwd: PathBuf,
    /// `/proc/PID/comm`.
    pub comm: String,
    /// The nice value.
    pub nice: i32,
    /// The resource limits.
    pub limits: Vec<Limit>,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adj: i32,
    /// The file mode creation mask.
    pub umask: u32,
    /// The effective user.
    pub uid: u32,
    /// The effective group.
    pub gid: u32,
    /// The supplementary groups.
    #[serde(default)]
    pub groups: Vec<u32>,
    /// The effective capabilities, by the number of their bit (capabilities(7)).
    #[serde(default)]
    pub capabilities: u64,
    /// The cgroup-v2 path (or the systemd hierarchy's on v1), for example `/system.slice/ovs-vswitchd.service`.
    pub cgroup: String,
    /// The process that started it with `--monitor` and would start it again, if any.
    pub monitor: Option<ProcessId>,
    /// Its PID file.
    pub pid_file: PathBuf,
    /// Its control socket.
    pub control: PathBuf,
    /// Its log file, where it has one.
    pub log_file: Option<PathBuf>,
    /// The process id in its own pid namespace, which its PID file and the name of its control socket say.
    #[serde(default)]
    pub own_pid: i32,
    /// It runs in a container: its root directory or its pid namespace is not ours.
    #[serde(default)]
    pub contained: bool,
}

/// What a daemon says it is, and what a start now would give.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// Of the running daemon (`version` through its control socket).
    pub running: String,
    /// Of the program on disk (`--version`).
    pub installed: String,
}

/// Which signal to send. Only what a run needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGSTOP.
    Stop,
    /// SIGCONT.
    Continue,
    /// SIGTERM.
    Terminate,
    /// SIGKILL.
    Kill,
}

/// The daemons of the host.
pub trait Daemons: Send + Sync {
    /// The ovs-vswitchd that owns the upcall port ids which the datapath is bound to. Never looked up by PID file. Like
    /// every daemon here it is root's or that of the run directory's user: a process that only says of itself that it is
    /// one does not count, whatever it owns.
    fn find_vswitchd(&self, upcall_port_ids: &[u32]) -> Result<Daemon>;
    /// The ovsdb-server that listens on the database socket (`SO_PEERCRED`).
    fn find_ovsdb_server(&self) -> Result<Daemon>;
    /// Does systemd alone listen on the database socket, so that it would start ovsdb-server for whoever connects? False
    /// where that cannot be told.
    fn would_start_database(&self) -> bool;
    /// Does systemd listen on the database socket, so that the server which its unit starts gets that very socket?
    fn systemd_listens(&self) -> Result<bool>;
    /// Holds the listening sockets that this daemon was handed at its start (`--remote=pfd:N`, Open vSwitch 4.0), so that
    /// they outlive it: clients wait in their queue, and [`Daemons::start_like`] hands them on. May be run twice.
    fn keep_listening(&self, daemon: &Daemon) -> Result<()>;
    /// Every running daemon of a kind, whatever it is bound to: those that hold the lock of a PID file in the run directory
    /// and have a control socket, so neither monitors nor starters that wait for their child.
    fn find_all(&self, kind: DaemonKind) -> Result<Vec<Daemon>>;
    /// All that is known of the process `pid`, held from now on. The kernel or systemd has named it; one that cannot be a
    /// daemon of this host is an error.
    fn describe(&self, kind: DaemonKind, pid: i32) -> Result<Daemon>;
    /// Is this very process alive (a zombie is not)?
    fn is_alive(&self, id: ProcessId) -> bool;
    /// Signals this very process, never a later one with its number. A process that has ended is an error.
    fn signal(&self, id: ProcessId, signal: Signal) -> Result<()>;
    /// Ends the monitor of a daemon, where it has one, and whatever that has started: it would start another in the place
    /// of one that crashed. May be done twice.
    fn end_monitor(&self, daemon: &Daemon, until: Instant) -> Result<()>;
    /// The processes of a cgroup that were started since `ticks` (clock ticks after boot), but for reload hooks of ours.
    fn started_since(&self, cgroup: &str, ticks: u64) -> Result<Vec<ProcessId>>;
    /// Does the daemon listen on its control socket, this very process?
    fn listens(&self, daemon: &Daemon) -> bool;
    /// Waits until the process has ended; false where `until` passes first.
    fn wait_end(&self, id: ProcessId, until: Instant) -> Result<bool>;
    /// What runs, by its own word.
    fn running_version(&self, daemon: &Daemon, until: Instant) -> Result<String>;
    /// What runs and what is installed.
    fn versions(&self, daemon: &Daemon, until: Instant) -> Result<Versions>;
    /// A unixctl command to this daemon: where another process listens in its place, that is an error.
    fn command(&self, daemon: &Daemon, command: &str, arguments: &[&str], until: Instant) -> Result<String>;
    /// Puts the old daemon's PID file aside, so that a second daemon can be started under the same name.
    fn set_aside_pid_file(&self, old: &Daemon) -> Result<()>;
    /// Waits for the new daemon's PID file and describes the process in it, which must be `old`'s program.
    fn wait_pid_file(&self, old: &Daemon, until: Instant) -> Result<Daemon>;
    /// Gives the name back to the old daemon, keeping the new one's file beside it.
    fn swap_pid_file(&self, old: &Daemon, new: &Daemon) -> Result<()>;
    /// Makes the name `owner`'s (the one daemon that goes on living) and removes what lies beside it. May be run
    /// twice, from any state that a crash can leave.
    fn settle_pid_file(&self, owner: &Daemon) -> Result<()>;
    /// Waits until a standby has read the database and waits for its lock.
    fn wait_standby(&self, standby: &Daemon, until: Instant) -> Result<()>;
    /// Starts a daemon as `model` was started, where no service manager owns it. Returns once the command has been
    /// started: an ovs-vswitchd that finds the lock taken lets its starter wait. The program is the unit's, or that of a
    /// fixed path; one that ran as a user of its own is started as that user, with what it says and may do, never as root.
    fn start_like(&self, model: &Daemon) -> Result<Box<dyn Starting>>;
    /// As [`Daemons::start_like`] with the program that [`Daemons::save_program`] kept: the way back. The process is
    /// put into the cgroup of `model`, so that its unit goes on owning it.
    fn start_saved(&self, model: &Daemon, saved: &SavedProgram) -> Result<Box<dyn Starting>>;
    /// The files that the daemon runs and that a package has replaced or removed since it started: its executable and
    /// shared objects, the C library's as well. None of a daemon in a container, whose files are not this host's.
    fn replaced(&self, daemon: &Daemon) -> Result<Vec<String>>;
    /// Keeps the program of a running daemon, which says it is `version`, and those of its shared objects that a
    /// package has replaced since, in the first of `folders` from which it runs (`--version`). May be run twice.
    fn save_program(&self, daemon: &Daemon, version: &str, folders: &[PathBuf], until: Instant)
        -> Result<SavedProgram>;
    /// Removes the PID file under the name of `model`, and what lies beside it, where they name processes that have
    /// ended.
    fn remove_stale_pid_files(&self, model: &Daemon) -> Result<()>;
    /// What an ovsdb-server serves, to whom, and how.
    fn server_state(&self, server: &Daemon, until: Instant) -> Result<ServerState>;
    /// How a daemon logs.
    fn logs(&self, daemon: &Daemon, until: Instant) -> Result<Logs>;
    /// Have the files that ovs-ctl describes the host by changed since `server` was started? `options` are those in which
    /// its unit says what to write.
    fn sources(&self, server: &Daemon, options: &[PathBuf]) -> Sources;
}

/// The program of a daemon, kept for the way back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedProgram {
    /// The copy of the executable.
    pub program: PathBuf,
    /// Where the shared objects are that a package has replaced; `None` where it has replaced none.
    pub libraries: Option<PathBuf>,
}

impl SavedProgram {
    /// `LD_LIBRARY_PATH` of a process that runs it, where it needs one; `own` is what it would have without us.
    pub fn library_path(&self, own: Option<&str>) -> Option<String> {
        let libraries = self.libraries.as_ref()?.to_string_lossy();
        Some(own.filter(|own| !own.is_empty()).map_or(libraries.to_string(), |own| format!("{libraries}:{own}")))
    }
}

/// A start under way.
pub trait Starting: Send {
    /// Waits for the starting command to end well (the daemon has detached); false where `until` passes first.
    fn wait(&mut self, until: Instant) -> Result<bool>;
    /// Ends the starting command, and the daemon that it still waits for; one that has detached is another matter.
    fn cancel(&mut self);
}

/// An interface of a port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its type; empty for a system device.
    pub kind: String,
    /// Its OpenFlow port number, where it has one.
    pub ofport: Option<i64>,
    /// `options:dst_port`, where set: it names the datapath's port of a tunnel.
    pub dst_port: Option<String>,
    /// True where BFD is enabled on it.
    pub bfd: bool,
    /// True where CFM is enabled on it.
    pub cfm: bool,
    /// True where LLDP is enabled on it.
    #[serde(default)]
    pub lldp: bool,
    /// True where ovs-vswitchd polices what it receives, by an ingress qdisc of its own.
    #[serde(default)]
    pub policed: bool,
    /// The MTU that the database asks for, bytes.
    #[serde(default)]
    pub mtu_request: Option<i64>,
}

/// The QoS of a port, where the database asks for one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qos {
    /// For example `linux-htb`; empty is the same as no QoS.
    pub kind: String,
    /// The numbers of its queues.
    pub queues: Vec<i64>,
}

/// A port of a bridge.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Access VLAN, where it has one.
    pub tag: Option<i64>,
    /// Trunked VLANs; empty is all of them.
    pub trunks: Vec<i64>,
    /// The inner VLANs that a `dot1q-tunnel` port takes; empty is all of them.
    #[serde(default)]
    pub cvlans: Vec<i64>,
    /// `access`, `trunk`, `native-tagged`, `native-untagged`, `dot1q-tunnel`, where set.
    pub vlan_mode: Option<String>,
    /// `active` or `passive` where LACP is on.
    pub lacp: Option<String>,
    /// How a bond spreads its traffic, where that is set.
    #[serde(default)]
    pub bond_mode: Option<String>,
    /// Its QoS, where it has one.
    #[serde(default)]
    pub qos: Option<Qos>,
    /// Its interfaces; more than one is a bond.
    pub interfaces: Vec<Interface>,
}

/// A bridge, as the database has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bridge {
    /// Its name.
    pub name: String,
    /// `system` (or empty) for the kernel's datapath, `netdev` for userspace.
    pub datapath_type: String,
    /// The OpenFlow versions it is limited to; empty is the default set.
    pub protocols: Vec<String>,
    /// `standalone`, `secure` or empty.
    pub fail_mode: String,
    /// Targets of its controllers. A bridge with one loses its rules when flow-restore-wait is removed.
    pub controllers: Vec<String>,
    /// Of them, those that the daemon was connected to, by its own word (up to 5 s old).
    #[serde(default)]
    pub connected: Vec<String>,
    /// Of them, those that are primary or secondary, by their role.
    #[serde(default)]
    pub ranked: Vec<String>,
    /// It snoops on multicast memberships.
    #[serde(default)]
    pub snoops: bool,
    /// STP is on.
    pub stp: bool,
    /// RSTP is on.
    pub rstp: bool,
    /// How many mirrors it has.
    pub mirrors: usize,
    /// It exports NetFlow.
    pub netflow: bool,
    /// It exports sFlow.
    pub sflow: bool,
    /// It exports IPFIX.
    pub ipfix: bool,
    /// It exports IPFIX of single flows.
    #[serde(default)]
    pub flow_ipfix: bool,
    /// Its ports.
    pub ports: Vec<Port>,
}

impl Bridge {
    /// Is it of the kernel's datapath?
    pub fn is_of_kernel(&self) -> bool {
        matches!(self.datapath_type.as_str(), "" | "system")
    }
}

/// What the database says about this host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseFacts {
    /// `other_config` of Open_vSwitch.
    pub other_config: BTreeMap<String, String>,
    /// `external_ids` of Open_vSwitch.
    pub external_ids: BTreeMap<String, String>,
    /// `ovs_version` column.
    pub ovs_version: String,
    /// Version of the schema that the server serves, for example `8.3.1`.
    pub schema_version: String,
    /// `system_type` column, where set.
    #[serde(default)]
    pub system_type: Option<String>,
    /// `system_version` column, where set.
    #[serde(default)]
    pub system_version: Option<String>,
    /// `dpdk_initialized` column.
    pub dpdk_initialized: bool,
    /// What the configuration's writers ask for.
    pub next_cfg: i64,
    /// What ovs-vswitchd has carried out.
    pub cur_cfg: i64,
    /// The bridges, by name; without those of [`DatabaseFacts::ignored_bridges`].
    pub bridges: Vec<Bridge>,
    /// Names of bridges that no ovs-vswitchd makes, as they would lead out of its folder (`add_del_bridges`,
    /// vswitchd/bridge.c). No path may be made of them.
    #[serde(default)]
    pub ignored_bridges: Vec<String>,
    /// The conntrack zones of the kernel's datapath, by number; none where the schema has no such table.
    pub ct_zones: Vec<CtZone>,
    /// The limit of zones without one, where the schema has it (OVS 3.3) and it is set.
    pub ct_zone_default_limit: Option<u32>,
}

impl DatabaseFacts {
    /// Whether a boolean in `other_config` is on (`smap_get_bool`: only `true` is).
    pub fn is_on(&self, key: &str) -> bool {
        self.other_config.get(key).is_some_and(|v| v == "true")
    }

    /// Has ovn-controller a hand in flow-restore-wait, now or before this run set its key aside?
    pub fn has_ovn_wait(&self) -> bool {
        [OVN_MANAGED, OVN_MANAGED_ASIDE].iter().any(|key| self.external_ids.contains_key(*key))
    }

    /// Is flow-restore-wait set, and not for ovn-controller to take it away after a reboot? In that case the running
    /// ovs-vswitchd has seen it false once, and looks no more.
    pub fn is_restore_wait_stuck(&self) -> bool {
        self.is_on("flow-restore-wait") && self.external_ids.get(OVN_MANAGED).is_none_or(|v| v != "true")
    }
}

/// The key of `external_ids` by which ovn-controller (24.03.8, 25.03.3, 25.09.3, 26.03.1) says that flow-restore-wait is its
/// own. Later ones delete a flag that has it.
pub const OVN_MANAGED: &str = "ovn-managed-flow-restore-wait";
/// Ours, in its place while a run has a flag of its own: ovn-controller leaves that alone then.
pub const OVN_MANAGED_ASIDE: &str = "ovs-graceful-ovn-managed-flow-restore-wait";

/// What became of a request to remove flow-restore-wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cleared {
    /// It was ours and is gone; `next_cfg` to wait for.
    Removed {
        /// Wait for `cur_cfg` to reach this.
        next_cfg: i64,
    },
    /// Our mark was there, but somebody else had removed the flag (hazards 23).
    AlreadyGone,
    /// The flag, if it is there, is not ours: left alone.
    NotOurs,
}

/// The database.
pub trait Database: DatabaseDisk + Send + Sync {
    /// Everything Check and the report want to know.
    fn facts(&self, until: Instant) -> Result<DatabaseFacts>;
    /// Sets `other_config:flow-restore-wait=true` and our mark of run `run`, and increments `next_cfg`, in one
    /// transaction. Fails, and changes nothing, where the flag is set already. Returns `next_cfg`.
    fn set_restore_wait(&self, run: &str, until: Instant) -> Result<i64>;
    /// Removes the flag where our mark of run `run` stands beside it, and increments `next_cfg`. May be run twice.
    fn clear_restore_wait(&self, run: &str, until: Instant) -> Result<Cleared>;
    /// Changes the timeout policies of these zones by a key that says nothing to the kernel, and marks them.
    fn touch_policies(&self, zones: &[u16], until: Instant) -> Result<()>;
    /// Changes the marked ones back. May be run twice.
    fn clear_touched_policies(&self, until: Instant) -> Result<()>;
    /// Gives ovn-controller back the flow-restore-wait that [`Database::set_restore_wait`] has set aside, once the running
    /// ovs-vswitchd has seen none. May be run twice.
    fn return_ovn_wait(&self, until: Instant) -> Result<()>;
    /// Leaves nothing of run `run`: the flag with its mark, and marked timeout policies.
    fn clear_all(&self, run: &str, until: Instant) -> Result<Cleared> {
        let cleared = self.clear_restore_wait(run, until)?;
        self.clear_touched_policies(until)?;
        Ok(cleared)
    }
    /// Increments `next_cfg` alone, as `ovs-vsctl` without `--no-wait` would. Returns it.
    fn bump(&self, until: Instant) -> Result<i64>;
    /// The same, and on return it is on the disk: proves that the database can be written.
    fn prove_writable(&self, until: Instant) -> Result<()>;
    /// Waits until ovs-vswitchd has carried out `next_cfg`.
    fn wait_in_step(&self, next_cfg: i64, until: Instant) -> Result<()>;
    /// Runs operations (RFC 7047, 5.2) on database Open_vSwitch; any that fails is an error and nothing is done.
    fn transact(&self, operations: Vec<serde_json::Value>, until: Instant) -> Result<Vec<serde_json::Value>>;
    /// Makes the row of this host say what `row` says; other keys of `external_ids` stay. May be done twice.
    fn write_row(&self, row: &SystemRow, until: Instant) -> Result<()>;
    /// Gets into the queue for the lock that an ovs-vswitchd must have before it touches anything (RFC 7047, 4.1.8).
    fn queue_for_switch_lock(&self, until: Instant) -> Result<Box<dyn SwitchLock>>;
    /// Watches flow-restore-wait from now on.
    fn watch_restore_wait(&self, until: Instant) -> Result<Box<dyn RestoreWaitWatch>>;
}

/// A place in the queue for the lock of ovs-vswitchd. Dropped, also by our death, it is given up.
pub trait SwitchLock: Send {
    /// Is it ours by now? Gets a new place where the server has been replaced meanwhile; never waits.
    fn is_ours(&mut self) -> bool;
}

/// Notices that somebody else removes flow-restore-wait (hazards 23).
pub trait RestoreWaitWatch: Send {
    /// The flag as of now; while the database's server is away, as it was last seen.
    fn is_set(&mut self) -> Result<bool>;
}

/// The unit of ovs-vswitchd, in every distribution that has one.
pub const SWITCH_UNIT: &str = "ovs-vswitchd.service";

/// The unit of ovsdb-server, in every distribution that has one.
pub const DATABASE_UNIT: &str = "ovsdb-server.service";

/// The units that stand for both daemons, of Debian and of RHEL.
pub const UMBRELLAS: [&str; 2] = ["openvswitch-switch.service", "openvswitch.service"];

/// The units of Open vSwitch, whose jobs would pull the daemons away under a run (hazards 21): those of the daemons, and
/// those that stand for both, of Debian and of RHEL.
pub const UNITS: [&str; 4] = [SWITCH_UNIT, DATABASE_UNIT, UMBRELLAS[0], UMBRELLAS[1]];

/// Our unit that is stopped before every unit that hangs on those of Open vSwitch, and takes their restarts back.
pub const GATE: &str = "ovs-graceful-neighbours.service";

/// Of Open vSwitch as well; its package's scripts restart it beside the umbrella unit.
pub const HOSTNAME_UNIT: &str = "ovs-record-hostname.service";

/// Is this a unit of Open vSwitch or of ours, and no neighbour?
pub fn is_our_own(unit: &str) -> bool {
    UNITS.contains(&unit) || unit == HOSTNAME_UNIT || unit.starts_with("ovs-graceful-")
}

/// A unit that systemd stops and restarts with one of Open vSwitch's (`Requires=`, `BindsTo=`, `PartOf=`), directly or by
/// way of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Its name.
    pub name: String,
    /// The unit of Open vSwitch that it hangs on.
    pub hangs_on: String,
    /// `active`, `deactivating`, `inactive`, ...
    pub state: String,
    /// Whether it stays as it is where one of Open vSwitch's units is restarted.
    pub gated: Gated,
}

/// Whether [`GATE`] takes the restart of a unit back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gated {
    /// Before it is stopped.
    Yes,
    /// The gate is not installed.
    NoGate,
    /// The gate is there and not active.
    Inactive,
    /// The gate does not wait for it: no daemon-reload since its unit was written.
    NotOrdered,
}

/// A service unit, as its manager has it loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// Its name, for example `ovs-vswitchd.service`.
    pub name: String,
    /// `active`, `reloading`, `inactive`, `failed`, `activating`, `deactivating`.
    pub active_state: String,
    /// For example `running`.
    pub sub_state: String,
    /// The main process; 0 is none.
    pub main_pid: i32,
    /// The process of a command under way (ExecStart=, ExecReload=, ...); 0 is none.
    pub control_pid: i32,
    /// `PIDFile=`, where set.
    pub pid_file: Option<PathBuf>,
    /// The program and arguments of `ExecStart=`: `$VARIABLES` not expanded, `%` specifiers expanded.
    pub exec_start: Vec<String>,
    /// The same of `ExecReload=`.
    pub exec_reload: Vec<String>,
    /// The text of the unit file.
    pub fragment: Option<PathBuf>,
    /// The drop-ins that are loaded.
    pub drop_ins: Vec<PathBuf>,
    /// True where a file has changed since it was loaded.
    pub needs_daemon_reload: bool,
    /// Its cgroup.
    pub control_group: String,
    /// `EnvironmentFile=` entries.
    pub environment_files: Vec<PathBuf>,
    /// `Type=`.
    pub kind: String,
    /// `TriggeredBy=`: the units that start it, such as `ovsdb-server.socket`.
    #[serde(default)]
    pub triggered_by: Vec<String>,
}

/// What the run-time drop-in of a hand-over says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    /// The unit, for example `ovs-vswitchd.service`.
    pub unit: String,
    /// The PID file to re-read when the reload ends.
    pub pid_file: PathBuf,
    /// Our program and its arguments up to and with `--`; the unit's own ExecStart= words are put behind.
    pub hook: Vec<String>,
    /// How long the reload may take, seconds.
    pub limit_s: u64,
}

/// The unit that the supervisor runs in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupervisorUnit {
    /// Its name, for example `ovs-graceful-run.service`.
    pub name: String,
    /// What `systemctl status` calls it.
    pub description: String,
    /// The program (an absolute path) and its arguments.
    pub command: Vec<String>,
    /// Run when the supervisor has ended, however it ended.
    pub stop_post: Vec<String>,
    /// Exit codes that end it for good. However else it ends, it is started again with what it has
    /// [kept](ServiceManager::keep).
    pub ends_with: Vec<i32>,
    /// Added to its environment.
    pub environment: Vec<(String, String)>,
    /// Its nice value.
    pub nice: i32,
}

/// The timer that looks after guarded timeout policies, and the service it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardUnits {
    /// The timer's name.
    pub timer: String,
    /// The service's name.
    pub service: String,
    /// The program (an absolute path) and its arguments.
    pub command: Vec<String>,
    /// From the end of one look to the next.
    pub interval: Duration,
    /// How long one look may take.
    pub limit: Duration,
    /// It is confined to what a look at timeout policies takes.
    pub confined: bool,
}

/// A job of the service manager that has not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueuedJob {
    /// Its number.
    pub id: u32,
    /// The unit it is for.
    pub unit: String,
    /// `start`, `stop`, `restart`, `reload`, ...
    pub kind: String,
    /// It is being carried out; else it waits for others.
    pub running: bool,
}

/// A job for a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    /// `systemctl start`.
    Start,
    /// `systemctl stop`.
    Stop,
    /// `systemctl restart`.
    Restart,
    /// `systemctl reload`.
    Reload,
}

/// The service manager. Jobs are queued with mode `ignore-dependencies`: no other unit is pulled along.
pub trait ServiceManager: Send + Sync {
    /// Is it there at all?
    fn is_running(&self) -> bool;
    /// The service unit that owns this daemon (by its main process, or by being Open vSwitch's own unit).
    fn owner(&self, daemon: &Daemon, until: Instant) -> Result<Option<Unit>>;
    /// A unit by name; `None` where there is none to load.
    fn unit(&self, name: &str, until: Instant) -> Result<Option<Unit>>;
    /// Is a stop of the whole machine under way (hazards 21)?
    fn shutdown_queued(&self, until: Instant) -> Result<bool>;
    /// All jobs that somebody has queued.
    fn jobs(&self, until: Instant) -> Result<Vec<QueuedJob>>;
    /// The loaded units that hang on those of Open vSwitch.
    fn neighbours(&self, until: Instant) -> Result<Vec<Neighbour>>;
    /// Takes a job out of the queue: it ends as `canceled`. One that has ended meanwhile is no error.
    fn cancel_job(&self, id: u32, until: Instant) -> Result<()>;
    /// Writes the run-time drop-in, loads it and returns the unit with it; no unit of Open vSwitch can be stopped or
    /// restarted by hand meanwhile. May be run twice.
    fn prepare_hand_over(&self, hand_over: &HandOver, until: Instant) -> Result<Unit>;
    /// Puts `words` behind the unit's ExecStart= in a run-time drop-in, until [`ServiceManager::end_hand_over`].
    fn append_to_start(&self, unit: &str, words: &[&str], until: Instant) -> Result<()>;
    /// Has the unit find the program of `saved` before the installed one of its name (`PATH`, which is how ovs-ctl finds
    /// it), by a run-time drop-in, until [`ServiceManager::end_hand_over`].
    fn prefer_program(&self, unit: &str, saved: &SavedProgram, until: Instant) -> Result<()>;
    /// Removes the run-time drop-in of `unit` and loads what is left. May be run twice.
    fn end_hand_over(&self, unit: &str, until: Instant) -> Result<()>;
    /// The job of a unit that somebody else has queued, if there is one.
    fn job_of(&self, unit: &str, until: Instant) -> Result<Option<Box<dyn Job>>>;
    /// Queues a job and returns at once.
    fn start_job(&self, unit: &str, kind: JobKind, until: Instant) -> Result<Box<dyn Job>>;
    /// Starts the supervisor as a transient unit and waits until its program has been executed.
    fn start_supervisor(&self, unit: &SupervisorUnit, until: Instant) -> Result<()>;
    /// Has these descriptors outlive this process, until the unit of the supervisor has ended for good: a supervisor
    /// that is started in place of a dead one gets them ([`SupervisorUnit`]). On
    /// return they are safe. False where nobody would keep them (no systemd).
    fn keep(&self, descriptors: &[(&str, BorrowedFd<'_>)], until: Instant) -> Result<bool>;
    /// Starts a transient timer with its service. One of this name that is active goes on as it is.
    fn start_guard(&self, units: &GuardUnits, until: Instant) -> Result<()>;
    /// Ends the timer of [`ServiceManager::start_guard`] and returns at once; where there is none, that is no error.
    fn end_guard(&self, timer: &str, until: Instant) -> Result<()>;
}

/// A queued job.
pub trait Job: Send {
    /// Waits for its end; `None` where `until` passes first. `Ok(Some("done"))` is success, other words are systemd's
    /// (`failed`, `timeout`, `canceled`, `dependency`, `skipped`).
    fn wait(&mut self, until: Instant) -> Result<Option<String>>;
}

/// Queues a job of `unit` and waits for its end.
///
/// # Errors
/// Where it does not end well, or not before `until`.
pub fn complete_job(services: &dyn ServiceManager, unit: &str, kind: JobKind, until: Instant) -> Result<()> {
    match services.start_job(unit, kind, until)?.wait(until)?.as_deref() {
        Some("done") => Ok(()),
        Some(other) => {
            Err(HostError::new(unit, format!("its job ended as `{other}`"))
                .remedy(format!("see `journalctl -u {unit}`")))
        }
        None => Err(HostError::timeout(unit, "waiting for the end of its job")),
    }
}

/// The OpenFlow state of a bridge: in the words of ovs-ofctl, which are compared and told, and in the daemon's own bytes,
/// which are given back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeRules {
    /// The bridge.
    pub bridge: String,
    /// The highest version that the bridge speaks, for example `OpenFlow15`: all is read in it but some flows.
    pub protocol: String,
    /// `{class=..,type=..,len=..}->tun_metadataN`, one a line of the TLV map.
    pub tlv_map: Vec<String>,
    /// The meters, as `add-meter` takes them.
    pub meters: Vec<String>,
    /// The groups, as `add-groups` takes them.
    pub groups: Vec<String>,
    /// The flows, as `add-flows` takes them, without counters and ages.
    pub flows: Vec<String>,
    /// The rules that no version tells as the daemon has them. Flows of them are not in `flows`; groups of them, which
    /// flows need, are in `groups` as the highest version tells them.
    #[serde(default)]
    pub untold: Vec<RefusedRule>,
    /// The groups of which the daemon does not show whether they are what is told.
    #[serde(default)]
    pub unsure: Vec<RefusedRule>,
    /// What adds all of it.
    #[serde(default)]
    pub messages: Messages,
}

impl BridgeRules {
    /// Is there a message for each of its rules? Another version of ovs-graceful may have kept the words alone.
    pub fn has_messages(&self) -> bool {
        let kinds = [
            (self.groups.len(), &self.messages.groups),
            (self.flows.len(), &self.messages.flows),
            (self.meters.len(), &self.messages.meters),
            (self.tlv_map.len(), &self.messages.tlv_map),
        ];
        kinds.iter().all(|(count, messages)| messages.each().count() == *count)
    }
}

/// How a bridge was restored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredRules {
    /// The bridge.
    pub bridge: String,
    /// True where its rules appeared one after the other: its version has no bundles (before OpenFlow 1.3), or it refused
    /// them.
    pub not_atomic: bool,
    /// The rules that are not there.
    #[serde(default)]
    pub refused: Vec<RefusedRule>,
}

/// A rule that cannot be put back as it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RefusedRule {
    /// The bridge.
    pub bridge: String,
    /// `flow`, `group`, `meter` or `tlv-map`.
    pub kind: String,
    /// The rule.
    pub rule: String,
    /// The OpenFlow error, ovs-ofctl's words, or what it would become.
    pub reason: String,
}

impl fmt::Display for RefusedRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bridge {}: {} `{}`: {}", self.bridge, self.kind, self.rule, self.reason)
    }
}

/// A restore that waits for the new daemon, and the rules that it could not put back.
pub struct Preparation {
    /// The restore.
    pub restore: Box<dyn PreparedRestore>,
    /// Where there are any, their bridges are not prepared.
    pub refused: Vec<RefusedRule>,
}

/// A rule that is there on one side only.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RuleDifference {
    /// The bridge.
    pub bridge: String,
    /// `flow`, `group`, `meter` or `tlv-map`.
    pub kind: String,
    /// True where it was there before and is not now; false where it is new.
    pub missing: bool,
    /// True where the rule has a time-out: it may have gone, or been learned, rightly.
    pub timed: bool,
    /// The rule.
    pub rule: String,
}

/// A learned MAC address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdbEntry {
    /// OpenFlow port number, or `LOCAL`.
    pub port: String,
    /// VLAN of the entry; 0 is none.
    pub vlan: u16,
    /// The address, as `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Seconds since it was seen; `None` for a static entry.
    pub age_s: Option<u32>,
}

/// What became of learned addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LearnReport {
    /// How many are in the table again.
    pub restored: u64,
    /// How many there was no time for.
    pub unasked: u64,
    /// How many are not, by another reason.
    pub skipped: BTreeMap<String, u64>,
}

impl LearnReport {
    /// With what became of those that there had been no time for.
    pub fn and_then(&mut self, rest: LearnReport) {
        self.restored += rest.restored;
        self.unasked = rest.unasked;
        for (reason, count) in rest.skipped {
            *self.skipped.entry(reason).or_default() += count;
        }
    }
}

/// The bridges, through their management sockets.
pub trait OpenFlow: Send + Sync {
    /// Flows, groups, meters and TLV maps of `bridges`, which are `daemon`'s, read side by side.
    fn snapshot(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<BridgeRules>>;
    /// How many flows each of `bridges` has now, in their order: asked of the daemon as a number, not dumped.
    fn count_flows(&self, bridges: &[BridgeRules], until: Instant) -> Result<Vec<u64>>;
    /// `before` brought up to now: everything is read again but the flows of those bridges that `watch` saw no change
    /// of (hazards 22).
    fn refresh(
        &self,
        daemon: &Daemon,
        bridges: &[Bridge],
        before: &[BridgeRules],
        watch: &mut dyn RuleWatch,
        until: Instant,
    ) -> Result<Vec<BridgeRules>>;
    /// Watches the flows of `bridges` from now on. A bridge that cannot be watched counts as changed.
    fn watch(&self, bridges: &[Bridge], until: Instant) -> Result<Box<dyn RuleWatch>>;
    /// Waits until `daemon` has all of `bridges` and each one's management socket answers. From then on it keeps up to
    /// `flow_limit` kernel flows (hazards 24: it begins with 10,000; above its limit handlers do not install flows, far
    /// above it all are deleted).
    fn wait_ready(&self, daemon: &Daemon, bridges: &[Bridge], flow_limit: u32, until: Instant) -> Result<()>;
    /// Makes each bridge's rules `rules`, bridges side by side; what else is there goes. A rule that the daemon refuses
    /// costs no other, but those that need it. May be run twice.
    fn restore(&self, rules: &[BridgeRules], until: Instant) -> Result<Vec<RestoredRules>>;
    /// Does all of a restore that can be done before the new daemon is there: each rule is proved to be one that can be
    /// put back, by `daemon`, which has them. Changes nothing.
    fn prepare_restore(&self, daemon: &Daemon, rules: &[BridgeRules], until: Instant) -> Result<Preparation>;
    /// The flows of `bridges` that `daemon` has and that the installed ovs-ofctl, which is of another version, cannot read:
    /// not all of them where there are many.
    fn unreadable(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<RefusedRule>>;
    /// The learned addresses of each of `bridges` in `daemon`, in their order, the latest first.
    fn fdb(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<Vec<FdbEntry>>>;
    /// Teaches `daemon` the addresses, without a packet being sent. What does not fit in before `until` is skipped.
    fn learn(&self, daemon: &Daemon, bridge: &Bridge, entries: &[FdbEntry], until: Instant) -> Result<LearnReport>;
    /// What else each of `bridges` knows, in their order, as `daemon` has it.
    fn state(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<Vec<BridgeState>>;
    /// Gives `daemon` what the bridges knew. Returns what it has not taken, in words. May be run twice.
    fn give_state(
        &self,
        daemon: &Daemon,
        bridges: &[Bridge],
        wanted: &[BridgeState],
        until: Instant,
    ) -> Result<Vec<String>>;
    /// Waits until `daemon` is connected to all controllers that `bridges` were connected to: before, it throws packets
    /// for them away.
    fn wait_for_controllers(&self, daemon: &Daemon, bridges: &[Bridge], until: Instant) -> Result<()>;
    /// Does both and returns when both are done: at the same time, or one after the other.
    fn both(&self, one: &mut dyn FnMut(), other: &mut (dyn FnMut() + Send));
}

/// A restore that waits for the new daemon.
pub trait PreparedRestore: Send {
    /// As [`OpenFlow::prepare_restore`], for the bridges whose rules are not those that they were prepared with.
    fn update(&mut self, daemon: &Daemon, rules: &[BridgeRules], until: Instant) -> Result<Vec<RefusedRule>>;
    /// As [`OpenFlow::restore`], fast for each bridge whose rules are still those that it was prepared with. May be done
    /// more than once.
    fn commit(&self, rules: &[BridgeRules], until: Instant) -> Result<Vec<RestoredRules>>;
}

/// Notices changes of flows.
pub trait RuleWatch: Send {
    /// The bridges whose flows have changed since the watch began, or may have.
    fn changed(&mut self, until: Instant) -> Result<std::collections::BTreeSet<String>>;
    /// TLV map, meters and groups of a bridge as of now, through the connection that is open already; the flows of the
    /// answer are empty. `None` where it cannot, as with versions before OpenFlow 1.3.
    fn small_tables(&mut self, bridge: &str) -> Option<BridgeRules>;
}

//! The truth about the simulated host, and what happens in it by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dpfreeze::freeze::{Captured, Classes, KeptQdisc, Refused, Skipped};
use dpfreeze::ovs::Dispatch;

use super::devices::{BY_HAND, SHAPED, SHAPED_INDEX};
use super::disk::Files;
use super::fault::{Fault, Script};
use crate::control::{AbortGate, HookCommand};
use crate::host::datapath::FreezeEvent;
use crate::host::kept::{Given, Served, ServerByHand, MANAGERS, SWITCH_DATABASE};
use crate::host::logs::LogsByHand;
use crate::host::{
    Bridge, BridgeRules, Daemon, DaemonKind, FdbEntry, HostError, Interface, Logs, Port, ProcessId, Result,
    ServerState, StateItem, SystemRow,
};

/// The unit of the switch.
pub(super) const SWITCH: &str = "ovs-vswitchd.service";
/// The unit of the database server.
pub(super) const SERVER: &str = "ovsdb-server.service";
/// A daemon has written its PID file and listens after this.
const APPEARS: Duration = Duration::from_millis(20);
/// A daemon has read the database after this.
pub(super) const READY: Duration = Duration::from_millis(60);
/// Upcalls that a daemon has in hand are done after this.
const IN_HAND: Duration = Duration::from_millis(3);
/// A hook whose supervisor has died gives up after this.
const HOOK_PATIENCE: Duration = Duration::from_secs(100);
/// `RestartSec=` of the units, systemd's default.
const RESTART: Duration = Duration::from_millis(100);
/// What the timeout policy of the zone says for UDP without an answer, seconds.
pub(super) const POLICY_S: u32 = 78;
/// Where the database server listens, what it is told to open besides at its start, and what somebody has opened.
const LISTENS: &str = "punix:/run/openvswitch/db.sock";
const CLOSED: &str = "ptcp:6641";
const OPENED: &str = "ptcp:6640";
/// The file of the switch's database, and that of one that somebody has added.
const FILE: &str = "/etc/openvswitch/conf.db";
const ADDED: &str = "/srv/Extra";
/// The bridge that has a controller.
const WITH_CONTROLLER: &str = "br1";
/// The MTU that somebody has set by hand, and the one that a switch that starts sets in its place.
pub const MTU: u32 = 1400;
const OWN_MTU: u32 = 1500;
/// How long the disk of the database is in trouble that nothing helps: longer than all limits of a run.
const LOST_FOR: Duration = Duration::from_secs(1800);
/// How long the machine is down, and how long the world needs to come to rest.
const LONG: Duration = Duration::from_secs(400);

/// What kind of host it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// systemd runs and owns the daemons.
    pub systemd: bool,
    /// BPF works: level `full`.
    pub freeze: bool,
    /// The installed switch works. It is another version than the running one.
    pub installed_works: bool,
    /// The unit of the switch is being restarted, and its ExecStop= has begun the run.
    pub restarting: bool,
    /// The unit of the switch is being reloaded, and its ExecReload= has begun the run.
    pub reloading: bool,
    /// Upcalls are dispatched per vport: a refused binding is tried again, with sockets that nobody has seen.
    pub per_vport: bool,
    /// The kernel does not tell who the upcalls go to (Linux 5.15 to 6.0).
    pub untold: bool,
    /// The daemons run in containers, and whoever runs that of the switch restarts it once he is told.
    pub containers: bool,
    /// A rule of the first switch that is not like others.
    pub odd: Odd,
    /// A port has a qdisc of somebody.
    pub shaped: bool,
    /// How often the kernel passes over a freeze.
    pub skipped: Skipped,
}

/// What is the matter with [`ODD_RULE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Odd {
    /// There is none.
    None,
    /// It is found out beforehand that it could not be put back; no daemon takes it.
    Told,
    /// Nothing tells so beforehand, and no daemon takes it.
    Untold,
}

/// See [`Odd`].
pub const ODD_RULE: &str = "priority=7,actions=odd";

impl Variant {
    /// Most hosts.
    pub const USUAL: Variant = Variant {
        systemd: true,
        freeze: true,
        installed_works: true,
        restarting: false,
        reloading: false,
        per_vport: false,
        untold: false,
        containers: false,
        odd: Odd::None,
        shaped: true,
        skipped: Skipped { first: 0, second: 0, unseen: 0 },
    };

    /// systemd starts the daemons.
    pub fn units(self) -> bool {
        self.systemd && !self.containers
    }
}

/// Which program a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// What ran before the run.
    Old,
    /// What is installed.
    Installed,
    /// The copy of the old one that was kept.
    Saved,
}

/// A process of a daemon. One that has ended is no longer there.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its number and start.
    pub id: ProcessId,
    /// Which daemon.
    pub kind: DaemonKind,
    /// What it runs.
    pub program: Program,
    /// SIGSTOP.
    pub stopped: bool,
    /// When it was started.
    pub born: Duration,
    /// It has written its PID file.
    pub appeared: bool,
    /// It waits for nobody: it has the database's lock and has taken over.
    pub leads: bool,
    /// Its binding was refused; it does not try again, but per vport when something wakes it.
    pub refused: bool,
    /// It has seen flow-restore-wait and keeps still.
    pub waits: bool,
    /// It has opened its datapath: it does not bind again, whoever takes the upcalls from it.
    pub opened: bool,
    /// The sockets that it gives to the datapath.
    pub port_ids: Vec<u32>,
    /// OpenFlow rules by bridge.
    pub rules: BTreeMap<String, BridgeRules>,
    /// Learned addresses by bridge.
    pub addresses: BTreeMap<String, Vec<FdbEntry>>,
    /// What bridges know besides rules and addresses.
    pub state: BTreeMap<String, BTreeSet<StateItem>>,
    /// Its requests for tunnel ports are changed into questions.
    pub watched: bool,
    /// The same of its policing of a port.
    pub polices: bool,
    /// It has taken over: its tunnels have their ports.
    pub has_tunnels: bool,
    /// It has found out what the datapath can do.
    pub probed: bool,
    /// It was told less than that.
    pub sees_less: bool,
    /// It is in its unit's cgroup.
    pub in_unit: bool,
    /// The timeout policy of the zone as it has seen it: as OVS 3.3 it makes one when that changes.
    pub touched: Option<bool>,
    /// Of a database server: what it serves.
    pub served: ServerState,
    /// How it logs.
    pub logs: Logs,
}

/// The freeze: pinned, so it outlives who loaded it.
#[derive(Debug, Clone)]
pub struct Frost {
    /// What is refused.
    pub classes: Classes,
    /// Until when, if nobody renews.
    pub lease: Duration,
    /// Until when at most.
    pub end: Duration,
    /// Whose binding is captured.
    pub standby: Option<ProcessId>,
    /// What that one may not delete.
    pub kept: Vec<(u32, KeptQdisc)>,
    /// What was captured.
    pub captured: Option<Captured>,
    /// Counters.
    pub refused: Refused,
    /// How often the kernel passes over it.
    pub skipped: Skipped,
    /// What was seen.
    pub events: Vec<FreezeEvent>,
}

/// The kernel's datapath. Two flows stand for all: one that any daemon may adopt, one that recirculates.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    /// Where upcalls go.
    pub bound: Vec<u32>,
    /// The freeze, while its pins are there.
    pub frost: Option<Frost>,
    /// Whose flow the established traffic uses.
    pub established: Option<i32>,
    /// Whose flow the recirculating traffic uses.
    pub recirculating: Option<i32>,
    /// Packets parked by the supervisor that lives.
    pub parked: u64,
    /// The parking sockets of the supervisor that lives.
    pub park: Option<Vec<u32>>,
    /// The ports of tunnels are there.
    pub tunnels: bool,
    /// Internal devices have lost their addresses with the module.
    pub bare_devices: bool,
    /// A port has the qdisc that somebody has given it.
    pub shaped: bool,
    /// The MTU of a bridge's own device.
    pub mtu: u32,
    /// How many timeout policies daemons have made.
    pub policies: u32,
    /// A daemon was killed while it found out what the datapath can do.
    pub left_probe: bool,
    /// The next dump of flows has none.
    pub table_made_anew: bool,
    /// No bridge was ever made.
    pub no_datapath: bool,
    /// Nobody binds before, and what is captured until then cannot be read.
    pub binds_from: Option<Duration>,
}

/// The disk of the database.
#[derive(Debug, Clone, Default)]
pub struct TableDisk {
    /// Nothing more fits, or nothing can be written at all.
    pub state: DiskState,
    /// Room is kept beside the file.
    pub ballast: bool,
    /// The server has the database in memory, where it can be written; what the file still says.
    pub file: Option<Table>,
    /// It cannot be brought into memory.
    pub no_memory: bool,
    /// When somebody has repaired it.
    pub repaired: Option<Duration>,
}

/// How it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DiskState {
    /// It can be written.
    #[default]
    Well,
    /// It is full.
    Full,
    /// It is read-only.
    ReadOnly,
}

/// The Open_vSwitch table.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table {
    /// `other_config:flow-restore-wait`
    pub flag: bool,
    /// `external_ids:ovs-graceful-run`
    pub mark: Option<String>,
    /// `next_cfg`
    pub next_cfg: i64,
    /// `cur_cfg`
    pub cur_cfg: i64,
    /// A bridge that somebody has removed.
    pub removed: Option<&'static str>,
    /// The timeout policy of the one zone is changed for a moment.
    pub touched: bool,
    /// The row of the host.
    pub row: SystemRow,
}

/// The reload hook in the unit's cgroup, or that of ExecStop= where the unit is being restarted.
#[derive(Debug, Clone, Default)]
pub struct WorldHook {
    /// Which one.
    pub id: u64,
    /// Its supervisor has gone.
    pub orphan: bool,
    /// What it has started.
    pub started: Option<i32>,
    /// When its supervisor went.
    pub orphaned: Option<Duration>,
    /// It is ExecStop='s.
    pub stops: bool,
    /// It was told to end.
    pub told: bool,
}

/// The unit of the switch.
#[derive(Debug, Clone, Default)]
pub struct SwitchUnit {
    /// `MainPID=`
    pub main: i32,
    /// `active`, `reloading` or `failed`.
    pub state: String,
    /// Our drop-in is there.
    pub drop_in: bool,
    /// The hook of the reload under way.
    pub hook: Option<WorldHook>,
    /// Results of jobs that have ended.
    pub results: BTreeMap<u64, &'static str>,
    /// The reload under way.
    pub reload: Option<u64>,
    /// A restart whose command has not ended: the job, and the switch it has started.
    pub starting: Option<(u64, i32)>,
    /// The drop-in has it start the program that was kept.
    pub prefers_saved: bool,
    /// It has failed, and `Restart=on-failure` starts it then.
    pub restart: Option<Duration>,
}

/// The PID file of the switch and the names beside it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PidNames {
    /// The name itself.
    pub name: Option<i32>,
    /// `.ovsg-old`
    pub old: Option<i32>,
    /// `.ovsg-new`
    pub new: Option<i32>,
}

/// Whoever waits long looks more and more rarely: a wait up to a deadline is not worth thousands of looks.
#[derive(Debug, Clone, Default)]
pub struct Patience {
    sleeps: u32,
    seen: BTreeSet<&'static str>,
}

impl Patience {
    /// An operation: one that has not been seen since the wait began is the end of it.
    pub fn operation(&mut self, name: &'static str) {
        if self.seen.insert(name) {
            self.sleeps = 0;
        }
    }

    /// How long somebody sleeps who asks for `time`.
    pub fn next(&mut self, time: Duration) -> Duration {
        self.sleeps += 1;
        let longer = time * self.sleeps.saturating_sub(20).max(1);
        longer.min(Duration::from_secs(1).max(time))
    }
}

/// What was set by hand.
#[derive(Debug, Clone, Default)]
pub struct ByHand {
    /// In the database server.
    pub server: ServerByHand,
    /// Of the log of either daemon.
    pub logs: LogsByHand,
    /// In the row of the host.
    pub row: SystemRow,
}

/// Everything.
pub struct World {
    /// How long it has been waited for.
    pub patience: Patience,
    /// What kind of host.
    pub variant: Variant,
    /// What goes wrong.
    pub script: Script,
    /// Since the test began.
    pub time: Duration,
    /// Counts boots.
    pub boot: u32,
    /// The supervisor (or the recovery) under way is alive.
    pub supervisor_lives: bool,
    /// Its gate.
    pub gate: Arc<AbortGate>,
    /// All processes.
    pub processes: BTreeMap<i32, Process>,
    /// The ovs-vswitchd that the test began with.
    pub first: i32,
    /// What the switch was told.
    pub rules: BTreeMap<String, BridgeRules>,
    /// The kernel.
    pub kernel: Kernel,
    /// The database.
    pub table: Table,
    /// Its disk.
    pub table_disk: TableDisk,
    /// The run is in the queue for the database's lock, before every switch that does not have it yet.
    pub lock_queued: bool,
    /// The switch's unit.
    pub switch: SwitchUnit,
    /// A drop-in of the database's unit.
    pub server_drop_in: bool,
    /// PID files.
    pub pid_names: PidNames,
    /// The saved program.
    pub saved: Option<PathBuf>,
    /// Files.
    pub files: Files,
    /// Packets lost, by why.
    pub losses: BTreeMap<&'static str, u64>,
    /// Packets that arrived where they should.
    pub delivered: u64,
    /// How many were lost when the point of no return was told.
    pub lost_before_no_return: Option<u64>,
    /// A supervisor died while it held the upcalls.
    pub died_parking: bool,
    /// Switches that nobody had asked to end.
    pub killed: Vec<i32>,
    /// Somebody has read the rules.
    pub rules_read: bool,
    /// The old daemon died by itself before anybody had read its rules.
    pub died_unread: bool,
    /// What bridges know besides rules has been read.
    pub state_read: bool,
    /// The old daemon died by itself before that.
    pub died_knowing: bool,
    /// The machine went down.
    pub rebooted: bool,
    /// systemd keeps what the supervisor has parked.
    pub kept: bool,
    /// How often a supervisor, or a recovery, was killed.
    pub deaths: u32,
    /// What was set by hand when the test began.
    pub by_hand: ByHand,
    in_hand: Option<(i32, Duration)>,
    next_pid: i32,
    next_id: u64,
}

/// The bridges of the host: one keeps its rules by itself, one has a controller.
pub fn bridges() -> Vec<Bridge> {
    let port = |name: &str, kind: &str| {
        let policed = name == SHAPED;
        let interfaces = vec![Interface { name: name.into(), kind: kind.into(), policed, ..Interface::default() }];
        Port { name: name.into(), interfaces, ..Port::default() }
    };
    let ports = [port("vx0", "vxlan"), port(SHAPED, ""), port(BY_HAND, "internal")];
    let bridge = |name: &str| Bridge { name: name.to_owned(), fail_mode: "secure".into(), ..Bridge::default() };
    let bridge = |name: &str| Bridge { ports: ports.to_vec(), ..bridge(name) };
    let controllers = vec!["tcp:192.0.2.1".to_owned()];
    vec![bridge("br0"), Bridge { connected: controllers.clone(), controllers, ..bridge(WITH_CONTROLLER) }]
}

/// What the switch was told, by bridge.
pub fn rules(odd: Odd) -> BTreeMap<String, BridgeRules> {
    let of = |bridge: Bridge| BridgeRules {
        bridge: bridge.name.clone(),
        protocol: "OpenFlow15".into(),
        flows: vec![
            format!("priority=1,in_port=1,actions=2,comment={}", bridge.name),
            "priority=0,actions=CONTROLLER:65535".into(),
        ],
        ..BridgeRules::default()
    };
    let mut rules: BTreeMap<String, BridgeRules> =
        bridges().into_iter().map(|bridge| (bridge.name.clone(), of(bridge))).collect();
    if odd != Odd::None {
        rules.values_mut().for_each(|rules| rules.flows.insert(1, ODD_RULE.into()));
    }
    rules.into_iter().map(|(bridge, rules)| (bridge, super::openflow::told(rules))).collect()
}

/// What a database server serves that has just been started.
fn served() -> ServerState {
    let texts = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect::<BTreeSet<String>>();
    let mut state = ServerState {
        remotes: texts(&[LISTENS, CLOSED, MANAGERS]),
        names: texts(&[SWITCH_DATABASE]),
        given: Given { remotes: texts(&[LISTENS, CLOSED]), databases: texts(&[FILE]), ..Given::default() },
        ..ServerState::default()
    };
    state.add_database(Path::new("/"), FILE);
    state.databases.values_mut().for_each(|served| served.name = Some(SWITCH_DATABASE.to_owned()));
    state
}

/// What somebody has made of that.
fn served_by_hand() -> ServerState {
    let mut state = served();
    state.remotes.remove(CLOSED);
    state.remotes.remove(MANAGERS);
    state.remotes.insert(OPENED.to_owned());
    add_database(&mut state, ADDED);
    state
}

/// `ovsdb-server/add-db`, where every file is named as its database.
pub fn add_database(state: &mut ServerState, file: &str) {
    let name = file.rsplit('/').next().unwrap_or(file);
    state.names.insert(name.to_owned());
    state.databases.insert(file.to_owned(), Served { name: Some(name.to_owned()), added_by: Some(file.to_owned()) });
}

/// How a daemon logs; `level` is that of one module to its file.
fn logs(level: &str) -> Logs {
    Logs::parse(&format!("bridge OFF INFO {level}\nvlog OFF INFO INFO\n"), "")
}

/// What ovs-ctl writes of the host.
fn written_row() -> SystemRow {
    let ids = [("rundir".to_owned(), "/var/run/openvswitch".to_owned())].into();
    SystemRow { ids, system_type: Some("debian".into()), system_version: Some("12".into()) }
}

/// What bridges have learned.
pub fn addresses() -> BTreeMap<String, Vec<FdbEntry>> {
    let entry = |mac: &str| FdbEntry { port: "2".into(), vlan: 0, mac: mac.into(), age_s: Some(3) };
    BTreeMap::from([("br0".to_owned(), vec![entry("aa:bb:cc:dd:ee:01"), entry("aa:bb:cc:dd:ee:02")])])
}

/// What bridges know besides.
pub fn state() -> BTreeMap<String, BTreeSet<StateItem>> {
    let item = StateItem::Fragments { mode: 3 };
    BTreeMap::from([("br0".to_owned(), [item.clone()].into()), (WITH_CONTROLLER.to_owned(), [item].into())])
}

impl World {
    /// A host that forwards.
    pub fn new(variant: Variant, script: Script) -> World {
        let mut world = World {
            patience: Patience::default(),
            variant,
            script,
            time: Duration::ZERO,
            boot: 1,
            supervisor_lives: true,
            gate: Arc::default(),
            processes: BTreeMap::new(),
            first: 0,
            rules: rules(variant.odd),
            kernel: Kernel::default(),
            table: Table::default(),
            table_disk: TableDisk::default(),
            lock_queued: false,
            switch: SwitchUnit::default(),
            server_drop_in: false,
            pid_names: PidNames::default(),
            saved: None,
            files: Files::default(),
            losses: BTreeMap::new(),
            delivered: 0,
            lost_before_no_return: None,
            died_parking: false,
            killed: Vec::new(),
            rules_read: false,
            died_unread: false,
            state_read: false,
            died_knowing: false,
            rebooted: false,
            kept: false,
            deaths: 0,
            by_hand: ByHand::default(),
            in_hand: None,
            next_pid: 100,
            next_id: 0,
        };
        world.spawn(DaemonKind::OvsdbServer, Program::Old, variant.units());
        let first = world.spawn(DaemonKind::OvsVswitchd, Program::Old, variant.units());
        world.first = first;
        for process in world.processes.values_mut() {
            process.served = served_by_hand();
            process.logs = logs("DBG");
        }
        world.table.row = SystemRow { system_type: Some("lab".into()), ..written_row() };
        world.by_hand = ByHand {
            server: served_by_hand().by_hand(),
            logs: logs("DBG").by_hand(&["daemon".to_owned(), "--detach".to_owned()]),
            row: world.table.row.clone(),
        };
        world.switch = SwitchUnit { main: first, state: "active".into(), ..SwitchUnit::default() };
        if variant.containers {
            // There is no unit: only the hook of whoever runs the container.
            let hook = WorldHook { id: world.fresh_id(), ..WorldHook::default() };
            world.switch = SwitchUnit { hook: Some(hook), ..SwitchUnit::default() };
        }
        world.pass(Duration::from_secs(1));
        if let Some(daemon) = world.processes.get_mut(&first) {
            daemon.rules = rules(variant.odd);
            daemon.addresses = addresses();
            daemon.state = state();
        }
        world.kernel.established = Some(first);
        world.kernel.recirculating = Some(first);
        (world.kernel.shaped, world.kernel.mtu) = (variant.shaped, MTU);
        if variant.restarting {
            let id = world.fresh_id();
            world.switch.state = "deactivating".into();
            world.switch.reload = Some(id);
            world.switch.hook = Some(WorldHook { id, stops: true, ..WorldHook::default() });
        }
        if variant.reloading {
            let id = world.fresh_id();
            world.switch.state = "reloading".into();
            world.switch.reload = Some(id);
            world.switch.hook = Some(WorldHook { id, ..WorldHook::default() });
        }
        world.losses.clear();
        world.delivered = 0;
        world
    }

    /// Clock ticks after boot, as in `/proc/PID/stat`.
    pub fn ticks(&self) -> u64 {
        self.time.as_millis() as u64
    }

    /// A number that nothing else has.
    pub fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Starts a daemon.
    pub fn spawn(&mut self, kind: DaemonKind, program: Program, in_unit: bool) -> i32 {
        let pid = self.next_pid;
        self.next_pid += 1;
        let process = Process {
            id: ProcessId { pid, start_time: self.ticks() },
            kind,
            program,
            stopped: false,
            born: self.time,
            appeared: false,
            leads: false,
            refused: false,
            waits: false,
            opened: false,
            port_ids: vec![pid as u32 * 10, pid as u32 * 10 + 1],
            rules: BTreeMap::new(),
            addresses: BTreeMap::new(),
            state: BTreeMap::new(),
            in_unit,
            touched: None,
            served: served(),
            logs: logs("INFO"),
            watched: false,
            polices: false,
            has_tunnels: false,
            probed: false,
            sees_less: false,
        };
        self.processes.insert(pid, process);
        pid
    }

    /// Ends a process. Only one that was asked to takes its PID file along.
    pub fn end(&mut self, pid: i32, asked: bool) {
        let Some(process) = self.processes.remove(&pid) else { return };
        if process.kind == DaemonKind::OvsdbServer {
            // Whoever comes back first to the next server has the lock.
            self.processes.values_mut().for_each(|process| process.leads = false);
            self.lock_queued = false;
            return;
        }
        if asked {
            self.pid_names.name = None;
        } else if process.kind == DaemonKind::OvsVswitchd {
            self.killed.push(pid);
            // At the worst moment: it has not gone on since.
            self.kernel.left_probe |= process.probed && !process.opened;
        }
        if self.in_hand.is_some_and(|(owner, _)| owner == pid) {
            self.in_hand = None;
            self.lose("in hand of a daemon that ended", 2);
        }
        if self.switch.main == pid && self.switch.reload.is_none() && self.switch.state == "active" {
            self.fail_unit(asked);
        }
    }

    /// The switches, the oldest first.
    pub fn switches(&self) -> impl Iterator<Item = &Process> {
        self.processes.values().filter(|process| process.kind == DaemonKind::OvsVswitchd)
    }

    /// The database server.
    pub fn server(&self) -> Option<&Process> {
        self.processes.values().find(|process| process.kind == DaemonKind::OvsdbServer)
    }

    /// The switch that has the database's lock and runs.
    pub fn leader(&mut self) -> Option<&mut Process> {
        self.processes.values_mut().find(|process| process.leads && !process.stopped)
    }

    /// The process that reads these sockets.
    pub fn reader(&self, port_ids: &[u32]) -> Option<&Process> {
        self.processes.values().find(|process| process.port_ids.iter().any(|id| port_ids.contains(id)))
    }

    /// How many packets were lost.
    pub fn lost(&self) -> u64 {
        self.losses.values().sum()
    }

    fn lose(&mut self, why: &'static str, packets: u64) {
        *self.losses.entry(why).or_default() += packets;
    }

    /// What is refused now.
    pub fn refused_now(&self) -> Classes {
        let holds = |frost: &&Frost| self.time < frost.lease && self.time < frost.end;
        self.kernel.frost.as_ref().filter(holds).map_or(Classes::empty(), |frost| frost.classes)
    }

    /// The daemon of a process, described.
    pub fn describe(&self, process: &Process) -> Daemon {
        let program = process.kind.program();
        Daemon {
            kind: process.kind,
            id: process.id,
            exe: format!("/usr/sbin/{program}").into(),
            exe_deleted: process.program == Program::Old,
            argv: vec![program.into(), "--detach".into()],
            environment: Vec::new(),
            cwd: "/".into(),
            comm: program.into(),
            nice: -10,
            limits: Vec::new(),
            oom_score_adj: 0,
            umask: 0o022,
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            capabilities: 0,
            cgroup: if process.in_unit { format!("/system.slice/{program}.service") } else { "/".into() },
            monitor: None,
            pid_file: format!("/run/openvswitch/{program}.pid").into(),
            control: format!("/run/openvswitch/{program}.{}.ctl", process.id.pid).into(),
            log_file: None,
            own_pid: process.id.pid,
            contained: self.variant.containers,
        }
    }

    /// Lets time pass, with traffic and with what the daemons do.
    pub fn pass(&mut self, time: Duration) {
        // Not in steps longer than what daemons do, for as long as they do anything; then at once.
        let mut left = time;
        for _ in 0..12 {
            let step = left.min(Duration::from_millis(10));
            self.tick(step);
            left -= step;
            if left.is_zero() {
                return;
            }
        }
        self.tick(left);
    }

    fn tick(&mut self, time: Duration) {
        self.time += time;
        if self.table_disk.repaired.is_some_and(|at| self.time >= at) {
            self.table_disk.state = DiskState::Well;
        }
        self.live();
        self.traffic(time.as_millis().max(1) as u64);
    }

    fn traffic(&mut self, packets: u64) {
        self.miss(packets);
        match self.kernel.established {
            Some(_) => self.delivered += packets,
            None => {
                if let Some(by) = self.miss(packets) {
                    self.kernel.established = Some(by);
                }
            }
        }
        match self.kernel.recirculating {
            Some(owner) => {
                let bound = self.reader(&self.kernel.bound).map(|process| process.id.pid);
                match bound.is_some_and(|bound| bound != owner) {
                    true => self.lose("recirculated to an id that its daemon does not know", packets),
                    false => self.delivered += packets,
                }
            }
            None => {
                if let Some(by) = self.miss(packets) {
                    self.kernel.recirculating = Some(by);
                }
            }
        }
    }

    /// Packets without a flow. Returns the process that answered them.
    fn miss(&mut self, packets: u64) -> Option<i32> {
        if self.kernel.park.as_ref().is_some_and(|park| *park == self.kernel.bound) {
            self.kernel.parked += packets;
            return None;
        }
        let bound = self.kernel.bound.clone();
        match self.reader(&bound).map(|process| process.id.pid) {
            Some(pid) => self.answer(pid, packets).then_some(pid),
            None => {
                self.lose("nobody reads the upcalls", packets);
                None
            }
        }
    }

    /// The rules that this switch must have: all that it takes.
    pub fn rules_for(&self, pid: i32) -> BTreeMap<String, BridgeRules> {
        let mut rules = self.rules.clone();
        if pid != self.first {
            rules.values_mut().for_each(|rules| {
                rules.flows.retain(|flow| flow != ODD_RULE);
                *rules = super::openflow::told(std::mem::take(rules));
            });
        }
        rules
    }

    /// Gives packets to a switch. True where it forwards them.
    pub fn answer(&mut self, pid: i32, packets: u64) -> bool {
        let Some(process) = self.processes.get(&pid) else {
            self.lose("given to a daemon that has ended", packets);
            return false;
        };
        if process.stopped || !process.leads {
            self.lose("given to a daemon that does not work", packets);
        } else if process.sees_less {
            self.lose("given to a daemon that takes the datapath for one that can do less", packets);
        } else if process.rules != self.rules_for(pid) {
            self.lose("a daemon without its rules dropped them", packets);
        } else {
            self.delivered += packets;
            return true;
        }
        false
    }

    /// What was parked goes to the switch that is bound.
    pub fn replay(&mut self) -> u64 {
        let parked = std::mem::take(&mut self.kernel.parked);
        let bound = self.kernel.bound.clone();
        match self.reader(&bound).map(|process| process.id.pid) {
            Some(pid) if parked > 0 => {
                self.answer(pid, parked);
            }
            _ => self.lose("replayed to nobody", parked),
        }
        parked
    }

    /// The upcalls are taken away from whoever has them.
    pub fn bind(&mut self, port_ids: Vec<u32>) {
        let before = self.reader(&self.kernel.bound).map(|process| process.id.pid);
        self.in_hand = before.map(|pid| (pid, self.time + IN_HAND)).filter(|_| self.kernel.bound != port_ids);
        self.kernel.bound = port_ids;
    }

    /// Has the daemon that had the upcalls something in hand?
    pub fn drained(&self) -> bool {
        self.in_hand.is_none()
    }

    /// What everybody does by himself.
    pub fn live(&mut self) {
        if self.in_hand.is_some_and(|(_, until)| self.time >= until) {
            self.in_hand = None;
        }
        let mut next = self.switches().map(|process| process.id.pid).min();
        while let Some(pid) = next {
            self.live_switch(pid);
            next = self.switches().map(|process| process.id.pid).find(|other| *other > pid);
        }
        self.live_hook();
        self.end_start();
        if self.switch.restart.is_some_and(|at| self.time >= at) {
            let job = self.fresh_id();
            self.restart_switch(job);
        }
    }

    fn live_switch(&mut self, pid: i32) {
        let Some(process) = self.processes.get(&pid) else { return };
        let age = self.time.saturating_sub(process.born);
        let (appeared, leads) = (process.appeared, process.leads);
        if process.stopped || age < APPEARS {
            return;
        }
        if process.program == Program::Installed && !self.variant.installed_works {
            self.end(pid, false);
            return;
        }
        if !appeared {
            // Another daemon that lives holds the lock of its PID file.
            if self.pid_names.name.is_some_and(|other| self.processes.contains_key(&other)) {
                self.end(pid, false);
                return;
            }
            self.pid_names.name = Some(pid);
            if let Some(process) = self.processes.get_mut(&pid) {
                process.appeared = true;
            }
        }
        if age < READY || self.server().is_none() {
            return;
        }
        let led = self.processes.values().any(|other| other.leads);
        if !leads && (led || self.lock_queued) {
            return;
        }
        let woken = self.table.cur_cfg != self.table.next_cfg;
        self.lead(pid);
        if woken {
            self.try_again(pid);
        }
    }

    /// A switch that has the lock.
    fn lead(&mut self, pid: i32) {
        let (flag, writable) = (self.table.flag, self.writable());
        let Some(process) = self.processes.get_mut(&pid) else { return };
        process.leads = true;
        if !std::mem::replace(&mut process.probed, true) {
            // One that does not wait for its rules flushes first, which no freeze refuses to a flow by its key.
            process.sees_less = std::mem::take(&mut self.kernel.left_probe) && flag;
            let id = process.id;
            self.configure_ports(id);
        }
        let Some(process) = self.processes.get_mut(&pid) else { return };
        let keeps = std::mem::replace(&mut process.has_tunnels, true) || process.watched;
        if std::mem::replace(&mut self.kernel.tunnels, true) && !keeps {
            self.lose("a daemon made its tunnel ports anew", 2);
        }
        let Some(process) = self.processes.get_mut(&pid) else { return };
        let touched = process.touched.replace(self.table.touched);
        if touched.is_some_and(|seen| seen != self.table.touched) {
            self.kernel.policies += 1;
        }
        if writable {
            self.table.cur_cfg = self.table.next_cfg;
        }
        if flag {
            // One that has its datapath open already goes on as it is.
            process.waits = !process.opened;
            return;
        }
        if std::mem::take(&mut process.waits) {
            // ofproto_flush_flows: it takes the adding of the controllers for a change of mind.
            process.rules.remove(WITH_CONTROLLER);
        }
        // It binds once, when it opens its datapath.
        if process.refused || process.opened {
            return;
        }
        let (wanted, id) = (process.port_ids.clone(), process.id);
        if self.kernel.binds_from.is_some_and(|from| self.time < from) {
            return;
        }
        if self.refused_now().contains(Classes::UPCALL_BIND) && !self.may_bind(id, &wanted) {
            return;
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            process.opened = true;
        }
        self.bind(wanted);
        self.flush();
    }

    /// The main loop of a switch turns: `udpif_set_threads()` binds per vport what could not be bound before, and leaves
    /// the flows alone.
    pub fn try_again(&mut self, pid: i32) {
        let forbidden = self.refused_now().contains(Classes::UPCALL_BIND);
        let frost = self.kernel.frost.as_ref();
        let watched = frost.and_then(|frost| frost.standby).is_some_and(|standby| standby.pid == pid);
        let per_vport = self.variant.per_vport;
        let Some(process) = self.processes.get_mut(&pid) else { return };
        if !per_vport || !process.refused || process.opened || (forbidden && watched) {
            return;
        }
        process.opened = true;
        let port_ids = process.port_ids.clone();
        self.bind(port_ids);
    }

    /// It takes every qdisc of a port for its own, unless it is told that there is none, and adapts the MTU.
    fn configure_ports(&mut self, id: ProcessId) {
        self.kernel.mtu = OWN_MTU;
        if !self.processes.get(&id.pid).is_some_and(|process| process.polices) {
            self.lose("a daemon made the policing of a port anew", 1);
        }
        let refused = self.refused_now().contains(Classes::QDISC_DEL);
        let spared = |frost: &&mut Frost| {
            refused && frost.standby == Some(id) && frost.kept.contains(&(SHAPED_INDEX, KeptQdisc::Root))
        };
        match self.kernel.frost.as_mut().filter(spared) {
            Some(frost) => frost.refused.qdisc_del += 1,
            None => self.kernel.shaped = false,
        }
    }

    fn may_bind(&mut self, id: ProcessId, wanted: &[u32]) -> bool {
        let per_vport = self.variant.per_vport;
        let Some(frost) = &mut self.kernel.frost else { return true };
        if frost.standby != Some(id) {
            frost.events.push(FreezeEvent::BoundByOther { pid: id.pid });
            return true;
        }
        frost.refused.upcall_bind += 1;
        frost.captured = Some(Captured {
            process: dpfreeze::freeze::ProcessId { tgid: id.pid as u32, start_time: id.start_time },
            ifindex: 1,
            features: None,
            port_ids: if per_vport { Vec::new() } else { wanted.to_vec() },
            dispatch: if per_vport { Dispatch::PerVport } else { Dispatch::PerCpu },
            count: 1,
        });
        if let Some(process) = self.processes.get_mut(&id.pid) {
            process.refused = true;
        }
        false
    }

    /// The datapath goes with its module: flows, bindings and devices.
    pub fn lose_module(&mut self) {
        self.kernel.established = None;
        self.kernel.recirculating = None;
        self.kernel.tunnels = false;
        self.kernel.bound.clear();
        self.kernel.bare_devices = true;
    }

    /// All flows of the datapath are deleted, unless that is refused.
    pub fn flush(&mut self) {
        if self.refused_now().contains(Classes::FLOW_FLUSH) {
            if let Some(frost) = &mut self.kernel.frost {
                frost.refused.flow_flush += 1;
            }
            return;
        }
        self.kernel.established = None;
        self.kernel.recirculating = None;
    }

    /// A revalidation of `pid`: flows of another daemon go, unless that is refused.
    pub fn revalidate(&mut self, pid: i32) {
        if self.refused_now().contains(Classes::FLOW_DEL) {
            return;
        }
        for flow in [&mut self.kernel.established, &mut self.kernel.recirculating] {
            if flow.is_some_and(|owner| owner != pid) {
                *flow = None;
            }
        }
    }

    /// Has the command that started `pid` ended? And how well?
    pub fn detached(&self, pid: i32) -> Option<bool> {
        match self.processes.get(&pid) {
            Some(process) => process.leads.then_some(true),
            None => Some(false),
        }
    }

    /// What the supervisor tells its hook.
    pub fn order(&mut self, command: HookCommand) {
        match command {
            HookCommand::Start if self.variant.containers || self.switch.hook.as_ref().is_some_and(|h| h.stops) => {
                if let Some(hook) = &mut self.switch.hook {
                    hook.told = true;
                }
            }
            HookCommand::Start => {
                let pid = self.spawn(DaemonKind::OvsVswitchd, Program::Installed, true);
                if let Some(hook) = &mut self.switch.hook {
                    hook.started = Some(pid);
                }
            }
            HookCommand::Finish => self.end_hook(true),
            HookCommand::Cancel => self.end_hook(false),
        }
    }

    fn live_hook(&mut self) {
        let Some(hook) = &mut self.switch.hook else { return };
        if self.variant.containers {
            // Told, he goes on whatever becomes of the run; else he gives up.
            if hook.told || hook.orphan {
                let told = hook.told;
                self.switch.hook = None;
                if told {
                    self.restart_container();
                }
            }
            return;
        }
        if hook.stops {
            // Left alone it does what the package does, which comes to the same: whatever is in the unit ends.
            if hook.told || hook.orphan {
                self.switch.hook = None;
                let job = self.switch.reload.take().unwrap_or_default();
                self.restart_switch(job);
            }
            return;
        }
        if !hook.orphan {
            return;
        }
        let since = *hook.orphaned.get_or_insert(self.time);
        let started = hook.started;
        let old_is_gone = !self.processes.contains_key(&self.switch.main);
        if let Some(pid) = started {
            let settled = self.pid_names.old.is_none() && self.pid_names.new.is_none();
            let patient = self.time < since + HOOK_PATIENCE;
            if patient && (!settled || self.detached(pid).is_none()) {
                return;
            }
        }
        self.end_hook(started.is_some() && old_is_gone);
    }

    /// `docker restart`
    fn restart_container(&mut self) {
        let running: Vec<i32> = self.switches().map(|process| process.id.pid).collect();
        for pid in running {
            self.end(pid, true);
        }
        self.spawn(DaemonKind::OvsVswitchd, Program::Installed, false);
    }

    /// The hook ends, and systemd judges the reload.
    fn end_hook(&mut self, well: bool) {
        if self.switch.hook.take().is_none() {
            return;
        }
        let result = if well { "done" } else { "failed" };
        if well {
            self.add_managers();
        }
        if let Some(job) = self.switch.reload.take() {
            self.switch.results.insert(job, result);
        }
        self.switch.state = "active".into();
        if well && self.switch.drop_in {
            if let Some(pid) = self.pid_names.name.filter(|pid| self.processes.contains_key(pid)) {
                self.switch.main = pid;
            }
        }
        if !self.processes.contains_key(&self.switch.main) {
            self.fail_unit(false);
        }
    }

    /// The unit's main process has gone; `Restart=on-failure` of both distributions' units looks at why.
    fn fail_unit(&mut self, asked: bool) {
        self.stop_unit("failed");
        self.switch.restart = (self.variant.units() && !asked).then(|| self.time + RESTART);
    }

    /// Everything in the switch's cgroup ends.
    pub fn stop_unit(&mut self, state: &str) {
        self.switch.state = state.to_owned();
        self.switch.hook = None;
        if let Some(job) = self.switch.reload.take() {
            self.switch.results.insert(job, "canceled");
        }
        self.switch.main = 0;
        self.switch.restart = None;
        let inside: Vec<i32> = self.switches().filter(|process| process.in_unit).map(|p| p.id.pid).collect();
        for pid in inside {
            self.end(pid, true);
        }
    }

    /// `systemctl restart` of the switch.
    pub fn restart_switch(&mut self, job: u64) {
        self.stop_unit("inactive");
        let program = if self.switch.prefers_saved { Program::Saved } else { Program::Installed };
        let pid = self.spawn(DaemonKind::OvsVswitchd, program, true);
        self.pass(Duration::from_millis(100));
        self.switch.starting = Some((job, pid));
        self.end_start();
    }

    /// The command that starts the switch ends when the switch has, or waits for nobody of ours.
    fn end_start(&mut self) {
        let Some((job, pid)) = self.switch.starting else { return };
        let process = self.processes.get(&pid);
        if self.lock_queued && process.is_some_and(|process| !process.leads) {
            return;
        }
        let up = process.is_some();
        self.switch.starting = None;
        self.switch.main = if up { pid } else { 0 };
        self.switch.state = if up { "active" } else { "failed" }.into();
        self.switch.results.insert(job, if up { "done" } else { "failed" });
        self.add_managers();
    }

    /// What was set by hand and is not so any more, in words.
    pub fn lacking(&self) -> Vec<String> {
        let server = self.server().into_iter();
        let switches = self.switches();
        let logs =
            server.clone().chain(switches).flat_map(|one| self.by_hand.logs.lacks(one.kind.program(), &one.logs));
        let state = server.flat_map(|one| self.by_hand.server.lacks(&one.served));
        let row = self.by_hand.row.differences(&self.table.row);
        state.chain(logs).map(|lack| lack.what).chain(row).collect()
    }

    /// A command to a daemon that changes what [`World::lacking`] looks at; `None` where it is none of these.
    pub fn set_by_command(&mut self, pid: i32, command: &str, arguments: &[&str]) -> Option<Result<()>> {
        let process = self.processes.get_mut(&pid)?;
        let (first, state) = (*arguments.first()?, &mut process.served);
        let refuse = |why: &str| Some(Err(HostError::new(command, why)));
        match command {
            "ovsdb-server/add-remote" => drop(state.remotes.insert(first.to_owned())),
            "ovsdb-server/remove-remote" if !state.remotes.remove(first) => return refuse("no such remote"),
            "ovsdb-server/add-db" if state.databases.contains_key(first) => return refuse("already open"),
            "ovsdb-server/add-db" => add_database(state, first),
            "ovsdb-server/remove-remote" => {}
            "vlog/set" => {
                for setting in arguments {
                    let [module, destination, level] = setting.split(':').collect::<Vec<_>>()[..] else {
                        return refuse("no such setting");
                    };
                    let at = ["console", "syslog", "file"].iter().position(|name| *name == destination)?;
                    process.logs.levels.get_mut(module)?[at] = level.to_owned();
                }
            }
            _ => return None,
        }
        Some(Ok(()))
    }

    /// ovs-ctl adds the managers whenever it has started the switch.
    fn add_managers(&mut self) {
        let servers = self.processes.values_mut().filter(|one| one.kind == DaemonKind::OvsdbServer);
        servers.for_each(|server| server.served.remotes.extend([MANAGERS.to_owned()]));
    }

    /// Does a transaction that changes something get through?
    pub fn writable(&self) -> bool {
        self.table_disk.state == DiskState::Well || self.table_disk.file.is_some()
    }

    /// Is there a disk that somebody has to look at?
    pub fn is_disk_in_trouble(&self) -> bool {
        self.files.full || self.table_disk.state != DiskState::Well
    }

    /// Is there a mark, a ballast or a database in memory that somebody has to look after?
    pub fn is_database_untidy(&self) -> bool {
        self.table.mark.is_some() || self.table_disk.ballast || self.table_disk.file.is_some()
    }

    /// Does a switch that lives have the upcalls?
    pub fn is_served(&self) -> bool {
        self.reader(&self.kernel.bound).is_some_and(|process| process.leads && !process.stopped)
    }

    /// A database server starts: it reads the file.
    fn read_file(&mut self) {
        if let Some(file) = self.table_disk.file.take() {
            self.table = file;
        }
    }

    /// `systemctl restart` of the database server.
    pub fn restart_server(&mut self) {
        self.read_file();
        let old = self.server().map(|server| server.id.pid);
        let leader = self.processes.values().filter(|process| process.leads).map(|process| process.id.pid).next();
        if let Some(old) = old {
            self.end(old, true);
        }
        self.spawn(DaemonKind::OvsdbServer, Program::Installed, self.variant.units());
        // ovs-ctl
        self.table.row = written_row();
        // Whoever waits in the queue may be faster than who had it: here the one that had it is, where it lives.
        if let Some(leader) = leader.and_then(|pid| self.processes.get_mut(&pid)) {
            leader.leads = true;
        }
        self.live();
    }

    /// The supervisor is gone, and with it what only it had.
    pub fn kill_supervisor(&mut self) {
        self.supervisor_lives = false;
        self.deaths += 1;
        if let Some(hook) = &mut self.switch.hook {
            hook.orphan = true;
        }
        if self.kept {
            self.live();
            return;
        }
        if self.kernel.park.take().is_some_and(|park| park == self.kernel.bound) {
            self.died_parking = true;
        }
        let parked = std::mem::take(&mut self.kernel.parked);
        if parked > 0 {
            self.died_parking = true;
            self.lose("parked by a supervisor that died", parked);
        }
        self.live();
    }

    /// Another supervisor, or a recovery, is there.
    pub fn next_supervisor(&mut self) {
        self.supervisor_lives = true;
        // The socket of the one before has gone, whether the hook had been seen on it or not.
        if let Some(hook) = &mut self.switch.hook {
            hook.orphan = true;
        }
        self.patience = Patience::default();
        self.script.next_life();
        self.pass(Duration::from_millis(30));
    }

    /// The machine goes down and comes up again, as far as the database; the switch is not started yet.
    pub fn reboot(&mut self) {
        self.kill_supervisor();
        self.rebooted = true;
        self.boot += 1;
        self.time += LONG;
        self.processes.clear();
        self.kernel = Kernel::default();
        self.pid_names = PidNames::default();
        self.switch = SwitchUnit { state: "inactive".into(), ..SwitchUnit::default() };
        self.server_drop_in = false;
        self.in_hand = None;
        self.files.lose_power();
        self.read_file();
        self.spawn(DaemonKind::OvsdbServer, Program::Installed, self.variant.units());
    }

    /// The switch is started, as at the end of a boot.
    pub fn start_switch_at_boot(&mut self) {
        if self.variant.containers {
            self.restart_container();
            return self.pass(Duration::from_secs(1));
        }
        let job = self.fresh_id();
        self.restart_switch(job);
        self.pass(Duration::from_secs(1));
    }

    /// Something happens that nobody asked for.
    pub(super) fn happen(&mut self, fault: Fault) {
        match fault {
            Fault::Abort => {
                // Past the point of no return it is refused; that is an outcome too.
                let _refused = self.gate.request_abort();
            }
            Fault::ThawedByHand => self.gate.request_thaw(),
            Fault::OldDies => {
                self.died_unread |= !self.rules_read;
                self.died_knowing |= !self.state_read;
                self.end(self.first, false)
            }
            Fault::NewDies => {
                let newest = self.switches().map(|process| process.id.pid).max();
                if let Some(pid) = newest.filter(|pid| *pid != self.first) {
                    self.end(pid, false);
                }
            }
            Fault::FlagRemoved => self.table.flag = false,
            Fault::BridgeRemoved => {
                self.table.removed = Some(WITH_CONTROLLER);
                self.rules.remove(WITH_CONTROLLER);
                for process in self.processes.values_mut() {
                    process.rules.remove(WITH_CONTROLLER);
                    process.state.remove(WITH_CONTROLLER);
                }
            }
            Fault::Suspend => self.pass(LONG),
            Fault::TableMadeAnew => self.kernel.table_made_anew = true,
            Fault::DatabaseFull => self.table_disk.state = DiskState::Full,
            Fault::DatabaseReadOnly => self.table_disk.state = DiskState::ReadOnly,
            Fault::DatabaseLost => {
                self.table_disk.state = DiskState::ReadOnly;
                self.table_disk.no_memory = true;
                self.table_disk.repaired = Some(self.time + LOST_FOR);
            }
            Fault::ProbeLeft => self.kernel.left_probe = true,
            Fault::BindsLate(time) => self.kernel.binds_from = Some(self.time + time),
            _ => {}
        }
        self.live();
    }

    /// Did this come about?
    pub fn happened(&self, fault: Fault) -> bool {
        self.script.struck.iter().any(|(_, struck)| *struck == fault)
    }

    /// What a person would find left over of a run.
    pub fn left_over(&self) -> BTreeSet<String> {
        let mut left = BTreeSet::new();
        let mut add = |there: bool, what: &str| {
            if there {
                left.insert(what.to_owned());
            }
        };
        add(self.table.flag, "flow-restore-wait");
        add(self.table.mark.is_some(), "the mark of the run");
        add(self.table_disk.ballast, "the room kept beside the database");
        add(self.table_disk.file.is_some(), "a database in memory");
        add(self.table.touched, "a changed timeout policy");
        add(self.kernel.bare_devices, "devices without addresses");
        add(self.kernel.frost.is_some(), "a freeze");
        add(self.switch.drop_in, "the drop-in of the switch");
        add(self.server_drop_in, "the drop-in of the database server");
        add(self.switch.hook.is_some(), "the reload hook");
        add(self.pid_names.old.is_some() || self.pid_names.new.is_some(), "links of the PID file");
        add(self.processes.values().any(|process| process.stopped), "a stopped process");
        add(self.kernel.parked > 0, "parked packets");
        for path in self.files.names_in_memory() {
            add(true, &path);
        }
        left
    }
}

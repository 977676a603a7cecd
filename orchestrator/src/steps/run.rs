//! What a run carries from step to step, and how a step waits: never past its limit, never past an event that
//! changes the plan.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;

use crate::config::Config;
use crate::control::{Control, Hook, Progress, Vitals};
use crate::features::Features;
use crate::host::clock::Clock;
use crate::host::datapath::{Datapath, FreezeEvent};
use crate::host::devices::{Devices, Standing};
use crate::host::module::{Device, KernelModule};
use crate::host::surroundings::Surroundings;
use crate::host::{
    BridgeRules, BridgeState, Daemon, Daemons, Database, DatabaseFacts, FdbEntry, Job, Kept, LearnReport, OpenFlow,
    PreparedRestore, ProcessId, RefusedRule, RestoreWaitWatch, RuleWatch, SavedProgram, ServiceManager, Starting,
    SwitchLock,
};
use crate::journal::Runs;
use crate::machine::{Action, Event, Machine};
use crate::report::{Level, Report, Strategy};

use dpfreeze::freeze::Port;
use dpfreeze::snapshot::Snapshot;

/// The host of a run.
pub struct Host {
    /// The kernel's side.
    pub datapath: Box<dyn Datapath>,
    /// Processes.
    pub daemons: Box<dyn Daemons>,
    /// OVSDB.
    pub database: Box<dyn Database>,
    /// Rules, groups, meters, learned addresses.
    pub openflow: Box<dyn OpenFlow>,
    /// systemd, where it is the first process.
    pub services: Box<dyn ServiceManager>,
    /// What Check looks at besides.
    pub surroundings: Box<dyn Surroundings>,
    /// The kernel module.
    pub module: Box<dyn KernelModule>,
    /// Network devices.
    pub devices: Box<dyn Devices>,
    /// Time.
    pub clock: Arc<dyn Clock>,
}

/// What the operator asked for.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Standby, or stop before start.
    pub strategy: Strategy,
    /// Replace ovsdb-server too.
    pub ovsdb: bool,
    /// End with nothing done where the running daemons are the installed ones.
    pub if_needed: bool,
    /// A command that must succeed before the run settles.
    pub gate_command: Option<String>,
    /// The unit whose reload or restart job this run is.
    pub called_by: Option<String>,
    /// Somebody else ends the old daemon and starts the new one, once he is told to: whoever runs their container.
    pub elsewhere: bool,
}

impl Wish {
    /// Is the kernel module to be reloaded? Then nothing is frozen or parked.
    pub fn reloads_module(&self) -> bool {
        self.strategy == Strategy::ReloadModule
    }
}

/// How the new daemon is being started.
pub enum Start {
    /// By the reload hook, in the unit's cgroup.
    Unit {
        /// The unit's name.
        unit: String,
        /// The reload job.
        job: Box<dyn Job>,
        /// The hook.
        link: Box<dyn Hook>,
    },
    /// By the unit's restart, which waits for its ExecStop=: a hook that ends when it is told to start.
    Restart {
        /// The unit's name.
        unit: String,
        /// The restart job.
        job: Box<dyn Job>,
        /// The hook. Where the old daemon lives when the hook is left alone, it stops it as the package does.
        link: Box<dyn Hook>,
    },
    /// By somebody else, who ends the old daemon as well.
    Elsewhere {
        /// His hook.
        link: Box<dyn Hook>,
        /// His command has begun: its end will be told.
        runs: bool,
        /// When that was done.
        done: Option<Instant>,
    },
    /// By ourselves, where no service manager owns the daemons.
    Own(Box<dyn Starting>),
}

/// What earlier steps found out or left under way.
#[derive(Default)]
pub struct Known {
    /// The database's facts as Check saw them.
    pub facts: DatabaseFacts,
    /// The ovs-vswitchd to be replaced.
    pub old: Option<Daemon>,
    /// Its program, kept for the way back.
    pub saved: Option<SavedProgram>,
    /// It was told to end.
    pub old_told: bool,
    /// The unit that owned it at Check, where one did.
    pub owner: Option<String>,
    /// The unit whose reload starts the new one.
    pub unit: Option<String>,
    /// The ovs-vswitchd that takes over.
    pub new: Option<Daemon>,
    /// The datapath before.
    pub before: Option<Snapshot>,
    /// What the old ovs-vswitchd found that the datapath can do.
    pub features: Features,
    /// What was changed in the daemons at run time.
    pub kept: Option<Kept>,
    /// The ovsdb-server that has got it back.
    pub given_back: Option<ProcessId>,
    /// OpenFlow rules as they are to be restored.
    pub rules: Vec<BridgeRules>,
    /// Sees changes of the rules since they were read.
    pub rule_watch: Option<Box<dyn RuleWatch>>,
    /// The restore of [`Known::rules`], ready to be carried out.
    pub prepared: Option<Box<dyn PreparedRestore>>,
    /// Rules that could not be put back, as of the last restore.
    pub refused: Vec<RefusedRule>,
    /// Learned addresses by bridge.
    pub addresses: BTreeMap<String, Vec<FdbEntry>>,
    /// What became of them, by bridge.
    pub learned: BTreeMap<String, LearnReport>,
    /// What bridges know besides rules and addresses.
    pub state: Vec<BridgeState>,
    /// What of it the new daemon has not taken, in words.
    pub state_lost: Vec<String>,
    /// The start of the program that ran before.
    pub back: Option<Box<dyn Starting>>,
    /// The start of the new daemon.
    pub start: Option<Start>,
    /// The command that starts it has ended well; where somebody else starts it, he has said that he goes on.
    pub start_ended: bool,
    /// A daemon was told to start and has not been seen yet.
    pub unseen: bool,
    /// The standby has been stopped by us (SIGSTOP) and must be woken or killed.
    pub standby_stopped: bool,
    /// Holds a daemon up that starts without having been a standby, until its tunnel ports are watched.
    pub switch_lock: Option<Box<dyn SwitchLock>>,
    /// Timeout policies in the database are changed for a moment.
    pub policies_touched: bool,
    /// Internal devices as they were, once they were looked at because the module is to be reloaded.
    pub devices: Option<Vec<Device>>,
    /// The devices of the ports as they stood.
    pub standing: Standing,
    /// Ports whose deletion was refused.
    pub refused_ports: Vec<Port>,
    /// Processes that sent more messages at once than the freeze can look at, and were told of.
    pub told_of: BTreeSet<i32>,
    /// When nothing is refused any more, whatever renews.
    pub freeze_end: Option<Instant>,
    /// When the upcalls left the old daemon.
    pub gap_began: Option<Instant>,
    /// The `next_cfg` of the removal of flow-restore-wait.
    pub next_cfg: Option<i64>,
}

/// Why a step did not end as it should.
#[derive(Debug)]
pub enum Stop {
    /// It failed.
    Failed {
        /// What and why.
        error: anyhow::Error,
        /// True where doing it again may help.
        retryable: bool,
    },
    /// Check refuses this host: the report's findings say why.
    Refused,
    /// Its time ran out.
    TimedOut(String),
    /// Something happened that changes the plan.
    CutOff(Action),
}

impl Stop {
    /// A failure that may be tried again: what failed may be done twice.
    pub fn retryable(self) -> Stop {
        match self {
            Stop::Failed { error, .. } => Stop::Failed { error, retryable: true },
            other => other,
        }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Stop {
    fn from(error: E) -> Stop {
        Stop::Failed { error: error.into(), retryable: false }
    }
}

/// How a step ended: an event for the machine.
pub type Ended = Result<Event, Stop>;

/// One run.
pub struct Run {
    /// Its name, as in `/var/lib/ovs-graceful/runs/ID`.
    pub id: String,
    /// What was asked for.
    pub wish: Wish,
    /// What this host can do.
    pub level: Level,
    /// Limits and bounds.
    pub config: Config,
    /// Where runs are kept.
    pub runs: Runs,
    /// The host.
    pub host: Host,
    /// Found out so far.
    pub known: Known,
    /// What will be reported.
    pub report: Report,
    /// Who listens and who may interrupt.
    pub control: Box<dyn Control>,
    /// Decides what comes next.
    pub machine: Machine,
    /// Watches flow-restore-wait while it is ours.
    pub restore_wait: Option<Box<dyn RestoreWaitWatch>>,
    /// When the step under way must have ended.
    pub deadline: Instant,
    /// When events were last asked for.
    pub looked: Instant,
}

/// How often a step that waits looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// How often it asks what else has happened meanwhile.
const ASK_AGAIN: Duration = Duration::from_millis(20);

impl Run {
    /// Now, by the host's clock.
    pub fn now(&self) -> Instant {
        self.host.clock.now()
    }

    /// The daemon to be replaced.
    pub fn old(&self) -> anyhow::Result<&Daemon> {
        self.known.old.as_ref().ok_or_else(|| anyhow!("the running ovs-vswitchd has not been looked up yet"))
    }

    /// The daemon that takes over.
    pub fn new_daemon(&self) -> anyhow::Result<&Daemon> {
        self.known.new.as_ref().ok_or_else(|| anyhow!("no new ovs-vswitchd has been started yet"))
    }

    /// Something worth a line.
    pub fn note(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::info!("{text}");
        self.control.tell(&Progress::Note { text });
    }

    /// Something went wrong without ending the run.
    pub fn warn(&mut self, text: impl Into<String>) {
        let text = text.into();
        tracing::warn!("{text}");
        self.report.warnings.push(text.clone());
        self.control.tell(&Progress::Warning { text });
    }

    /// Progress: the lease is renewed, and what happened meanwhile is told to the machine.
    ///
    /// An error cuts the step off: its time is up, or the machine wants something else.
    pub fn checkpoint(&mut self) -> Result<(), Stop> {
        self.looked = self.now();
        self.tell_vitals();
        for event in self.happened()? {
            self.tell_machine(event)?;
        }
        Ok(())
    }

    /// For `status` and for who follows the run.
    fn tell_vitals(&self) {
        let parked = self.host.datapath.park_stats();
        let lease = self.host.datapath.is_armed().then(|| self.now() + self.lease());
        let frozen_until = lease.map(|lease| self.known.freeze_end.map_or(lease, |end| end.min(lease)));
        self.control.update(&Vitals {
            level: self.report.level,
            parked: parked.waiting,
            most_parked: parked.most_waiting,
            overflowed: parked.overflowed + parked.socket_drops,
            frozen_until,
            deadline: Some(self.deadline),
        });
    }

    /// Tells the machine of an event, and cuts the step off where that changes the plan.
    pub fn tell_machine(&mut self, event: Event) -> Result<(), Stop> {
        match self.machine.on(event) {
            // A request to abort past the point of no return is refused by the socket itself (`AbortGate`).
            Action::Continue | Action::RefuseAbort => Ok(()),
            action => Err(Stop::CutOff(action)),
        }
    }

    /// Asks `ready` until it says yes; each question is a checkpoint.
    pub fn wait_for(&mut self, what: &str, ready: impl FnMut(&mut Run) -> Result<bool, Stop>) -> Result<(), Stop> {
        match self.wait_until(self.deadline, ready)? {
            true => Ok(()),
            false => Err(Stop::TimedOut(what.to_owned())),
        }
    }

    /// The same until `end` at most; false where it passes first.
    pub fn wait_until(
        &mut self,
        end: Instant,
        mut ready: impl FnMut(&mut Run) -> Result<bool, Stop>,
    ) -> Result<bool, Stop> {
        loop {
            if ready(self)? {
                return Ok(true);
            }
            let now = self.now();
            if now.saturating_duration_since(self.looked) >= ASK_AGAIN {
                self.checkpoint()?;
            }
            if now >= end {
                return Ok(false);
            }
            self.host.clock.sleep(LOOK_AGAIN);
        }
    }

    fn happened(&mut self) -> Result<Vec<Event>, Stop> {
        let mut events = Vec::new();
        if self.control.gate().abort_requested() {
            events.push(Event::AbortRequested);
        }
        if self.host.datapath.is_armed() {
            self.freeze_events(&mut events)?;
        }
        if let Some(watch) = &mut self.restore_wait {
            if !watch.is_set()? {
                events.push(Event::RestoreWaitRemoved);
            }
        }
        if self.known.new.as_ref().is_some_and(|new| !self.host.daemons.is_alive(new.id)) {
            events.push(Event::NewDaemonDied);
        }
        if self.known.old.as_ref().is_some_and(|old| !self.host.daemons.is_alive(old.id)) {
            events.push(Event::OldDaemonDied);
        }
        Ok(events)
    }

    /// A step that is within its time limit is no hang: the lease outlasts it.
    pub fn lease(&self) -> Duration {
        self.deadline.saturating_duration_since(self.now()) + self.config.freeze.lease()
    }

    fn freeze_events(&mut self, events: &mut Vec<Event>) -> Result<(), Stop> {
        for event in self.host.datapath.events()? {
            match event {
                FreezeEvent::VportDelRefused(port) => self.known.refused_ports.push(port),
                FreezeEvent::TooManyMessages { pid, bytes } if self.known.told_of.insert(pid) => self.warn(format!(
                    "process {pid} sent more than 64 netlink messages at once ({bytes} bytes), and the freeze refused all \
                     of them unseen (EBUSY); if that was no Open vSwitch, repeat what it did"
                )),
                FreezeEvent::TooManyMessages { .. } => {}
                FreezeEvent::BoundByOther { .. } => events.push(Event::BoundByOther),
            }
        }
        if self.control.gate().thaw_requested() {
            self.host.datapath.thaw()?;
            self.warn("the freeze was lifted by hand");
            events.push(Event::LeaseLost);
        } else if let Err(lost) = self.host.datapath.renew(self.lease()) {
            self.host.datapath.thaw()?;
            self.warn(format!("{lost}"));
            events.push(Event::LeaseLost);
        }
        Ok(())
    }
}

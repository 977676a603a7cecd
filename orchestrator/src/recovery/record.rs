//! What a run writes down for whoever has to finish or undo it.

use serde::{Deserialize, Serialize};

use crate::host::clock::Clock;
use crate::host::{BridgeRules, BridgeState, Daemon, Messages};
use crate::journal::{Entry, Journal, Runs};
use crate::machine::Phase;
use crate::report::{ConntrackReport, Level, Report, Strategy, Version};
use crate::steps::Run;

/// All that a recovery must know of the run, besides how far it came.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Mark {
    /// The boot it belongs to (`/proc/sys/kernel/random/boot_id`): process ids mean nothing in another.
    pub boot: String,
    /// When the supervisor was started, in clock ticks after boot: what the run has started is younger.
    pub began: u64,
    /// The ovs-vswitchd to be replaced.
    pub old: Option<Daemon>,
    /// The one that takes over.
    pub new: Option<Daemon>,
    /// The port ids that the upcalls went to before the run.
    pub old_port_ids: Vec<u32>,
    /// The unit that owns the daemon.
    pub unit: Option<String>,
    /// What the report of the recovery is to say of the run.
    #[serde(default)]
    pub found: Option<Found>,
}

/// What a run had found out of itself, for the report of its recovery.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// Start of the run, milliseconds since 1970-01-01 UTC.
    pub started_ms: u64,
    /// What ran before.
    pub from: Version,
    /// What was installed.
    pub to: Version,
    /// What the host could do; `None` where that was not known yet.
    pub level: Option<Level>,
    /// How the new daemon was to come to be.
    pub strategy: Strategy,
    /// What conntrack was told before, and what is guarded.
    pub conntrack: ConntrackReport,
}

impl Found {
    /// As `report` has it now.
    fn of(report: &Report) -> Found {
        Found {
            started_ms: report.started_ms,
            from: report.from.clone(),
            to: report.to.clone(),
            level: report.level,
            strategy: report.strategy,
            conntrack: report.conntrack.clone(),
        }
    }
}

impl Mark {
    /// Did the old daemon run in a container? Then nothing of Open vSwitch is ours to start.
    pub fn is_contained(&self) -> bool {
        self.old.as_ref().is_some_and(|old| old.contained)
    }
}

/// The run's journal, and what it has said already.
pub struct Recorder {
    runs: Runs,
    journal: Journal,
    mark: Mark,
    said: Option<Mark>,
    rules: Option<Kept>,
}

/// What was written down last of rules and state.
struct Kept {
    rules: Vec<(String, Messages)>,
    state: Vec<BridgeState>,
}

impl Recorder {
    /// Opens the journal of run `id`, whose folder is there.
    ///
    /// # Errors
    /// Where the journal cannot be written: then the run must not begin.
    pub fn open(runs: &Runs, id: &str, clock: &dyn Clock) -> anyhow::Result<Recorder> {
        let (journal, _) = runs.journal(id)?;
        let mark = Mark { boot: clock.boot(), began: clock.started()?, ..Mark::default() };
        Ok(Recorder { runs: runs.clone(), journal, mark, said: None, rules: None })
    }

    /// `step` of `phase` is about to be done.
    ///
    /// # Errors
    /// Where it could not be written down.
    pub fn intent(&mut self, run: &mut Run, phase: Phase, step: &str) -> anyhow::Result<()> {
        self.place(phase)?;
        self.look(run);
        self.say(|data| Entry::intent(phase, step, data))
    }

    /// It is done.
    ///
    /// # Errors
    /// As [`Recorder::intent`].
    pub fn done(&mut self, run: &mut Run, phase: Phase, step: &str) -> anyhow::Result<()> {
        self.look(run);
        if matches!(phase, Phase::Snapshot | Phase::SwitchPrepare) {
            self.keep_rules(&run.id, &run.known.rules, &run.known.state)?;
        }
        self.say(|data| Entry::done(phase, step, data))
    }

    /// It is undone.
    ///
    /// # Errors
    /// As [`Recorder::intent`].
    pub fn undone(&mut self, phase: Phase) -> anyhow::Result<()> {
        self.place(phase)?;
        self.journal.append(&Entry::undone(phase, phase.name()))
    }

    /// Hazards 27: between Switch and Handover nothing may wait for a disk.
    fn place(&mut self, phase: Phase) -> anyhow::Result<()> {
        match (Phase::SwitchPrepare..=Phase::Handover).contains(&phase) {
            true => self.journal.to_memory(),
            false => self.journal.to_disk(),
        }
    }

    fn look(&mut self, run: &mut Run) {
        let found = Found::of(&run.report);
        if self.mark.found.as_ref() != Some(&found) {
            self.mark.found = Some(found);
        }
        if self.mark.old.is_none() {
            if let Some(old) = run.known.old.clone() {
                self.mark.unit = run.known.owner.clone();
                self.mark.old = Some(old);
            }
        }
        // As long as they are the old daemon's; what could not be found out is asked again.
        if self.mark.old.is_some() && self.mark.old_port_ids.is_empty() && run.known.gap_began.is_none() {
            self.mark.old_port_ids = run.host.datapath.upcall_port_ids().unwrap_or_default();
        }
        if self.mark.new.as_ref().map(|new| new.id) != run.known.new.as_ref().map(|new| new.id) {
            self.mark.new = run.known.new.clone();
        }
    }

    /// Writes an entry down, with the mark where that has changed: a daemon's description is long, and the gap is short.
    /// What could not be written has not been said.
    fn say(&mut self, entry: impl FnOnce(serde_json::Value) -> Entry) -> anyhow::Result<()> {
        if self.said.as_ref() == Some(&self.mark) {
            return self.journal.append(&entry(serde_json::Value::Null));
        }
        self.journal.append(&entry(serde_json::to_value(&self.mark)?))?;
        self.said = Some(self.mark.clone());
        Ok(())
    }

    /// Hazards 22: the rules of the switch, not of the snapshot.
    fn keep_rules(&mut self, id: &str, rules: &[BridgeRules], state: &[BridgeState]) -> anyhow::Result<()> {
        // Cheap, however many there are, where they are the very bytes that were kept.
        let same =
            |(kept, rules): (&(String, Messages), &BridgeRules)| kept.0 == rules.bridge && kept.1 == rules.messages;
        let is_kept = |kept: &Kept| {
            kept.state == state && kept.rules.len() == rules.len() && kept.rules.iter().zip(rules).all(same)
        };
        if !self.rules.as_ref().is_some_and(is_kept) {
            self.runs.keep_rules(id, rules, state)?;
            let rules = rules.iter().map(|rules| (rules.bridge.clone(), rules.messages.clone())).collect();
            self.rules = Some(Kept { rules, state: state.to_vec() });
        }
        Ok(())
    }
}

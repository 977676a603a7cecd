//! The report of a run: JSON, schema 1 (design.md, "The report"). Keys are stable: they may be added to, never
//! renamed or removed. What is unknown is `null` or empty, so that every key is always there.

mod check;
mod summary;
#[cfg(test)]
mod tests;

pub use check::{CheckReport, Finding, Findings, Name, Severity};
pub use summary::summary;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::str::FromStr;

use anyhow::Context;
use atomic_write_file::unix::OpenOptionsExt as _;
pub use dpfreeze::freeze::{Refused, Skipped};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::machine::{ExitCode, Outcome, Phase};

/// The schema that [`Report`] is.
pub const SCHEMA: u32 = 1;

/// How much of the promise this host can keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Freeze and park.
    Full,
    /// No usable BPF: the flush happens, misses are parked.
    Park,
    /// Neither: a run refuses unless forced.
    None,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Level::Full => "full",
            Level::Park => "park",
            Level::None => "none",
        })
    }
}

/// How the new daemon comes to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Started beside the old one, waiting for the database's lock.
    #[default]
    Standby,
    /// Started after the old one's end.
    StopStart,
    /// The same, with the kernel module taken out and put in again in between. No kernel flow survives that, and
    /// nothing is parked.
    ReloadModule,
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Strategy {
    /// Every strategy.
    pub const ALL: [Strategy; 3] = [Strategy::Standby, Strategy::StopStart, Strategy::ReloadModule];

    /// As it is typed and reported.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Standby => "standby",
            Strategy::StopStart => "stop-start",
            Strategy::ReloadModule => "reload-module",
        }
    }
}

impl FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Strategy, String> {
        let known = Strategy::ALL.into_iter().find(|known| known.name() == text);
        known.ok_or_else(|| format!("`{text}` is neither `standby` nor `stop-start` nor `reload-module`"))
    }
}

/// A version of the daemons.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Of ovs-vswitchd, for example `3.1.0`.
    pub ovs: Option<String>,
}

/// When a phase ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// [`Phase::name`], or `back`.
    pub name: String,
    /// Milliseconds from the start of the run.
    pub start_ms: u64,
    /// Milliseconds it took.
    pub duration_ms: u64,
}

/// What became of the packets that nobody could answer for a while.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Parked {
    /// Upcalls taken in.
    pub packets: u64,
    /// The most that waited at once.
    #[serde(default)]
    pub most_packets: u64,
    /// The memory that the park took at most, bytes.
    #[serde(default)]
    pub most_bytes: u64,
    /// Given back to the datapath.
    pub replayed: u64,
    /// Of these, those of which something had to be taken back first, by what it was; `continued` went on where they
    /// were.
    #[serde(default)]
    pub undone: BTreeMap<String, u64>,
    /// Lost: the park or its sockets were full.
    pub overflowed: u64,
    /// Of these, where there was no room: `park` (`park.max_packets`, `park.max_bytes`) or `sockets` (not read fast
    /// enough, `park.socket_bytes`).
    #[serde(default)]
    pub overflowed_by_reason: BTreeMap<String, u64>,
    /// Of those that found no room in the park, the ports they had come by.
    #[serde(default)]
    pub overflowed_by_port: BTreeMap<String, u64>,
    /// Taken in, not given back, by reason.
    pub unreplayable: BTreeMap<String, u64>,
    /// The longest time that a packet was parked, in milliseconds.
    pub longest_ms: f64,
    /// The 99th percentile of that time, in milliseconds.
    pub p99_ms: f64,
}

/// A datapath, before against after.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatapathReport {
    /// Its name.
    pub name: String,
    /// Kernel flows in the snapshot.
    pub flows_before: u64,
    /// Of these, still there at the end, under their UFID.
    pub flows_kept: u64,
    /// Of these, removed by the run, by reason.
    pub flows_removed: BTreeMap<String, u64>,
    /// The rise of the kernel's `n_lost`.
    pub lost_delta: i64,
    /// The rise of the kernel's `n_missed`.
    pub missed_delta: i64,
}

/// What conntrack was told, before against after.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConntrackReport {
    /// Timeout policies in the snapshot.
    pub timeout_policies_before: u64,
    /// Of these, guarded because connections live under them.
    pub timeout_policies_guarded: u64,
    /// Zone limits in the snapshot.
    pub zone_limits_before: u64,
    /// Of these, set again because they were lost.
    pub zone_limits_restored: u64,
    /// Connections by zone in the snapshot; zones without one are left out.
    #[serde(default, deserialize_with = "by_zone")]
    pub connections_before: BTreeMap<u16, u64>,
    /// The same at the end: they come and go.
    #[serde(default, deserialize_with = "by_zone")]
    pub connections_after: BTreeMap<u16, u64>,
}

/// serde gives the keys of a map as text where the report is part of a tagged message, and does not make numbers of them.
fn by_zone<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u16, u64>, D::Error> {
    let zones = BTreeMap::<String, u64>::deserialize(deserializer)?;
    zones.into_iter().map(|(zone, count)| Ok((zone.parse().map_err(D::Error::custom)?, count))).collect()
}

/// A bridge's OpenFlow state, before against after.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFlowReport {
    /// Its name.
    pub bridge: String,
    /// Flows before.
    pub flows_before: u64,
    /// Flows after.
    pub flows_after: u64,
    /// Groups before.
    pub groups_before: u64,
    /// Groups after.
    pub groups_after: u64,
    /// Meters before.
    pub meters_before: u64,
    /// Meters after.
    pub meters_after: u64,
    /// True where the restore could not be one bundle.
    pub not_atomic: bool,
}

/// The report of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// The run's id.
    pub id: String,
    /// [`ExitCode::result`].
    pub result: String,
    /// What the command exits with.
    pub exit_code: ExitCode,
    /// One sentence: why it ended as it did.
    pub reason: String,
    /// Start of the run, milliseconds since 1970-01-01 UTC.
    pub started_ms: u64,
    /// Milliseconds from start to end.
    pub duration_ms: u64,
    /// What ran before.
    pub from: Version,
    /// What runs now.
    pub to: Version,
    /// What the host could do; `null` where the run ended before that was known.
    pub level: Option<Level>,
    /// How the new daemon came to be.
    pub strategy: Strategy,
    /// The phases that were begun.
    pub phases: Vec<PhaseTime>,
    /// How long no daemon was bound to the upcalls, in milliseconds; `null` where one always was.
    pub gap_ms: Option<f64>,
    /// The packets nobody could answer for a while.
    pub parked: Parked,
    /// The datapaths.
    pub datapaths: Vec<DatapathReport>,
    /// What the freeze refused.
    pub refused: Refused,
    /// What conntrack was told.
    pub conntrack: ConntrackReport,
    /// The bridges.
    pub openflow: Vec<OpenFlowReport>,
    /// What is not as it was.
    pub differences: Vec<String>,
    /// What went wrong without ending the run, and the errors that did.
    pub warnings: Vec<String>,
    /// What Check looked at, as `ovs-graceful check` lists it; empty where the run did not come to that.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// Whatever else a step measured, by name. Not part of the schema.
    #[serde(default)]
    pub details: BTreeMap<String, serde_json::Value>,
}

impl Report {
    /// The report of a run that has just started. Its result is "needs a person" until [`Report::finish`], so that
    /// one that was cut off does not look well.
    pub fn new(id: &str, strategy: Strategy, started_ms: u64) -> Report {
        Report {
            schema: SCHEMA,
            id: id.to_string(),
            result: ExitCode::NeedsPerson.result().to_string(),
            exit_code: ExitCode::NeedsPerson,
            reason: "the run has not ended".to_string(),
            started_ms,
            duration_ms: 0,
            from: Version::default(),
            to: Version::default(),
            level: None,
            strategy,
            phases: Vec::new(),
            gap_ms: None,
            parked: Parked::default(),
            datapaths: Vec::new(),
            refused: Refused::default(),
            conntrack: ConntrackReport::default(),
            openflow: Vec::new(),
            differences: Vec::new(),
            warnings: Vec::new(),
            findings: Vec::new(),
            details: BTreeMap::new(),
        }
    }

    /// Notes that `phase` ran. A phase that ran again, or the second half of Switch, makes the first entry longer.
    pub fn phase(&mut self, phase: Phase, start_ms: u64, duration_ms: u64) {
        self.phase_named(phase.name(), start_ms, duration_ms);
    }

    /// The same for what is no phase of its own: `back`.
    pub fn phase_named(&mut self, name: &str, start_ms: u64, duration_ms: u64) {
        let end = start_ms.saturating_add(duration_ms);
        match self.phases.last_mut() {
            Some(last) if last.name == name => last.duration_ms = end.saturating_sub(last.start_ms),
            _ => self.phases.push(PhaseTime { name: name.to_string(), start_ms, duration_ms }),
        }
    }

    /// Notes how often the kernel passed over the freeze; the warning where messages can have passed unseen.
    #[must_use]
    pub fn freeze_skipped(&mut self, skipped: Skipped) -> Option<String> {
        if skipped != Skipped::default() {
            let counts = serde_json::json!({
                "first": skipped.first, "second": skipped.second, "unseen_at_most": skipped.unseen,
            });
            self.details.insert("freeze_skipped".to_owned(), counts);
        }
        (skipped.unseen > 0).then(|| {
            format!(
                "the kernel passed over the freeze: {} netlink messages at the most were not looked at, so kernel flows, \
                 meters, ports or timeout policies may have been deleted; remedy: boot with `bpf` in the list of LSMs \
                 (lsm=) on Linux 6.2 or later, or with preempt=voluntary where the kernel knows that",
                skipped.unseen
            )
        })
    }

    /// Notes the end of the run.
    pub fn finish(&mut self, outcome: &Outcome, duration_ms: u64) {
        self.result = outcome.exit_code.result().to_string();
        self.exit_code = outcome.exit_code;
        self.reason = match self.refusals().as_slice() {
            names if outcome.exit_code == ExitCode::Refused && !names.is_empty() => {
                format!("{}; nothing was touched", names.join(", "))
            }
            _ => outcome.reason.clone(),
        };
        self.duration_ms = duration_ms;
    }

    /// True of a run that was refused, or that had nothing to do: nothing was touched, and nobody will ask for it.
    pub fn touched_nothing(&self) -> bool {
        match self.exit_code {
            ExitCode::Refused | ExitCode::Busy => true,
            ExitCode::Done => self.phases.iter().all(|phase| phase.name == Phase::Check.name()),
            ExitCode::Undone | ExitCode::Back | ExitCode::Differences | ExitCode::NeedsPerson => false,
        }
    }

    /// The names of what refuses the run, each once.
    fn refusals(&self) -> Vec<&'static str> {
        let refused = self.findings.iter().filter(|finding| finding.severity == Severity::Refused);
        let mut names: Vec<&str> = Vec::new();
        for finding in refused {
            if !names.contains(&finding.name.word()) {
                names.push(finding.name.word());
            }
        }
        names
    }

    /// Writes the report to `path`, readable by its owner only: the old file or the whole new one, never half of it.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        write_private_json(path, self).with_context(|| format!("cannot write the report {}", path.display()))
    }

    /// The report that `text` is.
    ///
    /// # Errors
    /// Where it is none of [`SCHEMA`].
    pub fn parse(text: &[u8]) -> anyhow::Result<Report> {
        serde_json::from_slice(text).with_context(|| format!("this is not a report of schema {SCHEMA}"))
    }
}

/// Writes `value` as JSON to `path` atomically, mode 0600.
pub fn write_private_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut file = atomic_write_file::OpenOptions::new().preserve_mode(false).mode(0o600).open(path)?;
    serde_json::to_writer_pretty(&mut file, value)?;
    file.write_all(b"\n")?;
    file.commit()?;
    Ok(())
}

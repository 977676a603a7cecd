//! What a run has begun and done, so that another process can finish or undo it.
//!
//! ```text
//! /var/lib/ovs-graceful/runs/<id>/     0700
//!     journal                          records: [length u32 LE][crc32c u32 LE][JSON]
//!     report.json                      once the run is over
//! /run/ovs-graceful/journal.<id>       records written between Switch and Handover
//! /run/ovs-graceful/report.<id>.json   where the disk could not take the report, until it can
//! /run/ovs-graceful/needs-person       the id of a run that ended with 40, until the host is well again
//! ```
//!
//! Every step is journalled before it is done. Each record is synced to disk before the step goes on, except between
//! Switch and Handover: then nothing may wait for a disk that may itself be reached over the bridge (hazards 27), so
//! records go to /run, and are carried over to the disk afterwards. Numbers make that safe to cut off at any point.
//!
//! Reading stops at the first record that is cut off or does not match its checksum: what comes after it was not
//! finished when the machine went down.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{anyhow, ensure, Context};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::conntrack::{self, Conntrack};
use crate::host::devices::Standing;
use crate::host::disk::{AppendFile, Disk};
use crate::host::module::Device;
use crate::host::real::RealDisk;
use crate::host::{BridgeRules, BridgeState, Kept};
use crate::machine::{ExitCode, Phase};
use crate::report::Report;

/// Where the state of runs is kept across reboots.
pub const STATE_DIR: &str = "/var/lib/ovs-graceful";

/// A record may be so long, in bytes; a longer one is refused when written and a bad one when read.
const MAX_RECORD: usize = 64 * 1024 * 1024;

const HEADER: usize = 8;

/// Where a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepState {
    /// About to be done.
    Intent,
    /// Done.
    Done,
    /// Undone.
    Undone,
}

/// One line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The phase under way.
    pub phase: Phase,
    /// The step, in the words of the file under `steps/`.
    pub step: String,
    /// Where it is.
    pub state: StepState,
    /// What its undo, or a second try, has to know.
    #[serde(default)]
    pub data: serde_json::Value,
}

impl Entry {
    /// A step that is about to be done.
    pub fn intent(phase: Phase, step: &str, data: serde_json::Value) -> Entry {
        Entry { phase, step: step.to_string(), state: StepState::Intent, data }
    }

    /// A step that is done.
    pub fn done(phase: Phase, step: &str, data: serde_json::Value) -> Entry {
        Entry { phase, step: step.to_string(), state: StepState::Done, data }
    }

    /// A step that is undone.
    pub fn undone(phase: Phase, step: &str) -> Entry {
        Entry { phase, step: step.to_string(), state: StepState::Undone, data: serde_json::Value::Null }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Numbered {
    number: u64,
    #[serde(flatten)]
    entry: Entry,
}

/// Where the records of a run go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalPaths {
    /// On disk.
    pub disk: PathBuf,
    /// In memory, between Switch and Handover.
    pub memory: PathBuf,
}

/// The journal of one run, open for appending.
#[derive(Debug)]
pub struct Journal {
    files: Arc<dyn Disk>,
    paths: JournalPaths,
    disk: Log,
    memory: Option<Log>,
    /// The number of the next record.
    next: u64,
    /// The number of the first record that the disk does not have.
    disk_next: u64,
}

impl Journal {
    /// Opens the journal, with what is in it already. A tail that was cut off is cut away; records that were left in
    /// memory are carried over to the disk.
    pub fn open(files: Arc<dyn Disk>, paths: JournalPaths) -> anyhow::Result<(Journal, Vec<Entry>)> {
        let (disk, mut entries) = Log::open(files.as_ref(), &paths.disk)?;
        let next = entries.last().map_or(0, |last| last.number + 1);
        let mut journal = Journal { files, paths, disk, memory: None, next, disk_next: next };
        entries.extend(journal.carry_over()?);
        Ok((journal, plain(entries)))
    }

    /// Appends `entry`. On return it is safe: on disk, or, between Switch and Handover, against everything but a
    /// reboot.
    pub fn append(&mut self, entry: &Entry) -> anyhow::Result<()> {
        let record = encode(&Numbered { number: self.next, entry: entry.clone() })?;
        match &mut self.memory {
            Some(memory) => {
                memory.append(&record)?;
                self.next += 1;
                Ok(())
            }
            None => {
                self.disk.append(&record)?;
                // A record that is written has used its number up, whether or not it can be synced.
                self.next += 1;
                self.disk_next = self.next;
                self.disk.sync()
            }
        }
    }

    /// From now on records go to memory only. Doing it twice is doing it once.
    pub fn to_memory(&mut self) -> anyhow::Result<()> {
        if self.memory.is_none() {
            self.memory = Some(Log::open(self.files.as_ref(), &self.paths.memory)?.0);
        }
        Ok(())
    }

    /// From now on records go to the disk again, those in memory first. Doing it twice is doing it once; where it
    /// fails, records go on to memory and it may be tried again.
    pub fn to_disk(&mut self) -> anyhow::Result<()> {
        self.carry_over()?;
        self.memory = None;
        Ok(())
    }

    /// Writes the records in memory that the disk does not have to the disk, and removes them from memory.
    fn carry_over(&mut self) -> anyhow::Result<Vec<Numbered>> {
        let path = self.paths.memory.clone();
        let Some(bytes) = read(self.files.as_ref(), &path)? else { return Ok(Vec::new()) };
        let (mut records, _) = decode(&bytes).map_err(|newer| newer.of(&path))?;
        records.retain(|numbered| numbered.number >= self.disk_next);
        for numbered in &records {
            self.disk.append(&encode(numbered)?)?;
            self.disk_next = numbered.number + 1;
            self.next = self.next.max(self.disk_next);
        }
        self.disk.sync()?;
        self.files.remove(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        Ok(records)
    }
}

/// A file of records.
#[derive(Debug)]
struct Log {
    file: Box<dyn AppendFile>,
    path: PathBuf,
    /// So many bytes of it are whole records.
    good: u64,
    /// There may be more behind them: a record that could not be written (disk full) and not be taken back.
    torn: bool,
}

impl Log {
    /// Opens it, with its records; what follows the last whole one is cut away.
    fn open(files: &dyn Disk, path: &Path) -> anyhow::Result<(Log, Vec<Numbered>)> {
        let file = files.open(path).with_context(|| format!("cannot open the journal {}", path.display()))?;
        let mut log = Log { file, path: path.to_path_buf(), good: 0, torn: false };
        let bytes = log.file.read().with_context(|| format!("cannot read the journal {}", path.display()))?;
        let (records, good) = decode(&bytes).map_err(|newer| newer.of(path))?;
        log.good = good;
        log.torn = bytes.len() as u64 > good;
        log.mend()?;
        Ok((log, records))
    }

    /// Cuts away what is no whole record: it would hide every later one.
    fn mend(&mut self) -> anyhow::Result<()> {
        if self.torn {
            self.file.cut(self.good).with_context(|| format!("cannot cut the journal {}", self.path.display()))?;
            self.torn = false;
            self.sync()?;
        }
        Ok(())
    }

    /// One write call, so that a reader sees all of a record or a tail that does not match its checksum.
    fn append(&mut self, record: &[u8]) -> anyhow::Result<()> {
        self.mend()?;
        let written = self.file.append(record);
        match written {
            Ok(()) => self.good += record.len() as u64,
            Err(_) => {
                self.torn = true;
                // If not now, then before the next record.
                let _ = self.mend();
            }
        }
        written.with_context(|| format!("cannot write the journal {}", self.path.display()))
    }

    fn sync(&mut self) -> anyhow::Result<()> {
        self.file.sync().with_context(|| format!("cannot sync the journal {}", self.path.display()))
    }
}

/// All of a file; `None` where it is not there.
fn read(files: &dyn Disk, path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match files.read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// A record that is whole and that this version does not understand: nothing that was torn.
#[derive(Debug)]
struct Newer(serde_json::Error);

impl Newer {
    fn of(self, path: &Path) -> anyhow::Error {
        let Newer(error) = self;
        anyhow!("the journal {} is of another version ({error}); use the version that wrote it", path.display())
    }
}

fn plain(records: Vec<Numbered>) -> Vec<Entry> {
    records.into_iter().map(|numbered| numbered.entry).collect()
}

fn encode(numbered: &Numbered) -> anyhow::Result<Vec<u8>> {
    let json = serde_json::to_vec(numbered)?;
    ensure!(json.len() <= MAX_RECORD, "step {}: a journal record of {} bytes", numbered.entry.step, json.len());
    let mut record = Vec::with_capacity(HEADER + json.len());
    record.extend_from_slice(&(json.len() as u32).to_le_bytes());
    record.extend_from_slice(&crc32c::crc32c(&json).to_le_bytes());
    record.extend_from_slice(&json);
    Ok(record)
}

/// The records up to the first that was cut off, and how many bytes they take.
fn decode(bytes: &[u8]) -> Result<(Vec<Numbered>, u64), Newer> {
    let mut records: Vec<Numbered> = Vec::new();
    let mut rest = bytes;
    while let Some((json, after)) = decode_one(rest) {
        let numbered: Numbered = serde_json::from_slice(json).map_err(Newer)?;
        if records.last().is_some_and(|last| numbered.number <= last.number) {
            break;
        }
        records.push(numbered);
        rest = after;
    }
    Ok((records, (bytes.len() - rest.len()) as u64))
}

/// The JSON of the first record, whose checksum is right, and what follows it.
fn decode_one(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (checksum, rest) = rest.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length) as usize;
    // No record is empty; zeros, which a file system may leave at the end of a file, would look like one.
    if length > MAX_RECORD || length == 0 {
        return None;
    }
    let (json, rest) = rest.split_at_checked(length)?;
    (crc32c::crc32c(json) == u32::from_le_bytes(*checksum)).then_some((json, rest))
}

/// The folders of past runs and the one under way.
#[derive(Debug, Clone)]
pub struct Runs {
    files: Arc<dyn Disk>,
    state: PathBuf,
    run: PathBuf,
}

/// A past run, as `ovs-graceful runs` lists it.
#[derive(Debug, Clone, PartialEq)]
pub struct PastRun {
    /// Its id.
    pub id: String,
    /// Its report; `None` where it was cut off before it wrote one.
    pub report: Option<Report>,
}

impl Default for Runs {
    fn default() -> Runs {
        Runs::at(Path::new(STATE_DIR), Path::new(crate::control::RUN_DIR))
    }
}

/// What a file of rules has.
type Told = (Vec<BridgeRules>, Vec<BridgeState>);

impl Runs {
    /// Runs under other directories than the host's: `state` survives a reboot, `run` does not.
    pub fn at(state: &Path, run: &Path) -> Runs {
        Runs::on(Arc::new(RealDisk), state, run)
    }

    /// The same on `files`.
    pub fn on(files: Arc<dyn Disk>, state: &Path, run: &Path) -> Runs {
        Runs { files, state: state.join("runs"), run: run.to_path_buf() }
    }

    /// The folder of run `id`.
    pub fn folder(&self, id: &str) -> PathBuf {
        self.state.join(id)
    }

    /// Where the report of run `id` is: on disk, or in memory because that was full.
    fn report_files(&self, id: &str) -> [PathBuf; 2] {
        [self.folder(id).join("report.json"), self.run.join(format!("report.{id}.json"))]
    }

    /// The report of run `id`.
    ///
    /// # Errors
    /// Where it has none yet, or one of another schema.
    pub fn report(&self, id: &str) -> anyhow::Result<Report> {
        let files = self.report_files(id);
        let path = files.iter().find(|path| self.files.exists(path)).unwrap_or(&files[0]);
        let text = self.files.read(path).with_context(|| format!("cannot read the report {}", path.display()))?;
        Report::parse(&text).with_context(|| format!("{} is not a report of this version", path.display()))
    }

    /// Where the journal of run `id` is.
    pub fn journal_paths(&self, id: &str) -> JournalPaths {
        JournalPaths { disk: self.folder(id).join("journal"), memory: self.run.join(format!("journal.{id}")) }
    }

    /// Opens the journal of run `id`, whose folder is there.
    pub fn journal(&self, id: &str) -> anyhow::Result<(Journal, Vec<Entry>)> {
        Journal::open(self.files.clone(), self.journal_paths(id))
    }

    /// What run `id` has written down, on disk and in memory. Nothing is written: the disk may be read-only by now.
    pub fn entries(&self, id: &str) -> anyhow::Result<Vec<Entry>> {
        let paths = self.journal_paths(id);
        let mut records: Vec<Numbered> = Vec::new();
        for path in [paths.disk, paths.memory] {
            let bytes = read(self.files.as_ref(), &path)?.unwrap_or_default();
            let (read, _) = decode(&bytes).map_err(|newer| newer.of(&path))?;
            let next = records.last().map_or(0, |last| last.number + 1);
            records.extend(read.into_iter().filter(|numbered| numbered.number >= next));
        }
        Ok(plain(records))
    }

    /// The OpenFlow rules of run `id`, in memory: between Switch and Handover nothing may wait for a disk.
    pub fn rules_file(&self, id: &str) -> PathBuf {
        self.run.join(format!("rules.{id}.json"))
    }

    /// Keeps the rules of run `id`, and what else its bridges know.
    pub fn keep_rules(&self, id: &str, rules: &[BridgeRules], state: &[BridgeState]) -> anyhow::Result<()> {
        self.replace(&self.rules_file(id), &serde_json::to_vec(&(rules, state))?)
    }

    /// Keeps the groups and flows of a bridge as ovs-ofctl takes them, a file each, until run `id` is forgotten.
    pub fn keep_words(&self, id: &str, rules: &BridgeRules) -> anyhow::Result<[PathBuf; 2]> {
        let file = |kind: &str| self.folder(id).join(format!("{kind}.{}", rules.bridge.replace('/', "_")));
        let files = [file("groups"), file("flows")];
        for (file, words) in files.iter().zip([&rules.groups, &rules.flows]) {
            self.replace(file, (words.join("\n") + "\n").as_bytes())?;
        }
        Ok(files)
    }

    fn told(&self, id: &str) -> anyhow::Result<Option<Told>> {
        self.parsed(&self.rules_file(id))
    }

    /// The rules of run `id`; `None` where none were kept.
    pub fn rules(&self, id: &str) -> anyhow::Result<Option<Vec<BridgeRules>>> {
        Ok(self.told(id)?.map(|(rules, _)| rules))
    }

    /// What the bridges of run `id` knew besides rules and addresses.
    pub fn state(&self, id: &str) -> anyhow::Result<Vec<BridgeState>> {
        Ok(self.told(id)?.map(|(_, state)| state).unwrap_or_default())
    }

    fn by_hand_file(&self, id: &str) -> PathBuf {
        self.run.join(format!("by-hand.{id}.json"))
    }

    /// Keeps what was changed at run time in the daemons that run `id` replaces.
    pub fn keep_by_hand(&self, id: &str, kept: &Kept) -> anyhow::Result<()> {
        self.replace(&self.by_hand_file(id), &serde_json::to_vec(kept)?)
    }

    /// The same; `None` where none was kept.
    pub fn by_hand(&self, id: &str) -> anyhow::Result<Option<Kept>> {
        self.parsed(&self.by_hand_file(id))
    }

    fn devices_file(&self, id: &str) -> PathBuf {
        self.run.join(format!("devices.{id}.json"))
    }

    /// Keeps the internal devices of run `id`, which go with the kernel module, in memory.
    pub fn keep_devices(&self, id: &str, devices: &[Device]) -> anyhow::Result<()> {
        self.replace(&self.devices_file(id), &serde_json::to_vec(devices)?)
    }

    /// The devices of run `id`; none where none were kept.
    pub fn devices(&self, id: &str) -> anyhow::Result<Vec<Device>> {
        Ok(self.parsed(&self.devices_file(id))?.unwrap_or_default())
    }

    fn standing_file(&self, id: &str) -> PathBuf {
        self.run.join(format!("standing.{id}.json"))
    }

    /// Keeps the devices of the ports as run `id` found them, in memory.
    pub fn keep_standing(&self, id: &str, standing: &Standing) -> anyhow::Result<()> {
        self.replace(&self.standing_file(id), &serde_json::to_vec(standing)?)
    }

    /// The devices of the ports of run `id`; none where none were kept.
    pub fn standing(&self, id: &str) -> anyhow::Result<Standing> {
        Ok(self.parsed(&self.standing_file(id))?.unwrap_or_default())
    }

    fn replace(&self, path: &Path, text: &[u8]) -> anyhow::Result<()> {
        self.files.replace(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn parsed<T: DeserializeOwned>(&self, path: &Path) -> anyhow::Result<Option<T>> {
        let Some(text) = read(self.files.as_ref(), path)? else { return Ok(None) };
        serde_json::from_slice(&text).map(Some).with_context(|| format!("cannot read {}", path.display()))
    }

    /// Notes that the supervisor of run `id` has died and is started again. True the first time, where that could be
    /// noted.
    pub fn note_restart(&self, id: &str) -> bool {
        let path = self.restart_file(id);
        !self.files.exists(&path) && self.files.replace(&path, b"").is_ok()
    }

    fn restart_file(&self, id: &str) -> PathBuf {
        self.run.join(format!("restarted.{id}"))
    }

    /// Keeps what conntrack was told when run `id` began.
    pub fn keep_conntrack(&self, id: &str, found: &Conntrack) -> anyhow::Result<()> {
        self.replace(&self.folder(id).join(conntrack::FILE), &serde_json::to_vec_pretty(found)?)
    }

    /// Removes what run `id`, which is over, has left in memory.
    pub fn clear_memory(&self, id: &str) {
        let kept = [self.rules_file(id), self.devices_file(id), self.by_hand_file(id), self.standing_file(id)];
        for path in kept.into_iter().chain([self.journal_paths(id).memory, self.restart_file(id)]) {
            let _not_there_is_fine = self.files.remove(&path);
        }
    }

    /// Removes what runs have left in memory that were killed just after their reports; reports themselves are brought
    /// to the disk. What a person may want to look at stays.
    pub fn clear_left_over(&self) -> anyhow::Result<()> {
        for run in self.list()? {
            let Some(report) = run.report else { continue };
            let [on_disk, in_memory] = self.report_files(&run.id);
            let kept = self.files.exists(&on_disk) || self.write_report(&on_disk, &report).is_ok();
            if kept && self.files.exists(&in_memory) {
                let _still_there_is_fine = self.files.remove(&in_memory);
            }
            if report.exit_code != ExitCode::NeedsPerson {
                self.clear_memory(&run.id);
            }
        }
        Ok(())
    }

    /// Keeps the report of run `id`: the run is over. On a disk that is full it would not be, and would be taken for one
    /// that was cut off: then the report is kept in memory, and says so.
    ///
    /// # Errors
    /// Where neither can take it.
    pub fn keep_report(&self, id: &str, report: &mut Report) -> anyhow::Result<()> {
        let [on_disk, in_memory] = self.report_files(id);
        let Err(error) = self.write_report(&on_disk, report) else { return Ok(()) };
        if !self.files.exists(&self.folder(id)) {
            // It has not begun.
            return Err(error);
        }
        report.warnings.push(format!(
            "{error:#}; it is kept in {} until the machine goes down; `ovs-graceful recover` brings it to the disk once \
             there is space",
            in_memory.display()
        ));
        self.write_report(&in_memory, report)
    }

    fn write_report(&self, path: &Path, report: &Report) -> anyhow::Result<()> {
        let mut text = serde_json::to_vec_pretty(report)?;
        text.push(b'\n');
        self.files.replace(path, &text).with_context(|| format!("cannot write the report {}", path.display()))
    }

    /// Where the program that ran before run `id` may be kept, the best place first: either may be mounted noexec.
    pub fn program_folders(&self, id: &str) -> Vec<PathBuf> {
        vec![self.folder(id).join("program"), self.run.join(format!("program.{id}"))]
    }

    /// Removes the program that was kept for run `id`: it is over, and did not have to go back to it.
    pub fn drop_program(&self, id: &str) {
        for folder in self.program_folders(id) {
            let _not_there_is_fine = self.files.remove_folder(&folder);
        }
    }

    /// Forgets a run that has not begun.
    pub fn forget(&self, id: &str) {
        let _may_not_be_there = self.files.remove_folder(&self.folder(id));
    }

    /// Makes the folder of a new run, mode 0700; what is too much of past runs goes ([`Runs::retain`]).
    pub fn create(&self, id: &str, keep: u32) -> anyhow::Result<PathBuf> {
        ensure!(is_id(id), "`{id}` is no run id: letters, digits, `-` and `_`, at most 64");
        let folder = self.folder(id);
        for dir in [&folder, &self.run] {
            self.files.make_folder(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        self.retain(keep);
        Ok(folder)
    }

    /// The ids of all runs, oldest first.
    pub fn ids(&self) -> anyhow::Result<Vec<String>> {
        let names = match self.files.names(&self.state) {
            Ok(names) => names,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("cannot list {}", self.state.display())),
        };
        let mut ids: Vec<String> = names.into_iter().filter(|name| is_id(name)).collect();
        ids.sort();
        Ok(ids)
    }

    /// All runs with their reports, oldest first.
    pub fn list(&self) -> anyhow::Result<Vec<PastRun>> {
        let ids = self.ids()?;
        Ok(ids.into_iter().map(|id| PastRun { report: self.report(&id).ok(), id }).collect())
    }

    /// The newest run that was begun and has no report. It is under way, or was cut off: the run lock tells which.
    pub fn interrupted(&self) -> anyhow::Result<Option<String>> {
        Ok(self.ids()?.into_iter().rev().find(|id| !self.is_over(id)))
    }

    /// Has run `id` a report?
    pub fn is_over(&self, id: &str) -> bool {
        self.report_files(id).iter().any(|path| self.files.exists(path))
    }

    /// Removes past runs: of those that touched something the oldest beyond `keep`, but never the last one that ended
    /// with 21, with 30 or with 40; of those that touched nothing all but the last. Never one without a report (it may
    /// have to be recovered). Old reports are not worth failing a run for: what cannot be removed stays.
    pub fn retain(&self, keep: u32) {
        let Ok(ids) = self.ids() else { return };
        let over: Vec<(&String, Option<Report>)> =
            ids.iter().filter(|id| self.is_over(id)).map(|id| (id, self.report(id).ok())).collect();
        for id in superfluous(&over, keep as usize) {
            if let Err(e) = self.files.remove_folder(&self.folder(id)) {
                tracing::warn!(id, "an old run cannot be removed: {e}");
            }
        }
    }

    fn needs_person_file(&self) -> PathBuf {
        self.run.join("needs-person")
    }

    /// The run that ended with 40 and left the host in a state that only a person can judge, until one has, another run
    /// has replaced the daemons, or the machine was booted.
    ///
    /// # Errors
    /// Where that cannot be read.
    pub fn needs_person(&self) -> anyhow::Result<Option<String>> {
        let path = self.needs_person_file();
        let Some(text) = read(self.files.as_ref(), &path)? else { return Ok(None) };
        Ok(Some(String::from_utf8_lossy(&text).trim().to_owned()).filter(|id| is_id(id)))
    }

    /// Notes how run `id` ended: with 40 a person is needed until a run ends well. One that was undone, and one that
    /// touched nothing, change nothing about that.
    pub fn note_end(&self, report: &Report) {
        let path = self.needs_person_file();
        let noted = match report.exit_code {
            ExitCode::NeedsPerson => self.files.replace(&path, report.id.as_bytes()),
            ExitCode::Refused | ExitCode::Busy | ExitCode::Undone => Ok(()),
            ExitCode::Done | ExitCode::Back | ExitCode::Differences if report.touched_nothing() => Ok(()),
            ExitCode::Done | ExitCode::Back | ExitCode::Differences => self.well_again(),
        };
        if let Err(error) = noted {
            tracing::warn!("{}: {error}: `ovs-graceful status` will not tell of this run as it should", path.display());
        }
    }

    fn container_run_file(&self) -> PathBuf {
        self.run.join("container-run")
    }

    /// Notes that `hook container-stop` begins run `id`, for `hook container-started`.
    ///
    /// # Errors
    /// Where that cannot be written.
    pub fn note_container_run(&self, id: &str) -> anyhow::Result<()> {
        self.files.make_folder(&self.run).with_context(|| format!("cannot create {}", self.run.display()))?;
        self.replace(&self.container_run_file(), id.as_bytes())
    }

    /// The run that `hook container-stop` began last, until its end has been told.
    ///
    /// # Errors
    /// Where that cannot be read.
    pub fn container_run(&self) -> anyhow::Result<Option<String>> {
        let Some(text) = read(self.files.as_ref(), &self.container_run_file())? else { return Ok(None) };
        Ok(Some(String::from_utf8_lossy(&text).trim().to_owned()).filter(|id| is_id(id)))
    }

    /// Its end has been told, or it never began. A note that stays is another's end told twice, and no more.
    pub fn forget_container_run(&self) {
        let _not_there_is_fine = self.files.remove(&self.container_run_file());
    }

    /// The host has been found well after a run that ended with 40.
    ///
    /// # Errors
    /// Where that cannot be noted.
    pub fn well_again(&self) -> io::Result<()> {
        let path = self.needs_person_file();
        match self.files.exists(&path) {
            true => self.files.remove(&path),
            false => Ok(()),
        }
    }
}

/// Those of `over` (oldest first) that [`Runs::retain`] removes. One whose report cannot be read counts as one that
/// touched something.
fn superfluous<'a>(over: &[(&'a String, Option<Report>)], keep: usize) -> Vec<&'a String> {
    let touched_nothing = |report: &Option<Report>| report.as_ref().is_some_and(Report::touched_nothing);
    let (empty, real): (Vec<_>, Vec<_>) = over.iter().partition(|(_, report)| touched_nothing(report));
    let last_with = |code: ExitCode| {
        let with = |report: &Option<Report>| report.as_ref().is_some_and(|report| report.exit_code == code);
        real.iter().rev().find(|(_, report)| with(report)).map(|(id, _)| *id)
    };
    let spared = [ExitCode::Back, ExitCode::Differences, ExitCode::NeedsPerson].map(last_with);
    let beyond = real.iter().take(real.len().saturating_sub(keep)).map(|(id, _)| *id);
    let old_empty = empty.iter().take(empty.len().saturating_sub(1)).map(|(id, _)| *id);
    beyond.filter(|id| !spared.contains(&Some(*id))).chain(old_empty).collect()
}

/// The id of a run that starts now: sortable, and unique on this host.
pub fn new_id() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = civil(now.as_secs() / 86_400);
    let second = now.as_secs() % 86_400;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let millis = now.subsec_millis();
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}{millis:03}-{}", std::process::id())
}

/// Year, month and day of a day counted from 1970-01-01 (Howard Hinnant's `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let in_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * in_year + 2) / 153;
    let day_of_month = in_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day_of_month)
}

fn is_id(id: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    !id.is_empty() && id.len() <= 64 && id.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::report::Strategy as RunStrategy;

    fn paths(dir: &Path) -> JournalPaths {
        JournalPaths { disk: dir.join("journal"), memory: dir.join("memory") }
    }

    fn open(dir: &Path) -> anyhow::Result<(Journal, Vec<Entry>)> {
        Journal::open(Arc::new(RealDisk), paths(dir))
    }

    fn entry(n: u64) -> Entry {
        Entry::intent(Phase::ALL[n as usize % 11], &format!("step-{n}"), json!({ "n": n, "pids": [1, 2, 3] }))
    }

    fn filled(dir: &Path, count: u64) -> Vec<Entry> {
        let (mut journal, old) = open(dir).unwrap();
        assert!(old.is_empty());
        let entries: Vec<Entry> = (0..count).map(entry).collect();
        entries.iter().for_each(|entry| journal.append(entry).unwrap());
        entries
    }

    #[test]
    fn what_was_appended_is_read_back_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let entries = filled(dir.path(), 5);
        let (mut journal, read) = open(dir.path()).unwrap();
        assert_eq!(read, entries);
        journal.append(&Entry::done(Phase::Arm, "more", json!(null))).unwrap();
        assert_eq!(open(dir.path()).unwrap().1.len(), 6);
        assert_eq!(std::fs::metadata(dir.path().join("journal")).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn cut_off_at_every_byte_the_whole_records_before_are_read_and_more_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let entries = filled(dir.path(), 3);
        let bytes = std::fs::read(dir.path().join("journal")).unwrap();
        let mut ends = vec![0];
        for numbered in decode(&bytes).unwrap().0 {
            ends.push(ends.last().unwrap() + encode(&numbered).unwrap().len());
        }
        for length in 0..=bytes.len() {
            std::fs::write(dir.path().join("journal"), &bytes[..length]).unwrap();
            let whole = ends.iter().filter(|end| **end <= length).count() - 1;
            let (mut journal, read) = open(dir.path()).unwrap();
            assert_eq!(read, entries[..whole], "cut at {length}");
            journal.append(&entry(77)).unwrap();
            let after = open(dir.path()).unwrap().1;
            assert_eq!(after.len(), whole + 1, "cut at {length}");
            assert_eq!(after[whole], entry(77));
        }
    }

    #[test]
    fn records_in_memory_are_carried_over_once_wherever_the_run_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        let mut entries = filled(dir.path(), 2);
        let (mut journal, _) = open(dir.path()).unwrap();
        journal.to_memory().unwrap();
        let before = std::fs::read(&paths.disk).unwrap();
        for n in 2..5 {
            entries.push(entry(n));
            journal.append(&entry(n)).unwrap();
        }
        assert_eq!(std::fs::read(&paths.disk).unwrap(), before, "nothing goes to the disk meanwhile");
        let memory = std::fs::read(&paths.memory).unwrap();
        // Killed before the way back to disk.
        drop(journal);
        assert_eq!(open(dir.path()).unwrap().1, entries);
        // Killed after the copy, before the removal.
        std::fs::write(&paths.memory, memory).unwrap();
        let (mut journal, read) = open(dir.path()).unwrap();
        assert_eq!(read, entries);
        journal.to_memory().unwrap();
        journal.append(&entry(5)).unwrap();
        journal.to_disk().unwrap();
        journal.append(&entry(6)).unwrap();
        entries.extend([entry(5), entry(6)]);
        assert!(!paths.memory.exists());
        assert_eq!(open(dir.path()).unwrap().1, entries);
    }

    proptest! {
        #[test]
        fn garbage_is_never_more_than_a_bad_tail(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok((_, good)) = decode(&bytes) {
                prop_assert!(good as usize <= bytes.len());
            }
        }

        #[test]
        fn a_flipped_bit_hides_its_record_and_what_follows(at in 0usize..400, bit in 0u8..8) {
            let all: Vec<Numbered> = (0..4).map(|n| Numbered { number: n, entry: entry(n) }).collect();
            let records: Vec<Vec<u8>> = all.iter().map(|numbered| encode(numbered).unwrap()).collect();
            let mut bytes: Vec<u8> = records.concat();
            prop_assume!(at < bytes.len());
            bytes[at] ^= 1 << bit;
            let (read, _) = decode(&bytes).unwrap();
            let mut end = 0;
            let untouched = records.iter().take_while(|record| { end += record.len(); end <= at }).count();
            prop_assert_eq!(&read[..], &all[..untouched]);
        }
    }

    #[test]
    fn a_whole_record_of_another_version_is_not_taken_for_a_torn_one() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 2);
        let path = dir.path().join("journal");
        let mut bytes = std::fs::read(&path).unwrap();
        let json = br#"{"number":2,"phase":"a-new-one","step":"x","state":"intent"}"#;
        bytes.extend_from_slice(&(json.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(json).to_le_bytes());
        bytes.extend_from_slice(json);
        std::fs::write(&path, &bytes).unwrap();
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("another version"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "nothing of it is cut away");
    }

    #[test]
    fn zeros_at_the_end_are_a_torn_tail() {
        let dir = tempfile::tempdir().unwrap();
        let entries = filled(dir.path(), 2);
        let path = dir.path().join("journal");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.resize(bytes.len() + 4096, 0);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(open(dir.path()).unwrap().1, entries);
    }

    #[test]
    fn what_a_run_wrote_is_read_from_disk_and_memory_without_writing() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs::at(&dir.path().join("state"), &dir.path().join("run"));
        runs.create("run-1", 3).unwrap();
        let (mut journal, _) = runs.journal("run-1").unwrap();
        journal.append(&entry(0)).unwrap();
        journal.to_memory().unwrap();
        journal.append(&entry(1)).unwrap();
        assert_eq!(runs.entries("run-1").unwrap(), [entry(0), entry(1)]);
        assert!(runs.journal_paths("run-1").memory.exists());
        assert!(runs.entries("run-2").unwrap().is_empty());
    }

    /// Of a run that replaced the daemons.
    fn report(runs: &Runs, id: &str) {
        report_with(runs, id, ExitCode::Done, &["check", "verify"]);
    }

    fn report_with(runs: &Runs, id: &str, exit_code: ExitCode, phases: &[&str]) {
        let mut report = Report::new(id, RunStrategy::Standby, 0);
        phases.iter().for_each(|phase| report.phase_named(phase, 0, 1));
        report.finish(&crate::machine::Outcome { exit_code, reason: "told".into() }, 2);
        runs.keep_report(id, &mut report).unwrap();
        runs.note_end(&report);
    }

    #[test]
    fn refused_and_empty_runs_never_push_out_a_real_report() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs::at(&dir.path().join("state"), &dir.path().join("run"));
        let one = |id: &str, exit_code, phases: &[&str]| {
            runs.create(id, 2).unwrap();
            report_with(&runs, id, exit_code, phases);
            runs.retain(2);
        };
        one("run-01", ExitCode::Done, &["check", "verify"]);
        for n in 2..9 {
            one(&format!("run-{n:02}"), ExitCode::Refused, &["check"]);
        }
        one("run-09", ExitCode::Done, &["check"]);
        assert_eq!(runs.ids().unwrap(), ["run-01", "run-09"]);
        one("run-10", ExitCode::Undone, &["check", "snapshot"]);
        assert_eq!(
            runs.ids().unwrap(),
            ["run-01", "run-09", "run-10"],
            "two that touched something, and one that did not"
        );
        one("run-11", ExitCode::Done, &["check", "verify"]);
        assert_eq!(runs.ids().unwrap(), ["run-09", "run-10", "run-11"]);
    }

    #[test]
    fn the_last_run_that_did_not_end_well_stays() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs::at(&dir.path().join("state"), &dir.path().join("run"));
        let codes = [ExitCode::NeedsPerson, ExitCode::NeedsPerson, ExitCode::Back, ExitCode::Differences];
        for (n, code) in codes.into_iter().chain([ExitCode::Done; 5]).enumerate() {
            let id = format!("run-{n}");
            runs.create(&id, 2).unwrap();
            report_with(&runs, &id, code, &["check", "verify"]);
            runs.retain(2);
        }
        assert_eq!(runs.ids().unwrap(), ["run-1", "run-2", "run-3", "run-7", "run-8"]);
    }

    #[test]
    fn a_run_that_needs_a_person_is_remembered_until_one_ends_well() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs::at(&dir.path().join("state"), &dir.path().join("run"));
        let all = ["check", "verify"];
        let mut number = 0;
        let mut ended = |exit_code, phases: &[&str]| {
            number += 1;
            let id = format!("run-{number}");
            runs.create(&id, 20).unwrap();
            report_with(&runs, &id, exit_code, phases);
            runs.needs_person().unwrap()
        };
        assert_eq!(ended(ExitCode::Done, &all), None);
        assert_eq!(ended(ExitCode::NeedsPerson, &all).as_deref(), Some("run-2"));
        for code in [ExitCode::Refused, ExitCode::Undone] {
            assert_eq!(ended(code, &all).as_deref(), Some("run-2"), "{code:?}");
        }
        assert_eq!(ended(ExitCode::Done, &["check"]).as_deref(), Some("run-2"), "nothing to do is no cure");
        assert_eq!(ended(ExitCode::Differences, &all), None);
        assert_eq!(ended(ExitCode::NeedsPerson, &all).as_deref(), Some("run-7"));
        runs.well_again().unwrap();
        runs.well_again().unwrap();
        assert_eq!(runs.needs_person().unwrap(), None);
    }

    #[test]
    fn old_runs_go_but_never_one_that_may_have_to_be_recovered() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs::at(&dir.path().join("state"), &dir.path().join("run"));
        assert!(runs.list().unwrap().is_empty());
        for n in 0..6 {
            let id = format!("run-{n}");
            let folder = runs.create(&id, 3).unwrap();
            assert_eq!(std::fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700);
            if n != 1 {
                report(&runs, &id);
                runs.retain(3);
            }
        }
        assert_eq!(runs.ids().unwrap(), ["run-1", "run-3", "run-4", "run-5"]);
        assert_eq!(runs.interrupted().unwrap(), Some("run-1".into()));
        report(&runs, "run-1");
        assert_eq!(runs.interrupted().unwrap(), None);
    }

    #[test]
    fn a_report_that_the_disk_cannot_take_ends_the_run_and_gets_there_later() {
        let dir = tempfile::tempdir().unwrap();
        let [state, run] = ["state", "run"].map(|name| dir.path().join(name));
        let runs = Runs::at(&state, &run);
        let folder = runs.create("run-1", 3).unwrap();
        // Nothing can take the place of a folder that is not empty.
        std::fs::create_dir_all(folder.join("report.json/in-the-way")).unwrap();
        let mut written = Report::new("run-1", RunStrategy::Standby, 0);
        runs.keep_report("run-1", &mut written).unwrap();
        assert!(written.warnings[0].contains("until the machine goes down"), "{:?}", written.warnings);
        std::fs::remove_dir_all(folder.join("report.json")).unwrap();
        assert_eq!(runs.interrupted().unwrap(), None);
        assert_eq!(runs.list().unwrap()[0].report.as_ref(), Some(&written));
        runs.clear_left_over().unwrap();
        assert_eq!(std::fs::read_dir(&run).unwrap().count(), 0);
        assert_eq!(runs.report("run-1").unwrap(), written);
    }

    #[test]
    fn an_id_cannot_leave_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs::at(dir.path(), dir.path());
        for id in ["..", "a/b", "", ".", "x y"] {
            assert!(runs.create(id, 3).is_err(), "{id}");
        }
        assert!(is_id(&new_id()));
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(20_777), (2026, 11, 20));
        assert_eq!(civil(19_782), (2024, 2, 29));
    }
}

//! What a run has begun and done, so that another process can finish or undo it.
//!
//! ```text
//! /var/lib/ovs-graceful/runs/<id>/     0700
//!     journal                          records: [length u32 LE][crc32c u32 LE][JSON]
//!     report.json                      once the run is over
//! /run/ovs-graceful/journal.<id>       records written between Switch and Handover
//! ```
//!
//! Every step is journalled before it is done. Each record is synced to disk before the step goes on, except between
//! Switch and Handover: then nothing may wait for a disk that may itself be reached over the bridge (hazards 27), so
//! records go to /run, and are carried over to the disk afterwards. Numbers make that safe to cut off at any point.
//!
//! Reading stops at the first record that is cut off or does not match its checksum: what comes after it was not
//! finished when the machine went down.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context};
use serde::{Deserialize, Serialize};

use crate::machine::Phase;
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
    paths: JournalPaths,
    disk: File,
    memory: Option<File>,
    /// The number of the next record.
    next: u64,
    /// The number of the first record that the disk does not have.
    disk_next: u64,
}

impl Journal {
    /// Opens the journal, with what is in it already. A tail that was cut off is cut away; records that were left in
    /// memory are carried over to the disk.
    pub fn open(paths: JournalPaths) -> anyhow::Result<(Journal, Vec<Entry>)> {
        let mut disk = open_append(&paths.disk)?;
        let (mut entries, good) = read_records(&mut disk, &paths.disk)?;
        cut_off(&mut disk, &paths.disk, good)?;
        let next = entries.last().map_or(0, |last| last.number + 1);
        let mut journal = Journal { paths, disk, memory: None, next, disk_next: next };
        entries.extend(journal.carry_over()?);
        Ok((journal, entries.into_iter().map(|numbered| numbered.entry).collect()))
    }

    /// Appends `entry`. On return it is safe: on disk, or, between Switch and Handover, against everything but a
    /// reboot.
    pub fn append(&mut self, entry: &Entry) -> anyhow::Result<()> {
        let record = encode(&Numbered { number: self.next, entry: entry.clone() })?;
        match &mut self.memory {
            Some(memory) => {
                write_record(memory, &record, &self.paths.memory)?;
                self.next += 1;
                Ok(())
            }
            None => {
                write_record(&mut self.disk, &record, &self.paths.disk)?;
                // A record that is written has used its number up, whether or not it can be synced.
                self.next += 1;
                self.disk_next = self.next;
                sync(&self.disk, &self.paths.disk)
            }
        }
    }

    /// From now on records go to memory only. Doing it twice is doing it once.
    pub fn to_memory(&mut self) -> anyhow::Result<()> {
        if self.memory.is_none() {
            self.memory = Some(open_append(&self.paths.memory)?);
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
        let mut memory = match File::open(&path) {
            Ok(memory) => memory,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("cannot read the journal {}", path.display())),
        };
        let (mut records, _) = read_records(&mut memory, &path)?;
        records.retain(|numbered| numbered.number >= self.disk_next);
        for numbered in &records {
            write_record(&mut self.disk, &encode(numbered)?, &self.paths.disk)?;
            self.disk_next = numbered.number + 1;
            self.next = self.next.max(self.disk_next);
        }
        sync(&self.disk, &self.paths.disk)?;
        std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        Ok(records)
    }
}

fn open_append(path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600);
    options.open(path).with_context(|| format!("cannot open the journal {}", path.display()))
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

/// One write call, so that a reader sees all of a record or a tail that does not match its checksum.
fn write_record(file: &mut File, record: &[u8], path: &Path) -> anyhow::Result<()> {
    let end = file.seek(SeekFrom::End(0))?;
    if let Err(e) = file.write_all(record) {
        // A record that was half written (disk full) would hide every later one.
        let _ = file.set_len(end);
        return Err(e).with_context(|| format!("cannot write the journal {}", path.display()));
    }
    Ok(())
}

fn sync(file: &File, path: &Path) -> anyhow::Result<()> {
    file.sync_data().with_context(|| format!("cannot sync the journal {}", path.display()))
}

fn cut_off(file: &mut File, path: &Path, good: u64) -> anyhow::Result<()> {
    if file.metadata()?.len() > good {
        file.set_len(good).with_context(|| format!("cannot cut the journal {}", path.display()))?;
        sync(file, path)?;
    }
    Ok(())
}

/// The records up to the first bad one, and how many bytes they take.
fn read_records(file: &mut File, path: &Path) -> anyhow::Result<(Vec<Numbered>, u64)> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes).with_context(|| format!("cannot read the journal {}", path.display()))?;
    Ok(decode(&bytes))
}

fn decode(bytes: &[u8]) -> (Vec<Numbered>, u64) {
    let mut records: Vec<Numbered> = Vec::new();
    let mut rest = bytes;
    while let Some((numbered, after)) = decode_one(rest) {
        if records.last().is_some_and(|last| numbered.number <= last.number) {
            break;
        }
        records.push(numbered);
        rest = after;
    }
    (records, (bytes.len() - rest.len()) as u64)
}

fn decode_one(bytes: &[u8]) -> Option<(Numbered, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (checksum, rest) = rest.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > MAX_RECORD {
        return None;
    }
    let (json, rest) = rest.split_at_checked(length)?;
    if crc32c::crc32c(json) != u32::from_le_bytes(*checksum) {
        return None;
    }
    Some((serde_json::from_slice(json).ok()?, rest))
}

/// The folders of past runs and the one under way.
#[derive(Debug, Clone)]
pub struct Runs {
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

impl Runs {
    /// Runs under other directories than the host's: `state` survives a reboot, `run` does not.
    pub fn at(state: &Path, run: &Path) -> Runs {
        Runs { state: state.join("runs"), run: run.to_path_buf() }
    }

    /// The folder of run `id`.
    pub fn folder(&self, id: &str) -> PathBuf {
        self.state.join(id)
    }

    /// The report of run `id`.
    pub fn report(&self, id: &str) -> PathBuf {
        self.folder(id).join("report.json")
    }

    /// The journal of run `id`.
    pub fn journal(&self, id: &str) -> JournalPaths {
        JournalPaths { disk: self.folder(id).join("journal"), memory: self.run.join(format!("journal.{id}")) }
    }

    /// Makes the folder of a new run, mode 0700, and removes the oldest beyond `keep`, never one without a report
    /// (it may have to be recovered).
    pub fn create(&self, id: &str, keep: u32) -> anyhow::Result<PathBuf> {
        ensure!(is_id(id), "`{id}` is no run id: letters, digits, `-` and `_`, at most 64");
        let folder = self.folder(id);
        for dir in [&folder, &self.run] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.with_context(|| format!("cannot create {}", dir.display()))?;
        }
        self.retain(keep, id);
        Ok(folder)
    }

    /// The ids of all runs, oldest first.
    pub fn ids(&self) -> anyhow::Result<Vec<String>> {
        let folders = match std::fs::read_dir(&self.state) {
            Ok(folders) => folders,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("cannot list {}", self.state.display())),
        };
        let names = folders.filter_map(|folder| folder.ok()?.file_name().into_string().ok());
        let mut ids: Vec<String> = names.filter(|name| is_id(name)).collect();
        ids.sort();
        Ok(ids)
    }

    /// All runs with their reports, oldest first.
    pub fn list(&self) -> anyhow::Result<Vec<PastRun>> {
        let ids = self.ids()?;
        Ok(ids.into_iter().map(|id| PastRun { report: Report::read(&self.report(&id)).ok(), id }).collect())
    }

    /// The newest run that was begun and has no report. It is under way, or was cut off: the run lock tells which.
    pub fn interrupted(&self) -> anyhow::Result<Option<String>> {
        Ok(self.ids()?.into_iter().rev().find(|id| !self.report(id).exists()))
    }

    /// Old reports are not worth failing a run for: what cannot be removed stays.
    fn retain(&self, keep: u32, current: &str) {
        let Ok(ids) = self.ids() else { return };
        let over: Vec<&String> = ids.iter().filter(|id| *id != current && self.report(id).exists()).collect();
        let excess = (over.len() + 1).saturating_sub(keep as usize);
        for id in over.into_iter().take(excess) {
            if let Err(e) = std::fs::remove_dir_all(self.folder(id)) {
                tracing::warn!(id, "an old run cannot be removed: {e}");
            }
        }
    }
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

    fn entry(n: u64) -> Entry {
        Entry::intent(Phase::ALL[n as usize % 11], &format!("step-{n}"), json!({ "n": n, "pids": [1, 2, 3] }))
    }

    fn filled(dir: &Path, count: u64) -> Vec<Entry> {
        let (mut journal, old) = Journal::open(paths(dir)).unwrap();
        assert!(old.is_empty());
        let entries: Vec<Entry> = (0..count).map(entry).collect();
        entries.iter().for_each(|entry| journal.append(entry).unwrap());
        entries
    }

    #[test]
    fn what_was_appended_is_read_back_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let entries = filled(dir.path(), 5);
        let (mut journal, read) = Journal::open(paths(dir.path())).unwrap();
        assert_eq!(read, entries);
        journal.append(&Entry::done(Phase::Arm, "more", json!(null))).unwrap();
        assert_eq!(Journal::open(paths(dir.path())).unwrap().1.len(), 6);
        assert_eq!(std::fs::metadata(dir.path().join("journal")).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn cut_off_at_every_byte_the_whole_records_before_are_read_and_more_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let entries = filled(dir.path(), 3);
        let bytes = std::fs::read(dir.path().join("journal")).unwrap();
        let mut ends = vec![0];
        for numbered in decode(&bytes).0 {
            ends.push(ends.last().unwrap() + encode(&numbered).unwrap().len());
        }
        for length in 0..=bytes.len() {
            std::fs::write(dir.path().join("journal"), &bytes[..length]).unwrap();
            let whole = ends.iter().filter(|end| **end <= length).count() - 1;
            let (mut journal, read) = Journal::open(paths(dir.path())).unwrap();
            assert_eq!(read, entries[..whole], "cut at {length}");
            journal.append(&entry(77)).unwrap();
            let after = Journal::open(paths(dir.path())).unwrap().1;
            assert_eq!(after.len(), whole + 1, "cut at {length}");
            assert_eq!(after[whole], entry(77));
        }
    }

    #[test]
    fn records_in_memory_are_carried_over_once_wherever_the_run_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        let mut entries = filled(dir.path(), 2);
        let (mut journal, _) = Journal::open(paths.clone()).unwrap();
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
        assert_eq!(Journal::open(paths.clone()).unwrap().1, entries);
        // Killed after the copy, before the removal.
        std::fs::write(&paths.memory, memory).unwrap();
        let (mut journal, read) = Journal::open(paths.clone()).unwrap();
        assert_eq!(read, entries);
        journal.to_memory().unwrap();
        journal.append(&entry(5)).unwrap();
        journal.to_disk().unwrap();
        journal.append(&entry(6)).unwrap();
        entries.extend([entry(5), entry(6)]);
        assert!(!paths.memory.exists());
        assert_eq!(Journal::open(paths).unwrap().1, entries);
    }

    proptest! {
        #[test]
        fn garbage_is_never_more_than_a_bad_tail(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (_, good) = decode(&bytes);
            prop_assert!(good as usize <= bytes.len());
        }

        #[test]
        fn a_flipped_bit_hides_its_record_and_what_follows(at in 0usize..400, bit in 0u8..8) {
            let all: Vec<Numbered> = (0..4).map(|n| Numbered { number: n, entry: entry(n) }).collect();
            let records: Vec<Vec<u8>> = all.iter().map(|numbered| encode(numbered).unwrap()).collect();
            let mut bytes: Vec<u8> = records.concat();
            prop_assume!(at < bytes.len());
            bytes[at] ^= 1 << bit;
            let (read, _) = decode(&bytes);
            let mut end = 0;
            let untouched = records.iter().take_while(|record| { end += record.len(); end <= at }).count();
            prop_assert_eq!(&read[..], &all[..untouched]);
        }
    }

    fn report(runs: &Runs, id: &str) {
        Report::new(id, RunStrategy::Standby, 0).write(&runs.report(id)).unwrap();
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
            }
        }
        assert_eq!(runs.ids().unwrap(), ["run-1", "run-3", "run-4", "run-5"]);
        assert_eq!(runs.interrupted().unwrap(), Some("run-1".into()));
        report(&runs, "run-1");
        assert_eq!(runs.interrupted().unwrap(), None);
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

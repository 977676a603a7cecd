//! The disk that the database's file is on, and what can be done where it cannot be written: flow-restore-wait is
//! removed by a transaction, a transaction has to be written before it counts, and an ovs-vswitchd that has seen the flag
//! binds no upcalls before the flag has gone (docs/database-disk.md).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::clock::Clock;
use super::{Database, HostError, Result};

/// What is kept free for the removal of flow-restore-wait, bytes.
pub const BALLAST: u64 = 1 << 20;
/// The least that is free before a run, bytes, beside twice the file: a conversion keeps a copy and writes a new one.
const LEAST: u64 = 2 * BALLAST;
/// For whoever is told that the disk does not take what was to be written.
pub const DISK_REMEDY: &str = "make room on the disk of the database, or make it writable";
/// For whoever is told that the server serves the database from memory.
pub const MEMORY_REMEDY: &str =
    "make its disk writable, then `ovs-graceful recover`, before ovsdb-server or the machine is restarted";
/// So long a disk may be in trouble that comes to an end by itself.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two tries.
pub const TRY_AGAIN: Duration = Duration::from_millis(100);

/// What is known of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its size, bytes.
    pub size: u64,
    /// What is free for it, bytes.
    pub free: u64,
    /// The server has it in memory: the file on the disk is older.
    pub in_memory: bool,
}

impl DatabaseFile {
    /// How much has to be free before a run, bytes.
    pub fn needed(&self) -> u64 {
        LEAST + 2 * self.size
    }
}

/// The disk of the database.
pub trait DatabaseDisk: Send + Sync {
    /// Looks at it, and makes and removes a file beside the database. The database is not touched.
    fn look_at_disk(&self) -> Result<DatabaseFile>;
    /// The same without that file: a disk that hangs keeps nobody waiting.
    fn glance_at_disk(&self) -> Result<DatabaseFile> {
        self.look_at_disk()
    }
    /// Is the ballast there, or a database in memory? False where it is not known which file the database has, as nothing
    /// was put beside that.
    fn has_left_over(&self) -> Result<bool>;
    /// Puts a file of [`BALLAST`] beside the database. May be done twice.
    fn keep_ballast(&self) -> Result<()>;
    /// Removes it; false where there is none, or where the file is not known.
    fn drop_ballast(&self) -> Result<bool>;
    /// Has the server serve the database, as it is, from memory: from then on it can be written, whatever its disk does.
    /// No client notices. A restart of the server goes back to the file on the disk.
    fn serve_from_memory(&self, until: Instant) -> Result<()>;
    /// Undoes that: has the server write the database to its place on the disk. False where it was there.
    fn write_back(&self, until: Instant) -> Result<bool>;
}

/// What was done about a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Measure {
    /// Nothing but to wait.
    Waited,
    /// The ballast was given up.
    Room(String),
    /// The database is in memory now.
    Memory(String),
    /// Something that may help did not work.
    Failed(String),
}

/// What is done, one after the other, where the database's disk refuses a transaction.
#[derive(Debug, Default)]
pub struct Measures {
    since: Option<Instant>,
    gave_room: bool,
    failed: bool,
}

impl Measures {
    /// After `error`: does the next thing that may help. The transaction is to be tried again then.
    ///
    /// # Errors
    /// `error`, where it is another one, or where `until` has passed.
    pub fn after(
        &mut self,
        error: HostError,
        database: &dyn Database,
        now: Instant,
        until: Instant,
    ) -> Result<Measure> {
        if !error.unwritable || now >= until {
            return Err(error);
        }
        let since = *self.since.get_or_insert(now);
        if !std::mem::replace(&mut self.gave_room, true) && database.drop_ballast().unwrap_or(false) {
            return Ok(Measure::Room(format!("{error}: the room that was kept beside the database is given up")));
        }
        if now.saturating_duration_since(since) < PATIENCE {
            return Ok(Measure::Waited);
        }
        match database.serve_from_memory(until) {
            Ok(()) => Ok(Measure::Memory(format!("{error}: {}", in_memory()))),
            Err(_) if std::mem::replace(&mut self.failed, true) => Ok(Measure::Waited),
            Err(failed) => Ok(Measure::Failed(format!("{error}: it cannot be served from memory either: {failed}"))),
        }
    }
}

/// Does `transaction` as soon as the database can be written, for which everything is done that helps, until `until`. What
/// was done is added to `told`.
///
/// # Errors
/// That of the last try.
pub fn write<T>(
    database: &dyn Database,
    clock: &dyn Clock,
    until: Instant,
    told: &mut Vec<String>,
    mut transaction: impl FnMut() -> Result<T>,
) -> Result<T> {
    let mut measures = Measures::default();
    loop {
        let error = match transaction() {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        match measures.after(error, database, clock.now(), until)? {
            Measure::Waited => clock.sleep(TRY_AGAIN),
            Measure::Room(text) | Measure::Memory(text) | Measure::Failed(text) => told.push(text),
        }
    }
}

/// What the report says of a database in memory.
pub fn in_memory() -> String {
    format!("the database is served from memory, and what is changed in it is lost with ovsdb-server; remedy: {MEMORY_REMEDY}")
}

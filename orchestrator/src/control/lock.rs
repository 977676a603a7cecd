//! One run at a time.

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::recovery::RECOVERY;

/// Who only asks for the holder has the lock for a moment, too, and is none: so often, so far apart, it is tried again.
const LOOKS: u32 = 20;
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Who holds the lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The run's id.
    pub id: String,
    /// The supervisor's process.
    pub pid: u32,
}

/// The id of one that has not said yet who it is.
const UNKNOWN: &str = "unknown";

/// The id of an ordinary restart in the lock: the commands of the units then do what the package wrote.
pub const PLAIN: &str = "plain-restart";

impl Holder {
    fn unknown() -> Holder {
        Holder { id: UNKNOWN.to_string(), pid: 0 }
    }
}

impl fmt::Display for Holder {
    /// What is under way, and what one can do about it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Holder { id, pid } = self;
        match id.as_str() {
            RECOVERY => write!(f, "a recovery is under way (process {pid}); `ovs-graceful wait` waits for it"),
            PLAIN => write!(f, "an ordinary restart is under way (process {pid}), and ends by itself; try again then"),
            UNKNOWN => write!(f, "a run is under way that has not said yet which; `ovs-graceful wait` waits for it"),
            _ => write!(
                f,
                "run {id} is under way (process {pid}); wait for it (`ovs-graceful wait`) or undo it (`ovs-graceful abort`)"
            ),
        }
    }
}

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another run has it: exit code 11.
    #[error("{} is held: {}", path.display(), .holder.clone().unwrap_or_else(Holder::unknown))]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Who has it, where it could be read.
        holder: Option<Holder>,
    },
    /// The file could not be opened, locked or written.
    #[error("cannot lock {}: {source}; is /run writable, and are you root?", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The lock of the run under way: held while this lives, and given back by the kernel when its process dies.
#[derive(Debug)]
pub struct RunLock {
    file: Flock<File>,
}

impl RunLock {
    /// Takes the lock and writes `holder` into it.
    pub fn acquire(path: &Path, holder: &Holder) -> Result<RunLock, LockError> {
        let mut looks = 0..LOOKS;
        loop {
            match RunLock::try_acquire(path, holder) {
                Err(LockError::Held { holder: None, .. }) if looks.next().is_some() => thread::sleep(LOOK_AGAIN),
                done => return done,
            }
        }
    }

    fn try_acquire(path: &Path, holder: &Holder) -> Result<RunLock, LockError> {
        let io_error = |source: io::Error| LockError::Io { path: path.to_path_buf(), source };
        let file = open(path).map_err(io_error)?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((mut file, Errno::EWOULDBLOCK)) => {
                return Err(LockError::Held { path: path.to_path_buf(), holder: read_holder(&mut file) })
            }
            Err((_, errno)) => return Err(io_error(errno.into())),
        };
        write_holder(&mut file, holder).map_err(io_error)?;
        Ok(RunLock { file })
    }

    /// Who holds the lock now, without taking it: `None` where nobody does.
    pub fn holder(path: &Path) -> Result<Option<Holder>, LockError> {
        let io_error = |source: io::Error| LockError::Io { path: path.to_path_buf(), source };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_error(e)),
        };
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => Ok(None),
            Err((mut file, Errno::EWOULDBLOCK)) => Ok(Some(read_holder(&mut file).unwrap_or_else(Holder::unknown))),
            Err((_, errno)) => Err(io_error(errno.into())),
        }
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // The file stays: unlinking it would let two runs lock two files of one name. Its text goes; a failure only
        // leaves the name of a run that is over in a file that nobody locks.
        let _ = self.file.set_len(0);
    }
}

fn open(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn read_holder(file: &mut File) -> Option<Holder> {
    let mut text = String::new();
    file.take(4096).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn write_holder(file: &mut File, holder: &Holder) -> io::Result<()> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&serde_json::to_vec(holder)?)
}

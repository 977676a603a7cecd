//! The file systems on which a run keeps what must outlive its supervisor.

use std::fmt::Debug;
use std::io;
use std::path::Path;

/// Where journals, reports and rules are kept. Everything is for root alone: folders 0700, files 0600.
pub trait Disk: Debug + Send + Sync {
    /// Makes a folder, with those above it; synced. One that is there already is fine.
    fn make_folder(&self, folder: &Path) -> io::Result<()>;
    /// The names in a folder.
    fn names(&self, folder: &Path) -> io::Result<Vec<String>>;
    /// Is there such a file?
    fn exists(&self, path: &Path) -> bool;
    /// All of a file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// Opens a file for appending, made (and its folder synced) where it is not there.
    fn open(&self, path: &Path) -> io::Result<Box<dyn AppendFile>>;
    /// The old file or the whole new one, never half of it; synced with its folder.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Removes a folder with all in it.
    fn remove_folder(&self, folder: &Path) -> io::Result<()>;
}

/// A file that grows at its end.
pub trait AppendFile: Debug + Send {
    /// All of it.
    fn read(&mut self) -> io::Result<Vec<u8>>;
    /// Appends `bytes` in one write; where that fails, some of them may be there.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Cuts it to `length` bytes.
    fn cut(&mut self, length: u64) -> io::Result<()>;
    /// What was written is on the disk when this returns.
    fn sync(&mut self) -> io::Result<()>;
}

//! The disk of the simulated host: what was not synced is lost when the machine goes down, and so is all of /run.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::world::World;
use super::Sim;
use crate::host::disk::{AppendFile, Disk};
use crate::host::HostError;

/// All files.
#[derive(Debug, Clone, Default)]
pub struct Files {
    files: BTreeMap<PathBuf, Stored>,
    folders: BTreeSet<PathBuf>,
    /// Nothing can be added but in /run.
    pub full: bool,
}

#[derive(Debug, Clone, Default)]
struct Stored {
    bytes: Vec<u8>,
    /// So many of them are on the disk.
    synced: usize,
}

impl Files {
    /// The machine has gone down.
    pub fn lose_power(&mut self) {
        self.files.retain(|path, _| !path.starts_with("/run"));
        self.folders.retain(|path| !path.starts_with("/run"));
        self.files.values_mut().for_each(|file| file.bytes.truncate(file.synced));
    }

    /// The files in /run.
    pub fn names_in_memory(&self) -> Vec<String> {
        self.files.keys().filter(|path| path.starts_with("/run")).map(|path| path.display().to_string()).collect()
    }

    /// May something be added to `path`?
    fn room(&self, path: &Path) -> io::Result<()> {
        match self.full && !path.starts_with("/run") {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }

    fn file(&mut self, path: &Path) -> io::Result<&mut Stored> {
        self.files.get_mut(path).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// See the module.
#[derive(Clone)]
pub struct SimDisk(pub Sim);

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimDisk")
    }
}

impl SimDisk {
    /// An operation that may fail by itself (which is no fault) or by one.
    fn operate<T>(
        &self,
        name: &'static str,
        half: impl FnOnce(&mut World),
        mut effect: impl FnMut(&mut Files) -> io::Result<T>,
    ) -> io::Result<T> {
        let no_space = |error: HostError| io::Error::other(error.cause);
        self.0.operate_in_parts(name, None, half, |world| Ok(effect(&mut world.files))).map_err(no_space)?
    }
}

impl Disk for SimDisk {
    fn make_folder(&self, folder: &Path) -> io::Result<()> {
        self.operate(
            "disk.make_folder",
            |_| {},
            |files| {
                files.room(folder)?;
                files.folders.extend(folder.ancestors().map(Path::to_path_buf));
                Ok(())
            },
        )
    }

    fn names(&self, folder: &Path) -> io::Result<Vec<String>> {
        let world = self.0.look();
        if !world.files.folders.contains(folder) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let all = world.files.folders.iter().chain(world.files.files.keys());
        let inside = all.filter(|path| path.parent() == Some(folder));
        Ok(inside.filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect())
    }

    fn exists(&self, path: &Path) -> bool {
        let world = self.0.look();
        world.files.files.contains_key(path) || world.files.folders.contains(path)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.0.look().files.file(path).map(|file| file.bytes.clone())
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn AppendFile>> {
        self.operate(
            "disk.open",
            |_| {},
            |files| {
                if path.parent().is_none_or(|folder| !files.folders.contains(folder)) {
                    return Err(io::ErrorKind::NotFound.into());
                }
                if !files.files.contains_key(path) {
                    files.room(path)?;
                }
                files.files.entry(path.to_path_buf()).or_default();
                Ok(())
            },
        )?;
        Ok(Box::new(SimFile { disk: self.clone(), path: path.to_path_buf() }))
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.operate(
            "disk.replace",
            |_| {},
            |files| {
                if path.parent().is_none_or(|folder| !files.folders.contains(folder)) {
                    return Err(io::ErrorKind::NotFound.into());
                }
                files.room(path)?;
                files.files.insert(path.to_path_buf(), Stored { bytes: bytes.to_vec(), synced: bytes.len() });
                Ok(())
            },
        )
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.operate(
            "disk.remove",
            |_| {},
            |files| files.files.remove(path).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into()),
        )
    }

    fn remove_folder(&self, folder: &Path) -> io::Result<()> {
        self.operate(
            "disk.remove_folder",
            |_| {},
            |files| {
                files.files.retain(|path, _| !path.starts_with(folder));
                files.folders.retain(|path| !path.starts_with(folder));
                Ok(())
            },
        )
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    path: PathBuf,
}

impl AppendFile for SimFile {
    fn read(&mut self) -> io::Result<Vec<u8>> {
        self.disk.read(&self.path)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let half = |world: &mut World| {
            if let Ok(file) = world.files.file(&self.path) {
                file.bytes.extend_from_slice(&bytes[..bytes.len() / 2]);
            }
        };
        self.disk.operate("disk.append", half, |files| {
            files.room(&self.path)?;
            files.file(&self.path)?.bytes.extend_from_slice(bytes);
            Ok(())
        })
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        self.disk.operate(
            "disk.cut",
            |_| {},
            |files| {
                files.file(&self.path)?.bytes.truncate(length as usize);
                Ok(())
            },
        )
    }

    fn sync(&mut self) -> io::Result<()> {
        self.disk.operate(
            "disk.sync",
            |_| {},
            |files| {
                let file = files.file(&self.path)?;
                file.synced = file.bytes.len();
                Ok(())
            },
        )
    }
}

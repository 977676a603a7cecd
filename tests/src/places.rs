//! Where the lab keeps things, and its locks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

/// The workspace this binary was built from.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// Cache of images: `$XDG_CACHE_HOME/ovs-graceful-lab` where that variable is set, else `target/lab`.
pub fn cache() -> Result<PathBuf> {
    let folder = match std::env::var_os("XDG_CACHE_HOME") {
        Some(base) if !base.is_empty() => PathBuf::from(base).join("ovs-graceful-lab"),
        _ => workspace().join("target/lab"),
    };
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// Keeps VMs of other processes from running beside ours, which would spoil what they measure.
#[derive(Debug)]
pub struct VmLock {
    _held: Flock<File>,
}

/// Takes that lock: `$LAB_LOCK`, else `vm.lock` in the cache.
pub fn vm_lock() -> Result<VmLock> {
    let path = match std::env::var_os("LAB_LOCK") {
        Some(path) => PathBuf::from(path),
        None => cache()?.join("vm.lock"),
    };
    Ok(VmLock { _held: lock(&path, "another VM of the lab runs")? })
}

/// Takes an exclusive lock on `path`, saying `why` when it has to wait.
pub fn lock(path: &Path, why: &str) -> Result<Flock<File>> {
    let file = File::options().create(true).append(true).open(path);
    let file = file.with_context(|| format!("cannot open the lock {}", path.display()))?;
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => return Ok(held),
        Err((file, _)) => file,
    };
    eprintln!("lab: {why}, waiting for {}", path.display());
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| anyhow::anyhow!("cannot lock {}: {e}", path.display()))
}

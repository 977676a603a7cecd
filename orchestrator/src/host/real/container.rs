//! The container that the daemons run in, where they do: its files, held so that they stay reachable when it has ended.
//!
//! A container here is what namespaces(7) and chroot(2) make: another root directory, which belongs to a mount
//! namespace. Its pid namespace ends with its first process and cannot be entered any more then.

use std::env;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use nix::sched::{setns, CloneFlags};
use nix::unistd::{chdir, chroot, fchdir};

/// The root directory of a process and the mount namespace that it belongs to.
#[derive(Debug)]
pub struct Root {
    root: OwnedFd,
    mounts: OwnedFd,
}

/// Where the programs of Open vSwitch are taken from that this host does not have.
static TOOLS: RwLock<Option<Arc<Root>>> = RwLock::new(None);

impl Root {
    /// That of process `pid`. As long as it is held the file systems in it stay mounted.
    pub fn of(pid: i32) -> io::Result<Root> {
        let mut place = OpenOptions::new();
        place.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY);
        let root = place.open(format!("/proc/{pid}/root"))?.into();
        let mounts = File::open(format!("/proc/{pid}/ns/mnt"))?.into();
        Ok(Root { root, mounts })
    }

    /// Makes it the root directory of this process, for good. To be called between fork and exec: system calls only.
    pub fn enter(&self) -> io::Result<()> {
        setns(self.mounts.as_fd(), CloneFlags::CLONE_NEWNS)?;
        fchdir(&self.root)?;
        chroot(c".")?;
        chdir(c"/")?;
        Ok(())
    }
}

/// From now on programs that this host does not have are looked for in `root`.
pub fn take_tools_from(root: Arc<Root>) {
    *TOOLS.write().unwrap_or_else(PoisonError::into_inner) = Some(root);
}

/// Where to run `program`: `None` is here, where a bare name is found on our own search path, and a path always.
pub fn of_program(program: &str) -> Option<Arc<Root>> {
    if program.contains('/') || is_here(program) {
        return None;
    }
    TOOLS.read().unwrap_or_else(PoisonError::into_inner).clone()
}

fn is_here(program: &str) -> bool {
    let search_path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&search_path).any(|folder| Path::new(&folder).join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_host_has_is_run_here() {
        assert!(is_here("sh") && !is_here("no-such-program-of-ours"));
        assert!(of_program("sh").is_none() && of_program("/nonexistent/x").is_none());
        let root = Root::of(std::process::id() as i32).unwrap();
        assert!(Root::of(0).is_err());
        take_tools_from(Arc::new(root));
        assert!(of_program("no-such-program-of-ours").is_some() && of_program("sh").is_none());
    }
}

//! The container that the daemons run in, where they do: its files, held so that they stay reachable when it has ended.
//!
//! A container here is what namespaces(7) and chroot(2) make: another root directory, which belongs to a mount
//! namespace. Its pid namespace ends with its first process and cannot be entered any more then.

use std::env;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use nix::sched::{setns, CloneFlags};
use nix::unistd::{chdir, chroot, fchdir};

use super::trusted;

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

    /// The directory itself, opened with O_PATH.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// Where programs are looked for, after our own search path, in this order: that of systemd's services, which is what
/// `ovs-ctl` finds the daemons by.
pub const PROGRAM_DIRECTORIES: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// From now on programs that this host does not have are looked for in `root`, that of a daemon which the kernel has
/// named.
pub fn take_tools_from(root: Arc<Root>) {
    *TOOLS.write().unwrap_or_else(PoisonError::into_inner) = Some(root);
}

/// Where `program` is, and in which root directory; `None` is here. A bare name is looked for here and then in the
/// daemons' container: what others than root can have put there is passed over. A path is as it is.
pub fn of_program(program: &str) -> io::Result<(PathBuf, Option<Arc<Root>>)> {
    if program.contains('/') {
        return Ok((program.into(), None));
    }
    let own = env::var_os("PATH").unwrap_or_default();
    let own = env::split_paths(&own).filter(|folder| folder.is_absolute()).collect::<Vec<_>>();
    let here = search(own.into_iter().chain(directories()), program, trusted::program);
    let tools = || TOOLS.read().unwrap_or_else(PoisonError::into_inner).clone();
    match (here, tools()) {
        (Ok(path), _) => Ok((path, None)),
        (Err(_), Some(root)) => {
            let path = search(directories(), program, |path| trusted::program_below(root.descriptor(), path))?;
            Ok((path, Some(root)))
        }
        (Err(error), None) => Err(error),
    }
}

/// [`PROGRAM_DIRECTORIES`].
pub fn directories() -> impl Iterator<Item = PathBuf> {
    PROGRAM_DIRECTORIES.split(':').map(PathBuf::from)
}

/// The first program of a name that `look` takes; else why one that is there was not taken.
pub fn search(
    folders: impl Iterator<Item = PathBuf>,
    name: &str,
    look: impl Fn(&Path) -> io::Result<PathBuf>,
) -> io::Result<PathBuf> {
    let mut why = io::Error::new(io::ErrorKind::NotFound, "it is not installed");
    for folder in folders {
        match look(&folder.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => why = error,
            found => return found,
        }
    }
    Err(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_host_has_is_run_here() {
        let sh = std::fs::canonicalize("/bin/sh").unwrap();
        let (path, root) = of_program("sh").unwrap();
        assert!(path == sh && root.is_none());
        assert!(of_program("no-such-program-of-ours").unwrap_err().to_string().contains("not installed"));
        assert!(of_program("/nonexistent/x")
            .is_ok_and(|(path, root)| path == Path::new("/nonexistent/x") && root.is_none()));
        let root = Root::of(std::process::id() as i32).unwrap();
        assert!(Root::of(0).is_err());
        let inside = search(directories(), "sh", |path| trusted::program_below(root.descriptor(), path));
        assert_eq!(inside.unwrap(), sh);
    }

    #[test]
    fn what_others_may_have_put_there_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("sh");
        std::fs::copy("/bin/sh", &program).unwrap();
        let found = search([folder.path().to_owned()].into_iter().chain(directories()), "sh", trusted::program);
        assert_eq!(found.unwrap(), std::fs::canonicalize("/bin/sh").unwrap());
        let only = search([folder.path().to_owned()].into_iter(), "sh", trusted::program).unwrap_err().to_string();
        assert!(only.contains("others than root"), "{only}");
    }
}

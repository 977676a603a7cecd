//! As whom a program runs that we start for a daemon: never as more than that daemon is.

use std::io;

use super::{procfs, trusted};
use crate::host::Daemon;

/// capset(2), `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Users and groups to become between fork and exec.
#[derive(Debug)]
pub(super) struct Credentials {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    capabilities: u64,
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapabilityWord {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

impl Credentials {
    /// Those of `daemon` without a supplementary group and without a capability: for a question.
    pub fn of_question(daemon: &Daemon) -> Self {
        Credentials { uid: daemon.uid, gid: daemon.gid, groups: Vec::new(), capabilities: 0 }
    }

    /// Those that `daemon` has, where they are not root's: for another daemon in its place.
    pub fn of_daemon(daemon: &Daemon) -> Self {
        // More than we have ourselves cannot be given.
        let own = procfs::capabilities(std::process::id().cast_signed()).unwrap_or_default();
        Credentials {
            uid: daemon.uid,
            gid: daemon.gid,
            groups: daemon.groups.clone(),
            capabilities: daemon.capabilities & own,
        }
    }

    /// Makes them this process's, for good, and nothing it runs later can have more (no_new_privs). To be called between
    /// fork and exec: system calls only. Whoever is not root keeps his own.
    pub fn take_on(&self) -> io::Result<()> {
        // SAFETY: each call takes integers and pointers to values that live through it.
        unsafe {
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            if libc::geteuid() != 0 {
                return Ok(());
            }
            check(libc::setgroups(self.groups.len(), self.groups.as_ptr()))?;
            check(libc::setresgid(self.gid, self.gid, self.gid))?;
            if trusted::is_ours(self.uid) {
                return Ok(());
            }
            check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0))?;
            check(libc::setresuid(self.uid, self.uid, self.uid))?;
        }
        self.set_capabilities()
    }

    /// An ambient one stays when another program is executed (capabilities(7)).
    fn set_capabilities(&self) -> io::Result<()> {
        let header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
        let word = |bits: u32| CapabilityWord { effective: bits, permitted: bits, inheritable: bits };
        let words = [word(self.capabilities as u32), word((self.capabilities >> 32) as u32)];
        // SAFETY: as above; the kernel reads both structures and writes to neither.
        unsafe {
            if libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) < 0 {
                return Err(io::Error::last_os_error());
            }
            for bit in (0..64u64).filter(|bit| self.capabilities & (1 << bit) != 0) {
                check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, bit, 0, 0))?;
            }
        }
        Ok(())
    }
}

fn check(result: i32) -> io::Result<()> {
    match result < 0 {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

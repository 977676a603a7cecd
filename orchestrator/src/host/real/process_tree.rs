//! The end of a process with all that it has started, sessions of their own or not.

use std::io;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::daemons::{pidfd_open, pidfd_send_signal};
use super::procfs;
use crate::host::ProcessId;

/// Kills `root` and all that it has started, and those in turn; returns who that was. The caller knows that `root` is who
/// he means.
pub fn end(root: ProcessId, until: Instant) -> io::Result<Vec<ProcessId>> {
    let tree = stop(root, until)?;
    // Children first: as long as its parent is stopped the number of one that has ended is nobody else's.
    tree.iter().rev().for_each(|id| signal(*id, Signal::SIGKILL));
    Ok(tree)
}

/// To this very process, never to a later one with its number. One that has ended needs none.
fn signal(id: ProcessId, signal: Signal) {
    let Ok(process) = pidfd_open(id.pid) else { return };
    if procfs::identity(id.pid).is_ok_and(|now| now == id) {
        let _has_ended = pidfd_send_signal(&process, signal as i32);
    }
}

/// Stops (SIGSTOP) each before its children are looked for: none can start another. Those that do not stop until `until`
/// are in the list as well.
fn stop(root: ProcessId, until: Instant) -> io::Result<Vec<ProcessId>> {
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(id) = tree.get(next).copied() {
        signal(id, Signal::SIGSTOP);
        let runs = || procfs::stat(id.pid).is_ok_and(|stat| !matches!(stat.state, 'T' | 'Z'));
        while runs() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        tree.extend(procfs::children(id.pid)?);
        next += 1;
    }
    Ok(tree)
}

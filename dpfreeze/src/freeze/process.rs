//! Processes, known by thread group id and start time, and what is provably theirs.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use nix::time::{clock_gettime, ClockId};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::netlink::table::{self, NetlinkSocketRow};
use crate::netlink::Protocol;

/// `PROC_PID_INIT_INO`, linux/proc_ns.h
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// A process that no reuse of its number can be taken for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Thread group id, in the initial pid namespace.
    pub tgid: u32,
    /// Field `starttime` of `/proc/PID/stat`: clock ticks (1/100 s) since boot.
    pub start_time: u64,
}

impl ProcessId {
    /// The calling process.
    pub fn current() -> Result<ProcessId> {
        let pid = Pid::this();
        Ok(ProcessId { tgid: std::process::id(), start_time: start_time(pid)? })
    }

    /// Does this very process still run?
    pub fn alive(&self) -> bool {
        i32::try_from(self.tgid)
            .ok()
            .filter(|pid| *pid > 0)
            .and_then(|pid| start_time(Pid::from_raw(pid)).ok())
            .is_some_and(|start| start == self.start_time)
    }
}

/// When a process was started: field `starttime` of `/proc/PID/stat`, clock ticks since boot.
pub fn start_time(pid: Pid) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).map_err(|error| Error::io(&path, error))?;
    parse_start_time(&stat).ok_or_else(|| Error::malformed(path, "has no field starttime"))
}

/// Field 22; the second field, the command, may hold spaces and brackets, so count from the last bracket.
fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// Time since boot, suspended time included, as `bpf_ktime_get_boot_ns()` has it.
pub fn boottime() -> Result<Duration> {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).map_err(|errno| Error::io("CLOCK_BOOTTIME", errno))
}

/// The program compares thread group ids of the initial namespace; ours would be another number elsewhere.
pub fn require_initial_pid_namespace() -> Result<()> {
    let path = "/proc/self/ns/pid";
    let inode = fs::metadata(path).map_err(|error| Error::io(path, error))?.ino();
    if inode == INITIAL_PID_NAMESPACE {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: "freeze".into(),
        why: "this process is in a pid namespace of its own, and the kernel would not know it for the exempt one"
            .into(),
        remedy: "run on the host itself, or in a container with the host's pid namespace".into(),
    })
}

/// Proves that each port id is bound by a socket that `process` holds open, or says which is not.
pub fn prove_port_ids(process: ProcessId, port_ids: &[u32]) -> Result<()> {
    let unproved = |why: String| Error::Unsupported {
        what: format!("upcall binding captured from process {}", process.tgid),
        why,
        remedy: "the binding is not used; go back to the old daemon".into(),
    };
    let sockets = socket_inodes(process.tgid)?;
    let inodes = generic_sockets(&table::read()?);
    for port_id in port_ids {
        match inodes.get(port_id) {
            None => return Err(unproved(format!("no socket is bound to port id {port_id}"))),
            Some(inode) if !sockets.contains(inode) => {
                return Err(unproved(format!("port id {port_id} belongs to another process")));
            }
            Some(_) => {}
        }
    }
    // After the look at its files: they were those of this process and not of one that took its number.
    if !process.alive() {
        return Err(unproved("that process has ended".into()));
    }
    Ok(())
}

/// Inodes of the sockets among the open files of a process.
fn socket_inodes(tgid: u32) -> Result<HashSet<u64>> {
    let dir = format!("/proc/{tgid}/fd");
    let mut inodes = HashSet::new();
    for entry in fs::read_dir(&dir).map_err(|error| Error::io(&dir, error))? {
        let entry = entry.map_err(|error| Error::io(&dir, error))?;
        match fs::read_link(entry.path()) {
            Ok(target) => inodes.extend(socket_inode(&target.to_string_lossy())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // closed meanwhile
            Err(error) => return Err(Error::io(entry.path().display().to_string(), error)),
        }
    }
    Ok(inodes)
}

fn socket_inode(target: &str) -> Option<u64> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Port id → inode of the generic netlink sockets. The same port id can be bound once per protocol, so protocols must
/// not be mixed.
fn generic_sockets(table: &[NetlinkSocketRow]) -> HashMap<u32, u64> {
    let generic = table.iter().filter(|row| row.protocol == Protocol::Generic as u32);
    generic.map(|row| (row.port_id, row.inode)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_counted_from_the_last_bracket() {
        let stat = "42 (a) (b) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 123 456";
        assert_eq!(parse_start_time(stat), Some(987_654));
        assert_eq!(parse_start_time("42 (x) S 1"), None);
        assert!(start_time(Pid::this()).unwrap() > 0);
    }

    #[test]
    fn only_generic_sockets_count() {
        let row = |protocol, port_id, inode| NetlinkSocketRow { protocol, port_id, rmem: 0, drops: 0, inode };
        let table = [row(0, 700, 11), row(16, 700, 22), row(16, 3_456_789_012, 33)];
        let sockets = generic_sockets(&table);
        assert_eq!(sockets, HashMap::from([(700, 22), (3_456_789_012, 33)]));
    }

    #[test]
    fn a_dead_process_is_not_alive() {
        let mut own = ProcessId::current().unwrap();
        assert!(own.alive());
        own.start_time += 1;
        assert!(!own.alive());
        assert!(!ProcessId::default().alive());
    }

    #[test]
    fn socket_links() {
        assert_eq!(socket_inode("socket:[123]"), Some(123));
        assert_eq!(socket_inode("pipe:[123]"), None);
    }
}

//! What `/proc` tells about a process (`Documentation/filesystems/proc.rst`).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, Context};

use crate::host::{Limit, ProcessId};

/// `/proc/PID/NAME`.
fn path(pid: i32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

/// Every process there is now.
pub fn pids() -> io::Result<Vec<i32>> {
    let entries = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(entries.collect())
}

/// What we need of `/proc/PID/stat`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// The name, at most 15 bytes.
    pub comm: String,
    /// R, S, D, T, Z and so on.
    pub state: char,
    /// The parent.
    pub parent: i32,
    /// The nice value.
    pub nice: i32,
    /// Clock ticks after boot.
    pub start_time: u64,
}

/// Reads `/proc/PID/stat`.
pub fn stat(pid: i32) -> io::Result<Stat> {
    parse_stat(&String::from_utf8_lossy(&fs::read(path(pid, "stat"))?))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat: malformed")))
}

/// The name may hold spaces and parentheses: the fields begin after the last one.
fn parse_stat(text: &str) -> Option<Stat> {
    let (head, tail) = text.rsplit_once(')')?;
    let fields: Vec<&str> = tail.split_whitespace().collect();
    Some(Stat {
        comm: head.split_once('(')?.1.to_owned(),
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        nice: fields.get(16)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
    })
}

/// The identity of process `pid` as of now.
pub fn identity(pid: i32) -> io::Result<ProcessId> {
    Ok(ProcessId { pid, start_time: stat(pid)?.start_time })
}

/// The processes that `pid` has started and that live.
pub fn children(pid: i32) -> io::Result<Vec<ProcessId>> {
    let child = |child: i32| {
        let stat = stat(child).ok().filter(|stat| stat.parent == pid && stat.state != 'Z')?;
        Some(ProcessId { pid: child, start_time: stat.start_time })
    };
    Ok(pids()?.into_iter().filter_map(child).collect())
}

/// The executable; the kernel marks one that was replaced or removed.
pub fn exe(pid: i32) -> io::Result<(PathBuf, bool)> {
    let link = fs::read_link(path(pid, "exe"))?;
    match link.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(name) => Ok((PathBuf::from(std::ffi::OsStr::from_bytes(name)), true)),
        None => Ok((link, false)),
    }
}

/// Our own program, for those who are to start it: the path it was started from, even where it was replaced there.
///
/// # Errors
/// The path is not UTF-8, so that no unit and no hook could name it.
pub fn own_program() -> anyhow::Result<String> {
    let (program, _) = exe(std::process::id().cast_signed()).context("cannot find our own program")?;
    program.into_os_string().into_string().map_err(|path| anyhow!("our own program's path {path:?} is not UTF-8"))
}

/// The working directory.
pub fn cwd(pid: i32) -> io::Result<PathBuf> {
    fs::read_link(path(pid, "cwd"))
}

/// The words of `cmdline` or `environ`, which NUL bytes end.
pub fn words(pid: i32, name: &str) -> io::Result<Vec<String>> {
    let bytes = fs::read(path(pid, name))?;
    let words = bytes.strip_suffix(b"\0").unwrap_or(&bytes).split(|b| *b == 0);
    Ok(words.map(|w| String::from_utf8_lossy(w).into_owned()).collect())
}

/// A file of one number.
pub fn number(pid: i32, name: &str) -> io::Result<i32> {
    let text = fs::read_to_string(path(pid, name))?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/{name}: {text:?}")))
}

/// The effective user and group of `/proc/PID/status`.
pub fn owner(pid: i32) -> io::Result<(u32, u32)> {
    let text = fs::read_to_string(path(pid, "status"))?;
    let effective = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok())
    };
    effective("Uid:").zip(effective("Gid:")).ok_or_else(|| io::Error::other(format!("/proc/{pid}/status: malformed")))
}

/// The process id in the innermost pid namespace of process `pid`: the last number of `NSpid` (Linux 4.1).
pub fn own_pid(pid: i32) -> io::Result<i32> {
    Ok(parse_own_pid(&fs::read_to_string(path(pid, "status"))?).unwrap_or(pid))
}

fn parse_own_pid(status: &str) -> Option<i32> {
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?.parse().ok()
}

/// Is its root directory or its pid namespace another one than ours? The mount namespace alone says nothing: systemd
/// gives many a unit one of its own, on the same root.
pub fn is_contained(pid: i32) -> io::Result<bool> {
    let root = |path: PathBuf| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let other_root = root(path(pid, "root/."))? != root("/".into())?;
    Ok(other_root || !shares(pid, "pid")?)
}

/// Is it in our namespace of this kind (namespaces(7))?
pub fn shares(pid: i32, namespace: &str) -> io::Result<bool> {
    let ours = fs::read_link(format!("/proc/self/ns/{namespace}"))?;
    Ok(fs::read_link(path(pid, &format!("ns/{namespace}")))? == ours)
}

/// The file mode creation mask of `/proc/PID/status` (Linux 4.7), else the usual one.
pub fn umask(pid: i32) -> io::Result<u32> {
    let text = fs::read_to_string(path(pid, "status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Umask:"));
    Ok(line.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(0o022))
}

/// The cgroup: the unified hierarchy's, else systemd's own.
pub fn cgroup(pid: i32) -> io::Result<String> {
    Ok(parse_cgroup(&fs::read_to_string(path(pid, "cgroup"))?).unwrap_or_default())
}

fn parse_cgroup(text: &str) -> Option<String> {
    let of = |prefix: &str| text.lines().find_map(|line| line.strip_prefix(prefix)).filter(|path| !path.is_empty());
    let named = text.lines().find_map(|line| line.split_once(":name=systemd:").map(|(_, path)| path));
    named.or_else(|| of("0::")).map(str::to_owned)
}

/// The limits of `/proc/PID/limits`.
pub fn limits(pid: i32) -> io::Result<Vec<Limit>> {
    Ok(parse_limits(&fs::read_to_string(path(pid, "limits"))?))
}

/// The columns are 26, 21 and 21 characters wide (`proc_pid_limits` in `fs/proc/base.c`).
fn parse_limits(text: &str) -> Vec<Limit> {
    let column = |line: &str, from: usize, to: usize| line.get(from..to.min(line.len())).map(|s| s.trim().to_owned());
    let value = |text: &str| match text {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    };
    let parse = |line: &str| {
        Some(Limit {
            name: column(line, 0, 26)?,
            soft: value(&column(line, 26, 47)?)?,
            hard: value(&column(line, 47, 68)?)?,
        })
    };
    text.lines().skip(1).filter_map(parse).collect()
}

/// The inodes of the sockets that process `pid` has open.
pub fn socket_inodes(pid: i32) -> io::Result<BTreeSet<u64>> {
    let inode = |link: PathBuf| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok();
    let links = fs::read_dir(path(pid, "fd"))?.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    Ok(links.filter_map(inode).collect())
}

/// Is `pid` a process of the program `name`? Kernel threads and other users' processes are not.
pub fn runs(pid: i32, name: &str) -> bool {
    exe(pid).is_ok_and(|(exe, _)| exe.file_name() == Path::new(name).file_name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_process_is_found_again() {
        let pid = std::process::id() as i32;
        let id = identity(pid).unwrap();
        assert_eq!(identity(pid).unwrap(), id);
        assert!(pids().unwrap().contains(&pid));
        assert_eq!(exe(pid).unwrap(), (std::env::current_exe().unwrap(), false));
        assert_eq!(Path::new(&own_program().unwrap()), std::env::current_exe().unwrap());
        assert_eq!(words(pid, "cmdline").unwrap(), std::env::args().collect::<Vec<_>>());
        assert!(limits(pid).unwrap().iter().any(|l| l.name == "Max open files" && l.soft.is_some()));
        assert!(runs(pid, exe(pid).unwrap().0.file_name().unwrap().to_str().unwrap()));
    }

    #[test]
    fn a_process_in_a_container_has_two_numbers() {
        let pid = std::process::id() as i32;
        assert_eq!((own_pid(pid).unwrap(), is_contained(pid).unwrap()), (pid, false));
        assert!(shares(pid, "user").unwrap() && shares(pid, "none").is_err());
        assert_eq!(parse_own_pid("Name:\tx\nNSpid:\t4711\t7\nNSpgid:\t4711\t7\n"), Some(7));
        assert_eq!(parse_own_pid("Name:\tx\n"), None);
    }

    #[test]
    fn a_name_may_hold_what_separates_fields() {
        let text = "355 (a) (b c) S 1 355 355 0 -1 4194624 1 2 3 4 5 6 7 8 20 -10 1 0 872 160 39 184";
        let stat = parse_stat(text).unwrap();
        assert_eq!((stat.comm.as_str(), stat.state, stat.parent), ("a) (b c", 'S', 1));
        assert_eq!((stat.nice, stat.start_time), (-10, 872));
        assert!(parse_stat("355 (x").is_none());
    }

    #[test]
    fn limits_have_fixed_columns() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max core file size        34359738368          unlimited            bytes     \n\
                    Max nice priority         0                    0                    \n";
        let limits = parse_limits(text);
        assert_eq!(limits[0], Limit { name: "Max core file size".into(), soft: Some(34359738368), hard: None });
        assert_eq!(limits[1], Limit { name: "Max nice priority".into(), soft: Some(0), hard: Some(0) });
    }

    #[test]
    fn cgroups_of_both_hierarchies() {
        assert_eq!(parse_cgroup("0::/system.slice/x.service\n").as_deref(), Some("/system.slice/x.service"));
        assert_eq!(parse_cgroup("3:cpu:/\n1:name=systemd:/y\n0::/\n").as_deref(), Some("/y"));
    }
}

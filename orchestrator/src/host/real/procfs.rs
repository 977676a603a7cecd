//! What `/proc` tells about a process (`Documentation/filesystems/proc.rst`).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, Context};

use super::trusted;
use crate::host::{Limit, ProcessId};

/// As much of a command line, of an environment or of another text is read, bytes: the kernel takes a quarter of the
/// stack's limit for the first two together, usually 2 MiB (`bprm_stack_limits` in fs/exec.c).
const TEXT_MAX: u64 = 8 << 20;

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

/// When a process was started, seconds since 1970 (proc(5): `btime` of /proc/stat, and its clock ticks after that).
pub fn started(id: ProcessId) -> io::Result<i64> {
    let text = fs::read_to_string("/proc/stat")?;
    let boot = text.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<i64>().ok());
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100).max(1);
    let after = i64::try_from(id.start_time).ok().map(|start| start / ticks);
    boot.zip(after).map(|(boot, after)| boot + after).ok_or_else(|| io::Error::other("/proc/stat: malformed"))
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

/// A file of a process, which decides itself how long some of them are.
fn bytes(pid: i32, name: &str) -> io::Result<Vec<u8>> {
    trusted::read(File::open(path(pid, name))?, TEXT_MAX)
}

fn text(pid: i32, name: &str) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&bytes(pid, name)?).into_owned())
}

/// The words of `cmdline` or `environ`, which NUL bytes end.
pub fn words(pid: i32, name: &str) -> io::Result<Vec<String>> {
    let bytes = bytes(pid, name)?;
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
    let text = text(pid, "status")?;
    let effective = |key: &str| numbers_of(&text, key, 10).and_then(|all| u32::try_from(*all.get(1)?).ok());
    effective("Uid:").zip(effective("Gid:")).ok_or_else(|| io::Error::other(format!("/proc/{pid}/status: malformed")))
}

/// All users of `/proc/PID/status`: the real, the effective, the saved one and that of file systems.
pub fn users(pid: i32) -> io::Result<Vec<u32>> {
    users_or_groups(pid, "Uid:")
}

/// The supplementary groups of `/proc/PID/status`.
pub fn groups(pid: i32) -> io::Result<Vec<u32>> {
    users_or_groups(pid, "Groups:")
}

fn users_or_groups(pid: i32, key: &str) -> io::Result<Vec<u32>> {
    let malformed = || io::Error::other(format!("/proc/{pid}/status: malformed"));
    let all = numbers_of(&text(pid, "status")?, key, 10).ok_or_else(malformed)?;
    all.into_iter().map(|number| u32::try_from(number).map_err(|_| malformed())).collect()
}

/// The effective capabilities of `/proc/PID/status`, by the number of their bit (include/uapi/linux/capability.h).
pub fn capabilities(pid: i32) -> io::Result<u64> {
    let all = numbers_of(&text(pid, "status")?, "CapEff:", 16);
    all.and_then(|all| all.first().copied()).ok_or_else(|| io::Error::other(format!("/proc/{pid}/status: malformed")))
}

/// The numbers behind a key of `/proc/PID/status`; `None` where it is not there or something else is among them.
fn numbers_of(status: &str, key: &str, radix: u32) -> Option<Vec<u64>> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().map(|word| u64::from_str_radix(word, radix).ok()).collect()
}

/// The process id in the innermost pid namespace of process `pid`: the last number of `NSpid` (Linux 4.1).
pub fn own_pid(pid: i32) -> io::Result<i32> {
    Ok(parse_own_pid(&text(pid, "status")?).unwrap_or(pid))
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
    let text = text(pid, "status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Umask:"));
    Ok(line.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(0o022))
}

/// The cgroup: the unified hierarchy's, else systemd's own.
pub fn cgroup(pid: i32) -> io::Result<String> {
    Ok(parse_cgroup(&text(pid, "cgroup")?).unwrap_or_default())
}

/// Number, controllers and path, between colons (cgroups(7)). Whoever makes a cgroup names it, colons and all.
fn parse_cgroup(text: &str) -> Option<String> {
    let path = |wanted: &dyn Fn(&str, &str) -> bool| {
        text.lines().find_map(|line| {
            let (number, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            (wanted(number, controllers) && !path.is_empty()).then(|| path.to_owned())
        })
    };
    path(&|_, controllers| controllers == "name=systemd")
        .or_else(|| path(&|number, controllers| number == "0" && controllers.is_empty()))
}

/// The limits of `/proc/PID/limits`.
pub fn limits(pid: i32) -> io::Result<Vec<Limit>> {
    Ok(parse_limits(&text(pid, "limits")?))
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

/// The inodes of the sockets that listen at `path`, in the network namespace of process `pid` (`unix_seq_show`,
/// net/unix/af_unix.c). A socket may have this name and lie elsewhere: it says nothing about whose it is.
pub fn listening(pid: i32, path: &Path) -> io::Result<BTreeSet<u64>> {
    let sockets = fs::read_to_string(self::path(pid, "net/unix"))?;
    Ok(sockets.lines().filter_map(|line| listens_at(line, path)).collect())
}

/// `Num RefCount Protocol Flags Type St Inode Path`; a path may have spaces.
fn listens_at(line: &str, path: &Path) -> Option<u64> {
    /// `__SO_ACCEPTCON` of linux/net.h.
    const ACCEPTS: u32 = 1 << 16;
    let mut rest = line;
    let mut word = || {
        let (word, after) = rest.trim_start().split_once(' ')?;
        rest = after;
        Some(word)
    };
    let (flags, inode) =
        (word().and(word()).and(word()).and_then(|_| word())?, word().and(word()).and_then(|_| word())?);
    let accepts = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & ACCEPTS != 0);
    (accepts && is_same(Path::new(rest), path)).then(|| inode.parse().ok())?
}

/// Do both names stand for the same place? Open vSwitch says `/var/run` to what systemd calls `/run`.
fn is_same(one: &Path, other: &Path) -> bool {
    let folder = |path: &Path| fs::canonicalize(path.parent()?).ok();
    one == other || one.file_name() == other.file_name() && folder(one).is_some() && folder(one) == folder(other)
}

/// The number of the mount that descriptor `name` of process `pid` was reached by (`/proc/PID/fdinfo`, proc(5)).
pub fn mount_of(pid: i32, name: &OsStr) -> io::Result<u64> {
    let text = fs::read_to_string(path(pid, "fdinfo").join(name))?;
    let number = text.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    number.ok_or_else(|| io::Error::other("the kernel does not tell its mount"))
}

/// Has process `pid` the file at `path` open?
pub fn has_open(pid: i32, path: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
    let Ok(wanted) = file(path) else { return false };
    let open = fs::read_dir(self::path(pid, "fd")).into_iter().flatten().flatten();
    open.filter_map(|entry| file(&entry.path()).ok()).any(|theirs| theirs == wanted)
}

/// Is `pid` a process of a program of the name `name`? Kernel threads are not. It says nothing about whose it is.
pub fn runs(pid: i32, name: &str) -> bool {
    exe(pid).is_ok_and(|(exe, _)| exe.file_name() == Path::new(name).file_name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_listens_is_found_by_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db with spaces.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let own = std::process::id().cast_signed();
        let inodes = listening(own, &path).unwrap();
        assert_eq!(inodes.len(), 1);
        assert!(inodes.is_subset(&socket_inodes(own).unwrap()));
        let alias = folder.path().join("alias");
        std::os::unix::fs::symlink(folder.path(), &alias).unwrap();
        assert_eq!(listening(own, &alias.join("db with spaces.sock")).unwrap(), inodes);
        assert!(listening(own, &folder.path().join("nowhere/db with spaces.sock")).unwrap().is_empty());
        // One that has connected has the name, too, and does not listen.
        let client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let served = listener.accept().unwrap();
        assert_eq!(listening(own, &path).unwrap(), inodes);
        drop((listener, client, served));
        assert!(listening(own, &path).unwrap().is_empty());
        assert_eq!(listens_at("Num       RefCount Protocol Flags    Type St Inode Path", Path::new("Path")), None);
    }

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
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(has_open(pid, file.path()) && !has_open(pid, Path::new("/etc/hostname")));
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
    fn who_a_process_is_is_read_from_its_status() {
        let pid = std::process::id() as i32;
        let (own, group) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        assert_eq!((owner(pid).unwrap(), users(pid).unwrap()), ((own, group), vec![own; 4]));
        assert!(groups(pid).is_ok() && capabilities(pid).is_ok());
        let status = "Uid:\t0\t992\t0\t992\nGroups:\t \nCapEff:\t0000000000003000\n";
        assert_eq!(numbers_of(status, "Uid:", 10), Some(vec![0, 992, 0, 992]));
        assert_eq!(numbers_of(status, "Groups:", 10), Some(vec![]));
        assert_eq!(numbers_of(status, "CapEff:", 16), Some(vec![0x3000]));
        assert_eq!((numbers_of("Uid:\t0\tx\n", "Uid:", 10), numbers_of(status, "Gid:", 10)), (None, None));
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
        let own = "/user.slice/x:name=systemd:/system.slice/ovs-vswitchd.service";
        assert_eq!(parse_cgroup(&format!("0::{own}\n")).as_deref(), Some(own), "a name that a user has chosen");
    }
}

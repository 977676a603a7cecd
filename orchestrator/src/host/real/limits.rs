//! What a run needs of limits that others set: descriptors of the supervisor; memory and tasks of the cgroup that both
//! daemons live in until the old one has ended.

use std::fs;
use std::path::{Path, PathBuf};

use dpfreeze::park::possible_cpus;
use nix::sys::resource::{getrlimit, setrlimit, Resource};

use crate::host::surroundings::CheckOptions;
use crate::host::Daemon;
use crate::report::{Finding, Findings, Name, Severity};

/// As many descriptors the supervisor asks for. systemd's own default for the hard limit.
pub const MOST_DESCRIPTORS: u64 = 524_288;
/// The most that any process may be allowed (Documentation/admin-guide/sysctl/fs.rst).
const NR_OPEN: &str = "/proc/sys/fs/nr_open";
/// What a run has open beside the upcall sockets and what it has for each bridge: BPF maps, netlink sockets of the replay's
/// threads, D-Bus, pipes of programs under way, files.
const OTHER_DESCRIPTORS: u64 = 256;
/// Where cgroups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";
/// What the commands of a unit's start take beside the daemon, bytes: a few shells.
const START_BYTES: u64 = 16 << 20;
/// The same in tasks.
const START_TASKS: u64 = 16;
/// cgroup v1 has no word for "no limit" but a number next to 2^63.
const UNLIMITED: u64 = 1 << 60;

/// Raises this process's limit of descriptors as far as it may be, and returns how many it may have then.
pub fn raise_descriptors() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 0 };
    // A process may have a higher limit from before fs.nr_open was lowered, and gets no more all the same.
    let most = number_in(Path::new(NR_OPEN)).unwrap_or(u64::MAX);
    // CAP_SYS_RESOURCE lets a process go beyond its hard limit.
    let raised = [MOST_DESCRIPTORS.min(most).max(hard), hard].into_iter().find(|to| {
        let to = *to;
        setrlimit(Resource::RLIMIT_NOFILE, to, to).is_ok()
    });
    raised.unwrap_or(soft).min(most)
}

/// What a run on this host takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Size {
    /// CPUs that the kernel may ever have.
    cpus: u64,
    /// Upcall sockets of the running daemon: one for each of its CPUs, or one for each port.
    sockets: u64,
    /// Bridges.
    bridges: u64,
}

impl Size {
    /// A socket of our own for each CPU. Duplicates of the daemons' sockets: the old one's, the new one's, and where the run
    /// goes back those of the one that is started then. For each bridge a pipe and a connection.
    fn descriptors(self) -> u64 {
        self.cpus + 3 * self.sockets + 2 * self.bridges + OTHER_DESCRIPTORS
    }
}

/// Whether the limits of this process, of the daemon's cgroup and of the host leave room for a run.
pub(super) fn look(daemon: &Daemon, options: &CheckOptions, found: &mut Findings) {
    let cpus = possible_cpus().unwrap_or_default() as u64;
    let size = Size { cpus, sockets: options.upcall_sockets as u64, bridges: options.bridges as u64 };
    descriptors(size, raise_descriptors(), number_in(Path::new(NR_OPEN)), found);
    if options.beside {
        second_daemon(daemon, found);
    }
}

/// `limit` is what this process may have, `nr_open` the bound of that.
fn descriptors(size: Size, limit: u64, nr_open: Option<u64>, found: &mut Findings) {
    let needed = size.descriptors();
    let what = format!(
        "{needed} (one for each of {} possible CPUs, three for each of {} upcall sockets, two for each of {} bridges, \
         {OTHER_DESCRIPTORS} others)",
        size.cpus, size.sockets, size.bridges
    );
    match nr_open {
        _ if limit >= needed => {
            found.ok(Name::Descriptors, "supervisor", format!("it may open {limit} files and needs {what}"));
        }
        Some(nr_open) if nr_open < needed => {
            let cause = format!("fs.nr_open allows {nr_open} open files, and the run needs {what}");
            let remedy = format!("`sysctl -w fs.nr_open={}`", needed.next_power_of_two());
            found.refuse(Name::Descriptors, "supervisor", cause, &remedy);
        }
        _ => {
            let cause = format!("it may open {limit} files, and the run needs {what}");
            let remedy = format!("`prlimit --pid $$ --nofile={needed}:{needed}`, or the same limit for the container");
            found.refuse(Name::Descriptors, "supervisor", cause, &remedy);
        }
    }
}

/// The new daemon is started beside the old one, in the same cgroup.
fn second_daemon(daemon: &Daemon, found: &mut Findings) {
    let pid = daemon.id.pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let Some(used) = Used::read(&status) else { return };
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let limits = |controller| {
        let groups = of_process(Path::new(CGROUPS), &groups, controller);
        groups.iter().flat_map(Group::limits).collect::<Vec<_>>()
    };
    let mut low = too_low(Name::Memory, limits("memory"), used.bytes());
    low.extend(of_the_host(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), used));
    if low.is_empty() {
        let cause = format!("there is room for a second ovs-vswitchd ({} MiB)", mib(used.bytes()));
        found.ok(Name::Memory, "ovs-vswitchd", cause);
    }
    found.extend(low);
    found.extend(too_low(Name::Tasks, limits("pids"), used.threads + START_TASKS));
}

/// What the running daemon takes, of `/proc/PID/status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Used {
    resident: u64,
    locked: u64,
    threads: u64,
}

impl Used {
    fn read(status: &str) -> Option<Self> {
        let kib = |key| field(status, key).map(|kib| kib << 10);
        Some(Used {
            resident: kib("VmRSS:")? + kib("VmSwap:").unwrap_or(0),
            locked: kib("VmLck:").unwrap_or(0),
            threads: field(status, "Threads:")?,
        })
    }

    /// What a second one needs: as much, a quarter more for what it has read and not yet worked off, and its start.
    fn bytes(self) -> u64 {
        self.resident + self.resident / 4 + START_BYTES
    }
}

/// A limit of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
struct GroupLimit {
    /// The cgroup's folder.
    group: PathBuf,
    /// The file of the limit.
    file: &'static str,
    /// systemd's word for it.
    property: &'static str,
    limit: u64,
    used: u64,
}

/// A cgroup and the files of its limits: with the property, the file of the limit, that of what is used, and what of that
/// the kernel takes back before it refuses anything.
struct Group {
    path: PathBuf,
    files: &'static [(&'static str, &'static str, &'static str, &'static str)],
}

/// Documentation/admin-guide/cgroup-v2.rst
const MEMORY: &[(&str, &str, &str, &str)] = &[
    ("MemoryHigh", "memory.high", "memory.current", "inactive_file"),
    ("MemoryMax", "memory.max", "memory.current", "inactive_file"),
];
/// Documentation/admin-guide/cgroup-v1/memory.rst
const MEMORY_V1: &[(&str, &str, &str, &str)] =
    &[("MemoryLimit", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")];
/// Both versions.
const PIDS: &[(&str, &str, &str, &str)] = &[("TasksMax", "pids.max", "pids.current", "")];

impl Group {
    /// Those that are set.
    fn limits(&self) -> Vec<GroupLimit> {
        let limit = |(property, file, used, spare): &(&'static str, &'static str, &'static str, &'static str)| {
            let limit = number_in(&self.path.join(file)).filter(|limit| *limit < UNLIMITED)?;
            let stat = fs::read_to_string(self.path.join("memory.stat")).unwrap_or_default();
            let spare = if spare.is_empty() { 0 } else { field(&stat, spare).unwrap_or(0) };
            let used = number_in(&self.path.join(used))?.saturating_sub(spare);
            Some(GroupLimit { group: self.path.clone(), file, property, limit, used })
        };
        self.files.iter().filter_map(limit).collect()
    }
}

/// The cgroup of `controller` that a process is in, and those above it. `groups` is its `/proc/PID/cgroup`.
fn of_process(root: &Path, groups: &str, controller: &str) -> Vec<Group> {
    let lines = || groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let v1 = lines().find(|(controllers, _)| controllers.split(',').any(|name| name == controller));
    let (root, path, files) = match (v1, lines().find(|(controllers, _)| controllers.is_empty())) {
        (Some((_, path)), _) => (root.join(controller), path, if controller == "memory" { MEMORY_V1 } else { PIDS }),
        (None, Some((_, path))) => (root.to_owned(), path, if controller == "memory" { MEMORY } else { PIDS }),
        (None, None) => return Vec::new(),
    };
    let own = root.join(path.trim_start_matches('/'));
    let above = own.ancestors().take_while(|group| group.starts_with(&root));
    above.map(|group| Group { path: group.to_owned(), files }).collect()
}

/// A finding for each cgroup that has not `needed` left, with one command for all of its limits.
fn too_low(name: Name, limits: Vec<GroupLimit>, needed: u64) -> Vec<Finding> {
    let low: Vec<GroupLimit> = limits.into_iter().filter(|l| l.limit.saturating_sub(l.used) < needed).collect();
    let of_group = low.chunk_by(|a, b| a.group == b.group);
    of_group
        .filter_map(|low| Some((low.first()?, low)))
        .map(|(first, low)| {
            let is_memory = name == Name::Memory;
            let say = |n: u64| if is_memory { format!("{} MiB", mib(n)) } else { n.to_string() };
            let set: Vec<String> = low.iter().map(|l| format!("{}={}", l.property, say(l.limit))).collect();
            let cause = format!(
                "{} with {} in use, and a second ovs-vswitchd beside the first needs {}",
                set.join(", "),
                say(first.used),
                say(needed)
            );
            // Memory: twice that, to the next MiB. At its limit a daemon is throttled before it is killed.
            let least = match is_memory {
                true => (mib(first.used + 2 * needed) + 1) << 20,
                false => first.used + needed,
            };
            refused(name, &unit_of(&first.group), cause, remedy(low, least))
        })
        .collect()
}

/// Sets all of these limits of one cgroup to `least`.
fn remedy(low: &[GroupLimit], least: u64) -> String {
    let group = low.first().map(|l| l.group.clone()).unwrap_or_default();
    let unit = unit_of(&group);
    let is_unit = [".service", ".slice", ".scope"].iter().any(|kind| unit.ends_with(kind));
    let set: Vec<String> = low
        .iter()
        .map(|l| match is_unit {
            true => format!("{}={least}", l.property),
            false => format!("echo {least} > {}", l.group.join(l.file).display()),
        })
        .collect();
    match is_unit {
        true => format!("`systemctl set-property --runtime {unit} {}`", set.join(" ")),
        false => set.iter().map(|echo| format!("`{echo}`")).collect::<Vec<_>>().join("; "),
    }
}

fn unit_of(group: &Path) -> String {
    group.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Memory that is locked cannot be swapped out.
fn of_the_host(meminfo: &str, used: Used) -> Option<Finding> {
    let kib = |key| field(meminfo, key).map(|kib| kib << 10);
    let swap = if used.locked > 0 { 0 } else { kib("SwapFree:").unwrap_or(0) };
    let free = kib("MemAvailable:")? + swap;
    (free < used.bytes()).then(|| {
        let cause = format!(
            "{} MiB of memory are free, and a second ovs-vswitchd beside the first needs {} MiB",
            mib(free),
            mib(used.bytes())
        );
        let remedy = "end what takes memory (`ps --sort=-rss -eo rss,args`)";
        refused(Name::Memory, "this host", cause, remedy.into())
    })
}

/// The number behind `key` at the beginning of a line.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == key).then(|| words.next()?.parse().ok())?
    })
}

/// The number in a file of the kernel; none for `max`.
fn number_in(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

fn refused(name: Name, object: &str, cause: String, remedy: String) -> Finding {
    Finding { name, severity: Severity::Refused, object: object.into(), cause, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: Size = Size { cpus: 256, sockets: 256, bridges: 250 };

    fn found(size: Size, limit: u64, nr_open: Option<u64>) -> Vec<Finding> {
        let mut found = Findings::default();
        descriptors(size, limit, nr_open, &mut found);
        found.into_inner()
    }

    #[test]
    fn descriptors_are_counted_and_what_bounds_them_is_named() {
        let needed = 256 + 3 * 256 + 500 + 256;
        let [one] = found(LARGE, needed, Some(1 << 20)).try_into().unwrap();
        assert_eq!((one.severity, one.name), (Severity::Ok, Name::Descriptors));
        let [one] = found(LARGE, 1024, Some(1 << 20)).try_into().unwrap();
        assert_eq!(one.severity, Severity::Refused);
        assert!(one.cause.contains("1024") && one.cause.contains("1780") && one.remedy.contains("prlimit"), "{one:?}");
        let [one] = found(LARGE, 1024, Some(1024)).try_into().unwrap();
        assert!(one.cause.contains("fs.nr_open allows 1024") && one.remedy == "`sysctl -w fs.nr_open=2048`", "{one:?}");
    }

    #[test]
    fn the_limit_of_this_process_is_raised_as_far_as_it_may_be() {
        let raised = raise_descriptors();
        assert!(raised > 0 && getrlimit(Resource::RLIMIT_NOFILE).unwrap().0 >= raised);
        assert_eq!(raise_descriptors(), raised);
    }

    fn write(root: &Path, path: &str, text: &str) {
        let file = root.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }

    fn all_limits(root: &Path, groups: &str, controller: &str) -> Vec<GroupLimit> {
        of_process(root, groups, controller).iter().flat_map(Group::limits).collect()
    }

    #[test]
    fn limits_of_the_cgroup_and_of_those_above_it_count() {
        let dir = tempfile::tempdir().unwrap();
        let unit = "system.slice/ovs-vswitchd.service";
        for (file, text) in [
            ("memory.max", "104857600\n"),
            ("memory.high", "max\n"),
            ("memory.current", "62914560\n"),
            ("memory.stat", "anon 1\ninactive_file 10485760\n"),
            ("pids.max", "20\n"),
            ("pids.current", "12\n"),
        ] {
            write(dir.path(), &format!("{unit}/{file}"), text);
        }
        write(dir.path(), "system.slice/memory.high", "73400320\n");
        write(dir.path(), "system.slice/memory.current", "62914560\n");
        let groups = "0::/system.slice/ovs-vswitchd.service\n";
        let limits = all_limits(dir.path(), groups, "memory");
        let seen: Vec<_> = limits.iter().map(|l| (l.property, l.limit >> 20, l.used >> 20)).collect();
        assert_eq!(seen, [("MemoryMax", 100, 50), ("MemoryHigh", 70, 60)]);

        assert!(too_low(Name::Memory, limits.clone(), 10 << 20).is_empty());
        let found = too_low(Name::Memory, limits.clone(), 40 << 20);
        let [slice] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((slice.object.as_str(), slice.severity), ("system.slice", Severity::Refused));
        let found = too_low(Name::Memory, limits, 60 << 20);
        assert_eq!(
            found[0].cause,
            "MemoryMax=100 MiB with 50 MiB in use, and a second ovs-vswitchd beside the first needs 60 MiB"
        );
        assert_eq!(
            found[0].remedy,
            format!("`systemctl set-property --runtime ovs-vswitchd.service MemoryMax={}`", 171 << 20)
        );
        let [tasks] = too_low(Name::Tasks, all_limits(dir.path(), groups, "pids"), 9).try_into().unwrap();
        assert_eq!(tasks.remedy, "`systemctl set-property --runtime ovs-vswitchd.service TasksMax=21`");
    }

    #[test]
    fn limits_of_the_first_version_count_and_no_unit_is_made_up() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "memory/a/b/memory.limit_in_bytes", "104857600\n");
        write(dir.path(), "memory/a/b/memory.usage_in_bytes", "94371840\n");
        write(dir.path(), "memory/a/memory.limit_in_bytes", "9223372036854771712\n");
        write(dir.path(), "memory/a/memory.usage_in_bytes", "94371840\n");
        let groups = "7:cpu,memory:/a/b\n1:name=systemd:/x.service\n0::/x.service\n";
        let limits = all_limits(dir.path(), groups, "memory");
        let [one] = limits.as_slice() else { panic!("{limits:?}") };
        assert_eq!((one.limit >> 20, one.used >> 20, one.property), (100, 90, "MemoryLimit"));
        let [one] = too_low(Name::Memory, limits, 20 << 20).try_into().unwrap();
        assert!(
            one.remedy.starts_with("`echo 137363456 > ") && one.remedy.ends_with("/memory.limit_in_bytes`"),
            "{one:?}"
        );
        assert!(of_process(dir.path(), "", "memory").is_empty());
    }

    #[test]
    fn what_is_locked_needs_memory_and_not_swap() {
        let status = "VmLck:\t       0 kB\nVmRSS:\t   40960 kB\nVmSwap:\t 0 kB\nThreads:\t9\n";
        let used = Used::read(status).unwrap();
        assert_eq!((used.bytes() >> 20, used.threads), (66, 9));
        let meminfo = "MemAvailable:   40960 kB\nSwapFree:  40960 kB\n";
        assert!(of_the_host(meminfo, used).is_none());
        let found = of_the_host(meminfo, Used { locked: 1, ..used }).unwrap();
        assert!(found.cause.contains("40 MiB") && found.cause.contains("66 MiB"), "{found:?}");
        assert!(Used::read("Name: x\n").is_none());
    }
}

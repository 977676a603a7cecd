//! Whose daemon a process is: by what the kernel and root's files say of it, never by what it says of itself.
//!
//! Name, command line, environment and the files that these name are a process's own word: any user can have all of
//! them. A daemon is one of Open vSwitch's where its users are root or the one that the run directory belongs to, or
//! those that systemd has started the package's unit as, in our user namespace, and it holds the lock of the PID file there, or the upcall sockets that the datapath is bound
//! to, or listens on the database's socket, or is the main process of the package's unit. The name of its program is
//! asked for besides: others may hold descriptors of the same sockets (a supervisor of ours, systemd in its store).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{open, OFlag};
use nix::sys::stat::Mode;

use super::pid_file::{self, PidFile};
use super::{procfs, trusted};
use crate::host::{Context, Daemon, DaemonKind, HostError, Result};

/// What the kernel puts behind the name of a file that has none any more.
const DELETED: &str = " (deleted)";

/// The directory that daemons have their sockets and PID files in, and whom it belongs to.
#[derive(Debug, Clone)]
pub(super) struct RunDirectory {
    path: PathBuf,
    owner: u32,
    device: u64,
}

impl RunDirectory {
    /// That at `path`, usually `/run/openvswitch`. All above it has to be root's.
    pub fn open(path: &Path) -> Result<Self> {
        let object = path.display().to_string();
        let place = trusted::directory(path).about(&object)?;
        let folder = place.metadata().about(&object)?;
        Ok(RunDirectory { path: place.path, owner: folder.uid(), device: folder.dev() })
    }

    /// May this user be a daemon's?
    pub fn admits_user(&self, user: u32) -> bool {
        trusted::is_ours(user) || user == self.owner
    }

    /// Can this process be a daemon of `kind`? It is one where it also has what only a daemon has. One that is not root's
    /// runs a program of root's: another its user may have written himself. In the package's unit its user may be another
    /// than the run directory's: systemd gives a `RuntimeDirectory=` back to root at every command of the unit.
    pub fn admits(&self, kind: DaemonKind, pid: i32) -> bool {
        if !kind.file_names().iter().any(|name| procfs::runs(pid, name))
            || !procfs::shares(pid, "user").unwrap_or(false)
        {
            return false;
        }
        let users = procfs::users(pid).unwrap_or_default();
        let roots_program = || fs::metadata(format!("/proc/{pid}/exe")).is_ok_and(|exe| trusted::only_ours(&exe));
        // One user in all four ways: a program with the set-user-ID bit has two.
        users.first().is_some_and(|first| users.iter().all(|user| user == first))
            && (users.iter().all(|user| self.admits_user(*user))
                || procfs::cgroup(pid).is_ok_and(|own| is_of_unit(kind, &own)))
            && (users.iter().all(|user| trusted::is_ours(*user)) || roots_program())
    }

    /// The PID file of `kind`.
    pub fn pid_file(&self, kind: DaemonKind) -> PathBuf {
        self.path.join(format!("{}.pid", kind.program()))
    }

    /// Does the process hold the lock of a PID file of `kind` in this directory, whichever of the names of a run that
    /// has by now, or none: either daemon takes the name away when it ends.
    pub fn holds_pid_file(&self, kind: DaemonKind, pid: i32) -> bool {
        let name = self.pid_file(kind);
        let named = PidFile::new(&name).inodes();
        let folder = format!("/proc/{pid}/fd");
        let Ok(entries) = fs::read_dir(folder) else { return false };
        entries.flatten().any(|entry| self.is_locked_pid_file(&entry.path(), &name, &named, pid))
    }

    fn is_locked_pid_file(&self, descriptor: &Path, name: &Path, named: &BTreeSet<u64>, pid: i32) -> bool {
        let users = procfs::users(pid).unwrap_or_default();
        let without_a_name = || {
            let link = fs::read_link(descriptor).unwrap_or_default();
            link.to_string_lossy().strip_suffix(DELETED).is_some_and(|path| Path::new(path) == name)
        };
        let is_it = |file: &fs::Metadata| {
            let here = file.dev() == self.device && (trusted::is_ours(file.uid()) || users.contains(&file.uid()));
            here && (named.contains(&file.ino()) || file.nlink() == 0 && without_a_name())
        };
        // Looked at before it is opened: a process may have anything open.
        let Ok(file) = open(descriptor, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) else { return false };
        let file: Option<File> = trusted::open_regular(file, is_it).ok();
        file.is_some_and(|file| pid_file::lock_holder(&file).is_ok_and(|holder| holder == Some(pid)))
    }

    /// The process, which the kernel or systemd has named, as a daemon of `kind`; else why it is none.
    pub fn expect(&self, kind: DaemonKind, pid: i32) -> Result<()> {
        match self.admits(kind, pid) {
            true => Ok(()),
            false => Err(HostError::new(
                format!("process {pid}"),
                format!(
                    "it is no {} of this host: another program, another user than root and that of {}, or another user namespace",
                    kind.program(),
                    self.path.display()
                ),
            )),
        }
    }

    /// What the daemon says about its own files, where that can be believed: in the run directory, or of a daemon that is
    /// root's in any directory that only root can have put there. Else they are where its package has them.
    pub fn believe(&self, mut daemon: Daemon) -> Daemon {
        let root = trusted::is_ours(daemon.uid);
        let in_place = |path: &Path| {
            let Some(folder) = path.parent() else { return false };
            folder == self.path || root && trusted::directory(folder).is_ok_and(|place| place.path == folder)
        };
        if !in_place(&daemon.pid_file) {
            daemon.pid_file = self.pid_file(daemon.kind);
        }
        if !in_place(&daemon.control) {
            daemon.control = self.path.join(format!("{}.{}.ctl", daemon.kind.program(), daemon.own_pid));
        }
        daemon
    }
}

/// A process of root's or of the run directory's user that has the name of a daemon, whatever it is. Those of others are
/// nobody's business.
pub(super) fn of_that_name(kind: DaemonKind, run_directory: &Path) -> Option<i32> {
    let run_directory = RunDirectory::open(run_directory).ok()?;
    procfs::pids().ok()?.into_iter().find(|pid| run_directory.admits(kind, *pid))
}

/// Is this the cgroup of the package's unit, where only root and systemd put a process? A user's own systemd has its units
/// elsewhere, by whatever name.
pub(super) fn is_of_unit(kind: DaemonKind, cgroup: &str) -> bool {
    cgroup.strip_prefix("/system.slice/").and_then(|unit| unit.strip_suffix(".service")) == Some(kind.program())
}

/// Of several daemons those that are: one that runs as a user of its own counts for less than root's, and than one in the
/// cgroup of the package's unit, where only root puts a process.
pub(super) fn the_likely(all: Vec<Daemon>) -> Vec<Daemon> {
    let likely = |daemon: &Daemon| trusted::is_ours(daemon.uid) || is_of_unit(daemon.kind, &daemon.cgroup);
    match all.iter().any(likely) {
        true => all.into_iter().filter(likely).collect(),
        false => all,
    }
}

#[cfg(test)]
mod tests {
    use super::super::daemons::describe;
    use super::super::trusted::tests::of_root;
    use super::*;
    use std::io::{self, BufRead};
    use std::os::unix::fs::{chown, PermissionsExt};
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};

    const SWITCH: DaemonKind = DaemonKind::OvsVswitchd;
    const THEIRS: u32 = 4711;
    const NOBODY: u32 = 65534;

    struct Ends(Child);

    impl Drop for Ends {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    impl Ends {
        fn pid(&self) -> i32 {
            self.0.id().cast_signed()
        }
    }

    /// A process of a program that has the daemon's name and belongs to `owner`.
    fn named(folder: &Path, user: u32, owner: u32) -> Ends {
        runs_as(folder, user, owner, SWITCH.program())
    }

    fn runs_as(folder: &Path, user: u32, owner: u32, name: &str) -> Ends {
        let program = folder.join(format!("{name}.{user}.{owner}")).join(name);
        fs::create_dir(program.parent().unwrap()).unwrap();
        fs::copy("/bin/sleep", &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        chown(&program, Some(owner), None).unwrap();
        loop {
            match Command::new(&program).arg("60").uid(user).spawn() {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                child => return Ends(child.unwrap()),
            }
        }
    }

    #[test]
    fn a_name_makes_nobody_a_daemon() {
        let Some(folder) = of_root().filter(|_| trusted::is_ours(0) && nix::unistd::geteuid().is_root()) else {
            return;
        };
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let run = folder.path().join("run");
        fs::create_dir(&run).unwrap();
        let admitted = |user, owner| {
            let process = named(folder.path(), user, owner);
            RunDirectory::open(&run).unwrap().admits(SWITCH, process.pid())
        };
        assert!(admitted(0, 0));
        let alternative = runs_as(folder.path(), 0, 0, "ovs-vswitchd-dpdk");
        assert!(RunDirectory::open(&run).unwrap().admits(SWITCH, alternative.pid()));
        assert!(!RunDirectory::open(&run).unwrap().admits(DaemonKind::OvsdbServer, alternative.pid()));
        assert!(!admitted(NOBODY, 0) && !admitted(NOBODY, NOBODY));
        assert!(!admitted(THEIRS, 0), "the run directory is root's");
        chown(&run, Some(THEIRS), None).unwrap();
        fs::remove_dir_all(folder.path().join("ovs-vswitchd.4711.0")).unwrap();
        assert!(admitted(THEIRS, 0));
        assert!(!admitted(THEIRS, THEIRS), "a program of its own");
        let own = RunDirectory::open(&run).unwrap();
        assert!(!own.admits(SWITCH, std::process::id().cast_signed()), "another name");
        let error = own.expect(SWITCH, std::process::id().cast_signed()).unwrap_err().to_string();
        assert!(error.contains("it is no ovs-vswitchd of this host"), "{error}");
    }

    #[test]
    fn nobody_else_can_have_made_the_run_directory() {
        let folder = tempfile::tempdir().unwrap();
        assert!(RunDirectory::open(folder.path()).unwrap_err().to_string().contains("others than root"));
    }

    /// Another process, which locks the file (`pid_file`).
    fn locker(file: &Path) -> Ends {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "--nocapture", "host::real::pid_file::tests::holds_a_lock"]);
        let mut child = command.env("LOCKED", file).stdout(Stdio::piped()).spawn().unwrap();
        let lines = io::BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(io::Result::ok).any(|line| line.contains("locked")));
        Ends(child)
    }

    #[test]
    fn who_holds_the_lock_in_the_run_directory_is_found_under_any_name_and_none() {
        let Some(folder) = of_root() else { return };
        let run = RunDirectory::open(folder.path()).unwrap();
        let file = run.pid_file(SWITCH);
        fs::write(&file, "1\n").unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let other = elsewhere.path().join("ovs-vswitchd.pid");
        fs::write(&other, "1\n").unwrap();
        let (process, stranger) = (locker(&file), locker(&other));
        let holds = |process: &Ends| run.holds_pid_file(SWITCH, process.pid());
        assert!(holds(&process) && !holds(&stranger));
        assert!(!run.holds_pid_file(DaemonKind::OvsdbServer, process.pid()));
        assert!(!run.holds_pid_file(SWITCH, std::process::id().cast_signed()));
        let mut aside = file.clone().into_os_string();
        aside.push(".ovsg-old");
        fs::rename(&file, &aside).unwrap();
        assert!(holds(&process));
        fs::rename(&aside, &file).unwrap();
        fs::remove_file(&file).unwrap();
        assert!(holds(&process), "no name is left");
        fs::remove_file(&other).unwrap();
        fs::write(&file, "2\n").unwrap();
        assert!(holds(&process) && !holds(&stranger));
    }

    #[test]
    fn what_a_daemon_says_of_its_files_is_believed_in_the_run_directory() {
        let Some(folder) = of_root() else { return };
        let run = RunDirectory::open(folder.path()).unwrap();
        let daemon = describe(SWITCH, procfs::identity(std::process::id().cast_signed()).unwrap()).unwrap();
        let with = |uid: u32, path: &Path| {
            let believed =
                run.believe(Daemon { uid, control: path.to_owned(), pid_file: path.to_owned(), ..daemon.clone() });
            (believed.control == path, believed.pid_file == path)
        };
        let inside = folder.path().canonicalize().unwrap().join("x");
        assert_eq!((with(0, &inside), with(THEIRS, &inside)), ((true, true), (true, true)));
        assert_eq!((with(0, Path::new("/run/x")), with(THEIRS, Path::new("/run/x"))), ((true, true), (false, false)));
        let everybody = tempfile::tempdir().unwrap();
        assert_eq!(with(0, &everybody.path().join("x")), (false, false));
    }

    #[test]
    fn of_several_root_s_and_the_unit_s_are_the_likely_ones() {
        let daemon = describe(SWITCH, procfs::identity(std::process::id().cast_signed()).unwrap()).unwrap();
        let of = |uid: u32, cgroup: &str| Daemon { uid, cgroup: cgroup.into(), ..daemon.clone() };
        let own_unit = "/user.slice/user-4711.slice/user@4711.service/app.slice/ovs-vswitchd.service";
        let (root, theirs) = (of(0, "/"), of(THEIRS, own_unit));
        let in_unit = of(THEIRS, "/system.slice/ovs-vswitchd.service");
        assert_eq!(the_likely(vec![theirs.clone(), in_unit.clone()]), [in_unit]);
        assert_eq!(the_likely(vec![theirs.clone(), root.clone()]), [root]);
        assert_eq!(the_likely(vec![theirs.clone(), theirs.clone()]).len(), 2);
    }
}

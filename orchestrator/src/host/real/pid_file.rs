//! Moves of a daemon's PID file.
//!
//! A daemon holds an fcntl lock on its PID file, and `ovs-appctl -t NAME` and logrotate believe only a locked one: the
//! lock follows the inode, so the file is only ever linked and renamed, never written (hazards 19). Beside
//! `NAME.pid` there are, during a run:
//!
//! ```text
//! NAME.pid            the daemon that `ovs-appctl -t NAME` finds
//! NAME.pid.ovsg-old   another link to the old daemon's file, from set_aside to settle
//! NAME.pid.ovsg-new   another link to the new daemon's file, from swap to settle
//! NAME.pid.ovsg-tmp   for the length of one replacement
//! ```
//! Both links stay until the end, because either daemon unlinks `NAME.pid` when a signal ends it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{fcntl, open, FcntlArg, OFlag};
use nix::sys::stat::Mode;

use super::trusted;
use crate::host::{Context, HostError, Result};

/// A PID file has not more, bytes.
const LENGTH_MAX: u64 = 64;

/// The PID file of a daemon and the names beside it.
#[derive(Debug, Clone)]
pub struct PidFile(PathBuf);

impl PidFile {
    /// The PID file at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        PidFile(path.into())
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.0.clone().into_os_string();
        name.push(suffix);
        name.into()
    }

    fn old(&self) -> PathBuf {
        self.beside(".ovsg-old")
    }

    fn new_one(&self) -> PathBuf {
        self.beside(".ovsg-new")
    }

    fn object(&self) -> String {
        self.0.display().to_string()
    }

    /// The pid in the file under the name; `None` where there is no such file or it is still empty.
    pub fn pid(&self) -> Result<Option<i32>> {
        read(&self.0).about(self.object())
    }

    /// The process that holds the file's lock, in our pid namespace's number, whatever it calls itself in its own. The
    /// file has been locked before it had its name (`make_pidfile` in `lib/daemon-unix.c`).
    pub fn holder(&self) -> Result<Option<i32>> {
        match open_file(&self.0).about(self.object())? {
            Some(file) => lock_holder(&file).about(self.object()),
            None => Ok(None),
        }
    }

    /// The inodes of the files that any of the names stands for now.
    pub fn inodes(&self) -> BTreeSet<u64> {
        let all = [self.0.clone(), self.old(), self.new_one(), self.beside(".ovsg-tmp"), self.beside(".ovsg-step")];
        all.iter().filter_map(|path| fs::symlink_metadata(path).ok()).map(|file| file.ino()).collect()
    }

    /// Links the file of the old daemon aside and takes the name away. May be run twice.
    pub fn set_aside(&self, old: i32) -> Result<()> {
        match (self.pid()?, read(&self.old()).about(self.object())?) {
            (Some(pid), _) if pid == old => {
                remove(&self.new_one()).about(self.object())?;
                place(&self.0, &self.old(), &self.beside(".ovsg-tmp")).about(self.object())?;
                remove(&self.0).about(self.object())
            }
            (None, Some(pid)) if pid == old => Ok(()),
            (name, aside) => Err(self.surprise(&[("", name), (".ovsg-old", aside)], old)),
        }
    }

    /// Links the new daemon's file aside and gives the name back to the old one. May be run twice.
    pub fn swap(&self, old: i32, new: i32) -> Result<()> {
        let (name, aside) = (self.pid()?, read(&self.new_one()).about(self.object())?);
        let tmp = self.beside(".ovsg-tmp");
        match (name, aside) {
            (Some(pid), _) if pid == new => place(&self.0, &self.new_one(), &tmp).about(self.object())?,
            (_, Some(pid)) if pid == new => {}
            _ => return Err(self.surprise(&[("", name), (".ovsg-new", aside)], new)),
        }
        if read(&self.old()).about(self.object())? != Some(old) {
            return Err(self.surprise(&[(".ovsg-old", read(&self.old()).about(self.object())?)], old));
        }
        place(&self.old(), &self.0, &tmp).about(self.object())
    }

    /// Makes the name `owner`'s, from whichever of the three names holds its file, and removes the others. May be run
    /// twice, and from any state a crash can leave.
    pub fn settle(&self, owner: i32) -> Result<()> {
        let tmp = self.beside(".ovsg-tmp");
        if self.pid()? != Some(owner) {
            let names = [self.new_one(), self.old(), tmp.clone()];
            let Some(from) = names.iter().find(|path| read(path).ok().flatten() == Some(owner)) else {
                let found = [("", self.pid()?), (".ovsg-old", read(&self.old()).about(self.object())?)];
                return Err(self.surprise(&found, owner));
            };
            let step = self.beside(".ovsg-step");
            place(from, &self.0, &step).about(self.object())?;
        }
        [self.old(), self.new_one(), tmp, self.beside(".ovsg-step")]
            .iter()
            .try_for_each(|path| remove(path))
            .about(self.object())
    }

    /// Removes each of the names that holds a pid for which `lives` says no. Nobody locks such a file.
    pub fn remove_stale(&self, lives: impl Fn(i32) -> bool) -> Result<()> {
        for path in [self.0.clone(), self.old(), self.new_one()] {
            if read(&path).about(self.object())?.is_some_and(|pid| !lives(pid)) {
                remove(&path).about(self.object())?;
            }
        }
        Ok(())
    }

    fn surprise(&self, found: &[(&str, Option<i32>)], wanted: i32) -> HostError {
        let list: Vec<String> = found
            .iter()
            .map(|(suffix, pid)| match pid {
                Some(pid) => format!("{}{suffix} holds {pid}", self.0.display()),
                None => format!("{}{suffix} is not there", self.0.display()),
            })
            .collect();
        HostError::new(self.object(), format!("expected the file of process {wanted}, but {}", list.join(" and ")))
            .remedy("somebody else starts or stops daemons; restart the daemon if `ovs-appctl` cannot find it by name")
    }
}

/// The lock that daemons have on their PID files.
fn whole_file() -> libc::flock {
    libc::flock { l_type: libc::F_WRLCK as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 }
}

/// The process that holds a write lock on the file, in our pid namespace's number.
pub(super) fn lock_holder(file: &File) -> io::Result<Option<i32>> {
    let mut lock = whole_file();
    fcntl(file, FcntlArg::F_GETLK(&mut lock))?;
    Ok((lock.l_type == libc::F_WRLCK as i16 && lock.l_pid > 0).then_some(lock.l_pid))
}

/// Opens a PID file, where there is one. The directory may be that of a user who can have put anything there.
fn open_file(path: &Path) -> io::Result<Option<File>> {
    match open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()).map_err(io::Error::from) {
        Ok(file) => trusted::open_regular(file, |_| true).map(Some),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// The pid in a file; `None` where there is none yet.
fn read(path: &Path) -> io::Result<Option<i32>> {
    let Some(file) = open_file(path)? else { return Ok(None) };
    // What else may be in there is nobody's business.
    let no_pid = || io::Error::other("there is no process id in it");
    let bytes = trusted::read(file, LENGTH_MAX).map_err(|_| no_pid())?;
    match std::str::from_utf8(&bytes).map_err(|_| no_pid())?.trim() {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| no_pid()),
    }
}

/// Makes `to` another link of `from`, replacing what `to` was. A rename between two links of one file does nothing and
/// leaves both, hence the look at the inodes and the last removal.
fn place(from: &Path, to: &Path, tmp: &Path) -> io::Result<()> {
    let same = |a: &Path, b: &Path| Some(inode(a)? == inode(b)?);
    if same(from, to) == Some(true) {
        return Ok(());
    }
    remove(tmp)?;
    fs::hard_link(from, tmp)?;
    fs::rename(tmp, to)
}

/// Of a link its own.
fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new() -> (Self, PidFile) {
            let dir = tempfile::tempdir().unwrap();
            let file = PidFile::new(dir.path().join("d.pid"));
            fs::write(&file.0, "10\n").unwrap();
            (Dir(dir), file)
        }

        fn names(&self) -> Vec<String> {
            let mut names: Vec<String> =
                fs::read_dir(self.0.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn a_whole_run_ends_with_the_new_daemons_own_inode() {
        let (dir, file) = Dir::new();
        for _ in 0..2 {
            file.set_aside(10).unwrap();
            assert_eq!((file.pid().unwrap(), dir.names()), (None, vec!["d.pid.ovsg-old".into()]));
        }
        fs::write(&file.0, "20\n").unwrap();
        let inode = fs::metadata(&file.0).unwrap().ino();
        for _ in 0..2 {
            file.swap(10, 20).unwrap();
            assert_eq!(file.pid().unwrap(), Some(10));
        }
        remove(&file.0).unwrap(); // the old daemon does this when it ends
        for _ in 0..2 {
            file.settle(20).unwrap();
            assert_eq!((file.pid().unwrap(), dir.names()), (Some(20), vec!["d.pid".into()]));
        }
        assert_eq!(fs::metadata(&file.0).unwrap().ino(), inode);
    }

    #[test]
    fn settling_on_the_old_daemon_works_from_every_point_of_the_run() {
        let inode = |file: &PidFile| fs::metadata(&file.0).unwrap().ino();
        for stop_after in 0..6 {
            let (dir, file) = Dir::new();
            let before = inode(&file);
            let steps: [&dyn Fn(); 5] = [
                &|| file.set_aside(10).unwrap(),
                &|| fs::write(&file.0, "20\n").unwrap(),
                &|| file.swap(10, 20).unwrap(),
                &|| remove(&file.0).unwrap(), // a standby ended by SIGTERM takes the name with it
                &|| fs::write(file.beside(".ovsg-tmp"), "").unwrap(),
            ];
            steps.iter().take(stop_after).for_each(|step| step());
            file.settle(10).unwrap();
            assert_eq!((file.pid().unwrap(), dir.names()), (Some(10), vec!["d.pid".into()]), "after {stop_after}");
            assert_eq!(inode(&file), before, "after {stop_after}");
        }
    }

    /// The other process of the test below: a lock of one's own is none to oneself.
    #[test]
    #[ignore]
    fn holds_a_lock() {
        let file = File::options().write(true).open(std::env::var_os("LOCKED").unwrap()).unwrap();
        fcntl(&file, FcntlArg::F_SETLK(&whole_file())).unwrap();
        println!("locked");
        std::thread::sleep(std::time::Duration::from_secs(60));
    }

    #[test]
    fn who_holds_the_lock_is_told_whatever_is_written() {
        use std::io::BufRead;
        let (_dir, file) = Dir::new();
        assert_eq!(file.holder().unwrap(), None);
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "--nocapture", "host::real::pid_file::tests::holds_a_lock"]);
        let mut child = command.env("LOCKED", &file.0).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(io::Result::ok).any(|line| line.contains("locked")));
        assert_eq!((file.pid().unwrap(), file.holder().unwrap()), (Some(10), Some(child.id() as i32)));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(file.holder().unwrap(), None);
        assert_eq!(PidFile::new("/nonexistent/d.pid").holder().unwrap(), None);
    }

    #[test]
    fn what_is_no_file_of_a_pid_is_neither_followed_nor_told_nor_waited_for() {
        let (dir, file) = Dir::new();
        let secret = dir.0.path().join("secret");
        fs::write(&secret, "do-not-tell").unwrap();
        let put: [&dyn Fn(&Path); 4] = [
            &|path| std::os::unix::fs::symlink(&secret, path).unwrap(),
            &|path| nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap(),
            &|path| drop(fs::hard_link(&secret, path)),
            &|path| File::create(path).unwrap().set_len(1 << 40).unwrap(),
        ];
        for put in put {
            fs::remove_file(&file.0).unwrap();
            put(&file.0);
            let error = file.pid().unwrap_err().to_string();
            assert!(!error.contains("do-not-tell"), "{error}");
            assert!(file.set_aside(10).is_err() && file.settle(10).is_err());
        }
    }

    #[test]
    fn surprises_are_refused_and_change_nothing() {
        let (dir, file) = Dir::new();
        assert!(file.set_aside(11).is_err());
        assert!(file.swap(10, 20).is_err());
        assert!(file.settle(30).is_err());
        assert_eq!((file.pid().unwrap(), dir.names()), (Some(10), vec!["d.pid".into()]));
    }
}

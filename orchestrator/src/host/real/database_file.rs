//! The file of the database, found by what ovsdb-server has open: its command line is a hint at best, and several
//! databases may be served.
//!
//! The server holds a lock file beside each database (`lockfile_name`, lib/lockfile.c), whose name says where a compaction
//! puts the new file (`ovsdb_log_replace_start`, ovsdb/log.c). A compaction writes all of the database and goes on in the
//! new file: that is how it gets into memory, and back.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{fallocate, openat, openat2, FallocateFlags, OFlag, OpenHow, ResolveFlag};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sched::{setns, unshare, CloneFlags};
use nix::sys::stat::{fstat, fstatat, Mode};
use nix::sys::statvfs::{fstatvfs, FsFlags};
use nix::unistd::{fchdir, unlinkat, UnlinkatFlags};
use serde::{Deserialize, Serialize};

use super::{unixctl, Ovsdb, RealDaemons};
use crate::host::database_disk::{DatabaseDisk, DatabaseFile, BALLAST, DISK_REMEDY};
use crate::host::{Context, Daemon, Daemons, HostError, ProcessId, Result};
use crate::report::write_private_json;

/// The name of the database in its schema.
const DATABASE: &str = "Open_vSwitch";
/// Beside the database, from Standby to the end of a run.
const BALLAST_NAME: &str = ".ovs-graceful-ballast";
/// Beside the database, for a moment.
const TRY_NAME: &str = ".ovs-graceful-try";
/// So much is written into it, bytes.
const TRY_SIZE: usize = 4096;
/// The source of our mounts, by which they are known.
const SOURCE: &str = "ovs-graceful-database";
/// The least that the database may grow to in memory, bytes; four times its size, where that is more.
const MEMORY_LEAST: u64 = 16 << 20;
/// Says which server serves from memory.
const RECORD: &str = "/run/ovs-graceful/database.json";
/// No schema is longer, bytes: that of OVS 3.5 has 30,000.
const SCHEMA_MAX: u64 = 1 << 20;
/// How long a compaction may take where nothing else says so.
const COMPACT_LIMIT: Duration = Duration::from_secs(20);

/// This server was told to serve from memory.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    server: ProcessId,
    /// Where the file is on the disk: a folder that was unmounted since has no name any more.
    folder: PathBuf,
    name: PathBuf,
}

/// The database's file, as the server sees it.
struct Place {
    server: Daemon,
    /// The folder, in the server's mount namespace.
    folder: PathBuf,
    /// The same, opened (`O_PATH`).
    opened: OwnedFd,
    name: OsString,
}

impl Place {
    /// `None` where it is not known which of the server's files it is.
    fn of(daemons: &dyn Daemons) -> Result<Option<Place>> {
        let server = daemons.find_ovsdb_server()?;
        let object = format!("ovsdb-server (pid {})", server.id.pid);
        let mut found = Vec::new();
        let places = match recorded().filter(|record| record.server == server.id) {
            Some(record) => vec![(record.folder, record.name.into_os_string())],
            None => locked(server.id.pid).about(&object)?,
        };
        for (folder, name) in places {
            match open_folder(server.id.pid, &folder) {
                // A server that is not root's can lock a file wherever its user may write: root changes nothing there.
                Ok(opened) if !is_of(&opened, server.uid).about(&object)? => {}
                Ok(opened) => found.push(Place { server: server.clone(), folder, opened, name }),
                // A folder that has been removed since is none of a file that it has open.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).about(folder.display().to_string()),
            }
        }
        if found.iter().any(|place| place.is_on_disk().unwrap_or(false)) {
            // Of a file system that was unmounted since, only the lock file is left.
            found.retain(|place| place.is_on_disk().unwrap_or(false));
        }
        if found.len() > 1 {
            found.retain(|place| place.is_of_switch().unwrap_or(false));
        }
        Ok(found.pop().filter(|_| found.is_empty()))
    }

    fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    fn object(&self) -> String {
        self.path().display().to_string()
    }

    fn open(&self, name: &OsStr, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(openat(&self.opened, name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map(File::from)?)
    }

    /// False where there is none.
    fn remove(&self, name: &str) -> io::Result<bool> {
        match unlinkat(&self.opened, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Does its first record, the schema, name the switch's database?
    fn is_of_switch(&self) -> io::Result<bool> {
        let mut head = Vec::new();
        self.open(&self.name, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?.take(SCHEMA_MAX).read_to_end(&mut head)?;
        Ok(is_of_switch(&head))
    }

    /// Does the server have this very file open?
    fn is_on_disk(&self) -> io::Result<bool> {
        let there = match fstatat(&self.opened, self.name.as_os_str(), nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(there) => there,
            Err(Errno::ENOENT) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        let fds = fs::read_dir(format!("/proc/{}/fd", self.server.id.pid))?.flatten();
        let mut open = fds.filter_map(|entry| fs::metadata(entry.path()).ok());
        Ok(open.any(|file| (file.dev(), file.ino()) == (there.st_dev, there.st_ino)))
    }

    fn is_in_memory(&self) -> io::Result<bool> {
        Ok(recorded().is_some_and(|record| record.server == self.server.id) && !self.is_on_disk()?)
    }

    /// Makes a file in the folder, writes into it, waits until that is on the disk, and removes it.
    fn try_writing(&self) -> io::Result<()> {
        // One that somebody was killed over.
        self.remove(TRY_NAME)?;
        let mut file = self.open(OsStr::new(TRY_NAME), OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
        let written = file.write_all(&[b'x'; TRY_SIZE]).and_then(|()| file.sync_all());
        self.remove(TRY_NAME)?;
        written
    }

    fn glance(&self) -> Result<DatabaseFile> {
        let object = self.object();
        let stat = fstatvfs(&self.opened).about(&object)?;
        if stat.flags().contains(FsFlags::ST_RDONLY) {
            return Err(HostError::unwritable(object, "its file system is read-only").remedy(DISK_REMEDY));
        }
        let blocks = if self.server.uid == 0 { stat.blocks_free() } else { stat.blocks_available() };
        let size = fstatat(&self.opened, self.name.as_os_str(), nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW);
        let size = size.about(&object)?.st_size.unsigned_abs();
        let in_memory = self.is_in_memory().about(&object)?;
        Ok(DatabaseFile { path: self.path(), size, free: blocks * stat.fragment_size(), in_memory })
    }

    fn look(&self) -> Result<DatabaseFile> {
        let (file, object) = (self.glance()?, self.object());
        match self.try_writing() {
            // What is free says so better.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(DatabaseFile { free: 0, ..file }),
            Err(error) => Err(unwritable(&object, &format!("no file can be written beside it: {error}"))),
            Ok(()) => Ok(file),
        }
    }

    fn keep_ballast(&self) -> io::Result<()> {
        self.remove(BALLAST_NAME)?;
        let mut file = self.open(OsStr::new(BALLAST_NAME), OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
        let kept = match fallocate(&file, FallocateFlags::empty(), 0, BALLAST.cast_signed()) {
            Ok(()) => Ok(()),
            // Something that no file system takes for nothing, or packs.
            Err(Errno::EOPNOTSUPP) => File::open("/dev/urandom").and_then(|random| {
                let copied = io::copy(&mut random.take(BALLAST), &mut file)?;
                if copied == BALLAST {
                    Ok(())
                } else {
                    Err(io::ErrorKind::WriteZero.into())
                }
            }),
            Err(errno) => Err(errno.into()),
        };
        if kept.is_err() {
            self.remove(BALLAST_NAME)?;
        }
        kept
    }

    /// Has the server write all of the database to the place that its name has now, and go on there.
    fn compact(&self, until: Instant) -> Result<()> {
        unixctl::command(&self.server, "ovsdb-server/compact", &[DATABASE], until)
            .map(drop)
            .map_err(|error| unwritable(&self.object(), &error.cause))
    }

    /// A memory file system over the folder, in the server's mount namespace.
    fn cover(&self) -> io::Result<()> {
        let folder = fstat(&self.opened)?;
        let size = fstatat(&self.opened, self.name.as_os_str(), nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_or(0, |file| file.st_size.unsigned_abs());
        let size = MEMORY_LEAST.max(4 * size);
        let (mode, uid, gid) = (folder.st_mode & 0o7777, folder.st_uid, folder.st_gid);
        let mut options = OsString::from(format!("size={size},mode={mode:o},uid={uid},gid={gid}"));
        if let Some(label) = label(&self.opened) {
            options.push(",context=\"");
            options.push(label);
            options.push("\"");
        }
        self.in_namespace(|| {
            // The very folder that was looked at, whatever its name stands for by now.
            fchdir(&self.opened)?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            Ok(mount(Some(SOURCE), ".", Some("tmpfs"), flags, Some(options.as_os_str()))?)
        })
    }

    /// Takes what [`Place::cover`] has put there out of sight: who has a file of it open keeps that.
    fn uncover(&self) -> io::Result<()> {
        while covers(self.server.id.pid)?.contains(&self.folder) {
            self.in_namespace(|| Ok(umount2(&self.folder, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?))?;
        }
        Ok(())
    }

    /// Does `work` in the server's mount namespace, in a thread of its own that ends with it.
    fn in_namespace(&self, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
        let namespace = File::open(format!("/proc/{}/ns/mnt", self.server.id.pid))?;
        let entered = move || {
            // setns(2): not for a thread that shares its root and working directory with others.
            unshare(CloneFlags::CLONE_FS)?;
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS)?;
            work()
        };
        let joined = std::thread::scope(|scope| scope.spawn(entered).join());
        joined.unwrap_or_else(|_| Err(io::Error::other("the thread in the mount namespace has panicked")))
    }
}

fn unwritable(object: &str, cause: &str) -> HostError {
    HostError::unwritable(object, cause).remedy(DISK_REMEDY)
}

/// The folder and name of each database that the process has locked, and of each file of that name that it has open.
pub(super) fn locked(pid: i32) -> io::Result<Vec<(PathBuf, OsString)>> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let links: Vec<PathBuf> = fds.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    let mut found: Vec<_> = links.iter().filter_map(|link| of_lock_file(link)).collect();
    let open = links.iter().filter(|link| found.iter().any(|(_, name)| link.file_name() == Some(name)));
    let open: Vec<_> =
        open.filter_map(|link| Some((link.parent()?.to_owned(), link.file_name()?.to_owned()))).collect();
    found.extend(open);
    found.sort();
    found.dedup();
    Ok(found)
}

/// `/etc/openvswitch/.conf.db.~lock~` is that of `conf.db` in `/etc/openvswitch`.
fn of_lock_file(link: &Path) -> Option<(PathBuf, OsString)> {
    let name = link.file_name()?.as_bytes().strip_prefix(b".")?.strip_suffix(b".~lock~")?;
    let folder = link.parent().filter(|folder| folder.is_absolute())?;
    (!name.is_empty()).then(|| (folder.to_owned(), OsString::from_vec(name.to_owned())))
}

/// Is this the head of a file of the switch's database? `OVSDB JSON length hash`, then the schema.
fn is_of_switch(head: &[u8]) -> bool {
    let wanted = format!("\"name\":\"{DATABASE}\"");
    let Some(end) = head.iter().position(|byte| *byte == b'\n') else { return false };
    let (line, rest) = head.split_at(end);
    let length = std::str::from_utf8(line).ok().and_then(|line| line.split(' ').nth(2)?.parse::<usize>().ok());
    let schema = rest.get(1..).and_then(|rest| rest.get(..length?.min(rest.len())));
    line.starts_with(b"OVSDB ")
        && schema.is_some_and(|schema| schema.windows(wanted.len()).any(|w| w == wanted.as_bytes()))
}

/// The folder as the process sees it, without any symbolic link: the kernel has told its name.
fn open_folder(pid: i32, folder: &Path) -> io::Result<OwnedFd> {
    let root = nix::fcntl::open(
        format!("/proc/{pid}/root").as_str(),
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(&root, folder, how)?)
}

/// Is the folder root's or that user's, and nobody else may write to it by its mode for others?
fn is_of(folder: &OwnedFd, uid: u32) -> io::Result<bool> {
    let stat = fstat(folder)?;
    Ok([0, uid].contains(&stat.st_uid) && stat.st_mode & 0o002 == 0)
}

/// Where our mounts are that the process sees (`/proc/PID/mountinfo`: the fifth field; behind ` - ` type and source).
fn covers(pid: i32) -> io::Result<Vec<PathBuf>> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    Ok(text.lines().filter_map(covered).collect())
}

fn covered(line: &str) -> Option<PathBuf> {
    let (mount, file_system) = line.split_once(" - ")?;
    (file_system.split(' ').nth(1) == Some(SOURCE)).then(|| mount.split(' ').nth(4).map(unescaped)).flatten()
}

/// Blanks and the like are in octal there (`mangle`, fs/seq_file.c).
fn unescaped(word: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = word.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// The SELinux label of a folder, which what replaces it has to have: the server may write where it says so.
fn label(folder: &OwnedFd) -> Option<OsString> {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", folder.as_raw_fd())).ok()?;
    let mut value = [0_u8; 256];
    // SAFETY: both strings end with NUL, and the length is that of the buffer.
    let length =
        unsafe { libc::getxattr(path.as_ptr(), c"security.selinux".as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    let label = value.get(..usize::try_from(length).ok()?)?;
    let label = label.strip_suffix(b"\0").unwrap_or(label);
    (!label.is_empty() && !label.contains(&b'"')).then(|| OsString::from_vec(label.to_owned()))
}

fn recorded() -> Option<Record> {
    serde_json::from_slice(&fs::read(RECORD).ok()?).ok()
}

fn forget_record() -> Result<()> {
    match fs::remove_file(RECORD) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).about(RECORD),
        _ => Ok(()),
    }
}

impl Ovsdb {
    fn known_place(&self) -> Result<Option<Place>> {
        Place::of(&RealDaemons::new(self.socket()))
    }

    fn place(&self) -> Result<Place> {
        let unknown =
            || HostError::new("ovsdb-server", format!("which file it has database {DATABASE} in is not known"));
        self.known_place()?.ok_or_else(unknown)
    }
}

impl DatabaseDisk for Ovsdb {
    fn look_at_disk(&self) -> Result<DatabaseFile> {
        self.place()?.look()
    }

    fn glance_at_disk(&self) -> Result<DatabaseFile> {
        self.place()?.glance()
    }

    fn has_left_over(&self) -> Result<bool> {
        let Some(place) = self.known_place()? else { return Ok(false) };
        let there = |name: &str| match fstatat(&place.opened, name, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno).about(place.object()),
        };
        Ok(there(BALLAST_NAME)? || there(TRY_NAME)? || recorded().is_some())
    }

    fn keep_ballast(&self) -> Result<()> {
        let place = self.place()?;
        let object = place.folder.join(BALLAST_NAME).display().to_string();
        place.keep_ballast().map_err(|error| unwritable(&object, &error.to_string()))
    }

    fn drop_ballast(&self) -> Result<bool> {
        let Some(place) = self.known_place()? else { return Ok(false) };
        let object = place.folder.join(BALLAST_NAME).display().to_string();
        // A disk that has become read-only keeps the file of a look at it, too.
        let removed = place.remove(TRY_NAME).and_then(|_| place.remove(BALLAST_NAME));
        removed.map_err(|error| unwritable(&object, &format!("it cannot be removed: {error}")))
    }

    fn serve_from_memory(&self, until: Instant) -> Result<()> {
        let place = self.place()?;
        let object = place.object();
        let (folder, name) = (place.folder.clone(), place.name.clone().into());
        write_private_json(Path::new(RECORD), &Record { server: place.server.id, folder, name })
            .map_err(|error| HostError::new(RECORD, format!("{error:#}")))?;
        place.uncover().about(&object)?;
        place
            .cover()
            .map_err(|error| HostError::new(&object, format!("no memory can be put over its folder: {error}")))?;
        let moved = place.compact(until);
        place.uncover().about(&object)?;
        moved
    }

    fn write_back(&self, until: Instant) -> Result<bool> {
        let Some(Record { server, .. }) = recorded() else { return Ok(false) };
        let place = self.place()?;
        let object = place.object();
        place.uncover().about(&object)?;
        if server != place.server.id || place.is_on_disk().about(&object)? {
            // That server has gone, and what it had in memory with it; or a compaction of its own has brought it back.
            return forget_record().map(|()| false);
        }
        place.try_writing().map_err(|error| unwritable(&object, &error.to_string()))?;
        place.compact(until.min(Instant::now() + COMPACT_LIMIT))?;
        match place.is_on_disk().about(&object)? {
            true => forget_record().map(|()| true),
            false => Err(HostError::new(object, "ovsdb-server says that it has written it, and has another file open")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_lock_file_names_its_database() {
        let of = |link: &str| of_lock_file(Path::new(link)).map(|(folder, name)| (folder, name.into_string().unwrap()));
        assert_eq!(of("/etc/openvswitch/.conf.db.~lock~"), Some(("/etc/openvswitch".into(), "conf.db".into())));
        for other in ["/etc/openvswitch/conf.db", "/run/openvswitch/ovsdb-server.pid", ".conf.db.~lock~", "/..~lock~"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn a_folder_of_somebody_else_is_not_that_of_the_database() {
        let directory = tempfile::tempdir().unwrap();
        let own = fs::metadata(directory.path()).unwrap().uid();
        let opened = || open_folder(std::process::id().cast_signed(), directory.path()).unwrap();
        assert!(is_of(&opened(), own).unwrap());
        assert_eq!(is_of(&opened(), own + 1).unwrap(), own == 0);
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(!is_of(&opened(), own).unwrap(), "/tmp is nobody's");
    }

    #[test]
    fn the_switch_s_database_is_known_by_its_schema() {
        let file = |name: &str| {
            let schema = format!("{{\"cksum\":\"1 2\",\"name\":\"{name}\",\"tables\":{{}}}}\n");
            format!("OVSDB JSON {} 0123\n{schema}OVSDB JSON 4 0\n\"name\":\"Open_vSwitch\"", schema.len()).into_bytes()
        };
        assert!(is_of_switch(&file("Open_vSwitch")));
        assert!(!is_of_switch(&file("hardware_vtep")));
        assert!(!is_of_switch(b"") && !is_of_switch(b"OVSDB JSON\n") && !is_of_switch(b"root:x:0:0\n"));
    }

    #[test]
    fn a_mount_of_ours_is_known_by_its_source() {
        let line = "90 25 0:47 / /etc/open\\040vswitch rw,nosuid shared:3 - tmpfs ovs-graceful-database rw,size=16384k";
        assert_eq!(covered(line), Some("/etc/open vswitch".into()));
        assert_eq!(covered(&line.replace(SOURCE, "tmpfs")), None);
        assert_eq!(unescaped("a\\b\\1"), PathBuf::from("a\\b\\1"));
    }

    #[test]
    fn what_is_written_beside_the_database_goes_again() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("conf.db"), "x").unwrap();
        let me = std::process::id().cast_signed();
        let mut server = crate::host::real::ovsdb_server::tests::server();
        server.id = super::super::procfs::identity(me).unwrap();
        let canonical = folder.path().canonicalize().unwrap();
        let opened = open_folder(me, &canonical).unwrap();
        let place = Place { server, folder: canonical, opened, name: "conf.db".into() };
        let names = || fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        place.try_writing().unwrap();
        assert_eq!(names(), ["conf.db"]);
        for _ in 0..2 {
            place.keep_ballast().unwrap();
            let ballast = fs::metadata(folder.path().join(BALLAST_NAME)).unwrap();
            assert_eq!((ballast.len(), ballast.mode() & 0o777), (BALLAST, 0o600));
            assert!(ballast.blocks() * 512 >= BALLAST);
        }
        assert!(place.remove(BALLAST_NAME).unwrap() && !place.remove(BALLAST_NAME).unwrap());
        assert!(!place.is_on_disk().unwrap(), "nobody has it open");
        let _held = File::open(place.path()).unwrap();
        assert!(place.is_on_disk().unwrap());
    }
}

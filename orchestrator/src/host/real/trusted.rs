//! Files that nobody but root can have put where they are, found without a moment in which they could be exchanged.
//!
//! A path is walked from descriptor to descriptor (openat(2), O_PATH and O_NOFOLLOW). Each directory in which a name is
//! looked up has to belong to root, and nobody else may write to it: then only root can change what the name stands for.
//! Symbolic links are followed by hand, under the same rule. A POSIX ACL that lets somebody else write shows in the bits
//! of the group (acl(5)).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{openat, readlinkat, OFlag};
use nix::sys::stat::Mode;
use nix::unistd::geteuid;

/// As many links as the kernel follows (MAXSYMLINKS in include/linux/namei.h).
const LINKS_MAX: usize = 40;
/// To write for the group and for others.
const OTHERS_WRITE: u32 = 0o022;
/// To execute for anybody.
const EXECUTE: u32 = 0o111;

/// Where a path leads to: the open file, and its path without a link.
#[derive(Debug)]
pub struct Place {
    /// Opened with O_PATH.
    pub file: OwnedFd,
    /// Without symbolic links, below the root directory of the walk.
    pub path: PathBuf,
}

impl Place {
    /// What it is.
    pub fn metadata(&self) -> io::Result<fs::Metadata> {
        fs::metadata(by_descriptor(&self.file))
    }
}

/// Root, or whoever this process runs as.
pub fn is_ours(user: u32) -> bool {
    user == 0 || user == geteuid().as_raw()
}

/// Does it belong to root, and may nobody else write to it?
pub fn only_ours(file: &fs::Metadata) -> bool {
    is_ours(file.uid()) && file.mode() & OTHERS_WRITE == 0
}

/// The program at `path`, which nobody but root can have put there; its path without a link.
pub fn program(path: &Path) -> io::Result<PathBuf> {
    program_below(File::open("/")?.as_fd(), path)
}

/// The same below another root directory.
pub fn program_below(root: BorrowedFd, path: &Path) -> io::Result<PathBuf> {
    let place = walk(root, path)?;
    let file = place.metadata()?;
    if !file.is_file() || file.mode() & EXECUTE == 0 {
        return Err(refused(&place.path, "it is no program"));
    }
    match only_ours(&file) {
        true => Ok(place.path),
        false => Err(refused(&place.path, "others than root may write to it")),
    }
}

/// The directory at `path`, whoever it belongs to: nobody but root can make another of it.
pub fn directory(path: &Path) -> io::Result<Place> {
    let place = walk(File::open("/")?.as_fd(), path)?;
    match place.metadata()?.is_dir() {
        true => Ok(place),
        false => Err(refused(&place.path, "it is no directory")),
    }
}

/// The regular file at `path` for reading: no link, and root's or `owner`'s, as is the directory it lies in.
pub fn open(path: &Path, owner: u32) -> io::Result<File> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(refused(path, "it is no file"));
    };
    let folder = directory(folder)?;
    let theirs = |user: u32| is_ours(user) || user == owner;
    if !theirs(folder.metadata()?.uid()) {
        return Err(refused(&folder.path, "it belongs to neither root nor the daemon's user"));
    }
    open_regular(
        openat(&folder.file, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?,
        |file| theirs(file.uid()),
    )
}

/// Opens for reading what a descriptor with O_PATH stands for, where that is a regular file that is `wanted`: a FIFO
/// would have us wait, and a device may do something when it is opened.
pub fn open_regular(file: OwnedFd, wanted: impl Fn(&fs::Metadata) -> bool) -> io::Result<File> {
    let found = fs::metadata(by_descriptor(&file))?;
    let path = fs::read_link(by_descriptor(&file)).unwrap_or_default();
    if !found.is_file() {
        return Err(refused(&path, "it is no regular file"));
    }
    if !wanted(&found) {
        return Err(refused(&path, "it belongs to somebody else"));
    }
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(by_descriptor(&file))
}

/// All of a file that may have `most` bytes, and no more.
pub fn read(file: impl Read, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    match u64::try_from(bytes.len()).is_ok_and(|length| length <= most) {
        true => Ok(bytes),
        false => Err(io::Error::other(format!("it has more than {most} bytes"))),
    }
}

/// What a descriptor stands for, by a path.
pub fn by_descriptor(file: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn refused(path: &Path, why: &str) -> io::Error {
    io::Error::other(format!("{}: {why}", path.display()))
}

fn walk(root: BorrowedFd, path: &Path) -> io::Result<Place> {
    let root = root.try_clone_to_owned()?;
    let mut todo = names(path);
    let mut done: Vec<(OsString, OwnedFd)> = Vec::new();
    let mut links = 0;
    while let Some(name) = todo.pop() {
        if name == ".." {
            done.pop();
            continue;
        }
        let here = done.last().map_or(&root, |(_, folder)| folder);
        let object = || path_of(&done).join(&name);
        if !only_ours(&fs::metadata(by_descriptor(here))?) {
            return Err(refused(&path_of(&done), "others than root may write to this directory"));
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let next = openat(here, name.as_os_str(), flags, Mode::empty()).map_err(|error| {
            io::Error::new(io::Error::from(error).kind(), format!("{}: {error}", object().display()))
        })?;
        // Of a link itself this is O_PATH's own answer: the path of a descriptor would be followed.
        match readlinkat(&next, "") {
            Ok(_) if links == LINKS_MAX => return Err(refused(path, "too many symbolic links")),
            Ok(target) => {
                links += 1;
                let target = Path::new(&target);
                if target.is_absolute() {
                    done.clear();
                }
                todo.extend(names(target));
            }
            // EINVAL and ENOENT: it is no link.
            Err(_) => done.push((name, next)),
        }
    }
    let path = path_of(&done);
    Ok(Place { file: done.pop().map_or(root, |(_, file)| file), path })
}

/// The names of a path, the last one first.
fn names(path: &Path) -> Vec<OsString> {
    let name = |part: Component| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().rev().filter_map(name).collect()
}

fn path_of(done: &[(OsString, OwnedFd)]) -> PathBuf {
    std::iter::once(OsStr::new("/")).chain(done.iter().map(|(name, _)| name.as_os_str())).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::{symlink, PermissionsExt};

    /// A directory of which every part is root's: that of this test's program, where its own parts are.
    pub fn of_root() -> Option<tempfile::TempDir> {
        let program = std::env::current_exe().ok()?;
        let folder = tempfile::tempdir_in(program.parent()?).ok()?;
        walk(File::open("/").ok()?.as_fd(), &folder.path().join("..")).ok()?;
        Some(folder)
    }

    fn write(path: &Path, mode: u32) {
        fs::write(path, "x").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_program_of_the_package_is_found_through_its_links() {
        let found = program(Path::new("/bin/sh")).unwrap();
        assert_eq!(found, fs::canonicalize("/bin/sh").unwrap());
        assert_eq!(program(Path::new("/usr/../bin/./sh")).unwrap(), found);
        assert_eq!(program(Path::new("/nonexistent/sh")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(program(Path::new("/etc/passwd")).unwrap_err().to_string().contains("no program"));
        assert!(program(Path::new("/usr")).unwrap_err().to_string().contains("no program"));
    }

    #[test]
    fn what_others_may_write_to_is_refused_wherever_that_is() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("sh");
        write(&inside, 0o755);
        // Everybody may write to /tmp.
        assert!(program(&inside).unwrap_err().to_string().contains("this directory"));
        let Some(folder) = of_root() else { return };
        let (own, link) = (folder.path().join("own"), folder.path().join("link"));
        write(&own, 0o755);
        assert_eq!(program(&own).unwrap(), own.canonicalize().unwrap());
        symlink(&inside, &link).unwrap();
        assert!(program(&link).unwrap_err().to_string().contains("this directory"), "a link that leads out");
        write(&own, 0o775);
        assert!(program(&own).unwrap_err().to_string().contains("may write to it"));
        write(&own, 0o755);
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(program(&own).unwrap_err().to_string().contains("this directory"));
        let circle = folder.path().join("circle");
        symlink("circle", &circle).unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(program(&circle).unwrap_err().to_string().contains("too many"));
    }

    #[test]
    fn only_a_regular_file_of_root_or_the_daemon_is_read() {
        let Some(folder) = of_root() else { return };
        let at = |name: &str| folder.path().join(name);
        write(&at("file"), 0o644);
        assert_eq!(read(open(&at("file"), 4711).unwrap(), 1).unwrap(), b"x");
        symlink(at("file"), at("link")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        nix::unistd::mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
        for name in ["link", "folder", "fifo"] {
            assert!(open(&at(name), 4711).unwrap_err().to_string().contains("no regular file"), "{name}");
        }
        assert_eq!(open(&at("none"), 4711).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(open(Path::new("/dev/null"), 4711).is_err());
        if geteuid().is_root() {
            std::os::unix::fs::chown(at("file"), Some(4711), None).unwrap();
            assert!(open(&at("file"), 4711).is_ok() && open(&at("file"), 4712).is_err());
            std::os::unix::fs::chown(folder.path(), Some(4711), None).unwrap();
            assert!(open(&at("file"), 4711).is_ok() && open(&at("file"), 4712).is_err());
        }
    }

    #[test]
    fn no_more_is_read_than_there_may_be() {
        assert_eq!(read(&b"1234"[..], 4).unwrap(), b"1234");
        assert!(read(&b"12345"[..], 4).is_err() && read(File::open("/dev/zero").unwrap(), 100).is_err());
    }
}

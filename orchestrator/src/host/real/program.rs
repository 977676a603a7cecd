//! Keeps the program of a running daemon for the way back: its executable, and those of the shared objects that it has
//! mapped which a package upgrade has replaced or removed since.
//!
//! All is read through /proc/PID, which reaches the very files that the process runs, whatever their names have become.
//! Kept is what belongs to root and what nobody else may write to: it runs as root when the run goes back.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{symlink, DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::fcntl::{open, OFlag};
use nix::sys::stat::Mode;

use super::command::Question;
use super::container::Root;
use super::credentials::Credentials;
use super::{procfs, trusted, unixctl};
use crate::host::{Context, Daemon, HostError, Result, SavedProgram};

/// More is no list of mappings, bytes: a process has 65,530 at most (vm.max_map_count).
const MAPS_MAX: u64 = 64 << 20;

/// Shared objects of the C library are taken from the disk: its loader is named in the executable and must be of the
/// same build as they are, and a newer C library runs what was built for an older one.
const C_LIBRARY: &[&str] = &[
    "ld-",
    "ld.",
    "ld64.",
    "libc.",
    "libc-",
    "libm.",
    "libm-",
    "libmvec",
    "libpthread",
    "libdl.",
    "libdl-",
    "librt.",
    "librt-",
    "libresolv",
    "libnss_",
    "libutil.",
    "libutil-",
    "libanl",
    "libBrokenLocale",
    "libthread_db",
    "linux-vdso",
];

/// The folder of a kept program, held open. Nobody but root may look into the folders above it: a daemon's user reaches it
/// by the descriptor, `/proc/self/fd/N`.
#[derive(Debug)]
pub(super) struct Folder(OwnedFd);

impl Folder {
    /// That of `program`.
    pub fn of(program: &Path) -> io::Result<Self> {
        let folder = program.parent().unwrap_or(Path::new("/"));
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Folder(open(folder, flags, Mode::empty())?))
    }

    /// Its path for a process that has it open.
    pub fn path(&self) -> PathBuf {
        trusted::by_descriptor(&self.0)
    }

    /// Has it outlive execve(2). To be called between fork and exec: a system call only.
    pub fn keep_open(&self) -> io::Result<()> {
        // SAFETY: the call takes integers; the descriptor is ours.
        match unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_SETFD, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Keeps the program of `daemon` in the first of `folders` from which it runs.
pub(super) fn save(daemon: &Daemon, version: &str, folders: &[PathBuf], until: Instant) -> Result<SavedProgram> {
    let mut errors = Vec::new();
    for folder in folders {
        match save_into(daemon, version, folder, until) {
            Ok(saved) => return Ok(saved),
            Err(error) => {
                // Where it does not run it is of no use.
                let _ = fs::remove_dir_all(folder);
                errors.push(error.to_string());
            }
        }
    }
    Err(HostError::new(daemon.exe.display().to_string(), format!("it could not be kept: {}", errors.join("; ")))
        .remedy("free some space, or, where it is mounted noexec, `mount -o remount,exec /run`"))
}

/// The program of a daemon that runs in a container stays where it is: the container's files are held. Its path there.
pub(super) fn keep_in_container(
    root: &Arc<Root>,
    daemon: &Daemon,
    version: &str,
    until: Instant,
) -> Result<SavedProgram> {
    let program = program_inside(daemon);
    let program = trusted::program_below(root.descriptor(), &program).about(program.display().to_string())?;
    let question = Question {
        program: program.clone(),
        root: Some(root.clone()),
        folder: None,
        library_path: None,
        credentials: Credentials::of_question(daemon),
    };
    is_version(&program.to_string_lossy(), &question.ask(until)?, version)?;
    Ok(SavedProgram { program, libraries: None })
}

/// What the kernel calls the executable is seen from our root directory, where that leads to it.
fn program_inside(daemon: &Daemon) -> PathBuf {
    let root = fs::read_link(format!("/proc/{}/root", daemon.id.pid)).unwrap_or_else(|_| "/".into());
    match daemon.exe.strip_prefix(&root) {
        Ok(inside) => Path::new("/").join(inside),
        Err(_) => daemon.exe.clone(),
    }
}

fn save_into(daemon: &Daemon, version: &str, folder: &Path, until: Instant) -> Result<SavedProgram> {
    let object = folder.display().to_string();
    let pid = daemon.id.pid;
    make(folder).about(&object)?;
    // A daemon takes the name of its PID file and control socket from that of its program.
    let program = folder.join(daemon.kind.program());
    let exe = of_root(Path::new(&format!("/proc/{pid}/exe"))).about(daemon.exe.display().to_string())?;
    // A user can give a file of root's any name, by a mount in a namespace of his own.
    let may_lie = !trusted::is_ours(daemon.uid);
    if may_lie && !is_where_it_is_named(&exe, &daemon.exe).unwrap_or(false) {
        return Err(HostError::new(
            daemon.exe.display().to_string(),
            "it does not lie where it says, in a folder of root's",
        ));
    }
    copy(&exe, &program).about(&object)?;
    let replaced = replaced_objects(pid, may_lie).about(&object)?;
    let libraries = folder.join("lib");
    if !replaced.is_empty() {
        make(&libraries).about(&object)?;
    }
    for (mapped, name) in &replaced {
        let kept = libraries.join(name);
        copy(mapped, &kept).about(&object)?;
        link_names(&kept, name).about(&object)?;
    }
    // What was read through its number was all its own.
    if procfs::identity(pid).ok() != Some(daemon.id) {
        return Err(HostError::new(format!("process {pid}"), "it has ended meanwhile"));
    }
    let saved = SavedProgram { program, libraries: (!replaced.is_empty()).then_some(libraries) };
    prove(&saved, daemon, version, until)?;
    Ok(saved)
}

/// Those above it are root's alone; this one the daemon's user has to read where he is another ([`Folder`]).
fn make(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
}

/// A file that belongs to root and that nobody else may write to.
fn of_root(path: &Path) -> io::Result<File> {
    let place = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    if !trusted::only_ours(&fs::metadata(trusted::by_descriptor(&place))?) {
        return Err(io::Error::other("it does not belong to root, or others may write to it: root does not run it"));
    }
    trusted::open_regular(place, trusted::only_ours)
}

/// Written aside and renamed: a program that runs cannot be written to.
fn copy(from: &File, to: &Path) -> io::Result<()> {
    let aside = to.with_extension("new");
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut copy = OpenOptions::new().write(true).create_new(true).mode(0o700).open(&aside)?;
    io::copy(&mut &*from, &mut copy)?;
    copy.set_permissions(fs::Permissions::from_mode(0o755))?;
    fs::rename(&aside, to)
}

/// Does it run, and is it the version that runs now?
fn prove(saved: &SavedProgram, daemon: &Daemon, version: &str, until: Instant) -> Result<()> {
    let program = saved.program.to_string_lossy();
    let reached = reach(saved).about(&*program)?;
    let question = Question {
        program: reached.program,
        root: None,
        folder: Some(reached.folder),
        library_path: reached.libraries.map(|path| path.display().to_string()),
        credentials: Credentials::of_question(daemon),
    };
    let text = question.ask(until);
    let text = text.map_err(|e| HostError::new(&*program, format!("the copy does not run: {}", e.cause)))?;
    is_version(&program, &text, version)
}

/// A kept program by paths that lead to it from a process of any user that has `folder` open.
pub(super) struct Reached {
    pub folder: Folder,
    pub program: PathBuf,
    pub libraries: Option<PathBuf>,
}

/// See [`Reached`].
pub(super) fn reach(saved: &SavedProgram) -> io::Result<Reached> {
    let folder = Folder::of(&saved.program)?;
    let inside = |path: &PathBuf| path.file_name().map(|name| folder.path().join(name));
    let program = inside(&saved.program).ok_or_else(|| io::Error::other("it is no program"))?;
    let libraries = saved.libraries.as_ref().and_then(inside);
    Ok(Reached { program, libraries, folder })
}

fn is_version(program: &str, text: &str, version: &str) -> Result<()> {
    match unixctl::parse_version(text) {
        Some(said) if said == version => Ok(()),
        _ => Err(HostError::new(program, format!("it says {:?}, and {version} runs", text.lines().next()))),
    }
}

/// The shared objects of root's that the process has mapped and that are no longer what their names stand for, but for
/// those of the C library: each, and its name. A process maps whatever it likes; what is not root's is passed over.
fn replaced_objects(pid: i32, may_lie: bool) -> io::Result<Vec<(File, String)>> {
    let exe = identity(Path::new(&format!("/proc/{pid}/exe")))?;
    let mut found: Vec<(File, String)> = Vec::new();
    for Mapped { file, path } in mapped_code(pid)? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let of_the_c_library = C_LIBRARY.iter().any(|prefix| name.starts_with(prefix));
        if of_the_c_library || found.iter().any(|(_, known)| known == name) {
            continue;
        }
        if identity(&file)? == exe || !is_replaced(&file, &path)? {
            continue;
        }
        let Ok(file) = of_root(&file) else { continue };
        if !may_lie || is_where_it_is_named(&file, &path).unwrap_or(false) {
            found.push((file, name.to_owned()));
        }
    }
    Ok(found)
}

/// Is, or was, the file in this very folder of ours, which is root's? In another mount namespace the same names lead
/// elsewhere; a mount has its number there.
fn is_where_it_is_named(file: &File, path: &Path) -> io::Result<bool> {
    let folder = trusted::directory(path.parent().unwrap_or(Path::new("/")))?;
    Ok(trusted::only_ours(&folder.metadata()?) && mount_of(file)? == mount_of(&folder.file)?)
}

fn mount_of(file: &impl AsRawFd) -> io::Result<u64> {
    procfs::mount_of(std::process::id().cast_signed(), file.as_raw_fd().to_string().as_ref())
}

/// The files whose code the process has mapped, its executable among them, that are no longer what their names stand for.
pub(super) fn replaced(pid: i32) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for Mapped { file, path } in mapped_code(pid)? {
        let name = path.display().to_string();
        if !found.contains(&name) && is_replaced(&file, &path)? {
            found.push(name);
        }
    }
    Ok(found)
}

/// Code of a file that a process has mapped.
struct Mapped {
    /// The very file, through /proc.
    file: PathBuf,
    /// What its name was.
    path: PathBuf,
}

fn mapped_code(pid: i32) -> io::Result<Vec<Mapped>> {
    let maps = trusted::read(File::open(format!("/proc/{pid}/maps"))?, MAPS_MAX)?;
    let maps = String::from_utf8_lossy(&maps);
    let mapped = maps.lines().filter_map(executable_mapping);
    // Memory that was made executable is no file of a package (memfd_create(2), shmem).
    let of_a_file = mapped.filter(|(_, path)| !path.starts_with("/memfd:") && !path.starts_with("/dev/"));
    Ok(of_a_file
        .map(|(range, path)| Mapped { file: format!("/proc/{pid}/map_files/{range}").into(), path: path.into() })
        .collect())
}

fn is_replaced(file: &Path, path: &Path) -> io::Result<bool> {
    Ok(identity(path).ok() != Some(identity(file)?))
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|file| (file.dev(), file.ino()))
}

/// Address range (as map_files names it) and path of a line of /proc/PID/maps that maps code of a file.
fn executable_mapping(line: &str) -> Option<(String, &str)> {
    let mut words = line.splitn(6, ' ');
    let (range, permissions) = (words.next()?, words.next()?);
    let path = words.nth(3)?.trim_start();
    if !permissions.contains('x') || !path.starts_with('/') {
        return None;
    }
    // maps pads addresses with zeros to eight digits, map_files does not (fs/proc/base.c, "%lx-%lx").
    let (from, to) = range.split_once('-')?;
    let bare = |address: &str| format!("{:x}", u64::from_str_radix(address, 16).unwrap_or_default());
    Some((format!("{}-{}", bare(from), bare(to)), path.strip_suffix(" (deleted)").unwrap_or(path)))
}

/// An object is looked for by its soname, which its file name begins with: `libx.so.1` of `libx.so.1.2.3`.
fn link_names(kept: &Path, name: &str) -> io::Result<()> {
    let Some(at) = name.find(".so.") else { return Ok(()) };
    let ends = name.match_indices('.').map(|(dot, _)| dot).filter(|dot| *dot > at + 3);
    for end in ends {
        let link = kept.with_file_name(&name[..end]);
        match symlink(name, &link) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::real::daemons::describe;
    use crate::host::real::procfs;
    use crate::host::DaemonKind;

    #[test]
    fn code_of_files_is_found_in_the_maps() {
        let line = "7f00aa000000-7f00ab000000 r-xp 00001000 fe:00 1234                       /usr/lib/libssl.so.3";
        assert_eq!(executable_mapping(line), Some(("7f00aa000000-7f00ab000000".into(), "/usr/lib/libssl.so.3")));
        let gone = "00400000-00500000 r-xp 00000000 fe:00 99 /usr/lib/lib a.so.1 (deleted)";
        assert_eq!(executable_mapping(gone), Some(("400000-500000".into(), "/usr/lib/lib a.so.1")));
        assert_eq!(executable_mapping("7f00aa000000-7f00ab000000 r--p 0 fe:00 1234 /usr/lib/libssl.so.3"), None);
        assert_eq!(executable_mapping("7ffd000-7ffe000 r-xp 00000000 00:00 0                  [vdso]"), None);
        assert_eq!(executable_mapping("7ffd000-7ffe000 r-xp 00000000 00:00 0 "), None);
    }

    #[test]
    fn an_object_is_found_by_every_beginning_of_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let kept = folder.path().join("libx-3.1.so.0.0.3");
        fs::write(&kept, "x").unwrap();
        for _ in 0..2 {
            link_names(&kept, "libx-3.1.so.0.0.3").unwrap();
        }
        for name in ["libx-3.1.so.0.0", "libx-3.1.so.0"] {
            assert_eq!(fs::read_link(folder.path().join(name)).unwrap(), Path::new("libx-3.1.so.0.0.3"));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn the_program_of_a_running_process_is_kept_and_proved() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("ovs-vswitchd");
        // A script's process runs its interpreter: a program that tells a version as ovs-vswitchd does is needed.
        fs::copy("/bin/sleep", &program).unwrap();
        let mut child = start(&program);
        let id = procfs::identity(child.id() as i32).unwrap();
        // What an upgrade does: the file is gone, the process is not.
        fs::remove_file(&program).unwrap();
        let daemon = describe(DaemonKind::OvsVswitchd, id).unwrap();
        assert!(daemon.exe_deleted);
        let until = Instant::now() + std::time::Duration::from_secs(20);
        let text = crate::host::real::command::run_well("/bin/sleep", &["--version"], None, until).unwrap();
        let version = unixctl::parse_version(&text).unwrap();
        let folders = [PathBuf::from("/proc/nowhere"), directory.path().join("kept")];
        for _ in 0..2 {
            let saved = save(&daemon, &version, &folders, until).unwrap();
            assert_eq!(saved, SavedProgram { program: folders[1].join("ovs-vswitchd"), libraries: None });
        }
        assert_eq!(fs::read(folders[1].join("ovs-vswitchd")).unwrap(), fs::read("/bin/sleep").unwrap());
        let error = save(&daemon, "0.0.0", &folders, until).unwrap_err().to_string();
        assert!(error.contains("0.0.0 runs"), "{error}");
        assert!(!folders[1].exists(), "what is of no use does not stay");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(save(&daemon, &version, &folders, until).is_err());
    }

    #[test]
    fn a_program_that_others_may_write_to_is_not_kept() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("ovs-vswitchd");
        fs::copy("/bin/sleep", &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o775)).unwrap();
        let mut child = start(&program);
        let daemon = describe(DaemonKind::OvsVswitchd, procfs::identity(child.id() as i32).unwrap()).unwrap();
        let until = Instant::now() + std::time::Duration::from_secs(20);
        let error = save(&daemon, "9.1", &[directory.path().join("kept")], until).unwrap_err().to_string();
        assert!(error.contains("root does not run it"), "{error}");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_question_is_asked_as_the_user_of_the_daemon() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("closed/ovs-vswitchd");
        make(program.parent().unwrap()).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let script = "#!/bin/sh\nid -u; id -G; grep -E 'NoNewPrivs|CapEff' /proc/self/status; env | sort\n";
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = std::process::Command::new("/bin/sleep").arg("30").spawn().unwrap();
        let daemon = describe(DaemonKind::OvsVswitchd, procfs::identity(child.id() as i32).unwrap()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let daemon = Daemon { uid: 4711, gid: 4712, ..daemon };
        let saved = SavedProgram { program, libraries: None };
        let error = prove(&saved, &daemon, "1", Instant::now() + std::time::Duration::from_secs(20)).unwrap_err();
        assert!(error.to_string().contains("\"4711\""), "{error}");
        let reached = reach(&saved).unwrap();
        let credentials = Credentials::of_question(&daemon);
        let question = Question {
            program: reached.program,
            root: None,
            folder: Some(reached.folder),
            library_path: None,
            credentials,
        };
        let text = question.ask(Instant::now() + std::time::Duration::from_secs(20)).unwrap();
        let (head, environment) = text.split_at(text.find("LC_ALL").unwrap());
        assert_eq!(head, "4711\n4712\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n");
        let names: Vec<&str> = environment.lines().filter_map(|line| line.split('=').next()).collect();
        assert_eq!(names, ["LC_ALL", "PATH", "PWD"], "{environment}");
    }

    /// A file that was just written is busy while another test's fork holds it open. The starter goes on before the kernel
    /// has mapped the program's code (`vfork(2)`).
    fn start(program: &Path) -> std::process::Child {
        let child = loop {
            match std::process::Command::new(program).arg("300").spawn() {
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                child => break child.unwrap(),
            }
        };
        while mapped_code(child.id() as i32).unwrap().is_empty() {
            std::thread::yield_now();
        }
        child
    }

    #[test]
    fn a_file_lies_where_the_same_mount_leads() {
        let sh = fs::canonicalize("/bin/sh").unwrap();
        let file = File::open(&sh).unwrap();
        assert!(is_where_it_is_named(&file, &sh).unwrap());
        assert!(!is_where_it_is_named(&file, Path::new("/proc/sh")).unwrap(), "another mount");
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let copied = directory.path().join("sh");
        fs::copy(&sh, &copied).unwrap();
        assert!(
            !is_where_it_is_named(&File::open(&copied).unwrap(), &copied).unwrap_or(false),
            "a folder of everybody's"
        );
    }

    #[test]
    fn nothing_of_our_own_process_has_been_replaced() {
        // map_files is root's (proc_map_files_get_link in fs/proc/base.c).
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let found = replaced_objects(std::process::id() as i32, false).unwrap();
        assert!(found.is_empty(), "{found:?}");
        let found = replaced(std::process::id() as i32).unwrap();
        // The test's own program may be built anew beside it.
        assert!(found.iter().all(|path| path.contains("/deps/")), "{found:?}");
    }

    #[test]
    fn a_file_that_was_replaced_under_a_running_process_is_named() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("ovs-vswitchd");
        fs::copy("/bin/sleep", &program).unwrap();
        let mut child = start(&program);
        let pid = child.id() as i32;
        assert!(replaced(pid).unwrap().is_empty());
        fs::copy("/bin/sleep", directory.path().join("new")).unwrap();
        fs::rename(directory.path().join("new"), &program).unwrap();
        assert_eq!(replaced(pid).unwrap(), [program.display().to_string()]);
        fs::remove_file(&program).unwrap();
        assert_eq!(replaced(pid).unwrap(), [program.display().to_string()]);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

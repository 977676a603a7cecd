//! Keeps the program of a running daemon for the way back: its executable, and those of the shared objects that it has
//! mapped which a package upgrade has replaced or removed since.
//!
//! All is read through /proc/PID, which reaches the very files that the process runs, whatever their names have become.

use std::fs;
use std::io;
use std::os::unix::fs::{symlink, DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::container::Root;
use super::{command, unixctl};
use crate::host::{Context, Daemon, HostError, Result, SavedProgram};

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
    let text = command::run_well_in(root, &program.to_string_lossy(), &["--version"], until)?;
    is_version(&program.to_string_lossy(), &text, version)?;
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
    let name = daemon.exe.file_name().unwrap_or(daemon.kind.program().as_ref());
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).about(&object)?;
    let program = folder.join(name);
    copy(Path::new(&format!("/proc/{pid}/exe")), &program).about(&object)?;
    let replaced = replaced_objects(pid).about(&object)?;
    let libraries = folder.join("lib");
    if !replaced.is_empty() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&libraries).about(&object)?;
    }
    for (mapped, name) in &replaced {
        let kept = libraries.join(name);
        copy(mapped, &kept).about(&object)?;
        link_names(&kept, name).about(&object)?;
    }
    let saved = SavedProgram { program, libraries: (!replaced.is_empty()).then_some(libraries) };
    prove(&saved, version, until)?;
    Ok(saved)
}

/// Written aside and renamed: a program that runs cannot be written to.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let aside = to.with_extension("new");
    fs::copy(from, &aside)?;
    fs::rename(&aside, to)
}

/// Does it run, and is it the version that runs now?
fn prove(saved: &SavedProgram, version: &str, until: Instant) -> Result<()> {
    let program = saved.program.to_string_lossy();
    let text = match saved.library_path(None) {
        // Ours is not the environment it will run in.
        Some(path) => {
            let library_path = format!("LD_LIBRARY_PATH={path}");
            command::run_well("env", &[library_path.as_str(), &program, "--version"], None, until)
        }
        None => command::run_well(&program, &["--version"], None, until),
    };
    let text = text.map_err(|e| HostError::new(&*program, format!("the copy does not run: {}", e.cause)))?;
    is_version(&program, &text, version)
}

fn is_version(program: &str, text: &str, version: &str) -> Result<()> {
    match unixctl::parse_version(text) {
        Some(said) if said == version => Ok(()),
        _ => Err(HostError::new(program, format!("it says {:?}, and {version} runs", text.lines().next()))),
    }
}

/// The shared objects that the process has mapped and that are no longer what their names stand for, but for those of the
/// C library: how to reach each, and its name.
fn replaced_objects(pid: i32) -> io::Result<Vec<(PathBuf, String)>> {
    let exe = identity(Path::new(&format!("/proc/{pid}/exe")))?;
    let mut found: Vec<(PathBuf, String)> = Vec::new();
    for Mapped { file, path } in mapped_code(pid)? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let of_the_c_library = C_LIBRARY.iter().any(|prefix| name.starts_with(prefix));
        if of_the_c_library || found.iter().any(|(_, known)| known == name) {
            continue;
        }
        if identity(&file)? != exe && is_replaced(&file, &path)? {
            found.push((file, name.to_owned()));
        }
    }
    Ok(found)
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
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
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
        let text = command::run_well("/bin/sleep", &["--version"], None, until).unwrap();
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

    /// A file that was just written is busy while another test's fork holds it open.
    fn start(program: &Path) -> std::process::Child {
        loop {
            match std::process::Command::new(program).arg("30").spawn() {
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                child => return child.unwrap(),
            }
        }
    }

    #[test]
    fn nothing_of_our_own_process_has_been_replaced() {
        // map_files is root's (proc_map_files_get_link in fs/proc/base.c).
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let found = replaced_objects(std::process::id() as i32).unwrap();
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

//! The file systems that a run writes to.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::statvfs::{statvfs, FsFlags};

use crate::host::surroundings::CheckOptions;
use crate::report::{Findings, Name};

/// Less than this free is refused, bytes: `/var/lib` takes the snapshot and the old binaries (about 30 MiB).
const STATE_MIN: u64 = 64 << 20;
/// Less than this free is refused, bytes: `/run` takes the journal while nothing may wait for a disk.
const RUN_MIN: u64 = 16 << 20;
/// What is written to see whether it can be: a block.
const TRIAL: [u8; 4096] = [0; 4096];

/// Is there room, and can it be written to?
pub(super) fn look(options: &CheckOptions, found: &mut Findings) {
    space(&options.state_directory, STATE_MIN, found);
    space(&options.run_directory, RUN_MIN, found);
}

/// Free space for those without root's reserve, which is none of ours to use up.
fn space(path: &Path, least: u64, found: &mut Findings) {
    let Some(there) = path.ancestors().find(|path| path.exists()) else { return };
    match statvfs(there) {
        Ok(stat) => {
            let free = stat.blocks_available() * stat.fragment_size();
            let read_only = stat.flags().contains(FsFlags::ST_RDONLY);
            let full = free < least;
            // Where it is full that is what is said.
            let written = if read_only || full { Ok(()) } else { try_to_write(there) };
            judge(path, free, least, read_only, written, found);
        }
        Err(e) => found.refuse(Name::Space, path.display(), e, "look at that file system"),
    }
}

fn judge(path: &Path, free: u64, least: u64, read_only: bool, written: io::Result<()>, found: &mut Findings) {
    let object = path.display();
    if read_only {
        let remedy = writable_again(path);
        return found.refuse(Name::Space, object, "its file system is read-only", &remedy);
    }
    if free < least {
        let cause = format!("{} MiB free, {} MiB are needed", free >> 20, least >> 20);
        return found.refuse(Name::Space, object, cause, "make room on that file system");
    }
    match written {
        Ok(()) => found.ok(Name::Space, object, format!("{} MiB free", free >> 20)),
        Err(error) => {
            let cause = format!("a file cannot be written there: {error}");
            found.refuse(Name::Space, object, cause, &writable_again(path));
        }
    }
}

fn writable_again(path: &Path) -> String {
    format!(
        "see in `dmesg` why it is so, and then `mount -o remount,rw \"$(findmnt -n -o TARGET -T {})\"`",
        path.ancestors().find(|path| path.exists()).unwrap_or(path).display()
    )
}

/// Writes a file that has no name, and so goes with the last who has it open, whatever becomes of us.
fn try_to_write(folder: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder) {
        Ok(mut file) => file.write_all(&TRIAL),
        // A file system that has no such files, or a kernel that does not know them there.
        Err(e) if [Errno::EOPNOTSUPP, Errno::EISDIR].iter().any(|no| e.raw_os_error() == Some(*no as i32)) => {
            try_by_name(folder)
        }
        Err(e) => Err(e),
    }
}

fn try_by_name(folder: &Path) -> io::Result<()> {
    let path = folder.join(format!(".ovs-graceful-trial-{}", std::process::id()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    let written = file.write_all(&TRIAL);
    fs::remove_file(&path)?;
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Finding, Severity};

    fn one(judge: impl FnOnce(&mut Findings)) -> Finding {
        let mut found = Findings::default();
        judge(&mut found);
        let [one] = found.into_inner().try_into().unwrap();
        one
    }

    #[test]
    fn a_file_system_that_is_read_only_is_refused_with_the_command_that_changes_it() {
        let here = Path::new("/");
        let finding = one(|found| judge(here, 1 << 40, 1, true, Ok(()), found));
        assert_eq!((finding.name, finding.severity), (Name::Space, Severity::Refused));
        assert!(finding.cause.contains("read-only") && finding.remedy.contains("`mount -o remount,rw"), "{finding}");
        let full = one(|found| judge(here, 1 << 20, 2 << 20, false, Ok(()), found));
        assert!(full.cause.contains("1 MiB free, 2 MiB"), "{full}");
    }

    #[test]
    fn a_folder_that_takes_no_file_is_refused_however_much_is_free() {
        // Not read-only, and root can make no file there either.
        let finding = one(|found| space(Path::new("/proc/sys"), 0, found));
        assert_eq!(finding.severity, Severity::Refused);
        assert!(finding.cause.contains("a file cannot be written there"), "{finding}");
    }

    #[test]
    fn the_trial_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        // One that a run has yet to make.
        assert_eq!(one(|found| space(&dir.path().join("none/yet"), 0, found)).severity, Severity::Ok);
        try_by_name(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

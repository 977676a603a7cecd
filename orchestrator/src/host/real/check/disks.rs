//! The file systems that a run writes to.

use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::host::surroundings::CheckOptions;
use crate::report::{Findings, Name};

/// Less than this free is refused, bytes: `/var/lib` takes the snapshot and the old binaries (about 30 MiB).
const STATE_MIN: u64 = 64 << 20;
/// Less than this free is refused, bytes: `/run` takes the journal while nothing may wait for a disk.
const RUN_MIN: u64 = 16 << 20;

/// Is there room?
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
            if free >= least {
                return found.ok(Name::Space, path.display(), format!("{} MiB free", free >> 20));
            }
            let cause = format!("{} MiB free, {} MiB are needed", free >> 20, least >> 20);
            found.refuse(Name::Space, path.display(), cause, "make room on that file system");
        }
        Err(e) => found.refuse(Name::Space, path.display(), e, "look at that file system"),
    }
}

//! The disk of the database (docs/database-disk.md).

use crate::host::database_disk::{DatabaseFile, MEMORY_REMEDY};
use crate::host::HostError;
use crate::report::{Findings, Name};

/// What was found of it.
pub(super) fn look(looked: Result<DatabaseFile, HostError>, found: &mut Findings) {
    let name = Name::DatabaseDisk;
    match looked {
        Ok(file) => {
            let (object, free) = (file.path.display(), file.free >> 10);
            if file.in_memory {
                let cause = "ovsdb-server serves the database from memory: its disk could not be written";
                return found.refuse(name, object, cause, MEMORY_REMEDY);
            }
            if file.free < file.needed() {
                let cause = format!("{free} KiB free, {} KiB are needed", file.needed() >> 10);
                return found.refuse(name, object, cause, "make room on that file system");
            }
            found.ok(name, object, format!("it can be written, {free} KiB free"));
        }
        Err(error) if error.unwritable => found.refuse(name, error.object, error.cause, &error.remedy),
        Err(error) => {
            let cause = format!("{}: no room can be kept for the removal of flow-restore-wait", error.cause);
            found.warn(name, error.object, cause, "see to it that the disk of the database has room");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::database_disk::DISK_REMEDY;
    use crate::report::Severity;

    fn file(free: u64) -> DatabaseFile {
        DatabaseFile { path: "/etc/openvswitch/conf.db".into(), size: 100 << 10, free, in_memory: false }
    }

    fn severity(looked: Result<DatabaseFile, HostError>) -> Severity {
        let mut found = Findings::default();
        look(looked, &mut found);
        let found = found.into_inner();
        assert!(found[0].severity == Severity::Ok || !found[0].remedy.is_empty(), "{found:?}");
        found[0].severity
    }

    #[test]
    fn a_disk_without_room_or_that_is_read_only_is_refused_with_a_remedy() {
        let needed = file(0).needed();
        assert_eq!(severity(Ok(file(needed))), Severity::Ok);
        assert_eq!(severity(Ok(file(needed - 1))), Severity::Refused);
        assert_eq!(severity(Ok(DatabaseFile { in_memory: true, ..file(needed) })), Severity::Refused);
        let read_only = HostError::unwritable("/etc/openvswitch/conf.db", "Read-only file system").remedy(DISK_REMEDY);
        assert_eq!(severity(Err(read_only)), Severity::Refused);
        let unknown = HostError::new("ovsdb-server (pid 7)", "which file is not known");
        assert_eq!(severity(Err(unknown)), Severity::Warning);
    }
}

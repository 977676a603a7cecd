//! Sockets whose mode or owner somebody has changed: whoever starts next makes them anew.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::switch::named;
use crate::host::kept::printable;
use crate::host::real::assemble::{DATABASE_SOCKET, RUN_DIRECTORY};
use crate::host::{Daemon, DatabaseFacts};
use crate::report::{Findings, Name};

/// What a daemon makes a socket with (`bind_unix_socket`, lib/socket-util-unix.c); its umask takes some of that away.
const MODE: u32 = 0o770;
/// How a server is given a socket that systemd holds, which outlives it.
const HANDED: &str = "--remote=pfd:";

/// Looks at the sockets of the bridges and, where the server is to be replaced, at that of the database.
pub(super) fn look(vswitchd: &Daemon, server: Option<&Daemon>, facts: Option<&DatabaseFacts>, found: &mut Findings) {
    let folder = Path::new(RUN_DIRECTORY);
    let bridges = facts.into_iter().flat_map(|facts| &facts.bridges);
    let mut all: Vec<(PathBuf, &Daemon)> =
        bridges.map(|bridge| (folder.join(format!("{}.mgmt", bridge.name)), vswitchd)).collect();
    let own = server.filter(|server| !server.argv.iter().any(|word| word.starts_with(HANDED)));
    all.extend(own.map(|server| (DATABASE_SOCKET.into(), server)));
    let changed = all.iter().filter(|(path, daemon)| is_changed(path, daemon));
    let changed: Vec<String> = changed.filter_map(|(path, _)| path.file_name()?.to_str().map(printable)).collect();
    if !changed.is_empty() {
        let cause = format!(
            "mode or owner were changed by hand, and are as at first after the restart, for users who are not root: {}",
            named(&changed)
        );
        let remedy = "none: change them again afterwards, or make the users members of the daemon's group";
        found.warn(Name::Sockets, format!("sockets in {RUN_DIRECTORY}"), cause, remedy);
    }
}

/// Is it a socket, and not as `daemon` makes one?
fn is_changed(path: &Path, daemon: &Daemon) -> bool {
    let Ok(now) = fs::symlink_metadata(path) else { return false };
    let is_as_made = (now.mode() & 0o7777, now.uid(), now.gid()) == (MODE & !daemon.umask, daemon.uid, daemon.gid);
    now.file_type().is_socket() && !is_as_made
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::host::real::ovsdb_server::tests::server;

    #[test]
    fn a_socket_is_as_it_was_made_or_it_was_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("br0.mgmt");
        let _socket = UnixListener::bind(&path).unwrap();
        let made = fs::symlink_metadata(&path).unwrap();
        let daemon = Daemon { umask: 0o022, uid: made.uid(), gid: made.gid(), ..server() };
        let set = |mode: u32| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        set(0o750);
        assert!(!is_changed(&path, &daemon));
        assert!(is_changed(&path, &Daemon { umask: 0, ..daemon.clone() }));
        assert!(is_changed(&path, &Daemon { gid: daemon.gid + 1, ..daemon.clone() }));
        set(0o770);
        assert!(is_changed(&path, &daemon));
        assert!(!is_changed(&folder.path().join("none"), &daemon));
        // What is no socket is nobody's.
        assert!(!is_changed(folder.path(), &Daemon { umask: 0o7777, ..daemon }));
    }
}

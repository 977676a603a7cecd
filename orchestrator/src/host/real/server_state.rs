//! What an ovsdb-server serves, as it says itself, and as the files that it has open say.
//!
//! A server notes what is changed in it at run time in a file without a name, for its monitor (`config_tmpfile`,
//! ovsdb/ovsdb-server.c). Names of databases are in the files themselves: `list-dbs` does not say which file is whose.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::fcntl::{open, OFlag};
use nix::sys::stat::Mode;
use serde_json::Value;

use super::database_file::locked;
use super::{procfs, trusted, unixctl};
use crate::host::kept::{Given, ServerState, Sources, SWITCH_DATABASE};
use crate::host::logs::Logs;
use crate::host::{Context, Daemon, Result};

/// No note of a server is longer, bytes.
const NOTE_MAX: u64 = 1 << 20;
/// No schema is longer, bytes: that of OVS 3.5 has 30,000.
const SCHEMA_MAX: u64 = 1 << 20;
/// Where ovs-ctl takes the host's type and version from (`set_defaults`, utilities/ovs-ctl.in).
const OPTIONS: [&str; 2] = ["/etc/openvswitch/system-type.conf", "/etc/openvswitch/system-version.conf"];
const RELEASE: &str = "/etc/os-release";

/// A regular file that a process has open.
struct Open {
    device: u64,
    inode: u64,
    links: u64,
    file: File,
}

/// File systems whose server answers when it likes: a process may have mounted one itself.
const SERVED_BY_OTHERS: [&str; 7] = ["fuse", "nfs", "cifs", "smb", "ceph", "9p", "afs"];

/// The mounts of process `pid` whose files could have us wait, by their numbers (`/proc/PID/mountinfo`, proc(5)).
fn served_by_others(pid: i32) -> io::Result<BTreeSet<u64>> {
    let number = |line: &str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let waits = SERVED_BY_OTHERS.iter().any(|kind| file_system.starts_with(kind));
        waits.then(|| mount.split(' ').next()?.parse().ok()).flatten()
    };
    Ok(fs::read_to_string(format!("/proc/{pid}/mountinfo"))?.lines().filter_map(number).collect())
}

/// Every regular file that process `pid` has open. What is none is not opened, and nothing of a network: it could have us
/// wait.
fn open_files(pid: i32) -> io::Result<Vec<Open>> {
    let others = served_by_others(pid)?;
    let regular = |entry: fs::DirEntry| {
        if others.contains(&procfs::mount_of(pid, &entry.file_name()).ok()?) {
            return None;
        }
        let descriptor = open(&entry.path(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
        let file = trusted::open_regular(descriptor, |_| true).ok()?;
        let metadata = file.metadata().ok()?;
        Some(Open { device: metadata.dev(), inode: metadata.ino(), links: metadata.nlink(), file })
    };
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().filter_map(regular).collect())
}

/// What the server has noted, where it is found.
fn note(server: &Daemon, files: &[Open]) -> Option<ServerState> {
    let nameless = files.iter().filter(|open| open.links == 0);
    nameless
        .filter_map(|open| {
            let bytes = trusted::read(&open.file, NOTE_MAX).ok()?;
            ServerState::noted(&serde_json::from_slice::<Value>(&bytes).ok()?, server)
        })
        .next()
}

/// What is served, with the names of the databases; what the server says is not asked for yet.
fn served(server: &Daemon) -> io::Result<ServerState> {
    let files = open_files(server.id.pid)?;
    let mut state =
        note(server, &files).unwrap_or_else(|| ServerState { given: Given::of(server), ..ServerState::default() });
    if state.databases.is_empty() {
        for (folder, name) in locked(server.id.pid)? {
            state.add_database(Path::new("/"), &folder.join(name).to_string_lossy());
        }
        state.replication = state.given.replication.clone();
    }
    let root = format!("/proc/{}/root", server.id.pid);
    for (path, served) in state.databases.iter_mut().filter(|(path, _)| path.starts_with('/')) {
        let Ok(there) = fs::metadata(format!("{root}{path}")) else { continue };
        let is_it = |open: &&Open| (open.device, open.inode) == (there.dev(), there.ino());
        served.name = files.iter().find(is_it).and_then(|open| database_name(&open.file).ok().flatten());
    }
    Ok(state)
}

/// What it serves, to whom, and how.
pub fn read(server: &Daemon, until: Instant) -> Result<ServerState> {
    let ask = |command: &str| unixctl::command(server, &format!("ovsdb-server/{command}"), &[], until);
    let (remotes, names) = (ask("list-remotes")?, ask("list-dbs")?);
    // Not before 2.17.
    let logged = ask("tlog-list").unwrap_or_default();
    let mut state = served(server).about("ovsdb-server")?;
    state.take_in(&remotes, &names, &logged);
    Ok(state)
}

/// How a daemon logs.
pub fn logs(daemon: &Daemon, until: Instant) -> Result<Logs> {
    let ask = |command: &str| unixctl::command(daemon, command, &[], until);
    Ok(Logs::parse(&ask("vlog/list")?, &ask("vlog/list-pattern")?))
}

/// The file of the switch's database that the server has open, by a name of its own that leads to it.
pub fn database_file(server: &Daemon) -> Option<PathBuf> {
    let state = served(server).ok()?;
    let is_it = |name: &Option<String>| name.as_deref() == Some(SWITCH_DATABASE);
    state.databases.into_iter().find(|(_, served)| is_it(&served.name)).map(|(path, _)| path.into())
}

/// Have the files that ovs-ctl describes the host by changed since this server was started? `more` are those of its unit's
/// options. Where the time of its start is not known, they may have.
pub fn sources(server: &Daemon, more: &[PathBuf]) -> Sources {
    let Ok(started) = procfs::started(server.id) else { return Sources { options: true, release: true } };
    // By its inode's change: a package gives its files the time at which they were made.
    let changed = |path: &Path| fs::metadata(path).is_ok_and(|file| file.ctime() > started);
    let options = OPTIONS.iter().map(Path::new).chain(more.iter().map(PathBuf::as_path)).any(changed);
    Sources { options, release: changed(Path::new(RELEASE)) }
}

/// The name of the database whose file this is: in its schema, or where it is clustered in its header (ovsdb(5)).
fn database_name(file: &File) -> io::Result<Option<String>> {
    let mut head = Vec::new();
    file.take(SCHEMA_MAX).read_to_end(&mut head)?;
    Ok(name_in(&head))
}

/// `OVSDB JSON length hash` or `OVSDB CLUSTER length hash`, then JSON.
fn name_in(head: &[u8]) -> Option<String> {
    let end = head.iter().position(|byte| *byte == b'\n')?;
    let (line, rest) = head.split_at(end);
    let words: Vec<&str> = std::str::from_utf8(line).ok()?.split(' ').collect();
    let ["OVSDB", "JSON" | "CLUSTER", length, ..] = words[..] else { return None };
    let json = rest.get(1..)?.get(..length.parse().ok()?)?;
    let value: Value = serde_json::from_slice(json).ok()?;
    value.get("name")?.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;
    use crate::host::real::ovsdb_server::tests::server;

    fn database(name: &str, kind: &str) -> Vec<u8> {
        let schema = format!("{{\"cksum\":\"1 2\",\"name\":\"{name}\",\"tables\":{{}}}}\n");
        format!("OVSDB {kind} {} 0123\n{schema}OVSDB JSON 4 0\n", schema.len()).into_bytes()
    }

    #[test]
    fn a_database_is_named_in_its_file() {
        for kind in ["JSON", "CLUSTER"] {
            assert_eq!(name_in(&database("Extra", kind)).as_deref(), Some("Extra"));
        }
        let cut = database("Extra", "JSON");
        for other in [&b""[..], b"OVSDB JSON\n", b"OVSDB JSON 3 0\n{}", b"root:x:0:0\n", &cut[..40]] {
            assert_eq!(name_in(other), None);
        }
    }

    /// This process has open what a server would have.
    #[test]
    fn what_is_served_is_read_from_what_is_open() {
        let folder = tempfile::tempdir().unwrap();
        let folder_path = folder.path().canonicalize().unwrap();
        let at = |name: &str| folder_path.join(name);
        for (file, name) in [("conf.db", "Open_vSwitch"), ("extra.db", "Extra"), ("gone.db", "Gone")] {
            fs::write(at(file), database(name, "JSON")).unwrap();
        }
        let _open: Vec<File> = ["conf.db", "extra.db", "gone.db"].map(|file| File::open(at(file)).unwrap()).into();
        fs::remove_file(at("gone.db")).unwrap();
        let mut note = tempfile::tempfile().unwrap();
        let files: Vec<String> = ["conf.db", "extra.db", "gone.db"].map(|file| at(file).display().to_string()).into();
        let text = serde_json::json!({"remotes": ["ptcp:1"], "db_filenames": files, "is_backup": false});
        note.write_all(text.to_string().as_bytes()).unwrap();
        note.rewind().unwrap();
        let id = procfs::identity(std::process::id().cast_signed()).unwrap();
        let argv = vec!["ovsdb-server".to_owned(), "--no-chdir".to_owned()];
        let environment = vec![("OVS_DBDIR".to_owned(), folder_path.display().to_string())];
        let daemon = Daemon { id, argv, environment, ..server() };
        let state = served(&daemon).unwrap();
        let names: Vec<_> = state.databases.values().map(|served| served.name.as_deref()).collect();
        assert_eq!(names, [Some("Open_vSwitch"), Some("Extra"), None]);
        assert_eq!(database_file(&daemon), Some(at("conf.db")));
        assert!(state.given.databases.contains(&at("conf.db").display().to_string()));
    }
}

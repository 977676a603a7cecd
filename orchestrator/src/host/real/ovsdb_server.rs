//! Replaces ovsdb-server while ovs-vswitchd goes on forwarding. Always before a standby is started: a standby that
//! waits for the lock would get it (hazards 17).

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{chown, fchown, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::credentials::Credentials;
use super::{command, procfs, server_state, trusted};
use crate::host::clock::Clock;
use crate::host::kept::first_file;
use crate::host::{
    complete_job, Context, Daemon, Daemons, Database, HostError, JobKind, Result, ServiceManager, Signal, Unit,
};

/// Where `ovs-ctl` keeps the database when nothing on the command line says otherwise.
const DEFAULT_FILE: &str = "/etc/openvswitch/conf.db";
/// Options of `ovs-ctl` that delete configuration at every start of ovsdb-server.
const DESTRUCTIVE: &[&str] = &["--delete-bridges", "--delete-transient-ports"];
/// Behind them on the command line, these win.
const HARMLESS: &[&str] = &["--no-delete-bridges", "--no-delete-transient-ports"];
/// Where `ovs-ctl` keeps the id of the host that it has made itself (`set_system_ids`).
const SYSTEM_ID: &str = "/etc/openvswitch/system-id.conf";
/// Between two looks at a server that starts.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Where the package has its schema when nothing in the environment says otherwise.
const DEFAULT_FOLDER: &str = "/usr/share/openvswitch";

/// The file of database Open_vSwitch that `server` serves: the one that it has open, whatever its command line and its
/// environment say. Where that is not found, its command line; of one that is not root's where the kernel says that it has
/// that file open.
pub fn database_file(server: &Daemon) -> PathBuf {
    let believed = |path: &PathBuf| trusted::is_ours(server.uid) || procfs::has_open(server.id.pid, path);
    let given = || Some(first_file(server)).filter(believed);
    server_state::database_file(server).or_else(given).unwrap_or_else(|| DEFAULT_FILE.into())
}

/// The database's file for reading. That of a server which is not root's lies in a folder of its user, who can put
/// anything in its place.
pub fn open_database(server: &Daemon, file: &Path) -> io::Result<File> {
    match trusted::is_ours(server.uid) {
        true => File::open(file),
        false => trusted::open(&file.canonicalize()?, server.uid),
    }
}

/// The schema of the installed version.
pub fn schema_file(server: &Daemon) -> PathBuf {
    let set = server.environment.iter().find(|(key, _)| key == "OVS_PKGDATADIR").map(|(_, value)| value.as_str());
    let set = set.filter(|_| trusted::is_ours(server.uid));
    Path::new(set.unwrap_or(DEFAULT_FOLDER)).join("vswitch.ovsschema")
}

/// The words of the unit's command and environment files, options apart from their values.
fn words(unit: &Unit) -> BTreeSet<String> {
    let files = unit.environment_files.iter().filter_map(|path| fs::read_to_string(path).ok());
    let lines: Vec<String> = files
        .flat_map(|text| text.lines().map(str::trim).map(str::to_owned).collect::<Vec<_>>())
        .filter(|line| !line.starts_with('#') && !line.starts_with(';'))
        .collect();
    let apart = |text: &String| -> Vec<String> {
        text.split(|c: char| c.is_whitespace() || "=\"'".contains(c)).map(str::to_owned).collect()
    };
    lines.iter().chain(&unit.exec_start).flat_map(apart).collect()
}

/// The options in the unit's command or environment files that would delete configuration.
pub fn destructive_options(unit: &Unit) -> Vec<&'static str> {
    let words = words(unit);
    DESTRUCTIVE.iter().filter(|option| words.contains(**option)).copied().collect()
}

/// The option of `ovs-ctl` that leaves the host the id which it has in the database: `set_system_ids` would write another
/// one over it, which stands in `file`, and OVN would see another chassis. None where it would not.
fn own_system_id(unit: &Unit, set: Option<&String>, file: &Path) -> Option<String> {
    let id = set.filter(|id| is_system_id(id))?;
    let is_its = fs::read_to_string(file).is_ok_and(|text| text.trim() == id);
    let given = unit.exec_start.iter().any(|word| word.ends_with("ovs-ctl")) && words(unit).contains("--system-id");
    (given && !is_its).then(|| format!("--system-id={id}"))
}

/// It becomes a word of a command line that a shell reads.
fn is_system_id(id: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    (1..=255).contains(&id.len()) && id.bytes().all(plain)
}

/// The files in which the unit says what ovs-ctl is to write of the system's type and version; none where it does not.
pub fn row_options(unit: &Unit) -> Vec<PathBuf> {
    let words = words(unit);
    let says = ["--system-type", "--system-version"].iter().any(|option| words.contains(*option));
    let files = unit.environment_files.iter().chain(&unit.fragment).chain(&unit.drop_ins);
    if says {
        files.cloned().collect()
    } else {
        Vec::new()
    }
}

/// Replaces `old` by a server of the installed version. Returns that one, which answers by then. `system_id` is the host's,
/// as the database has it.
pub fn replace(
    daemons: &dyn Daemons,
    services: &dyn ServiceManager,
    database: &dyn Database,
    clock: &dyn Clock,
    old: &Daemon,
    system_id: Option<&String>,
    until: Instant,
) -> Result<Daemon> {
    match services.owner(old, until)? {
        Some(unit) => {
            let system_id = own_system_id(&unit, system_id, Path::new(SYSTEM_ID));
            by_unit(daemons, services, &unit, system_id, until)?;
        }
        None => by_hand(daemons, database, clock, old, until)?,
    }
    wait_new(daemons, clock, old, until)
}

/// Waits until ovs-vswitchd is in step with the database.
pub fn wait_in_step(database: &dyn Database, until: Instant) -> Result<()> {
    let next_cfg = database.bump(until)?;
    database.wait_in_step(next_cfg, until)
}

fn by_unit(
    daemons: &dyn Daemons,
    services: &dyn ServiceManager,
    unit: &Unit,
    system_id: Option<String>,
    until: Instant,
) -> Result<()> {
    let lost = lost_sockets(daemons, services, unit, until)?;
    let harmless = if destructive_options(unit).is_empty() { &[] } else { HARMLESS };
    let words: Vec<&str> = harmless.iter().copied().chain(system_id.as_deref()).collect();
    if !words.is_empty() {
        services.append_to_start(&unit.name, &words, until)?;
    }
    let result = match lost.is_empty() {
        true => complete_job(services, &unit.name, JobKind::Restart, until),
        false => with_new_sockets(services, unit, &lost, until),
    };
    // Whatever came of it, the unit goes back to what the package wrote.
    let undone = if words.is_empty() { Ok(()) } else { services.end_hand_over(&unit.name, until) };
    result.and(undone)
}

/// The units of sockets that systemd hands to the server, but that nobody reaches any more: a server which was started
/// beside systemd, such as by `ovs-ctl restart` in ExecReload=, has put its own in their place. One that the unit starts
/// would listen where nobody asks.
fn lost_sockets(
    daemons: &dyn Daemons,
    services: &dyn ServiceManager,
    unit: &Unit,
    until: Instant,
) -> Result<Vec<String>> {
    let mut active = Vec::new();
    for socket in unit.triggered_by.iter().filter(|name| name.ends_with(".socket")) {
        if services.unit(socket, until)?.is_some_and(|socket| socket.active_state == "active") {
            active.push(socket.clone());
        }
    }
    Ok(if active.is_empty() || daemons.systemd_listens()? { Vec::new() } else { active })
}

/// Restarts the server with its sockets, which systemd makes anew only while the server is away.
fn with_new_sockets(services: &dyn ServiceManager, unit: &Unit, sockets: &[String], until: Instant) -> Result<()> {
    complete_job(services, &unit.name, JobKind::Stop, until)?;
    let made = sockets.iter().try_for_each(|socket| complete_job(services, socket, JobKind::Restart, until));
    // Without them it listens by itself.
    complete_job(services, &unit.name, JobKind::Start, until).and(made)
}

/// Ends the server and starts it as it was, converting the database in between as `ovs-ctl` would, but never replacing
/// it by an empty one.
fn by_hand(
    daemons: &dyn Daemons,
    database: &dyn Database,
    clock: &dyn Clock,
    old: &Daemon,
    until: Instant,
) -> Result<()> {
    let versions = daemons.versions(old, until)?;
    // Asked while it has its file open.
    let file = database_file(old);
    daemons.keep_listening(old)?;
    daemons.signal(old.id, Signal::Terminate)?;
    if !daemons.wait_end(old.id, until)? {
        return Err(HostError::timeout(format!("ovsdb-server (pid {})", old.id.pid), "waiting for its end"));
    }
    // An error here must not leave the host without a server: it is told after the start.
    let converted = convert(old, &file, &schema_file(old), until);
    let mut starting = daemons.start_like(old)?;
    if !starting.wait(until)? {
        return Err(HostError::timeout("ovsdb-server", "starting it").remedy("see its log"));
    }
    converted?;
    wait_new(daemons, clock, old, until)?;
    if versions.running != versions.installed {
        let row = json!({"ovs_version": versions.installed});
        let update = json!({"op": "update", "table": "Open_vSwitch", "where": [], "row": row});
        database.transact(vec![update], until)?;
    }
    Ok(())
}

/// Converts the database where the installed schema asks for it, keeping a copy beside it and its owner. That of a server
/// which is not root's is converted by its user.
fn convert(server: &Daemon, file: &Path, schema: &Path, until: Instant) -> Result<()> {
    let object = file.display().to_string();
    let (file_word, schema_word) = (file.to_string_lossy(), schema.to_string_lossy());
    let credentials = || (!trusted::is_ours(server.uid)).then(|| Credentials::of_question(server));
    let tool = |words: &[&str]| command::run_well_as(credentials(), "ovsdb-tool", words, until);
    if tool(&["needs-conversion", &file_word, &schema_word])?.trim() != "yes" {
        return Ok(());
    }
    let said = tool(&["db-version", &file_word])?;
    let version = schema_version(&said).about(&object)?;
    let backup = PathBuf::from(format!("{object}.backup{version}-ovs-graceful"));
    if !trusted::is_ours(server.uid) {
        // Its user chooses what these names lead to: so it is its user who writes there.
        let words = ["--no-dereference", "--remove-destination", "--", &file_word, &backup.to_string_lossy()];
        command::run_well_as(credentials(), "cp", &words, until)?;
        return tool(&["convert", &file_word, &schema_word]).map(drop);
    }
    let source = open_database(server, file).about(&object)?;
    let before = source.metadata().about(&object)?;
    keep(source, &backup).about(backup.display().to_string())?;
    tool(&["convert", &file_word, &schema_word])?;
    chown(file, Some(before.uid()), Some(before.gid())).about(object)
}

/// Numbers with dots between them (`ovsdb_parser_get_version`, RFC 7047, 3.2): it becomes part of a file's name.
fn schema_version(said: &str) -> io::Result<&str> {
    let version = said.trim();
    let numbers: Vec<&str> = version.split('.').collect();
    let is_number = |text: &&str| (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    match numbers.len() == 3 && numbers.iter().all(is_number) {
        true => Ok(version),
        false => Err(io::Error::other("ovsdb-tool does not tell the version of its schema")),
    }
}

/// A copy with the owner of `source`, never through a link.
fn keep(mut source: File, backup: &Path) -> io::Result<()> {
    let like = source.metadata()?;
    match fs::remove_file(backup) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut copy = OpenOptions::new().write(true).create_new(true).mode(like.mode() & 0o777).open(backup)?;
    io::copy(&mut source, &mut copy)?;
    fchown(&copy, Some(like.uid()), Some(like.gid()))
}

/// Waits for another server than `old` behind the socket.
fn wait_new(daemons: &dyn Daemons, clock: &dyn Clock, old: &Daemon, until: Instant) -> Result<Daemon> {
    loop {
        let last = match daemons.find_ovsdb_server() {
            Ok(server) if server.id != old.id => return Ok(server),
            Ok(_) => "the old one still answers".to_owned(),
            Err(error) => error.cause,
        };
        let left = until.saturating_duration_since(clock.now());
        if left.is_zero() {
            return Err(HostError::timeout("ovsdb-server", format_args!("waiting for the new one ({last})"))
                .remedy("see its log"));
        }
        clock.sleep(left.min(LOOK_AGAIN));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::host::{DaemonKind, ProcessId};

    /// A server about which nothing is known.
    pub fn server() -> Daemon {
        Daemon {
            kind: DaemonKind::OvsdbServer,
            id: ProcessId { pid: 0, start_time: 0 },
            exe: PathBuf::new(),
            exe_deleted: false,
            argv: vec![],
            environment: vec![],
            cwd: PathBuf::new(),
            comm: String::new(),
            nice: 0,
            limits: vec![],
            oom_score_adj: 0,
            umask: 0,
            uid: 0,
            gid: 0,
            groups: vec![],
            capabilities: 0,
            cgroup: String::new(),
            monitor: None,
            pid_file: PathBuf::new(),
            control: PathBuf::new(),
            log_file: None,
            own_pid: 0,
            contained: false,
        }
    }

    #[test]
    fn a_version_of_a_schema_leads_to_no_other_folder() {
        assert_eq!(schema_version("8.3.1\n").unwrap(), "8.3.1");
        for other in ["", "8.3", "/../../cron.hourly/x8.3.0", "8.3.0/x", "8.3.0\n8.3.0", "8..0", "8.3.00000000000"] {
            assert!(schema_version(other).is_err(), "{other}");
        }
    }

    #[test]
    fn a_copy_of_the_database_is_written_through_no_link() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("conf.db"), "database").unwrap();
        fs::write(at("other"), "other").unwrap();
        std::os::unix::fs::symlink(at("other"), at("backup")).unwrap();
        for _ in 0..2 {
            keep(File::open(at("conf.db")).unwrap(), &at("backup")).unwrap();
            assert!(fs::symlink_metadata(at("backup")).unwrap().is_file());
            assert_eq!(fs::read(at("backup")).unwrap(), b"database");
            assert_eq!(fs::read(at("other")).unwrap(), b"other");
        }
    }

    #[test]
    fn a_host_keeps_the_id_that_it_has_in_the_database() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("system-id.conf");
        fs::write(&file, "from-the-file\n").unwrap();
        let start = ["/usr/share/openvswitch/scripts/ovs-ctl", "--system-id=random", "start", "$OVS_CTL_OPTS"];
        let unit = |start: &[&str]| Unit {
            exec_start: start.iter().map(|word| (*word).to_owned()).collect(),
            ..Unit::default()
        };
        let option = |start: &[&str], id: &str| own_system_id(&unit(start), Some(&id.to_owned()), &file);
        assert_eq!(option(&start, "chassis-7").as_deref(), Some("--system-id=chassis-7"));
        assert_eq!(option(&start, "from-the-file"), None);
        assert_eq!(own_system_id(&unit(&start), None, &file), None);
        // Nothing overwrites it.
        assert_eq!(option(&["/usr/sbin/ovsdb-server", "--system-id=random"], "chassis-7"), None);
        assert_eq!(option(&start[..1], "chassis-7"), None);
        for id in ["", "a b", "$(reboot)", "x;y", "a\nb", "\"", &"x".repeat(256)] {
            assert_eq!(option(&start, id), None, "{id}");
        }
    }

    #[test]
    fn destructive_options_are_found_where_they_hide() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("default");
        let unit = |text: &str, start: &[&str]| {
            fs::write(&file, text).unwrap();
            Unit {
                environment_files: vec![file.clone(), "/nonexistent".into()],
                exec_start: start.iter().map(|s| s.to_string()).collect(),
                ..Unit::default()
            }
        };
        let found = |text: &str, start: &[&str]| destructive_options(&unit(text, start));
        assert_eq!(found("OVS_CTL_OPTS='--x --delete-bridges'\n", &[]), ["--delete-bridges"]);
        assert_eq!(found("OVS_CTL_OPTS=--delete-transient-ports=yes\n", &[]), ["--delete-transient-ports"]);
        assert_eq!(found("# OVS_CTL_OPTS=--delete-bridges\n", &["start", "--delete-bridges"]), ["--delete-bridges"]);
        assert!(found("# --delete-bridges\nOVS_CTL_OPTS=--no-delete-bridges\n", &["start"]).is_empty());
    }
}

//! What was changed in ovsdb-server at run time, through its control socket, and what the row of this host in its database
//! says that ovs-ctl would write anew.
//!
//! By hand is what the server's own command line does not say: an option of the unit that has changed since is not fought
//! over.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::logs::LogsByHand;
use super::{Daemon, DatabaseFacts, ProcessId};

/// The switch's own database: without it there is no run.
pub const SWITCH_DATABASE: &str = "Open_vSwitch";
/// The remote by which ovs-ctl adds the managers (`add_managers`, utilities/ovs-ctl.in), whenever it has started either
/// daemon.
pub const MANAGERS: &str = "db:Open_vSwitch,Open_vSwitch,manager_options";
/// Sockets that were handed over at the start, which no command adds.
const HANDED: &str = "pfd:";
/// How a database of another server is named (ovsdb-server(1)).
const RELAY: &str = "relay:";
/// Probe intervals that a server begins with, ms (ovsdb/replication.h, ovsdb/relay.h of OVS).
const REPLICATION_PROBE: i64 = 60_000;
const RELAY_PROBE: i64 = 5_000;
/// Options of ovsdb-server whose value may be a word of its own (`parse_options`, ovsdb/ovsdb-server.c; the short ones are
/// those of `STREAM_SSL_LONG_OPTIONS`).
const WITH_VALUE: [&str; 21] = [
    "--remote",
    "--unixctl",
    "--run",
    "--bootstrap-ca-cert",
    "--peer-ca-cert",
    "--private-key",
    "--certificate",
    "--ca-cert",
    "--ssl-protocols",
    "--ssl-ciphers",
    "--ssl-ciphersuites",
    "--ssl-server-name",
    "--sync-from",
    "--sync-exclude-tables",
    "--config-file",
    "--user",
    "--syslog-target",
    "--syslog-method",
    "-p",
    "-c",
    "-C",
];

/// Something that a daemon lacks, and the command that gives it that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lack {
    /// In words, for the report.
    pub what: String,
    /// The command of its control socket.
    pub command: String,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// Names come from whoever has set them, and go to terminals.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A database that is served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// Its name; `None` where its file was moved or removed, and nobody can tell.
    pub name: Option<String>,
    /// What adds it (`ovsdb-server/add-db`); `None` where nothing does.
    pub added_by: Option<String>,
}

/// Active-backup, and probes of other servers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replication {
    /// The active server (`--sync-from`).
    pub source: Option<String>,
    /// Tables that are left out (`--sync-exclude-tables`).
    pub excluded: Option<String>,
    /// It follows the active server.
    pub backup: bool,
}

/// What the command line of a server gives it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// `--remote`
    pub remotes: BTreeSet<String>,
    /// The files, as in [`ServerState::databases`].
    pub databases: BTreeSet<String>,
    /// Active-backup.
    pub replication: Replication,
    /// `--config-file` says all of it, and no command changes it.
    pub by_file: bool,
}

/// What a server serves, to whom, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerState {
    /// `ovsdb-server/list-remotes`
    pub remotes: BTreeSet<String>,
    /// `ovsdb-server/list-dbs`, without those that a server makes itself (`_Server`).
    pub names: BTreeSet<String>,
    /// By the absolute path of the file, or `relay:NAME`.
    pub databases: BTreeMap<String, Served>,
    /// Active-backup.
    pub replication: Replication,
    /// Probe interval of an active server, where it is told and another than at first, ms.
    pub replication_probe: Option<i64>,
    /// The same of servers that are relayed.
    pub relay_probe: Option<i64>,
    /// `DB:TABLE` whose transactions are logged (`ovsdb-server/tlog-list`).
    pub logged: BTreeSet<String>,
    /// What its command line gives it.
    pub given: Given,
}

/// What of it was changed at run time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerByHand {
    remotes_added: BTreeSet<String>,
    remotes_removed: BTreeSet<String>,
    /// Name and what adds it.
    databases_added: BTreeMap<String, Option<String>>,
    /// Files.
    databases_removed: BTreeSet<String>,
    source: Option<String>,
    excluded: Option<String>,
    replication_probe: Option<i64>,
    relay_probe: Option<i64>,
    logged: BTreeSet<String>,
}

/// The words of a command line behind the program: options with their values, and the others.
fn options(argv: &[String]) -> (Vec<(&str, &str)>, Vec<&str>) {
    let (mut options, mut others) = (Vec::new(), Vec::new());
    let mut words = argv.iter().skip(1).map(String::as_str);
    while let Some(word) = words.next() {
        match word.split_once('=') {
            _ if !word.starts_with('-') => others.push(word),
            Some((name, value)) if word.starts_with("--") => options.push((name, value)),
            _ if WITH_VALUE.contains(&word) => options.push((word, words.next().unwrap_or_default())),
            _ => options.push((word, "")),
        }
    }
    (options, others)
}

/// The folder of databases (`ovs_dbdir`, lib/dirs.c.in), as the environment of a daemon has it.
pub fn database_folder(daemon: &Daemon) -> PathBuf {
    let variable = |name: &str| daemon.environment.iter().find(|(key, _)| key == name).map(|(_, value)| value);
    match (variable("OVS_DBDIR"), variable("OVS_SYSCONFDIR")) {
        (Some(folder), _) if !folder.is_empty() => folder.into(),
        (_, Some(folder)) if !folder.is_empty() => Path::new(folder).join("openvswitch"),
        _ => "/etc/openvswitch".into(),
    }
}

impl Given {
    /// What the command line of `server` says.
    pub fn of(server: &Daemon) -> Given {
        let (options, files) = options(&server.argv);
        let value =
            |name: &str| options.iter().rev().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let has = |name: &str| options.iter().any(|(key, _)| *key == name);
        let mut databases: BTreeSet<String> = files.iter().map(|file| key(&server.cwd, file)).collect();
        let by_file = has("--config-file");
        if databases.is_empty() && !by_file && !has("--no-dbs") {
            databases.insert(first_file(server).display().to_string());
        }
        let source = value("--sync-from");
        let backup = source.is_some() && !has("--active");
        let remotes = options.iter().filter(|(key, _)| *key == "--remote").map(|(_, value)| (*value).to_owned());
        let replication = Replication { source, excluded: value("--sync-exclude-tables"), backup };
        Given { remotes: remotes.collect(), databases, replication, by_file }
    }
}

/// The file that a server serves first by its command line.
pub fn first_file(server: &Daemon) -> PathBuf {
    match options(&server.argv).1.first() {
        Some(file) => server.cwd.join(file),
        None => database_folder(server).join("conf.db"),
    }
}

/// `relay:NAME` of `relay:NAME:REMOTES`; else the absolute path.
fn key(cwd: &Path, file: &str) -> String {
    match relay(file) {
        Some((name, _)) => format!("{RELAY}{name}"),
        None => cwd.join(file).display().to_string(),
    }
}

/// Name and remotes of `relay:NAME:REMOTES`; a server of OVS before 3.3 forgets the remotes.
fn relay(file: &str) -> Option<(&str, Option<&str>)> {
    let rest = file.strip_prefix(RELAY)?;
    Some(rest.split_once(':').map_or((rest, None), |(name, remotes)| (name, Some(remotes))))
}

impl ServerState {
    /// From what a server has noted for a start after a crash (`save_config`, ovsdb/ovsdb-server.c): `db_filenames` until
    /// 3.2, `databases` since. `None` where that is no such note.
    pub fn noted(note: &Value, server: &Daemon) -> Option<ServerState> {
        let note = note.as_object()?;
        let text = |name: &str| note.get(name).and_then(Value::as_str).map(str::to_owned);
        let replication = Replication {
            source: text("sync_from"),
            excluded: text("sync_exclude"),
            backup: note.get("is_backup")?.as_bool()?,
        };
        let mut state = ServerState { given: Given::of(server), replication, ..ServerState::default() };
        match (note.get("db_filenames"), note.get("databases")) {
            (Some(Value::Array(files)), _) => {
                files.iter().filter_map(Value::as_str).for_each(|file| state.add_database(&server.cwd, file));
            }
            (_, Some(Value::Object(all))) => all.iter().for_each(|(file, how)| state.add_noted(&server.cwd, file, how)),
            _ => return None,
        }
        Some(state)
    }

    /// A database by what adds it.
    pub fn add_database(&mut self, cwd: &Path, file: &str) {
        let served = match relay(file) {
            Some((name, remotes)) => {
                Served { name: Some(name.to_owned()), added_by: remotes.is_some().then(|| file.to_owned()) }
            }
            None => Served { name: None, added_by: Some(cwd.join(file).display().to_string()) },
        };
        self.databases.insert(key(cwd, file), served);
    }

    fn add_noted(&mut self, cwd: &Path, file: &str, how: &Value) {
        let source = how.get("source").and_then(Value::as_object).and_then(|source| source.iter().next());
        let probe = source.and_then(|(_, options)| options.get("inactivity-probe")?.as_i64());
        match how.get("service-model").and_then(Value::as_str) {
            Some("relay") => {
                let word = source.map_or_else(|| format!("{RELAY}{file}"), |(from, _)| format!("{RELAY}{file}:{from}"));
                self.add_database(cwd, &word);
                self.relay_probe = probe.filter(|probe| *probe != RELAY_PROBE).or(self.relay_probe);
            }
            Some("active-backup") => {
                self.add_database(cwd, file);
                self.replication_probe = probe.filter(|probe| *probe != REPLICATION_PROBE).or(self.replication_probe);
            }
            _ => self.add_database(cwd, file),
        }
    }

    /// The answers to `list-remotes`, `list-dbs` and `tlog-list`; a server that does not know the last gives none.
    pub fn take_in(&mut self, remotes: &str, names: &str, logged: &str) {
        let lines =
            |text: &str| text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
        self.remotes = lines(remotes);
        self.names = lines(names);
        self.names.retain(|name| !name.starts_with('_'));
        let mut database = "";
        for line in logged.lines().skip(2) {
            match (line.starts_with(' '), line.split_whitespace().collect::<Vec<_>>().as_slice()) {
                (false, [name]) => database = name,
                (true, [table, "ON"]) => drop(self.logged.insert(format!("{database}:{table}"))),
                _ => {}
            }
        }
    }

    /// The names of served databases that no known file has.
    pub fn unexplained(&self) -> BTreeSet<String> {
        let known: BTreeSet<&String> = self.databases.values().filter_map(|served| served.name.as_ref()).collect();
        self.names.iter().filter(|name| !known.contains(name)).cloned().collect()
    }

    /// What was changed at run time.
    pub fn by_hand(&self) -> ServerByHand {
        let given = &self.given;
        if given.by_file {
            return ServerByHand { logged: self.logged.clone(), ..ServerByHand::default() };
        }
        let mut removed: BTreeSet<String> = given.remotes.difference(&self.remotes).cloned().collect();
        if !self.remotes.contains(MANAGERS) {
            removed.insert(MANAGERS.to_owned());
        }
        let mut added: BTreeSet<String> = self.remotes.difference(&given.remotes).cloned().collect();
        added.retain(|remote| !remote.starts_with(HANDED));
        let is_given = |file: &String| given.databases.contains(file);
        let new = self.databases.iter().filter(|(file, _)| !is_given(file));
        let databases_added = new.filter_map(|(_, served)| Some((served.name.clone()?, served.added_by.clone())));
        let unexplained = self.unexplained();
        // Of one that nobody can tell, only the name is known.
        let databases_added = databases_added.chain(unexplained.into_iter().map(|name| (name, None)));
        let is_there = |file: &String| self.databases.contains_key(file);
        let changed = |now: &Option<String>, own: &Option<String>| now.clone().filter(|_| now != own);
        ServerByHand {
            remotes_added: added,
            remotes_removed: removed,
            databases_added: databases_added.filter(|(name, _)| name != SWITCH_DATABASE).collect(),
            databases_removed: given.databases.iter().filter(|file| !is_there(file)).cloned().collect(),
            source: changed(&self.replication.source, &given.replication.source),
            excluded: changed(&self.replication.excluded, &given.replication.excluded),
            replication_probe: self.replication_probe,
            relay_probe: self.relay_probe,
            logged: self.logged.clone(),
        }
    }

    /// Would a server that is started with this command line follow another one, though this one does not by now? It would
    /// replace what it has by what that one has.
    pub fn would_be_backup(&self) -> bool {
        self.given.replication.backup && !self.replication.backup
    }
}

impl ServerByHand {
    /// The databases that nothing adds again.
    pub fn beyond_help(&self) -> Vec<&str> {
        self.databases_added.iter().filter(|(_, by)| by.is_none()).map(|(name, _)| name.as_str()).collect()
    }

    /// What a server lacks that is as `now` says, in the order in which it is put right: what nobody is to reach first.
    pub fn lacks(&self, now: &ServerState) -> Vec<Lack> {
        let mut lacks = Vec::new();
        let mut lack = |what: String, command: &str, arguments: &[&str]| {
            let arguments = arguments.iter().map(|word| (*word).to_owned()).collect();
            lacks.push(Lack {
                what: printable(&format!("ovsdb-server: {what}")),
                command: format!("ovsdb-server/{command}"),
                arguments,
            });
        };
        for remote in self.remotes_removed.intersection(&now.remotes) {
            lack(format!("remote {remote}, which was removed at run time, is there again"), "remove-remote", &[remote]);
        }
        for file in &self.databases_removed {
            let name = now.databases.get(file).and_then(|served| served.name.as_deref());
            if let Some(name) = name.filter(|name| *name != SWITCH_DATABASE) {
                lack(format!("database {name}, which was removed at run time, is there again"), "remove-db", &[name]);
            }
        }
        for (name, by) in self.databases_added.iter().filter(|(name, _)| !now.names.contains(*name)) {
            let what = format!("database {name}, which was added at run time, is not there");
            lack(what, "add-db", &[by.as_deref().unwrap_or_default()]);
        }
        for remote in self.remotes_added.difference(&now.remotes) {
            lack(format!("remote {remote}, which was added at run time, is not there"), "add-remote", &[remote]);
        }
        let replication = &now.replication;
        if let Some(source) = self.source.as_ref().filter(|source| replication.source.as_ref() != Some(source)) {
            lack(format!("active server {source} is not set"), "set-active-ovsdb-server", &[source]);
        }
        if let Some(excluded) =
            self.excluded.as_ref().filter(|excluded| replication.excluded.as_ref() != Some(excluded))
        {
            lack(format!("tables {excluded} are not left out"), "set-sync-exclude-tables", &[excluded]);
        }
        let probes = [
            (self.replication_probe, now.replication_probe, "active-ovsdb-server"),
            (self.relay_probe, now.relay_probe, "relay-source"),
        ];
        for (before, now, of) in probes {
            if let Some(probe) = before.filter(|probe| now != Some(*probe)) {
                let command = format!("set-{of}-probe-interval");
                lack(format!("probe interval of {of} is not {probe} ms"), &command, &[&probe.to_string()]);
            }
        }
        for table in self.logged.difference(&now.logged) {
            lack(format!("transactions of {table} are not logged"), "tlog-set", &[table, "on"]);
        }
        lacks
    }
}

/// What ovs-ctl writes of the host into its row whenever it starts ovsdb-server (`set_system_ids`, utilities/ovs-ctl.in).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemRow {
    /// Keys of `external_ids`: `system-id` and `rundir`.
    pub ids: BTreeMap<String, String>,
    /// `system_type`
    pub system_type: Option<String>,
    /// `system_version`
    pub system_version: Option<String>,
}

/// Has what ovs-ctl takes `system_type` and `system_version` from changed since it has written them?
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sources {
    /// `system-type.conf`, `system-version.conf` or the options of the unit: whatever is written now is right.
    pub options: bool,
    /// `os-release`: another version of the same system is right.
    pub release: bool,
}

impl SystemRow {
    /// That of a database.
    pub fn of(facts: &DatabaseFacts) -> SystemRow {
        let id = |key: &str| Some((key.to_owned(), facts.external_ids.get(key)?.clone()));
        SystemRow {
            ids: ["system-id", "rundir"].into_iter().filter_map(id).collect(),
            system_type: facts.system_type.clone(),
            system_version: facts.system_version.clone(),
        }
    }

    /// The run directory that ovs-ctl writes by itself is nobody's choice: `control` is a socket in it.
    pub fn without_own_rundir(mut self, control: &Path) -> SystemRow {
        let real = |path: &Path| path.strip_prefix("/var").map_or(path.to_owned(), |rest| Path::new("/").join(rest));
        self.ids.retain(|key, value| key != "rundir" || control.parent().map(real) != Some(real(Path::new(value))));
        self
    }

    /// What is to be there, where ovs-ctl has made `now` of it: by hand was what it would have written otherwise when it
    /// wrote the last time.
    pub fn wanted(&self, now: &SystemRow, sources: Sources) -> SystemRow {
        let mut wanted = now.clone();
        wanted.ids.extend(self.ids.clone());
        let other_type = self.system_type.is_some() && self.system_type != now.system_type;
        if other_type && !sources.options {
            wanted.system_type.clone_from(&self.system_type);
        }
        // Who has set the type has set the version with it; a version alone may be that of before an upgrade.
        if self.system_version.is_some() && !sources.options && (other_type || !sources.release) {
            wanted.system_version.clone_from(&self.system_version);
        }
        wanted
    }

    /// In words, what differs in `now`.
    pub fn differences(&self, now: &SystemRow) -> Vec<String> {
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".to_owned());
        let columns = [
            ("system_type", &self.system_type, &now.system_type),
            ("system_version", &self.system_version, &now.system_version),
        ];
        let columns = columns.into_iter().filter(|(_, before, now)| before != now);
        let columns = columns.map(|(name, before, now)| (name.to_owned(), text(before), text(now)));
        let ids = self.ids.iter().filter(|(key, value)| now.ids.get(*key) != Some(value));
        let ids =
            ids.map(|(key, value)| (format!("external_ids:{key}"), value.clone(), text(&now.ids.get(key).cloned())));
        columns
            .chain(ids)
            .map(|(name, before, now)| printable(&format!("Open_vSwitch {name}: {before} before, {now} now")))
            .collect()
    }
}

/// All that a run, or its recovery, gives the daemons back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The ovsdb-server that it was read from.
    pub server: Option<ProcessId>,
    /// What was changed in it.
    pub by_hand: ServerByHand,
    /// How it logged.
    pub server_logs: LogsByHand,
    /// How ovs-vswitchd logged.
    pub switch_logs: LogsByHand,
    /// The row of this host.
    pub row: SystemRow,
    /// Where its values come from.
    pub sources: Sources,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::host::real::ovsdb_server::tests::server as unknown;

    const LISTENS: &str = "punix:/run/openvswitch/db.sock";

    fn server(words: &str) -> Daemon {
        Daemon { argv: words.split(' ').map(str::to_owned).collect(), cwd: "/".into(), ..unknown() }
    }

    fn packaged() -> Daemon {
        server(&format!(
            "ovsdb-server /etc/openvswitch/conf.db -vconsole:emer --remote={LISTENS} --private-key=db:Open_vSwitch,SSL,private_key \
             --user ovs:ovs --remote ptcp:6641 --no-chdir --pidfile=/run/openvswitch/ovsdb-server.pid --detach"
        ))
    }

    fn named(mut state: ServerState, names: &[(&str, &str)]) -> ServerState {
        for (file, name) in names {
            state.databases.get_mut(*file).unwrap().name = Some((*name).to_owned());
        }
        state
    }

    /// As 3.1 notes it.
    fn state(server: &Daemon, remotes: &str, files: &[&str], names: &[(&str, &str)]) -> ServerState {
        let note = json!({"remotes": [], "db_filenames": files, "is_backup": false});
        let mut state = ServerState::noted(&note, server).unwrap();
        let all: Vec<&str> = names.iter().map(|(_, name)| *name).chain(["_Server"]).collect();
        state.take_in(&remotes.replace(' ', "\n"), &all.join("\n"), "");
        named(state, names)
    }

    const OWN: (&str, &str) = ("/etc/openvswitch/conf.db", SWITCH_DATABASE);

    fn told(lacks: &[Lack]) -> Vec<String> {
        lacks.iter().map(|lack| format!("{} {}", lack.command, lack.arguments.join(" "))).collect()
    }

    #[test]
    fn a_server_as_it_was_started_has_nothing_by_hand() {
        let remotes = format!("{LISTENS} ptcp:6641 {MANAGERS}");
        let state = state(&packaged(), &remotes, &["/etc/openvswitch/conf.db"], &[OWN]);
        assert_eq!(state.given.databases, ["/etc/openvswitch/conf.db".to_owned()].into());
        let by_hand = state.by_hand();
        assert_eq!(told(&by_hand.lacks(&state)), [""; 0]);
        assert_eq!(by_hand.beyond_help(), [""; 0]);
        assert!(!state.would_be_backup());
    }

    #[test]
    fn what_was_added_and_removed_is_so_again() {
        let old = state(
            &packaged(),
            &format!("{LISTENS} ptcp:6640:127.0.0.1 {MANAGERS}"),
            &["/etc/openvswitch/conf.db", "/srv/extra.db", "relay:R:tcp:192.0.2.1:1"],
            &[OWN, ("/srv/extra.db", "Extra"), ("relay:R", "R")],
        );
        let by_hand = old.by_hand();
        let fresh = state(
            &server(&format!("ovsdb-server /etc/openvswitch/conf.db --remote={LISTENS} --remote=ptcp:6641")),
            &format!("{LISTENS} ptcp:6641"),
            &["/etc/openvswitch/conf.db"],
            &[OWN],
        );
        let lacks = by_hand.lacks(&fresh);
        assert_eq!(
            told(&lacks),
            [
                "ovsdb-server/remove-remote ptcp:6641".to_owned(),
                "ovsdb-server/add-db /srv/extra.db".to_owned(),
                "ovsdb-server/add-db relay:R:tcp:192.0.2.1:1".to_owned(),
                format!("ovsdb-server/add-remote {MANAGERS}"),
                "ovsdb-server/add-remote ptcp:6640:127.0.0.1".to_owned(),
            ]
        );
        assert_eq!(by_hand.lacks(&old), []);
    }

    #[test]
    fn an_option_that_only_the_new_one_has_stays_and_a_handed_socket_is_nobody_s_to_add() {
        let old = state(&packaged(), &format!("{LISTENS} ptcp:6641 {MANAGERS}"), &[OWN.0], &[OWN]);
        let new = server("ovsdb-server /etc/openvswitch/conf.db --remote=pfd:3 --remote=ptcp:7777");
        let new = state(&new, &format!("pfd:3 ptcp:7777 {MANAGERS}"), &[OWN.0], &[OWN]);
        assert_eq!(old.by_hand().lacks(&new), []);
        // And back.
        assert_eq!(new.by_hand().lacks(&old), []);
    }

    #[test]
    fn managers_that_were_removed_stay_so() {
        let old = state(&packaged(), &format!("{LISTENS} ptcp:6641"), &[OWN.0], &[OWN]);
        let new = state(&packaged(), &format!("{LISTENS} ptcp:6641 {MANAGERS}"), &[OWN.0], &[OWN]);
        assert_eq!(told(&old.by_hand().lacks(&new)), [format!("ovsdb-server/remove-remote {MANAGERS}")]);
    }

    #[test]
    fn a_database_of_the_command_line_that_was_removed_is_removed_by_its_name() {
        let two = server(&format!("ovsdb-server /etc/openvswitch/conf.db /srv/x.db --remote={LISTENS}"));
        let old = state(&two, LISTENS, &[OWN.0], &[OWN]);
        let new = state(&two, LISTENS, &[OWN.0, "/srv/x.db"], &[OWN, ("/srv/x.db", "X")]);
        assert_eq!(told(&old.by_hand().lacks(&new)), ["ovsdb-server/remove-db X"]);
    }

    #[test]
    fn a_database_without_a_file_is_named() {
        let mut old = state(&packaged(), LISTENS, &[OWN.0, "/tmp/gone.db"], &[OWN]);
        old.names.insert("Gone".to_owned());
        assert_eq!(old.by_hand().beyond_help(), ["Gone"]);
        let new = state(&packaged(), LISTENS, &[OWN.0], &[OWN]);
        let lacks = old.by_hand().lacks(&new);
        assert!(lacks.iter().any(|lack| lack.what.contains("database Gone")), "{lacks:?}");
        // A server before 3.3 forgets where a relay comes from.
        let relays = state(&packaged(), LISTENS, &[OWN.0, "relay:R"], &[OWN, ("relay:R", "R")]);
        assert_eq!(relays.by_hand().beyond_help(), ["R"]);
    }

    #[test]
    fn both_notes_of_replication_are_read() {
        let note = json!({"remotes": {}, "databases": {
            "/etc/openvswitch/conf.db": {"service-model": "active-backup", "backup": false,
                "source": {"tcp:192.0.2.9:6640": {"inactivity-probe": 7000}}},
            "R": {"service-model": "relay", "source": {"tcp:192.0.2.1:1": {"inactivity-probe": 5000}}},
        }, "sync_from": "tcp:192.0.2.9:6640", "sync_exclude": "A:b", "is_backup": false});
        let state = ServerState::noted(&note, &packaged()).unwrap();
        assert_eq!((state.replication_probe, state.relay_probe), (Some(7000), None));
        assert_eq!(state.databases["relay:R"].added_by.as_deref(), Some("relay:R:tcp:192.0.2.1:1"));
        let lacks = told(&state.by_hand().lacks(&ServerState::default()));
        for wanted in [
            "ovsdb-server/set-active-ovsdb-server tcp:192.0.2.9:6640",
            "ovsdb-server/set-sync-exclude-tables A:b",
            "ovsdb-server/set-active-ovsdb-server-probe-interval 7000",
        ] {
            assert!(lacks.iter().any(|lack| lack == wanted), "{lacks:?}");
        }
        let backup = server("ovsdb-server --sync-from=tcp:192.0.2.9:6640");
        let state = ServerState::noted(&note, &backup).unwrap();
        assert!(state.would_be_backup());
        assert!(!told(&state.by_hand().lacks(&ServerState::default()))
            .iter()
            .any(|lack| lack.contains("set-active-ovsdb-server tcp")));
        for other in
            [json!(null), json!([1]), json!({}), json!({"is_backup": 1}), json!({"is_backup": true, "databases": 3})]
        {
            assert_eq!(ServerState::noted(&other, &packaged()), None, "{other}");
        }
    }

    #[test]
    fn a_configuration_file_says_all_of_it() {
        let by_file = server("ovsdb-server --config-file=/etc/openvswitch/x.json");
        let old = state(&by_file, "ptcp:1 ptcp:2", &["/x.db"], &[("/x.db", "X")]);
        assert_eq!(old.by_hand(), ServerByHand::default());
    }

    #[test]
    fn logged_tables_are_found_under_their_database() {
        let list = "database        table                       logging\n--------        -----                       -------\n\
                    Open_vSwitch     \n                AutoAttach                  OFF\n                Bridge                      ON\n";
        let mut state = ServerState::default();
        state.take_in("", "", list);
        assert_eq!(state.logged, ["Open_vSwitch:Bridge".to_owned()].into());
        assert_eq!(
            told(&state.by_hand().lacks(&ServerState::default())),
            ["ovsdb-server/tlog-set Open_vSwitch:Bridge on"]
        );
    }

    #[test]
    fn the_folder_of_databases_follows_the_environment() {
        let with = |environment: &[(&str, &str)]| {
            let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let given = Given::of(&Daemon { environment, ..server("ovsdb-server --detach") });
            given.databases.into_iter().next().unwrap()
        };
        assert_eq!(with(&[]), "/etc/openvswitch/conf.db");
        assert_eq!(with(&[("OVS_DBDIR", "/srv/ovs")]), "/srv/ovs/conf.db");
        assert_eq!(with(&[("OVS_SYSCONFDIR", "/opt/etc")]), "/opt/etc/openvswitch/conf.db");
    }

    #[test]
    fn the_run_directory_of_the_package_is_nobody_s_choice() {
        let control = Path::new("/run/openvswitch/ovsdb-server.7.ctl");
        let left = |value: &str| {
            let ids =
                BTreeMap::from([("rundir".to_owned(), value.to_owned()), ("system-id".to_owned(), "a".to_owned())]);
            SystemRow { ids, ..SystemRow::default() }.without_own_rundir(control).ids.into_keys().collect::<Vec<_>>()
        };
        assert_eq!(left("/var/run/openvswitch"), ["system-id"]);
        assert_eq!(left("/run/openvswitch"), ["system-id"]);
        assert_eq!(left("/srv/run"), ["rundir", "system-id"]);
    }

    #[test]
    fn a_value_is_no_database() {
        let given = Given::of(&server("ovsdb-server -p k.pem -c cert.pem -C ca.pem /srv/conf.db"));
        assert_eq!(given.databases.into_iter().collect::<Vec<_>>(), ["/srv/conf.db"]);
    }

    #[test]
    fn a_row_that_was_set_by_hand_stays_and_another_version_of_the_system_is_right() {
        let row = |kind: &str, version: &str| SystemRow {
            ids: [("rundir".to_owned(), kind.to_owned())].into(),
            system_type: Some(kind.to_owned()),
            system_version: Some(version.to_owned()),
        };
        let wanted = |before: &SystemRow, options: bool, release: bool| {
            let wanted = before.wanted(&row("debian", "13"), Sources { options, release });
            (wanted.system_type.unwrap(), wanted.system_version.unwrap())
        };
        let is = |kind: &str, version: &str| (kind.to_owned(), version.to_owned());
        assert_eq!(wanted(&row("lab", "1"), false, false), is("lab", "1"));
        assert_eq!(wanted(&row("debian", "1"), false, false), is("debian", "1"));
        assert_eq!(wanted(&row("debian", "12"), false, true), is("debian", "13"));
        assert_eq!(wanted(&row("lab", "1"), false, true), is("lab", "1"));
        assert_eq!(wanted(&row("lab", "1"), true, false), is("debian", "13"));
        let differences = row("lab", "1").differences(&row("debian", "1"));
        assert_eq!(
            differences,
            [
                "Open_vSwitch system_type: lab before, debian now",
                "Open_vSwitch external_ids:rundir: lab before, debian now"
            ]
        );
    }
}

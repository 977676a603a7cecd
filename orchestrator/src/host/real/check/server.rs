//! What a run could not give the next ovsdb-server back.

use std::time::Instant;

use super::options;
use crate::check::refuse;
use crate::host::kept::{printable, Given, ServerState};
use crate::host::real::assemble::DATABASE_SOCKET;
use crate::host::real::ovsdb_server;
use crate::host::surroundings::CheckOptions;
use crate::host::{Daemon, Daemons, ServiceManager, Unit};
use crate::report::{Findings, Name};

/// Options that ovs-ctl gives ovsdb-server alone of itself (`do_start_ovsdb`, utilities/ovs-ctl.in).
const OF_SERVER: [&str; 5] = [
    "--remote=punix:",
    "--remote=pfd:",
    "--private-key=db:Open_vSwitch,",
    "--certificate=db:Open_vSwitch,",
    "--bootstrap-ca-cert=db:Open_vSwitch,",
];
/// What makes a server listen or serve something is the more important half.
const KEPT_BY_UNIT: &str =
    "put it into the options of that unit (Debian: OVS_CTL_OPTS in /etc/default/openvswitch-switch), \
                            where it is wanted";

pub(super) fn look(
    daemons: &dyn Daemons,
    services: &dyn ServiceManager,
    server: &Daemon,
    options: &CheckOptions,
    until: Instant,
    found: &mut Findings,
) {
    let remedy =
        "see whether `ovs-appctl -t ovsdb-server ovsdb-server/list-remotes` answers; a restart of ovsdb-server helps";
    match daemons.server_state(server, until) {
        Ok(state) => judge(server, &state, options, found),
        Err(error) if options.replace_ovsdb => return refuse(Name::OvsdbServer, &error, remedy, found),
        Err(_) => return,
    }
    if options.replace_ovsdb {
        if let Ok(Some(unit)) = services.owner(server, until) {
            judge_options(server, &unit, found);
        }
    }
}

fn judge(server: &Daemon, state: &ServerState, options: &CheckOptions, found: &mut Findings) {
    let object = format!("ovsdb-server (pid {})", server.id.pid);
    if let Some(source) = state.replication.source.as_deref().filter(|_| state.replication.backup) {
        let cause = format!("it is a backup of {source}: nothing can be written into its database");
        let remedy =
            "`ovs-appctl -t ovsdb-server ovsdb-server/disconnect-active-ovsdb-server`, if it is to be the active one";
        found.refuse(Name::OvsdbServer, &object, cause, remedy);
    }
    if !options.replace_ovsdb {
        return;
    }
    if state.would_be_backup() {
        let cause =
            "its command line makes it a backup, which it is no more: the next one would replace its database by \
                     that of another server";
        let remedy = "put --active into the options of its unit, behind --sync-from, or take both out";
        found.refuse(Name::OvsdbServer, &object, cause, remedy);
    }
    for name in state.by_hand().beyond_help() {
        let cause =
            "it was added at run time, and no file of that name leads to it any more: the next ovsdb-server will not \
                     serve it";
        let name = printable(name);
        let remedy = format!("keep what is in it: `ovsdb-client backup unix:{DATABASE_SOCKET} {name} > {name}.db`");
        found.warn(Name::OvsdbServer, format!("database {name}"), cause, &remedy);
    }
}

/// What stands on its command line, and not in its unit.
fn judge_options(server: &Daemon, unit: &Unit, found: &mut Findings) {
    let own = of_its_own(server, &options::texts(unit));
    let daemon = format!("ovsdb-server (pid {})", server.id.pid);
    options::tell(Name::OvsdbServer, &daemon, &unit.name, &own, KEPT_BY_UNIT, found);
}

/// The options and files of the command line that ovs-ctl does not give of itself and that `texts` do not have.
fn of_its_own(server: &Daemon, texts: &str) -> Vec<String> {
    // The first is the switch's own, which ovs-ctl names.
    let own = ovsdb_server::database_file(server);
    let files = Given::of(server).databases.into_iter().filter(|file| own.as_os_str() != file.as_str());
    let unsaid = files.filter(|file| !options::is_said(file, texts));
    options::of_its_own(server, &OF_SERVER, texts).into_iter().chain(unsaid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::kept::{Replication, Served};
    use crate::host::real::ovsdb_server::tests::server as unknown;
    use crate::report::Severity;

    fn server(words: &str) -> Daemon {
        Daemon { argv: words.split(' ').map(str::to_owned).collect(), cwd: "/".into(), ..unknown() }
    }

    #[test]
    fn what_only_the_command_line_has_is_told() {
        let server = server(
            "ovsdb-server /etc/openvswitch/conf.db /etc/openvswitch/extra.db /srv/other.db -vfile:info --remote=punix:/x \
             --remote=ptcp:6640 --remote=ptcp:6641 --private-key=db:Open_vSwitch,SSL,private_key --no-chdir \
             --log-file=/x --pidfile=/y --detach --disable-file-column-diff",
        );
        let texts = "OVS_CTL_OPTS=\"--ovsdb-server-options=--remote=ptcp:6641\"\nEXTRA_DBS=extra.db\n";
        let own = of_its_own(&server, texts);
        assert_eq!(own, ["--remote=ptcp:6640", "--disable-file-column-diff", "/srv/other.db"]);
    }

    #[test]
    fn what_cannot_be_put_back_is_named_and_a_backup_is_refused() {
        let options = CheckOptions { replace_ovsdb: true, ..CheckOptions::default() };
        let judged = |server: &Daemon, state: &ServerState, options: &CheckOptions| {
            let mut found = Findings::default();
            judge(server, state, options, &mut found);
            found.into_inner().into_iter().map(|one| (one.severity, one.object)).collect::<Vec<_>>()
        };
        let plain = server("ovsdb-server /etc/openvswitch/conf.db");
        let mut state = ServerState { given: Given::of(&plain), ..ServerState::default() };
        assert_eq!(judged(&plain, &state, &options), []);
        state.names.insert("Gone".to_owned());
        state.databases.insert("/tmp/gone.db".to_owned(), Served { name: None, added_by: Some("/tmp/gone.db".into()) });
        assert_eq!(judged(&plain, &state, &options), [(Severity::Warning, "database Gone".to_owned())]);
        assert_eq!(judged(&plain, &state, &CheckOptions::default()), []);
        let backup = server("ovsdb-server /etc/openvswitch/conf.db --sync-from=tcp:192.0.2.1:6640");
        let active = ServerState { given: Given::of(&backup), ..ServerState::default() };
        assert_eq!(judged(&backup, &active, &options).len(), 1);
        let replication = Replication { source: Some("tcp:192.0.2.1:6640".into()), backup: true, excluded: None };
        let following = ServerState { replication, ..active };
        assert_eq!(
            judged(&backup, &following, &CheckOptions::default()).first().map(|one| one.0),
            Some(Severity::Refused)
        );
    }
}

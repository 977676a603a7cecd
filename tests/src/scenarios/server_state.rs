//! What was set at run time in ovsdb-server, in either daemon's log and in the row of the host survives a run, whatever its
//! end; beside it a stock restart, which loses each of these.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::{json, Value};

use super::{aftermath, is_chosen, network, plain, rows, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::{self, facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct ServerState {
    whole: bool,
}

/// Every case.
pub const WHOLE: ServerState = ServerState { whole: true };
/// For every `tests/all`.
pub const SAMPLE: ServerState = ServerState { whole: false };

const SAMPLED: [&str; 2] = ["done", "killed in standby"];

/// Two more databases, one of which the unit has its server serve, and a port that it has it open.
const CONFIGURE: &str = r#"cd /etc/openvswitch
    for name in Extra Removed; do
        printf '{"name":"%s","version":"1.0.0","tables":{"T":{"columns":{"c":{"type":"string"}}}}}' $name > /run/lab.schema
        rm -f $name.db; ovsdb-tool create $name.db /run/lab.schema
    done
    echo "OVS_CTL_OPTS='--ovsdb-server-options=--remote=ptcp:6641:127.0.0.1 --extra-dbs=/etc/openvswitch/Removed.db'" \
        > /etc/default/openvswitch-switch
    systemctl restart openvswitch-switch; ovs-vsctl show > /dev/null"#;
/// Of [`rows`], what is set by hand here.
const ROWS: [&str; 5] = ["remotes-added", "remotes-removed", "switch-logs", "server-logs", "system-row"];
/// And besides.
const SET: &str = r#"server() { ovs-appctl -t ovsdb-server "$@"; }
    server ovsdb-server/remove-remote ptcp:6641:127.0.0.1
    server ovsdb-server/add-db /etc/openvswitch/Extra.db
    server ovsdb-server/remove-db Removed
    server ovsdb-server/set-active-ovsdb-server tcp:127.0.0.1:7777
    server ovsdb-server/set-sync-exclude-tables Extra:T
    server ovsdb-server/tlog-set Open_vSwitch:Bridge on
    ovs-vsctl --no-wait set open_vswitch . external_ids:hostname=lab-host external_ids:system-id='"lab id"'"#;
/// What is looked at, by name.
const LOOK: [(&str, &str); 13] = [
    ("remotes", "ovs-appctl -t ovsdb-server ovsdb-server/list-remotes | grep -v -e ^pfd: -e db.sock"),
    ("ports", "ss -Hltn 'sport = 6640 or sport = 6641' | awk '{print $4}' | sort"),
    ("databases", "ovs-appctl -t ovsdb-server ovsdb-server/list-dbs"),
    ("a client of the port", "timeout 5 ovsdb-client list-dbs tcp:127.0.0.1:6640"),
    ("active server", "ovs-appctl -t ovsdb-server ovsdb-server/get-active-ovsdb-server"),
    ("logged tables", "ovs-appctl -t ovsdb-server ovsdb-server/tlog-list | grep ON"),
    ("levels of ovsdb-server", "ovs-appctl -t ovsdb-server vlog/list"),
    ("levels of ovs-vswitchd", "ovs-appctl -t ovs-vswitchd vlog/list"),
    ("patterns of ovsdb-server", "ovs-appctl -t ovsdb-server vlog/list-pattern"),
    ("patterns of ovs-vswitchd", "ovs-appctl -t ovs-vswitchd vlog/list-pattern"),
    ("type", "ovs-vsctl get open_vswitch . system_type system_version"),
    ("run directory", "ovs-vsctl get open_vswitch . external_ids:rundir"),
    ("id", "ovs-vsctl get open_vswitch . external_ids:system-id"),
];
/// What stays with every restart, and is looked at as well.
const STAYS: [(&str, &str); 1] = [("hostname", "ovs-vsctl get open_vswitch . external_ids:hostname")];

struct Case {
    name: &'static str,
    arguments: &'static [&'static str],
    /// The phase in which `harm` is done.
    phase: &'static str,
    harm: Harm,
    exit: i64,
    /// The server is another one afterwards.
    replaced: bool,
    prepare: &'static str,
    /// A database that `check` names, and that is among the differences.
    named: &'static str,
    /// What `check` says besides.
    warned: &'static str,
    tidy: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Harm {
    None,
    Abort,
    NewDies,
    SupervisorDies,
}

const BASE: Case = Case {
    name: "",
    arguments: &[],
    phase: "",
    harm: Harm::None,
    exit: 0,
    replaced: true,
    prepare: "true",
    named: "",
    warned: "",
    tidy: "true",
};

const CASES: [Case; 10] = [
    Case { name: "done", ..BASE },
    Case { name: "stop-start", arguments: &["--strategy", "stop-start"], ..BASE },
    Case { name: "without ovsdb-server", arguments: &["--no-ovsdb"], replaced: false, ..BASE },
    Case { name: "aborted in standby", phase: "standby", harm: Harm::Abort, exit: 20, ..BASE },
    Case { name: "killed in standby", phase: "standby", harm: Harm::SupervisorDies, exit: 20, ..BASE },
    Case { name: "back", phase: "restore", harm: Harm::NewDies, exit: 21, ..BASE },
    Case { name: "killed in restore", phase: "restore", harm: Harm::SupervisorDies, exit: 21, ..BASE },
    Case {
        name: "a database whose file has gone",
        exit: 30,
        prepare: "mv /etc/openvswitch/Extra.db /etc/openvswitch/Moved.db",
        named: "Extra",
        tidy: "mv /etc/openvswitch/Moved.db /etc/openvswitch/Extra.db; \
               ovs-appctl -t ovsdb-server ovsdb-server/add-db /etc/openvswitch/Extra.db",
        ..BASE
    },
    Case {
        name: "an option that the unit has no more",
        prepare: "sed -i 's/ --extra-dbs=[^ ]*Removed.db//' /etc/default/openvswitch-switch",
        warned: "runs with /etc/openvswitch/Removed.db, which this unit does not have",
        tidy: "sed -i \"s|:127.0.0.1'|:127.0.0.1 --extra-dbs=/etc/openvswitch/Removed.db'|\" /etc/default/openvswitch-switch; \
               grep -q Removed.db /etc/default/openvswitch-switch",
        ..BASE
    },
    Case {
        name: "another folder of databases",
        prepare: "mkdir -p /srv/ovs; systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server; \
                  cp -a /etc/openvswitch/conf.db /srv/ovs/; mv /etc/openvswitch/conf.db /etc/openvswitch/conf.away; \
                  echo OVS_DBDIR=/srv/ovs >> /etc/default/openvswitch-switch; systemctl start openvswitch-switch; \
                  ovs-vsctl show > /dev/null",
        ..BASE
    },
];

impl ServerState {
    fn cases<'a>(&'a self, arguments: &'a [String]) -> impl Iterator<Item = &'static Case> + 'a {
        CASES.iter().filter(|case| is_chosen(case.name, arguments, self.whole, &SAMPLED))
    }
}

impl Custom for ServerState {
    fn name(&self) -> &'static str {
        match self.whole {
            true => "server_state_whole",
            false => "server_state",
        }
    }

    fn about(&self) -> &'static str {
        match self.whole {
            true => {
                "what was set at run time in ovsdb-server, logs and the row of the host, through every end of a run"
            }
            false => "server_state_whole, a run that is done and one that is cut off",
        }
    }

    fn by_hand(&self) -> bool {
        self.whole
    }

    fn runs(&self, arguments: &[String]) -> Result<u32> {
        Ok(self.cases(arguments).count() as u32)
    }

    fn run(&self, job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        shell(CONFIGURE).context("configuring")?;
        guest::wait_for_daemons()?;
        plain::rules()?;
        let fresh = look();
        set_all()?;
        let wanted = look();
        for (name, _) in LOOK {
            outcome.check(
                format!("{name}: set by hand"),
                wanted[name] != fresh[name],
                json!([fresh[name], wanted[name]]),
            );
        }
        for case in self.cases(&job.extra_args) {
            say(&format!("server_state: {}", case.name));
            one(case, &wanted, out, outcome).with_context(|| format!("server_state: {}", case.name))?;
        }
        if self.whole {
            say("server_state: without a unit");
            without_a_unit(out, outcome)?;
        }
        say("server_state: a stock restart");
        shell("systemctl restart openvswitch-switch")?;
        guest::wait_for_daemons()?;
        let after = look();
        for (name, _) in LOOK {
            // The last case may have begun without it: then there is nothing to be lost.
            let lost = after[name] != wanted[name];
            outcome.check(format!("stock loses it: {name}"), lost, json!([wanted[name], after[name]]));
        }
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

/// Sets all of it by hand.
fn set_all() -> Result<()> {
    rows::set(&ROWS)?;
    shell(SET).map(drop).context("setting the rest by hand")
}

type Seen = BTreeMap<&'static str, String>;

fn look() -> Seen {
    let all = LOOK.iter().chain(&STAYS);
    all.map(|(name, script)| (*name, shell_lenient(&format!("timeout 20 sh -c \"{}\"", script.replace('$', "\\$")))))
        .collect()
}

fn pids(name: &str) -> Vec<u32> {
    facts::daemons(name).into_iter().map(|daemon| daemon.pid).collect()
}

fn one(case: &Case, wanted: &Seen, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let check = |what: &str| format!("{}: {what}", case.name);
    shell(case.prepare).context("preparing")?;
    if case.name.starts_with("another folder") {
        guest::wait_for_daemons()?;
        plain::rules()?;
        set_all()?;
    }
    if !case.named.is_empty() || !case.warned.is_empty() {
        let said = shell_lenient("ovs-graceful check");
        let named = case.named.is_empty() || said.contains(&format!("ovsdb-server: database {}", case.named));
        outcome.check(check("check names it"), named && said.contains(case.warned), said);
    }
    let servers = pids("ovsdb-server");
    let known = run::known();
    let log = out.join(format!("run-{}", case.name.replace(' ', "-")));
    let mut client = run::start_with(case.arguments, &[], &log)?;
    let id = happen(case, &known, &mut client)?;
    let report: Value = serde_json::from_str(&fs::read_to_string(run::report(&id))?)?;
    outcome.check(check("exit code"), report["exit_code"] == case.exit, &report);
    outcome.note(check("warnings"), &report["warnings"]);
    outcome.check(check("another ovsdb-server"), (pids("ovsdb-server") != servers) == case.replaced, &servers);
    let differences = report["differences"].to_string();
    let told = if case.named.is_empty() { differences == "[]" } else { differences.contains(case.named) };
    outcome.check(check("what is lost is a difference, and nothing else"), told, &report["differences"]);
    let now = look();
    for (name, value) in wanted {
        let is_lost = !case.named.is_empty() && ["databases", "a client of the port"].contains(name);
        outcome.check(check(name), (now[name] == *value) != is_lost, json!([value, now[name]]));
    }
    let left = shell_lenient("ls /run/ovs-graceful");
    outcome.check(check("nothing is left of it"), !left.contains("by-hand"), left);
    aftermath::nothing_left(case.name, outcome);
    shell(case.tidy).map(drop)
}

/// Carries the case out; the run's id, once it has its report.
fn happen(case: &Case, known: &[String], client: &mut Child) -> Result<String> {
    let old = pids("ovs-vswitchd");
    let id = if case.phase.is_empty() { None } else { Some(run::wait_for(case.phase, known)?) };
    match case.harm {
        Harm::None => {}
        Harm::Abort => drop(shell_lenient("ovs-graceful abort")),
        Harm::NewDies => {
            for pid in pids("ovs-vswitchd").iter().filter(|pid| !old.contains(pid)) {
                kill(Pid::from_raw(i32::try_from(*pid)?), Signal::SIGKILL)?;
            }
        }
        Harm::SupervisorDies => kill(run::supervisor()?, Signal::SIGKILL)?,
    }
    client.wait()?;
    let id = id.or_else(|| run::known().into_iter().find(|id| !known.contains(id))).context("there was no run")?;
    if case.harm == Harm::SupervisorDies {
        run::wait_for_recovery(&id)?;
        run::wait_until_unit_gone(Duration::from_secs(60))?;
        run::wait_until_no_job(Duration::from_secs(60))?;
    }
    match run::report(&id).exists() {
        true => Ok(id),
        false => bail!("run {id} has no report"),
    }
}

/// Daemons that `ovs-ctl` has started, and a database that the environment alone leads to.
fn without_a_unit(out: &Path, outcome: &mut Outcome) -> Result<()> {
    shell(
        "systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server
         . /etc/default/openvswitch-switch
         systemd-run -q --scope --unit=by-hand env OVS_DBDIR=${OVS_DBDIR:-/etc/openvswitch} \
            /usr/share/openvswitch/scripts/ovs-ctl --no-monitor --system-id=random $OVS_CTL_OPTS start",
    )?;
    plain::rules()?;
    set_all()?;
    let wanted = look();
    one(&Case { name: "without a unit", ..BASE }, &wanted, out, outcome)?;
    shell(
        // In the place of systemd's socket there was one of that server's.
        "/usr/share/openvswitch/scripts/ovs-ctl stop; systemctl stop ovsdb-server.socket 2> /dev/null || true
         systemctl start openvswitch-switch; ovs-vsctl show > /dev/null",
    )?;
    guest::wait_for_daemons()?;
    set_all()
}

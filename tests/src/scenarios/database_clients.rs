//! Clients of ovsdb-server through a run that replaces it: one connects every 10 ms, asks and goes; one stays, and comes back
//! as soon as it is cut off. Where systemd listens for the server nobody is refused; elsewhere it is measured for how long.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{anyhow, Result};
use serde_json::json;

use super::{aftermath, network, plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::{facts, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct DatabaseClients;

const SOCKET: &str = "/run/openvswitch/db.sock";
const EVERY: Duration = Duration::from_millis(10);
/// Longer than any replacement of the server takes here.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a client has been through.
#[derive(Debug, Default)]
struct Served {
    answered: u64,
    /// Nobody listened.
    refused: u64,
    /// Cut off before the answer came.
    cut_off: u64,
    /// From the first failure, or the question, to the next answer, ms.
    longest_ms: u128,
}

/// One question and its answer.
fn ask(stream: &mut UnixStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(br#"{"method":"list_dbs","params":[],"id":0}"#)?;
    let mut answer = Vec::new();
    let mut some = [0; 4096];
    while !answer.ends_with(b"}") {
        match stream.read(&mut some)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            read => answer.extend_from_slice(some.get(..read).unwrap_or_default()),
        }
    }
    Ok(())
}

/// Asks every 10 ms until `ended`, each time over a new connection or (`stays`) over the same as long as it lasts.
fn client(stays: bool, ended: &AtomicBool) -> Served {
    let mut served = Served::default();
    let mut connection: Option<UnixStream> = None;
    let mut since: Option<Instant> = None;
    while !ended.load(Ordering::Relaxed) {
        let begun = *since.get_or_insert_with(Instant::now);
        let connected = connection.take().map_or_else(|| UnixStream::connect(SOCKET), Ok);
        let asked = match connected {
            Ok(mut stream) => ask(&mut stream).map(|()| stream).map_err(|_| &mut served.cut_off),
            Err(_) => Err(&mut served.refused),
        };
        match asked {
            Ok(stream) => {
                served.answered += 1;
                served.longest_ms = served.longest_ms.max(begun.elapsed().as_millis());
                connection = Some(stream).filter(|_| stays);
                since = None;
            }
            Err(count) => *count += 1,
        }
        thread::sleep(EVERY);
    }
    served
}

fn start(stays: bool, ended: &Arc<AtomicBool>) -> JoinHandle<Served> {
    let ended = Arc::clone(ended);
    thread::spawn(move || client(stays, &ended))
}

impl Custom for DatabaseClients {
    fn name(&self) -> &'static str {
        "database_clients"
    }

    fn about(&self) -> &'static str {
        "clients of ovsdb-server through a run that replaces it: refused never, or for how long"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn run(&self, job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        let plainly: &[Way] = &[Way::AsInstalled];
        let ways = if facts::socket_is_active() { &WAYS } else { plainly };
        for way in ways.iter().filter(|way| super::is_chosen(way.name(), &job.extra_args, true, &[])) {
            through_a_run(*way, out, outcome)?;
        }
        Ok(())
    }
}

/// How ovsdb-server was started, where systemd can listen for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As the package does.
    AsInstalled,
    /// `systemctl reload`, without us: that starts one beside systemd, which puts its own socket over that of systemd.
    Reloaded,
    /// By ovs-ctl, outside its unit, with a socket that it was handed.
    ByHand,
}

const WAYS: [Way; 3] = [Way::AsInstalled, Way::Reloaded, Way::ByHand];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::AsInstalled => "as installed",
            Way::Reloaded => "reloaded",
            Way::ByHand => "by hand",
        }
    }

    fn prepare(self) -> Result<()> {
        let script = match self {
            Way::AsInstalled => "true".to_owned(),
            // systemd would pass the reload on to ovs-vswitchd.
            Way::Reloaded => "systemctl --job-mode=ignore-dependencies reload ovsdb-server".to_owned(),
            // Nobody connects but the one that starts the server by it.
            Way::ByHand => format!(
                "systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server ovsdb-server.socket; rm -f {SOCKET}
                 systemd-run -q --scope --unit=by-hand systemd-socket-activate -l {SOCKET} \\
                    --fdname=ovsdb-server.socket /usr/share/openvswitch/scripts/ovs-ctl --no-monitor \\
                    --system-id=random start > /dev/null 2>&1 &
                 until [ -S {SOCKET} ]; do sleep 0.1; done
                 ovs-vsctl --timeout=60 --no-wait show > /dev/null"
            ),
        };
        shell(&script)?;
        shell("timeout 90 sh -c 'until ovs-appctl -t ovs-vswitchd version && ovs-vsctl show; do sleep 0.3; done'")
            .map(drop)
    }

    /// Does a listening socket outlive the server?
    fn waits(self) -> bool {
        match self {
            Way::AsInstalled => facts::socket_is_active(),
            Way::Reloaded => false,
            Way::ByHand => true,
        }
    }
}

/// Replaces both daemons while clients ask.
fn through_a_run(way: Way, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let title = way.name();
    say(title);
    way.prepare()?;
    plain::rules()?;
    let waits = way.waits();
    let live = plain::start_probes()?;
    let before = facts::daemons("ovsdb-server");
    let ended = Arc::new(AtomicBool::new(false));
    let clients = [start(false, &ended), start(true, &ended)];
    thread::sleep(Duration::from_secs(2));
    let log = out.join(format!("run-{}", title.replace(' ', "-")));
    let said = shell_lenient(&format!("timeout 300 ovs-graceful restart > {} 2>&1; echo exit=$?", log.display()));
    outcome.check(format!("{title}: exit 0"), said.trim() == "exit=0", &said);
    thread::sleep(Duration::from_secs(2));
    ended.store(true, Ordering::Relaxed);
    let replaced = facts::daemons("ovsdb-server") != before;
    outcome.check(format!("{title}: ovsdb-server was replaced"), replaced, &before);
    for (name, client) in ["each time anew", "the same"].into_iter().zip(clients) {
        let served = client.join().map_err(|_| anyhow!("a client panicked"))?;
        let value = json!({
            "answered": served.answered, "refused": served.refused, "cut_off": served.cut_off,
            "longest_ms": u64::try_from(served.longest_ms).unwrap_or(u64::MAX),
        });
        outcome.note(format!("{title}: client, {name}"), &value);
        outcome.check(format!("{title}: client, {name}: answered"), served.answered > 100, &value);
        if waits {
            outcome.check(format!("{title}: client, {name}: never refused"), served.refused == 0, &value);
        }
    }
    aftermath::finish(title, live, false, outcome)?;
    if way == Way::Reloaded {
        // Without us, and with what that costs.
        let restarted = shell_lenient(
            "systemctl reset-failed ovsdb-server; systemctl restart ovsdb-server && ovs-vsctl --timeout=20 show; echo exit=$?",
        );
        let well = restarted.trim_end().ends_with("exit=0");
        outcome.check(format!("{title}: systemd's socket is reached again"), well, restarted);
    }
    Ok(())
}

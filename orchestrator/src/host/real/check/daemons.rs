//! The two daemons: does each run once, and where?

use std::path::Path;

use crate::check::{refuse, START};
use crate::host::real::assemble::RUN_DIRECTORY;
use crate::host::real::{identity, procfs};
use crate::host::surroundings::{CheckOptions, Known};
use crate::host::{Daemon, DaemonKind, Daemons};
use crate::report::{Findings, Name};

const SWITCH: DaemonKind = DaemonKind::OvsVswitchd;

/// The two daemons, if each runs once and the upcalls go to the ovs-vswitchd that runs.
pub(super) fn running(daemons: &dyn Daemons, known: &Known<'_>, found: &mut Findings) -> Option<(Daemon, Daemon)> {
    let server = match daemons.find_ovsdb_server() {
        Ok(server) => Some(server),
        Err(error) => {
            let cause = format!("it does not run ({}: {})", error.object, error.cause);
            found.refuse(Name::OvsRunning, "ovsdb-server", cause, START);
            None
        }
    };
    let vswitchd = vswitchd(&daemons.find_all(SWITCH).unwrap_or_default(), known, found)?;
    let server = server?;
    found.ok(Name::OvsRunning, "Open vSwitch", format!("pid {} and {}", server.id.pid, vswitchd.id.pid));
    Some((vswitchd, server))
}

fn vswitchd(all: &[Daemon], known: &Known<'_>, found: &mut Findings) -> Option<Daemon> {
    match (all, known.vswitchd) {
        ([one], None | Some(Ok(_))) => return Some(one.clone()),
        ([_], Some(Err(error))) => refuse(Name::OvsRunning, error, START, found),
        ([], _) => match identity::of_that_name(SWITCH, Path::new(RUN_DIRECTORY)) {
            Some(pid) => found.refuse(
                Name::OvsRunning,
                format!("ovs-vswitchd (pid {pid})"),
                "neither its PID file nor its control socket is in our /run/openvswitch",
                "a container has to share the host's /run/openvswitch (docs/containers.md)",
            ),
            None => found.refuse(Name::OvsRunning, SWITCH.program(), "it does not run", START),
        },
        (many, _) => {
            let pids: Vec<i32> = many.iter().map(|daemon| daemon.id.pid).collect();
            let remedy = "stop all but the one that forwards; after an interrupted run `ovs-graceful recover`";
            found.refuse(Name::OvsRunning, SWITCH.program(), format!("it runs more than once: {pids:?}"), remedy);
        }
    }
    None
}

/// The freeze and the sockets are those of our own network namespace.
pub(super) fn namespaces(vswitchd: &Daemon, found: &mut Findings) {
    if !procfs::shares(vswitchd.id.pid, "net").unwrap_or(false) {
        let object = format!("ovs-vswitchd (pid {})", vswitchd.id.pid);
        let remedy =
            format!("in the daemon's network namespace: `nsenter -t {} -n ovs-graceful check`", vswitchd.id.pid);
        found.refuse(Name::NetworkNamespace, object, "it runs in another network namespace", &remedy);
    }
}

/// A container is not ours to start (docs/containers.md).
pub(super) fn container(vswitchd: &Daemon, options: &CheckOptions, found: &mut Findings) {
    judge_container(vswitchd.id.pid, vswitchd.contained, options.elsewhere, found);
}

fn judge_container(pid: i32, contained: bool, elsewhere: bool, found: &mut Findings) {
    let object = format!("ovs-vswitchd (pid {pid})");
    match (contained, elsewhere) {
        (true, false) => found.refuse(
            Name::Container,
            object,
            "it runs in a container, which has to be restarted by whoever runs it",
            "`ovs-graceful restart --restart-command 'docker restart NAME'`",
        ),
        (true, true) => {
            found.ok(Name::Container, object, "it runs in a container; its files are kept for the way back");
        }
        (false, _) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Severity;

    #[test]
    fn a_container_is_not_ours_to_start() {
        let judged = |contained, elsewhere| {
            let mut found = Findings::default();
            judge_container(7, contained, elsewhere, &mut found);
            found.into_inner().pop().map(|one| one.severity)
        };
        assert_eq!(judged(true, false), Some(Severity::Refused));
        assert_eq!(judged(true, true), Some(Severity::Ok));
        assert_eq!(judged(false, false), None);
    }
}

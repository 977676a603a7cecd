//! The real OVN of the distribution on one node: ovn-northd, its databases and ovn-controller, which makes the bridge and
//! owns its rules. A logical switch with two ports and an ACL that tracks connections; traffic through a run.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::{aftermath, network, upgrade, Custom};
use crate::command::{shell, shell_lenient, shell_logged, wait_until};
use crate::guest::probe::Place;
use crate::guest::{self, facts, say};
use crate::outcome::{Job, Outcome};
use crate::packages::{Packages, OLD};

/// See the module.
pub struct Ovn;

const LOG: &str = "/var/log/ovn/ovn-controller.log";
/// What ovn-controller says of a database that does not take its connection (lib/reconnect.c).
const REFUSED: &str = "db.sock: connection attempt failed";

fn install(log: &Path) -> Result<()> {
    upgrade::apt_sources()?;
    let said = shell_logged(&format!("{} install ovs-graceful={OLD} ovn-central ovn-host", upgrade::APT), log);
    anyhow::ensure!(said.starts_with("exit=0"), "apt-get does not install them: {said}");
    shell(
        "ovs-vsctl set open_vswitch . external_ids:ovn-remote=unix:/run/ovn/ovnsb_db.sock \
            external_ids:ovn-encap-type=geneve external_ids:ovn-encap-ip=127.0.0.1 external_ids:system-id=lab
         systemctl restart ovn-controller
         timeout 60 sh -c 'until ovs-vsctl br-exists br-int; do sleep 0.3; done'",
    )
    .map(drop)
}

fn logical_network() -> Result<()> {
    shell("ovn-nbctl --wait=sb ls-add sw0")?;
    for (ns, address) in [("ns1", "10.9.0.1"), ("ns2", "10.9.0.2")] {
        network::attach(ns, "br-int", &format!("{address}/24"), "")?;
        let mac = network::mac(ns)?;
        shell(&format!(
            "ovn-nbctl lsp-add sw0 {ns} -- lsp-set-addresses {ns} '{mac} {address}'
             ovs-vsctl set interface v-{ns} external_ids:iface-id={ns}"
        ))?;
    }
    shell("ovn-nbctl --wait=hv acl-add sw0 to-lport 1000 ip4 allow-related")?;
    network::ping("ns1", "10.9.0.2")
}

/// From losing the database to having it again, as ovn-controller wrote it, ms.
fn without_database(log: &str) -> Option<i64> {
    let of_database = |line: &&str| line.contains("/openvswitch/db.sock: ");
    let at = |words: &str, first: bool| {
        let mut lines = log.lines().filter(of_database).filter(|line| line.contains(words));
        let line = if first { lines.next() } else { lines.next_back() };
        clock(line?)
    };
    Some(at(": connected", false)? - at("connection closed by peer", true).or_else(|| at("connection dropped", true))?)
}

/// `2026-11-30T12:00:00.123Z|...`: ms of the day.
fn clock(line: &str) -> Option<i64> {
    let time = line.split('T').nth(1)?.split('Z').next()?;
    let mut parts = time.split([':', '.']).map(|part| part.parse::<i64>().ok());
    let (h, m, s, ms) = (parts.next()??, parts.next()??, parts.next()??, parts.next()??);
    Some(((h * 60 + m) * 60 + s) * 1000 + ms)
}

impl Custom for Ovn {
    fn name(&self) -> &'static str {
        "ovn"
    }

    fn about(&self) -> &'static str {
        "the real ovn-controller and ovn-northd: a logical switch with a stateful ACL through a run"
    }

    fn packages(&self) -> Packages {
        Packages::Ovn
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        install(&out.join("apt"))?;
        network::patient_veth()?;
        logical_network()?;
        outcome.note("ovn-controller", shell_lenient("ovn-controller --version | head -1").trim());
        let rules = || shell_lenient("ovs-ofctl --no-stats dump-flows br-int | grep -v '^NXST' | sort");
        let (before, daemons) = (rules(), facts::DAEMONS.map(facts::daemons));
        let said_before = fs::read_to_string(LOG)?.len();
        let listens = facts::socket_is_active();
        let probes = network::gentle_probes(Place::named("ns1"), Place::named("ns2"), Ipv4Addr::new(10, 9, 0, 2));
        let live = guest::start_all(probes)?;
        std::thread::sleep(Duration::from_secs(3));
        say("a run");
        let said = shell_logged("timeout 300 ovs-graceful restart", &out.join("run"));
        outcome.check("exit 0", said.starts_with("exit=0"), &said);
        std::thread::sleep(Duration::from_secs(8));
        let lost = aftermath::finish("ovn", live, false, outcome)?;
        outcome.note("lost", lost);
        let now = facts::DAEMONS.map(facts::daemons);
        // OVN's own ovsdb-servers are among them.
        let others = daemons.iter().zip(&now).all(|(before, now)| now.len() == before.len() && before != now);
        outcome.check("both daemons are others", others, json!([daemons, now]));
        let log = fs::read_to_string(LOG)?.split_off(said_before);
        fs::write(out.join("ovn-controller.log"), &log)?;
        outcome.note("ovn-controller without the database, ms", without_database(&log));
        let refused = log.matches(REFUSED).count();
        outcome.note("connections of ovn-controller that were refused", refused);
        if listens {
            outcome.check("ovn-controller is never refused", refused == 0, &log);
        }
        let same = || rules() == before;
        let settled = wait_until("the rules", Duration::from_secs(30), Duration::from_millis(500), same);
        outcome.check("the rules are those of before", settled.is_ok(), json!([before, rules()]));
        let flag = shell_lenient("ovs-vsctl get open_vswitch . other_config");
        outcome.check("flow-restore-wait is gone", !flag.contains("flow-restore-wait"), flag);
        let id = shell_lenient("ovs-vsctl get open_vswitch . external_ids:system-id");
        outcome.check("the chassis is the one that it was", id.trim() == "lab", id);
        let synced = shell("ovn-nbctl --timeout=20 --wait=hv sync");
        outcome.check("ovn-controller works", synced.is_ok(), format!("{synced:?}"));
        network::ping("ns2", "10.9.0.1")?;
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_without_a_database_is_read_from_the_log() {
        let log =
            "2026-11-30T12:00:01.250Z|00021|reconnect|INFO|unix:/run/openvswitch/db.sock: connection closed by peer\n\
                   2026-11-30T12:00:02.251Z|00022|reconnect|INFO|unix:/run/openvswitch/db.sock: connecting...\n\
                   2026-11-30T12:00:02.300Z|00023|reconnect|INFO|unix:/run/openvswitch/db.sock: connected\n\
                   2026-11-30T12:00:09.300Z|00024|reconnect|INFO|unix:/run/ovn/ovnsb_db.sock: connected\n";
        assert_eq!(without_database(log), Some(1050));
        assert_eq!(without_database(""), None);
    }
}

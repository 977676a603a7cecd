//! Our Debian package comes and goes under traffic, in every order: Open vSwitch runs on as if nothing had happened, and
//! nothing is left. With Open vSwitch stopped, and absent, as well.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use super::{aftermath, network, plain, Custom};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};
use crate::packages::{Packages, NEW, OLD};

/// See the module.
pub struct Package;

const DPKG: &str = "DEBIAN_FRONTEND=noninteractive dpkg";
const POLICY: &str = "/usr/sbin/policy-rc.d";

impl Custom for Package {
    fn name(&self) -> &'static str {
        "package"
    }

    fn about(&self) -> &'static str {
        "our Debian package is installed, upgraded, removed, purged: Open vSwitch runs on, and nothing is left"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn packages(&self) -> Packages {
        Packages::Ours
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(8)
    }

    fn run(&self, _job: &Job, _out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        let stock = traces();
        let live = plain::start_probes()?;
        let daemons = facts::DAEMONS.map(facts::daemons);
        let orders = [
            vec![install(OLD), remove(), install(OLD), purge()],
            vec![install(OLD), install(NEW), remove(), purge()],
            vec![install(NEW), install(OLD), purge(), install(NEW), remove(), install(NEW), purge()],
        ];
        for (i, order) in orders.iter().enumerate() {
            in_order(&format!("order {}", i + 1), order, outcome);
            let now = traces();
            outcome.check(format!("order {}: nothing is left", i + 1), now == stock, json!([stock, now]));
        }
        let now = facts::DAEMONS.map(facts::daemons);
        outcome.check("Open vSwitch runs on", daemons == now, json!([daemons, now]));
        own_policy(outcome)?;
        not_during_a_run(outcome)?;
        aftermath::finish("package", live, false, outcome)?;
        without_open_vswitch(outcome)?;
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

fn install(version: &str) -> String {
    format!("{DPKG} --force-downgrade --force-confnew -i /lab/packages/ovs-graceful_{version}_amd64.deb")
}

fn remove() -> String {
    format!("{DPKG} --remove ovs-graceful")
}

fn purge() -> String {
    format!("{DPKG} --purge ovs-graceful")
}

fn in_order(name: &str, order: &[String], outcome: &mut Outcome) {
    say(name);
    for (i, command) in order.iter().enumerate() {
        let said = shell_lenient(&format!("{command} 2>&1; echo exit=$?"));
        let well = ["rror", "ovs-graceful: "].iter().all(|complaint| !said.contains(complaint));
        let words = command.split(' ').skip(1).collect::<Vec<_>>().join(" ");
        outcome.check(format!("{name}, step {}: {words}", i + 1), said.contains("exit=0") && well, said);
    }
}

/// Everything of a package that could stay behind, and what it changes about the units of Open vSwitch.
fn traces() -> String {
    let places = "/usr/sbin /usr/lib/ovs-graceful /lib/systemd/system /usr/lib/systemd/system /usr/lib/systemd/system-generators /etc/systemd/system \
        /run/systemd/system /run/systemd/generator /run/systemd/transient /etc/ovs-graceful /etc/needrestart /var/lib/ovs-graceful \
        /run/ovs-graceful /sys/fs/bpf /var/lib/systemd/deb-systemd-helper-enabled /etc/alternatives /usr/share/man \
        /usr/share/doc /usr/share/bash-completion /usr/share/zsh /usr/share/fish";
    let files = shell_lenient(&format!("find {places} 2>/dev/null | grep -e ovs-graceful -e dpfreeze -e policy-rc.d"));
    let units = shell_lenient(
        "systemctl list-units --all --plain --no-legend 'ovs-graceful*'; systemctl --failed --plain --no-legend; \
         dpkg-query -W -f '${db:Status-Abbrev}\\n' ovs-graceful 2>/dev/null; dpkg --audit",
    );
    files + &aftermath::commands(&["openvswitch-switch", "ovs-vswitchd", "ovsdb-server"]) + &units
}

/// Where the administrator has a policy of his own, that one has the say.
fn own_policy(outcome: &mut Outcome) -> Result<()> {
    say("a policy of the administrator's own");
    let own = "#!/bin/sh\nexit 0\n";
    fs::write(POLICY, own)?;
    let said = shell_lenient(&format!("chmod +x {POLICY}; {} 2>&1; echo exit=$?", install(OLD)));
    let told = said.contains("exit=0") && said.contains("is your own and stays");
    outcome.check("own policy: our package says that it stays", told, said);
    let said = shell_lenient(&format!("{} 2>&1; echo exit=$?", purge()));
    let stays = fs::read_to_string(POLICY).is_ok_and(|text| text == own);
    outcome.check("own policy: it is there after the purge", said.contains("exit=0") && stays, said);
    fs::remove_file(POLICY).map_err(Into::into)
}

/// What finishes or undoes a run is in the package.
fn not_during_a_run(outcome: &mut Outcome) -> Result<()> {
    say("during a run");
    shell(&format!("{} 2>&1", install(OLD)))?;
    let known = run::known();
    let began = Instant::now();
    let restart = std::thread::spawn(|| shell_lenient("ovs-graceful restart 2>&1; echo exit=$?"));
    run::wait_for("snapshot", &known)?;
    let said = shell_lenient(&format!("{} 2>&1; echo exit=$?", remove()));
    let refused = !said.contains("exit=0") && said.contains("not removed while a run is under way");
    outcome.check("during a run: not removed, and it says why", refused, said);
    let ended = restart.join().unwrap_or_default();
    outcome.check("during a run: the run is done", ended.contains("exit=0") && began.elapsed().as_secs() > 0, ended);
    let status = shell_lenient("dpkg-query -W -f '${db:Status-Abbrev}' ovs-graceful");
    // dpkg notes the wish; the package is installed.
    outcome.check("during a run: the package is as it was", status.starts_with("ri"), status);
    let said = shell_lenient(&format!("{} 2>&1; echo exit=$?", purge()));
    outcome.check("after the run: purged", said.contains("exit=0"), said);
    let left = traces();
    let gone = !left.contains("/ovs-graceful") && !left.contains("dpfreeze");
    outcome.check("after the run: nothing is left", gone, left);
    Ok(())
}

/// Stopped, and removed altogether.
fn without_open_vswitch(outcome: &mut Outcome) -> Result<()> {
    say("without Open vSwitch");
    shell("systemctl stop openvswitch-switch")?;
    let gone = || facts::DAEMONS.iter().all(|name| facts::daemons(name).is_empty());
    wait_until("the daemons have gone", Duration::from_secs(60), Duration::from_millis(200), gone)?;
    let all = [install(OLD), install(NEW), remove(), install(NEW), purge()];
    in_order("stopped", &all, outcome);
    outcome.check("stopped: it is not started", gone(), facts::DAEMONS.map(facts::daemons).len());
    shell(&format!("{DPKG} --purge --force-depends openvswitch-switch 2>&1"))?;
    in_order("absent", &all, outcome);
    let said = shell_lenient(&format!("{} >/dev/null 2>&1; ovs-graceful check; echo exit=$?", install(NEW)));
    outcome.check("absent: check says so", said.contains("exit=10") && said.contains("ovsdb-server"), said);
    in_order("absent, at last", &[purge()], outcome);
    Ok(())
}

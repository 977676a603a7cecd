//! Units that hang on those of Open vSwitch, in every way that systemd has, openvswitch-ipsec among them: no door to a run
//! stops or restarts one. Without our package the umbrella's restart restarts them all, and so does a plain one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::{json, Value};

use super::{aftermath, doors, network, plain, upgrade, Custom};
use crate::command::{shell, shell_lenient, shell_logged, wait_until};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};
use crate::packages::Packages;

/// See the module.
pub struct Dependents;

const UMBRELLA: &str = "openvswitch-switch.service";
const GATE: &str = "ovs-graceful-neighbours.service";
const IPSEC: &str = "openvswitch-ipsec.service";

/// Unit, and what its `[Unit]` says. A template is started as `@one`.
const UNITS: [(&str, &str); 9] = [
    ("lab-requires-after", "Requires=openvswitch-switch.service\nAfter=openvswitch-switch.service"),
    ("lab-requires", "Requires=openvswitch-switch.service"),
    ("lab-binds", "BindsTo=openvswitch-switch.service\nAfter=openvswitch-switch.service"),
    ("lab-part", "PartOf=openvswitch-switch.service"),
    ("lab-of-switch", "BindsTo=ovs-vswitchd.service\nAfter=ovs-vswitchd.service"),
    ("lab-of-database", "Requires=ovsdb-server.service\nAfter=ovsdb-server.service"),
    ("lab-second", "Requires=lab-requires-after.service\nAfter=lab-requires-after.service"),
    ("lab-vm@", "Requires=openvswitch-switch.service\nAfter=openvswitch-switch.service"),
    // Nobody restarts this one; a reload is passed on to it.
    ("lab-wants", "Wants=openvswitch-switch.service\nReloadPropagatedFrom=openvswitch-switch.service"),
];

/// Those of [`UNITS`] that systemd restarts with the umbrella.
fn hang() -> Vec<String> {
    UNITS.iter().map(|(name, _)| service(name)).filter(|name| name != "lab-wants.service").collect()
}

fn service(name: &str) -> String {
    match name.ends_with('@') {
        true => format!("{name}one.service"),
        false => format!("{name}.service"),
    }
}

fn write_unit(name: &str, words: &str) -> Result<()> {
    let text = format!(
        "[Unit]\n{words}\n[Service]\nExecStart=/bin/sleep infinity\nExecReload=/bin/sh -c 'echo reload >> /run/lab-reloads'\n"
    );
    fs::write(format!("/etc/systemd/system/{name}.service"), text).map_err(Into::into)
}

/// Main process and time of start of every unit that has one.
fn lives() -> BTreeMap<String, String> {
    let all = UNITS.iter().map(|(name, _)| service(name)).chain([IPSEC.to_owned()]);
    let life = |unit: &String| {
        let words = ["ActiveState", "MainPID", "ActiveEnterTimestampMonotonic"];
        words.map(|word| facts::unit_property(unit, word)).join(" ")
    };
    all.map(|unit| (unit.clone(), life(&unit))).collect()
}

/// The policies of IPsec; that there are none at all is told.
fn policies() -> String {
    shell_lenient("ip xfrm policy")
}

impl Custom for Dependents {
    fn name(&self) -> &'static str {
        "dependents"
    }

    fn about(&self) -> &'static str {
        "units that hang on those of Open vSwitch, openvswitch-ipsec among them, are left alone by every door"
    }

    fn packages(&self) -> Packages {
        Packages::OursAndIpsec
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(16)
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        for (name, words) in UNITS {
            write_unit(name, words)?;
        }
        let all: Vec<String> = UNITS.iter().map(|(name, _)| service(name)).collect();
        shell(&format!("systemctl daemon-reload; systemctl start {}", all.join(" ")))?;
        restarted("without us", "systemctl restart openvswitch-switch", &hang(), outcome)?;
        doors::install_package(out)?;
        ipsec(out, outcome)?;
        let generate = "s=$(date +%s%N); for i in 1 2 3 4 5; do ovs-graceful hook generate /run/lab-generated; done; \
            e=$(date +%s%N); echo $(( (e - s) / 5000 ))";
        outcome.note("generator, µs", shell_lenient(generate).trim());
        named_by_check(outcome);
        every_door(out, outcome)?;
        not_ordered(out, outcome)?;
        inactive(outcome)?;
        plainly(outcome)?;
        stopped(outcome)?;
        purged(outcome)?;
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

/// The command restarts these units. That it does makes the rest of this a test.
fn restarted(name: &str, command: &str, units: &[String], outcome: &mut Outcome) -> Result<()> {
    say(name);
    let before = lives();
    let said = shell_lenient(&format!("timeout 240 {command} 2>&1; echo exit=$?"));
    outcome.check(format!("{name}: exit 0"), said.trim().ends_with("exit=0"), said);
    std::thread::sleep(Duration::from_secs(5));
    let now = lives();
    let other = |unit: &String| before[unit] != now[unit] && now[unit].starts_with("active");
    let left: Vec<&String> = units.iter().filter(|unit| !other(unit)).collect();
    outcome.check(format!("{name}: all of them were restarted"), left.is_empty(), json!([left, before, now]));
    plain::rules()?;
    network::ping("ns1", "10.9.0.2")
}

/// openvswitch-ipsec with a tunnel, whose policies it would take away and make anew.
fn ipsec(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let said = shell_logged(&format!("{} install openvswitch-ipsec", upgrade::APT), &out.join("apt-ipsec"));
    outcome.check("openvswitch-ipsec is installed", said.starts_with("exit=0"), said);
    shell(
        "ip link add u0 type veth peer name u1; ip addr add 172.16.0.1/24 dev u0; ip link set u0 up; ip link set u1 up
         ovs-vsctl add-br br-ipsec -- add-port br-ipsec t0 -- set interface t0 type=gre options:remote_ip=172.16.0.2 \
            options:psk=secret
         systemctl restart openvswitch-ipsec",
    )?;
    let made = || !policies().trim().is_empty();
    let there = wait_until("policies", Duration::from_secs(60), Duration::from_millis(500), made).is_ok();
    let words =
        shell_lenient("systemctl status openvswitch-ipsec; tail -n 20 /var/log/openvswitch/ovs-monitor-ipsec.log");
    outcome.check("openvswitch-ipsec has made its policies", there, words);
    Ok(())
}

/// What `check` says of neighbours, by unit.
fn findings() -> BTreeMap<String, Value> {
    let said = shell_lenient("timeout 120 ovs-graceful check --json 2>/dev/null");
    let check: Value = serde_json::from_str(&said).unwrap_or_default();
    let all = check["findings"].as_array().cloned().unwrap_or_default();
    let of = all.into_iter().filter(|one| one["name"] == "neighbour");
    of.map(|one| (one["object"].as_str().unwrap_or_default().to_owned(), one)).collect()
}

fn named_by_check(outcome: &mut Outcome) {
    let found = findings();
    let all: Vec<String> = hang().into_iter().chain([IPSEC.to_owned()]).collect();
    let named = all.iter().all(|unit| found.get(unit).is_some_and(|one| one["severity"] == "ok"));
    outcome.check("check names each and says that it stays", named, json!(found));
}

/// A run, and the neighbours are who they were; the policies of IPsec have never been away.
fn alone(name: &str, door: impl FnOnce() -> String, outcome: &mut Outcome) -> Result<()> {
    unchanged(name, |name, outcome| doors::graceful(name, door, outcome), outcome)
}

fn unchanged(name: &str, act: impl FnOnce(&str, &mut Outcome) -> Result<()>, outcome: &mut Outcome) -> Result<()> {
    let (before, rules) = (lives(), policies());
    let watch = shell("ip xfrm monitor policy > /run/lab-xfrm 2>&1 & echo $!")?;
    act(name, outcome)?;
    shell(&format!("kill {}", watch.trim()))?;
    let now = lives();
    outcome.check(format!("{name}: the neighbours are who they were"), before == now, json!([before, now]));
    let (after, seen) = (policies(), shell_lenient("cat /run/lab-xfrm"));
    let stay = rules == after && !seen.contains("Deleted");
    outcome.check(format!("{name}: the policies of IPsec stay"), stay, json!([rules, after, seen]));
    let gate = facts::unit_property(GATE, "ActiveState");
    outcome.check(format!("{name}: the gate is there for the next time"), gate == "active", gate);
    let left = Path::new("/run/ovs-graceful/neighbours").exists();
    outcome.check(format!("{name}: no list is left"), !left, left);
    Ok(())
}

fn every_door(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let systemctl = |words: &str| {
        let words = words.to_owned();
        move || doors::systemctl(&words, &words, out)
    };
    let restart = || shell_logged("timeout 240 ovs-graceful restart", &out.join("restart"));
    alone("ovs-graceful restart", restart, outcome)?;
    alone("reload", systemctl("reload openvswitch-switch"), outcome)?;
    let reloads = shell_lenient("cat /run/lab-reloads");
    outcome.check("a reload is passed on to who wants that", reloads.trim() == "reload", reloads);
    alone("restart", systemctl("restart openvswitch-switch"), outcome)?;
    alone("restart of ovs-vswitchd", systemctl("restart ovs-vswitchd"), outcome)?;
    alone("restart of ovsdb-server", systemctl("restart ovsdb-server"), outcome)?;
    let reload = systemctl("reload ovs-vswitchd");
    unchanged("reload of ovs-vswitchd", |name, outcome| doors::graceful_switch(name, reload, outcome), outcome)?;
    let apt = "--reinstall install openvswitch-switch openvswitch-common";
    let upgrade = || shell_logged(&format!("{} {apt}", upgrade::APT), &out.join("apt-reinstall"));
    alone("upgrade", upgrade, outcome)?;
    doors::divert_ovs_ctl()?;
    alone("ovs-ctl", || doors::ovs_ctl("restart", out), outcome)
}

/// A unit whose file systemd has read without a daemon-reload is not known to the gate: `check` says so, systemd restarts
/// it, the report names it, and it runs again. Once the remedy was typed it is left alone.
fn not_ordered(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let unit = "lab-late.service";
    write_unit("lab-late", "Requires=openvswitch-switch.service\nAfter=openvswitch-switch.service")?;
    shell(&format!("systemctl start {unit}"))?;
    let found = findings();
    let told = &found.get(unit).cloned().unwrap_or_default();
    let remedy = told["remedy"].as_str().unwrap_or_default().to_owned();
    let warned = told["severity"] == "warning" && remedy.contains("daemon-reload");
    outcome.check("a unit that the gate does not know: check warns", warned, json!(found));
    let life = || facts::unit_property(unit, "ActiveState") + " " + &facts::unit_property(unit, "MainPID");
    let before = life();
    let known = run::known();
    let door = || doors::systemctl("restart openvswitch-switch", "restart-not-ordered", out);
    doors::graceful("a unit that the gate does not know", door, outcome)?;
    let now = life();
    outcome.check(
        "systemd has restarted it, and it runs",
        before != now && now.starts_with("active"),
        json!([before, now]),
    );
    let ids: Vec<String> = run::known().into_iter().filter(|id| !known.contains(id)).collect();
    let reports: Vec<String> =
        ids.iter().map(|id| shell_lenient(&format!("cat {}", run::report(id).display()))).collect();
    let named = reports.iter().any(|report| report.contains(unit));
    outcome.check("the report names it", named, json!(ids));
    shell(remedy.trim_matches('`'))?;
    let before = life();
    let door = || doors::systemctl("restart openvswitch-switch", "restart-ordered", out);
    alone("the remedy was typed", door, outcome)?;
    let now = life();
    outcome.check("and it is left alone", before == now, json!([before, now]));
    shell(&format!("systemctl stop {unit}; rm /etc/systemd/system/{unit}; systemctl daemon-reload")).map(drop)
}

/// Somebody has stopped the gate.
fn inactive(outcome: &mut Outcome) -> Result<()> {
    shell(&format!("systemctl stop {GATE}"))?;
    let found = findings();
    let remedies: Vec<&str> = found.values().filter_map(|one| one["remedy"].as_str()).collect();
    let warned = found.values().all(|one| one["severity"] == "warning") && found.len() == hang().len() + 1;
    let told = remedies.iter().all(|remedy| *remedy == format!("`systemctl start {GATE}`"));
    outcome.check("without the gate check warns of each", warned && told, json!(found));
    shell(&format!("systemctl start {GATE}"))?;
    named_by_check(outcome);
    Ok(())
}

/// A plain restart is what it is without us: asked for, or because the run is refused.
fn plainly(outcome: &mut Outcome) -> Result<()> {
    let all: Vec<String> = hang().into_iter().chain([IPSEC.to_owned()]).collect();
    restarted("plain", "ovs-graceful restart --plain", &all, outcome)?;
    // Not of br0: its ports would listen for half a minute.
    shell("ovs-vsctl add-br brstp -- set bridge brstp stp_enable=true")?;
    restarted("refused", "systemctl restart openvswitch-switch", &all, outcome)?;
    restarted("refused, of ovs-vswitchd", "systemctl restart ovs-vswitchd", &all, outcome)?;
    shell("ovs-vsctl del-br brstp").map(drop)
}

/// A stop stops them, and the gate; a start starts the gate.
fn stopped(outcome: &mut Outcome) -> Result<()> {
    say("stopped");
    shell(&format!("timeout 120 systemctl stop {UMBRELLA}"))?;
    doors::wait_until_gone()?;
    let running =
        || lives().into_iter().filter(|(unit, life)| unit != "lab-wants.service" && life.starts_with("active"));
    let gone = || running().next().is_none();
    let stopped = wait_until("them to stop", Duration::from_secs(20), Duration::from_millis(300), gone).is_ok();
    outcome.check("stopped: so are they", stopped, json!(lives()));
    shell(&format!("systemctl start {UMBRELLA} {}", hang().join(" ")))?;
    let active = || facts::unit_property(GATE, "ActiveState") == "active";
    let gate = wait_until("the gate", Duration::from_secs(20), Duration::from_millis(300), active).is_ok();
    outcome.check("started again: so is the gate", gate, gate);
    Ok(())
}

/// Without our package it is as it was.
fn purged(outcome: &mut Outcome) -> Result<()> {
    shell(&format!("rm {0}; dpkg-divert --quiet --local --rename --remove {0}", doors::OVS_CTL))?;
    let said = shell_lenient("DEBIAN_FRONTEND=noninteractive dpkg --purge ovs-graceful 2>&1; echo exit=$?");
    outcome.check("purged", said.trim().ends_with("exit=0"), said);
    let left = shell_lenient(&format!(
        "systemctl cat {GATE} 2>/dev/null; find /run/systemd /etc/systemd /usr/lib/systemd | grep -e '{GATE}' -e ovs-graceful"
    ));
    outcome.check("purged: nothing of the gate is left", left.trim().is_empty(), left);
    restarted("purged", "systemctl restart openvswitch-switch", &hang(), outcome)
}

//! The distribution's own commands lead to a run, where our drop-ins are installed: `systemctl reload` of the unit that
//! stands for both daemons, and `ovs-ctl restart --graceful`. Refused it changes nothing, and switched off it is what the
//! package wrote.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::{aftermath, network, plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Doors;

const DROP_IN: &str = include_str!("../../../systemd/openvswitch-switch.service.d/50-ovs-graceful.conf");
const PATCH: &str = include_str!("../../../patches/ovs-ctl-graceful.patch");
const OVS_CTL: &str = "/usr/share/openvswitch/scripts/ovs-ctl";
const FOLDER: &str = "/usr/lib/systemd/system/openvswitch-switch.service.d";
const UNIT: &str = "openvswitch-switch";

impl Custom for Doors {
    fn name(&self) -> &'static str {
        "doors"
    }

    fn about(&self) -> &'static str {
        "systemctl reload of the distribution's unit, and ovs-ctl restart --graceful; refused, switched off, uninstalled"
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        let stock = exec_reload();
        fs::copy("/usr/bin/ovs-graceful", "/usr/sbin/ovs-graceful")?;
        fs::create_dir_all(FOLDER)?;
        fs::write(format!("{FOLDER}/50-ovs-graceful.conf"), DROP_IN)?;
        shell("systemctl daemon-reload")?;
        for round in ["first", "second"] {
            let name = format!("{round} reload");
            graceful(&name, || reload(&name, out), outcome)?;
        }
        fs::write("/run/lab-patch", PATCH)?;
        shell(&format!("busybox patch {OVS_CTL} /run/lab-patch"))?;
        graceful("ovs-ctl", || ovs_ctl(out), outcome)?;
        refused(out, outcome)?;
        switched_off(outcome)?;
        shell(&format!("rm -r {FOLDER}; systemctl daemon-reload"))?;
        let now = exec_reload();
        outcome.check("without the drop-in the unit is what the package wrote", now == stock, json!([stock, now]));
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

/// Without what systemd tells of the last time.
fn exec_reload() -> String {
    shell_lenient(&format!("systemctl show -p ExecReload {UNIT} | sed 's/ignore_errors.*//'"))
}

/// Exit code and words of the reload.
fn reload(name: &str, out: &Path) -> String {
    let log = out.join(name.replace(' ', "-"));
    shell_lenient(&format!(
        "timeout 240 systemctl reload {UNIT} > {0} 2>&1; echo exit=$?; cat {0}; journalctl -q -u {UNIT} -n 30 -o cat",
        log.display()
    ))
}

fn ovs_ctl(out: &Path) -> String {
    let log = out.join("ovs-ctl");
    let command = format!("timeout 240 {OVS_CTL} --system-id=random restart --graceful");
    shell_lenient(&format!("{command} > {0} 2>&1; echo exit=$?; cat {0}", log.display()))
}

fn graceful(name: &str, door: impl FnOnce() -> String, outcome: &mut Outcome) -> Result<()> {
    say(name);
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(3));
    let (before, rules) = (facts::DAEMONS.map(facts::daemons), facts::promised(&plain::bridges()));
    let known = run::known();
    let said = door();
    outcome.check(format!("{name}: exit 0"), said.starts_with("exit=0"), &said);
    let now = facts::DAEMONS.map(facts::daemons);
    let others = before.iter().zip(&now).all(|(before, now)| now.len() == 1 && before != now);
    outcome.check(format!("{name}: both daemons are others"), others, json!([before, now]));
    let runs = run::known().len() - known.len();
    outcome.check(format!("{name}: it was a run"), runs == 1, runs);
    let active = facts::unit_property(UNIT, "ActiveState");
    outcome.check(format!("{name}: {UNIT} is active"), active == "active", active);
    std::thread::sleep(Duration::from_secs(3));
    aftermath::nothing_left(name, outcome);
    aftermath::owned(name, outcome);
    aftermath::as_before(name, &rules, outcome);
    aftermath::new_traffic_passes(name, outcome);
    aftermath::finish(name, live, false, outcome).map(drop)
}

fn refused(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("refused");
    shell("ovs-vsctl set bridge br0 stp_enable=true")?;
    let before = facts::DAEMONS.map(facts::daemons);
    let said = reload("refused", out);
    let told = !said.starts_with("exit=0") && said.contains("spanning-tree");
    outcome.check("refused: the reload fails, and its log says why", told, &said);
    let (now, active) = (facts::DAEMONS.map(facts::daemons), facts::unit_property(UNIT, "ActiveState"));
    outcome.check("refused: nothing was touched", before == now && active == "active", json!([before, now, active]));
    shell("ovs-vsctl set bridge br0 stp_enable=false").map(drop)
}

fn switched_off(outcome: &mut Outcome) -> Result<()> {
    say("switched off");
    shell("mkdir -p /etc/ovs-graceful; printf '[doors]\\nreload = false\\n' > /etc/ovs-graceful/config.toml")?;
    let (before, known) = (facts::DAEMONS.map(facts::daemons), run::known());
    let said = shell_lenient(&format!("timeout 240 systemctl reload {UNIT} 2>&1; echo exit=$?"));
    let now = facts::DAEMONS.map(facts::daemons);
    let stock = said.contains("exit=0") && before != now && run::known() == known;
    outcome.check("switched off: the package's own reload, and no run", stock, json!([said, before, now]));
    fs::remove_file("/etc/ovs-graceful/config.toml")?;
    network::ping("ns1", "10.9.0.2")
}

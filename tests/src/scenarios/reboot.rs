//! The machine goes down in the gap of a run. At the next boot, before ovs-vswitchd starts, `ovs-graceful-recover.service`
//! removes what would keep it from forwarding, and tells what became of the run; somebody else's flag it leaves alone.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use nix::sys::signal::{kill, Signal};
use serde_json::{json, Value};

use super::{aftermath, plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Reboot;

/// What the boots tell each other: the id of the run.
const RUN: &str = "/var/lib/lab-reboot";
const UNIT: &str = include_str!("../../../systemd/ovs-graceful-recover.service");
const FLAG: &str = "ovs-vsctl --no-wait get open_vswitch . other_config";

impl Custom for Reboot {
    fn name(&self) -> &'static str {
        "reboot"
    }

    fn about(&self) -> &'static str {
        "the machine goes down in the gap of a run, and forwards after the next boot"
    }

    fn reboots(&self) -> bool {
        true
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        match fs::read_to_string(RUN) {
            Ok(id) => after(&id, outcome),
            Err(_) => before(out),
        }
    }
}

/// Ends with the machine.
fn before(out: &Path) -> Result<()> {
    plain::set_up()?;
    fs::copy("/usr/bin/ovs-graceful", "/usr/sbin/ovs-graceful")?;
    fs::write("/usr/lib/systemd/system/ovs-graceful-recover.service", UNIT)?;
    shell("systemctl daemon-reload && systemctl enable ovs-graceful-recover.service")?;
    let _client = run::start(&[], &out.join("run"))?;
    let id = run::wait_for("restore", &[])?;
    kill(run::supervisor()?, Signal::SIGSTOP)?;
    fs::write(RUN, &id)?;
    let set = shell(FLAG)?;
    ensure!(set.contains("flow-restore-wait"), "the run was not in its gap any more: {set}");
    say("the machine goes down");
    shell("sync")?;
    fs::write("/proc/sysrq-trigger", "b")?;
    std::thread::sleep(Duration::from_secs(30));
    bail!("the machine did not go down")
}

fn after(id: &str, outcome: &mut Outcome) -> Result<()> {
    say("booted again");
    let boots = shell_lenient("journalctl -b -q -o cat UNIT=ovs-graceful-recover.service");
    outcome.check("the unit ran", boots.contains("Finished"), &boots);
    let [recovered, started] = [ended("ovs-graceful-recover.service"), first_start("ovs-vswitchd.service")];
    let in_time = matches!((recovered, started), (Some(end), Some(start)) if end <= start);
    outcome.check("before ovs-vswitchd was started", in_time, json!([recovered, started]));
    let shown = shell_lenient(&format!("ovs-graceful runs show {id} --json"));
    let report: Value = serde_json::from_str(&shown).unwrap_or(Value::Null);
    // That the old daemon had ended was written down in memory only (hazards 27).
    let told = report["exit_code"] == 20 && report["reason"].as_str().is_some_and(|reason| reason.contains("booted"));
    outcome.check("the report says that the machine went down", told, &report);
    aftermath::nothing_left("booted", outcome);
    aftermath::no_unit_failed(outcome);
    // Neither namespaces nor rules outlive a boot, run or no run.
    shell("ovs-vsctl del-br br0")?;
    plain::set_up().context("the network after the boot")?;
    aftermath::new_traffic_passes("booted", outcome);
    aftermath::owned("booted", outcome);
    shell("ovs-vsctl --no-wait set open_vswitch . other_config:flow-restore-wait=true")?;
    let said = shell_lenient(
        "systemctl restart ovs-graceful-recover.service; systemctl show -p ExecMainStatus ovs-graceful-recover.service",
    );
    outcome.check("a flag that is not ours needs a person", said.contains("ExecMainStatus=40"), said);
    let kept = shell(FLAG)?;
    outcome.check("a flag that is not ours stays", kept.contains("flow-restore-wait"), kept);
    shell("ovs-vsctl remove open_vswitch . other_config flow-restore-wait; systemctl reset-failed").map(drop)
}

/// When the unit's command ended, µs since the boot.
fn ended(unit: &str) -> Option<u64> {
    facts::unit_property(unit, "ExecMainExitTimestampMonotonic").parse().ok().filter(|at| *at > 0)
}

/// When systemd began to start it for the first time in this boot, µs since the boot.
fn first_start(unit: &str) -> Option<u64> {
    let first = shell_lenient(&format!("journalctl -b -q -o json _PID=1 UNIT={unit} JOB_TYPE=start | head -n 1"));
    let entry: Value = serde_json::from_str(first.trim()).ok()?;
    entry["__MONOTONIC_TIMESTAMP"].as_str()?.parse().ok()
}

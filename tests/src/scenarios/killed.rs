//! The supervisor is killed in the middle of a run: systemd starts it again with what it had parked, and the host
//! forwards, with nothing lost and nothing left.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::{json, Value};

use super::{plain, Custom};
use crate::command::{shell_lenient, wait_until};
use crate::guest::probe::Running;
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome, ProbeOutcome};

/// See the module.
pub struct Killed;

/// When the supervisor is killed, and what must come of it.
struct Case {
    name: &'static str,
    /// Seen in the journal of the run, on disk or in memory.
    phase: &'static str,
    /// What `recover` reports.
    exit: u64,
    /// True where the old ovs-vswitchd must live on.
    undone: bool,
    /// Kill every ovs-vswitchd as well.
    daemons_too: bool,
}

const CASES: [Case; 4] = [
    Case { name: "standby", phase: "standby", exit: 20, undone: true, daemons_too: false },
    Case { name: "take-over", phase: "switch-prepare", exit: 20, undone: true, daemons_too: false },
    Case { name: "no return", phase: "switch-commit", exit: 21, undone: false, daemons_too: false },
    Case { name: "nobody left", phase: "restore", exit: 21, undone: false, daemons_too: true },
];

impl Custom for Killed {
    fn name(&self) -> &'static str {
        "killed"
    }

    fn about(&self) -> &'static str {
        "the supervisor is killed before and after the point of no return; systemd recovers"
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        for case in &CASES {
            say(&format!("killed in {}", case.name));
            one(case, out, outcome).with_context(|| format!("killed in {}", case.name))?;
        }
        let failed = facts::failed_units();
        outcome.check("no unit failed", failed.is_empty(), failed);
        Ok(())
    }
}

fn one(case: &Case, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(2));
    let rules = facts::promised(&plain::bridges());
    let before = facts::daemons("ovs-vswitchd");
    let known = run::known();
    let mut client = run::start(&[], &out.join(format!("run-{}", case.phase)))?;
    let killed = kill_in(case.phase, &known);
    let id = match killed {
        Ok(id) => id,
        Err(error) => {
            let _ = client.kill();
            let _ = client.wait();
            return Err(error);
        }
    };
    if case.daemons_too {
        for daemon in facts::daemons("ovs-vswitchd") {
            let _ended_by_itself = kill(Pid::from_raw(i32::try_from(daemon.pid)?), Signal::SIGKILL);
        }
    }
    let report = run::wait_for_recovery(&id)?;
    client.wait()?;
    run::wait_until_unit_gone(Duration::from_secs(20))?;
    std::thread::sleep(Duration::from_secs(3));
    let report: Value = serde_json::from_str(&fs::read_to_string(report)?)?;
    let check = |what: &str| format!("{}: {what}", case.name);
    outcome.check(check("exit code of the report"), report["exit_code"] == case.exit, &report);
    let after = facts::daemons("ovs-vswitchd");
    let same = before == after;
    outcome.check(check("one ovs-vswitchd, the right one"), after.len() == 1 && same == case.undone, &after);
    nothing_left(case.name, outcome);
    owned(case.name, outcome);
    let now = facts::promised(&plain::bridges());
    outcome.check(check("rules and ports as before"), now == rules, json!([rules, now]));
    let ping = shell_lenient("ip netns exec ns1 ping -c 3 -i 0.2 -W 2 10.9.0.2");
    outcome.check(check("new traffic passes"), ping.contains("3 received"), ping);
    finish(case, live, outcome)
}

fn finish(case: &Case, live: Vec<(String, Box<dyn Running>)>, outcome: &mut Outcome) -> Result<()> {
    for (name, probe) in live {
        let ended = probe.finish().with_context(|| format!("probe {name}"))?;
        let udp = match &ended {
            ProbeOutcome::Udp(udp) => Some((udp.requests.lost + udp.replies.lost, udp.requests.received)),
            _ => None,
        };
        if let Some((lost, received)) = udp {
            let name = format!("{}: {name}: nothing lost", case.name);
            outcome.check(name, received > 0 && lost == 0, json!({ "lost": lost }));
        }
        outcome.probes.insert(format!("{} {name}", case.phase), ended);
    }
    Ok(())
}

/// Nothing of a run that is over is left on the host.
pub(super) fn nothing_left(case: &str, outcome: &mut Outcome) {
    let check = |what: &str| format!("{case}: {what}");
    let frozen = shell_lenient("dpfreeze status --json");
    let thawed = serde_json::from_str::<Value>(&frozen).is_ok_and(|s| s.is_null() || s["armed"] == false);
    outcome.check(check("nothing is frozen"), thawed, frozen);
    let flag = shell_lenient("ovs-vsctl get open_vswitch . other_config external_ids");
    let unset = !flag.contains("flow-restore-wait") && !flag.contains("ovs-graceful");
    outcome.check(check("no flow-restore-wait, no mark"), unset, flag);
    let files = shell_lenient("ls /run/openvswitch /run/ovs-graceful; ls /run/systemd/system/*.d 2>/dev/null");
    let clean =
        !["ovsg", "rules.", "journal.", "restarted.", "90-ovs-graceful"].iter().any(|word| files.contains(word));
    outcome.check(check("no file of the run is left"), clean, files);
    let status = shell_lenient("ovs-graceful status --json");
    let parsed: Value = serde_json::from_str(&status).unwrap_or(Value::Null);
    outcome.check(
        check("status: no run, none interrupted"),
        parsed["lock"].is_null() && parsed["interrupted"].is_null(),
        status,
    );
}

/// The unit owns the one ovs-vswitchd that lives.
pub(super) fn owned(case: &str, outcome: &mut Outcome) {
    let found = facts::daemons("ovs-vswitchd");
    let unit = "ovs-vswitchd.service";
    let state = facts::unit_property(unit, "ActiveState");
    let main = facts::unit_property(unit, "MainPID");
    let right = matches!(found.as_slice(), [d] if main == d.pid.to_string()) && state == "active";
    let value = json!({ "state": state, "main_pid": main, "daemons": found });
    outcome.check(format!("{case}: the unit is active and owns its daemon"), right, value);
    let by_name = shell_lenient("timeout 20 ovs-appctl -t ovs-vswitchd version");
    outcome.check(format!("{case}: ovs-appctl by name"), by_name.contains("Open vSwitch"), by_name);
}

/// Kills the supervisor with SIGKILL as soon as the journal of the new run has the intent of `phase`. Returns the
/// run's id.
pub(super) fn kill_in(phase: &str, known: &[String]) -> Result<String> {
    let id = run::wait_for(phase, known)?;
    // In Standby: with the daemon that was started, if it can be had.
    if phase == "standby" {
        let _ = wait_until("a second daemon", Duration::from_secs(20), Duration::from_millis(20), || {
            facts::daemons("ovs-vswitchd").len() > 1
        });
    }
    kill(run::supervisor()?, Signal::SIGKILL)?;
    Ok(id)
}

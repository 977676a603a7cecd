//! The supervisor is killed in the middle of a run: systemd starts it again with what it had parked, and the host
//! forwards, with nothing lost and nothing left.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

use super::{aftermath, plain, Custom};
use crate::command::{shell, wait_until};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};

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
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

fn one(case: &Case, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(2));
    let rules = facts::promised(&plain::bridges());
    let before = facts::daemons("ovs-vswitchd");
    let features = facts::features(&plain::bridges());
    let known = run::known();
    let mut client = run::start(&[], &out.join(format!("run-{}", case.phase)))?;
    let killed = match case.daemons_too {
        true => kill_all_in(case.phase, &known),
        false => kill_in(case.phase, &known),
    };
    let id = match killed {
        Ok(id) => id,
        Err(error) => {
            let _ = client.kill();
            let _ = client.wait();
            return Err(error);
        }
    };
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
    aftermath::nothing_left(case.name, outcome);
    aftermath::owned(case.name, outcome);
    aftermath::as_before(case.name, &rules, outcome);
    aftermath::sees_as_much(case.name, &features, outcome);
    aftermath::new_traffic_passes(case.name, outcome);
    aftermath::finish(case.name, live, false, outcome).map(drop)
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

/// The same to every ovs-vswitchd, of which one leaves a feature probe, before the supervisor can do anything about it.
pub(super) fn kill_all_in(phase: &str, known: &[String]) -> Result<String> {
    let id = run::wait_for(phase, known)?;
    let supervisor = run::supervisor()?;
    kill(supervisor, Signal::SIGSTOP)?;
    for daemon in facts::daemons("ovs-vswitchd") {
        let _ended_by_itself = kill(Pid::from_raw(i32::try_from(daemon.pid)?), Signal::SIGKILL);
    }
    shell(aftermath::LEFT_PROBE)?;
    kill(supervisor, Signal::SIGKILL)?;
    Ok(id)
}

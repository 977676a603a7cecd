//! Rules change while a run is under way (hazards 4 and 22): what is deleted reaches the kernel at once and does not
//! come back, what is added is not forgotten.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{meanwhile, plain, Custom};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::{run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct RuleChange;

/// Lets pings pass; deleted during the run.
const DELETED: &str = "cookie=0x222,priority=100,icmp,nw_dst=10.9.0.2";
/// What is below it.
const BELOW: &str = "cookie=0x221,priority=90,icmp,nw_dst=10.9.0.2,actions=drop";
/// Added during the run.
const ADDED: &str = "cookie=0x333,priority=100,udp,tp_dst=9009,actions=drop";

fn with_cookie(cookie: &str) -> String {
    shell_lenient(&format!("ovs-ofctl --no-stats dump-flows br0 cookie={cookie}/-1 | grep cookie=")).trim().to_owned()
}

/// The kernel's flows for pings to ns2.
fn pings() -> Vec<String> {
    let flows = shell_lenient("ovs-dpctl dump-flows");
    flows.lines().filter(|flow| flow.contains("dst=10.9.0.2,proto=1,")).map(str::to_owned).collect()
}

fn all_drop(flows: &[String]) -> bool {
    !flows.is_empty() && flows.iter().all(|flow| flow.contains("actions:drop"))
}

fn change(known: &[String], outcome: &mut Outcome) -> Result<()> {
    let id = run::wait_for("standby", known)?;
    say("the run stands by: rules change");
    shell(&format!(
        "ovs-ofctl --strict del-flows br0 {} && ovs-ofctl add-flow br0 '{ADDED}'",
        DELETED.replace("cookie=0x222,", "cookie=0x222/-1,")
    ))?;
    let mut flows = pings();
    // On a slow machine the old daemon has until the switch for it, and then the kernel keeps what it has.
    while !all_drop(&flows) && !run::has_begun(&id, "switch-prepare") && !run::report(&id).exists() {
        std::thread::sleep(Duration::from_millis(20));
        flows = pings();
    }
    let early = !run::has_begun(&id, "switch-prepare");
    outcome.check("the kernel dropped pings before the switch", early && all_drop(&flows), flows);
    Ok(())
}

impl Custom for RuleChange {
    fn name(&self) -> &'static str {
        "rule_change"
    }

    fn about(&self) -> &'static str {
        "a rule is deleted and one is added between snapshot and switch"
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        shell(&format!("ovs-ofctl add-flow br0 '{DELETED},actions=NORMAL' && ovs-ofctl add-flow br0 '{BELOW}'"))?;
        let mut ping = Command::new("ip")
            .args(["netns", "exec", "ns1", "ping", "-q", "-i", "0.05", "10.9.0.2"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start ping")?;
        let passing = || pings().iter().any(|flow| !flow.contains("actions:drop"));
        let passed = wait_until("the kernel passes pings", Duration::from_secs(10), Duration::from_millis(50), passing);
        outcome.check("pings passed before", passed.is_ok(), pings());
        let ran = meanwhile::restart(&[], out, outcome, change);
        let answers = shell_lenient("ip netns exec ns1 ping -c 3 -i 0.2 -W 1 10.9.0.2");
        let _ended_by_itself = ping.kill();
        ping.wait()?;
        ran?;
        outcome.check("pings do not pass afterwards", answers.contains(" 0 received"), answers);
        let [deleted, below, added] = ["0x222", "0x221", "0x333"].map(with_cookie);
        outcome.check("the deleted rule is not back", deleted.lines().all(|l| !l.contains("0x222")), &deleted);
        outcome.check("the rule below it is there", below.contains("0x221"), below);
        outcome.check("the added rule is there", added.contains("0x333"), added);
        Ok(())
    }
}

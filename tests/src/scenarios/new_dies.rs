//! The new ovs-vswitchd is killed when it is bound already (hazards 1): the run goes back to one that lives, and what
//! arrived meanwhile waits in the sockets of the dead one.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::aftermath::{sees_as_much, LEFT_PROBE};
use super::{meanwhile, plain, Custom};
use crate::guest::facts;
use crate::outcome::{Job, Outcome, ProbeOutcome};

/// See the module.
pub struct NewDies;

/// A handler takes this many upcalls at a time (`UPCALL_MAX_BATCH`, ofproto/ofproto-dpif-upcall.c); those that it has
/// in its hands when it dies are lost.
const IN_HAND: u64 = 64;

impl Custom for NewDies {
    fn name(&self) -> &'static str {
        "new_dies"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn about(&self) -> &'static str {
        "the new ovs-vswitchd is killed after the hand-over: back, and the upcalls wait"
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        let before = facts::daemons("ovs-vswitchd");
        let rules = facts::promised(&plain::bridges());
        let lost = facts::counters()?.lost;
        let features = facts::features(&plain::bridges());
        let kill = format!("{LEFT_PROBE} && kill -KILL $(pgrep -n -x ovs-vswitchd); sleep 20");
        let gate = ["--no-ovsdb", "--gate-command", &kill];
        let report = meanwhile::traffic(&gate, out, outcome, |_, _| Ok(()))?;
        outcome.check("exit code 21", report["exit_code"] == 21, &report["exit_code"]);
        std::thread::sleep(Duration::from_secs(2));
        let after = facts::daemons("ovs-vswitchd");
        outcome.check("one ovs-vswitchd, another one", after.len() == 1 && after != before, json!([before, after]));
        let now = facts::promised(&plain::bridges());
        outcome.check("rules and ports as before", now == rules, json!([rules, now]));
        let bridge = &report["openflow"][0];
        let told = bridge["flows_before"].as_u64() > Some(0) && bridge["flows_before"] == bridge["flows_after"];
        outcome.check("the report tells them", told, bridge);
        sees_as_much("back", &features, outcome);
        let lost = facts::counters()?.lost - lost;
        outcome.check("kernel lost 0: somebody was bound at all times", lost == 0, lost);
        for (name, most) in [("e", 0), ("n", IN_HAND)] {
            if let Some(ProbeOutcome::Udp(udp)) = outcome.probes.get(name) {
                let lost = udp.requests.lost + udp.replies.lost;
                outcome.check(format!("{name} lost at most {most}"), lost <= most, lost);
            }
        }
        Ok(())
    }
}

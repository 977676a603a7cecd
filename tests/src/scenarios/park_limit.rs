//! plain with a park too small for it: what the report says overflowed is exactly what the probes lost.

use anyhow::Result;
use serde_json::json;

use super::{plain, Expect, Traffic};
use crate::guest::probe::Spec;
use crate::guest::Evidence;
use crate::outcome::{Outcome, ProbeOutcome};

/// See the module.
pub struct ParkLimit;

/// Far fewer than the new flows of any hand-over.
const MAX_PACKETS: u32 = 4;

impl Traffic for ParkLimit {
    fn name(&self) -> &'static str {
        "park_limit"
    }

    fn about(&self) -> &'static str {
        "plain with a park of 4 packets: overflowed = lost"
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        // No TCP: it would hide its losses.
        plain::probes().into_iter().filter(|(name, _)| name != "tcp" && name != "silent").collect()
    }

    fn expect(&self) -> Expect {
        Expect { overflow: true, ..Expect::default() }
    }

    fn before_action(&self, _outcome: &mut Outcome) -> Result<()> {
        std::fs::create_dir_all("/etc/ovs-graceful")?;
        std::fs::write("/etc/ovs-graceful/config.toml", format!("[park]\nmax_packets = {MAX_PACKETS}\n"))?;
        Ok(())
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        if !evidence.job.action.judged_as_ours() {
            return;
        }
        let mut lost = 0;
        for probe in outcome.probes.values() {
            if let ProbeOutcome::Udp(udp) = probe {
                lost += udp.requests.lost + udp.replies.lost;
            }
        }
        let report = evidence.report.clone().unwrap_or_default();
        let overflowed = report["parked"]["overflowed"].as_u64().unwrap_or(0);
        let found = json!({ "overflowed": overflowed, "lost": lost });
        outcome.check("the park overflowed", overflowed > 0, overflowed);
        outcome.check("overflowed = lost by the probes", overflowed == lost, found);
    }
}

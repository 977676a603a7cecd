//! plain with a park too small for it: what the report says overflowed is exactly what the probes lost, by port as well;
//! and it is the newest that is lost, or the oldest, as configured.

use anyhow::Result;
use serde_json::json;

use super::{plain, Expect, Traffic};
use crate::guest::probe::Spec;
use crate::guest::Evidence;
use crate::outcome::{Outcome, ProbeOutcome};

/// See the module.
pub struct ParkLimit {
    name: &'static str,
    about: &'static str,
    /// `park.when_full`
    when_full: &'static str,
}

/// The newest are lost.
pub static NEWEST: ParkLimit = ParkLimit {
    name: "park_limit",
    about: "plain with a park of 2 packets: overflowed = lost",
    when_full: "drop-newest",
};
/// The oldest are lost.
pub static OLDEST: ParkLimit = ParkLimit {
    name: "park_oldest",
    about: "park_limit, what has waited longest makes room",
    when_full: "drop-oldest",
};

/// Far fewer than the new flows of any hand-over.
const MAX_PACKETS: u32 = 2;

impl Traffic for ParkLimit {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn by_hand(&self) -> bool {
        self.name == OLDEST.name
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
        let config = format!("[park]\nmax_packets = {MAX_PACKETS}\nwhen_full = \"{}\"\n", self.when_full);
        std::fs::write("/etc/ovs-graceful/config.toml", config)?;
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
        let parked = &report["parked"];
        let overflowed = parked["overflowed"].as_u64().unwrap_or(0);
        let found = json!({ "overflowed": overflowed, "lost": lost });
        outcome.check("the park overflowed", overflowed > 0, overflowed);
        outcome.check("overflowed = lost by the probes", overflowed == lost, found);
        let by_port = |name: &str| parked["overflowed_by_port"][name].as_u64().unwrap_or(0);
        let counted = by_port("v-ns1") + by_port("v-ns2");
        let in_park = parked["overflowed_by_reason"]["park"].as_u64().unwrap_or(0);
        outcome.check("by reason and by port: all of it", counted == overflowed && in_park == overflowed, parked);
        // Of what came first nothing is left at the end, or it has waited for all of the gap.
        let waited = parked["longest_ms"].as_f64().unwrap_or(0.0);
        let gap = report["gap_ms"].as_f64().unwrap_or(0.0);
        let oldest_left = waited > gap / 2.0;
        let found = json!({ "longest_ms": waited, "gap_ms": gap });
        outcome.check(
            format!("{}: as configured", self.when_full),
            oldest_left == (self.when_full == "drop-newest"),
            found,
        );
    }
}

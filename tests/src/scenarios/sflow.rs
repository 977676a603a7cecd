//! sFlow of every packet, to a real collector: samples that nobody took are counted, not made up, and nothing else of a
//! packet is lost with its sample.

use anyhow::Result;
use serde_json::json;

use super::{network, plain, Expect, Traffic};
use crate::command::shell;
use crate::guest::probe::Spec;
use crate::guest::Evidence;
use crate::outcome::{Outcome, ProbeOutcome};

/// See the module.
pub struct Sflow;

/// Of the collector.
const PORT: u16 = 6343;
/// A daemon that ends takes the datagram along that it was filling: 1,400 bytes (SFL_DEFAULT_DATAGRAM_SIZE).
const IN_A_DATAGRAM: u64 = 8;

fn phase_ms(evidence: &Evidence, name: &str) -> u64 {
    let phases = evidence.report.as_ref().and_then(|report| report["phases"].as_array());
    let phase = phases.into_iter().flatten().find(|phase| phase["name"] == name);
    phase.and_then(|phase| phase["duration_ms"].as_u64()).unwrap_or(0)
}

impl Traffic for Sflow {
    fn name(&self) -> &'static str {
        "sflow"
    }

    fn about(&self) -> &'static str {
        "sFlow of every packet to a collector"
    }

    fn set_up(&self) -> Result<()> {
        plain::set_up()?;
        shell(&format!(
            "ip link set lo up
             ovs-vsctl -- --id=@s create sflow agent=lo target='\"127.0.0.1:{PORT}\"' header=128 sampling=1 polling=0 \
               -- set bridge br0 sflow=@s"
        ))
        .map(drop)
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let ports = vec![network::CONSTANT_PORT, network::EACH_NEW_PORT];
        let mut probes = vec![("samples".to_owned(), Spec::Samples { port: PORT, ports })];
        // Of TCP's packets the collector knows nothing.
        probes.extend(plain::probes().into_iter().filter(|(_, probe)| !matches!(probe, Spec::Tcp { .. })));
        for (_, probe) in &mut probes {
            // Each packet is an upcall.
            if let Spec::Udp { interval_us, .. } = probe {
                *interval_us *= 4;
            }
        }
        probes
    }

    fn expect(&self) -> Expect {
        Expect { thrown_away: &["action_sflow"], ..Expect::default() }
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        let Some(ProbeOutcome::Copies(samples)) = outcome.probes.get("samples").cloned() else {
            outcome.check("samples were collected", false, json!(null));
            return;
        };
        let sent = |name: &str| match outcome.probes.get(name) {
            Some(ProbeOutcome::Udp(udp)) => udp.requests.sent + udp.replies.sent,
            _ => 0,
        };
        let sent = sent("e") + sent("n");
        let sampled: u64 = samples.by_flow.values().map(|count| count.different).sum();
        let twice: u64 = samples.by_flow.values().map(|count| count.duplicated).sum();
        let parked = evidence.report.as_ref().map(|report| report["parked"].clone()).unwrap_or_default();
        let counted = parked["unreplayable"]["action_sflow"].as_u64().unwrap_or(0);
        let found =
            json!({ "sent": sent, "sampled": sampled, "twice": twice, "counted": counted, "flows": samples.by_flow });
        outcome.note("samples", &found);
        if !evidence.job.action.judged_as_ours() {
            return;
        }
        outcome.check("samples were thrown away, and counted", counted > 0, counted);
        outcome.check("no packet was sampled twice", twice == 0, &found);
        // Until the run settles the kept flow of `e` samples for a bridge that is no more.
        let missing = sent.saturating_sub(sampled);
        let settling = phase_ms(evidence, "gates") + phase_ms(evidence, "settle");
        let unknown = settling / (4 * network::CONSTANT_US / 1000 * u64::from(evidence.job.load.slower)) * 2;
        let bounds = counted..=counted + IN_A_DATAGRAM + unknown;
        outcome.check(
            "what was counted is missing, and no more than that",
            bounds.contains(&missing),
            json!([found, unknown]),
        );
    }
}

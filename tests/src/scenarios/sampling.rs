//! A sample of every packet, to a real collector: samples that nobody took are counted, not made up, and nothing else of
//! a packet is lost with its sample.

use anyhow::Result;
use serde_json::json;

use super::network::{self, UNWILDCARD};
use super::{plain, Expect, Traffic};
use crate::command::shell;
use crate::guest::probe::{Export, Spec};
use crate::guest::Evidence;
use crate::outcome::{CopiesOutcome, Outcome, ProbeOutcome};

/// See the module.
pub struct Sampling {
    name: &'static str,
    about: &'static str,
    /// Of the report.
    reason: &'static str,
    export: Export,
    /// Makes the bridge sample.
    configuration: &'static str,
    /// Rules in place of those of [`plain`].
    rules: Option<&'static str>,
    /// A daemon that ends takes so many samples along at most.
    unsent: u64,
}

/// Copies of packets that are no probe's are counted as well: ARP, between the two.
const OTHERS: u64 = 4;
/// Of the collector; the configurations below name it.
const PORT: u16 = 6343;

/// sFlow of the bridge.
pub static SFLOW: Sampling = Sampling {
    name: "sflow",
    about: "sFlow of every packet to a collector",
    reason: "action_sflow",
    export: Export::Sflow,
    configuration: r#"
        ip link set lo up
        ovs-vsctl -- --id=@s create sflow agent=lo target='"127.0.0.1:6343"' header=128 sampling=1 polling=0 \
          -- set bridge br0 sflow=@s"#,
    rules: None,
    // The datagram that it was filling: 1,400 bytes (SFL_DEFAULT_DATAGRAM_SIZE).
    unsent: 8,
};

/// IPFIX of the bridge: without a cache every packet is a record of its own. `enable-output-sampling=true` switches the
/// second record of a packet, that of its output, *off* (vswitchd/bridge.c takes the opposite of what is written).
pub static IPFIX: Sampling = Sampling {
    name: "ipfix",
    about: "IPFIX of every packet to a collector",
    reason: "action_ipfix",
    export: Export::Ipfix,
    configuration: r#"
        ip link set lo up
        ovs-vsctl -- --id=@i create ipfix targets='"127.0.0.1:6343"' sampling=1 cache_active_timeout=0 \
            other_config:enable-output-sampling=true \
          -- set bridge br0 ipfix=@i"#,
    rules: None,
    unsent: 0,
};

/// The `sample` action of OpenFlow, to a collector set.
pub static FLOW_SAMPLE: Sampling = Sampling {
    name: "flow_sample",
    about: "the OpenFlow action `sample` for every packet of the probes, to a collector",
    reason: "action_flow_sample",
    export: Export::Ipfix,
    configuration: r#"
        ip link set lo up
        ovs-vsctl -- --id=@b get bridge br0 \
          -- --id=@i create ipfix targets='"127.0.0.1:6343"' cache_active_timeout=0 \
          -- create flow_sample_collector_set bridge=@b id=1 ipfix=@i"#,
    rules: Some("sample(probability=65535,collector_set_id=1,obs_domain_id=1,obs_point_id=1)"),
    unsent: 0,
};

impl Sampling {
    /// Samples of the stream of new flows that came twice. IPFIX tells the packets of a constant flow not apart.
    fn twice(&self, samples: &CopiesOutcome) -> u64 {
        let told_apart = |flow: &str| self.export == Export::Sflow || flow.starts_with("9001 ");
        samples.by_flow.iter().filter(|(flow, _)| told_apart(flow)).map(|(_, count)| count.duplicated).sum()
    }

    /// Samples that came, each once where they can be told apart.
    fn sampled(&self, samples: &CopiesOutcome) -> u64 {
        let all: u64 = samples.by_flow.values().map(|count| count.different + count.duplicated).sum();
        all - self.twice(samples)
    }
}

impl Traffic for Sampling {
    fn name(&self) -> &'static str {
        self.name
    }

    fn by_hand(&self) -> bool {
        self.name != SFLOW.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn set_up(&self) -> Result<()> {
        plain::set_up()?;
        shell(self.configuration)?;
        let Some(sample) = self.rules else { return Ok(()) };
        network::rules(
            "br0",
            &format!(
                "priority=10,actions=NORMAL\n\
                 priority=100,udp,tp_dst=9000,actions={sample},NORMAL\n\
                 priority=100,udp,tp_src=9000,actions={sample},NORMAL\n\
                 priority=100,udp,tp_dst=9001,actions={sample},{UNWILDCARD},NORMAL\n\
                 priority=100,udp,tp_src=9001,actions={sample},NORMAL\n"
            ),
        )
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let ports = vec![network::CONSTANT_PORT, network::EACH_NEW_PORT];
        let mut probes = vec![("samples".to_owned(), Spec::Exports { export: self.export, port: PORT, ports })];
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
        Expect { thrown_away: Some(self.reason), keeps_flows: false, ..Expect::default() }
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
        let (sampled, twice) = (self.sampled(&samples), self.twice(&samples));
        let parked = evidence.report.as_ref().map(|report| report["parked"].clone()).unwrap_or_default();
        let counted = parked["unreplayable"][self.reason].as_u64().unwrap_or(0);
        let found =
            json!({ "sent": sent, "sampled": sampled, "twice": twice, "counted": counted, "flows": samples.by_flow });
        outcome.note("samples", &found);
        if !evidence.job.action.judged_as_ours() {
            return;
        }
        outcome.check("samples were thrown away, and counted", counted > 0, counted);
        outcome.check("no packet was sampled twice", twice == 0, &found);
        let missing = sent.saturating_sub(sampled);
        let bounds = counted.saturating_sub(OTHERS)..=counted + self.unsent;
        outcome.check("what was counted is missing, and no more than that", bounds.contains(&missing), &found);
    }
}

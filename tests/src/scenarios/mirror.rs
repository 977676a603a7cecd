//! A mirror of everything on a pipeline with connection tracking: the copies, too, exactly once.

use std::net::Ipv4Addr;

use anyhow::Result;
use serde_json::json;

use super::nat::UNWILDCARD_REPLY;
use super::network::{self, undone, UNWILDCARD};
use super::{Expect, Traffic};
use crate::command::shell;
use crate::guest::probe::{Place, Spec};
use crate::guest::Evidence;
use crate::outcome::{CopiesOutcome, Outcome, ProbeOutcome};

/// See the module.
pub struct Mirror;

impl Traffic for Mirror {
    fn name(&self) -> &'static str {
        "mirror"
    }

    fn about(&self) -> &'static str {
        "a mirror of everything before ct, misses behind it: each copy exactly once"
    }

    fn set_up(&self) -> Result<()> {
        shell("ovs-vsctl add-br br0")?;
        network::attach("ns1", "br0", "10.9.0.1/24", "")?;
        network::attach("ns2", "br0", "10.9.0.2/24", "")?;
        network::attach("ns3", "br0", "", "")?;
        network::attach("ns4", "br0", "", "")?;
        shell(
            "ovs-vsctl -- --id=@p get port v-ns4 \
               -- --id=@m create mirror name=all select-all=true output-port=@p -- set bridge br0 mirrors=@m",
        )?;
        network::rules(
            "br0",
            &format!(
                "table=0,priority=1,actions=NORMAL\n\
                 table=0,priority=50,ip,actions=ct(table=1,zone=5)\n\
                 table=1,priority=100,udp,tp_dst=9001,actions={UNWILDCARD},ct(commit,zone=5),NORMAL\n\
                 table=1,priority=100,udp,tp_src=9001,actions={UNWILDCARD_REPLY},NORMAL\n\
                 table=1,priority=50,ip,ct_state=+trk+new,actions=ct(commit,zone=5),NORMAL\n\
                 table=1,priority=50,ip,ct_state=+trk+est,actions=NORMAL\n"
            ),
        )?;
        network::ping("ns1", "10.9.0.2")
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        // First, so that it sees the first packet of the others.
        let ports = vec![network::CONSTANT_PORT, network::EACH_NEW_PORT];
        let copies = Spec::Copies { place: Place::named("ns4"), device: "e-ns4".to_owned(), ports };
        let mut probes = vec![("copies".to_owned(), copies)];
        let address = Ipv4Addr::new(10, 9, 0, 2);
        probes.extend(network::gentle_probes(Place::named("ns1"), Place::named("ns2"), address));
        probes.push(network::silent("ns3"));
        probes
    }

    fn expect(&self) -> Expect {
        Expect { keeps_flows: false, ..Expect::default() }
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        undone(evidence, outcome, "continued");
        let Some(ProbeOutcome::Copies(copies)) = outcome.probes.get("copies").cloned() else {
            outcome.check("copies were counted", false, json!(null));
            return;
        };
        outcome.check("no copy was lost by the counting", copies.dropped == 0, copies.dropped);
        if !evidence.job.action.judged_as_ours() {
            outcome.note("copies", &copies);
            return;
        }
        for (name, port) in [("e", network::CONSTANT_PORT), ("n", network::EACH_NEW_PORT)] {
            let Some(ProbeOutcome::Udp(udp)) = outcome.probes.get(name).cloned() else { continue };
            once(&copies, &format!("{port} requests"), udp.requests.sent, outcome);
            once(&copies, &format!("{port} replies"), udp.replies.sent, outcome);
        }
    }
}

fn once(copies: &CopiesOutcome, flow: &str, sent: u64, outcome: &mut Outcome) {
    let seen = copies.by_flow.get(flow).cloned().unwrap_or_default();
    let exactly = sent > 0 && seen.different == sent && seen.duplicated == 0;
    outcome.check(format!("{flow} mirrored exactly once"), exactly, json!({ "sent": sent, "copies": seen }));
}

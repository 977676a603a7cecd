//! Packets that cannot start again, each kind by itself: what the report counts under its reason is exactly what the
//! probe of that kind has lost.
//!
//! All streams stop in the midst of the gap: of a stream that goes on the new daemon makes the same flows again, and the
//! parked packets are continued there (docs/replay.md).

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{json, Value};

use super::network::{self, UNWILDCARD};
use super::{Custom, Expect};
use crate::command::shell;
use crate::guest::probe::{udp, Place, Ports, Spec};
use crate::guest::{self, facts, run, say, verdict, Live};
use crate::outcome::{Job, Outcome, ProbeOutcome};

/// See the module.
pub struct Unreplayable;

struct Kind {
    /// As in the report.
    reason: &'static str,
    /// What its packets are sent to.
    address: Ipv4Addr,
    port: u16,
}

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// Translated to [`SERVER`].
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 200);

const KINDS: [Kind; 4] = [
    Kind { reason: "copy_before_recirc", address: SERVER, port: 9301 },
    Kind { reason: "copy_beside_recirc", address: SERVER, port: 9302 },
    Kind { reason: "nested_recirc", address: SERVER, port: 9303 },
    Kind { reason: "nat_connection_gone", address: SERVICE, port: 9304 },
];

/// Time between two packets of a kind, µs.
const INTERVAL_US: u64 = network::EACH_NEW_US;

impl Custom for Unreplayable {
    fn name(&self) -> &'static str {
        "unreplayable"
    }

    fn about(&self) -> &'static str {
        "packets that cannot start again: each under its reason, with the exact number"
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(1)
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        set_up()?;
        facts::save_everything(&out.join("before"), &["br0".to_owned()]);
        let live = start()?;
        std::thread::sleep(Duration::from_secs(2));
        facts::flows(&out.join("flows-before"))?;
        let known = run::known();
        let path = out.join("report.json");
        let arguments = ["--report", path.to_str().context("the folder's name")?];
        let mut client = run::start(&arguments, &out.join("action-stdout"))?;
        let stopped = stop_in_the_gap(&live, &known);
        outcome.action_exit = client.wait()?.code();
        stopped?;
        say("the run has ended");
        outcome.probes = guest::finish_all(live)?;
        let report: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
        outcome.check("exit code 0", outcome.action_exit == Some(0), outcome.action_exit);
        KINDS.iter().for_each(|kind| judge(kind, &report, outcome));
        let unreplayable = report["parked"]["unreplayable"].as_object().map_or(0, serde_json::Map::len);
        outcome.check("no other reason", unreplayable == KINDS.len(), &report["parked"]);
        verdict::probes_sent(outcome);
        // The others have lost what they should.
        let constant = outcome.probes.remove_entry("e");
        let others = std::mem::replace(&mut outcome.probes, constant.into_iter().collect());
        verdict::no_losses(&Expect::default(), outcome);
        outcome.probes.extend(others);
        Ok(())
    }
}

fn set_up() -> Result<()> {
    shell("ovs-vsctl add-br br0")?;
    network::patient_veth()?;
    network::attach("ns1", "br0", "10.9.0.1/24", "")?;
    network::attach("ns2", "br0", "10.9.0.2/24", "")?;
    network::attach("ns3", "br0", "", "")?;
    network::neighbour("ns1", &SERVICE.to_string(), "ns2")?;
    network::rules(
        "br0",
        &format!(
            "table=0,priority=1,actions=NORMAL\n\
             table=0,priority=60,udp,tp_dst=9301,actions=output:v-ns3,ct(table=1,zone=5)\n\
             table=0,priority=60,udp,tp_dst=9302,actions=ct(table=1,zone=5),output:v-ns3\n\
             table=0,priority=60,udp,tp_dst=9303,actions=check_pkt_larger(1000)->NXM_NX_REG2[0],resubmit(,4)\n\
             table=0,priority=60,udp,tp_dst=9304,actions=ct(table=2,zone=6,nat)\n\
             table=0,priority=60,udp,tp_src=9304,actions=ct(table=3,zone=6,nat)\n\
             table=1,priority=1,udp,actions={UNWILDCARD},NORMAL\n\
             table=2,priority=2,udp,ct_state=+trk+new,actions=ct(commit,zone=6,nat(dst={SERVER}),table=1)\n\
             table=2,priority=1,udp,actions=resubmit(,1)\n\
             table=3,priority=1,actions=NORMAL\n\
             table=4,priority=2,udp,reg2=1,actions=drop\n\
             table=4,priority=1,udp,actions=ct(table=1,zone=5)\n"
        ),
    )?;
    network::ping("ns1", &SERVER.to_string())
}

fn start() -> Result<Live> {
    let stream = |port, address: Ipv4Addr, interval_us, ports| Spec::Udp {
        from: Place::named("ns1"),
        to: Place::named("ns2"),
        address: address.into(),
        port,
        interval_us,
        ports,
        length: udp::LENGTH,
    };
    let kinds = KINDS.iter().enumerate().map(|(index, kind)| {
        // Ports of its own for each: a source has one socket for a port.
        let ports = Ports::Cycle { first: 10_000 * (index as u16 + 1), count: 9_000 };
        (kind.reason.to_owned(), stream(kind.port, kind.address, INTERVAL_US, ports))
    });
    let constant = ("e".to_owned(), stream(network::CONSTANT_PORT, SERVER, network::CONSTANT_US, Ports::Constant));
    guest::start_all(kinds.chain([constant]).collect())
}

/// The connections of what is parked are forgotten, and everything but `e` stops.
fn stop_in_the_gap(live: &Live, known: &[String]) -> Result<()> {
    run::wait_for("switch-commit", known)?;
    shell("conntrack -F 2>&1")?;
    run::wait_for("restore", known)?;
    live.iter().filter(|(name, _)| name != "e").for_each(|(_, probe)| probe.stop_sending());
    Ok(())
}

fn judge(kind: &Kind, report: &Value, outcome: &mut Outcome) {
    let lost = match outcome.probes.get(kind.reason) {
        Some(ProbeOutcome::Udp(udp)) => udp.requests.lost,
        _ => 0,
    };
    let counted = report["parked"]["unreplayable"][kind.reason].as_u64().unwrap_or(0);
    let found = json!({ "lost": lost, "counted": counted });
    outcome.check(format!("{}: as many as the probe has lost", kind.reason), counted > 0 && counted == lost, found);
}

//! 20,000 OpenFlow rules, 4 bridges, 15,000 kernel flows, and a burst of new flows.

use std::fmt::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::network::{self, UNWILDCARD};
use super::Traffic;
use crate::command::{shell, wait_until};
use crate::guest::probe::{Place, Ports, Spec, SLOWER};
use crate::guest::{facts, say, Evidence};
use crate::outcome::Outcome;

/// See the module.
pub struct Scale;

const BRIDGES: [&str; 4] = ["br0", "br1", "br2", "br3"];
const RULES_PER_BRIDGE: u32 = 5000;
/// Flows that the kernel must hold.
const FLOWS: u32 = 15_000;
/// Port of the crowd of flows.
const CROWD_PORT: u16 = 9003;
/// Source ports of the crowd: beside those of the new-flow stream.
const CROWD_FIRST: u16 = 45_000;
/// Refreshing each flow every 60 s takes a packet every 4 ms.
const CROWD_US: u64 = 4000;
/// The burst: new flows at the highest rate that stock carries here without loss when nothing restarts.
const BURST_US: u64 = 5000;

fn rules(bridge: u32) -> String {
    let mut text = format!(
        "priority=10,actions=NORMAL\n\
         priority=100,udp,tp_dst=9001,actions={UNWILDCARD},NORMAL\n\
         priority=100,udp,tp_dst={CROWD_PORT},actions={UNWILDCARD},NORMAL\n"
    );
    for i in 0..RULES_PER_BRIDGE - 3 {
        let _ = writeln!(
            text,
            "cookie={i:#x},priority=20,ip,nw_src=10.{}.{}.{},actions=drop",
            100 + bridge,
            i >> 8,
            i & 255
        );
    }
    text
}

/// Makes the kernel's flows, a packet each, no faster than the daemon takes them.
fn fill() -> Result<()> {
    let filler = std::thread::spawn(|| -> Result<()> {
        Place::named("ns1").enter()?;
        for i in 0..FLOWS {
            let port = CROWD_FIRST + u16::try_from(i)?;
            let socket = UdpSocket::bind(("0.0.0.0", port)).with_context(|| format!("port {port}"))?;
            // Too short for a probe's packet: the sink ignores it.
            socket.send_to(b"fill", (Ipv4Addr::new(10, 9, 0, 2), CROWD_PORT))?;
            if i % 4 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    });
    filler.join().map_err(|_| anyhow::anyhow!("the filler panicked"))?
}

/// Kernel flows now.
pub(super) fn present() -> u64 {
    facts::counters().map(|c| c.flows).unwrap_or(0)
}

/// Idle flows stay longer than it takes to send a packet every `interval_us` to each of `flows`: to make them anew every
/// 10 s would be all the VM does.
pub(super) fn keep_idle(flows: u64, interval_us: u64) -> Result<()> {
    let round_ms = flows * interval_us / 1000 * SLOWER.load(Ordering::Relaxed);
    shell(&format!("ovs-vsctl set open_vswitch . other_config:max-idle={}", round_ms * 3 / 2)).map(drop)
}

/// Makes flows with `fill`. Looking through all of them twice a second takes much of the time that making them needs; but
/// only revalidators raise the limit that a daemon begins with, 10,000.
pub(super) fn undisturbed(fill: impl FnOnce() -> Result<()>) -> Result<()> {
    shell("ovs-vsctl set open_vswitch . other_config:max-revalidator=60000; ovs-appctl upcall/set-flow-limit 200000")?;
    fill()?;
    shell("ovs-vsctl remove open_vswitch . other_config max-revalidator").map(drop)
}

/// Waits until the kernel holds `flows` flows.
pub(super) fn wait_until_full(flows: u64) -> Result<()> {
    say(&format!("the kernel holds {} flows", present()));
    let full = || present() >= flows;
    wait_until(&format!("the kernel holds {flows} flows"), Duration::from_secs(5), Duration::from_millis(500), full)
}

impl Traffic for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn about(&self) -> &'static str {
        "20,000 rules, 4 bridges, 15,000 kernel flows, a burst of new flows"
    }

    fn alone(&self) -> bool {
        true
    }

    fn set_up(&self) -> Result<()> {
        keep_idle(u64::from(FLOWS), CROWD_US)?;
        for bridge in BRIDGES {
            shell(&format!("ovs-vsctl add-br {bridge}"))?;
        }
        network::attach("ns1", "br0", "10.9.0.1/24", "")?;
        network::attach("ns2", "br0", "10.9.0.2/24", "")?;
        network::attach("ns3", "br0", "", "")?;
        for (i, bridge) in (0u32..).zip(BRIDGES) {
            network::rules(bridge, &rules(i))?;
        }
        network::ping("ns1", "10.9.0.2")?;
        say("rules are there");
        Ok(())
    }

    fn before_traffic(&self) -> Result<()> {
        // Something must listen, or the fill is answered by ICMP errors that make flows of their own.
        let sink = std::thread::spawn(|| -> Result<UdpSocket> {
            Place::named("ns2").enter()?;
            Ok(UdpSocket::bind(("0.0.0.0", CROWD_PORT))?)
        });
        let sink = sink.join().map_err(|_| anyhow::anyhow!("the sink panicked"))??;
        undisturbed(fill)?;
        drop(sink);
        wait_until_full(u64::from(FLOWS))
    }

    fn bridges(&self) -> Vec<String> {
        BRIDGES.map(str::to_owned).to_vec()
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let udp = |port, interval_us, ports| {
            let (from, to) = (Place::named("ns1"), Place::named("ns2"));
            Spec::udp(&from, &to, (Ipv4Addr::new(10, 9, 0, 2), port), interval_us, ports)
        };
        vec![
            ("e".to_owned(), udp(network::CONSTANT_PORT, network::CONSTANT_US, Ports::Constant)),
            ("n".to_owned(), udp(network::EACH_NEW_PORT, BURST_US, Ports::EachNew)),
            ("crowd".to_owned(), udp(CROWD_PORT, CROWD_US, Ports::Cycle { first: CROWD_FIRST, count: FLOWS as u16 })),
            network::silent("ns3"),
        ]
    }

    fn before_action(&self, outcome: &mut Outcome) -> Result<()> {
        outcome.note("kernel flows before", present());
        Ok(())
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        let (before, after) = (evidence.flows_before.len(), evidence.flows_after.len());
        outcome.check("15,000 kernel flows before", before >= FLOWS as usize, before);
        if evidence.job.action.judged_as_ours() {
            let found = json!({ "before": before, "after": after });
            outcome.check("15,000 kernel flows after", after >= FLOWS as usize, found);
        }
    }
}

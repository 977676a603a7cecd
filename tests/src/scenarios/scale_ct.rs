//! 20,000 kernel flows behind `ct`: established connections with a flow each way, and the flow that each began with. All
//! of them name recirculation ids of the old daemon.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{anyhow, Context, Result};
use serde_json::json;

use super::nat::UNWILDCARD_REPLY;
use super::network::{self, UNWILDCARD};
use super::scale::{keep_idle, present, undisturbed, wait_until_full};
use super::{Expect, Traffic};
use crate::command::shell;
use crate::guest::probe::{Place, Ports, Spec};
use crate::guest::{say, Evidence};
use crate::outcome::Outcome;

/// See the module.
pub struct ScaleCt;

/// Three flows each.
const CONNECTIONS: u16 = 7_000;
/// Flows that the kernel must hold.
const FLOWS: u64 = 20_000;
/// Port of the crowd of connections.
const CROWD_PORT: u16 = 9003;
/// Source ports of the crowd: beside those of the new-flow stream.
const CROWD_FIRST: u16 = 45_000;
/// Time between two packets of the crowd, µs. This and [`BURST_US`] are about the highest rate at which stock holds
/// 20,000 flows here and loses nothing while nothing restarts (`--action nothing`); at one and a half of it its
/// revalidators keep up with 17,500 flows only.
const CROWD_US: u64 = 3000;
/// Time between two new flows, µs: each is three upcalls.
const BURST_US: u64 = 11_250;

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// Answers what comes to the crowd's port, until `ended`.
fn answer(ended: &AtomicBool) -> Result<()> {
    Place::named("ns2").enter()?;
    let socket = UdpSocket::bind(("0.0.0.0", CROWD_PORT))?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut buffer = [0; 64];
    while !ended.load(Ordering::Relaxed) {
        if let Ok((length, sender)) = socket.recv_from(&mut buffer) {
            socket.send_to(buffer.get(..length).unwrap_or_default(), sender)?;
        }
    }
    Ok(())
}

/// Makes the connections: a packet, its answer, and a packet more; too short for a probe's.
fn connect() -> Result<()> {
    Place::named("ns1").enter()?;
    let mut buffer = [0; 64];
    let mut unanswered = 0;
    for port in CROWD_FIRST..CROWD_FIRST + CONNECTIONS {
        let socket = UdpSocket::bind(("0.0.0.0", port)).with_context(|| format!("port {port}"))?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        socket.send_to(b"fill", (SERVER, CROWD_PORT))?;
        unanswered += u32::from(socket.recv(&mut buffer).is_err());
        socket.send_to(b"fill", (SERVER, CROWD_PORT))?;
    }
    say(&format!("{unanswered} of {CONNECTIONS} connections were not answered in time"));
    Ok(())
}

fn fill() -> Result<()> {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| answer(&ended));
        let connected = scope.spawn(connect).join().map_err(|_| anyhow!("the client panicked"))?;
        ended.store(true, Ordering::Relaxed);
        server.join().map_err(|_| anyhow!("the server panicked"))??;
        connected
    })
}

impl Traffic for ScaleCt {
    fn name(&self) -> &'static str {
        "scale_ct"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn about(&self) -> &'static str {
        "20,000 kernel flows behind ct, established connections and a burst of new ones"
    }

    fn alone(&self) -> bool {
        true
    }

    fn set_up(&self) -> Result<()> {
        keep_idle(u64::from(CONNECTIONS), CROWD_US)?;
        shell("ovs-vsctl add-br br0")?;
        network::attach("ns1", "br0", "10.9.0.1/24", "")?;
        network::attach("ns2", "br0", "10.9.0.2/24", "")?;
        network::attach("ns3", "br0", "", "")?;
        let each_port = format!("table=1,priority=100,udp,tp_dst={CROWD_PORT},ct_state=+trk");
        network::rules(
            "br0",
            &format!(
                "table=0,priority=1,actions=NORMAL\n\
                 table=0,priority=50,ip,actions=ct(table=1,zone=5)\n\
                 {each_port}+new,actions={UNWILDCARD},ct(commit,zone=5),NORMAL\n\
                 {each_port}+est,actions={UNWILDCARD},NORMAL\n\
                 table=1,priority=100,udp,tp_src={CROWD_PORT},ct_state=+trk+est,actions={UNWILDCARD_REPLY},NORMAL\n\
                 table=1,priority=100,udp,tp_dst=9001,ct_state=+trk+new,actions={UNWILDCARD},ct(commit,zone=5),NORMAL\n\
                 table=1,priority=50,ip,ct_state=+trk+new,actions=ct(commit,zone=5),NORMAL\n\
                 table=1,priority=50,ip,ct_state=+trk+est,actions=NORMAL\n"
            ),
        )?;
        network::ping("ns1", "10.9.0.2")
    }

    fn before_traffic(&self) -> Result<()> {
        undisturbed(fill)?;
        wait_until_full(FLOWS)
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let udp = |port, interval_us, ports| {
            Spec::udp(&Place::named("ns1"), &Place::named("ns2"), (SERVER, port), interval_us, ports)
        };
        let crowd = Ports::Cycle { first: CROWD_FIRST, count: CONNECTIONS };
        vec![
            ("e".to_owned(), udp(network::CONSTANT_PORT, network::CONSTANT_US, Ports::Constant)),
            ("n".to_owned(), udp(network::EACH_NEW_PORT, BURST_US, Ports::EachNew)),
            ("crowd".to_owned(), udp(CROWD_PORT, CROWD_US, crowd)),
            network::silent("ns3"),
        ]
    }

    fn expect(&self) -> Expect {
        Expect { keeps_flows: false, ..Expect::default() }
    }

    fn before_action(&self, outcome: &mut Outcome) -> Result<()> {
        outcome.note("kernel flows before", present());
        Ok(())
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        let before = evidence.flows_before.len();
        outcome.check("20,000 kernel flows before", before as u64 >= FLOWS, before);
        let parked = evidence.report.as_ref().map(|report| report["parked"].clone()).unwrap_or_default();
        outcome.note("parked", json!(parked));
    }
}

//! Packets that cannot start again, each kind by itself: what the report counts under its reason is exactly what the
//! probe of that kind has lost.
//!
//! All streams stop in the midst of the gap: of a stream that goes on the new daemon makes the same flows again, and the
//! parked packets are continued there (docs/replay.md). What no rule of Open vSwitch sends up just then is injected.

use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context, Result};
use nix::sys::signal::{kill, Signal};
use serde_json::{json, Value};

use super::network::{self, UNWILDCARD, UNWILDCARD_TTL};
use super::{controller, Custom, Expect};
use crate::command::{shell, wait_until};
use crate::guest::controller::Controller;
use crate::guest::inject::{add_flow, inject, Injected};
use crate::guest::probe::{Place, Ports, Protocol, Spec};
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
    protocol: Protocol,
}

impl Kind {
    const fn udp(reason: &'static str, address: Ipv4Addr, port: u16) -> Self {
        Kind { reason, address, port, protocol: Protocol::Udp }
    }
}

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// Translated to [`SERVER`] by `ct`.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 200);
/// Made [`SERVER`] by a rule.
const ALIAS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 201);

const ALIAS_PORT: u16 = 9308;
/// A stream of which a controller gets a copy; it loses nothing.
const COPIED: &str = "controller_copy";
const COPIED_PORT: u16 = 9310;

const KINDS: [Kind; 8] = [
    Kind::udp("copy_before_recirc", SERVER, 9301),
    Kind::udp("copy_beside_recirc", SERVER, 9302),
    Kind::udp("nested_recirc", SERVER, 9303),
    Kind::udp("nat_connection_gone", SERVICE, 9304),
    Kind::udp("nat_helper", SERVICE, 9305),
    Kind { reason: "nat_protocol", address: SERVICE, port: 9306, protocol: Protocol::UdpLite },
    Kind::udp("header_change_before_recirc", SERVER, 9307),
    Kind::udp("parents_disagree", SERVER, ALIAS_PORT),
];

/// Where the connection table cannot be asked.
const UNASKED: [Kind; 1] = [Kind::udp("nat_before_recirc", SERVICE, 9309)];

// enum user_action_cookie_type of Open vSwitch (ofproto/ofproto-dpif-upcall.h), and one that it does not have.
const SFLOW: u16 = 1;
const SLOW_PATH: u16 = 2;
const FLOW_SAMPLE: u16 = 3;
const IPFIX: u16 = 4;
const CONTROLLER: u16 = 5;
const NOBODYS: u16 = 4711;

/// Where a flow recirculates to that somebody adds by hand: Open vSwitch's own match all that they change.
const BY_HAND: u32 = 0x7fff_fff1;

/// Reason, what is injected, how many.
const INJECTED: [(&str, Injected, u64); 8] = [
    ("header_change_not_exact", Injected::Recirculate(BY_HAND), 2),
    ("no_parent", Injected::Recirculate(0x7fff_fff0), 3),
    ("action_sflow", Injected::Userspace { cookie: SFLOW, cut_to: 0 }, 4),
    ("action_flow_sample", Injected::Userspace { cookie: FLOW_SAMPLE, cut_to: 0 }, 5),
    ("action_ipfix", Injected::Userspace { cookie: IPFIX, cut_to: 0 }, 6),
    ("controller_no_flow", Injected::Userspace { cookie: CONTROLLER, cut_to: 0 }, 7),
    ("action_unknown_cookie", Injected::Userspace { cookie: NOBODYS, cut_to: 0 }, 8),
    ("truncated", Injected::Userspace { cookie: SLOW_PATH, cut_to: 60 }, 9),
];

/// So long packets of all kinds are parked once the old daemon is told to end.
const GATHERING: Duration = Duration::from_millis(200);
/// Time between two packets of a kind, µs: each makes flows, and all kinds together are not to keep a slow machine busy.
const INTERVAL_US: u64 = 2 * network::EACH_NEW_US;

impl Custom for Unreplayable {
    fn name(&self) -> &'static str {
        "unreplayable"
    }

    fn about(&self) -> &'static str {
        "packets that cannot start again: each under its reason, with the exact number"
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(2)
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        let controller = set_up()?;
        let kinds = of_this_kernel(outcome);
        let counted = round(&kinds, &INJECTED, &controller, out, outcome)?;
        for (reason, _, count) in INJECTED {
            outcome.check(format!("{reason}: as many as were injected"), counted[reason] == count, &counted);
        }
        keep_from_asking()?;
        round(&UNASKED, &[], &controller, &out.join("unasked"), outcome)?;
        Ok(())
    }
}

/// Linux 7 has no UDP-Lite any more.
fn of_this_kernel(outcome: &mut Outcome) -> Vec<Kind> {
    let has = |protocol: Protocol| protocol != Protocol::UdpLite || Protocol::udp_lite_is_known();
    let (there, absent): (Vec<Kind>, Vec<Kind>) = KINDS.into_iter().partition(|kind| has(kind.protocol));
    outcome.note("not of this kernel", absent.iter().map(|kind| kind.reason).collect::<Vec<_>>());
    there
}

fn set_up() -> Result<Controller> {
    let controller = Controller::counting(controller::PORT)?;
    shell("ovs-vsctl add-br br0")?;
    controller::connect()?;
    network::patient_veth()?;
    network::attach("ns1", "br0", "10.9.0.1/24", "")?;
    network::attach("ns2", "br0", "10.9.0.2/24", "")?;
    network::attach("ns3", "br0", "", "")?;
    network::neighbour("ns1", &SERVICE.to_string(), "ns2")?;
    network::neighbour("ns1", &ALIAS.to_string(), "ns2")?;
    // Of UDP-Lite the kernel counts the checksum with UDP's pseudo header, and finds it wrong
    // (nf_conntrack_proto_udp.c, udplite_error).
    shell("sysctl -qw net.netfilter.nf_conntrack_checksum=0")?;
    let [client, server] = [network::mac("ns1")?, network::mac("ns2")?];
    network::rules(
        "br0",
        &format!(
            "table=0,priority=1,actions=NORMAL\n\
             table=0,priority=60,udp,tp_dst=9301,actions=output:v-ns3,ct(table=1,zone=5)\n\
             table=0,priority=60,udp,tp_dst=9302,actions=ct(table=1,zone=5),output:v-ns3\n\
             table=0,priority=60,udp,tp_dst=9303,actions=check_pkt_larger(1000)->NXM_NX_REG2[0],resubmit(,4)\n\
             table=0,priority=60,udp,tp_dst=9304,actions=ct(table=2,zone=6,nat)\n\
             table=0,priority=60,udp,tp_src=9304,actions=ct(table=3,zone=6,nat)\n\
             table=0,priority=60,udp,tp_dst=9305,actions=ct(table=5,zone=7,nat)\n\
             table=0,priority=60,udp,tp_src=9305,actions=ct(table=3,zone=7,nat)\n\
             table=0,priority=60,ip,nw_proto=136,nw_dst={SERVICE},actions=ct(table=6,zone=8,nat)\n\
             table=0,priority=60,ip,nw_proto=136,nw_src={SERVER},actions=ct(table=3,zone=8,nat)\n\
             table=0,priority=60,udp,tp_dst=9307,actions=decap(),encap(ethernet),\
             set_field:{client}->eth_src,set_field:{server}->eth_dst,ct(table=1,zone=5)\n\
             table=0,priority=60,udp,tp_dst={ALIAS_PORT},nw_dst={ALIAS},\
             actions=mod_nw_dst:{SERVER},ct(table=1,zone=5)\n\
             table=0,priority=60,udp,tp_dst={ALIAS_PORT},nw_dst={SERVER},actions=ct(table=1,zone=5)\n\
             table=0,priority=60,udp,tp_dst={COPIED_PORT},actions=CONTROLLER:100,NORMAL\n\
             table=0,priority=60,udp,tp_dst=9309,actions=ct(table=2,zone=6,nat)\n\
             table=0,priority=60,udp,tp_src=9309,actions=ct(table=3,zone=6,nat)\n\
             table=1,priority=1,udp,actions={UNWILDCARD},NORMAL\n\
             table=2,priority=2,udp,ct_state=+trk+new,actions=ct(commit,zone=6,nat(dst={SERVER}),table=1)\n\
             table=2,priority=1,udp,actions=resubmit(,1)\n\
             table=3,priority=1,actions=NORMAL\n\
             table=4,priority=2,udp,reg2=1,actions=drop\n\
             table=4,priority=1,udp,actions=ct(table=1,zone=5)\n\
             table=5,priority=2,udp,ct_state=+trk+new,\
             actions=ct(commit,zone=7,nat(dst={SERVER}),alg=tftp,table=1)\n\
             table=5,priority=1,udp,actions=resubmit(,1)\n\
             table=6,priority=2,ip,ct_state=+trk+new,actions=ct(commit,zone=8,nat(dst={SERVER}),table=7)\n\
             table=6,priority=1,ip,actions=resubmit(,7)\n\
             table=7,priority=1,ip,actions={UNWILDCARD_TTL},NORMAL\n"
        ),
    )?;
    network::ping("ns1", &SERVER.to_string())?;
    Ok(controller)
}

/// A restart under a stream of each of `kinds`, and `injected` in the gap; what the report counted by reason.
fn round(
    kinds: &[Kind],
    injected: &[(&str, Injected, u64)],
    controller: &Controller,
    out: &Path,
    outcome: &mut Outcome,
) -> Result<Value> {
    facts::save_everything(&out.join("before"), &["br0".to_owned()]);
    let copies_before = controller.packets();
    let live = start(kinds)?;
    let caller = Caller::start();
    std::thread::sleep(Duration::from_secs(2));
    facts::flows(&out.join("flows-before"))?;
    let known = run::known();
    let path = out.join("report.json");
    let arguments = ["--report", path.to_str().context("the folder's name")?];
    let mut client = run::start(&arguments, &out.join("action-stdout"))?;
    let stopped = in_the_gap(&live, caller, injected, &known);
    outcome.action_exit = client.wait()?.code();
    stopped?;
    say("the run has ended");
    let earlier = std::mem::replace(&mut outcome.probes, guest::finish_all(live)?);
    let report: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    outcome.check("exit code 0", outcome.action_exit == Some(0), outcome.action_exit);
    let counted = report["parked"]["unreplayable"].clone();
    kinds.iter().for_each(|kind| judge(kind, &counted, outcome));
    let reasons = counted.as_object().map_or(0, serde_json::Map::len);
    judge_copies(copies_before, controller, &counted, outcome);
    outcome.check("no other reason", reasons == kinds.len() + injected.len() + 1, &report["parked"]);
    verdict::probes_sent(outcome);
    // The others have lost what they should.
    let lossless = ["e", COPIED].iter().filter_map(|name| outcome.probes.remove_entry(*name)).collect();
    let others = std::mem::replace(&mut outcome.probes, lossless);
    verdict::no_losses(&Expect::default(), outcome);
    outcome.probes.extend(others);
    outcome.probes.extend(earlier);
    Ok(counted)
}

fn start(kinds: &[Kind]) -> Result<Live> {
    let (from, to) = (Place::named("ns1"), Place::named("ns2"));
    let streams = kinds.iter().enumerate().map(|(index, kind)| {
        // Ports of its own for each: a source has one socket for a port.
        let ports = Ports::Cycle { first: 10_000 + 5_000 * index as u16, count: 5_000 };
        let mut stream = Spec::udp(&from, &to, (kind.address, kind.port), INTERVAL_US, ports);
        if let Spec::Udp { protocol, .. } = &mut stream {
            *protocol = kind.protocol;
        }
        (kind.reason.to_owned(), stream)
    });
    let constant = |name: &str, port, interval_us| {
        (name.to_owned(), Spec::udp(&from, &to, (SERVER, port), interval_us, Ports::Constant))
    };
    let constant =
        [constant("e", network::CONSTANT_PORT, network::CONSTANT_US), constant(COPIED, COPIED_PORT, INTERVAL_US)];
    guest::start_all(streams.chain(constant).collect())
}

/// The connections of what is parked in zone 6 are forgotten, packets are injected, and everything but `e` stops.
fn in_the_gap(live: &Live, caller: Caller, injected: &[(&str, Injected, u64)], known: &[String]) -> Result<()> {
    // Nothing of it is on its way when packets are parked.
    run::wait_for("switch-prepare", known)?;
    caller.end()?;
    run::wait_for("switch-commit", known)?;
    let begun = Instant::now();
    if !injected.is_empty() {
        // Not earlier: the old daemon deletes what it does not know, until that is refused. The run reads the flows when
        // the old daemon has ended.
        add_flow(BY_HAND)?;
        injected.iter().try_for_each(|(_, what, count)| inject(*what, *count))?;
    }
    while_the_run_is_stopped(|| {
        std::thread::sleep(GATHERING.saturating_sub(begun.elapsed()));
        live.iter().filter(|(name, _)| name != "e").for_each(|(_, probe)| probe.stop_sending());
        if injected.is_empty() {
            return Ok(());
        }
        forget_connections(6)
    })
}

/// On a quick machine the replay would have begun. What comes up meanwhile waits in the run's sockets.
fn while_the_run_is_stopped(work: impl FnOnce() -> Result<()>) -> Result<()> {
    let supervisor = run::supervisor()?;
    kill(supervisor, Signal::SIGSTOP)?;
    let done = work();
    kill(supervisor, Signal::SIGCONT)?;
    done
}

/// Before all others, as the probes are. `conntrack -D` ends where a connection has expired since it was listed, and begins
/// again then.
fn forget_connections(zone: u16) -> Result<()> {
    let delete = format!("chrt --rr 1 conntrack -D -w {zone} >/dev/null 2>&1");
    let left = format!("[ -z \"$(conntrack -L -w {zone} 2>/dev/null)\" ]");
    shell(&format!("for i in $(seq 20); do if {delete}; then exit 0; fi; done; {left}"))
        .with_context(|| format!("connections of zone {zone} are left"))
        .map(drop)
}

/// Keeps the flow in use that makes [`ALIAS`] [`SERVER`], from its start until it is ended.
struct Caller {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Caller {
    fn start() -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let stop = ended.clone();
        let thread = std::thread::spawn(move || {
            Place::named("ns1").enter()?;
            // Beside the ports of the streams, and as high as theirs: flows match the bits that tell ports of rules apart.
            let socket = UdpSocket::bind(("0.0.0.0", 61_000))?;
            while !stop.load(Ordering::Relaxed) {
                socket.send_to(b"not one of the stream", (ALIAS, ALIAS_PORT))?;
                std::thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        });
        Caller { ended, thread }
    }

    fn end(self) -> Result<()> {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the caller panicked"))?
    }
}

/// Takes ctnetlink away: the kernel would load it again for who asks.
fn keep_from_asking() -> Result<()> {
    std::fs::write("/etc/modprobe.d/lab.conf", "install nf_conntrack_netlink /bin/false\n")?;
    let gone = || shell("modprobe -r nf_conntrack_netlink").is_ok();
    wait_until("nf_conntrack_netlink is unloaded", Duration::from_secs(10), Duration::from_millis(200), gone)
}

/// What the controller has not got a copy of is what the report counts.
fn judge_copies(copies_before: u64, controller: &Controller, counted: &Value, outcome: &mut Outcome) {
    let sent = match outcome.probes.get(COPIED) {
        Some(ProbeOutcome::Udp(udp)) => udp.requests.sent,
        _ => 0,
    };
    let copies = controller.packets() - copies_before;
    let missing = sent.saturating_sub(copies);
    let counted = counted[COPIED].as_u64().unwrap_or(0);
    let found = json!({ "sent": sent, "copies": copies, "counted": counted });
    outcome.check("controller_copy: as many as the controller has not got", counted > 0 && counted == missing, found);
}

fn judge(kind: &Kind, counted: &Value, outcome: &mut Outcome) {
    let lost = match outcome.probes.get(kind.reason) {
        Some(ProbeOutcome::Udp(udp)) => udp.requests.lost,
        _ => 0,
    };
    let counted = counted[kind.reason].as_u64().unwrap_or(0);
    let found = json!({ "lost": lost, "counted": counted });
    outcome.check(format!("{}: as many as the probe has lost", kind.reason), counted > 0 && counted == lost, found);
}

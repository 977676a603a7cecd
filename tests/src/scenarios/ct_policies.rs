//! Three zones with policies of TCP, UDP and ICMP, zone 0 among them; limits on two, a default limit; thousands of live
//! connections. Each keeps its policy until it ends, then the old policies go; a tenant at its limit stays refused.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context, Result};
use serde_json::{json, Value};

use super::network::{self, UNWILDCARD};
use super::{Expect, Traffic};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::probe::{Place, Spec, SLOWER};
use crate::guest::{say, Evidence};
use crate::outcome::{Action, Load, Outcome};

/// See the module.
pub struct CtPolicies;

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// Live connections of each of the three kinds: 5,100 in all, a tenth of that in a brief run. Those of TCP are all that
/// zone 5 may have.
fn each() -> usize {
    if brief() {
        170
    } else {
        1700
    }
}

fn brief() -> bool {
    SLOWER.load(Ordering::Relaxed) >= u64::from(Load::BRIEF.slower)
}

/// Limits that are nobody's default (Linux: TCP established 432000 s, UDP 120 s, ICMP 30 s).
const TCP_ESTABLISHED: u64 = 7000;
const UDP_SINGLE: u64 = 205;
const UDP_MULTIPLE: u64 = 305;
const UDP_ZONE_0: u64 = 405;
const ICMP: u64 = 55;
/// How far a timer may have run down between the packet and the look: so many connections take their time.
pub(super) fn slack() -> u64 {
    if brief() {
        12
    } else {
        60
    }
}
/// The same of a ping.
const ICMP_SLACK: u64 = 12;

/// A kind of live connection: its port says its zone.
pub(super) struct Kind {
    name: &'static str,
    pub(super) port: u16,
    pub(super) timer: u64,
}

const TCP: Kind = Kind { name: "tcp in zone 5", port: 9300, timer: TCP_ESTABLISHED };
pub(super) const UDP: Kind = Kind { name: "udp in zone 6", port: 9201, timer: UDP_MULTIPLE };
const DEFAULT_ZONE: Kind = Kind { name: "udp in zone 0", port: 9200, timer: UDP_ZONE_0 };

/// OVS 3.3 and later make no policy for a zone that comes with it, but when it changes (docs/conntrack.md).
const ASKED_FOR: &str = "
    for policy in $(ovs-vsctl --bare --columns=_uuid list CT_Timeout_Policy); do
        ovs-vsctl set CT_Timeout_Policy $policy timeouts:icmp_reply=30
        ovs-vsctl remove CT_Timeout_Policy $policy timeouts icmp_reply
    done";

/// Connections that are held open, and somebody who tries for one more.
struct Held {
    tcp: Vec<(TcpStream, TcpStream)>,
    udp: Vec<UdpPairs>,
    greedy: Greedy,
    policies: BTreeSet<String>,
    count: String,
}

/// Clients and the one server they talk to.
pub(super) struct UdpPairs {
    clients: Vec<UdpSocket>,
    server: UdpSocket,
}

static HELD: Mutex<Option<Held>> = Mutex::new(None);

/// Runs `make` in a namespace: a socket stays in the one it was made in.
fn inside<T: Send>(ns: &str, make: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let place = Place::named(ns);
    let made = std::thread::scope(|scope| scope.spawn(move || place.enter().and_then(|()| make())).join());
    made.map_err(|_| anyhow!("making sockets in {ns} panicked"))?
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::V4(SocketAddrV4::new(SERVER, port))
}

fn hold_tcp() -> Result<Vec<(TcpStream, TcpStream)>> {
    let listener = inside("ns2", || Ok(TcpListener::bind(("0.0.0.0", TCP.port))?))?;
    let mut held = Vec::new();
    for _ in 0..each() {
        let client = inside("ns1", || Ok(TcpStream::connect_timeout(&address(TCP.port), Duration::from_secs(10))?))?;
        held.push((client, listener.accept()?.0));
    }
    Ok(held)
}

pub(super) fn hold_udp(kind: &Kind) -> Result<UdpPairs> {
    let server = inside("ns2", || Ok(UdpSocket::bind(("0.0.0.0", kind.port))?))?;
    server.set_read_timeout(Some(Duration::from_secs(5)))?;
    let clients = inside("ns1", || {
        (0..each())
            .map(|_| -> Result<UdpSocket> {
                let client = UdpSocket::bind("0.0.0.0:0")?;
                client.connect(address(kind.port))?;
                client.set_read_timeout(Some(Duration::from_secs(5)))?;
                Ok(client)
            })
            .collect()
    })?;
    Ok(UdpPairs { clients, server })
}

impl UdpPairs {
    /// A packet and its answer on every connection.
    pub(super) fn talk(&self) -> Result<()> {
        let mut buffer = [0u8; 16];
        for client in &self.clients {
            client.send(b"ask")?;
            let (_, from) = self.server.recv_from(&mut buffer).context("no request came")?;
            self.server.send_to(b"answer", from)?;
            client.recv(&mut buffer).context("no answer came")?;
        }
        Ok(())
    }
}

fn talk_tcp(held: &mut [(TcpStream, TcpStream)]) -> Result<()> {
    use std::io::{Read, Write};
    let mut buffer = [0u8; 3];
    for (client, server) in held {
        client.set_read_timeout(Some(Duration::from_secs(5)))?;
        server.set_read_timeout(Some(Duration::from_secs(5)))?;
        client.write_all(b"ask")?;
        server.read_exact(&mut buffer).context("nothing came over a TCP connection")?;
        server.write_all(b"yes")?;
        client.read_exact(&mut buffer).context("nothing came back over a TCP connection")?;
    }
    Ok(())
}

/// Seconds left to the connections to `port`, as `conntrack -L` prints them.
pub(super) fn timers(port: u16) -> Vec<u64> {
    let proto = if port == TCP.port { "tcp" } else { "udp" };
    let text = shell_lenient(&format!("conntrack -L -p {proto} --orig-port-dst {port} 2>/dev/null"));
    text.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse().ok()).collect()
}

/// All connections of `kind` are there, and none has more or much less than its policy gives.
fn governed(kind: &Kind, when: &str, wanted: usize, outcome: &mut Outcome) {
    let timers = timers(kind.port);
    let right = timers.iter().filter(|t| (kind.timer - slack()..=kind.timer).contains(t)).count();
    let found = json!({ "wanted": wanted, "right": right, "all": timers.len(),
        "lowest": timers.iter().min(), "highest": timers.iter().max() });
    asked(outcome, format!("{when}: {} under its policy", kind.name), right == wanted && timers.len() == wanted, found);
}

/// Of ours it is asked, of stock it is noted: what the baseline loses is no failure of the lab.
fn asked(outcome: &mut Outcome, name: String, pass: bool, found: Value) {
    match outcome.action.judged_as_ours() {
        true => outcome.check(name, pass, found),
        false => outcome.note(name, json!({ "held": pass, "found": found })),
    }
}

/// Names of the policies that the kernel's flows ask for.
pub(super) fn named_by_flows() -> BTreeSet<String> {
    let flows = shell_lenient("ovs-dpctl dump-flows");
    let names = flows.split("timeout=").skip(1).filter_map(|rest| rest.split([',', ')']).next());
    names.map(str::to_owned).collect()
}

/// Open vSwitch's own policies, as the kernel lists them.
pub(super) fn policies() -> BTreeSet<String> {
    let dump = shell_lenient("dpfreeze dump");
    let words = dump.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("ovs_tp_")).map(str::to_owned).collect()
}

/// Tries for one TCP connection after the other where none may be had.
struct Greedy {
    stop: Arc<AtomicBool>,
    tried: Arc<AtomicU64>,
    had: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Greedy {
    fn start() -> Greedy {
        let (stop, tried, had) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let (stopped, tries, haves) = (stop.clone(), tried.clone(), had.clone());
        let thread = std::thread::spawn(move || {
            let place = Place::named("ns1");
            if place.enter().is_err() {
                return;
            }
            while !stopped.load(Ordering::Relaxed) {
                tries.fetch_add(1, Ordering::Relaxed);
                if TcpStream::connect_timeout(&address(TCP.port), Duration::from_millis(300)).is_ok() {
                    haves.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Greedy { stop, tried, had, thread }
    }

    /// How often it tried, and how often it succeeded.
    fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let _ended = self.thread.join();
        (self.tried.load(Ordering::Relaxed), self.had.load(Ordering::Relaxed))
    }
}

fn limit_of_zone_5() -> String {
    shell_lenient("ovs-dpctl ct-get-limits zone=5 | grep zone=5").trim().to_owned()
}

impl Traffic for CtPolicies {
    fn name(&self) -> &'static str {
        "ct_policies"
    }

    fn about(&self) -> &'static str {
        "three zones with timeout policies, limits, thousands of live connections"
    }

    fn set_up(&self) -> Result<()> {
        shell("ovs-vsctl add-br br0")?;
        shell(&format!(
            "ovs-vsctl -- --id=@d create Datapath datapath_version=0 -- set open_vswitch . datapaths:system=@d
             ovs-vsctl add-zone-tp system zone=5 tcp_syn_sent=31 tcp_established={TCP_ESTABLISHED} tcp_time_wait=5
             ovs-vsctl add-zone-tp system zone=6 udp_single={UDP_SINGLE} udp_multiple={UDP_MULTIPLE} icmp_first={ICMP}
             ovs-vsctl add-zone-tp system zone=0 udp_single=206 udp_multiple={UDP_ZONE_0}
             {ASKED_FOR}"
        ))?;
        network::attach("ns1", "br0", "10.9.0.1/24", "")?;
        network::attach("ns2", "br0", "10.9.0.2/24", "")?;
        network::attach("ns3", "br0", "", "")?;
        // New flows without ct: for each new connection of a limited zone the kernel looks at every one that is there
        // (nf_conncount), which makes an emulated CPU's time theirs.
        let (default, limited) = (DEFAULT_ZONE.port, TCP.port);
        network::rules(
            "br0",
            &format!(
                "table=0,priority=1,actions=NORMAL\n\
                 table=0,priority=100,udp,tp_dst=9001,actions={UNWILDCARD},NORMAL\n\
                 table=0,priority=100,udp,tp_src=9001,actions=NORMAL\n\
                 table=0,priority=60,tcp,tp_dst={limited},actions=ct(table=1,zone=5)\n\
                 table=0,priority=60,tcp,tp_src={limited},actions=ct(table=1,zone=5)\n\
                 table=0,priority=60,udp,tp_dst={default},actions=ct(table=1,zone=0)\n\
                 table=0,priority=60,udp,tp_src={default},actions=ct(table=1,zone=0)\n\
                 table=0,priority=50,ip,actions=ct(table=1,zone=6)\n\
                 table=1,priority=50,ip,ct_zone=5,ct_state=+trk+new,actions=ct(commit,zone=5),NORMAL\n\
                 table=1,priority=50,ip,ct_zone=6,ct_state=+trk+new,actions=ct(commit,zone=6),NORMAL\n\
                 table=1,priority=50,ip,ct_zone=0,ct_state=+trk+new,actions=ct(commit,zone=0),NORMAL\n\
                 table=1,priority=50,ip,ct_state=+trk+est,actions=NORMAL\n"
            ),
        )?;
        let limit = each();
        shell(&format!("ovs-dpctl ct-set-limits default=50000 zone=5,limit={limit} zone=6,limit=60000"))?;
        network::ping("ns1", "10.9.0.2")
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let mut probes = network::usual_probes(Place::named("ns1"), Place::named("ns2"), SERVER);
        probes.push(network::silent("ns3"));
        probes
    }

    fn expect(&self) -> Expect {
        Expect { refused: &["upcall_bind", "ct_timeout_del"], keeps_flows: false, ..Expect::default() }
    }

    fn before_action(&self, outcome: &mut Outcome) -> Result<()> {
        let tcp = hold_tcp()?;
        let udp = vec![hold_udp(&UDP)?, hold_udp(&DEFAULT_ZONE)?];
        let count = limit_of_zone_5();
        let mut held = Held { tcp, udp, greedy: Greedy::start(), policies: BTreeSet::new(), count };
        talk(&mut held)?;
        // A connection of UDP counts as replied from its third second on (nf_conntrack_proto_udp.c, stream_ts).
        std::thread::sleep(Duration::from_secs(3));
        talk(&mut held)?;
        all_governed("before", outcome);
        held.policies = named_by_flows();
        outcome.note("policies before", &held.policies);
        let limit = each();
        let full = held.count.contains(&format!("limit={limit},count={limit}"));
        outcome.check("before: zone 5 is at its limit", full, &held.count);
        *HELD.lock().unwrap_or_else(PoisonError::into_inner) = Some(held);
        Ok(())
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        let held = HELD.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut held) = held else { return outcome.check("live connections were held", false, Value::Null) };
        match talk(&mut held) {
            Ok(()) => all_governed("after", outcome),
            Err(error) => outcome.check("after: every live connection passes", false, format!("{error:#}")),
        }
        let (tried, had) = held.greedy.finish();
        outcome.check("a tenant at its limit stayed refused", tried > 10 && had == 0, json!([tried, had]));
        limits(&held.count, outcome);
        let old = held.policies.clone();
        newcomers(&old, outcome);
        if evidence.job.action == Action::Ours {
            still_guarded(&old, outcome);
            drop((held.tcp, held.udp));
            the_end(&old, outcome);
            by_hand(outcome);
        }
    }
}

fn talk(held: &mut Held) -> Result<()> {
    talk_tcp(&mut held.tcp).context(TCP.name)?;
    held.udp.iter().try_for_each(UdpPairs::talk)
}

fn all_governed(when: &str, outcome: &mut Outcome) {
    for kind in [&TCP, &UDP, &DEFAULT_ZONE] {
        governed(kind, when, each(), outcome);
    }
    shell_lenient("ip netns exec ns1 ping -q -c 1 -W 2 10.9.0.2");
    let text = shell_lenient("conntrack -L -p icmp 2>/dev/null");
    let timers: Vec<u64> = text.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse().ok()).collect();
    let right = timers.iter().max().is_some_and(|t| (ICMP - ICMP_SLACK..=ICMP).contains(t));
    asked(outcome, format!("{when}: icmp in zone 6 under its policy"), right, json!(timers));
}

/// The kernel counts those that were refused for a moment.
fn limits(before: &str, outcome: &mut Outcome) {
    std::thread::sleep(Duration::from_secs(1));
    let now = limit_of_zone_5();
    outcome.check("limit and count of zone 5 as before", now == before, json!([before, now]));
}

/// New connections get the policy that the new daemon has made.
fn newcomers(old: &BTreeSet<String>, outcome: &mut Outcome) {
    let fresh = Kind { name: "a new connection of zone 6", port: 9202, timer: UDP_SINGLE };
    let talked = hold_udp(&fresh).and_then(|pairs| pairs.talk());
    let named = named_by_flows();
    outcome.check("new connections pass", talked.is_ok(), format!("{talked:?}"));
    governed(&fresh, "after", each(), outcome);
    let shared: Vec<&String> = named.intersection(old).collect();
    let renamed = !named.is_empty() && shared.is_empty();
    asked(outcome, "flows name new policies".to_owned(), renamed, json!([old, named]));
}

/// A ping is over in a minute; TCP and UDP are held.
fn still_guarded(old: &BTreeSet<String>, outcome: &mut Outcome) {
    let old: BTreeSet<String> = old.iter().filter(|name| !name.contains("icmp")).cloned().collect();
    let status: Value = serde_json::from_str(&shell_lenient("ovs-graceful status --json")).unwrap_or(Value::Null);
    let guarded: BTreeSet<String> = status["guard"]["policies"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|policy| policy["connections"].as_u64().is_some_and(|left| left > 0))
        .filter_map(|policy| Some(policy["policy"].as_str()?.to_owned()))
        .collect();
    outcome.check(
        "status shows the old policies guarded",
        !old.is_empty() && old.is_subset(&guarded),
        &status["guard"],
    );
    let there = policies();
    outcome.check("old policies are there while connections live", old.is_subset(&there), json!([old, there]));
}

/// `ovs-graceful ct`: what the run found is compared by meaning, and lost limits are put back.
fn by_hand(outcome: &mut Outcome) {
    let ct = |words: &str| shell_lenient(&format!("timeout 30 ovs-graceful ct {words}; echo exit=$?"));
    let shown = ct("show");
    outcome.check(
        "ct show: zone 5 has its policy",
        shown.contains("tcp_established=7000") && shown.contains("exit=0"),
        &shown,
    );
    let same = ct("diff");
    outcome.check("ct diff: nothing, whatever the policies are called", same.contains("exit=0"), &same);
    shell_lenient("ovs-dpctl ct-del-limits zone=5,6");
    let lost = ct("diff");
    let limit = each();
    let told = lost.contains(&format!("limit of zone 5 was {limit}")) && lost.contains("exit=30");
    outcome.check("ct diff: the lost limits", told, &lost);
    let restored = ct("restore");
    let now = shell_lenient("ovs-dpctl ct-get-limits");
    let back = now.contains(&format!("zone=5,limit={limit}")) && now.contains("zone=6,limit=60000");
    outcome.check("ct restore: the limits are back", back && restored.contains("exit=0"), json!([restored, now]));
}

/// With the last connection go the old policies, then guard and timer.
fn the_end(old: &BTreeSet<String>, outcome: &mut Outcome) {
    say("the last connections end");
    let begun = Instant::now();
    outcome.note("conntrack -F", shell_lenient("conntrack -F 2>&1").trim());
    let gone = wait_until("the old policies to go", Duration::from_secs(60), Duration::from_secs(1), || {
        policies().is_disjoint(old)
    });
    let took = begun.elapsed().as_secs();
    outcome.check("old policies go within a minute", gone.is_ok(), json!({ "seconds": took, "left": policies() }));
    let ended = wait_until("the guard to end", Duration::from_secs(30), Duration::from_secs(1), || {
        !Path::new("/sys/fs/bpf/ovs-graceful-guard").exists()
            && crate::guest::facts::unit_property("ovs-graceful-guard.timer", "ActiveState") == "inactive"
    });
    let left = shell_lenient("ls /sys/fs/bpf /run/ovs-graceful; systemctl list-timers --all --no-pager | grep ovs");
    outcome.check("nothing of the guard is left", ended.is_ok() && !left.contains("guard.json"), left);
    outcome
        .note("guard log", shell_lenient("journalctl --no-pager -o cat -u ovs-graceful-guard.service | grep guard:"));
}

//! Tunnels of more kinds, all on one bridge: GRE and ERSPAN over IPv4 and IPv6, VXLAN over IPv6 and with group policy, a
//! mirror into an ERSPAN tunnel, and ports that Open vSwitch cannot make. Beside stock, in one VM.

mod outer;

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{json, Value};

use super::nat::UNWILDCARD_REPLY;
use super::network::{self, UNWILDCARD};
use super::{Custom, Traffic};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::probe::{tcp, Place, Ports, Spec};
use crate::guest::{self, Evidence};
use crate::outcome::{Action, CopiesOutcome, Job, Outcome, ProbeOutcome};

/// See the module.
pub struct MoreTunnels;

/// A tunnel from br0 to a kernel device in namespace `far`.
struct Tunnel {
    /// Its port, its device there, and its probes.
    name: &'static str,
    /// Words of `ovs-vsctl set interface`.
    ours: &'static str,
    /// Words of `ip link add`.
    theirs: &'static str,
    /// What its packets say on the outside (`outer`).
    says: &'static str,
}

const V4: &str = "local 172.16.0.2 remote 172.16.0.1";
const V6: &str = "local fd00::2 remote fd00::1";

/// What the group policy tunnel's packets carry.
const GROUP: u16 = 85;

/// Number N of them has the addresses 10.9.N.1 and 10.9.N.2. A device takes only what has its key. Open vSwitch reads index
/// and hardware of ERSPAN as hexadecimal numbers, and numbers its packets; Linux at the other end would drop what two CPUs
/// mix up if it looked at that.
const TUNNELS: [Tunnel; 7] = [
    Tunnel {
        name: "gre",
        ours: "type=gre options:remote_ip=172.16.0.2 options:key=7",
        theirs: "type gretap V4 key 7",
        says: "gre key=7",
    },
    Tunnel {
        name: "erspan1",
        ours: "type=erspan options:remote_ip=172.16.0.2 options:key=9 options:erspan_ver=1 options:erspan_idx=7",
        theirs: "type erspan V4 key 9 oseq erspan_ver 1 erspan 7",
        says: "erspan v1 session=9 index=7",
    },
    Tunnel {
        name: "erspan2",
        ours: "type=erspan options:remote_ip=172.16.0.2 options:key=10 options:erspan_ver=2 options:erspan_dir=1 \
               options:erspan_hwid=4",
        theirs: "type erspan V4 key 10 oseq erspan_ver 2 erspan_dir egress erspan_hwid 4",
        says: "erspan v2 session=10 dir=1 hwid=4",
    },
    Tunnel {
        name: "vxlan6",
        ours: "type=vxlan options:remote_ip=fd00::2 options:key=11",
        theirs: "type vxlan id 11 V6 dstport 4789 udp6zerocsumrx",
        says: "vxlan6 port=4789 vni=11",
    },
    Tunnel {
        name: "gre6",
        ours: "type=ip6gre options:remote_ip=fd00::2 options:key=12",
        theirs: "type ip6gretap V6 key 12",
        says: "gre6 key=12",
    },
    Tunnel {
        name: "gbp",
        ours: "type=vxlan options:remote_ip=172.16.0.2 options:key=13 options:exts=gbp options:dst_port=4790",
        theirs: "type vxlan id 13 V4 dstport 4790 gbp",
        says: "vxlan port=4790 vni=13 group=85",
    },
    Tunnel {
        name: "erspan6",
        ours: "type=ip6erspan options:remote_ip=fd00::2 options:key=14 options:erspan_ver=1 options:erspan_idx=8",
        theirs: "type ip6erspan V6 key 14 oseq erspan_ver 1 erspan 8",
        says: "erspan6 v1 session=14 index=8",
    },
];

/// Where the mirror of ns1's port goes.
const MIRROR: Tunnel = Tunnel {
    name: "mirror",
    ours: "type=erspan options:remote_ip=172.16.0.2 options:key=15 options:erspan_ver=1 options:erspan_idx=f",
    theirs: "type erspan V4 key 15 oseq erspan_ver 1 erspan 15",
    says: "erspan v1 session=15 index=15",
};

/// Ports that Open vSwitch does not make: GTP-U is of its own datapath alone (`vport_type_to_kind`,
/// lib/dpif-netlink-rtnl.c), Debian's kernel has no `bareudp`, and of two tunnels that are the same it makes one.
const UNMAKEABLE: [&str; 3] = [
    "gtpu -- set interface gtpu type=gtpu options:remote_ip=172.16.0.2 options:key=16",
    "bareudp -- set interface bareudp type=bareudp options:remote_ip=172.16.0.2 options:dst_port=6635 options:payload_type=ip",
    "twin1 -- set interface twin1 type=vxlan options:remote_ip=172.16.0.3 options:key=20 \
     -- add-port br0 twin2 -- set interface twin2 type=vxlan options:remote_ip=172.16.0.3 options:key=20",
];

/// Source ports of a tunnel's new flows.
const NEW_PORTS: u16 = 3000;

const CAPTURE: &str = "/run/lab-outer.pcap";

/// Ports of the constant flow and of the new flows of tunnel number `n`, from 1 on.
fn ports(n: usize) -> [u16; 2] {
    let first = network::CONSTANT_PORT + 10 * n as u16;
    [first, first + 1]
}

impl Custom for MoreTunnels {
    fn name(&self) -> &'static str {
        "more_tunnels"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn about(&self) -> &'static str {
        "GRE, ERSPAN, VXLAN over IPv6, a mirror into ERSPAN, ports in error, beside stock"
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(3)
    }

    fn run(&self, job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        network::patient_veth()?;
        Link.set_up()?;
        for (name, action, words) in [
            ("stock", Action::StockReload, &[][..]),
            ("ours", Action::Ours, &[]),
            ("stop-start", Action::Ours, &["--strategy", "stop-start"]),
        ] {
            guest::say(name);
            let extra_args = words.iter().map(|word| (*word).to_owned()).collect();
            let job = Job { action, extra_args, ..job.clone() };
            let folder = out.join(name);
            fs::create_dir_all(&folder)?;
            let mut round = Outcome::new(self.name(), action);
            guest::run_traffic(&job, &Link, &folder, &mut round).context(name)?;
            take_in(name, round, outcome);
        }
        Ok(())
    }
}

/// What a round found, under its name.
fn take_in(name: &str, round: Outcome, outcome: &mut Outcome) {
    outcome.checks.extend(round.checks.into_iter().map(|mut check| {
        check.name = format!("{name}: {}", check.name);
        check
    }));
    outcome.probes.extend(round.probes.into_iter().map(|(probe, ended)| (format!("{name} {probe}"), ended)));
    outcome.note(name, json!({ "action_ms": round.action_ms, "notes": round.notes }));
}

/// The network and its traffic.
struct Link;

fn add(tunnel: &Tunnel) -> Result<()> {
    let Tunnel { name, ours, theirs, .. } = tunnel;
    let theirs = theirs.replace("V4", V4).replace("V6", V6);
    shell(&format!(
        "ip -n far link add {name} {theirs}
         ip -n far link set {name} mtu 1400 up
         ovs-vsctl add-port br0 {name} -- set interface {name} {ours}"
    ))
    .map(drop)
    .with_context(|| format!("tunnel {name}"))
}

fn rules() -> String {
    let mut rules = "priority=10,actions=NORMAL\n".to_owned();
    for (tunnel, n) in TUNNELS.iter().zip(1..) {
        let [constant, new] = ports(n);
        let group = match tunnel.name {
            "gbp" => format!("set_field:{GROUP}->tun_gbp_id,"),
            _ => String::new(),
        };
        rules += &format!(
            "priority=100,udp,tp_dst={constant},actions={group}NORMAL\n\
             priority=100,udp,tp_dst={new},actions={UNWILDCARD},{group}NORMAL\n\
             priority=100,udp,tp_src={new},actions={UNWILDCARD_REPLY},NORMAL\n"
        );
    }
    rules
}

/// Devices that Open vSwitch made for tunnels, with index and settings.
fn devices() -> String {
    shell_lenient("cd /sys/class/net; for device in *_sys *_sys_*; do ip -o -d link show $device; done")
}

/// Interfaces that could not be made, by name, with why.
fn in_error() -> String {
    shell_lenient(
        "ovs-vsctl --format=csv --no-heading --columns=name,ofport,error list interface | grep -v '\\[\\]$' | sort",
    )
}

impl Traffic for Link {
    fn name(&self) -> &'static str {
        MoreTunnels.name()
    }

    fn about(&self) -> &'static str {
        MoreTunnels.about()
    }

    fn set_up(&self) -> Result<()> {
        // What comes from a tunnel into `far` is flooded into the others: each address has its device there.
        shell(
            "ip netns add far
             ip netns exec far sysctl -qw net.ipv6.conf.default.disable_ipv6=1 \
                net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2
             ip link add u0 type veth peer name u1 netns far
             ip netns exec far sysctl -qw net.ipv6.conf.u1.disable_ipv6=0
             sysctl -qw net.ipv6.conf.u0.disable_ipv6=0
             ip addr add 172.16.0.1/24 dev u0
             ip addr add fd00::1/64 dev u0 nodad
             ip link set u0 up
             ip -n far addr add 172.16.0.2/24 dev u1
             ip -n far addr add fd00::2/64 dev u1 nodad
             ip -n far link set u1 up
             ip -n far link set lo up
             ovs-vsctl add-br br0",
        )?;
        network::attach("ns1", "br0", "", "")?;
        network::attach("ns3", "br0", "", "")?;
        shell("ip -n ns1 link set e-ns1 mtu 1400")?;
        for tunnel in TUNNELS.iter().chain([&MIRROR]) {
            add(tunnel)?;
        }
        for port in UNMAKEABLE {
            // It waits for the daemon, and says that there is an error.
            shell_lenient(&format!("ovs-vsctl add-port br0 {port}"));
        }
        shell(
            "ovs-vsctl -- --id=@p get port v-ns1 -- --id=@o get port mirror \
               -- --id=@m create mirror name=all select-src-port=@p select-dst-port=@p output-port=@o \
               -- set bridge br0 mirrors=@m",
        )?;
        network::rules("br0", &rules())?;
        for (tunnel, n) in TUNNELS.iter().zip(1..) {
            shell(&format!(
                "ip -n ns1 addr add 10.9.{n}.1/24 dev e-ns1; ip -n far addr add 10.9.{n}.2/24 dev {}",
                tunnel.name
            ))?;
            network::ping("ns1", &format!("10.9.{n}.2")).with_context(|| format!("tunnel {}", tunnel.name))?;
        }
        Ok(())
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let (here, there) = (Place::named("ns1"), Place::named("far"));
        // First, so that it sees the first packet of the others.
        let all = (1..=TUNNELS.len()).flat_map(ports).collect();
        let copies = Spec::Copies { place: there.clone(), device: MIRROR.name.to_owned(), ports: all };
        let mut probes = vec![("copies".to_owned(), copies)];
        for (tunnel, n) in TUNNELS.iter().zip(1..) {
            let [constant, new] = ports(n);
            let address = Ipv4Addr::new(10, 9, n as u8, 2);
            let mut udp = |letter: &str, port, interval_us, ports| {
                let spec = Spec::udp(&here, &there, (address, port), interval_us, ports);
                probes.push((format!("{} {letter}", tunnel.name), spec));
            };
            udp("e", constant, 4 * network::CONSTANT_US, Ports::Constant);
            // Each from a new port for as long as a round takes, and from no other tunnel's.
            let first = 10_000 + NEW_PORTS * (n as u16 - 1);
            udp("n", new, 8 * network::EACH_NEW_US, Ports::Cycle { first, count: NEW_PORTS });
        }
        let address = Ipv4Addr::new(10, 9, 1, 2).into();
        let tcp = Spec::Tcp { from: here, to: there, address, port: network::TCP_PORT, pace: tcp::MODEST };
        probes.push((format!("{} tcp", TUNNELS[0].name), tcp));
        probes.push(network::silent("ns3"));
        probes
    }

    fn before_traffic(&self) -> Result<()> {
        shell(&format!(
            "rm -f {CAPTURE}
             ip netns exec far tcpdump -q -n -s 120 -B 8192 -Q in -Z root -i u1 -w {CAPTURE} >/run/lab-tcpdump 2>&1 &
             echo $! > /run/lab-tcpdump.pid"
        ))?;
        let listens = || fs::read_to_string("/run/lab-tcpdump").is_ok_and(|said| said.contains("listening on"));
        wait_until("tcpdump listens", Duration::from_secs(20), Duration::from_millis(100), listens)
    }

    fn before_action(&self, outcome: &mut Outcome) -> Result<()> {
        outcome.note("devices", devices());
        outcome.note("in error", in_error());
        Ok(())
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        let ours = evidence.job.action.judged_as_ours();
        kept_devices(ours, outcome);
        said_outside(ours, outcome);
        copies(ours, outcome);
    }
}

/// Open vSwitch before 3.2 makes the devices anew, unless it is ours to prevent it.
fn kept_devices(ours: bool, outcome: &mut Outcome) {
    let before = outcome.notes.get("devices").cloned().unwrap_or_default();
    let (now, version) = (json!(devices()), shell_lenient("ovs-vswitchd --version | head -1"));
    let old = [" 2.", " 3.0.", " 3.1."].iter().any(|part| version.contains(part));
    let all = ["gre_sys", "erspan_sys", "ip6gre_sys", "ip6erspan_sys", "vxlan_sys_4789", "vxlan_sys_4790"];
    let is_there = |name: &&str| [": ", "@"].iter().any(|end| before.to_string().contains(&format!(" {name}{end}")));
    let there = all.iter().all(is_there);
    outcome.check("there were devices of all kinds", there, &before);
    outcome.check("devices with index and settings", (before == now) == (ours || !old), json!([before, now]));
    let before = outcome.notes.get("in error").cloned().unwrap_or_default();
    let now = json!(in_error());
    let three = ["gtpu,", "bareudp,", "twin"].iter().all(|name| before.to_string().contains(name));
    outcome.check("some ports could not be made", three, &before);
    outcome.check("the same ones, for the same reasons", before == now, json!([before, now]));
}

fn capture() -> Result<outer::Seen> {
    shell("kill $(cat /run/lab-tcpdump.pid)")?;
    let gone = || shell("! kill -0 $(cat /run/lab-tcpdump.pid) 2>/dev/null").is_ok();
    wait_until("tcpdump ends", Duration::from_secs(20), Duration::from_millis(100), gone)?;
    outer::read(&fs::read(CAPTURE)?)
}

/// Keys and options are right in every packet.
fn said_outside(ours: bool, outcome: &mut Outcome) {
    let seen = match capture() {
        Ok(seen) => seen,
        Err(error) => return outcome.check("packets were captured", false, format!("{error:#}")),
    };
    let known: Vec<&str> = TUNNELS.iter().chain([&MIRROR]).map(|tunnel| tunnel.says).collect();
    let each = known.iter().all(|says| seen.kinds.get(*says) >= Some(&100));
    // ARP goes with NORMAL, in no group.
    let others = |says: &&String| !known.contains(&says.as_str()) && says.as_str() != "vxlan port=4790 vni=13";
    let strange: Vec<Value> =
        seen.kinds.iter().filter(|(says, _)| others(says)).map(|(says, count)| json!([says, count])).collect();
    outcome.note("outside", json!({ "kinds": seen.kinds, "begun_anew": seen.begun_anew }));
    if ours {
        outcome.check("every tunnel's key and options were seen", each, &seen.kinds);
        outcome.check("and no others", strange.is_empty(), strange);
        outcome.check("no device began its sequence numbers anew", seen.begun_anew == 0, seen.begun_anew);
    }
}

/// Of every packet there and back exactly one copy came through the ERSPAN tunnel.
fn copies(ours: bool, outcome: &mut Outcome) {
    let Some(ProbeOutcome::Copies(copies)) = outcome.probes.get("copies").cloned() else {
        return outcome.check("copies were counted", false, json!(null));
    };
    outcome.check("no copy was lost by the counting", copies.dropped == 0, copies.dropped);
    for (tunnel, n) in TUNNELS.iter().zip(1..) {
        for (letter, port) in ["e", "n"].into_iter().zip(ports(n)) {
            let name = format!("{} {letter}", tunnel.name);
            let Some(ProbeOutcome::Udp(udp)) = outcome.probes.get(&name).cloned() else { continue };
            once(&copies, &name, &format!("{port} requests"), udp.requests.sent, ours, outcome);
            once(&copies, &name, &format!("{port} replies"), udp.replies.sent, ours, outcome);
        }
    }
}

fn once(copies: &CopiesOutcome, name: &str, flow: &str, sent: u64, ours: bool, outcome: &mut Outcome) {
    let seen = copies.by_flow.get(flow).cloned().unwrap_or_default();
    let exactly = sent > 0 && seen.different == sent && seen.duplicated == 0;
    if ours {
        outcome.check(
            format!("{name}: {flow} mirrored exactly once"),
            exactly,
            json!({ "sent": sent, "copies": seen }),
        );
    }
}

//! Traffic control of others on the ports, and MTUs set by hand: stock's restart takes them away, ours does not. Without BPF
//! they are lost all the same, and the report says so.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{json, Value};

use super::{aftermath, network, plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::{say, wait_for_daemons};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Qdiscs;

/// What a starting ovs-vswitchd does with what is on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stock {
    /// It takes it away.
    Takes,
    /// It makes it anew: the police action has another number.
    MakesAnew,
    /// It leaves it alone.
    Leaves,
}

/// A port, what is put on it, and what becomes of that.
struct Case {
    port: &'static str,
    put: &'static str,
    stock: Stock,
}

const fn taken(port: &'static str, put: &'static str) -> Case {
    Case { port, put, stock: Stock::Takes }
}

/// `P` stands for the port. The first two have the probes' traffic.
const CASES: &[Case] = &[
    taken(
        "v-ns1",
        "tc qdisc add dev P root tbf rate 1gbit burst 1mb latency 400ms
         tc qdisc add dev P handle ffff: ingress
         tc filter add dev P parent ffff: pref 10 protocol ip u32 match ip dport 7777 0xffff action drop
         tc filter add dev P parent ffff: pref 11 protocol ip u32 match u32 0 0 action ok",
    ),
    Case {
        port: POLICED,
        put: "ovs-vsctl set interface P ingress_policing_rate=1000000 ingress_policing_burst=100000",
        stock: Stock::MakesAnew,
    },
    taken(
        "p-htb",
        "tc qdisc add dev P root handle 5: htb default 20
         tc class add dev P parent 5: classid 5:1 htb rate 100mbit
         tc class add dev P parent 5:1 classid 5:10 htb rate 10mbit ceil 100mbit
         tc class add dev P parent 5:1 classid 5:20 htb rate 20mbit ceil 100mbit
         tc qdisc add dev P parent 5:10 handle 510: sfq perturb 10
         tc filter add dev P parent 5: protocol ip pref 3 u32 match ip dport 22 0xffff flowid 5:10
         tc filter add dev P parent 5: protocol ip pref 4 flower ip_proto tcp dst_port 80 classid 5:20",
    ),
    taken("p-netem", "tc qdisc add dev P root netem delay 10ms 2ms distribution normal"),
    taken("p-fq", "tc qdisc add dev P root fq"),
    taken("p-codel", "tc qdisc add dev P root fq_codel target 7ms"),
    taken(
        "p-prio",
        "tc qdisc add dev P root handle 7: prio bands 3; tc qdisc add dev P parent 7:1 handle 71: pfifo limit 7",
    ),
    taken(
        "p-flower",
        "tc qdisc add dev P handle ffff: ingress
         tc filter add dev P parent ffff: protocol ip pref 5 chain 3 flower ip_proto udp dst_port 7777 action drop
         tc filter add dev P parent ffff: protocol ip pref 6 flower src_ip 192.0.2.1 action goto chain 3",
    ),
    taken(
        "p-mirred",
        "tc qdisc add dev P handle ffff: ingress
         tc filter add dev P parent ffff: protocol all pref 1 matchall action mirred egress mirror dev p-fq",
    ),
    taken(
        "p-basic",
        "tc qdisc add dev P handle ffff: ingress
         tc filter add dev P parent ffff: protocol ip pref 9 basic match 'cmp(u8 at 9 layer 1 eq 17)' action ok
         tc filter add dev P parent ffff: protocol ip pref 8 u32 match u32 0 0 police rate 5mbit burst 50k drop",
    ),
    taken(
        "p-bpf",
        "tc qdisc add dev P handle ffff: ingress
         tc filter add dev P parent ffff: protocol all pref 2 bpf bytecode '1,6 0 0 4294967295,' action ok",
    ),
    taken(
        "p-block",
        "tc qdisc add dev P ingress_block 22 handle ffff: ingress
         tc filter add block 22 protocol ip pref 1 flower dst_ip 192.0.2.7 action drop",
    ),
    Case {
        port: "p-clsact",
        put: "tc qdisc add dev P clsact; tc filter add dev P egress protocol ip pref 1 matchall action ok",
        stock: Stock::Leaves,
    },
    taken(
        "p-qos",
        "ovs-vsctl set port P qos=@q -- --id=@q create qos type=linux-htb other-config:max-rate=1000000000 \
            queues:1=@one -- --id=@one create queue other-config:max-rate=500000000
         tc class add dev P parent 1:fffe classid 1:50 htb rate 1mbit ceil 10mbit",
    ),
];

/// Internal ports with an MTU that nobody has asked the database for. A starting daemon changes those that it finds before a
/// port with less than 1500 ([`SMALLER`]): of all but the first it finds them so, for they ask for their OpenFlow numbers.
const BY_HAND: [&str; 5] = ["br0", "i-one", "i-two", "i-three", "i-four"];
/// A port whose MTU, 1450, is the smallest of those that are not internal.
const SMALLER: &str = "p-mtu";
/// The port that Open vSwitch polices, with traffic.
const POLICED: &str = "v-ns2";

impl Custom for Qdiscs {
    fn name(&self) -> &'static str {
        "qdiscs"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn about(&self) -> &'static str {
        "qdiscs, classes and filters of others on ports, and MTUs by hand, beside stock"
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        CASES.iter().try_for_each(|case| make_port(case.port))?;
        for (port, number) in BY_HAND[1..].iter().zip(101..) {
            shell(&format!(
                "ovs-vsctl add-port br0 {port} -- set interface {port} type=internal ofport_request={number}
                 ip link set {port} up"
            ))?;
        }
        shell(&format!(
            "ip link add {SMALLER} mtu 1450 type veth peer name {SMALLER}-e mtu 1450
             ip link set {SMALLER} up; ip link set {SMALLER}-e up; ovs-vsctl add-port br0 {SMALLER}"
        ))?;
        shell("ip link set br0 up")?;
        stock(outcome)?;
        ours(out, outcome)?;
        without_bpf(out, outcome)?;
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

/// A port of br0 to put something on, where plain has none of that name.
pub(super) fn make_port(port: &str) -> Result<()> {
    if port.starts_with("v-") {
        return Ok(());
    }
    shell(&format!(
        "ip link add {port} type veth peer name {port}-e; ip link set {port} up; ip link set {port}-e up
         ovs-vsctl add-port br0 {port}"
    ))
    .map(drop)
}

/// Takes everything off `port` that is on it.
pub(super) fn clear(port: &str) -> Result<()> {
    shell(&format!(
        "ovs-vsctl clear port {port} qos
         ovs-vsctl set interface {port} ingress_policing_rate=0 ingress_policing_burst=0
         tc qdisc del dev {port} root 2>/dev/null || true
         tc qdisc del dev {port} ingress 2>/dev/null || true
         tc qdisc del dev {port} clsact 2>/dev/null || true"
    ))
    .map(drop)
}

/// What is to be on `port`, whatever is there.
pub(super) fn put_on(port: &str) -> Result<()> {
    let case = CASES.iter().find(|case| case.port == port).with_context(|| format!("no case {port}"))?;
    clear(port)?;
    shell(&case.put.replace("dev P", &format!("dev {port}")).replace(" P ", &format!(" {port} "))).map(drop)
}

/// Everything as it is to be, whatever is there.
fn put() -> Result<()> {
    CASES.iter().try_for_each(|case| put_on(case.port))?;
    for device in BY_HAND {
        shell(&format!("ip link set {device} mtu 1400"))?;
    }
    Ok(())
}

/// What `tc` tells of a port, without counters.
pub(super) fn look_at(port: &str) -> String {
    let text = shell_lenient(&format!(
        "tc qdisc show dev {port}; tc class show dev {port}
         for parent in root ffff: ffff:fff2 ffff:fff3 5: 5:10; do tc filter show dev {port} parent $parent 2>/dev/null; done"
    ));
    // The order of classes is the kernel's, and classes of fq_codel and sfq come and go with packets.
    let lines = text.lines().map(|line| line.split(" direct_packets_stat").next().unwrap_or(line));
    let mut lines: Vec<&str> =
        lines.filter(|line| !line.starts_with("class fq_codel") && !line.starts_with("class sfq")).collect();
    lines.sort_unstable();
    lines.join("\n")
}

/// What `tc` and `ip` tell of each device.
fn facts() -> BTreeMap<String, String> {
    let mut all: BTreeMap<String, String> =
        CASES.iter().map(|case| (case.port.to_owned(), look_at(case.port))).collect();
    let mtu = |device: &str| shell_lenient(&format!("cat /sys/class/net/{device}/mtu")).trim().to_owned();
    all.extend(BY_HAND.iter().map(|device| ((*device).to_owned(), mtu(device))));
    all
}

fn changed(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> BTreeMap<String, Value> {
    let differ = |(name, was): (&String, &String)| {
        let now = after.get(name)?;
        (now != was).then(|| (name.clone(), json!([was, now])))
    };
    before.iter().filter_map(differ).collect()
}

/// What the policing of Open vSwitch has counted, bytes.
fn policed_bytes() -> u64 {
    let told = shell_lenient(&format!("tc -s filter show dev {POLICED} parent ffff:"));
    let sent = told.lines().filter_map(|line| line.split_once("Sent ")?.1.split(' ').next()?.parse::<u64>().ok());
    sent.max().unwrap_or_default()
}

/// It takes away what it is said to take away: else the rest would show nothing.
fn stock(outcome: &mut Outcome) -> Result<()> {
    say("stock");
    put()?;
    let before = facts();
    shell("ip netns exec ns1 ping -q -c 50 -i 0.02 -s 1200 10.9.0.2")?;
    let policed = policed_bytes();
    shell("timeout 100 systemctl restart openvswitch-switch")?;
    wait_for_daemons()?;
    std::thread::sleep(Duration::from_secs(1));
    let changed = changed(&before, &facts());
    for case in CASES {
        let is_changed = changed.contains_key(case.port);
        let name = format!("stock: {}: {:?}", case.port, case.stock);
        outcome.check(name, is_changed == (case.stock != Stock::Leaves), changed.get(case.port));
    }
    let now = policed_bytes();
    outcome.check("stock: the policing counts from 0", policed > 50_000 && now < policed, [policed, now]);
    let mtus: Vec<&str> = BY_HAND.into_iter().filter(|device| changed.contains_key(*device)).collect();
    // Which ones depends on the order in which the daemon finds them.
    outcome.check("stock: MTUs are changed", !mtus.is_empty(), json!(mtus));
    outcome.note("stock: changed", json!(changed));
    plain::rules()?;
    network::ping("ns1", "10.9.0.2")
}

fn report_of(words: &str, out: &Path, name: &str) -> (String, Value) {
    let report = out.join(format!("{name}.json"));
    let exit = shell_lenient(&format!(
        "timeout 150 ovs-graceful restart {words} --report {} > {} 2>&1; echo exit=$?",
        report.display(),
        out.join(name).display()
    ));
    let told = serde_json::from_str(&shell_lenient(&format!("cat {}", report.display()))).unwrap_or(Value::Null);
    (exit.trim().to_owned(), told)
}

fn warned(prefix: &str) -> Vec<String> {
    let told: Value =
        serde_json::from_str(&shell_lenient(&format!("{prefix} ovs-graceful check --json"))).unwrap_or(Value::Null);
    let is_it = |finding: &&Value| matches!(finding["name"].as_str(), Some("qdisc" | "ingress-qdisc"));
    let found = told["findings"].as_array().cloned().unwrap_or_default();
    found.iter().filter(is_it).map(|finding| finding["object"].as_str().unwrap_or_default().to_owned()).collect()
}

fn ours(out: &Path, outcome: &mut Outcome) -> Result<()> {
    put()?;
    for (name, words) in [("ours", ""), ("stop-start", "--strategy stop-start")] {
        say(name);
        let warnings = warned("");
        outcome.check(format!("{name}: check does not warn of what is kept"), warnings.is_empty(), warnings);
        let live = plain::start_probes()?;
        std::thread::sleep(Duration::from_secs(2));
        let before = facts();
        let policed = policed_bytes();
        let (exit, report) = report_of(words, out, name);
        let now = policed_bytes();
        outcome.check(format!("{name}: the policing goes on counting"), policed > 0 && now > policed, [policed, now]);
        std::thread::sleep(Duration::from_secs(4));
        let changed = changed(&before, &facts());
        outcome.check(
            format!("{name}: exit 0"),
            exit == "exit=0",
            json!([exit, report["differences"], report["warnings"]]),
        );
        outcome.check(format!("{name}: nothing is changed"), changed.is_empty(), changed);
        let refused = &report["refused"]["qdisc_del"];
        outcome.check(format!("{name}: deletions were refused"), refused.as_u64() >= Some(10), refused);
        aftermath::finish(name, live, false, outcome)?;
        // A daemon that was told of a change asks for everything anew.
        shell("ovs-vsctl set open_vswitch . external_ids:lab=1; ovs-vsctl add-port br0 i-new -- set interface i-new type=internal")?;
        std::thread::sleep(Duration::from_secs(1));
        let later = self::changed(&before, &facts());
        outcome.check(format!("{name}: nor by a later change of the database"), later.is_empty(), later);
        shell("ovs-vsctl del-port br0 i-new")?;
        aftermath::nothing_left(name, outcome);
        aftermath::owned(name, outcome);
    }
    Ok(())
}

/// Nothing is frozen then. What is lost is warned of before, and a difference afterwards, port by port.
fn without_bpf(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("without BPF");
    let ports: Vec<&str> = CASES.iter().filter(|case| case.stock == Stock::Takes).map(|case| case.port).collect();
    let no_bpf = "systemd-run -qG --pipe --wait -p SystemCallFilter=~bpf -p SystemCallErrorNumber=EPERM";
    let warnings = warned(no_bpf);
    let all = ports.iter().all(|port| warnings.contains(&format!("device {port}")));
    outcome.check("without BPF: check warns of each", all, &warnings);
    shell(
        "mkdir -p /run/systemd/system/ovs-graceful-run.service.d
         printf '[Service]\\nSystemCallFilter=~bpf\\nSystemCallErrorNumber=EPERM\\n' \
            > /run/systemd/system/ovs-graceful-run.service.d/lab.conf
         systemctl daemon-reload",
    )?;
    let (policing, policed) = (facts()[POLICED].clone(), policed_bytes());
    let (exit, report) = report_of("", out, "without-bpf");
    let (after, now) = (facts()[POLICED].clone(), policed_bytes());
    outcome.check("without BPF: the policing goes on counting", policed > 0 && now >= policed, [policed, now]);
    outcome.check("without BPF: policing is not made anew", policing == after, json!([policing, after]));
    outcome.check("without BPF: exit 30", exit == "exit=30", json!([exit, report["reason"]]));
    outcome.check("without BPF: level park", report["level"] == "park", &report["level"]);
    let differences = report["differences"].to_string();
    let named = ports.iter().all(|port| differences.contains(&format!("device {port}: ")));
    outcome.check("without BPF: each is told afterwards", named, &report["differences"]);
    let mtus: Vec<String> =
        BY_HAND.iter().map(|device| shell_lenient(&format!("cat /sys/class/net/{device}/mtu"))).collect();
    outcome.check("without BPF: MTUs as before", mtus.iter().all(|mtu| mtu.trim() == "1400"), mtus);
    shell_lenient("rm -r /run/systemd/system/ovs-graceful-run.service.d; systemctl daemon-reload");
    Ok(())
}

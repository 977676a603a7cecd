//! What is true in the guest at one moment: daemons, units, datapath counters and flows, OpenFlow, conntrack.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::command::{capture, shell, shell_lenient};

/// One of the two daemons, found by its name in /proc, never by its PID file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Daemon {
    /// Process.
    pub pid: u32,
    /// Field 22 of /proc/PID/stat, clock ticks since boot.
    pub start_time: u64,
    /// Target of /proc/PID/exe.
    pub executable: String,
    /// Path of the cgroup v2.
    pub cgroup: String,
}

/// The two daemons' names.
pub const DAEMONS: [&str; 2] = ["ovsdb-server", "ovs-vswitchd"];

/// Every live process of that name.
pub fn daemons(name: &str) -> Vec<Daemon> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut found: Vec<Daemon> = entries.filter_map(|e| daemon(e.file_name().to_str()?.parse().ok()?, name)).collect();
    found.sort_by_key(|d| d.pid);
    found
}

fn daemon(pid: u32, name: &str) -> Option<Daemon> {
    let base = format!("/proc/{pid}");
    if fs::read_to_string(format!("{base}/comm")).ok()?.trim() != name {
        return None;
    }
    let stat = fs::read_to_string(format!("{base}/stat")).ok()?;
    let after_name = stat.rsplit_once(") ")?.1;
    let fields: Vec<&str> = after_name.split(' ').collect();
    if fields.first() == Some(&"Z") {
        return None;
    }
    let executable = fs::read_link(format!("{base}/exe")).ok()?.to_string_lossy().into_owned();
    let cgroup = fs::read_to_string(format!("{base}/cgroup")).ok()?;
    let cgroup = cgroup.lines().find_map(|l| l.strip_prefix("0::")).unwrap_or_default().to_owned();
    Some(Daemon { pid, start_time: fields.get(19)?.parse().ok()?, executable, cgroup })
}

/// Counters of the kernel datapath (`ovs-dpctl show`, which asks the kernel itself).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Packets that found a flow.
    pub hit: u64,
    /// Packets that found none.
    pub missed: u64,
    /// Upcalls that nobody took.
    pub lost: u64,
    /// Flows present.
    pub flows: u64,
}

/// Reads the counters of the only kernel datapath.
pub fn counters() -> Result<Counters> {
    parse_counters(&shell("ovs-dpctl show")?).context("`ovs-dpctl show` has no counters: no datapath?")
}

fn parse_counters(text: &str) -> Option<Counters> {
    let line = text.lines().find(|l| l.trim_start().starts_with("lookups:"))?;
    let field = |name: &str| -> Option<u64> { line.split(&format!("{name}:")).nth(1)?.split(' ').next()?.parse().ok() };
    let flows = text.lines().find_map(|l| l.trim_start().strip_prefix("flows: "))?.trim().parse().ok()?;
    Some(Counters { hit: field("hit")?, missed: field("missed")?, lost: field("lost")?, flows })
}

/// Packets that went where no probe and no counter of a port sees them, since boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// The queues of CPUs had no room (`softnet_data`; /proc/net/softnet_stat).
    pub by_cpus: u64,
    /// A sender waited for the address of its neighbour, and its queue had no room (/proc/net/stat/arp_cache).
    pub unresolved: u64,
}

/// Reads them.
pub fn dropped() -> Dropped {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let arp = read("/proc/net/stat/arp_cache");
    let titles = arp.lines().next().unwrap_or_default();
    let column = titles.split_whitespace().position(|title| title == "unresolved_discards");
    let rows = arp.lines().skip(1).collect::<Vec<_>>().join("\n");
    Dropped {
        // The second column of each CPU's line (`softnet_seq_show`, net/core/net-procfs.c).
        by_cpus: sum_of_column(&read("/proc/net/softnet_stat"), 1),
        unresolved: column.map_or(0, |column| sum_of_column(&rows, column)),
    }
}

/// Hexadecimal numbers, one line for each CPU.
fn sum_of_column(lines: &str, column: usize) -> u64 {
    lines.lines().filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(column)?, 16).ok()).sum()
}

/// A flow of the kernel datapath, as `ovs-dpctl dump-flows -m` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Flow {
    /// Key and mask.
    pub key: String,
    /// Actions.
    pub actions: String,
    /// Packet count.
    pub packets: u64,
}

impl Flow {
    /// A range of UDP ports that the stream of new flows wanders through: once it has passed, the flow is idle and the
    /// old daemon rightly removes it before the switch. The upper half (`/0x8000`) holds the constant flow's own port.
    pub fn covers_moving_ports(&self) -> bool {
        let Some((_, udp)) = self.key.split_once("udp(") else { return false };
        let Some((_, port)) = udp.split_once("dst=") else { return false };
        port.split([',', ')']).next().is_some_and(|port| port.contains('/') && !port.ends_with("/0x8000"))
    }

    /// Whether a restart may keep it: nothing in it belongs to the old process.
    ///
    /// Recirculation ids, all cookies and meters do (design, idea 5; for those of samples see docs/adoption.md).
    pub fn may_be_kept(&self) -> bool {
        let recirculated = self.key.contains("recirc_id(") && !self.key.contains("recirc_id(0)");
        let bound = ["recirc(", "meter(", "userspace("].iter().any(|w| self.actions.contains(w));
        !recirculated && !bound
    }
}

/// Flows by UFID.
pub type Flows = BTreeMap<String, Flow>;

/// Asks the kernel for its flows, not the daemon; the text goes to `file`.
pub fn flows(file: &Path) -> Result<Flows> {
    let text = shell("ovs-dpctl dump-flows -m")?;
    fs::write(file, &text)?;
    read_flows(file)
}

/// Flows from a file that `ovs-dpctl dump-flows -m` was written to.
pub fn read_flows(file: &Path) -> Result<Flows> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    Ok(text.lines().filter_map(parse_flow).collect())
}

fn parse_flow(line: &str) -> Option<(String, Flow)> {
    let (ufid, rest) = line.trim().strip_prefix("ufid:")?.split_once(", ")?;
    let (key, rest) = rest.split_once(", packets:")?;
    let packets = rest.split(',').next()?.parse().ok()?;
    let actions = rest.split_once("actions:")?.1.to_owned();
    Some((ufid.to_owned(), Flow { key: key.to_owned(), actions, packets }))
}

/// What the lab wants to be the same after a restart, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Promised(pub BTreeMap<String, String>);

/// OpenFlow flows, groups, meters of each bridge; datapath ports; conntrack limits and timeout policies.
///
/// A daemon that was left half alive accepts and never answers: each question has its limit.
pub fn promised(bridges: &[String]) -> Promised {
    let mut all = BTreeMap::new();
    for bridge in bridges {
        all.insert(
            format!("flows of {bridge}"),
            shell_lenient(&format!("timeout 60 ovs-ofctl --no-stats dump-flows {bridge} | sort")),
        );
        // In no order; a meter is several lines, with an empty one behind them.
        for (kind, in_lines) in
            [("groups", "cat"), ("meters", "awk 'BEGIN { RS = \"\"; FS = \"\\n\" } { $1 = $1; print }'")]
        {
            let script =
                format!("timeout 60 ovs-ofctl -O OpenFlow13 dump-{kind} {bridge} | grep -v xid= | {in_lines} | sort");
            all.insert(format!("{kind} of {bridge}"), shell_lenient(&script));
        }
    }
    all.insert("datapath ports".to_owned(), shell_lenient("timeout 60 ovs-dpctl show | grep '^ *port '"));
    let limits = shell_lenient("timeout 60 ovs-dpctl ct-get-limits | sed 's/,count=[0-9]*//'");
    all.insert("conntrack limits".to_owned(), limits);
    all.insert("zone policies".to_owned(), shell_lenient("timeout 60 ovs-vsctl list-zone-tp system 2>&1"));
    Promised(all)
}

/// What a daemon found that the kernel datapath can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Features {
    /// As the daemon names itself.
    pub daemon: String,
    /// `ovs-appctl dpif/show-dp-features`.
    pub found: String,
}

/// Asks the daemon, at the first of `bridges`.
pub fn features(bridges: &[String]) -> Features {
    let ask = |what: &str| shell_lenient(&format!("timeout 60 ovs-appctl {what} 2>&1"));
    let found = bridges.first().map(|bridge| ask(&format!("dpif/show-dp-features {bridge}"))).unwrap_or_default();
    Features { daemon: ask("version"), found }
}

/// Kinds of connections that the kernel tracks, and how many there are of each: addresses both ways, protocol, zone, and
/// ports below [`FIRST_VARYING`].
pub fn connections() -> Result<BTreeMap<String, u64>> {
    let mut kinds = BTreeMap::new();
    // A listing that is cut off would make strays of what it lacks.
    let list = || capture(Command::new("conntrack").arg("-L"));
    let text = list().or_else(|_| list()).or_else(|_| list())?;
    // A daemon's own, such as that to its controller, which each run makes anew.
    let on_loopback = |line: &&str| line.contains(" src=127.");
    for line in text.lines().filter(|line| !on_loopback(line)) {
        *kinds.entry(kind_of_connection(line)).or_default() += 1;
    }
    Ok(kinds)
}

/// Ports and identifiers from here on are those that probes and translations vary.
const FIRST_VARYING: u16 = 10_000;

/// A Geneve tunnel's other port is any of all that there are (`geneve_build_skb` in drivers/net/geneve.c).
const GENEVE: &str = "6081";

fn kind_of_connection(line: &str) -> String {
    let mut words = vec![line.split_whitespace().next().unwrap_or_default().to_owned()];
    let tunnel = line.contains(&format!("dport={GENEVE} "));
    for word in line.split_whitespace() {
        let Some((name, value)) = word.split_once('=') else { continue };
        let varies = value.parse::<u16>().is_ok_and(|port| port >= FIRST_VARYING) || tunnel && value != GENEVE;
        match name {
            "src" | "dst" | "zone" | "type" => words.push(word.to_owned()),
            "sport" | "dport" if !varies => words.push(word.to_owned()),
            _ => {}
        }
    }
    words.join(" ")
}

/// Whether systemd is the first process (sd_booted(3)).
pub fn systemd_runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// One property of a unit (`systemctl show`).
pub fn unit_property(unit: &str, property: &str) -> String {
    shell_lenient(&format!("systemctl show --value -p {property} {unit}")).trim().to_owned()
}

/// Does systemd listen for ovsdb-server?
pub fn socket_is_active() -> bool {
    unit_property("ovsdb-server.socket", "ActiveState") == "active"
}

/// Failed units, one a line.
pub fn failed_units() -> String {
    shell_lenient("systemctl list-units --failed --plain --no-legend | cut -d' ' -f1").trim().to_owned()
}

/// Leaves everything a reader wants to see after a failure in `folder`.
pub fn save_everything(folder: &Path, bridges: &[String]) {
    if fs::create_dir_all(folder).is_err() {
        return;
    }
    let mut wanted = vec![
        ("dpctl-show".to_owned(), "ovs-dpctl -s show".to_owned()),
        ("vsctl-show".to_owned(), "ovs-vsctl show; ovs-vsctl list open_vswitch".to_owned()),
        ("conntrack".to_owned(), "conntrack -L 2>&1".to_owned()),
        ("ct-limits".to_owned(), "ovs-dpctl ct-get-limits".to_owned()),
        ("netlink-sockets".to_owned(), "cat /proc/net/netlink".to_owned()),
        ("processes".to_owned(), "ps -eo pid,ppid,lstart,stat,cgroup:60,args".to_owned()),
        ("units".to_owned(), "systemctl --no-pager status 'ovs*' openvswitch-switch; systemctl --failed".to_owned()),
        ("upcall-show".to_owned(), "ovs-appctl upcall/show".to_owned()),
        ("links".to_owned(), "ip -s link; ip addr".to_owned()),
        // A packet that a busy CPU's queue (softnet_data) has no room for is in no counter of a port.
        ("softnet".to_owned(), "cat /proc/net/softnet_stat /proc/sys/net/core/netdev_max_backlog".to_owned()),
        // For lost fragments: who gave up putting them together (IpReasm...).
        (
            "snmp".to_owned(),
            "cat /proc/net/snmp; for ns in $(ls /run/netns); do echo $ns; ip netns exec $ns cat /proc/net/snmp; done"
                .to_owned(),
        ),
    ];
    for bridge in bridges {
        let flows = format!("ovs-ofctl dump-flows {bridge}; ovs-ofctl dump-ports {bridge}");
        wanted.push((format!("openflow-{bridge}"), flows));
        wanted.push((format!("fdb-{bridge}"), format!("ovs-appctl fdb/show {bridge}")));
    }
    for (name, script) in wanted {
        let _ =
            fs::write(folder.join(name), shell_lenient(&format!("timeout 20 sh -c '{}'", script.replace('\'', "\""))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_dpctl_show() {
        let text = "system@ovs-system:\n  lookups: hit:7034 missed:412 lost:3\n  flows: 17\n  masks: hit:9 total:2 hit/pkt:1.2\n  port 0: ovs-system (internal)\n";
        assert_eq!(parse_counters(text), Some(Counters { hit: 7034, missed: 412, lost: 3, flows: 17 }));
        assert_eq!(parse_counters(""), None);
    }

    #[test]
    fn drops_of_all_cpus() {
        assert_eq!(sum_of_column("0000aa 00000002 00000000\n0000bb 00000010 00000000\n", 1), 18);
        assert_eq!(sum_of_column("", 1), 0);
    }

    #[test]
    fn connections_of_a_kind_differ_in_what_varies() {
        let line = "udp      17 29 src=10.9.0.1 dst=10.9.0.200 sport=10007 dport=9001 src=10.9.0.2 dst=10.9.0.1 sport=9001 dport=10007 [ASSURED] mark=0 zone=5 use=1";
        let kind = "udp src=10.9.0.1 dst=10.9.0.200 dport=9001 src=10.9.0.2 dst=10.9.0.1 sport=9001 zone=5";
        assert_eq!(kind_of_connection(line), kind);
        assert_eq!(kind_of_connection(&line.replace("10007", "20000")), kind);
        assert_ne!(kind_of_connection(&line.replace("dst=10.9.0.200", "dst=10.9.0.2")), kind);
        let outer = |port| {
            format!("udp 17 src=1.0.0.1 dst=1.0.0.2 sport={port} dport=6081 src=1.0.0.2 dst=1.0.0.1 sport=6081 dport={port} mark=0")
        };
        assert_eq!(kind_of_connection(&outer(102)), kind_of_connection(&outer(40_000)));
        assert!(kind_of_connection(&outer(102)).contains("dport=6081"));
    }

    #[test]
    fn flows_and_what_may_be_kept() {
        let line = "ufid:0000-1, recirc_id(0),dp_hash(0/0),in_port(v1),eth_type(0x0800),ipv4(src=1.2.3.4/0.0.0.0,frag=no), packets:50, bytes:4600, used:0.010s, dp:ovs, actions:v2";
        let (ufid, flow) = parse_flow(line).unwrap();
        assert_eq!((ufid.as_str(), flow.packets, flow.actions.as_str()), ("0000-1", 50, "v2"));
        assert!(flow.may_be_kept());
        let recirculating = line.replace("actions:v2", "actions:ct(zone=5),recirc(0x1)");
        assert!(!parse_flow(&recirculating).unwrap().1.may_be_kept());
        let sampled = line.replace("actions:v2", "actions:userspace(pid=0,sFlow(vid=0,pcp=0,output=1),actions),v2");
        assert!(!parse_flow(&sampled).unwrap().1.may_be_kept());
        let slow = line.replace("actions:v2", "actions:userspace(pid=0,slow_path(action))");
        assert!(!parse_flow(&slow).unwrap().1.may_be_kept());
        let child = line.replace("recirc_id(0)", "recirc_id(0x1)");
        assert!(!parse_flow(&child).unwrap().1.may_be_kept());
        assert_eq!(parse_flow("garbage"), None);
    }
}

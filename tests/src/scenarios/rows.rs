//! Kinds of run-time state that a run keeps, by the words of orchestrator/src/inventory.rs: what sets each by hand, what is
//! looked at before and after, and what takes it away again.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{network, plain, qdiscs};
use crate::command::{shell, shell_lenient, wait_until};

/// One kind, in [`set_up`]'s network.
#[derive(Debug)]
pub struct Row {
    /// Its word.
    pub kept: &'static str,
    how: How,
}

#[derive(Debug)]
enum How {
    /// By commands.
    Commands { set: &'static str, look: &'static str, tidy: &'static str },
    /// By what [`qdiscs`] puts on this port.
    Port(&'static str),
}

const fn row(kept: &'static str, set: &'static str, look: &'static str, tidy: &'static str) -> Row {
    Row { kept, how: How::Commands { set, look, tidy } }
}

const fn on_port(kept: &'static str, port: &'static str) -> Row {
    Row { kept, how: How::Port(port) }
}

/// How daemons log: both are set alike.
macro_rules! logs {
    ($kept:literal, $daemon:literal) => {
        row(
            $kept,
            concat!(
                "log() { ovs-appctl -t ", $daemon, " \"$@\"; }\n",
                "log vlog/set ANY:syslog:warn; log vlog/set jsonrpc:file:dbg\n",
                "log vlog/set 'PATTERN:file:%D{%H:%M:%S}|%c|%p|lab: %m'; log vlog/disable-rate-limit jsonrpc"
            ),
            concat!("ovs-appctl -t ", $daemon, " vlog/list; ovs-appctl -t ", $daemon, " vlog/list-pattern"),
            concat!(
                "log() { ovs-appctl -t ", $daemon, " \"$@\"; }\n",
                "log vlog/set ANY:syslog:err; log vlog/set jsonrpc:file:info\n",
                "log vlog/set 'PATTERN:file:%D{%Y-%m-%dT%H:%M:%S.###Z}|%05N|%c%T|%p|%m'; log vlog/enable-rate-limit jsonrpc"
            ),
        )
    };
}

const REMOTES: &str = "ovs-appctl -t ovsdb-server ovsdb-server/list-remotes | grep -v -e ^pfd: -e db.sock";

/// Every kind that stands by itself.
pub const ROWS: &[Row] = &[
    row(
        "groups",
        "ovs-ofctl -O OpenFlow15 --may-create mod-group br0 'group_id=21,type=indirect,bucket=bucket_id:1,actions=NORMAL'
         ovs-ofctl -O OpenFlow15 add-flow br0 cookie=0x21,priority=120,udp,tp_dst=9000,actions=group:21",
        "ovs-ofctl -O OpenFlow15 dump-groups br0; ovs-ofctl -O OpenFlow15 --no-stats dump-flows br0 cookie=0x21/-1",
        "ovs-ofctl del-flows br0 cookie=0x21/-1; ovs-ofctl -O OpenFlow15 del-groups br0",
    ),
    row(
        "group-properties",
        "ovs-vsctl --may-exist add-br brg -- set bridge brg protocols=OpenFlow10,OpenFlow13
         ovs-ofctl -O OpenFlow10 del-groups brg
         ovs-ofctl -O OpenFlow10 add-group brg group_id=14,type=select,selection_method=dp_hash,bucket=bucket_id=3,weight=2,output:2",
        "ovs-ofctl -O OpenFlow10 dump-groups brg",
        "ovs-vsctl --if-exists del-br brg",
    ),
    row(
        "meters",
        "ovs-ofctl -O OpenFlow13 del-meter br0 meter=9
         ovs-ofctl -O OpenFlow13 add-meter br0 meter=9,pktps,burst,bands=type=drop,rate=100000,burst_size=10000
         ovs-ofctl -O OpenFlow13 add-flow br0 cookie=0x22,priority=120,tcp,tp_dst=9002,actions=meter:9,NORMAL",
        "ovs-ofctl -O OpenFlow13 dump-meters br0; ovs-ofctl -O OpenFlow13 --no-stats dump-flows br0 cookie=0x22/-1",
        "ovs-ofctl del-flows br0 cookie=0x22/-1; ovs-ofctl -O OpenFlow13 del-meter br0 meter=9",
    ),
    row(
        "tlv-map",
        "ovs-ofctl del-tlv-map br0; ovs-ofctl add-tlv-map br0 '{class=0xffff,type=1,len=8}->tun_metadata1'",
        "ovs-ofctl dump-tlv-map br0",
        "ovs-ofctl del-tlv-map br0",
    ),
    row(
        "port-flags",
        "ovs-ofctl mod-port br0 v-ns3 no-flood; ovs-ofctl mod-port br0 v-ns4 no-packet-in",
        "ovs-ofctl -O OpenFlow10 show br0 | grep -e '): addr:' -e 'config:' | sed 's/ addr:.*//'",
        "ovs-ofctl mod-port br0 v-ns3 flood; ovs-ofctl mod-port br0 v-ns4 packet-in",
    ),
    row(
        "fragments",
        "ovs-ofctl set-frags br0 nx-match",
        "ovs-ofctl -O OpenFlow10 get-frags br0",
        "ovs-ofctl set-frags br0 normal",
    ),
    row(
        "tables",
        "ovs-ofctl -O OpenFlow14 mod-table br0 5 evict; ovs-ofctl -O OpenFlow14 mod-table br0 6 vacancy:20,80",
        "ovs-ofctl -O OpenFlow14 dump-table-desc br0 | sed -e 1d -e 's/vacancy=[0-9]*%//'",
        "ovs-ofctl -O OpenFlow14 mod-table br0 5 noevict; ovs-ofctl -O OpenFlow14 mod-table br0 6 novacancy",
    ),
    row(
        "misses",
        "ovs-ofctl -O OpenFlow12 mod-table br0 7 drop",
        "ovs-ofctl -O OpenFlow12 dump-tables br0 | grep -A9 'table 7'",
        "ovs-ofctl -O OpenFlow12 mod-table br0 7 controller",
    ),
    row(
        "static-addresses",
        "ovs-appctl fdb/add br0 v-ns3 0 02:00:00:00:00:33",
        "ovs-appctl fdb/show br0 | awk '$4 == \"static\" { print $1, $2, $3 }' | sort",
        "ovs-appctl fdb/del br0 0 02:00:00:00:00:33",
    ),
    // ns2 joins.
    row(
        "multicast-groups",
        "ip -n ns2 addr del 239.1.1.1/32 dev e-ns2 autojoin 2> /dev/null || true
         ip -n ns2 addr add 239.1.1.1/32 dev e-ns2 autojoin",
        "ovs-appctl mdb/show br0 | sed 's/ *[0-9]*$//' | grep 239.1.1.1",
        "ip -n ns2 addr del 239.1.1.1/32 dev e-ns2 autojoin; ovs-appctl mdb/flush br0",
    ),
    // An IGMPv2 query of 192.0.2.9 to all hosts, as it comes in at a router's port.
    row(
        "multicast-routers",
        "ovs-appctl ofproto/trace-packet-out br0 in_port=4 \
            01005e00000102000000000908004600002000000000010282cdc0000209e0000001940400001164ee9b00000000 NORMAL",
        "ovs-appctl mdb/show br0 | sed 's/ *[0-9]*$//' | grep querier",
        "ovs-appctl mdb/flush br0",
    ),
    // Which of them a starting daemon changes is a matter of the order in which it finds them.
    row(
        "mtu",
        "for i in br0 i-one i-two i-three i-four; do ip link set $i mtu 1400; done",
        "cd /sys/class/net; grep . br0/mtu i-one/mtu i-two/mtu i-three/mtu i-four/mtu",
        "for i in br0 i-one i-two i-three i-four; do ip link set $i mtu 1500; done",
    ),
    on_port("root-qdisc", "p-htb"),
    on_port("ingress-qdisc", "p-flower"),
    on_port("policing", "v-ns2"),
    on_port("classes", "p-qos"),
    logs!("switch-logs", "ovs-vswitchd"),
    logs!("server-logs", "ovsdb-server"),
    row(
        "remotes-added",
        "ovs-appctl -t ovsdb-server ovsdb-server/add-remote ptcp:6640:127.0.0.1",
        REMOTES,
        "ovs-appctl -t ovsdb-server ovsdb-server/remove-remote ptcp:6640:127.0.0.1",
    ),
    row(
        "remotes-removed",
        "ovs-appctl -t ovsdb-server ovsdb-server/remove-remote db:Open_vSwitch,Open_vSwitch,manager_options",
        REMOTES,
        "ovs-appctl -t ovsdb-server ovsdb-server/add-remote db:Open_vSwitch,Open_vSwitch,manager_options",
    ),
    row(
        "databases",
        r#"printf '{"name":"Lab","version":"1.0.0","tables":{"T":{"columns":{"c":{"type":"string"}}}}}' > /run/lab.schema
           rm -f /etc/openvswitch/Lab.db; ovsdb-tool create /etc/openvswitch/Lab.db /run/lab.schema
           ovs-appctl -t ovsdb-server ovsdb-server/add-db /etc/openvswitch/Lab.db"#,
        "ovs-appctl -t ovsdb-server ovsdb-server/list-dbs",
        "ovs-appctl -t ovsdb-server ovsdb-server/remove-db Lab",
    ),
    row(
        "system-row",
        "ovs-vsctl --no-wait set open_vswitch . system_type=lab system_version=7 external_ids:rundir=/run/lab",
        "ovs-vsctl get open_vswitch . system_type system_version external_ids:rundir",
        "ovs-vsctl --no-wait set open_vswitch . system_type=other system_version=8 external_ids:rundir=/run/openvswitch",
    ),
];

/// The row of that word.
pub fn find(kept: &str) -> Result<&'static Row> {
    ROWS.iter().find(|row| row.kept == kept).with_context(|| format!("no row {kept}"))
}

/// What is looked at for the row of that word.
pub fn look(kept: &str) -> String {
    find(kept).map_or_else(|error| error.to_string(), Row::look)
}

/// Sets each of these.
pub fn set(kept: &[&str]) -> Result<()> {
    kept.iter().try_for_each(|kept| find(kept)?.set())
}

/// The network in which each row can be set: plain's, with one more port, and bridges that snoop.
pub fn set_up() -> Result<()> {
    plain::set_up()?;
    network::patient_veth()?;
    network::attach("ns4", "br0", "", "")?;
    shell(
        "ovs-vsctl set bridge br0 mcast_snooping_enable=true \
            other_config:mcast-snooping-disable-flood-unregistered=true
         for i in i-one i-two i-three i-four; do
             ovs-vsctl add-port br0 $i -- set interface $i type=internal; ip link set $i up
         done
         ip link set br0 up",
    )?;
    for row in ROWS {
        if let How::Port(port) = row.how {
            qdiscs::make_port(port)?;
        }
    }
    Ok(())
}

/// How long what is set may take until it can be seen: a host joins a group within ten seconds.
const SEEN: Duration = Duration::from_secs(12);

impl Row {
    /// Sets it.
    pub fn set(&self) -> Result<()> {
        match self.how {
            How::Commands { set, .. } => shell(set).map(drop),
            How::Port(port) => qdiscs::put_on(port),
        }
        .with_context(|| format!("setting {}", self.kept))
    }

    /// Sets it, and waits until that can be seen. Returns what is seen.
    pub fn set_and_see(&self) -> Result<String> {
        let before = self.look();
        self.set()?;
        let changed = || self.look() != before;
        wait_until(&format!("{} is seen", self.kept), SEEN, Duration::from_millis(200), changed)?;
        Ok(self.look())
    }

    /// What is compared, without ages, counters and what follows from the moment.
    pub fn look(&self) -> String {
        match self.how {
            How::Commands { look, .. } => shell_lenient(look),
            How::Port(port) => qdiscs::look_at(port),
        }
    }

    /// Takes it away. What it was before may be another thing than nothing.
    pub fn tidy(&self) -> Result<()> {
        match self.how {
            How::Commands { tidy, .. } => {
                shell_lenient(tidy);
                Ok(())
            }
            How::Port(port) => qdiscs::clear(port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shown in another way, or not at all, as the table says.
    const ELSEWHERE: [&str; 16] = [
        "active-backup",
        "addresses",
        "datapath",
        "features",
        "group-tags",
        "guarded-policies",
        "kernel-flows",
        "others-policies",
        "packets",
        "ports",
        "probes",
        "rules",
        "rules-meanwhile",
        "tunnels",
        "zone-limits",
        "zone-policies",
    ];

    #[test]
    fn every_kind_that_is_kept_is_here_or_elsewhere() {
        let sources = include_str!("../../../orchestrator/src/inventory.rs");
        let table = sources.split("\nkept! {").nth(1).unwrap();
        let mut kept: Vec<&str> =
            table.lines().filter(|line| line.ends_with("];")).filter_map(|line| line.split('"').nth(1)).collect();
        let mut known: Vec<&str> = ROWS.iter().map(|row| row.kept).chain(ELSEWHERE).collect();
        kept.sort_unstable();
        known.sort_unstable();
        assert_eq!(kept, known);
    }
}

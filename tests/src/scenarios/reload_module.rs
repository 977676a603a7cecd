//! `restart --reload-module` beside `ovs-ctl force-reload-kmod`: what goes with the kernel module (devices, addresses,
//! routes, limits) is there again, and rules, ports and policies are; flows cannot be, and what is lost is counted.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::{json, Value};

use super::{aftermath, doors, network, plain, Custom};
use crate::command::{shell, shell_lenient, shell_logged};
use crate::guest::{facts, say, wait_for_daemons};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct ReloadModule;

/// An internal port with all that an operator may have given it, and a bridge's own device with an address.
const DEVICES: &str = "
    ovs-vsctl add-port br0 int0 -- set interface int0 type=internal
    sysctl -qw net.ipv6.conf.int0.disable_ipv6=0 net.ipv4.conf.int0.arp_ignore=1
    ip link set int0 address 02:00:00:00:08:01 mtu 1400 up
    ip address add 10.8.0.1/24 brd + dev int0
    ip address add 10.8.0.7 peer 10.8.0.8/32 dev int0 label int0:x
    ip address add fd08::1/64 dev int0 nodad
    ip route add 10.77.0.0/16 via 10.8.0.2 dev int0 metric 50 mtu 1300
    ip route add blackhole 10.78.0.0/16 table 100
    ip route add default via 10.8.0.3 dev int0 table 100
    ip -6 route add fd77::/64 via fd08::2 dev int0
    ip address replace 10.7.0.1/24 dev br0
    ip link set br0 up";

impl Custom for ReloadModule {
    fn name(&self) -> &'static str {
        "reload_module"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn about(&self) -> &'static str {
        "the kernel module taken out and put in again, beside stock's force-reload-kmod"
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        // A module that goes may take a kernel along: its words belong on the console.
        shell("sysctl -qw kernel.printk=5")?;
        plain::set_up()?;
        network::patient_veth()?;
        make_devices()?;
        shell(
            "ovs-vsctl -- --id=@d create Datapath datapath_version=0 -- set open_vswitch . datapaths:system=@d
             ovs-vsctl add-zone-tp system zone=5 udp_single=205 udp_multiple=305
             ovs-ofctl -O OpenFlow13 add-group br0 group_id=7,type=all,bucket=actions=NORMAL
             ovs-ofctl -O OpenFlow13 add-meter br0 meter=3,kbps,band=type=drop,rate=1000000",
        )?;
        set_limits()?;
        refused(out, outcome)?;
        let stock = stock(out, outcome)?;
        let ours = ours(out, outcome)?;
        outcome.note("lost", json!({ "stock": stock, "ours": ours }));
        in_use(out, outcome)?;
        // Both take the time of loading a module and starting a daemon, which an emulated CPU makes seconds.
        outcome.check("not much more lost than with stock", ours <= 4 * stock, json!([ours, stock]));
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

fn make_devices() -> Result<()> {
    shell(DEVICES)?;
    // Until the addresses of IPv6 have been proved to be nobody else's.
    std::thread::sleep(Duration::from_secs(3));
    Ok(())
}

/// Those of the kernel alone: no column of this schema holds them.
fn set_limits() -> Result<()> {
    shell("ovs-dpctl ct-set-limits default=50000 zone=5,limit=400 zone=6,limit=60000").map(drop)
}

/// Devices, addresses and routes, as `ip` tells them; without what numbers itself anew, and without what is said of the
/// detection of duplicate addresses: it is under way, or was left out because the address had been there before.
fn devices() -> BTreeMap<String, String> {
    let words = [
        ("link", "ip -o link show dev %s | sed 's/^[0-9]*: //; s/ qlen [0-9]*//'"),
        ("addresses", "ip -o address show dev %s | sed 's/^[0-9]*: //; s/ nodad//; s/ tentative//'"),
        ("routes", "ip -4 route show table all dev %s | sort"),
        ("routes of IPv6", "ip -6 route show table all dev %s | sort"),
        (
            "settings",
            "grep -H . /proc/sys/net/ipv4/conf/%s/* /proc/sys/net/ipv6/conf/%s/* 2>/dev/null | grep -v secret",
        ),
    ];
    let mut found = BTreeMap::new();
    for device in ["br0", "int0"] {
        for (what, script) in words {
            found.insert(format!("{what} of {device}"), shell_lenient(&script.replace("%s", device)));
        }
    }
    found
}

/// Ports by name: another datapath numbers them anew.
fn promised() -> Value {
    let mut promised = serde_json::to_value(facts::promised(&plain::bridges())).unwrap_or_default();
    promised["datapath ports"] =
        json!(shell_lenient("ovs-dpctl show | sed -n 's/^ *port [0-9]*: \\([^ ]*\\).*/\\1/p' | sort"));
    promised
}

fn reloads() -> usize {
    shell_lenient("dmesg | grep -c 'Open vSwitch switching datapath'").trim().parse().unwrap_or(0)
}

/// What would be lost for good is said, and nothing is touched.
fn refused(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let cases = [
        ("elsewhere", "ip netns add other; ip link set int0 netns other", "another network namespace"),
        ("vlan", "ip link add link int0 name int0.5 type vlan id 5", "int0.5 stands on it"),
    ];
    for (name, script, words) in cases {
        say(&format!("refused: {name}"));
        shell(script)?;
        let before = (facts::daemons("ovs-vswitchd"), promised(), devices());
        let said = shell_logged("ovs-graceful restart --reload-module", &out.join(format!("refused-{name}")));
        let told = said.contains("exit=10") && said.contains(words) && said.contains("int0");
        outcome.check(format!("{name}: refused, and said why"), told, &said);
        let after = (facts::daemons("ovs-vswitchd"), promised(), devices());
        let touched = differences(&(before.1, before.2), &(after.1, after.2));
        let untouched = before.0 == after.0 && touched.as_object().is_some_and(serde_json::Map::is_empty);
        outcome.check(format!("{name}: nothing was touched"), untouched, json!([before.0, after.0, touched]));
        shell_lenient(
            "ip link del int0.5 2>/dev/null; ip -n other link set int0 netns 1 2>/dev/null; ip netns del other",
        );
        // The other namespace has taken its addresses.
        shell_lenient("ovs-vsctl del-port br0 int0; ip route flush table 100");
        make_devices()?;
    }
    Ok(())
}

/// A datapath in another network namespace keeps the module: nobody can see that before. The run goes back, with all that
/// was taken along with Open vSwitch's own datapath.
fn in_use(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("in use");
    shell("ip netns add pin; ip netns exec pin ovs-dpctl add-dp lab")?;
    let before = (promised(), devices());
    let said = shell_logged("timeout 180 ovs-graceful restart --reload-module", &out.join("in-use"));
    let told = said.contains("exit=21") && said.contains("see who uses it");
    outcome.check("in use: went back, and said why", told, &said);
    std::thread::sleep(Duration::from_secs(3));
    let found = differences(&before, &(promised(), devices()));
    outcome.check("in use: all as before", found.as_object().is_some_and(serde_json::Map::is_empty), found);
    shell("ip netns exec pin ovs-dpctl del-dp lab; ip netns del pin")?;
    aftermath::nothing_left("in use", outcome);
    aftermath::owned("in use", outcome);
    aftermath::new_traffic_passes("in use", outcome);
    Ok(())
}

/// What stock loses, with daemons that are not systemd's: that sees its own end, and stops at once what ovs-ctl has started
/// in their place.
fn stock(out: &Path, outcome: &mut Outcome) -> Result<u64> {
    say("stock");
    shell("systemctl stop openvswitch-switch")?;
    doors::wait_until_gone()?;
    shell("/usr/share/openvswitch/scripts/ovs-ctl --system-id=random start")?;
    rules()?;
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(3));
    let (before, loaded) = ((promised(), devices()), reloads());
    let log = out.join("stock");
    let script = "/usr/share/openvswitch/scripts/ovs-ctl --system-id=random force-reload-kmod";
    let exit = shell_lenient(&format!("timeout 120 {script} > {} 2>&1; echo exit=$?", log.display()));
    say(&format!("stock: {}, {}", exit.trim(), shell_lenient(&format!("tail -n 5 {}", log.display()))));
    std::thread::sleep(Duration::from_secs(8));
    let after = (promised(), devices());
    outcome.note("stock: exit", exit.trim());
    outcome.note("stock: not as before", differences(&before, &after));
    outcome.check("stock: the module was reloaded", reloads() > loaded, reloads());
    let lost = aftermath::finish("stock", live, true, outcome)?.iter().sum();
    // Its daemons are systemd's no longer.
    say("stock: traffic ended");
    shell("timeout 60 /usr/share/openvswitch/scripts/ovs-ctl stop")?;
    say("stock: daemons ended");
    shell("systemctl reset-failed; timeout 100 systemctl restart openvswitch-switch")?;
    say("stock: daemons are systemd's again");
    wait_for_daemons()?;
    shell_lenient("ovs-vsctl del-port br0 int0; ip route flush table 100; ip address flush dev br0");
    make_devices()?;
    set_limits()?;
    rules()?;
    Ok(lost)
}

/// What a daemon that was started anew has none of.
fn rules() -> Result<()> {
    shell("ovs-ofctl del-flows br0; ovs-ofctl -O OpenFlow13 del-groups br0; ovs-ofctl -O OpenFlow13 del-meters br0")?;
    network::rules(
        "br0",
        &format!(
            "cookie=0xabc,priority=10,actions=NORMAL\n\
             cookie=0xdef,priority=100,udp,tp_dst=9001,actions={},NORMAL\n",
            network::UNWILDCARD
        ),
    )?;
    shell(
        "ovs-ofctl -O OpenFlow13 add-group br0 group_id=7,type=all,bucket=actions=NORMAL
         ovs-ofctl -O OpenFlow13 add-meter br0 meter=3,kbps,band=type=drop,rate=1000000",
    )?;
    network::ping("ns1", "10.9.0.2")
}

fn differences(before: &(Value, BTreeMap<String, String>), after: &(Value, BTreeMap<String, String>)) -> Value {
    let mut found = serde_json::Map::new();
    for (name, old) in before.0.as_object().into_iter().flatten() {
        if after.0[name] != *old {
            found.insert(name.clone(), json!([old, after.0[name]]));
        }
    }
    for (name, old) in &before.1 {
        if after.1.get(name) != Some(old) {
            found.insert(name.clone(), json!([old, after.1.get(name)]));
        }
    }
    Value::Object(found)
}

fn ours(out: &Path, outcome: &mut Outcome) -> Result<u64> {
    say("ours");
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(3));
    let (before, loaded) = ((promised(), devices()), reloads());
    let report = out.join("report.json");
    let exit = shell_lenient(&format!(
        "timeout 180 ovs-graceful restart --reload-module --report {} > {} 2>&1; echo exit=$?",
        report.display(),
        out.join("ours").display()
    ));
    std::thread::sleep(Duration::from_secs(8));
    let after = (promised(), devices());
    let told: Value = serde_json::from_str(&shell_lenient(&format!("cat {}", report.display()))).unwrap_or(Value::Null);
    outcome.note("report", &told);
    outcome.check(
        "ours: exit 0",
        exit.trim() == "exit=0",
        json!([exit.trim(), shell_lenient(&format!("cat {}", out.join("ours").display()))]),
    );
    outcome.check("ours: the module was reloaded", reloads() > loaded, reloads());
    let differences = differences(&before, &after);
    outcome.check("ours: all as before", differences.as_object().is_some_and(serde_json::Map::is_empty), differences);
    outcome.check("ours: strategy", told["strategy"] == "reload-module", &told["strategy"]);
    let gone = &told["datapaths"][0]["flows_removed"]["module_reloaded"];
    outcome.check("ours: the report says what was lost", gone.as_u64().is_some_and(|flows| flows > 0), gone);
    let restored = &told["conntrack"]["zone_limits_restored"];
    outcome.check("ours: limits restored", *restored == 3, restored);
    aftermath::nothing_left("ours", outcome);
    aftermath::owned("ours", outcome);
    aftermath::new_traffic_passes("ours", outcome);
    Ok(aftermath::finish("ours", live, true, outcome)?.iter().sum())
}

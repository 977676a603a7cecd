//! Hosts with many of something: CPUs that the kernel may get, ports, bridges, meters, groups, learned addresses. Plain's
//! network and traffic beside them.

use std::fmt::Write;
use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use serde_json::{json, Value};

use super::{network, plain, Traffic};
use crate::command::{shell, shell_lenient};
use crate::guest::{say, Evidence};
use crate::outcome::Outcome;
use crate::vm;

/// See the module.
pub struct Many {
    name: &'static str,
    about: &'static str,
    cpus: &'static str,
    set_up: fn() -> Result<()>,
    /// Prints how many there are.
    count: &'static str,
    /// At least so many.
    least: u64,
    /// Prints what is the same afterwards, besides what every scenario compares.
    look: &'static str,
}

/// As many CPUs as a large server has, two of them there. APIC number 255 is everybody's, and makes one less.
pub const CPUS: Many = Many {
    name: "many_cpus",
    about: "a kernel that may get 256 CPUs: a socket for each",
    cpus: "2,maxcpus=256",
    // The daemon has sockets for the two alone. Half of the usual soft limit stands for those that 256 would have.
    set_up: || {
        shell(
            "mkdir -p /etc/systemd/system.conf.d
             printf '[Manager]\\nDefaultLimitNOFILE=512:524288\\n' > /etc/systemd/system.conf.d/lab.conf
             systemctl daemon-reexec",
        )
        .map(drop)
    },
    count: "echo $(($(sed 's/.*-//' /sys/devices/system/cpu/possible) + 1))",
    least: 255,
    look: "true",
};

/// On Debian 11 the daemon has a socket for each.
pub const PORTS: Many = Many {
    name: "many_ports",
    about: "1,000 ports; on Debian 11 a socket for each",
    cpus: vm::CPUS,
    set_up: || {
        let ports = (0..1000).fold(String::new(), |mut words, i| {
            let _ = write!(words, " -- add-port br0 m{i} -- set interface m{i} type=internal");
            words
        });
        shell(&format!("ovs-vsctl --timeout=300{ports}")).map(drop)
    },
    count: "ovs-dpctl show | grep -c ' port [0-9]*: m[0-9]'",
    least: 1000,
    look: "true",
};

/// Each with rules of its own.
pub const BRIDGES: Many = Many {
    name: "many_bridges",
    about: "250 bridges, each with rules",
    cpus: vm::CPUS,
    set_up: || {
        let bridges = (0..250).fold(String::new(), |mut words, i| {
            let _ = write!(words, " -- add-br bq{i} -- set bridge bq{i} fail_mode=secure");
            words
        });
        shell(&format!("ovs-vsctl --timeout=300{bridges}"))?;
        shell(
            "echo 'cookie=0x7,priority=9,ip,nw_dst=10.7.0.0/16,actions=drop' > /run/lab-rules
             echo 'cookie=0x8,priority=5,actions=NORMAL' >> /run/lab-rules
             seq 0 249 | xargs -P 2 -I N ovs-ofctl add-flows bqN /run/lab-rules",
        )
        .map(drop)
    },
    count: "ovs-vsctl list-br | grep -c bq",
    least: 250,
    look: "true",
};

/// No bundle takes them.
pub const METERS: Many = Many {
    name: "many_meters",
    about: "1,100 meters, some of them used by rules",
    cpus: vm::CPUS,
    set_up: || {
        shell(
            "seq 1 1100 | xargs -P 2 -I N ovs-ofctl -O OpenFlow13 add-meter br0 \
               meter=N,kbps,burst,stats,band=type=drop,rate=N000000,burst_size=1000
             for i in 1 300 1018 1019 1100; do
               ovs-ofctl -O OpenFlow13 add-flow br0 priority=50,udp,tp_dst=$i,actions=meter:$i,NORMAL
             done",
        )
        .map(drop)
    },
    count: "ovs-ofctl -O OpenFlow13 dump-meters br0 | grep -c meter=",
    least: 1100,
    look: "true",
};

/// Of every type.
pub const GROUPS: Many = Many {
    name: "many_groups",
    about: "5,000 groups, some of them used by rules",
    cpus: vm::CPUS,
    set_up: || {
        let kinds =
            ["all,bucket=output:2,bucket=output:3", "indirect,bucket=output:2", "select,bucket=weight:7,output:2"];
        let groups = (1..=5000).zip(kinds.iter().cycle()).fold(String::new(), |mut words, (id, kind)| {
            let _ = writeln!(words, "group_id={id},type={kind}");
            words
        });
        fs::write("/run/lab-groups", groups)?;
        shell(
            "ovs-ofctl -O OpenFlow15 add-groups br0 /run/lab-groups
             for i in 1 2 3 4999 5000; do
               ovs-ofctl -O OpenFlow13 add-flow br0 priority=50,udp,tp_dst=$i,actions=group:$i
             done",
        )
        .map(drop)
    },
    count: "ovs-ofctl -O OpenFlow15 dump-groups br0 | grep -c group_id=",
    least: 5000,
    look: "true",
};

/// Told and taken in that version alone.
pub const OLD_RULES: Many = Many {
    name: "many_old_rules",
    about: "5,000 rules on a bridge that speaks OpenFlow 1.0 alone",
    cpus: vm::CPUS,
    set_up: || {
        let rules = (0..5000).fold(String::new(), |mut words, i| {
            let _ = writeln!(
                words,
                "priority=100,ip,nw_dst=10.20.{}.{},actions=mod_nw_tos:32,output:LOCAL",
                i >> 8,
                i & 255
            );
            words
        });
        fs::write("/run/lab-old-rules", rules)?;
        shell(
            "ovs-vsctl add-br brold -- set bridge brold protocols=OpenFlow10 fail_mode=secure
             ovs-ofctl add-flows brold /run/lab-old-rules",
        )
        .map(drop)
    },
    count: "ovs-ofctl dump-flows brold | grep -c nw_dst=10.20.",
    least: 5000,
    look:
        "ovs-appctl bridge/dump-flows brold | sed 's/duration=[^ ]* n_packets=[^ ]* n_bytes=[^ ]* //' | sort | md5sum",
};

/// So many learned addresses, at two ports.
const LEARNED: u32 = 50_000;

/// More than half of the largest table that a bridge may have.
pub const ADDRESSES: Many = Many {
    name: "many_addresses",
    about: "50,000 learned addresses",
    cpus: vm::CPUS,
    set_up: || {
        shell("ovs-vsctl set bridge br0 other_config:mac-table-size=65536 other_config:mac-aging-time=3600")?;
        learn(LEARNED)
    },
    count: "ovs-appctl fdb/show br0 | grep -c ' 02:50:'",
    least: LEARNED as u64,
    look: "ovs-appctl fdb/show br0 | awk '/ 02:50:/ { print $1, $2, $3 }' | sort | md5sum",
};

/// Has the daemon learn them as it learns from a frame, which would be an upcall each.
fn learn(count: u32) -> Result<()> {
    let path = shell("echo /run/openvswitch/ovs-vswitchd.$(cat /run/openvswitch/ovs-vswitchd.pid).ctl")?;
    let mut daemon = UnixStream::connect(path.trim()).with_context(|| format!("cannot connect to {path}"))?;
    let mut answers = serde_json::Deserializer::from_reader(daemon.try_clone()?).into_iter::<Value>();
    let numbers: Vec<u32> = (0..count).collect();
    for some in numbers.chunks(40) {
        for number in some {
            let [_, a, b, c] = number.to_be_bytes();
            let mac = format!("02:50:00:{a:02x}:{b:02x}:{c:02x}");
            let frame = format!("in_port={},dl_src={mac},dl_dst={mac},dl_type=0x88b5", 2 + number % 2);
            let params = json!(["br0", frame, "-generate", "NORMAL"]);
            daemon.write_all(
                json!({"id": number, "method": "ofproto/trace-packet-out", "params": params}).to_string().as_bytes(),
            )?;
        }
        for _ in some {
            let answer = answers.next().context("ovs-vswitchd closed its control socket")??;
            anyhow::ensure!(answer["error"].is_null(), "ovs-vswitchd learns no address: {answer}");
        }
    }
    Ok(())
}

/// The rules of every bridge as they were when the network was made.
const RULES_BEFORE: &str = "/run/lab-all-rules";
/// What [`Many::look`] printed before the run.
const LOOKED_BEFORE: &str = "/run/lab-looked";

fn all_rules() -> String {
    shell_lenient(
        "ovs-vsctl list-br | sort | xargs -P 2 -I B sh -c \
           'timeout 60 ovs-ofctl --no-stats dump-flows B | grep -v xid= | sort | sed \"s/^/B/\"' | sort",
    )
}

impl Traffic for Many {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn cpus(&self) -> &'static str {
        self.cpus
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn set_up(&self) -> Result<()> {
        plain::set_up()?;
        (self.set_up)()?;
        fs::write(RULES_BEFORE, all_rules())?;
        network::ping("ns1", "10.9.0.2")?;
        say("all of them are there");
        Ok(())
    }

    fn before_action(&self, outcome: &mut Outcome) -> Result<()> {
        let found: u64 = shell(self.count)?.trim().parse()?;
        outcome.check(format!("{} of them", self.least), found >= self.least, found);
        fs::write(LOOKED_BEFORE, shell(self.look)?)?;
        Ok(())
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        if !evidence.job.action.judged_as_ours() {
            return;
        }
        let (before, after) = (fs::read_to_string(RULES_BEFORE).unwrap_or_default(), all_rules());
        let found = json!([before.lines().count(), after.lines().count()]);
        outcome.check("rules of all bridges as before", !before.is_empty() && before == after, found);
        let looked = json!([fs::read_to_string(LOOKED_BEFORE).unwrap_or_default(), shell_lenient(self.look)]);
        let left: u64 = shell_lenient(self.count).trim().parse().unwrap_or(0);
        outcome.check(
            "all of them are there, as before",
            left >= self.least && looked[0] == looked[1],
            json!([left, looked]),
        );
        if let Some(report) = &evidence.report {
            outcome.note("gap_ms", &report["gap_ms"]);
            let phases = report["phases"].as_array().into_iter().flatten();
            let times = phases.map(|phase| (phase["name"].as_str().unwrap_or_default(), &phase["duration_ms"]));
            outcome.note("phases", json!(times.collect::<std::collections::BTreeMap<_, _>>()));
        }
        let log = shell_lenient(
            "journalctl -b --no-pager -u ovs-graceful-run | grep -i -e 'too many open' -e EMFILE || true",
        );
        outcome.check("no descriptor was lacking", log.trim().is_empty(), log);
    }
}

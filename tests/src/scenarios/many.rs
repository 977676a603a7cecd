//! Hosts with many of something: CPUs that the kernel may get, ports, bridges, meters. Plain's network and traffic beside
//! them.

use std::fmt::Write;
use std::fs;

use anyhow::Result;
use serde_json::json;

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
};

/// The rules of every bridge as they were when the network was made.
const RULES_BEFORE: &str = "/run/lab-all-rules";

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
        Ok(())
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        if !evidence.job.action.judged_as_ours() {
            return;
        }
        let (before, after) = (fs::read_to_string(RULES_BEFORE).unwrap_or_default(), all_rules());
        let found = json!([before.lines().count(), after.lines().count()]);
        outcome.check("rules of all bridges as before", !before.is_empty() && before == after, found);
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

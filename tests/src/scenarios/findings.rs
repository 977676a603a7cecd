//! Every finding of `ovs-graceful check`: what provokes it, and what its remedy, typed as printed, makes of it. Several at
//! once, because a host may have more than one fault: all are told, and none twice. Part of `refusals`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{json, Value};

use crate::command::{shell, shell_lenient};
use crate::guest::say;
use crate::outcome::Outcome;

/// What the text of a remedy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Its commands, typed as printed, make the finding go away.
    Typed,
    /// It tells a person what to do, which these commands are.
    ByHand(&'static str),
    /// It says that there is none; these commands make the host what it was.
    Nothing(&'static str),
}

/// A finding.
pub struct Provoked {
    /// Its name.
    name: &'static str,
    /// Does it refuse a run, or is it a warning?
    refused: bool,
    /// Makes the host so.
    prepare: &'static str,
    remedy: Remedy,
}

/// Findings that are provoked at once.
struct Group {
    name: &'static str,
    /// Put before `ovs-graceful`.
    prefix: &'static str,
    /// The command that lists the findings as JSON, and that of a run; empty where that would be none.
    words: [&'static str; 2],
    /// Before all, and after all.
    around: [&'static str; 2],
    all: &'static [Provoked],
}

/// A command that may not use BPF.
const NO_BPF: &str = "systemd-run -qG --pipe --wait -p SystemCallFilter=~bpf -p SystemCallErrorNumber=EPERM";

const CHECK: [&str; 2] = ["check --json", "restart"];
const ONLY_CHECK: [&str; 2] = ["check --json", ""];

const fn warned(name: &'static str, prepare: &'static str, remedy: Remedy) -> Provoked {
    Provoked { name, refused: false, prepare, remedy }
}

const fn refused(name: &'static str, prepare: &'static str, remedy: Remedy) -> Provoked {
    Provoked { name, refused: true, prepare, remedy }
}

/// The unit's reload, while it lasts, is its state.
const HANGING_RELOAD: &str = "mkdir -p /run/systemd/system/ovs-vswitchd.service.d
     printf '[Service]\\nExecReload=\\nExecReload=/bin/sleep 600\\n' \
        > /run/systemd/system/ovs-vswitchd.service.d/lab.conf
     systemctl daemon-reload";
const END_RELOAD: &str = "kill $(systemctl show -p ControlPID --value ovs-vswitchd); sleep 1";

/// A shutdown that waits for the start of something before it, and stops nothing until then.
const DELAYED_SHUTDOWN: &str = "mkdir -p /run/systemd/system/shutdown.target.d
     printf '[Unit]\\nRefuseManualStart=no\\n' > /run/systemd/system/shutdown.target.d/lab.conf
     systemctl daemon-reload
     systemd-run -q --no-block --unit=lab-before -p DefaultDependencies=no -p Before=shutdown.target \
        -p Type=oneshot sleep 600
     sleep 1";
const CANCELLED_SHUTDOWN: &str =
    "systemctl cancel $(systemctl list-jobs --no-legend shutdown.target | awk '{ print $1 }'); systemctl stop lab-before; \
     systemctl reset-failed lab-before";

const GROUPS: &[Group] = &[
    Group {
        name: "database and OpenFlow",
        prefix: "",
        words: CHECK,
        around: ["ovs-vsctl add-br brx", "ovs-vsctl --if-exists del-br brx"],
        all: &[
            refused(
                "restore-wait-stuck",
                "ovs-vsctl set open_vswitch . other_config:flow-restore-wait=true",
                Remedy::Typed,
            ),
            refused("dpdk", "ovs-vsctl --no-wait set open_vswitch . other_config:dpdk-init=true", Remedy::Typed),
            refused(
                "netdev-bridge",
                "ovs-vsctl add-br brn -- set bridge brn datapath_type=netdev",
                Remedy::Nothing("ovs-vsctl del-br brn"),
            ),
            refused(
                "spanning-tree",
                "ovs-vsctl set bridge brx stp_enable=true",
                Remedy::Nothing("ovs-vsctl set bridge brx stp_enable=false"),
            ),
            // A row alone: ovs-vsctl makes a port with a bridge, whose name would be no device's.
            warned(
                "bridge-ignored",
                "ovs-vsctl --no-wait -- --id=@b create bridge name=br/x -- add open_vswitch . bridges @b",
                Remedy::Typed,
            ),
            warned(
                "lacp",
                "ovs-vsctl set port v-ns1 lacp=passive",
                Remedy::Nothing("ovs-vsctl clear port v-ns1 lacp"),
            ),
            warned(
                "bfd",
                "ovs-vsctl set interface v-ns1 bfd:enable=true",
                Remedy::Nothing("ovs-vsctl clear interface v-ns1 bfd"),
            ),
            warned(
                "cfm",
                "ovs-vsctl set interface v-ns2 cfm_mpid=7",
                Remedy::Nothing("ovs-vsctl clear interface v-ns2 cfm_mpid"),
            ),
            warned(
                "sampling",
                "ovs-vsctl -- set bridge br0 netflow=@n -- --id=@n create netflow targets=\\\"127.0.0.1:5566\\\"",
                Remedy::Nothing("ovs-vsctl clear bridge br0 netflow"),
            ),
            warned(
                "controller",
                "ovs-vsctl set-controller brx tcp:127.0.0.1:7",
                Remedy::Typed,
            ),
            warned(
                "bond",
                "ovs-vsctl add-bond brx bondx x-one x-two bond_mode=balance-slb -- set interface x-one type=internal \
                    -- set interface x-two type=internal",
                Remedy::Nothing("ovs-vsctl del-port brx bondx"),
            ),
            warned(
                "lldp",
                "ovs-vsctl set interface v-ns1 lldp:enable=true",
                Remedy::Nothing("ovs-vsctl clear interface v-ns1 lldp"),
            ),
            // CFM is on there by now.
            warned(
                "ovs-vswitchd",
                "ovs-appctl cfm/set-fault v-ns2 true; ovs-appctl upcall/disable-ufid",
                Remedy::Nothing("ovs-appctl cfm/set-fault v-ns2 normal; ovs-appctl upcall/enable-ufid"),
            ),
            warned(
                "hard-timeout",
                "ovs-ofctl add-flow br0 cookie=0x77,priority=1,hard_timeout=60000,udp,tp_dst=7,actions=drop; \
                 ovs-vsctl set bridge br0 protocols=OpenFlow13",
                Remedy::Nothing("ovs-vsctl clear bridge br0 protocols; ovs-ofctl del-flows br0 cookie=0x77/-1"),
            ),
            // A bridge that changes its protocols makes its socket anew.
            warned(
                "sockets",
                "stat -c %a /run/openvswitch/br0.mgmt > /run/lab-mode; chmod 0777 /run/openvswitch/br0.mgmt",
                Remedy::Nothing("chmod $(cat /run/lab-mode) /run/openvswitch/br0.mgmt"),
            ),
            warned(
                "ingress-qdisc",
                "ovs-vsctl set interface v-ns3 ingress_policing_rate=100000
                 tc filter add dev v-ns3 parent ffff: pref 7 protocol ip u32 match u32 0 0 action ok",
                Remedy::Nothing("ovs-vsctl set interface v-ns3 ingress_policing_rate=0"),
            ),
            warned(
                "qdisc",
                "ovs-vsctl set port v-ns3 qos=@q -- --id=@q create qos type=linux-htb
                 tc qdisc replace dev v-ns3 root handle 8: tbf rate 1gbit burst 1mb latency 400ms",
                Remedy::Nothing("ovs-vsctl clear port v-ns3 qos"),
            ),
        ],
    },
    Group {
        name: "hw-offload",
        prefix: "",
        words: ONLY_CHECK,
        around: ["true", "true"],
        all: &[refused("hw-offload", "ovs-vsctl set open_vswitch . other_config:hw-offload=true", Remedy::Typed)],
    },
    Group {
        name: "files and units",
        prefix: "",
        words: CHECK,
        // The unit's reload, while it lasts, is a job for it.
        around: [
            "mkdir -p /hidden /var/lib/ovs-graceful /run/systemd/system/openvswitch-switch.service.d
             printf '[Service]\\nExecReload=\\nExecReload=/bin/sleep 600\\n' \
                > /run/systemd/system/openvswitch-switch.service.d/lab.conf
             systemctl daemon-reload",
            "rm -r /run/systemd/system/openvswitch-switch.service.d
             kill $(systemctl show -p ControlPID --value openvswitch-switch) || true
             systemctl daemon-reload",
        ],
        all: &[
            refused(
                "space",
                "mount -t tmpfs -o size=1m,noexec lab /var/lib/ovs-graceful",
                Remedy::ByHand("umount /var/lib/ovs-graceful"),
            ),
            // Not of the version that is installed: there is none.
            refused("old-binary", "mount -o remount,noexec /run", Remedy::Typed),
            refused(
                "versions",
                "p=$(readlink -f /usr/sbin/ovs-vswitchd); cp -p $p /hidden/vswitchd; rm $p",
                Remedy::ByHand("cp -p /hidden/vswitchd $(readlink -m /usr/sbin/ovs-vswitchd)"),
            ),
            refused(
                "tools",
                "mv /usr/bin/ovs-ofctl /hidden/ovs-ofctl",
                Remedy::ByHand("mv /hidden/ovs-ofctl /usr/bin/ovs-ofctl"),
            ),
            refused(
                "schema",
                "cp -p /usr/share/openvswitch/vswitch.ovsschema /hidden/; echo '{' > /usr/share/openvswitch/vswitch.ovsschema",
                Remedy::ByHand("cp -p /hidden/vswitch.ovsschema /usr/share/openvswitch/"),
            ),
            refused("unit-job", "systemctl --no-block reload openvswitch-switch; sleep 1", Remedy::Typed),
            warned(
                "ovs-ctl-options",
                "cp -p /etc/default/openvswitch-switch /hidden/; \
                 echo 'OVS_CTL_OPTS=--delete-bridges' >> /etc/default/openvswitch-switch",
                Remedy::ByHand("cp -p /hidden/openvswitch-switch /etc/default/"),
            ),
        ],
    },
    Group {
        name: "a server that hangs",
        prefix: "",
        words: ONLY_CHECK,
        around: [
            "mkdir -p /etc/ovs-graceful; printf '[limits]\\ncheck_ms = 15000\\n' > /etc/ovs-graceful/config.toml",
            "rm /etc/ovs-graceful/config.toml",
        ],
        all: &[refused(
            "database",
            "kill -STOP $(cat /run/openvswitch/ovsdb-server.pid)",
            Remedy::ByHand("kill -CONT $(cat /run/openvswitch/ovsdb-server.pid)"),
        )],
    },
    Group {
        name: "a reload that hangs",
        prefix: "",
        words: CHECK,
        around: [HANGING_RELOAD, "rm -r /run/systemd/system/ovs-vswitchd.service.d; systemctl daemon-reload"],
        all: &[
            refused("unit", "systemctl --no-block reload ovs-vswitchd; sleep 1", Remedy::ByHand(END_RELOAD)),
        ],
    },
    Group {
        name: "the machine goes down",
        prefix: "",
        words: CHECK,
        around: [DELAYED_SHUTDOWN, "rm -r /run/systemd/system/shutdown.target.d; systemctl daemon-reload"],
        all: &[refused(
            "shutdown",
            "systemctl --no-block --job-mode=ignore-requirements start shutdown.target; sleep 1",
            Remedy::Nothing(CANCELLED_SHUTDOWN),
        )],
    },
    Group {
        name: "no message bus",
        // As where dbus has crashed: nobody listens on its socket, in the eyes of this command alone.
        prefix: "unshare -m sh -c 'mount -t tmpfs lab /run/dbus && exec \"$@\"' sh",
        words: ONLY_CHECK,
        around: ["true", "true"],
        all: &[refused("systemd", "true", Remedy::ByHand("true"))],
    },
    Group {
        name: "no BPF",
        prefix: "",
        words: ONLY_CHECK,
        around: ["true", "true"],
        all: &[warned("bpf", "sysctl -qw kernel.ftrace_enabled=0", Remedy::Typed)],
    },
    Group {
        name: "another network namespace",
        prefix: "ip netns exec ns1",
        words: ONLY_CHECK,
        around: ["true", "true"],
        all: &[
            refused("datapath", "true", Remedy::ByHand("true")),
            refused("network-namespace", "true", Remedy::ByHand("true")),
        ],
    },
    Group {
        name: "reload of the module",
        prefix: "",
        words: ["restart --plan --reload-module --json", ""],
        around: ["true", "true"],
        all: &[
            warned("reload-module", "true", Remedy::Nothing("true")),
            refused("module", "ip link add link br0 name br0.7 type vlan id 7", Remedy::Typed),
        ],
    },
];

/// Part of `per_vport_to_cpu`.
const PER_VPORT: Group = Group {
    name: "upcalls per vport",
    prefix: NO_BPF,
    words: ONLY_CHECK,
    around: ["true", "true"],
    all: &[refused("dispatch", "true", Remedy::ByHand("true")), warned("bpf", "true", Remedy::ByHand("true"))],
};

/// A kernel that takes the program and never calls it, and a host that does not say so. Linux 6.1 takes no program any more
/// afterwards, so this is one of the last.
const DEAF_HOOKS: Group = Group {
    name: "a kernel whose hooks are not called",
    prefix: "unshare -m sh -c 'echo 1 > /run/lab-one && \
             mount --bind /run/lab-one /proc/sys/kernel/ftrace_enabled && exec \"$@\"' sh",
    words: ONLY_CHECK,
    around: ["sysctl -qw kernel.ftrace_enabled=0", "sysctl -qw kernel.ftrace_enabled=1"],
    all: &[warned("canary", "true", Remedy::Nothing("true"))],
};

/// Where the kernel does not tell who the upcalls go to, and a handler thread has no time to wait for its own.
const UNTOLD: Group = Group {
    name: "a kernel that does not tell",
    prefix: "",
    words: CHECK,
    around: ["rm -f /run/lab-busy", "true"],
    all: &[refused(
        "upcalls-untold",
        "systemd-run -q --unit=lab-busy /lab/lab guest hold-handler /run/lab-busy
         timeout 20 sh -c 'until [ -e /run/lab-busy ]; do sleep 0.1; done'",
        Remedy::ByHand("systemctl stop lab-busy"),
    )],
};

/// Does the kernel of a snapshot by `dpfreeze` say who the upcalls go to?
pub fn tells_upcalls() -> Result<bool> {
    let told = shell("/lab/bin/dpfreeze snapshot /tmp/told.json >&2; cat /tmp/told.json")?;
    let kernel: Value = serde_json::from_str(&told)?;
    let is_told = |datapath: &Value| !datapath["datapath"]["per_cpu_pids"].is_null();
    Ok(kernel["datapaths"].as_array().into_iter().flatten().all(is_told))
}

/// All of `refusals` in an image `+untold`: what is other there.
pub fn provoke_untold(out: &Path, outcome: &mut Outcome) -> Result<()> {
    // The handlers of a process that was stopped wait in another system call.
    shell("kill -STOP $(pidof ovs-vswitchd); sleep 0.2; kill -CONT $(pidof ovs-vswitchd)")?;
    let (found, _) = printed(&shell_lenient("timeout 120 ovs-graceful check --json 2>/dev/null || true"))?;
    let left = found.get("upcalls-untold").map(Vec::as_slice).unwrap_or_default();
    outcome.check("the handlers of a daemon that was stopped are seen", left.is_empty(), json!(texts(left)));
    provoke_group(&UNTOLD, out, outcome)
}

/// Provokes what leaves a kernel behind that is not the same any more.
pub fn provoke_the_last(out: &Path, outcome: &mut Outcome) -> Result<()> {
    provoke_group(&DEAF_HOOKS, out, outcome)
}

/// Those of the cases of `refusals`, whose remedy is tried there.
pub const REFUSALS: &[(&str, Remedy)] = &[
    ("upcalls", Remedy::Typed),
    ("ovs-running", Remedy::Typed),
    ("openvswitch-module", Remedy::Typed),
    ("pidfd_getfd", Remedy::Nothing("true")),
];

/// Those that no command in this VM provokes, and the test that does.
#[cfg(test)]
const ELSEWHERE: &[(&str, &str)] = &[
    (
        "neighbour",
        "scenario dependents, and orchestrator: host::real::check::services::tests::\
         who_would_be_restarted_is_named_with_the_remedy",
    ),
    ("ovsdb-server", "host::real::check::server::tests::what_cannot_be_put_back_is_named_and_a_backup_is_refused"),
    (
        "bridges",
        "scenario refusals, and orchestrator: \
         check::database::tests::a_plain_host_is_fine (it is neither refused nor warned about)",
    ),
    (
        "database-disk",
        "scenario database_disk, and orchestrator: \
         check::database_disk::tests::a_disk_without_room_or_that_is_read_only_is_refused_with_a_remedy",
    ),
    (
        "rule",
        "scenario odd_rules, and orchestrator: \
         supervisor::simulation::a_rule_that_cannot_be_put_back_ends_the_run_before_anything_is_touched",
    ),
    (
        "descriptors",
        "scenario memory_limit, and orchestrator: \
         host::real::limits::tests::descriptors_are_counted_and_what_bounds_them_is_named",
    ),
    (
        "memory",
        "scenario memory_limit, and orchestrator: \
         host::real::limits::tests::limits_of_the_cgroup_and_of_those_above_it_count",
    ),
    (
        "tasks",
        "scenario memory_limit, and orchestrator: \
         host::real::limits::tests::limits_of_the_cgroup_and_of_those_above_it_count",
    ),
    ("dispatch", "scenario per_vport_to_cpu, and orchestrator: check::tests::upcalls_per_vport_need_a_freeze"),
    (
        "upcalls-untold",
        "scenario refusals in the image bookworm+untold, and orchestrator: \
         check::tests::a_kernel_that_does_not_tell_is_refused_only_where_the_daemon_does_not_either",
    ),
    (
        "container",
        "scenario containers, and orchestrator: host::real::check::daemons::tests::a_container_is_not_ours_to_start",
    ),
];

/// A finding as it is printed.
#[derive(Debug, Clone, PartialEq)]
struct Printed {
    refused: bool,
    remedy: String,
    text: String,
}

/// By name.
type Found = BTreeMap<String, Vec<Printed>>;

/// All that are refused or warned about, by name, and which of them were told twice.
fn printed(json: &str) -> Result<(Found, Vec<String>)> {
    let value: Value = serde_json::from_str(json).with_context(|| format!("this is no JSON: {json}"))?;
    let all = value["findings"].as_array().or(value["check"]["findings"].as_array()).context("no findings")?;
    let word = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let mut found = Found::new();
    let mut seen: Vec<(String, String)> = Vec::new();
    let mut twice = Vec::new();
    for finding in all.iter().filter(|finding| finding["severity"] != "ok") {
        let what = (word(finding, "object"), word(finding, "cause"));
        if seen.contains(&what) {
            twice.push(format!("{what:?}"));
        }
        seen.push(what);
        found.entry(word(finding, "name")).or_default().push(Printed {
            refused: finding["severity"] == "refused",
            remedy: word(finding, "remedy"),
            text: finding.to_string(),
        });
    }
    Ok((found, twice))
}

/// The commands in a remedy: what stands between backticks.
fn commands(remedy: &str) -> Vec<&str> {
    remedy.split('`').skip(1).step_by(2).collect()
}

/// What ovs-graceful lists.
fn listed(group: &Group, prefix: &str) -> Result<(Found, Vec<String>)> {
    // On standard error are only words for a person.
    printed(&shell_lenient(&format!("timeout 120 {prefix} ovs-graceful {} 2>/dev/null || true", group.words[0])))
}

/// Does what the remedies of `name` say.
fn heal(name: &str, remedy: Remedy, printed: &[Printed], outcome: &mut Outcome) {
    let none = printed.iter().all(|one| one.remedy.starts_with("none"));
    let by_hand = match remedy {
        Remedy::Nothing(by_hand) => {
            outcome.check(format!("{name}: says that there is no remedy"), none, json!(texts(printed)));
            by_hand
        }
        Remedy::ByHand(by_hand) => {
            let told = !none && printed.iter().all(|one| !one.remedy.is_empty());
            outcome.check(format!("{name}: names a remedy"), told, json!(texts(printed)));
            by_hand
        }
        Remedy::Typed => {
            let typed: Vec<&str> = printed.iter().flat_map(|one| commands(&one.remedy)).collect();
            outcome.check(
                format!("{name}: its remedy can be typed"),
                !typed.is_empty() && !none,
                json!(texts(printed)),
            );
            for command in typed {
                let said = shell_lenient(&format!("timeout 120 {command} 2>&1"));
                say(&format!("{name}: {command}: {}", said.trim()));
            }
            return;
        }
    };
    let said = shell_lenient(by_hand);
    if !said.trim().is_empty() {
        say(&format!("{name}: {by_hand}: {said}"));
    }
}

fn texts(printed: &[Printed]) -> Vec<&str> {
    printed.iter().map(|one| one.text.as_str()).collect()
}

/// Provokes all findings of all groups.
pub fn provoke_all(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let plain = shell_lenient("ovs-graceful check --json 2>/dev/null");
    let well = |name: &str| plain.contains(&format!("\"name\": \"{name}\""));
    outcome.check("a plain host: bridges is told, and neither refused nor warned about", well("bridges"), &plain);
    GROUPS.iter().try_for_each(|group| provoke_group(group, out, outcome))
}

fn provoke_group(group: &Group, out: &Path, outcome: &mut Outcome) -> Result<()> {
    say(&format!("findings: {}", group.name));
    shell(group.around[0]).with_context(|| group.name)?;
    provoke(group, out, outcome)?;
    shell(group.around[1]).with_context(|| group.name).map(drop)
}

fn provoke(group: &Group, out: &Path, outcome: &mut Outcome) -> Result<()> {
    for one in group.all {
        shell(one.prepare).with_context(|| format!("{}: preparing {}", group.name, one.name))?;
    }
    let (found, twice) = listed(group, group.prefix)?;
    let file = out.join(format!("findings-{}.txt", group.name.replace(' ', "-")));
    fs::write(file, format!("{found:#?}\n"))?;
    outcome.check(format!("{}: nothing is told twice", group.name), twice.is_empty(), json!(twice));
    for one in group.all {
        let there = found.get(one.name).map(Vec::as_slice).unwrap_or_default();
        let right = !there.is_empty() && there.iter().all(|printed| printed.refused == one.refused);
        outcome.check(format!("{}: {} is found", group.name, one.name), right, json!(texts(there)));
    }
    if !group.words[1].is_empty() {
        run_lists_the_same(group, &found, out, outcome)?;
    }
    for one in group.all {
        heal(one.name, one.remedy, found.get(one.name).map(Vec::as_slice).unwrap_or_default(), outcome);
    }
    let (now, _) = listed(group, "")?;
    // What a word of the command line provokes stays.
    for one in group.all.iter().filter(|one| one.remedy != Remedy::Nothing("true")) {
        let gone = !now.contains_key(one.name);
        let left = now.get(one.name).map(Vec::as_slice).unwrap_or_default();
        outcome.check(format!("{}: {} has gone", group.name, one.name), gone, json!(texts(left)));
    }
    Ok(())
}

/// A run that is refused lists what `check` lists, once.
fn run_lists_the_same(group: &Group, found: &Found, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let said =
        shell_lenient(&format!("timeout 120 {} ovs-graceful {} 2>&1; echo exit=$?", group.prefix, group.words[1]));
    fs::write(out.join(format!("findings-{}-run.txt", group.name.replace(' ', "-"))), &said)?;
    let name = format!("{}: {}", group.name, group.words[1]);
    outcome.check(format!("{name}: exit 10"), said.trim_end().ends_with("exit=10"), &said);
    let listed = |line: &&str| line.starts_with("refused ") || line.starts_with("warning ");
    let names: Vec<&str> = said.lines().filter(listed).filter_map(|line| line.split_whitespace().nth(1)).collect();
    for (word, printed) in found {
        let times = names.iter().filter(|name| name.strip_suffix(':') == Some(word)).count();
        outcome.check(format!("{name}: lists {word} as check does"), times == printed.len(), &said);
    }
    Ok(())
}

/// Where upcalls are dispatched per vport, a run needs the freeze, and for that BPF: refused without, and well with it.
pub fn dispatch_needs_bpf(outcome: &mut Outcome) -> Result<()> {
    provoke_group(&PER_VPORT, &std::env::temp_dir(), outcome)
}

/// The remedy of a case of `refusals`, which is prepared.
pub fn follow_remedy(name: &str, outcome: &mut Outcome) -> Result<()> {
    let Some((_, remedy)) = REFUSALS.iter().find(|(known, _)| *known == name) else { return Ok(()) };
    let list = || printed(&shell_lenient("timeout 120 ovs-graceful check --json 2>/dev/null || true"));
    let found = list()?.0.remove(name).unwrap_or_default();
    outcome.check(format!("{name} is found"), !found.is_empty(), json!(texts(&found)));
    heal(name, *remedy, &found, outcome);
    if matches!(remedy, Remedy::Typed) {
        let left = list()?.0.remove(name).unwrap_or_default();
        outcome.check(format!("{name} has gone"), left.is_empty(), json!(texts(&left)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// All sources of orchestrator.
    fn sources() -> Vec<String> {
        let mut folders = vec![crate::places::workspace().join("orchestrator/src")];
        let mut texts = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => texts.push(std::fs::read_to_string(path).unwrap()),
                }
            }
        }
        texts
    }

    #[test]
    fn every_finding_of_the_docs_has_a_case() {
        let docs = include_str!("../../../docs/operating.md");
        let table = docs.split("### Outside the promise").nth(1).and_then(|rest| rest.split("\n#").next()).unwrap();
        let rows = table.lines().filter(|line| line.starts_with("| `"));
        let explained: BTreeSet<&str> = rows.filter_map(|row| row.split('`').nth(1)).collect();
        let here = GROUPS.iter().chain([&DEAF_HOOKS]).flat_map(|group| group.all).map(|one| one.name);
        let cases: Vec<&str> =
            here.chain(REFUSALS.iter().map(|(name, _)| *name)).chain(ELSEWHERE.iter().map(|(name, _)| *name)).collect();
        assert_eq!(explained, cases.iter().copied().collect(), "a finding without a case, or a case without one");
        assert_eq!(explained.len(), cases.len(), "one has two cases");
        let sources = sources();
        for (name, test) in ELSEWHERE {
            let word = test.split("::").last().and_then(|last| last.split(' ').next()).unwrap();
            let wanted = format!("fn {word}(");
            assert!(sources.iter().any(|text| text.contains(&wanted)), "{name}: there is no test {word}");
        }
    }

    #[test]
    fn what_the_docs_call_refused_is_refused_here() {
        let docs = include_str!("../../../docs/operating.md");
        for one in GROUPS.iter().flat_map(|group| group.all) {
            let row = docs.lines().find(|line| line.starts_with(&format!("| `{}` |", one.name))).unwrap();
            let word = if one.refused { "refused" } else { "warned" };
            assert!(row.split('|').nth(2).unwrap().contains(word), "{row}");
        }
    }

    #[test]
    fn commands_stand_between_backticks() {
        assert_eq!(commands("`a b`; if so: `c`"), ["a b", "c"]);
        assert!(commands("none: do nothing").is_empty());
    }

    #[test]
    fn findings_are_read_and_those_told_twice_are_seen() {
        let one = |name: &str, severity: &str, cause: &str| json!({"name": name, "severity": severity, "object": "o", "cause": cause, "remedy": "none"});
        let all = [one("a", "ok", "x"), one("b", "refused", "y"), one("c", "warning", "y"), one("b", "refused", "z")];
        let (found, twice) = printed(&json!({"level": "full", "findings": all}).to_string()).unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), ["b", "c"]);
        assert_eq!((found["b"].len(), twice.len(), found["c"][0].refused), (2, 1, false));
    }
}

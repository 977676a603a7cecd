//! Hosts that a restart must refuse: cause, remedy and exit code are said, and nothing is touched.

use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::{aftermath, doors, findings, plain, Custom};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::{self, facts, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Refusals;

/// One such host.
struct Case {
    name: &'static str,
    /// Makes the host so.
    prepare: &'static str,
    /// Makes it well again.
    restore: &'static str,
    /// Put before the command.
    prefix: &'static str,
    /// What both commands answer.
    exit: i32,
    /// One of these must be in what is said (small letters).
    cause: &'static [&'static str],
    /// The finding whose remedy is tried, where it is not in [`findings`].
    finding: &'static str,
}

const BASE: Case = Case { name: "", prepare: "true", restore: "true", prefix: "", exit: 10, cause: &[], finding: "" };

/// In this order: the last ones cannot be undone in a running system.
const CASES: &[Case] = &[
    Case {
        name: "netdev bridge",
        prepare: "ovs-vsctl add-br brn -- set bridge brn datapath_type=netdev",
        restore: "ovs-vsctl del-br brn",
        cause: &["netdev"],
        ..BASE
    },
    Case {
        name: "STP",
        prepare: "ovs-vsctl set bridge br0 stp_enable=true",
        restore: "ovs-vsctl set bridge br0 stp_enable=false",
        cause: &["stp"],
        ..BASE
    },
    Case {
        name: "RSTP",
        prepare: "ovs-vsctl set bridge br0 rstp_enable=true",
        restore: "ovs-vsctl set bridge br0 rstp_enable=false",
        cause: &["rstp"],
        ..BASE
    },
    Case {
        name: "hw-offload",
        prepare: "ovs-vsctl set open_vswitch . other_config:hw-offload=true",
        restore: "ovs-vsctl remove open_vswitch . other_config hw-offload",
        cause: &["hw-offload"],
        ..BASE
    },
    Case {
        name: "flow-restore-wait stuck",
        prepare: "ovs-vsctl set open_vswitch . other_config:flow-restore-wait=true",
        restore: "ovs-vsctl remove open_vswitch . other_config flow-restore-wait",
        cause: &["flow-restore-wait"],
        ..BASE
    },
    Case {
        name: "no root",
        prefix: "setpriv --reuid=65534 --regid=65534 --clear-groups",
        exit: 1,
        cause: &["root"],
        ..BASE
    },
    Case {
        name: "lock held",
        // The lock file is the design's; a flock of somebody else's is as good as a run's.
        prepare: "mkdir -p -m 700 /run/ovs-graceful; \
                  systemd-run -q --unit=lab-holder flock /run/ovs-graceful/lock sleep 600; sleep 1",
        restore: "systemctl stop lab-holder",
        exit: 11,
        cause: &["a run is under way"],
        ..BASE
    },
    Case {
        name: "no upcall socket",
        prepare: "/lab/lab guest attack unbind | grep -qx 'errno 0'",
        restore: "systemctl restart openvswitch-switch",
        cause: &["no socket for its upcalls"],
        finding: "upcalls",
        ..BASE
    },
    Case {
        finding: "ovs-running",
        name: "OVS not running",
        prepare: "systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server",
        restore: "systemctl start openvswitch-switch",
        cause: &["not running", "no ovs-vswitchd", "no running", "does not run", "not found", "cannot find", "is not there", "no process"],
        ..BASE
    },
    Case {
        name: "OVS not installed",
        prepare: "systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server; mkdir -p /hidden; \
                  mv /usr/sbin/ovs-vswitchd /usr/sbin/ovsdb-server /usr/bin/ovs-vsctl /usr/bin/ovs-ofctl /hidden/",
        restore: "mv /hidden/ovs-vswitchd /hidden/ovsdb-server /usr/sbin/; mv /hidden/ovs-vsctl /hidden/ovs-ofctl /usr/bin/; \
                  systemctl start openvswitch-switch",
        cause: &["not running", "no ovs-vswitchd", "no running", "does not run", "not installed", "not found", "cannot find", "no process"],
        ..BASE
    },
    Case {
        finding: "openvswitch-module",
        name: "no kernel module",
        prepare: "systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server; ovs-dpctl del-dp ovs-system || true; \
                  modprobe -r openvswitch; ! grep -q ^openvswitch /proc/modules",
        restore: "systemctl start openvswitch-switch",
        cause: &["module", "modprobe"],
        ..BASE
    },
    Case {
        name: "ptrace_scope=3",
        prepare: "sysctl -qw kernel.yama.ptrace_scope=3",
        cause: &["ptrace_scope"],
        finding: "pidfd_getfd",
        ..BASE
    },
];

/// Where a refusal might leave something behind: configuration, the database, units, PID files and sockets.
/// Not /run/systemd/transient: systemd keeps the supervisor's own unit there for a moment after its end.
const WATCHED: [&str; 4] = ["/etc", "/var/lib/openvswitch", "/run/systemd/system", "/run/openvswitch"];

/// Every file below `folder` with the hash of its bytes. Read in this process: a thousand files take a tool too long
/// under TCG.
fn files(folder: &Path, text: &mut String) {
    let mut entries: Vec<_> = std::fs::read_dir(folder).into_iter().flatten().flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            files(&path, text);
            continue;
        }
        let mut hasher = DefaultHasher::new();
        if kind.is_file() {
            std::fs::read(&path).unwrap_or_default().hash(&mut hasher);
        } else if kind.is_symlink() {
            std::fs::read_link(&path).unwrap_or_default().hash(&mut hasher);
        }
        let _ = writeln!(text, "{} {:016x}", path.display(), hasher.finish());
    }
}

/// Everything that a refusal must leave as it is, as text. Without the kernel's flows: they come and go with the
/// seconds by themselves, and asking ovs-dpctl for them loads the module.
fn state() -> String {
    let mut text = String::new();
    WATCHED.iter().for_each(|folder| files(Path::new(folder), &mut text));
    text.push_str(&shell_lenient(
        "timeout 5 ovs-ofctl --no-stats dump-flows br0 2>/dev/null | sort
         timeout 5 ovs-vsctl get open_vswitch . other_config 2>/dev/null
         systemctl show -p Id,MainPID,ActiveState,ExecMainStartTimestampMonotonic,FragmentPath,DropInPaths \
            ovsdb-server ovs-vswitchd openvswitch-switch",
    ));
    text
}

/// Lines of one text that the other has not.
fn difference(before: &str, after: &str) -> Vec<String> {
    let missing = before.lines().filter(|l| !after.lines().any(|a| a == *l)).map(|l| format!("-{l}"));
    let added = after.lines().filter(|l| !before.lines().any(|b| b == *l)).map(|l| format!("+{l}"));
    missing.chain(added).take(12).collect()
}

/// Runs a command, judges its exit code and words, and that it touched nothing of `before`.
fn refused(case: &Case, words: &str, before: &str, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let name = format!("{}: {words}", case.name);
    let output = Command::new("timeout")
        .args(["60", "sh", "-c", &format!("{} ovs-graceful {words}", case.prefix)])
        .stdin(Stdio::null())
        .output()
        .with_context(|| name.clone())?;
    let after = state();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let file = format!("refusal-{}.txt", name.replace([' ', ':', '/'], "_"));
    std::fs::write(out.join(file), format!("{text}\n[{}]\n", output.status))?;
    outcome.check(format!("{name}: exit {}", case.exit), output.status.code() == Some(case.exit), &text);
    let small = text.to_lowercase();
    outcome.check(format!("{name}: names the cause"), case.cause.iter().any(|c| small.contains(c)), &text);
    if case.exit == 10 {
        let remedy = small.contains("remedy") || words.contains("json");
        outcome.check(format!("{name}: names a remedy"), remedy, &text);
    }
    let changes = difference(before, &after);
    outcome.check(format!("{name}: touched nothing"), changes.is_empty(), json!(changes));
    Ok(())
}

/// Flows that stay in use, so that refusals can be seen to leave them alone.
fn traffic() -> Result<Child> {
    let mut ping = Command::new("ip");
    ping.args(["netns", "exec", "ns1", "ping", "-q", "-i", "0.2", "10.9.0.2"]);
    ping.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("cannot start ping")
}

/// The state once two looks at it are the same.
fn settled() -> String {
    let mut last = state();
    let _ = wait_until("the host is at rest", Duration::from_secs(15), Duration::from_millis(300), || {
        let now = state();
        let same = now == last;
        last = now;
        same
    });
    last
}

const CONFIG: &str = "/etc/ovs-graceful/config.toml";

/// `[doors] refused`, and a configuration that cannot be read: what a restart of the unit and an upgrade make of a host
/// that is refused, and what is told where.
fn doors_when_refused(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("doors.refused");
    shell("cp /usr/bin/ovs-graceful /usr/sbin/ovs-graceful; mkdir -p /etc/ovs-graceful")?;
    doors::install_drop_ins()?;
    shell("ovs-vsctl set bridge br0 stp_enable=true")?;
    for (name, config, told) in [
        ("keep", "[doors]\nrefused = \"keep\"\n", "spanning-tree"),
        ("unreadable", "[park]\nmax_packet = 9\n", "max_packet"),
    ] {
        std::fs::write(CONFIG, config)?;
        let before = facts::DAEMONS.map(facts::daemons);
        let policy = upgrade_of_a_refused_host(name, out)?;
        let kept = policy.contains("exit=101") && policy.contains("as they are") && !policy.contains("exit=0");
        outcome.check(format!("{name}: an upgrade stops nothing"), kept, &policy);
        let why = if name == "keep" { "STP" } else { told };
        outcome.check(format!("{name}: apt's terminal shows why"), policy.contains(why), &policy);
        let said = doors::systemctl("restart openvswitch-switch", &format!("restart-{name}"), out);
        outcome.check(format!("{name}: systemctl restart fails"), !said.starts_with("exit=0"), &said);
        outcome.check(format!("{name}: its journal says why"), said.contains(told), &said);
        let now = facts::DAEMONS.map(facts::daemons);
        outcome.check(format!("{name}: the daemons stay"), before == now, json!([before, now]));
        let active = || facts::unit_property("openvswitch-switch", "ActiveState") == "active";
        let again = wait_until("the unit is active", Duration::from_secs(30), Duration::from_millis(200), active);
        outcome.check(format!("{name}: the unit is active again"), again.is_ok(), format!("{again:?}"));
        aftermath::no_unit_failed(outcome);
    }
    std::fs::write(CONFIG, "")?;
    let before = facts::DAEMONS.map(facts::daemons);
    let policy = upgrade_of_a_refused_host("plain", out)?;
    outcome.check(
        "plain: an upgrade may stop the daemons, and says why",
        policy.contains("exit=0") && policy.contains("STP"),
        &policy,
    );
    let said = shell_lenient("timeout 240 ovs-graceful restart --plain 2>&1; echo exit=$?");
    guest::wait_for_daemons()?;
    let now = facts::DAEMONS.map(facts::daemons);
    let others = before.iter().zip(&now).all(|(before, now)| now.len() == 1 && before != now);
    outcome.check(
        "restart --plain is an ordinary one",
        said.trim_end().ends_with("exit=0") && others,
        json!([said, before, now]),
    );
    let journal = shell_lenient("journalctl -q -b -u ovs-graceful-run -o cat --since -30s");
    outcome.check("and no run", !journal.contains("point of no return"), journal);
    shell("ovs-vsctl set bridge br0 stp_enable=false")?;
    doors::remove_drop_ins()?;
    shell(&format!("rm {CONFIG} /usr/sbin/ovs-graceful"))?;
    plain::rules()
}

/// What Debian's preinst and postinst ask, in an upgrade of its own, and the terminal shows.
fn upgrade_of_a_refused_host(name: &str, out: &Path) -> Result<String> {
    let ask = |script: &str, unit: &str, action: &str| {
        format!(
            "DPKG_MAINTSCRIPT_PACKAGE=openvswitch-switch DPKG_MAINTSCRIPT_NAME={script} \
             ovs-graceful hook policy {unit} {action} 2>&1; echo exit=$?\n"
        )
    };
    let script = format!(
        "rm -f /run/ovs-graceful/upgrade\n{}{}{}rm -f /run/ovs-graceful/upgrade\n",
        ask("preinst", "ovsdb-server.service", "stop"),
        ask("preinst", "ovs-vswitchd.service", "stop"),
        ask("postinst", "openvswitch-switch.service", "restart"),
    );
    let said = shell_lenient(&script);
    std::fs::write(out.join(format!("upgrade-{name}")), &said)?;
    Ok(said)
}

impl Custom for Refusals {
    fn name(&self) -> &'static str {
        "refusals"
    }

    fn about(&self) -> &'static str {
        "hosts that are refused: exit code, cause, remedy, nothing touched"
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(8)
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        if !findings::tells_upcalls()? {
            return findings::provoke_untold(out, outcome);
        }
        let mut ping = traffic()?;
        let before = settled();
        let well = Case { name: "well", exit: 0, cause: &["full"], ..BASE };
        for words in ["check", "check --json", "restart --plan"] {
            refused(&well, words, &before, out, outcome)?;
        }
        findings::provoke_all(out, outcome)?;
        guest::wait_for_daemons()?;
        doors_when_refused(out, outcome)?;
        findings::provoke_the_last(out, outcome)?;
        for case in CASES {
            say(&format!("refusal: {}", case.name));
            shell(case.prepare).with_context(|| format!("preparing {}", case.name))?;
            let before = settled();
            for words in ["check", "restart"] {
                refused(case, words, &before, out, outcome)?;
            }
            findings::follow_remedy(case.finding, outcome)?;
            shell(case.restore).with_context(|| format!("restoring {}", case.name))?;
            if case.restore.contains("openvswitch-switch") {
                guest::wait_for_daemons()?;
            }
        }
        let _ = ping.kill();
        let _ = ping.wait();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_both_ways() {
        assert!(difference("a\nb", "b\na").is_empty());
        assert_eq!(difference("a\nb", "b\nc"), ["-a", "+c"]);
    }
}

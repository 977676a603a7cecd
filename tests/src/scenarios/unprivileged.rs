//! An unprivileged user can neither redirect upcalls, nor freeze or thaw, nor read what was parked.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{json, Value};

use super::{plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::say;
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Unprivileged;

const NOBODY: &str = "setpriv --reuid=65534 --regid=65534 --clear-groups";

fn freeze_state() -> Value {
    serde_json::from_str(&shell_lenient("dpfreeze status --json")).unwrap_or(Value::Null)
}

/// What an attack must not change.
fn fingerprint() -> Value {
    let state = freeze_state();
    json!({
        "armed": state["armed"], "classes": state["classes"], "refused": state["refused"],
        "captured": state["captured"], "standby": state["standby"],
    })
}

fn attack(prefix: &str, kind: &str) -> String {
    shell_lenient(&format!("timeout 20 {prefix} /lab/lab guest attack {kind}")).trim().to_owned()
}

fn attacks(when: &str, outcome: &mut Outcome) {
    for kind in ["bind", "flush"] {
        let answer = attack(NOBODY, kind);
        outcome.check(format!("{when}: nobody's {kind} is refused"), answer == "errno 1", &answer);
        // In a user namespace of his own he has CAP_NET_ADMIN, over another network namespace.
        let answer = attack(&format!("{NOBODY} unshare -Urn"), kind);
        let fails = answer.starts_with("errno ") && answer != "errno 0";
        outcome.check(format!("{when}: nobody's {kind} from his own namespaces fails"), fails, &answer);
    }
}

fn tools(when: &str, outcome: &mut Outcome) {
    for words in [
        "dpfreeze thaw",
        "dpfreeze status",
        "dpfreeze dump",
        "dpfreeze freeze --class flow-flush --lease 60",
        "ovs-graceful abort",
        "ovs-graceful thaw",
        "ovs-graceful recover",
    ] {
        let text = shell_lenient(&format!("timeout 20 {NOBODY} {words} && echo it-worked"));
        outcome.check(format!("{when}: nobody's `{words}` fails"), !text.contains("it-worked"), text);
    }
}

impl Custom for Unprivileged {
    fn name(&self) -> &'static str {
        "unprivileged"
    }

    fn about(&self) -> &'static str {
        "an unprivileged user can neither redirect, freeze, thaw nor read"
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        shell("chmod 755 /lab /lab/lab")?;
        shell("dpfreeze freeze --class flow-flush --class flow-del --lease 300")?;
        let before = fingerprint();
        outcome.check("frozen by root", before["armed"] == true, &before);
        let flush = shell_lenient("ovs-dpctl del-flows && echo it-worked");
        outcome.check("root's own flush is refused while frozen", !flush.contains("it-worked"), flush);
        let before = fingerprint();
        attacks("frozen", outcome);
        tools("frozen", outcome);
        let after = fingerprint();
        outcome.check("nothing about the freeze changed", before == after, json!([before, after]));
        shell("dpfreeze thaw")?;
        during_a_run(out, outcome)
    }
}

fn during_a_run(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("a run under attack");
    let report = out.join("report.json");
    let mut run = Command::new("ovs-graceful")
        .args(["restart", "--report"])
        .arg(&report)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(out.join("action-stdout"))?)
        .stderr(std::fs::File::create(out.join("action-stderr"))?)
        .spawn()
        .context("cannot start ovs-graceful")?;
    let end = Instant::now() + Duration::from_secs(120);
    let mut seen = Vec::new();
    let mut opened = Vec::new();
    while run.try_wait()?.is_none() && Instant::now() < end {
        for kind in ["bind", "flush"] {
            seen.push(attack(NOBODY, kind));
        }
        let text = shell_lenient(&format!(
            "{NOBODY} sh -c 'cat /run/ovs-graceful/* /var/lib/ovs-graceful/runs/*/* 2>/dev/null | head -c 1 | grep -q . && \
                echo state; for p in $(pidof ovs-graceful); do cat /proc/$p/fd/* /proc/$p/maps 2>/dev/null | head -c 1 | \
                grep -q . && echo process; done; ls /sys/fs/bpf 2>/dev/null | grep -q . && echo pins; true'"
        ));
        opened.extend(text.lines().map(str::to_owned));
    }
    let exit = run.wait()?.code();
    outcome.check("the run under attack ends with 0", exit == Some(0), exit);
    outcome.check("attacks took place", !seen.is_empty(), seen.len());
    let refused = seen.iter().all(|a| a == "errno 1");
    seen.sort();
    seen.dedup();
    outcome.check("every attack was refused", refused, seen);
    opened.sort();
    opened.dedup();
    outcome.check("nothing of the run was readable", opened.is_empty(), opened);
    let ping = shell_lenient("ip netns exec ns1 ping -q -c 3 -i 0.2 -w 10 10.9.0.2 && echo it-worked");
    outcome.check("the switch forwards", ping.contains("it-worked"), ping);
    Ok(())
}

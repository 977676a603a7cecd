//! systemd stays right: three runs in a row, then everything that units, ovs-appctl and logrotate do.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::{plain, Custom};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::{self, facts, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Systemd;

/// Environment variables that systemd makes anew for every start.
const FRESH: [&str; 3] = ["INVOCATION_ID=", "JOURNAL_STREAM=", "SYSTEMD_EXEC_PID="];

/// Lines of /proc/PID/status that a start decides.
const STATUS: [&str; 14] = [
    "Umask:",
    "Uid:",
    "Gid:",
    "Groups:",
    "CapInh:",
    "CapPrm:",
    "CapEff:",
    "CapBnd:",
    "CapAmb:",
    "NoNewPrivs:",
    "Seccomp:",
    "SigBlk:",
    "SigIgn:",
    "SigCgt:",
];

/// What /proc tells about how a process was started.
fn start_facts(pid: u32) -> Result<BTreeMap<&'static str, String>> {
    let read = |name: &str| -> Result<String> {
        let path = format!("/proc/{pid}/{name}");
        let bytes = fs::read(&path).with_context(|| format!("cannot read {path}"))?;
        Ok(String::from_utf8_lossy(&bytes).replace('\0', "\n"))
    };
    let mut environment: Vec<String> =
        read("environ")?.lines().filter(|l| !FRESH.iter().any(|f| l.starts_with(f))).map(str::to_owned).collect();
    environment.sort();
    let status = read("status")?;
    let status: Vec<&str> = status.lines().filter(|l| STATUS.iter().any(|s| l.starts_with(s))).collect();
    let locked = read("status")?.lines().any(|l| l.starts_with("VmLck:") && !l.contains(" 0 kB"));
    let stat = read("stat")?;
    let nice = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(16)).unwrap_or_default().to_owned();
    Ok(BTreeMap::from([
        ("cmdline", read("cmdline")?),
        ("environ", environment.join("\n")),
        ("limits", read("limits")?),
        ("status", status.join("\n")),
        ("oom_score_adj", read("oom_score_adj")?),
        ("cgroup", read("cgroup")?),
        ("nice", nice),
        ("memory locked", locked.to_string()),
        ("cwd", fs::read_link(format!("/proc/{pid}/cwd"))?.to_string_lossy().into_owned()),
    ]))
}

fn both() -> Result<Vec<BTreeMap<&'static str, String>>> {
    let mut all = Vec::new();
    for name in facts::DAEMONS {
        let found = facts::daemons(name);
        let [one] = found.as_slice() else { anyhow::bail!("{} processes are called {name}: {found:?}", found.len()) };
        all.push(start_facts(one.pid)?);
    }
    Ok(all)
}

fn owned(when: &str, outcome: &mut Outcome) {
    for name in facts::DAEMONS {
        let found = facts::daemons(name);
        let unit = format!("{name}.service");
        let state = facts::unit_property(&unit, "ActiveState");
        let main = facts::unit_property(&unit, "MainPID");
        let group = facts::unit_property(&unit, "ControlGroup");
        let right =
            matches!(found.as_slice(), [d] if main == d.pid.to_string() && d.cgroup == group) && state == "active";
        let value = json!({ "state": state, "main_pid": main, "control_group": group, "daemons": found });
        outcome.check(format!("{when}: {unit} owns its daemon"), right, value);
    }
}

fn works(what: &str, script: &str, outcome: &mut Outcome) {
    let text = shell_lenient(&format!("timeout 120 sh -ec '{script}' && echo it-worked"));
    outcome.check(what, text.contains("it-worked"), text);
}

impl Custom for Systemd {
    fn name(&self) -> &'static str {
        "systemd"
    }

    fn about(&self) -> &'static str {
        "three runs in a row; units, ovs-appctl and logrotate work as before"
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        shell("systemctl restart openvswitch-switch")?;
        guest::wait_for_daemons()?;
        let stock = both()?;
        let drop_ins = "systemctl show -p DropInPaths,PIDFile,ExecReload,ExecStop ovs-vswitchd ovsdb-server";
        let unit_before = shell_lenient(drop_ins);
        for round in 1..=3 {
            say(&format!("run {round} of 3"));
            let before = facts::DAEMONS.map(facts::daemons);
            let script =
                format!("ovs-graceful restart --report {}", out.join(format!("report-{round}.json")).display());
            let text = shell_lenient(&format!(
                "timeout 180 {script} >{0} 2>&1; echo exit=$?",
                out.join(format!("run-{round}")).display()
            ));
            outcome.check(format!("run {round}: exit 0"), text.trim() == "exit=0", text.trim());
            let after = facts::DAEMONS.map(facts::daemons);
            outcome.check(
                format!("run {round}: both daemons replaced"),
                before[0] != after[0] && before[1] != after[1],
                json!([before, after]),
            );
            owned(&format!("run {round}"), outcome);
            compare(round, &stock, outcome);
            works(
                &format!("run {round}: ovs-appctl by name"),
                "ovs-appctl -t ovs-vswitchd version; ovs-appctl -t ovsdb-server version",
                outcome,
            );
        }
        let unit_after = shell_lenient(drop_ins);
        outcome.check("units as before", unit_before == unit_after, json!([unit_before, unit_after]));
        works(
            "logrotate reopens the log",
            "logrotate -f /etc/logrotate.d/openvswitch-switch; sleep 1; ovs-appctl vlog/set info; \
             pid=$(pidof ovs-vswitchd); log=/var/log/openvswitch/ovs-vswitchd.log; \
             ls -lL /proc/$pid/fd | grep -q . ; test \"$(stat -c %i $log)\" = \"$(stat -Lc %i $(ls -d /proc/$pid/fd/* | \
             while read f; do [ \"$(readlink $f)\" = $log ] && echo $f; done | head -1))\"",
            outcome,
        );
        for verb in ["reload", "restart", "stop", "start"] {
            works(&format!("systemctl {verb}"), &format!("systemctl {verb} openvswitch-switch"), outcome);
            if verb == "stop" {
                // `systemctl stop` waits for the umbrella's own job only; its parts follow.
                let gone = || facts::DAEMONS.map(facts::daemons).concat().is_empty();
                let _told_below =
                    wait_until("the daemons to end", Duration::from_secs(30), Duration::from_millis(200), gone);
                let left = facts::DAEMONS.map(facts::daemons).concat();
                outcome.check("stop leaves no daemon", left.is_empty(), json!(left));
            } else {
                guest::wait_for_daemons()?;
                owned(&format!("after {verb}"), outcome);
            }
        }
        let failed = facts::failed_units();
        outcome.check("no unit failed", failed.is_empty(), failed);
        Ok(())
    }
}

fn compare(round: u32, stock: &[BTreeMap<&'static str, String>], outcome: &mut Outcome) {
    let now = match both() {
        Ok(now) => now,
        Err(error) => {
            outcome.check(format!("run {round}: one process each"), false, format!("{error:#}"));
            return;
        }
    };
    for ((daemon, before), after) in facts::DAEMONS.iter().zip(stock).zip(&now) {
        for (what, value) in before {
            let same = after.get(what) == Some(value);
            let found = if same { json!("same") } else { json!({ "stock": value, "ours": after.get(what) }) };
            outcome.check(format!("run {round}: {what} of {daemon} as after a stock restart"), same, found);
        }
    }
}

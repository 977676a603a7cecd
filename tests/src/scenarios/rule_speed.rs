//! 100,000 OpenFlow rules on two bridges: how long they take to be read and to be given back, and how much memory that
//! takes, beside `ovs-save` and what it writes, which is how a stock `ovs-ctl restart` keeps them.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{json, Value};

use super::{aftermath, network, plain, Custom};
use crate::command::shell;
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct RuleSpeed;

const BRIDGES: [&str; 2] = ["br0", "br1"];
const RULES_PER_BRIDGE: u32 = 50_000;
/// The supervisor may have so much in memory, KiB.
const MEMORY_KIB: u64 = 300 << 10;
const LOOK: Duration = Duration::from_millis(100);

/// Half of them are told in the same words by the highest version; of the others some come from OpenFlow 1.4 (`load`) and
/// some from 1.0 (`mod_nw_dst`).
fn rules(bridge: u32) -> String {
    let mut text = String::new();
    for i in 0..RULES_PER_BRIDGE {
        let address = format!("10.{}.{}.{}", 100 + bridge * 2 + (i >> 16), (i >> 8) & 255, i & 255);
        let (table, cookie) = (10 + i % 20, i + 1);
        let actions = match i % 4 {
            0 => "load:0x5->NXM_NX_REG1[],resubmit(,40)".to_owned(),
            1 => format!("mod_nw_dst:{address},output:2"),
            _ => format!("ct(commit,zone={},exec(set_field:{i:#x}->ct_mark)),output:2", i % 1000),
        };
        let _ = writeln!(
            text,
            "cookie={cookie:#x},table={table},priority=20,tcp,nw_src={address},tp_dst=443,actions={actions}"
        );
    }
    text
}

impl Custom for RuleSpeed {
    fn name(&self) -> &'static str {
        "rule_speed"
    }

    fn about(&self) -> &'static str {
        "100,000 rules: time and memory that they take, beside ovs-save"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        shell("ovs-vsctl add-br br1")?;
        load()?;
        say("rule_speed: rules are there");
        outcome.note("ovs-save", saved_by_stock()?);
        // Stock has put them back in other words.
        load()?;
        let own = || {
            shell("for b in br0 br1; do ovs-appctl bridge/dump-flows $b; done | sed 's/duration=[^ ]* n_packets=[^ ]* n_bytes=[^ ]* //' | sort | md5sum")
        };
        let before = (own()?, facts::daemons("ovs-vswitchd"));
        let known = run::known();
        let begun = Instant::now();
        let mut client = run::start(&[], &out.join("run"))?;
        let (ended, most) = (AtomicBool::new(false), AtomicU64::new(0));
        let code = std::thread::scope(|scope| {
            scope.spawn(|| watch_memory(&ended, &most));
            let code = client.wait();
            ended.store(true, Ordering::Relaxed);
            code
        })?;
        outcome.check("exit code 0", code.code() == Some(0), code.code());
        let id = run::known().into_iter().find(|id| !known.contains(id)).context("there was no run")?;
        let report: Value = serde_json::from_str(&fs::read_to_string(run::report(&id))?)?;
        let phases: Vec<&Value> = report["phases"].as_array().into_iter().flatten().collect();
        outcome.note(
            "ours",
            json!({"whole_s": begun.elapsed().as_secs_f64(), "phases": phases, "gap_ms": report["gap_ms"]}),
        );
        let most = most.into_inner();
        outcome.check("memory of the supervisor, KiB", (1..MEMORY_KIB).contains(&most), json!([most, MEMORY_KIB]));
        let after = (own()?, facts::daemons("ovs-vswitchd"));
        outcome.check("another daemon", before.1 != after.1, &after.1);
        outcome.check(
            "every rule is in the daemon's words what it was",
            before.0 == after.0,
            json!([before.0, after.0]),
        );
        outcome.check("report has no differences", report["differences"] == json!([]), &report["differences"]);
        aftermath::nothing_left("rule_speed", outcome);
        Ok(())
    }
}

fn load() -> Result<()> {
    for (number, bridge) in (0..).zip(BRIDGES) {
        let file = format!("/run/lab-rules-{bridge}");
        fs::write(&file, rules(number))?;
        shell(&format!("ovs-ofctl add-flows {bridge} {file} && rm {file}"))?;
    }
    Ok(())
}

/// What the supervisor has had in memory, by the kernel's word.
fn watch_memory(ended: &AtomicBool, most: &AtomicU64) {
    while !ended.load(Ordering::Relaxed) {
        let status = run::supervisor().and_then(|pid| Ok(fs::read_to_string(format!("/proc/{pid}/status"))?));
        let peak = status.ok().and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
            line.split_whitespace().next()?.parse().ok()
        });
        most.fetch_max(peak.unwrap_or(0), Ordering::Relaxed);
        std::thread::sleep(LOOK);
    }
}

/// Seconds that `ovs-save` takes to save the rules, and its script to put them back.
fn saved_by_stock() -> Result<Value> {
    let begun = Instant::now();
    shell("/usr/share/openvswitch/scripts/ovs-save save-flows br0 br1 > /run/lab-saved")?;
    let saved = begun.elapsed();
    let begun = Instant::now();
    shell("sh /run/lab-saved; rm /run/lab-saved")?;
    Ok(json!({"save_s": saved.as_secs_f64(), "restore_s": begun.elapsed().as_secs_f64()}))
}

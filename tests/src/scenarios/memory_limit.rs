//! A memory limit of ovs-vswitchd's unit, which the standby lives in as well: too low for two daemons it is refused, and
//! the remedy, typed as it is printed, makes a run of it. Nobody is killed for memory.

use std::path::Path;
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::{aftermath, network, plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct MemoryLimit;

/// Each with what the unit's limit is set to, of the memory that the unit has in use, percent.
const LIMITS: [(&str, &str); 2] = [("MemoryMax", "max"), ("MemoryHigh", "high")];
/// Enough for the one daemon that runs, not for two.
const PERCENT: u64 = 130;

impl Custom for MemoryLimit {
    fn name(&self) -> &'static str {
        "memory_limit"
    }

    fn about(&self) -> &'static str {
        "MemoryMax= and MemoryHigh= of ovs-vswitchd's unit, too low for two daemons"
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(2)
    }

    fn run(&self, job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        // A daemon that is as large as that of a host with many rules.
        shell(
            "seq 1 20000 | sed 's/.*/priority=3,reg1=&,ip,nw_dst=10.250.0.0\\/16,actions=drop/' > /run/lab-many
             ovs-ofctl --bundle add-flows br0 /run/lab-many",
        )?;
        let wanted = |limit: &&(&str, &str)| job.extra_args.is_empty() || job.extra_args.iter().any(|a| a == limit.0);
        for (property, file) in LIMITS.iter().filter(wanted) {
            say(&format!("memory_limit: {property}"));
            one(property, file, out, outcome).with_context(|| format!("memory_limit: {property}"))?;
        }
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

fn one(property: &str, file: &str, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let check = |what: &str| format!("{property}: {what}");
    let rules = facts::promised(&plain::bridges());
    let live = plain::start_probes()?;
    let current: u64 =
        facts::unit_property("ovs-vswitchd.service", "MemoryCurrent").parse().context("MemoryCurrent")?;
    let limit = current / 100 * PERCENT;
    shell(&format!("systemctl set-property --runtime ovs-vswitchd.service {property}={limit}"))?;
    let in_force = shell(&format!("cat /sys/fs/cgroup/system.slice/ovs-vswitchd.service/memory.{file}"))?;
    ensure!(in_force.trim() != "max", "{property} is not in force");
    let daemons = facts::daemons("ovs-vswitchd");
    let restart = |name: &str| -> Result<(Option<i32>, String)> {
        let log = out.join(format!("{property}-{name}"));
        let code = run::start(&[], &log)?.wait()?.code();
        Ok((code, std::fs::read_to_string(&log)?))
    };

    let (code, said) = restart("refused")?;
    outcome.check(check("refused"), code == Some(10), &said);
    outcome.check(check("the same daemon"), facts::daemons("ovs-vswitchd") == daemons, &said);
    outcome.check(check("names the property"), said.contains(property), &said);
    let looked = shell_lenient("ovs-graceful check");
    let remedy = looked.split("systemctl set-property ").nth(1).unwrap_or_default();
    let remedy = remedy.split([';', '\n', ')']).next().unwrap_or_default();
    outcome.check(check("check prints a command"), remedy.contains(&format!("{property}=")), &looked);
    shell(&format!("systemctl set-property {remedy}"))?;

    let (code, said) = restart("done")?;
    outcome.check(check("done after the remedy"), code == Some(0), &said);
    outcome.check(check("another daemon"), facts::daemons("ovs-vswitchd") != daemons, &said);
    let events =
        shell_lenient("cat /sys/fs/cgroup/system.slice/ovs-vswitchd.service/memory.events; dmesg | grep -i oom");
    let quiet = events.contains("oom_kill 0") && !events.contains("Killed process");
    outcome.check(check("nobody was killed for memory"), quiet, events);
    std::thread::sleep(Duration::from_secs(2));
    aftermath::all_is_well(property, &rules, outcome);
    shell(&format!("systemctl set-property --runtime ovs-vswitchd.service {property}=infinity"))?;
    aftermath::finish(property, live, false, outcome).map(drop)
}

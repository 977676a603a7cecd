//! Limits that are too low for a run are refused, and the remedy, typed as it is printed, makes the finding go away: those
//! of memory and tasks of ovs-vswitchd's unit, which the standby lives in as well, and that of open files. Under a memory
//! limit raised so a run is done, and nobody is killed for memory.

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

    /// Of the matrix: two whole runs for what is a comparison of numbers.
    fn by_hand(&self) -> bool {
        true
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
        if job.extra_args.is_empty() {
            let tasks = "systemctl set-property --runtime ovs-vswitchd.service \
                         TasksMax=$(($(systemctl show --value -p TasksCurrent ovs-vswitchd.service) + 2))";
            let no_limit = "systemctl set-property --runtime ovs-vswitchd.service TasksMax=infinity";
            only_checked("tasks", tasks, "systemctl set-property", no_limit, outcome)?;
            only_checked(
                "descriptors",
                "sysctl -qw fs.nr_open=128",
                "sysctl -w",
                "sysctl -qw fs.nr_open=1048576",
                outcome,
            )?;
        }
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

/// What begins with `word`, up to the end of the command, in the remedies of `ovs-graceful check`, and all that was said.
fn remedy(word: &str) -> (String, String) {
    let looked = shell_lenient("ovs-graceful check");
    let command = looked.split(word).nth(1).map(|rest| rest.split(['`', ';', '\n', ')']).next().unwrap_or_default());
    (command.map(|rest| format!("{word}{rest}")).unwrap_or_default(), looked)
}

/// `ovs-graceful check` refuses with finding `name`, and no more once its remedy was typed.
fn only_checked(name: &str, prepare: &str, word: &str, restore: &str, outcome: &mut Outcome) -> Result<()> {
    say(&format!("memory_limit: {name}"));
    shell(prepare)?;
    let (command, said) = remedy(word);
    let refused = shell_lenient("ovs-graceful check --json >/dev/null; echo $?");
    outcome.check(format!("{name}: refused"), refused.trim() == "10" && said.contains(name), &said);
    shell(&command).with_context(|| format!("{name}: {said}"))?;
    let after = shell_lenient("ovs-graceful check; echo exit $?");
    outcome.check(format!("{name}: the remedy helps"), after.contains("exit 0"), format!("{command}: {after}"));
    shell(restore).map(drop)
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
    let (command, looked) = remedy("systemctl set-property");
    outcome.check(check("check prints a command"), command.contains(&format!("{property}=")), &looked);
    // What check itself has the daemon do must not be what kills it.
    outcome.check(check("check leaves the daemon alone"), facts::daemons("ovs-vswitchd") == daemons, &looked);
    shell(&command)?;

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

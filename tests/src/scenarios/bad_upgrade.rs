//! `apt-get` upgrades Open vSwitch under traffic to versions that are no good: one whose ovs-vswitchd crashes at its start,
//! one that hangs, one with a newer schema, and one with a newer schema that crashes. Our package is installed: whoever
//! forwarded goes on forwarding, and apt is content. And back again to the version before.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::{aftermath, doors, network, plain, upgrade, Custom};
use crate::command::{shell_lenient, shell_logged};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};
use crate::packages::{Packages, BAD};

/// See the module.
pub struct BadUpgrade;

impl Custom for BadUpgrade {
    fn name(&self) -> &'static str {
        "bad_upgrade"
    }

    fn about(&self) -> &'static str {
        "apt-get upgrades to an ovs-vswitchd that crashes, hangs, has a newer schema; and back"
    }

    fn packages(&self) -> Packages {
        Packages::OursAndBad
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(24)
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        upgrade::apt_sources()?;
        let good = installed();
        upgrade::install_ours(&out.join("apt-ours").display().to_string(), outcome)?;
        for (version, _) in BAD {
            let name = version.trim_start_matches("99:");
            let to = |version: &str, log: &str| apt(version, &out.join(log));
            match name {
                "3-newer-schema" => doors::graceful(name, || to(version, name), outcome)?,
                _ => stays(name, || to(version, name), outcome)?,
            }
            let now = installed();
            outcome.check(format!("{name}: the package is installed"), now == version, &now);
            sane(name, outcome);
            let back = format!("{name}, and back");
            doors::graceful(&back, || to(&good, &back.replace(", ", "-").replace(' ', "-")), outcome)?;
            sane(&back, outcome);
        }
        Ok(())
    }
}

fn installed() -> String {
    shell_lenient("dpkg-query -W -f '${Version}' openvswitch-switch").trim().to_owned()
}

fn apt(version: &str, log: &Path) -> String {
    let words = format!("install --allow-downgrades openvswitch-switch={version}");
    shell_logged(&format!("{} {words}", upgrade::APT), log)
}

/// The ovs-vswitchd that forwarded goes on, and apt says why.
fn stays(name: &str, door: impl FnOnce() -> String, outcome: &mut Outcome) -> Result<()> {
    say(name);
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(3));
    let (before, rules) = (facts::daemons("ovs-vswitchd"), facts::promised(&plain::bridges()));
    let known = run::known();
    let said = door();
    outcome.check(format!("{name}: apt is content"), said.starts_with("exit=0"), &said);
    let told = said.contains("the one before it still runs") && said.contains("restart --if-needed");
    outcome.check(format!("{name}: apt tells who runs, and the remedy"), told, &said);
    let now = facts::daemons("ovs-vswitchd");
    let process = |found: &[facts::Daemon]| found.iter().map(|d| (d.pid, d.start_time)).collect::<Vec<_>>();
    let same = process(&before) == process(&now);
    outcome.check(format!("{name}: the ovs-vswitchd of before forwards"), same, json!([before, now]));
    let runs: Vec<_> = run::known().into_iter().filter(|id| !known.contains(id)).collect();
    let codes: Vec<_> = runs.iter().map(|id| doors::told(id)).collect();
    let undone = matches!(codes.as_slice(), [one] if one["exit_code"] == 20);
    outcome.check(format!("{name}: the run was undone"), undone, json!(codes));
    aftermath::all_is_well(name, &rules, outcome);
    aftermath::finish(name, live, false, outcome).map(drop)
}

fn sane(name: &str, outcome: &mut Outcome) {
    let audit = shell_lenient("dpkg --audit; apt-get check -qq");
    outcome.check(format!("{name}: the package manager is in a sane state"), audit.trim().is_empty(), audit);
    let failed = facts::failed_units();
    outcome.check(format!("{name}: no unit failed"), failed.is_empty(), failed);
}

//! `apt-get` upgrades Open vSwitch to that of the next release under traffic: with our package installed that is a
//! run; and beside it, in a VM of its own, as it is without.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use serde_json::json;

use super::{aftermath, doors, network, plain, Custom};
use crate::command::{shell, shell_lenient, shell_logged};
use crate::guest::{facts, say};
use crate::outcome::{Job, Outcome};
use crate::packages::{Packages, OLD};

/// See the module.
pub struct Upgrade {
    name: &'static str,
    about: &'static str,
    way: Way,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Open vSwitch alone.
    One,
    /// Our package, too, in the same upgrade.
    Both,
    /// Without our package.
    Stock,
    /// To the same version, which to its scripts is an upgrade within the release.
    Within,
    /// From release to release, up and down and back.
    Chain,
}

/// `apt-get install openvswitch-switch`.
pub const ONE: Upgrade = Upgrade {
    name: "upgrade",
    about: "apt-get install openvswitch-switch of the next release (3.1 to 3.5 on Debian 12), our package installed",
    way: Way::One,
};

/// `apt-get dist-upgrade` of both packages.
pub const BOTH: Upgrade = Upgrade {
    name: "upgrade_both",
    about: "apt-get dist-upgrade of Open vSwitch and of our package at once",
    way: Way::Both,
};

/// Within the release.
pub const WITHIN: Upgrade = Upgrade {
    name: "upgrade_within",
    about: "apt-get --reinstall of Open vSwitch: what its packages' scripts do within a release",
    way: Way::Within,
};

/// All releases, one after the other.
pub const CHAIN: Upgrade = Upgrade {
    name: "upgrade_chain",
    about: "apt-get from release to release in one VM: up to the last and down again",
    way: Way::Chain,
};

/// As it is without us.
pub const STOCK: Upgrade = Upgrade {
    name: "upgrade_stock",
    about: "apt-get install openvswitch-switch without our package, to compare",
    way: Way::Stock,
};

/// apt-get that asks nothing.
pub const APT: &str = "DEBIAN_FRONTEND=noninteractive timeout 900 apt-get -qy --no-install-recommends \
    -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold";

impl Custom for Upgrade {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn packages(&self) -> Packages {
        match self.way {
            Way::Chain => Packages::OursAndAll,
            Way::Within => Packages::OursAndSame,
            Way::One | Way::Both | Way::Stock => Packages::OursAndNext,
        }
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(12)
    }

    fn by_hand(&self) -> bool {
        self.way != Way::One
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        apt_sources()?;
        let log = |name: &str| out.join(name).display().to_string();
        if self.way == Way::Stock {
            return stock(&log("apt"), outcome);
        }
        install_ours(&log("apt-ours"), outcome)?;
        let words = match self.way {
            Way::Chain => return chain(out, outcome),
            Way::Within => return within(&log("apt"), outcome),
            Way::Both => "dist-upgrade",
            Way::One | Way::Stock => "install openvswitch-switch",
        };
        match number(&installed()?) == candidate()? {
            true => back(self.name, &log("apt"), outcome)?,
            false => graceful(self.name, words, &log("apt"), outcome)?,
        }
        let stops = shell_lenient("journalctl -q -b -o cat -u ovs-vswitchd | grep -c '^Stopped' || true");
        // The lab's own restart at the first boot.
        outcome.check("systemd has not stopped ovs-vswitchd again", stops.trim() == "1", &stops);
        let ours = shell_lenient("dpkg-query -W -f '${Version}' ovs-graceful");
        let newer = (ours.trim() != OLD) == (self.way == Way::Both);
        outcome.check("our package is of the version that it should be", newer, ours);
        Ok(())
    }
}

/// `apt-get words`, which upgrades Open vSwitch: a run, and apt says so.
pub fn graceful(name: &str, words: &str, log: &str, outcome: &mut Outcome) -> Result<()> {
    goes_to(&candidate()?, name, words, log, outcome)
}

fn goes_to(to: &str, name: &str, words: &str, log: &str, outcome: &mut Outcome) -> Result<()> {
    let from = version();
    doors::graceful(name, || apt(words, log), outcome)?;
    upgraded(&from, to, outcome);
    told(to, log, outcome)
}

/// From the last release to the one before it.
fn back(name: &str, log: &str, outcome: &mut Outcome) -> Result<()> {
    let (all, installed) = (versions()?, installed()?);
    let to = all.iter().rev().find(|version| **version != installed).context("apt has no other Open vSwitch")?;
    goes_to(number(to), name, &to_version(to), log, outcome)
}

/// Without Debian's part.
fn number(version: &str) -> &str {
    version.split(['-', '+']).next().unwrap_or_default()
}

fn to_version(version: &str) -> String {
    format!("--allow-downgrades install openvswitch-switch={version} openvswitch-common={version}")
}

/// Those that apt has, the newest last.
fn versions() -> Result<Vec<String>> {
    let all = shell("apt-cache madison openvswitch-switch | awk '{ print $3 }' | sort -uV")?;
    Ok(all.lines().map(str::to_owned).collect())
}

fn installed() -> Result<String> {
    Ok(shell("dpkg-query -W -f '${Version}' openvswitch-switch")?.trim().to_owned())
}

/// Exit code and words of `apt-get words`.
fn apt(words: &str, log: &str) -> String {
    shell_logged(&format!("{APT} {words}"), Path::new(log))
}

fn told(version: &str, log: &str, outcome: &mut Outcome) -> Result<()> {
    let said = fs::read_to_string(log)?;
    let told = said.contains(&format!("ovs-graceful: ovs-vswitchd is {version}"));
    outcome.check("apt tells what became of it", told, said);
    Ok(())
}

/// To the version that is there.
fn within(log: &str, outcome: &mut Outcome) -> Result<()> {
    let words = "--reinstall install openvswitch-switch openvswitch-common";
    doors::graceful("within the release", || apt(words, log), outcome)?;
    sane(outcome);
    told(&candidate()?, log, outcome)
}

/// To each release in turn, with what apt has of it.
fn chain(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let (all, installed) = (versions()?, installed()?);
    let here = all.iter().position(|version| *version == installed).context("apt does not have what is installed")?;
    let up = here + 1..all.len();
    // Debian's own downgrade to its release 11 ends without ovs-vsctl and without a restart (docs/packages.md).
    let back = (1..all.len() - 1).rev();
    for (step, version) in up.chain(back).filter_map(|index| all.get(index)).enumerate() {
        let name = format!("step {}: to {version}", step + 1);
        let log = out.join(format!("apt-{}", step + 1)).display().to_string();
        let words = to_version(version);
        if new_registers() && !has_new_registers(version) {
            goes_down_without(&name, || apt(&words, &log), out, outcome)?;
        } else {
            doors::graceful(&name, || apt(&words, &log), outcome)?;
        }
        let now = self::version();
        outcome.check(format!("{name}: that runs"), now.contains(&format!(" {}", number(version))), now);
    }
    let audit = shell_lenient("dpkg --audit");
    outcome.check("dpkg finds nothing half done", audit.trim().is_empty(), audit);
    aftermath::no_unit_failed(outcome);
    Ok(())
}

/// A rule with a register that came with Open vSwitch 3.7 (NEWS); no packet gets to its table.
const NEW_RULE: &str = "table=77,priority=7,ip,reg20=0x7";

/// Does the running ovs-vswitchd have 32 registers?
fn new_registers() -> bool {
    version().split_whitespace().last().is_some_and(has_new_registers)
}

fn has_new_registers(version: &str) -> bool {
    let mut numbers = version.split(['.', '-', '+']).map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(3), Some(7))
}

/// Down to a version that cannot load one of the rules: that is said, by name, and nothing is touched. Without the rule it
/// is a run.
fn goes_down_without(name: &str, apt: impl FnOnce() -> String, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let name = format!("{name}, with a rule that it cannot load");
    shell(&format!("ovs-ofctl add-flow br0 '{NEW_RULE},actions=drop'"))?;
    shell("mkdir -p /etc/ovs-graceful; printf '[doors]\\nrefused = \"keep\"\\n' > /etc/ovs-graceful/config.toml")?;
    let before = facts::DAEMONS.map(facts::daemons);
    let live = plain::start_probes()?;
    let said = apt();
    let listed =
        shell_lenient("timeout 120 ovs-graceful check 2>&1; timeout 120 ovs-graceful restart 2>&1; echo exit=$?");
    let now = facts::DAEMONS.map(facts::daemons);
    let pids = |all: &[Vec<facts::Daemon>]| all.iter().flatten().map(|one| one.pid).collect::<Vec<_>>();
    outcome.check(format!("{name}: the daemons stay"), pids(&before) == pids(&now), json!([before, now]));
    outcome.check(format!("{name}: apt's terminal names it"), said.contains("reg20"), &said);
    let refused = listed.contains("exit=10") || listed.contains("exit=20");
    outcome.check(format!("{name}: a run is refused, and names it"), refused && listed.contains("reg20"), &listed);
    aftermath::finish(&name, live, false, outcome)?;
    shell("rm /etc/ovs-graceful/config.toml")?;
    // Only the version that knows the register can name it.
    shell("ovs-ofctl del-flows br0 table=77")?;
    let run = || shell_logged("timeout 240 ovs-graceful restart", &out.join("restart-without-the-rule"));
    doors::graceful(&format!("{name}, which is gone"), run, outcome)
}

/// Nothing but what the lab has brought.
pub fn apt_sources() -> Result<()> {
    shell("rm -f /etc/apt/sources.list.d/*; echo 'deb [trusted=yes] file:/lab/packages ./' > /etc/apt/sources.list")?;
    shell("apt-get -q update 2>&1").map(drop)
}

/// Installs our package under traffic.
pub fn install_ours(log: &str, outcome: &mut Outcome) -> Result<()> {
    say("installing our package");
    let live = plain::start_probes()?;
    let before = facts::DAEMONS.map(facts::daemons);
    let said = apt(&format!("install ovs-graceful={OLD}"), log);
    outcome.check("our package is installed", said.starts_with("exit=0"), &said);
    let now = facts::DAEMONS.map(facts::daemons);
    outcome.check("its installation leaves the daemons alone", before == now, json!([before, now]));
    aftermath::finish("installation", live, false, outcome).map(drop)
}

/// Of the running ovs-vswitchd.
fn version() -> String {
    shell_lenient("ovs-appctl -t ovs-vswitchd version | head -1").trim().to_owned()
}

/// What apt would install, as ovs-vswitchd tells it.
fn candidate() -> Result<String> {
    let version = shell("apt-cache policy openvswitch-switch | sed -n 's/^ *Candidate: //p'")?;
    match number(version.trim()) {
        number if number.contains('.') => Ok(number.to_owned()),
        _ => bail!("apt has no openvswitch-switch: {version:?}"),
    }
}

fn upgraded(from: &str, to: &str, outcome: &mut Outcome) {
    let (now, new) = (version(), format!(" {to}"));
    let went = !from.contains(&new) && now.ends_with(&new);
    outcome.check(format!("to {to}"), went, json!([from, now]));
    sane(outcome);
}

fn sane(outcome: &mut Outcome) {
    let audit =
        shell_lenient("dpkg --audit; dpkg-query -W -f '${db:Status-Abbrev} ${Package}\\n' | grep -v '^ii' || true");
    outcome.check("dpkg finds nothing half done", audit.trim().is_empty(), audit);
    aftermath::no_unit_failed(outcome);
}

/// What it costs otherwise: that it costs something is what makes the other side of the comparison one.
fn stock(log: &str, outcome: &mut Outcome) -> Result<()> {
    say("upgrading without our package");
    let (from, to) = (version(), candidate()?);
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(3));
    let said = apt("install openvswitch-switch", log);
    outcome.check("exit 0", said.starts_with("exit=0"), &said);
    std::thread::sleep(Duration::from_secs(6));
    let [_, lost] = aftermath::finish("stock", live, true, outcome)?;
    outcome.check("new flows are lost", lost > 0, lost);
    upgraded(&from, &to, outcome);
    Ok(())
}

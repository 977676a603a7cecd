//! Our RPM against a stand-in for RHEL's openvswitch: Debian's daemons in RHEL's layout, as a user of their own. Under
//! traffic: installed, Open vSwitch upgraded (its package restarts nothing, our trigger makes a run), reload, restart, an
//! upgrade that is refused, erased.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::{aftermath, doors, network, plain, upgrade, Custom};
use crate::command::{shell, shell_lenient, shell_logged};
use crate::guest::{facts, run, say, wait_for_daemons};
use crate::outcome::{Job, Outcome};
use crate::packages::Packages;

/// See the module.
pub struct Rpm;

const UNIT: &str = "openvswitch";
/// Debian's rpm wants to be told that it is meant; that of Debian 13 does not know the word any more.
const RPM: &str = "timeout 300 rpm $(rpm --force-debian --version >/dev/null 2>&1 && echo --force-debian) \
                   --nodeps --nosignature";

impl Custom for Rpm {
    fn name(&self) -> &'static str {
        "rpm"
    }

    fn about(&self) -> &'static str {
        "our RPM beside a stand-in for RHEL's openvswitch: upgraded, reloaded, restarted, refused, erased"
    }

    fn packages(&self) -> Packages {
        Packages::Rpm
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(10)
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        become_like_rhel()?;
        plain::set_up()?;
        network::patient_veth()?;
        let stock = units();
        untouched("installation", &format!("{RPM} -i /lab/packages/ovs-graceful-0.1.0-1.rpm"), outcome)?;
        let log = |name: &str, command: &str| shell_logged(command, &out.join(name));
        let upgrade = format!("{RPM} -U /lab/packages/openvswitch-*-2.rpm");
        doors::graceful_by(UNIT, "rpm -U", || log("rpm-upgrade", &upgrade), outcome)?;
        as_their_user("rpm -U", outcome);
        for word in ["reload", "restart"] {
            let command = format!("timeout 240 systemctl {word} {UNIT}");
            doors::graceful_by(UNIT, word, || log(word, &command), outcome)?;
            as_their_user(word, outcome);
        }
        refused(&|name, command| log(name, command), outcome)?;
        untouched("our upgrade", &format!("{RPM} -U /lab/packages/ovs-graceful-0.1.1-1.rpm"), outcome)?;
        untouched("erasing ours", &format!("{RPM} -e ovs-graceful"), outcome)?;
        let left =
            shell_lenient("find /usr /etc /run /sys/fs/bpf -xdev 2>/dev/null | grep -e ovs-graceful -e dpfreeze");
        outcome.check("erased: nothing is left", !left.contains('/'), &left);
        let now = units();
        outcome.check("erased: the units are what their package wrote", now == stock, json!([stock, now]));
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

/// Debian's packages go; RHEL's layout comes.
fn become_like_rhel() -> Result<()> {
    say("becoming like RHEL");
    upgrade::apt_sources()?;
    shell(&format!("{} install rpm >/dev/null 2>&1", upgrade::APT))?;
    shell("systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server; ovs-dpctl del-dp ovs-system || true")?;
    shell("dpkg --purge --force-depends openvswitch-switch openvswitch-common >/dev/null 2>&1")?;
    shell(
        "useradd --system --no-create-home openvswitch
         mkdir -p /etc/openvswitch /var/lib/openvswitch /var/log/openvswitch
         rm -f /etc/openvswitch/* /etc/openvswitch/.conf* /var/lib/openvswitch/*",
    )?;
    shell(&format!("{RPM} -i /lab/packages/openvswitch-*-1.rpm"))?;
    shell("chown -R openvswitch:openvswitch /etc/openvswitch /var/lib/openvswitch /var/log/openvswitch")?;
    shell(&format!("systemctl daemon-reload; systemctl enable -q --now {UNIT} 2>&1"))?;
    wait_for_daemons()
}

/// Something about our own package: the daemons run on.
fn untouched(name: &str, command: &str, outcome: &mut Outcome) -> Result<()> {
    say(name);
    let live = plain::start_probes()?;
    let (before, known) = (facts::DAEMONS.map(facts::daemons), run::known());
    let said = shell_lenient(&format!("{command} 2>&1; echo exit=$?"));
    outcome.check(format!("{name}: exit 0, and nothing to say"), said.trim() == "exit=0", said);
    let now = facts::DAEMONS.map(facts::daemons);
    let same = before == now && (run::known().len() <= known.len());
    outcome.check(format!("{name}: the daemons are left alone"), same, json!([before, now]));
    aftermath::finish(name, live, false, outcome).map(drop)
}

fn as_their_user(name: &str, outcome: &mut Outcome) {
    let users = shell_lenient("ps -o user= -C ovsdb-server,ovs-vswitchd | sort | uniq -c | tr -s ' '");
    outcome.check(format!("{name}: both daemons are their user's"), users.trim() == "2 openvswitch", users);
}

/// The old daemons go on, as they do with the package alone; the remedy that is told is one.
fn refused(log: &dyn Fn(&str, &str) -> String, outcome: &mut Outcome) -> Result<()> {
    say("refused");
    shell("ovs-vsctl set bridge br0 stp_enable=true")?;
    let before = facts::DAEMONS.map(facts::daemons).map(|all| all.into_iter().map(|one| one.pid).collect::<Vec<_>>());
    let said = log("refused", &format!("{RPM} -U --oldpackage /lab/packages/openvswitch-*-1.rpm"));
    let now = facts::DAEMONS.map(facts::daemons).map(|all| all.into_iter().map(|one| one.pid).collect::<Vec<_>>());
    outcome.check("refused: the transaction goes on", said.starts_with("exit=0"), &said);
    outcome.check("refused: the daemons of before run on", before == now, json!([before, now]));
    let told = said.contains("spanning-tree") && said.contains("restart --if-needed");
    outcome.check("refused: it says why, and the remedy", told, &said);
    shell("ovs-vsctl set bridge br0 stp_enable=false; sleep 35")?;
    let remedy = || log("remedy", "ovs-graceful restart --if-needed");
    doors::graceful_by(UNIT, "the remedy", remedy, outcome)
}

/// What our package changes about the units.
fn units() -> String {
    let ours = shell_lenient("systemctl list-units --all --plain --no-legend 'ovs-graceful*'");
    aftermath::commands(&[UNIT, "ovs-vswitchd", "ovsdb-server"]) + &ours
}

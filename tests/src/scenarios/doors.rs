//! The distribution's own commands lead to a run, where our drop-ins are installed: `systemctl reload` and `systemctl
//! restart` of the unit that stands for both daemons, and `ovs-ctl restart --graceful`. A refused reload changes nothing,
//! a refused restart is a plain one; a stop stops; and switched off all is what the package wrote.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::{json, Value};

use super::{aftermath, network, plain, upgrade, Custom};
use crate::command::{shell, shell_lenient, shell_logged, wait_until};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};
use crate::packages::OLD;

/// See the module.
pub struct Doors {
    whole: bool,
}

/// Every phase of a run that a restart can come into.
pub const WHOLE: Doors = Doors { whole: true };
/// Some of them.
pub const SAMPLE: Doors = Doors { whole: false };

/// What our package installs for the units, by folder.
pub const DROP_INS: [(&str, &str); 2] = [
    (
        "/usr/lib/systemd/system/openvswitch-switch.service.d",
        include_str!("../../../systemd/openvswitch-switch.service.d/50-ovs-graceful.conf"),
    ),
    (
        "/usr/lib/systemd/system/ovs-vswitchd.service.d",
        include_str!("../../../systemd/ovs-vswitchd.service.d/50-ovs-graceful.conf"),
    ),
];
/// Our unit that leaves those alone that hang on Open vSwitch's, and the generator that tells it who they are.
const GATE: (&str, &str) = (
    "/usr/lib/systemd/system/ovs-graceful-neighbours.service",
    include_str!("../../../systemd/ovs-graceful-neighbours.service"),
);
const GENERATOR: (&str, &str) = (
    "/usr/lib/systemd/system-generators/ovs-graceful-generator",
    include_str!("../../../systemd/ovs-graceful-generator"),
);
/// One that hangs on the umbrella: scenario `dependents` has all kinds.
const NEIGHBOUR: &str = "/run/systemd/system/lab-neighbour.service";
const PATCH: &str = include_str!("../../../patches/ovs-ctl-graceful.patch");
/// Of every release here.
pub const OVS_CTL: &str = "/usr/share/openvswitch/scripts/ovs-ctl";
const UNIT: &str = "openvswitch-switch";

impl Custom for Doors {
    fn name(&self) -> &'static str {
        match self.whole {
            true => "doors_whole",
            false => "doors",
        }
    }

    fn about(&self) -> &'static str {
        match self.whole {
            true => "doors, with a restart in every phase of a run, and after an upgrade",
            false => {
                "systemctl reload and restart of the distribution's unit, ovs-ctl restart --graceful; refused, switched off, \
                 uninstalled"
            }
        }
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(if self.whole { 24 } else { 15 })
    }

    fn by_hand(&self) -> bool {
        self.whole
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        let stock = aftermath::commands(&[UNIT, "ovs-vswitchd"]);
        fs::copy("/usr/bin/ovs-graceful", "/usr/sbin/ovs-graceful")?;
        install_drop_ins()?;
        let neighbour = start_neighbour()?;
        for round in if self.whole { &["first", "second"][..] } else { &["first"] } {
            let name = format!("{round} reload");
            graceful(&name, || systemctl(&format!("reload {UNIT}"), &name, out), outcome)?;
        }
        graceful("restart", || systemctl(&format!("restart {UNIT}"), "restart", out), outcome)?;
        if self.whole {
            after_an_upgrade(out, outcome)?;
        }
        let one = || systemctl("restart ovs-vswitchd", "restart of ovs-vswitchd", out);
        graceful("restart of ovs-vswitchd", one, outcome)?;
        // systemd passes either on to the other: Requires=, PartOf=.
        let other = || systemctl("restart ovsdb-server", "restart of ovsdb-server", out);
        graceful("restart of ovsdb-server", other, outcome)?;
        let reload = || systemctl("reload ovs-vswitchd", "reload of ovs-vswitchd", out);
        graceful_switch("reload of ovs-vswitchd", reload, outcome)?;
        neighbour_stays(&neighbour, outcome)?;
        undone(out, outcome)?;
        during_a_run(self.whole, out, outcome)?;
        if self.whole {
            without_the_umbrella(out, outcome)?;
        }
        patch_ovs_ctl()?;
        graceful("ovs-ctl", || ovs_ctl("restart", out), outcome)?;
        module(out, outcome)?;
        refused(out, outcome)?;
        stopped(outcome)?;
        switched_off(outcome)?;
        remove_drop_ins()?;
        let now = aftermath::commands(&[UNIT, "ovs-vswitchd"]);
        outcome.check("without the drop-in the unit is what the package wrote", now == stock, json!([stock, now]));
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

/// Our drop-ins, as our package installs them.
pub fn install_drop_ins() -> Result<()> {
    for (folder, text) in DROP_INS {
        fs::create_dir_all(folder)?;
        fs::write(format!("{folder}/50-ovs-graceful.conf"), text)?;
    }
    for (path, text) in [GATE, GENERATOR] {
        fs::create_dir_all(Path::new(path).parent().unwrap_or(Path::new("/")))?;
        fs::write(path, text)?;
    }
    let (gate, generator) = (GATE.0, GENERATOR.0);
    shell(&format!("chmod 755 {generator}; systemctl daemon-reload; systemctl enable --now $(basename {gate}) 2>&1"))
        .map(drop)
}

/// Starts a unit that hangs on the umbrella; its main process.
fn start_neighbour() -> Result<String> {
    let text =
        format!("[Unit]\nRequires={UNIT}.service\nAfter={UNIT}.service\n[Service]\nExecStart=/bin/sleep 99999\n");
    fs::write(NEIGHBOUR, text)?;
    shell("systemctl daemon-reload; systemctl start lab-neighbour")?;
    Ok(facts::unit_property("lab-neighbour", "MainPID"))
}

/// No door so far has stopped it.
fn neighbour_stays(main: &str, outcome: &mut Outcome) -> Result<()> {
    let now = facts::unit_property("lab-neighbour", "MainPID");
    outcome.check("who hangs on the umbrella was left alone", main == now && now != "0", json!([main, now]));
    shell(&format!("systemctl stop lab-neighbour; rm {NEIGHBOUR}; systemctl daemon-reload")).map(drop)
}

/// The units are what their package wrote again.
pub fn remove_drop_ins() -> Result<()> {
    for (folder, _) in DROP_INS {
        fs::remove_dir_all(folder)?;
    }
    shell(&format!("systemctl disable --now $(basename {}) 2>&1", GATE.0))?;
    for (path, _) in [GATE, GENERATOR] {
        fs::remove_file(path)?;
    }
    shell("systemctl daemon-reload").map(drop)
}

/// Exit code and words of a systemctl.
pub fn systemctl(words: &str, name: &str, out: &Path) -> String {
    let log = out.join(name.replace(' ', "-"));
    shell_lenient(&format!(
        "timeout 240 systemctl {words} > {0} 2>&1; echo exit=$?; cat {0}; journalctl -q -u {UNIT} -n 30 -o cat",
        log.display()
    ))
}

/// Exit code and words of `ovs-ctl words --graceful`.
pub fn ovs_ctl(words: &str, out: &Path) -> String {
    shell_logged(&ovs_ctl_command(words), &out.join(format!("ovs-ctl-{words}")))
}

/// Of a script that has the option.
pub fn ovs_ctl_command(words: &str) -> String {
    format!("timeout 240 {OVS_CTL} --system-id=random {words} --graceful")
}

/// Gives Open vSwitch's own script the option `--graceful`.
fn patch_ovs_ctl() -> Result<()> {
    fs::write("/run/lab-patch", PATCH)?;
    shell(&format!("busybox patch {OVS_CTL} /run/lab-patch")).map(drop)
}

/// The script of our package, which has the option, in the place of Open vSwitch's own (docs/ovs-ctl.md).
pub fn divert_ovs_ctl() -> Result<()> {
    shell(&format!("dpkg-divert --local --rename --divert {OVS_CTL}.distrib --add {OVS_CTL}"))?;
    shell(&format!("cp /usr/lib/ovs-graceful/ovs-ctl {OVS_CTL}")).map(drop)
}

/// Our package, with a gate command as that of [`crate::guest::act`]; its words stay in `out`.
pub fn install_package(out: &Path) -> Result<()> {
    upgrade::apt_sources()?;
    let log = out.join("apt-ours");
    shell(&format!("{} install ovs-graceful={OLD} > {} 2>&1", upgrade::APT, log.display()))?;
    let command = format!("ovs-dpctl dump-flows -m > {}/flows-gates", out.display());
    fs::write("/etc/ovs-graceful/config.toml", format!("[gates]\ncommand = \"{command}\"\n")).map_err(Into::into)
}

/// To whatever other release there is.
pub fn upgrade_command() -> String {
    let version = "v=$(apt-cache madison openvswitch-switch | awk '{ print $3; exit }')";
    let words = "--allow-downgrades install openvswitch-switch=$v openvswitch-common=$v";
    format!("{version}; export {} {words}", upgrade::APT.replacen(" timeout", "; timeout", 1))
}

/// Where the unit itself is restarted, that has ended before the run.
pub fn wait_until_over() -> Result<()> {
    let over = || shell_lenient("ovs-graceful status --json").contains("\"lock\": null");
    wait_until("the run is over", Duration::from_secs(60), Duration::from_millis(200), over)
}

/// The report of the last run, once that is over.
pub fn wait_and_fetch_report(to: &Path) -> Result<()> {
    wait_until_over()?;
    let mut runs = run::known();
    runs.sort();
    if let Some(last) = runs.pop() {
        fs::copy(run::report(&last), to)?;
    }
    Ok(())
}

/// Goes through a door under traffic: a run, done, and nothing lost.
pub fn graceful(name: &str, door: impl FnOnce() -> String, outcome: &mut Outcome) -> Result<()> {
    graceful_by(UNIT, name, door, outcome)
}

/// The same where `unit` stands for both daemons.
pub fn graceful_by(unit: &str, name: &str, door: impl FnOnce() -> String, outcome: &mut Outcome) -> Result<()> {
    graceful_of(&facts::DAEMONS, (unit, ONE_RUN), name, door, outcome)
}

/// The same where ovs-vswitchd alone is to be replaced.
pub fn graceful_switch(name: &str, door: impl FnOnce() -> String, outcome: &mut Outcome) -> Result<()> {
    graceful_of(&["ovs-vswitchd"], (UNIT, ONE_RUN), name, door, outcome)
}

const ONE_RUN: usize = 1;

/// The same where only `replaced` are to be others afterwards, by at most `most` runs. Where those may be more than one,
/// one of them may have been undone.
fn graceful_of(
    replaced: &[&str],
    (unit, most): (&str, usize),
    name: &str,
    door: impl FnOnce() -> String,
    outcome: &mut Outcome,
) -> Result<()> {
    say(name);
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(3));
    let (before, rules) = (facts::DAEMONS.map(facts::daemons), facts::promised(&plain::bridges()));
    let known = run::known();
    let said = door();
    outcome.check(format!("{name}: exit 0"), said.starts_with("exit=0"), &said);
    wait_until_over()?;
    let now = facts::DAEMONS.map(facts::daemons);
    let mut each = facts::DAEMONS.iter().zip(before.iter().zip(&now));
    let right = |(daemon, (before, now)): (&&str, (&Vec<_>, &Vec<facts::Daemon>))| {
        let other = before != now;
        now.len() == 1 && (other == replaced.contains(daemon) || other && most > ONE_RUN)
    };
    outcome.check(format!("{name}: others are {}", replaced.join(", ")), each.all(right), json!([before, now]));
    let runs = run::known().into_iter().filter(|id| !known.contains(id)).map(|id| told(&id));
    let undone = |run: &Value| most > ONE_RUN && run["exit_code"] == 20;
    let none = |run: &Value| run["reason"] == "nothing to do" || run["exit_code"] == 10 || undone(run);
    let runs: Vec<_> = runs.filter(|run| !none(run)).collect();
    let done = runs.iter().all(|run| matches!(run["exit_code"].as_u64(), Some(0 | 30)));
    outcome.check(format!("{name}: it was a run, and it is done"), done && (1..=most).contains(&runs.len()), runs);
    if facts::systemd_runs() {
        let active = facts::unit_property(unit, "ActiveState");
        outcome.check(format!("{name}: {unit} is active"), active == "active", active);
    }
    std::thread::sleep(Duration::from_secs(3));
    aftermath::all_is_well(name, &rules, outcome);
    aftermath::finish(name, live, false, outcome).map(drop)
}

/// `ovs-ctl force-reload-kmod --graceful`: the module is another, and nothing was promised to packets.
pub fn module(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let name = "ovs-ctl force-reload-kmod";
    say(name);
    // Ports are there again, under numbers that the datapath chooses.
    let promised = || {
        let mut all = facts::promised(&plain::bridges());
        all.0.remove("datapath ports");
        all
    };
    let (rules, known) = (promised(), run::known());
    let said = ovs_ctl("force-reload-kmod", out);
    outcome.check(format!("{name}: exit 0"), said.starts_with("exit=0"), &said);
    wait_until_over()?;
    let runs: Vec<Value> = run::known().iter().filter(|id| !known.contains(id)).map(|id| told(id)).collect();
    let right = matches!(runs.as_slice(), [one] if one["strategy"] == "reload-module");
    outcome.check(format!("{name}: the module was reloaded"), right, said);
    aftermath::nothing_left(name, outcome);
    aftermath::owned(name, outcome);
    let now = promised();
    outcome.check(format!("{name}: rules and limits as before"), now == rules, json!([rules, now]));
    aftermath::new_traffic_passes(name, outcome);
    Ok(())
}

/// A reload of ovs-vswitchd whose run is undone has failed, and changes nothing.
fn undone(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let name = "undone reload of ovs-vswitchd";
    say(name);
    let live = plain::start_probes()?;
    let (before, rules, known) = (facts::daemons("ovs-vswitchd"), facts::promised(&plain::bridges()), run::known());
    let aborting = std::thread::spawn(move || {
        let seen = run::wait_for("standby", &known);
        format!("{seen:?} {}", shell_lenient("ovs-graceful abort 2>&1"))
    });
    let said = systemctl("reload ovs-vswitchd", name, out);
    let aborted = aborting.join().unwrap_or_default();
    let failed = !said.starts_with("exit=0") && aborted.contains("accepted");
    outcome.check(format!("{name}: it has failed"), failed, json!([said, aborted]));
    wait_until_over()?;
    let now = facts::daemons("ovs-vswitchd");
    outcome.check(format!("{name}: the ovs-vswitchd of before goes on"), before == now, json!([before, now]));
    aftermath::nothing_left(name, outcome);
    aftermath::owned(name, outcome);
    aftermath::as_before(name, &rules, outcome);
    aftermath::finish(name, live, false, outcome).map(drop)
}

/// As Debian's package does it after an upgrade.
fn after_an_upgrade(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let also = "ovs-record-hostname.service";
    let has_it = shell(&format!("systemctl cat {also}")).is_ok();
    let all = format!("--quiet restart {UNIT}.service {}", if has_it { also } else { "" });
    graceful("restart after an upgrade", || systemctl(&all, "restart after an upgrade", out), outcome)
}

/// A restart of the unit that stands for both while a run is under way waits for that and is content with it; of one of a
/// daemon's own systemd refuses it, or it waits for the run and is another.
fn during_a_run(whole: bool, out: &Path, outcome: &mut Outcome) -> Result<()> {
    // The last three are of different kinds: systemd refuses it, it waits and is another run, the run yields to it.
    let all = [
        ("check", "restart openvswitch-switch"),
        ("settle", "restart ovs-vswitchd"),
        ("handover", "restart openvswitch-switch"),
        ("standby", "restart openvswitch-switch"),
        ("restore", "restart ovsdb-server"),
        ("verify", "restart ovs-vswitchd"),
        ("snapshot", "restart ovs-vswitchd"),
    ];
    for (phase, words) in all.into_iter().skip(if whole { 0 } else { 4 }) {
        in_phase(phase, words, (UNIT, &format!("{words} in {phase}")), out, outcome)?;
    }
    Ok(())
}

/// The same where both daemons were started by their own units.
fn without_the_umbrella(out: &Path, outcome: &mut Outcome) -> Result<()> {
    shell(&format!("systemctl stop {UNIT}"))?;
    wait_until_gone()?;
    shell("systemctl start ovs-vswitchd")?;
    plain::rules()?;
    network::ping("ns1", "10.9.0.2")?;
    for phase in ["check", "verify", "snapshot"] {
        let name = format!("restart ovs-vswitchd in {phase} without the umbrella");
        in_phase(phase, "restart ovs-vswitchd", ("ovs-vswitchd", &name), out, outcome)?;
    }
    let active = facts::unit_property(UNIT, "ActiveState");
    outcome.check("the umbrella is as it was", active == "inactive", active);
    shell(&format!("systemctl start {UNIT}")).map(drop)
}

/// `systemctl words` when a run of ours has come to `phase`.
fn in_phase(phase: &str, words: &str, (unit, name): (&str, &str), out: &Path, outcome: &mut Outcome) -> Result<()> {
    // A run that finds a job queued refuses itself, one that finds it later is undone; then the restart is one.
    let may_yield = matches!(phase, "check" | "snapshot");
    // On a slow machine a run is over before systemd hears of the restart.
    let most = if words.ends_with(UNIT) { ONE_RUN } else { 2 };
    // Of ovs-vswitchd alone where the run that would have replaced both was undone.
    let replaced: &[&str] = match may_yield && unit == "ovs-vswitchd" {
        true => &["ovs-vswitchd"],
        false => &facts::DAEMONS,
    };
    let door = || {
        let known = run::known();
        let first = std::thread::spawn(|| shell_lenient("ovs-graceful restart 2>&1; echo first=$?"));
        let second = run::wait_for(phase, &known).map(|_| systemctl(words, name, out));
        format!("{}{}", second.unwrap_or_else(|error| format!("{error:#}")), first.join().unwrap_or_default())
    };
    let both = || {
        let said = door();
        let well = said.starts_with("exit=0") || said.contains("Operation refused");
        let yielded = may_yield && ["first=10", "first=20"].iter().any(|code| said.contains(code));
        let first = said.contains("first=0") || yielded;
        format!("exit={}\n{said}", u8::from(!(well && first)))
    };
    graceful_of(replaced, (unit, most), name, both, outcome)
}

/// What the report of a run says of its end.
pub fn told(id: &str) -> Value {
    let report: Value =
        fs::read(run::report(id)).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
    json!({ "exit_code": report["exit_code"], "reason": report["reason"], "warnings": report["warnings"],
            "differences": report["differences"], "parked": report["parked"], "strategy": report["strategy"] })
}

fn refused(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("refused");
    shell("ovs-vsctl set bridge br0 stp_enable=true")?;
    let before = facts::DAEMONS.map(facts::daemons);
    let said = systemctl(&format!("reload {UNIT}"), "refused", out);
    let told = !said.starts_with("exit=0") && said.contains("spanning-tree");
    outcome.check("refused: the reload fails, and its log says why", told, &said);
    let log = out.join("refused-switch");
    let of_switch = format!("timeout 240 systemctl reload ovs-vswitchd > {} 2>&1; echo exit=$?", log.display());
    let said = shell_lenient(&format!("{of_switch}; journalctl -q -u ovs-vswitchd -n 30 -o cat"));
    let told = !said.starts_with("exit=0") && said.contains("spanning-tree");
    outcome.check("refused: and so does that of ovs-vswitchd", told, &said);
    let (now, active) = (facts::DAEMONS.map(facts::daemons), facts::unit_property(UNIT, "ActiveState"));
    outcome.check("refused: nothing was touched", before == now && active == "active", json!([before, now, active]));
    let said = systemctl(&format!("restart {UNIT}"), "refused-restart", out);
    let now = facts::DAEMONS.map(facts::daemons);
    let others = before.iter().zip(&now).all(|(before, now)| now.len() == 1 && before != now);
    let told = said.starts_with("exit=0") && said.contains("spanning-tree") && said.contains("restarted as they are");
    outcome.check(
        "refused: the restart is a plain one, and its log says why",
        told && others,
        json!([said, before, now]),
    );
    aftermath::owned("refused", outcome);
    shell("ovs-vsctl set bridge br0 stp_enable=false").map(drop)
}

/// systemctl waits for the unit that it was told, not for those that are stopped with it.
pub fn wait_until_gone() -> Result<()> {
    let all_gone = || facts::DAEMONS.iter().all(|name| facts::daemons(name).is_empty());
    wait_until("the daemons have gone", Duration::from_secs(60), Duration::from_millis(200), all_gone)
}

/// Stopped is stopped.
fn stopped(outcome: &mut Outcome) -> Result<()> {
    say("stopped");
    let known = run::known();
    let said = shell_lenient(&format!("timeout 240 systemctl stop {UNIT} 2>&1; echo exit=$?"));
    wait_until_gone()?;
    let now = facts::DAEMONS.map(facts::daemons);
    let gone = said.contains("exit=0") && now.iter().all(Vec::is_empty) && run::known() == known;
    outcome.check("stopped: no daemon lives, and no run", gone, json!([said, now]));
    shell(&format!("systemctl start {UNIT}"))?;
    aftermath::owned("started again", outcome);
    network::ping("ns1", "10.9.0.2")
}

/// What the package's `ExecReload=` is.
const RELOAD: &str = "/usr/share/openvswitch/scripts/ovs-systemd-reload";

/// What Debian's preinst asks before it stops ovs-vswitchd.
const MAY_STOP: &str = "DPKG_MAINTSCRIPT_PACKAGE=openvswitch-switch DPKG_MAINTSCRIPT_NAME=preinst \
    ovs-graceful hook policy ovs-vswitchd.service stop 2>&1; echo exit=$?";

fn switched_off(outcome: &mut Outcome) -> Result<()> {
    say("switched off");
    let forbidden = shell_lenient(MAY_STOP);
    outcome.check("an upgrade must not stop the daemons", forbidden.trim().ends_with("exit=101"), forbidden);
    let off = "[doors]\\nenabled = false\\n";
    shell(&format!("mkdir -p /etc/ovs-graceful; printf '{off}' > /etc/ovs-graceful/config.toml"))?;
    let allowed = shell_lenient(MAY_STOP);
    outcome.check("switched off: an upgrade may stop the daemons", allowed.trim() == "exit=0", allowed);
    for word in ["reload", "restart"] {
        let (before, known) = (facts::DAEMONS.map(facts::daemons), run::known());
        let said = shell_lenient(&format!("timeout 240 systemctl {word} {UNIT} 2>&1; echo exit=$?"));
        let now = facts::DAEMONS.map(facts::daemons);
        // Debian 11's unit names a script that its package does not have.
        let works = word == "restart" || Path::new(RELOAD).exists();
        let did =
            if works { said.contains("exit=0") && before != now } else { said.contains("exit=1") && before == now };
        let stock = did && run::known() == known;
        outcome.check(format!("switched off: the package's own {word}, no run"), stock, json!([said, before, now]));
    }
    fs::remove_file("/etc/ovs-graceful/config.toml")?;
    network::ping("ns1", "10.9.0.2")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    /// What `ovs-ctl WORDS` of our package executes.
    fn executes(words: &[&str]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own").display().to_string();
        let script = include_str!("../../../patches/ovs-ctl").replace(OVS_CTL, &own);
        assert!(script.contains(&own));
        let echo = "#!/bin/sh\necho ${0##*/} $# \"$@\"\n".to_owned();
        for (name, text) in [("ovs-ctl", &script), ("own", &echo), ("ovs-graceful", &echo)] {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let mut command = Command::new("sh");
        let path = format!("{}:/usr/bin:/bin", folder.path().display());
        let output = command.arg(folder.path().join("ovs-ctl")).args(words).env("PATH", path).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    #[test]
    fn our_ovs_ctl_is_theirs_but_for_the_option() {
        assert_eq!(executes(&["restart"]), "own 1 restart");
        assert_eq!(executes(&["--system-id=random", "restart", "--graceful"]), "ovs-graceful 1 restart");
        assert_eq!(executes(&["restart", "--graceful", "--no-ovsdb-server"]), "ovs-graceful 2 restart --no-ovsdb");
        assert_eq!(executes(&["--graceful", "force-reload-kmod"]), "ovs-graceful 2 restart --reload-module");
        assert_eq!(executes(&["--graceful", "start", "--db-file=a b"]), "own 2 start --db-file=a b");
        assert_eq!(executes(&["--graceful", "--no-graceful", "restart"]), "own 1 restart");
        assert_eq!(executes(&[]), "own 0");
    }
}

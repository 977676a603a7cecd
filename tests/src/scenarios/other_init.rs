//! A host without systemd: BusyBox is the first process, Open vSwitch's init script has started the daemons, and each is
//! under `--monitor`, as that script has it. Everything that leads to a run there, and what goes wrong.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::{aftermath, doors, killed, network, plain, upgrade, Custom};
use crate::command::{shell, shell_lenient, shell_logged, wait_until};
use crate::guest::{facts, run, say, Live};
use crate::outcome::{Job, Outcome};
use crate::packages::Packages;

/// See the module.
pub struct OtherInit;

impl Custom for OtherInit {
    fn name(&self) -> &'static str {
        "other_init"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn about(&self) -> &'static str {
        "no systemd: an init script, daemons under --monitor; restart, ovs-ctl, apt, the supervisor killed"
    }

    fn kernel_args(&self) -> &'static str {
        "init=/usr/local/sbin/init"
    }

    fn packages(&self) -> Packages {
        Packages::OursAndNext
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(12)
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        let init = shell_lenient("readlink /proc/1/exe");
        outcome.check("systemd does not run", init.contains("busybox") && !facts::systemd_runs(), init);
        upgrade::apt_sources()?;
        upgrade::install_ours(&out.join("apt-ours").display().to_string(), outcome)?;
        doors::graceful("restart", || said(out, "restart", "ovs-graceful restart"), outcome)?;
        let stop_start = "ovs-graceful restart --strategy stop-start";
        doors::graceful("stop-start", || said(out, "stop-start", stop_start), outcome)?;
        doors::divert_ovs_ctl()?;
        doors::graceful("ovs-ctl", || doors::ovs_ctl("restart", out), outcome)?;
        doors::module(out, outcome)?;
        monitored(outcome)?;
        goes_back("the new one crashes", &|| new_crashes(out), IN_HAND, outcome)?;
        goes_back("the old one crashes", &|| old_crashes(out), WITHOUT_A_DAEMON, outcome)?;
        for (phase, exit) in [("switch-prepare", 20), ("restore", 21)] {
            cut_off(phase, exit, out, outcome)?;
        }
        doors::graceful("after that", || said(out, "after", "ovs-graceful restart"), outcome)?;
        after_a_power_cut(out, outcome)?;
        // Its init script is to restart the daemons.
        upgrade::graceful("upgrade", "install openvswitch-switch", &out.join("apt").display().to_string(), outcome)
    }
}

/// Exit code and words of a command.
fn said(out: &Path, name: &str, command: &str) -> String {
    shell_logged(&format!("timeout 240 {command}"), &out.join(name))
}

/// A daemon that crashes is started again by its monitor, as it was before there had been a run.
fn monitored(outcome: &mut Outcome) -> Result<()> {
    let name = "crashed";
    say(name);
    let rules = facts::promised(&plain::bridges());
    let before = facts::daemons("ovs-vswitchd");
    shell(CRASH)?;
    let other =
        || matches!(facts::daemons("ovs-vswitchd").as_slice(), [one] if !before.contains(one)) && bridge_answers();
    wait_until("the monitor has started another", Duration::from_secs(60), Duration::from_millis(100), other)?;
    // Its rules went with it, as without us.
    plain::rules()?;
    aftermath::all_is_well(name, &rules, outcome);
    Ok(())
}

/// The ovs-vswitchd that forwards crashes in the middle of a run, which goes back; its monitor starts none beside.
fn goes_back(name: &str, door: &dyn Fn() -> String, most: u64, outcome: &mut Outcome) -> Result<()> {
    say(name);
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(2));
    let (before, rules) = (facts::daemons("ovs-vswitchd"), facts::promised(&plain::bridges()));
    let said = door();
    outcome.check(format!("{name}: exit 21"), said.contains("exit=21"), said);
    // A monitor waits up to 10 s before it starts another (lib/daemon-unix.c).
    std::thread::sleep(Duration::from_secs(12));
    let now = facts::daemons("ovs-vswitchd");
    outcome.check(
        format!("{name}: one ovs-vswitchd, another one"),
        now.len() == 1 && now != before,
        json!([before, now]),
    );
    aftermath::all_is_well(name, &rules, outcome);
    established_passed(name, live, most, outcome)
}

/// A handler takes this many upcalls at a time (see `new_dies`).
const IN_HAND: u64 = 64;
/// Until another is bound, ten seconds of them, which a slow machine takes.
const WITHOUT_A_DAEMON: u64 = 1000;

const CRASH: &str = "kill -SEGV $(pgrep -n -x ovs-vswitchd)";

fn new_crashes(out: &Path) -> String {
    said(out, "new-crashes", &format!("ovs-graceful restart --no-ovsdb --gate-command '{CRASH}; sleep 20'"))
}

fn old_crashes(out: &Path) -> String {
    let (known, old) = (run::known(), facts::daemons("ovs-vswitchd"));
    let crashing = std::thread::spawn(move || {
        let seen = run::wait_for("standby", &known);
        let killed: String = old.iter().map(|one| shell_lenient(&format!("kill -SEGV {} 2>&1", one.pid))).collect();
        format!("{seen:?} {killed}")
    });
    let said = said(out, "old-crashes", "ovs-graceful restart --no-ovsdb");
    format!("{said}{}", crashing.join().unwrap_or_default())
}

/// Ends the traffic, of which new flows may have lost `most`.
fn established_passed(name: &str, live: Live, most: u64, outcome: &mut Outcome) -> Result<()> {
    let [established, new] = aftermath::finish(name, live, true, outcome)?;
    outcome.check(format!("{name}: what the kernel had a flow for passed"), established == 0, established);
    outcome.check(format!("{name}: of new flows at most {most} lost"), new <= most, new);
    Ok(())
}

/// The supervisor is killed, nobody starts it again, and what it had parked goes with it (docs/operating.md); a person
/// types `ovs-graceful recover`.
fn cut_off(phase: &str, exit: u8, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let name = &format!("killed in {phase}");
    say(name);
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(2));
    let (before, rules) = (facts::daemons("ovs-vswitchd"), facts::promised(&plain::bridges()));
    let known = run::known();
    let mut client = run::start(&[], &out.join(format!("run-{phase}")))?;
    let killed = killed::kill_in(phase, &known);
    if killed.is_err() {
        let _ = client.kill();
    }
    client.wait()?;
    killed?;
    let recovered = said(out, &format!("recover-{phase}"), "ovs-graceful recover");
    outcome.check(
        format!("{name}: recover ends with {exit}"),
        recovered.starts_with(&format!("exit={exit}")),
        recovered,
    );
    let now = facts::daemons("ovs-vswitchd");
    let right = now.len() == 1 && (now == before) == (exit == 20);
    outcome.check(format!("{name}: one ovs-vswitchd, the right one"), right, json!([before, now]));
    aftermath::all_is_well(name, &rules, outcome);
    established_passed(name, live, WITHOUT_A_DAEMON, outcome)
}

/// Daemons that were started with the flag of a run that nobody has finished (`reboot` has the power cut) forward once it has
/// been recovered.
fn after_a_power_cut(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let name = "after a power cut";
    say(name);
    let flag = "other_config:flow-restore-wait=true external_ids:ovs-graceful-run=20260101-000000000-1";
    shell(&format!("ovs-vsctl --no-wait set open_vswitch . {flag}"))?;
    shell("/etc/init.d/openvswitch-switch stop && /etc/init.d/openvswitch-switch start")?;
    let set = shell("ovs-vsctl --no-wait get open_vswitch . other_config")?;
    outcome.check(format!("{name}: the flag is there"), set.contains("flow-restore-wait"), set);
    let recovered = said(out, "recover-boot", "ovs-graceful recover");
    outcome.check(format!("{name}: recover ends with 0"), recovered.starts_with("exit=0"), recovered);
    wait_until("the bridge is there", Duration::from_secs(60), Duration::from_millis(100), bridge_answers)?;
    // Rules outlive no boot.
    plain::rules()?;
    aftermath::nothing_left(name, outcome);
    aftermath::owned(name, outcome);
    aftermath::new_traffic_passes(name, outcome);
    Ok(())
}

fn bridge_answers() -> bool {
    shell("timeout 5 ovs-ofctl show br0").is_ok()
}

//! The new ovs-vswitchd does not come up, or dies: the run goes back to the program that ran before, without a loss;
//! the next run goes forward again.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::json;

use super::{aftermath, plain, tunnel, Custom, Traffic};
use crate::command::shell_lenient;
use crate::guest::probe::Spec;
use crate::guest::{self, facts, run, say, Live};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Back {
    /// Across a VXLAN tunnel, whose ports the program that runs again would make anew (OVS before 3.2).
    pub tunnel: bool,
}

/// What is done to the new daemon, and what must come of it.
struct Case {
    name: &'static str,
    arguments: &'static [&'static str],
    harm: Harm,
    exit: i32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Harm {
    /// After Check the installed program is replaced by one that ends at once.
    Broken,
    /// The new daemon is killed once the old one has been told to end.
    Killed,
    /// As [`Harm::Broken`], and before the run one of the shared objects that the daemon has mapped is replaced.
    Objects,
    /// None: the installed program has to run again.
    None,
}

const CASES: [Case; 5] = [
    Case { name: "broken", arguments: &["--strategy", "stop-start"], harm: Harm::Broken, exit: 21 },
    Case { name: "broken with its objects", arguments: &["--strategy", "stop-start"], harm: Harm::Objects, exit: 21 },
    Case { name: "dies", arguments: &[], harm: Harm::Killed, exit: 21 },
    Case { name: "forward again", arguments: &[], harm: Harm::None, exit: 0 },
    Case { name: "forward, stop-start", arguments: &["--strategy", "stop-start"], harm: Harm::None, exit: 0 },
];

impl Custom for Back {
    fn name(&self) -> &'static str {
        if self.tunnel {
            "back_vxlan"
        } else {
            "back"
        }
    }

    fn by_hand(&self) -> bool {
        self.tunnel
    }

    fn about(&self) -> &'static str {
        if self.tunnel {
            "back, across a VXLAN tunnel"
        } else {
            "the new ovs-vswitchd cannot come up or dies; the program that ran before forwards again"
        }
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        self.set_up()?;
        // The program that the package installed, behind its alternative.
        let installed = fs::canonicalize("/usr/sbin/ovs-vswitchd").context("no ovs-vswitchd is installed")?;
        for case in &CASES {
            say(&format!("back: {}", case.name));
            let live = guest::start_all(self.probes())?;
            one(case, live, &installed, out, outcome).with_context(|| format!("back: {}", case.name))?;
        }
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

impl Back {
    fn set_up(&self) -> Result<()> {
        match self.tunnel {
            true => tunnel::VXLAN.set_up(),
            false => plain::set_up(),
        }
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        match self.tunnel {
            true => tunnel::VXLAN.probes(),
            false => plain::probes(),
        }
    }
}

fn one(case: &Case, live: Live, installed: &Path, out: &Path, outcome: &mut Outcome) -> Result<()> {
    std::thread::sleep(Duration::from_secs(3));
    let rules = facts::promised(&plain::bridges());
    let before = facts::daemons("ovs-vswitchd");
    let how = started_as(before.first().map_or(0, |daemon| daemon.pid));
    if case.harm == Harm::Objects {
        replace_object(before.first().map_or(0, |daemon| daemon.pid))?;
    }
    let known = run::known();
    let mut client = run::start(case.arguments, &out.join(format!("run-{}", case.name.replace(' ', "-"))))?;
    let code = harm(case, installed, &known, &before).and_then(|()| Ok(client.wait()?.code()));
    repair(installed)?;
    let code = code.inspect_err(|_| {
        let _ = client.kill();
        let _ = client.wait();
    })?;
    std::thread::sleep(Duration::from_secs(5));
    let check = |what: &str| format!("{}: {what}", case.name);
    outcome.check(check("exit code"), code == Some(case.exit), code);
    let after = facts::daemons("ovs-vswitchd");
    outcome.check(check("one ovs-vswitchd, another process"), after.len() == 1 && after != before, &after);
    if let [now] = after.as_slice() {
        let is_installed = Path::new(&now.executable) == installed;
        outcome.check(check("runs the right program"), is_installed == (case.exit == 0), &now.executable);
        let version = shell_lenient(&format!("/proc/{}/exe --version", now.pid));
        outcome.check(check("the program says its version"), version.contains("Open vSwitch"), version);
        if case.harm == Harm::Objects {
            let kept = shell_lenient(&format!("grep -e /program/ /proc/{}/maps | grep -e {OBJECT}", now.pid));
            outcome.check(check("runs with the object that ran before"), !kept.is_empty(), kept);
        }
        let as_before = started_as(now.pid);
        outcome.check(check("started as before"), as_before == how, json!([how, as_before]));
    }
    aftermath::nothing_left(case.name, outcome);
    aftermath::owned(case.name, outcome);
    aftermath::as_before(case.name, &rules, outcome);
    aftermath::finish(case.name, live, false, outcome).map(drop)
}

fn harm(case: &Case, installed: &Path, known: &[String], before: &[facts::Daemon]) -> Result<()> {
    match case.harm {
        Harm::Broken | Harm::Objects => {
            run::wait_for("snapshot", known)?;
            fs::rename(installed, aside(installed))?;
            fs::write(installed, "#!/bin/sh\nexit 1\n")?;
            Ok(fs::set_permissions(installed, fs::Permissions::from_mode(0o755))?)
        }
        Harm::Killed => {
            run::wait_for("restore", known)?;
            for daemon in facts::daemons("ovs-vswitchd").iter().filter(|daemon| !before.contains(daemon)) {
                kill(Pid::from_raw(i32::try_from(daemon.pid)?), Signal::SIGKILL)?;
            }
            Ok(())
        }
        Harm::None => Ok(()),
    }
}

/// Debian's ovs-vswitchd has it mapped.
const OBJECT: &str = "libunbound.so";

/// A package upgrade writes a new file and gives it the name.
fn replace_object(pid: u32) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mapped = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.contains(OBJECT));
    let mapped = mapped.with_context(|| format!("ovs-vswitchd has no {OBJECT} mapped"))?;
    let new = format!("{mapped}.new");
    fs::copy(mapped, &new)?;
    Ok(fs::rename(new, mapped)?)
}

fn aside(installed: &Path) -> PathBuf {
    installed.with_extension("aside")
}

fn repair(installed: &Path) -> Result<()> {
    match aside(installed).exists() {
        true => Ok(fs::rename(aside(installed), installed)?),
        false => Ok(()),
    }
}

/// Command line, user, priority and place of a daemon.
fn started_as(pid: u32) -> BTreeMap<&'static str, String> {
    let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let text = |name: &str| String::from_utf8_lossy(&read(name)).replace('\0', " ");
    let status = text("status");
    let line = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    let nice = text("stat").rsplit_once(") ").and_then(|(_, rest)| Some(rest.split(' ').nth(16)?.to_owned()));
    BTreeMap::from([
        ("cmdline", text("cmdline")),
        ("cgroup", text("cgroup")),
        ("limits", text("limits")),
        ("cwd", fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default().display().to_string()),
        ("uid", line("Uid:")),
        ("umask", line("Umask:")),
        ("nice", nice.unwrap_or_default()),
    ])
}

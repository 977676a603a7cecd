//! Local users who try to pass for Open vSwitch: `nobody`, and the user `openvswitch` that the daemons themselves run as,
//! one of them taken over. Nothing of theirs runs as root, is asked, signalled or ended, and no run is refused for it.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::{aftermath, killed, meanwhile, plain, Custom};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Hostile;

const IMPOSTOR: &str = include_str!("impostor");
/// What no root may run: it leaves a mark that belongs to whoever ran it.
const EVIL: &str = "#!/bin/sh\necho \"$0 $*\" > /srv/marks/$(id -u).$$\necho 'ovs-vswitchd (Open vSwitch) 3.1.0'\n";
/// As long as the daemon's own name, whose place it takes (see [`take_over`]).
const EVIL_NAME: &str = "/srv/o/evil0";
const NOBODY: User = User { name: "nobody", folder: "/srv/p" };
const SWITCH_USER: User = User { name: "openvswitch", folder: "/srv/o" };

/// Who tries, and where his files are.
#[derive(Clone, Copy)]
struct User {
    name: &'static str,
    folder: &'static str,
}

/// What he runs.
struct Decoy {
    name: &'static str,
    /// The name of the program's file.
    program: &'static str,
    /// `argv[0]`.
    called: &'static str,
    /// Put before it.
    prefix: &'static str,
    /// Its arguments.
    words: &'static str,
}

const DECOY: Decoy = Decoy { name: "", program: "ovs-vswitchd", called: "/srv/p/evil0", prefix: "", words: "" };

const OF_NOBODY: &[Decoy] = &[
    Decoy { name: "named", words: "--unixctl=/srv/p/ctl --listen=1", ..DECOY },
    Decoy {
        name: "environment",
        called: "ovs-vswitchd",
        prefix: "env OVS_RUNDIR=/srv/p PATH=/srv/p/bin:/usr/bin",
        words: "--unixctl=/srv/p/ovs-vswitchd.PID.ctl --listen=1",
        ..DECOY
    },
    Decoy {
        name: "the real one's files",
        words: "--pidfile=/run/openvswitch/ovs-vswitchd.pid --unixctl=$(ls /run/openvswitch/ovs-vswitchd.*.ctl)",
        ..DECOY
    },
    Decoy {
        name: "a PID file of its own",
        prefix: "env OVS_RUNDIR=/srv/p",
        words: "--pidfile=/srv/p/ovs-vswitchd.pid --lock=/srv/p/ovs-vswitchd.pid --unixctl=/srv/p/ctl-2 --listen=1 --monitor",
        ..DECOY
    },
    Decoy {
        name: "namespaces",
        prefix: "unshare --user --map-root-user --net --pid --fork",
        words: "--unixctl=/srv/p/ctl-3 --listen=1",
        ..DECOY
    },
    Decoy { name: "renamed", words: "--unixctl=/srv/p/ctl-4 --listen=1 --rename='/srv/p/evil0 --unixctl=/srv/p/ctl-4'", ..DECOY },
    Decoy {
        name: "a long command line",
        words: "--unixctl=/srv/p/ctl-5 --listen=1 $(head -c 1500000 /dev/zero | tr '\\0' x | fold -w 100000)",
        ..DECOY
    },
    Decoy { name: "database", program: "ovsdb-server", words: "--unixctl=/srv/p/ctl-6 --listen=1", ..DECOY },
];

const OF_THE_SWITCH_USER: &[Decoy] = &[
    Decoy {
        name: "a control socket",
        called: EVIL_NAME,
        words: "--unixctl=/run/openvswitch/ovs-vswitchd.PID.ctl --listen=1",
        ..DECOY
    },
    Decoy {
        name: "the real one's files",
        called: EVIL_NAME,
        words:
            "--pidfile=/run/openvswitch/ovs-vswitchd.pid --unixctl=$(ls /run/openvswitch/ovs-vswitchd.*.ctl | head -1)",
        ..DECOY
    },
    Decoy {
        name: "another PID file",
        called: EVIL_NAME,
        words:
            "--pidfile=/run/openvswitch/x.pid --lock=/run/openvswitch/x.pid --unixctl=/run/openvswitch/x.ctl --listen=1",
        ..DECOY
    },
    Decoy {
        name: "database",
        program: "ovsdb-server",
        called: EVIL_NAME,
        words: "--unixctl=/run/openvswitch/ovsdb-server.PID.ctl --listen=1",
        ..DECOY
    },
];

impl Custom for Hostile {
    fn name(&self) -> &'static str {
        "hostile"
    }

    fn about(&self) -> &'static str {
        "local users pass for Open vSwitch: nobody, and the user that the daemons run as, one of them taken over"
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(6)
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        shell("mkdir -p /srv/marks; chmod 1777 /srv/marks; useradd -r -M -s /usr/sbin/nologin openvswitch")?;
        [NOBODY, SWITCH_USER].iter().try_for_each(|user| user.move_in())?;
        without_a_switch(outcome)?;
        of_nobody(out, outcome)?;
        as_the_switch_user(out, outcome)?;
        by_hand(out, outcome)?;
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

impl User {
    /// His files: copies of perl with the daemons' names, and what he would have root run.
    fn move_in(self) -> Result<()> {
        let User { name, folder } = self;
        fs::create_dir_all(format!("{folder}/bin"))?;
        for program in facts::DAEMONS {
            fs::copy("/usr/bin/perl", format!("{folder}/{program}"))?;
            fs::write(format!("{folder}/bin/{program}"), EVIL)?;
            fs::set_permissions(format!("{folder}/bin/{program}"), fs::Permissions::from_mode(0o755))?;
        }
        fs::write(format!("{folder}/evil0"), EVIL)?;
        fs::set_permissions(format!("{folder}/evil0"), fs::Permissions::from_mode(0o755))?;
        fs::write(format!("{folder}/impostor"), IMPOSTOR)?;
        shell(&format!("chown -R {name}: {folder}")).map(drop)
    }

    fn start(self, decoys: &[Decoy], outcome: &mut Outcome) -> Result<Decoys> {
        let logs = decoys.iter().enumerate().map(|(number, decoy)| self.start_one(number, decoy));
        let decoys = Decoys(logs.collect::<Result<_>>()?);
        let pids: Vec<_> = decoys.0.iter().map(|(name, pid, _)| (name, pid)).collect();
        outcome.note(format!("decoys of {}", self.name), json!(pids));
        Ok(decoys)
    }

    /// His process, and its log.
    fn start_one(self, number: usize, decoy: &Decoy) -> Result<(String, u32, String)> {
        let User { name, folder } = self;
        let Decoy { program, called, prefix, words, .. } = decoy;
        let log = format!("{folder}/log-{number}");
        shell_lenient(&format!("rm -f {log} {log}.ready"));
        let script = format!(
            "#!/bin/bash\ncd {folder}\nexec -a {called} {folder}/{program} {folder}/impostor {words} --log={log}\n"
        );
        let start = format!("/srv/start-{name}-{number}");
        fs::write(&start, script)?;
        shell(&format!(
            "chmod 755 {start}; cd /; setsid setpriv --reuid={name} --regid=$(id -g {name}) --clear-groups {prefix} {start} \
                > /srv/start-{name}-{number}.log 2>&1 &"
        ))?;
        let ready = format!("{log}.ready");
        wait_until(
            &format!("{}: {} runs", name, decoy.name),
            Duration::from_secs(20),
            Duration::from_millis(100),
            || Path::new(&ready).exists(),
        )?;
        let pid = who_has_open(&log).with_context(|| format!("{}: its process", decoy.name))?;
        Ok((decoy.name.to_owned(), pid, log))
    }
}

/// The process that has a file open, by our own number for it.
fn who_has_open(path: &str) -> Option<u32> {
    let has = |pid: &u32| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| target == Path::new(path))
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(has)
}

/// Name, process and log of each.
struct Decoys(Vec<(String, u32, String)>);

impl Decoys {
    /// They live as before, and nobody has told them anything.
    fn were_left_alone(&self, when: &str, outcome: &mut Outcome) {
        for (name, pid, log) in &self.0 {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            outcome.check(format!("{when}: {name}: it runs"), matches!(state, Some('S' | 'R')), json!(state));
            let told = fs::read_to_string(log).unwrap_or_default();
            outcome.check(format!("{when}: {name}: neither signalled nor asked"), told.is_empty(), told);
        }
        nothing_ran_as_root(when, outcome);
    }

    fn end(self) {
        for (_, pid, _) in &self.0 {
            shell_lenient(&format!("kill -KILL {pid}"));
        }
    }
}

fn nothing_ran_as_root(when: &str, outcome: &mut Outcome) {
    let marks = shell_lenient("find /srv/marks -type f -user root -exec cat {} +");
    outcome.check(format!("{when}: nothing of theirs ran as root"), marks.is_empty(), marks);
    shell_lenient("find /srv/marks -type f -delete");
}

fn said(words: &str) -> String {
    shell_lenient(&format!("timeout 120 {words} 2>&1; echo exit=$?"))
}

/// What preinst of the package asks (`policy-rc.d`): 101 leaves the daemons to a run.
const POLICY: &str = "env DPKG_MAINTSCRIPT_PACKAGE=openvswitch-switch DPKG_MAINTSCRIPT_NAME=preinst \
                      ovs-graceful hook policy ovs-vswitchd.service stop";

/// ovs-vswitchd is down; a program of that name is there.
fn without_a_switch(outcome: &mut Outcome) -> Result<()> {
    let when = "no switch runs";
    say(when);
    shell("systemctl stop openvswitch-switch; systemctl start ovsdb-server")?;
    shell("until ! pidof -x /usr/lib/openvswitch-switch/ovs-vswitchd; do sleep 0.2; done")?;
    let decoys = NOBODY.start(&OF_NOBODY[..2], outcome)?;
    for words in ["ovs-graceful check", "ovs-graceful hook upgraded", "ovs-graceful restart --plan", POLICY] {
        let text = said(words);
        let named = decoys.0.iter().any(|(_, pid, _)| text.contains(&pid.to_string()));
        outcome.check(format!("{when}: `{words}` does not name them"), !named, &text);
        if words.ends_with("check") {
            let told = text.contains("exit=10") && text.contains("does not run");
            outcome.check(format!("{when}: check says so"), told, text);
        }
        nothing_ran_as_root(&format!("{when}: `{words}`"), outcome);
    }
    decoys.were_left_alone(when, outcome);
    decoys.end();
    shell("systemctl start openvswitch-switch; until ovs-ofctl show br0 >/dev/null 2>&1; do sleep 0.2; done")?;
    plain::rules()
}

fn of_nobody(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let when = "nobody";
    say(when);
    let decoys = NOBODY.start(OF_NOBODY, outcome)?;
    nothing_is_refused(when, outcome);
    decoys.were_left_alone(when, outcome);
    let folder = out.join(when);
    fs::create_dir_all(&folder)?;
    meanwhile::restart(&[], &folder, outcome, |_, _| Ok(()))?;
    decoys.were_left_alone("nobody, after a run", outcome);
    cut_off(&folder, outcome)?;
    decoys.were_left_alone("nobody, after a recovery", outcome);
    let upgraded = said("ovs-graceful hook upgraded");
    outcome.check("nobody: hook upgraded", upgraded.contains("exit=0"), upgraded);
    decoys.were_left_alone("nobody, after an upgrade", outcome);
    decoys.end();
    Ok(())
}

/// Neither what an operator types nor what a package asks.
fn nothing_is_refused(when: &str, outcome: &mut Outcome) {
    let text = said("ovs-graceful check");
    outcome.check(format!("{when}: check finds nothing"), text.contains("exit=0"), text);
    // An answer is kept for the length of an upgrade.
    shell_lenient("rm -f /run/ovs-graceful/upgrade");
    let text = said(POLICY);
    outcome.check(format!("{when}: an upgrade would be a run"), text.contains("exit=101"), text);
    shell_lenient("rm -f /run/ovs-graceful/upgrade");
}

/// The supervisor is killed: its recovery undoes the run, and ends whatever that had started.
fn cut_off(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let known = run::known();
    let mut client = run::start(&[], &out.join("run-cut-off"))?;
    let killed = killed::kill_in("standby", &known);
    if killed.is_err() {
        let _ = client.kill();
    }
    client.wait()?;
    let id = killed?;
    run::wait_for_recovery(&id)?;
    run::wait_until_unit_gone(Duration::from_secs(20))?;
    let code = crate::guest::facts::daemons("ovs-vswitchd").len();
    outcome.note("processes named ovs-vswitchd after the recovery", json!(code));
    Ok(())
}

/// The daemons run as `openvswitch`, as RHEL has them.
fn as_the_switch_user(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let when = "openvswitch";
    say(when);
    let options = "OVS_CTL_OPTS='--ovs-user=openvswitch:openvswitch'";
    fs::write("/etc/default/openvswitch-switch", format!("{options}\n"))?;
    // systemd gives it back to root at every command of a unit.
    for daemon in facts::DAEMONS {
        let folder = format!("/etc/systemd/system/{daemon}.service.d");
        fs::create_dir_all(&folder)?;
        fs::write(format!("{folder}/lab.conf"), "[Service]\nRuntimeDirectory=\n")?;
    }
    shell("systemctl daemon-reload")?;
    let own = "chown -R openvswitch: /run/openvswitch /etc/openvswitch /var/log/openvswitch /var/lib/openvswitch";
    shell(&format!("systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server; mkdir -p /run/openvswitch; {own}"))?;
    shell("systemctl start openvswitch-switch; until ovs-ofctl show br0 >/dev/null 2>&1; do sleep 0.2; done")?;
    plain::rules()?;
    theirs(when, outcome);
    let decoys = SWITCH_USER.start(OF_THE_SWITCH_USER, outcome)?;
    take_over("ovs-vswitchd")?;
    take_over("ovsdb-server")?;
    nothing_is_refused(when, outcome);
    decoys.were_left_alone(when, outcome);
    let folder = out.join(when);
    fs::create_dir_all(&folder)?;
    meanwhile::restart(&[], &folder, outcome, |_, _| Ok(()))?;
    decoys.were_left_alone("openvswitch, after a run", outcome);
    theirs("openvswitch, after a run", outcome);
    files_that_lead_elsewhere(outcome);
    decoys.end();
    Ok(())
}

/// Both daemons run as `openvswitch`.
fn theirs(when: &str, outcome: &mut Outcome) {
    let all = shell_lenient(
        "for p in $(pgrep -x 'ovs-vswitchd|ovsdb-server'); do stat -Lc '%n' /proc/$p/exe >/dev/null; \
        case $(readlink /proc/$p/exe) in /srv/*) ;; *) ps -o user:20= -p $p; esac; done | sort | uniq -c",
    );
    let words: Vec<&str> = all.split_whitespace().collect();
    outcome.check(format!("{when}: the daemons are the user's"), words == ["2", "openvswitch"], &all);
}

/// Does what somebody does who runs code in a daemon: its command line and its environment are its memory.
fn take_over(daemon: &str) -> Result<()> {
    let own = |daemon: &&facts::Daemon| !daemon.executable.starts_with("/srv");
    let all = facts::daemons(daemon);
    let pid = all.iter().find(own).with_context(|| format!("no {daemon}"))?.pid;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<u64> =
        stat.rsplit_once(") ").unwrap_or_default().1.split(' ').map(|word| word.parse().unwrap_or_default()).collect();
    // arg_start, env_start and env_end (proc_pid_stat(5)).
    let [arguments, environment, end] = [45, 47, 48].map(|at| fields.get(at).copied().unwrap_or_default());
    let memory = fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/mem"))?;
    memory.write_all_at(EVIL_NAME.as_bytes(), arguments)?;
    let mut words = b"PATH=/srv/o/bin\0OVS_RUNDIR=/srv/o\0OVS_PKGDATADIR=/srv/o\0OVS_LOGDIR=/srv/o\0".to_vec();
    words.truncate(usize::try_from(end - environment)?);
    memory.write_all_at(&words, environment)?;
    let cmdline = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    anyhow::ensure!(cmdline.starts_with(EVIL_NAME), "{daemon} says {cmdline:?}");
    Ok(())
}

/// The user's own run directory: what is there may be anything.
fn files_that_lead_elsewhere(outcome: &mut Outcome) {
    let secret = "/root/secret";
    shell_lenient(&format!("echo do-not-tell > {secret}; chmod 600 {secret}"));
    let each = ["ln -sf /root/secret", "mkfifo", "mkdir", "truncate -s 3G"];
    for how in each {
        let file = "/run/openvswitch/ovs-vswitchd.pid.ovsg-old";
        shell_lenient(&format!(
            "rm -rf {file}; setpriv --reuid=openvswitch --regid=openvswitch --clear-groups {how} {file}"
        ));
        for words in ["ovs-graceful check", "ovs-graceful restart --plan", "ovs-graceful hook upgraded"] {
            let text = said(words);
            let good = text.contains("exit=0") && !text.contains("do-not-tell");
            outcome.check(format!("`{how}` in the run directory: `{words}`"), good, text);
        }
        shell_lenient(&format!("rm -rf {file}"));
    }
}

/// No unit owns the daemons: a run starts the new ones itself.
fn by_hand(out: &Path, outcome: &mut Outcome) -> Result<()> {
    let when = "by hand";
    say(when);
    let ctl = "/usr/share/openvswitch/scripts/ovs-ctl --system-id=random --ovs-user=openvswitch:openvswitch start";
    shell("systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server")?;
    shell(&format!("mkdir -p /run/openvswitch; chown openvswitch: /run/openvswitch; setsid {ctl} >/dev/null 2>&1"))?;
    shell("until ovs-ofctl show br0 >/dev/null 2>&1; do sleep 0.2; done")?;
    plain::rules()?;
    let decoys = SWITCH_USER.start(OF_THE_SWITCH_USER, outcome)?;
    take_over("ovs-vswitchd")?;
    take_over("ovsdb-server")?;
    nothing_is_refused(when, outcome);
    let folder = out.join("by-hand");
    fs::create_dir_all(&folder)?;
    meanwhile::restart(&[], &folder, outcome, |_, _| Ok(()))?;
    decoys.were_left_alone("by hand, after a run", outcome);
    theirs("by hand, after a run", outcome);
    decoys.end();
    Ok(())
}

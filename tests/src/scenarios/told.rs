//! What an operator and a monitoring system are told: `status` and its exit code before, during and after a run, one that
//! was undone and one that needs a person among them; `wait`; what the freeze refused; a restart that replaced libraries
//! make necessary; and the time that a unit's command is given.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::{json, Value};

use super::doors::DROP_INS;
use super::{aftermath, plain, Custom};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::{self, attack, facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Told;

impl Custom for Told {
    fn name(&self) -> &'static str {
        "told"
    }

    fn about(&self) -> &'static str {
        "status, wait, refused messages, replaced libraries, time limits of units: what is told is true"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        let (code, status) = status()?;
        outcome.check("quiet: 0", code == Some(0), &status);
        let current = status["daemons"].as_array().is_some_and(|all| {
            all.len() == 2 && all.iter().all(|one| one["restart_needed"] == false && one["running"].is_string())
        });
        outcome.check("quiet: both daemons are the installed ones", current, &status["daemons"]);
        while_parked(out, outcome)?;
        replaced(out, outcome)?;
        undone(out, outcome)?;
        by_name(out, outcome)?;
        time_limit(out, outcome)?;
        needs_person(out, outcome)?;
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

/// Exit code and answer of `status --json`.
fn status() -> Result<(Option<i32>, Value)> {
    let output = Command::new("ovs-graceful").args(["status", "--json"]).output().context("ovs-graceful status")?;
    let answer = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
    Ok((output.status.code(), answer))
}

fn report(id: &str) -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(run::report(id))?)?)
}

fn switch() -> Result<Pid> {
    let found = facts::daemons("ovs-vswitchd");
    let oldest = found.iter().map(|daemon| daemon.pid).min().context("no ovs-vswitchd runs")?;
    Ok(Pid::from_raw(i32::try_from(oldest)?))
}

/// The new daemon is stopped, so that Restore waits for it with everything parked.
fn while_parked(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("status while packets are parked");
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(2));
    let known = run::known();
    let old = switch()?;
    let mut client = Command::new("ovs-graceful")
        .args(["restart", "--no-ovsdb"])
        .stdin(std::process::Stdio::null())
        .stdout(fs::File::create(out.join("run-parked"))?)
        .stderr(fs::File::create(out.join("run-parked-errors"))?)
        .spawn()?;
    let id = run::wait_for("restore", &known)?;
    let new = facts::daemons("ovs-vswitchd").into_iter().map(|daemon| daemon.pid);
    let new = new.map(i32::try_from).collect::<Result<Vec<_>, _>>()?.into_iter().map(Pid::from_raw);
    let new = new.filter(|pid| *pid != old).max().context("no new ovs-vswitchd")?;
    kill(new, Signal::SIGSTOP)?;
    let mut seen = Value::Null;
    let (patience, every) = (Duration::from_secs(30), Duration::from_millis(50));
    let parked = wait_until("packets to be parked", patience, every, || match status() {
        Ok((Some(11), status)) if status["run"]["parked"].as_u64() > Some(3) => {
            seen = status;
            true
        }
        _ => false,
    });
    let text = shell_lenient("ovs-graceful status; echo exit=$?");
    let waiting = Command::new("ovs-graceful").args(["wait", "--json"]).stdout(std::process::Stdio::piped()).spawn()?;
    kill(new, Signal::SIGCONT)?;
    outcome.check("status sees packets parked", parked.is_ok(), &seen);
    let run = &seen["run"];
    outcome.check("status: level and lease", run["level"] == "full" && run["lease_ms"].as_u64() > Some(1000), run);
    let limit = run["limit_ms"].as_u64().is_some_and(|limit| (1_000..=60_000).contains(&limit));
    outcome.check("status: phase with its time and limit", limit && run["phase_ms"].is_u64(), run);
    let words = text.contains("level full") && text.contains("packets parked now") && text.contains("exit=11");
    outcome.check("status in words", words, text);
    let client = client.wait()?.code();
    let waited = waiting.wait_with_output()?;
    outcome.check("the run is done", client == Some(0), json!(client));
    let theirs: Value = serde_json::from_slice(&waited.stdout).unwrap_or(Value::Null);
    let same = waited.status.code() == Some(0) && theirs["id"] == id.as_str();
    outcome.check("wait ends with the exit code of the run, and its report", same, &theirs);
    let again = shell_lenient(&format!("ovs-graceful wait {id}; echo exit=$?"));
    outcome.check("wait for a run that is over", again.contains("exit=0") && again.contains(&id), again);
    let (code, after) = status()?;
    let told = after["last_run"]["id"] == id.as_str() && after["last_run"]["exit_code"] == 0;
    outcome.check("afterwards: 0, and the last run", code == Some(0) && told, &after["last_run"]);
    aftermath::finish("parked", live, false, outcome).map(drop)
}

fn replaced(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("a replaced library");
    let mapped = format!(
        "awk '$2 ~ /x/ && $6 ~ /\\/lib(c|m|ssl|crypto|atomic|unbound)[.-]/ {{print $6}}' /proc/{}/maps",
        switch()?
    );
    let library = shell(&format!("{mapped} | sort -u | head -1"))?.trim().to_owned();
    outcome.note("library", &library);
    let before = facts::DAEMONS.map(facts::daemons);
    shell(&format!("cp -p {library} {library}.new && mv {library}.new {library}"))?;
    let (code, told) = status()?;
    let needed = told["daemons"].to_string().contains(&library) && told["daemons"][0]["restart_needed"] == true;
    outcome.check("status names what was replaced", needed && code == Some(0), &told["daemons"]);
    let words = shell_lenient("ovs-graceful status");
    outcome.check("and says what to type", words.contains("restart needed") && words.contains("--if-needed"), words);
    let done = if_needed("", out);
    outcome.check("--if-needed replaces the daemons", done.contains("exit=0") && done.contains("needed: "), done);
    let after = facts::DAEMONS.map(facts::daemons);
    let both = before.iter().zip(&after).all(|(before, after)| before != after);
    outcome.check("both daemons were replaced", both, json!([before, after]));
    let nothing = if_needed("", out);
    outcome.check("then there is nothing to do", nothing.contains("nothing to do"), nothing);
    shell("cp -p /usr/sbin/ovsdb-server /usr/sbin/new && mv /usr/sbin/new /usr/sbin/ovsdb-server")?;
    let nothing = if_needed("--no-ovsdb", out);
    outcome.check("with --no-ovsdb its program does not count", nothing.contains("nothing to do"), nothing);
    let done = if_needed("", out);
    let server = done.contains("exit=0") && done.contains("needed: ovsdb-server");
    outcome.check("a replaced ovsdb-server is a reason", server, done);
    let runs = shell("ovs-graceful runs --json")?;
    let runs: Value = serde_json::from_str(&runs)?;
    let empty = |run: &&Value| run["report"]["reason"] == "nothing to do";
    let kept = runs.as_array().map(|runs| runs.iter().filter(empty).count());
    outcome.check("of runs with nothing to do the last is kept", kept == Some(1), runs.to_string().len());
    Ok(())
}

fn if_needed(more: &str, out: &Path) -> String {
    let log = out.join("if-needed");
    shell_lenient(&format!(
        "timeout 240 ovs-graceful restart --if-needed {more} > {0} 2>&1; echo exit=$? >> {0}; cat {0}",
        log.display()
    ))
}

/// Aborted while somebody tried what is refused.
fn undone(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("a run that is undone");
    let known = run::known();
    let mut client = run::start(&[], &out.join("run-undone"))?;
    let id = run::wait_for("standby", &known)?;
    let flush = attack::attempt(attack::Attack::Flush);
    let crowd = attack::attempt(attack::Attack::Crowd);
    let aborted = shell_lenient("ovs-graceful abort; echo exit=$?");
    let client = client.wait()?.code();
    outcome.check("abort", aborted.contains("exit=0") && client == Some(20), aborted);
    let busy = libc::EBUSY;
    let answers = format!("{flush:?} {crowd:?}");
    outcome.check("both were refused", flush.ok() == Some(busy) && crowd.ok() == Some(busy), answers);
    let report = report(&id)?;
    let refused = &report["refused"];
    let counted = refused["flow_flush"].as_u64() >= Some(1) && refused["too_many"].as_u64() >= Some(1);
    outcome.check("a run that was undone reports what was refused", counted, refused);
    let warned = report["warnings"].to_string().contains("more than 64 netlink messages");
    outcome.check("and warns of too many messages", warned, &report["warnings"]);
    let none = shell_lenient("ovs-graceful abort; echo exit=$?; ovs-graceful wait; echo exit=$?");
    outcome.check("nothing to abort and nothing to wait for: 1", none.matches("exit=1\n").count() == 2, none);
    Ok(())
}

/// A deletion by name, refused while the new daemon may not delete ports, is repeated.
fn by_name(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("a port that somebody deletes by its name");
    let port = attack::PORT;
    let gate = format!(
        "ip link add {port} type dummy && ovs-dpctl add-if ovs-system {port} && /lab/lab guest attack delete-port > {0}; \
         ovs-dpctl show >> {0}",
        out.join("delete-port").display()
    );
    let known = run::known();
    let mut client = run::start(&["--gate-command", &gate], &out.join("run-by-name"))?;
    let id = run::wait_for("gates", &known)?;
    let code = client.wait()?.code();
    outcome.check("the run is done", code == Some(0), json!(code));
    let seen = fs::read_to_string(out.join("delete-port")).unwrap_or_default();
    let refused = seen.starts_with("errno 16") && seen.contains(port);
    outcome.check("the deletion was refused", refused, seen);
    let now = shell_lenient("ovs-dpctl show");
    outcome.check("and repeated", !now.contains(port), now);
    let said = fs::read_to_string(out.join("run-by-name")).unwrap_or_default();
    outcome.check("by the run", said.contains(&format!("{port}: deletion repeated")), said);
    outcome.check("it is counted", report(&id)?["refused"]["vport_del"].as_u64() >= Some(1), &id);
    shell(&format!("ip link del {port}")).map(drop)
}

/// The unit's limit is shorter than the run.
fn time_limit(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("a unit whose time limit is shorter than the run");
    shell("cp /usr/bin/ovs-graceful /usr/sbin/ovs-graceful")?;
    let short = "/run/systemd/system/openvswitch-switch.service.d";
    for (folder, text) in DROP_INS {
        fs::create_dir_all(folder)?;
        fs::write(format!("{folder}/50-ovs-graceful.conf"), text)?;
    }
    fs::create_dir_all(short)?;
    fs::write(format!("{short}/99-short.conf"), "[Service]\nTimeoutStopSec=4\n")?;
    fs::create_dir_all("/etc/ovs-graceful")?;
    fs::write("/etc/ovs-graceful/config.toml", "[gates]\ncommand = \"sleep 10\"\n")?;
    shell("systemctl daemon-reload")?;
    let known = run::known();
    let log = out.join("time-limit");
    let text = shell_lenient(&format!(
        "since=$(date +%s); timeout 240 systemctl restart openvswitch-switch > {0} 2>&1; echo exit=$? >> {0}; \
         journalctl -q -u openvswitch-switch --since @$since -o cat >> {0}; cat {0}",
        log.display()
    ));
    let ended = !text.contains("timed out") && text.contains("exit=0");
    outcome.check("systemd has not ended the command of a run that takes longer", ended, text);
    let new: Vec<String> = run::known().into_iter().filter(|id| !known.contains(id)).collect();
    let done = matches!(new.as_slice(), [id] if report(id).is_ok_and(|report| report["exit_code"] == 0));
    outcome.check("the run was done when the restart ended", done, json!(new));
    let environment = shell_lenient("tr '\\0' '\\n' < /proc/$(pidof ovs-vswitchd)/environ");
    outcome.check("the daemons have no socket of systemd's", !environment.contains("NOTIFY_SOCKET"), environment);
    for (folder, _) in DROP_INS {
        fs::remove_dir_all(folder)?;
    }
    fs::remove_dir_all(short)?;
    fs::remove_file("/etc/ovs-graceful/config.toml")?;
    shell("rm /usr/sbin/ovs-graceful; systemctl daemon-reload; systemctl reset-failed").map(drop)
}

/// Nobody is left, and the installed program does not start.
fn needs_person(out: &Path, outcome: &mut Outcome) -> Result<()> {
    say("a run that needs a person");
    let known = run::known();
    let mut client = run::start(&[], &out.join("run-40"))?;
    run::wait_for("standby", &known)?;
    // The standby has been started from it, or fails: both are well.
    let id = run::wait_for("restore", &known)?;
    let supervisor = run::supervisor()?;
    kill(supervisor, Signal::SIGSTOP)?;
    let flush = attack::attempt(attack::Attack::Flush);
    outcome.check("a flush is refused", flush.as_ref().ok() == Some(&libc::EBUSY), format!("{flush:?}"));
    shell("chmod a-x /usr/sbin/ovs-vswitchd")?;
    for daemon in facts::daemons("ovs-vswitchd") {
        let _ended_by_itself = kill(Pid::from_raw(i32::try_from(daemon.pid)?), Signal::SIGKILL);
    }
    kill(supervisor, Signal::SIGKILL)?;
    let written = run::wait_for_recovery(&id);
    client.wait()?;
    written?;
    run::wait_until_unit_gone(Duration::from_secs(60))?;
    let report = report(&id)?;
    outcome.check("the recovery needs a person", report["exit_code"] == 40, &report);
    let found = report["level"] == "full" && report["from"]["ovs"].is_string() && report["strategy"] == "standby";
    outcome.check("its report says what the run had found out", found, &report);
    let refused = report["refused"]["flow_flush"].as_u64() >= Some(1);
    outcome.check("and what was refused", refused, &report["refused"]);
    let (code, told) = status()?;
    let last = told["needs_person"] == id.as_str() && told["last_run"]["exit_code"] == 40;
    outcome.check("status: 40", code == Some(40) && last, &told);
    let words = shell_lenient("ovs-graceful status");
    outcome.check("status says what to type", words.contains("needs a person; remedy: `ovs-graceful recover`"), words);
    let recover = |name: &str, code: &str, part: &str, outcome: &mut Outcome| {
        let text =
            shell_lenient("timeout 100 ovs-graceful recover 2>/run/lab-errors; echo exit=$?; cat /run/lab-errors");
        outcome.check(name, text.contains(code) && text.contains(part), text);
    };
    recover("recover: still not well", "exit=40", "ovs-vswitchd", outcome);
    shell("chmod a+x /usr/sbin/ovs-vswitchd; systemctl reset-failed; systemctl restart openvswitch-switch")?;
    guest::wait_for_daemons()?;
    recover("recover: well again", "exit=0", "the host is well now", outcome);
    let (code, told) = status()?;
    outcome.check("status: 0 again", code == Some(0) && told["needs_person"].is_null(), &told);
    recover("recover: nothing any more", "exit=0", "nothing to recover", outcome);
    Ok(())
}

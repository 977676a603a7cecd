//! The disk that the database lives on fills up or becomes read-only before or after a step of the run, under traffic:
//! at the end of each case one ovs-vswitchd is bound and answers new flows, and once the disk is well nothing of the run
//! is left. `lab run database_disk -- CASE…` takes cases by name, for example `handover:before:full`. Each case leaves a
//! line in `table.md` (docs/database-disk.md).

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{json, Value};

use super::chaos::{PROGRAM, STEPS};
use super::{aftermath, is_chosen, network, plain, Custom, Program};
use crate::command::{shell, shell_lenient};
use crate::guest::{self, facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct DatabaseDisk {
    /// All cases, or a sample.
    whole: bool,
}

/// For every `tests/all`.
pub const SAMPLE: DatabaseDisk = DatabaseDisk { whole: false };
/// For the matrix.
pub const WHOLE: DatabaseDisk = DatabaseDisk { whole: true };

/// What the feature `chaos` runs in the midst of a run (orchestrator/src/chaos.rs).
const SCRIPT: &str = "/run/ovs-graceful-chaos";
/// The database's folder becomes a disk of its own, whose image is in memory.
const SET_UP: &str = "dir=$(dirname $(readlink -f /etc/openvswitch/conf.db)); echo $dir > /run/lab-database; \
    systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server; image=/dev/shm/database; echo $image > /run/lab-image; \
    truncate -s 8M $image; mkfs.ext4 -qF -b 1024 $image || busybox mke2fs -F -b 1024 $image; mount -o loop $image /mnt; \
    cp -a $dir/. /mnt; umount /mnt; mount -o loop,errors=remount-ro $image $dir; \
    systemctl start openvswitch-switch; ovs-vsctl show > /dev/null";
/// To the last byte of the database's last block.
const FILL: &str = "#!/bin/sh\ndir=$(cat /run/lab-database)\n\
    dd if=/dev/zero of=$dir/fill bs=64k 2> /dev/null\ndd if=/dev/zero of=$dir/rest bs=1k 2> /dev/null\n\
    for i in $(seq 50); do\n\
      timeout 10 ovs-vsctl --no-wait set open_vswitch . external_ids:lab-fill=$i > /dev/null 2>&1 || exit 0\n\
    done\nexit 1\n";
/// What ext4 does on an error of its device: from then on nothing can be written. Not every kernel shows it in the mount's
/// options.
const READ_ONLY: &str = "#!/bin/sh\ndir=$(cat /run/lab-database)\n\
    echo 1 > /sys/fs/ext4/$(basename $(findmnt -no SOURCE $dir))/trigger_fs_error\n! touch $dir/lab 2> /dev/null\n";
const MAKE_ROOM: &str = "dir=$(cat /run/lab-database); rm -f $dir/fill $dir/rest; ovs-graceful recover; \
    ovs-vsctl --no-wait remove open_vswitch . external_ids lab-fill";
/// Another disk with what the first one had. A server that has its file there has to be told.
const REPAIR: &str = "dir=$(cat /run/lab-database); image=$(cat /run/lab-image); umount -l $dir; cp $image $image+; \
    e2fsck -fy $image+ > /dev/null; mount -o loop,errors=remount-ro $image+ $dir; echo $image+ > /run/lab-image; rm $image; \
    ovs-graceful recover; ovs-appctl -t ovsdb-server ovsdb-server/compact Open_vSwitch; ovs-graceful recover";
/// What the file says, not the server.
const ON_DISK: &str = "cp $(cat /run/lab-database)/conf.db /run/lab-conf.db && ovsdb-tool query /run/lab-conf.db \
    '[\"Open_vSwitch\",{\"op\":\"select\",\"table\":\"Open_vSwitch\",\"where\":[],\"columns\":[\"other_config\",\"external_ids\"]}]'";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Case {
    step: usize,
    after: bool,
    read_only: bool,
}

impl Case {
    fn name(self) -> String {
        let (when, what) =
            (if self.after { "after" } else { "before" }, if self.read_only { "read-only" } else { "full" });
        format!("{}:{when}:{what}", STEPS[self.step])
    }

    /// What the run ends with (docs/database-disk.md).
    fn ends(self) -> &'static [u64] {
        let at = |step: &str, after| (STEPS.iter().position(|name| *name == step).unwrap_or(0), after);
        let place = (self.step, self.after);
        match self.read_only {
            _ if place == at("check", false) => &[10],
            _ if place <= at("switch-prepare", false) => &[20],
            // Until Handover something has to be written, and once more where the daemon has not said yet that it is in
            // step. A write that fits the page cache succeeds all the same, and so does its fsync (`ext4_sync_file`).
            true if place <= at("settle", false) => &[0, 30],
            _ => &[0],
        }
    }
}

fn all() -> Vec<Case> {
    let places = (0..STEPS.len()).flat_map(|step| [false, true].map(|after| (step, after)));
    places.flat_map(|(step, after)| [false, true].map(|read_only| Case { step, after, read_only })).collect()
}

impl DatabaseDisk {
    fn cases(&self, arguments: &[String]) -> Vec<Case> {
        let sample =
            ["snapshot:after:full", "standby:after:read-only", "handover:before:full", "handover:before:read-only"];
        all().into_iter().filter(|case| is_chosen(&case.name(), arguments, self.whole, &sample)).collect()
    }
}

impl Custom for DatabaseDisk {
    fn name(&self) -> &'static str {
        if self.whole {
            "database_disk_whole"
        } else {
            "database_disk"
        }
    }

    fn about(&self) -> &'static str {
        match self.whole {
            true => "the disk of the database fills up or becomes read-only before and after every step of the run",
            false => "the disk of the database fills up or becomes read-only at a step of the run (a sample)",
        }
    }

    fn programs(&self) -> &'static [Program] {
        &[Program { package: "orchestrator", example: PROGRAM, features: "orchestrator/chaos" }]
    }

    fn by_hand(&self) -> bool {
        self.whole
    }

    fn runs(&self, arguments: &[String]) -> Result<u32> {
        Ok(self.cases(arguments).len() as u32)
    }

    fn run(&self, job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        shell(SET_UP)?;
        plain::set_up()?;
        network::patient_veth()?;
        fs::copy(format!("/usr/bin/{PROGRAM}"), "/usr/bin/ovs-graceful")?;
        let mut table = String::new();
        for case in self.cases(&job.extra_args) {
            say(&format!("database_disk: {}", case.name()));
            let row = one(case, out, outcome).with_context(|| format!("database_disk: {}", case.name()))?;
            writeln!(table, "{row}")?;
            fs::write(out.join("table.md"), &table)?;
        }
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

fn one(case: Case, out: &Path, outcome: &mut Outcome) -> Result<String> {
    let name = case.name();
    let check = |what: &str| format!("{name}: {what}");
    fs::write(SCRIPT, if case.read_only { READ_ONLY } else { FILL })?;
    fs::set_permissions(SCRIPT, fs::Permissions::from_mode(0o755))?;
    let live = guest::start_all(plain::gentle_probes())?;
    std::thread::sleep(Duration::from_secs(1));
    let rules = facts::promised(&plain::bridges());
    let known = run::known();
    let log = out.join(format!("run-{}", name.replace(':', "-")));
    let fault = format!("{}:script", name.rsplit_once(':').map_or("", |(place, _)| place));
    let mut client = run::start_with(&[], &[("OVS_GRACEFUL_CHAOS", fault.as_str())], &log)?;
    client.wait()?;
    let id = run::known().into_iter().find(|id| !known.contains(id)).context("there was no run")?;
    run::wait_until_unit_gone(Duration::from_secs(60))?;
    std::thread::sleep(Duration::from_secs(1));
    let report: Value = serde_json::from_str(&shell(&format!("ovs-graceful runs show {id} --json"))?)?;
    let exit = report["exit_code"].as_u64().unwrap_or(u64::MAX);
    let struck = report["warnings"].to_string().contains("chaos:");
    outcome.check(check("the fault has struck"), struck, &report["warnings"]);
    outcome.check(check("exit code"), case.ends().contains(&exit), &report);
    // With the disk as it is: what no kernel flow is there for passes, so somebody is bound.
    let found = facts::daemons("ovs-vswitchd");
    outcome.check(check("one ovs-vswitchd"), found.len() == 1, &found);
    let [e, n] = aftermath::finish(&name, live, false, outcome)?;
    shell_lenient("ovs-dpctl del-flows");
    aftermath::new_traffic_passes(&name, outcome);
    // And once it is well.
    let healed = shell_lenient(if case.read_only { REPAIR } else { MAKE_ROOM });
    aftermath::nothing_left(&name, outcome);
    let (on_disk, files) = (shell_lenient(ON_DISK), shell_lenient("ls -A $(cat /run/lab-database)"));
    let clean =
        on_disk.contains("external_ids") && !on_disk.contains("flow-restore-wait") && !on_disk.contains("ovs-graceful");
    outcome.check(check("no flag, no mark in the file"), clean, json!([on_disk, healed]));
    outcome.check(check("no file of ours beside the database"), !files.contains("graceful"), files);
    aftermath::owned(&name, outcome);
    aftermath::as_before(&name, &rules, outcome);
    aftermath::new_traffic_passes(&name, outcome);
    let told = report["warnings"].as_array().into_iter().flatten().chain([&report["reason"]]);
    let told: Vec<&str> = told.filter_map(Value::as_str).filter(|line| !line.starts_with("chaos:")).collect();
    Ok(format!("| {name} | {exit} | {e} / {n} | {} |", told.join("; ").replace('\n', " ").replace('|', "\\|")))
}

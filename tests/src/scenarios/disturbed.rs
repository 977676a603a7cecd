//! What a host does in the midst of a run without meaning any harm: its disk fills up or fails, somebody presses
//! Ctrl-C, closes the terminal, starts a second run, sets the clock, or works with ovs-vsctl. Nothing is lost, and
//! each has its outcome (docs/operating.md).

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

use super::{aftermath, is_chosen, network, plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct Disturbed {
    whole: bool,
}

/// Every case.
pub const WHOLE: Disturbed = Disturbed { whole: true };
/// Those of [`SAMPLED`].
pub const SAMPLE: Disturbed = Disturbed { whole: false };

/// One of each kind: a disk, the database, a signal, a second run, the clock.
const SAMPLED: [&str; 5] = [
    "a second run",
    "disk full in Restore",
    "flow-restore-wait removed in Restore",
    "Ctrl-C twice in Standby",
    "OVN's own flow-restore-wait",
];

struct Case {
    name: &'static str,
    /// For `ovs-graceful restart`.
    arguments: &'static [&'static str],
    /// Before the run.
    prepare: &'static [&'static str],
    /// The phase that it happens in; empty where the run must be refused as it is.
    phase: &'static str,
    what: What,
    /// How the client ends.
    client: i32,
    /// What the report says.
    exit: u64,
    /// Afterwards.
    heal: &'static str,
    /// What must succeed then.
    holds: &'static [&'static str],
    /// At the end.
    tidy: &'static str,
    /// Rules and ports are others afterwards.
    changes: bool,
    /// The upcalls must have been without a daemon for less, ms.
    gap_below_ms: Option<f64>,
}

enum What {
    Shell(&'static str),
    /// Two of them for the client.
    Signals(Signal),
}

const BASE: Case = Case {
    name: "",
    arguments: &["--no-ovsdb"],
    prepare: &[],
    phase: "",
    what: What::Shell("true"),
    client: 0,
    exit: 0,
    heal: "true",
    holds: &[],
    tidy: "true",
    changes: false,
    gap_below_ms: None,
};

const SMALL_DISK: &str = "mkdir -p /var/lib/ovs-graceful; truncate -s 128M /root/disk; mkfs.ext4 -qF /root/disk; \
                          mount -o loop,errors=remount-ro /root/disk /var/lib/ovs-graceful";
/// Root may use what is reserved, and so do we: to the last block.
const FILL: &str = "dd if=/dev/zero of=/var/lib/ovs-graceful/fill bs=64k 2>/dev/null || true; \
                    dd if=/dev/zero of=/var/lib/ovs-graceful/rest bs=1k 2>/dev/null || true; sync";
/// What ext4 does on an error of its device.
const FAIL: &str = "echo 1 > /sys/fs/ext4/$(basename $(findmnt -no SOURCE /var/lib/ovs-graceful))/trigger_fs_error";
const MOUNT_AGAIN: &str = "umount /var/lib/ovs-graceful; mount -o loop /root/disk /var/lib/ovs-graceful; \
                           ovs-graceful recover";
const REMOVE_DISK: &str = "umount /var/lib/ovs-graceful; rm /root/disk";
const REPORT_IS_ON_DISK: &str = "test -s /var/lib/ovs-graceful/runs/*/report.json && ! ls /run/ovs-graceful/report.*";

/// Where the run has set it already.
const REMOVE_FLAG: What = What::Shell(
    "for i in $(seq 200); do ovs-vsctl get open_vswitch . other_config:flow-restore-wait > /dev/null 2>&1 && break; \
       sleep 0.05; done; ovs-vsctl --no-wait remove open_vswitch . other_config flow-restore-wait",
);
const OVN_WAITS: &str = "ovs-vsctl --no-wait set open_vswitch . other_config:flow-restore-wait=true \
                         external_ids:ovn-managed-flow-restore-wait=true";
const OVN_ENDS: &str = "ovs-vsctl --no-wait remove open_vswitch . other_config flow-restore-wait \
                        -- remove open_vswitch . external_ids ovn-managed-flow-restore-wait";
const KEEP_SCHEMA: &str = "cp /usr/share/openvswitch/vswitch.ovsschema /root/kept.ovsschema";
const RESTORE_SCHEMA: &str = "mv /root/kept.ovsschema /usr/share/openvswitch/vswitch.ovsschema";

const CASES: &[Case] = &[
    Case { name: "disk full before", prepare: &[SMALL_DISK, FILL], client: 10, tidy: REMOVE_DISK, ..BASE },
    Case {
        name: "disk read-only before",
        prepare: &[SMALL_DISK, "mount -o remount,ro /var/lib/ovs-graceful"],
        client: 10,
        tidy: REMOVE_DISK,
        ..BASE
    },
    Case {
        name: "disk fails in Arm",
        prepare: &[SMALL_DISK],
        phase: "arm",
        what: What::Shell(FAIL),
        client: 20,
        exit: 20,
        heal: MOUNT_AGAIN,
        holds: &[REPORT_IS_ON_DISK],
        tidy: REMOVE_DISK,
        ..BASE
    },
    Case {
        name: "disk fails in Restore",
        prepare: &[SMALL_DISK],
        phase: "restore",
        what: What::Shell(FAIL),
        heal: MOUNT_AGAIN,
        holds: &[REPORT_IS_ON_DISK],
        tidy: REMOVE_DISK,
        ..BASE
    },
    Case {
        name: "disk full in Restore",
        prepare: &[SMALL_DISK],
        phase: "restore",
        what: What::Shell(FILL),
        heal: "rm /var/lib/ovs-graceful/fill; ovs-graceful recover",
        holds: &[REPORT_IS_ON_DISK],
        tidy: REMOVE_DISK,
        ..BASE
    },
    Case {
        name: "disk hangs in Restore",
        prepare: &[SMALL_DISK],
        phase: "restore",
        // As one does that is reached through a bridge: nothing that waits for it comes back before it does.
        what: What::Shell(
            "(fsfreeze -f /var/lib/ovs-graceful; sleep 8; fsfreeze -u /var/lib/ovs-graceful) > /dev/null 2>&1 &",
        ),
        gap_below_ms: Some(5000.0),
        heal: "true",
        holds: &[REPORT_IS_ON_DISK],
        tidy: REMOVE_DISK,
        ..BASE
    },
    Case { name: "flow-restore-wait removed in Standby", phase: "standby", what: REMOVE_FLAG, client: 20, exit: 20, ..BASE },
    Case { name: "flow-restore-wait removed in Restore", phase: "restore", what: REMOVE_FLAG, ..BASE },
    Case {
        name: "Ctrl-C twice in Standby",
        phase: "standby",
        what: What::Signals(Signal::SIGINT),
        client: 20,
        exit: 20,
        ..BASE
    },
    Case { name: "Ctrl-C twice in Restore", phase: "restore", what: What::Signals(Signal::SIGINT), client: 12, ..BASE },
    Case { name: "lost terminal", phase: "standby", what: What::Signals(Signal::SIGHUP), ..BASE },
    Case {
        phase: "arm",
        what: What::Shell("if ovs-graceful restart > /dev/null 2>&1; then false; else test $? = 11; fi"),
        ..BASE
    },
    Case {
        name: "the clock is set",
        prepare: &["date +%s > /run/lab-now; cut -d. -f1 /proc/uptime > /run/lab-up"],
        phase: "standby",
        what: What::Shell("date -s '+3 hours'; sleep 2; date -s '-1 day'"),
        heal: "date -s @$(($(cat /run/lab-now) + $(cut -d. -f1 /proc/uptime) - $(cat /run/lab-up)))",
        ..BASE
    },
    Case {
        name: "ovs-vsctl adds in Arm",
        phase: "arm",
        what: What::Shell(
            "ovs-vsctl set bridge br0 external_ids:lab=yes -- add-port br0 v-ns4 -- add-br br1 \
             -- set bridge br1 fail_mode=secure; ovs-ofctl add-flow br1 cookie=0x777,actions=NORMAL",
        ),
        holds: &[
            "ovs-vsctl get bridge br0 external_ids:lab | grep -w yes",
            "ip netns exec ns4 ping -q -c 3 -W 2 10.9.0.2",
            "ovs-ofctl dump-flows br1 cookie=0x777/-1 | grep 0x777",
        ],
        changes: true,
        ..BASE
    },
    Case {
        name: "ovs-vsctl removes in Restore",
        phase: "restore",
        what: What::Shell(
            "ovs-vsctl --no-wait del-port br0 v-ns4 -- del-br br1 -- set open_vswitch . other_config:max-idle=15000",
        ),
        holds: &[
            "ovs-vsctl get open_vswitch . other_config:max-idle | grep 15000",
            "! ovs-dpctl show | grep -w -e v-ns4 -e br1",
        ],
        changes: true,
        ..BASE
    },
    Case {
        name: "ovs-vsctl adds in Restore",
        phase: "restore",
        what: What::Shell("ovs-vsctl --no-wait add-port br0 v-ns4 -- add-br br2"),
        holds: &["ip netns exec ns4 ping -q -c 3 -W 2 10.9.0.2", "ovs-ofctl show br2"],
        changes: true,
        ..BASE
    },
    Case {
        name: "ovs-vsctl removes in Arm",
        phase: "arm",
        what: What::Shell("ovs-vsctl del-port br0 v-ns4 -- del-br br2"),
        holds: &["! ovs-dpctl show | grep -w -e v-ns4 -e br2"],
        changes: true,
        ..BASE
    },
    Case {
        // 24.03.8, 25.03.3, 25.09.3 and 26.03.1 leave it set on a chassis of a gateway.
        name: "OVN's own flow-restore-wait",
        prepare: &[OVN_WAITS],
        holds: &[
            "ovs-vsctl get open_vswitch . external_ids:ovn-managed-flow-restore-wait | grep true",
            "ovs-vsctl get open_vswitch . other_config:flow-restore-wait | grep true",
            "ovs-graceful status",
            "ovs-graceful check",
            OVN_ENDS,
        ],
        phase: "standby",
        ..BASE
    },
    Case {
        // As where somebody has removed the flag by hand.
        name: "OVN's key without its flag",
        prepare: &["ovs-vsctl set open_vswitch . external_ids:ovn-managed-flow-restore-wait=true"],
        holds: &[
            "ovs-vsctl get open_vswitch . external_ids:ovn-managed-flow-restore-wait | grep true",
            "! ovs-vsctl get open_vswitch . other_config | grep flow-restore-wait",
            OVN_ENDS,
        ],
        phase: "standby",
        ..BASE
    },
    Case {
        // The versions after those.
        name: "OVN deletes its flow-restore-wait",
        prepare: &[OVN_WAITS],
        phase: "arm",
        what: What::Shell(
            "systemd-run -q --unit=lab-ovn sh -c 'while sleep 0.02; do \
               ovs-vsctl --no-wait get open_vswitch . external_ids:ovn-managed-flow-restore-wait 2>&1 | grep -q true && \
               ovs-vsctl --no-wait remove open_vswitch . other_config flow-restore-wait \
                 -- remove open_vswitch . external_ids ovn-managed-flow-restore-wait; done'",
        ),
        heal: "systemctl stop lab-ovn",
        ..BASE
    },
    Case {
        name: "a schema that cannot be had",
        arguments: &[],
        prepare: &[KEEP_SCHEMA, "sed -i 's/\"version\": \"[0-9.]*\"/\"version\": \"9.0.0\"/; s/\"Bridge\": {/\"Lost\": {/' /usr/share/openvswitch/vswitch.ovsschema"],
        client: 10,
        tidy: RESTORE_SCHEMA,
        ..BASE
    },
    Case {
        name: "a newer schema",
        arguments: &[],
        prepare: &[
            KEEP_SCHEMA,
            "sed -i 's/\"version\": \"[0-9.]*\"/\"version\": \"9.0.0\"/; \
                     0,/\"columns\": {/s//\"columns\": { \"lab_added\": { \"type\": \"string\" },/' /usr/share/openvswitch/vswitch.ovsschema",
        ],
        phase: "arm",
        holds: &[
            "ovsdb-client get-schema-version unix:/run/openvswitch/db.sock Open_vSwitch | grep -x 9.0.0",
            "ovsdb-client list-columns unix:/run/openvswitch/db.sock Open_vSwitch | grep lab_added",
            "ovs-vsctl --if-exists get bridge br0 name | grep br0",
        ],
        tidy: RESTORE_SCHEMA,
        ..BASE
    },
];

impl Disturbed {
    fn cases<'a>(&'a self, arguments: &'a [String]) -> impl Iterator<Item = &'static Case> + 'a {
        CASES.iter().filter(|case| is_chosen(case.name, arguments, self.whole, &SAMPLED))
    }
}

impl Custom for Disturbed {
    fn name(&self) -> &'static str {
        match self.whole {
            true => "disturbed_whole",
            false => "disturbed",
        }
    }

    fn about(&self) -> &'static str {
        match self.whole {
            true => "in the midst of a run: disk full or failing, Ctrl-C, a second run, the clock, ovs-vsctl",
            false => "disturbed_whole, one case of each kind",
        }
    }

    fn by_hand(&self) -> bool {
        self.whole
    }

    fn runs(&self, arguments: &[String]) -> Result<u32> {
        Ok(self.cases(arguments).count() as u32)
    }

    fn run(&self, job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        network::attach("ns4", "br0", "10.9.0.4/24", "")?;
        shell("ovs-vsctl del-port br0 v-ns4")?;
        for case in self.cases(&job.extra_args) {
            say(&format!("disturbed: {}", case.name));
            one(case, out, outcome).with_context(|| format!("disturbed: {}", case.name))?;
        }
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

fn one(case: &Case, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let check = |what: &str| format!("{}: {what}", case.name);
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(2));
    case.prepare.iter().try_for_each(|step| shell(step).map(drop))?;
    let rules = facts::promised(&plain::bridges());
    let daemons = facts::daemons("ovs-vswitchd");
    let known = run::known();
    let log = out.join(format!("run-{}", case.name.replace(' ', "-")));
    let mut client = run::start_with(case.arguments, &[], &log)?;
    let happened = match case.phase {
        "" => Ok(None),
        phase => happen(case, phase, &known, &client).map(Some),
    };
    let code = client.wait()?.code();
    let id = happened?;
    let said = fs::read_to_string(&log)?;
    outcome.check(check("exit code of the client"), code == Some(case.client), &said);
    match id {
        None => outcome.check(
            check("names a remedy"),
            said.to_lowercase().contains("remedy") || said.contains("free some space"),
            &said,
        ),
        Some(id) => ended(case, &id, outcome)?,
    }
    let same = facts::daemons("ovs-vswitchd") == daemons;
    let untouched = matches!(case.client, 10 | 20);
    outcome.check(check("the right ovs-vswitchd"), same == untouched, facts::daemons("ovs-vswitchd"));
    std::thread::sleep(Duration::from_secs(2));
    let healed = shell_lenient(case.heal);
    for line in case.holds {
        let held = shell(line);
        outcome.check(check(line), held.is_ok(), format!("{healed}{held:?}"));
    }
    aftermath::nothing_left(case.name, outcome);
    aftermath::owned(case.name, outcome);
    if !case.changes {
        aftermath::as_before(case.name, &rules, outcome);
    }
    aftermath::new_traffic_passes(case.name, outcome);
    shell(case.tidy)?;
    aftermath::finish(case.name, live, false, outcome).map(drop)
}

/// Returns the id of the run.
fn happen(case: &Case, phase: &str, known: &[String], client: &Child) -> Result<String> {
    let id = run::wait_for(phase, known)?;
    match case.what {
        What::Shell(script) => drop(shell(script)?),
        What::Signals(signal) => {
            let client = Pid::from_raw(i32::try_from(client.id())?);
            kill(client, signal)?;
            std::thread::sleep(Duration::from_millis(300));
            // It may have ended by the first.
            let _gone_is_fine = kill(client, signal);
        }
    }
    ensure!(phase != "arm" || !run::has_begun(&id, "switch-prepare"), "the run was faster than what happened to it");
    Ok(id)
}

/// Waits for the end of the run, which may have lost its client, and judges its report.
fn ended(case: &Case, id: &str, outcome: &mut Outcome) -> Result<()> {
    run::wait_until_unit_gone(Duration::from_secs(60))?;
    let shown = shell(&format!("ovs-graceful runs show {id} --json"))?;
    let report: Value = serde_json::from_str(&shown)?;
    outcome.check(format!("{}: exit code of the report", case.name), report["exit_code"] == case.exit, &report);
    if let Some(limit) = case.gap_below_ms {
        let gap = &report["gap_ms"];
        outcome.check(format!("{}: gap", case.name), gap.as_f64().is_some_and(|gap| gap < limit), gap);
    }
    Ok(())
}

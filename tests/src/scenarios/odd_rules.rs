//! Rules that OpenFlow's highest version does not tell as the daemon has them come back by another version. Those that no
//! version of their bridge tells cost nothing but themselves: before the point of no return the run ends undone, and names
//! them; after it, and on the way back, all others are in place.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::{json, Value};

use super::{aftermath, is_chosen, network, plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct OddRules {
    whole: bool,
}

/// Every case.
pub const WHOLE: OddRules = OddRules { whole: true };
/// Those of [`SAMPLED`].
pub const SAMPLE: OddRules = OddRules { whole: false };

/// Before a run, in the midst of one, and on each of its ways out.
const SAMPLED: [&str; 7] = [
    "rules of OpenFlow 1.0",
    "rules of OpenFlow 1.0 on a bridge of 1.3 alone",
    "groups of OpenFlow 1.0",
    "added while the run stands by",
    "a table that is too full",
    "a table that is too full, on the way back",
    "a table that is too full, in a recovery",
];

struct Case {
    name: &'static str,
    /// Makes the rules.
    prepare: &'static str,
    /// The phase in which something happens.
    phase: &'static str,
    what: What,
    exit: i32,
    /// Must be in what the report says: of the reason, the warnings, or the differences.
    named: &'static [&'static str],
    /// `ovs-graceful check` says the same beforehand, and ends with 10.
    checked: bool,
    /// Rules, in the words of `dump-flows`, that are gone afterwards; all others are there.
    gone: &'static [&'static str],
    /// Takes the rules away again.
    tidy: &'static str,
}

enum What {
    Nothing,
    Shell(&'static str),
    /// The new ovs-vswitchd is killed.
    NewDies,
    /// The supervisor is killed.
    SupervisorDies,
}

const BASE: Case = Case {
    name: "",
    prepare: "true",
    phase: "",
    what: What::Nothing,
    exit: 20,
    named: &[],
    checked: false,
    gone: &[],
    tidy: "ovs-ofctl del-flows br0 cookie=0x777/-1",
};

/// A bridge that speaks none of the versions in which its rules are told as it has them.
const ONLY_13: &str = "ovs-vsctl add-br br13 -- set bridge br13 protocols=OpenFlow10,OpenFlow13; ovs-ofctl del-flows br13; \
                       for r in priority=5,in_port=77,actions=strip_vlan,output:2 priority=5,in_port=78,actions=mod_vlan_vid:10 \
                         priority=5,vlan_tci=0x3000/0x3000,actions=drop priority=5,in_port=80,actions=dec_ttl,output:2; do \
                         ovs-ofctl add-flow br13 cookie=0x777,$r || exit 1; done; \
                       ovs-vsctl set bridge br13 protocols=OpenFlow13";
const STRIP: &str = "ovs-vsctl set bridge br0 protocols=OpenFlow10,OpenFlow15; \
                     ovs-ofctl add-flow br0 'cookie=0x777,priority=5,in_port=77,actions=strip_vlan,output:2'; \
                     ovs-vsctl set bridge br0 protocols=OpenFlow15";
/// A table that holds more than it may: the daemon that has the rules keeps them, another does not take all of them.
const FULL: &str =
    "for i in 1 2 3 4; do ovs-ofctl add-flow br0 \"cookie=0x777,table=5,priority=$i,actions=output:$i\"; done; \
                    ovs-vsctl -- --id=@ft create Flow_Table flow_limit=3 overflow_policy=refuse \
                                 -- set bridge br0 flow_tables:5=@ft";
const UNLIMIT: &str = "ovs-vsctl clear bridge br0 flow_tables; ovs-ofctl del-flows br0 cookie=0x777/-1";

const CASES: &[Case] = &[
    Case {
        name: "rules of OpenFlow 1.0",
        prepare: "for r in priority=5,in_port=77,actions=strip_vlan,output:2 priority=5,in_port=78,actions=mod_vlan_vid:10 \
                    priority=5,ip,in_port=79,actions=push_mpls:0x8847,set_field:10-\\>mpls_label,output:2 \
                    priority=5,vlan_tci=0x3000/0x3000,actions=drop priority=5,in_port=80,actions=dec_ttl,output:2 \
                    priority=5,in_port=81,send_flow_rem,idle_timeout=60000,actions=mod_nw_dst:10.9.0.9,output:2; do \
                    ovs-ofctl add-flow br0 cookie=0x777,$r || exit 1; done",
        exit: 0,
        ..BASE
    },
    Case {
        name: "rules of OpenFlow 1.0 on a bridge of 1.3 alone",
        prepare: ONLY_13,
        named: &["bridge br13", "in_port=77", "in_port=78", "vlan_tci=0x3000/0x3000", "in_port=80", "OFPBAC_MATCH_INCONSISTENT"],
        checked: true,
        tidy: "ovs-vsctl del-br br13",
        ..BASE
    },
    Case {
        name: "flags of rules that look alike",
        prepare: "ovs-ofctl -O OpenFlow13 add-flow br0 'cookie=0x777,priority=5,in_port=90,actions=load:5->NXM_NX_REG0[]'; \
                  ovs-ofctl add-flow br0 cookie=0x777,priority=5,in_port=91,actions=strip_vlan; \
                  ovs-ofctl add-flow br0 cookie=0x777,priority=5,in_port=92,send_flow_rem,actions=strip_vlan",
        exit: 0,
        ..BASE
    },
    Case {
        name: "groups of OpenFlow 1.0",
        prepare: "g() { ovs-ofctl \"$@\" || exit 1; }; g add-group br0 'group_id=771,type=all,bucket=mod_vlan_vid:10,output:2'; \
                  g -O OpenFlow13 add-group br0 'group_id=772,type=all,bucket=push_vlan:0x8100,set_field:4106->vlan_vid,output:2'; \
                  g add-group br0 'group_id=773,type=select,bucket=weight=1,mod_vlan_vid:10,output:2,bucket=weight=1,mod_vlan_vid:11,output:3'; \
                  g add-group br0 'group_id=774,type=ff,bucket=watch_port:1,mod_vlan_vid:12,output:2,bucket=watch_port:2,mod_vlan_vid:13,output:3'; \
                  g add-flow br0 cookie=0x777,priority=5,in_port=77,actions=group:771,group:772",
        exit: 0,
        named: &["bridge br0", "group_id=774"],
        tidy: "ovs-ofctl del-flows br0 cookie=0x777/-1; for g in 771 772 773 774; do ovs-ofctl del-groups br0 group_id=$g; done",
        ..BASE
    },
    Case {
        name: "a group of OpenFlow 1.0 on a bridge of 1.3 alone",
        prepare: "ovs-vsctl add-br br13; ovs-ofctl del-flows br13; \
                  ovs-ofctl add-group br13 'group_id=771,type=all,bucket=mod_vlan_vid:10,output:2'; \
                  ovs-vsctl set bridge br13 protocols=OpenFlow13",
        named: &["bridge br13", "group_id=771", "tells its mod_vlan_vid as push_vlan"],
        checked: true,
        tidy: "ovs-vsctl del-br br13",
        ..BASE
    },
    Case {
        name: "how a group of OpenFlow 1.0 selects",
        prepare: "ovs-vsctl add-br br13 -- set bridge br13 protocols=OpenFlow10,OpenFlow13; ovs-ofctl del-flows br13; \
                  ovs-ofctl add-group br13 'group_id=771,type=select,selection_method=hash,bucket=bucket_id=1,weight=1,mod_vlan_vid:10,output:2'",
        exit: 0,
        tidy: "ovs-vsctl del-br br13",
        ..BASE
    },
    Case {
        name: "OpenFlow 1.1 and registers",
        prepare: "ovs-vsctl add-br br11; ovs-ofctl del-flows br11; ovs-ofctl add-flow br11 priority=5,reg0=0x5,actions=drop; \
                  ovs-ofctl -O OpenFlow11 add-flow br11 table=3,priority=5,tcp,actions=write_metadata:5,goto_table:4; \
                  ovs-ofctl -O OpenFlow11 add-group br11 group_id=3,type=all,bucket=output:1; \
                  ovs-ofctl -O OpenFlow11 add-flow br11 table=4,priority=6,actions=group:3; \
                  ovs-vsctl set bridge br11 protocols=OpenFlow11",
        exit: 0,
        tidy: "ovs-vsctl del-br br11",
        ..BASE
    },
    Case {
        name: "added while the run stands by",
        phase: "standby",
        what: What::Shell(STRIP),
        named: &["bridge br0", "in_port=77", "OFPBAC_MATCH_INCONSISTENT"],
        tidy: "ovs-vsctl clear bridge br0 protocols; ovs-ofctl del-flows br0 cookie=0x777/-1",
        ..BASE
    },
    Case {
        name: "OpenFlow 1.0, tables, registers and a group",
        prepare: "ovs-vsctl add-br br10 -- set bridge br10 protocols=OpenFlow10; ovs-ofctl del-flows br10; printf \
                  'priority=1,actions=strip_vlan\\ntable=1,priority=3,actions=drop\\npriority=4,reg0=5,actions=mod_vlan_vid:7,NORMAL\\n' \
                  | ovs-ofctl add-flows br10 -; ovs-ofctl add-group br10 group_id=7,type=all,bucket=output:1; \
                  ovs-ofctl add-flow br10 table=2,priority=5,actions=group:7",
        exit: 0,
        tidy: "ovs-vsctl del-br br10",
        ..BASE
    },
    Case {
        name: "a table that is too full",
        prepare: FULL,
        exit: 30,
        named: &["bridge br0", "table=5", "OFPFMFC_TABLE_FULL"],
        gone: &["table=5, priority=4"],
        tidy: UNLIMIT,
        ..BASE
    },
    Case {
        name: "a table that is too full, on the way back",
        prepare: FULL,
        phase: "restore",
        what: What::NewDies,
        exit: 21,
        named: &["bridge br0", "table=5", "OFPFMFC_TABLE_FULL"],
        gone: &["table=5, priority=4"],
        tidy: UNLIMIT,
        ..BASE
    },
    Case {
        name: "a table that is too full, in a recovery",
        prepare: FULL,
        phase: "restore",
        what: What::SupervisorDies,
        exit: 21,
        named: &["bridge br0", "table=5", "OFPFMFC_TABLE_FULL"],
        gone: &["table=5, priority=4"],
        tidy: UNLIMIT,
        ..BASE
    },
];

impl OddRules {
    fn cases<'a>(&'a self, arguments: &'a [String]) -> impl Iterator<Item = &'static Case> + 'a {
        CASES.iter().filter(|case| is_chosen(case.name, arguments, self.whole, &SAMPLED))
    }
}

impl Custom for OddRules {
    fn name(&self) -> &'static str {
        match self.whole {
            true => "odd_rules_whole",
            false => "odd_rules",
        }
    }

    fn about(&self) -> &'static str {
        match self.whole {
            true => "rules that cannot be put back: named, and nothing else is lost",
            false => "odd_rules_whole, one case of each kind",
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
        for case in self.cases(&job.extra_args) {
            say(&format!("odd_rules: {}", case.name));
            one(case, out, outcome).with_context(|| format!("odd_rules: {}", case.name))?;
        }
        aftermath::no_unit_failed(outcome);
        Ok(())
    }
}

fn one(case: &Case, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let check = |what: &str| format!("{}: {what}", case.name);
    shell(case.prepare)?;
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(2));
    if case.checked {
        let said = shell_lenient("ovs-graceful check; echo exit=$?");
        let right = said.contains("exit=10") && case.named.iter().all(|word| said.contains(word));
        outcome.check(check("check names it"), right, said);
    }
    let bridges = shell("ovs-vsctl list-br")?.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let before = (facts::daemons("ovs-vswitchd"), rules(&bridges));
    let known = run::known();
    let mut client = run::start(&[], &out.join(format!("run-{}", case.name.replace([' ', ','], "-"))))?;
    let happened = happen(case, &known, &before.0);
    let code = client.wait()?.code();
    let id = happened?;
    let id = id.or_else(|| run::known().into_iter().find(|id| !known.contains(id))).context("there was no run")?;
    if matches!(case.what, What::SupervisorDies) {
        run::wait_for_recovery(&id)?;
        run::wait_until_unit_gone(Duration::from_secs(60))?;
        run::wait_until_no_job(Duration::from_secs(60))?;
    }
    let report: Value = serde_json::from_str(&fs::read_to_string(run::report(&id))?)?;
    outcome.note(check("report"), &report);
    let killed = matches!(case.what, What::SupervisorDies);
    let right = report["exit_code"] == case.exit && (killed || code == Some(case.exit));
    outcome.check(check("exit code"), right, json!([code, report["exit_code"]]));
    std::thread::sleep(Duration::from_secs(2));
    let after = (facts::daemons("ovs-vswitchd"), rules(&bridges));
    judge(case, &report, &before, &after, outcome);
    aftermath::nothing_left(case.name, outcome);
    aftermath::owned(case.name, outcome);
    aftermath::new_traffic_passes(case.name, outcome);
    aftermath::finish(case.name, live, killed, outcome)?;
    shell(case.tidy).map(drop)
}

type Seen = (Vec<facts::Daemon>, Vec<String>);

fn judge(case: &Case, report: &Value, before: &Seen, after: &Seen, outcome: &mut Outcome) {
    let check = |what: &str| format!("{}: {what}", case.name);
    let said = format!("{} {} {}", report["reason"], report["warnings"], report["differences"]);
    let lacking: Vec<&&str> = case.named.iter().filter(|word| !said.contains(**word)).collect();
    outcome.check(check("what cannot be put back is named"), lacking.is_empty(), json!([lacking, said]));
    let same = before.0 == after.0;
    outcome.check(
        check("another daemon only where the run came so far"),
        same == (case.exit == 20),
        json!([before.0, after.0]),
    );
    let lost = |rule: &&String| case.gone.iter().any(|gone| rule.contains(gone));
    let added = |rule: &&String| matches!(case.what, What::Shell(_)) && rule.contains("in_port=77");
    let wanted: Vec<&String> = before.1.iter().filter(|rule| !lost(rule)).collect();
    let there: Vec<&String> = after.1.iter().filter(|rule| !added(rule)).collect();
    outcome.check(check("all other rules are in place"), wanted == there, json!([wanted, there]));
    if !case.gone.is_empty() {
        let differences = report["differences"].to_string();
        let named = case.gone.iter().all(|gone| gone.split(", ").all(|field| differences.contains(field)));
        outcome.check(check("what is missing is a difference"), named, differences);
    }
}

/// The flows as the daemon itself has them, without counters.
fn rules(bridges: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    for bridge in bridges {
        // By the first of these versions that the bridge speaks; only later ones tell `reset_counts`.
        let dump = format!(
            "for v in 10 11 12 13 14 15; do timeout 60 ovs-ofctl -O OpenFlow$v --no-stats dump-flows {bridge} \
             2> /dev/null && break; done | sed 's/reset_counts //'"
        );
        all.extend(
            shell_lenient(&dump)
                .lines()
                .filter(|l| l.contains("actions="))
                .map(|line| format!("{bridge}: {}", line.trim())),
        );
        // In the daemon's own words: OpenFlow cannot tell, for example, whether a tag is pushed.
        let own = shell_lenient(&format!(
            "timeout 60 ovs-appctl bridge/dump-flows {bridge} | sed 's/duration=[^ ]* n_packets=[^ ]* n_bytes=[^ ]* //'; \
             timeout 60 ovs-ofctl dump-groups {bridge} 2> /dev/null | grep group_id= | while read -r group; do \
             echo \"$group\"; group=${{group%%,*}}; timeout 60 ovs-appctl ofproto/trace-packet-out {bridge} \
             in_port=LOCAL,dp_hash=1,tcp,nw_ttl=64 group:${{group#*=}} < /dev/null | grep -E 'bucket|vlan|actions:' | \
             sed \"s/^/$group: /\"; done"
        ));
        all.extend(own.lines().map(|line| format!("{bridge} itself: {}", line.trim().replace("table_id=", "table="))));
    }
    all.sort();
    all
}

fn happen(case: &Case, known: &[String], before: &[facts::Daemon]) -> Result<Option<String>> {
    if case.phase.is_empty() {
        return Ok(None);
    }
    let id = run::wait_for(case.phase, known)?;
    match case.what {
        What::Nothing => {}
        What::Shell(script) => drop(shell(script)?),
        What::NewDies => {
            for daemon in facts::daemons("ovs-vswitchd").iter().filter(|daemon| !before.contains(daemon)) {
                kill(Pid::from_raw(i32::try_from(daemon.pid)?), Signal::SIGKILL)?;
            }
        }
        What::SupervisorDies => kill(run::supervisor()?, Signal::SIGKILL)?,
    }
    Ok(Some(id))
}

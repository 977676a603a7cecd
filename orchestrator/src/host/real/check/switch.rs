//! What ovs-vswitchd was told by others than the database and forgets when it ends, where that is not put back.

use std::path::Path;
use std::time::Instant;

use crate::host::kept::printable;
use crate::host::real::command;
use crate::host::real::openflow::OVS_OFCTL;
use crate::host::real::parallel::side_by_side;
use crate::host::{Bridge, Daemon, Daemons, DatabaseFacts};
use crate::report::{Findings, Name};

/// Where the bridges' management sockets are.
const RUN_DIRECTORY: &str = "/run/openvswitch";
/// So many ports or rules are named; the rest is counted.
const NAMED: usize = 3;

/// Looks at the running daemon, bridges and ports.
pub(super) fn look(
    daemons: &dyn Daemons,
    vswitchd: &Daemon,
    facts: &DatabaseFacts,
    until: Instant,
    found: &mut Findings,
) {
    // Its length does not grow with the flows, as that of a dump does.
    let shown = daemons.command(vswitchd, "upcall/show", &[], until).unwrap_or_default();
    let offloads = offloads(&shown);
    judge_offload(offloads, facts.is_on("hw-offload"), found);
    let told = |command: &str| daemons.command(vswitchd, command, &[], until).unwrap_or_default();
    judge_by_hand(&shown, &told("ovs/route/show"), &told("cfm/show"), found);
    let kernel = facts.bridges.iter().filter(|bridge| bridge.is_of_kernel());
    let bridges: Vec<Bridge> = kernel.cloned().collect();
    // A program for each of hundreds of bridges: what else is looked at needs its time, too.
    let now = Instant::now();
    let soon = now + until.saturating_duration_since(now) / 3;
    let in_time = |bridge: &Bridge| (Instant::now() < soon).then(|| rules(bridge, until));
    let told = side_by_side(&bridges, |bridge| Ok(in_time(bridge))).unwrap_or_default();
    let unasked = told.iter().filter(|told| told.is_none()).count();
    for (bridge, told) in bridges.iter().zip(told) {
        judge(&format!("bridge {}", bridge.name), &told.unwrap_or_default(), found);
    }
    if unasked > 0 {
        let cause = format!(
            "{unasked} of {} were not asked, for lack of time, for rules that a restart changes",
            bridges.len()
        );
        found.warn(Name::Bridges, "database", cause, "none: the host is busy; a quieter hour, or a longer `check_ms`");
    }
}

/// Does the daemon offload flows of the kernel's datapath? It tells how many it has only where it may have some
/// (`upcall_unixctl_show`, ofproto/ofproto-dpif-upcall.c: OVS 2.15 to 3.6 also where it has none now).
fn offloads(shown: &str) -> bool {
    let mut datapath = "";
    shown.lines().any(|line| {
        if let Some(name) = line.strip_suffix(':').filter(|name| !name.starts_with(' ')) {
            datapath = name;
        }
        datapath.starts_with("system@") && line.trim_start().starts_with("offloaded flows")
    })
}

/// What was set by commands, and what shows it: `upcall/show`, `ovs/route/show` and `cfm/show`
/// (`upcall_unixctl_show`, ofproto/ofproto-dpif-upcall.c; `ovs_router_show`, lib/ovs-router.c; `cfm_print_details`,
/// lib/cfm.c).
fn judge_by_hand(upcalls: &str, routes: &str, cfm: &str, found: &mut Findings) {
    let mut warn = |cause: String| {
        found.warn(
            Name::OvsVswitchd,
            "ovs-vswitchd",
            cause,
            "none: it is lost in any restart; set it again afterwards",
        );
    };
    let routes: Vec<String> = routes.lines().filter_map(|line| line.strip_prefix("User: ")).map(printable).collect();
    if !routes.is_empty() {
        warn(format!("routes were added by hand (ovs/route/add): {}", named(&routes)));
    }
    // The first line of each: `---- NAME ----`.
    let name = |line: &str| line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" ----")).map(printable);
    let mut last = String::new();
    let mut forced = Vec::new();
    for line in cfm.lines() {
        if let Some(name) = name(line) {
            last = name;
        } else if line.starts_with("MPID") && line.ends_with("fault_override") {
            forced.push(last.clone());
        }
    }
    if !forced.is_empty() {
        warn(format!("the fault of CFM was forced by hand (cfm/set-fault): {}", named(&forced)));
    }
    if upcalls.lines().any(|line| line.trim() == "ufid enabled : false") {
        warn("UFIDs were switched off by hand (upcall/disable-ufid)".to_owned());
    }
}

/// What the database asks for holds from the next start on; what it asks for is told of the database.
fn judge_offload(offloads: bool, asked_for: bool, found: &mut Findings) {
    if offloads && !asked_for {
        let cause =
            "it offloads flows until it is restarted, although hw-offload is off now: they live in TC filters, \
                     which a freeze of the datapath does not reach";
        found.refuse(Name::HwOffload, "ovs-vswitchd", cause, "`ovs-graceful restart --plain`");
    }
}

/// The rules of a bridge as ovs-ofctl prints them, where it does not speak OpenFlow 1.0. What cannot be read is empty: the
/// run reads the rules again, and fails if it cannot.
fn rules(bridge: &Bridge, until: Instant) -> String {
    if bridge.protocols.is_empty() || bridge.protocols.iter().any(|version| version == "OpenFlow10") {
        return String::new();
    }
    let target = format!("unix:{}", Path::new(RUN_DIRECTORY).join(format!("{}.mgmt", bridge.name)).display());
    let versions = bridge.protocols.join(",");
    let words = ["-O", &versions, "--no-stats", "--no-names", "dump-flows", &target];
    command::run_well(OVS_OFCTL, &words, None, until).unwrap_or_default()
}

fn judge(object: &str, rules: &str, found: &mut Findings) {
    let rules: Vec<String> = rules.lines().filter(|line| has_hard_timeout(line)).map(str::to_owned).collect();
    if !rules.is_empty() {
        let cause = format!(
            "rules have a hard_timeout, and the bridge does not speak OpenFlow 1.0, which alone tells when a rule was \
             changed: {}",
            named(&rules)
        );
        let remedy = "none where they never change; one that was changed ends as if it had not been";
        found.warn(Name::HardTimeout, object, cause, remedy);
    }
}

/// The first few, and how many more.
pub(super) fn named(all: &[String]) -> String {
    let first = all.iter().take(NAMED).map(|text| text.trim()).collect::<Vec<_>>().join("; ");
    match all.len().saturating_sub(NAMED) {
        0 => first,
        more => format!("{first}; and {more} more"),
    }
}

fn has_hard_timeout(rule: &str) -> bool {
    // What is in the actions (`learn`) is about other rules.
    rule.split("actions=").next().is_some_and(|head| head.contains("hard_timeout="))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_there_is_named() {
        let names = |rules: &str| {
            let mut found = Findings::default();
            judge("bridge br0", rules, &mut found);
            found.into_inner().into_iter().map(|one| one.name).collect::<Vec<_>>()
        };
        assert_eq!(names(""), []);
        assert_eq!(names(" priority=1 actions=learn(hard_timeout=5,output:1)\n"), []);
        assert_eq!(names(" hard_timeout=60, priority=1 actions=drop\n"), [Name::HardTimeout]);
    }

    #[test]
    fn what_was_set_by_commands_is_named() {
        let judged = |upcalls: &str, routes: &str, cfm: &str| {
            let mut found = Findings::default();
            judge_by_hand(upcalls, routes, cfm, &mut found);
            found.into_inner().into_iter().map(|one| one.cause).collect::<Vec<_>>()
        };
        let plain = [
            "system@ovs-system:\n  ufid enabled : true\n",
            "Route Table:\nCached: 127.0.0.1/32 dev lo SRC 127.0.0.1 local\n",
        ];
        let cfm = "---- v1 ----\nMPID 7:\n\taverage health: 100\n";
        assert_eq!(judged(plain[0], plain[1], cfm), Vec::<String>::new());
        let route = "Route Table:\nUser: 192.0.2.0/24 dev br0 SRC 10.0.0.1\n";
        let forced = "---- v1 ----\nMPID 7:\n---- v2 ----\nMPID 8: extended fault_override\n\tfault: override\n";
        let found = judged(&plain[0].replace("true", "false"), route, forced);
        assert!(found[0].ends_with("192.0.2.0/24 dev br0 SRC 10.0.0.1"), "{found:?}");
        assert!(found[1].ends_with(": v2") && found[2].contains("UFID") && found.len() == 3, "{found:?}");
    }

    #[test]
    fn more_than_a_few_are_counted() {
        let all: Vec<String> = (0..5).map(|n| format!("p{n}")).collect();
        assert_eq!(named(&all), "p0; p1; p2; and 2 more");
        assert_eq!(named(&all[..2]), "p0; p1");
    }

    #[test]
    fn a_daemon_that_still_offloads_is_refused() {
        let shown = |name: &str, count: &str| {
            format!(
                "{name}:\n  flows         : (current 3) (avg 3) (max 5) (limit 10000)\n{count}  dump duration : 1ms\n"
            )
        };
        let count = "  offloaded flows : 2\n";
        assert!(offloads(&shown("system@ovs-system", count)) && !offloads(&shown("system@ovs-system", "")));
        // Of the other datapath, behind ours.
        let both = shown("system@ovs-system", "") + &shown("netdev@ovs-netdev", count);
        assert!(!offloads(&both) && !offloads(""));
        let judged = |offloads, asked_for| {
            let mut found = Findings::default();
            judge_offload(offloads, asked_for, &mut found);
            found.into_inner().pop().map(|one| (one.name, one.remedy))
        };
        assert_eq!(judged(true, false), Some((Name::HwOffload, "`ovs-graceful restart --plain`".to_owned())));
        // The database's finding has that as well.
        assert_eq!((judged(true, true), judged(false, false)), (None, None));
    }
}

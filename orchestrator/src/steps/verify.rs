//! Verify: is everything as it was? Before against after, by meaning.

use std::time::Duration;

use anyhow::Context;

use dpfreeze::snapshot::Snapshot;

use super::{bridges, by_hand, devices, features, notes, ports, Ended, Run, Step, Stop};
use crate::config::Config;
use crate::conntrack::Conntrack;
use crate::host::state::lost;
use crate::host::DatabaseFacts;
use crate::inventory::{self, Comparison};
use crate::machine::{Event, Phase};

pub(super) struct Verify;

impl Step for Verify {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Verify)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        let until = run.deadline;
        let kernel = run.host.datapath.snapshot().context("the datapath's state")?;
        let facts = run.host.database.facts(until).context("the database")?;
        let mut now = Now { kernel, facts };
        for comparison in inventory::compared(Phase::Verify) {
            compare(run, comparison, &mut now)?;
            run.checkpoint()?;
        }
        match run.report.differences.is_empty() {
            true => Ok(Event::Done),
            false => Ok(Event::DifferencesFound),
        }
    }
}

/// What is there now.
struct Now {
    kernel: Snapshot,
    facts: DatabaseFacts,
}

/// What is not as it was is a difference.
fn compare(run: &mut Run, comparison: Comparison, now: &mut Now) -> Result<(), Stop> {
    match comparison {
        Comparison::Conntrack => compare_conntrack(run, now),
        Comparison::Kernel => {
            compare_kernel(run, now);
            Ok(())
        }
        Comparison::Rules => compare_rules(run, now),
        Comparison::Bridges => compare_state(run),
        Comparison::Features => {
            compare_features(run);
            Ok(())
        }
        Comparison::ByHand => by_hand::compare(run),
        Comparison::Devices => {
            devices::compare(run, &now.facts);
            Ok(())
        }
        // In the phases that give and keep them: restore, gates, handover.
        Comparison::Addresses | Comparison::Flows | Comparison::Packets => Ok(()),
    }
}

fn compare_kernel(run: &mut Run, now: &Now) {
    let Some(before) = &run.known.before else { return };
    let reloads = run.wish.reloads_module();
    notes::after(&mut run.report, before, &now.kernel, &ports::wanted(&now.facts), reloads);
}

fn compare_rules(run: &mut Run, now: &Now) -> Result<(), Stop> {
    let until = run.deadline;
    bridges::forget_removed(run, &now.facts);
    let new = run.new_daemon()?.clone();
    let rules = bridges::despite_removals(run, |run| {
        run.host.openflow.snapshot(&new, &run.known.facts.bridges, until).context("OpenFlow rules")
    })?;
    notes::rules_after(&mut run.report, &run.known.rules, &rules, &run.known.refused);
    Ok(())
}

/// What was learned goes by itself, too: of that counts what the new daemon had taken when it was given.
fn compare_state(run: &mut Run) -> Result<(), Stop> {
    let (new, until) = (run.new_daemon()?.clone(), run.deadline);
    let now = bridges::despite_removals(run, |run| {
        run.host.openflow.state(&new, &run.known.facts.bridges, until).context("what bridges know besides rules")
    })?;
    let mut told = std::mem::take(&mut run.known.state_lost);
    told.extend(lost(&run.known.state, &now, |item| !item.is_learned()));
    told.sort_unstable();
    told.dedup();
    run.report.differences.extend(told);
    Ok(())
}

/// Zones by meaning; limits that were lost are set again, and the kernel has them from then on.
fn compare_conntrack(run: &mut Run, now: &mut Now) -> Result<(), Stop> {
    let Some(before) = &run.known.before else { return Ok(()) };
    let old = Conntrack::of(&run.known.facts, before);
    let lost = old.lost_limits(&Conntrack::of(&now.facts, &now.kernel));
    if !lost.is_empty() {
        run.host.datapath.set_ct_limits(&lost).context("setting conntrack limits again")?;
        run.report.conntrack.zone_limits_restored = lost.len() as u64;
        now.kernel = run.host.datapath.snapshot().context("the datapath's state")?;
    }
    run.report.differences.extend(old.zone_differences(&Conntrack::of(&now.facts, &now.kernel)));
    run.report.conntrack.connections_after = run.host.surroundings.connections();
    Ok(())
}

/// The same version on the same module finds what was found before; another version may know better, another module may
/// have less.
fn compare_features(run: &mut Run) {
    let same = run.report.from.ovs == run.report.to.ovs && !run.wish.reloads_module();
    for lost in features::lost(run) {
        match same {
            true => run.report.differences.push(format!("{lost}; remedy: ovs-graceful restart")),
            false => run.warn(lost),
        }
    }
}

//! Restore: the new daemon's own timeout policies. OVS 3.3 and later make none for a zone that is in the database when
//! they start: `ct_zones_reconfigure` (vswitchd/bridge.c) compares the row with the copy that it has just taken of it.
//! They do as soon as the row changes, so it is changed, by a key that the kernel has no limit for, and changed back.
//! Both before a packet needs a policy: the one that is made in between goes again.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{database_disk, Run, Stop};
use crate::host::zones::PolicyIndex;
use crate::host::CtZone;

/// The daemon carries out a change of the database at its next turn.
const PATIENCE: Duration = Duration::from_secs(3);

/// Names of timeout policies.
type Names = BTreeSet<String>;

/// Sees to it that each zone with a policy in the database has one that this daemon has made. A zone without costs
/// connections their timeouts, not packets: it is a warning.
pub(super) fn make(run: &mut Run) -> Result<(), Stop> {
    // An earlier try may have been cut off half-done.
    change_back(run)?;
    let zones: Vec<CtZone> = run.known.facts.ct_zones.iter().filter(|zone| zone.timeouts.is_some()).cloned().collect();
    let Some(before) = run.known.before.as_ref().filter(|_| !zones.is_empty()) else { return Ok(()) };
    let old: Names = before.timeout_policies.iter().map(|policy| policy.name.clone()).collect();
    let missing = without_policy(run, &zones, &old)?;
    if missing.is_empty() {
        return Ok(());
    }
    let numbers: Vec<u16> = missing.iter().map(|zone| zone.zone).collect();
    let until = run.deadline;
    run.known.policies_touched = true;
    database_disk::write(run, until, |database| database.touch_policies(&numbers, until))?;
    let made = wait_for_policies(run, &missing, &old)?;
    let between = names(run)?;
    change_back(run)?;
    if !made || !wait_for_policies(run, &missing, &between)? {
        run.warn(format!(
            "new connections of zone {} ({} zones in all) may have the system's timeouts: ovs-vswitchd has made no timeout \
             policy for them; remedy: change a timeout of theirs and change it back (docs/conntrack.md)",
            numbers.first().unwrap_or(&0),
            numbers.len()
        ));
    }
    run.report.details.insert("zones_asked_for".into(), numbers.len().into());
    Ok(())
}

fn change_back(run: &mut Run) -> Result<(), Stop> {
    if run.known.policies_touched {
        let until = run.deadline;
        database_disk::write(run, until, |database| database.clear_touched_policies(until))?;
        run.known.policies_touched = false;
    }
    Ok(())
}

/// Waits until each of `zones` has a policy whose name is not among `known`; false where patience ends first.
fn wait_for_policies(run: &mut Run, zones: &[CtZone], known: &Names) -> Result<bool, Stop> {
    let end = run.deadline.min(run.now() + PATIENCE);
    run.wait_until(end, |run| Ok(without_policy(run, zones, known)?.is_empty()))
}

fn without_policy(run: &mut Run, zones: &[CtZone], known: &Names) -> Result<Vec<CtZone>, Stop> {
    let mut policies = run.host.datapath.timeout_policies()?;
    policies.retain(|policy| !known.contains(&policy.name));
    let index = PolicyIndex::of(&policies);
    let missing = |zone: &&CtZone| zone.timeouts.as_ref().is_some_and(|row| index.saying(row).is_empty());
    Ok(zones.iter().filter(missing).cloned().collect())
}

fn names(run: &mut Run) -> Result<Names, Stop> {
    Ok(run.host.datapath.timeout_policies()?.into_iter().map(|policy| policy.name).collect())
}

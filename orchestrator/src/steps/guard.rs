//! Timeout policies that connections live under outlive the run (hazards 30): begun at Arm, before anything is at
//! stake; widened when the freeze goes. A guard that cannot be had costs connections their timeouts, not packets: it is
//! a warning.

use dpfreeze::conntrack::zones_in_flows;

use super::Run;
use crate::guard::{start_looks, Guarded};
use crate::host::zones::zones_of_policies;

/// Begins to guard the policies that connections live under now.
pub(super) fn begin(run: &mut Run) {
    let Some(before) = &run.known.before else { return };
    let flows = before.datapaths.iter().flat_map(|datapath| &datapath.flows);
    let zones = zones_of_policies(&before.timeout_policies, &run.known.facts.ct_zones, &zones_in_flows(flows));
    if zones.is_empty() {
        return;
    }
    let terms = run.config.guard_terms();
    let begun = run.host.datapath.begin_guard(&run.id, &zones, terms).map_err(anyhow::Error::from);
    let begun = begun.and_then(|guarded| {
        if guarded.policies > 0 {
            start_looks(run.host.services.as_ref(), terms)?;
        }
        Ok(guarded)
    });
    told(run, begun);
}

/// Takes in the connections that were made under the policies since. Does nothing where nothing was begun.
pub(super) fn widen(run: &mut Run) {
    if run.report.conntrack.timeout_policies_guarded == 0 || !run.host.datapath.is_armed() {
        return;
    }
    let widened = run.host.datapath.widen_guard(&run.id).map_err(anyhow::Error::from);
    told(run, widened);
}

fn told(run: &mut Run, guarded: anyhow::Result<Guarded>) {
    match guarded {
        Ok(Guarded { policies, connections }) => {
            run.report.conntrack.timeout_policies_guarded = policies;
            run.report.details.insert("connections_guarded".into(), connections.into());
        }
        Err(error) => run.warn(format!("live connections may lose their timeout policies: {error:#}")),
    }
}

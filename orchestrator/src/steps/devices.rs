//! What a starting ovs-vswitchd takes away from the devices of its ports: qdiscs and classes of others, which it is kept
//! from deleting, and MTUs that were set by hand, which are put back.

use anyhow::Context;
use dpfreeze::devices::Policer;

use super::{remembered, Run, Stop};
use crate::host::devices::{standing, Devices, Standing};
use crate::host::DatabaseFacts;
use crate::inventory::{is_forgotten, Kept};

/// What stands, to be kept and compared. Without it the run goes on. May be done twice.
pub(super) fn look(run: &mut Run) -> Result<(), Stop> {
    match standing(run.host.devices.as_ref(), &run.known.facts) {
        Ok(standing) => remember(run, standing),
        Err(error) => run.warn(format!("{error}: what others have put on them may be lost, and is not compared")),
    }
    keep(run)?;
    run.checkpoint()
}

/// What was found is not deleted by the new daemon, where there is a freeze.
pub(super) fn keep(run: &mut Run) -> Result<(), Stop> {
    let kept = remembered::qdiscs(run.known.standing.kept());
    Ok(run.host.datapath.keep_qdiscs(&kept).context("qdiscs of others")?)
}

fn remember(run: &mut Run, standing: Standing) {
    if standing != run.known.standing {
        if let Err(error) = run.runs.keep_standing(&run.id, &standing) {
            run.warn(format!("what stands on devices would not be known to a recovery: {error:#}"));
        }
        run.known.standing = standing;
    }
}

/// Is there anything that a daemon which starts would delete, and can be kept from?
pub(super) fn has_kept(run: &Run) -> bool {
    run.host.datapath.is_armed() && !run.known.standing.kept().is_empty()
}

/// The policing that the next daemon shall find as it is. Without it that is made anew, as without us.
pub(super) fn policers(run: &mut Run) -> Vec<Policer> {
    let policed = run.known.standing.policed();
    if policed.is_empty() || is_forgotten(Kept::Policing) {
        return Vec::new();
    }
    run.host.devices.policers(&policed).unwrap_or_else(|error| {
        run.warn(format!("{error}: its policing is made anew, and packets may be lost"));
        Vec::new()
    })
}

/// As soon as the new daemon has its ports: it has adapted them by then.
pub(super) fn put_mtus_back(run: &mut Run) -> Result<(), Stop> {
    if is_forgotten(Kept::Mtu) {
        return run.checkpoint();
    }
    for told in mtus_put_back(&run.known.standing, run.host.devices.as_ref(), &run.known.facts) {
        run.warn(told);
    }
    run.checkpoint()
}

/// Returns what could not be done, in words.
pub(crate) fn mtus_put_back(was: &Standing, devices: &dyn Devices, facts: &DatabaseFacts) -> Vec<String> {
    if !was.has_mtus_by_hand() {
        return Vec::new();
    }
    let now = match standing(devices, facts) {
        Ok(now) => now,
        Err(error) => return vec![format!("{error}: an MTU that was set by hand may have changed")],
    };
    let others = was.other_mtus(&now).into_iter();
    others.filter_map(|(device, mtu)| devices.set_mtu(&device, mtu).err()).map(|error| error.to_string()).collect()
}

/// What is gone is a difference.
pub(super) fn compare(run: &mut Run, facts: &DatabaseFacts) {
    match losses(&run.known.standing, run.host.devices.as_ref(), facts) {
        Ok(lost) => run.report.differences.extend(lost),
        Err(told) => run.warn(told),
    }
}

/// What is gone of what stood, in words; or why that is not known.
pub(crate) fn losses(was: &Standing, devices: &dyn Devices, facts: &DatabaseFacts) -> Result<Vec<String>, String> {
    if was.devices.is_empty() {
        return Ok(Vec::new());
    }
    let now = standing(devices, facts).map_err(|error| format!("{error}: what is gone of them is not known"))?;
    Ok(was.losses(&now))
}

//! The kernel module taken out and put in again, and what it takes along: internal devices with their addresses and
//! routes, conntrack's limits. All of it does nothing under the other strategies.

use anyhow::Context;
use dpfreeze::ovs::VportKind;

use super::{Run, Stop};
use crate::host::datapath::DATAPATH;

/// Before the old daemon ends: what its devices are.
pub(super) fn remember(run: &mut Run) -> Result<(), Stop> {
    let before = run.known.before.as_ref().and_then(|before| before.datapath(DATAPATH));
    let internal =
        before.into_iter().flat_map(|datapath| &datapath.vports).filter(|vport| vport.kind() == VportKind::Internal);
    let names: Vec<String> = internal.map(|vport| vport.name.clone()).filter(|name| name != DATAPATH).collect();
    let devices = run.host.module.devices(&names, run.deadline).context("addresses of internal devices")?;
    run.runs.keep_devices(&run.id, &devices)?;
    run.known.devices = Some(devices);
    run.checkpoint()
}

/// Deletes the datapath and puts the module in anew. May be done twice.
pub(super) fn reload(run: &mut Run) -> Result<(), Stop> {
    if run.known.new.is_some() {
        return Ok(());
    }
    if run.known.devices.is_none() {
        // The old daemon has ended by itself before SwitchPrepare came to it; its datapath is there.
        remember(run)?;
    }
    let versions = run.host.module.reload(run.deadline).context("reloading the kernel module")?;
    if versions.iter().all(|version| !version.is_empty()) {
        run.report.details.insert("module_versions".into(), versions.into());
    }
    run.checkpoint()
}

/// Before any flow: a connection over its limit is not taken back.
pub(super) fn put_limits_back(run: &mut Run) -> Result<(), Stop> {
    if !run.wish.reloads_module() {
        return Ok(());
    }
    run.host.datapath.reopen()?;
    let limits = run.known.before.as_ref().map(|before| before.ct_limits.clone()).unwrap_or_default();
    if !limits.is_empty() {
        run.host.datapath.set_ct_limits(&limits).context("conntrack limits")?;
        run.report.conntrack.zone_limits_restored = limits.len() as u64;
    }
    run.checkpoint()
}

/// As soon as the new daemon has made them. What one has lost is a difference; its packets flow.
pub(super) fn put_devices_back(run: &mut Run) -> Result<(), Stop> {
    if !run.wish.reloads_module() {
        return Ok(());
    }
    let devices = run.known.devices.clone().unwrap_or_default();
    for failed in run.host.module.put_back(&devices, run.deadline).context("internal devices")? {
        run.report.differences.push(failed);
    }
    run.checkpoint()
}

//! What an ovs-vswitchd found that the datapath can do, before the run and after it.

use std::time::Duration;

use super::Run;
use crate::features::Features;
use crate::host::Daemon;

/// How long ovs-vswitchd may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// What `daemon` found; nothing where it does not say so in time.
pub(super) fn found_by(run: &Run, daemon: &Daemon) -> Features {
    let until = run.deadline.min(run.now() + ANSWER);
    let Some(bridge) = run.known.facts.bridges.first() else { return Features::default() };
    let listing = run.host.daemons.command(daemon, "dpif/show-dp-features", &[&bridge.name], until);
    listing.map(|listing| Features::parse(&listing)).unwrap_or_default()
}

/// What the daemon that runs now found less of than the one before, each in words.
pub(super) fn lost(run: &Run) -> Vec<String> {
    let now = run.known.new.as_ref().map(|new| found_by(run, new)).unwrap_or_default();
    let lost = run.known.features.lost(&now);
    lost.iter()
        .map(|lost| format!("ovs-vswitchd found less that the datapath can do than the one before: {lost}"))
        .collect()
}

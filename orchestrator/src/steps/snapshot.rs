//! Snapshot: all that must be the same afterwards.

use std::time::Duration;

use anyhow::Context;

use dpfreeze::snapshot::Snapshot as Kernel;

use super::features::found_by;
use super::{by_hand, devices, notes, restore, Ended, Run, Step};
use crate::config::Config;
use crate::conntrack::Conntrack;
use crate::machine::{Event, Phase};

pub(super) struct Snapshot;

impl Step for Snapshot {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Snapshot)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        let until = run.deadline;
        let before = run.host.datapath.snapshot().context("the datapath's state")?;
        notes::before(&mut run.report, &before);
        keep_conntrack(run, &before);
        run.known.before = Some(before);
        let old = run.old()?.clone();
        run.known.features = found_by(run, &old);
        run.checkpoint()?;
        devices::look(run)?;
        let bridges = run.known.facts.bridges.clone();
        // First the watch, then the reading: what changes in between is seen.
        let mut watch = run.host.openflow.watch(&bridges, until).context("watching OpenFlow rules")?;
        // Through the connections that the watch has, as far as they can: hundreds of bridges would take a minute.
        let openflow = run.host.openflow.as_ref();
        let rules = openflow.refresh(&old, &bridges, &[], watch.as_mut(), until);
        let rules = rules.map_err(|error| notes::unread(openflow, &old, &bridges, error, until));
        run.known.rules = rules.context("OpenFlow rules")?;
        run.known.rule_watch = Some(watch);
        notes::rules_before(&mut run.report, &run.known.rules);
        run.known.state = openflow.state(&old, &bridges, until).context("what bridges know besides rules")?;
        run.checkpoint()?;
        by_hand::keep(run)?;
        // Parsed and ready now, so that the gap does not pay for it.
        restore::prepare(run)?;
        Ok(Event::Done)
    }

    fn undo(&self, run: &mut Run) -> Ended {
        run.known.rule_watch = None;
        run.known.prepared = None;
        Ok(Event::Done)
    }
}

/// What `ovs-graceful ct diff` and `ct restore` compare with. Without it the run goes on.
fn keep_conntrack(run: &mut Run, kernel: &Kernel) {
    let found =
        Conntrack { connections: run.host.surroundings.connections(), ..Conntrack::of(&run.known.facts, kernel) };
    run.report.conntrack.connections_before = found.connections.clone();
    if let Err(error) = run.runs.keep_conntrack(&run.id, &found) {
        run.warn(format!("what conntrack was told is not kept for `ovs-graceful ct`: {error:#}"));
    }
}

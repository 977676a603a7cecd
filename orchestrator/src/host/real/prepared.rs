//! A restore prepared while the old daemon still forwards: all that is left for the gap is to send it.

use std::path::Path;
use std::time::Instant;

use super::openflow::{has_bundles, RealOpenFlow};
use super::parallel::side_by_side;
use super::recording::Recording;
use crate::host::{BridgeRules, PreparedRestore, RestoredRules, Result};

/// All bridges.
pub struct Prepared {
    openflow: RealOpenFlow,
    bridges: Vec<(BridgeRules, Recording)>,
}

impl Prepared {
    /// Records the rules of all bridges whose version has bundles. One that cannot be recorded is restored by ovs-ofctl
    /// when its time has come.
    pub fn record(openflow: &RealOpenFlow, rules: &[BridgeRules], folder: &Path, until: Instant) -> Result<Self> {
        // ovs-ofctl would be needed in the gap then: half of the time is left for the rest of the step.
        let now = Instant::now();
        let until = now + until.saturating_duration_since(now) / 2;
        let recordings = side_by_side(rules, |rules| {
            let socket = folder.join(format!("{}.recording", rules.bridge));
            let recorded = has_bundles(rules).then(|| Recording::make(openflow, rules, &socket, until));
            let warn = |error| tracing::warn!(%error, bridge = rules.bridge, "its rules are not prepared");
            Ok(recorded.and_then(|recorded| recorded.map_err(warn).ok()))
        })?;
        let bridges = rules.iter().zip(recordings).filter_map(|(rules, made)| Some((rules.clone(), made?)));
        Ok(Prepared { openflow: openflow.clone(), bridges: bridges.collect() })
    }

    fn commit_one(&self, rules: &BridgeRules, until: Instant) -> Result<RestoredRules> {
        if let Some((_, recording)) = self.bridges.iter().find(|(before, _)| before == rules) {
            let target = self.openflow.target(&rules.bridge);
            let small = self.openflow.restore_small(&target, rules, until);
            match small.and_then(|()| recording.play(&self.openflow.socket(&rules.bridge), until)) {
                Ok(()) => return Ok(RestoredRules { bridge: rules.bridge.clone(), not_atomic: false }),
                Err(error) => tracing::warn!(%error, "the prepared restore failed; trying again from the beginning"),
            }
        }
        self.openflow.restore_one(rules, until)
    }
}

impl PreparedRestore for Prepared {
    fn commit(self: Box<Self>, rules: &[BridgeRules], until: Instant) -> Result<Vec<RestoredRules>> {
        side_by_side(rules, |rules| self.commit_one(rules, until))
    }
}

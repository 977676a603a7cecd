//! A restore prepared while the old daemon still forwards: all that is left for the gap is to send it.
//!
//! Each rule is proved on the way: it was told in a version in which it is the daemon's own ([`super::reading`]), and the
//! daemon that has the rules takes the messages (it is asked to judge them, and changes nothing). A rule for which one of
//! this is not so cannot be put back.

use std::time::Instant;

use super::giving::Giving;
use super::openflow::RealOpenFlow;
use super::parallel::side_by_side;
use crate::host::{BridgeRules, Daemon, OpenFlow, PreparedRestore, RefusedRule, RestoredRules, Result};

/// All bridges.
pub struct Prepared {
    openflow: RealOpenFlow,
    /// Those that are proved.
    bridges: Vec<BridgeRules>,
}

impl Prepared {
    /// Nothing is prepared yet.
    pub fn new(openflow: &RealOpenFlow) -> Self {
        Prepared { openflow: openflow.clone(), bridges: Vec::new() }
    }
}

impl PreparedRestore for Prepared {
    fn update(&mut self, _daemon: &Daemon, rules: &[BridgeRules], until: Instant) -> Result<Vec<RefusedRule>> {
        let changed: Vec<&BridgeRules> = rules.iter().filter(|rules| !self.bridges.contains(rules)).collect();
        let proved = side_by_side(&changed, |rules| prove(&self.openflow, rules, until))?;
        self.bridges.retain(|before| rules.contains(before));
        let mut refused = Vec::new();
        for (rules, refused_here) in changed.into_iter().zip(proved) {
            if refused_here.is_empty() {
                self.bridges.push(rules.clone());
            }
            refused.extend(refused_here);
        }
        Ok(refused)
    }

    fn commit(&self, rules: &[BridgeRules], until: Instant) -> Result<Vec<RestoredRules>> {
        self.openflow.restore(rules, until)
    }
}

/// All that is wrong with a rule is one reason.
fn prove(openflow: &RealOpenFlow, rules: &BridgeRules, until: Instant) -> Result<Vec<RefusedRule>> {
    let mut refused = rules.untold.clone();
    refused.extend(Giving::new(rules)?.try_out(openflow, &openflow.socket(&rules.bridge), until)?);
    Ok(refused)
}

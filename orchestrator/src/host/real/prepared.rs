//! A restore prepared while the old daemon still forwards: all that is left for the gap is to send it.
//!
//! Each rule is proved on the way: it was told in a version in which it is the daemon's own ([`super::reading`]), and the
//! daemon that has the rules takes the messages (it is asked to judge them, and changes nothing). A rule for which one of
//! this is not so cannot be put back.

use std::time::Instant;

use super::giving::Giving;
use super::openflow::RealOpenFlow;
use super::parallel::side_by_side;
use crate::host::{BridgeRules, Daemon, Messages, OpenFlow, PreparedRestore, RefusedRule, RestoredRules, Result};

/// All bridges.
pub struct Prepared {
    openflow: RealOpenFlow,
    proved: Vec<Proved>,
}

/// A bridge all of whose rules are taken: what was asked about. Their texts, of which there may be many, say nothing more.
struct Proved {
    bridge: String,
    protocol: String,
    messages: Messages,
}

impl Proved {
    fn of(rules: &BridgeRules) -> Self {
        let BridgeRules { bridge, protocol, messages, .. } = rules;
        Proved { bridge: bridge.clone(), protocol: protocol.clone(), messages: messages.clone() }
    }

    fn is_of(&self, rules: &BridgeRules) -> bool {
        self.bridge == rules.bridge && self.protocol == rules.protocol && self.messages == rules.messages
    }
}

impl Prepared {
    /// Nothing is prepared yet.
    pub fn new(openflow: &RealOpenFlow) -> Self {
        Prepared { openflow: openflow.clone(), proved: Vec::new() }
    }
}

impl PreparedRestore for Prepared {
    fn update(&mut self, _daemon: &Daemon, rules: &[BridgeRules], until: Instant) -> Result<Vec<RefusedRule>> {
        let is_proved = |rules: &BridgeRules| rules.untold.is_empty() && self.proved.iter().any(|one| one.is_of(rules));
        let changed: Vec<&BridgeRules> = rules.iter().filter(|rules| !is_proved(rules)).collect();
        let answers = side_by_side(&changed, |rules| prove(&self.openflow, rules, until))?;
        self.proved.retain(|one| rules.iter().any(|rules| one.is_of(rules)));
        let mut refused = Vec::new();
        for (rules, refused_here) in changed.into_iter().zip(answers) {
            if refused_here.is_empty() {
                self.proved.push(Proved::of(rules));
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

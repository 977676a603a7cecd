//! A restore prepared while the old daemon still forwards: all that is left for the gap is to send it.
//!
//! Each rule is proved on the way: ovs-ofctl reads what it has printed, what it makes of it is the same rule, the daemon
//! that has the rules takes the messages (it is asked to judge them, and changes nothing), and it has no other rule than
//! OpenFlow tells. A rule for which one of this is not so cannot be put back.

use std::time::Instant;

use super::openflow::RealOpenFlow;
use super::parallel::side_by_side;
use super::recording::Recording;
use crate::host::{BridgeRules, Daemon, OpenFlow, PreparedRestore, RefusedRule, RestoredRules, Result};

/// All bridges.
pub struct Prepared {
    openflow: RealOpenFlow,
    bridges: Vec<(BridgeRules, Recording)>,
}

impl Prepared {
    /// Nothing is prepared yet.
    pub fn new(openflow: &RealOpenFlow) -> Self {
        Prepared { openflow: openflow.clone(), bridges: Vec::new() }
    }

    fn recording(&self, rules: &BridgeRules) -> Option<&Recording> {
        self.bridges.iter().find(|(before, _)| before == rules).map(|(_, recording)| recording)
    }
}

impl PreparedRestore for Prepared {
    fn update(&mut self, daemon: &Daemon, rules: &[BridgeRules], until: Instant) -> Result<Vec<RefusedRule>> {
        let changed: Vec<&BridgeRules> = rules.iter().filter(|rules| self.recording(rules).is_none()).collect();
        let made = side_by_side(&changed, |rules| record(&self.openflow, daemon, rules, until))?;
        let mut refused = Vec::new();
        for (rules, (recording, refused_here)) in changed.into_iter().zip(made) {
            self.bridges.retain(|(before, _)| before.bridge != rules.bridge);
            if refused_here.is_empty() {
                self.bridges.push((rules.clone(), recording));
            }
            refused.extend(refused_here);
        }
        self.bridges.retain(|(before, _)| rules.contains(before));
        Ok(refused)
    }

    fn commit(&self, rules: &[BridgeRules], until: Instant) -> Result<Vec<RestoredRules>> {
        side_by_side(rules, |rules| self.openflow.restore_one(rules, self.recording(rules), until))
    }
}

/// Records one bridge's rules and proves them. All that is wrong with a rule is one reason.
fn record(
    openflow: &RealOpenFlow,
    daemon: &Daemon,
    rules: &BridgeRules,
    until: Instant,
) -> Result<(Recording, Vec<RefusedRule>)> {
    let (recording, mut refused) = Recording::make(openflow, rules, until)?;
    let mut add = |more: Vec<RefusedRule>| {
        for rule in more {
            if !refused.iter().any(|known| known.rule == rule.rule) {
                refused.push(rule);
            }
        }
    };
    add(recording.misread(rules, openflow, until)?);
    add(recording.try_out(rules, openflow, &openflow.socket(&rules.bridge), until)?);
    add(openflow.unfaithful(daemon, std::slice::from_ref(rules), until)?);
    Ok((recording, refused))
}

//! A restore prepared while the old daemon still forwards.
//!
//! `ovs-ofctl bundle TARGET -` reads and parses its whole input before it connects: started early, it has the rules
//! ready and waits for the end of its input, which is given when the new daemon is there.

use std::io::Write;
use std::process::{Child, ChildStdin, Stdio};
use std::thread::JoinHandle;
use std::time::Instant;

use super::command;
use super::openflow::{bundle_text, RealOpenFlow, OVS_OFCTL};
use crate::host::{BridgeRules, HostError, PreparedRestore, RestoredRules, Result};

/// One bridge's program, and the thread that feeds it (a pipe holds less than many rules).
pub struct PreparedBridge {
    rules: BridgeRules,
    child: Child,
    feeder: Option<JoinHandle<ChildStdin>>,
}

impl PreparedBridge {
    /// Starts the program for `rules`.
    pub fn start(openflow: &RealOpenFlow, rules: &BridgeRules) -> Result<Self> {
        let words = ["--no-names", "-O", &rules.protocol, "bundle", &openflow.target(&rules.bridge), "-"];
        let mut child = command::start(OVS_OFCTL, &words, Stdio::piped())?;
        let text = bundle_text(rules);
        let feeder = child.stdin.take().map(|mut pipe| {
            std::thread::spawn(move || {
                // A program that ends early says why at the commit.
                let _ = pipe.write_all(text.as_bytes());
                pipe
            })
        });
        Ok(PreparedBridge { rules: rules.clone(), child, feeder })
    }

    /// Ends the input and waits for the program to have done it.
    fn commit(&mut self, until: Instant) -> Result<()> {
        // The pipe is closed by being dropped.
        drop(self.feeder.take().map(JoinHandle::join));
        let output = command::finish(&mut self.child, OVS_OFCTL, None, until)?;
        match output.status.success() {
            true => Ok(()),
            false => Err(HostError::new(format!("bridge {}", self.rules.bridge), output.stderr.trim())),
        }
    }
}

impl Drop for PreparedBridge {
    fn drop(&mut self) {
        // Without effect on one that has been waited for.
        if matches!(self.child.try_wait(), Ok(None)) {
            command::end(&mut self.child);
        }
        drop(self.feeder.take().map(JoinHandle::join));
    }
}

/// All bridges.
pub struct Prepared {
    /// Restores what has changed since, and what failed.
    pub openflow: RealOpenFlow,
    /// Those whose version has bundles.
    pub bridges: Vec<PreparedBridge>,
}

impl PreparedRestore for Prepared {
    fn commit(self: Box<Self>, rules: &[BridgeRules], until: Instant) -> Result<Vec<RestoredRules>> {
        let Prepared { openflow, mut bridges } = *self;
        let work: Vec<(&BridgeRules, Option<PreparedBridge>)> = rules
            .iter()
            .map(|rules| (rules, bridges.iter().position(|bridge| bridge.rules == *rules).map(|at| bridges.remove(at))))
            .collect();
        let openflow = &openflow;
        std::thread::scope(|scope| {
            let threads: Vec<_> = work
                .into_iter()
                .map(|(rules, prepared)| scope.spawn(move || commit_one(openflow, rules, prepared, until)))
                .collect();
            let panicked = |_| Err(HostError::new(OVS_OFCTL, "a thread of ours panicked"));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
        })
    }
}

fn commit_one(
    openflow: &RealOpenFlow,
    rules: &BridgeRules,
    prepared: Option<PreparedBridge>,
    until: Instant,
) -> Result<RestoredRules> {
    if let Some(mut prepared) = prepared {
        let target = openflow.target(&rules.bridge);
        let committed = openflow.restore_small(&target, rules, until).and_then(|()| prepared.commit(until));
        match committed {
            Ok(()) => return Ok(RestoredRules { bridge: rules.bridge.clone(), not_atomic: false }),
            Err(error) => tracing::warn!(%error, "the prepared restore failed; trying again from the beginning"),
        }
    }
    openflow.restore_one(rules, until)
}

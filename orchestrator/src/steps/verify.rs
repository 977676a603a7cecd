//! Verify: is everything as it was? Before against after, by meaning.

use std::time::Duration;

use anyhow::Context;

use super::{notes, ports, Ended, Run, Step};
use crate::config::Config;
use crate::machine::{Event, Phase};

pub(super) struct Verify;

impl Step for Verify {
    fn limit(&self, config: &Config) -> Duration {
        config.limits.of(Phase::Verify)
    }

    fn perform(&self, run: &mut Run) -> Ended {
        let until = run.deadline;
        let after = run.host.datapath.snapshot().context("the datapath's state")?;
        let wanted = ports::wanted(&run.host.database.facts(until).context("the database")?);
        if let Some(before) = &run.known.before {
            notes::after(&mut run.report, before, &after, &wanted);
        }
        let rules = run.host.openflow.snapshot(&run.known.facts.bridges, until).context("OpenFlow rules")?;
        notes::rules_after(&mut run.report, &run.known.rules, &rules);
        run.checkpoint()?;
        match run.report.differences.is_empty() {
            true => Ok(Event::Done),
            false => Ok(Event::DifferencesFound),
        }
    }
}

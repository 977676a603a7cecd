//! Bridges that are made or removed while a run is under way.

use anyhow::Context;

use super::{Run, Stop};
use crate::host::{Bridge, DatabaseFacts};

/// What was made since Check is restored, too; what has gone is not waited for.
pub(super) fn look_again(run: &mut Run) -> Result<(), Stop> {
    let mut facts = run.host.database.facts(run.deadline).context("the database")?;
    // What the old daemon has not made has no rules, and what the new one makes of it is for Open vSwitch to say.
    facts.bridges.retain(|bridge| !run.known.facts.ignored_bridges.contains(&bridge.name));
    let known = names(&run.known.facts.bridges);
    for bridge in facts.bridges.iter().filter(|bridge| !known.contains(&bridge.name)) {
        run.warn(format!("bridge {}: made while the run was under way", bridge.name));
    }
    forget_removed(run, &facts);
    run.known.facts.bridges = facts.bridges;
    run.checkpoint()
}

/// What `facts` have no more is not restored, counted or compared.
pub(super) fn forget_removed(run: &mut Run, facts: &DatabaseFacts) {
    let there = names(&facts.bridges);
    for name in names(&run.known.facts.bridges).into_iter().filter(|name| !there.contains(name)) {
        run.warn(format!("bridge {name}: removed while the run was under way"));
    }
    run.known.facts.bridges.retain(|bridge| there.contains(&bridge.name));
    run.known.rules.retain(|rules| there.contains(&rules.bridge));
}

/// [`forget_removed`] with what the database has now.
pub(super) fn forget_removed_now(run: &mut Run) -> Result<(), Stop> {
    let facts = run.host.database.facts(run.deadline).context("the database")?;
    forget_removed(run, &facts);
    run.checkpoint()
}

/// What `what` asks of the bridges, asked anew where it failed since one of them has been removed.
pub(super) fn despite_removals<T>(
    run: &mut Run,
    mut what: impl FnMut(&mut Run) -> anyhow::Result<T>,
) -> Result<T, Stop> {
    loop {
        let before = run.known.facts.bridges.len();
        match what(run) {
            Ok(answer) => return Ok(answer),
            Err(error) => {
                forget_removed_now(run)?;
                if run.known.facts.bridges.len() == before {
                    return Err(error.into());
                }
            }
        }
    }
}

fn names(bridges: &[Bridge]) -> Vec<String> {
    bridges.iter().map(|bridge| bridge.name.clone()).collect()
}

//! `ct`: zones, timeout policies and limits: shown, compared with what a run found, put back.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use dpfreeze::conntrack::{limit_name, TimeoutPolicy};
use dpfreeze::ovs::DEFAULT_ZONE;
use serde_json::json;

use super::args::CtCommand;
use super::output::{complain, say, say_json};
use super::restart::busy;
use crate::conntrack::{Conntrack, FILE};
use crate::control::{RunLock, LOCK};
use crate::host::real::Ovsdb;
use crate::host::zones::PolicyIndex;
use crate::journal::Runs;
use crate::machine::ExitCode;

/// Where ovsdb-server listens.
const DATABASE: &str = "/run/openvswitch/db.sock";
/// How long the database may take to answer.
const DATABASE_LIMIT: Duration = Duration::from_secs(60);

/// Does it.
pub fn ct(command: CtCommand) -> anyhow::Result<ExitCode> {
    match command {
        CtCommand::Show { json } => show(json),
        CtCommand::Diff { run, json } => diff(run, json),
        CtCommand::Restore { run } => restore(run),
    }
}

fn now() -> anyhow::Result<Conntrack> {
    Conntrack::read(&Ovsdb::new(DATABASE), Instant::now() + DATABASE_LIMIT)
}

fn show(json: bool) -> anyhow::Result<ExitCode> {
    let now = now()?;
    match json {
        true => say_json(&now),
        false => say(in_words(&now).trim_end()),
    }
    Ok(ExitCode::Done)
}

fn diff(run: Option<String>, json: bool) -> anyhow::Result<ExitCode> {
    let (id, before) = found_by(run)?;
    let differences = before.differences(&now()?);
    match json {
        true => say_json(&json!({ "run": id, "differences": differences })),
        false if differences.is_empty() => say(&format!("conntrack is as run {id} found it")),
        false => say(&differences.join("\n")),
    }
    Ok(if differences.is_empty() { ExitCode::Done } else { ExitCode::Differences })
}

fn restore(run: Option<String>) -> anyhow::Result<ExitCode> {
    if let Some(holder) = RunLock::holder(Path::new(LOCK))? {
        complain(&busy(&holder));
        return Ok(ExitCode::Busy);
    }
    let (id, before) = found_by(run)?;
    let restored = before.restore(&now()?).context("not all could be put back")?;
    for policy in &restored.policies {
        say(&format!("timeout policy {policy} is there again"));
    }
    for limit in &restored.limits {
        say(&format!("limit of zone {} is {} again", zone_name(limit.zone), limit.limit));
    }
    let left = before.differences(&now()?);
    if restored.policies.is_empty() && restored.limits.is_empty() {
        say(&format!("nothing of what run {id} found was lost that can be put back"));
    }
    left.iter().for_each(|difference| say(&format!("left: {difference}")));
    Ok(if left.is_empty() { ExitCode::Done } else { ExitCode::Differences })
}

/// What run `run`, or the last one that has kept anything, found.
fn found_by(run: Option<String>) -> anyhow::Result<(String, Conntrack)> {
    let runs = Runs::default();
    let path = |id: &String| runs.folder(id).join(FILE);
    let id = match run {
        Some(id) => id,
        None => {
            let ids = runs.ids()?;
            let last = ids.into_iter().rev().find(|id| path(id).exists());
            last.context("no run has kept what conntrack was told; `ovs-graceful runs` lists them")?
        }
    };
    let found = Conntrack::load(&path(&id)).with_context(|| format!("run {id}"))?;
    Ok((id, found))
}

fn zone_name(zone: i32) -> String {
    match zone {
        DEFAULT_ZONE => "default".to_owned(),
        zone => zone.to_string(),
    }
}

/// Writing to a `String` cannot fail.
fn in_words(now: &Conntrack) -> String {
    let mut out = String::new();
    let index = PolicyIndex::of(&now.policies);
    let _ = writeln!(out, "zones of the database");
    for zone in &now.zones {
        let policy = match &zone.timeouts {
            None => "no timeout policy".to_owned(),
            Some(row) => {
                // The highest number is the latest.
                let number = index.saying(row).into_iter().max();
                let timeouts: Vec<String> = row.iter().map(|(key, value)| format!("{key}={value}")).collect();
                let number =
                    number.map_or_else(|| "NOT in the kernel".to_owned(), |number| format!("ovs_tp_{number}_*"));
                format!("{} ({number})", timeouts.join(" "))
            }
        };
        let limit = zone.limit.map(|limit| format!(", limit {limit}")).unwrap_or_default();
        let _ = writeln!(out, "  {:>5}  {policy}{limit}", zone.zone);
    }
    let _ = writeln!(out, "timeout policies of the kernel");
    for policy in &now.policies {
        let _ = writeln!(out, "  {}: {}, {} references", policy.name, limits(policy), policy.use_count.unwrap_or(0));
    }
    let _ = writeln!(out, "limits of the kernel");
    for limit in &now.limits {
        let _ = writeln!(out, "  {:>7}  {} ({} counted)", zone_name(limit.zone), limit.limit, limit.count);
    }
    let _ = writeln!(out, "connections");
    for (zone, count) in &now.connections {
        let _ = writeln!(out, "  {zone:>5}  {count}");
    }
    out
}

fn limits(policy: &TimeoutPolicy) -> String {
    let Ok(timeouts) = policy.timeouts() else { return "malformed".to_owned() };
    let words: Vec<String> = timeouts
        .into_iter()
        .map(|(kind, seconds)| match limit_name(policy.l4, kind) {
            Some(name) => format!("{name}={seconds}"),
            None => format!("{kind}={seconds}"),
        })
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use dpfreeze::ovs::ZoneLimit;

    use super::*;
    use crate::host::CtZone;

    #[test]
    fn a_zone_is_shown_with_its_policy_its_limit_and_its_connections() {
        let udp = TimeoutPolicy { name: "ovs_tp_3_udp4".into(), l3: 2, l4: 17, ..Default::default() };
        let timeouts = |seconds| Some(BTreeMap::from([("udp_single".to_owned(), seconds)]));
        let text = in_words(&Conntrack {
            zones: vec![
                CtZone { zone: 5, timeouts: timeouts(78), limit: Some(9) },
                CtZone { zone: 6, timeouts: timeouts(1), limit: None },
                CtZone { zone: 7, timeouts: None, limit: None },
            ],
            default_limit: None,
            policies: vec![udp.with_timeouts([(1, 78), (2, 120)])],
            limits: vec![ZoneLimit { zone: DEFAULT_ZONE, limit: 7, count: 0 }],
            connections: BTreeMap::from([(5, 41)]),
        });
        for line in [
            "      5  udp_single=78 (ovs_tp_3_*), limit 9",
            "      6  udp_single=1 (NOT in the kernel)",
            "      7  no timeout policy",
            "  ovs_tp_3_udp4: unreplied=78 replied=120, 0 references",
            "  default  7 (0 counted)",
            "      5  41",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
        }
    }
}

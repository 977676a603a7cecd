//! What conntrack was told, by OVSDB and in the kernel, at one moment: kept with each run, shown, compared by meaning,
//! put back where it was lost.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use dpfreeze::conntrack::{count_by_zone, create_timeout_policy, timeout_policies, Meaning, TimeoutPolicy};
use dpfreeze::ovs::{Ovs, ZoneLimit, DEFAULT_ZONE};
use dpfreeze::snapshot::{compare, Difference, Snapshot};
use serde::{Deserialize, Serialize};

use crate::host::zones::PolicyIndex;
use crate::host::{CtZone, Database, DatabaseFacts};

/// The name of the file in a run's folder.
pub const FILE: &str = "conntrack.json";

/// What conntrack was told, and how many connections it knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conntrack {
    /// The zones of OVSDB.
    pub zones: Vec<CtZone>,
    /// The limit of OVSDB for zones without one.
    pub default_limit: Option<u32>,
    /// The kernel's timeout policies.
    pub policies: Vec<TimeoutPolicy>,
    /// The kernel's limits.
    pub limits: Vec<ZoneLimit>,
    /// Connections by zone; zones without one are left out.
    pub connections: BTreeMap<u16, u64>,
}

/// What was put back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Restored {
    /// Names of policies.
    pub policies: Vec<String>,
    /// Limits.
    pub limits: Vec<ZoneLimit>,
}

impl Conntrack {
    /// Asks kernel and database.
    ///
    /// # Errors
    /// Where either does not answer. A kernel that does not list connections has none here.
    pub fn read(database: &dyn Database, until: Instant) -> anyhow::Result<Conntrack> {
        let facts = database.facts(until)?;
        let mut limits = Ovs::open()?.ct_limits()?;
        limits.sort_by_key(|limit| limit.zone);
        let mut policies = timeout_policies()?;
        policies.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Conntrack { policies, limits, connections: connections(), ..Conntrack::of(&facts, &Snapshot::default()) })
    }

    /// Of what a run has read already; connections are not counted.
    pub fn of(facts: &DatabaseFacts, kernel: &Snapshot) -> Conntrack {
        Conntrack {
            zones: facts.ct_zones.clone(),
            default_limit: facts.ct_zone_default_limit,
            policies: kernel.timeout_policies.clone(),
            limits: kernel.ct_limits.clone(),
            connections: BTreeMap::new(),
        }
    }

    /// Reads what a run has kept.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn load(path: &Path) -> anyhow::Result<Conntrack> {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is no snapshot of conntrack", path.display()))
    }

    /// What of this is not so in `after`, in words. Names do not count, and connections come and go.
    pub fn differences(&self, after: &Conntrack) -> Vec<String> {
        let mut found: Vec<String> =
            compare(&self.kernel(), &after.kernel()).iter().map(Difference::to_string).collect();
        found.extend(self.zone_differences(after));
        found
    }

    /// What OVSDB says otherwise than before, and the zones whose policy the kernel does not have.
    pub fn zone_differences(&self, after: &Conntrack) -> Vec<String> {
        let mut found = Vec::new();
        let rows: HashMap<u16, &CtZone> = after.zones.iter().map(|row| (row.zone, row)).collect();
        for old in &self.zones {
            match rows.get(&old.zone) {
                None => found.push(format!("conntrack: zone {} is not in the database any more", old.zone)),
                Some(new) if *new != old => {
                    found.push(format!("conntrack: zone {} had {} and has {}", old.zone, words(old), words(new)));
                }
                Some(_) => {}
            }
        }
        if self.default_limit != after.default_limit {
            let limit = |limit: Option<u32>| limit.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
            found.push(format!(
                "conntrack: the database's default limit was {} and is {}",
                limit(self.default_limit),
                limit(after.default_limit)
            ));
        }
        let never: HashSet<u16> = self.zones_without_policy().into_iter().collect();
        found.extend(after.zones_without_policy().into_iter().filter(|zone| !never.contains(zone)).map(|zone| {
            format!("conntrack: no timeout policy of the kernel says what the database says of zone {zone}")
        }));
        found
    }

    /// The zones with a policy in OVSDB that no policies of the kernel stand for.
    pub fn zones_without_policy(&self) -> Vec<u16> {
        let index = PolicyIndex::of(&self.policies);
        let without = |zone: &&CtZone| zone.timeouts.as_ref().is_some_and(|row| index.saying(row).is_empty());
        self.zones.iter().filter(without).map(|zone| zone.zone).collect()
    }

    fn kernel(&self) -> Snapshot {
        Snapshot { ct_limits: self.limits.clone(), timeout_policies: self.policies.clone(), ..Snapshot::default() }
    }

    /// The policies of this that no policy of `now` says the same as.
    pub fn lost_policies<'a>(&'a self, now: &Conntrack) -> Vec<&'a TimeoutPolicy> {
        let there: HashSet<Meaning> = now.policies.iter().map(TimeoutPolicy::meaning).collect();
        self.policies.iter().filter(|old| !there.contains(&old.meaning())).collect()
    }

    /// The limits of this that are others now, but those that the database sets otherwise now: these are its own.
    pub fn lost_limits(&self, now: &Conntrack) -> Vec<ZoneLimit> {
        let there: HashMap<i32, u32> = now.limits.iter().map(|limit| (limit.zone, limit.limit)).collect();
        let mut wanted: HashMap<i32, u32> =
            now.zones.iter().filter_map(|row| Some((row.zone.into(), row.limit?))).collect();
        wanted.extend(now.default_limit.map(|limit| (DEFAULT_ZONE, limit)));
        let lost = self.limits.iter().filter(|old| there.get(&old.zone) != Some(&old.limit));
        // A kernel that tells no default has none: 0.
        let lost = lost.filter(|old| old.zone != DEFAULT_ZONE || old.limit != *there.get(&DEFAULT_ZONE).unwrap_or(&0));
        let lost = lost.filter(|old| wanted.get(&old.zone).is_none_or(|limit| *limit == old.limit));
        lost.map(|old| ZoneLimit { count: 0, ..*old }).collect()
    }

    /// Puts back what is lost `now`: policies first, because flows that name an unknown one are silently untimed.
    ///
    /// # Errors
    /// The first of the kernel; what was put back before stays.
    pub fn restore(&self, now: &Conntrack) -> anyhow::Result<Restored> {
        let mut restored = Restored::default();
        let names: HashSet<&str> = now.policies.iter().map(|policy| policy.name.as_str()).collect();
        for policy in self.lost_policies(now) {
            // Another of its name says something else: that is somebody's own, and stays.
            if names.contains(policy.name.as_str()) {
                continue;
            }
            create_timeout_policy(policy)?;
            restored.policies.push(policy.name.clone());
        }
        let limits = self.lost_limits(now);
        if !limits.is_empty() {
            Ovs::open()?.set_ct_limits(&limits)?;
            restored.limits = limits;
        }
        Ok(restored)
    }
}

/// Connections by zone. What cannot be listed is not counted.
pub fn connections() -> BTreeMap<u16, u64> {
    count_by_zone().unwrap_or_else(|error| {
        tracing::warn!("connections are not counted: {error}");
        BTreeMap::new()
    })
}

fn words(zone: &CtZone) -> String {
    let mut words = match &zone.timeouts {
        None => "no timeout policy".to_owned(),
        Some(timeouts) => {
            let timeouts: Vec<String> = timeouts.iter().map(|(key, seconds)| format!("{key}={seconds}")).collect();
            format!("timeouts {}", timeouts.join(" "))
        }
    };
    if let Some(limit) = zone.limit {
        words.push_str(&format!(", limit {limit}"));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Runs;

    fn policy(name: &str, seconds: u32) -> TimeoutPolicy {
        TimeoutPolicy { name: name.into(), l3: 2, l4: 17, ..TimeoutPolicy::default() }.with_timeouts([(1, seconds)])
    }

    fn limit(zone: i32, limit: u32) -> ZoneLimit {
        ZoneLimit { zone, limit, count: 7 }
    }

    fn zone(zone: u16, seconds: u32) -> CtZone {
        CtZone { zone, timeouts: Some(BTreeMap::from([("udp_single".to_owned(), seconds)])), limit: None }
    }

    fn before() -> Conntrack {
        Conntrack {
            zones: vec![zone(5, 78), CtZone { zone: 6, timeouts: None, limit: Some(9) }],
            default_limit: None,
            policies: vec![policy("ovs_tp_1_udp4", 78), policy("ovs_tp_2_udp4", 5)],
            limits: vec![limit(DEFAULT_ZONE, 0), limit(5, 100), limit(6, 9)],
            connections: BTreeMap::from([(5, 3)]),
        }
    }

    #[test]
    fn other_names_and_other_counts_are_no_difference() {
        let mut after = before();
        after.policies[0].name = "ovs_tp_7_udp4".into();
        after.connections.clear();
        after.limits[1].count = 0;
        assert_eq!(before().differences(&after), [""; 0]);
        assert!(before().lost_limits(&after).is_empty() && before().lost_policies(&after).is_empty());
    }

    #[test]
    fn every_loss_is_told() {
        let told = |change: fn(&mut Conntrack)| {
            let mut after = before();
            change(&mut after);
            before().differences(&after).join("; ")
        };
        assert_eq!(told(|c| drop(c.zones.remove(1))), "conntrack: zone 6 is not in the database any more");
        assert_eq!(
            told(|c| c.zones[1].limit = Some(8)),
            "conntrack: zone 6 had no timeout policy, limit 9 and has no timeout policy, limit 8"
        );
        assert_eq!(told(|c| c.default_limit = Some(8)), "conntrack: the database's default limit was none and is 8");
        let text = told(|c| drop(c.policies.remove(0)));
        assert!(text.contains("ovs_tp_1_udp4") && text.contains("database says of zone 5"), "{text}");
        assert!(told(|c| c.limits[1].limit = 4).contains("limit of zone 5 was 100 and is 4"));
    }

    #[test]
    fn lost_limits_are_put_back_but_for_those_the_database_sets() {
        let mut after = before();
        after.limits = vec![limit(DEFAULT_ZONE, 0)];
        let lost: Vec<_> = before().lost_limits(&after).iter().map(|limit| (limit.zone, limit.limit)).collect();
        assert_eq!(lost, [(5, 100), (6, 9)]);
        after.zones[1].limit = Some(4);
        let lost: Vec<_> = before().lost_limits(&after).iter().map(|limit| limit.zone).collect();
        assert_eq!(lost, [5]);
        // A kernel without the family tells nothing: nothing is lost that was "no limit".
        after.limits.clear();
        assert!(before().lost_limits(&after).iter().all(|limit| limit.zone != DEFAULT_ZONE));
    }

    #[test]
    fn a_policy_is_lost_when_no_other_says_the_same() {
        let mut after = before();
        after.policies = vec![policy("ovs_tp_9_udp4", 78)];
        let lost: Vec<_> = before().lost_policies(&after).iter().map(|policy| policy.name.clone()).collect();
        assert_eq!(lost, ["ovs_tp_2_udp4"]);
    }

    #[test]
    fn it_is_the_same_after_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs/run-1").join(FILE);
        std::fs::create_dir_all(folder.path().join("runs/run-1")).unwrap();
        Runs::at(folder.path(), folder.path()).keep_conntrack("run-1", &before()).unwrap();
        assert_eq!(Conntrack::load(&path).unwrap(), before());
        assert!(Conntrack::load(&folder.path().join("none")).is_err());
    }
}

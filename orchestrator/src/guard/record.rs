//! What is guarded, for which connections, and since when: the part that asks nobody.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use dpfreeze::conntrack::{Live, TimeoutPolicy, Watched};
use serde::{Deserialize, Serialize};

use super::{write_private_json, Guarded};

/// How often is looked, and when it ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Milliseconds from one look to the next.
    pub interval_ms: u64,
    /// Milliseconds that the guard outlives the last look.
    pub lease_ms: u64,
    /// Seconds after which a policy is let go whatever lives under it.
    pub max_age_s: u64,
}

impl Terms {
    /// From one look to the next.
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.interval_ms)
    }

    /// How long it outlives the last look.
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    /// How long a policy is guarded at most.
    pub fn max_age(&self) -> Duration {
        Duration::from_secs(self.max_age_s)
    }
}

/// A policy under guard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The run that began it.
    pub run: String,
    /// Time since boot (CLOCK_BOOTTIME) when it did.
    pub since: Duration,
    /// So many of its connections were left at the last look.
    pub left: u64,
    /// The policy and its connections.
    pub watched: Watched,
}

/// All that is guarded.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Of the last run.
    pub terms: Terms,
    /// The policies.
    pub entries: Vec<Entry>,
}

impl Record {
    /// Reads it; one that is not there is empty.
    pub fn load(path: &Path) -> anyhow::Result<Record> {
        match std::fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| format!("{} is no record", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Record::default()),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Writes it: whole, or not at all.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        write_private_json(path, self).with_context(|| path.display().to_string())
    }

    /// The names of the policies.
    pub fn names(&self) -> Vec<String> {
        self.entries.iter().map(|entry| entry.watched.policy.clone()).collect()
    }

    /// Every zone of every policy.
    pub fn zones(&self) -> BTreeSet<u16> {
        self.entries.iter().flat_map(|entry| entry.watched.zones.iter().copied()).collect()
    }

    /// Adds the policies that are not in it, with the connections that live in their `zones`. A connection that an
    /// earlier run found lives under the policy of then, not under one that is new.
    pub fn begin(
        &mut self,
        run: &str,
        now: Duration,
        zones: &BTreeMap<String, BTreeSet<u16>>,
        policies: &[TimeoutPolicy],
        live: &Live,
    ) {
        // Of policies that the kernel has lost, as when a guard had ended, no connection is under.
        let there: HashSet<&str> = policies.iter().map(|policy| policy.name.as_str()).collect();
        self.entries.retain(|entry| there.contains(entry.watched.policy.as_str()));
        let known: HashSet<String> = self.names().into_iter().collect();
        let older = self.connections_of(|_| true);
        for policy in policies.iter().filter(|policy| !known.contains(&policy.name)) {
            let Some(zones) = zones.get(&policy.name) else { continue };
            let mut watched = Watched::new(policy, zones.clone());
            watched.add(live, &older);
            let left = watched.connections.len() as u64;
            self.entries.push(Entry { run: run.to_owned(), since: now, left, watched });
        }
    }

    /// Takes in what lives now in the zones of the policies that `run` began to guard.
    pub fn widen(&mut self, run: &str, live: &Live) {
        let older = self.connections_of(|entry| entry.run != run);
        for entry in self.entries.iter_mut().filter(|entry| entry.run == run) {
            entry.watched.add(live, &older);
            entry.left = entry.watched.connections.len() as u64;
        }
    }

    fn connections_of(&self, which: impl Fn(&Entry) -> bool) -> HashSet<u32> {
        self.entries.iter().filter(|entry| which(entry)).flat_map(|entry| entry.watched.connections.clone()).collect()
    }

    /// Forgets connections that have gone for good.
    pub fn prune(&mut self, live: &Live) {
        self.entries.iter_mut().for_each(|entry| entry.watched.prune(live));
    }

    /// Counts what is left, and says which policies have nothing left.
    pub fn count(&mut self, live: &Live) -> BTreeSet<String> {
        let mut finished = BTreeSet::new();
        for entry in &mut self.entries {
            entry.left = entry.watched.left(live) as u64;
            if entry.left == 0 {
                finished.insert(entry.watched.policy.clone());
            }
        }
        finished
    }

    /// Drops policies that no connection is known of.
    pub fn drop_finished(&mut self) {
        self.entries.retain(|entry| !entry.watched.connections.is_empty());
    }

    /// Drops policies that are too old, and those that the kernel does not have any more. Returns why, in words.
    pub fn forget(&mut self, now: Duration, policies: &[TimeoutPolicy]) -> Vec<String> {
        let max_age = self.terms.max_age();
        let there: HashSet<&str> = policies.iter().map(|policy| policy.name.as_str()).collect();
        let mut why = Vec::new();
        self.entries.retain(|Entry { since, watched, left, .. }| {
            let name = &watched.policy;
            if !there.contains(name.as_str()) {
                why.push(format!("{name} is not there any more; {left} connections were left"));
            } else if now.saturating_sub(*since) >= max_age {
                why.push(format!("{name} was guarded for {} s; {left} connections lose it", max_age.as_secs()));
            } else {
                return true;
            }
            false
        });
        why
    }

    /// What `run` has put under guard.
    pub fn guarded_by(&self, run: &str) -> Guarded {
        let own: Vec<&Entry> = self.entries.iter().filter(|entry| entry.run == run).collect();
        Guarded {
            policies: own.len() as u64,
            connections: own.iter().map(|entry| entry.watched.connections.len() as u64).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use dpfreeze::conntrack::Class;

    use super::*;

    const UDP: Class = (2, 17, 5);

    fn live(ids: &[u32]) -> Live {
        ids.iter().map(|id| (UDP, *id)).collect()
    }

    fn policy(name: &str) -> TimeoutPolicy {
        TimeoutPolicy { name: name.into(), l3: 2, l4: 17, ..TimeoutPolicy::default() }
    }

    fn zones(names: &[&str]) -> BTreeMap<String, BTreeSet<u16>> {
        names.iter().map(|name| ((*name).to_owned(), BTreeSet::from([5]))).collect()
    }

    fn connections(record: &Record) -> Vec<(&str, Vec<u32>)> {
        record.entries.iter().map(|e| (e.watched.policy.as_str(), e.watched.connections.clone())).collect()
    }

    fn begun() -> Record {
        let terms = Terms { max_age_s: 100, ..Terms::default() };
        let mut record = Record { terms, entries: Vec::new() };
        record.begin("run-1", Duration::from_secs(10), &zones(&["a"]), &[policy("a"), policy("mine")], &live(&[1, 2]));
        record
    }

    #[test]
    fn a_second_run_leaves_old_connections_to_their_old_policy() {
        let mut record = begun();
        assert_eq!(connections(&record), [("a", vec![1, 2])]);
        let both = [policy("a"), policy("b")];
        record.begin("run-2", Duration::from_secs(50), &zones(&["a", "b"]), &both, &live(&[2, 3]));
        assert_eq!(connections(&record), [("a", vec![1, 2]), ("b", vec![3])]);
        record.widen("run-2", &live(&[1, 2, 3, 4]));
        assert_eq!(connections(&record), [("a", vec![1, 2]), ("b", vec![3, 4])]);
        assert_eq!(record.guarded_by("run-2"), Guarded { policies: 1, connections: 2 });
    }

    #[test]
    fn a_policy_is_finished_with_its_last_connection_and_others_stay() {
        let mut record = begun();
        let both = [policy("a"), policy("b")];
        record.begin("run-2", Duration::from_secs(50), &zones(&["b"]), &both, &live(&[1, 2, 3]));
        assert_eq!(record.count(&live(&[2, 9])), BTreeSet::from(["b".to_owned()]));
        assert_eq!(record.entries.iter().map(|entry| entry.left).collect::<Vec<_>>(), [1, 0]);
        // One that a list had left out is there again in the next.
        assert!(record.count(&live(&[1, 3])).is_empty());
    }

    #[test]
    fn connections_of_a_policy_that_the_kernel_has_lost_count_for_the_new_one() {
        let mut record = begun();
        record.begin("run-2", Duration::from_secs(50), &zones(&["b"]), &[policy("b")], &live(&[1, 3]));
        assert_eq!(connections(&record), [("b", vec![1, 3])]);
    }

    #[test]
    fn a_policy_without_a_connection_is_not_guarded() {
        let mut record = Record::default();
        record.begin("run-1", Duration::ZERO, &zones(&["a"]), &[policy("a")], &live(&[]));
        record.drop_finished();
        assert!(record.entries.is_empty());
    }

    #[test]
    fn age_and_absence_end_a_guard() {
        let mut record = begun();
        assert!(record.forget(Duration::from_secs(109), &[policy("a")]).is_empty());
        let why = record.clone().forget(Duration::from_secs(110), &[policy("a")]);
        assert!(why[0].contains("100 s") && why[0].contains("2 connections"), "{why:?}");
        let why = record.forget(Duration::from_secs(20), &[]);
        assert!(why[0].contains("not there any more") && record.entries.is_empty(), "{why:?}");
    }

    #[test]
    fn it_is_the_same_after_a_file_and_empty_without_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guard.json");
        assert_eq!(Record::load(&path).unwrap(), Record::default());
        begun().save(&path).unwrap();
        assert_eq!(Record::load(&path).unwrap(), begun());
        std::fs::write(&path, "{").unwrap();
        assert!(Record::load(&path).unwrap_err().to_string().contains("guard.json"));
    }
}

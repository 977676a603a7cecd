//! Which connections live under a timeout policy.
//!
//! The kernel does not tell: a connection has the policy that the flow which made it asked for, and `CTA_TIMEOUT_USE`
//! counts flows. So a policy is taken to govern the connections that were in its zones, with its protocol, when they
//! were listed; it is needed until none of these is left.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::connections::for_each_connection;
use super::TimeoutPolicy;
use crate::error::Result;
use crate::flow_key::ActionSummary;
use crate::ovs::Flow;

/// The zones that flows name each timeout policy in. Flows whose actions are malformed name nothing.
pub fn zones_in_flows<'a>(flows: impl IntoIterator<Item = &'a Flow>) -> BTreeMap<String, BTreeSet<u16>> {
    let mut zones: BTreeMap<String, BTreeSet<u16>> = BTreeMap::new();
    for summary in flows.into_iter().filter_map(|flow| ActionSummary::of(&flow.actions).ok()) {
        for (policy, used_in) in summary.timeouts {
            zones.entry(policy).or_default().extend(used_in);
        }
    }
    zones
}

/// Layer 3 protocol (`AF_*`), layer 4 protocol (`IPPROTO_*`) and zone of a connection.
pub type Class = (u16, u8, u16);

/// The ids of the connections that live in some zones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Live(HashMap<Class, HashSet<u32>>);

impl Live {
    /// Lists them.
    ///
    /// # Errors
    /// As [`for_each_connection`].
    pub fn read(zones: &BTreeSet<u16>) -> Result<Live> {
        if zones.is_empty() {
            return Ok(Live::default());
        }
        for_each_connection(Some(zones), Live::default, |live, connection| {
            live.add((connection.l3, connection.l4, connection.zone), connection.id);
            Ok(())
        })
    }

    fn add(&mut self, class: Class, id: u32) {
        self.0.entry(class).or_default().insert(id);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.values().map(HashSet::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn under<'a>(&'a self, watched: &'a Watched) -> impl Iterator<Item = &'a HashSet<u32>> {
        watched.zones.iter().filter_map(|zone| self.0.get(&(watched.l3, watched.l4, *zone)))
    }
}

/// From protocols and zone, and ids (`CTA_ID`).
impl FromIterator<(Class, u32)> for Live {
    fn from_iter<I: IntoIterator<Item = (Class, u32)>>(ids: I) -> Live {
        let mut live = Live::default();
        ids.into_iter().for_each(|(class, id)| live.add(class, id));
        live
    }
}

/// A timeout policy and the connections that are taken to live under it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watched {
    /// The policy's name.
    pub policy: String,
    /// Its layer 3 protocol, an `AF_*` number.
    pub l3: u16,
    /// Its layer 4 protocol, an `IPPROTO_*` number.
    pub l4: u8,
    /// The zones it is used in.
    pub zones: BTreeSet<u16>,
    /// Ids (`CTA_ID`) of the connections.
    pub connections: Vec<u32>,
    /// Of these, the ones that the last list did not have.
    #[serde(default)]
    pub missing: Vec<u32>,
}

impl Watched {
    /// The policy in these zones, with no connection yet.
    pub fn new(policy: &TimeoutPolicy, zones: BTreeSet<u16>) -> Watched {
        Watched { policy: policy.name.clone(), l3: policy.l3, l4: policy.l4, zones, ..Watched::default() }
    }

    /// Takes in the connections of its zones and protocol that live now, but those in `older`, which live under a
    /// policy that was there before this one: a connection keeps the one it was made with.
    pub fn add(&mut self, live: &Live, older: &HashSet<u32>) {
        let mut ids: BTreeSet<u32> = self.connections.drain(..).collect();
        ids.extend(live.under(self).flatten().filter(|id| !older.contains(id)));
        self.connections = ids.into_iter().collect();
    }

    /// Forgets the connections that two lists in a row do not have. Not at once: the kernel may leave living ones out
    /// of a list that its table was resized under. Not never: an id comes again where a connection of the same
    /// addresses and ports is made in the same place of memory.
    pub fn prune(&mut self, live: &Live) {
        let gone = |id: &u32| !live.under(self).any(|set| set.contains(id));
        let missing: Vec<u32> = self.connections.iter().copied().filter(gone).collect();
        let before: HashSet<u32> = self.missing.drain(..).collect();
        let (gone, once): (Vec<u32>, Vec<u32>) = missing.into_iter().partition(|id| before.contains(id));
        let gone: HashSet<u32> = gone.into_iter().collect();
        self.connections.retain(|id| !gone.contains(id));
        self.missing = once;
    }

    /// How many of its connections are among the living.
    pub fn left(&self, live: &Live) -> usize {
        self.connections.iter().filter(|id| live.under(self).any(|set| set.contains(id))).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow_key::uapi::{action, ct};
    use crate::netlink::attr::AttrBuf;

    const UDP4: Class = (2, 17, 5);

    fn live(ids: &[(Class, u32)]) -> Live {
        ids.iter().copied().collect()
    }

    fn watched() -> Watched {
        let policy = TimeoutPolicy { name: "ovs_tp_1_udp4".into(), l3: 2, l4: 17, ..Default::default() };
        Watched::new(&policy, BTreeSet::from([5, 6]))
    }

    #[test]
    fn connections_of_the_zones_and_the_protocol_are_watched_and_no_others() {
        let mut it = watched();
        it.add(
            &live(&[(UDP4, 1), ((2, 17, 6), 2), ((2, 6, 5), 3), ((10, 17, 5), 4), ((2, 17, 7), 5), (UDP4, 9)]),
            &HashSet::from([9]),
        );
        assert_eq!(it.connections, [1, 2]);
        it.add(&live(&[(UDP4, 8)]), &HashSet::new());
        assert_eq!(it.connections, [1, 2, 8]);
    }

    #[test]
    fn it_is_over_when_the_last_one_has_gone_and_new_ones_do_not_count() {
        let mut it = watched();
        it.add(&live(&[(UDP4, 1), ((2, 17, 6), 2)]), &HashSet::new());
        assert_eq!(it.left(&live(&[(UDP4, 2), ((2, 17, 6), 2), (UDP4, 7)])), 1);
        // The same number in another zone than those of the policy is another connection.
        assert_eq!(it.left(&live(&[((2, 17, 9), 2), (UDP4, 7)])), 0);
    }

    #[test]
    fn a_connection_is_forgotten_when_two_lists_in_a_row_do_not_have_it() {
        let mut it = watched();
        it.add(&live(&[(UDP4, 1), (UDP4, 2), (UDP4, 3)]), &HashSet::new());
        it.prune(&live(&[(UDP4, 1)]));
        assert_eq!((&it.connections, &it.missing), (&vec![1, 2, 3], &vec![2, 3]));
        it.prune(&live(&[(UDP4, 1), (UDP4, 3)]));
        assert_eq!((&it.connections, &it.missing), (&vec![1, 3], &vec![]));
    }

    #[test]
    fn flows_say_where_a_policy_is_used() {
        let flow = |zone: u16, name: &str| {
            let mut inner = AttrBuf::new();
            inner.push_str(ct::TIMEOUT, name).push(ct::ZONE, &zone.to_ne_bytes());
            let mut actions = AttrBuf::new();
            actions.push_nested(action::CT, &inner);
            Flow { actions: actions.into_bytes(), ..Flow::default() }
        };
        let flows = [flow(5, "a"), flow(6, "a"), flow(7, "b"), Flow { actions: vec![1], ..Flow::default() }];
        let zones = zones_in_flows(&flows);
        assert_eq!(zones["a"], BTreeSet::from([5, 6]));
        assert_eq!(zones["b"], BTreeSet::from([7]));
        assert_eq!(zones.len(), 2);
    }
}

//! What a bridge knows besides its rules: multicast groups and routers, static and tagged addresses, flags of ports, the
//! handling of fragments, tables. A member of a group gets its stream, which is never flooded to others.

use std::net::Ipv4Addr;
use std::sync::Mutex;

use anyhow::{Context, Result};
use serde_json::json;

use super::{network, plain, rows, Traffic};
use crate::command::{shell, shell_lenient};
use crate::guest::probe::{Place, Ports, Spec};
use crate::guest::Evidence;
use crate::outcome::Outcome;

/// See the module.
pub struct SwitchState;

/// The group that ns2 has joined.
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 1, 1);
const PORT: u16 = 9003;
/// What of [`rows`] is set here, and a word that is in what is seen then.
const KNOWN: [(&str, &str); 6] = [
    ("multicast-groups", "239.1.1.1"),
    ("multicast-routers", "querier"),
    ("port-flags", "NO_FLOOD"),
    ("fragments", "nx-match"),
    ("tables", "eviction=on"),
    ("misses", "drop"),
];
/// Besides.
const ADDRESSES: (&str, &str) = (
    "addresses that are not learned as usual",
    "ovs-appctl fdb/show br0 | \
     awk '$4 == \"static\" || $1 == \"LOCAL\" || $2 == 9 { print $1, $2, $3, $4 == \"static\" }' | sort",
);

static BEFORE: Mutex<Vec<(&str, String)>> = Mutex::new(Vec::new());

fn known() -> Vec<(&'static str, String)> {
    let addresses = (ADDRESSES.0, shell_lenient(ADDRESSES.1));
    KNOWN.into_iter().map(|(kept, _)| (kept, rows::look(kept))).chain([addresses]).collect()
}

impl Traffic for SwitchState {
    fn name(&self) -> &'static str {
        "switch_state"
    }

    fn about(&self) -> &'static str {
        "multicast groups, static addresses, flags of ports, fragments and tables"
    }

    fn set_up(&self) -> Result<()> {
        plain::set_up()?;
        network::attach("ns4", "br0", "", "")?;
        shell("ovs-vsctl set open_vswitch . other_config:vlan-limit=2")?;
        network::attach("ns5", "br0", "", "tag=9 vlan_mode=dot1q-tunnel cvlans=7")?;
        shell(
            "ip -n ns5 link add link e-ns5 name e7 type vlan id 7 && ip -n ns5 link set e7 up \
             && ip -n ns5 addr add 10.7.0.5/24 dev e7",
        )?;
        shell(
            "ovs-vsctl set bridge br0 mcast_snooping_enable=true \
               other_config:mcast-snooping-disable-flood-unregistered=true \
             && ovs-vsctl set port br0 tag=100 && ip link set br0 up && ip addr add 10.100.0.1/24 dev br0",
        )?;
        shell("ip -n ns1 route add 239.0.0.0/8 dev e-ns1").map(drop)
    }

    /// A restart that nobody cares for has lost all of it.
    fn before_traffic(&self) -> Result<()> {
        rows::set(&KNOWN.map(|(kept, _)| kept))?;
        // Version 2.15 has no static addresses.
        let _unknown_command = rows::set(&["static-addresses"]);
        shell_lenient("ping -c 1 -W 1 10.100.0.9; ip netns exec ns5 ping -c 1 -W 1 10.7.0.9");
        Ok(())
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let (from, to) = (Place::named("ns1"), Place::named("ns2"));
        let mut probes = network::gentle_probes(from.clone(), to.clone(), Ipv4Addr::new(10, 9, 0, 2));
        probes.push(("m".to_owned(), Spec::udp(&from, &to, (GROUP, PORT), 10_000, Ports::Constant)));
        probes.push(network::silent("ns3"));
        probes
    }

    fn before_action(&self, outcome: &mut Outcome) -> Result<()> {
        let before = known();
        outcome.check("the bridge knows its state", is_all(&before), json!(before));
        *BEFORE.lock().ok().context("a thread panicked")? = before;
        Ok(())
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        let before = BEFORE.lock().map(|before| before.clone()).unwrap_or_default();
        for ((name, before), (_, after)) in before.into_iter().zip(known()) {
            let same = before == after;
            match evidence.job.action.judged_as_ours() {
                true => outcome.check(format!("{name} as before"), same, json!({ "before": before, "after": after })),
                false => outcome.note(format!("{name} as before"), same),
            }
        }
    }
}

/// Is there what the scenario is about?
fn is_all(known: &[(&str, String)]) -> bool {
    let words = KNOWN.into_iter().chain([(ADDRESSES.0, "LOCAL 100")]);
    words.zip(known).all(|((name, word), (known, text))| name == *known && text.contains(word))
}

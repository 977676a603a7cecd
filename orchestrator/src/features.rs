//! What an ovs-vswitchd found, as it started, that the kernel datapath can do. It goes by that for its whole life: one that
//! misses recirculation forwards, and connections through `ct()` hang (docs/adoption.md).

use std::collections::BTreeMap;

/// A listing of so many lines is none.
const MOST: usize = 200;

/// By the names and in the words of `ovs-appctl dpif/show-dp-features` (`dpif_show_support`, ofproto/ofproto-dpif.c).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features(BTreeMap<String, String>);

impl Features {
    /// Reads the listing; lines that are none of it are passed over.
    pub fn parse(listing: &str) -> Features {
        let lines = listing.lines().take(MOST).filter_map(|line| line.split_once(": "));
        Features(lines.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).collect())
    }

    /// What `now` has less of: `Recirc: Yes, now No`. A feature that one of them does not name was not lost.
    pub fn lost(&self, now: &Features) -> Vec<String> {
        let named = self.0.iter().filter_map(|(name, before)| Some((name, before, now.0.get(name)?)));
        named
            .filter(|(_, before, now)| is_less(now, before))
            .map(|(name, before, now)| format!("{name}: {before}, now {now}"))
            .collect()
    }
}

fn is_less(now: &str, before: &str) -> bool {
    match (now.parse::<u64>(), before.parse::<u64>()) {
        (Ok(now), Ok(before)) => now < before,
        _ => before == "Yes" && now == "No",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From Debian 12's 3.1.0, abridged; below as its log told that it had been misled.
    const WHOLE: &str = "Masked set action: Yes\nTunnel push pop: No\nUfid: Yes\nSample nesting: 10\n\
                         Max VLAN headers: 2\nMax MPLS depth: 3\nRecirc: Yes\nCT state: Yes\n";

    #[test]
    fn what_a_daemon_misses_is_told() {
        let now = "Masked set action: Yes\nTunnel push pop: No\nUfid: No\nSample nesting: 10\n\
                   Max VLAN headers: 2\nMax MPLS depth: 0\nRecirc: No\nCT state: Yes\n";
        let lost = Features::parse(WHOLE).lost(&Features::parse(now));
        assert_eq!(lost, ["Max MPLS depth: 3, now 0", "Recirc: Yes, now No", "Ufid: Yes, now No"]);
    }

    #[test]
    fn more_is_not_less_and_a_name_that_has_gone_is_no_feature() {
        let now = "Tunnel push pop: Yes\nSample nesting: 12\nExplicit Drop action: No\n";
        assert_eq!(Features::parse(WHOLE).lost(&Features::parse(now)), Vec::<String>::new());
        assert_eq!(Features::parse(WHOLE).lost(&Features::parse("no such bridge")), Vec::<String>::new());
        assert_eq!(Features::default().lost(&Features::parse(WHOLE)), Vec::<String>::new());
    }
}

//! Messages that add flows, as `ovs-ofctl ofp-parse` reads them: the program that is installed decodes them as the daemon
//! that is started will.

use std::ops::Range;
use std::time::Instant;

use super::messages::numbered;
use super::openflow::RealOpenFlow;
use super::told::{self, Head};
use crate::host::Result;

/// What ovs-ofctl makes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Printed<'a> {
    /// A flow, in the words of `dump-flows`.
    Flow {
        /// With its priority, where that is not the usual one.
        matched: &'a str,
        /// Without `actions=`.
        actions: &'a str,
    },
    /// None: the error's name.
    Not(&'a str),
}

/// All of them, by their place.
#[derive(Default)]
pub struct All {
    said: String,
    places: Vec<Place>,
}

/// Where in what was said the words of a message are.
#[derive(Debug, Clone)]
enum Place {
    Unsaid,
    /// Match and actions.
    Flow(Range<usize>, Range<usize>),
    Error(Range<usize>),
}

impl All {
    /// In the words of ovs-ofctl.
    pub(super) fn new(said: String, count: usize) -> Self {
        let mut places = vec![Place::Unsaid; count];
        let place = |part: &str| {
            let from = (part.as_ptr() as usize).saturating_sub(said.as_ptr() as usize);
            if part.is_empty() {
                0..0
            } else {
                from..from + part.len()
            }
        };
        for (number, printed) in said.lines().filter_map(line_of) {
            let Some(known) = places.get_mut(number) else { continue };
            *known = match printed {
                Printed::Flow { matched, actions } => Place::Flow(place(matched), place(actions)),
                Printed::Not(error) => Place::Error(place(error)),
            };
        }
        All { said, places }
    }

    /// What it makes of the message in this place.
    pub fn get(&self, at: usize) -> Printed<'_> {
        let text = |place: &Range<usize>| self.said.get(place.clone()).unwrap_or_default();
        match self.places.get(at) {
            Some(Place::Flow(matched, actions)) => Printed::Flow { matched: text(matched), actions: text(actions) },
            Some(Place::Error(error)) => Printed::Not(text(error)),
            Some(Place::Unsaid) | None => Printed::Not("ovs-ofctl does not say what it is"),
        }
    }
}

/// The flow that each of `messages` adds.
pub fn flows<'a>(openflow: &RealOpenFlow, messages: impl Iterator<Item = &'a [u8]>, until: Instant) -> Result<All> {
    let (mut stream, mut count) = (Vec::new(), 0);
    for (message, number) in messages.zip(0..) {
        stream.extend(numbered(message, number));
        count += 1;
    }
    match count {
        0 => Ok(All::default()),
        _ => {
            let said = openflow.print(&stream, until)?;
            Ok(All::new(of_flows(&said), count))
        }
    }
}

/// The lines about flows. Behind an error the whole message is printed in hexadecimal digits: ten times its words, and kept
/// for nothing.
fn of_flows(said: &str) -> String {
    said.split_inclusive('\n').filter(|line| line_of(line).is_some()).collect()
}

/// What is said of the message of which number:
/// `OFPT_FLOW_MOD (OF1.5) (xid=0x4): ADD table:3 priority=4,ip cookie:0x5 actions=drop`, or
/// `OFPT_FLOW_MOD (OF1.5) (xid=0x4): ***decode error: OFPBAC_MATCH_INCONSISTENT***`.
fn line_of(line: &str) -> Option<(usize, Printed<'_>)> {
    let (name, rest) = line.split_once(" (")?;
    if !matches!(name, "OFPT_FLOW_MOD" | "NXT_FLOW_MOD") {
        return None;
    }
    let (number, rest) = rest.split_once("xid=0x")?.1.split_once("):")?;
    let number = usize::from_str_radix(number, 16).ok()?;
    if let Some((_, error)) = rest.split_once("***decode error: ") {
        return Some((number, Printed::Not(error.split("***").next()?)));
    }
    let (head, actions) = rest.strip_prefix(" ADD")?.split_once("actions=")?;
    // All others are words of the message, not of the match: `table:3`, `idle:60`, `send_flow_rem`.
    let is_match = |word: &&str| word.contains('=') || !(word.contains(':') || told::is_flag(word));
    let matched = head.split(' ').filter(|word| !word.is_empty()).find(is_match).unwrap_or("");
    Some((number, Printed::Flow { matched, actions: actions.trim_end() }))
}

/// A flow as `add-flows` takes it, of the head of its message and its other words. IGMP as `ovs-save` writes it, because ovs-ofctl cannot read its own word.
pub fn text(head: &Head, matched: &str, actions: &str) -> String {
    let mut fields: Vec<String> = Vec::new();
    if head.cookie != 0 {
        fields.push(format!("cookie=0x{:x}", head.cookie));
    }
    let numbers = [
        ("table", u16::from(head.table)),
        ("idle_timeout", head.idle_timeout),
        ("hard_timeout", head.hard_timeout),
        ("importance", head.importance),
    ];
    fields.extend(numbers.iter().filter(|(_, number)| *number != 0).map(|(name, number)| format!("{name}={number}")));
    fields.extend(head.flags().map(str::to_owned));
    fields.extend(matched.split(',').filter(|field| !field.is_empty()).map(super::openflow::readable));
    format!("{} actions={actions}", fields.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_is_what_ovs_ofctl_prints_of_its_message() {
        // As OVS 3.1.0 prints them.
        let line =
            "OFPT_FLOW_MOD (OF1.5) (xid=0x1b): ADD table:3 priority=4,ipv6,ipv6_src=::1 cookie:0x5 idle:60 hard:7 \
                    importance:2 send_flow_rem reset_counts actions=dec_ttl,output:1";
        let flow = |matched, actions| Printed::Flow { matched, actions };
        assert_eq!(line_of(line), Some((27, flow("priority=4,ipv6,ipv6_src=::1", "dec_ttl,output:1"))));
        let line = "NXT_FLOW_MOD (xid=0x2): ADD actions=learn(table=1,actions=drop)";
        assert_eq!(line_of(line), Some((2, flow("", "learn(table=1,actions=drop)"))));
        let line = "OFPT_FLOW_MOD (OF1.5) (xid=0x2): ADD udp actions=drop";
        assert_eq!(line_of(line), Some((2, flow("udp", "drop"))));
        let line = "OFPT_FLOW_MOD (OF1.5) (xid=0xa): ***decode error: OFPBAC_MATCH_INCONSISTENT***";
        assert_eq!(line_of(line), Some((10, Printed::Not("OFPBAC_MATCH_INCONSISTENT"))));
        for other in
            ["OFPT_FLOW_MOD (OF1.5) (xid=0x2): DEL table:255 actions=drop", "00000000  06 0e 00 50 00 00 00 00-00 00"]
        {
            assert_eq!(line_of(other), None, "{other}");
        }
    }

    #[test]
    fn each_message_has_its_words_or_an_error() {
        let said = "OFPT_FLOW_MOD (OF1.5) (xid=0x2): ADD actions=drop\n\
                    OFPT_FLOW_MOD (OF1.5) (xid=0x0): ADD table:3 priority=4,ip actions=output:1\n\
                    OFPT_FLOW_MOD (OF1.5) (xid=0x1): ***decode error: OFPBMC_BAD_FIELD***\n\
                    00000000  06 0e 00 50 00 00 00 00-00 00\nOFPT_FLOW_MOD (OF1.5) (xid=0x9): ADD actions=drop\n";
        assert_eq!(of_flows(said).lines().count(), 4);
        let all = All::new(of_flows(said), 4);
        assert_eq!(all.get(0), Printed::Flow { matched: "priority=4,ip", actions: "output:1" });
        assert_eq!(all.get(1), Printed::Not("OFPBMC_BAD_FIELD"));
        assert_eq!(all.get(2), Printed::Flow { matched: "", actions: "drop" });
        assert!(matches!(all.get(3), Printed::Not(_)) && matches!(all.get(9), Printed::Not(_)));
    }

    #[test]
    fn the_words_of_a_flow_are_those_of_a_dump() {
        let head =
            Head { cookie: 5, table: 1, idle_timeout: 60, hard_timeout: 0, priority: 7, flags: 1 | 4, importance: 0 };
        assert_eq!(
            text(&head, "priority=7,igmp,igmp_type=17", "drop"),
            "cookie=0x5,table=1,idle_timeout=60,send_flow_rem,reset_counts,priority=7,ip,nw_proto=2,tp_src=17 actions=drop"
        );
    }
}

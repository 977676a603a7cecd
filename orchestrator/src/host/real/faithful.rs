//! Is what OpenFlow tells of a bridge's flows what the daemon has?
//!
//! A rule that one version of OpenFlow has added another may tell as another rule: `mod_vlan_vid` of OpenFlow 1.0 pushes
//! a tag only where there is none, and from 1.1 on it is told as `push_vlan`, which always does (`encode_SET_VLAN_VID`,
//! lib/ofp-actions.c); a match on some bits of the priority in a tag is told as one on all of them (`nx_put_raw`,
//! lib/nx-match.c); 1.0 has no meters. Put back, it would be that other rule. So what is told is compared with the
//! daemon's own text (`ovs-appctl bridge/dump-flows`): match and actions are printed by the same functions. Where the
//! words of the actions differ, those must be there as often that an encoding adds or leaves out; others have several
//! spellings of one meaning (`mod_nw_src` and `set_field`).

use std::collections::BTreeSet;

use super::openflow::{first_field, flow};
use super::told;
use crate::host::RefusedRule;

/// Actions that must be told as often as the daemon has them.
const COUNTED: [&str; 7] =
    ["push_vlan:", "write_actions(", "clear_actions", "write_metadata:", "goto_table:", "meter:", "group:"];
/// What is no part of a match.
const NO_MATCH: [&str; 7] =
    ["cookie=", "idle_timeout=", "hard_timeout=", "importance=", "n_offload_packets=", "n_offload_bytes=", "actions="];
/// Flags that no message has.
const INTERNAL_FLAGS: [&str; 2] = ["allow_hidden_fields", "no_readonly_table"];
/// The table of the daemon's own rules (TBL_INTERNAL, ofproto/ofproto-dpif.h).
const INTERNAL_TABLE: &str = "table=254";
/// OFP_DEFAULT_PRIORITY, which is not printed.
const USUAL_PRIORITY: u16 = 0x8000;
/// What stands for "no tag" in a match.
pub const UNTAGGED: &str = "vlan_tci=untagged";

/// The flows in the daemon's text, but those that it keeps to itself: each one's line, and its [`key`].
pub fn own_lines(own: &str) -> impl Iterator<Item = (&str, String)> {
    let lines = own.lines().filter(|line| line.contains("actions="));
    lines.map(|line| (line, key(&own_flow(line)))).filter(|(_, key)| !is_hidden(key))
}

/// Such a line as `add-flows` takes it.
pub fn own_flow(line: &str) -> String {
    flow(&line.replacen("table_id=", "table=", 1))
}

/// All of them, so.
pub fn own_flows(own: &str) -> Vec<String> {
    own_lines(own).map(|(line, _)| own_flow(line)).collect()
}

/// The actions of a rule, as text.
pub fn actions(rule: &str) -> &str {
    rule.split_once("actions=").map_or("", |(_, actions)| actions.trim_end())
}

/// Rules that a daemon keeps to itself: those of its own table, and those of in-band control and fail-open, whose
/// priority no rule of others can have.
fn is_hidden(key: &str) -> bool {
    key.split(',').any(|field| {
        let priority = field.strip_prefix("priority=").and_then(|number| number.parse::<u32>().ok());
        field == INTERNAL_TABLE || priority.is_some_and(|priority| priority > u32::from(u16::MAX))
    })
}

/// Table, priority and match, the same for the same rule. Rules of a bridge that share it differ in the value of a
/// tunnel's option alone.
pub fn key(rule: &str) -> String {
    let fields: BTreeSet<String> = criteria(rule).map(field).collect();
    fields.into_iter().collect::<Vec<_>>().join(",")
}

/// What a rule says of the tag: no tag can be said in two ways, and some versions know one of them.
pub fn tag(rule: &str) -> Option<&str> {
    criteria(rule).find_map(|field| field.strip_prefix("vlan_tci="))
}

/// Have both the same values of tunnels' options? Neither how long they are printed counts, nor their masks, which ovs-ofctl
/// leaves out.
pub fn same_options(own: &str, told: &str) -> bool {
    if !own.contains("tun_metadata") && !told.contains("tun_metadata") {
        return true;
    }
    options(own) == options(told)
}

fn options(rule: &str) -> BTreeSet<(&str, &str)> {
    let fields = criteria(rule).filter_map(|field| field.split_once('='));
    let options = fields.filter(|(name, _)| name.starts_with("tun_metadata"));
    options.map(|(name, value)| (name, digits(value))).collect()
}

/// The digits of a number that count, without its mask.
fn digits(value: &str) -> &str {
    let number = value.split_once('/').map_or(value, |(number, _)| number);
    number.trim_start_matches("0x").trim_start_matches('0')
}

/// Table and priority of a rule, or of a daemon's own line.
pub fn place(rule: &str) -> (u8, u16) {
    let number = |name: &str| criteria(rule).find_map(|field| field.strip_prefix(name)?.parse::<u16>().ok());
    let table =
        number("table=").or_else(|| number("table_id=")).and_then(|table| u8::try_from(table).ok()).unwrap_or(0);
    (table, number("priority=").unwrap_or(USUAL_PRIORITY))
}

/// Table, priority and match as ovs-ofctl takes them, to delete the rule. A dump does not name the first table, and a
/// deletion that names none is one from all.
pub fn to_delete(rule: &str) -> String {
    let mut fields: Vec<&str> = criteria(rule).collect();
    if !fields.iter().any(|field| field.starts_with("table=")) {
        fields.insert(0, "table=0");
    }
    fields.join(",")
}

/// The command that deletes a rule, as one types it, where there is one. `protocols` are the versions that its bridge
/// speaks; none are all.
pub fn deletion(refused: &RefusedRule, protocols: &[String]) -> Option<String> {
    let RefusedRule { bridge, kind, rule, .. } = refused;
    let highest = protocols.iter().max().map_or("OpenFlow15", String::as_str);
    match kind.as_str() {
        "flow" => {
            // What ovs-ofctl speaks where it is not told. With the extensions it takes every match.
            let default = protocols.is_empty() || protocols.iter().any(|version| version == "OpenFlow10");
            let version = if default { String::new() } else { format!("-O {highest} ") };
            Some(format!("ovs-ofctl {version}--strict del-flows {bridge} '{}'", to_delete(rule)))
        }
        "group" => Some(format!("ovs-ofctl -O {highest} del-groups {bridge} {}", first_field(rule))),
        "meter" => Some(format!("ovs-ofctl -O {highest} del-meter {bridge} {}", first_field(rule))),
        _ => None,
    }
}

fn criteria(rule: &str) -> impl Iterator<Item = &str> {
    let head = rule.split_once("actions=").map_or(rule, |(head, _)| head);
    head.split([',', ' ']).filter(|field| {
        let is_flag = told::is_flag(field) || INTERNAL_FLAGS.contains(field);
        !field.is_empty() && !is_flag && !NO_MATCH.iter().any(|other| field.starts_with(other))
    })
}

/// One field of a match. The value of a tunnel's option is printed in the length that the bridge's map gives it, which
/// ovs-ofctl does not know.
fn field(field: &str) -> String {
    match field.split_once('=') {
        Some(("vlan_tci", value)) if is_untagged(value) => UNTAGGED.to_owned(),
        Some((name, _)) if name.starts_with("tun_metadata") => name.to_owned(),
        _ => field.to_owned(),
    }
}

/// No tag: all of the TCI is 0 then, and the bit that says that there is one is among those that are compared.
fn is_untagged(value: &str) -> bool {
    let (value, mask) = value.split_once('/').unwrap_or((value, "0xffff"));
    let number = |text: &str| text.strip_prefix("0x").and_then(|digits| u16::from_str_radix(digits, 16).ok());
    number(value) == Some(0) && number(mask).is_some_and(|mask| mask & 0x1000 != 0)
}

/// See `COUNTED`. On a packet without a tag, setting one pushes it. A queue that was set before holds again after an
/// `enqueue`, and not after the `pop_queue` that it is told as.
pub fn same_meaning(key: &str, own: &str, told: &str) -> bool {
    let untagged = key.split(',').any(|field| field == UNTAGGED);
    let count = |text: &str, word: &str| text.matches(word).count();
    let told_alike = |word: &&str| (untagged && *word == "push_vlan:") || count(own, word) == count(told, word);
    let requeues = own.contains("enqueue:") && own.contains("set_queue:") && !told.contains("enqueue:");
    // Before OpenFlow 1.2 what sets a field has no mask (`set_field_to_legacy_openflow`).
    let legacy = |text: &str| LEGACY.iter().map(|word| count(text, word)).sum::<usize>();
    let loses_mask = sets_with_mask(own) && legacy(told) > legacy(own) + whole_sets(own);
    !requeues && !loses_mask && COUNTED.iter().all(told_alike)
}

/// How actions that set a field begin, that have no mask.
const LEGACY: [&str; 2] = ["mod_", "set_vlan_"];

/// The values that `set_field` sets, as `0x5/0xff`.
fn set_values(actions: &str) -> impl Iterator<Item = &str> {
    actions.split("set_field:").skip(1).filter_map(|rest| rest.split("->").next())
}

fn sets_with_mask(actions: &str) -> bool {
    set_values(actions).any(|value| value.contains('/'))
}

/// How many set a field as a whole, which needs no mask.
fn whole_sets(actions: &str) -> usize {
    set_values(actions).filter(|value| !value.contains('/')).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `ovs-appctl bridge/dump-flows` and `ovs-ofctl -O OpenFlow15 dump-flows` of OVS 3.1.0 say of the same rule: the
    /// rules of the first that the second does not tell.
    fn look(own: &str, told: &str) -> Vec<String> {
        let told: Vec<String> = told.lines().map(flow).collect();
        let is_told = |own: &String| {
            let own_key = key(own);
            told.iter().any(|told| key(told) == own_key && same_meaning(&own_key, actions(own), actions(told)))
        };
        own_flows(own).into_iter().filter(|own| !is_told(own)).collect()
    }

    #[test]
    fn other_spellings_are_the_same_rule() {
        let own = "duration=0s, n_packets=0, n_bytes=0, priority=2,ip,actions=dec_ttl,mod_nw_src:1.2.3.4,output:1\n\
             table_id=1, duration=0s, n_packets=0, n_bytes=0, priority=3,reg0=0x5,actions=load:0x3->NXM_NX_REG1[0..15]\n\
             duration=0s, n_packets=0, n_bytes=0, in_port=2,dl_vlan=10,actions=mod_vlan_vid:5,output:1\n\
             duration=0s, n_packets=0, n_bytes=0, priority=21,vlan_tci=0x0000,actions=mod_vlan_vid:9,output:2\n\
             duration=0s, n_packets=0, n_bytes=0, priority=4,tun_metadata0=0x5/0xff,actions=drop\n\
             duration=0s, n_packets=0, n_bytes=0, priority=9,udp,actions=enqueue:1:3\n\
             duration=0s, n_packets=0, n_bytes=0, priority=7,igmp,igmp_type=17,actions=drop\n\
             table_id=254, duration=9s, n_packets=0, n_bytes=0, priority=2,recirc_id=0,actions=drop\n\
             duration=9s, n_packets=0, n_bytes=0, priority=180008,tcp,tp_src=6653,actions=NORMAL\n";
        let told = "cookie=0x5, reset_counts priority=2,ip actions=dec_ttl,set_field:1.2.3.4->ip_src,output:1\n\
             table=1, idle_timeout=60, send_flow_rem priority=3,reg0=0x5 actions=set_field:0x3/0xffff->reg1\n\
             in_port=2,dl_vlan=10 actions=set_field:4101->vlan_vid,output:1\n\
             priority=21,vlan_tci=0x0000/0x1fff actions=push_vlan:0x8100,set_field:4105->vlan_vid,output:2\n\
             priority=4,tun_metadata0=0x5 actions=drop\n\
             priority=9,udp actions=set_queue:3,output:1,pop_queue\n\
             priority=7,igmp,igmp_type=17 actions=drop";
        assert_eq!(look(own, told), [""; 0]);
    }

    #[test]
    fn rules_that_differ_in_a_tunnel_option_alone_are_two_rules() {
        let own = "duration=0s, n_packets=0, n_bytes=0, priority=4,tun_metadata0=0x1,actions=group:1\n\
             duration=0s, n_packets=0, n_bytes=0, priority=4,tun_metadata0=0x2,actions=drop\n";
        let told = "priority=4,tun_metadata0=0x1 actions=group:1\npriority=4,tun_metadata0=0x2 actions=drop";
        assert_eq!(look(own, told), [""; 0]);
        let found = look(own, "priority=4,tun_metadata0=0x1 actions=drop\npriority=4,tun_metadata0=0x2 actions=drop");
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn options_are_the_same_however_they_are_printed() {
        let own = "priority=4,tun_metadata0=0x00000005/0xff,tun_metadata1 actions=drop";
        assert!(same_options(own, "priority=9,tun_metadata0=0x5,ip actions=drop"));
        assert!(!same_options(own, "tun_metadata0=0x50 actions=drop") && !same_options(own, "ip actions=drop"));
        assert!(same_options("ip actions=drop", "udp actions=set_field:5->tun_metadata0"));
    }

    #[test]
    fn a_mask_that_a_version_leaves_out_is_missed() {
        // As OVS 3.1.0 tells them in OpenFlow 1.0.
        let is_told = |own: &str, told: &str| same_meaning("ip", own, told);
        assert!(!is_told("set_field:02:00:00:00:00:00/ff:00:00:00:00:00->eth_src", "mod_dl_src:02:00:00:00:00:00"));
        assert!(!is_told(
            "set_field:1.2.3.4->ip_src,set_field:10.0.0.0/8->ip_dst",
            "mod_nw_src:1.2.3.4,mod_nw_dst:10.0.0.0"
        ));
        assert!(is_told(
            "set_field:1.2.3.4->ip_src,set_field:0x5/0xff->reg0",
            "mod_nw_src:1.2.3.4,load:0x5->NXM_NX_REG0[0..7]"
        ));
        assert!(is_told(
            "mod_nw_dst:1.2.3.4,set_field:0x5/0xff->reg0",
            "mod_nw_dst:1.2.3.4,load:0x5->NXM_NX_REG0[0..7]"
        ));
    }

    #[test]
    fn a_tag_that_is_always_pushed_is_another_rule() {
        let found = look(
            "duration=0s, n_packets=0, n_bytes=0, in_port=1,actions=mod_vlan_vid:10,output:2",
            "in_port=1 actions=push_vlan:0x8100,set_field:4106->vlan_vid,output:2",
        );
        assert_eq!(found, ["in_port=1 actions=mod_vlan_vid:10,output:2"]);
        assert_eq!(
            look(
                "duration=0s, n_packets=0, n_bytes=0, in_port=1,actions=push_vlan:0x8100,set_field:4106->vlan_vid",
                "in_port=1 actions=push_vlan:0x8100,set_field:4106->vlan_vid"
            ),
            [""; 0]
        );
    }

    #[test]
    fn a_match_that_is_told_as_another_is_another_rule() {
        let found = look(
            "duration=0s, n_packets=0, n_bytes=0, priority=7,vlan_tci=0x3000/0x3000,actions=drop",
            "priority=7,dl_vlan_pcp=1 actions=drop",
        );
        assert!(found[0].contains("priority=7,vlan_tci=0x3000/0x3000 actions=drop"), "{found:?}");
        let lost =
            look("table_id=1, duration=0s, n_packets=0, n_bytes=0, reg0=0x5,actions=drop", "table=1, actions=drop");
        assert!(lost[0].contains("table=1,reg0=0x5"), "{lost:?}");
        assert_eq!(
            to_delete(
                "cookie=0x5,table=1,send_flow_rem,priority=3,vlan_tci=0x0000/0x1fff,tun_metadata0=0x5 actions=drop"
            ),
            "table=1,priority=3,vlan_tci=0x0000/0x1fff,tun_metadata0=0x5"
        );
        assert_eq!(to_delete("reset_counts,priority=7,ip actions=drop"), "table=0,priority=7,ip");
        assert_eq!(place("cookie=0x5,table=1,priority=3,ip actions=learn(table=9)"), (1, 3));
        assert_eq!(place("table_id=1, duration=0s, n_packets=0, n_bytes=0, priority=3,ip,actions=drop"), (1, 3));
        assert_eq!(place("ip actions=learn(table=9,priority=1)"), (0, 0x8000));
        assert_eq!((tag("priority=1,vlan_tci=0x0000 actions=drop"), tag("ip actions=drop")), (Some("0x0000"), None));
        // A tag whose number is 0, or none: the bit is not compared.
        assert_eq!(key("vlan_tci=0x0000/0x0fff actions=drop"), "vlan_tci=0x0000/0x0fff");
    }

    #[test]
    fn a_rule_is_deleted_by_a_command_that_ovs_ofctl_takes() {
        let typed = |kind: &str, rule: &str, protocols: &[&str]| {
            let (bridge, kind, rule, reason) = ("br0".into(), kind.into(), rule.into(), String::new());
            let protocols: Vec<String> = protocols.iter().map(|version| (*version).to_owned()).collect();
            deletion(&RefusedRule { bridge, kind, rule, reason }, &protocols)
        };
        let rule = "cookie=0x7,idle_timeout=9,importance=2,send_flow_rem,check_overlap,reset_counts,no_packet_counts,\
                    no_byte_counts,priority=7,ip actions=learn(table=1,priority=3),output:2";
        let flow = |protocols| typed("flow", rule, protocols).unwrap();
        assert_eq!(flow(&[]), "ovs-ofctl --strict del-flows br0 'table=0,priority=7,ip'");
        assert_eq!(flow(&["OpenFlow10", "OpenFlow13"]), flow(&[]));
        assert_eq!(
            flow(&["OpenFlow13", "OpenFlow14"]),
            "ovs-ofctl -O OpenFlow14 --strict del-flows br0 'table=0,priority=7,ip'"
        );
        let group = typed("group", "group_id=5,type=all,bucket=actions=output:1", &[]).unwrap();
        assert_eq!(group, "ovs-ofctl -O OpenFlow15 del-groups br0 group_id=5");
        let meter = typed("meter", "meter=3 kbps bands=type=drop rate=1", &["OpenFlow13"]).unwrap();
        assert_eq!(meter, "ovs-ofctl -O OpenFlow13 del-meter br0 meter=3");
        assert_eq!(typed("tlv-map", "{class=0x1,type=0x1,len=4}->tun_metadata0", &[]), None);
    }

    #[test]
    fn what_a_version_leaves_out_is_missed() {
        let own = "duration=0s, n_packets=0, n_bytes=0, priority=1,actions=meter:5,set_queue:1,enqueue:1:2,output:3";
        assert_eq!(look(own, "priority=1 actions=set_queue:1,enqueue:1:2,output:3").len(), 1);
        let requeues = "duration=0s, n_packets=0, n_bytes=0, priority=1,actions=set_queue:1,enqueue:1:2,output:3";
        assert_eq!(look(requeues, "priority=1 actions=set_queue:1,set_queue:2,output:1,pop_queue,output:3").len(), 1);
    }
}

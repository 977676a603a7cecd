//! What a bridge tells of itself, turned into what adds it to another: match, instructions, buckets and bands stay the
//! bytes that were told.
//!
//! OpenFlow 1.1 to 1.5: FLOW_MOD (A.3.4.1), GROUP_MOD (A.3.4.2), METER_MOD (A.3.4.5), replies of OFPMP_FLOW, which 1.5
//! calls OFPMP_FLOW_DESC, OFPMP_GROUP_DESC and OFPMP_METER_CONFIG (A.3.5); NXST_FLOW, NXT_FLOW_MOD, NXT_GROUP_MOD and
//! NXT_TLV_TABLE_MOD as in include/openflow/nicira-ext.h. Numbers in network order.

use std::time::Instant;

use super::connection::{Connection, Question};
use super::messages::{
    extension, kind, message, EXPERIMENTER, FLOW_MOD, FLOW_MOD_SUBTYPE, GROUP_MOD, GROUP_MOD_SUBTYPE, HEADER,
    METER_MOD, OF10, OF11, OF13, OF15,
};
use crate::host::Result;

/// No buffered packet, and no port or group that a rule must name.
const NOTHING: [u8; 4] = [0xff; 4];
/// A match of type OFPMT_OXM without fields, padded.
const MATCH_ALL: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
const ALL_TABLES: u8 = 0xff;
/// OFPG_ALL, OFPM_ALL.
const ALL_GROUPS: [u8; 4] = [0xff, 0xff, 0xff, 0xfc];
const ALL_METERS: [u8; 4] = [0xff; 4];
/// Types of multipart messages; NXST_FLOW and NXST_GROUP_DESC in 1.0.
const FLOW: u16 = 1;
const GROUP_DESC: u16 = 7;
const METER_CONFIG: u16 = 10;
const NXST_FLOW: u32 = 0;
const NXST_GROUP_DESC: u32 = 8;
/// NXT_TLV_TABLE_MOD, _REQUEST.
const TLV_TABLE_MOD: u32 = 24;
const TLV_TABLE_REQUEST: u32 = 25;
/// OXS_OF_DURATION, its header: class, field and length.
const OXS_DURATION: [u8; 4] = [0x80, 0x02, 0, 8];

/// A flow that a bridge has told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The FLOW_MOD that adds it, of the version in which it was told.
    pub message: Vec<u8>,
    /// How long it is there, milliseconds.
    pub duration_ms: u64,
    /// How long it is unchanged, seconds: only 1.0 tells that.
    pub hard_age_s: Option<u64>,
}

/// All flows of a bridge, in the version of the connection.
pub fn flows(connection: &mut Connection, until: Instant) -> Result<Vec<Told>> {
    let version = connection.version();
    let replies = match version {
        OF10 => {
            // Any port; no match; all tables.
            let body = [0xff, 0xff, 0, 0, ALL_TABLES, 0, 0, 0];
            connection.multipart(&Question::Nicira(NXST_FLOW), &body, until)?
        }
        _ => {
            let body = [&[ALL_TABLES, 0, 0, 0][..], &NOTHING, &NOTHING, &[0; 4], &[0; 16], &MATCH_ALL].concat();
            connection.multipart(&Question::Standard(FLOW), &body, until)?
        }
    };
    let mut all = Vec::new();
    for reply in &replies {
        for entry in entries(reply) {
            let told = entry.and_then(|entry| flow(version, entry));
            all.push(told.ok_or_else(|| connection.error("a flow that is not told as OpenFlow has it"))?);
        }
    }
    Ok(all)
}

/// All groups of a bridge, as what adds them.
pub fn groups(connection: &mut Connection, until: Instant) -> Result<Vec<Vec<u8>>> {
    let all = [&ALL_GROUPS[..], &[0; 4]].concat();
    let (question, body): (_, &[u8]) = match connection.version() {
        OF10 => (Question::Nicira(NXST_GROUP_DESC), &all),
        OF15 => (Question::Standard(GROUP_DESC), &all),
        _ => (Question::Standard(GROUP_DESC), &[]),
    };
    let replies = connection.multipart(&question, body, until)?;
    all_of(connection, &replies, group)
}

/// All meters of a bridge, as what adds them.
pub fn meters(connection: &mut Connection, until: Instant) -> Result<Vec<Vec<u8>>> {
    if connection.version() < OF13 {
        return Ok(Vec::new());
    }
    let body = [&ALL_METERS[..], &[0; 4]].concat();
    let replies = connection.multipart(&Question::Standard(METER_CONFIG), &body, until)?;
    all_of(connection, &replies, |version, entry| message(version, METER_MOD, 0, &[&[0, 0], entry.get(2..)?]))
}

/// The mappings of a bridge's TLV map, as what adds each.
pub fn tlv_map(connection: &mut Connection, until: Instant) -> Result<Vec<Vec<u8>>> {
    let (version, xid) = (connection.version(), connection.next_xid());
    let request = extension(version, TLV_TABLE_REQUEST, xid, &[]).unwrap_or_default();
    let reply = connection.ask(&request, until)?;
    // Experimenter and subtype; space and number of fields.
    let rows = reply.get(HEADER + 8 + 16..).unwrap_or_default().chunks(8);
    // NTTTMC_ADD and padding.
    let add = |row: &[u8]| extension(version, TLV_TABLE_MOD, 0, &[&[0; 8], row]).filter(|_| row.len() == 8);
    rows.map(|row| add(row).ok_or_else(|| connection.error("half a mapping of its TLV map"))).collect()
}

fn all_of(
    connection: &Connection,
    replies: &[Vec<u8>],
    add: impl Fn(u8, &[u8]) -> Option<Vec<u8>>,
) -> Result<Vec<Vec<u8>>> {
    let all = replies.iter().flat_map(|reply| entries(reply));
    all.map(|entry| {
        let added = entry.and_then(|entry| add(connection.version(), entry));
        added.ok_or_else(|| connection.error("a group or meter that is not told as OpenFlow has it"))
    })
    .collect()
}

/// What a reply lists: each entry begins with its length. `None` is one that is cut off.
fn entries(mut rest: &[u8]) -> impl Iterator<Item = Option<&[u8]>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let length = number(rest, 0).filter(|length| *length >= HEADER);
        let entry = length.and_then(|length| rest.split_at_checked(length));
        rest = entry.map_or(&[], |(_, after)| after);
        Some(entry.map(|(entry, _)| entry))
    })
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

fn milliseconds(seconds_and_nanoseconds: &[u8]) -> Option<u64> {
    let (seconds, nanoseconds) = seconds_and_nanoseconds.split_at_checked(4)?;
    let seconds = u64::from(u32::from_be_bytes(seconds.try_into().ok()?));
    Some(seconds * 1000 + u64::from(u32::from_be_bytes(nanoseconds.try_into().ok()?)) / 1_000_000)
}

fn flow(version: u8, entry: &[u8]) -> Option<Told> {
    let part = |from: usize, to: usize| entry.get(from..to);
    match version {
        // Length, table, padding, duration, priority, time-outs, length of the match, ages, cookie, counters.
        OF10 => {
            let command = [*entry.get(2)?, 0];
            // Time-outs; priority; no buffer; any port; no flags are told.
            let body: [&[u8]; 9] = [
                part(24, 32)?,
                &command,
                part(14, 18)?,
                part(12, 14)?,
                &NOTHING,
                &[0xff, 0xff, 0, 0],
                part(18, 20)?,
                &[0; 6],
                entry.get(48..)?,
            ];
            let hard_age_s = number(entry, 22)?.checked_sub(1).map(|age| age as u64);
            let message = extension(version, FLOW_MOD_SUBTYPE, 0, &body)?;
            Some(Told { message, duration_ms: milliseconds(part(4, 12)?)?, hard_age_s })
        }
        // Length, padding, table, padding, priority, time-outs, flags, importance, cookie; match; statistics.
        OF15 => {
            let matched = 24..24 + number(entry, 26)?.next_multiple_of(8);
            let length = number(entry, matched.end + 2)?;
            let statistics = entry.get(matched.end + 4..matched.end + length)?;
            let after = entry.get(matched.end + length.next_multiple_of(8)..)?;
            let fields = Fields {
                table: *entry.get(4)?,
                cookie: part(16, 24)?,
                timeouts: part(8, 12)?,
                priority: part(6, 8)?,
                flags: part(12, 16)?,
            };
            let message = fields.flow_mod(version, &[entry.get(matched)?, after])?;
            Some(Told { message, duration_ms: duration(statistics)?, hard_age_s: None })
        }
        // Length, table, padding, duration, priority, time-outs, flags, importance, padding, cookie, counters; match.
        _ => {
            let fields = Fields {
                table: *entry.get(2)?,
                cookie: part(24, 32)?,
                timeouts: part(14, 18)?,
                priority: part(12, 14)?,
                flags: part(18, 22)?,
            };
            let message = fields.flow_mod(version, &[entry.get(48..)?])?;
            Some(Told { message, duration_ms: milliseconds(part(4, 12)?)?, hard_age_s: None })
        }
    }
}

/// What is behind the cookie's mask and before the match in a FLOW_MOD.
struct Fields<'a> {
    table: u8,
    cookie: &'a [u8],
    timeouts: &'a [u8],
    priority: &'a [u8],
    /// And the importance.
    flags: &'a [u8],
}

impl Fields<'_> {
    fn flow_mod(&self, version: u8, rest: &[&[u8]]) -> Option<Vec<u8>> {
        let table_and_add = [self.table, 0];
        let head: [&[u8]; 9] = [
            self.cookie,
            &[0; 8],
            &table_and_add,
            self.timeouts,
            self.priority,
            &NOTHING,
            &NOTHING,
            &NOTHING,
            self.flags,
        ];
        message(version, FLOW_MOD, 0, &[&head[..], rest].concat())
    }
}

/// OXS_OF_DURATION among the statistics of OpenFlow 1.5.
fn duration(mut statistics: &[u8]) -> Option<u64> {
    while let Some((head, rest)) = statistics.split_first_chunk::<4>() {
        let (value, after) = rest.split_at_checked(usize::from(head[3]))?;
        if *head == OXS_DURATION {
            return milliseconds(value);
        }
        statistics = after;
    }
    Some(0)
}

/// A GROUP_MOD. Before OpenFlow 1.5 (and in 1.0 as in 1.5, where Nicira has it) length and command are in the same place.
fn group(version: u8, entry: &[u8]) -> Option<Vec<u8>> {
    let after_length = entry.get(2..8)?;
    match version {
        OF10 | OF15 => {
            // Length of the buckets, padding; then no bucket in particular.
            let all_buckets = [&[0, 0][..], &NOTHING].concat();
            let body: [&[u8]; 5] = [&[0, 0], after_length, entry.get(8..10)?, &all_buckets, entry.get(16..)?];
            match version {
                OF10 => extension(version, GROUP_MOD_SUBTYPE, 0, &body),
                _ => message(version, GROUP_MOD, 0, &body),
            }
        }
        _ => message(version, GROUP_MOD, 0, &[&[0, 0], after_length, entry.get(8..)?]),
    }
}

/// What a FLOW_MOD says beside match and actions, and where. All versions have the same place for most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub cookie: u64,
    pub table: u8,
    pub idle_timeout: u16,
    pub hard_timeout: u16,
    pub priority: u16,
    /// `OFPFF_*` of the message's version.
    pub flags: u16,
    pub importance: u16,
}

/// OFPFF_CHECK_OVERLAP; OFPFF_RESET_COUNTS, from 1.2 on.
pub const CHECK_OVERLAP: u16 = 2;
pub const RESET_COUNTS: u16 = 4;
/// The names of the flags, as ovs-ofctl has them.
pub const FLAGS: [(u16, &str); 5] = [
    (1, "send_flow_rem"),
    (CHECK_OVERLAP, "check_overlap"),
    (RESET_COUNTS, "reset_counts"),
    (8, "no_packet_counts"),
    (16, "no_byte_counts"),
];
const HARD_TIMEOUT: usize = 28;

impl Head {
    /// What is in a message that adds a flow.
    pub fn of(flow_mod: &[u8]) -> Option<Head> {
        let is_old = kind(flow_mod) == Some(EXPERIMENTER);
        let word = |at: usize| number(flow_mod, at).and_then(|word| u16::try_from(word).ok());
        let cookie = if is_old { 16 } else { 8 };
        Some(Head {
            cookie: u64::from_be_bytes(flow_mod.get(cookie..cookie + 8)?.try_into().ok()?),
            table: *flow_mod.get(24)?,
            idle_timeout: word(26)?,
            hard_timeout: word(HARD_TIMEOUT)?,
            priority: word(30)?,
            flags: word(if is_old { 38 } else { 44 })?,
            importance: if is_old { 0 } else { word(46)? },
        })
    }

    /// The names of the flags.
    pub fn flags(&self) -> impl Iterator<Item = &'static str> + '_ {
        names_of(self.flags)
    }
}

/// The names of these flags.
pub fn names_of(flags: u16) -> impl Iterator<Item = &'static str> {
    FLAGS.into_iter().filter(move |(flag, _)| flags & flag != 0).map(|(_, name)| name)
}

/// Is this the name of a flag?
pub fn is_flag(word: &str) -> bool {
    FLAGS.iter().any(|(_, name)| *name == word)
}

/// Gives the message flags and importance, as far as its version has them; false where that is not all.
pub fn set_flags(flow_mod: &mut [u8], flags: u16, importance: u16) -> bool {
    let version = flow_mod.first().copied().unwrap_or(OF10);
    let known = match version {
        OF10 | OF11 => 1 | CHECK_OVERLAP,
        version if version < OF13 => 1 | CHECK_OVERLAP | RESET_COUNTS,
        _ => u16::MAX,
    };
    let at = if kind(flow_mod) == Some(EXPERIMENTER) { 38 } else { 44 };
    put(flow_mod, at, flags & known);
    let tells_importance = version > OF13;
    if tells_importance {
        put(flow_mod, 46, importance);
    }
    // What 1.0 and 1.1 add always resets the counts.
    flags & !known & !RESET_COUNTS == 0 && (tells_importance || importance == 0)
}

/// Gives the message another `hard_timeout`, seconds.
pub fn set_hard_timeout(flow_mod: &mut [u8], seconds: u16) {
    put(flow_mod, HARD_TIMEOUT, seconds);
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

/// Table, priority and match of a FLOW_MOD, which no two flows of a bridge share.
pub fn identity(flow_mod: &[u8]) -> Option<(u8, u16, &[u8])> {
    let head = Head::of(flow_mod)?;
    let matched = match kind(flow_mod)? {
        EXPERIMENTER => flow_mod.get(48..48 + number(flow_mod, 40)?)?,
        _ => flow_mod.get(48..48 + number(flow_mod, 50)?)?,
    };
    Some((head.table, head.priority, matched))
}

/// The same message with its match, and without what is done then.
pub fn without_instructions(flow_mod: &[u8]) -> Vec<u8> {
    let end = identity(flow_mod).map(|(_, _, matched)| (48 + matched.len().next_multiple_of(8)).min(flow_mod.len()));
    let mut message = flow_mod.get(..end.unwrap_or(flow_mod.len())).unwrap_or_default().to_vec();
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    put(&mut message, 2, length);
    message
}

/// The same message, so that it deletes the very flow that it adds: OFPFC_DELETE_STRICT, with any cookie. Without actions,
/// which the bridge need not take back as it tells them.
pub fn deletion(flow_mod: &[u8]) -> Vec<u8> {
    let mut message = without_instructions(flow_mod);
    if let Some(command) = message.get_mut(25) {
        *command = 4;
    }
    let cookie = if kind(flow_mod) == Some(EXPERIMENTER) { 16..24 } else { 8..16 };
    message.get_mut(cookie).into_iter().for_each(|cookie| cookie.fill(0));
    message
}

/// Deletes all flows (OFPFC_DELETE); from OpenFlow 1.1 on.
pub fn delete_all_flows(version: u8, xid: u32) -> Option<Vec<u8>> {
    let (none, all) = ([0; 16], [ALL_TABLES, 3, 0, 0, 0, 0, 0, 0]);
    message(version, FLOW_MOD, xid, &[&none, &all, &NOTHING, &NOTHING, &NOTHING, &[0; 4], &MATCH_ALL])
}

/// Deletes a group, or all of them (OFPGC_DELETE).
pub fn delete_groups(version: u8, id: Option<[u8; 4]>, xid: u32) -> Option<Vec<u8>> {
    let head = [&[0, 2, 0, 0][..], &id.unwrap_or(ALL_GROUPS)].concat();
    // No buckets, of any number.
    let buckets = [&[0; 4][..], &NOTHING].concat();
    match version {
        OF10 => extension(version, GROUP_MOD_SUBTYPE, xid, &[&head, &buckets]),
        OF15 => message(version, GROUP_MOD, xid, &[&head, &buckets]),
        _ => message(version, GROUP_MOD, xid, &[&head]),
    }
}

/// The number of the group that a GROUP_MOD is about.
pub fn group_id(group_mod: &[u8]) -> Option<[u8; 4]> {
    let at = if kind(group_mod) == Some(EXPERIMENTER) { 20 } else { 12 };
    group_mod.get(at..at + 4)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    /// `cookie=0x99,table=3,priority=7,reg0=0x5,idle_timeout=100,hard_timeout=900,send_flow_rem actions=drop`, 2.5 s old.
    const HEAD: Head =
        Head { cookie: 0x99, table: 3, idle_timeout: 100, hard_timeout: 900, priority: 7, flags: 1, importance: 0 };

    #[test]
    fn a_flow_is_added_by_the_bytes_that_were_told() {
        let matched = "0001 000c 0001 0004 00000005 00000000";
        // OpenFlow 1.4, and 1.5 with its statistics: duration, and how often (8 bytes).
        let entry = bytes(&format!(
            "0040 03 00 00000002 1dcd6500 0007 0064 0384 0001 0000 0000 0000000000000099 {} {matched}",
            "00".repeat(16)
        ));
        let new = bytes(&format!(
            "0048 0000 03 00 0007 0064 0384 0001 0000 0000000000000099 {matched} \
             0000 001c 80020008 00000002 1dcd6500 80020808 0000000000000003 00000000"
        ));
        for (version, entry) in [(5, entry), (OF15, new)] {
            let told = flow(version, &entry).unwrap();
            assert_eq!((told.duration_ms, told.hard_age_s), (2500, None));
            assert_eq!(Head::of(&told.message), Some(HEAD));
            let wanted = format!(
                "{version:02x}0e 0040 00000000 0000000000000099 0000000000000000 03 00 0064 0384 0007 ffffffff ffffffff \
                 ffffffff 0001 0000 {matched}"
            );
            assert_eq!(told.message, bytes(&wanted));
            assert_eq!(identity(&told.message), Some((3, 7, &bytes("0001 000c 0001 0004 00000005")[..])));
        }
    }

    #[test]
    fn a_flow_of_openflow_1_0_has_its_age_and_no_flags() {
        let entry = bytes(
            "0040 03 00 00000002 1dcd6500 0007 0064 0384 0008 0003 0002 0000000000000099 00000000000000000000000000000000 \
             0001 0004 00000005 0000 0008 0002 0000",
        );
        let told = flow(OF10, &entry).unwrap();
        assert_eq!((told.duration_ms, told.hard_age_s), (2500, Some(1)));
        assert_eq!(Head::of(&told.message), Some(Head { flags: 0, ..HEAD }));
        let wanted =
            "0104 0040 00000000 00002320 0000000d 0000000000000099 0300 0064 0384 0007 ffffffff ffff 0000 0008 \
                      000000000000 0001 0004 00000005 0000 0008 0002 0000";
        assert_eq!(told.message, bytes(wanted));
        assert_eq!(identity(&told.message), Some((3, 7, &bytes("0001 0004 00000005")[..])));

        let mut message = told.message.clone();
        assert!(set_flags(&mut message, 1 | 4, 0));
        assert_eq!(Head::of(&message).unwrap().flags, 1);
        // No counting, and importance: 1.0 has neither.
        assert!(!set_flags(&mut message, 8, 0) && !set_flags(&mut message, 0, 3));
        set_hard_timeout(&mut message, 41);
        assert_eq!(Head::of(&message).unwrap().hard_timeout, 41);
        let gone = deletion(&told.message);
        assert_eq!((&gone[16..24], &gone[24..26]), (&[0; 8][..], &[3, 4][..]));
        // Header and match are left.
        assert_eq!((gone.len(), &gone[2..4], &gone[48..]), (56, &[0, 56][..], &told.message[48..56]));
    }

    #[test]
    fn groups_are_added_by_the_bytes_that_were_told() {
        // group_id=3,type=select with a bucket of 16 bytes and a property of 8.
        let bucket = "0010 0008 0001 0005 0004 0000 0000 0000 ffff 0008 0000 0000";
        let new = bytes(&format!("0028 01 00 00000003 0010 000000000000 {bucket}"));
        let wanted = format!("060f 0030 00000000 0000 01 00 00000003 0010 0000 ffffffff {bucket}");
        assert_eq!(group(OF15, &new).unwrap(), bytes(&wanted));
        let wanted = format!("0104 0038 00000000 00002320 0000001f 0000 01 00 00000003 0010 0000 ffffffff {bucket}");
        assert_eq!(group(OF10, &new).unwrap(), bytes(&wanted));
        let old = bytes("0018 01 00 00000003 0010 0005 00000004 ffffffff 00000000");
        let wanted = "040f 0020 00000000 0000 01 00 00000003 0010 0005 00000004 ffffffff 00000000";
        assert_eq!(group(4, &old).unwrap(), bytes(wanted));
        for (version, entry) in [(OF10, &new), (4, &old), (OF15, &new)] {
            assert_eq!(group_id(&group(version, entry).unwrap()), Some([0, 0, 0, 3]));
        }
    }

    proptest::proptest! {
        /// Whoever has the socket may say anything.
        #[test]
        fn nothing_that_is_told_makes_us_fall_over(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            for version in OF10..=OF15 {
                for entry in entries(&bytes).flatten() {
                    if let Some(told) = flow(version, entry) {
                        let mut message = told.message;
                        let _fields = (Head::of(&message), identity(&message), deletion(&message));
                        set_hard_timeout(&mut message, 1);
                        set_flags(&mut message, u16::MAX, 1);
                    }
                    let _group = group(version, entry).map(|group| group_id(&group));
                }
            }
        }
    }

    #[test]
    fn what_is_cut_off_is_no_entry() {
        let whole = bytes("0010 0000000000000000000000000000 0008 000000000000");
        assert_eq!(entries(&whole).map(|entry| entry.map(<[u8]>::len)).collect::<Vec<_>>(), [Some(16), Some(8)]);
        for cut in [1, 7, 17, 23] {
            assert_eq!(entries(&whole[..cut]).last(), Some(None), "{cut}");
        }
        assert_eq!(entries(&[0, 0, 0, 0, 0, 0, 0, 0]).collect::<Vec<_>>(), [None]);
        // Nothing here panics, wherever it is cut.
        let entry = bytes("0040 03 00 00000002 1dcd6500 0007 0064 0384 0008 0003 0002 00000099");
        for version in OF10..=OF15 {
            for cut in 0..entry.len() {
                assert_eq!(flow(version, &entry[..cut]), None);
                let _none = (group(version, &entry[..cut]), Head::of(&entry[..cut]), identity(&entry[..cut]));
            }
        }
    }
}

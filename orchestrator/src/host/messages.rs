//! A bridge's OpenFlow state as the bytes that make it: what a daemon has told, and what it is given back.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Length of an OpenFlow header, bytes.
pub const HEADER: usize = 8;

/// The messages that add what a bridge has, in the order of the texts in [`super::BridgeRules`]. Each is of the OpenFlow
/// version in its first byte (1 for OpenFlow 1.0 to 6 for 1.5).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Messages {
    /// FLOW_MOD, of the version in which the daemon tells the flow as it has it.
    pub flows: Stream,
    /// GROUP_MOD.
    pub groups: Stream,
    /// NXT_GROUP_MOD of OpenFlow 1.0, for those of them that the bridge's highest version does not tell whole.
    pub whole_groups: Stream,
    /// METER_MOD.
    pub meters: Stream,
    /// NXT_TLV_TABLE_MOD, each with one mapping.
    pub tlv_map: Stream,
    /// When flows with a `hard_timeout` end, by their place: milliseconds of CLOCK_MONOTONIC, which is the daemon's clock.
    pub ends: BTreeMap<usize, u64>,
}

/// Whole messages behind one another. In JSON each is a line of hexadecimal digits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stream(Arc<Vec<u8>>);

impl Stream {
    /// The messages in `bytes`; what comes behind the last whole one is never looked at.
    pub fn new(bytes: Vec<u8>) -> Self {
        Stream(Arc::new(bytes))
    }

    /// Every message.
    pub fn each(&self) -> impl Iterator<Item = &[u8]> {
        each(&self.0)
    }
}

/// Every whole message of a stream.
pub fn each(stream: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = stream;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_be_bytes([*rest.get(2)?, *rest.get(3)?]));
        let (message, after) = rest.split_at_checked(length.max(HEADER))?;
        rest = after;
        Some(message)
    })
}

impl Serialize for Stream {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex = |message: &[u8]| {
            message.iter().fold(String::with_capacity(2 * message.len()), |mut text, byte| {
                let _cannot_fail = write!(text, "{byte:02x}");
                text
            })
        };
        serializer.collect_seq(self.each().map(hex))
    }
}

impl<'de> Deserialize<'de> for Stream {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut all = Vec::new();
        for text in Vec::<String>::deserialize(deserializer)? {
            let from = all.len();
            for pair in text.as_bytes().chunks(2) {
                let byte = std::str::from_utf8(pair).ok().filter(|pair| pair.len() == 2);
                let byte = byte.and_then(|pair| u8::from_str_radix(pair, 16).ok());
                all.push(byte.ok_or_else(|| D::Error::custom("a message that is not hexadecimal"))?);
            }
            let message = all.get(from..).unwrap_or_default();
            if each(message).next().map(<[u8]>::len) != Some(message.len()) {
                return Err(D::Error::custom("a message of another length than it says"));
            }
        }
        Ok(Stream::new(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_lines_of_a_file_and_come_back_from_it() {
        let bytes = vec![6, 14, 0, 10, 0, 0, 0, 1, 0xab, 0xcd, 1, 14, 0, 8, 0, 0, 0, 2];
        let messages =
            Messages { flows: Stream::new(bytes.clone()), ends: BTreeMap::from([(1, 70_000)]), ..Messages::default() };
        let text = serde_json::to_string(&messages).unwrap();
        assert!(text.contains(r#""flows":["060e000a00000001abcd","010e000800000002"]"#), "{text}");
        assert_eq!(serde_json::from_str::<Messages>(&text).unwrap(), messages);
        assert_eq!(messages.flows.each().collect::<Vec<_>>().concat(), bytes);
        for bad in ["060e000a00000001abc", "060e000a00000001ab", "060e000a00000001xxcd", "é0", ""] {
            assert!(serde_json::from_str::<Stream>(&format!("[\"{bad}\"]")).is_err(), "{bad}");
        }
        assert_eq!(serde_json::from_str::<Messages>("{}").unwrap(), Messages::default());
    }

    #[test]
    fn a_stream_that_is_cut_off_ends_with_its_last_whole_message() {
        let stream = [vec![6, 0, 0, 8, 0, 0, 0, 1], vec![6, 20, 0]].concat();
        assert_eq!(each(&stream).count(), 1);
    }
}

//! What a collector of IPFIX (RFC 7011) is told about UDP and TCP packets.

use std::collections::HashMap;

/// Version in a message's header (3.1).
const VERSION: u16 = 10;
/// Set id of templates (3.3.2); those of data are templates' ids, from 256 on.
const TEMPLATES: u16 = 2;
const FIRST_DATA: u16 = 256;
/// The bit of an information element's id that an enterprise number follows (3.2).
const ENTERPRISE: u16 = 1 << 15;
/// Length of a field that says its own (7).
const VARIABLE: u16 = u16::MAX;
// Information elements (IANA): packetDeltaCount, sourceTransportPort, destinationTransportPort.
const PACKETS: u16 = 2;
const SOURCE_PORT: u16 = 7;
const DESTINATION_PORT: u16 = 11;

/// Packets of one flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// Source and destination.
    pub ports: [u16; 2],
    /// How many.
    pub packets: u64,
}

/// Ids of information elements, their lengths.
type Template = Vec<(u16, u16)>;

/// What has been said of how records look.
#[derive(Debug, Default)]
pub(super) struct Ipfix(HashMap<u16, Template>);

impl Ipfix {
    /// The records of `message` that have ports; None if it is malformed.
    pub fn records(&mut self, message: &[u8]) -> Option<Vec<Record>> {
        let mut message = Bytes(message);
        let (version, length) = (message.short()?, message.short()?);
        // Time of export, sequence number, observation domain.
        message.take(12)?;
        if version != VERSION || usize::from(length) != message.0.len() + 16 {
            return None;
        }
        let mut records = Vec::new();
        while !message.0.is_empty() {
            let (id, length) = (message.short()?, message.short()?);
            let set = message.take(usize::from(length).checked_sub(4)?)?;
            match id {
                TEMPLATES => self.learn(set)?,
                FIRST_DATA.. => records.extend(self.0.get(&id).map(|template| read(template, set)).unwrap_or_default()),
                _ => {}
            }
        }
        Some(records)
    }

    fn learn(&mut self, mut set: Bytes<'_>) -> Option<()> {
        // Less than a header is padding.
        while set.0.len() >= 4 {
            let (id, count) = (set.short()?, set.short()?);
            let mut template = Template::new();
            for _ in 0..count {
                let (element, length) = (set.short()?, set.short()?);
                if element & ENTERPRISE != 0 {
                    set.take(4)?;
                }
                template.push((element, length));
            }
            self.0.insert(id, template);
        }
        Some(())
    }
}

fn read(template: &Template, mut set: Bytes<'_>) -> Vec<Record> {
    let mut records = Vec::new();
    while !set.0.is_empty() {
        // What is too short for a record is padding.
        let Some(fields) = fields(template, &mut set) else { break };
        let number = |element| fields.get(&element).copied();
        if let (Some(src), Some(dst), Some(packets)) = (number(SOURCE_PORT), number(DESTINATION_PORT), number(PACKETS))
        {
            records.push(Record { ports: [src as u16, dst as u16], packets });
        }
    }
    records
}

/// The fields of a record that are numbers.
fn fields(template: &Template, set: &mut Bytes<'_>) -> Option<HashMap<u16, u64>> {
    let mut fields = HashMap::new();
    for (element, length) in template {
        let length = match *length {
            VARIABLE => set.own_length()?,
            length => usize::from(length),
        };
        let value = set.take(length)?.0;
        if value.len() <= 8 {
            fields.insert(*element, value.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)));
        }
    }
    Some(fields)
}

#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, length: usize) -> Option<Bytes<'a>> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(Bytes(head))
    }

    fn short(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.0.try_into().ok()?))
    }

    /// The length that a field of variable length begins with: a byte, or 255 and two more.
    fn own_length(&mut self) -> Option<usize> {
        match self.take(1)?.0 {
            [255] => self.short().map(usize::from),
            [length] => Some(usize::from(*length)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shorts(words: &[u16]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    fn message(sets: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let sets: Vec<u8> =
            sets.iter().flat_map(|(id, set)| [shorts(&[*id, set.len() as u16 + 4]), set.clone()].concat()).collect();
        [shorts(&[VERSION, sets.len() as u16 + 16]), vec![0; 12], sets].concat()
    }

    #[test]
    fn records_are_read_as_their_template_says() {
        // An enterprise's own element, one of variable length, the three that count.
        let template = shorts(&[
            260,
            5,
            ENTERPRISE | 900,
            2,
            0,
            6876,
            82,
            VARIABLE,
            SOURCE_PORT,
            2,
            DESTINATION_PORT,
            2,
            PACKETS,
            8,
        ]);
        let record = [&[0, 9, 3][..], b"br0", &shorts(&[70, 9001, 0, 0, 0, 2])].concat();
        let mut ipfix = Ipfix::default();
        let data = (260, [record.clone(), record, vec![0]].concat());
        assert_eq!(ipfix.records(&message(std::slice::from_ref(&data))), Some(vec![]), "no template yet");
        let found = ipfix.records(&message(&[(3, vec![1; 20]), (TEMPLATES, template), data.clone()]));
        assert_eq!(found, Some(vec![Record { ports: [70, 9001], packets: 2 }; 2]));
        let whole = message(&[data]);
        assert_eq!(ipfix.records(&whole).map(|records| records.len()), Some(2));
        assert_eq!(ipfix.records(&whole[..whole.len() - 1]), None);
    }
}

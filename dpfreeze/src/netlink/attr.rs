//! Netlink attributes (`struct nlattr`, include/uapi/linux/netlink.h): read without losing any, written aligned.

use crate::error::{Error, Result};

/// `NLA_F_NESTED`
pub const NLA_F_NESTED: u16 = 1 << 15;
/// `NLA_TYPE_MASK`: the type without the flag bits.
pub const NLA_TYPE_MASK: u16 = !(3 << 14);
const HEADER: usize = 4;
/// The longest payload of one attribute: its length, header included, is a u16.
pub const MAX_PAYLOAD: usize = u16::MAX as usize - HEADER;

/// One attribute of a message, borrowed from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr<'a> {
    /// Type, without the flag bits.
    pub kind: u16,
    /// Type as it was sent, with the flag bits.
    pub raw_kind: u16,
    /// What the attribute carries, without header and padding.
    pub payload: &'a [u8],
}

impl<'a> Attr<'a> {
    /// The payload as a host-order u32.
    pub fn u32(&self) -> Result<u32> {
        let bytes: [u8; 4] = self.fixed()?;
        Ok(u32::from_ne_bytes(bytes))
    }

    /// The payload as a host-order u64.
    pub fn u64(&self) -> Result<u64> {
        Ok(u64::from_ne_bytes(self.fixed()?))
    }

    /// The first `N` host-order u64 of the payload: structures of the kernel may grow at their end.
    pub fn u64s<const N: usize>(&self) -> Result<[u64; N]> {
        let mut values = [0; N];
        let mut chunks = self.payload.chunks_exact(8);
        for value in &mut values {
            let chunk = chunks.next().and_then(|c| c.first_chunk::<8>()).ok_or_else(|| {
                Error::malformed(
                    format!("attribute {}", self.kind),
                    format!("{} bytes where {} belong", self.payload.len(), 8 * N),
                )
            })?;
            *value = u64::from_ne_bytes(*chunk);
        }
        Ok(values)
    }

    /// The payload as a run of host-order u32; an error if its length is no multiple of four.
    pub fn u32s(&self) -> Result<Vec<u32>> {
        if !self.payload.len().is_multiple_of(4) {
            return Err(Error::malformed(
                format!("attribute {}", self.kind),
                format!("{} bytes are no array of u32", self.payload.len()),
            ));
        }
        Ok(self.payload.chunks_exact(4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// The payload as a big-endian u32, as nfnetlink sends them.
    pub fn be32(&self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.fixed()?))
    }

    /// The payload as a big-endian u16, as nfnetlink sends them.
    pub fn be16(&self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.fixed()?))
    }

    /// The payload as a host-order u16.
    pub fn u16(&self) -> Result<u16> {
        Ok(u16::from_ne_bytes(self.fixed()?))
    }

    /// The payload as one byte.
    pub fn u8(&self) -> Result<u8> {
        let [byte] = self.fixed()?;
        Ok(byte)
    }

    /// The payload as an array of exactly `N` bytes.
    pub fn fixed<const N: usize>(&self) -> Result<[u8; N]> {
        self.payload.try_into().map_err(|_| {
            Error::malformed(
                format!("attribute {}", self.kind),
                format!("{} bytes where {N} belong", self.payload.len()),
            )
        })
    }

    /// The payload as a string, up to its NUL.
    pub fn string(&self) -> String {
        let end = self.payload.iter().position(|b| *b == 0).unwrap_or(self.payload.len());
        String::from_utf8_lossy(&self.payload[..end]).into_owned()
    }

    /// The attributes nested in this one.
    pub fn nested(&self) -> Attrs<'a> {
        Attrs(self.payload)
    }
}

/// The attributes in a run of bytes, in order, unknown ones included.
#[derive(Clone, Copy, Debug)]
pub struct Attrs<'a>(pub &'a [u8]);

impl<'a> Attrs<'a> {
    /// The first attribute of type `kind`, or None; an error if the run is malformed before it.
    pub fn find(self, kind: u16) -> Result<Option<Attr<'a>>> {
        for attr in self {
            let attr = attr?;
            if attr.kind == kind {
                return Ok(Some(attr));
            }
        }
        Ok(None)
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = Result<Attr<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.0;
        if bytes.is_empty() {
            return None;
        }
        if bytes.len() < HEADER {
            self.0 = &[];
            return Some(Err(Error::malformed("attributes", format!("{} bytes after the last one", bytes.len()))));
        }
        let len = u16::from_ne_bytes([bytes[0], bytes[1]]) as usize;
        let raw_kind = u16::from_ne_bytes([bytes[2], bytes[3]]);
        if len < HEADER || len > bytes.len() {
            self.0 = &[];
            return Some(Err(Error::malformed(
                format!("attribute {}", raw_kind & NLA_TYPE_MASK),
                format!("says {len} bytes, {} are there", bytes.len()),
            )));
        }
        self.0 = &bytes[align(len).min(bytes.len())..];
        Some(Ok(Attr { kind: raw_kind & NLA_TYPE_MASK, raw_kind, payload: &bytes[HEADER..len] }))
    }
}

/// Writes attributes one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttrBuf(Vec<u8>);

impl AttrBuf {
    /// An empty run.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one attribute; `kind` may carry flag bits. `payload` has at most [`MAX_PAYLOAD`] bytes: whoever has
    /// longer ones (packets) uses [`AttrBuf::try_push`].
    pub fn push(&mut self, kind: u16, payload: &[u8]) -> &mut Self {
        let len = HEADER + payload.len();
        debug_assert!(payload.len() <= MAX_PAYLOAD);
        self.0.extend_from_slice(&(len as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(payload);
        self.0.resize(align(self.0.len()), 0);
        self
    }

    /// Appends one attribute whose length is not known to fit; an error leaves the run as it was.
    pub fn try_push(&mut self, kind: u16, payload: &[u8]) -> Result<&mut Self> {
        if payload.len() > MAX_PAYLOAD {
            return Err(Error::malformed(
                format!("attribute {}", kind & NLA_TYPE_MASK),
                format!("{} bytes, at most {MAX_PAYLOAD} fit", payload.len()),
            ));
        }
        Ok(self.push(kind, payload))
    }

    /// Appends `attr` as it was read, flag bits included.
    pub fn push_attr(&mut self, attr: &Attr<'_>) -> &mut Self {
        self.push(attr.raw_kind, attr.payload)
    }

    /// Appends a host-order u32.
    pub fn push_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.push(kind, &value.to_ne_bytes())
    }

    /// Appends a NUL-terminated string.
    pub fn push_str(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.push(kind, &bytes)
    }

    /// Appends a nest that holds `inner`, with `NLA_F_NESTED`.
    pub fn push_nested(&mut self, kind: u16, inner: &AttrBuf) -> &mut Self {
        self.push(kind | NLA_F_NESTED, &inner.0)
    }

    /// The bytes written so far, always aligned to 4, given away.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// The bytes written so far, always aligned to 4.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// `NLMSG_ALIGN` and `NLA_ALIGN`: the next multiple of four.
pub(crate) fn align(len: usize) -> usize {
    (len + 3) & !3
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<(u16, Vec<u8>)>> {
        Attrs(bytes).map(|attr| attr.map(|a| (a.raw_kind, a.payload.to_vec()))).collect()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(attrs in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..40)), 0..12)) {
            let mut buf = AttrBuf::new();
            for (kind, payload) in &attrs {
                buf.push(*kind, payload);
            }
            prop_assert_eq!(buf.as_bytes().len() % 4, 0);
            prop_assert_eq!(read(buf.as_bytes()).unwrap(), attrs);
        }

        #[test]
        fn copying_attributes_keeps_the_bytes(attrs in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..40)), 0..12)) {
            let mut buf = AttrBuf::new();
            attrs.iter().for_each(|(kind, payload)| { buf.push(*kind, payload); });
            let mut copy = AttrBuf::new();
            Attrs(buf.as_bytes()).for_each(|attr| { copy.push_attr(&attr.unwrap()); });
            prop_assert_eq!(copy, buf);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let read: Vec<_> = Attrs(&bytes).collect();
            // An error ends the run, so that nobody can loop on it.
            prop_assert!(read.iter().rev().skip(1).all(|attr| attr.is_ok()));
        }
    }

    #[test]
    fn the_last_attribute_may_be_unpadded() {
        assert_eq!(read(&[5, 0, 7, 0, 9]).unwrap(), [(7, vec![9])]);
    }

    #[test]
    fn a_wrong_length_is_an_error() {
        for bytes in [&[3, 0, 1, 0][..], &[9, 0, 1, 0, 1, 2, 3, 4], &[4, 0, 1]] {
            assert!(read(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn flags_are_no_part_of_the_type() {
        let mut buf = AttrBuf::new();
        buf.push_nested(5, AttrBuf::new().push_u32(1, 2));
        let attr = Attrs(buf.as_bytes()).find(5).unwrap().unwrap();
        assert_eq!(attr.raw_kind, 5 | NLA_F_NESTED);
        assert_eq!(attr.nested().find(1).unwrap().unwrap().u32().unwrap(), 2);
    }

    #[test]
    fn a_payload_that_does_not_fit_is_refused() {
        let mut buf = AttrBuf::new();
        assert!(buf.try_push(1, &[0; MAX_PAYLOAD + 1]).is_err());
        assert!(buf.as_bytes().is_empty());
        assert_eq!(buf.try_push(1, &[0; MAX_PAYLOAD]).unwrap().as_bytes().len(), 65536);
    }

    #[test]
    fn numbers_have_their_size() {
        let attr = |payload| Attr { kind: 1, raw_kind: 1, payload };
        assert!(attr(&[1, 2, 3]).u32().is_err());
        assert!(attr(&[1, 2, 3, 4, 5]).u32s().is_err());
        assert!(attr(&[0; 15]).u64s::<2>().is_err());
        assert_eq!(attr(&[0; 24]).u64s::<2>().unwrap(), [0, 0]);
        assert_eq!(attr(&[0, 0, 1, 44]).be32().unwrap(), 300);
        assert_eq!(attr(b"ovs-system\0\0").string(), "ovs-system");
    }
}

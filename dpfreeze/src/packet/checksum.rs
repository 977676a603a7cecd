//! The Internet checksum, changed by what changed (RFC 1624), and SCTP's CRC32c (RFC 9260, appendix A).

/// The checksum that was `sum` before `old`, at an even or odd offset `at` of what it covers, became `new`.
pub fn replace(sum: u16, old: &[u8], new: &[u8], at: usize) -> u16 {
    let mut acc = u64::from(!sum);
    for (i, (old, new)) in old.iter().zip(new).enumerate().filter(|(_, (old, new))| old != new) {
        let shift = if (at + i).is_multiple_of(2) { 8 } else { 0 };
        acc += u64::from(!(u16::from(*old) << shift)) + (u64::from(*new) << shift);
    }
    !fold(acc)
}

/// The checksum over `bytes`, in which its own field counts as it is.
pub fn over(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| {
        let high = pair.first().copied().unwrap_or(0);
        u64::from(u16::from_be_bytes([high, pair.get(1).copied().unwrap_or(0)]))
    };
    !fold(bytes.chunks(2).map(word).sum())
}

fn fold(mut acc: u64) -> u16 {
    while acc > 0xffff {
        acc = (acc & 0xffff) + (acc >> 16);
    }
    acc as u16
}

/// SCTP's checksum over a packet from its common header on, whose own field counts as zero.
pub fn sctp(packet: &[u8]) -> u32 {
    const REFLECTED: u32 = 0x82f6_3b78;
    let mut crc = u32::MAX;
    for (i, byte) in packet.iter().enumerate() {
        crc ^= u32::from(if (8..12).contains(&i) { 0 } else { *byte });
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { REFLECTED } else { 0 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sctp_is_crc32c_with_a_hole() {
        // The check value of CRC-32/ISCSI is that of "123456789".
        let mut crc = u32::MAX;
        for byte in b"123456789" {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
            }
        }
        assert_eq!(!crc, 0xe306_9283);
        let hole = [b"12345678", &[0; 4][..], b"9"].concat();
        let filled = [b"12345678", &[7; 4][..], b"9"].concat();
        assert_eq!(sctp(&hole), sctp(&filled));
        assert_ne!(sctp(&hole), sctp(&[b"12345678", &[0; 4][..], b"8"].concat()));
    }

    proptest! {
        #[test]
        fn a_changed_checksum_is_that_of_the_changed_bytes(
            bytes in prop::collection::vec(any::<u8>(), 20..60),
            at in 0usize..16,
            new in prop::collection::vec(any::<u8>(), 1..5),
        ) {
            // Something must not be zero, as in every header.
            prop_assume!(bytes[19] != 0);
            let mut changed = bytes.clone();
            changed[at..at + new.len()].copy_from_slice(&new);
            prop_assert_eq!(replace(over(&bytes), &bytes[at..at + new.len()], &new, at), over(&changed));
        }
    }
}

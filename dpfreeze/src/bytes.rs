//! Runs of bytes as hexadecimal strings in JSON: a third of the size of an array of numbers, and readable.

use serde::{de::Error as _, Deserialize, Deserializer, Serializer};

/// `bytes` in hexadecimal.
pub(crate) fn encode(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|b| [b >> 4, b & 15]).map(|n| char::from(DIGITS[usize::from(n)])).collect()
}

fn decode(text: &str) -> Result<Vec<u8>, String> {
    if !text.len().is_multiple_of(2) {
        return Err(format!("{} hexadecimal digits are no whole bytes", text.len()));
    }
    let digit =
        |c: u8| char::from(c).to_digit(16).ok_or_else(|| format!("{:?} is no hexadecimal digit", char::from(c)));
    text.as_bytes().chunks_exact(2).map(|pair| Ok((digit(pair[0])? << 4 | digit(pair[1])?) as u8)).collect()
}

/// For `#[serde(with)]` on a `Vec<u8>`.
pub(crate) mod hex {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        decode(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_round_trip_and_refusals() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&all)).unwrap(), all);
        assert_eq!(encode(&[0x0a, 0xf0]), "0af0");
        assert!(decode("0af").is_err());
        assert!(decode("zz").is_err());
        assert!(decode("+1").is_err());
        assert!(decode("é").is_err());
    }
}

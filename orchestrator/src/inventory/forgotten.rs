//! A kind of state that is lost on purpose, so that a test sees whether anybody notices: with the feature `chaos` alone,
//! which no shipped program has.

use super::Kept;

/// In the environment of `ovs-graceful restart`: the word of a kind.
#[cfg(feature = "chaos")]
pub const VARIABLE: &str = "OVS_GRACEFUL_FORGET";

/// Is this kind to be lost?
#[cfg(feature = "chaos")]
pub fn is_forgotten(kept: Kept) -> bool {
    std::env::var(VARIABLE).is_ok_and(|word| word == kept.word())
}

/// Is this kind to be lost? Never.
#[cfg(not(feature = "chaos"))]
pub const fn is_forgotten(_: Kept) -> bool {
    false
}

/// Is any?
pub fn forgets() -> bool {
    Kept::ALL.iter().any(|kept| is_forgotten(*kept))
}

//! What connection tracking was told: timeout policies.

mod timeout;

pub use timeout::{
    create_timeout_policy, delete_timeout_policy, read_timeout_policies, timeout_policies, TimeoutPolicy,
};

//! What connection tracking was told (timeout policies), and what it knows (connections).

mod connection;
mod timeout;
pub(crate) mod tuple;

pub use connection::{Connection, Connections, KernelConnections};
pub use timeout::{
    create_timeout_policy, delete_timeout_policy, read_timeout_policies, timeout_policies, TimeoutPolicy,
};
pub use tuple::{Transport, Tuple};

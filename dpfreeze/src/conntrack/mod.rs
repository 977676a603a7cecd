//! What connection tracking was told, and what it knows: timeout policies, connections.

mod connection;
mod connections;
mod timeout;
pub(crate) mod tuple;
mod watch;

pub use connection::{Connection, Connections, KernelConnections};
pub use connections::{count_by_zone, for_each_connection, ListedConnection, Status};
pub use timeout::{
    create_timeout_policy, default_timeouts, delete_timeout_policy, limit, limit_name, read_timeout_policies,
    set_default_timeouts, timeout_policies, timeout_policy, Meaning, TimeoutPolicy,
};
pub use tuple::{protocol, Transport, Tuple};
pub use watch::{zones_in_flows, Class, Live, Watched};

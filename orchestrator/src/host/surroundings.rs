//! What Check looks at besides the datapath and the database: kernel, privileges, programs, units, disks.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use dpfreeze::freeze::Environment;

use super::{Daemon, Daemons, DatabaseFacts, Result, ServiceManager, Versions};
use crate::report::Finding;

/// What the run to be checked for is to do.
#[derive(Debug, Clone, Default)]
pub struct CheckOptions {
    /// ovsdb-server is to be replaced too.
    pub replace_ovsdb: bool,
    /// The unit whose reload or restart job this is.
    pub called_by: Option<String>,
    /// Somebody else ends the old ovs-vswitchd and starts the new one.
    pub elsewhere: bool,
    /// The new ovs-vswitchd is started beside the old one.
    pub beside: bool,
    /// So many sockets the datapath's upcalls go to.
    pub upcall_sockets: usize,
    /// So many bridges there are.
    pub bridges: usize,
    /// Where snapshots and old binaries are kept, usually `/var/lib/ovs-graceful`.
    pub state_directory: PathBuf,
    /// Where journal and socket live, usually `/run/ovs-graceful`.
    pub run_directory: PathBuf,
}

/// What Check knows already.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The ovs-vswitchd that the upcalls go to, or why none was found; `None` where the datapath does not tell.
    pub vswitchd: Option<&'a Result<Daemon>>,
    /// What runs and what is installed, where it was told.
    pub versions: Option<&'a Versions>,
    /// What the database says, where it answers.
    pub facts: Option<&'a DatabaseFacts>,
}

/// The rest of the host, as Check asks for it. Nothing is touched.
pub trait Surroundings: Send + Sync {
    /// What the kernel lets us do.
    fn environment(&self) -> Environment;
    /// Connections of the connection table by zone. What cannot be listed is not counted.
    fn connections(&self) -> BTreeMap<u16, u64>;
    /// Daemons, units, disks and the new database tool, looked at.
    fn findings(
        &self,
        daemons: &dyn Daemons,
        services: &dyn ServiceManager,
        known: &Known<'_>,
        options: &CheckOptions,
        until: Instant,
    ) -> Vec<Finding>;
}

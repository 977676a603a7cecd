//! What Check looks at besides the daemons: kernel, privileges, programs, disks.

use std::collections::BTreeMap;
use std::time::Instant;

use dpfreeze::freeze::Environment;

use super::real::check::CheckOptions;
use super::{Daemons, Database, ServiceManager};
use crate::report::Finding;

/// The rest of the host, as Check asks for it. Nothing is touched.
pub trait Surroundings: Send + Sync {
    /// Are we root?
    fn is_root(&self) -> bool;
    /// What the kernel lets us do.
    fn environment(&self) -> Environment;
    /// Connections of the connection table by zone. What cannot be listed is not counted.
    fn connections(&self) -> BTreeMap<u16, u64>;
    /// Daemons, database, units, disks and the new database tool, looked at.
    fn findings(
        &self,
        daemons: &dyn Daemons,
        database: &dyn Database,
        services: &dyn ServiceManager,
        options: &CheckOptions,
        until: Instant,
    ) -> Vec<Finding>;
}

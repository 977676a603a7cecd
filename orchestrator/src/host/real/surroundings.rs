//! The rest of this machine.

use std::collections::BTreeMap;
use std::time::Instant;

use dpfreeze::freeze::{environment, Environment};

use super::check::{findings, CheckOptions};
use crate::conntrack::connections;
use crate::host::surroundings::Surroundings;
use crate::host::{Daemons, Database, ServiceManager};
use crate::report::Finding;

/// The rest of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealSurroundings;

impl Surroundings for RealSurroundings {
    fn is_root(&self) -> bool {
        nix::unistd::geteuid().is_root()
    }

    fn environment(&self) -> Environment {
        environment()
    }

    fn connections(&self) -> BTreeMap<u16, u64> {
        connections()
    }

    fn findings(
        &self,
        daemons: &dyn Daemons,
        database: &dyn Database,
        services: &dyn ServiceManager,
        options: &CheckOptions,
        until: Instant,
    ) -> Vec<Finding> {
        findings(daemons, database, services, options, until)
    }
}

//! The rest of this machine.

use std::collections::BTreeMap;
use std::time::Instant;

use dpfreeze::freeze::{environment, Environment};

use super::check::findings;
use crate::conntrack::connections;
use crate::host::surroundings::{CheckOptions, Known, Surroundings};
use crate::host::{Daemons, ServiceManager};
use crate::report::Finding;

/// The rest of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealSurroundings;

impl Surroundings for RealSurroundings {
    fn environment(&self) -> Environment {
        environment()
    }

    fn connections(&self) -> BTreeMap<u16, u64> {
        connections()
    }

    fn findings(
        &self,
        daemons: &dyn Daemons,
        services: &dyn ServiceManager,
        known: &Known<'_>,
        options: &CheckOptions,
        until: Instant,
    ) -> Vec<Finding> {
        findings(daemons, services, known, options, until)
    }
}

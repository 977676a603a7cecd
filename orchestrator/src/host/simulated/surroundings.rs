//! Kernel and privileges of the simulated host.

use std::collections::BTreeMap;
use std::time::Instant;

use dpfreeze::freeze::{Environment, Hook, ModuleState};

use super::Sim;
use crate::host::real::check::{database_findings, CheckOptions};
use crate::host::surroundings::Surroundings;
use crate::host::{Daemons, Database, ServiceManager};
use crate::report::{Finding, Severity};

pub(super) struct SimSurroundings(pub(super) Sim);

impl Surroundings for SimSurroundings {
    fn is_root(&self) -> bool {
        true
    }

    fn environment(&self) -> Environment {
        Environment {
            kernel: "simulated".into(),
            openvswitch: ModuleState::Loaded,
            lockdown: None,
            ptrace_scope: None,
            lsms: Vec::new(),
            pidfd_getfd: true,
            hook: self.0.look().variant.freeze.then_some(Hook::FmodRet),
            failures: Vec::new(),
        }
    }

    fn connections(&self) -> BTreeMap<u16, u64> {
        BTreeMap::new()
    }

    fn findings(
        &self,
        _daemons: &dyn Daemons,
        database: &dyn Database,
        _services: &dyn ServiceManager,
        _options: &CheckOptions,
        until: Instant,
    ) -> Vec<Finding> {
        match database.facts(until) {
            Ok(facts) => database_findings(&facts),
            Err(error) => vec![Finding {
                name: "database".into(),
                severity: Severity::Refused,
                object: error.object,
                cause: error.cause,
                remedy: error.remedy,
            }],
        }
    }
}

//! Kernel and privileges of the simulated host.

use std::collections::BTreeMap;
use std::time::Instant;

use dpfreeze::freeze::{Environment, Hook, ModuleState};

use super::Sim;
use crate::check::refuse;
use crate::host::surroundings::{CheckOptions, Known, Surroundings};
use crate::host::{Daemons, ServiceManager};
use crate::report::{Finding, Findings, Name};

pub(super) struct SimSurroundings(pub(super) Sim);

impl Surroundings for SimSurroundings {
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
        _services: &dyn ServiceManager,
        known: &Known<'_>,
        _options: &CheckOptions,
        until: Instant,
    ) -> Vec<Finding> {
        let mut found = Findings::default();
        // The one operation of this look, which may fail like any other.
        if let Err(error) = self.0.operate("surroundings.findings", Some(until), |_| Ok(())) {
            refuse(Name::Tools, &error, "", &mut found);
        }
        if let Some(Err(error)) = known.vswitchd {
            refuse(Name::OvsRunning, error, "", &mut found);
        }
        found.into_inner()
    }
}

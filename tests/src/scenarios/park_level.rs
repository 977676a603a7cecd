//! plain without BPF: the kernel is locked down, so the restart works at level park.

use anyhow::Result;

use super::{plain, Expect, Traffic};
use crate::guest::probe::Spec;

/// See the module.
pub struct ParkLevel;

impl Traffic for ParkLevel {
    fn name(&self) -> &'static str {
        "park_level"
    }

    fn about(&self) -> &'static str {
        "plain under lockdown=confidentiality: no BPF, level park"
    }

    fn kernel_args(&self) -> &'static str {
        "lockdown=confidentiality"
    }

    fn set_up(&self) -> Result<()> {
        plain::set_up()
    }

    fn bridges(&self) -> Vec<String> {
        plain::Plain.bridges()
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        plain::Plain.probes()
    }

    fn expect(&self) -> Expect {
        Expect { level: "park", refused: &[], keeps_flows: false, ..Expect::default() }
    }
}

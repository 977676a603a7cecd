//! plain without BPF: the kernel is locked down, so the restart works at level park.

use super::{Expect, Traffic};

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

    fn expect(&self) -> Expect {
        Expect { level: "park", refused: &[], keeps_flows: false, ..Expect::default() }
    }
}

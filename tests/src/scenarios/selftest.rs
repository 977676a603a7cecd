//! The freeze's own tests on the running kernel: `dpfreeze/examples/freeze_selftest`.

use std::path::Path;

use anyhow::Result;

use super::{Custom, Program};
use crate::command::{shell, shell_lenient};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct SelfTest;

const PROGRAM: &str = "freeze_selftest";
/// Fewer than this many means that tests got lost on the way.
const TESTS: usize = 30;

impl Custom for SelfTest {
    fn name(&self) -> &'static str {
        "selftest"
    }

    fn about(&self) -> &'static str {
        "the freeze's own tests on the running kernel"
    }

    fn programs(&self) -> &'static [Program] {
        &[Program { package: "dpfreeze", example: PROGRAM, features: "" }]
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        shell("modprobe openvswitch; modprobe nfnetlink_cttimeout")?;
        let text = shell_lenient(&format!("timeout 800 {PROGRAM} && echo all-passed"));
        std::fs::write(out.join(PROGRAM), &text)?;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("ok ") {
                outcome.check(name, true, "ok");
            } else if let Some(failed) = line.strip_prefix("FAIL ") {
                let (name, why) = failed.split_once(' ').unwrap_or((failed, ""));
                outcome.check(name, false, why);
            }
        }
        let count = outcome.checks.len();
        outcome.check(format!("at least {TESTS} tests"), count >= TESTS, count);
        outcome.check("the program ended with 0", text.contains("all-passed"), text.lines().last());
        Ok(())
    }
}

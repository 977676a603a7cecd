//! The new ovs-vswitchd finds less that the datapath can do than the old one had found, as something is in the way of its
//! feature probes (docs/adoption.md): the run ends with 30 and says so, and the remedy that it tells is one.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::aftermath::{sees_as_much, LEFT_PROBE};
use super::{meanwhile, plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::{facts, run};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct SeesLess;

/// The old daemon's revalidators would delete what they do not know: they look whenever either time is over.
const ASLEEP: &str = "ovs-vsctl set open_vswitch . other_config:max-revalidator=600000 other_config:max-idle=600000";
const AWAKE: &str = "ovs-vsctl --no-wait remove open_vswitch . other_config max-revalidator max-idle";

impl Custom for SeesLess {
    fn name(&self) -> &'static str {
        "sees_less"
    }

    fn about(&self) -> &'static str {
        "the new ovs-vswitchd is misled about what the datapath can do: told, and mended by the remedy"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(2)
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        let features = facts::features(&plain::bridges());
        shell(ASLEEP)?;
        std::thread::sleep(Duration::from_secs(2));
        let report = meanwhile::traffic(&["--no-ovsdb"], out, outcome, |known, _| {
            run::wait_for("standby", known)?;
            shell(LEFT_PROBE)?;
            run::wait_for("restore", known)?;
            shell(AWAKE).map(drop)
        })?;
        outcome.check("exit code 30", report["exit_code"] == 30, &report["exit_code"]);
        let told = report["differences"].to_string();
        let right = told.contains("Recirc: Yes, now No") && told.contains("remedy: ovs-graceful restart");
        outcome.check("the report tells what it does not see, and the remedy", right, told);
        let said = shell_lenient("ovs-graceful restart --no-ovsdb 2>&1; echo exit=$?");
        outcome.check("the remedy ends with 0", said.trim().ends_with("exit=0"), said);
        sees_as_much("the remedy", &features, outcome);
        Ok(())
    }
}

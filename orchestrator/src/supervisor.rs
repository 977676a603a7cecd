//! The supervisor of a run and its short-lived relatives. Not wired yet: each entry point says so.

use anyhow::bail;

use crate::cli::SuperviseArgs;
use crate::config::Config;
use crate::report::CheckReport;

/// Does the run of `args` and returns its exit code.
pub fn supervise(args: SuperviseArgs) -> anyhow::Result<i32> {
    bail!("run {}: the steps are not wired yet; nothing was touched", args.id)
}

/// Looks at the host; touches nothing.
pub fn check(_config: &Config) -> anyhow::Result<CheckReport> {
    bail!("check: not wired yet")
}

/// Finishes or undoes an interrupted run and returns the exit code.
pub fn recover(_config: &Config) -> anyhow::Result<i32> {
    bail!("recover: not wired yet")
}

/// The emergency thaw where no supervisor lives; returns the exit code.
pub fn thaw(_config: &Config) -> anyhow::Result<i32> {
    dpfreeze::freeze::thaw()?;
    bail!("thaw: every freeze is lifted; binding the running daemon and replaying is not wired yet")
}

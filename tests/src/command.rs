//! Child processes: every failure names the command, its exit and its last words.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

fn words(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// Runs a command, its output going where the caller's goes.
pub fn run(command: &mut Command) -> Result<()> {
    let text = words(command);
    let status = command.status().with_context(|| format!("cannot start `{text}`"))?;
    if !status.success() {
        bail!("`{text}` ended with {status}");
    }
    Ok(())
}

/// Runs a command and gives what it printed to stdout.
pub fn capture(command: &mut Command) -> Result<String> {
    let text = words(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{text}`"))?;
    if !output.status.success() {
        bail!("`{text}` ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Seconds for a line of shell: below the time that a scenario has, so that what hangs is named instead of the whole VM.
const SHELL_LIMIT: &str = "1000";

fn limited_shell(options: &str, script: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", SHELL_LIMIT, "sh", options, script]);
    command
}

/// Runs a line of shell (`sh -ec`) and gives what it printed to stdout.
pub fn shell(script: &str) -> Result<String> {
    capture(&mut limited_shell("-ec", script))
}

/// Runs a line of shell that may fail: stdout and stderr together, failure noted in the text.
pub fn shell_lenient(script: &str) -> String {
    match limited_shell("-c", script).stdin(Stdio::null()).output() {
        Ok(Output { status, stdout, stderr }) => {
            let mut text = String::from_utf8_lossy(&stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&stderr));
            if !status.success() {
                text.push_str(&format!("[{status}]\n"));
            }
            text
        }
        Err(error) => format!("[cannot start sh: {error}]\n"),
    }
}

/// `exit=CODE`, then what a script said, which stays in `log`.
pub fn shell_logged(script: &str, log: &Path) -> String {
    shell_lenient(&format!("{script} > {0} 2>&1; echo exit=$?; cat {0}", log.display()))
}

/// Calls `ready` every `step` until it says yes; an error that names `what` after `limit`.
pub fn wait_until(what: &str, limit: Duration, step: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + limit;
    while !ready() {
        if Instant::now() >= end {
            bail!("{what}: not after {} s", limit.as_secs());
        }
        std::thread::sleep(step);
    }
    Ok(())
}

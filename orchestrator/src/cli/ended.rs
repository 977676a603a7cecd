//! What a command ends with besides the exit codes of a run ([`crate::machine::ExitCode`]), and how its errors are told.

use serde_json::json;

use super::output::{complain, say_json};
use crate::config::ConfigError;
use crate::control::LockError;
use crate::machine::ExitCode;

/// The command could not do what it was asked for: no root, no such run, no run to abort, no database.
pub const FAILED: u8 = 1;

/// Wrong usage, or a configuration that cannot be read (clap's own code for the first).
pub const USAGE: u8 = 2;

/// The client has detached; the run goes on.
pub const DETACHED: u8 = 12;

/// The exit code of a command that ended with `error`.
pub fn code_of(error: &anyhow::Error) -> u8 {
    let held = matches!(error.downcast_ref(), Some(LockError::Held { .. }));
    match error.downcast_ref::<ConfigError>() {
        Some(_) => USAGE,
        None if held => ExitCode::Busy.code(),
        None => FAILED,
    }
}

/// Tells why a command could not do what it was asked for, to standard error, and with `json` to standard output as well;
/// returns `code`.
pub fn fail(json: bool, code: u8, why: &str) -> u8 {
    if json {
        say_json(&json!({ "error": { "exit_code": code, "message": why } }));
    }
    complain(why);
    code
}

/// How a command ended.
pub fn answered(json: bool, result: anyhow::Result<ExitCode>) -> u8 {
    match result {
        Ok(code) => code.code(),
        Err(error) => fail(json, code_of(&error), &format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;
    use crate::config::Config;

    #[test]
    fn a_bad_configuration_is_no_refusal_and_nothing_else_is_one() {
        let error = Config::parse("[park]\nmax_packet = 9\n", "/etc/x.toml").context("reading");
        assert_eq!(code_of(&error.unwrap_err()), USAGE);
        assert_eq!(code_of(&anyhow::anyhow!("there is no run x")), FAILED);
        let held = LockError::Held { path: "/run/lock".into(), holder: None };
        assert_eq!(code_of(&held.into()), 11);
    }
}

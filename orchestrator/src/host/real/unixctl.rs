//! Commands to a daemon through its own control socket, `RUNDIR/NAME.PID.ctl` (`lib/unixctl.c`).
//!
//! The socket is addressed by pid: with two ovs-vswitchd side by side the PID file says nothing.

use std::path::Path;
use std::time::Instant;

use serde_json::{json, Value};

use super::jsonrpc::Connection;
use crate::host::error::{HostError, Result};

/// Sends `command` with `arguments` to the daemon behind `socket` and returns its text.
pub fn command(socket: &Path, command: &str, arguments: &[&str], until: Instant) -> Result<String> {
    let answer = Connection::connect(socket)?.call(command, json!(arguments), until)?;
    text(socket, command, answer)
}

/// Sends all `commands` (with their arguments) at once: a daemon that answers late answers them in one turn. Their texts,
/// or the first error.
pub fn commands(socket: &Path, commands: &[(&str, Value)], until: Instant) -> Result<Vec<String>> {
    let answers = Connection::connect(socket)?.call_many(commands, until)?;
    commands.iter().zip(answers).map(|((command, _), answer)| text(socket, command, answer?)).collect()
}

/// Commands that were sent and not yet answered.
pub struct Asked {
    connection: Connection,
    commands: Vec<(&'static str, Value)>,
    first: u64,
}

/// As [`commands`], without waiting for the answers: many daemons can be asked before the first has answered.
pub fn ask(socket: &Path, commands: Vec<(&'static str, Value)>, until: Instant) -> Result<Asked> {
    let mut connection = Connection::connect(socket)?;
    let first = connection.ask_many(&commands, until)?;
    Ok(Asked { connection, commands, first })
}

impl Asked {
    /// Waits until all are done; the answer to each, in order.
    pub fn wait(mut self, until: Instant) -> Result<Vec<Result<Value>>> {
        self.connection.answers(&self.commands, self.first, until)
    }
}

fn text(socket: &Path, command: &str, answer: Value) -> Result<String> {
    match answer {
        Value::String(text) => Ok(text),
        Value::Null => Ok(String::new()),
        other => Err(HostError::new(socket.display().to_string(), format!("{command}: unexpected answer {other}"))),
    }
}

/// The version in the answer to `version`: `ovs-vswitchd (Open vSwitch) 3.1.0` and more lines.
pub fn parse_version(text: &str) -> Option<String> {
    let first = text.lines().next()?;
    let word = first.split_whitespace().last()?;
    word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.to_owned())
}

/// The number behind `name` in the answer to `memory/show`, which is `name:number` words.
pub fn parse_memory(text: &str, name: &str) -> Option<u64> {
    text.split_whitespace().find_map(|word| {
        let (key, number) = word.rsplit_once(':')?;
        // 3.1 says `idl-cells-Open_vSwitch`, 2.13 says `idl-cells`.
        (key == name || key.strip_prefix(name).is_some_and(|rest| rest.starts_with('-')))
            .then(|| number.parse().ok())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_releases_and_of_packages() {
        assert_eq!(parse_version("ovs-vswitchd (Open vSwitch) 3.1.0\n").as_deref(), Some("3.1.0"));
        assert_eq!(parse_version("ovs-vswitchd (Open vSwitch) 3.5.0-1~x\nDPDK 24\n").as_deref(), Some("3.5.0-1~x"));
        assert_eq!(parse_version(""), None);
        assert_eq!(parse_version("command not found"), None);
    }

    #[test]
    fn memory_words_of_old_and_new_versions() {
        assert_eq!(parse_memory("idl-cells-Open_vSwitch:17\n", "idl-cells"), Some(17));
        assert_eq!(parse_memory("handlers:1 idl-cells:345 ports:3", "idl-cells"), Some(345));
        assert_eq!(parse_memory("handlers:1", "idl-cells"), None);
    }
}

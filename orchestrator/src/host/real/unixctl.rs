//! Commands to a daemon through its own control socket, `RUNDIR/NAME.PID.ctl` (`lib/unixctl.c`).
//!
//! The socket is addressed by pid: with two ovs-vswitchd side by side the PID file says nothing.

use std::path::Path;
use std::time::Instant;

use serde_json::{json, Value};

use super::jsonrpc::Connection;
use super::procfs;
use crate::host::error::{HostError, Result};
use crate::host::Daemon;

/// Connects to the control socket of `daemon`, where it is that very process who listens there (`SO_PEERCRED`: who called
/// listen(2)). Until that is known nothing is said.
pub(super) fn connect(daemon: &Daemon) -> Result<Connection> {
    let connection = Connection::connect(&daemon.control)?;
    let peer = connection.peer()?.pid();
    match peer == daemon.id.pid && procfs::identity(peer).is_ok_and(|id| id == daemon.id) {
        true => Ok(connection),
        false => Err(HostError::new(
            daemon.control.display().to_string(),
            format!("process {peer} listens there, which is not {} (pid {})", daemon.kind.program(), daemon.id.pid),
        )
        .remedy("somebody has put a socket in the place of the daemon's: restart the daemon")),
    }
}

/// Sends `command` with `arguments` to `daemon` and returns its text.
pub fn command(daemon: &Daemon, command: &str, arguments: &[&str], until: Instant) -> Result<String> {
    let answer = connect(daemon)?.call(command, json!(arguments), until)?;
    text(&daemon.control, command, answer)
}

/// Sends all `commands` (with their arguments) at once: a daemon that answers late answers them in one turn. Their texts,
/// or the first error.
pub fn commands(daemon: &Daemon, commands: &[(&str, Value)], until: Instant) -> Result<Vec<String>> {
    let answers = connect(daemon)?.call_many(commands, until)?;
    commands.iter().zip(answers).map(|((command, _), answer)| text(&daemon.control, command, answer?)).collect()
}

/// Commands that were sent and not yet answered.
pub struct Asked {
    connection: Connection,
    commands: Vec<(&'static str, Value)>,
    first: u64,
}

/// As [`commands`], without waiting for the answers: many can be asked before the first has answered. To a program of
/// our own, whose socket is where nobody else may put one.
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
    fn whoever_else_listens_is_told_nothing() {
        use std::io::Read;
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("ctl");
        let listener = std::os::unix::net::UnixListener::bind(&control).unwrap();
        let own = procfs::identity(std::process::id().cast_signed()).unwrap();
        let own = super::super::daemons::describe(crate::host::DaemonKind::OvsVswitchd, own).unwrap();
        let own = Daemon { control, ..own };
        assert!(connect(&own).is_ok());
        listener.accept().unwrap();
        let later = crate::host::ProcessId { start_time: own.id.start_time + 1, ..own.id };
        let other = crate::host::ProcessId { pid: 1, ..own.id };
        for id in [later, other] {
            let until = Instant::now() + std::time::Duration::from_secs(5);
            let error = command(&Daemon { id, ..own.clone() }, "version", &[], until).unwrap_err().to_string();
            assert!(error.contains("which is not ovs-vswitchd"), "{error}");
            let mut said = String::new();
            listener.accept().unwrap().0.read_to_string(&mut said).unwrap();
            assert_eq!(said, "");
        }
    }

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

//! The exit codes of the binary, as far as they can be seen without Open vSwitch.

// The lint's exception for tests does not reach helper functions of an integration test.
#![allow(clippy::unwrap_used)]

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output};

/// A user that owns nothing (`nobody` of Debian).
const NOBODY: u32 = 65534;

fn ovs_graceful(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ovs-graceful"));
    command.args(words);
    command
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn usage_errors_end_with_2() {
    for words in [
        &["explode"][..],
        &[],
        &["restart", "--strategy", "hope"],
        &["restart", "--no-such-flag"],
        &["hook"],
        &["hook", "reload"],
        &["hook", "supervise"],
        &["runs", "show"],
        &["ct"],
        &["ct", "explode"],
    ] {
        let output = ovs_graceful(words).output().unwrap();
        assert_eq!(code(&output), 2, "{words:?}: {}", stderr(&output));
    }
}

#[test]
fn help_and_version_end_with_0_and_help_tells_the_exit_codes() {
    let help = ovs_graceful(&["--help"]).output().unwrap();
    let text = String::from_utf8_lossy(&help.stdout).into_owned();
    assert_eq!(code(&help), 0);
    for part in ["check", "restart", "status", "abort", "recover", "thaw", "runs", "wait", "40 needs a person"] {
        assert!(text.contains(part), "{part} missing in {text}");
    }
    assert_eq!(code(&ovs_graceful(&["--version"]).output().unwrap()), 0);
}

#[test]
fn without_root_every_command_ends_with_1_and_says_what_to_do() {
    let everything: [&[&str]; 14] = [
        &["check"],
        &["check", "--json"],
        &["restart"],
        &["restart", "--plan"],
        &["status"],
        &["status", "--json"],
        &["wait"],
        &["runs", "--json"],
        &["abort"],
        &["recover"],
        &["thaw"],
        &["runs"],
        &["ct", "show"],
        &["hook", "supervise", "--id", "x"],
    ];
    let root = nix::unistd::geteuid().is_root();
    // Where tests run as root, the binary runs as nobody: from a place that nobody can reach.
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let program: PathBuf = dir.path().join("ovs-graceful");
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_ovs-graceful"), &program).unwrap();
    for words in everything {
        let mut command = Command::new(&program);
        command.args(words);
        if root {
            command.uid(NOBODY).gid(NOBODY);
        }
        // A test beside this one may have forked while the copy was still open for writing.
        let output = loop {
            match command.output() {
                Err(busy) if busy.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                ended => break ended.unwrap(),
            }
        };
        assert_eq!(code(&output), 1, "{words:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("needs root") && stderr(&output).contains("remedy"), "{words:?}");
        match words.contains(&"--json") {
            true => assert_eq!(error(&output).0, 1, "{words:?}"),
            false => assert!(output.stdout.is_empty(), "{words:?}"),
        }
    }
}

/// The error that a command with `--json` has printed: exit code and message.
fn error(output: &Output) -> (u64, String) {
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let error = &answer["error"];
    (error["exit_code"].as_u64().unwrap_or_default(), error["message"].as_str().unwrap_or_default().to_owned())
}

/// The rest needs root, as a run does, and no run under way.
fn as_root(words: &[&str]) -> Option<Output> {
    nix::unistd::geteuid().is_root().then(|| ovs_graceful(words).output().unwrap())
}

#[test]
fn a_bad_configuration_ends_with_2_and_names_the_key_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    std::fs::write(&path, "[freeze]\nleese_ms = 1\n").unwrap();
    let path = path.to_str().unwrap();
    for words in [&["restart"][..], &["restart", "--plan"], &["check"]] {
        let Some(output) = as_root(&[&["--config", path], words].concat()) else { return };
        assert_eq!(code(&output), 2, "{words:?}: {}", stderr(&output));
        let text = stderr(&output);
        assert!(text.contains(path) && text.matches("unknown field `leese_ms`").count() == 1, "{text}");
    }
    let Some(output) = as_root(&["--config", path, "check", "--json"]) else { return };
    let (code, message) = error(&output);
    assert!(code == 2 && message.contains("leese_ms"), "{code} {message}");
    // It may be the reason why somebody asks.
    let Some(output) = as_root(&["--config", path, "status"]) else { return };
    assert_eq!(self::code(&output), 2, "{}", stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("leese_ms") && text.contains("no run begins"), "{text}");
}

#[test]
fn a_configuration_that_was_named_and_is_not_there_ends_with_2() {
    for words in [&["check"][..], &["restart", "--plan"], &["restart"]] {
        let Some(output) = as_root(&[&["--config", "/nonexistent/c.toml"], words].concat()) else { return };
        assert_eq!(code(&output), 2, "{words:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("/nonexistent/c.toml"), "{}", stderr(&output));
    }
}

#[test]
fn check_says_where_its_configuration_is_from() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    std::fs::write(&path, "").unwrap();
    let path = path.to_str().unwrap();
    let Some(output) = as_root(&["--config", path, "check"]) else { return };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.starts_with(&format!("configuration: {path}\n")), "{text}");
}

#[test]
fn what_a_command_could_not_do_ends_with_1() {
    for words in [&["abort"][..], &["runs", "show", "no-such-run"], &["wait", "no-such-run"], &["wait"]] {
        let Some(output) = as_root(words) else { return };
        assert_eq!(code(&output), 1, "{words:?}: {}", stderr(&output));
    }
    let Some(output) = as_root(&["runs", "show", "no-such-run", "--json"]) else { return };
    assert!(error(&output).1.contains("no-such-run"), "{output:?}");
    let Some(output) = as_root(&["restart", "--report", "/nonexistent/report.json"]) else { return };
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert!(stderr(&output).contains("/nonexistent/report.json"), "{}", stderr(&output));
}

#[test]
fn an_answer_that_cannot_be_written_ends_with_1_and_a_closed_pipe_is_none() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    for words in [&["runs"][..], &["status"], &["status", "--json"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = ovs_graceful(words).stdout(full).output().unwrap();
        assert_eq!(code(&output), 1, "{words:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("could not be written"), "{words:?}: {}", stderr(&output));
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = ovs_graceful(words).stdout(writer).output().unwrap();
        assert_eq!(code(&output), 0, "{words:?}: {}", stderr(&output));
    }
}

#[test]
fn status_answers_where_nothing_is_there() {
    let Some(output) = as_root(&["status", "--json"]) else { return };
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys = ["run", "lock", "interrupted", "needs_person", "last_run", "freeze", "flow_restore_wait", "daemons"];
    for key in keys.into_iter().chain(["configuration", "unknown"]) {
        assert!(answer.get(key).is_some(), "{key} missing in {answer}");
    }
    assert_eq!((&answer["schema"], &answer["exit_code"]), (&1.into(), &0.into()));
}

#[test]
fn a_reload_without_a_run_ends_with_1() {
    let Some(output) = as_root(&["hook", "reload", "--", "/bin/true"]) else { return };
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("no run"), "{}", stderr(&output));
}

#[test]
fn nothing_to_recover_ends_with_0() {
    let Some(output) = as_root(&["recover"]) else { return };
    assert_eq!(code(&output), 0, "{}", stderr(&output));
}

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
    for part in ["check", "restart", "status", "abort", "recover", "thaw", "runs", "40 needs a person"] {
        assert!(text.contains(part), "{part} missing in {text}");
    }
    assert_eq!(code(&ovs_graceful(&["--version"]).output().unwrap()), 0);
}

#[test]
fn without_root_every_command_refuses_with_10_and_says_what_to_do() {
    let everything: [&[&str]; 11] = [
        &["check"],
        &["check", "--json"],
        &["restart"],
        &["restart", "--plan"],
        &["status"],
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
        assert_eq!(code(&output), 10, "{words:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("needs root") && stderr(&output).contains("remedy"), "{words:?}");
        assert!(output.stdout.is_empty(), "{words:?}");
    }
}

/// The rest needs root, as a run does, and no run under way.
fn as_root(words: &[&str]) -> Option<Output> {
    nix::unistd::geteuid().is_root().then(|| ovs_graceful(words).output().unwrap())
}

#[test]
fn a_bad_configuration_refuses_with_10_and_names_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    std::fs::write(&path, "[freeze]\nleese_ms = 1\n").unwrap();
    let path = path.to_str().unwrap();
    for words in [&["restart"][..], &["restart", "--plan"], &["check"]] {
        let Some(output) = as_root(&[&["--config", path], words].concat()) else { return };
        assert_eq!(code(&output), 10, "{words:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("leese_ms") && stderr(&output).contains(path), "{}", stderr(&output));
    }
}

#[test]
fn nothing_to_abort_and_no_such_run_refuse_with_10() {
    for words in [&["abort"][..], &["runs", "show", "no-such-run"]] {
        let Some(output) = as_root(words) else { return };
        assert_eq!(code(&output), 10, "{words:?}: {}", stderr(&output));
    }
}

#[test]
fn status_answers_where_nothing_is_there() {
    let Some(output) = as_root(&["status", "--json"]) else { return };
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for key in ["run", "lock", "interrupted", "freeze", "flow_restore_wait", "unknown"] {
        assert!(answer.get(key).is_some(), "{key} missing in {answer}");
    }
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

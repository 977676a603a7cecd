//! The completions of both programs, in the shell itself.

#![allow(clippy::unwrap_used)]

use std::process::Command;

use clap::CommandFactory;
use clap_complete::Shell;

#[allow(dead_code)]
#[path = "../examples/documents.rs"]
mod documents;

/// What bash offers for the last of `words`, which may be empty.
fn offered(program: &clap::Command, words: &[&str]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("completion");
    let text = documents::completions(program, Shell::Bash).unwrap();
    let (_, function) = text.split_once("complete -F ").unwrap();
    let function = function.split_whitespace().next().unwrap().to_owned();
    std::fs::write(&script, text).unwrap();
    let name = program.get_name();
    // As bash calls it: the whole line in COMP_WORDS, then program, word and the word before.
    let last = words.len();
    let before = if last > 1 { words[last - 2] } else { name };
    let words: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let text = format!(
        "source '{}' && COMP_WORDS=('{name}' {}) && COMP_CWORD={last} && {function} '{name}' {} '{before}'; \
         printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        script.display(),
        words.join(" "),
        words[last - 1]
    );
    let output = Command::new("bash").args(["--norc", "-c", &text]).output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).split_whitespace().map(str::to_owned).collect()
}

fn has(found: &[String], wanted: &[&str]) {
    wanted.iter().for_each(|word| assert!(found.iter().any(|one| one == word), "{word} is missing of {found:?}"));
}

#[test]
fn bash_completes_every_word_and_offers_nothing_hidden() {
    let program = orchestrator::cli::Cli::command();
    let first = offered(&program, &[""]);
    has(&first, &["check", "restart", "status", "runs", "ct", "wait"]);
    assert!(!first.iter().any(|word| word == "hook"), "{first:?}");
    has(&offered(&program, &["restart", "--"]), &["--plan", "--if-needed", "--strategy", "--report", "--json"]);
    has(&offered(&program, &["restart", "--strategy", ""]), &["standby", "stop-start", "reload-module"]);
    has(&offered(&program, &["runs", ""]), &["show"]);
    has(&offered(&program, &["ct", ""]), &["show", "diff", "restore"]);
    has(&offered(&program, &["ct", "diff", "--"]), &["--json"]);
}

#[test]
fn the_completions_of_the_hand_tool_offer_nothing_hidden() {
    let program = documents::dpfreeze_args::Cli::command();
    let first = offered(&program, &[""]);
    has(&first, &["freeze", "thaw", "status", "dump"]);
    assert!(!first.iter().any(|word| word == "canary"), "{first:?}");
    has(&offered(&program, &["freeze", "--class", ""]), &["flow-flush", "ct-timeout-del"]);
}

//! Writing to a terminal that may be gone. A lost terminal changes nothing about a run: an error here is dropped.

use std::io::{self, Write};

use serde::Serialize;

use crate::report::{summary, Report};

/// The answer: to standard output.
pub fn say(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// The answer, as JSON.
pub fn say_json(value: &impl Serialize) {
    let mut out = io::stdout().lock();
    let _ = serde_json::to_writer_pretty(&mut out, value);
    let _ = writeln!(out);
}

/// What went wrong: to standard error.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "ovs-graceful: {text}");
}

/// How a run ended that did not do what was asked for: to standard error. Its exit code.
pub fn complain_of(report: &Report) -> u8 {
    complain(summary(report, false).trim_end());
    report.exit_code.code()
}

/// What is going on: to standard error, so that standard output is the answer alone.
pub fn tell(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

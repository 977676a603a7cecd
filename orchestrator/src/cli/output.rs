//! Writing to a terminal that may be gone. A lost terminal changes nothing about a run; a command that only answers has
//! not done so where its answer could not be written ([`lost`]).

use std::io::{self, Write};
use std::sync::Mutex;

use serde::Serialize;

use crate::report::{summary, Report};

/// Why standard output did not take an answer. A reader that has read enough (a closed pipe) is no error.
static LOST: Mutex<Option<String>> = Mutex::new(None);

/// Why the answer could not be written, where it could not.
pub fn lost() -> Option<String> {
    note(io::stdout().flush());
    LOST.lock().ok()?.clone()
}

fn note(written: io::Result<()>) {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            if let Ok(mut lost) = LOST.lock() {
                lost.get_or_insert_with(|| format!("the answer could not be written: {error}"));
            }
        }
        Ok(()) | Err(_) => {}
    }
}

/// The answer: to standard output.
pub fn say(text: &str) {
    note(writeln!(io::stdout(), "{text}"));
}

/// The answer, as JSON.
pub fn say_json(value: &impl Serialize) {
    let mut out = io::stdout().lock();
    let written = serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from);
    note(written.and_then(|()| writeln!(out)));
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

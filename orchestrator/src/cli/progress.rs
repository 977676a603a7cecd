//! A line per phase: with a spinner on a terminal, plain otherwise.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::output::tell;
use crate::control::Progress;
use crate::machine::Phase;

/// Shows the progress of a run on standard error.
pub struct Display {
    bar: Option<ProgressBar>,
    prepare_ms: u64,
}

impl Display {
    /// Spinning where standard error is a terminal.
    pub fn new() -> Display {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Display { bar, prepare_ms: 0 }
    }

    /// Shows one event.
    pub fn show(&mut self, progress: &Progress) {
        if let Progress::PhaseBegun { phase, .. } = progress {
            if let Some(bar) = &self.bar {
                bar.set_message(phase.name());
                bar.reset_elapsed();
            }
        }
        if let Some(line) = self.line(progress) {
            self.print(&line);
        }
    }

    /// A line between the phases.
    pub fn print(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => tell(line),
        }
    }

    /// Takes the spinner away.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// The line for an event, where it is worth one.
    fn line(&mut self, progress: &Progress) -> Option<String> {
        match progress {
            Progress::Hello { id, .. } => Some(format!("run {id}")),
            Progress::PhaseBegun { .. } | Progress::Finished { .. } => None,
            // The first half of Switch is not worth a line of its own where it went well.
            Progress::PhaseEnded { phase: Phase::SwitchPrepare, duration_ms, ok: true } => {
                self.prepare_ms = *duration_ms;
                None
            }
            Progress::PhaseEnded { phase, duration_ms, ok } => {
                let before = if *phase == Phase::SwitchCommit { std::mem::take(&mut self.prepare_ms) } else { 0 };
                let how = if *ok { "done in" } else { "FAILED after" };
                Some(format!("{phase:<9} {how} {} ms", duration_ms + before))
            }
            Progress::PointOfNoReturn => Some("point of no return: from here on Ctrl-C only detaches".to_string()),
            Progress::Undoing { phase } => Some(format!("{phase:<9} being undone")),
            Progress::GoingBack { why } => Some(format!("going back to the old version: {why}")),
            Progress::Note { text } => Some(format!("          {text}")),
            Progress::Warning { text } => Some(format!("warning: {text}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switch_is_one_line_and_a_failure_is_loud() {
        let mut display = Display { bar: None, prepare_ms: 0 };
        let ended = |phase, duration_ms, ok| Progress::PhaseEnded { phase, duration_ms, ok };
        assert_eq!(display.line(&ended(Phase::SwitchPrepare, 30, true)), None);
        let line = display.line(&ended(Phase::SwitchCommit, 12, true));
        assert_eq!(line.as_deref(), Some("switch    done in 42 ms"));
        let line = display.line(&ended(Phase::SwitchPrepare, 30, false));
        assert_eq!(line.as_deref(), Some("switch    FAILED after 30 ms"));
    }
}

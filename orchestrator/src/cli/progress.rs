//! A line per phase: with a spinner on a terminal, plain otherwise.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::output::tell;
use crate::control::{Progress, Status};
use crate::machine::Phase;

/// Without a terminal a phase that takes long is told of so often.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// Shows the progress of a run on standard error.
pub struct Display {
    bar: Option<ProgressBar>,
    prepare_ms: u64,
    /// When the last line was printed.
    told: Instant,
}

impl Display {
    /// Spinning where standard error is a terminal.
    pub fn new() -> Display {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Display { bar, prepare_ms: 0, told: Instant::now() }
    }

    /// Shows one event.
    pub fn show(&mut self, progress: &Progress) {
        if let Progress::PhaseBegun { phase, .. } = progress {
            if let Some(bar) = &self.bar {
                bar.set_message(phase.name());
            }
        }
        if let Some(line) = self.line(progress) {
            self.told = Instant::now();
            self.print(&line);
        }
    }

    /// Shows how far a phase is that takes its time.
    pub fn wait(&mut self, status: &Status) {
        let Some(line) = waiting(status) else { return };
        match &self.bar {
            Some(bar) => bar.set_message(line),
            None if self.told.elapsed() >= TELL_AGAIN => {
                self.told = Instant::now();
                tell(&line);
            }
            None => {}
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
            // It has touched nothing.
            Progress::Undoing { phase: Phase::Check } => None,
            Progress::Undoing { phase } => Some(format!("{phase:<9} being undone")),
            Progress::GoingBack { why } => Some(format!("going back to the old version: {why}")),
            Progress::Note { text } => Some(format!("          {text}")),
            Progress::Warning { text } => Some(format!("warning: {text}")),
        }
    }
}

/// What a run waits in, for how long at most, and how much is parked meanwhile.
fn waiting(status: &Status) -> Option<String> {
    let phase = status.phase?;
    let doing = match status.doing.as_str() {
        "doing" => "",
        "undoing" => " being undone",
        "going back" => " going back",
        _ => return None,
    };
    let so_long = status.phase_ms.unwrap_or_default() / 1000;
    let limit = status.limit_ms.map(|limit| format!(" of at most {} s", limit.div_ceil(1000))).unwrap_or_default();
    let parked = if status.parked > 0 { format!(", {} packets parked", status.parked) } else { String::new() };
    Some(format!("{phase:<9}{doing} {so_long} s{limit}{parked}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switch_is_one_line_and_a_failure_is_loud() {
        let mut display = Display { bar: None, prepare_ms: 0, told: Instant::now() };
        let ended = |phase, duration_ms, ok| Progress::PhaseEnded { phase, duration_ms, ok };
        assert_eq!(display.line(&ended(Phase::SwitchPrepare, 30, true)), None);
        let line = display.line(&ended(Phase::SwitchCommit, 12, true));
        assert_eq!(line.as_deref(), Some("switch    done in 42 ms"));
        let line = display.line(&ended(Phase::SwitchPrepare, 30, false));
        assert_eq!(line.as_deref(), Some("switch    FAILED after 30 ms"));
    }

    #[test]
    fn a_phase_that_takes_long_says_how_long_it_may_and_what_is_parked() {
        let status = Status { phase: Some(Phase::Restore), doing: "doing".into(), ..Status::default() };
        let status = Status { phase_ms: Some(12_900), limit_ms: Some(60_000), parked: 34, ..status };
        assert_eq!(waiting(&status).as_deref(), Some("restore   12 s of at most 60 s, 34 packets parked"));
        let status = Status { doing: "undoing".into(), limit_ms: None, parked: 0, ..status };
        assert_eq!(waiting(&status).as_deref(), Some("restore   being undone 12 s"));
        assert_eq!(waiting(&Status { doing: "finished".into(), ..status }), None);
    }

    #[test]
    fn without_a_terminal_a_line_comes_every_ten_seconds_at_most() {
        let mut display = Display { bar: None, prepare_ms: 0, told: Instant::now() };
        let status = Status { phase: Some(Phase::Arm), doing: "doing".into(), ..Status::default() };
        let told = display.told;
        display.wait(&status);
        assert_eq!(display.told, told, "nothing yet");
        let Some(long_ago) = told.checked_sub(TELL_AGAIN) else { return };
        display.told = long_ago;
        display.wait(&status);
        assert!(display.told >= told);
    }
}

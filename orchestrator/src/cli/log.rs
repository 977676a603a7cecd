//! Where the log goes: to the journal when systemd runs us, else to standard error.
//!
//! A run must never wait for its log: the journal may wait for a disk that is reached over the bridge whose daemon is
//! being replaced (hazards 27). Lines go through a bounded queue to a thread of their own; when that is full they are
//! dropped and counted.

use std::fmt::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::EnvFilter;

/// So many lines may wait to be written.
const QUEUE: usize = 4096;

/// How long the end of the process waits for lines that are not written yet.
const PATIENCE: Duration = Duration::from_secs(2);

enum Line {
    Text(Level, String),
    End,
}

/// The log of this process, until it is dropped.
pub struct Log {
    queue: SyncSender<Line>,
    writer: Option<JoinHandle<()>>,
}

/// Sets the log up. `OVS_GRACEFUL_LOG` changes what is logged, for example `debug`.
pub fn init() -> Log {
    let (queue, lines) = sync_channel(QUEUE);
    let dropped = Arc::new(AtomicU64::new(0));
    let filter =
        EnvFilter::builder().with_env_var("OVS_GRACEFUL_LOG").try_from_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let queueing = Queueing { queue: queue.clone(), dropped: Arc::clone(&dropped) };
    // A second call (tests) leaves the first one's choice.
    let _ = tracing_subscriber::registry().with(filter).with(queueing).try_init();
    let writer = std::thread::Builder::new().name("log".to_string()).spawn(move || write_all(&lines, &dropped)).ok();
    Log { queue, writer }
}

impl Drop for Log {
    fn drop(&mut self) {
        let Some(writer) = self.writer.take() else { return };
        let until = Instant::now() + PATIENCE;
        // A queue that is full has a writer that is stuck: it gets no longer than the rest.
        while self.queue.try_send(Line::End).is_err() && Instant::now() < until && !writer.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        while !writer.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Puts every event into the queue, without ever waiting.
struct Queueing {
    queue: SyncSender<Line>,
    dropped: Arc<AtomicU64>,
}

impl<S: Subscriber> Layer<S> for Queueing {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let line = Line::Text(*event.metadata().level(), text.message + &text.fields);
        if self.queue.try_send(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The message of an event, and its other fields as `name=value`.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

fn write_all(lines: &Receiver<Line>, dropped: &AtomicU64) {
    let registry = tracing_subscriber::registry();
    let journal = if stderr_is_the_journal() { tracing_journald::layer().ok() } else { None };
    // For this thread only: the rest of the process has the queue.
    let _default = match journal {
        Some(journal) => registry.with(journal).set_default(),
        None => {
            let plain = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
            registry.with(plain.with_target(false)).set_default()
        }
    };
    while let Ok(Line::Text(level, text)) = lines.recv() {
        write_one(level, &text);
        let missing = dropped.swap(0, Ordering::Relaxed);
        if missing > 0 {
            write_one(Level::WARN, &format!("{missing} log lines were dropped: the log was too slow"));
        }
    }
}

fn write_one(level: Level, text: &str) {
    match level {
        Level::ERROR => tracing::error!("{text}"),
        Level::WARN => tracing::warn!("{text}"),
        Level::INFO => tracing::info!("{text}"),
        Level::DEBUG => tracing::debug!("{text}"),
        Level::TRACE => tracing::trace!("{text}"),
    }
}

/// systemd.exec(5): `$JOURNAL_STREAM` is `device:inode` of the stream that the journal reads.
fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = nix::sys::stat::fstat(std::io::stderr().as_fd()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_drops_lines_and_never_waits() {
        let (queue, lines) = sync_channel(2);
        let dropped = Arc::new(AtomicU64::new(0));
        let layer = Queueing { queue, dropped: Arc::clone(&dropped) };
        let _default = tracing_subscriber::registry().with(layer).set_default();
        for n in 0..5 {
            tracing::warn!(bridge = "br0", "line {n}");
        }
        assert_eq!(dropped.load(Ordering::Relaxed), 3);
        let Ok(Line::Text(level, text)) = lines.try_recv() else { panic!("no line") };
        assert_eq!((level, text.as_str()), (Level::WARN, "line 0 bridge=\"br0\""));
    }
}

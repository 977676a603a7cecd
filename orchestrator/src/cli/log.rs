//! Where the log goes: to the journal when systemd runs us, else to standard error.

use std::os::fd::AsFd;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::EnvFilter;

/// Sets the log up. `OVS_GRACEFUL_LOG` changes what is logged, for example `debug`.
pub fn init() {
    let filter =
        EnvFilter::builder().with_env_var("OVS_GRACEFUL_LOG").try_from_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    let journal = if stderr_is_the_journal() { tracing_journald::layer().ok() } else { None };
    // A second call (tests) leaves the first one's choice.
    let _ = match journal {
        Some(journal) => registry.with(journal).try_init(),
        None => {
            registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false)).try_init()
        }
    };
}

/// systemd.exec(5): `$JOURNAL_STREAM` is `device:inode` of the stream that the journal reads.
fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = nix::sys::stat::fstat(std::io::stderr().as_fd()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

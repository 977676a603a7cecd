//! The time limits of the units whose commands we are (`TimeoutStopSec=`, `TimeoutStartSec=`): a run may take longer, and
//! systemd would end its command in the middle. While it goes on systemd is asked for more time (sd_notify(3),
//! `EXTEND_TIMEOUT_USEC=`), which our drop-ins allow (`NotifyAccess=exec`).

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Where systemd listens; the drop-ins keep `NOTIFY_SOCKET` from the daemons, and so from us.
const SOCKET: &str = "/run/systemd/notify";

/// How much time is asked for, each time.
const MORE: Duration = Duration::from_secs(60);

/// How often. A daemon-reload, of which a run makes several, forgets what was granted and counts the unit's own limit from
/// the beginning (`service_coldplug`, src/core/service.c of systemd): a message that came meanwhile is read before that
/// limit is looked at, so one has to come within each reload.
const AGAIN: Duration = Duration::from_millis(50);

/// From now on this process, a command of a unit, is given the time that it needs, for `most` at most. Where systemd does
/// not listen, or the unit does not let it, the unit's own limits stay.
pub(super) fn ask(most: Duration) {
    ask_at(Path::new(SOCKET).to_path_buf(), most, AGAIN);
}

fn ask_at(socket: PathBuf, most: Duration, again: Duration) {
    let until = Instant::now() + most;
    let body = move || {
        while Instant::now() < until && ask_once(&socket).is_ok() {
            thread::sleep(again);
        }
    };
    // Without it the limits are what they were.
    let _started = thread::Builder::new().name("patience".to_owned()).spawn(body);
}

fn ask_once(socket: &Path) -> std::io::Result<()> {
    let message = format!("EXTEND_TIMEOUT_USEC={}", MORE.as_micros());
    UnixDatagram::unbound()?.send_to(message.as_bytes(), socket).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_time_is_asked_for_again_and_again_until_there_was_enough() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        systemd.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        ask_at(path, Duration::from_millis(300), Duration::from_millis(10));
        let mut buffer = [0; 100];
        for _ in 0..3 {
            let length = systemd.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"EXTEND_TIMEOUT_USEC=60000000");
        }
        systemd.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
        while systemd.recv(&mut buffer).is_ok() {}
    }
}

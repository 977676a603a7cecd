//! Sockets that a daemon was handed at its start and listens on (`--remote=pfd:N`, Open vSwitch 4.0): they outlive it here
//! and are handed on to the next one, so that clients wait in their queue and are not refused.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg};
use nix::sys::socket::{getsockopt, sockopt};

use super::daemons::pidfd_getfd;
use crate::host::Daemon;

const REMOTE: &str = "--remote=pfd:";
/// Nobody is handed so many (SD_LISTEN_FDS_START is 3).
const MOST: RawFd = 64;

/// One of them.
#[derive(Debug)]
pub struct Listener {
    /// The number under which the daemon knows it.
    number: RawFd,
    socket: OwnedFd,
}

impl Listener {
    /// Gives it its number, in a child between fork and exec: a system call only.
    ///
    /// # Errors
    /// Where the kernel refuses it.
    pub fn hand_on(&self) -> io::Result<()> {
        let held = self.socket.as_raw_fd();
        // SAFETY: both calls take integers. The number belongs to nothing that this child still needs: it was either free
        // or a file of the parent's that is closed at exec, and the socket itself was put at it or above.
        let result = unsafe {
            match held == self.number {
                true => libc::fcntl(held, libc::F_SETFD, 0),
                false => libc::dup2(held, self.number),
            }
        };
        Errno::result(result).map(drop).map_err(io::Error::from)
    }
}

/// The numbers in a command line.
fn numbers(argv: &[String]) -> impl Iterator<Item = RawFd> + '_ {
    let number = |word: &String| word.strip_prefix(REMOTE)?.parse().ok();
    argv.iter().filter_map(number).filter(|number| (3..MOST).contains(number))
}

/// Those that the command line of a daemon names, duplicated; `process` is its pidfd. Whatever it names is its own, and
/// goes to its successor, which runs as its user. What is no socket that listens, or is not let go of, is left out.
pub fn of(daemon: &Daemon, process: BorrowedFd<'_>) -> Vec<Listener> {
    let take = |number| {
        let taken = taken(process, number);
        if let Err(why) = &taken {
            tracing::warn!(pid = daemon.id.pid, number, %why, "a socket that the daemon was handed is not handed on");
        }
        taken.ok()
    };
    numbers(&daemon.argv).filter_map(take).collect()
}

fn taken(process: BorrowedFd<'_>, number: RawFd) -> nix::Result<Listener> {
    let socket = pidfd_getfd(process, number)?;
    if !getsockopt(&socket, sockopt::AcceptConn)? {
        return Err(Errno::EINVAL);
    }
    // Where the number is free it is taken by this: then no other file that the start needs can have it.
    let raw = fcntl(&socket, FcntlArg::F_DUPFD_CLOEXEC(number))?;
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    Ok(Listener { number, socket: unsafe { OwnedFd::from_raw_fd(raw) } })
}

/// A command line that names no descriptor but those that are kept; the others become `by_path`.
pub fn without_lost(argv: &[String], kept: &[Listener], by_path: &str) -> Vec<String> {
    let lost: Vec<String> = numbers(argv)
        .filter(|number| !kept.iter().any(|one| one.number == *number))
        .map(|number| format!("{REMOTE}{number}"))
        .collect();
    let word = |word: &String| if lost.contains(word) { format!("--remote={by_path}") } else { word.clone() };
    argv.iter().map(word).collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, IntoRawFd};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::host::real::daemons::pidfd_open;
    use crate::host::real::ovsdb_server::tests::server;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn a_socket_that_was_handed_over_is_handed_on() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("db.sock")).unwrap();
        let number = fcntl(&listener, FcntlArg::F_DUPFD(20)).unwrap();
        let argv = words(&["ovsdb-server", "conf.db", &format!("--remote=pfd:{number}"), "--remote=db:x", "--pidfile"]);
        let daemon = Daemon { argv: argv.clone(), ..server() };
        let own = pidfd_open(std::process::id() as i32).unwrap();
        let held = of(&daemon, own.as_fd());
        if held.is_empty() {
            // Some sandboxes have no pidfd_getfd.
            return;
        }
        assert_eq!(held.iter().map(|one| one.number).collect::<Vec<_>>(), [number]);
        assert_eq!(without_lost(&argv, &held, "punix:/x"), argv);
        let lost = words(&["ovsdb-server", "conf.db", "--remote=punix:/x", "--remote=db:x", "--pidfile"]);
        assert_eq!(without_lost(&argv, &[], "punix:/x"), lost);
        let file = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        let daemon = Daemon { argv: words(&["ovsdb-server", &format!("--remote=pfd:{file}")]), ..server() };
        if (3..MOST).contains(&file) {
            assert!(of(&daemon, own.as_fd()).is_empty());
        }
    }

    #[test]
    fn only_a_number_that_may_be_handed_over_counts() {
        let argv =
            words(&["--remote=pfd:3", "--remote=pfd:1", "--remote=pfd:x", "--remote=pfd:4096", "--remote=ptcp:3"]);
        assert_eq!(numbers(&argv).collect::<Vec<_>>(), [3]);
    }
}

//! The canary: proves, from a process that is not exempt, that the kernel refuses what it is told to refuse *and* that
//! it stops doing so when the lease ends. A program that loads, attaches and pins may still refuse nothing
//! (`lsm/` without `bpf` in the boot-time list of LSMs).
//!
//! The message is a flush of a datapath that cannot exist: passed on, it comes back as ENODEV and harms nothing.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use netlink_sys::constants::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::freeze::{scope, Classes, Families, Freeze, Scope};

/// Indices are given out from 1 upwards: no device ever has the largest one.
const CANARY_IFINDEX: u32 = i32::MAX as u32;
/// Stands for the flow family where openvswitch is not loaded: no family has it, so it comes back as ENOENT.
const CANARY_FAMILY: u16 = 0xfffe;
/// Tried one after the other: a slow machine may not get a message out within the first.
const LEASES_MS: [u64; 4] = [50, 200, 800, 3200];
/// How long a message of the canary may take, answer included.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How to start the canary: a program that calls [`canary_main`] when started with these arguments.
#[derive(Clone, Debug)]
pub struct CanaryCommand {
    /// The program, usually `/proc/self/exe`.
    pub program: PathBuf,
    /// Its arguments, for example `hook canary`.
    pub args: Vec<OsString>,
}

impl CanaryCommand {
    /// This very executable with these arguments.
    pub fn own(args: &[&str]) -> CanaryCommand {
        CanaryCommand { program: "/proc/self/exe".into(), args: args.iter().map(OsString::from).collect() }
    }
}

/// What the canary proved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryReport {
    /// The lease with which it was proved.
    pub lease_ms: u64,
    /// How long after the arming the message passed again.
    pub passed_after_ms: u64,
    /// Was it proved with the real flow family (false: openvswitch is not loaded)?
    pub with_openvswitch: bool,
}

/// The remedy where the kernel does not do what the program says.
const GIVE_UP: &str = "run at level park, without a freeze, and report this kernel";

/// How the kernel took the canary's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// sendmsg failed.
    Refused(i32),
    /// It was delivered and answered with this errno.
    Answered(i32),
}

impl Freeze {
    /// Proves refusal, exemption and expiry. Leaves the freeze unarmed; must not be armed.
    ///
    /// # Errors
    /// Where one of the three does not hold: then this kernel, or this hook, must not be relied on.
    pub fn canary(&mut self, command: &CanaryCommand, families: Families) -> Result<CanaryReport> {
        if self.state()?.armed {
            return Err(failed("the freeze is armed", "prove it before arming"));
        }
        let with_openvswitch = families.flow != 0;
        let flow = if with_openvswitch { families.flow } else { CANARY_FAMILY };
        let scope = Scope {
            netns_inode: scope::netns_inode()?,
            ifindexes: vec![CANARY_IFINDEX],
            families: Families { flow, ..families },
            ..Scope::default()
        };
        let mut child = Canary::start(command, flow)?;
        let passes = child.send()?;
        if !matches!(passes, Fate::Answered(errno) if errno != 0) {
            return Err(failed(&format!("before the arming a message met {passes:?}"), "look for another LSM"));
        }
        for lease_ms in LEASES_MS {
            let proof = self.prove(&mut child, &scope, Duration::from_millis(lease_ms), passes);
            self.set_classes(Classes::empty())?;
            if let Some(passed_after_ms) = proof? {
                return Ok(CanaryReport { lease_ms, passed_after_ms, with_openvswitch });
            }
        }
        Err(failed("every lease ran out before the canary's message was sent", "try again when the host is less busy"))
    }

    /// One lease. None: it ran out before the canary's message got through to the hook, which proves nothing.
    fn prove(&mut self, child: &mut Canary, scope: &Scope, lease: Duration, passes: Fate) -> Result<Option<u64>> {
        // The lease begins between the two: it surely holds for its length from the first on, and has surely run out
        // its length after the second.
        let arming = Instant::now();
        self.arm(scope, Classes::FLOW_FLUSH, lease, lease * 2)?;
        let armed = Instant::now();
        let refused = child.send()?;
        let late = arming.elapsed() >= lease;
        if refused != Fate::Refused(Errno::EBUSY as i32) {
            return if late && refused == passes {
                Ok(None)
            } else {
                Err(failed(
                    &format!("the hook refuses nothing: a message to be refused met {refused:?}"),
                    "boot with `bpf` in the list of LSMs (lsm=), or run at level park",
                ))
            };
        }
        if self.refused()?.flow_flush == 0 {
            return Err(failed("a message was refused, but not by the freeze", "look for another LSM"));
        }
        let own = send_flush(scope.families.flow)?;
        if own != passes {
            return Err(failed(&format!("the exemption does not hold: the exempt process met {own:?}"), GIVE_UP));
        }
        std::thread::sleep((lease + Duration::from_millis(2)).saturating_sub(armed.elapsed()));
        let after = child.send()?;
        if after != passes {
            return Err(failed(&format!("the lease does not end: after it a message met {after:?}"), GIVE_UP));
        }
        Ok(Some(armed.elapsed().as_millis() as u64))
    }
}

fn failed(why: &str, remedy: &str) -> Error {
    Error::Unsupported { what: "canary of the freeze".into(), why: why.into(), remedy: remedy.into() }
}

/// The child process that sends messages for us.
struct Canary {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    family: u16,
}

impl Canary {
    fn start(command: &CanaryCommand, family: u16) -> Result<Canary> {
        let what = format!("canary {}", command.program.display());
        let mut child = Command::new(&command.program)
            .args(&command.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| Error::io(&what, error))?;
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::io(what, io::ErrorKind::BrokenPipe));
        };
        Ok(Canary { child, orders, answers: BufReader::new(answers), family })
    }

    /// Has the child send one message, and says how it fared.
    fn send(&mut self) -> Result<Fate> {
        let what = |error: io::Error| Error::io("canary process", error);
        writeln!(self.orders, "{}", self.family).map_err(what)?;
        let mut fds = [PollFd::new(self.answers.get_ref().as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(ANSWER_LIMIT).unwrap_or(PollTimeout::MAX);
        if poll(&mut fds, limit).map_err(|errno| what(errno.into()))? == 0 {
            return Err(what(io::ErrorKind::TimedOut.into()));
        }
        let mut line = String::new();
        self.answers.by_ref().take(64).read_line(&mut line).map_err(what)?;
        parse_fate(&line).ok_or_else(|| Error::malformed("canary process", format!("answered {line:?}")))
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        // It may be stuck: it is ours alone, so there is nothing to be gentle about.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse_fate(line: &str) -> Option<Fate> {
    let (how, errno) = line.trim_end().split_once(' ')?;
    let errno = errno.parse().ok()?;
    match how {
        "refused" => Some(Fate::Refused(errno)),
        "answered" => Some(Fate::Answered(errno)),
        _ => None,
    }
}

/// The canary process: for each line with a family id on stdin sends one message and writes its fate to stdout, until
/// stdin ends. A binary calls this when [`CanaryCommand`] starts it so.
pub fn canary_main() -> ExitCode {
    for line in io::stdin().lock().lines() {
        let fate = line.map_err(|error| Error::io("stdin", error)).and_then(|line| {
            let family = line.trim().parse().map_err(|_| Error::malformed("stdin", format!("{line:?}")))?;
            send_flush(family)
        });
        let said = match fate {
            Ok(Fate::Refused(errno)) => writeln!(io::stdout(), "refused {errno}"),
            Ok(Fate::Answered(errno)) => writeln!(io::stdout(), "answered {errno}"),
            Err(error) => {
                let _ = writeln!(io::stderr(), "canary: {error}");
                return ExitCode::FAILURE;
            }
        };
        if said.is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Sends the flush of [`CANARY_IFINDEX`] and waits for the answer.
fn send_flush(family: u16) -> Result<Fate> {
    let what = |error: io::Error| Error::io("canary message", error);
    let mut socket = Socket::new(NETLINK_GENERIC).map_err(what)?;
    socket.bind_auto().map_err(what)?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(what)?;
    let limit = TimeVal::new(ANSWER_LIMIT.as_secs() as i64, 0);
    setsockopt(&socket, sockopt::ReceiveTimeout, &limit).map_err(|errno| what(errno.into()))?;
    if let Err(error) = socket.send(&flush(family), 0) {
        return Ok(Fate::Refused(error.raw_os_error().unwrap_or_default()));
    }
    let (answer, _) = socket.recv_from_full().map_err(what)?;
    // struct nlmsghdr, then struct nlmsgerr, whose first member is the negative errno
    let errno = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    errno.map(|errno| Fate::Answered(-errno)).ok_or_else(|| Error::malformed("answer to the canary", "too short"))
}

/// `OVS_FLOW_CMD_DEL` without attributes: nlmsghdr, genlmsghdr, ovs_header (linux/openvswitch.h).
fn flush(family: u16) -> Vec<u8> {
    const NLM_F_REQUEST: u16 = 1;
    const NLM_F_ACK: u16 = 4;
    const OVS_FLOW_CMD_DEL: u8 = 2;
    const OVS_FLOW_VERSION: u8 = 1;
    let mut message = Vec::with_capacity(24);
    message.extend(24u32.to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend(1u32.to_ne_bytes());
    message.extend(0u32.to_ne_bytes());
    message.extend([OVS_FLOW_CMD_DEL, OVS_FLOW_VERSION, 0, 0]);
    message.extend(CANARY_IFINDEX.to_ne_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_a_flush() {
        let message = flush(0x1234);
        assert_eq!(message.len(), 24);
        assert_eq!(message[..4], 24u32.to_ne_bytes());
        assert_eq!(message[16], 2);
    }

    #[test]
    fn fates_are_told_apart() {
        assert_eq!(parse_fate("refused 16\n"), Some(Fate::Refused(16)));
        assert_eq!(parse_fate("answered 19\n"), Some(Fate::Answered(19)));
        assert_eq!(parse_fate("19"), None);
    }
}

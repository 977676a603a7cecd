//! Processes that send messages, because what is refused depends on who sends.

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

use dpfreeze::freeze;
use dpfreeze::netlink::Protocol;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{sendmsg, setsockopt, sockopt, MsgFlags};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;

use crate::messages::Sendmsg;

/// How a sendmsg fared: errnos.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// sendmsg failed.
    Refused(i32),
    /// Delivered; the first acknowledgement said this.
    Answered(i32),
}

impl Fate {
    pub fn passed(self) -> bool {
        matches!(self, Fate::Answered(_))
    }
}

pub fn send(what: &Sendmsg) -> Fate {
    let mut socket = Socket::new(what.protocol as isize).unwrap();
    socket.bind_auto().unwrap();
    socket.connect(&SocketAddr::new(0, 0)).unwrap();
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(5, 0)).unwrap();
    if let Err(errno) = sendmsg_as_ovs(&socket, &what.bytes) {
        return Fate::Refused(errno as i32);
    }
    let Ok((answer, _)) = socket.recv_from_full() else { return Fate::Answered(-1) };
    const NLMSG_ERROR: u16 = 2;
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    let errno = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    Fate::Answered(if kind == NLMSG_ERROR { -errno } else { 0 })
}

/// As nl_sock_transact_multiple__() of lib/netlink-socket.c sends: by sendmsg, again where that was interrupted.
pub fn sendmsg_as_ovs(socket: &Socket, bytes: &[u8]) -> nix::Result<usize> {
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &[], MsgFlags::empty(), None) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// A child that sends what it is told.
pub struct Sender {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Sender {
    /// As root in our namespaces, but not exempt.
    pub fn root() -> Sender {
        Self::behind(&[], Path::new("/proc/self/exe"))
    }

    /// The user nobody.
    pub fn nobody(exe: &Path) -> Sender {
        Self::behind(&["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"], exe)
    }

    /// The user nobody, as root of a user namespace of his own.
    pub fn nobody_with_user_namespace(exe: &Path) -> Sender {
        let command = "setpriv --reuid=65534 --regid=65534 --clear-groups -- unshare --user --map-root-user --";
        Self::behind(&command.split(' ').collect::<Vec<_>>(), exe)
    }

    /// Root in another network namespace.
    pub fn elsewhere() -> Sender {
        Self::behind(&["unshare", "--net", "--"], Path::new("/proc/self/exe"))
    }

    fn behind(wrapper: &[&str], exe: &Path) -> Sender {
        // /proc/self/exe would be the wrapper's.
        let exe: PathBuf = if wrapper.is_empty() { exe.into() } else { exe.canonicalize().unwrap() };
        let mut words: Vec<std::ffi::OsString> = wrapper.iter().map(Into::into).collect();
        words.push(exe.into());
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .arg("sender")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Sender { child, orders, answers }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub fn start_time(&self) -> u64 {
        freeze::start_time(self.pid()).unwrap()
    }

    pub fn send(&mut self, what: &Sendmsg) -> Fate {
        let hex: String = what.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let answer = self.ask(&format!("send {} {hex}", what.protocol as u32));
        let (how, errno) = answer.split_once(' ').unwrap();
        let errno = errno.parse().unwrap();
        if how == "refused" {
            Fate::Refused(errno)
        } else {
            Fate::Answered(errno)
        }
    }

    /// Binds sockets and keeps them open; their port ids.
    pub fn bind(&mut self, count: usize) -> Vec<u32> {
        self.ask(&format!("bind {count}")).split(' ').map(|id| id.parse().unwrap()).collect()
    }

    /// Can it read the state of the freeze?
    pub fn reads_state(&mut self) -> bool {
        self.ask("state") == "some"
    }

    fn ask(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The child's side.
pub fn sender_main() -> ExitCode {
    let mut kept = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["send", protocol, hex] => {
                let protocol = match protocol {
                    "0" => Protocol::Route,
                    "12" => Protocol::Netfilter,
                    _ => Protocol::Generic,
                };
                let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
                let bytes = (0..hex.len()).step_by(2).map(byte).collect();
                match send(&Sendmsg { protocol, bytes }) {
                    Fate::Refused(errno) => println!("refused {errno}"),
                    Fate::Answered(errno) => println!("answered {errno}"),
                }
            }
            ["bind", count] => {
                let ids: Vec<String> = (0..count.parse().unwrap())
                    .map(|_| {
                        let mut socket = Socket::new(Protocol::Generic as isize).unwrap();
                        let id = socket.bind_auto().unwrap().port_number();
                        kept.push(socket);
                        id.to_string()
                    })
                    .collect();
                println!("{}", ids.join(" "));
            }
            ["state"] => println!("{}", if matches!(freeze::state(), Ok(Some(_))) { "some" } else { "none" }),
            _ => return ExitCode::FAILURE,
        }
    }
    ExitCode::SUCCESS
}

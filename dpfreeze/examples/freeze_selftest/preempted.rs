//! Senders of one CPU that interrupt each other while the program decides.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

use crate::families;
use crate::messages::{flow_del_long, flow_flush, GHOST};
use crate::sender::{send, sendmsg_as_ovs, Fate};

const CANARIES: u64 = 4000;

/// How the canaries of one run fared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub passed: u64,
    pub refused: u64,
}

/// Sends messages to be refused from the CPU on which `busy` others, whom everybody preempts, send all the time.
pub fn disturbed(busy: usize, urgency: &str) -> Found {
    let busy: Vec<Busy> = (0..busy).map(|_| Busy::start()).collect();
    let output = Command::new("/proc/self/exe").args(["canaries", urgency]).output().unwrap();
    drop(busy);
    let text = String::from_utf8_lossy(&output.stdout);
    let (passed, refused) = text.trim_end().split_once(' ').unwrap_or_else(|| panic!("canaries said {text:?}"));
    Found { passed: passed.parse().unwrap(), refused: refused.parse().unwrap() }
}

struct Busy(Child);

impl Busy {
    fn start() -> Busy {
        let mut child = Command::new("/proc/self/exe").arg("busy").stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "busy\n");
        Busy(child)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends batches over which the program thinks for long, until it is killed.
pub fn busy_main() -> ExitCode {
    let f = families();
    let mut socket = Socket::new(dpfreeze::netlink::Protocol::Generic as isize).unwrap();
    socket.bind_auto().unwrap();
    socket.connect(&SocketAddr::new(0, 0)).unwrap();
    let batch = flow_del_long(f, GHOST).times(63).then(&flow_flush(f, GHOST));
    pin(libc::SCHED_IDLE, 0);
    println!("busy");
    loop {
        let _ = sendmsg_as_ovs(&socket, &batch.bytes);
    }
}

/// Sends messages to be refused, a moment after one another, and prints how many passed and how many were refused.
pub fn canaries_main() -> ExitCode {
    let flush = flow_flush(families(), GHOST);
    match std::env::args().nth(2).as_deref() {
        Some("urgent") => pin(libc::SCHED_FIFO, 1),
        _ => pin(libc::SCHED_OTHER, 0),
    }
    let (mut passed, mut refused) = (0, 0);
    for turn in 0..CANARIES {
        std::thread::sleep(Duration::from_micros(100 + turn * 37 % 400));
        match send(&flush) {
            Fate::Refused(errno) if errno == Errno::EBUSY as i32 => refused += 1,
            _ => passed += 1,
        }
    }
    println!("{passed} {refused}");
    ExitCode::SUCCESS
}

/// To the first CPU, under this policy of the scheduler.
fn pin(policy: i32, priority: i32) {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: a cpu_set_t is plain bits; the calls read what they are given and keep no pointer.
    let results = unsafe {
        let mut cpus: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut cpus);
        let pinned = libc::sched_setaffinity(0, std::mem::size_of_val(&cpus), &cpus);
        [pinned, libc::sched_setscheduler(0, policy, &parameters)]
    };
    assert_eq!(results, [0, 0], "{}", std::io::Error::last_os_error());
}

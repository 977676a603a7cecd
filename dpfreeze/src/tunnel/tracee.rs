//! The system boundary: ptrace and the memory of another process. All of it is called from the one tracing thread.

use std::io;
use std::mem::{size_of, MaybeUninit};
use std::ptr;

use libc::{c_int, c_long, c_uint, c_void, pid_t};

use crate::memory;

/// `PTRACE_EVENT_STOP` (linux/ptrace.h)
const EVENT_STOP: c_int = 128;

/// How a tracee has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// At a system call, going in or coming out.
    Syscall,
    /// Stopped by PTRACE_INTERRUPT, or running again after a stop of the whole process.
    Event,
    /// The whole process is stopped (SIGSTOP and the like).
    Group,
    /// A signal is to be delivered.
    Signal(c_int),
}

/// What a system call stop is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Syscall {
    /// Going in: number and arguments.
    Entry(u64, [u64; 6]),
    /// Coming out: value or negative errno.
    Exit(i64),
}

/// One thread, traced by the calling thread; let go when the value is dropped, provided the thread is in a stop.
pub(super) struct Tracee(pid_t);

fn ptrace(request: c_uint, pid: pid_t, address: usize, data: usize) -> io::Result<c_long> {
    // SAFETY: every request used here takes its data by value or as a pointer to memory that the caller holds, valid
    // for the length given in `address`.
    match unsafe { libc::ptrace(request, pid, address as *mut c_void, data as *mut c_void) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

impl Tracee {
    /// Begins to trace thread `pid` and asks it to stop.
    pub(super) fn seize(pid: pid_t) -> io::Result<Self> {
        ptrace(libc::PTRACE_SEIZE, pid, 0, libc::PTRACE_O_TRACESYSGOOD as usize)?;
        let tracee = Tracee(pid);
        tracee.interrupt()?;
        Ok(tracee)
    }

    /// Asks a running tracee to stop.
    pub(super) fn interrupt(&self) -> io::Result<()> {
        ptrace(libc::PTRACE_INTERRUPT, self.0, 0, 0).map(drop)
    }

    /// Waits for the next stop. None: the tracee has ended. `ErrorKind::Interrupted`: a signal came to this thread.
    pub(super) fn wait(&self) -> io::Result<Option<Stop>> {
        let mut status = 0;
        // SAFETY: `status` is a valid c_int for the length of the call.
        if unsafe { libc::waitpid(self.0, &mut status, libc::__WALL) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stop_of(status))
    }

    /// Lets the tracee run to the next system call stop, delivering `signal` if it is not 0.
    pub(super) fn run_to_syscall(&self, signal: c_int) -> io::Result<()> {
        ptrace(libc::PTRACE_SYSCALL, self.0, 0, signal as usize).map(drop)
    }

    /// Lets the tracee run to the next stop of another kind, delivering `signal` if it is not 0.
    pub(super) fn run(&self, signal: c_int) -> io::Result<()> {
        ptrace(libc::PTRACE_CONT, self.0, 0, signal as usize).map(drop)
    }

    /// Leaves the tracee in the stop of its whole process, but waits for its end.
    pub(super) fn listen(&self) -> io::Result<()> {
        ptrace(libc::PTRACE_LISTEN, self.0, 0, 0).map(drop)
    }

    /// Lets go of a tracee that is in a stop, delivering `signal` if it is not 0.
    pub(super) fn detach(&self, signal: c_int) -> io::Result<()> {
        ptrace(libc::PTRACE_DETACH, self.0, 0, signal as usize).map(drop)
    }

    /// What the system call stop is about (Linux 5.3 and later, independent of the architecture).
    pub(super) fn syscall(&self) -> io::Result<Option<Syscall>> {
        let mut info = MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
        let length = size_of::<libc::ptrace_syscall_info>();
        ptrace(libc::PTRACE_GET_SYSCALL_INFO, self.0, length, info.as_mut_ptr() as usize)?;
        // SAFETY: all bytes were zeroed, of which the kernel wrote some; any bytes are valid for this plain structure.
        let info = unsafe { info.assume_init() };
        Ok(match info.op {
            // SAFETY: `op` says which member of the union was written.
            libc::PTRACE_SYSCALL_INFO_ENTRY => unsafe { Some(Syscall::Entry(info.u.entry.nr, info.u.entry.args)) },
            // SAFETY: the same.
            libc::PTRACE_SYSCALL_INFO_EXIT => unsafe { Some(Syscall::Exit(info.u.exit.sval)) },
            _ => None,
        })
    }

    /// Reads `length` bytes at `address`, or as many of them as can be read.
    pub(super) fn read(&self, address: u64, length: usize) -> io::Result<Vec<u8>> {
        memory::read(self.0, address, length)
    }

    /// Writes `bytes` at `address`; an error unless all were written.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = libc::iovec { iov_base: ptr::without_provenance_mut(address as usize), iov_len: bytes.len() };
        // SAFETY: `local` describes `bytes`, which is only read; `remote` is in the other process, and the kernel
        // checks it.
        let count = unsafe { libc::process_vm_writev(self.0, &local, 1, &remote, 1, 0) };
        match usize::try_from(count) {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

fn stop_of(status: c_int) -> Option<Stop> {
    if !libc::WIFSTOPPED(status) {
        return None;
    }
    let signal = libc::WSTOPSIG(status);
    Some(match status >> 16 {
        EVENT_STOP if signal == libc::SIGTRAP => Stop::Event,
        EVENT_STOP => Stop::Group,
        _ if signal == libc::SIGTRAP | 0x80 => Stop::Syscall, // PTRACE_O_TRACESYSGOOD
        _ => Stop::Signal(signal),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_are_told_apart() {
        let stopped = |signal: c_int, event: c_int| (event << 16) | (signal << 8) | 0x7f;
        assert_eq!(stop_of(stopped(libc::SIGTRAP | 0x80, 0)), Some(Stop::Syscall));
        assert_eq!(stop_of(stopped(libc::SIGTRAP, EVENT_STOP)), Some(Stop::Event));
        assert_eq!(stop_of(stopped(libc::SIGSTOP, EVENT_STOP)), Some(Stop::Group));
        assert_eq!(stop_of(stopped(libc::SIGTERM, 0)), Some(Stop::Signal(libc::SIGTERM)));
        assert_eq!(stop_of(0), None); // exited
        assert_eq!(stop_of(libc::SIGKILL), None); // killed
    }
}

//! A handler thread of ovs-vswitchd that is busy for as long as it is wanted: stopped by ptrace in a system call that is
//! no wait.

#[cfg(target_arch = "x86_64")]
pub use by_registers::hold_handler;

/// Registers are those of x86-64 below.
#[cfg(not(target_arch = "x86_64"))]
pub fn hold_handler(_: &std::path::Path) -> anyhow::Result<()> {
    anyhow::bail!("how a handler is held is known on x86-64 alone")
}

#[cfg(target_arch = "x86_64")]
mod by_registers {
    use std::path::Path;

    use anyhow::{Context, Result};
    use nix::sys::ptrace::{self, Options};
    use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
    use nix::unistd::Pid;

    use crate::command::shell;

    /// System calls at which the thread may be stopped before it is given up.
    const MOST_CALLS: usize = 200;

    /// Stops the first handler thread of ovs-vswitchd at its next system call that is no wait, makes `told`, and sleeps. With
    /// this process the stop ends.
    pub fn hold_handler(told: &Path) -> Result<()> {
        let thread = shell("grep -lE '^handler' /proc/$(pidof -s ovs-vswitchd)/task/*/comm | head -n 1 | cut -d/ -f5")?;
        let thread = Pid::from_raw(thread.trim().parse().context("ovs-vswitchd has no handler thread")?);
        ptrace::seize(thread, Options::PTRACE_O_TRACESYSGOOD)?;
        ptrace::interrupt(thread)?;
        wait(thread)?;
        // Its poll has been interrupted and would be gone on with; it ends now, and with nothing to do.
        let mut registers = ptrace::getregs(thread)?;
        registers.rax = 0;
        registers.orig_rax = u64::MAX;
        ptrace::setregs(thread, registers)?;
        let waits = [libc::SYS_poll, libc::SYS_ppoll, libc::SYS_restart_syscall, libc::SYS_futex];
        for _ in 0..MOST_CALLS {
            ptrace::syscall(thread, None)?;
            wait(thread)?;
            let call = ptrace::getregs(thread)?.orig_rax;
            if !waits.contains(&libc::c_long::try_from(call)?) {
                std::fs::write(told, format!("{call}\n"))?;
                loop {
                    nix::unistd::pause();
                }
            }
        }
        anyhow::bail!("handler {thread} does nothing but wait")
    }

    fn wait(thread: Pid) -> Result<WaitStatus> {
        waitpid(thread, Some(WaitPidFlag::__WALL)).context("waiting for the handler")
    }
}

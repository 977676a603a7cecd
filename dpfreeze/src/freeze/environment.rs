//! What this host can do, each failure with its cause, the reason why it matters, and the remedy.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::{fork, pause, ForkResult};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::freeze::{hook, Hook};

/// Ring buffers came with 5.8; fmod_ret with 5.7.
const OLDEST_KERNEL: (u32, u32) = (5, 8);
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// What is concerned, in a word or two.
    pub object: String,
    /// What was found.
    pub cause: String,
    /// Why that matters.
    pub reason: String,
    /// What the operator can do about it.
    pub remedy: String,
}

/// Is a kernel module there?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModuleState {
    /// Loaded, or built in.
    Loaded,
    /// Installed for this kernel, not loaded.
    Available,
    /// Neither.
    Absent,
}

/// What this host can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// `uname -r`
    pub kernel: String,
    /// The openvswitch module.
    pub openvswitch: ModuleState,
    /// Kernel lockdown: `none`, `integrity`, `confidentiality`; None where the kernel has no lockdown.
    pub lockdown: Option<String>,
    /// Yama's ptrace_scope; None where the kernel has no Yama.
    pub ptrace_scope: Option<u32>,
    /// The boot-time list of LSMs.
    pub lsms: Vec<String>,
    /// Can files be taken over from a process with `pidfd_getfd`? Tried with a child (hazard 29).
    pub pidfd_getfd: bool,
    /// The hook that takes the BPF program; only a canary proves that it refuses anything.
    pub hook: Option<Hook>,
    /// What is not as it should be.
    pub failures: Vec<Fact>,
}

/// Looks at the host. Changes nothing: what is loaded for the try is gone again on return.
pub fn environment() -> Environment {
    let mut failures = Vec::new();
    let openvswitch = module_state("openvswitch");
    if openvswitch != ModuleState::Loaded {
        failures.push(Fact {
            object: "openvswitch module".into(),
            cause: if openvswitch == ModuleState::Available { "not loaded" } else { "not installed" }.into(),
            reason: "without it there is no kernel datapath to keep".into(),
            remedy: module_remedy(openvswitch).into(),
        });
    }
    let pidfd_getfd = try_pidfd_getfd();
    if let Err(error) = &pidfd_getfd {
        failures.push(pidfd_fact(error));
    }
    let hook = hook::try_hooks(&Hook::here());
    if let Err(error) = &hook {
        failures.push(bpf_fact(error));
    }
    Environment {
        kernel: kernel(),
        openvswitch,
        lockdown: lockdown(),
        ptrace_scope: ptrace_scope(),
        lsms: lsms(),
        pidfd_getfd: pidfd_getfd.is_ok(),
        hook: hook.ok(),
        failures,
    }
}

fn module_remedy(state: ModuleState) -> &'static str {
    match state {
        ModuleState::Absent => {
            "install the package that has the modules of this kernel (Debian: linux-image, Ubuntu: linux-modules-extra, \
             RHEL: kernel-modules-core), or boot a kernel that has the module"
        }
        ModuleState::Loaded | ModuleState::Available => "`modprobe openvswitch`, or start Open vSwitch",
    }
}

/// What can be said before the kernel is asked to load anything.
pub(super) fn require_bpf() -> Result<()> {
    let unsupported = |why: String, remedy: &str| {
        Err(Error::Unsupported { what: "BPF program of the freeze".into(), why, remedy: remedy.into() })
    };
    let may_load = has_capability(CAP_SYS_ADMIN) || (has_capability(CAP_BPF) && has_capability(CAP_PERFMON));
    if !may_load {
        return unsupported(
            "this process has neither CAP_SYS_ADMIN nor CAP_BPF with CAP_PERFMON".into(),
            "run it as root, outside a container that drops them",
        );
    }
    if lockdown().as_deref() == Some("confidentiality") {
        return unsupported(
            "the kernel is locked down for confidentiality, so BPF programs may not read kernel memory".into(),
            "boot with lockdown=integrity or none, or run at level park, without a freeze",
        );
    }
    let kernel = kernel();
    if kernel_version(&kernel).is_some_and(|version| version < OLDEST_KERNEL) {
        return unsupported(
            format!("kernel {kernel} is older than {}.{}", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
            "boot a newer kernel, or run at level park, without a freeze",
        );
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return unsupported(
            format!("kernel {kernel} has no BTF (/sys/kernel/btf/vmlinux)"),
            "use a kernel with CONFIG_DEBUG_INFO_BTF, or run at level park, without a freeze",
        );
    }
    // Without it a hook is attached and never called, and Linux 6.1 then takes none until the next boot.
    if read_trimmed("/proc/sys/kernel/ftrace_enabled").as_deref() == Some("0") {
        return unsupported(
            "kernel.ftrace_enabled is 0, so the kernel calls no hook".into(),
            "`sysctl kernel.ftrace_enabled=1`, or run at level park, without a freeze",
        );
    }
    Ok(())
}

fn bpf_fact(error: &Error) -> Fact {
    let (cause, remedy) = match error {
        Error::Unsupported { why, remedy, .. } => (why.clone(), remedy.clone()),
        other => (other.to_string(), "run at level park, without a freeze".into()),
    };
    let reason = "without the freeze the starting daemon flushes the datapath";
    Fact { object: "BPF".into(), cause, reason: reason.into(), remedy }
}

fn pidfd_fact(error: &io::Error) -> Fact {
    let remedy = match (ptrace_scope(), error.raw_os_error()) {
        (Some(3), _) => {
            "none until the next boot, with kernel.yama.ptrace_scope of 2 or less: 3 cannot be lowered at run time"
        }
        (_, Some(libc::ENOSYS)) => "use a kernel of 5.6 or later",
        _ if !has_capability(CAP_SYS_PTRACE) => "run it as root, with CAP_SYS_PTRACE",
        _ => "allow ptrace to this program (SELinux: setsebool deny_ptrace off)",
    };
    Fact {
        object: "pidfd_getfd".into(),
        cause: format!("refused for a child of this process: {error}"),
        reason: "packets that the old daemon has not read cannot be taken over when it stops".into(),
        remedy: remedy.into(),
    }
}

fn kernel() -> String {
    read_trimmed("/proc/sys/kernel/osrelease").unwrap_or_default()
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn lockdown() -> Option<String> {
    selected(&read_trimmed("/sys/kernel/security/lockdown")?)
}

/// The word in brackets: `none [integrity] confidentiality`.
fn selected(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

fn ptrace_scope() -> Option<u32> {
    read_trimmed("/proc/sys/kernel/yama/ptrace_scope")?.parse().ok()
}

pub(super) fn lsms() -> Vec<String> {
    let list = read_trimmed("/sys/kernel/security/lsm").unwrap_or_default();
    list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn module_state(name: &str) -> ModuleState {
    if Path::new("/sys/module").join(name).exists() {
        return ModuleState::Loaded;
    }
    let dir = format!("/lib/modules/{}", kernel());
    let listed = |file: &str| {
        let list = fs::read_to_string(format!("{dir}/{file}")).unwrap_or_default();
        // `kernel/net/openvswitch/openvswitch.ko.xz: ...`
        list.lines().any(|line| {
            let path = line.split(':').next().unwrap_or_default();
            path.rsplit('/').next().and_then(|file| file.split('.').next()) == Some(name)
        })
    };
    if listed("modules.builtin") {
        ModuleState::Loaded
    } else if listed("modules.dep") {
        ModuleState::Available
    } else {
        ModuleState::Absent
    }
}

fn has_capability(bit: u32) -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|caps| caps & (1 << bit) != 0)
}

fn read_trimmed(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Takes over an open file of a child, as the park does with the sockets of a daemon.
fn try_pidfd_getfd() -> io::Result<()> {
    let file = fs::File::open("/dev/null")?;
    // SAFETY: the child calls nothing but prctl(2) and pause(2), which are async-signal-safe, and never returns.
    let child = match unsafe { fork() }? {
        ForkResult::Child => {
            let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
            loop {
                pause();
            }
        }
        ForkResult::Parent { child } => child,
    };
    let taken = pidfd_getfd(child.as_raw(), file.as_raw_fd());
    kill(child, Signal::SIGKILL)?;
    waitpid(child, None)?;
    taken
}

fn pidfd_getfd(pid: i32, fd: RawFd) -> io::Result<()> {
    let owned = |fd: libc::c_long| -> io::Result<OwnedFd> {
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the system call has just returned this descriptor, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    };
    // SAFETY: a system call with integer arguments.
    let pidfd = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: as above.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_that_is_not_there_is_not_to_be_loaded() {
        assert!(module_remedy(ModuleState::Available).contains("modprobe"));
        let absent = module_remedy(ModuleState::Absent);
        assert!(absent.contains("install") && !absent.contains("modprobe"), "{absent}");
    }

    #[test]
    fn versions() {
        assert_eq!(kernel_version("6.1.0-18-cloud-amd64"), Some((6, 1)));
        assert_eq!(kernel_version("5.10-rc1"), Some((5, 10)));
        assert_eq!(kernel_version("next"), None);
        assert!((5, 4) < OLDEST_KERNEL && (5, 10) > OLDEST_KERNEL);
    }

    #[test]
    fn lockdown_mode_is_the_word_in_brackets() {
        assert_eq!(selected("none [integrity] confidentiality").as_deref(), Some("integrity"));
        assert_eq!(selected("none"), None);
    }
}

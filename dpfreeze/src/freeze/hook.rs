//! Loading the program and attaching it to a hook.

use std::fmt;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{ErrorKind, Link, MapMut, PrintLevel};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::freeze::environment;
use crate::freeze::pins::{Pins, LINK, SECOND_LINK};

/// The generated skeleton of `bpf/freeze.bpf.c`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/freeze.skel.rs"));
}

/// Where in the kernel the program sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hook {
    /// `fmod_ret/security_netlink_send`: kernel 5.7 (x86-64; arm64 about 6.4), any list of LSMs. The kernel (since 5.12)
    /// passes over it on a CPU where another task was preempted in it ([`Skipped`](crate::freeze::Skipped)).
    FmodRet,
    /// `lsm/netlink_send`: loads everywhere, but refuses nothing unless `bpf` is in the boot-time list of LSMs. Never
    /// passed over since kernel 6.2.
    Lsm,
}

impl Hook {
    /// In the order in which they are to be tried where these LSMs are active.
    pub fn in_order(lsms: &[String]) -> [Hook; 2] {
        match lsms.iter().any(|lsm| lsm == "bpf") {
            true => [Hook::Lsm, Hook::FmodRet],
            false => [Hook::FmodRet, Hook::Lsm],
        }
    }

    /// In the order in which they are to be tried on this host.
    pub fn here() -> [Hook; 2] {
        Hook::in_order(&environment::lsms())
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hook::FmodRet => "fmod_ret/security_netlink_send",
            Hook::Lsm => "lsm/netlink_send",
        })
    }
}

/// What libbpf said since the last [`said`]; it reports causes only through its global print function.
static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// The verifier's log can be megabytes; its end holds the cause.
const SAID_LINES: usize = 12;

fn listen(_: PrintLevel, message: String) {
    tracing::debug!(target: "libbpf", "{}", message.trim_end());
    SAID.lock().unwrap_or_else(PoisonError::into_inner).push(message);
}

fn said() -> String {
    let all = std::mem::take(&mut *SAID.lock().unwrap_or_else(PoisonError::into_inner)).concat();
    let lines: Vec<&str> = all.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(SAID_LINES)..].join(" | ")
}

/// Loads, attaches and pins the program on the first of `hooks` that takes it.
pub fn load_and_pin(hooks: &[Hook], pins: &Pins) -> Result<Hook> {
    first_that_takes_it(hooks, Some(pins))
}

/// Which hook takes the program? Nothing is pinned: it is gone again on return.
pub fn try_hooks(hooks: &[Hook]) -> Result<Hook> {
    first_that_takes_it(hooks, None)
}

fn first_that_takes_it(hooks: &[Hook], pins: Option<&Pins>) -> Result<Hook> {
    environment::require_bpf()?;
    libbpf_rs::set_print(Some((PrintLevel::Info, listen)));
    let mut failures = Vec::new();
    for hook in hooks {
        said();
        match attach(*hook, pins) {
            Ok(()) => return Ok(*hook),
            Err(error) => {
                tracing::debug!("{hook}: {error:#} ({})", said());
                failures.push(error);
                if let Some(pins) = pins {
                    pins.remove()?;
                    pins.prepare()?;
                }
            }
        }
    }
    let kinds: Vec<ErrorKind> = failures.iter().map(libbpf_rs::Error::kind).collect();
    let (why, remedy) = refusal(&kinds);
    Err(Error::Unsupported { what: "BPF program of the freeze".into(), why, remedy: remedy.into() })
}

/// Why the kernel takes the program on no hook, and what helps. libbpf's own words are in the debug log.
fn refusal(kinds: &[ErrorKind]) -> (String, &'static str) {
    // The first hook is the better one; what the second one lacks says little.
    let kind = kinds.first().copied().unwrap_or(ErrorKind::Other);
    match kind {
        ErrorKind::PermissionDenied => (
            "the kernel refuses BPF to root (EPERM)".into(),
            "look for what forbids bpf(2): a container, a seccomp filter, kernel lockdown or a security module",
        ),
        ErrorKind::NotFound => (
            "the kernel has no hook for the program (ENOENT)".into(),
            "use a kernel with CONFIG_BPF_LSM, or on x86-64 one of 5.8 or later with CONFIG_FUNCTION_ERROR_INJECTION",
        ),
        ErrorKind::OutOfMemory => {
            ("the kernel has no memory for it (ENOMEM)".into(), "free some memory, or raise the limit of locked memory")
        }
        ErrorKind::InvalidInput | ErrorKind::Unsupported => (
            "the kernel does not know what the program needs".into(),
            "use a kernel of 5.8 or later with CONFIG_DEBUG_INFO_BTF and CONFIG_BPF_SYSCALL",
        ),
        other => (
            format!("the kernel does not take it ({other:?})"),
            "see libbpf's words in the log (OVS_GRACEFUL_LOG=debug)",
        ),
    }
}

fn attach(hook: Hook, pins: Option<&Pins>) -> libbpf_rs::Result<()> {
    let mut object = MaybeUninit::uninit();
    let mut open = skeleton::FreezeSkelBuilder::default().open(&mut object)?;
    open.progs.freeze_fmod_ret.set_autoload(hook == Hook::FmodRet);
    open.progs.freeze_fmod_two.set_autoload(hook == Hook::FmodRet);
    open.progs.freeze_lsm.set_autoload(hook == Hook::Lsm);
    open.progs.freeze_lsm_two.set_autoload(hook == Hook::Lsm);
    let mut loaded = open.load()?;
    if let Some(pins) = pins {
        let maps = &mut loaded.maps;
        let pin = |map: &mut MapMut<'_>, name: &str| map.pin(pins.path(name));
        pin(&mut maps.config, "config")?;
        pin(&mut maps.halt, "halt")?;
        pin(&mut maps.refused, "refused")?;
        pin(&mut maps.captured, "captured")?;
        pin(&mut maps.datapaths, "datapaths")?;
        pin(&mut maps.dp_names, "dp_names")?;
        pin(&mut maps.timeouts, "timeouts")?;
        pin(&mut maps.qdiscs, "qdiscs")?;
        pin(&mut maps.events, "events")?;
    }
    let progs = &mut loaded.progs;
    let [mut link, mut second]: [Link; 2] = match hook {
        Hook::FmodRet => [progs.freeze_fmod_ret.attach()?, progs.freeze_fmod_two.attach()?],
        Hook::Lsm => [progs.freeze_lsm.attach()?, progs.freeze_lsm_two.attach()?],
    };
    // The link last: its pin says that everything else is in place.
    match pins {
        Some(pins) => second.pin(pins.path(SECOND_LINK)).and_then(|()| link.pin(pins.path(LINK))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_that_is_never_passed_over_comes_first_where_it_works() {
        let lsms = |list: &str| list.split(',').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(Hook::in_order(&lsms("lockdown,capability,apparmor,bpf"))[0], Hook::Lsm);
        assert_eq!(Hook::in_order(&lsms("lockdown,capability,apparmor"))[0], Hook::FmodRet);
        assert_eq!(Hook::in_order(&[])[0], Hook::FmodRet);
    }

    #[test]
    fn a_failure_is_one_short_sentence_and_its_remedy_fits() {
        let kinds = [ErrorKind::PermissionDenied, ErrorKind::NotFound, ErrorKind::InvalidInput, ErrorKind::Other];
        for kind in kinds {
            let (why, remedy) = refusal(&[kind, ErrorKind::NotFound]);
            assert!(why.len() < 80 && !why.contains("libbpf") && !remedy.is_empty(), "{why}");
        }
        let (why, remedy) = refusal(&[ErrorKind::PermissionDenied]);
        assert!(why.contains("EPERM") && remedy.contains("lockdown") && !remedy.contains("kernel of"), "{remedy}");
    }
}

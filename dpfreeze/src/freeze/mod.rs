//! The freeze: a BPF program on `security_netlink_send` refuses, while a lease lasts, the netlink messages that would
//! destroy what the datapath and the conntrack timeout policies know (`bpf/freeze.bpf.c`).
//!
//! * **Scope**: one network namespace, listed datapaths, listed timeout policies; everybody else passes.
//! * **Exempt**: the process that armed it, known by thread group id *and* start time.
//! * **Lease**: the program itself compares the clock (CLOCK_BOOTTIME, suspended time counts) with the lease and with
//!   an absolute end; whatever dies or hangs, the freeze ends by itself.
//! * **Guard**: timeout policies that connections live under are kept beyond the freeze by a [`PolicyGuard`].
//! * **Two copies**: the kernel passes over a program in which another task of the same CPU was preempted, so there are two,
//!   and [`Skipped`] says how often that happened. Programs of LSM hooks are always called (Linux 6.2): that hook is
//!   taken where it works.
//! * **Pins**: links and maps lie under [`PIN_DIR`], so the freeze outlives a crash of its loader and any root process
//!   can look at it ([`state`]) or lift it ([`thaw`]).

mod abi;
mod canary;
mod environment;
mod event;
mod guard;
mod halt;
mod hook;
mod pins;
mod process;
mod scope;
mod state;

use std::time::Duration;

use libbpf_rs::{MapCore, MapHandle};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

pub use canary::{canary_main, CanaryCommand, CanaryReport};
pub use environment::{environment, Environment, Fact, ModuleState};
pub use event::{Event, EventKind, Port};
pub use guard::PolicyGuard;
pub use halt::Halt;
pub use hook::Hook;
pub use pins::PIN_DIR;
pub use process::{start_time, ProcessId};
pub use scope::{Families, Scope, PROBE_METERS};
pub use state::{state, Refused, Skipped, State};

use crate::error::{Error, Result};
use crate::ovs::Dispatch;
use abi::Config;
use pins::Pins;

bitflags::bitflags! {
    /// The classes of messages that can be refused. The bit numbers are those of `enum class` in the BPF program.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
    pub struct Classes: u64 {
        /// `OVS_FLOW_CMD_DEL` with neither key nor UFID: deletes every flow of the datapath.
        const FLOW_FLUSH = 1 << 0;
        /// `OVS_FLOW_CMD_DEL` by UFID. Deletions that carry the key are feature probes and pass (hazard 6).
        const FLOW_DEL = 1 << 1;
        /// `OVS_FLOW_CMD_SET`: replaces the actions of a flow.
        const FLOW_SET = 1 << 2;
        /// `OVS_DP_CMD_DEL`.
        const DP_DEL = 1 << 3;
        /// `OVS_VPORT_CMD_DEL`. Each refusal is an [`Event`], because the daemon does not try again (hazard 7).
        const VPORT_DEL = 1 << 4;
        /// `OVS_METER_CMD_DEL`, but for the two meter ids that the daemon's feature probe uses.
        const METER_DEL = 1 << 5;
        /// `IPCTNL_MSG_TIMEOUT_DELETE` of a name in the scope, or of all unused policies at once.
        const CT_TIMEOUT_DEL = 1 << 6;
        /// `OVS_DP_CMD_SET` with `OVS_DP_ATTR_PER_CPU_PIDS`, sent by the process given to
        /// [`Freeze::watch_standby`]: captured, then refused. From anybody else it passes and is an [`Event`].
        /// `OVS_VPORT_CMD_SET` with `OVS_VPORT_ATTR_UPCALL_PID` is refused to the same process, but tried again by it,
        /// with other sockets each time; from anybody else it passes unseen (hazard 16).
        const UPCALL_BIND = 1 << 7;
        /// `RTM_DELQDISC` of what was given to [`Freeze::keep_qdiscs`], and `RTM_GETTCLASS` for all of a device's classes,
        /// sent by the process given to [`Freeze::watch_standby`]. The answer is `ENOENT`, which tells the daemon that
        /// there is nothing: it does not try again. From anybody else they pass.
        const QDISC_DEL = 1 << 8;
    }
}

/// What the standby may not delete of a device's traffic control.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum KeptQdisc {
    /// Its root qdisc.
    Root,
    /// Its ingress qdisc.
    Ingress,
    /// Classes of its root qdisc: the standby is not told of any, and leaves alone what it does not know.
    Classes,
    /// Its policing by Open vSwitch: not refused, but the standby's tracer is told ([`Halt`]).
    Policing,
}

impl KeptQdisc {
    /// Device and parent as the BPF program's map has them (`struct kept`).
    fn key(self, ifindex: u32) -> Vec<u8> {
        let parent = match self {
            KeptQdisc::Root => crate::devices::ROOT,
            KeptQdisc::Ingress => crate::devices::INGRESS,
            KeptQdisc::Classes => 0,
            KeptQdisc::Policing => crate::devices::CLSACT_INGRESS,
        };
        [ifindex.to_ne_bytes(), parent.to_ne_bytes()].concat()
    }
}

/// What came of a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a lost lease means that messages got through"]
pub enum Renewal {
    /// The freeze has held without a gap and holds on for this long.
    Held(Duration),
    /// The lease had run out: messages may have passed. It stays thawed.
    Expired,
    /// The absolute end has come. It stays thawed.
    Ended,
    /// Somebody thawed it: the pins are gone.
    Thawed,
}

/// What the standby wanted to bind when it was refused, every port id proved to be its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// The process that sent it.
    pub process: ProcessId,
    /// The datapath.
    pub ifindex: u32,
    /// `OVS_DP_ATTR_USER_FEATURES` of the message, where it had them.
    pub features: Option<u32>,
    /// `OVS_DP_ATTR_PER_CPU_PIDS`, one netlink port id for each CPU; none where it would bind per vport.
    pub port_ids: Vec<u32>,
    /// Which way of binding it tried.
    pub dispatch: Dispatch,
    /// How often the standby has tried since the arming.
    pub count: u64,
}

/// A loaded freeze: frozen or not as [`Freeze::arm`] says. Dropping it lifts nothing: the pins keep it, the lease ends it.
#[derive(Debug)]
pub struct Freeze {
    pins: Pins,
    hook: Hook,
    config: MapHandle,
    refused: MapHandle,
    captured: MapHandle,
    datapaths: MapHandle,
    dp_names: MapHandle,
    timeouts: MapHandle,
    /// None in a freeze that was pinned by an earlier version.
    qdiscs: Option<MapHandle>,
    events: MapHandle,
}

impl Freeze {
    /// Loads and pins the program on the first hook of [`Hook::here`] that takes it. Left-over pins of a dead process are replaced.
    ///
    /// # Errors
    /// Where a living process holds a freeze, or no hook takes the program: the error says what is missing (capability,
    /// kernel version, BTF, lockdown) and the remedy.
    pub fn load() -> Result<Freeze> {
        Self::load_shared(&Hook::here())
    }

    /// Like [`Freeze::load`], on this hook and no other.
    pub fn load_on(hook: Hook) -> Result<Freeze> {
        Self::load_shared(&[hook])
    }

    /// Like [`Freeze::load`], but proves the hook with a canary and goes on to the next hook where that one loads
    /// without refusing anything (`lsm/` without `bpf` in the boot-time list of LSMs).
    pub fn load_proven(canary: &CanaryCommand, families: Families) -> Result<(Freeze, CanaryReport)> {
        first_proven(canary, families, Self::load_on)
    }

    /// The freeze that is pinned, left by another process (after a crash, for `thaw`), or None.
    pub fn open() -> Result<Option<Freeze>> {
        Self::open_in(Pins::shared())
    }

    fn open_in(pins: Pins) -> Result<Option<Freeze>> {
        let Some(hook) = pins.pinned_hook()? else { return Ok(None) };
        Ok(Some(Freeze {
            hook,
            config: pins.open_map("config")?,
            refused: pins.open_map("refused")?,
            captured: pins.open_map("captured")?,
            datapaths: pins.open_map("datapaths")?,
            dp_names: pins.open_map("dp_names")?,
            timeouts: pins.open_map("timeouts")?,
            qdiscs: pins.path("qdiscs").exists().then(|| pins.open_map("qdiscs")).transpose()?,
            events: pins.open_map("events")?,
            pins,
        }))
    }

    fn load_shared(hooks: &[Hook]) -> Result<Freeze> {
        refuse_if_held()?;
        thaw()?;
        Self::load_in(Pins::shared(), hooks)
    }

    fn load_in(pins: Pins, hooks: &[Hook]) -> Result<Freeze> {
        process::require_initial_pid_namespace()?;
        pins.remove()?;
        pins.prepare()?;
        hook::load_and_pin(hooks, &pins)?;
        let link = pins.path(pins::LINK);
        Self::open_in(pins)?.ok_or_else(|| Error::io(link.display().to_string(), nix::errno::Errno::ENOENT))
    }

    /// The hook that the program is attached to.
    pub fn hook(&self) -> Hook {
        self.hook
    }

    /// Freezes: `classes` are refused in `scope` from now on, to everybody but this process, for `lease`, and for
    /// `end` at the most however often it is renewed. Counters and the capture start at zero, no standby is watched
    /// and no qdisc kept.
    pub fn arm(&mut self, scope: &Scope, classes: Classes, lease: Duration, end: Duration) -> Result<()> {
        // Off while the maps change: half a scope is none.
        self.write_config(&Config::default())?;
        scope::fill(&self.datapaths, scope.ifindexes.iter().map(|index| index.to_ne_bytes().to_vec()))?;
        scope::fill(&self.dp_names, scope.names.iter().map(|name| scope::padded(name, abi::IFNAMSIZ)))?;
        self.fill_timeouts(&scope.timeout_names)?;
        self.keep_qdiscs(&[])?;
        self.reset_counters()?;
        let now = process::boottime()?;
        let own = ProcessId::current()?;
        let config = Config {
            classes: classes.bits(),
            lease_ns: after(now, lease),
            end_ns: after(now, end),
            netns: scope.netns_inode,
            exempt_tgid: own.tgid.into(),
            exempt_start: own.start_time,
            fam_datapath: scope.families.datapath.into(),
            fam_vport: scope.families.vport.into(),
            fam_flow: scope.families.flow.into(),
            fam_meter: scope.families.meter.into(),
            timeout_names: scope.timeout_names.len() as u64,
            armed_ns: nanos(now),
            probe_meters: scope.probe_meters.into(),
            ..Config::default()
        };
        self.write_config(&config)
    }

    /// Changes what is refused; scope, lease and counters stay.
    pub fn set_classes(&mut self, classes: Classes) -> Result<()> {
        let config = self.read_config()?;
        self.write_config(&Config { classes: classes.bits(), ..config })
    }

    /// Replaces what the standby may not delete of the traffic control of devices (by ifindex), while
    /// [`Classes::QDISC_DEL`] is among the classes.
    pub fn keep_qdiscs(&mut self, kept: &[(u32, KeptQdisc)]) -> Result<()> {
        let Some(qdiscs) = &self.qdiscs else { return Ok(()) };
        scope::fill(qdiscs, kept.iter().map(|(ifindex, what)| what.key(*ifindex)))
    }

    /// Replaces the names of the guarded timeout policies.
    pub fn set_timeout_names(&mut self, names: &[String]) -> Result<()> {
        // The count first where names come, last where they go: never "guarded" with a count of 0.
        let config = self.read_config()?;
        let count = names.len() as u64;
        self.write_config(&Config { timeout_names: config.timeout_names.max(count), ..config })?;
        self.fill_timeouts(names)?;
        self.write_config(&Config { timeout_names: count, ..config })
    }

    /// Narrows it to the timeout policies of these names, with a new lease and a new absolute end, without a gap.
    /// Counters stay. What [`PolicyGuard`] is made of.
    pub fn guard_timeouts(&mut self, names: &[String], lease: Duration, end: Duration) -> Result<()> {
        self.set_timeout_names(names)?;
        let config = self.read_config()?;
        let now = process::boottime()?;
        self.write_config(&Config {
            classes: Classes::CT_TIMEOUT_DEL.bits(),
            lease_ns: after(now, lease),
            end_ns: after(now, end),
            standby_tgid: 0,
            standby_start: 0,
            ..config
        })
    }

    /// Moves the lease to `lease` from now, never beyond the absolute end. To be called by the step that makes
    /// progress, never by a thread of its own (hazard 5).
    pub fn renew(&mut self, lease: Duration) -> Result<Renewal> {
        if self.pins.pinned_hook()?.is_none() {
            return Ok(Renewal::Thawed);
        }
        let config = self.read_config()?;
        let now = process::boottime()?;
        let lease_ns = after(now, lease).min(config.end_ns);
        self.write_config(&Config { lease_ns, ..config })?;
        // Asked after the write: a lease that ran out in between has let messages through all the same.
        let now = nanos(process::boottime()?);
        if now < config.lease_ns && now < config.end_ns {
            return Ok(Renewal::Held(Duration::from_nanos(lease_ns.saturating_sub(now))));
        }
        self.write_config(&Config { classes: 0, ..config })?;
        Ok(if now >= config.end_ns { Renewal::Ended } else { Renewal::Expired })
    }

    /// Makes this process the exempt one, in place of the dead one that armed the freeze.
    pub fn take_over(&mut self) -> Result<()> {
        let own = ProcessId::current()?;
        let config = self.read_config()?;
        self.write_config(&Config { exempt_tgid: own.tgid.into(), exempt_start: own.start_time, ..config })
    }

    /// From now on the upcall binding of this process, and of no other, is captured and refused, while
    /// [`Classes::UPCALL_BIND`] is among the classes. `start_time` as in `/proc/PID/stat` ([`start_time`]).
    pub fn watch_standby(&mut self, pid: Pid, start_time: u64) -> Result<()> {
        let config = self.read_config()?;
        let standby_tgid = u64::try_from(pid.as_raw()).unwrap_or_default();
        self.write_config(&Config { standby_tgid, standby_start: start_time, ..config })
    }

    /// What the standby wanted to bind, or None where it has not tried yet.
    ///
    /// # Errors
    /// Where a captured port id is not provably a socket of that very process (hazard 2): such a capture must never
    /// be bound.
    pub fn captured(&self) -> Result<Option<Captured>> {
        let Some(raw) = abi::read_captured(&self.captured)? else { return Ok(None) };
        let process = ProcessId { tgid: raw.tgid, start_time: raw.start };
        process::prove_port_ids(process, &raw.port_ids)?;
        Ok(Some(Captured {
            process,
            ifindex: raw.ifindex,
            features: raw.features,
            port_ids: raw.port_ids,
            dispatch: raw.dispatch,
            count: raw.count,
        }))
    }

    /// How many messages of each class were refused since the arming.
    pub fn refused(&self) -> Result<Refused> {
        Refused::read(&self.refused)
    }

    /// How often the kernel has passed over the program since it was loaded; nothing where somebody has lifted it.
    pub fn skipped(&self) -> Result<Skipped> {
        Ok(self.pins.skipped()?.unwrap_or_default())
    }

    /// The events since the last call, oldest first; never waits.
    pub fn events(&self) -> Result<Vec<Event>> {
        event::drain(&self.events)
    }

    /// What `status` shows.
    pub fn state(&self) -> Result<State> {
        State::read(self)
    }

    /// Lifts the freeze at once and removes program and pins; counters and events go with them, so read those first.
    pub fn thaw(self) -> Result<()> {
        thaw_in(&self.pins)
    }

    fn read_config(&self) -> Result<Config> {
        Config::decode(&abi::lookup(&self.config, "config", 0)?)
    }

    fn write_config(&self, config: &Config) -> Result<()> {
        abi::update(&self.config, "config", 0, &config.encode())
    }

    fn fill_timeouts(&self, names: &[String]) -> Result<()> {
        scope::fill(&self.timeouts, names.iter().map(|name| scope::padded(name, abi::TIMEOUT_NAME_LEN)))
    }

    fn reset_counters(&self) -> Result<()> {
        let zero = 0u64.to_ne_bytes();
        for class in 0..self.refused.max_entries() {
            abi::update(&self.refused, "refused", class, &zero)?;
        }
        let empty = vec![0; self.captured.value_size() as usize];
        abi::update(&self.captured, "captured", 0, &empty)?;
        self.events().map(drop)
    }
}

/// Proves with a canary that a freeze works on this host, and by which hook, and leaves alone whatever is frozen: what
/// `check` calls.
///
/// # Errors
/// As [`Freeze::load_proven`].
pub fn prove(canary: &CanaryCommand, families: Families) -> Result<(Hook, CanaryReport)> {
    let (freeze, report) = first_proven(canary, families, |hook| {
        let pins = Pins::private();
        Freeze::load_in(pins.clone(), &[hook]).inspect_err(|_| drop(pins.remove()))
    })?;
    let hook = freeze.hook;
    freeze.thaw()?;
    Ok((hook, report))
}

fn first_proven(
    canary: &CanaryCommand,
    families: Families,
    load: impl Fn(Hook) -> Result<Freeze>,
) -> Result<(Freeze, CanaryReport)> {
    let mut failures = Vec::new();
    for hook in Hook::here() {
        let proof = load(hook).and_then(|mut freeze| match freeze.canary(canary, families) {
            Ok(report) => Ok((freeze, report)),
            Err(error) => {
                freeze.thaw()?;
                Err(error)
            }
        });
        match proof {
            Ok(proof) => return Ok(proof),
            Err(error) => failures.push(format!("{hook}: {error}")),
        }
    }
    Err(Error::Unsupported {
        what: "freeze".into(),
        why: failures.join("; "),
        remedy: "run at level park, without a freeze".into(),
    })
}

/// Lifts whatever freeze is pinned, armed by whomever, and removes program and pins. Done twice it does nothing.
pub fn thaw() -> Result<()> {
    thaw_in(&Pins::shared())?;
    pins::sweep_proofs()
}

fn thaw_in(pins: &Pins) -> Result<()> {
    // The classes first: with the pin gone, the program may live on until the kernel's deferred release.
    if let Ok(config) = pins.open_map("config") {
        abi::update(&config, "config", 0, &Config::default().encode())?;
    }
    pins.remove()
}

/// Another process's freeze is not ours to replace, unless that process is dead or holds nothing.
fn refuse_if_held() -> Result<()> {
    let Some(state) = state()? else { return Ok(()) };
    let own = ProcessId::current()?;
    if state.armed && state.exempt_alive && state.exempt != own {
        return Err(Error::Unsupported {
            what: format!("freeze in {PIN_DIR}"),
            why: format!("process {} holds it", state.exempt.tgid),
            remedy: "wait for that run to end, or lift it with `ovs-graceful thaw`".into(),
        });
    }
    Ok(())
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn after(now: Duration, wait: Duration) -> u64 {
    nanos(now).saturating_add(nanos(wait))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The run hands it from thread to thread.
    #[test]
    fn a_freeze_may_change_threads() {
        fn may<T: Send>() {}
        may::<Freeze>();
    }

    #[test]
    fn a_lease_never_wraps_round() {
        assert_eq!(after(Duration::from_secs(1), Duration::from_millis(500)), 1_500_000_000);
        assert_eq!(after(Duration::from_secs(1), Duration::MAX), u64::MAX);
    }
}

//! The guard: timeout policies that connections live under stay until the last of these has gone (hazards 30).
//!
//! A run begins it at Arm and widens it at Settle. From then on it lives by itself: the kernel's side is dpfreeze's
//! [`PolicyGuard`], whose lease is renewed by a look every few seconds (`ovs-graceful hook guard`, started by a timer
//! of systemd). Each look lists the connections, lets go of policies whose connections have gone or that are too old,
//! and ends timer and guard with the last of them. The daemon then deletes them by itself: it tries every 20 s. Where
//! the looks cease, the lease ends the guard.
//!
//! ```text
//! /run/ovs-graceful/guard.json   what is guarded and for which connections: gone with a reboot, as they are
//! /run/ovs-graceful/guard.lock   held by whoever changes it
//! /sys/fs/bpf/ovs-graceful-guard program and names
//! ```

mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context;
use dpfreeze::conntrack::{timeout_policies, Live, TimeoutPolicy};
use dpfreeze::freeze::{Hook, PolicyGuard, Renewal};
use nix::fcntl::{Flock, FlockArg};
use nix::time::{clock_gettime, ClockId};
use serde::Serialize;

use crate::control::RUN_DIR;
use crate::host::{GuardUnits, ServiceManager};
use crate::report::write_private_json;

pub use record::{Entry, Record, Terms};

const RECORD: &str = "/run/ovs-graceful/guard.json";
const LOCK: &str = "/run/ovs-graceful/guard.lock";
/// Held by the process that looks where there is no systemd.
const LOOP_LOCK: &str = "/run/ovs-graceful/guard-loop.lock";
/// The timer of the looks. Its service has the same name.
pub const TIMER: &str = "ovs-graceful-guard.timer";
const SERVICE: &str = "ovs-graceful-guard.service";
/// How long systemd may take to start or stop the timer.
const UNIT_LIMIT: Duration = Duration::from_secs(10);

/// What a run has put under guard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Guarded {
    /// Policies.
    pub policies: u64,
    /// Connections that they are kept for.
    pub connections: u64,
}

/// A policy under guard, for `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PolicyStatus {
    /// Its name.
    pub policy: String,
    /// The zones it is used in.
    pub zones: BTreeSet<u16>,
    /// So many connections were left at the last look.
    pub connections: u64,
    /// Seconds since it is guarded.
    pub age_s: u64,
}

/// The guard, for `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// What is guarded.
    pub policies: Vec<PolicyStatus>,
    /// Deletions that were refused.
    pub refused: u64,
    /// It ends by itself after so many ms, unless a look renews it; 0: it has ended.
    pub lease_left_ms: u64,
    /// It ends in any case after so many ms.
    pub end_left_ms: u64,
}

/// Begins to guard, for run `run`, the policies of `zones` (names and the zones they are used in) for the connections
/// that live in these zones now. What earlier runs guard stays guarded.
///
/// # Errors
/// Where connections cannot be listed, the program not be loaded on `hook`, or the record not be written; nothing is
/// guarded then that was not before.
pub fn begin(
    run: &str,
    hook: Hook,
    zones: &BTreeMap<String, BTreeSet<u16>>,
    policies: &[TimeoutPolicy],
    terms: Terms,
) -> anyhow::Result<Guarded> {
    let _lock = lock()?;
    let mut record = Record::load(Path::new(RECORD))?;
    let all: BTreeSet<u16> = record.zones().into_iter().chain(zones.values().flatten().copied()).collect();
    let live = Live::read(&all).context("connections under timeout policies")?;
    record.begin(run, boottime()?, zones, policies, &live);
    record.terms = terms;
    record.drop_finished();
    hold(&record, hook)?;
    Ok(record.guarded_by(run))
}

/// Takes in the connections that have come since [`begin`]: flows named the old policies until now.
///
/// # Errors
/// As [`begin`].
pub fn widen(run: &str, hook: Hook) -> anyhow::Result<Guarded> {
    let _lock = lock()?;
    let mut record = Record::load(Path::new(RECORD))?;
    let live = Live::read(&record.zones()).context("connections under timeout policies")?;
    record.widen(run, &live);
    hold(&record, hook)?;
    Ok(record.guarded_by(run))
}

/// Lets go of what run `run` has begun to guard: it was undone, and the old daemon keeps its policies by itself.
///
/// # Errors
/// Where program or record cannot be changed.
pub fn withdraw(run: &str) -> anyhow::Result<()> {
    let _lock = lock()?;
    let mut record = Record::load(Path::new(RECORD))?;
    record.entries.retain(|entry| entry.run != run);
    match PolicyGuard::open()? {
        Some(mut guard) if !record.entries.is_empty() => {
            guard.keep(&record.names())?;
            record.save(Path::new(RECORD))
        }
        _ => end(),
    }
}

/// The record before the kernel: a guard that nobody knows of would be held by nothing but its lease, and is.
fn hold(record: &Record, hook: Hook) -> anyhow::Result<()> {
    if record.entries.is_empty() {
        return end();
    }
    record.save(Path::new(RECORD))?;
    let mut guard = PolicyGuard::load(hook)?;
    guard.hold(&record.names(), record.terms.lease(), record.terms.max_age())?;
    Ok(())
}

/// Ends it at once, whatever lives under the policies.
///
/// # Errors
/// Where the program cannot be removed.
pub fn release() -> anyhow::Result<()> {
    let _lock = lock()?;
    end()
}

fn end() -> anyhow::Result<()> {
    PolicyGuard::release()?;
    match std::fs::remove_file(RECORD) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context(RECORD),
        _ => Ok(()),
    }
}

/// One look: renews the lease, lets go of what is not needed any more. False where nothing is left to look after.
///
/// # Errors
/// Where kernel or record cannot be read; the lease then ends the guard, unless a later look succeeds.
pub fn look() -> anyhow::Result<bool> {
    let _lock = lock()?;
    let mut record = Record::load(Path::new(RECORD))?;
    let Some(mut guard) = PolicyGuard::open()?.filter(|_| !record.entries.is_empty()) else {
        end()?;
        return Ok(false);
    };
    let renewed = guard.renew(record.terms.lease())?;
    let policies = timeout_policies()?;
    for gone in record.forget(boottime()?, &policies) {
        println!("guard: {gone}");
    }
    forget_finished(&mut record)?;
    if record.entries.is_empty() {
        println!("guard: nothing is left to guard; {} deletions were refused", guard.refused()?);
        end()?;
        return Ok(false);
    }
    match renewed {
        // Once more: on a busy host the look itself takes its time.
        Renewal::Held(_) => {
            guard.keep(&record.names())?;
            let _said_by_the_next_look = guard.renew(record.terms.lease())?;
        }
        Renewal::Expired | Renewal::Ended | Renewal::Thawed => {
            println!(
                "guard: it had not been renewed in time and policies may have been deleted; guarding what is left"
            );
            guard.hold(&record.names(), record.terms.lease(), record.terms.max_age())?;
        }
    }
    record.save(Path::new(RECORD))?;
    Ok(true)
}

/// Forgets policies with no connection left. Only after a second list: the kernel may leave connections out of one that
/// its table was resized under.
fn forget_finished(record: &mut Record) -> anyhow::Result<()> {
    let zones = record.zones();
    let live = Live::read(&zones)?;
    let mut finished = record.count(&live);
    record.prune(&live);
    if !finished.is_empty() {
        let again = record.count(&Live::read(&zones)?);
        finished.retain(|policy| again.contains(policy));
    }
    for policy in &finished {
        println!("guard: {policy}: its last connection has gone");
    }
    record.entries.retain(|entry| !finished.contains(&entry.watched.policy));
    Ok(())
}

/// Looks until nothing is left: what stands for the timer where there is no systemd.
///
/// # Errors
/// Where the lock file cannot be opened. A look that fails is said and tried again.
pub fn look_for_ever() -> anyhow::Result<()> {
    let Ok(_alone) = Flock::lock(open(LOOP_LOCK)?, FlockArg::LockExclusiveNonblock) else { return Ok(()) };
    loop {
        let interval = Record::load(Path::new(RECORD)).map(|record| record.terms.interval()).unwrap_or_default();
        std::thread::sleep(interval.max(Duration::from_secs(1)));
        match look() {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => eprintln!("guard: {error:#}"),
        }
    }
}

/// Starts the looks: a timer of systemd, or a process of our own.
///
/// # Errors
/// Where neither can be started; the lease then ends the guard.
pub fn start_looks(services: &dyn ServiceManager, terms: Terms) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot find our own program")?;
    let program = program.to_str().context("the path of our own program is not UTF-8")?.to_owned();
    if !services.is_running() {
        return start_loop(&program);
    }
    let units = GuardUnits {
        timer: TIMER.to_owned(),
        service: SERVICE.to_owned(),
        command: vec![program, "hook".to_owned(), "guard".to_owned()],
        interval: terms.interval(),
        // So that after one that hangs another can still renew.
        limit: terms.lease() / 2,
        confined: true,
    };
    services.start_guard(&units, Instant::now() + UNIT_LIMIT).with_context(|| format!("cannot start {TIMER}"))
}

/// Ends the timer, from within the service that it has started.
///
/// # Errors
/// Where systemd does not take the job.
pub fn stop_looks(services: &dyn ServiceManager) -> anyhow::Result<()> {
    if services.is_running() {
        services.end_guard(TIMER, Instant::now() + UNIT_LIMIT)?;
    }
    Ok(())
}

/// A session of its own, so that it outlives the supervisor.
fn start_loop(program: &str) -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt;
    let mut command = std::process::Command::new(program);
    command.args(["hook", "guard", "--loop"]).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec only setsid(2) is called, which is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(nix::unistd::setsid().map(|_| ())?));
    }
    command.spawn().context("cannot start the process that looks after timeout policies").map(drop)
}

/// What `status` shows; None where nothing is guarded.
///
/// # Errors
/// Where kernel or record cannot be read.
pub fn status() -> anyhow::Result<Option<Status>> {
    let Some(guard) = PolicyGuard::open()? else { return Ok(None) };
    let state = guard.state()?;
    let now = boottime()?;
    let policies = Record::load(Path::new(RECORD))?.entries.into_iter().map(|entry| PolicyStatus {
        connections: entry.left,
        age_s: now.saturating_sub(entry.since).as_secs(),
        policy: entry.watched.policy,
        zones: entry.watched.zones,
    });
    Ok(Some(Status {
        policies: policies.collect(),
        refused: guard.refused()?,
        lease_left_ms: if state.armed { state.lease_left_ms } else { 0 },
        end_left_ms: if state.armed { state.end_left_ms } else { 0 },
    }))
}

fn boottime() -> anyhow::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_BOOTTIME).context("clock")?.into())
}

fn lock() -> anyhow::Result<Flock<File>> {
    Flock::lock(open(LOCK)?, FlockArg::LockExclusive)
        .map_err(|(_, errno)| anyhow::anyhow!("cannot lock {LOCK}: {errno}"))
}

fn open(path: &str) -> anyhow::Result<File> {
    DirBuilder::new().recursive(true).mode(0o700).create(RUN_DIR).with_context(|| RUN_DIR.to_owned())?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).with_context(|| format!("cannot open {path}"))
}

//! systemd over the system bus. Interfaces: org.freedesktop.systemd1(5).
//!
//! Its own socket `/run/systemd/private` would do without a message bus, but zbus refuses what comes from there: the
//! sender is a well-known name.
//!
//! zbus is asynchronous: each connection has a small runtime of its own, which runs only while we wait.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Instant;

use nix::fcntl::OFlag;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use sd_notify::NotifyState;
use tokio::runtime::Runtime;
use zbus::{Connection, MatchRule, Message, MessageStream, OwnedObjectPath, OwnedVariant, Variant};

use super::jsonrpc::remaining;
use super::limits::MOST_DESCRIPTORS;
use crate::host::{
    is_our_own, Context, Daemon, Gated, GuardUnits, HandOver, HostError, Job, JobKind, Neighbour, QueuedJob, Result,
    SavedProgram, ServiceManager, SupervisorUnit, Unit, DATABASE_UNIT, GATE, SWITCH_UNIT, UMBRELLAS, UNITS,
};

const DESTINATION: &str = "org.freedesktop.systemd1";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// Where run-time drop-ins live: gone with the next boot.
const RUNTIME_UNITS: &str = "/run/systemd/system";
/// The file name of our drop-in.
const DROP_IN: &str = "90-ovs-graceful.conf";
/// The services that own Open vSwitch's daemons in its packages.
const OWN_UNITS: &[&str] = &[SWITCH_UNIT, DATABASE_UNIT];
/// Every wait for systemd's answer is about this object.
const OBJECT: &str = "systemd";

/// The systemd of this host.
#[derive(Debug, Clone)]
pub struct Systemd {
    runtime_units: PathBuf,
}

impl Default for Systemd {
    fn default() -> Self {
        Systemd { runtime_units: RUNTIME_UNITS.into() }
    }
}

/// A connection and the runtime it runs on.
struct Bus {
    runtime: Runtime,
    connection: Connection,
}

impl Bus {
    fn connect(until: Instant) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().about(OBJECT)?;
        let connection = within(&runtime, until, "connecting to the system bus", Connection::system())
            .map_err(|e| e.remedy("is dbus installed and running?"))?;
        Ok(Bus { runtime, connection })
    }

    /// Calls `method` of `interface` on the object `path`.
    fn call<B>(&self, path: &str, interface: &str, method: &str, body: &B, until: Instant) -> Result<Message>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let call = self.connection.call_method(Some(DESTINATION), path, Some(interface), method, body);
        within(&self.runtime, until, method, call)
    }

    /// Calls `method` of the manager.
    fn manager<B>(&self, method: &str, body: &B, until: Instant) -> Result<Message>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        self.call(MANAGER_PATH, MANAGER, method, body, until)
    }

    /// The object path in the answer to `method`; `None` where systemd says that there is no such unit.
    fn path<B>(&self, method: &str, body: &B, until: Instant) -> Result<Option<OwnedObjectPath>>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        match self.manager(method, body, until) {
            Ok(message) => Ok(Some(message.body().deserialize().about(OBJECT)?)),
            Err(error) if error.cause.contains("NoSuchUnit") || error.cause.contains("NoUnitForPID") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All properties of `interface` on the object `path`.
    fn properties(&self, path: &str, interface: &str, until: Instant) -> Result<Properties> {
        let message = self.call(path, "org.freedesktop.DBus.Properties", "GetAll", &(interface,), until)?;
        Ok(Properties(message.body().deserialize().about(OBJECT)?))
    }

    fn unit_properties(&self, path: &str, until: Instant) -> Result<Properties> {
        self.properties(path, "org.freedesktop.systemd1.Unit", until)
    }

    fn jobs(&self, until: Instant) -> Result<Vec<JobRow>> {
        self.manager("ListJobs", &(), until)?.body().deserialize().about(OBJECT)
    }

    /// Every end of a job from now on.
    fn ends_of_jobs(&self, until: Instant) -> Result<MessageStream> {
        self.manager("Subscribe", &(), until)?;
        within(&self.runtime, until, "listening for jobs", async {
            let rule = MatchRule::builder()
                .msg_type(zbus::message::Type::Signal)
                .interface(MANAGER)
                .member("JobRemoved")
                .build()?;
            MessageStream::for_match_rule(rule, &self.connection, None).await
        })
    }

    /// The unit `name` as its files are *now*: the package may have changed them since they were loaded.
    fn fresh_unit(&self, name: &str, until: Instant) -> Result<(OwnedObjectPath, Unit)> {
        let missing = || HostError::new(name, "there is no such unit");
        let path = self.path("LoadUnit", &(name,), until)?.ok_or_else(missing)?;
        let mut unit = self.unit(path.as_str(), until)?.ok_or_else(missing)?;
        if unit.needs_daemon_reload {
            self.manager("Reload", &(), until)?;
            unit = self.unit(path.as_str(), until)?.ok_or_else(missing)?;
        }
        if unit.exec_start.is_empty() {
            return Err(HostError::new(name, "it has no ExecStart= to start the new daemon with"));
        }
        Ok((path, unit))
    }

    fn unit(&self, path: &str, until: Instant) -> Result<Option<Unit>> {
        let unit = self.properties(path, "org.freedesktop.systemd1.Unit", until)?;
        if unit.text("LoadState") == "not-found" {
            return Ok(None);
        }
        // A socket or a timer has no such properties.
        let service = match unit.text("Id").ends_with(".service") {
            true => self.properties(path, "org.freedesktop.systemd1.Service", until)?,
            false => Properties::default(),
        };
        Ok(Some(Unit {
            name: unit.text("Id"),
            active_state: unit.text("ActiveState"),
            sub_state: unit.text("SubState"),
            main_pid: service.number("MainPID"),
            control_pid: service.number("ControlPID"),
            pid_file: service.path("PIDFile"),
            exec_start: service.command("ExecStart"),
            exec_reload: service.command("ExecReload"),
            fragment: unit.path("FragmentPath"),
            drop_ins: unit.get::<Vec<String>>("DropInPaths").into_iter().flatten().map(PathBuf::from).collect(),
            needs_daemon_reload: unit.get("NeedDaemonReload").unwrap_or(false),
            control_group: service.text("ControlGroup"),
            environment_files: service
                .get::<Vec<(String, bool)>>("EnvironmentFiles")
                .into_iter()
                .flatten()
                .map(|(path, _)| path.into())
                .collect(),
            kind: service.text("Type"),
            triggered_by: unit.get("TriggeredBy").unwrap_or_default(),
        }))
    }
}

/// Runs one exchange with systemd with a deadline.
fn within<T>(
    runtime: &Runtime,
    until: Instant,
    doing: &str,
    exchange: impl Future<Output = zbus::Result<T>>,
) -> Result<T> {
    let Some(left) = remaining(until) else { return Err(HostError::timeout(OBJECT, doing)) };
    let result = runtime.block_on(async { tokio::time::timeout(left, exchange).await });
    match result {
        Ok(result) => result.map_err(|e| HostError::new(OBJECT, format!("{doing}: {e}"))),
        Err(_) => Err(HostError::timeout(OBJECT, doing)),
    }
}

/// What ListJobs tells of a job: number, unit, kind, state, its own object and the unit's.
type JobRow = (u32, String, String, String, OwnedObjectPath, OwnedObjectPath);

/// The properties of an object.
#[derive(Default)]
struct Properties(HashMap<String, OwnedVariant>);

impl Properties {
    fn get<T>(&self, name: &str) -> Option<T>
    where
        T: TryFrom<OwnedVariant>,
    {
        self.0.get(name)?.try_clone().ok()?.try_into().ok()
    }

    fn text(&self, name: &str) -> String {
        self.get(name).unwrap_or_default()
    }

    fn number(&self, name: &str) -> i32 {
        self.get::<u32>(name).and_then(|n| i32::try_from(n).ok()).unwrap_or_default()
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.get::<String>(name).filter(|p| !p.is_empty()).map(PathBuf::from)
    }

    /// The words of the first command: the program's path, then its arguments without `argv[0]`.
    fn command(&self, name: &str) -> Vec<String> {
        type Command = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);
        let commands = self.get::<Vec<Command>>(name).unwrap_or_default();
        let words = commands.into_iter().next().map(|command| {
            let mut words = vec![command.0];
            words.extend(command.1.into_iter().skip(1));
            words
        });
        words.unwrap_or_default()
    }
}

impl Systemd {
    /// Queues a restart of the unit and of all that are restarted with it, in their order, as `systemctl restart` does;
    /// does not wait for it.
    pub fn queue_restart(&self, unit: &str, until: Instant) -> Result<()> {
        Bus::connect(until)?.manager("RestartUnit", &(unit, "replace"), until).map(drop)
    }

    /// Queues a restart of the unit where it is active, as `systemctl try-restart` does; does not wait for it.
    pub fn queue_try_restart(&self, unit: &str, until: Instant) -> Result<()> {
        Bus::connect(until)?.manager("TryRestartUnit", &(unit, "replace"), until).map(drop)
    }

    fn write_drop_in(&self, unit: &str, text: &str) -> Result<()> {
        let file = self.drop_in(unit);
        write_whole(&file, &format!("{DROP_IN_HEAD}{text}")).about(file.display().to_string())
    }

    fn remove_drop_in(&self, unit: &str) -> Result<bool> {
        let file = self.drop_in(unit);
        match fs::remove_file(&file) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(HostError::new(file.display().to_string(), e)),
        }
        // Other drop-ins may live there; then it stays.
        let _ = file.parent().map(fs::remove_dir);
        Ok(true)
    }

    fn drop_in(&self, unit: &str) -> PathBuf {
        self.runtime_units.join(format!("{unit}.d")).join(DROP_IN)
    }
}

impl ServiceManager for Systemd {
    fn is_running(&self) -> bool {
        // sd_booted(3).
        Path::new("/run/systemd/system").is_dir()
    }

    fn owner(&self, daemon: &Daemon, until: Instant) -> Result<Option<Unit>> {
        if !self.is_running() {
            return Ok(None);
        }
        let bus = Bus::connect(until)?;
        let pid = u32::try_from(daemon.id.pid).about(OBJECT)?;
        let Some(path) = bus.path("GetUnitByPID", &(pid,), until)? else { return Ok(None) };
        // A daemon that somebody started by hand lives in a session or in another service: that unit does not own it.
        let owns = |unit: &Unit| {
            let mains = [Some(daemon.id.pid), daemon.monitor.map(|monitor| monitor.pid)];
            mains.contains(&Some(unit.main_pid)) || OWN_UNITS.contains(&unit.name.as_str())
        };
        if !path.as_str().ends_with("_2eservice") {
            return Ok(None);
        }
        Ok(bus.unit(path.as_str(), until)?.filter(owns))
    }

    fn unit(&self, name: &str, until: Instant) -> Result<Option<Unit>> {
        let bus = Bus::connect(until)?;
        match bus.path("LoadUnit", &(name,), until)? {
            Some(path) => bus.unit(path.as_str(), until),
            None => Ok(None),
        }
    }

    fn shutdown_queued(&self, until: Instant) -> Result<bool> {
        let jobs = self.jobs(until)?;
        Ok(jobs.iter().any(|job| job.unit == "shutdown.target" && job.kind == "start"))
    }

    fn jobs(&self, until: Instant) -> Result<Vec<QueuedJob>> {
        let job = |row: JobRow| QueuedJob { id: row.0, unit: row.1, kind: row.2, running: row.3 == "running" };
        Ok(Bus::connect(until)?.jobs(until)?.into_iter().map(job).collect())
    }

    fn neighbours(&self, until: Instant) -> Result<Vec<Neighbour>> {
        let bus = Bus::connect(until)?;
        let gate = bus.path("LoadUnit", &(GATE,), until)?;
        let gate = gate.map_or_else(|| Ok(Properties::default()), |path| bus.unit_properties(path.as_str(), until))?;
        let mut found: Vec<Neighbour> = Vec::new();
        let mut seen: BTreeSet<String> = UNITS.map(str::to_owned).into();
        // Taken from the end: who hangs on several units is told of the umbrella. The last name may be its alias.
        let roots = [UMBRELLAS[1], SWITCH_UNIT, DATABASE_UNIT, UMBRELLAS[0]];
        let mut left: Vec<(String, &str)> = roots.map(|unit| (unit.to_owned(), unit)).into();
        while let Some((name, root)) = left.pop() {
            let Some(path) = bus.path("GetUnit", &(&name,), until)? else { continue };
            let unit = bus.unit_properties(path.as_str(), until)?;
            let hang = CARRIES_RESTARTS.iter().flat_map(|list| unit.get::<Vec<String>>(list).unwrap_or_default());
            left.extend(hang.filter(|other| seen.insert(other.clone())).map(|other| (other, root)));
            if !is_our_own(&name) {
                let (gated, state) = (gated(&gate, &name), unit.text("ActiveState"));
                found.push(Neighbour { name, hangs_on: root.to_owned(), state, gated });
            }
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    fn cancel_job(&self, id: u32, until: Instant) -> Result<()> {
        match Bus::connect(until)?.manager("CancelJob", &(id,), until) {
            Err(error) if !error.cause.contains("NoSuchJob") => Err(error),
            _ => Ok(()),
        }
    }

    fn prepare_hand_over(&self, hand_over: &HandOver, until: Instant) -> Result<Unit> {
        let bus = Bus::connect(until)?;
        let (path, unit) = bus.fresh_unit(&hand_over.unit, until)?;
        self.write_drop_in(&hand_over.unit, &drop_in_text(hand_over, &unit.exec_start))?;
        for other in UNITS.into_iter().filter(|other| *other != hand_over.unit) {
            if bus.path("GetUnit", &(other,), until)?.is_some() {
                self.write_drop_in(other, NOT_BY_HAND)?;
            }
        }
        bus.manager("Reload", &(), until)?;
        let missing = || HostError::new(&hand_over.unit, "it has gone while its drop-in was loaded");
        let unit = bus.unit(path.as_str(), until)?.ok_or_else(missing)?;
        if unit.pid_file.as_deref() != Some(&hand_over.pid_file) {
            let file = self.drop_in(&hand_over.unit);
            return Err(HostError::new(&hand_over.unit, format!("the drop-in {} has no effect", file.display()))
                .remedy("look for drop-ins of a later name or in /etc/systemd/system that set PIDFile="));
        }
        Ok(unit)
    }

    fn append_to_start(&self, unit: &str, words: &[&str], until: Instant) -> Result<()> {
        let bus = Bus::connect(until)?;
        let (_, loaded) = bus.fresh_unit(unit, until)?;
        let words: Vec<String> =
            loaded.exec_start.iter().map(|w| quoted(w)).chain(words.iter().map(|w| literal(w))).collect();
        self.write_drop_in(unit, &format!("[Service]\nExecStart=\nExecStart={}\n", words.join(" ")))?;
        bus.manager("Reload", &(), until).map(drop)
    }

    fn prefer_program(&self, unit: &str, saved: &SavedProgram, until: Instant) -> Result<()> {
        self.write_drop_in(unit, &prefer_text(saved)?)?;
        Bus::connect(until)?.manager("Reload", &(), until).map(drop)
    }

    fn end_hand_over(&self, unit: &str, until: Instant) -> Result<()> {
        // That of ovsdb-server alone is for its restart, before any hand-over.
        let all = UNITS.into_iter().filter(|other| unit != DATABASE_UNIT && *other != unit).chain([unit]);
        let mut removed = false;
        for unit in all {
            removed |= self.remove_drop_in(unit)?;
        }
        match removed {
            true => Bus::connect(until)?.manager("Reload", &(), until).map(drop),
            false => Ok(()),
        }
    }

    fn job_of(&self, unit: &str, until: Instant) -> Result<Option<Box<dyn Job>>> {
        let bus = Bus::connect(until)?;
        let stream = bus.ends_of_jobs(until)?;
        let row = bus.jobs(until)?.into_iter().find(|row| row.1 == unit);
        Ok(row.map(|row| Box::new(RealJob { bus, stream, path: row.4, unit: unit.to_owned() }) as _))
    }

    fn start_job(&self, unit: &str, kind: JobKind, until: Instant) -> Result<Box<dyn Job>> {
        let bus = Bus::connect(until)?;
        let method = match kind {
            JobKind::Start => "StartUnit",
            JobKind::Stop => "StopUnit",
            JobKind::Restart => "RestartUnit",
            JobKind::Reload => "ReloadUnit",
        };
        RealJob::queue(bus, unit, method, &(unit, "ignore-dependencies"), until).map(|job| Box::new(job) as _)
    }

    fn start_supervisor(&self, unit: &SupervisorUnit, until: Instant) -> Result<()> {
        let bus = Bus::connect(until)?;
        let none: Vec<(String, Vec<(String, Variant<'_>)>)> = Vec::new();
        let body = (unit.name.as_str(), "fail", supervisor_properties(unit), none);
        let mut job = RealJob::queue(bus, &unit.name, "StartTransientUnit", &body, until)?;
        match job.wait(until)?.as_deref() {
            Some("done") => Ok(()),
            Some(other) => Err(HostError::new(&unit.name, format!("its start ended as {other}"))
                .remedy(format!("see `journalctl -u {}`", unit.name))),
            None => Err(HostError::timeout(&unit.name, "starting it")),
        }
    }

    fn keep(&self, descriptors: &[(&str, BorrowedFd<'_>)], until: Instant) -> Result<bool> {
        if !self.is_running() || std::env::var_os("NOTIFY_SOCKET").is_none() {
            return Ok(false);
        }
        let about = "systemd's file descriptor store";
        for (name, descriptor) in descriptors {
            if remaining(until).is_none() {
                return Err(HostError::timeout(about, "giving it what is to be kept"));
            }
            // A socket that is readable is none that systemd should drop.
            let message = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
            sd_notify::notify_with_fds(&message, &[*descriptor]).about(about)?;
        }
        barrier(until).about(about)?;
        Ok(true)
    }

    fn start_guard(&self, units: &GuardUnits, until: Instant) -> Result<()> {
        let bus = Bus::connect(until)?;
        if let Some(path) = bus.path("GetUnit", &(&units.timer,), until)? {
            let state = bus.properties(path.as_str(), "org.freedesktop.systemd1.Unit", until)?.text("ActiveState");
            if matches!(state.as_str(), "active" | "activating") {
                return Ok(());
            }
        }
        let service = vec![(units.service.clone(), guard_properties(units))];
        let body = (units.timer.as_str(), "replace", timer_properties(units), service);
        let mut job = RealJob::queue(bus, &units.timer, "StartTransientUnit", &body, until)?;
        match job.wait(until)?.as_deref() {
            Some("done") => Ok(()),
            Some(other) => Err(HostError::new(&units.timer, format!("its start ended as {other}"))),
            None => Err(HostError::timeout(&units.timer, "starting it")),
        }
    }

    fn end_guard(&self, timer: &str, until: Instant) -> Result<()> {
        Bus::connect(until)?.path("StopUnit", &(timer, "ignore-dependencies"), until).map(drop)
    }
}

/// What a supervisor that has died had [kept](ServiceManager::keep), where systemd has started this process in its
/// place. To be called once.
pub fn inherited() -> Vec<(String, OwnedFd)> {
    let Ok(listed) = sd_notify::listen_fds_with_names() else { return Vec::new() };
    // SAFETY: systemd has given these descriptors to this process, and nobody else in it has taken them.
    listed.map(|(fd, name)| (name, unsafe { OwnedFd::from_raw_fd(fd) })).collect()
}

/// Waits until systemd has read everything that we have told it: it closes what came with the barrier
/// (sd_notify_barrier(3)).
fn barrier(until: Instant) -> std::io::Result<()> {
    let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
    drop(theirs);
    let left = until.saturating_duration_since(Instant::now()).as_millis();
    let mut closed = [PollFd::new(ours.as_fd(), PollFlags::POLLHUP)];
    match poll(&mut closed, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX))? {
        0 => Err(std::io::Error::from(std::io::ErrorKind::TimedOut)),
        _ => Ok(()),
    }
}

/// A job and the connection on which its end is announced.
struct RealJob {
    bus: Bus,
    stream: MessageStream,
    path: OwnedObjectPath,
    unit: String,
}

impl RealJob {
    /// Calls `method` of the manager, listening for ends of jobs from before the call.
    fn queue<B>(bus: Bus, unit: &str, method: &str, body: &B, until: Instant) -> Result<Self>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let stream = bus.ends_of_jobs(until)?;
        let path = bus.manager(method, body, until)?.body().deserialize().about(unit)?;
        Ok(RealJob { bus, stream, path, unit: unit.to_owned() })
    }
}

impl Job for RealJob {
    fn wait(&mut self, until: Instant) -> Result<Option<String>> {
        let (stream, path) = (&mut self.stream, &self.path);
        let ended = within(&self.bus.runtime, until, "waiting for a job", async {
            while let Some(message) = next(stream).await {
                let message = message?;
                let (_, job, _, result): (u32, OwnedObjectPath, String, String) = message.body().deserialize()?;
                if job == *path {
                    return Ok(Some(result));
                }
            }
            Ok(None)
        });
        match ended {
            Ok(Some(result)) => Ok(Some(result)),
            Ok(None) => Err(HostError::new(&self.unit, "systemd closed the connection while its job was under way")),
            Err(error) if error.timed_out => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The next message of a stream (what `StreamExt::next` does).
async fn next(stream: &mut MessageStream) -> Option<zbus::Result<Message>> {
    std::future::poll_fn(|cx| zbus::export::futures_core::Stream::poll_next(Pin::new(&mut *stream), cx)).await
}

/// The lists of a unit whose members are stopped and restarted with it (systemd.unit(5)).
const CARRIES_RESTARTS: [&str; 5] = ["RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo"];

/// Whether the gate, which has these properties, takes the restart of `unit` back.
fn gated(gate: &Properties, unit: &str) -> Gated {
    let waits = gate.get::<Vec<String>>("After").is_some_and(|after| after.iter().any(|other| other == unit));
    match (gate.text("LoadState").as_str(), gate.text("ActiveState").as_str()) {
        ("loaded", _) if !waits => Gated::NotOrdered,
        // Restarted with Open vSwitch, it is taking back.
        ("loaded", "active" | "deactivating" | "activating") => Gated::Yes,
        ("loaded", _) => Gated::Inactive,
        _ => Gated::NoGate,
    }
}

/// How a run-time drop-in begins.
const DROP_IN_HEAD: &str = "# Written by ovs-graceful for one run, and removed at its end.\n";
/// A restart that somebody asks for during a reload is carried out at once, whatever waits for what: it would end both
/// daemons and the reload with them. systemd refuses it instead. At shutdown units are stopped all the same.
const NOT_BY_HAND: &str = "[Unit]\nRefuseManualStop=yes\n";

/// The text of the run-time drop-in.
fn drop_in_text(hand_over: &HandOver, exec_start: &[String]) -> String {
    let words: Vec<String> =
        hand_over.hook.iter().map(|word| literal(word)).chain(exec_start.iter().map(|w| quoted(w))).collect();
    format!(
        "{NOT_BY_HAND}\n\
         [Service]\n\
         # Read again when ExecReload= ends: that is how the new daemon becomes the main process.\n\
         PIDFile={}\n\
         ExecReload=\n\
         ExecReload={}\n\
         # The old daemon may have to be killed; that is no failure of the unit.\n\
         SuccessExitStatus=SIGKILL\n\
         TimeoutStartSec={}\n",
        hand_over.pid_file.display(),
        words.join(" "),
        hand_over.limit_s,
    )
}

/// The text of the drop-in that has ovs-ctl find a program that was kept: its own search path comes behind `PATH`
/// (utilities/ovs-lib.in of OVS).
fn prefer_text(saved: &SavedProgram) -> Result<String> {
    let program = saved.program.display().to_string();
    let folder = saved.program.parent().map(|folder| folder.display().to_string());
    let folder = folder.ok_or_else(|| HostError::new(&program, "it is in no folder"))?;
    let path = format!("PATH={folder}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let libraries = saved.library_path(None).map(|path| format!("LD_LIBRARY_PATH={path}"));
    let lines: Vec<String> =
        [Some(path), libraries].into_iter().flatten().map(|word| format!("Environment={}\n", literal(&word))).collect();
    Ok(format!("[Service]\n{}", lines.concat()))
}

/// A word of a command line (systemd.service(5), "Command lines") that systemd takes as it is but for `$VARIABLES`,
/// which it expands when it runs the command, as it would have done in ExecStart=.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=/.,:+@$[]".contains(c) || c == '{' || c == '}';
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    let mut text = String::from("\"");
    for c in word.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            '%' => text.push_str("%%"),
            '\n' => text.push_str("\\n"),
            '\t' => text.push_str("\\t"),
            other => text.push(other),
        }
    }
    text.push('"');
    text
}

/// A word of our own, in which nothing is to be expanded.
fn literal(word: &str) -> String {
    quoted(&word.replace('$', "$$"))
}

/// Writes a file that is whole whenever somebody reads it.
fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    // Not *.conf: systemd does not read it.
    let new = path.with_extension("new");
    fs::write(&new, text)?;
    fs::rename(new, path)
}

/// `ExecStart=` and the like.
fn command(words: &[String]) -> Variant<'static> {
    let program = words.first().cloned().unwrap_or_default();
    Variant::from(vec![(program, words.to_vec(), false)])
}

/// The properties of the transient timer: as the supervisor's unit, it hangs on nothing.
fn timer_properties(units: &GuardUnits) -> Vec<(String, Variant<'static>)> {
    let interval = u64::try_from(units.interval.as_micros()).unwrap_or(u64::MAX);
    let both = ["OnActiveSec", "OnUnitInactiveSec"].map(|base| (base.to_owned(), interval));
    let properties = [
        ("Description", Variant::from("ovs-graceful looks after timeout policies of live connections".to_owned())),
        ("DefaultDependencies", Variant::from(false)),
        ("IgnoreOnIsolate", Variant::from(true)),
        ("CollectMode", Variant::from("inactive-or-failed".to_owned())),
        ("TimersMonotonic", Variant::from(both.to_vec())),
        ("AccuracyUSec", Variant::from(1_000_000u64)),
        ("RemainAfterElapse", Variant::from(false)),
    ];
    properties.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The properties of the service that the timer starts: one look, ended where it hangs.
fn guard_properties(units: &GuardUnits) -> Vec<(String, Variant<'static>)> {
    let limit = u64::try_from(units.limit.as_micros()).unwrap_or(u64::MAX);
    let text = |text: &str| Variant::from(text.to_owned());
    let on = || Variant::from(true);
    let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let mut properties = vec![
        ("Description", text("ovs-graceful: one look at what a run has left to be looked after")),
        ("Type", text("oneshot")),
        ("ExecStart", command(&units.command)),
        ("DefaultDependencies", Variant::from(false)),
        ("IgnoreOnIsolate", Variant::from(true)),
        ("CollectMode", text("inactive-or-failed")),
        ("TimeoutStartUSec", Variant::from(limit)),
        ("StandardOutput", text("journal")),
        ("StandardError", text("journal")),
    ];
    if units.confined {
        // Nobody is started by it, so it can be confined to what a look takes (systemd/README.md).
        properties.extend([
            ("CapabilityBoundingSet", Variant::from(GUARD_CAPABILITIES)),
            ("NoNewPrivileges", on()),
            ("ProtectSystem", text("strict")),
            ("ReadWritePaths", Variant::from(list(&["-/run/ovs-graceful"]))),
            ("ProtectHome", text("yes")),
            ("PrivateDevices", on()),
            ("ProtectControlGroups", on()),
            ("ProtectKernelModules", on()),
            ("RestrictAddressFamilies", Variant::from((true, list(&["AF_UNIX", "AF_NETLINK"])))),
            ("RestrictNamespaces", Variant::from(0u64)),
            ("RestrictRealtime", on()),
            ("RestrictSUIDSGID", on()),
            ("LockPersonality", on()),
            ("MemoryDenyWriteExecute", on()),
        ]);
    }
    properties.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// `CAP_NET_ADMIN` to list connections, `CAP_BPF` for the map of the guard (include/uapi/linux/capability.h).
const GUARD_CAPABILITIES: u64 = 1 << 12 | 1 << 39;

/// A run keeps five descriptors at a time, and does so up to three times.
const MOST_STORED: u32 = 64;

/// The properties of the transient unit: it hangs on nothing and nothing hangs on it.
fn supervisor_properties(unit: &SupervisorUnit) -> Vec<(String, Variant<'static>)> {
    let environment: Vec<String> = unit.environment.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let text = |text: &str| Variant::from(text.to_owned());
    let mut properties = vec![
        ("Description", text(&unit.description)),
        ("Type", text("exec")),
        ("ExecStart", command(&unit.command)),
        ("DefaultDependencies", Variant::from(false)),
        ("IgnoreOnIsolate", Variant::from(true)),
        ("CollectMode", text("inactive-or-failed")),
        ("OOMScoreAdjust", Variant::from(-1000i32)),
        ("Nice", Variant::from(unit.nice)),
        ("LimitMEMLOCK", Variant::from(u64::MAX)),
        ("LimitNOFILE", Variant::from(MOST_DESCRIPTORS)),
        // One that dies comes back with what it had parked, and undoes or finishes its run.
        ("Restart", text("on-failure")),
        ("RestartUSec", Variant::from(0u64)),
        ("SuccessExitStatus", Variant::from((unit.ends_with.clone(), Vec::<i32>::new()))),
        ("NotifyAccess", text("main")),
        ("FileDescriptorStoreMax", Variant::from(MOST_STORED)),
        // What it has started (ovs-ofctl, a gate command) has to end with it; daemons live in units of their own.
        ("KillMode", text("mixed")),
        ("StandardOutput", text("journal")),
        ("StandardError", text("journal")),
        ("Environment", Variant::from(environment)),
    ];
    if !unit.stop_post.is_empty() {
        properties.push(("ExecStopPost", command(&unit.stop_post)));
    }
    properties.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_supervisor_may_have_as_many_descriptors_as_a_large_host_takes() {
        let unit = SupervisorUnit {
            name: "u".into(),
            description: String::new(),
            command: vec!["/bin/true".into()],
            stop_post: Vec::new(),
            ends_with: Vec::new(),
            environment: Vec::new(),
            nice: 0,
        };
        let properties: HashMap<String, Variant<'_>> = supervisor_properties(&unit).into_iter().collect();
        assert_eq!(properties["LimitNOFILE"], Variant::from(524_288u64));
        assert_eq!(properties["LimitMEMLOCK"], Variant::from(u64::MAX));
        assert_eq!(properties["FileDescriptorStoreMax"], Variant::from(64u32));
    }

    #[test]
    fn the_drop_in_keeps_what_systemd_is_to_expand_and_nothing_else() {
        let hand_over = HandOver {
            unit: "ovs-vswitchd.service".into(),
            pid_file: "/run/openvswitch/ovs-vswitchd.pid".into(),
            hook: vec!["/opt/a b/ovs-graceful".into(), "hook".into(), "cost$".into(), "--".into()],
            limit_s: 600,
        };
        let start = ["/usr/share/ovs-ctl", "--system-id=random", "start", "$OVS_CTL_OPTS", "${USER}", "50% \"x\""];
        let text = drop_in_text(&hand_over, &start.map(String::from));
        let line = text.lines().filter(|l| l.starts_with("ExecReload=")).nth(1).unwrap();
        assert_eq!(
            line,
            "ExecReload=\"/opt/a b/ovs-graceful\" hook cost$$ -- /usr/share/ovs-ctl --system-id=random start \
             $OVS_CTL_OPTS ${USER} \"50%% \\\"x\\\"\""
        );
        assert!(text.contains("\nPIDFile=/run/openvswitch/ovs-vswitchd.pid\n"));
    }
}

//! The kernel datapath of this machine, through dpfreeze.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dpfreeze::conntrack::TimeoutPolicy;
use dpfreeze::devices::Policer;
use dpfreeze::freeze::{
    self, CanaryCommand, Captured, Classes, EventKind, Families, Freeze, Halt, KeptQdisc, PolicyGuard, Port, Refused,
    Renewal, Scope, Skipped, PROBE_METERS,
};
use dpfreeze::ovs::{Datapath as Dp, Dispatch, Flow, FlowCounts, Ovs, Vport, ZoneLimit};
use dpfreeze::park::binding::{self, Binding};
use dpfreeze::park::{
    self, Chosen, DrainWatch, Duplicates, Handlers, Origins, Park, ParkLimits, ParkStats, RemovalReport, ReplayInput,
    ReplayReport,
};
use dpfreeze::snapshot::{self, Snapshot};
use dpfreeze::tunnel::{self, Adoption, Guard};

use super::{daemons, fragments};
use crate::guard::{self, Guarded, Terms};
use crate::host::datapath::{Datapath, FreezeEvent, GoesTo, HandedOver, Lease, DATAPATH};
use crate::host::{Context, HostError, ProcessId, Result};

/// How long the replay to the old daemon may take, when a run is undone.
const RETURN_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at who the ports are bound to.
const PORTS_POLL: Duration = Duration::from_millis(1);

/// The datapath of this machine.
pub struct KernelDatapath {
    ovs: Ovs,
    limits: ParkLimits,
    freeze: Option<Freeze>,
    park: Option<Park>,
    /// Who the upcalls went to before they were taken.
    returned_to: Option<Binding>,
    before: Arc<Vec<Flow>>,
    chosen: Option<Choice>,
    removed: Option<RemovalReport>,
    /// What the guard had refused before this run began to use it.
    guard_refused: Option<u64>,
    /// What freezes of this run that have been lifted had refused.
    refused_before: Refused,
    /// How often the kernel passed over those.
    skipped_before: Skipped,
    old: Option<ProcessId>,
    drain: Option<DrainWatch>,
    adoption: Option<Adoption>,
    /// Tunnel ports that the new daemon wanted to delete and has not adopted.
    stale_tunnels: Vec<String>,
    /// The upcall sockets of the new daemon.
    bound: Option<Duplicates>,
    /// Who the upcalls go to, for a kernel that does not tell.
    goes_to: GoesTo,
    /// A daemon that binds is refused.
    binding_is_refused: bool,
}

/// How long a handler thread may be too busy to be seen waiting.
const HANDLER_PATIENCE: Duration = Duration::from_secs(2);

impl KernelDatapath {
    /// Opens it.
    ///
    /// # Errors
    /// Where the module is not loaded, or this process may not.
    pub fn open(limits: ParkLimits) -> Result<KernelDatapath> {
        let ovs = Ovs::open().about("kernel datapath")?;
        Ok(KernelDatapath {
            ovs,
            limits,
            freeze: None,
            park: None,
            returned_to: None,
            before: Arc::default(),
            chosen: None,
            removed: None,
            guard_refused: None,
            refused_before: Refused::default(),
            skipped_before: Skipped::default(),
            old: None,
            drain: None,
            adoption: None,
            stale_tunnels: Vec::new(),
            bound: None,
            goes_to: GoesTo::TheDaemon,
            binding_is_refused: false,
        })
    }

    /// The datapath as the kernel tells it.
    fn told(&mut self) -> Result<Dp> {
        let dp = self.ovs.datapath(DATAPATH).about(DATAPATH)?;
        dp.ok_or_else(|| HostError::new(DATAPATH, "there is no such datapath"))
    }

    /// The datapath, with the port ids by CPU even where the kernel does not tell them.
    fn dp(&mut self) -> Result<Dp> {
        let mut dp = self.told()?;
        if dp.dispatch() == Dispatch::PerCpu && dp.per_cpu_pids.is_none() {
            dp.per_cpu_pids = Some(self.untold()?);
        }
        Ok(dp)
    }

    /// Linux 5.15 to 6.0 take the port ids by CPU and do not give them back.
    fn untold(&self) -> Result<Vec<u32>> {
        // Whether a daemon that is refused has tried is not seen in it, nor, once its supervisor is gone, who was who.
        let may_be_refused = self.binding_is_refused || self.old.is_none();
        let park = self.park.as_ref().map(Park::port_ids);
        // What the old daemon goes on with, or leaves behind, is all of its sockets.
        let some = self.goes_to != GoesTo::TheDaemon;
        self.goes_to.port_ids(park, may_be_refused, || daemons::port_ids_of_handlers(self.old, some, HANDLER_PATIENCE))
    }

    /// Waits until `daemon` has bound every port, and dispatches by port from then on. Returns the port ids.
    fn wait_for_ports(&mut self, daemon: u32, until: Instant) -> Result<Vec<u32>> {
        let dp = self.dp()?;
        loop {
            let vports = self.ovs.vports(dp.ifindex).about(DATAPATH)?;
            if let Some(port_ids) = own_ports(daemon, &vports)? {
                binding::dispatch_per_vport(&mut self.ovs, &dp).about(DATAPATH)?;
                return Ok(port_ids);
            }
            if Instant::now() >= until {
                let what = format!("process {daemon} has not bound the upcalls of every port");
                return Err(HostError::new(DATAPATH, what));
            }
            std::thread::sleep(PORTS_POLL);
        }
    }

    fn freeze(&mut self) -> Result<&mut Freeze> {
        self.freeze.as_mut().ok_or_else(|| HostError::new("freeze", "it is not loaded"))
    }

    fn park(&mut self) -> Result<&mut Park> {
        self.park.as_mut().ok_or_else(|| HostError::new("parking sockets", "they are not open"))
    }

    fn families(&self) -> Families {
        self.ovs.families().into()
    }
}

impl Datapath for KernelDatapath {
    fn is_there(&mut self) -> Result<bool> {
        Ok(self.ovs.datapath(DATAPATH).about(DATAPATH)?.is_some())
    }

    fn snapshot(&mut self) -> Result<Snapshot> {
        let snapshot = snapshot::capture(&mut self.ovs).about(DATAPATH)?;
        if self.chosen.is_none() {
            self.before = Arc::new(snapshot.datapath(DATAPATH).map(|dp| dp.flows.clone()).unwrap_or_default());
        }
        Ok(snapshot)
    }

    fn flow_counts(&mut self) -> Result<FlowCounts> {
        let dp = self.dp()?;
        self.ovs.flow_counts(dp.ifindex).about(DATAPATH)
    }

    fn reopen(&mut self) -> Result<()> {
        self.ovs = Ovs::open().about("kernel datapath")?;
        Ok(())
    }

    fn timeout_policies(&mut self) -> Result<Vec<TimeoutPolicy>> {
        dpfreeze::conntrack::timeout_policies().about("conntrack timeout policies")
    }

    fn set_ct_limits(&mut self, limits: &[ZoneLimit]) -> Result<()> {
        self.ovs.set_ct_limits(limits).about("conntrack limits")
    }

    fn upcall_port_ids(&mut self) -> Result<Vec<u32>> {
        let dp = self.dp()?;
        match dp.dispatch() {
            Dispatch::PerCpu => Ok(dp.per_cpu_pids.unwrap_or_default()),
            Dispatch::PerVport => {
                let vports = self.ovs.vports(dp.ifindex).about(DATAPATH)?;
                Ok(binding::port_ids_of(&vports))
            }
        }
    }

    fn port_ids_waited_for(&mut self, daemon: ProcessId) -> Result<Vec<u32>> {
        let object = format!("ovs-vswitchd (pid {})", daemon.pid);
        Handlers::of(number(daemon)?, HANDLER_PATIENCE).and_then(Handlers::some).about(object)
    }

    fn tells_upcalls(&mut self) -> Result<bool> {
        let dp = self.ovs.datapath(DATAPATH).about(DATAPATH)?;
        Ok(dp.is_none_or(|dp| dp.dispatch() == Dispatch::PerVport || dp.per_cpu_pids.is_some()))
    }

    fn dispatches_per_cpu(&mut self) -> Result<bool> {
        Ok(self.told()?.dispatch() == Dispatch::PerCpu)
    }

    fn prove_freeze(&mut self) -> Result<()> {
        let canary = CanaryCommand::own(&["hook", "canary"]);
        // In pins of its own: whatever a crashed run has left frozen stays so.
        freeze::prove(&canary, self.families()).about("freeze").map(drop)
    }

    fn arm(&mut self, classes: Classes, lease: Lease) -> Result<()> {
        let dp = self.dp()?;
        let policies = dpfreeze::conntrack::timeout_policies().about("conntrack timeout policies")?;
        let names: Vec<String> = policies.into_iter().map(|policy| policy.name).collect();
        let canary = CanaryCommand::own(&["hook", "canary"]);
        let (mut freeze, _report) = Freeze::load_proven(&canary, self.families()).about("freeze")?;
        let somebody_s = self.ovs.has_meters(dp.ifindex, &PROBE_METERS).about(DATAPATH)?;
        let scope = Scope::here(&[dp.ifindex], &names, self.families()).about("freeze")?;
        let scope = Scope { probe_meters: !somebody_s, ..scope };
        freeze.arm(&scope, classes, lease.lease, lease.end).about("freeze")?;
        self.binding_is_refused = classes.contains(Classes::UPCALL_BIND);
        self.freeze = Some(freeze);
        Ok(())
    }

    fn take_up_freeze(&mut self) -> Result<bool> {
        self.freeze = Freeze::open().about("freeze")?;
        match &mut self.freeze {
            Some(freeze) => {
                freeze.take_over().about("freeze")?;
                self.binding_is_refused = freeze.state().about("freeze")?.classes.contains(Classes::UPCALL_BIND);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    fn is_armed(&self) -> bool {
        self.freeze.is_some()
    }

    fn refuse(&mut self, classes: Classes) -> Result<()> {
        self.freeze()?.set_classes(classes).about("freeze")?;
        self.binding_is_refused = classes.contains(Classes::UPCALL_BIND);
        Ok(())
    }

    fn renew(&mut self, lease: Duration) -> Result<()> {
        match self.freeze()?.renew(lease).about("freeze")? {
            Renewal::Held(_) => Ok(()),
            Renewal::Expired => Err(HostError::new("freeze", "its lease ran out before the next step of the run")),
            Renewal::Ended => Err(HostError::new("freeze", "its absolute end has come")),
            Renewal::Thawed => Err(HostError::new("freeze", "somebody lifted it")),
        }
    }

    fn watch_standby(&mut self, standby: ProcessId) -> Result<()> {
        match &mut self.freeze {
            Some(freeze) => {
                freeze.watch_standby(nix::unistd::Pid::from_raw(standby.pid), standby.start_time).about("freeze")
            }
            None => Ok(()),
        }
    }

    fn keep_qdiscs(&mut self, kept: &[(u32, KeptQdisc)]) -> Result<()> {
        self.freeze.as_mut().map_or(Ok(()), |freeze| freeze.keep_qdiscs(kept)).about("freeze")
    }

    fn adopt(&mut self, standby: ProcessId, tunnels: bool, policed: &[Policer]) -> Result<()> {
        let dp = self.dp()?;
        let mut guard = match tunnels {
            true => Guard::read(&mut self.ovs, dp.ifindex).about("tunnel ports")?,
            false => Guard::none(&self.ovs, dp.ifindex),
        };
        guard.policed = policed.to_vec();
        if !guard.is_empty() {
            let halt = self.freeze.as_ref().map(|freeze| Halt::of(freeze, standby.pid, guard.vport_family));
            let halt = halt.transpose().about("freeze")?;
            let adoption = Adoption::attach(standby.pid, standby.start_time, guard, halt);
            let adoption = adoption.about("tunnel ports and policing")?;
            self.adoption = Some(adoption);
        }
        Ok(())
    }

    fn adopted(&mut self, patience: Duration) -> Result<Vec<String>> {
        let Some(adoption) = self.adoption.take() else { return Ok(Vec::new()) };
        adoption.wait(patience);
        let report = adoption.finish();
        let (ports, ms) = (report.adopted.len(), report.watched.as_millis());
        tracing::info!(
            "{ports} tunnel ports and policed devices adopted; the new ovs-vswitchd was watched for {ms} ms, {} stops",
            report.stops
        );
        self.stale_tunnels.extend(report.stale);
        Ok(report.failed)
    }

    fn captured(&mut self) -> Result<Option<Captured>> {
        self.freeze()?.captured().about("upcall binding of the new ovs-vswitchd")
    }

    fn refused(&mut self) -> Result<Refused> {
        let now = self.freeze.as_ref().map(|freeze| freeze.refused().about("freeze")).transpose()?;
        let mut refused = self.refused_before.plus(now.unwrap_or_default());
        // A deletion is refused by whichever of the two programs the kernel asks first.
        if let Some(before) = self.guard_refused {
            refused.ct_timeout_del += refused_by_guard()?.saturating_sub(before);
        }
        Ok(refused)
    }

    fn skipped(&mut self) -> Result<Skipped> {
        let now = self.freeze.as_ref().map(|freeze| freeze.skipped().about("freeze")).transpose()?;
        Ok(self.skipped_before.plus(now.unwrap_or_default()))
    }

    fn events(&mut self) -> Result<Vec<FreezeEvent>> {
        let events = self.freeze()?.events().about("freeze")?;
        Ok(events.into_iter().filter_map(known_event).collect())
    }

    fn thaw(&mut self) -> Result<()> {
        self.bound = None;
        // The counters go with the freeze, also with one that a dead supervisor has left.
        let freeze = self.freeze.take().or_else(|| Freeze::open().ok().flatten());
        if let Some(freeze) = freeze {
            self.refused_before = self.refused_before.plus(freeze.refused().unwrap_or_default());
            match freeze.skipped() {
                Ok(skipped) => self.skipped_before = self.skipped_before.plus(skipped),
                Err(error) => tracing::warn!("how often the kernel passed over the freeze is not known: {error}"),
            }
        }
        if let Err(error) = fragments::come_as_before() {
            tracing::warn!("net.ipv4.ipfrag_max_dist is not put back: {error}");
        }
        freeze::thaw().about("freeze")
    }

    fn begin_guard(&mut self, run: &str, zones: &BTreeMap<String, BTreeSet<u16>>, terms: Terms) -> Result<Guarded> {
        let hook = self.freeze()?.hook();
        let policies = dpfreeze::conntrack::timeout_policies().about("conntrack timeout policies")?;
        let guarded = guard::begin(run, hook, zones, &policies, terms).map_err(guard_error)?;
        self.guard_refused = Some(refused_by_guard()?);
        Ok(guarded)
    }

    fn widen_guard(&mut self, run: &str) -> Result<Guarded> {
        let hook = self.freeze()?.hook();
        guard::widen(run, hook).map_err(guard_error)
    }

    fn withdraw_guard(&mut self, run: &str) -> Result<()> {
        if let Some(before) = self.guard_refused.take() {
            // Where it is the last run's, its counter goes with it.
            self.refused_before.ct_timeout_del += refused_by_guard()?.saturating_sub(before);
        }
        guard::withdraw(run).map_err(guard_error)
    }

    fn prepare_park(&mut self, old: ProcessId) -> Result<()> {
        let dp = self.dp()?;
        let binding = Binding::of(&mut self.ovs, &dp).about(DATAPATH)?;
        let port_ids = binding.port_ids();
        let mut park = Park::open(self.limits).about("parking sockets")?;
        let pid = number(old)?;
        let adopted = park.adopt(pid, &port_ids).about("upcall sockets of the old ovs-vswitchd")?;
        let adopted: HashSet<u32> = adopted.into_iter().collect();
        if let Some(stray) = port_ids.iter().find(|id| **id != 0 && !adopted.contains(id)) {
            return Err(HostError::new(
                "upcall sockets of the old ovs-vswitchd",
                format!("port id {stray}, which the datapath is bound to, is not a socket of process {pid}"),
            )
            .remedy("is a second ovs-vswitchd running?"));
        }
        self.drain = Some(DrainWatch::new(pid, &port_ids));
        self.old = Some(old);
        self.returned_to = Some(binding);
        self.park = Some(park);
        Ok(())
    }

    fn take_upcalls(&mut self) -> Result<()> {
        if self.park.is_none() {
            // The old daemon has ended by itself before its sockets could be adopted.
            self.park = Some(Park::open(self.limits).about("parking sockets")?);
        }
        if let Err(error) = fragments::may_come_in_any_order() {
            tracing::warn!("net.ipv4.ipfrag_max_dist stays, and a replay may cost datagrams of fragments: {error}");
        }
        let port_ids = self.park()?.port_ids();
        let dp = self.dp()?;
        binding::take(&mut self.ovs, &dp, &port_ids).about(DATAPATH)?;
        self.goes_to = GoesTo::Us;
        Ok(())
    }

    fn return_upcalls(&mut self) -> Result<()> {
        if self.park.is_none() {
            return Ok(());
        }
        if let Some(binding) = self.returned_to.clone() {
            let dp = self.dp()?;
            binding.put_back(&mut self.ovs, &dp).about(DATAPATH)?;
            self.goes_to = GoesTo::Given(binding.port_ids());
        }
        if let Some(old) = self.old {
            self.return_parked(old, Instant::now() + RETURN_LIMIT)?;
        }
        self.park = None;
        self.chosen = None;
        self.bound = None;
        Ok(())
    }

    fn bind_upcalls(&mut self, features: Option<u32>, port_ids: &[u32]) -> Result<()> {
        let dp = self.dp()?;
        binding::give(&mut self.ovs, &dp, features, port_ids).about(DATAPATH)?;
        self.goes_to = GoesTo::Given(port_ids.to_vec());
        Ok(())
    }

    fn follow(&mut self, daemon: ProcessId) -> Result<()> {
        let dp = self.dp()?;
        if dp.dispatch() == Dispatch::PerVport {
            return Ok(());
        }
        let vports = self.ovs.vports(dp.ifindex).about(DATAPATH)?;
        match own_ports(number(daemon)?, &vports)? {
            Some(_) => binding::dispatch_per_vport(&mut self.ovs, &dp).about(DATAPATH),
            None => Ok(()),
        }
    }

    fn kept(&mut self) -> Result<Vec<(&'static str, BorrowedFd<'_>)>> {
        self.park.as_mut().map_or(Ok(Vec::new()), Park::keep).about("parking sockets")
    }

    fn take_up_park(&mut self, kept: Vec<(String, OwnedFd)>) -> Result<()> {
        self.park = Some(Park::resume(self.limits, kept).about("parked packets of a supervisor that died")?);
        self.goes_to = GoesTo::Us;
        Ok(())
    }

    fn return_parked(&mut self, daemon: ProcessId, until: Instant) -> Result<ReplayReport> {
        if self.park.is_none() {
            return Ok(ReplayReport::default());
        }
        let port_ids = self.upcall_port_ids()?;
        // The daemon knows its own recirculation ids and reads its own sockets: all goes back as it came.
        self.park()?.release_adopted();
        let reader = raised(number(daemon)?, &port_ids, self.limits)?;
        let replayed = give_back(&mut self.park, &Origins::living(), &reader, until)?;
        self.park = None;
        Ok(replayed)
    }

    fn is_drained(&mut self) -> Result<bool> {
        match &mut self.drain {
            Some(watch) => watch.idle().about("the old ovs-vswitchd"),
            None => Err(HostError::new("the old ovs-vswitchd", "its upcalls have not been taken over")),
        }
    }

    fn undrained(&self) -> String {
        self.drain.as_ref().map(|watch| watch.held_up_by()).unwrap_or_default()
    }

    fn read_left_over(&mut self) -> Result<()> {
        // Per vport the old daemon may have bound a new port, or all of them anew, until its end.
        if self.dp()?.dispatch() == Dispatch::PerVport && self.park.is_some() {
            self.take_upcalls()?;
        }
        self.park()?.read_adopted().about("what the old ovs-vswitchd left unread")
    }

    fn park_stats(&self) -> ParkStats {
        self.park.as_ref().map(Park::stats).unwrap_or_default()
    }

    fn make_room_for_probes(&mut self) -> Result<u64> {
        let Some(dp) = self.ovs.datapath(DATAPATH).about(DATAPATH)? else { return Ok(0) };
        Ok(self.ovs.make_room_for_probes(dp.ifindex).about("meters of the datapath")? as u64)
    }

    fn remove_left_probes(&mut self) -> Result<u64> {
        let Some(dp) = self.ovs.datapath(DATAPATH).about(DATAPATH)? else { return Ok(0) };
        park::remove_left_probes(&mut self.ovs, dp.ifindex).about(DATAPATH)
    }

    fn choose_doomed(&mut self) -> Result<()> {
        let dp = self.dp()?;
        self.chosen = Some(Choice::Made(Chosen::now(&mut self.ovs, dp.ifindex, &self.before).about(DATAPATH)?));
        Ok(())
    }

    fn choose_doomed_meanwhile(&mut self) -> Result<()> {
        let ifindex = self.dp()?.ifindex;
        let before = self.before.clone();
        let choose = move || Chosen::now(&mut Ovs::open()?, ifindex, &before);
        let thread = std::thread::Builder::new().name("flows".into()).spawn(choose);
        self.chosen = Some(Choice::Making(thread.about(DATAPATH)?));
        Ok(())
    }

    fn remove_doomed(&mut self) -> Result<&RemovalReport> {
        let ifindex = self.dp()?.ifindex;
        let chosen = match self.chosen.take().and_then(Choice::made) {
            Some(chosen) => chosen,
            None => Chosen::now(&mut self.ovs, ifindex, &self.before).about(DATAPATH)?,
        };
        let report = park::remove_doomed(&mut self.ovs, ifindex, chosen).about(DATAPATH)?;
        Ok(self.removed.insert(report))
    }

    fn removed(&self) -> Option<&RemovalReport> {
        self.removed.as_ref()
    }

    fn prepare_hand_over(&mut self, to: &Captured) -> Result<()> {
        if to.dispatch == Dispatch::PerVport {
            // It has no sockets before it may bind them.
            return Ok(());
        }
        self.bound = Some(raised(to.process.tgid, &to.port_ids, self.limits)?);
        Ok(())
    }

    fn hand_over(&mut self, to: &Captured, until: Instant) -> Result<HandedOver> {
        let reader = match (self.bound.take(), to.dispatch) {
            (Some(reader), _) => reader,
            (None, Dispatch::PerCpu) => raised(to.process.tgid, &to.port_ids, self.limits)?,
            (None, Dispatch::PerVport) => {
                let port_ids = self.wait_for_ports(to.process.tgid, until)?;
                raised(to.process.tgid, &port_ids, self.limits)?
            }
        };
        let dp = self.dp()?;
        let origins = Origins::of(dump(&self.removed, &self.chosen));
        if to.dispatch == Dispatch::PerCpu {
            let features = to.features.unwrap_or(dp.user_features);
            self.ovs.set_per_cpu_pids(&dp, features, &to.port_ids).about(DATAPATH)?;
            self.goes_to = GoesTo::Given(to.port_ids.clone());
        }
        let bound = Instant::now();
        let reader = self.bound.insert(reader);
        let replay = give_back(&mut self.park, &origins, reader, until)?;
        Ok(HandedOver { bound, replay })
    }

    fn make_room(&mut self, daemon: ProcessId) -> Result<()> {
        let port_ids = self.upcall_port_ids()?;
        raised(number(daemon)?, &port_ids, self.limits).map(drop)
    }

    fn replay_to(&mut self, daemon: ProcessId, until: Instant) -> Result<ReplayReport> {
        self.follow(daemon)?;
        let port_ids = self.upcall_port_ids()?;
        let reader = raised(number(daemon)?, &port_ids, self.limits)?;
        self.chosen = self.chosen.take().and_then(Choice::made).map(Choice::Made);
        let origins = Origins::of(dump(&self.removed, &self.chosen));
        give_back(&mut self.park, &origins, self.bound.insert(reader), until)
    }

    fn retake_upcalls(&mut self) -> Result<bool> {
        if self.bound.is_none() {
            return Ok(false);
        }
        self.take_upcalls()?;
        if let (Some(bound), Some(park)) = (self.bound.take(), &mut self.park) {
            park.adopt_duplicates(bound).about("upcall sockets of the new ovs-vswitchd")?;
            park.read_adopted().about("what the new ovs-vswitchd left unread")?;
        }
        Ok(true)
    }

    fn delete_stale_ports(&mut self, ports: &[Port], wanted: &[String]) -> Result<Vec<String>> {
        let dp = self.dp()?;
        let vports = self.ovs.vports(dp.ifindex).about(DATAPATH)?;
        let mut deleted = Vec::new();
        for vport in vports.iter().filter(|vport| is_stale(vport, ports, &self.stale_tunnels, wanted)) {
            let about = || format!("port {}", vport.name);
            self.ovs.vport_del(dp.ifindex, vport.port_no).about(about())?;
            if tunnel::is_backer(&vport.name) {
                // Its device is Open vSwitch's own, and taken out of the datapath it is nobody's.
                tunnel::delete_device(&vport.name).about(about())?;
            }
            deleted.push(vport.name.clone());
        }
        Ok(deleted)
    }
}

/// Should this port have been deleted by the daemon, and does nobody want it?
fn is_stale(vport: &Vport, ports: &[Port], tunnels: &[String], wanted: &[String]) -> bool {
    let is_it = |port: &Port| match port {
        Port::Number(number) => *number == vport.port_no,
        Port::Name(name) => *name == vport.name,
    };
    let asked_for = ports.iter().any(is_it) || tunnels.contains(&vport.name);
    asked_for && vport.name != DATAPATH && !wanted.contains(&vport.name)
}

/// The port ids that these ports are bound to, if `pid` reads all of them.
fn own_ports(pid: u32, vports: &[Vport]) -> Result<Option<Vec<u32>>> {
    let wanted = binding::port_ids_of(vports);
    let own = Duplicates::of(pid, &wanted).about("upcall sockets of the ovs-vswitchd")?.port_ids();
    Ok(binding::ports_are_bound_to(vports, &own).then_some(wanted))
}

/// The sockets that the daemon `pid` reads, with room for what is parked.
fn raised(pid: u32, port_ids: &[u32], limits: ParkLimits) -> Result<Duplicates> {
    let object = "upcall sockets of the ovs-vswitchd";
    let reader = Duplicates::of(pid, port_ids).about(object)?;
    reader.raise_buffers(limits.socket_bytes).about(object)?;
    Ok(reader)
}

/// Which flows cannot survive.
enum Choice {
    Made(Chosen),
    /// By a thread, while the run waits for the new daemon.
    Making(JoinHandle<dpfreeze::Result<Chosen>>),
}

impl Choice {
    /// Waits for it. None where it failed: it can be made anew.
    fn made(self) -> Option<Chosen> {
        let thread = match self {
            Choice::Made(chosen) => return Some(chosen),
            Choice::Making(thread) => thread,
        };
        match thread.join() {
            Ok(Ok(chosen)) => Some(chosen),
            Ok(Err(error)) => {
                tracing::warn!("dumping kernel flows: {error}");
                None
            }
            Err(_) => {
                tracing::error!("dumping kernel flows: a thread of ours panicked");
                None
            }
        }
    }
}

/// The flow table as it was before anything was removed from it.
fn dump<'a>(removed: &'a Option<RemovalReport>, chosen: &'a Option<Choice>) -> &'a [Flow] {
    match (removed, chosen) {
        (Some(removed), _) => &removed.dump,
        (None, Some(Choice::Made(chosen))) => chosen.dump(),
        (None, Some(Choice::Making(_)) | None) => &[],
    }
}

fn give_back(
    park: &mut Option<Park>,
    origins: &Origins<'_>,
    daemon: &Duplicates,
    until: Instant,
) -> Result<ReplayReport> {
    let limit = until.saturating_duration_since(Instant::now());
    match park {
        Some(park) => park.replay(&ReplayInput { origins, daemon, limit }).about("parked packets"),
        None => Ok(ReplayReport::default()),
    }
}

fn refused_by_guard() -> Result<u64> {
    match PolicyGuard::open().about("guard of timeout policies")? {
        Some(guard) => guard.refused().about("guard of timeout policies"),
        None => Ok(0),
    }
}

fn guard_error(error: anyhow::Error) -> HostError {
    HostError::new("guard of timeout policies", format_args!("{error:#}"))
}

fn number(process: ProcessId) -> Result<u32> {
    u32::try_from(process.pid).about(format!("process {}", process.pid))
}

fn known_event(event: freeze::Event) -> Option<FreezeEvent> {
    match event.kind {
        EventKind::VportDelRefused(port) => Some(FreezeEvent::VportDelRefused(port)),
        EventKind::BoundByOther { .. } => Some(FreezeEvent::BoundByOther { pid: event.sender.tgid as i32 }),
        EventKind::TooManyMessages { bytes } => {
            Some(FreezeEvent::TooManyMessages { pid: event.sender.tgid as i32, bytes })
        }
        EventKind::Captured { .. } | EventKind::Unknown(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ports_that_were_to_go_and_that_nobody_wants_are_stale() {
        let ports = [(0, DATAPATH), (1, "br0"), (2, "v1"), (3, "v2"), (4, "vxlan_sys_4789"), (5, "genev_sys_6081")];
        let vports = ports.map(|(port_no, name)| Vport { port_no, name: name.into(), ..Vport::default() });
        let stale = |port_nos: &[u32], names: &[&str], tunnels: &[&str], wanted: &[&str]| {
            let mut asked: Vec<Port> = port_nos.iter().map(|number| Port::Number(*number)).collect();
            asked.extend(names.iter().map(|name| Port::Name((*name).to_owned())));
            let [tunnels, wanted] =
                [tunnels, wanted].map(|names| names.iter().map(|n| n.to_string()).collect::<Vec<_>>());
            let is_stale = |vport: &&Vport| is_stale(vport, &asked, &tunnels, &wanted);
            vports.iter().filter(is_stale).map(|vport| vport.port_no).collect::<Vec<_>>()
        };
        let wanted = ["br0", "v2", "vxlan_sys_4789"];
        assert!(stale(&[], &[], &[], &wanted).is_empty());
        assert_eq!(stale(&[0, 2, 3], &[], &[], &wanted), [2]);
        assert_eq!(stale(&[4], &[], &["vxlan_sys_4789", "genev_sys_6081"], &wanted), [5]);
        assert_eq!(stale(&[2], &[], &["genev_sys_6081"], &wanted), [2, 5]);
        assert_eq!(stale(&[], &[DATAPATH, "v1", "v2", "gone"], &[], &wanted), [2], "refused by name");
    }

    #[test]
    fn what_the_freeze_saw_is_passed_on() {
        let sender = freeze::ProcessId { tgid: 42, start_time: 7 };
        let known = |kind| known_event(freeze::Event { at: Duration::ZERO, sender, ifindex: 3, kind });
        for port in [Port::Number(2), Port::Name("v1".into())] {
            assert_eq!(known(EventKind::VportDelRefused(port.clone())), Some(FreezeEvent::VportDelRefused(port)));
        }
        let told = known(EventKind::TooManyMessages { bytes: 9000 });
        assert_eq!(told, Some(FreezeEvent::TooManyMessages { pid: 42, bytes: 9000 }));
        assert_eq!(known(EventKind::Unknown(77)), None);
    }
}

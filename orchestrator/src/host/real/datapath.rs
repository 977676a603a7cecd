//! The kernel datapath of this machine, through dpfreeze.

use std::time::{Duration, Instant};

use dpfreeze::freeze::{self, CanaryCommand, Captured, Classes, EventKind, Families, Freeze, Refused, Renewal, Scope};
use dpfreeze::ovs::{Datapath as Dp, Dispatch, Flow, Ovs};
use dpfreeze::park::{
    self, DrainWatch, Duplicates, Origins, Park, ParkLimits, ParkStats, RemovalReport, ReplayInput, ReplayReport,
};
use dpfreeze::snapshot::{self, Snapshot};
use dpfreeze::tunnel::{Adoption, Guard};

use crate::host::datapath::{Datapath, FreezeEvent, Lease, DATAPATH};
use crate::host::{Context, HostError, ProcessId, Result};

/// How long the replay to the old daemon may take, when a run is undone.
const RETURN_LIMIT: Duration = Duration::from_secs(10);

/// The datapath of this machine.
pub struct KernelDatapath {
    ovs: Ovs,
    limits: ParkLimits,
    freeze: Option<Freeze>,
    park: Option<Park>,
    returned_to: Vec<u32>,
    before: Vec<Flow>,
    dump: Option<Vec<Flow>>,
    removed: Option<RemovalReport>,
    drain: Option<DrainWatch>,
    adoption: Option<Adoption>,
    bound: Option<(u32, Vec<u32>)>,
}

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
            returned_to: Vec::new(),
            before: Vec::new(),
            dump: None,
            removed: None,
            drain: None,
            adoption: None,
            bound: None,
        })
    }

    fn dp(&mut self) -> Result<Dp> {
        self.ovs
            .datapath(DATAPATH)
            .about(DATAPATH)?
            .ok_or_else(|| HostError::new(DATAPATH, "there is no such datapath").remedy("start Open vSwitch first"))
    }

    fn bind(&mut self, features: Option<u32>, port_ids: &[u32]) -> Result<()> {
        let dp = self.dp()?;
        // A DP_SET without USER_FEATURES would zero them.
        let features = features.unwrap_or(dp.user_features);
        self.ovs.set_per_cpu_pids(&dp, features, port_ids).about(DATAPATH)
    }

    fn freeze(&mut self) -> Result<&mut Freeze> {
        self.freeze.as_mut().ok_or_else(|| HostError::new("freeze", "it is not loaded"))
    }

    fn park(&mut self) -> Result<&mut Park> {
        self.park.as_mut().ok_or_else(|| HostError::new("parking sockets", "they are not open"))
    }

    fn families(&self) -> Families {
        let known = self.ovs.families();
        Families {
            datapath: known.datapath,
            vport: known.vport,
            flow: known.flow,
            meter: known.meter.unwrap_or_default(),
        }
    }
}

impl Datapath for KernelDatapath {
    fn snapshot(&mut self) -> Result<Snapshot> {
        let snapshot = snapshot::capture(&mut self.ovs).about(DATAPATH)?;
        if self.dump.is_none() {
            self.before = snapshot.datapath(DATAPATH).map(|dp| dp.flows.clone()).unwrap_or_default();
        }
        Ok(snapshot)
    }

    fn upcall_port_ids(&mut self) -> Result<Vec<u32>> {
        let dp = self.dp()?;
        match dp.dispatch() {
            Dispatch::PerCpu => Ok(dp.per_cpu_pids),
            Dispatch::PerVport => {
                let vports = self.ovs.vports(dp.ifindex).about(DATAPATH)?;
                let mut ids: Vec<u32> = vports.into_iter().flat_map(|vport| vport.upcall_pids).collect();
                ids.sort_unstable();
                ids.dedup();
                Ok(ids)
            }
        }
    }

    fn dispatches_per_cpu(&mut self) -> Result<bool> {
        Ok(self.dp()?.dispatch() == Dispatch::PerCpu)
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
        let scope = Scope::here(&[dp.ifindex], &names, self.families()).about("freeze")?;
        freeze.arm(&scope, classes, lease.lease, lease.end).about("freeze")?;
        self.freeze = Some(freeze);
        Ok(())
    }

    fn is_armed(&self) -> bool {
        self.freeze.is_some()
    }

    fn refuse(&mut self, classes: Classes) -> Result<()> {
        self.freeze()?.set_classes(classes).about("freeze")
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

    fn adopt_tunnels(&mut self, standby: ProcessId) -> Result<()> {
        let dp = self.dp()?;
        let guard = Guard::read(&mut self.ovs, dp.ifindex).about("tunnel ports")?;
        if !guard.backers.is_empty() {
            let adoption = Adoption::attach(standby.pid, standby.start_time, guard).about("tunnel ports")?;
            self.adoption = Some(adoption);
        }
        Ok(())
    }

    fn tunnels_adopted(&mut self, patience: Duration) -> Result<Vec<String>> {
        let Some(adoption) = self.adoption.take() else { return Ok(Vec::new()) };
        adoption.wait(patience);
        let report = adoption.finish();
        Ok(report.failed)
    }

    fn captured(&mut self) -> Result<Option<Captured>> {
        self.freeze()?.captured().about("upcall binding of the new ovs-vswitchd")
    }

    fn refused(&mut self) -> Result<Refused> {
        match &self.freeze {
            Some(freeze) => freeze.refused().about("freeze"),
            None => Ok(Refused::default()),
        }
    }

    fn events(&mut self) -> Result<Vec<FreezeEvent>> {
        let events = self.freeze()?.events().about("freeze")?;
        Ok(events.into_iter().filter_map(known_event).collect())
    }

    fn thaw(&mut self) -> Result<()> {
        self.freeze = None;
        freeze::thaw().about("freeze")
    }

    fn prepare_park(&mut self, old: ProcessId) -> Result<()> {
        let port_ids = self.upcall_port_ids()?;
        let mut park = Park::open(self.limits).about("parking sockets")?;
        let pid = number(old)?;
        let adopted = park.adopt(pid, &port_ids).about("upcall sockets of the old ovs-vswitchd")?;
        if let Some(stray) = port_ids.iter().find(|id| **id != 0 && !adopted.contains(id)) {
            return Err(HostError::new(
                "upcall sockets of the old ovs-vswitchd",
                format!("port id {stray}, which the datapath is bound to, is not a socket of process {pid}"),
            )
            .remedy("is a second ovs-vswitchd running?"));
        }
        self.drain = Some(DrainWatch::new(pid, &port_ids));
        self.bound = Some((pid, port_ids.clone()));
        self.returned_to = port_ids;
        self.park = Some(park);
        Ok(())
    }

    fn take_upcalls(&mut self) -> Result<()> {
        let port_ids = self.park()?.port_ids();
        self.bind(None, &port_ids)
    }

    fn return_upcalls(&mut self) -> Result<()> {
        if self.park.is_none() {
            return Ok(());
        }
        let port_ids = self.returned_to.clone();
        self.bind(None, &port_ids)?;
        // The old daemon knows its own recirculation ids and reads its own sockets: all goes back as it came.
        self.park()?.release_adopted();
        self.choose_doomed()?;
        self.replay(Instant::now() + RETURN_LIMIT)?;
        self.park = None;
        self.dump = None;
        Ok(())
    }

    fn is_drained(&mut self) -> Result<bool> {
        match &mut self.drain {
            Some(watch) => watch.idle().about("the old ovs-vswitchd"),
            None => Err(HostError::new("the old ovs-vswitchd", "its upcalls have not been taken over")),
        }
    }

    fn read_left_over(&mut self) -> Result<()> {
        self.park()?.read_adopted().about("what the old ovs-vswitchd left unread")
    }

    fn park_stats(&self) -> ParkStats {
        self.park.as_ref().map(Park::stats).unwrap_or_default()
    }

    fn choose_doomed(&mut self) -> Result<()> {
        let dp = self.dp()?;
        self.dump = Some(self.ovs.flows(dp.ifindex).about(DATAPATH)?);
        Ok(())
    }

    fn remove_doomed(&mut self) -> Result<&RemovalReport> {
        let dp = self.dp()?;
        let report = park::remove_doomed(&mut self.ovs, dp.ifindex, &self.before, self.dump.take()).about(DATAPATH)?;
        Ok(self.removed.insert(report))
    }

    fn removed(&self) -> Option<&RemovalReport> {
        self.removed.as_ref()
    }

    fn hand_over(&mut self, to: &Captured) -> Result<()> {
        self.bind(to.features, &to.port_ids)?;
        self.bound = Some((to.process.tgid, to.port_ids.clone()));
        Ok(())
    }

    fn bound_by_itself(&mut self, daemon: ProcessId) -> Result<()> {
        let port_ids = self.upcall_port_ids()?;
        self.bound = Some((number(daemon)?, port_ids));
        Ok(())
    }

    fn replay(&mut self, until: Instant) -> Result<ReplayReport> {
        let dump = self.removed.as_ref().map(|removed| &removed.dump).or(self.dump.as_ref());
        let origins = Origins::of(dump.into_iter().flatten());
        let daemon = match &self.bound {
            Some((pid, port_ids)) => Duplicates::of(*pid, port_ids).about("upcall sockets of the ovs-vswitchd")?,
            None => return Err(HostError::new("parked packets", "no daemon is bound to the upcalls")),
        };
        let limit = until.saturating_duration_since(Instant::now());
        let input = ReplayInput { origins: &origins, daemon: &daemon, limit };
        match &mut self.park {
            Some(park) => park.replay(&input).about("parked packets"),
            None => Err(HostError::new("parked packets", "nothing was parked")),
        }
    }

    fn delete_stale_ports(&mut self, port_nos: &[u32], wanted: &[String]) -> Result<Vec<String>> {
        let dp = self.dp()?;
        let vports = self.ovs.vports(dp.ifindex).about(DATAPATH)?;
        let mut deleted = Vec::new();
        for vport in vports.iter().filter(|vport| port_nos.contains(&vport.port_no)) {
            if vport.name == DATAPATH || wanted.contains(&vport.name) {
                continue;
            }
            self.ovs.vport_del(dp.ifindex, vport.port_no).about(format!("port {}", vport.name))?;
            deleted.push(vport.name.clone());
        }
        Ok(deleted)
    }
}

fn number(process: ProcessId) -> Result<u32> {
    u32::try_from(process.pid).about(format!("process {}", process.pid))
}

fn known_event(event: freeze::Event) -> Option<FreezeEvent> {
    match event.kind {
        EventKind::VportDelRefused(freeze::Port::Number(port_no)) => Some(FreezeEvent::VportDelRefused { port_no }),
        EventKind::BoundByOther { .. } => Some(FreezeEvent::BoundByOther { pid: event.sender.tgid as i32 }),
        _ => None,
    }
}

//! The kernel's datapath of the simulated host, as one supervisor has it open.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use dpfreeze::conntrack::{limit, TimeoutPolicy};
use dpfreeze::devices::Policer;
use dpfreeze::freeze::{Captured, Classes, KeptQdisc, Port, Refused, Skipped};
use dpfreeze::ovs::Dispatch;
use dpfreeze::ovs::{Datapath as Dp, Flow, FlowCounts, ZoneLimit};
use dpfreeze::park::{ParkStats, RemovalReport, ReplayReport};
use dpfreeze::snapshot::{DatapathSnapshot, Snapshot};

use super::world::{Frost, Process, World, POLICY_S};
use super::Sim;
use crate::guard::{Guarded, Terms};
use crate::host::datapath::{Datapath, FreezeEvent, GoesTo, HandedOver, Lease, DATAPATH};
use crate::host::{HostError, ProcessId, Result};

/// The kernel takes so long to remove flows, grace periods included.
const REMOVAL: Duration = Duration::from_millis(20);

pub(super) struct SimDatapath {
    sim: Sim,
    /// This process has the freeze open.
    open: bool,
    returned_to: Vec<u32>,
    handed_over: bool,
    goes_to: GoesTo,
    old: Option<ProcessId>,
    removed: Option<RemovalReport>,
    /// What freezes that were lifted had refused.
    refused_before: Refused,
    /// How often the kernel passed over those.
    skipped_before: Skipped,
}

impl SimDatapath {
    pub(super) fn new(sim: &Sim) -> SimDatapath {
        SimDatapath {
            sim: sim.clone(),
            open: false,
            returned_to: Vec::new(),
            handed_over: false,
            goes_to: GoesTo::TheDaemon,
            old: None,
            removed: None,
            refused_before: Refused::default(),
            skipped_before: Skipped::default(),
        }
    }

    /// With the freeze that this process has open.
    fn frozen<T>(&self, name: &'static str, mut effect: impl FnMut(&mut Frost, Duration) -> Result<T>) -> Result<T> {
        let open = self.open;
        self.sim.operate(name, None, |world| {
            let now = world.time;
            match world.kernel.frost.as_mut().filter(|_| open) {
                Some(frost) => effect(frost, now),
                None => Err(HostError::new("freeze", "it is not loaded")),
            }
        })
    }
}

/// The flows of the kernel, by what they do.
fn flows(world: &World) -> Vec<Flow> {
    // struct nlattr: OVS_ACTION_ATTR_OUTPUT (1) to port 1, OVS_ACTION_ATTR_RECIRC (7) to id 5 (openvswitch.h).
    let kinds = [
        (world.kernel.established, 1, [8, 0, 1, 0, 1, 0, 0, 0]),
        (world.kernel.recirculating, 2, [8, 0, 7, 0, 5, 0, 0, 0]),
    ];
    let there = kinds.into_iter().filter(|(owner, ..)| owner.is_some());
    there.map(|(_, id, actions)| Flow { ufid: Some([id; 16]), actions: actions.to_vec(), ..Flow::default() }).collect()
}

fn reads(world: &World, daemon: ProcessId, port_ids: &[u32]) -> Result<()> {
    match world.reader(port_ids).is_some_and(|reader| reader.id == daemon) {
        true => Ok(()),
        false => Err(HostError::new("upcall sockets", format!("they are not those of process {}", daemon.pid))),
    }
}

/// Does it have handler threads? It has been told to bind, whatever came of that.
fn waits_for_upcalls(world: &World, process: &Process) -> bool {
    process.opened || process.refused || process.port_ids.iter().any(|id| world.kernel.bound.contains(id))
}

impl Datapath for SimDatapath {
    fn is_there(&mut self) -> Result<bool> {
        Ok(!self.sim.look().kernel.no_datapath)
    }

    fn snapshot(&mut self) -> Result<Snapshot> {
        self.sim.operate("datapath.snapshot", None, |world| {
            let datapath = Dp { ifindex: 1, name: DATAPATH.into(), ..Dp::default() };
            let all = DatapathSnapshot { datapath, flows: flows(world), ..DatapathSnapshot::default() };
            Ok(Snapshot { datapaths: vec![all], ..Snapshot::default() })
        })
    }

    fn flow_counts(&mut self) -> Result<FlowCounts> {
        self.sim.operate("datapath.flow_counts", None, |world| {
            let lacking = std::mem::take(&mut world.kernel.table_made_anew);
            Ok(flows(world).into_iter().filter(|_| !lacking).collect())
        })
    }

    fn timeout_policies(&mut self) -> Result<Vec<TimeoutPolicy>> {
        self.sim.operate("datapath.timeout_policies", None, |world| {
            let policy = |number| {
                TimeoutPolicy { name: format!("ovs_tp_{number}_udp4"), l3: 2, l4: 17, ..TimeoutPolicy::default() }
                    .with_timeouts([(limit::UDP_UNREPLIED, POLICY_S)])
            };
            Ok((0..world.kernel.policies).map(policy).collect())
        })
    }

    fn set_ct_limits(&mut self, _limits: &[ZoneLimit]) -> Result<()> {
        self.sim.operate("datapath.set_ct_limits", None, |_| Ok(()))
    }

    fn reopen(&mut self) -> Result<()> {
        self.sim.operate("datapath.reopen", None, |_| Ok(()))
    }

    fn begin_guard(&mut self, _run: &str, _zones: &BTreeMap<String, BTreeSet<u16>>, _terms: Terms) -> Result<Guarded> {
        self.sim.operate("datapath.begin_guard", None, |_| Ok(Guarded { policies: 0, connections: 0 }))
    }

    fn widen_guard(&mut self, _run: &str) -> Result<Guarded> {
        self.sim.operate("datapath.widen_guard", None, |_| Ok(Guarded { policies: 0, connections: 0 }))
    }

    fn withdraw_guard(&mut self, _run: &str) -> Result<()> {
        self.sim.operate("datapath.withdraw_guard", None, |_| Ok(()))
    }

    fn make_room_for_probes(&mut self) -> Result<u64> {
        self.sim.operate("datapath.make_room_for_probes", None, |_world| Ok(0))
    }

    fn remove_left_probes(&mut self) -> Result<u64> {
        self.sim.operate("datapath.remove_left_probes", None, |world| {
            Ok(u64::from(std::mem::take(&mut world.kernel.left_probe)))
        })
    }

    fn retake_upcalls(&mut self) -> Result<bool> {
        if !std::mem::take(&mut self.handed_over) {
            return Ok(false);
        }
        self.sim.operate("datapath.retake_upcalls", None, |world| {
            open_park(world);
            let park = world.kernel.park.clone().unwrap_or_default();
            world.bind(park);
            Ok(())
        })?;
        self.goes_to = GoesTo::Us;
        Ok(true)
    }

    fn upcall_port_ids(&mut self) -> Result<Vec<u32>> {
        let (goes_to, old, open) = (self.goes_to.clone(), self.old, self.open);
        self.sim.operate("datapath.upcall_port_ids", None, |world| {
            if !world.variant.untold {
                return Ok(world.kernel.bound.clone());
            }
            let refused =
                open && world.kernel.frost.as_ref().is_some_and(|one| one.classes.contains(Classes::UPCALL_BIND));
            let waiting = world.processes.values().filter(|one| Some(one.id) != old && waits_for_upcalls(world, one));
            let mut theirs: Vec<Vec<u32>> = waiting.map(|one| one.port_ids.clone()).collect();
            goes_to.port_ids(world.kernel.park.clone(), refused || old.is_none(), || match theirs.len() {
                0 | 1 => Ok(theirs.pop().unwrap_or_default()),
                _ => Err(HostError::new("ovs-vswitchd", "several of them have sockets for upcalls")),
            })
        })
    }

    fn port_ids_waited_for(&mut self, daemon: ProcessId) -> Result<Vec<u32>> {
        self.sim.operate("datapath.port_ids_waited_for", None, |world| {
            let process = world.processes.get(&daemon.pid).filter(|process| waits_for_upcalls(world, process));
            Ok(process.map(|process| process.port_ids.clone()).unwrap_or_default())
        })
    }

    fn tells_upcalls(&mut self) -> Result<bool> {
        Ok(!self.sim.look().variant.untold)
    }

    fn dispatches_per_cpu(&mut self) -> Result<bool> {
        self.sim.operate("datapath.dispatches_per_cpu", None, |world| Ok(!world.variant.per_vport))
    }

    fn prove_freeze(&mut self) -> Result<()> {
        self.sim.operate("datapath.prove_freeze", None, |_| Ok(()))
    }

    fn arm(&mut self, classes: Classes, lease: Lease) -> Result<()> {
        self.sim.operate_in_parts(
            "datapath.arm",
            None,
            |world| {
                let nothing = Lease { lease: Duration::ZERO, end: Duration::ZERO };
                world.kernel.frost = Some(frost(world, Classes::empty(), nothing));
            },
            |world| {
                world.kernel.frost = Some(frost(world, classes, lease));
                Ok(())
            },
        )?;
        self.open = true;
        Ok(())
    }

    fn take_up_freeze(&mut self) -> Result<bool> {
        self.open = self.sim.operate("datapath.take_up_freeze", None, |world| Ok(world.kernel.frost.is_some()))?;
        Ok(self.open)
    }

    fn is_armed(&self) -> bool {
        self.open
    }

    fn refuse(&mut self, classes: Classes) -> Result<()> {
        self.frozen("datapath.refuse", |frost, _| {
            frost.classes = classes;
            Ok(())
        })
    }

    fn renew(&mut self, lease: Duration) -> Result<()> {
        let mut world = self.sim.look();
        let now = world.time;
        match &mut world.kernel.frost {
            Some(frost) if now < frost.lease && now < frost.end => {
                frost.lease = now + lease;
                Ok(())
            }
            Some(_) => Err(HostError::new("freeze", "its lease ran out before the next step of the run")),
            None => Err(HostError::new("freeze", "somebody lifted it")),
        }
    }

    fn watch_standby(&mut self, standby: ProcessId) -> Result<()> {
        if !self.open {
            return Ok(());
        }
        self.frozen("datapath.watch_standby", |frost, _| {
            frost.standby = Some(standby);
            Ok(())
        })
    }

    fn keep_qdiscs(&mut self, kept: &[(u32, KeptQdisc)]) -> Result<()> {
        if !self.open {
            return Ok(());
        }
        self.frozen("datapath.keep_qdiscs", |frost, _| {
            frost.kept = kept.to_vec();
            Ok(())
        })
    }

    fn adopt(&mut self, standby: ProcessId, tunnels: bool, policed: &[Policer]) -> Result<()> {
        self.sim.operate("datapath.adopt", None, |world| match world.processes.get_mut(&standby.pid) {
            Some(process) => {
                process.watched = tunnels;
                process.polices = !policed.is_empty();
                Ok(())
            }
            None => Err(HostError::new("tunnel ports", "the daemon has ended")),
        })
    }

    fn adopted(&mut self, _patience: Duration) -> Result<Vec<String>> {
        self.sim.operate("datapath.adopted", None, |_| Ok(Vec::new()))
    }

    fn captured(&mut self) -> Result<Option<Captured>> {
        // Polled: a fault in every look would be too many.
        let world = self.sim.look();
        if world.kernel.binds_from.is_some_and(|from| world.time < from) {
            return Err(HostError::new("freeze", "the standby keeps writing"));
        }
        match world.kernel.frost.as_ref().filter(|_| self.open) {
            Some(frost) => Ok(frost.captured.clone()),
            None => Err(HostError::new("freeze", "it is not loaded")),
        }
    }

    fn refused(&mut self) -> Result<Refused> {
        let now = self.sim.look().kernel.frost.as_ref().map(|frost| frost.refused).unwrap_or_default();
        Ok(self.refused_before.plus(now))
    }

    fn skipped(&mut self) -> Result<Skipped> {
        let now = self.sim.look().kernel.frost.as_ref().map(|frost| frost.skipped).unwrap_or_default();
        Ok(self.skipped_before.plus(now))
    }

    fn events(&mut self) -> Result<Vec<FreezeEvent>> {
        let mut world = self.sim.look();
        Ok(world.kernel.frost.as_mut().map(|frost| std::mem::take(&mut frost.events)).unwrap_or_default())
    }

    fn thaw(&mut self) -> Result<()> {
        self.open = false;
        self.handed_over = false;
        let (mut refused, mut skipped) = (Refused::default(), Skipped::default());
        let lifted = self.sim.operate("datapath.thaw", None, |world| {
            if let Some(frost) = world.kernel.frost.take() {
                refused = frost.refused;
                skipped = frost.skipped;
            }
            Ok(())
        });
        self.refused_before = self.refused_before.plus(refused);
        self.skipped_before = self.skipped_before.plus(skipped);
        lifted
    }

    fn prepare_park(&mut self, old: ProcessId) -> Result<()> {
        self.returned_to = self.sim.operate("datapath.prepare_park", None, |world| {
            let bound = world.kernel.bound.clone();
            reads(world, old, &bound)?;
            open_park(world);
            Ok(bound)
        })?;
        self.old = Some(old);
        Ok(())
    }

    fn take_upcalls(&mut self) -> Result<()> {
        self.sim.operate("datapath.take_upcalls", None, |world| {
            open_park(world);
            let park = world.kernel.park.clone().unwrap_or_default();
            world.bind(park);
            Ok(())
        })?;
        self.goes_to = GoesTo::Us;
        Ok(())
    }

    fn return_upcalls(&mut self) -> Result<()> {
        let returned_to = self.returned_to.clone();
        if returned_to.is_empty() {
            // Its opening has failed.
            self.sim.look().kernel.park = None;
            return Ok(());
        }
        self.sim.operate_in_parts(
            "datapath.return_upcalls",
            None,
            |world| world.bind(returned_to.clone()),
            |world| {
                if world.kernel.park.is_none() {
                    return Ok(());
                }
                world.bind(returned_to.clone());
                if world.reader(&returned_to).is_none() {
                    return Err(HostError::new("upcall sockets", "their owner has ended"));
                }
                world.replay();
                world.kernel.park = None;
                Ok(())
            },
        )?;
        self.goes_to = GoesTo::Given(returned_to);
        Ok(())
    }

    fn bind_upcalls(&mut self, _features: Option<u32>, port_ids: &[u32]) -> Result<()> {
        self.sim.operate("datapath.bind_upcalls", None, |world| {
            world.bind(port_ids.to_vec());
            Ok(())
        })?;
        self.goes_to = GoesTo::Given(port_ids.to_vec());
        Ok(())
    }

    fn follow(&mut self, _daemon: ProcessId) -> Result<()> {
        // One mode of dispatch is all that the model has.
        Ok(())
    }

    fn kept(&mut self) -> Result<Vec<(&'static str, BorrowedFd<'_>)>> {
        Ok(Vec::new())
    }

    fn take_up_park(&mut self, _kept: Vec<(String, OwnedFd)>) -> Result<()> {
        Ok(())
    }

    fn return_parked(&mut self, daemon: ProcessId, _until: Instant) -> Result<ReplayReport> {
        let replayed = self.sim.operate("datapath.return_parked", None, |world| {
            let bound = world.kernel.bound.clone();
            reads(world, daemon, &bound)?;
            let replayed = world.replay();
            world.kernel.park = None;
            Ok(replayed)
        })?;
        Ok(ReplayReport { replayed, ..ReplayReport::default() })
    }

    fn is_drained(&mut self) -> Result<bool> {
        Ok(self.sim.look().drained())
    }

    fn undrained(&self) -> String {
        String::new()
    }

    fn read_left_over(&mut self) -> Result<()> {
        self.sim.operate("datapath.read_left_over", None, |_| Ok(()))
    }

    fn park_stats(&self) -> ParkStats {
        ParkStats { waiting: self.sim.look().kernel.parked, ..ParkStats::default() }
    }

    fn choose_doomed(&mut self) -> Result<()> {
        self.sim.operate("datapath.choose_doomed", None, |_| Ok(()))
    }

    fn remove_doomed(&mut self) -> Result<&RemovalReport> {
        let report = self.sim.operate("datapath.remove_doomed", None, |world| {
            let dump = flows(world);
            let roots = u64::from(world.kernel.recirculating.take().is_some());
            world.pass(REMOVAL);
            Ok(RemovalReport { dump, roots, ..RemovalReport::default() })
        })?;
        Ok(self.removed.insert(report))
    }

    fn removed(&self) -> Option<&RemovalReport> {
        self.removed.as_ref()
    }

    fn prepare_hand_over(&mut self, to: &Captured) -> Result<()> {
        if to.dispatch == Dispatch::PerVport {
            return Ok(());
        }
        let daemon = ProcessId { pid: to.process.tgid as i32, start_time: to.process.start_time };
        let port_ids = to.port_ids.clone();
        self.sim.operate("datapath.prepare_hand_over", None, |world| reads(world, daemon, &port_ids))
    }

    fn hand_over(&mut self, to: &Captured, _until: Instant) -> Result<HandedOver> {
        let daemon = ProcessId { pid: to.process.tgid as i32, start_time: to.process.start_time };
        let replayed = self.sim.operate_in_parts(
            "datapath.hand_over",
            None,
            |world| {
                if to.dispatch == Dispatch::PerCpu {
                    world.bind(to.port_ids.clone());
                }
            },
            |world| {
                // Per vport it has bound its ports by itself.
                let port_ids = match to.dispatch {
                    Dispatch::PerCpu => to.port_ids.clone(),
                    Dispatch::PerVport => world.kernel.bound.clone(),
                };
                reads(world, daemon, &port_ids)?;
                world.bind(port_ids);
                Ok(world.replay())
            },
        )?;
        self.goes_to = GoesTo::Given(to.port_ids.clone());
        self.handed_over = true;
        let replay = ReplayReport { replayed, ..ReplayReport::default() };
        Ok(HandedOver { bound: self.sim.now(), replay })
    }

    fn make_room(&mut self, daemon: ProcessId) -> Result<()> {
        self.sim.operate("datapath.make_room", None, |world| {
            let bound = world.kernel.bound.clone();
            reads(world, daemon, &bound)
        })
    }

    fn replay_to(&mut self, daemon: ProcessId, _until: Instant) -> Result<ReplayReport> {
        let replayed = self.sim.operate("datapath.replay_to", None, |world| {
            let bound = world.kernel.bound.clone();
            reads(world, daemon, &bound)?;
            Ok(world.replay())
        })?;
        Ok(ReplayReport { replayed, ..ReplayReport::default() })
    }

    fn delete_stale_ports(&mut self, _ports: &[Port], _wanted: &[String]) -> Result<Vec<String>> {
        self.sim.operate("datapath.delete_stale_ports", None, |_| Ok(Vec::new()))
    }
}

fn frost(world: &World, classes: Classes, lease: Lease) -> Frost {
    Frost {
        classes,
        lease: world.time + lease.lease,
        end: world.time + lease.end,
        standby: None,
        kept: Vec::new(),
        captured: None,
        refused: Refused::default(),
        skipped: world.variant.skipped,
        events: Vec::new(),
    }
}

/// The parking sockets, with numbers that nobody else has.
fn open_park(world: &mut World) {
    if world.kernel.park.is_none() {
        let id = world.fresh_id() as u32;
        world.kernel.park = Some(vec![1_000_000 + id]);
    }
}

//! The kernel datapath as the steps see it. The bytes are dpfreeze's.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use dpfreeze::conntrack::TimeoutPolicy;
use dpfreeze::devices::Policer;
use dpfreeze::freeze::{Captured, Classes, KeptQdisc, Port, Refused, Skipped};
use dpfreeze::ovs::{FlowCounts, ZoneLimit};
use dpfreeze::park::{ParkStats, RemovalReport, ReplayReport};
use dpfreeze::snapshot::Snapshot;

use super::{ProcessId, Result};
use crate::guard::{Guarded, Terms};

/// The one datapath that OVS keeps in the kernel for all its bridges (ofproto-dpif.c, `open_dpif_backer`).
pub const DATAPATH: &str = "ovs-system";

/// What a freeze needs to know besides its classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// How long a refusal outlives the last progress.
    pub lease: Duration,
    /// How long after arming nothing is refused any more, whatever renews.
    pub end: Duration,
}

/// A hand-over that was done.
#[derive(Debug)]
pub struct HandedOver {
    /// When the new daemon was bound.
    pub bound: Instant,
    /// What became of the parked packets.
    pub replay: ReplayReport,
}

/// Something the freeze saw happen and let pass, or refused and wants repeated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FreezeEvent {
    /// The deletion of this port was refused; its sender will not try again (hazards 7).
    VportDelRefused(Port),
    /// A process other than the standby bound the upcalls (hazards 1).
    BoundByOther {
        /// Its thread group.
        pid: i32,
    },
    /// So many messages in one send that the freeze could not look at each: all of them were refused.
    TooManyMessages {
        /// The sender's thread group.
        pid: i32,
        /// The length of what it sent.
        bytes: u64,
    },
}

/// Who the upcalls go to, as far as this process has had a say in it: all there is to know where the kernel does not tell
/// ([`Datapath::tells_upcalls`]).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum GoesTo {
    /// It has had none: to the daemon that waits for them.
    #[default]
    TheDaemon,
    /// To the parking sockets, unless a daemon has bound its own since.
    Us,
    /// To these port ids.
    Given(Vec<u32>),
}

impl GoesTo {
    /// The port ids, of which `park` are those of the parking sockets and `theirs` those that a daemon waits for. A daemon
    /// waits whether its binding was refused or not: where one may have been, or nobody knows (`may_be_refused`), it is not
    /// taken for bound.
    ///
    /// # Errors
    /// Those of `theirs`.
    pub fn port_ids(
        &self,
        park: Option<Vec<u32>>,
        may_be_refused: bool,
        theirs: impl FnOnce() -> Result<Vec<u32>>,
    ) -> Result<Vec<u32>> {
        match (self, park) {
            (GoesTo::Given(port_ids), _) => Ok(port_ids.clone()),
            (GoesTo::Us, Some(park)) if may_be_refused => Ok(park),
            (GoesTo::Us, Some(park)) => Ok(Some(theirs()?).filter(|theirs| !theirs.is_empty()).unwrap_or(park)),
            (GoesTo::Us | GoesTo::TheDaemon, _) => theirs(),
        }
    }
}

/// The kernel datapath.
pub trait Datapath {
    /// Is there one at all? A daemon makes it with its first bridge and deletes it with the last.
    fn is_there(&mut self) -> Result<bool>;
    /// All of the state that can be compared after the run.
    fn snapshot(&mut self) -> Result<Snapshot>;
    /// How often each flow has matched: a small part of [`Datapath::snapshot`], and cheap.
    fn flow_counts(&mut self) -> Result<FlowCounts>;
    /// Conntrack's timeout policies: another small part.
    fn timeout_policies(&mut self) -> Result<Vec<TimeoutPolicy>>;
    /// Sets connection limits of conntrack zones.
    fn set_ct_limits(&mut self, limits: &[ZoneLimit]) -> Result<()>;
    /// The port ids that upcalls go to now: one for each CPU, or those of all ports. Where the kernel does not tell them
    /// ([`Datapath::tells_upcalls`]): those that this process has given it last, or else those that the daemon waits for.
    fn upcall_port_ids(&mut self) -> Result<Vec<u32>>;
    /// The port ids, one for each CPU, that the handler threads of `daemon` wait for: it has bound them, or was refused to.
    fn port_ids_waited_for(&mut self, daemon: ProcessId) -> Result<Vec<u32>>;
    /// Does the kernel tell which port ids upcalls go to? Linux 5.15 to 6.0 do not where they dispatch per CPU.
    fn tells_upcalls(&mut self) -> Result<bool>;
    /// Does the datapath dispatch upcalls per CPU? The alternative, per vport, comes with OVS before 2.16.
    fn dispatches_per_cpu(&mut self) -> Result<bool>;
    /// Proves with a canary that the kernel can refuse, and stops refusing when the lease ends. Changes nothing.
    fn prove_freeze(&mut self) -> Result<()>;
    /// Loads the freeze and refuses `classes` from now on, for the lease.
    fn arm(&mut self, classes: Classes, lease: Lease) -> Result<()>;
    /// Takes up the freeze that a process which has ended left behind; false where there is none.
    fn take_up_freeze(&mut self) -> Result<bool>;
    /// Asks the kernel anew who it is: the module has been taken out and put in again, and its families have other
    /// numbers.
    fn reopen(&mut self) -> Result<()>;
    /// Is there a freeze to speak of (level `full`)?
    fn is_armed(&self) -> bool;
    /// Refuses exactly `classes` from now on.
    fn refuse(&mut self, classes: Classes) -> Result<()>;
    /// Progress was made: the lease begins again, for `lease`. An error where it has run out already.
    fn renew(&mut self, lease: Duration) -> Result<()>;
    /// The process whose upcall binding is captured and refused.
    fn watch_standby(&mut self, standby: ProcessId) -> Result<()>;
    /// What that process may not delete of devices (by ifindex), while `QDISC_DEL` is refused. Does nothing without a
    /// freeze.
    fn keep_qdiscs(&mut self, kept: &[(u32, KeptQdisc)]) -> Result<()>;
    /// Lets `standby`, which has not yet taken over, find what it would delete and make anew: with `tunnels` its tunnel
    /// ports and their devices (hazards 7; docs/tunnels.md), and the policing of these devices. Does nothing where there
    /// is neither.
    fn adopt(&mut self, standby: ProcessId, tunnels: bool, policed: &[Policer]) -> Result<()>;
    /// Waits until it has, for `patience` at most, and lets it go. Returns what could not be adopted, in words.
    fn adopted(&mut self, patience: Duration) -> Result<Vec<String>>;
    /// The binding that the standby asked for, once it has; each port id is proved to be its own.
    fn captured(&mut self) -> Result<Option<Captured>>;
    /// How often what was refused, by every freeze of this run; also after the [thaw](Datapath::thaw).
    fn refused(&mut self) -> Result<Refused>;
    /// How often the kernel passed over them; also after the [thaw](Datapath::thaw).
    fn skipped(&mut self) -> Result<Skipped>;
    /// What was seen since the last call.
    fn events(&mut self) -> Result<Vec<FreezeEvent>>;
    /// Lifts every refusal and unloads the freeze; what was held of the new daemon is let go, the guard stays. May be
    /// run twice.
    fn thaw(&mut self) -> Result<()>;
    /// Keeps, for run `run` and beyond it, the timeout policies of `zones` (by name, with the zones they are used in)
    /// from being deleted while connections live under them (hazards 30). Needs a freeze that was proved.
    fn begin_guard(&mut self, run: &str, zones: &BTreeMap<String, BTreeSet<u16>>, terms: Terms) -> Result<Guarded>;
    /// Takes in the connections that have come since, under flows that still named the old policies.
    fn widen_guard(&mut self, run: &str) -> Result<Guarded>;
    /// Lets go of what `run` has begun to guard. May be run twice.
    fn withdraw_guard(&mut self, run: &str) -> Result<()>;

    /// Opens the parking sockets and keeps duplicates of those that `old` reads.
    fn prepare_park(&mut self, old: ProcessId) -> Result<()>;
    /// Binds the upcalls to the parking sockets, which are opened now where they are not yet.
    fn take_upcalls(&mut self) -> Result<()>;
    /// Binds the upcalls to the port ids they had before [`Datapath::take_upcalls`] and lets the parked packets go
    /// to their owner. May be run twice.
    fn return_upcalls(&mut self) -> Result<()>;
    /// Binds the upcalls to these port ids, one for each CPU or all of them for each port; `features` as the datapath has them where not given. The
    /// caller has proved whose they are.
    fn bind_upcalls(&mut self, features: Option<u32>, port_ids: &[u32]) -> Result<()>;
    /// Where `daemon` has bound every port by itself and the kernel dispatches per CPU, it dispatches per vport from now
    /// on. Else nothing.
    fn follow(&mut self, daemon: ProcessId) -> Result<()>;
    /// What must outlive this process, with names ([`ServiceManager::keep`](crate::host::ServiceManager::keep)): the
    /// parking sockets and what was read from them. Empty where nothing is parked.
    fn kept(&mut self) -> Result<Vec<(&'static str, BorrowedFd<'_>)>>;
    /// Goes on with what [`Datapath::kept`] gave a process that has died.
    fn take_up_park(&mut self, kept: Vec<(String, OwnedFd)>) -> Result<()>;
    /// Gives what is parked back to its owner `daemon`, which lives, is bound again and knows its own recirculation
    /// ids; what lies in its own sockets is its own. May be run twice.
    fn return_parked(&mut self, daemon: ProcessId, until: Instant) -> Result<ReplayReport>;
    /// Has the old daemon nothing queued and nothing in hand (hazards 9)? Ask twice.
    fn is_drained(&mut self) -> Result<bool>;
    /// What keeps it from being drained, in words.
    fn undrained(&self) -> String;
    /// Reads what the old daemon left in its sockets, which it can no longer read.
    fn read_left_over(&mut self) -> Result<()>;
    /// How much is parked.
    fn park_stats(&self) -> ParkStats;
    /// Deletes the meters, where there are a thousand and more, without whose slots in the kernel's table the next daemon
    /// takes all meters for broken (hazards 24). Restore sets them again; until then their flows pass unmetered. To be
    /// called just before a daemon starts. Returns how many.
    fn make_room_for_probes(&mut self) -> Result<u64>;
    /// Removes what a daemon that was killed while it started has left of its feature probes, and returns how many: the
    /// next one would take the datapath for one that can do less (hazards 6). To be called while no daemon starts.
    fn remove_left_probes(&mut self) -> Result<u64>;
    /// Dumps the flows and decides which of them cannot survive; no flow is added while the upcalls are parked, so
    /// the decision stands until [`Datapath::remove_doomed`].
    fn choose_doomed(&mut self) -> Result<()>;
    /// The same, while the caller goes on: for when no flow is removed either.
    fn choose_doomed_meanwhile(&mut self) -> Result<()> {
        self.choose_doomed()
    }
    /// Removes them, in order and with a grace period between (hazards 12).
    fn remove_doomed(&mut self) -> Result<&RemovalReport>;
    /// What [`Datapath::remove_doomed`] did, once it has.
    fn removed(&self) -> Option<&RemovalReport>;
    /// Gets ready all that [`Datapath::hand_over`] can be spared.
    fn prepare_hand_over(&mut self, to: &Captured) -> Result<()>;
    /// Binds the upcalls to what the new daemon asked for and replays what is parked, until nothing more arrives or
    /// `until`. All that can be made ready is made ready before the binding: after it new misses overtake parked ones.
    fn hand_over(&mut self, to: &Captured, until: Instant) -> Result<HandedOver>;
    /// Makes room for a burst of misses in the sockets that the upcalls go to now, which are `daemon`'s: all that is
    /// established may miss at once.
    fn make_room(&mut self, daemon: ProcessId) -> Result<()>;
    /// Replays what is parked, if anything is, to `daemon`, which has bound the upcalls by itself (level `park`).
    fn replay_to(&mut self, daemon: ProcessId, until: Instant) -> Result<ReplayReport>;
    /// After the end of a daemon that was handed over to: misses are parked again, and what it left unread in its
    /// sockets as well, of which duplicates are held until the thaw (hazards 1). False where there was none.
    fn retake_upcalls(&mut self) -> Result<bool>;
    /// Deletes those of the ports with these numbers or names, and of the tunnel ports that the new daemon wanted to delete
    /// while they were adopted, whose name is not among `wanted`; returns their names.
    fn delete_stale_ports(&mut self, ports: &[Port], wanted: &[String]) -> Result<Vec<String>>;
}

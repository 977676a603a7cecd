//! What a run is asked and what it answers: the JSON between host and guest, and the result that is kept.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What replaces the daemons in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// `ovs-graceful restart`, put in through the input disk.
    Ours,
    /// `systemctl reload openvswitch-switch`: stock's own graceful way.
    StockReload,
    /// `systemctl restart openvswitch-switch`: what a package upgrade does.
    StockRestart,
    /// `systemctl reload openvswitch-switch` with our Debian package installed.
    DoorReload,
    /// `systemctl restart openvswitch-switch` with it.
    DoorRestart,
    /// `systemctl restart ovs-vswitchd` with it.
    DoorRestartSwitch,
    /// `ovs-ctl restart --graceful` with it, by its own script in the place of Open vSwitch's.
    DoorOvsCtl,
    /// `apt-get install openvswitch-switch` with it: of Debian 13, or in an image of another release, of Debian 12.
    DoorUpgrade,
    /// `ovs-graceful restart --restart-command`: both daemons run in containers, and that of the switch is restarted from an
    /// image of Debian 13.
    Container,
    /// Nothing at all, judged like ours: a run that did nothing must not pass.
    Nothing,
}

impl Action {
    /// The name on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Action::Ours => "ours",
            Action::StockReload => "stock-reload",
            Action::StockRestart => "stock-restart",
            Action::DoorReload => "door-reload",
            Action::DoorRestart => "door-restart",
            Action::DoorRestartSwitch => "door-restart-switch",
            Action::DoorOvsCtl => "door-ovs-ctl",
            Action::DoorUpgrade => "door-upgrade",
            Action::Container => "container",
            Action::Nothing => "nothing",
        }
    }

    /// Whether our Debian package is installed, and the distribution's own commands lead to a run.
    pub fn is_door(self) -> bool {
        use Action::{DoorOvsCtl, DoorReload, DoorRestart, DoorRestartSwitch, DoorUpgrade};
        matches!(self, DoorReload | DoorRestart | DoorRestartSwitch | DoorOvsCtl | DoorUpgrade)
    }

    /// Whether what only our restart can fulfil is asked of this run.
    pub fn judged_as_ours(self) -> bool {
        self.is_door() || matches!(self, Action::Ours | Action::Container | Action::Nothing)
    }
}

/// How much traffic a run has.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Load {
    /// Its intervals are so many times as long as the scenario says.
    pub slower: u32,
    /// Seconds of it before the action.
    pub before_s: f64,
    /// Seconds of it after the action's end, unless the scenario needs more.
    pub after_s: f64,
    /// Whether logs and dumps are brought back from a run that passed as well.
    pub keeps_logs: bool,
}

impl Load {
    /// For everything once, where nobody looks at times: a quarter of the traffic, and soon over.
    pub const BRIEF: Load = Load { slower: 4, before_s: 2.0, after_s: 5.0, keeps_logs: false };

    /// To measure with.
    pub const fn full(slower: u32) -> Load {
        Load { slower, before_s: 5.0, after_s: 10.0, keeps_logs: true }
    }
}

/// What the guest agent finds in `/lab/job.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Name of the scenario.
    pub scenario: String,
    /// What replaces the daemons.
    pub action: Action,
    /// Whether our product is in the input, to be installed; stock runs have none of it.
    pub product: bool,
    /// How much traffic there is.
    pub load: Load,
    /// Actions one after the other in the same guest, each with its own traffic, judgement and `result.json`; only
    /// scenarios with traffic take more than one.
    pub rounds: usize,
    /// What time it is, ms since 1970: a machine that was kept lives in the past.
    pub unix_ms: u64,
    /// Something that no other run has, for the random numbers of a machine that was kept.
    pub entropy: String,
    /// More arguments for `ovs-graceful restart`.
    pub extra_args: Vec<String>,
}

/// One named assertion.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    /// Short and stable.
    pub name: String,
    /// Did it hold?
    pub pass: bool,
    /// What was found, so that a failure explains itself.
    pub value: Value,
}

/// One direction of a UDP probe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Direction {
    /// Packets that set out in this direction.
    pub sent: u64,
    /// Different packets that arrived.
    pub received: u64,
    /// Packets that never arrived.
    pub lost: u64,
    /// Arrivals of a packet that had arrived before.
    pub duplicated: u64,
    /// Arrivals after a packet that was sent later.
    pub reordered: u64,
    /// Arrivals whose checksum was wrong.
    pub corrupted: u64,
    /// Longest row of lost packets, times the interval, ms.
    pub longest_lost_ms: f64,
    /// Longest time between two arrivals, ms.
    pub longest_gap_ms: f64,
    /// Median time since the request was sent, ms.
    pub p50_ms: f64,
    /// 99th percentile, ms.
    pub p99_ms: f64,
    /// Highest, ms.
    pub max_ms: f64,
    /// Highest where a lost packet counts as the time to the next one received, ms.
    pub worst_ms: f64,
    /// When the first lost packet was sent, ms since the probe began.
    pub first_lost_ms: Option<f64>,
    /// When the last lost packet was sent, ms since the probe began.
    pub last_lost_ms: Option<f64>,
    /// When packets took long, the first ones of them.
    #[serde(default)]
    pub slow: Vec<Spell>,
}

/// Packets in a row that took long.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Spell {
    /// Sending time of the first, ms of the guest's uptime (as in the journal that comes along).
    pub from_ms: f64,
    /// Sending time of the last, ms of the guest's uptime.
    pub to_ms: f64,
    /// How many.
    pub packets: u64,
    /// The longest delay among them, ms.
    pub worst_ms: f64,
}

/// A UDP probe.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct UdpOutcome {
    /// Packets that its rate and time ask for.
    pub due: u64,
    /// Packets it sent.
    pub sent: u64,
    /// How late the sender itself was at worst, ms: the measurement's own error.
    pub sender_late_ms: f64,
    /// Packets that the kernel did not take, by error.
    pub send_errors: BTreeMap<String, u64>,
    /// There.
    pub requests: Direction,
    /// And back.
    pub replies: Direction,
    /// Replies that came from another address than the request went to.
    pub wrong_source: u64,
}

/// A long-lived TCP connection.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct TcpOutcome {
    /// Bytes written by the client and by the server.
    pub written: [u64; 2],
    /// Bytes that arrived in order with the right content, at the server and at the client.
    pub verified: [u64; 2],
    /// Wrong bytes.
    pub corrupted: u64,
    /// Retransmitted segments, both ends (TCP_INFO).
    pub retransmitted: u64,
    /// Highest back-off of the retransmission timer seen (TCP_INFO, sampled).
    pub backoff: u64,
    /// Retransmission time-outs of the two namespaces while the probe ran (TcpExt TCPTimeouts).
    pub timeouts: u64,
    /// Longest time between two arrivals, ms.
    pub longest_gap_ms: f64,
    /// How long the connection lived, s.
    pub seconds: f64,
    /// What broke it.
    pub error: Option<String>,
}

/// Frames seen by a port that nobody talks to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SilentOutcome {
    /// Unicast frames for others in the quiet window before the action.
    pub quiet_unicast: u64,
    /// The same from the action's start to the end of the traffic.
    pub later_unicast: u64,
    /// Broadcast and multicast frames in the quiet window.
    pub quiet_broadcast: u64,
    /// The same from the action's start to the end of the traffic.
    pub later_broadcast: u64,
}

/// TCP connections, each new.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ConnectionsOutcome {
    /// Connections that the rate and the time ask for.
    pub due: u64,
    /// Connections begun.
    pub begun: u64,
    /// Connections whose request was answered rightly.
    pub answered: u64,
    /// The others, by error.
    pub errors: BTreeMap<String, u64>,
    /// Longest time from the first SYN to the answer, ms.
    pub longest_ms: f64,
}

/// iperf3, as its client tells.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct IperfOutcome {
    /// Bytes sent.
    pub bytes: u64,
    /// Segments sent again, needlessly or not.
    pub retransmitted: u64,
    /// Longest time without a byte sent, ms, in steps of half a second.
    pub longest_silent_ms: f64,
    /// How long it sent, s.
    pub seconds: f64,
    /// What broke it.
    pub error: Option<String>,
}

/// Copies of one direction of a UDP probe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyCount {
    /// Different packets seen.
    pub different: u64,
    /// Packets seen again.
    pub duplicated: u64,
    /// Numbers between the first and the last that were not seen: of the packet, or where only ports are known, of its
    /// port.
    pub missing: Vec<u32>,
}

/// What a mirror's port saw.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiesOutcome {
    /// By port of the probe and direction, for example `9001 requests`.
    pub by_flow: BTreeMap<String, CopyCount>,
    /// Frames that the counting itself lost.
    pub dropped: u64,
}

/// Any probe.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ProbeOutcome {
    /// UDP.
    Udp(Box<UdpOutcome>),
    /// TCP.
    Tcp(TcpOutcome),
    /// TCP connections, each new.
    Connections(ConnectionsOutcome),
    /// iperf3.
    Iperf(IperfOutcome),
    /// A mirror's port.
    Copies(CopiesOutcome),
    /// A silent port.
    Silent(SilentOutcome),
}

/// The result of one run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// 1.
    pub schema: u32,
    /// Name of the scenario.
    pub scenario: String,
    /// What replaced the daemons.
    pub action: Action,
    /// Did every assertion hold?
    pub passed: bool,
    /// Why the run could not be made (a lab error), if so.
    pub error: Option<String>,
    /// Kernel, OVS and other versions; filled by guest and host.
    pub versions: BTreeMap<String, String>,
    /// Exit code of the action.
    pub action_exit: Option<i32>,
    /// How long the action took, ms.
    pub action_ms: f64,
    /// Every probe by name.
    pub probes: BTreeMap<String, ProbeOutcome>,
    /// Every assertion.
    pub checks: Vec<Check>,
    /// Numbers worth keeping that are not assertions.
    pub notes: BTreeMap<String, Value>,
}

impl Outcome {
    /// An outcome with nothing measured yet.
    pub fn new(scenario: &str, action: Action) -> Self {
        Outcome {
            schema: 1,
            scenario: scenario.to_owned(),
            action,
            passed: false,
            error: None,
            versions: BTreeMap::new(),
            action_exit: None,
            action_ms: 0.0,
            probes: BTreeMap::new(),
            checks: Vec::new(),
            notes: BTreeMap::new(),
        }
    }

    /// Writes down an assertion.
    pub fn check(&mut self, name: impl Into<String>, pass: bool, value: impl Serialize) {
        let value = serde_json::to_value(value).unwrap_or(Value::Null);
        self.checks.push(Check { name: name.into(), pass, value });
    }

    /// Writes down a number.
    pub fn note(&mut self, name: impl Into<String>, value: impl Serialize) {
        self.notes.insert(name.into(), serde_json::to_value(value).unwrap_or(Value::Null));
    }
}

//! The database through `db.sock` (RFC 7047).
//!
//! Every call has a connection of its own: nothing is lost when ovsdb-server is replaced in between, and one that died
//! is given a moment to come back.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{json, Map, Value};

use super::jsonrpc::Connection;
use crate::host::database_disk::DISK_REMEDY;
use crate::host::{
    Bridge, Cleared, CtZone, Database, DatabaseFacts, HostError, Interface, Port, Qos, RestoreWaitWatch, Result,
    SwitchLock, SystemRow, OVN_MANAGED, OVN_MANAGED_ASIDE,
};

/// The key of `other_config` that holds a starting ovs-vswitchd back (`vswitchd/bridge.c`).
const FLAG: &str = "flow-restore-wait";
/// The key of `external_ids` that says which run set the flag, so that a later one knows whether it may remove it.
const MARK: &str = "ovs-graceful-run";
/// What ovn-controller's key is set aside with: its flag was set, or not.
const WITH_FLAG: &str = "true";
const ALONE: &str = "false";
/// The key of `external_ids` of a timeout policy that says by which key of `timeouts` we have changed it for a moment.
const TOUCHED: &str = "ovs-graceful-touched";
/// The keys of `CT_Timeout_Policy:timeouts` (vswitchd/vswitch.ovsschema); the kernel has no limit for the first two.
const TIMEOUTS: [&str; 16] = [
    "icmp_reply",
    "udp_first",
    "icmp_first",
    "udp_single",
    "udp_multiple",
    "tcp_syn_sent",
    "tcp_syn_recv",
    "tcp_established",
    "tcp_fin_wait",
    "tcp_close_wait",
    "tcp_last_ack",
    "tcp_time_wait",
    "tcp_close",
    "tcp_syn_sent2",
    "tcp_retransmit",
    "tcp_unack",
];
/// The database.
const DATABASE: &str = "Open_vSwitch";

/// How long a server that is not there is waited for: systemd starts one that failed again within a second or two.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// The lock of ovs-vswitchd (`bridge_init`, vswitchd/bridge.c).
const SWITCH_LOCK: &str = "ovs_vswitchd";
/// How long the answer of a new server is waited for: meanwhile the run stands.
const LOCK_AGAIN: Duration = Duration::from_millis(200);
/// How often the watch of the flag looks for one, and how long it waits for its first answer: meanwhile the run stands.
const WATCH_AGAIN: Duration = Duration::from_millis(200);

/// The database server of this host.
#[derive(Debug, Clone)]
pub struct Ovsdb {
    socket: PathBuf,
}

impl Ovsdb {
    /// The server behind `socket`, usually `/run/openvswitch/db.sock`. Connects only when asked something.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Ovsdb { socket: socket.into() }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn connect(&self, until: Instant) -> Result<Connection> {
        self.ask(until, Ok)
    }

    /// Asks again while the server is away, and where it goes away without an answer: only what may be asked twice.
    fn ask<T>(&self, until: Instant, mut question: impl FnMut(Connection) -> Result<T>) -> Result<T> {
        let mut last_seen = Instant::now();
        loop {
            let error = match Connection::connect(&self.socket) {
                Ok(connection) => match question(connection) {
                    Err(error) if error.away => {
                        last_seen = Instant::now();
                        error
                    }
                    answer => return answer,
                },
                Err(error) => error,
            };
            if Instant::now() >= until || last_seen.elapsed() >= PATIENCE {
                return Err(error);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// [`Database::transact`] of what may be done twice.
    fn transact_again(&self, operations: &[Value], until: Instant) -> Result<Vec<Value>> {
        self.ask(until, |mut connection| transact(&mut connection, operations.to_vec(), until))
    }

    fn schema_and_tables(&self, until: Instant) -> Result<(Value, Tables)> {
        self.ask(until, |mut connection| {
            let schema = connection.call("get_schema", json!([DATABASE]), until)?;
            let tables = Tables::select(&mut connection, &schema, until)?;
            Ok((schema, tables))
        })
    }

    fn tables(&self, until: Instant) -> Result<Tables> {
        Ok(self.schema_and_tables(until)?.1)
    }

    fn object(&self) -> String {
        format!("database {}", self.socket.display())
    }

    /// The two operations every configuring transaction ends with.
    fn increment() -> [Value; 2] {
        [
            json!({"op": "mutate", "table": DATABASE, "where": [], "mutations": [["next_cfg", "+=", 1]]}),
            json!({"op": "select", "table": DATABASE, "where": [], "columns": ["next_cfg"]}),
        ]
    }

    /// `next_cfg` in the result of [`Self::increment`].
    fn incremented(&self, results: &[Value]) -> Result<i64> {
        let number = results.last().and_then(|r| r["rows"][0]["next_cfg"].as_i64());
        number.ok_or_else(|| {
            HostError::new(self.object(), "it has no row in table Open_vSwitch")
                .remedy("was it initialised (ovs-vsctl init)?")
        })
    }
}

impl Database for Ovsdb {
    fn facts(&self, until: Instant) -> Result<DatabaseFacts> {
        let (schema, tables) = self.schema_and_tables(until)?;
        let root = tables
            .rows("Open_vSwitch")
            .next()
            .ok_or_else(|| HostError::new(self.object(), "it has no row in table Open_vSwitch"))?;
        let mut bridges: Vec<Bridge> = tables.rows("Bridge").map(|row| tables.bridge(row)).collect();
        bridges.sort_by(|a, b| a.name.cmp(&b.name));
        let (bridges, ignored): (Vec<_>, Vec<_>) = bridges.into_iter().partition(|bridge| is_made(&bridge.name));
        Ok(DatabaseFacts {
            other_config: map(&root["other_config"]),
            external_ids: map(&root["external_ids"]),
            ovs_version: string(&root["ovs_version"]),
            schema_version: string(&schema["version"]),
            system_type: optional(&root["system_type"]),
            system_version: optional(&root["system_version"]),
            dpdk_initialized: root["dpdk_initialized"] == json!(true),
            next_cfg: root["next_cfg"].as_i64().unwrap_or_default(),
            cur_cfg: root["cur_cfg"].as_i64().unwrap_or_default(),
            bridges,
            ignored_bridges: ignored.into_iter().map(|bridge| bridge.name).collect(),
            ct_zones: tables.ct_zones(),
            ct_zone_default_limit: tables.kernel_datapath().and_then(|row| number(&row["ct_zone_default_limit"])),
        })
    }

    fn set_restore_wait(&self, run: &str, until: Instant) -> Result<i64> {
        let set = json!({"op": "mutate", "table": DATABASE, "where": [], "mutations": [
            ["other_config", "insert", ["map", [[FLAG, "true"]]]],
            ["external_ids", "insert", ["map", [[MARK, run]]]],
        ]});
        // A flag set to something else than true would survive "insert": take that away first.
        let drop = json!({"op": "mutate", "table": DATABASE, "where": [], "mutations": [
            ["other_config", "delete", ["set", [FLAG]]],
            ["external_ids", "delete", ["set", [MARK]]],
        ]});
        let [mutate, select] = Self::increment();
        let [ovn_s, its_key] = aside();
        let results = self.transact(vec![ovn_s, its_key, flag_is(false), drop, set, mutate, select], until).map_err(|e| {
            match e.cause.contains("timed out") {
                true => HostError::new(self.object(), "flow-restore-wait is set already").remedy(format!(
                    "find out who set it; if nobody is restoring flows: ovs-vsctl remove open_vswitch . other_config {FLAG}"
                )),
                false => e,
            }
        })?;
        self.incremented(&results)
    }

    fn clear_restore_wait(&self, run: &str, until: Instant) -> Result<Cleared> {
        let ours = json!([["external_ids", "includes", ["map", [[MARK, run]]]]]);
        let flagged = json!([
            ["external_ids", "includes", ["map", [[MARK, run]]]],
            ["other_config", "includes", ["map", [[FLAG, "true"]]]]
        ]);
        let operations = [
            json!({"op": "mutate", "table": DATABASE, "where": flagged, "mutations": [
                ["other_config", "delete", ["set", [FLAG]]], ["next_cfg", "+=", 1]]}),
            json!({"op": "mutate", "table": DATABASE, "where": ours, "mutations": [
                ["external_ids", "delete", ["set", [MARK]]]]}),
            json!({"op": "select", "table": DATABASE, "where": [], "columns": ["next_cfg"]}),
        ];
        let results = self.transact_again(&operations, until)?;
        Ok(match (results[0]["count"].as_i64(), results[1]["count"].as_i64()) {
            (Some(1), _) => Cleared::Removed { next_cfg: self.incremented(&results)? },
            (_, Some(1)) => Cleared::AlreadyGone,
            _ => Cleared::NotOurs,
        })
    }

    fn return_ovn_wait(&self, until: Instant) -> Result<()> {
        self.transact_again(&returned(), until).map(drop)
    }

    fn touch_policies(&self, zones: &[u16], until: Instant) -> Result<()> {
        let tables = self.tables(until)?;
        let mut operations: Vec<Value> = tables.policies_of(zones).into_iter().map(touching).collect();
        operations.extend(Self::increment());
        self.transact_again(&operations, until).map(drop)
    }

    fn clear_touched_policies(&self, until: Instant) -> Result<()> {
        let tables = self.tables(until)?;
        let mut operations: Vec<Value> = tables.rows("CT_Timeout_Policy").filter_map(untouching).collect();
        if operations.is_empty() {
            return Ok(());
        }
        operations.extend(Self::increment());
        self.transact_again(&operations, until).map(drop)
    }

    fn bump(&self, until: Instant) -> Result<i64> {
        let results = self.transact_again(&Self::increment(), until)?;
        self.incremented(&results)
    }

    fn prove_writable(&self, until: Instant) -> Result<()> {
        // RFC 7047, 5.2.7: the answer comes after fsync().
        let [mutate, _] = Self::increment();
        self.transact_again(&[mutate, json!({"op": "commit", "durable": true})], until).map(drop)
    }

    fn wait_in_step(&self, next_cfg: i64, until: Instant) -> Result<()> {
        self.ask(until, |connection| {
            let mut monitor = Monitor::start(connection, &["cur_cfg"], until)?;
            while monitor.row["cur_cfg"].as_i64().is_none_or(|cur| cur < next_cfg) {
                if !monitor.next(until)? {
                    return Err(HostError::timeout(
                        "ovs-vswitchd",
                        format_args!("waiting for cur_cfg {} to reach next_cfg {next_cfg}", monitor.row["cur_cfg"]),
                    )
                    .remedy("see its log; it may be stopped, or busy configuring"));
                }
            }
            Ok(())
        })
    }

    fn transact(&self, operations: Vec<Value>, until: Instant) -> Result<Vec<Value>> {
        transact(&mut self.connect(until)?, operations, until)
    }

    fn write_row(&self, row: &SystemRow, until: Instant) -> Result<()> {
        self.transact_again(&writing(row), until).map(drop)
    }

    fn queue_for_switch_lock(&self, until: Instant) -> Result<Box<dyn SwitchLock>> {
        let mut connection = self.connect(until)?;
        let ours = lock(&mut connection, until)?;
        Ok(Box::new(Lock { socket: self.socket.clone(), connection: Some(connection), ours }))
    }

    fn watch_restore_wait(&self, until: Instant) -> Result<Box<dyn RestoreWaitWatch>> {
        Ok(Box::new(FlagWatch::start(self, until)?))
    }
}

/// The operations that make the row of this host say what `row` says. Of what that does not know nothing is written.
fn writing(row: &SystemRow) -> Vec<Value> {
    let columns = [("system_type", &row.system_type), ("system_version", &row.system_version)];
    let columns: Map<String, Value> =
        columns.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value.as_ref()?)))).collect();
    let keys: Vec<&String> = row.ids.keys().collect();
    let pairs: Vec<(&String, &String)> = row.ids.iter().collect();
    let ids = json!({"op": "mutate", "table": DATABASE, "where": [], "mutations": [
        ["external_ids", "delete", ["set", keys]],
        ["external_ids", "insert", ["map", pairs]],
    ]});
    let columns = Some(columns).filter(|columns| !columns.is_empty());
    let columns = columns.map(|row| json!({"op": "update", "table": DATABASE, "where": [], "row": row}));
    columns.into_iter().chain([ids]).collect()
}

/// The operation that changes a row of CT_Timeout_Policy by a key it does not have or, where it has all of them, by
/// another value of the first, and notes which and what it was.
fn touching(row: &Value) -> Value {
    let timeouts = map_of_numbers(&row["timeouts"]);
    let absent = TIMEOUTS.iter().find(|key| !timeouts.contains_key(**key));
    let (key, value, mark) = match absent {
        Some(key) => (*key, 30, (*key).to_owned()),
        None => {
            let was = timeouts.get(TIMEOUTS[0]).copied().unwrap_or_default();
            (TIMEOUTS[0], was ^ 1, format!("{}={was}", TIMEOUTS[0]))
        }
    };
    json!({"op": "mutate", "table": "CT_Timeout_Policy", "where": [["_uuid", "==", row["_uuid"]]], "mutations": [
        ["timeouts", "delete", ["set", [key]]],
        ["timeouts", "insert", ["map", [[key, value]]]],
        ["external_ids", "insert", ["map", [[TOUCHED, mark]]]],
    ]})
}

/// The operation that takes that back, where it is noted.
fn untouching(row: &Value) -> Option<Value> {
    let mark = map(&row["external_ids"]).remove(TOUCHED)?;
    let (key, was) = mark.split_once('=').map_or((mark.as_str(), None), |(key, was)| (key, was.parse::<u32>().ok()));
    let mut mutations = vec![json!(["timeouts", "delete", ["set", [key]]])];
    mutations.extend(was.map(|was| json!(["timeouts", "insert", ["map", [[key, was]]]])));
    mutations.push(json!(["external_ids", "delete", ["set", [TOUCHED]]]));
    let ours = json!([["_uuid", "==", row["_uuid"]], ["external_ids", "includes", ["map", [[TOUCHED, mark]]]]]);
    Some(json!({"op": "mutate", "table": "CT_Timeout_Policy", "where": ours, "mutations": mutations}))
}

/// Runs `operations`; the results have one element each.
fn transact(connection: &mut Connection, operations: Vec<Value>, until: Instant) -> Result<Vec<Value>> {
    let count = operations.len();
    let mut params = vec![json!(DATABASE)];
    params.extend(operations);
    let Value::Array(results) = connection.call("transact", Value::Array(params), until)? else {
        return Err(HostError::new("database", "transact: the answer is not an array"));
    };
    // RFC 7047, 4.1.3: the failed operation holds an error object, those after it null; a commit error comes extra.
    if let Some(failed) = results.iter().find(|r| r.get("error").is_some()) {
        return Err(refused(failed));
    }
    if results.len() < count {
        return Err(HostError::new("database", "transact: the answer is too short"));
    }
    Ok(results)
}

/// What ovsdb-server says of a transaction that it has not carried out. `I/O error` is that of its file
/// (`ovsdb_io_error`, lib/ovsdb-error.c); it forgets the transaction then, and tries the next one anew (`ovsdb_log_write`).
fn refused(failed: &Value) -> HostError {
    let text = |key| failed.get(key).and_then(Value::as_str).unwrap_or_default();
    let cause = format!("transaction refused: {} {}", text("error"), text("details"));
    match text("error") {
        "I/O error" => HostError::unwritable("database", format!("{cause} ({})", text("io-error"))).remedy(DISK_REMEDY),
        _ => HostError::new("database", cause),
    }
}

/// Sets ovn-controller's key aside, and its flag with it where that is set: what follows in the transaction finds neither.
fn aside() -> [Value; 2] {
    let key = json!(["external_ids", "includes", ["map", [[OVN_MANAGED, "true"]]]]);
    let flag = json!(["other_config", "includes", ["map", [[FLAG, "true"]]]]);
    let renamed = |to: &str| {
        [
            json!(["external_ids", "delete", ["set", [OVN_MANAGED]]]),
            json!(["external_ids", "insert", ["map", [[OVN_MANAGED_ASIDE, to]]]]),
        ]
    };
    let [forget, note] = renamed(WITH_FLAG);
    [
        json!({"op": "mutate", "table": DATABASE, "where": [key, flag],
            "mutations": [forget, note, ["other_config", "delete", ["set", [FLAG]]]]}),
        json!({"op": "mutate", "table": DATABASE, "where": [key], "mutations": renamed(ALONE)}),
    ]
}

/// Gives back what [`aside`] has taken. It may have been started meanwhile and have made its own.
fn returned() -> [Value; 2] {
    let was = |what: &str| json!([["external_ids", "includes", ["map", [[OVN_MANAGED_ASIDE, what]]]]]);
    let [forget, key] = [
        json!(["external_ids", "delete", ["set", [OVN_MANAGED_ASIDE]]]),
        json!(["external_ids", "insert", ["map", [[OVN_MANAGED, "true"]]]]),
    ];
    [
        json!({"op": "mutate", "table": DATABASE, "where": was(WITH_FLAG), "mutations": [forget, key,
            ["other_config", "delete", ["set", [FLAG]]], ["other_config", "insert", ["map", [[FLAG, "true"]]]]]}),
        json!({"op": "mutate", "table": DATABASE, "where": was(ALONE), "mutations": [forget, key]}),
    ]
}

/// The operation that lets a transaction fail unless the flag is (or is not) `true`.
fn flag_is(set: bool) -> Value {
    json!({"op": "wait", "timeout": 0, "table": DATABASE, "columns": ["other_config"], "rows": [],
        "where": [["other_config", "includes", ["map", [[FLAG, "true"]]]]],
        "until": if set { "!=" } else { "==" }})
}

/// A connection that has asked for the lock of ovs-vswitchd. The server gives locks in the order of the requests, and
/// tells when one's turn has come; the connection's end gives it back.
struct Lock {
    socket: PathBuf,
    connection: Option<Connection>,
    ours: bool,
}

impl SwitchLock for Lock {
    fn is_ours(&mut self) -> bool {
        if self.look().is_err() {
            // Its server has gone. The next one has no queue yet.
            self.ours = false;
            let again = Connection::connect(&self.socket).and_then(|mut connection| {
                self.ours = lock(&mut connection, Instant::now() + LOCK_AGAIN)?;
                Ok(connection)
            });
            self.connection = again.ok();
        }
        self.ours
    }
}

impl Lock {
    fn look(&mut self) -> Result<()> {
        let gone = || HostError::away("database", "no connection");
        let connection = self.connection.as_mut().ok_or_else(gone)?;
        while let Some(message) = connection.notification(Instant::now())? {
            match message["method"].as_str() {
                Some("locked") => self.ours = true,
                Some("stolen") => self.ours = false,
                _ => {}
            }
        }
        Ok(())
    }
}

/// Asks for the lock; true where it is ours at once.
fn lock(connection: &mut Connection, until: Instant) -> Result<bool> {
    Ok(connection.call("lock", json!([SWITCH_LOCK]), until)?["locked"] == json!(true))
}

/// A monitor (RFC 7047, 4.1.5) of the one row of table Open_vSwitch.
struct Monitor {
    connection: Connection,
    row: Map<String, Value>,
    empty: Value,
}

impl std::ops::Index<&str> for Monitor {
    type Output = Value;

    fn index(&self, column: &str) -> &Value {
        self.row.get(column).unwrap_or(&self.empty)
    }
}

impl Monitor {
    fn start(mut connection: Connection, columns: &[&str], until: Instant) -> Result<Self> {
        let initial = connection.call("monitor", json!([DATABASE, null, {DATABASE: {"columns": columns}}]), until)?;
        let mut monitor = Monitor { connection, row: Map::new(), empty: Value::Null };
        monitor.take(&initial);
        Ok(monitor)
    }

    fn take(&mut self, updates: &Value) {
        let rows = updates[DATABASE].as_object().into_iter().flat_map(|rows| rows.values());
        for new in rows.filter_map(|row| row["new"].as_object()) {
            self.row.extend(new.clone());
        }
    }

    /// Takes in the next update; false where `until` passes first.
    fn next(&mut self, until: Instant) -> Result<bool> {
        while let Some(message) = self.connection.notification(until)? {
            if message["method"] == json!("update") {
                self.take(&message["params"][1]);
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// [`RestoreWaitWatch`] on a monitor, and on another one when ovsdb-server has died and come back. In between what was
/// seen last counts: a server that is away has removed nothing.
struct FlagWatch {
    database: Ovsdb,
    monitor: Option<Monitor>,
    set: bool,
    /// When a server that is away is looked for again.
    again: Instant,
}

impl FlagWatch {
    fn start(database: &Ovsdb, until: Instant) -> Result<Self> {
        let monitor = Monitor::start(database.connect(until)?, &["other_config"], until)?;
        Ok(FlagWatch { database: database.clone(), set: flag(&monitor), monitor: Some(monitor), again: Instant::now() })
    }

    /// Takes in what has arrived.
    fn look(&mut self) -> Result<()> {
        let now = Instant::now();
        let mut monitor = match self.monitor.take() {
            Some(monitor) => monitor,
            None if now < self.again => return Ok(()),
            None => {
                self.again = now + WATCH_AGAIN;
                Monitor::start(Connection::connect(&self.database.socket)?, &["other_config"], self.again)?
            }
        };
        while monitor.next(now)? {}
        self.set = flag(&monitor);
        self.monitor = Some(monitor);
        Ok(())
    }
}

fn flag(monitor: &Monitor) -> bool {
    map(&monitor["other_config"]).get(FLAG).is_some_and(|v| v == "true")
}

impl RestoreWaitWatch for FlagWatch {
    fn is_set(&mut self) -> Result<bool> {
        match self.look() {
            Err(error) if !error.away && !error.timed_out => Err(error),
            _ => Ok(self.set),
        }
    }
}

/// The rows that [`DatabaseFacts`] is made of, by table and UUID.
struct Tables(BTreeMap<&'static str, BTreeMap<String, Value>>);

/// Tables and the columns we want of them, where the schema has them.
const WANTED: &[(&str, &[&str])] = &[
    (
        "Open_vSwitch",
        &[
            "other_config",
            "external_ids",
            "ovs_version",
            "system_type",
            "system_version",
            "dpdk_initialized",
            "next_cfg",
            "cur_cfg",
            "datapaths",
        ],
    ),
    (
        "Bridge",
        &[
            "name",
            "datapath_type",
            "protocols",
            "fail_mode",
            "controller",
            "mcast_snooping_enable",
            "stp_enable",
            "rstp_enable",
            "mirrors",
            "netflow",
            "sflow",
            "ipfix",
            "ports",
        ],
    ),
    ("Port", &["name", "tag", "trunks", "cvlans", "vlan_mode", "lacp", "bond_mode", "qos", "interfaces"]),
    ("QoS", &["type", "queues"]),
    (
        "Interface",
        &[
            "name",
            "type",
            "ofport",
            "options",
            "bfd",
            "cfm_mpid",
            "lldp",
            "ingress_policing_rate",
            "ingress_policing_kpkts_rate",
            "mtu_request",
        ],
    ),
    ("Controller", &["target", "is_connected", "role"]),
    ("Flow_Sample_Collector_Set", &["bridge", "ipfix"]),
    // Schema 8.2.0 (OVS 2.13) and later; the limits 8.5.0 (OVS 3.3).
    ("Datapath", &["ct_zones", "ct_zone_default_limit"]),
    ("CT_Zone", &["timeout_policy", "limit"]),
    ("CT_Timeout_Policy", &["timeouts", "external_ids"]),
];

impl Tables {
    fn select(connection: &mut Connection, schema: &Value, until: Instant) -> Result<Self> {
        let there: Vec<_> = WANTED.iter().filter(|(table, _)| schema["tables"].get(table).is_some()).collect();
        let operations = there.iter().map(|(table, columns)| {
            let known = |column: &&&str| schema["tables"][table]["columns"].get(column).is_some();
            let mut columns: Vec<&str> = columns.iter().filter(known).copied().collect();
            columns.push("_uuid");
            json!({"op": "select", "table": table, "where": [], "columns": columns})
        });
        let results = transact(connection, operations.collect(), until)?;
        let mut tables = BTreeMap::new();
        for ((table, _), result) in there.iter().zip(results) {
            let rows = result["rows"].as_array().cloned().unwrap_or_default();
            tables.insert(*table, rows.into_iter().map(|row| (string(&row["_uuid"][1]), row)).collect());
        }
        Ok(Tables(tables))
    }

    fn rows(&self, table: &str) -> impl Iterator<Item = &Value> {
        self.0.get(table).into_iter().flat_map(|rows| rows.values())
    }

    /// The rows of `table` that a column refers to.
    fn referred<'a>(&'a self, table: &str, column: &'a Value) -> impl Iterator<Item = &'a Value> {
        let rows = self.0.get(table);
        set(column).into_iter().filter_map(move |uuid| rows?.get(uuid[1].as_str()?))
    }

    /// The datapath of type `system` (Open_vSwitch:datapaths), the kernel's.
    fn kernel_datapath(&self) -> Option<&Value> {
        let datapaths = pairs(&self.rows("Open_vSwitch").next()?["datapaths"]);
        let (_, uuid) = datapaths.into_iter().find(|(kind, _)| *kind == &json!("system"))?;
        self.referred("Datapath", uuid).next()
    }

    fn ct_zones(&self) -> Vec<CtZone> {
        let zones = self.kernel_datapath().map(|row| pairs(&row["ct_zones"])).unwrap_or_default();
        let mut zones: Vec<CtZone> = zones.into_iter().filter_map(|(zone, uuid)| self.ct_zone(zone, uuid)).collect();
        zones.sort_by_key(|zone| zone.zone);
        zones
    }

    fn ct_zone(&self, zone: &Value, uuid: &Value) -> Option<CtZone> {
        let row = self.referred("CT_Zone", uuid).next()?;
        let policy = self.referred("CT_Timeout_Policy", &row["timeout_policy"]).next();
        let timeouts = policy.map(|policy| map_of_numbers(&policy["timeouts"]));
        Some(CtZone { zone: zone.as_u64()?.try_into().ok()?, timeouts, limit: number(&row["limit"]) })
    }

    /// The rows of the timeout policies of these zones, each once.
    fn policies_of(&self, zones: &[u16]) -> Vec<&Value> {
        let zones: BTreeSet<u16> = zones.iter().copied().collect();
        let all = self.kernel_datapath().map(|row| pairs(&row["ct_zones"])).unwrap_or_default();
        let wanted =
            |zone: &Value| zone.as_u64().and_then(|zone| zone.try_into().ok()).is_some_and(|z| zones.contains(&z));
        let of_zones = all.into_iter().filter(|(zone, _)| wanted(zone));
        let rows = of_zones
            .flat_map(|(_, uuid)| self.referred("CT_Zone", uuid))
            .flat_map(|row| self.referred("CT_Timeout_Policy", &row["timeout_policy"]));
        let mut rows: Vec<&Value> = rows.collect();
        let uuid = |row: &Value| string(&row["_uuid"][1]);
        rows.sort_by_key(|row| uuid(row));
        rows.dedup_by_key(|row| uuid(row));
        rows
    }

    fn bridge(&self, row: &Value) -> Bridge {
        let controllers: Vec<&Value> = self.referred("Controller", &row["controller"]).collect();
        Bridge {
            name: string(&row["name"]),
            datapath_type: string(&row["datapath_type"]),
            protocols: set(&row["protocols"]).into_iter().map(string).collect(),
            fail_mode: string(&row["fail_mode"]),
            controllers: controllers.iter().map(|row| string(&row["target"])).collect(),
            connected: controllers
                .iter()
                .filter(|row| row["is_connected"] == true)
                .map(|row| string(&row["target"]))
                .collect(),
            // Their names in the schema, which has kept them.
            ranked: controllers
                .iter()
                .filter(|row| ["master", "slave"].contains(&string(&row["role"]).as_str()))
                .map(|row| string(&row["target"]))
                .collect(),
            snoops: row["mcast_snooping_enable"] == json!(true),
            stp: row["stp_enable"] == json!(true),
            rstp: row["rstp_enable"] == json!(true),
            mirrors: set(&row["mirrors"]).len(),
            netflow: !set(&row["netflow"]).is_empty(),
            sflow: !set(&row["sflow"]).is_empty(),
            ipfix: !set(&row["ipfix"]).is_empty(),
            flow_ipfix: self
                .rows("Flow_Sample_Collector_Set")
                .any(|one| one["bridge"] == row["_uuid"] && !set(&one["ipfix"]).is_empty()),
            ports: self.referred("Port", &row["ports"]).map(|port| self.port(port)).collect(),
        }
    }

    fn port(&self, row: &Value) -> Port {
        let word = |column: &str| Some(string(&row[column])).filter(|s| !s.is_empty());
        Port {
            name: string(&row["name"]),
            tag: row["tag"].as_i64(),
            trunks: set(&row["trunks"]).into_iter().filter_map(Value::as_i64).collect(),
            cvlans: set(&row["cvlans"]).into_iter().filter_map(Value::as_i64).collect(),
            vlan_mode: word("vlan_mode"),
            lacp: word("lacp").filter(|mode| mode != "off"),
            bond_mode: word("bond_mode"),
            qos: self.referred("QoS", &row["qos"]).next().map(qos),
            interfaces: self.referred("Interface", &row["interfaces"]).map(interface).collect(),
        }
    }
}

/// Does ovs-vswitchd make a bridge of this name?
fn is_made(name: &str) -> bool {
    !name.contains(['/', '\\'])
}

fn interface(row: &Value) -> Interface {
    Interface {
        name: string(&row["name"]),
        kind: string(&row["type"]),
        ofport: row["ofport"].as_i64(),
        dst_port: map(&row["options"]).remove("dst_port"),
        bfd: map(&row["bfd"]).get("enable").is_some_and(|v| v == "true"),
        cfm: row["cfm_mpid"].is_i64(),
        lldp: map(&row["lldp"]).get("enable").is_some_and(|v| v == "true"),
        policed: ["ingress_policing_rate", "ingress_policing_kpkts_rate"]
            .iter()
            .any(|column| row[*column].as_i64().is_some_and(|rate| rate > 0)),
        mtu_request: row["mtu_request"].as_i64(),
    }
}

fn qos(row: &Value) -> Qos {
    let queues = pairs(&row["queues"]).into_iter().filter_map(|(number, _)| number.as_i64()).collect();
    Qos { kind: string(&row["type"]), queues }
}

/// The elements of a column: an atom and a UUID stand for the set of themselves (RFC 7047, 5.1).
fn set(value: &Value) -> Vec<&Value> {
    match value.as_array().map(Vec::as_slice) {
        Some([tag, Value::Array(elements)]) if tag == "set" => elements.iter().collect(),
        _ if value.is_null() => Vec::new(),
        _ => vec![value],
    }
}

/// An optional string: the atom, or empty.
fn string(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// An optional text.
fn optional(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// An optional number.
fn number(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

/// The pairs of a map.
fn pairs(value: &Value) -> Vec<(&Value, &Value)> {
    match value.as_array().map(Vec::as_slice) {
        Some([tag, Value::Array(pairs)]) if tag == "map" => pairs.iter().map(|pair| (&pair[0], &pair[1])).collect(),
        _ => Vec::new(),
    }
}

/// A map of strings.
fn map(value: &Value) -> BTreeMap<String, String> {
    pairs(value).into_iter().map(|(key, value)| (string(key), string(value))).collect()
}

/// A map of strings to numbers.
fn map_of_numbers(value: &Value) -> BTreeMap<String, u32> {
    pairs(value).into_iter().filter_map(|(key, value)| Some((key.as_str()?.to_owned(), number(value)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_written_without_what_is_not_known_of_it() {
        let ids = BTreeMap::from([("rundir".to_owned(), "/run/x".to_owned())]);
        let row = SystemRow { ids, system_type: Some("lab".to_owned()), system_version: None };
        let written = writing(&row);
        let [columns, mutate] = &written[..] else { panic!("{written:?}") };
        assert_eq!(columns["row"], json!({"system_type": "lab"}));
        assert_eq!(mutate["mutations"][1], json!(["external_ids", "insert", ["map", [["rundir", "/run/x"]]]]));
        assert_eq!(writing(&SystemRow { system_type: None, ..row }).len(), 1);
        let (_, columns) = WANTED.iter().find(|(table, _)| *table == DATABASE).unwrap();
        assert!(["system_type", "system_version"].iter().all(|column| columns.contains(column)));
    }

    #[test]
    fn a_policy_is_changed_and_changed_back_whatever_it_has() {
        let row =
            |timeouts: Value, ids: Value| json!({"_uuid": ["uuid", "p"], "timeouts": timeouts, "external_ids": ids});
        let marked = |mark: &str| json!(["map", [[TOUCHED, mark], ["other", "stays"]]]);
        let touched = touching(&row(json!(["map", [["icmp_reply", 3]]]), json!(["map", []])));
        assert_eq!(touched["mutations"][1], json!(["timeouts", "insert", ["map", [["udp_first", 30]]]]));
        let back = untouching(&row(json!(["map", []]), marked("udp_first"))).unwrap();
        assert_eq!(back["mutations"][0], json!(["timeouts", "delete", ["set", ["udp_first"]]]));
        assert_eq!(back["mutations"].as_array().unwrap().len(), 2);
        let all: Vec<Value> = TIMEOUTS.iter().map(|key| json!([key, u32::MAX])).collect();
        let touched = touching(&row(json!(["map", all]), json!(["map", []])));
        assert_eq!(touched["mutations"][1], json!(["timeouts", "insert", ["map", [["icmp_reply", u32::MAX - 1]]]]));
        let mark = touched["mutations"][2][2][1][0][1].as_str().unwrap().to_owned();
        let back = untouching(&row(json!(["map", []]), marked(&mark))).unwrap();
        assert_eq!(back["mutations"][1], json!(["timeouts", "insert", ["map", [["icmp_reply", u32::MAX]]]]));
        assert_eq!(untouching(&row(json!(["map", []]), json!(["map", []]))), None);
    }

    #[test]
    fn columns_as_rfc_7047_writes_them() {
        assert_eq!(set(&json!(["set", ["a", "b"]])), [&json!("a"), &json!("b")]);
        assert_eq!(set(&json!("a")), [&json!("a")]);
        assert_eq!(set(&json!(["uuid", "1-2"])), [&json!(["uuid", "1-2"])]);
        assert!(set(&json!(["set", []])).is_empty());
        assert_eq!(map(&json!(["map", [["k", "v"]]])), BTreeMap::from([("k".into(), "v".into())]));
        assert!(map(&json!("x")).is_empty());
        assert_eq!(string(&json!(["set", []])), "");
    }

    #[test]
    fn a_server_that_is_away_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db.sock");
        let database = Ovsdb::new(&path);
        let server = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
            // The first is closed without an answer.
            drop(listener.accept().unwrap());
            let (mut peer, _) = listener.accept().unwrap();
            std::io::Read::read(&mut peer, &mut [0; 4096]).unwrap();
            std::io::Write::write_all(&mut peer, br#"{"id":0,"error":null,"result":[{},{"rows":[{"next_cfg":7}]}]}"#)
                .unwrap();
        });
        assert_eq!(database.bump(Instant::now() + Duration::from_secs(5)).unwrap(), 7);
        server.join().unwrap();
        let error = database.bump(Instant::now()).unwrap_err();
        assert!(error.away, "{error}");
    }

    #[test]
    fn the_lock_is_asked_for_again_where_the_server_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db.sock");
        let database = Ovsdb::new(&path);
        let (say, said) = std::sync::mpsc::channel();
        let (answered, has_answered) = std::sync::mpsc::channel();
        let server = std::thread::spawn(move || {
            for turn in [true, false] {
                let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
                let (mut peer, _) = listener.accept().unwrap();
                let mut buffer = [0; 4096];
                let n = std::io::Read::read(&mut peer, &mut buffer).unwrap();
                let asked: Value = serde_json::from_slice(&buffer[..n]).unwrap();
                assert_eq!((&asked["method"], &asked["params"]), (&json!("lock"), &json!(["ovs_vswitchd"])));
                // Of the first server somebody else has it, until he goes.
                let answer = json!({"id": asked["id"], "error": null, "result": {"locked": !turn}});
                let ours = json!({"method": "locked", "params": ["ovs_vswitchd"], "id": null});
                std::io::Write::write_all(&mut peer, answer.to_string().as_bytes()).unwrap();
                answered.send(()).unwrap();
                said.recv().unwrap();
                std::io::Write::write_all(&mut peer, ours.to_string().as_bytes()).unwrap();
                said.recv().unwrap();
                drop((listener, peer));
                std::fs::remove_file(&path).unwrap();
            }
        });
        let mut lock = database.queue_for_switch_lock(Instant::now() + Duration::from_secs(5)).unwrap();
        let mut look_until = |done: &dyn Fn(bool) -> bool| {
            let end = Instant::now() + Duration::from_secs(5);
            while !done(lock.is_ours()) {
                assert!(Instant::now() < end, "waited too long");
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        has_answered.recv().unwrap();
        look_until(&|ours| !ours);
        say.send(()).unwrap();
        look_until(&|ours| ours);
        say.send(()).unwrap();
        // The first server has gone, and the second gives it at once.
        look_until(&|_| has_answered.try_recv().is_ok());
        look_until(&|ours| ours);
        say.send(()).unwrap();
        say.send(()).unwrap();
        server.join().unwrap();
    }

    #[test]
    fn the_flag_is_watched_beyond_the_death_of_a_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db.sock");
        let database = Ovsdb::new(&path);
        // Answers one monitor with the flag as given; dies when told to.
        let serve = move |value: &'static str| {
            let _ = std::fs::remove_file(&path);
            let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
            std::thread::spawn(move || {
                let (mut peer, _) = listener.accept().unwrap();
                std::io::Read::read(&mut peer, &mut [0; 4096]).unwrap();
                let row = json!({"u": {"new": {"other_config": ["map", [[FLAG, value]]]}}});
                let answer = json!({"id": 0, "error": null, "result": {DATABASE: row}});
                std::io::Write::write_all(&mut peer, answer.to_string().as_bytes()).unwrap();
                peer
            })
        };
        let first = serve("true");
        let mut watch = FlagWatch::start(&database, Instant::now() + Duration::from_secs(5)).unwrap();
        assert!(watch.is_set().unwrap());
        drop(first.join().unwrap());
        assert!(watch.is_set().unwrap(), "a server that is away has removed nothing");
        let second = serve("false");
        let end = Instant::now() + Duration::from_secs(5);
        while watch.is_set().unwrap() {
            assert!(Instant::now() < end, "the server that came back was not asked");
            std::thread::sleep(LOOK_AGAIN);
        }
        second.join().unwrap();
    }

    fn row(uuid: &str, mut value: Value) -> (String, Value) {
        value["_uuid"] = json!(["uuid", uuid]);
        (uuid.to_owned(), value)
    }

    #[test]
    fn zones_are_put_together_from_their_rows() {
        let zones = json!(["map", [[6, ["uuid", "z6"]], [5, ["uuid", "z5"]], [7, ["uuid", "gone"]]]]);
        let datapaths = json!(["map", [["netdev", ["uuid", "n"]], ["system", ["uuid", "d"]]]]);
        let tables = Tables(BTreeMap::from([
            ("Open_vSwitch", BTreeMap::from([row("o", json!({ "datapaths": datapaths }))])),
            ("Datapath", BTreeMap::from([row("d", json!({"ct_zones": zones, "ct_zone_default_limit": 9}))])),
            (
                "CT_Zone",
                BTreeMap::from([
                    row("z5", json!({"timeout_policy": ["uuid", "p"], "limit": ["set", []]})),
                    row("z6", json!({"timeout_policy": ["set", []], "limit": 60000})),
                ]),
            ),
            ("CT_Timeout_Policy", BTreeMap::from([row("p", json!({"timeouts": ["map", [["udp_single", 78]]]}))])),
        ]));
        assert_eq!(tables.policies_of(&[6]), Vec::<&Value>::new());
        assert_eq!(tables.policies_of(&[5, 6, 7])[0]["_uuid"][1], "p");
        let policy = BTreeMap::from([("udp_single".to_owned(), 78)]);
        assert_eq!(
            tables.ct_zones(),
            [
                CtZone { zone: 5, timeouts: Some(policy), limit: None },
                CtZone { zone: 6, timeouts: None, limit: Some(60000) }
            ]
        );
        assert_eq!(tables.kernel_datapath().and_then(|row| number(&row["ct_zone_default_limit"])), Some(9));
        // A schema before 8.2.0 has none of these tables.
        assert!(Tables(BTreeMap::from([("Open_vSwitch", BTreeMap::from([row("o", json!({}))]))]))
            .ct_zones()
            .is_empty());
    }

    #[test]
    fn names_that_lead_out_of_a_folder_are_no_bridges() {
        assert!(is_made("br-int") && is_made("..") && is_made("br 0"));
        assert!(!is_made("br/0") && !is_made("../../etc/x") && !is_made("br\\0"));
    }

    #[test]
    fn a_bridge_is_put_together_from_its_rows() {
        let tables = Tables(BTreeMap::from([
            (
                "Controller",
                BTreeMap::from([row("c", json!({"target": "tcp:1.2.3.4", "is_connected": true, "role": "slave"}))]),
            ),
            (
                "Flow_Sample_Collector_Set",
                BTreeMap::from([row("s", json!({"bridge": ["uuid", "b"], "ipfix": ["uuid", "x"]}))]),
            ),
            (
                "Port",
                BTreeMap::from([row(
                    "p",
                    json!({"name": "bond0", "lacp": "active", "bond_mode": "balance-tcp", "tag": 5, "trunks": ["set", []],
                        "interfaces": ["set", [["uuid", "i"], ["uuid", "j"], ["uuid", "gone"]]]}),
                )]),
            ),
            (
                "Interface",
                BTreeMap::from([
                    row(
                        "i",
                        json!({"name": "e0", "type": "", "ofport": 1, "bfd": ["map", [["enable", "true"]]],
                        "lldp": ["map", [["enable", "true"]]]}),
                    ),
                    row(
                        "j",
                        json!({"name": "e1", "type": "vxlan", "ofport": ["set", []], "cfm_mpid": 7,
                        "options": ["map", [["dst_port", "8472"], ["remote_ip", "10.0.0.1"]]]}),
                    ),
                ]),
            ),
        ]));
        let bridge = tables.bridge(
            &json!({"_uuid": ["uuid", "b"], "name": "br0", "datapath_type": "netdev", "protocols": "OpenFlow13",
            "controller": ["uuid", "c"], "ports": ["uuid", "p"], "stp_enable": true, "fail_mode": ["set", []]}),
        );
        assert_eq!((&bridge.controllers, &bridge.connected), (&vec!["tcp:1.2.3.4".to_owned()], &bridge.controllers));
        assert_eq!(bridge.ranked, bridge.controllers);
        assert!(bridge.flow_ipfix && !bridge.ipfix);
        assert_eq!(bridge.protocols, ["OpenFlow13"]);
        assert!(bridge.stp && !bridge.rstp && bridge.fail_mode.is_empty());
        let port = &bridge.ports[0];
        assert_eq!((port.tag, port.lacp.as_deref(), port.interfaces.len()), (Some(5), Some("active"), 2));
        assert!(port.interfaces[0].bfd && !port.interfaces[0].cfm && port.interfaces[1].cfm);
        assert!(
            port.interfaces[0].lldp && !port.interfaces[1].lldp && port.bond_mode.as_deref() == Some("balance-tcp")
        );
        assert_eq!((port.interfaces[0].ofport, port.interfaces[1].ofport), (Some(1), None));
    }
}

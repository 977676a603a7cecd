//! What Check looks at on the host: daemons, database, units, disks, the new database tool. Nothing is touched; the
//! conversion is tried on a copy.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sys::statvfs::statvfs;

use super::{command, ovsdb_server, procfs, unixctl};
use crate::host::{
    Bridge, Daemon, DaemonKind, Daemons, Database, DatabaseFacts, QueuedJob, ServiceManager, Unit, SWITCH_UNIT, UNITS,
};
use crate::report::{Finding, Severity};

/// Less than this free is refused, bytes: `/var/lib` takes the snapshot and the old binaries (about 30 MiB).
const STATE_MIN: u64 = 64 << 20;
/// Less than this free is refused, bytes: `/run` takes the journal while nothing may wait for a disk.
const RUN_MIN: u64 = 16 << 20;

const SWITCH: DaemonKind = DaemonKind::OvsVswitchd;

/// What the run to be checked for is to do.
#[derive(Debug, Clone, Default)]
pub struct CheckOptions {
    /// ovsdb-server is to be replaced too.
    pub replace_ovsdb: bool,
    /// The unit whose reload or restart job this is.
    pub called_by: Option<String>,
    /// Somebody else ends the old ovs-vswitchd and starts the new one.
    pub elsewhere: bool,
    /// Where snapshots and old binaries are kept, usually `/var/lib/ovs-graceful`.
    pub state_directory: PathBuf,
    /// Where journal and socket live, usually `/run/ovs-graceful`.
    pub run_directory: PathBuf,
}

/// Collects findings.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, severity: Severity, name: &str, object: impl ToString, cause: impl ToString, remedy: &str) {
        self.0.push(Finding {
            name: name.to_owned(),
            severity,
            object: object.to_string(),
            cause: cause.to_string(),
            remedy: remedy.to_owned(),
        });
    }

    fn ok(&mut self, name: &str, object: impl ToString, cause: impl ToString) {
        self.add(Severity::Ok, name, object, cause, "");
    }

    fn warn(&mut self, name: &str, object: impl ToString, cause: impl ToString, remedy: &str) {
        self.add(Severity::Warning, name, object, cause, remedy);
    }

    fn refuse(&mut self, name: &str, object: impl ToString, cause: impl ToString, remedy: &str) {
        self.add(Severity::Refused, name, object, cause, remedy);
    }
}

/// Looks at the host. Without root, or without Open vSwitch, that is the only finding.
pub fn findings(
    daemons: &dyn Daemons,
    database: &dyn Database,
    services: &dyn ServiceManager,
    options: &CheckOptions,
    until: Instant,
) -> Vec<Finding> {
    let mut found = Findings::default();
    if !nix::unistd::geteuid().is_root() {
        found.refuse("not-root", "this process", "it does not run as root", "run it with sudo");
        return found.0;
    }
    let Some((vswitchd, server)) = running(daemons, &mut found) else { return found.0 };
    tools(until, &mut found);
    namespaces(&vswitchd, &mut found);
    container(&vswitchd, options, &mut found);
    versions(daemons, &vswitchd, options, until, &mut found);
    match database.facts(until) {
        Ok(facts) => found.0.extend(database_findings(&facts)),
        Err(e) => found.refuse("database", e.object, e.cause, "see the log of ovsdb-server"),
    }
    if server.contained || options.elsewhere {
        found.ok("schema", "database", "the container of the new ovsdb-server brings it, and converts the database");
    } else {
        schema(&server, options, until, &mut found);
    }
    service_findings(services, &vswitchd, &server, options, until, &mut found);
    space(&options.state_directory, STATE_MIN, &mut found);
    space(&options.run_directory, RUN_MIN, &mut found);
    found.0
}

/// The two daemons, if each runs once.
fn running(daemons: &dyn Daemons, found: &mut Findings) -> Option<(Daemon, Daemon)> {
    let all = daemons.find_all(SWITCH).unwrap_or_default();
    let server = match daemons.find_ovsdb_server() {
        Ok(server) => Some(server),
        Err(e) => {
            let cause = format!("ovsdb-server does not run ({}: {})", e.object, e.cause);
            found.refuse("ovs-running", "Open vSwitch", cause, "start it: systemctl start openvswitch-switch");
            None
        }
    };
    match all.as_slice() {
        [one] => server.map(|server| {
            found.ok("ovs-running", "Open vSwitch", format!("pid {} and {}", server.id.pid, one.id.pid));
            (one.clone(), server)
        }),
        [] => {
            match procfs::pids().unwrap_or_default().into_iter().find(|pid| procfs::runs(*pid, SWITCH.program())) {
                Some(pid) => found.refuse(
                    "ovs-running",
                    format!("ovs-vswitchd (pid {pid})"),
                    "its control socket is not in our /run/openvswitch",
                    "a container has to share the host's /run/openvswitch (docs/containers.md)",
                ),
                None => {
                    let remedy = "start it: systemctl start openvswitch-switch";
                    found.refuse("ovs-running", "ovs-vswitchd", "it does not run", remedy);
                }
            }
            None
        }
        many => {
            let pids: Vec<i32> = many.iter().map(|daemon| daemon.id.pid).collect();
            let remedy = "stop all but the one that forwards; after an interrupted run: ovs-graceful recover";
            found.refuse("ovs-running", "ovs-vswitchd", format!("it runs more than once: {pids:?}"), remedy);
            None
        }
    }
}

/// The programs of the package that a run works with.
fn tools(until: Instant, found: &mut Findings) {
    for tool in ["ovs-ofctl", "ovsdb-tool"] {
        if let Err(e) = command::run_well(tool, &["--version"], None, until) {
            found.refuse("tools", tool, e.cause, "install the openvswitch package's command line tools");
        }
    }
}

/// The freeze and the sockets are those of our own network namespace.
fn namespaces(vswitchd: &Daemon, found: &mut Findings) {
    if !procfs::shares(vswitchd.id.pid, "net").unwrap_or(false) {
        let object = format!("ovs-vswitchd (pid {})", vswitchd.id.pid);
        let remedy = "run ovs-graceful in the daemon's network namespace (nsenter -n)";
        found.refuse("network-namespace", object, "it runs in another network namespace", remedy);
    }
}

/// A container is not ours to start (docs/containers.md).
fn container(vswitchd: &Daemon, options: &CheckOptions, found: &mut Findings) {
    let object = format!("ovs-vswitchd (pid {})", vswitchd.id.pid);
    match (vswitchd.contained, options.elsewhere) {
        (true, false) => found.refuse(
            "container",
            object,
            "it runs in a container, which has to be restarted by whoever runs it",
            "ovs-graceful restart --restart-command 'docker restart NAME'",
        ),
        (true, true) => found.ok("container", object, "it runs in a container; its files are kept for the way back"),
        (false, _) => {}
    }
}

fn versions(daemons: &dyn Daemons, vswitchd: &Daemon, options: &CheckOptions, until: Instant, found: &mut Findings) {
    let versions = match daemons.versions(vswitchd, until) {
        Ok(versions) => versions,
        Err(e) => {
            let remedy = "the daemon may hang: see its log";
            return found.refuse("versions", e.object, e.cause, remedy);
        }
    };
    found.ok("versions", "ovs-vswitchd", format!("{} runs, {} is installed", versions.running, versions.installed));
    if vswitchd.contained {
        // Looked at with the container's files, by Check's keeping of it.
        return;
    }
    // The way back: the file of the running program, even where the package has replaced it.
    let running = format!("/proc/{}/exe", vswitchd.id.pid);
    let answer = command::run_well(&running, &["--version"], None, until);
    let version = answer.as_deref().ok().and_then(unixctl::parse_version);
    if version.as_deref() == Some(versions.running.as_str()) {
        return found.ok("old-binary", vswitchd.exe.display(), "it runs, so there is a way back");
    }
    // A package may have removed shared objects of its own; the running program has them open.
    let name = format!("check.{}", std::process::id());
    let scratch = [&options.run_directory, &options.state_directory].map(|folder| folder.join(&name));
    let saved = daemons.save_program(vswitchd, &versions.running, &scratch, until);
    scratch.iter().for_each(|folder| drop(fs::remove_dir_all(folder)));
    if saved.is_ok() {
        let cause = "it runs with the shared objects that it has open, so there is a way back";
        return found.ok("old-binary", vswitchd.exe.display(), cause);
    }
    let cause = match answer {
        Ok(text) => format!("it says {:?} and not {}", text.lines().next().unwrap_or_default(), versions.running),
        Err(e) => format!("it does not run any more: {}", e.cause),
    };
    let remedy = "its libraries have been replaced; after a failure there is no way back to the old version";
    match versions.running == versions.installed {
        true => found.warn("old-binary", vswitchd.exe.display(), cause, remedy),
        false => found.refuse("old-binary", vswitchd.exe.display(), cause, remedy),
    }
}

/// What the database alone tells.
pub fn database_findings(facts: &DatabaseFacts) -> Vec<Finding> {
    let mut found = Findings::default();
    if facts.is_on("flow-restore-wait") {
        found.refuse(
            "restore-wait-stuck",
            "other_config:flow-restore-wait",
            "it is set: ovs-vswitchd would start and forward nothing, even after a reboot",
            "ovs-graceful recover; or: ovs-vsctl remove open_vswitch . other_config flow-restore-wait",
        );
    }
    if facts.is_on("hw-offload") {
        found.refuse(
            "hw-offload",
            "other_config:hw-offload",
            "flows live in TC filters, which a freeze of the datapath does not reach",
            "ovs-vsctl remove open_vswitch . other_config hw-offload and restart, or restart without ovs-graceful",
        );
    }
    let dpdk = facts.other_config.get("dpdk-init").is_some_and(|v| v == "true" || v == "try");
    if dpdk || facts.dpdk_initialized {
        let remedy = "restart without ovs-graceful";
        found.refuse("dpdk", "other_config:dpdk-init", "DPDK starts only after the old daemon has gone", remedy);
    }
    facts.bridges.iter().for_each(|bridge| bridge_findings(bridge, &mut found));
    if found.0.is_empty() {
        found.ok(
            "bridges",
            "database",
            format!("{} bridges, nothing in them is outside the promise", facts.bridges.len()),
        );
    }
    found.0
}

fn bridge_findings(bridge: &Bridge, found: &mut Findings) {
    let object = format!("bridge {}", bridge.name);
    if !matches!(bridge.datapath_type.as_str(), "" | "system") {
        let cause = format!("its datapath ({}) is not the kernel's and ends with the daemon", bridge.datapath_type);
        found.refuse("netdev-bridge", &object, cause, "restart without ovs-graceful, in a maintenance window");
    }
    if bridge.stp || bridge.rstp {
        let name = if bridge.stp { "STP" } else { "RSTP" };
        let cause = format!("{name} is on: after a restart its ports listen for about 30 s");
        found.refuse("spanning-tree", &object, cause, "restart without ovs-graceful, in a maintenance window");
    }
    for port in &bridge.ports {
        let object = format!("{object}, port {}", port.name);
        if port.lacp.is_some() {
            found.warn("lacp", &object, "LACP negotiates anew after the restart", "use LACP fallback or slow timers");
        }
        for interface in &port.interfaces {
            let object = format!("{object}, interface {}", interface.name);
            for (on, name) in [(interface.bfd, "BFD"), (interface.cfm, "CFM")] {
                if on {
                    let cause = format!("{name} starts again in state Down");
                    found.warn(&name.to_lowercase(), &object, cause, "pause what acts on it for the time of the run");
                }
            }
        }
    }
    for (on, name) in [(bridge.sflow, "sFlow"), (bridge.ipfix, "IPFIX"), (bridge.netflow, "NetFlow")] {
        if on {
            found.warn("sampling", &object, format!("{name} misses packets of the gap; their forwarding does not"), "");
        }
    }
}

/// Converts a copy of the database with the installed tool (hazards 18).
fn schema(server: &Daemon, options: &CheckOptions, until: Instant, found: &mut Findings) {
    let file = ovsdb_server::database_file(server);
    let object = file.display().to_string();
    match conversion(&file, &ovsdb_server::schema_file(server), options, until) {
        Ok(false) => found.ok("schema", object, "the installed schema is the one it has"),
        Ok(true) if options.replace_ovsdb => found.ok("schema", object, "a copy of it was converted to the new schema"),
        Ok(true) => found.refuse(
            "schema",
            object,
            "the installed version has a newer schema, and with --no-ovsdb it would not be converted",
            "leave --no-ovsdb out",
        ),
        Err(cause) => found.refuse(
            "schema",
            object,
            format!("the installed ovsdb-tool cannot convert a copy of it: {cause}"),
            "repair the database or the package first: a failed conversion ends in an empty database",
        ),
    }
}

/// Whether the database needs a conversion, and whether that works, tried on a copy in a directory of our own.
fn conversion(file: &Path, schema: &Path, options: &CheckOptions, until: Instant) -> Result<bool, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let parent = options.run_directory.parent().unwrap_or(Path::new("/run"));
    let directory = Private::create(parent).map_err(|e| text(&e))?;
    let copy = directory.0.join("conf.db");
    fs::copy(file, &copy).map_err(|e| format!("cannot copy it: {e}"))?;
    let (copy, schema) = (copy.to_string_lossy().into_owned(), schema.to_string_lossy().into_owned());
    let tool = |words: &[&str]| command::run_well("ovsdb-tool", words, None, until).map_err(|e| text(&e));
    if tool(&["needs-conversion", &copy, &schema])?.trim() != "yes" {
        return Ok(false);
    }
    tool(&["convert", &copy, &schema])?;
    Ok(true)
}

/// A directory that only root can look into and that goes when we do.
struct Private(PathBuf);

impl Private {
    fn create(parent: &Path) -> std::io::Result<Self> {
        let path = parent.join(format!("ovs-graceful-check.{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Private(path))
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn service_findings(
    services: &dyn ServiceManager,
    vswitchd: &Daemon,
    server: &Daemon,
    options: &CheckOptions,
    until: Instant,
    found: &mut Findings,
) {
    if !services.is_running() {
        return found.ok("systemd", "systemd", "it does not run; daemons are started as they were");
    }
    match services.jobs(until) {
        Ok(jobs) => {
            if jobs.iter().any(|job| job.unit == "shutdown.target" && job.kind == "start") {
                found.refuse("shutdown", "shutdown.target", "the machine is being stopped", "wait for the next boot");
            }
            for job in jobs.iter().filter(|job| UNITS.contains(&job.unit.as_str()) && !comes_with_us(job, options)) {
                let remedy = "wait until it has ended (systemctl list-jobs)";
                found.refuse("unit-job", &job.unit, format!("a {} job is queued for it", job.kind), remedy);
            }
        }
        Err(e) => found.refuse("systemd", e.object, e.cause, "systemctl must work before daemons can be handed over"),
    }
    match services.owner(vswitchd, until) {
        Ok(Some(unit)) => owner_findings(&unit, options.called_by.as_deref() == Some(&unit.name), found),
        Ok(None) if options.elsewhere => {}
        Ok(None) => found.ok("unit", "ovs-vswitchd", "no unit owns it; it is started as it was"),
        Err(e) => found.refuse("unit", e.object, e.cause, "systemctl status ovs-vswitchd"),
    }
    if options.replace_ovsdb {
        if let Ok(Some(unit)) = services.owner(server, until) {
            for word in ovsdb_server::destructive_options(&unit) {
                let cause = format!("its options hold {word}, which is switched off for the run");
                found.warn("ovs-ctl-options", &unit.name, cause, "take it out: every restart deletes configuration");
            }
        }
    }
}

/// The job that has called us, and where that is the restart of ovs-vswitchd, those of the units that are restarted with
/// it.
fn comes_with_us(job: &QueuedJob, options: &CheckOptions) -> bool {
    match options.called_by.as_deref() {
        _ if job.kind == "stop" => false,
        Some(SWITCH_UNIT) => true,
        Some(unit) => job.unit == unit,
        None => false,
    }
}

/// A unit that has called us is being reloaded, or restarted and about to stop its daemon.
fn owner_findings(unit: &Unit, called_us: bool, found: &mut Findings) {
    let is = |active: &str, sub: &str| unit.active_state == active && unit.sub_state == sub;
    let called = is("deactivating", "stop") || is("reloading", "reload");
    if !(is("active", "running") || called_us && called) {
        let cause = format!("it is {} ({})", unit.active_state, unit.sub_state);
        return found.refuse("unit", &unit.name, cause, "systemctl status; wait or restart it first");
    }
    if unit.exec_start.is_empty() {
        return found.refuse("unit", &unit.name, "it has no ExecStart=", "reinstall the openvswitch package");
    }
    let cause = match &unit.pid_file {
        Some(path) => format!("it owns the daemon and follows {}", path.display()),
        None => "it owns the daemon; PIDFile= is missing in it, a run writes that to /run/systemd/system".to_owned(),
    };
    found.ok("unit", &unit.name, cause);
}

/// Free space for those without root's reserve, which is none of ours to use up.
fn space(path: &Path, least: u64, found: &mut Findings) {
    let Some(there) = path.ancestors().find(|path| path.exists()) else { return };
    match statvfs(there) {
        Ok(stat) => {
            let free = stat.blocks_available() * stat.fragment_size();
            if free >= least {
                return found.ok("space", path.display(), format!("{} MiB free", free >> 20));
            }
            let cause = format!("{} MiB free, {} MiB are needed", free >> 20, least >> 20);
            found.refuse("space", path.display(), cause, "make room on that file system");
        }
        Err(e) => found.refuse("space", path.display(), e, "look at that file system"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Interface, Port};
    use std::collections::BTreeMap;

    fn names(facts: &DatabaseFacts) -> Vec<(String, Severity)> {
        database_findings(facts).into_iter().map(|f| (f.name, f.severity)).collect()
    }

    #[test]
    fn a_plain_host_is_fine() {
        let facts =
            DatabaseFacts { bridges: vec![Bridge { name: "br0".into(), ..Bridge::default() }], ..Default::default() };
        assert_eq!(names(&facts), [("bridges".into(), Severity::Ok)]);
    }

    #[test]
    fn what_cannot_be_kept_is_refused() {
        let on = |key: &str| DatabaseFacts {
            other_config: BTreeMap::from([(key.to_owned(), "true".to_owned())]),
            ..DatabaseFacts::default()
        };
        for (key, name) in
            [("flow-restore-wait", "restore-wait-stuck"), ("hw-offload", "hw-offload"), ("dpdk-init", "dpdk")]
        {
            assert_eq!(names(&on(key)), [(name.into(), Severity::Refused)]);
        }
        let with = |bridge: Bridge| DatabaseFacts { bridges: vec![bridge], ..DatabaseFacts::default() };
        let netdev = with(Bridge { datapath_type: "netdev".into(), ..Bridge::default() });
        assert_eq!(names(&netdev), [("netdev-bridge".into(), Severity::Refused)]);
        assert_eq!(
            names(&with(Bridge { rstp: true, ..Bridge::default() })),
            [("spanning-tree".into(), Severity::Refused)]
        );
    }

    #[test]
    fn what_is_outside_the_promise_is_named_by_interface() {
        let interface = Interface { name: "e0".into(), bfd: true, cfm: true, ..Interface::default() };
        let port =
            Port { name: "bond0".into(), lacp: Some("active".into()), interfaces: vec![interface], ..Port::default() };
        let bridge = Bridge { name: "br0".into(), ports: vec![port], ipfix: true, ..Bridge::default() };
        let found = database_findings(&DatabaseFacts { bridges: vec![bridge], ..DatabaseFacts::default() });
        let seen: Vec<_> = found.iter().map(|f| (f.name.as_str(), f.severity, f.object.as_str())).collect();
        assert_eq!(
            seen,
            [
                ("lacp", Severity::Warning, "bridge br0, port bond0"),
                ("bfd", Severity::Warning, "bridge br0, port bond0, interface e0"),
                ("cfm", Severity::Warning, "bridge br0, port bond0, interface e0"),
                ("sampling", Severity::Warning, "bridge br0"),
            ]
        );
    }

    #[test]
    fn the_private_directory_is_private_and_goes() {
        use std::os::unix::fs::PermissionsExt;
        let parent = tempfile::tempdir().unwrap();
        let private = Private::create(parent.path()).unwrap();
        assert_eq!(fs::metadata(&private.0).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(Private::create(parent.path()).is_err());
        drop(private);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}

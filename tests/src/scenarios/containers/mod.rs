//! Daemons that run in containers, as Kolla and Kubernetes have them: whoever runs the container restarts it in the middle
//! of a run. The runtime is crun, that of podman; images of two releases are layers over the guest's own files.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{json, Value};

use super::doors::{told, wait_until_over};
use super::{aftermath, network, plain, Custom};
use crate::command::{shell, shell_lenient, wait_until};
use crate::guest::{facts, run, say};
use crate::outcome::{Job, Outcome};
use crate::packages::Packages;

/// See the module.
pub struct Containers {
    whole: bool,
}

/// Every case.
pub const WHOLE: Containers = Containers { whole: true };
/// Without what goes wrong with the command that starts the container again.
pub const SAMPLE: Containers = Containers { whole: false };

/// What the images are made of.
pub const IMAGES: Packages = Packages::Layers("trixie");
const SCRIPT: &str = include_str!("container");
/// Where the script has everything: on a file system of its own, because a layer may not lie within another.
const TOP: &str = "/srv/containers";
/// The switch, as Kolla runs it: the first process of its container.
const SWITCH: &str = "exec ovs-vswitchd unix:/run/openvswitch/db.sock -vconsole:off --pidfile --log-file --mlockall";
/// The database, as Kolla runs it, but that it converts the database first, as ovs-ctl does.
const DATABASE: &str = "db=/etc/openvswitch/conf.db schema=/usr/share/openvswitch/vswitch.ovsschema
[ \"$(ovsdb-tool needs-conversion $db $schema)\" != yes ] || ovsdb-tool convert $db $schema
exec ovsdb-server $db -vconsole:off --remote=punix:/run/openvswitch/db.sock --pidfile --log-file";
/// Both in one container, by ovs-ctl, as OVN-Kubernetes has them.
const BOTH: &str = "ctl=/usr/share/openvswitch/scripts/ovs-ctl
trap '$ctl stop; exit 0' TERM
$ctl --system-id=random start
sleep infinity &
wait";

impl Custom for Containers {
    fn name(&self) -> &'static str {
        match self.whole {
            true => "containers_whole",
            false => "containers",
        }
    }

    fn about(&self) -> &'static str {
        match self.whole {
            true => "containers, with wrong commands",
            false => "daemons in containers (crun): restarted, upgraded 3.1 to 3.5 and back, a bad image, both in one",
        }
    }

    fn by_hand(&self) -> bool {
        self.whole
    }

    fn packages(&self) -> Packages {
        IMAGES
    }

    fn runs(&self, _arguments: &[String]) -> Result<u32> {
        Ok(if self.whole { 16 } else { 10 })
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        prepare()?;
        plain::set_up()?;
        network::patient_veth()?;
        let ended = rounds(self.whole, out, outcome);
        shell_lenient(&format!("for log in {TOP}/*.log; do cp $log {}/$(basename $log); done", out.display()));
        ended
    }
}

/// What must come of a round.
#[derive(Clone, Copy)]
struct Wanted {
    /// Exit code of the run: one of these.
    exit: &'static [u64],
    /// The image whose version forwards afterwards.
    image: &'static str,
    /// The daemon of before goes on.
    stays: bool,
}

const DONE: &[u64] = &[0, 30];
const OLD: Wanted = Wanted { exit: DONE, image: "old", stays: false };
const NEW: Wanted = Wanted { exit: DONE, image: "new", stays: false };

fn rounds(whole: bool, out: &Path, outcome: &mut Outcome) -> Result<()> {
    let impostor = impostor()?;
    // While the host has its programs.
    outcome.note("versions of the images", json!([version_of("old"), version_of("new")]));
    refused(outcome);
    let log = |name: &str| out.join(name.replace(' ', "-"));
    let restart = |name: &str, command: &str, wanted: Wanted, outcome: &mut Outcome| {
        round(name, || restart_by(command, &log(name)), wanted, outcome)
    };
    restart("restart", "container restart switch", OLD, outcome)?;
    database_alone(outcome)?;
    restart("upgrade", "container restart switch new", NEW, outcome)?;
    round("downgrade by hooks", || by_hooks("container restart switch old"), OLD, outcome)?;
    let back = Wanted { exit: &[21], image: "old", stays: false };
    restart("an image that crashes", "container restart switch bad; sleep 2", back, outcome)?;
    // The program of before runs outside of any container now, and the report says how to go on.
    shell_lenient("container stop switch");
    let ended = "kill $(cat /run/openvswitch/ovs-vswitchd.pid); container start switch old";
    restart("a good image after it", ended, OLD, outcome)?;
    if whole {
        wrong_commands(&restart, outcome)?;
    }
    killed(&log("killed"), outcome)?;
    let alive = Path::new("/proc").join(impostor.to_string()).exists();
    outcome.check("a user's own ovs-vswitchd was left alone", alive, impostor);
    both_in_one(&log("both"), outcome)
}

/// What starts the container again does not, or takes more down than that.
fn wrong_commands(restart: Restart<'_>, outcome: &mut Outcome) -> Result<()> {
    let nothing = Wanted { exit: &[21], image: "old", stays: true };
    restart("a command that fails", "container restart swich", nothing, outcome)?;
    restart("a command that does nothing", "true", nothing, outcome)?;
    nobody_restarts(nothing, outcome)?;
    // What the daemon would take down with it is refused (docs/containers.md).
    let cleanup = "ovs-appctl -t /run/openvswitch/ovs-vswitchd.1.ctl exit --cleanup; container restart switch";
    restart("exit with cleanup", cleanup, OLD, outcome)?;
    without_tools(outcome)
}

/// A round with this name, this command and what must come of it.
type Restart<'a> = &'a dyn Fn(&str, &str, Wanted, &mut Outcome) -> Result<()>;

/// The daemons of the image make way for containers of the same release.
pub fn prepare() -> Result<()> {
    shell("systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server; cp -a /lab/packages/runtime/* /")?;
    let script = Path::new("/usr/local/bin/container");
    fs::write(script, SCRIPT)?;
    fs::set_permissions(script, fs::Permissions::from_mode(0o755))?;
    shell(&format!(
        "mkdir -p {TOP}; mount -t tmpfs tmpfs {TOP}; mkdir {TOP}/host; mount --bind / {TOP}/host
         mkdir {TOP}/images; mv /lab/packages/old /lab/packages/new {TOP}/images/"
    ))?;
    // An image whose switch crashes: the layer of the newer release, and a switch that is none.
    let switch = "usr/lib/openvswitch-switch/ovs-vswitchd";
    shell(&format!(
        "cp -a {TOP}/images/new {TOP}/images/bad
         printf '#!/bin/sh\\ncase \"$*\" in *--version*) echo \"ovs-vswitchd (Open vSwitch) 9.9.9\"; exit ;; esac\\nkill -SEGV $$\\n' \
            > {TOP}/images/bad/{switch}",
    ))?;
    fs::write(format!("{TOP}/config.json"), config().to_string())?;
    for (name, script) in [("switch", SWITCH), ("database", DATABASE), ("both", BOTH)] {
        fs::write(format!("{TOP}/{name}.run"), script)?;
    }
    start_both()
}

fn start_both() -> Result<()> {
    shell("container start database old; container start switch old")?;
    let up = || shell_lenient("timeout 5 ovs-vsctl --timeout=5 show").contains("ovs_version") && !switch().is_empty();
    wait_until("both daemons run in their containers", Duration::from_secs(30), Duration::from_millis(200), up)
}

/// What crun is given (config.md of the OCI runtime specification): privileged, with the host's network.
fn config() -> Value {
    let bind = |path: &str| json!({ "destination": path, "source": path, "type": "none", "options": ["rbind", "rslave", "rw"] });
    let mut mounts = vec![json!({ "destination": "/proc", "source": "proc", "type": "proc" })];
    let shared =
        ["/dev", "/sys", "/run/openvswitch", "/etc/openvswitch", "/var/log/openvswitch", "/var/lib/openvswitch"];
    mounts.extend(shared.map(bind));
    let capabilities = [
        "NET_ADMIN",
        "NET_RAW",
        "NET_BROADCAST",
        "SYS_ADMIN",
        "SYS_MODULE",
        "SYS_NICE",
        "SYS_RESOURCE",
        "IPC_LOCK",
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "KILL",
        "SETUID",
        "SETGID",
        "SETPCAP",
    ]
    .map(|name| format!("CAP_{name}"));
    let sets: serde_json::Map<String, Value> = ["bounding", "effective", "permitted", "inheritable"]
        .map(|set| (set.to_owned(), json!(capabilities)))
        .into_iter()
        .collect();
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/sh", "-e", "/run-me"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": sets,
        },
        "root": { "path": "rootfs" },
        "mounts": mounts,
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }] },
    })
}

/// A program of that name which a user runs in namespaces of his own, where it is process 1, as the real one in its
/// container; his process. It is there all the time and must not be taken for a daemon.
fn impostor() -> Result<u32> {
    shell(
        "cp /bin/sleep /tmp/ovs-vswitchd
         setsid setpriv --reuid=65534 --regid=65534 --clear-groups \
            unshare --user --map-root-user --pid --fork --mount-proc /tmp/ovs-vswitchd infinity >/dev/null 2>&1 &",
    )?;
    let his = || facts::daemons("ovs-vswitchd").into_iter().find(|daemon| is_impostor(daemon.pid));
    let there = || his().is_some();
    wait_until("a user's ovs-vswitchd runs", Duration::from_secs(20), Duration::from_millis(100), there)?;
    his().map(|daemon| daemon.pid).context("it has ended")
}

fn is_impostor(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("Uid:") && line.contains("65534"))
}

/// A run that would start the daemon by itself, on the host.
fn refused(outcome: &mut Outcome) {
    say("refused");
    let before = switch();
    for words in ["check", "restart"] {
        let said = shell_lenient(&format!("ovs-graceful {words} 2>&1; echo exit=$?"));
        let told = said.contains("exit=10") && said.contains("container") && said.contains("--restart-command");
        outcome.check(format!("{words}: refused, with its remedy"), told, said);
    }
    let plan =
        shell_lenient("ovs-graceful restart --plan --restart-command 'container restart switch' 2>&1; echo exit=$?");
    outcome.check("plan: names the command", plan.contains("exit=0") && plan.contains("`container restart"), plan);
    let now = switch();
    outcome.check("nothing was touched", before == now, json!([before, now]));
}

fn by_hooks(command: &str) -> String {
    shell_lenient(&format!(
        "timeout 240 ovs-graceful hook container-stop 2>&1; echo stop=$?
         timeout 60 ovs-graceful hook container-stop 2>&1; echo second=$?
         {command}
         timeout 240 ovs-graceful hook container-started > /run/lab-started 2>&1; echo exit=$?; cat /run/lab-started"
    ))
}

/// Whoever was to restart the container has forgotten it.
fn nobody_restarts(wanted: Wanted, outcome: &mut Outcome) -> Result<()> {
    let file = Path::new("/etc/ovs-graceful/config.toml");
    fs::create_dir_all("/etc/ovs-graceful")?;
    fs::write(file, "[limits]\nelsewhere_ms = 5000\n")?;
    round("nobody restarts", || by_hooks("true"), wanted, outcome)?;
    fs::remove_file(file).map_err(Into::into)
}

/// A container of ovsdb-server needs no run: the switch goes on without it.
fn database_alone(outcome: &mut Outcome) -> Result<()> {
    let name = "the database alone";
    say(name);
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(2));
    let before = facts::DAEMONS.map(facts::daemons);
    shell("container restart database new")?;
    let schema =
        || shell_lenient("timeout 5 ovsdb-client get-schema-version unix:/run/openvswitch/db.sock Open_vSwitch");
    wait_until("the database answers", Duration::from_secs(30), Duration::from_millis(200), || {
        schema().starts_with("8.")
    })?;
    std::thread::sleep(Duration::from_secs(2));
    let now = facts::DAEMONS.map(facts::daemons);
    outcome.check(format!("{name}: another server"), before[0] != now[0] && before[1] == now[1], json!([before, now]));
    let schema = schema();
    outcome.check(format!("{name}: its newer schema"), schema.trim() == "8.8.0", schema);
    aftermath::new_traffic_passes(name, outcome);
    aftermath::finish(name, live, false, outcome).map(drop)
}

/// A host that has none of Open vSwitch's programs: those of the container are used. The layer `old` has its own.
fn without_tools(outcome: &mut Outcome) -> Result<()> {
    let each =
        |script: &str| format!("for tool in ovs-ofctl ovsdb-tool ovs-vsctl ovs-dpctl ovs-appctl; do {script}; done");
    let (aside, again) =
        (each("mv /usr/bin/$tool /usr/bin/$tool.aside"), each("mv /usr/bin/$tool.aside /usr/bin/$tool"));
    let words = "timeout 240 ovs-graceful restart --restart-command 'container restart switch' 2>&1";
    let door =
        || shell_lenient(&format!("{aside}; said=$({words}); code=$?; {again}; echo exit=$code; echo \"$said\""));
    round("a host without tools", door, OLD, outcome)
}

/// The supervisor dies just before the container is restarted; its recovery waits for the new daemon.
fn killed(log: &Path, outcome: &mut Outcome) -> Result<()> {
    let supervisor = "sed -n \"s/.*\\\"pid\\\": *\\([0-9]*\\).*/\\1/p\" /run/ovs-graceful/lock";
    let command = format!("kill -KILL $({supervisor}); container restart switch");
    let recovered = Wanted { exit: &[21], image: "old", stays: false };
    let known = run::known();
    let door = || {
        let said = restart_by(&command, log);
        let id = run::known().into_iter().find(|id| !known.contains(id));
        let over = id.context("no run").and_then(|id| run::wait_for_recovery(&id)).map(drop);
        let gone = over.and_then(|()| run::wait_until_unit_gone(Duration::from_secs(20)));
        format!("{said}\n{gone:?}")
    };
    round("the supervisor is killed", door, recovered, outcome)
}

/// Both daemons in one container, as Kubernetes has them: the database goes and comes in the middle of the run.
fn both_in_one(log: &Path, outcome: &mut Outcome) -> Result<()> {
    shell("container stop switch; container stop database; container start both old")?;
    wait_until("both daemons run", Duration::from_secs(60), Duration::from_millis(200), || {
        facts::DAEMONS.iter().all(|name| !facts::daemons(name).is_empty())
            && shell_lenient("ovs-ofctl dump-flows br0").contains("NORMAL")
    })?;
    plain::rules()?;
    network::ping("ns1", "10.9.0.2")?;
    round("both in one", || restart_by("container restart both new", &log.with_file_name("both")), NEW, outcome)?;
    round("both in one, back", || by_hooks("container restart both old"), OLD, outcome)
}

fn restart_by(command: &str, log: &Path) -> String {
    let words = format!("timeout 240 ovs-graceful restart --restart-command '{command}' > {} 2>&1", log.display());
    shell_lenient(&format!("{words}; echo exit=$?; cat {}", log.display()))
}

/// The ovs-vswitchd that is no monitor: its control socket is there.
fn switch() -> Vec<(u32, u64, String)> {
    let own = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.to_owned();
        line.split_whitespace().last().map(|own| format!("/run/openvswitch/ovs-vswitchd.{own}.ctl"))
    };
    let found = facts::daemons("ovs-vswitchd").into_iter().filter(|daemon| !is_impostor(daemon.pid));
    let found = found.filter_map(|daemon| Some((daemon.pid, daemon.start_time, own(daemon.pid)?)));
    found.filter(|(_, _, control)| Path::new(control).exists()).collect()
}

/// The image `old` is of the guest's own release, `new` of Debian 13.
fn version_of(image: &str) -> String {
    static OWN: OnceLock<String> = OnceLock::new();
    let own = || shell_lenient("ovs-vswitchd --version | awk 'NR == 1 { print \" \" $NF }'").trim_end().to_owned();
    match image {
        "old" => OWN.get_or_init(own).clone(),
        _ => " 3.5.0".to_owned(),
    }
}

fn version() -> String {
    let control = switch().first().map(|(_, _, control)| control.clone()).unwrap_or_default();
    shell_lenient(&format!("timeout 20 ovs-appctl -t {control} version | head -1")).trim().to_owned()
}

/// One restart under traffic.
fn round(name: &str, door: impl FnOnce() -> String, wanted: Wanted, outcome: &mut Outcome) -> Result<()> {
    say(name);
    let live = plain::start_probes()?;
    std::thread::sleep(Duration::from_secs(3));
    let (before, rules) = (switch(), facts::promised(&plain::bridges()));
    let known = run::known();
    let said = door();
    wait_until_over()?;
    let runs: Vec<Value> = run::known().iter().filter(|id| !known.contains(id)).map(|id| told(id)).collect();
    let as_wanted =
        matches!(runs.as_slice(), [one] if one["exit_code"].as_u64().is_some_and(|c| wanted.exit.contains(&c)));
    outcome.check(format!("{name}: the run ended as it should"), as_wanted, json!([said, runs]));
    let code = said.lines().find_map(|line| line.strip_prefix("exit="));
    let code = code.and_then(|code| code.parse::<u64>().ok());
    outcome.check(format!("{name}: and told so"), code.is_some_and(|c| wanted.exit.contains(&c)), &said);
    if let Some(second) = said.lines().find_map(|line| line.strip_prefix("second=")) {
        outcome.check(format!("{name}: a second one is told to wait"), second == "11", &said);
    }
    std::thread::sleep(Duration::from_secs(3));
    let now = switch();
    let right = now.len() == 1 && (before == now) == wanted.stays;
    outcome.check(format!("{name}: one ovs-vswitchd, the right one"), right, json!([before, now]));
    let (version, right) = (version(), version_of(wanted.image));
    outcome.check(format!("{name}: of the right version"), version.ends_with(&right), json!([version, right]));
    aftermath::nothing_left(name, outcome);
    aftermath::as_before(name, &rules, outcome);
    aftermath::new_traffic_passes(name, outcome);
    aftermath::finish(name, live, false, outcome).map(drop)
}

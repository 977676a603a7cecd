//! The kernel module of this machine, by the tools that come with every distribution: `modprobe`, `ip`, `ovs-dpctl`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use dpfreeze::ovs::VportKind;
use dpfreeze::snapshot::Snapshot;
use serde_json::Value;

use super::command::{run, run_well};
use crate::host::datapath::DATAPATH;
use crate::host::module::{Device, KernelModule};
use crate::host::{Context, HostError, Result};
use crate::report::{Finding, Findings, Name};

/// The module of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealModule;

const MODULE: &str = "openvswitch";
/// How long the last reference to the module may take to go: a grace period of RCU.
const LET_GO: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// What iproute2 prints for a life time without an end, s.
const FOR_EVER: u64 = u32::MAX as u64;
/// Folders of /proc/sys/net with a folder for each device.
const SETTINGS: [&str; 4] = ["ipv4/conf", "ipv6/conf", "ipv4/neigh", "ipv6/neigh"];

/// The kernel complains about whoever uses them; each has a twin in milliseconds.
const DEPRECATED: [&str; 2] = ["base_reachable_time", "retrans_time"];

impl KernelModule for RealModule {
    fn obstacles(&self, now: &Snapshot, until: Instant) -> Result<Vec<Finding>> {
        let mut found = Findings::default();
        let mut refuse =
            |object: String, cause: String, remedy: &str| found.refuse(Name::Module, object, cause, remedy);
        if !loaded() {
            refuse(MODULE.into(), "it is part of the kernel, no module".into(), "boot the new kernel");
        }
        if let Err(error) = run_well("modinfo", &["-F", "filename", MODULE], None, until) {
            refuse(MODULE.into(), format!("it could not be loaded again: {error}"), "install the module's package");
        }
        if let Err(error) = run_well("ip", &["-j", "address", "show", "dev", "lo"], None, until) {
            refuse("ip".into(), format!("addresses cannot be kept: {error}"), "install iproute2 (4.16 or later)");
        }
        for other in holders().into_iter().filter(|holder| !holder.starts_with("vport_")) {
            refuse(MODULE.into(), format!("module {other} uses it"), "unload that one first");
        }
        for other in now.datapaths.iter().map(|all| &all.datapath.name).filter(|name| *name != DATAPATH) {
            refuse(
                format!("datapath {other}"),
                "it is not Open vSwitch's own and would be lost".into(),
                "delete it first",
            );
        }
        let vports = now.datapath(DATAPATH).map_or(&[][..], |datapath| &datapath.vports);
        for vport in vports.iter().filter(|vport| vport.kind() == VportKind::Internal) {
            let object = format!("device {}", vport.name);
            if vport.netnsid.is_some() {
                let cause =
                    "it is in another network namespace, and would come back in this one, without its addresses";
                refuse(object, cause.into(), "bring it back to this namespace for the reload, or remove its port");
            } else if let Some(upper) = upper(&vport.name) {
                let cause = format!("{upper} stands on it and would vanish with it");
                let remedy = format!("`ip link delete {upper}`, and make it again after the reload");
                refuse(object, cause, &remedy);
            }
        }
        Ok(found.into_inner())
    }

    fn devices(&self, names: &[String], until: Instant) -> Result<Vec<Device>> {
        names.iter().map(|name| device(name, until)).collect()
    }

    fn reload(&self, until: Instant) -> Result<Vec<String>> {
        let before = version();
        let ports = vport_modules();
        let unloaded = unload(&ports, until);
        for module in std::iter::once(MODULE).chain(ports.iter().map(String::as_str)) {
            run_well("modprobe", &[module], None, until)?;
        }
        unloaded?;
        Ok(vec![before, version()])
    }

    fn put_back(&self, devices: &[Device], until: Instant) -> Result<Vec<String>> {
        let mut failed = Vec::new();
        for wanted in devices {
            if !Path::new("/sys/class/net").join(&wanted.name).exists() {
                failed.push(format!("device {} is not there any more", wanted.name));
                continue;
            }
            put_device_back(wanted, &mut failed, until)?;
        }
        Ok(failed)
    }
}

fn loaded() -> bool {
    Path::new("/sys/module").join(MODULE).join("initstate").exists()
}

/// The loaded module's `srcversion`; empty where it has none.
fn version() -> String {
    let path = Path::new("/sys/module").join(MODULE).join("srcversion");
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Modules that use it.
fn holders() -> Vec<String> {
    let entries = fs::read_dir(Path::new("/sys/module").join(MODULE).join("holders"));
    let mut names: Vec<String> =
        entries.into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn vport_modules() -> Vec<String> {
    holders().into_iter().filter(|name| name.starts_with("vport_")).collect()
}

/// A device that stands on `name` (a VLAN, a bridge or bond that it is a member of).
fn upper(name: &str) -> Option<String> {
    let entries = fs::read_dir(Path::new("/sys/class/net").join(name)).ok()?;
    let mut names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    // Every port of the datapath has the datapath's own device above it.
    names.find_map(|entry| Some(entry.strip_prefix("upper_")?.to_owned()).filter(|upper| upper != DATAPATH))
}

/// Deletes the datapath, then the modules that only it needed.
fn unload(ports: &[String], until: Instant) -> Result<()> {
    let datapath = format!("system@{DATAPATH}");
    if let Err(error) = run_well("ovs-dpctl", &["del-dp", &datapath], None, until) {
        // Where it is gone already nothing is wrong.
        let listed = run_well("ovs-dpctl", &["dump-dps"], None, until)?;
        if listed.split_whitespace().any(|name| name == datapath) {
            return Err(error);
        }
    }
    let until = until.min(Instant::now() + LET_GO);
    let modules: Vec<&str> = ["-r"].into_iter().chain(ports.iter().map(String::as_str)).chain([MODULE]).collect();
    loop {
        match run_well("modprobe", &modules, None, until) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() + LOOK_AGAIN >= until => {
                let remedy = "see who uses it: a datapath in another network namespace keeps the module";
                return Err(HostError::new(format!("module {MODULE}"), error).remedy(remedy));
            }
            Err(_) => sleep(LOOK_AGAIN),
        }
    }
}

fn device(name: &str, until: Instant) -> Result<Device> {
    let address = &json("ip", &["-j", "address", "show", "dev", name], until)?[0];
    let routes = |family: &str| -> Result<Vec<Vec<String>>> {
        let all = json("ip", &["-j", family, "route", "show", "table", "all", "dev", name], until)?;
        Ok(all.as_array().into_iter().flatten().filter_map(route_words).collect())
    };
    let flags = address["flags"].as_array().cloned().unwrap_or_default();
    Ok(Device {
        name: name.to_owned(),
        mac: text(&address["address"]),
        mtu: address["mtu"].as_u64().unwrap_or_default(),
        up: flags.iter().any(|flag| flag == "UP"),
        addresses: address["addr_info"].as_array().into_iter().flatten().filter_map(address_words).collect(),
        routes: routes("-4")?,
        routes6: routes("-6")?,
        settings: settings(name),
    })
}

fn json(program: &str, arguments: &[&str], until: Instant) -> Result<Value> {
    let said = run_well(program, arguments, None, until)?;
    // Older iproute2 prints nothing where there is nothing.
    let said = if said.trim().is_empty() { "[]" } else { said.trim() };
    serde_json::from_str(said).map_err(|error| HostError::new(program, format!("its answer is no JSON: {error}")))
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// Appends `key value`, where there is a value.
fn push(words: &mut Vec<String>, key: &str, value: &Value) {
    if !value.is_null() {
        words.extend([key.to_owned(), text(value)]);
    }
}

/// `ip address` in JSON as the words of a command. Temporary addresses (RFC 8981) are the kernel's own.
fn address_words(info: &Value) -> Option<Vec<String>> {
    if info["temporary"] == true {
        return None;
    }
    let (local, length) = (info["local"].as_str()?, info["prefixlen"].as_u64()?);
    let mut words = match info["address"].as_str().filter(|peer| *peer != local) {
        Some(peer) => vec![local.to_owned(), "peer".into(), format!("{peer}/{length}")],
        None => vec![format!("{local}/{length}")],
    };
    push(&mut words, "broadcast", &info["broadcast"]);
    push(&mut words, "scope", &info["scope"]);
    push(&mut words, "label", &info["label"]);
    for (key, name) in [("valid_life_time", "valid_lft"), ("preferred_life_time", "preferred_lft")] {
        match info[key].as_u64() {
            Some(FOR_EVER) | None => {}
            Some(seconds) => words.extend([name.to_owned(), seconds.to_string()]),
        }
    }
    if info["noprefixroute"] == true {
        words.push("noprefixroute".into());
    }
    if info["family"] == "inet6" {
        // It was unique a second ago.
        words.push("nodad".into());
    }
    Some(words)
}

/// `ip route` in JSON as the words of a command; none for what the kernel makes of addresses by itself.
fn route_words(route: &Value) -> Option<Vec<String>> {
    let kind = route["type"].as_str().unwrap_or("unicast");
    let automatic = route["protocol"] == "kernel" || route["table"] == "local";
    if automatic || matches!(kind, "local" | "broadcast" | "multicast" | "anycast") {
        return None;
    }
    let mut words = vec![kind.to_owned(), route["dst"].as_str()?.to_owned()];
    push(&mut words, "via", &route["gateway"]);
    if let (Some(family), Some(host)) = (route["via"]["family"].as_str(), route["via"]["host"].as_str()) {
        words.extend(["via", family, host].map(str::to_owned));
    }
    for (key, name) in
        [("table", "table"), ("protocol", "proto"), ("scope", "scope"), ("prefsrc", "src"), ("metric", "metric")]
    {
        push(&mut words, name, &route[key]);
    }
    for metric in route["metrics"].as_array().into_iter().flatten().filter_map(Value::as_object) {
        metric.iter().for_each(|(key, value)| push(&mut words, key, value));
    }
    push(&mut words, "pref", &route["pref"]);
    push(&mut words, "expires", &route["expires"]);
    let flags = route["flags"].as_array();
    if flags.is_some_and(|flags| flags.iter().any(|flag| flag == "onlink")) {
        words.push("onlink".into());
    }
    Some(words)
}

fn settings(name: &str) -> BTreeMap<String, String> {
    let folders = SETTINGS.iter().map(|folder| format!("/proc/sys/net/{folder}/{name}"));
    let files = folders.flat_map(|folder| fs::read_dir(folder).into_iter().flatten().flatten());
    // Some can only be written.
    let read = |path: &Path| Some((path.to_str()?.to_owned(), fs::read_to_string(path).ok()?.trim().to_owned()));
    files
        .filter(|file| !DEPRECATED.iter().any(|name| file.file_name() == *name))
        .filter_map(|f| read(&f.path()))
        .collect()
}

fn put_device_back(wanted: &Device, failed: &mut Vec<String>, until: Instant) -> Result<()> {
    let name = wanted.name.as_str();
    let now = device(name, until)?;
    for (path, value) in wanted.settings.iter().filter(|(path, value)| now.settings.get(*path) != Some(*value)) {
        if let Err(error) = fs::write(path, value).about(path) {
            failed.push(error.to_string());
        }
    }
    let mut commands: Vec<Vec<String>> = Vec::new();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
    if now.mac != wanted.mac {
        commands.push(words(&["link", "set", "dev", name, "address", &wanted.mac]));
    }
    if now.mtu != wanted.mtu {
        commands.push(words(&["link", "set", "dev", name, "mtu", &wanted.mtu.to_string()]));
    }
    if now.up != wanted.up {
        commands.push(words(&["link", "set", "dev", name, if wanted.up { "up" } else { "down" }]));
    }
    let with_device = |head: &[&str], tail: &Vec<String>| {
        let (first, rest) = tail.split_at(head_length(tail));
        let device = ["dev".to_owned(), name.to_owned()];
        words(head).into_iter().chain(first.iter().cloned()).chain(device).chain(rest.iter().cloned()).collect()
    };
    commands.extend(wanted.addresses.iter().map(|tail| with_device(&["address", "replace"], tail)));
    commands.extend(wanted.routes.iter().map(|tail| with_device(&["-4", "route", "replace"], tail)));
    commands.extend(wanted.routes6.iter().map(|tail| with_device(&["-6", "route", "replace"], tail)));
    for command in commands {
        let ended = run("ip", &command, None, until)?;
        if !ended.status.success() {
            failed.push(format!("device {name}: `ip {}`: {}", command.join(" "), ended.stderr.trim()));
        }
    }
    Ok(())
}

/// Where `dev NAME` belongs: behind a route's destination and gateway, and behind an address.
fn head_length(words: &[String]) -> usize {
    match words.iter().position(|word| word == "via") {
        // `via inet6 HOST` has a word more.
        Some(via) if words.get(via + 1).is_some_and(|family| family.starts_with("inet")) => via + 3,
        Some(via) => via + 2,
        None if words.get(1).is_some_and(|word| word == "peer") => 3,
        None if words.first().is_some_and(|word| word.contains('/')) => 1,
        None => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line(words: Vec<String>) -> String {
        words.join(" ")
    }

    #[test]
    fn an_address_is_told_as_it_was() {
        let plain = json!({"family": "inet", "local": "10.0.0.1", "prefixlen": 24, "broadcast": "10.0.0.255",
            "scope": "global", "label": "br0", "valid_life_time": 4294967295u64, "preferred_life_time": 4294967295u64});
        assert_eq!(address_words(&plain).map(line).unwrap(), "10.0.0.1/24 broadcast 10.0.0.255 scope global label br0");
        let leased = json!({"family": "inet6", "local": "fd00::1", "prefixlen": 64, "scope": "global",
            "noprefixroute": true, "valid_life_time": 60, "preferred_life_time": 30});
        assert_eq!(
            address_words(&leased).map(line).unwrap(),
            "fd00::1/64 scope global valid_lft 60 preferred_lft 30 noprefixroute nodad"
        );
        let peer = json!({"family": "inet", "local": "10.0.0.1", "address": "10.0.0.2", "prefixlen": 32});
        assert_eq!(address_words(&peer).map(line).unwrap(), "10.0.0.1 peer 10.0.0.2/32");
        assert_eq!(address_words(&json!({"local": "fd00::2", "prefixlen": 64, "temporary": true})), None);
    }

    #[test]
    fn a_route_is_told_unless_the_kernel_makes_it() {
        let made = json!({"dst": "10.0.0.0/24", "protocol": "kernel", "scope": "link", "prefsrc": "10.0.0.1"});
        assert_eq!(route_words(&made), None);
        let local = json!({"type": "local", "dst": "10.0.0.1", "table": "local", "protocol": "kernel"});
        assert_eq!(route_words(&local), None);
        let default = json!({"dst": "default", "gateway": "10.0.0.254", "protocol": "static", "metric": 100,
            "metrics": [{"mtu": 1400}], "flags": ["onlink"]});
        assert_eq!(
            route_words(&default).map(line).unwrap(),
            "unicast default via 10.0.0.254 proto static metric 100 mtu 1400 onlink"
        );
        let other = json!({"dst": "10.9.0.0/16", "via": {"family": "inet6", "host": "fe80::1"}, "table": "7"});
        let words = route_words(&other).unwrap();
        assert_eq!(head_length(&words), 5);
        assert_eq!(line(words), "unicast 10.9.0.0/16 via inet6 fe80::1 table 7");
    }
}

//! What unit files say of who hangs on Open vSwitch: read by our generator (systemd.generator(7)), before systemd has
//! loaded any of them.
//!
//! systemd passes a restart on to every unit that hangs on the one that is restarted (systemd.unit(5): `Requires=`,
//! `Requisite=`, `BindsTo=`, `PartOf=`). All of these jobs wait for one another as the units are ordered, and of two units
//! that are stopped the later one goes first. Ours ([`GATE`]) is later than all of them, so its ExecStop= runs before
//! any of them is stopped, and takes their jobs back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::host::{is_our_own, GATE, UNITS};

/// Where systemd looks for units of the system (systemd.unit(5), "System Unit Search Path"), without those of generators,
/// which are being made anew.
pub const FOLDERS: [&str; 10] = [
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/run/systemd/system",
    "/run/systemd/system.attached",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// What makes the unit in whose file it stands hang on the units behind it.
const HANGS_ON: [&str; 5] = ["Requires", "Requisite", "BindsTo", "PartOf", "StopPropagatedFrom"];
/// The same the other way round.
const CARRIES: &str = "PropagatesStopTo";
const KINDS: [&str; 11] =
    ["service", "socket", "target", "mount", "automount", "timer", "path", "slice", "scope", "swap", "device"];
/// As much of a file is read, bytes.
const FILE_MAX: u64 = 1 << 20;
/// The name of the drop-ins that are made.
const DROP_IN: &str = "50-ovs-graceful.conf";
const HEAD: &str =
    "# Written by the generator of ovs-graceful at every daemon-reload: see ovs-graceful-neighbours.service.\n[Unit]\n";

/// What was found in the unit files.
#[derive(Debug, Default)]
pub struct UnitFiles {
    /// Units and templates that have a file.
    there: BTreeSet<String>,
    /// Names that are links to other units.
    aliases: BTreeMap<String, String>,
    /// By unit, template or prefix of units: what it hangs on.
    hangs: BTreeMap<String, BTreeSet<String>>,
}

impl UnitFiles {
    /// Reads every unit file and drop-in in `folders`. What cannot be read is left out: systemd cannot read it either.
    pub fn read(folders: &[PathBuf]) -> Self {
        let mut files = UnitFiles::default();
        for folder in folders {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                files.take(&entry.path());
            }
        }
        files
    }

    fn take(&mut self, path: &Path) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return };
        if let Some(unit) = name.strip_suffix(".d") {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                if entry.path().extension().is_some_and(|end| end == "conf") {
                    self.text(unit, &read(&entry.path()));
                }
            }
        } else if let Some(unit) = name.strip_suffix(".requires") {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                self.hang(unit, &entry.file_name().to_string_lossy());
            }
        } else if name.rsplit_once('.').is_some_and(|(_, kind)| KINDS.contains(&kind)) {
            self.there.insert(name.to_owned());
            let target = fs::read_link(path).ok();
            match target.as_deref().and_then(Path::file_name).and_then(|target| target.to_str()) {
                Some(target) if target != name && target != "null" => {
                    self.aliases.insert(name.to_owned(), target.to_owned());
                }
                _ => self.text(name, &read(path)),
            }
        }
    }

    fn text(&mut self, unit: &str, text: &str) {
        let whole = text.replace("\\\n", " ");
        let lines = whole.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
        for (key, value) in lines.filter_map(|line| line.split_once('=')) {
            let others = value.split_whitespace().map(|word| word.trim_matches(['"', '\'']));
            match key.trim_end() {
                key if HANGS_ON.contains(&key) => others.for_each(|other| self.hang(unit, other)),
                CARRIES => others.for_each(|other| self.hang(other, unit)),
                _ => {}
            }
        }
    }

    fn hang(&mut self, unit: &str, on: &str) {
        self.hangs.entry(unit.to_owned()).or_default().insert(on.to_owned());
    }

    /// The name that `name` is a link to, or itself.
    fn canonical<'a>(&'a self, name: &'a str) -> &'a str {
        // Links to links: systemd follows few as well.
        (0..8).fold(name, |name, _| self.aliases.get(name).map_or(name, String::as_str))
    }

    /// Whatever hangs on a unit of Open vSwitch, however far.
    fn neighbours(&self) -> BTreeSet<&str> {
        let mut all: BTreeSet<&str> = UNITS.into_iter().collect();
        loop {
            let is_in = |on: &String| {
                let on = self.canonical(on);
                all.contains(on) || template(on).is_some_and(|template| all.contains(template.as_str()))
            };
            let hang = self.hangs.iter().filter(|(_, on)| on.iter().any(is_in));
            let more: Vec<&str> =
                hang.map(|(unit, _)| self.canonical(unit)).filter(|unit| !all.contains(unit)).collect();
            if more.is_empty() {
                return all.into_iter().filter(|unit| !is_our_own(unit)).collect();
            }
            all.extend(more);
        }
    }

    /// Has it a file of its own, or that of its template?
    fn exists(&self, unit: &str) -> bool {
        self.there.contains(unit) || template(unit).is_some_and(|template| self.there.contains(&template))
    }

    /// The drop-ins that put [`GATE`] behind every neighbour, by unit.
    fn drop_ins(&self) -> BTreeMap<String, String> {
        let (several, single): (Vec<&str>, Vec<&str>) =
            self.neighbours().into_iter().partition(|name| is_several(name));
        let single: Vec<&str> = single.into_iter().filter(|unit| self.exists(unit)).collect();
        let mut made = BTreeMap::new();
        if single.is_empty() && several.is_empty() {
            return made;
        }
        // Those of Open vSwitch as well: what was taken back is known when their own commands run.
        let own = UNITS.into_iter().filter(|unit| self.exists(unit));
        let after: String = own.chain(single).map(|unit| format!("After={unit}\n")).collect();
        made.insert(GATE.to_owned(), format!("{HEAD}{after}"));
        // An order that holds for every instance can only stand there.
        made.extend(several.into_iter().map(|name| (name.to_owned(), format!("{HEAD}Before={GATE}\n"))));
        made
    }
}

/// Writes the drop-ins into the folder of a generator.
///
/// # Errors
/// Where they cannot be written.
pub fn order(files: &UnitFiles, into: &Path) -> io::Result<()> {
    for (unit, text) in files.drop_ins() {
        let folder = into.join(format!("{unit}.d"));
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(DROP_IN), text)?;
    }
    Ok(())
}

fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    let file = fs::metadata(path).ok().filter(fs::Metadata::is_file).and_then(|_| fs::File::open(path).ok());
    let _as_far_as_it_goes = file.map(|file| file.take(FILE_MAX).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `x@.service` of `x@i.service`.
fn template(unit: &str) -> Option<String> {
    let (prefix, rest) = unit.split_once('@')?;
    let (instance, kind) = rest.rsplit_once('.')?;
    (!instance.is_empty()).then(|| format!("{prefix}@.{kind}"))
}

/// A template, or the beginning of names (`x-.service.d`). That of all units of a kind (`service.d`) is none: it would be
/// ours, too.
fn is_several(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(stem, _)| stem.ends_with(['@', '-']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)]) -> BTreeMap<String, String> {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match text.strip_prefix("-> ") {
                Some(target) => std::os::unix::fs::symlink(target, path).unwrap(),
                None => fs::write(path, text).unwrap(),
            }
        }
        UnitFiles::read(&[folder.path().to_owned(), folder.path().join("absent")]).drop_ins()
    }

    fn after(files: &[(&str, &str)]) -> Vec<String> {
        let made = of(files);
        let text = made.get(GATE).map(String::as_str).unwrap_or_default();
        text.lines().filter_map(|line| line.strip_prefix("After=")).map(str::to_owned).collect()
    }

    const UMBRELLA: (&str, &str) = ("openvswitch-switch.service", "[Unit]\nRequires=ovs-vswitchd.service\n");

    #[test]
    fn who_hangs_on_open_vswitch_in_whatever_way_is_found() {
        let found = after(&[
            UMBRELLA,
            ("ovs-vswitchd.service", "[Unit]\nPartOf=openvswitch-switch.service\nRequires=ovsdb-server.service\n"),
            ("ipsec.service", "[Unit]\nAfter=x.service\nRequires=network.target \\\n  openvswitch-switch.service\n"),
            ("second.service", "[Unit]\nBindsTo = \"ipsec.service\"\n"),
            ("part.socket", "[Unit]\nPartOf=ovsdb-server.service\n"),
            ("dropped.service", "[Unit]\n"),
            ("dropped.service.d/own.conf", "[Unit]\nRequisite=ovs-vswitchd.service\n"),
            ("by-link.target", ""),
            ("by-link.target.requires/openvswitch-switch.service", "-> /x/openvswitch-switch.service"),
            ("ovs.service", "-> openvswitch-switch.service"),
            ("through-alias.service", "[Unit]\nStopPropagatedFrom=ovs.service\n"),
            ("instance@.service", "[Unit]\n"),
            ("instance@a.service.d/own.conf", "[Unit]\nRequires=ipsec.service\n"),
            ("carried.service", "[Unit]\n"),
            ("openvswitch-switch.service.d/own.conf", "[Unit]\nPropagatesStopTo=carried.service\n"),
            // None of these.
            ("wants.service", "[Unit]\nWants=openvswitch-switch.service\nAfter=openvswitch-switch.service\n"),
            ("comment.service", "[Unit]\n# Requires=openvswitch-switch.service\n;PartOf=ovs-vswitchd.service\n"),
            ("without-file.service.d/own.conf", "[Unit]\nRequires=openvswitch-switch.service\n"),
            ("ovs-record-hostname.service", "[Unit]\nRequires=openvswitch-switch.service\n"),
            ("ovs-graceful-neighbours.service", "[Unit]\nPartOf=openvswitch-switch.service\n"),
            ("masked.service", "-> /dev/null"),
            ("notes.txt", "Requires=openvswitch-switch.service\n"),
        ]);
        let own = ["ovs-vswitchd.service", "openvswitch-switch.service"];
        let others = [
            "by-link.target",
            "carried.service",
            "dropped.service",
            "instance@a.service",
            "ipsec.service",
            "part.socket",
            "second.service",
            "through-alias.service",
        ];
        assert_eq!(found, [own.as_slice(), &others].concat());
    }

    #[test]
    fn templates_and_prefixes_get_the_order_themselves() {
        let made = of(&[
            UMBRELLA,
            ("vm@.service", "[Unit]\nRequires=openvswitch-switch.service\n"),
            ("tap-.service.d/all.conf", "[Unit]\nPartOf=openvswitch-switch.service\n"),
            ("service.d/all.conf", "[Unit]\nPartOf=openvswitch-switch.service\n"),
            ("of-vm.service", "[Unit]\nRequires=vm@one.service\n"),
        ]);
        assert_eq!(made.keys().collect::<Vec<_>>(), [GATE, "tap-.service", "vm@.service"]);
        assert!(made["vm@.service"].ends_with("\nBefore=ovs-graceful-neighbours.service\n"));
        assert!(made[GATE].ends_with("\nAfter=of-vm.service\n"), "{}", made[GATE]);
    }

    #[test]
    fn without_neighbours_nothing_is_written() {
        assert!(of(&[UMBRELLA, ("wants.service", "[Unit]\nWants=openvswitch-switch.service\n")]).is_empty());
        assert!(of(&[]).is_empty());
        let folder = tempfile::tempdir().unwrap();
        order(&UnitFiles::default(), folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

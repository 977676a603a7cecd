//! Debian packages for the guest: ours, and those that an upgrade of Open vSwitch to another release takes, as apt chooses
//! them for the image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};

use crate::apt_sources;
use crate::command::{capture, run};
use crate::image;
use crate::places;

/// What a scenario finds in `/lab/packages`, with an index for apt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packages {
    /// Nothing: it has no such folder.
    None,
    /// Ours in two versions, [`OLD`] and [`NEW`].
    Ours,
    /// Ours, and what it takes to go to Open vSwitch of the release after the guest's; of the one before where there is
    /// none.
    OursAndNext,
    /// Ours, and Open vSwitch of the guest's own suite.
    OursAndSame,
    /// Ours, Open vSwitch of the guest's own suite, and openvswitch-ipsec.
    OursAndIpsec,
    /// Ours, and what it takes to go to Open vSwitch of each release that we know of.
    OursAndAll,
    /// Ours as RPM, a stand-in for RHEL's openvswitch, and rpm itself.
    Rpm,
    /// No packages but what is in them: crun in `runtime`, Open vSwitch of the guest's suite in `old`, and what an upgrade
    /// of it to this suite takes in `new`: layers over the files of the guest.
    Layers(&'static str),
    /// Ours, and OVN: that of the guest's suite, or of the one before where it has none.
    Ovn,
    /// Ours, openvswitch-switch of the guest's own suite, and later versions of it that are no good, [`BAD`].
    OursAndBad,
}

/// Later versions of openvswitch-switch.
pub const BAD: [(&str, Bad); 4] = [
    ("99:1-crashes", Bad { daemon: Some("kill -SEGV $$"), schema: false }),
    ("99:2-hangs", Bad { daemon: Some("exec sleep infinity"), schema: false }),
    ("99:3-newer-schema", Bad { daemon: None, schema: true }),
    ("99:4-newer-schema-crashes", Bad { daemon: Some("kill -SEGV $$"), schema: true }),
];

/// What is changed about a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bad {
    /// In place of ovs-vswitchd: what a shell does where it is to start; `--version` it answers.
    daemon: Option<&'static str>,
    /// The schema is a newer one, with a column more.
    schema: bool,
}

/// The version that a scenario installs first.
pub const OLD: &str = "0.1.0";
/// The same package as a later version.
pub const NEW: &str = "0.1.1~lab";

/// Puts what `wanted` names into `folder`, for a guest of `suite`.
pub fn put(wanted: Packages, suite: &str, folder: &Path) -> Result<()> {
    let suite = image::suite_of(suite);
    if wanted == Packages::None {
        return Ok(());
    }
    fs::create_dir(folder)?;
    // Held until it is copied: every building begins by removing the last one.
    let _lock = places::lock(&places::cache()?.join("package.lock"), "another lab builds the package")?;
    if wanted == Packages::Rpm {
        copy_all(&apt(suite, suite, &["rpm"])?, folder)?;
        let script = places::workspace().join("tests/rpm/build");
        capture(Command::new(script).arg(image::tree(suite)?).arg(folder)).context("building RPMs")?;
        return index(folder);
    }
    if let Packages::Layers(to) = wanted {
        unpack(&apt(suite, suite, &["crun"])?, &folder.join("runtime"))?;
        unpack(&apt(suite, suite, &OPEN_VSWITCH)?, &folder.join("old"))?;
        return unpack(&apt(suite, to, &OPEN_VSWITCH)?, &folder.join("new"));
    }
    let ours = ours()?;
    fs::copy(&ours, folder.join(format!("ovs-graceful_{OLD}_amd64.deb")))?;
    repack(&ours, NEW, &folder.join(format!("ovs-graceful_{NEW}_amd64.deb")), |_| Ok(()))?;
    match wanted {
        Packages::None | Packages::Ours | Packages::Rpm | Packages::Layers(_) => {}
        Packages::OursAndIpsec => {
            copy_all(&apt(suite, suite, &[&OPEN_VSWITCH[..], &["openvswitch-ipsec"]].concat())?, folder)?;
        }
        Packages::OursAndSame => copy_all(&apt(suite, suite, &OPEN_VSWITCH)?, folder)?,
        Packages::OursAndNext => copy_all(&apt(suite, next(suite), &OPEN_VSWITCH)?, folder)?,
        Packages::OursAndAll => {
            for to in around(suite) {
                copy_all(&apt(suite, to, &OPEN_VSWITCH)?, folder)?;
            }
        }
        Packages::Ovn => {
            let of = if suite == "testing" { "trixie" } else { suite };
            copy_all(&apt(suite, of, &["ovn-central", "ovn-host"])?, folder)?;
        }
        Packages::OursAndBad => bad_ones(&apt(suite, suite, &OPEN_VSWITCH)?, folder)?,
    }
    index(folder)
}

const OPEN_VSWITCH: [&str; 2] = ["openvswitch-switch", "openvswitch-common"];

/// The releases that one of this suite goes through.
fn around(suite: &str) -> [&'static str; 3] {
    match suite {
        "trixie" | "testing" => ["bookworm", "trixie", "testing"],
        _ => ["bullseye", "bookworm", "trixie"],
    }
}

fn next(suite: &str) -> &'static str {
    match suite {
        "bookworm" => "trixie",
        "trixie" => "testing",
        // Back: a version before the guest's own.
        "testing" => "trixie",
        _ => "bookworm",
    }
}

/// The folder with the kernel of the suite's backports.
pub fn kernel(suite: &str, package: &str) -> Result<PathBuf> {
    apt(suite, &format!("{suite}-backports"), &[package])
}

/// For apt in the guest.
fn index(folder: &Path) -> Result<()> {
    let index = capture(Command::new("dpkg-scanpackages").args(["--multiversion", "."]).current_dir(folder))?;
    fs::write(folder.join("Packages"), index)?;
    Ok(())
}

/// Our package, built.
fn ours() -> Result<PathBuf> {
    let script = places::workspace().join("tests/package");
    let said = capture(&mut Command::new(&script)).context("building our package")?;
    let path = said.lines().last().map(PathBuf::from).filter(|path| path.is_file());
    path.with_context(|| format!("{} named no package: {said}", script.display()))
}

/// The files of packages, without Python and documentation; `/lib` is a link in the guest.
fn unpack(from: &Path, to: &Path) -> Result<()> {
    for package in fs::read_dir(from)?.flatten() {
        let name = package.file_name().to_string_lossy().into_owned();
        if name.contains("python") || name.starts_with("base-files") {
            continue;
        }
        capture(Command::new("dpkg-deb").arg("--extract").arg(package.path()).arg(to))?;
    }
    for unwanted in ["lib", "etc", "usr/share/doc", "usr/share/man", "usr/share/locale"] {
        let path = to.join(unwanted);
        if path.exists() {
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    for package in fs::read_dir(from)?.flatten() {
        fs::copy(package.path(), to.join(package.file_name()))?;
    }
    Ok(())
}

fn bad_ones(from: &Path, folder: &Path) -> Result<()> {
    copy_all(from, folder)?;
    let is_it = |path: &PathBuf| path.to_string_lossy().contains("/openvswitch-switch_");
    let package = fs::read_dir(from)?.flatten().map(|entry| entry.path()).find(is_it);
    let package = package.with_context(|| format!("no openvswitch-switch in {}", from.display()))?;
    for (version, bad) in BAD {
        let to = folder.join(format!("openvswitch-switch_{}_amd64.deb", version.replace(':', "_")));
        repack(&package, version, &to, |tree| spoil(bad, tree))?;
    }
    Ok(())
}

fn spoil(bad: Bad, tree: &Path) -> Result<()> {
    if let Some(start) = bad.daemon {
        let program = tree.join("usr/lib/openvswitch-switch/ovs-vswitchd");
        let version = "echo 'ovs-vswitchd (Open vSwitch) 99.0.0'; exit";
        fs::write(&program, format!("#!/bin/sh\ncase \"$*\" in *--version*) {version} ;; esac\n{start}\n"))?;
    }
    if bad.schema {
        let path = tree.join("usr/share/openvswitch/vswitch.ovsschema");
        let mut schema: Value = serde_json::from_slice(&fs::read(&path)?).context("the package's schema")?;
        schema["version"] = json!("99.0.0");
        schema["tables"]["Bridge"]["columns"]["of_a_later_version"] = json!({ "type": "string" });
        fs::write(&path, schema.to_string())?;
    }
    Ok(())
}

fn repack(package: &Path, version: &str, to: &Path, change: impl Fn(&Path) -> Result<()>) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let tree = scratch.path().join("tree");
    run(Command::new("dpkg-deb").arg("--raw-extract").arg(package).arg(&tree))?;
    let control = tree.join("DEBIAN/control");
    let text = fs::read_to_string(&control)?;
    let changed: Vec<String> = text
        .lines()
        .map(|line| if line.starts_with("Version:") { format!("Version: {version}") } else { line.to_owned() })
        .collect();
    fs::write(&control, changed.join("\n") + "\n")?;
    change(&tree)?;
    capture(Command::new("dpkg-deb").args(["-Zgzip", "-z1", "--build"]).arg(&tree).arg(to)).map(drop)
}

/// The folder with what apt would fetch to make `packages` in the image of `from` those of `to`; where they are the same,
/// to install them (again).
fn apt(from: &str, to: &str, packages: &[&str]) -> Result<PathBuf> {
    let how = "--yes --download-only --no-install-recommends --allow-downgrades --reinstall install";
    fetch(from, to, packages, how)
}

/// The folder with these packages of `suite` and with nothing that they ask for.
pub fn download(suite: &str, names: &[String]) -> Result<PathBuf> {
    fetch(suite, suite, &names.iter().map(String::as_str).collect::<Vec<_>>(), "download")
}

fn fetch(from: &str, to: &str, packages: &[&str], how: &str) -> Result<PathBuf> {
    let tree = image::tree(from)?;
    let mirror = apt_sources::mirror(&apt_sources::read_machine()?, &apt_sources::codename()?)?;
    let cache = places::cache()?;
    let name = format!("packages-{from}-{to}-{}", packages.join("-"));
    let _lock = places::lock(&cache.join(format!("{name}.lock")), "another lab fetches these packages")?;
    let folder = cache.join(&name);
    if folder.join("complete").exists() {
        return Ok(folder.join("archives"));
    }
    println!("lab: fetching what it takes to go from {from} to {to}");
    let scratch = cache.join(format!("{name}.scratch"));
    if scratch.exists() {
        fs::remove_dir_all(&scratch)?;
    }
    let archives = folder.join("archives");
    for made in [scratch.join("state/lists/partial"), scratch.join("cache"), archives.join("partial")] {
        fs::create_dir_all(made)?;
    }
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    fs::write(scratch.join("sources.list"), format!("deb [signed-by={keyring}] {mirror} {to} main\n"))?;
    let set = |name: &str, value: &Path| format!("{name}={}", value.display());
    let options = [
        set("Dir::State", &scratch.join("state")),
        set("Dir::State::status", &tree.join("var/lib/dpkg/status")),
        set("Dir::Cache", &scratch.join("cache")),
        set("Dir::Cache::archives", &archives),
        set("Dir::Etc::SourceList", &scratch.join("sources.list")),
        "Dir::Etc::SourceParts=/dev/null".to_owned(),
        "Dir::Etc::PreferencesParts=/dev/null".to_owned(),
        "APT::Sandbox::User=root".to_owned(),
    ];
    let get = |words: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(options.iter().flat_map(|option| ["-o", option])).arg("-q").args(words).current_dir(&archives);
        capture(&mut command)
    };
    get(&["update"]).with_context(|| format!("the mirror has no {to}"))?;
    let names: Vec<String> = packages.iter().map(|name| format!("{name}/{to}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    get(&[how.split(' ').collect::<Vec<_>>(), names].concat())?;
    fs::remove_dir_all(archives.join("partial"))?;
    let _lock_file = fs::remove_file(archives.join("lock"));
    if fs::read_dir(&archives)?.count() == 0 {
        bail!("apt wants no package to go from {from} to {to}");
    }
    fs::remove_dir_all(&scratch)?;
    fs::write(folder.join("complete"), "")?;
    Ok(archives)
}

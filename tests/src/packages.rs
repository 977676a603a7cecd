//! Debian packages for the guest: ours, and those that an upgrade of Open vSwitch to another release takes, as apt chooses
//! them for the image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

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
    /// Ours, and what an upgrade of Open vSwitch to this suite takes.
    OursAndSuite(&'static str),
}

/// The version that a scenario installs first.
pub const OLD: &str = "0.1.0";
/// The same package as a later version.
pub const NEW: &str = "0.1.1~lab";

/// Puts what `wanted` names into `folder`, for a guest of `suite`.
pub fn put(wanted: Packages, suite: &str, folder: &Path) -> Result<()> {
    if wanted == Packages::None {
        return Ok(());
    }
    fs::create_dir(folder)?;
    let ours = ours()?;
    fs::copy(&ours, folder.join(format!("ovs-graceful_{OLD}_amd64.deb")))?;
    repack(&ours, NEW, &folder.join(format!("ovs-graceful_{NEW}_amd64.deb")))?;
    if let Packages::OursAndSuite(to) = wanted {
        for package in fs::read_dir(upgrade(suite, to)?)?.flatten() {
            fs::copy(package.path(), folder.join(package.file_name()))?;
        }
    }
    let index = capture(Command::new("dpkg-scanpackages").args(["--multiversion", "."]).current_dir(folder))?;
    fs::write(folder.join("Packages"), index)?;
    Ok(())
}

/// Our package, built.
fn ours() -> Result<PathBuf> {
    let _lock = places::lock(&places::cache()?.join("package.lock"), "another lab builds the package")?;
    let script = places::workspace().join("tests/package");
    let said = capture(&mut Command::new(&script)).context("building our package")?;
    let path = said.lines().last().map(PathBuf::from).filter(|path| path.is_file());
    path.with_context(|| format!("{} named no package: {said}", script.display()))
}

fn repack(package: &Path, version: &str, to: &Path) -> Result<()> {
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
    capture(Command::new("dpkg-deb").args(["-Zgzip", "-z1", "--build"]).arg(&tree).arg(to)).map(drop)
}

/// The folder with what apt would fetch for an upgrade of openvswitch-switch in the image of `from` to `to`.
fn upgrade(from: &str, to: &str) -> Result<PathBuf> {
    let tree = image::tree(from)?;
    let mirror = apt_sources::mirror(&apt_sources::read_machine()?, &apt_sources::codename()?)?;
    let cache = places::cache()?;
    let name = format!("packages-{from}-{to}");
    let _lock = places::lock(&cache.join(format!("{name}.lock")), "another lab fetches these packages")?;
    let folder = cache.join(&name);
    if folder.join("complete").exists() {
        return Ok(folder.join("archives"));
    }
    println!("lab: fetching what an upgrade from {from} to {to} takes");
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
    let apt = |words: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(options.iter().flat_map(|option| ["-o", option])).arg("-q").args(words);
        capture(&mut command)
    };
    apt(&["update"]).with_context(|| format!("the mirror has no {to}"))?;
    apt(&["install", "--yes", "--download-only", "--no-install-recommends", "openvswitch-switch"])?;
    fs::remove_dir_all(archives.join("partial"))?;
    let _lock_file = fs::remove_file(archives.join("lock"));
    if fs::read_dir(&archives)?.count() == 0 {
        bail!("an upgrade from {from} to {to} takes no package");
    }
    fs::remove_dir_all(&scratch)?;
    fs::write(folder.join("complete"), "")?;
    Ok(archives)
}

//! Debian 12's own openvswitch module without `OVS_DP_ATTR_PER_CPU_PIDS` in its answers, as Linux 5.15 to 6.0 have it: no
//! mirror has such a kernel. Built from the release's own sources and headers, for the lab alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};

use crate::command::{capture, run};
use crate::packages;

/// What is changed: the attribute is never put into an answer (`ovs_dp_cmd_fill_info`, net/openvswitch/datapath.c).
const TOLD: &str = "OVS_DP_F_DISPATCH_UPCALL_PER_CPU && pids) {";
const UNTOLD: &str = "OVS_DP_F_DISPATCH_UPCALL_PER_CPU && pids && 0) {";

/// The folder with the packages that it is built from.
pub fn sources(suite: &str) -> Result<PathBuf> {
    let version = super::kernel_version(&super::tree(suite)?)?;
    packages::download(suite, &packages_of(&version)?)
}

/// For 6.1.0-50-cloud-amd64: headers of the flavour and of all, tools and one source for 6.1.
fn packages_of(version: &str) -> Result<[String; 4]> {
    let common = version.trim_end_matches("-cloud-amd64").trim_end_matches("-amd64");
    let series = series(version)?;
    Ok([
        format!("linux-headers-{version}"),
        format!("linux-headers-{common}-common"),
        format!("linux-kbuild-{series}"),
        format!("linux-source-{series}"),
    ])
}

fn series(version: &str) -> Result<&str> {
    let (series, _) = version.split_once(".0-").with_context(|| format!("{version} is no kernel of Debian's"))?;
    Ok(series)
}

/// Replaces the module in `tree`, whose kernel `version` is.
pub fn replace_module(sources: &Path, tree: &Path, version: &str) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let module = build(sources, version, scratch.path()).context("building openvswitch.ko as before Linux 6.1")?;
    let folder = tree.join("usr/lib/modules").join(version).join("kernel/net/openvswitch");
    let own = ["openvswitch.ko", "openvswitch.ko.xz"].map(|name| folder.join(name));
    ensure!(own.iter().any(|path| path.exists()), "{} has no openvswitch module", folder.display());
    own.iter().filter(|path| path.exists()).try_for_each(fs::remove_file)?;
    run(Command::new("strip").arg("--strip-debug").arg(&module))?;
    fs::copy(module, folder.join("openvswitch.ko")).map(drop).map_err(Into::into)
}

fn build(sources: &Path, version: &str, scratch: &Path) -> Result<PathBuf> {
    let series = series(version)?;
    for package in fs::read_dir(sources)?.flatten() {
        run(Command::new("dpkg-deb").arg("--extract").arg(package.path()).arg(scratch))?;
    }
    let source = scratch.join(format!("usr/src/linux-source-{series}.tar.xz"));
    let mut unpack = Command::new("tar");
    run(unpack.arg("-xJf").arg(source).arg("-C").arg(scratch).args(["--wildcards", "*/net/openvswitch/*"]))?;
    let folder = scratch.join(format!("linux-source-{series}/net/openvswitch"));
    let datapath = folder.join("datapath.c");
    let text = fs::read_to_string(&datapath)?;
    if text.matches(TOLD).count() != 1 {
        bail!("{} is not as we know it", datapath.display());
    }
    fs::write(&datapath, text.replace(TOLD, UNTOLD))?;
    let headers = scratch.join(format!("usr/src/linux-headers-{version}"));
    let makefile = headers.join("Makefile");
    let here = scratch.join("usr/src").display().to_string();
    fs::write(&makefile, fs::read_to_string(&makefile)?.replace("/usr/src", &here))?;
    let mut make = Command::new("make");
    make.arg("-C").arg(&headers).arg(format!("M={}", folder.display()));
    let others = ["GRE", "VXLAN", "GENEVE"].map(|kind| format!("CONFIG_OPENVSWITCH_{kind}=n"));
    capture(make.args(others).arg("modules"))?;
    Ok(folder.join("openvswitch.ko"))
}

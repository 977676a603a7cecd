//! The disk image: Debian from the machine's own mirror, cached by the hash of what it is made of.

mod cpio;
mod untold;

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

use crate::apt_sources;
use crate::command::{capture, run};
use crate::{packages, places};

/// What debootstrap adds to a minimal Debian. Scenarios need no more than this; none of our own files is among it.
const PACKAGES: &[&str] = &[
    KERNEL_PACKAGE,
    "systemd-sysv",
    "udev",
    "dbus",
    "kmod",
    "procps",
    "iproute2",
    "iputils-ping",
    "conntrack",
    "ethtool",
    "iperf3",
    "logrotate",
    "openvswitch-switch",
    "busybox-static",
    "strace",
    "tcpdump",
    "bpftool",
];

/// Kernel modules of the initramfs, in loading order (see `init.sh`).
const INITRAMFS_MODULES: &[&str] =
    &["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];

/// Units that would only make noise, use the network, or hang up the console that the lab prints to.
const MASKED: &[&str] = &[
    "serial-getty@ttyS0.service",
    "getty@tty1.service",
    "systemd-timesyncd.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "dpkg-db-backup.timer",
];

const INIT: &str = include_str!("init.sh");
const SERVICE: &str = include_str!("lab.service");
const RUN: &str = include_str!("lab-run.sh");
/// For BusyBox's init in the place of systemd, and what it runs at boot.
const INITTAB: &str = include_str!("inittab");
const BOOT: &str = include_str!("lab-boot.sh");
/// Raise when the way of building changes in a manner that the hashed inputs do not show.
const RECIPE: u32 = 1;

/// A bootable image: three files in one cached folder.
#[derive(Debug, Clone)]
pub struct Image {
    /// Raw ext4 file system, booted with a throw-away snapshot.
    pub disk: PathBuf,
    /// The package's kernel.
    pub kernel: PathBuf,
    /// Busybox and the virtio modules.
    pub initrd: PathBuf,
    /// Suite, such as `bookworm`.
    pub suite: String,
}

/// Puts ovs-vswitchd and ovs-dpctl of `suite` (Debian 11) into `folder`, and beside them, in `lib`, the libraries that
/// later suites have no more.
pub fn put_vswitchd(suite: &str, folder: &Path) -> Result<()> {
    let tree = tree(suite)?;
    let lib = folder.join("lib");
    fs::create_dir_all(&lib)?;
    let own = tree.join("usr/lib/openvswitch-common");
    fs::copy(own.join("ovs-vswitchd"), folder.join("ovs-vswitchd"))?;
    fs::copy(tree.join("usr/bin/ovs-dpctl"), folder.join("ovs-dpctl"))?;
    let system = tree.join("usr/lib/x86_64-linux-gnu");
    for name in ["libssl.so.1.1", "libcrypto.so.1.1"] {
        fs::copy(system.join(name), lib.join(name))?;
    }
    let pattern = "lib(openvswitch|ofproto|sflow)-.*";
    let found = capture(
        Command::new("find")
            .args([&own, &system])
            .args(["-regextype", "egrep", "-type", "f", "-regex"])
            .arg(format!(".*/{pattern}")),
    )?;
    for path in found.lines().map(Path::new) {
        if let Some(name) = path.file_name() {
            fs::copy(path, lib.join(name))?;
        }
    }
    Ok(())
}

/// Behind the name of a suite: with the kernel of its backports.
pub const BACKPORTS: &str = "+backports";
/// Behind the name of a suite: with an openvswitch module that does not tell who the upcalls go to.
pub const UNTOLD: &str = "+untold";
/// What Debian's kernels come as.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// The suite without its kernel.
pub fn suite_of(name: &str) -> &str {
    [BACKPORTS, UNTOLD].iter().find_map(|other| name.strip_suffix(other)).unwrap_or(name)
}

fn tree_folder(cache: &Path, suite: &str, mirror: &str) -> PathBuf {
    cache.join(format!("tree-{suite}-{}", tree_hash(suite, mirror)))
}

fn tree_hash(suite: &str, mirror: &str) -> String {
    hash(&(RECIPE, suite, mirror, PACKAGES))
}

/// Gives the image of `suite`, building it when the cache has none (about two minutes). `SUITE+backports` has the kernel
/// of the suite's backports, `SUITE+untold` the module of [`untold`].
pub fn ensure(name: &str) -> Result<Image> {
    let suite = suite_of(name);
    // Before the lock: it asks for the tree, too.
    let kernel = name.ends_with(BACKPORTS).then(|| packages::kernel(suite, KERNEL_PACKAGE)).transpose()?;
    let sources = name.ends_with(UNTOLD).then(|| untold::sources(suite)).transpose()?;
    let mirror = apt_sources::mirror(&apt_sources::read_machine()?, &apt_sources::codename()?)?;
    let image_hash =
        hash(&(tree_hash(suite, &mirror).as_str(), INIT, SERVICE, RUN, INITTAB, BOOT, MASKED, INITRAMFS_MODULES));
    let cache = places::cache()?;
    let _lock = places::lock(&cache.join("image.lock"), "another lab builds the image")?;
    let folder = cache.join(format!("image-{name}-{image_hash}"));
    let image = Image {
        disk: folder.join("disk.ext4"),
        kernel: folder.join("vmlinuz"),
        initrd: folder.join("initrd.cpio"),
        suite: name.to_owned(),
    };
    if folder.join("complete").exists() {
        return Ok(image);
    }
    let tree = ensure_tree(&tree_folder(&cache, suite, &mirror), suite, &mirror)?;
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    println!("lab: making the image {}", folder.display());
    let changed = folder.join("tree");
    let tree = match (&kernel, &sources) {
        (Some(kernel), _) => with_kernel(&tree, kernel, &changed)?,
        (None, Some(sources)) => with_module(sources, &tree, &changed)?,
        (None, None) => tree,
    };
    prepare_tree(&tree)?;
    fs::write(&image.initrd, initramfs(&tree)?)?;
    fs::copy(kernel_of(&tree)?, &image.kernel)?;
    fs::File::create(&image.disk)?.set_len(3 << 30)?;
    let args: [&OsStr; 6] =
        ["-q".as_ref(), "-t".as_ref(), "ext4".as_ref(), "-d".as_ref(), tree.as_os_str(), image.disk.as_os_str()];
    run(Command::new("mke2fs").args(args).env("PATH", admin_path()))?;
    if changed.exists() {
        fs::remove_dir_all(&changed)?;
    }
    fs::write(folder.join("complete"), "")?;
    Ok(image)
}

/// A copy of the tree with the module of [`untold`].
fn with_module(sources: &Path, tree: &Path, to: &Path) -> Result<PathBuf> {
    run(Command::new("cp").args(["--archive", "--reflink=auto"]).arg(tree).arg(to))?;
    let version = kernel_version(to)?;
    untold::replace_module(sources, to, &version)?;
    run(Command::new("chroot").arg(to).args(["depmod", &version]).env("PATH", admin_path()))?;
    Ok(to.to_owned())
}

/// What `uname -r` will say.
fn kernel_version(tree: &Path) -> Result<String> {
    let kernel = kernel_of(tree)?;
    let name = kernel.file_name().and_then(OsStr::to_str).and_then(|name| name.strip_prefix("vmlinuz-"));
    name.map(str::to_owned).context("a kernel without a version")
}

/// A copy of the tree with the kernel of these packages in the place of its own.
fn with_kernel(tree: &Path, packages: &Path, to: &Path) -> Result<PathBuf> {
    run(Command::new("cp").args(["--archive", "--reflink=auto"]).arg(tree).arg(to))?;
    for old in ["boot", "usr/lib/modules"] {
        fs::remove_dir_all(to.join(old))?;
    }
    for package in fs::read_dir(packages)?.flatten() {
        run(Command::new("dpkg-deb").arg("--extract").arg(package.path()).arg(to.join("new-kernel")))?;
    }
    // `/lib` is a link in the tree, and no more in the packages.
    for (from, part) in [("boot", "boot"), ("lib/modules", "usr/lib/modules"), ("usr/lib/modules", "usr/lib/modules")] {
        let from = to.join("new-kernel").join(from);
        if from.is_dir() {
            fs::rename(&from, to.join(part))?;
        }
    }
    fs::remove_dir_all(to.join("new-kernel"))?;
    fs::create_dir_all(to.join("boot"))?;
    for version in fs::read_dir(to.join("usr/lib/modules"))?.flatten() {
        // Where Debian has it since Linux 7.3; a script copies it at installation.
        let kernel = version.path().join("vmlinuz");
        if kernel.exists() {
            let name = format!("vmlinuz-{}", version.file_name().to_string_lossy());
            fs::copy(&kernel, to.join("boot").join(name))?;
        }
        run(Command::new("chroot").arg(to).arg("depmod").arg(version.file_name()).env("PATH", admin_path()))?;
    }
    Ok(to.to_owned())
}

/// The files that the image of `suite` is made of.
pub fn tree(name: &str) -> Result<PathBuf> {
    let suite = suite_of(name);
    let mirror = apt_sources::mirror(&apt_sources::read_machine()?, &apt_sources::codename()?)?;
    let cache = places::cache()?;
    let _lock = places::lock(&cache.join("image.lock"), "another lab builds the image")?;
    ensure_tree(&tree_folder(&cache, suite, &mirror), suite, &mirror)
}

fn hash(value: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

fn admin_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

fn ensure_tree(tree: &Path, suite: &str, mirror: &str) -> Result<PathBuf> {
    let complete = tree.with_extension("complete");
    if complete.exists() {
        return Ok(tree.to_owned());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("building the image needs root, because debootstrap makes devices and owners: run the lab as root");
    }
    if tree.exists() {
        fs::remove_dir_all(tree)?;
    }
    println!("lab: debootstrap {suite} (about a minute)");
    let log = tree.with_extension("log");
    let out = fs::File::create(&log)?;
    let mut command = Command::new("debootstrap");
    command.args(["--variant=minbase", &format!("--include={}", PACKAGES.join(","))]);
    command.arg(suite).arg(tree).arg(mirror).env("PATH", admin_path());
    command.stdout(out.try_clone()?).stderr(out);
    if let Some(proxy) = apt_proxy() {
        command.env("http_proxy", proxy);
    }
    run(&mut command).with_context(|| {
        format!("debootstrap of {suite} failed: is it on the mirror? Its words are in {}", log.display())
    })?;
    fs::write(&complete, "")?;
    Ok(tree.to_owned())
}

/// apt's proxy, which debootstrap does not read by itself.
fn apt_proxy() -> Option<String> {
    let text = capture(Command::new("apt-config").args(["shell", "P", "Acquire::http::Proxy"])).ok()?;
    let value = text.trim().strip_prefix("P=")?.trim_matches('\'').to_owned();
    (!value.is_empty()).then_some(value)
}

/// Puts the lab's unit in and takes what is local to this machine out.
fn prepare_tree(tree: &Path) -> Result<()> {
    let systemd = tree.join("etc/systemd/system");
    fs::create_dir_all(systemd.join("multi-user.target.wants"))?;
    fs::write(systemd.join("lab.service"), SERVICE)?;
    let wanted = systemd.join("multi-user.target.wants/lab.service");
    if wanted.symlink_metadata().is_err() {
        symlink("../lab.service", wanted)?;
    }
    for (name, text) in [("lab-run", RUN), ("lab-boot", BOOT)] {
        let script = tree.join("usr/local/sbin").join(name);
        fs::write(&script, text)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    }
    fs::write(tree.join("etc/inittab"), INITTAB)?;
    let other_init = tree.join("usr/local/sbin/init");
    if other_init.symlink_metadata().is_err() {
        symlink("/bin/busybox", other_init)?;
    }
    for unit in MASKED {
        let path = systemd.join(unit);
        if path.symlink_metadata().is_err() {
            symlink("/dev/null", path)?;
        }
    }
    fs::write(tree.join("etc/hostname"), "lab\n")?;
    fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost lab\n")?;
    fs::write(tree.join("etc/fstab"), "")?;
    fs::write(tree.join("etc/resolv.conf"), "")?;
    let archives = tree.join("var/cache/apt/archives");
    for entry in fs::read_dir(archives)?.flatten() {
        if entry.path().extension() == Some(OsStr::new("deb")) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn kernel_of(tree: &Path) -> Result<PathBuf> {
    let mut kernels: Vec<PathBuf> = fs::read_dir(tree.join("boot"))?
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.file_name().and_then(OsStr::to_str).is_some_and(|n| n.starts_with("vmlinuz-")))
        .collect();
    kernels.sort();
    kernels.pop().with_context(|| format!("{} has no kernel in /boot", tree.display()))
}

fn initramfs(tree: &Path) -> Result<Vec<u8>> {
    let mut cpio = cpio::Cpio::default();
    for directory in ["bin", "mod", "proc", "sys", "dev", "root"] {
        cpio.directory(directory);
    }
    let busybox = tree.join("bin/busybox");
    cpio.file("bin/busybox", &fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?);
    cpio.file("init", INIT.as_bytes());
    let modules = tree.join("lib/modules");
    let listing = capture(Command::new("find").arg(&modules).args(["-name", "virtio*.ko*"]))?;
    for name in INITRAMFS_MODULES {
        let plain = format!("/{name}.ko");
        let packed = format!("/{name}.ko.xz");
        let Some(path) = listing.lines().find(|l| l.ends_with(&plain) || l.ends_with(&packed)) else {
            // Older kernels have no module of its own for the legacy and modern halves.
            continue;
        };
        cpio.file(&format!("mod/{name}.ko"), &module_bytes(Path::new(path))?);
    }
    Ok(cpio.finish())
}

fn module_bytes(path: &Path) -> Result<Vec<u8>> {
    if path.extension() != Some(OsStr::new("xz")) {
        return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let output = Command::new("xz").arg("-dc").arg(path).output().context("cannot start xz")?;
    if !output.status.success() {
        bail!("xz -dc {}: {}", path.display(), output.status);
    }
    Ok(output.stdout)
}

//! Where the freeze lies: `/sys/fs/bpf/ovs-graceful/{link,config,refused,captured,datapaths,dp_names,timeouts,events}`.
//!
//! The link is pinned last and removed first: where it is, the freeze is whole.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use libbpf_rs::query::LinkTypeInfo;
use libbpf_rs::{Link, MapHandle, ProgramAttachType};
use nix::mount::{mount, MsFlags};
use nix::sys::statfs::{statfs, FsType};

use crate::error::{Error, Result};
use crate::freeze::{abi, Hook};

/// The folder of the pins, mode 0700.
pub const PIN_DIR: &str = "/sys/fs/bpf/ovs-graceful";
pub(super) const LINK: &str = "link";
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC`, linux/magic.h
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

/// The path of the pin `name`; of the folder itself where it is empty.
pub fn path(name: &str) -> PathBuf {
    Path::new(PIN_DIR).join(name)
}

/// Mounts the BPF file system where it is missing, and makes the folder, for root alone.
pub fn prepare() -> Result<()> {
    let kind = statfs(BPFFS).map_err(|errno| Error::io(BPFFS, errno))?.filesystem_type();
    if kind != BPF_FS_MAGIC {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700"))
            .map_err(|errno| Error::io(format!("mount the BPF file system at {BPFFS}"), errno))?;
    }
    match DirBuilder::new().mode(0o700).create(PIN_DIR) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Error::io(PIN_DIR, error)),
        _ => fs::set_permissions(PIN_DIR, fs::Permissions::from_mode(0o700)).map_err(|error| Error::io(PIN_DIR, error)),
    }
}

/// Removes every pin and the folder. The program goes with its link.
pub fn remove() -> Result<()> {
    unlink(&path(LINK))?;
    let entries = match fs::read_dir(PIN_DIR) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|error| Error::io(PIN_DIR, error))?,
    };
    for entry in entries {
        unlink(&entry.map_err(|error| Error::io(PIN_DIR, error))?.path())?;
    }
    match fs::remove_dir(PIN_DIR) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(PIN_DIR, error)),
        _ => Ok(()),
    }
}

fn unlink(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(path.display().to_string(), error)),
        _ => Ok(()),
    }
}

/// Opens a pinned map.
pub fn open_map(name: &str) -> Result<MapHandle> {
    MapHandle::from_pinned_path(path(name)).map_err(|error| abi::bpf_error(format!("map {name} in {PIN_DIR}"), &error))
}

/// The hook of the pinned link, None where nothing is pinned.
pub fn pinned_hook() -> Result<Option<Hook>> {
    let path = path(LINK);
    // Asked for as the file system says it: EACCES is an error, not "nothing there".
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path.display().to_string(), error)),
        Ok(_) => {}
    }
    let failed = |error: libbpf_rs::Error| abi::bpf_error(path.display().to_string(), &error);
    let info = Link::open(&path).and_then(|link| link.info()).map_err(failed)?;
    let attached = match &info.info {
        LinkTypeInfo::Tracing(tracing) => tracing.attach_type.clone(),
        _ => ProgramAttachType::Unknown,
    };
    match attached {
        ProgramAttachType::ModifyReturn => Ok(Some(Hook::FmodRet)),
        ProgramAttachType::LsmMac => Ok(Some(Hook::Lsm)),
        _ => Err(Error::malformed(path.display().to_string(), format!("is not ours: {:?}", info.info))),
    }
}

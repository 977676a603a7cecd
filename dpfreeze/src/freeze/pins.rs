//! Where the freeze lies: `/sys/fs/bpf/ovs-graceful/`, with the pins `link`, `link_two`, `config`, `halt`, `refused`, `captured`,
//! `datapaths`, `dp_names`, `timeouts`, `qdiscs` and `events`.
//!
//! `link` is pinned last and removed first: where it is, the freeze is whole.

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use libbpf_rs::query::{LinkInfo, LinkTypeInfo, ProgInfoIter};
use libbpf_rs::{Link, MapHandle, ProgramAttachType};
use nix::mount::{mount, MsFlags};
use nix::sys::statfs::{statfs, FsType};

use crate::error::{Error, Result};
use crate::freeze::{abi, Hook, Skipped};

/// The folder of the pins, mode 0700.
pub const PIN_DIR: &str = "/sys/fs/bpf/ovs-graceful";
/// The folder of the guard's pins.
const GUARD: &str = "/sys/fs/bpf/ovs-graceful-guard";
/// The folder of a proof, before the process id.
const PROOF: &str = "/sys/fs/bpf/ovs-graceful-proof-";
pub(super) const LINK: &str = "link";
/// Of the program's second copy. A freeze that was pinned by an earlier version has none.
pub(super) const SECOND_LINK: &str = "link_two";
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC`, linux/magic.h
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

/// A folder of pins.
#[derive(Clone, Debug)]
pub struct Pins(PathBuf);

impl Pins {
    /// [`PIN_DIR`]: the freeze of this host.
    pub fn shared() -> Pins {
        Pins(PIN_DIR.into())
    }

    /// The guard of this host, which outlives the freeze.
    pub fn guard() -> Pins {
        Pins(GUARD.into())
    }

    /// One that nobody else knows, for a proof that leaves the freeze of this host alone.
    pub fn private() -> Pins {
        Pins(format!("{PROOF}{}", std::process::id()).into())
    }

    /// The path of the pin `name`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn about(&self, error: io::Error) -> Error {
        Error::io(self.0.display().to_string(), error)
    }

    /// Mounts the BPF file system where it is missing, and makes the folder, for root alone.
    pub fn prepare(&self) -> Result<()> {
        let kind = statfs(BPFFS).map_err(|errno| Error::io(BPFFS, errno))?.filesystem_type();
        if kind != BPF_FS_MAGIC {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700"))
                .map_err(|errno| Error::io(format!("mount the BPF file system at {BPFFS}"), errno))?;
        }
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(self.about(error)),
            _ => fs::set_permissions(&self.0, fs::Permissions::from_mode(0o700)).map_err(|error| self.about(error)),
        }
    }

    /// Removes every pin and the folder. The program goes with its link.
    pub fn remove(&self) -> Result<()> {
        unlink(&self.path(LINK))?;
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(|error| self.about(error))?,
        };
        for entry in entries {
            unlink(&entry.map_err(|error| self.about(error))?.path())?;
        }
        match fs::remove_dir(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.about(error)),
            _ => Ok(()),
        }
    }

    /// Opens a pinned map.
    pub fn open_map(&self, name: &str) -> Result<MapHandle> {
        MapHandle::from_pinned_path(self.path(name))
            .map_err(|error| abi::bpf_error(format!("map {name} in {}", self.0.display()), &error))
    }

    /// What the kernel says of a pinned link, None where it is not pinned.
    fn link(&self, name: &str) -> Result<Option<LinkInfo>> {
        let path = self.path(name);
        // Asked for as the file system says it: EACCES is an error, not "nothing there".
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path.display().to_string(), error)),
            Ok(_) => {}
        }
        let failed = |error: libbpf_rs::Error| abi::bpf_error(path.display().to_string(), &error);
        Link::open(&path).and_then(|link| link.info()).map(Some).map_err(failed)
    }

    /// How often the kernel has passed over the program; None where nothing is pinned.
    pub fn skipped(&self) -> Result<Option<Skipped>> {
        let Some(first) = self.link(LINK)?.map(|link| link.prog_id) else { return Ok(None) };
        let second = self.link(SECOND_LINK)?.map(|link| link.prog_id);
        let mut misses = HashMap::new();
        let ours = ProgInfoIter::default().filter(|program| program.id == first || Some(program.id) == second);
        misses.extend(ours.map(|program| (program.id, program.recursion_misses)));
        let of = |id: u32| {
            let gone = || Error::malformed(self.0.display().to_string(), format!("the kernel has no program {id}"));
            misses.get(&id).copied().ok_or_else(gone)
        };
        let first = of(first)?;
        // Without a second copy nothing stands behind the first.
        Ok(Some(Skipped::of(first, second.map_or(Ok(first), of)?)))
    }

    /// The hook of the pinned link, None where nothing is pinned.
    pub fn pinned_hook(&self) -> Result<Option<Hook>> {
        let path = self.path(LINK);
        let Some(info) = self.link(LINK)? else { return Ok(None) };
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
}

/// Removes what proofs of processes that were killed have left. They are not armed; this is tidying up.
pub fn sweep_proofs() -> Result<()> {
    let entries = match fs::read_dir(BPFFS) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|error| Error::io(BPFFS, error))?,
    };
    for entry in entries {
        let path = entry.map_err(|error| Error::io(BPFFS, error))?.path();
        let pid = path.to_str().and_then(|path| path.strip_prefix(PROOF));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            Pins(path).remove()?;
        }
    }
    Ok(())
}

fn unlink(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(path.display().to_string(), error)),
        _ => Ok(()),
    }
}

//! Fragments of one sender that come in another order than they were sent.
//!
//! Conntrack puts datagrams together again. Linux gives one up where more than `net.ipv4.ipfrag_max_dist` (64) fragments of
//! its sender came between two of its own (`ip_frag_too_far`, net/ipv4/ip_fragment.c). A replay is such a crowd: parked
//! fragments come at once, between those that arrive meanwhile. So nothing is too far while packets are parked. IPv6 has no
//! such limit.

use std::io;
use std::path::Path;

use super::disk::RealDisk;
use crate::host::disk::Disk;

const LIMIT: &str = "/proc/sys/net/ipv4/ipfrag_max_dist";
/// What it was, also for whoever goes on after a supervisor that has died.
const BEFORE: &str = "/run/ovs-graceful/ipfrag_max_dist";
/// No distance is too far.
const NONE: &str = "0";

/// From now on fragments may come in any order. May be called twice.
///
/// # Errors
/// Where the kernel has no such limit, or does not let it be changed.
pub fn may_come_in_any_order() -> io::Result<()> {
    lift(Path::new(LIMIT), Path::new(BEFORE))
}

/// The limit is what it was before, unless somebody else has set it since. May be called twice.
///
/// # Errors
/// Where the kernel does not let it be changed, or its old value cannot be read.
pub fn come_as_before() -> io::Result<()> {
    put_back(Path::new(LIMIT), Path::new(BEFORE))
}

fn lift(limit: &Path, before: &Path) -> io::Result<()> {
    let value = value_in(limit)?;
    if value == NONE {
        return Ok(());
    }
    RealDisk.replace(before, value.as_bytes())?;
    std::fs::write(limit, NONE)
}

fn put_back(limit: &Path, before: &Path) -> io::Result<()> {
    let value = match value_in(before) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        value => value?,
    };
    if value_in(limit)? == NONE {
        std::fs::write(limit, value)?;
    }
    RealDisk.remove(before)
}

/// A number, and nothing else.
fn value_in(path: &Path) -> io::Result<String> {
    let text = RealDisk.read(path)?;
    let number: i32 = std::str::from_utf8(&text)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{} holds no number", path.display())))?;
    Ok(number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_lifted_once_and_put_back_once() {
        let folder = tempfile::tempdir().unwrap();
        let (limit, before) = (folder.path().join("limit"), folder.path().join("before"));
        let is = |value: &str| assert_eq!(value_in(&limit).unwrap(), value);
        std::fs::write(&limit, "64\n").unwrap();
        lift(&limit, &before).unwrap();
        lift(&limit, &before).unwrap();
        is("0");
        put_back(&limit, &before).unwrap();
        is("64");
        std::fs::write(&limit, "0\n").unwrap();
        put_back(&limit, &before).unwrap();
        is("0");
    }

    #[test]
    fn what_another_has_set_meanwhile_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (limit, before) = (folder.path().join("limit"), folder.path().join("before"));
        std::fs::write(&limit, "64\n").unwrap();
        lift(&limit, &before).unwrap();
        std::fs::write(&limit, "7\n").unwrap();
        put_back(&limit, &before).unwrap();
        assert_eq!(value_in(&limit).unwrap(), "7");
        assert!(!before.exists());
        std::fs::write(&before, "rm -rf").unwrap();
        assert!(put_back(&limit, &before).is_err());
    }
}

//! The table of netlink sockets, `/proc/PID/net/netlink` (net/netlink/af_netlink.c, `netlink_native_seq_show`).

use std::fs;

use crate::error::{Error, Result};

/// One socket of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetlinkSocketRow {
    /// Protocol, as in [`super::Protocol`].
    pub protocol: u32,
    /// Port id (`nl_pid`).
    pub port_id: u32,
    /// Memory taken by messages that nobody has read yet, bytes.
    pub rmem: u64,
    /// Messages that were lost because the receive buffer was full.
    pub drops: u64,
    /// Inode of the socket: `/proc/PID/fd` shows it as `socket:[inode]`.
    pub inode: u64,
}

/// The sockets of our own network namespace.
///
/// # Errors
/// [`Error::Io`], [`Error::Malformed`].
pub fn read() -> Result<Vec<NetlinkSocketRow>> {
    read_file("/proc/thread-self/net/netlink")
}

/// The sockets of the network namespace of process `pid`.
///
/// # Errors
/// As [`read`].
pub fn read_of(pid: u32) -> Result<Vec<NetlinkSocketRow>> {
    read_file(&format!("/proc/{pid}/net/netlink"))
}

fn read_file(path: &str) -> Result<Vec<NetlinkSocketRow>> {
    parse(&fs::read_to_string(path).map_err(|e| Error::io(format!("read {path}"), e))?)
}

/// Reads the table's text. Columns are found by their titles.
///
/// # Errors
/// [`Error::Malformed`] if a column is missing or holds no number.
pub fn parse(text: &str) -> Result<Vec<NetlinkSocketRow>> {
    let mut lines = text.lines();
    let titles: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    let column = |title: &str| {
        titles
            .iter()
            .position(|t| *t == title)
            .ok_or_else(|| Error::malformed("/proc/net/netlink", format!("no column {title}")))
    };
    let [protocol, port_id, rmem, drops, inode] =
        [column("Eth")?, column("Pid")?, column("Rmem")?, column("Drops")?, column("Inode")?];
    lines
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let number = |index: usize| -> Result<u64> {
                let field = fields.get(index).copied().unwrap_or_default();
                field.parse().map_err(|_| Error::malformed("/proc/net/netlink", format!("{field:?} in {line:?}")))
            };
            let small =
                |index| number(index)?.try_into().map_err(|_| Error::malformed("/proc/net/netlink", line.to_owned()));
            Ok(NetlinkSocketRow {
                protocol: small(protocol)?,
                port_id: small(port_id)?,
                rmem: number(rmem)?,
                drops: number(drops)?,
                inode: number(inode)?,
            })
        })
        .collect()
}

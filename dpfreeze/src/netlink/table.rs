//! The table of netlink sockets, `/proc/PID/net/netlink` (net/netlink/af_netlink.c, `netlink_native_seq_show`).

use std::fs;
use std::path::Path;

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

/// The inode of the socket that a link in `/proc/PID/fd` says a descriptor is; None where it is another file, or closed.
pub(crate) fn socket_inode(link: &Path) -> Option<u64> {
    fs::read_link(link).ok()?.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode
0000000000000000 16  2316567663 00000000 4096     0        0     2        17       12922   
0000000000000000 0   0          00000000 0        0        0     2        0        10      
";

    #[test]
    fn rows_are_read_by_the_titles_of_the_columns() {
        let busy = NetlinkSocketRow { protocol: 16, port_id: 2316567663, rmem: 4096, drops: 17, inode: 12922 };
        let kernel = NetlinkSocketRow { protocol: 0, port_id: 0, rmem: 0, drops: 0, inode: 10 };
        assert_eq!(parse(TABLE).unwrap(), [busy, kernel]);
        let swapped: String = TABLE
            .lines()
            .map(|line| {
                let mut fields: Vec<&str> = line.split_whitespace().collect();
                fields.swap(1, 9);
                fields.join(" ") + "\n"
            })
            .collect();
        assert_eq!(parse(&swapped).unwrap(), [busy, kernel]);
    }

    #[test]
    fn what_is_no_table_is_an_error() {
        assert!(parse("").is_err());
        assert!(parse(&TABLE.replace("Drops", "Props")).is_err());
        assert!(parse(&TABLE.replace("12922", "many")).is_err());
        assert!(parse(&(TABLE.to_owned() + "0000 16 5")).is_err());
    }
}

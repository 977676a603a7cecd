//! The error of this library: it names the object, the cause and the remedy.

use std::io;

use nix::errno::Errno;

/// What can go wrong between us and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, and to which object.
        what: String,
        /// The cause as the system said it.
        #[source]
        source: io::Error,
    },
    /// The kernel answered a netlink request with an error.
    #[error("{what}: the kernel answered {errno}{}", .text.as_deref().map(|t| format!(" ({t})")).unwrap_or_default())]
    Netlink {
        /// The request, for example `OVS_FLOW_CMD_GET of ovs-system`.
        what: String,
        /// The errno of the answer, positive.
        errno: Errno,
        /// `NLMSGERR_ATTR_MSG` of the extended acknowledgement, where there was one.
        text: Option<String>,
    },
    /// A message from the kernel does not have the form that its header file gives it.
    #[error("{what}: malformed message: {why}")]
    Malformed {
        /// The message.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A dump stayed incomplete (interrupted, truncated or overrun) through every retry.
    #[error(
        "{what}: the dump stayed incomplete after {tries} tries ({why}); try again when the datapath changes less"
    )]
    IncompleteDump {
        /// What was dumped.
        what: String,
        /// How often it was tried.
        tries: u32,
        /// Why the last try did not count.
        why: String,
    },
    /// The kernel or this process lacks something that the request needs.
    #[error("{what}: {why}; remedy: {remedy}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What is missing.
        why: String,
        /// What the operator can do about it.
        remedy: String,
    },
}

/// The result of this library.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] for `what`.
    pub fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Io { what: what.into(), source: source.into() }
    }

    /// The errno of a system call or of the kernel's answer, where there is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Io { source, .. } => source.raw_os_error().map(Errno::from_raw),
            Error::Netlink { errno, .. } => Some(*errno),
            Error::Malformed { .. } | Error::IncompleteDump { .. } | Error::Unsupported { .. } => None,
        }
    }

    /// An [`Error::Malformed`] for `what`.
    pub fn malformed(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Malformed { what: what.into(), why: why.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_object_cause_and_remedy() {
        let cases = [
            (Error::io("read /proc/1/fd", Errno::EACCES), "read /proc/1/fd: Permission denied (os error 13)"),
            (
                Error::Netlink { what: "flow".into(), errno: Errno::EBUSY, text: Some("in use".into()) },
                "flow: the kernel answered EBUSY: Device or resource busy (in use)",
            ),
            (
                Error::Netlink { what: "flow".into(), errno: Errno::ENOENT, text: None },
                "flow: the kernel answered ENOENT: No such file or directory",
            ),
            (Error::malformed("ovs_flow", "3 bytes"), "ovs_flow: malformed message: 3 bytes"),
            (
                Error::IncompleteDump { what: "flows".into(), tries: 8, why: "overrun".into() },
                "flows: the dump stayed incomplete after 8 tries (overrun); \
                 try again when the datapath changes less",
            ),
            (
                Error::Unsupported { what: "BPF".into(), why: "lockdown".into(), remedy: "boot without".into() },
                "BPF: lockdown; remedy: boot without",
            ),
        ];
        for (error, text) in cases {
            assert_eq!(error.to_string(), text);
        }
    }

    #[test]
    fn the_errno_is_found_wherever_there_is_one() {
        assert_eq!(Error::io("it", Errno::EACCES).errno(), Some(Errno::EACCES));
        assert_eq!(Error::io("it", io::Error::other("x")).errno(), None);
        assert_eq!(Error::Netlink { what: "it".into(), errno: Errno::EPERM, text: None }.errno(), Some(Errno::EPERM));
        assert_eq!(Error::malformed("it", "x").errno(), None);
    }
}

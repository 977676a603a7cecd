//! The error of this library: it names the object, the cause and the remedy.

use std::io;

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
        errno: nix::errno::Errno,
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
    #[error("{what}: {why}; {remedy}")]
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

    /// An [`Error::Malformed`] for `what`.
    pub fn malformed(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Malformed { what: what.into(), why: why.into() }
    }
}

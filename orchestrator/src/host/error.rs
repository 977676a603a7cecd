//! The error of the host: it names the object, the cause and the remedy.

use std::any::Any;
use std::fmt::Display;

/// What can go wrong between us and the daemons, the database, systemd or the bridges of this host.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{object}: {cause}{}", if .remedy.is_empty() { String::new() } else { format!("; {}", .remedy) })]
pub struct HostError {
    /// What it is about, for example `ovs-vswitchd (pid 355)` or `bridge br0`.
    pub object: String,
    /// What went wrong.
    pub cause: String,
    /// What the operator can do about it; empty where there is nothing to do.
    pub remedy: String,
    /// True where a deadline passed: the thing asked for may still happen.
    pub timed_out: bool,
    /// True where the daemon that was asked is not there, or went away before it answered: it may come back.
    pub away: bool,
    /// True where the database's disk did not take what was to be written: it is full, read-only or failing, and the
    /// same may succeed later.
    pub unwritable: bool,
}

/// The result of the host.
pub type Result<T> = std::result::Result<T, HostError>;

impl HostError {
    /// An error of `object` with its cause.
    pub fn new(object: impl Into<String>, cause: impl Display) -> Self {
        HostError {
            object: object.into(),
            cause: cause.to_string(),
            remedy: String::new(),
            timed_out: false,
            away: false,
            unwritable: false,
        }
    }

    /// A deadline of `object` that passed while `doing`.
    pub fn timeout(object: impl Into<String>, doing: impl Display) -> Self {
        HostError { timed_out: true, ..HostError::new(object, format_args!("no answer in time while {doing}")) }
    }

    /// The daemon `object` is not there, or went away.
    pub fn away(object: impl Into<String>, cause: impl Display) -> Self {
        HostError { away: true, ..HostError::new(object, cause) }
    }

    /// The disk of the database `object` did not take what was to be written.
    pub fn unwritable(object: impl Into<String>, cause: impl Display) -> Self {
        HostError { unwritable: true, ..HostError::new(object, cause) }
    }

    /// The same error with a remedy.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }
}

/// Gives an error of a lower layer its object.
pub trait Context<T> {
    /// Turns the error into a [`HostError`] of `object`.
    fn about(self, object: impl Into<String>) -> Result<T>;
}

impl<T, E: Display + 'static> Context<T> for std::result::Result<T, E> {
    fn about(self, object: impl Into<String>) -> Result<T> {
        self.map_err(|error| match (&error as &dyn Any).downcast_ref() {
            // A remedy within the cause would stand beside another one.
            Some(dpfreeze::Error::Unsupported { what, why, remedy }) => {
                HostError::new(object, format_args!("{what}: {why}")).remedy(remedy)
            }
            _ => HostError::new(object, error),
        })
    }
}

//! The guard: refuses the deletion of timeout policies that connections live under, apart from a freeze and beyond it
//! (hazards 30). The same program with pins, lease and absolute end of its own; nothing but nfnetlink is looked at.

use std::time::Duration;

use crate::error::Result;
use crate::freeze::pins::Pins;
use crate::freeze::{scope, Classes, Families, Freeze, Hook, Renewal, Scope, State};

/// The guard of this host. Dropping it lifts nothing: the pins keep it, the lease ends it.
#[derive(Debug)]
pub struct PolicyGuard(Freeze);

impl PolicyGuard {
    /// The guard that is pinned, or None.
    ///
    /// # Errors
    /// Where the pins cannot be read.
    pub fn open() -> Result<Option<PolicyGuard>> {
        Ok(Freeze::open_in(Pins::guard())?.map(PolicyGuard))
    }

    /// The guard that is pinned, or one that is loaded now on `hook` and refuses nothing yet.
    ///
    /// # Errors
    /// As [`Freeze::load_on`].
    pub fn load(hook: Hook) -> Result<PolicyGuard> {
        match PolicyGuard::open()? {
            Some(guard) => Ok(guard),
            None => Freeze::load_in(Pins::guard(), &[hook]).map(PolicyGuard),
        }
    }

    /// Refuses the deletion of the policies of these names, and of no others, in the network namespace of the calling
    /// thread: for `lease`, and for `end` at the most unless this is called again. One that holds is changed without a
    /// gap, and its counter stays.
    ///
    /// # Errors
    /// Where the maps cannot be written.
    pub fn hold(&mut self, names: &[String], lease: Duration, end: Duration) -> Result<()> {
        let state = self.state()?;
        if state.armed && state.netns_inode == scope::netns_inode()? {
            return self.0.guard_timeouts(names, lease, end);
        }
        let scope = Scope::here(&[], names, Families::default())?;
        self.0.arm(&scope, Classes::CT_TIMEOUT_DEL, lease, end)
    }

    /// Lets go of all policies but those of these names.
    ///
    /// # Errors
    /// As [`PolicyGuard::hold`].
    pub fn keep(&mut self, names: &[String]) -> Result<()> {
        self.0.set_timeout_names(names)
    }

    /// As [`Freeze::renew`].
    ///
    /// # Errors
    /// As [`Freeze::renew`].
    pub fn renew(&mut self, lease: Duration) -> Result<Renewal> {
        self.0.renew(lease)
    }

    /// How many deletions were refused since it began to hold.
    ///
    /// # Errors
    /// Where the counters cannot be read.
    pub fn refused(&self) -> Result<u64> {
        Ok(self.0.refused()?.ct_timeout_del)
    }

    /// What it is doing.
    ///
    /// # Errors
    /// Where the maps cannot be read.
    pub fn state(&self) -> Result<State> {
        State::read(&self.0)
    }

    /// Lets go of everything at once and removes program and pins. Done twice it does nothing.
    ///
    /// # Errors
    /// Where a pin cannot be removed.
    pub fn release() -> Result<()> {
        super::thaw_in(&Pins::guard())
    }
}

//! Abort against point of no return: exactly one of the two happens first.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

const OPEN: u8 = 0;
const ABORTED: u8 = 1;
const COMMITTED: u8 = 2;

/// Decides the race between a request to abort and the point of no return. Shared by the supervisor, which asks at
/// its checkpoints, and the threads of its socket.
#[derive(Debug, Default)]
pub struct AbortGate {
    state: AtomicU8,
    thaw: AtomicBool,
}

/// The run had been asked to abort (for [`AbortGate::commit`]) or is past the point of no return (for
/// [`AbortGate::request_abort`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too late")]
pub struct TooLate;

impl AbortGate {
    /// A gate that is open to both.
    pub fn new() -> AbortGate {
        AbortGate::default()
    }

    /// Asks the run to abort; too late after [`AbortGate::commit`]. Asking twice is asking once.
    pub fn request_abort(&self) -> Result<(), TooLate> {
        match self.state.compare_exchange(OPEN, ABORTED, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) | Err(ABORTED) => Ok(()),
            Err(_) => Err(TooLate),
        }
    }

    /// True once the run has been asked to abort. Ask at every checkpoint before the point of no return.
    pub fn abort_requested(&self) -> bool {
        self.state.load(Ordering::SeqCst) == ABORTED
    }

    /// Crosses the point of no return; too late if the run has been asked to abort. From here on
    /// [`AbortGate::request_abort`] is refused. Crossing twice is crossing once.
    pub fn commit(&self) -> Result<(), TooLate> {
        match self.state.compare_exchange(OPEN, COMMITTED, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) | Err(COMMITTED) => Ok(()),
            Err(_) => Err(TooLate),
        }
    }

    /// True after [`AbortGate::commit`].
    pub fn committed(&self) -> bool {
        self.state.load(Ordering::SeqCst) == COMMITTED
    }

    /// Asks for the emergency thaw: bind the running daemon, replay, lift every freeze, whatever the phase.
    pub fn request_thaw(&self) {
        self.thaw.store(true, Ordering::SeqCst);
    }

    /// True once somebody asked for the emergency thaw.
    pub fn thaw_requested(&self) -> bool {
        self.thaw.load(Ordering::SeqCst)
    }
}

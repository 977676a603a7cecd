//! Stops a traced thread when it is about to add or delete a port, and at no other system call.

use libbpf_rs::MapHandle;

use crate::error::Result;
use crate::freeze::{abi, Freeze};

const MAP: &str = "halt";

/// A thread whose tracer is told of its requests for ports: the kernel's program fails the `sendmsg` of such a request
/// with `EINTR` and sends the thread [`Halt::SIGNAL`], which the tracer sees. OVS sends again what was interrupted
/// (`nl_sock_transact_multiple__`, lib/netlink-socket.c), which passes unless the halt is on by then.
///
/// It is off at first, and has no effect on a thread that is not traced.
#[derive(Debug)]
pub struct Halt {
    map: MapHandle,
    on: Vec<u8>,
}

impl Halt {
    /// The signal of the program. It is ignored by default: a tracer that dies between signal and stop kills nobody.
    pub const SIGNAL: i32 = libc::SIGURG;

    /// For the thread `tid`, by the numbers of the initial pid namespace. `vport_family` is the generic netlink family
    /// `ovs_vport`.
    ///
    /// # Errors
    /// Where the maps of `freeze` are gone: somebody has lifted it.
    pub fn of(freeze: &Freeze, tid: i32, vport_family: u16) -> Result<Halt> {
        let words = [u64::try_from(tid).unwrap_or_default(), u64::from(vport_family)];
        let on = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Ok(Halt { map: freeze.pins.open_map(MAP)?, on })
    }

    /// From now on its requests for ports stop it.
    pub fn on(&self) -> Result<()> {
        abi::update(&self.map, MAP, 0, &self.on)
    }

    /// From now on they pass.
    pub fn off(&self) -> Result<()> {
        abi::update(&self.map, MAP, 0, &vec![0; self.on.len()])
    }
}

impl Drop for Halt {
    fn drop(&mut self) {
        if let Err(error) = self.off() {
            tracing::warn!("{error}");
        }
    }
}

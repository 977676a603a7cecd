//! The whole of this machine, for a run.

use std::sync::Arc;

use dpfreeze::park::ParkLimits;

use super::datapath::KernelDatapath;
use super::{Ovsdb, RealClock, RealDaemons, RealDevices, RealModule, RealOpenFlow, RealSurroundings, Systemd};
use crate::config::Config;
use crate::host::Database;
use crate::steps::Host;

/// Where the daemons keep their sockets and PID files (`ovs_rundir`).
pub const RUN_DIRECTORY: &str = "/run/openvswitch";
/// Where ovsdb-server listens.
pub const DATABASE_SOCKET: &str = "/run/openvswitch/db.sock";

impl Host {
    /// This machine's database, which is there before the datapath is.
    pub fn real_database() -> Box<dyn Database> {
        Box::new(Ovsdb::new(DATABASE_SOCKET))
    }

    /// This machine.
    ///
    /// # Errors
    /// Where there is no kernel datapath, or this process may not ask for it.
    pub fn real(config: &Config) -> anyhow::Result<Host> {
        let limits = ParkLimits {
            bytes: config.park.max_bytes,
            packets: config.park.max_packets,
            when_full: config.park.when_full.into(),
            socket_bytes: config.park.socket_bytes as usize,
        };
        Ok(Host {
            datapath: Box::new(KernelDatapath::open(limits)?),
            daemons: Box::new(RealDaemons::new(DATABASE_SOCKET)),
            database: Box::new(Ovsdb::new(DATABASE_SOCKET)),
            openflow: Box::new(RealOpenFlow::new(RUN_DIRECTORY)),
            services: Box::new(Systemd::default()),
            surroundings: Box::new(RealSurroundings),
            module: Box::new(RealModule),
            devices: Box::new(RealDevices),
            clock: Arc::new(RealClock),
        })
    }
}

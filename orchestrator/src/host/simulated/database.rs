//! The database of the simulated host.

use std::collections::BTreeMap;
use std::time::Instant;

use super::world::{bridges, DiskState, Table, World, POLICY_S};
use super::Sim;
use crate::host::database_disk::{DatabaseDisk, DatabaseFile};
use crate::host::{
    Cleared, CtZone, Database, DatabaseFacts, HostError, RestoreWaitWatch, Result, SwitchLock, SystemRow,
};

/// The zone that has a timeout policy.
const ZONE: u16 = 5;

fn zone(touched: bool) -> CtZone {
    let touched = touched.then(|| ("icmp_reply".to_owned(), 30));
    let timeouts = [("udp_single".to_owned(), POLICY_S)].into_iter().chain(touched);
    CtZone { zone: ZONE, timeouts: Some(timeouts.collect()), limit: None }
}

pub(super) struct SimDatabase(pub(super) Sim);

impl SimDatabase {
    fn table<T>(
        &self,
        name: &'static str,
        until: Instant,
        mut effect: impl FnMut(&mut Table) -> Result<T>,
    ) -> Result<T> {
        self.0.operate(name, Some(until), |world: &mut World| {
            if world.server().is_none() {
                return Err(HostError::new("database", "nobody listens on its socket"));
            }
            // What changes nothing is not written.
            let mut changed = world.table.clone();
            let done = effect(&mut changed)?;
            if changed != world.table && !world.writable() {
                return Err(refused());
            }
            world.table = changed;
            Ok(done)
        })
    }
}

fn refused() -> HostError {
    HostError::unwritable("database", "transaction refused: I/O error (simulated)")
}

fn disk<T>(
    sim: &Sim,
    name: &'static str,
    until: Option<Instant>,
    mut effect: impl FnMut(&mut World) -> Result<T>,
) -> Result<T> {
    sim.operate(name, until, |world| match world.server() {
        Some(_) => effect(world),
        None => Err(HostError::new("ovsdb-server", "it does not run")),
    })
}

impl DatabaseDisk for SimDatabase {
    fn look_at_disk(&self) -> Result<DatabaseFile> {
        disk(&self.0, "database_disk.look", None, |world| {
            let free = if world.table_disk.state == DiskState::Full { 0 } else { 1 << 30 };
            let in_memory = world.table_disk.file.is_some();
            let file = DatabaseFile { path: "/etc/openvswitch/conf.db".into(), size: 20_000, free, in_memory };
            match world.table_disk.state {
                DiskState::ReadOnly => Err(refused()),
                DiskState::Well | DiskState::Full => Ok(file),
            }
        })
    }

    fn has_left_over(&self) -> Result<bool> {
        disk(&self.0, "database_disk.has_left_over", None, |world| {
            Ok(world.table_disk.ballast || world.table_disk.file.is_some())
        })
    }

    fn keep_ballast(&self) -> Result<()> {
        disk(&self.0, "database_disk.keep_ballast", None, |world| match world.table_disk.state {
            DiskState::Well => {
                world.table_disk.ballast = true;
                Ok(())
            }
            DiskState::Full | DiskState::ReadOnly => Err(refused()),
        })
    }

    fn drop_ballast(&self) -> Result<bool> {
        disk(&self.0, "database_disk.drop_ballast", None, |world| match world.table_disk.state {
            DiskState::ReadOnly if world.table_disk.ballast => Err(refused()),
            DiskState::ReadOnly => Ok(false),
            state => {
                let had = std::mem::take(&mut world.table_disk.ballast);
                if had && state == DiskState::Full {
                    world.table_disk.state = DiskState::Well;
                }
                Ok(had)
            }
        })
    }

    fn serve_from_memory(&self, until: Instant) -> Result<()> {
        disk(&self.0, "database_disk.serve_from_memory", Some(until), |world| {
            if world.table_disk.no_memory {
                return Err(HostError::new("database", "no memory can be put over its folder (simulated)"));
            }
            world.table_disk.file.get_or_insert_with(|| world.table.clone());
            Ok(())
        })
    }

    fn write_back(&self, until: Instant) -> Result<bool> {
        disk(&self.0, "database_disk.write_back", Some(until), |world| match world.table_disk.state {
            _ if world.table_disk.file.is_none() => Ok(false),
            DiskState::Well => Ok(world.table_disk.file.take().is_some()),
            DiskState::Full | DiskState::ReadOnly => Err(refused()),
        })
    }
}

impl Database for SimDatabase {
    fn facts(&self, until: Instant) -> Result<DatabaseFacts> {
        self.table("database.facts", until, |table| {
            let flag = table.flag.then(|| ("flow-restore-wait".to_owned(), "true".to_owned()));
            let mark = table.mark.clone().map(|run| ("ovs-graceful-run".to_owned(), run));
            Ok(DatabaseFacts {
                other_config: BTreeMap::from_iter(flag),
                external_ids: mark.into_iter().chain(table.row.ids.clone()).collect(),
                system_type: table.row.system_type.clone(),
                system_version: table.row.system_version.clone(),
                next_cfg: table.next_cfg,
                cur_cfg: table.cur_cfg,
                ct_zones: vec![zone(table.touched)],
                bridges: bridges().into_iter().filter(|bridge| Some(&*bridge.name) != table.removed).collect(),
                ..DatabaseFacts::default()
            })
        })
    }

    fn set_restore_wait(&self, run: &str, until: Instant) -> Result<i64> {
        self.table("database.set_restore_wait", until, |table| {
            if table.flag {
                return Err(HostError::new("flow-restore-wait", "it is set already"));
            }
            table.flag = true;
            table.mark = Some(run.to_owned());
            table.next_cfg += 1;
            Ok(table.next_cfg)
        })
    }

    fn clear_restore_wait(&self, run: &str, until: Instant) -> Result<Cleared> {
        self.table("database.clear_restore_wait", until, |table| {
            if table.mark.as_deref() != Some(run) {
                return Ok(Cleared::NotOurs);
            }
            table.mark = None;
            if !std::mem::take(&mut table.flag) {
                return Ok(Cleared::AlreadyGone);
            }
            table.next_cfg += 1;
            Ok(Cleared::Removed { next_cfg: table.next_cfg })
        })
    }

    fn return_ovn_wait(&self, until: Instant) -> Result<()> {
        self.table("database.return_ovn_wait", until, |_table| Ok(()))
    }

    fn touch_policies(&self, zones: &[u16], until: Instant) -> Result<()> {
        self.table("database.touch_policies", until, |table| {
            table.touched |= zones.contains(&ZONE);
            table.next_cfg += 1;
            Ok(())
        })
    }

    fn clear_touched_policies(&self, until: Instant) -> Result<()> {
        self.table("database.clear_touched_policies", until, |table| {
            table.next_cfg += i64::from(std::mem::take(&mut table.touched));
            Ok(())
        })
    }

    fn bump(&self, until: Instant) -> Result<i64> {
        self.table("database.bump", until, |table| {
            table.next_cfg += 1;
            Ok(table.next_cfg)
        })
    }

    fn prove_writable(&self, until: Instant) -> Result<()> {
        self.table("database_disk.prove_writable", until, |table| {
            table.next_cfg += 1;
            Ok(())
        })
    }

    fn wait_in_step(&self, next_cfg: i64, until: Instant) -> Result<()> {
        self.table("database.wait_in_step", until, |_| Ok(()))?;
        let in_step = self.0.wait(until, |world| (world.table.cur_cfg >= next_cfg).then_some(()));
        in_step.ok_or_else(|| HostError::timeout("ovs-vswitchd", "waiting for it to be in step"))
    }

    fn transact(&self, _operations: Vec<serde_json::Value>, until: Instant) -> Result<Vec<serde_json::Value>> {
        self.table("database.transact", until, |_| Ok(Vec::new()))
    }

    fn write_row(&self, row: &SystemRow, until: Instant) -> Result<()> {
        self.table("database.write_row", until, |table| {
            table.row = row.clone();
            Ok(())
        })
    }

    fn queue_for_switch_lock(&self, until: Instant) -> Result<Box<dyn SwitchLock>> {
        // Given up by whoever dies just then, too.
        let lock = SimLock(self.0.clone());
        self.0.operate("database.queue_for_switch_lock", Some(until), |world| match world.server() {
            Some(_) => {
                world.lock_queued = true;
                Ok(())
            }
            None => Err(HostError::new("database", "nobody listens on its socket")),
        })?;
        Ok(Box::new(lock))
    }

    fn watch_restore_wait(&self, until: Instant) -> Result<Box<dyn RestoreWaitWatch>> {
        self.table("database.watch_restore_wait", until, |_| Ok(()))?;
        Ok(Box::new(SimWatch(self.0.clone())))
    }
}

struct SimLock(Sim);

impl SwitchLock for SimLock {
    fn is_ours(&mut self) -> bool {
        // Polled: a fault in every look would be too many.
        let mut world = self.0.world();
        world.lock_queued |= world.server().is_some();
        world.lock_queued && !world.switches().any(|process| process.leads)
    }
}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.0.world().lock_queued = false;
    }
}

struct SimWatch(Sim);

impl RestoreWaitWatch for SimWatch {
    fn is_set(&mut self) -> Result<bool> {
        Ok(self.0.look().table.flag)
    }
}

//! The service manager of the simulated host.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::world::{WorldHook, SERVER, SWITCH};
use super::Sim;
use crate::host::{
    Daemon, DaemonKind, GuardUnits, HandOver, HostError, Job, JobKind, Neighbour, QueuedJob, Result, SavedProgram,
    ServiceManager, SupervisorUnit, Unit,
};

pub(super) struct SimServices(pub(super) Sim);

impl SimServices {
    fn loaded(&self, name: &str) -> Option<Unit> {
        let world = self.0.look();
        let unit = |active_state: &str, main_pid: i32, drop_in: bool| Unit {
            name: name.to_owned(),
            active_state: active_state.to_owned(),
            sub_state: match active_state {
                "active" => "running".into(),
                "deactivating" => "stop".into(),
                "reloading" => "reload".into(),
                _ => String::new(),
            },
            main_pid,
            exec_start: vec!["/usr/share/openvswitch/scripts/ovs-ctl".into(), "start".into()],
            control_group: format!("/system.slice/{name}"),
            drop_ins: drop_in.then(|| "90-ovs-graceful.conf".into()).into_iter().collect(),
            ..Unit::default()
        };
        match name {
            SWITCH => Some(unit(&world.switch.state, world.switch.main, world.switch.drop_in)),
            SERVER => {
                let main = world.server().map_or(0, |server| server.id.pid);
                Some(unit(if main > 0 { "active" } else { "failed" }, main, world.server_drop_in))
            }
            _ => None,
        }
    }
}

impl ServiceManager for SimServices {
    fn is_running(&self) -> bool {
        self.0.look().variant.systemd
    }

    fn owner(&self, daemon: &Daemon, until: Instant) -> Result<Option<Unit>> {
        let runs = self.0.operate("services.owner", Some(until), |world| Ok(world.variant.units()))?;
        let name = match daemon.kind {
            DaemonKind::OvsVswitchd => SWITCH,
            DaemonKind::OvsdbServer => SERVER,
        };
        Ok(self.loaded(name).filter(|_| runs))
    }

    fn unit(&self, name: &str, until: Instant) -> Result<Option<Unit>> {
        self.0.operate("services.unit", Some(until), |_| Ok(()))?;
        Ok(self.loaded(name))
    }

    fn shutdown_queued(&self, until: Instant) -> Result<bool> {
        self.0.operate("services.shutdown_queued", Some(until), |_| Ok(false))
    }

    fn jobs(&self, until: Instant) -> Result<Vec<QueuedJob>> {
        self.0.operate("services.jobs", Some(until), |world| {
            let restart = |hook: &WorldHook| QueuedJob {
                id: 1,
                unit: SWITCH.into(),
                kind: "restart".into(),
                running: hook.stops,
            };
            Ok(world.switch.hook.iter().filter(|hook| hook.stops).map(restart).collect())
        })
    }

    fn neighbours(&self, until: Instant) -> Result<Vec<Neighbour>> {
        self.0.operate("services.neighbours", Some(until), |_| Ok(Vec::new()))
    }

    fn cancel_job(&self, _id: u32, until: Instant) -> Result<()> {
        self.0.operate("services.cancel_job", Some(until), |_| Ok(()))
    }

    fn job_of(&self, _unit: &str, until: Instant) -> Result<Option<Box<dyn Job>>> {
        let job = self.0.operate("services.job_of", Some(until), |world| Ok(world.switch.reload))?;
        Ok(job.map(|id| Box::new(SimJob { sim: self.0.clone(), id }) as _))
    }

    fn prepare_hand_over(&self, hand_over: &HandOver, until: Instant) -> Result<Unit> {
        self.0.operate("services.prepare_hand_over", Some(until), |world| {
            world.switch.drop_in = true;
            Ok(())
        })?;
        self.loaded(&hand_over.unit).ok_or_else(|| HostError::new(&hand_over.unit, "it has gone"))
    }

    fn append_to_start(&self, _unit: &str, _words: &[&str], until: Instant) -> Result<()> {
        self.0.operate("services.append_to_start", Some(until), |world| {
            world.server_drop_in = true;
            Ok(())
        })
    }

    fn prefer_program(&self, _unit: &str, _saved: &SavedProgram, until: Instant) -> Result<()> {
        self.0.operate("services.prefer_program", Some(until), |world| {
            world.switch.drop_in = true;
            world.switch.prefers_saved = true;
            Ok(())
        })
    }

    fn end_hand_over(&self, unit: &str, until: Instant) -> Result<()> {
        self.0.operate("services.end_hand_over", Some(until), |world| {
            match unit {
                SWITCH => {
                    world.switch.drop_in = false;
                    world.switch.prefers_saved = false;
                }
                _ => world.server_drop_in = false,
            }
            Ok(())
        })
    }

    fn start_job(&self, unit: &str, kind: JobKind, until: Instant) -> Result<Box<dyn Job>> {
        let id = self.0.operate("services.start_job", Some(until), |world| {
            let id = world.fresh_id();
            match (unit, kind) {
                (SWITCH, JobKind::Reload) if world.switch.drop_in && world.switch.state == "active" => {
                    world.switch.state = "reloading".into();
                    world.switch.reload = Some(id);
                    world.switch.hook = Some(WorldHook { id, ..WorldHook::default() });
                }
                (SWITCH, JobKind::Reload) => {
                    world.switch.results.insert(id, "failed");
                }
                (SWITCH, _) => world.restart_switch(id),
                // It runs: systemd has nothing to do.
                (_, JobKind::Start) => {
                    world.switch.results.insert(id, "done");
                }
                _ => {
                    world.restart_server();
                    world.switch.results.insert(id, "done");
                }
            }
            Ok(id)
        })?;
        Ok(Box::new(SimJob { sim: self.0.clone(), id }))
    }

    fn keep(&self, _descriptors: &[(&str, BorrowedFd<'_>)], until: Instant) -> Result<bool> {
        self.0.operate("services.keep", Some(until), |world| {
            world.kept = world.variant.systemd;
            Ok(world.kept)
        })
    }

    fn start_guard(&self, _units: &GuardUnits, until: Instant) -> Result<()> {
        self.0.operate("services.start_guard", Some(until), |_| Ok(()))
    }

    fn end_guard(&self, _timer: &str, until: Instant) -> Result<()> {
        self.0.operate("services.end_guard", Some(until), |_| Ok(()))
    }

    fn start_supervisor(&self, unit: &SupervisorUnit, _until: Instant) -> Result<()> {
        Err(HostError::new(&unit.name, "the tests are the supervisor"))
    }
}

struct SimJob {
    sim: Sim,
    id: u64,
}

impl Job for SimJob {
    fn wait(&mut self, until: Instant) -> Result<Option<String>> {
        self.sim.operate("job.wait", Some(until), |_| Ok(()))?;
        let id = self.id;
        Ok(self.sim.wait(until, |world| world.switch.results.get(&id).map(|result| (*result).to_owned())))
    }
}

//! The daemons of the simulated host.

use std::path::PathBuf;
use std::time::Instant;

use super::world::{bridges, PidNames, Process, Program, World};
use super::Sim;
use crate::host::{
    Daemon, DaemonKind, Daemons, HostError, Logs, ProcessId, Result, SavedProgram, ServerState, Signal, Sources,
    Starting, Versions,
};

pub(super) struct SimDaemons(pub(super) Sim);

/// What ran before, and what is installed.
const VERSIONS: (&str, &str) = ("3.1.0", "3.1.1");

fn version(program: Program) -> String {
    match program {
        Program::Old | Program::Saved => VERSIONS.0.into(),
        Program::Installed => VERSIONS.1.into(),
    }
}

fn gone(id: ProcessId) -> HostError {
    HostError::new(format!("process {}", id.pid), "it has ended")
}

fn living(world: &World, id: ProcessId) -> Result<&Process> {
    world.processes.get(&id.pid).filter(|process| process.id == id).ok_or_else(|| gone(id))
}

impl SimDaemons {
    fn start(&self, name: &'static str, program: Program, in_unit: bool) -> Result<Box<dyn Starting>> {
        let pid = self.0.operate(name, None, |world| Ok(world.spawn(DaemonKind::OvsVswitchd, program, in_unit)))?;
        Ok(Box::new(SimStarting { sim: self.0.clone(), pid }))
    }
}

impl Daemons for SimDaemons {
    fn find_vswitchd(&self, upcall_port_ids: &[u32]) -> Result<Daemon> {
        self.0.operate("daemons.find_vswitchd", None, |world| match world.reader(upcall_port_ids) {
            Some(process) => Ok(world.describe(process)),
            None => Err(HostError::new("ovs-vswitchd", "no process of it owns the upcall sockets of the datapath")),
        })
    }

    fn find_ovsdb_server(&self) -> Result<Daemon> {
        self.0.operate("daemons.find_ovsdb_server", None, |world| match world.server() {
            Some(process) => Ok(world.describe(process)),
            None => Err(HostError::new("ovsdb-server", "it does not run")),
        })
    }

    fn would_start_database(&self) -> bool {
        false
    }

    fn systemd_listens(&self) -> Result<bool> {
        Ok(true)
    }

    fn keep_listening(&self, _daemon: &Daemon) -> Result<()> {
        Ok(())
    }

    fn find_all(&self, kind: DaemonKind) -> Result<Vec<Daemon>> {
        self.0.operate("daemons.find_all", None, |world| {
            let all = world.processes.values().filter(|process| process.kind == kind);
            Ok(all.map(|process| world.describe(process)).collect())
        })
    }

    fn describe(&self, kind: DaemonKind, pid: i32) -> Result<Daemon> {
        self.0.operate("daemons.describe", None, |world| match world.processes.get(&pid) {
            Some(process) if process.kind == kind => Ok(world.describe(process)),
            _ => Err(HostError::new(format!("process {pid}"), "it has ended")),
        })
    }

    fn is_alive(&self, id: ProcessId) -> bool {
        living(&self.0.look(), id).is_ok()
    }

    fn signal(&self, id: ProcessId, signal: Signal) -> Result<()> {
        self.0.operate("daemons.signal", None, |world| {
            living(world, id)?;
            match signal {
                Signal::Stop | Signal::Continue => {
                    if let Some(process) = world.processes.get_mut(&id.pid) {
                        process.stopped = signal == Signal::Stop;
                    }
                }
                Signal::Terminate => world.end(id.pid, true),
                Signal::Kill => world.end(id.pid, false),
            }
            Ok(())
        })
    }

    fn end_monitor(&self, _daemon: &Daemon, until: Instant) -> Result<()> {
        // Nobody has one here (docs/simulation.md).
        self.0.operate("daemons.end_monitor", Some(until), |_| Ok(()))
    }

    fn started_since(&self, cgroup: &str, ticks: u64) -> Result<Vec<ProcessId>> {
        self.0.operate("daemons.started_since", None, |world| {
            let inside = world.processes.values().filter(|process| world.describe(process).cgroup == cgroup);
            Ok(inside.map(|process| process.id).filter(|id| id.start_time >= ticks).collect())
        })
    }

    fn listens(&self, daemon: &Daemon) -> bool {
        living(&self.0.look(), daemon.id).is_ok()
    }

    fn wait_end(&self, id: ProcessId, until: Instant) -> Result<bool> {
        self.0.operate("daemons.wait_end", Some(until), |_| Ok(()))?;
        Ok(self.0.wait(until, |world| living(world, id).is_err().then_some(())).is_some())
    }

    fn running_version(&self, daemon: &Daemon, until: Instant) -> Result<String> {
        self.0.operate("daemons.running_version", Some(until), |world| Ok(version(living(world, daemon.id)?.program)))
    }

    fn versions(&self, daemon: &Daemon, until: Instant) -> Result<Versions> {
        self.0.operate("daemons.versions", Some(until), |world| {
            let running = version(living(world, daemon.id)?.program);
            let installed = if daemon.contained { running.clone() } else { version(Program::Installed) };
            Ok(Versions { running, installed })
        })
    }

    fn command(&self, daemon: &Daemon, command: &str, arguments: &[&str], until: Instant) -> Result<String> {
        if command == "dpif/show-dp-features" {
            // No operation: what becomes of it is nobody's concern, and seeds mean what they meant.
            let sees_less = living(&self.0.look(), daemon.id)?.sees_less;
            return Ok(format!("Recirc: {}\n", if sees_less { "No" } else { "Yes" }));
        }
        if command == "ofproto/list" {
            return Ok(bridges().iter().map(|bridge| format!("{}\n", bridge.name)).collect());
        }
        if command.starts_with("ovsdb-server/") || command.starts_with("vlog/") {
            return self.0.operate("daemons.set_by_command", Some(until), |world| {
                if living(world, daemon.id)?.stopped {
                    return Err(HostError::timeout("its control socket", "asking it"));
                }
                let unknown = || Err(HostError::new(command, "no such command"));
                world.set_by_command(daemon.id.pid, command, arguments).unwrap_or_else(unknown)?;
                Ok(String::new())
            });
        }
        self.0.operate("daemons.command", Some(until), |world| {
            if living(world, daemon.id)?.stopped {
                return Err(HostError::timeout("its control socket", "asking it"));
            }
            world.try_again(daemon.id.pid);
            match command {
                "revalidator/wait" => world.revalidate(daemon.id.pid),
                "dpctl/del-flows" => world.flush(),
                _ => {}
            }
            Ok(String::new())
        })
    }

    fn set_aside_pid_file(&self, old: &Daemon) -> Result<()> {
        self.pid_names("daemons.set_aside_pid_file", |names| match *names {
            PidNames { name: Some(pid), .. } if pid == old.id.pid => {
                *names = PidNames { name: None, old: Some(pid), new: None };
                true
            }
            PidNames { name: None, old: Some(pid), .. } => pid == old.id.pid,
            _ => false,
        })
    }

    fn wait_pid_file(&self, old: &Daemon, until: Instant) -> Result<Daemon> {
        self.0.operate("daemons.wait_pid_file", Some(until), |_| Ok(()))?;
        let named = |world: &mut World| {
            let pid = world.pid_names.name.filter(|pid| *pid != old.id.pid)?;
            let stale = || HostError::new("the PID file", format!("it names process {pid}, which is no ovs-vswitchd"));
            Some(world.processes.get(&pid).map(|process| world.describe(process)).ok_or_else(stale))
        };
        let waiting = "waiting for the new daemon's PID file";
        self.0.wait(until, named).unwrap_or_else(|| Err(HostError::timeout("the PID file", waiting)))
    }

    fn swap_pid_file(&self, old: &Daemon, new: &Daemon) -> Result<()> {
        self.pid_names("daemons.swap_pid_file", |names| {
            let there = [names.name, names.new].contains(&Some(new.id.pid)) && names.old == Some(old.id.pid);
            if there {
                *names = PidNames { name: names.old, old: names.old, new: Some(new.id.pid) };
            }
            there
        })
    }

    fn settle_pid_file(&self, owner: &Daemon) -> Result<()> {
        self.pid_names("daemons.settle_pid_file", |names| {
            let there = [names.name, names.old, names.new].contains(&Some(owner.id.pid));
            if there {
                *names = PidNames { name: Some(owner.id.pid), ..PidNames::default() };
            }
            there
        })
    }

    fn wait_standby(&self, standby: &Daemon, until: Instant) -> Result<()> {
        self.0.operate("daemons.wait_standby", Some(until), |_| Ok(()))?;
        let id = standby.id;
        let waits = self.0.wait(until, |world| match living(world, id) {
            Ok(process) => (world.time >= process.born + super::world::READY).then_some(true),
            Err(_) => Some(false),
        });
        match waits {
            Some(true) => Ok(()),
            Some(false) => Err(gone(id)),
            None => Err(HostError::timeout("standby", "waiting until it has read the database")),
        }
    }

    fn start_like(&self, model: &Daemon) -> Result<Box<dyn Starting>> {
        if model.contained {
            return Err(HostError::new("ovs-vswitchd", "it ran in a container, which is not ours to start"));
        }
        self.start("daemons.start_like", Program::Installed, false)
    }

    fn start_saved(&self, model: &Daemon, saved: &SavedProgram) -> Result<Box<dyn Starting>> {
        if self.0.look().saved.as_ref() != Some(&saved.program) {
            return Err(HostError::new(saved.program.display().to_string(), "there is no such program"));
        }
        if model.contained && self.0.look().deaths > 0 {
            return Err(HostError::new(
                "ovs-vswitchd",
                "the container's files went with the supervisor that held them",
            ));
        }
        let in_unit = model.cgroup.ends_with(".service");
        self.start("daemons.start_saved", Program::Saved, in_unit)
    }

    fn replaced(&self, _daemon: &Daemon) -> Result<Vec<String>> {
        self.0.operate("daemons.replaced", None, |_| Ok(Vec::new()))
    }

    fn save_program(
        &self,
        daemon: &Daemon,
        _version: &str,
        folders: &[PathBuf],
        until: Instant,
    ) -> Result<SavedProgram> {
        self.0.operate("daemons.save_program", Some(until), |world| {
            living(world, daemon.id)?;
            let folder = folders.first().ok_or_else(|| HostError::new("program", "there is no folder for it"))?;
            let program = folder.join("ovs-vswitchd");
            world.saved = Some(program.clone());
            Ok(SavedProgram { program, libraries: None })
        })
    }

    fn remove_stale_pid_files(&self, _model: &Daemon) -> Result<()> {
        self.0.operate("daemons.remove_stale_pid_files", None, |world| {
            let lives = |pid: &i32| world.processes.contains_key(pid);
            let names = world.pid_names;
            world.pid_names =
                PidNames { name: names.name.filter(lives), old: names.old.filter(lives), new: names.new.filter(lives) };
            Ok(())
        })
    }

    fn server_state(&self, server: &Daemon, until: Instant) -> Result<ServerState> {
        self.0.operate("daemons.server_state", Some(until), |world| Ok(living(world, server.id)?.served.clone()))
    }

    fn logs(&self, daemon: &Daemon, until: Instant) -> Result<Logs> {
        self.0.operate("daemons.logs", Some(until), |world| Ok(living(world, daemon.id)?.logs.clone()))
    }

    fn sources(&self, _server: &Daemon, _options: &[PathBuf]) -> Sources {
        Sources::default()
    }
}

impl SimDaemons {
    fn pid_names(&self, name: &'static str, mut change: impl FnMut(&mut PidNames) -> bool) -> Result<()> {
        self.0.operate(name, None, |world| match change(&mut world.pid_names) {
            true => Ok(()),
            false => Err(HostError::new("the PID file", format!("unexpected: {:?}", world.pid_names))),
        })
    }
}

struct SimStarting {
    sim: Sim,
    pid: i32,
}

impl Starting for SimStarting {
    fn wait(&mut self, until: Instant) -> Result<bool> {
        self.sim.operate("starting.wait", Some(until), |_| Ok(()))?;
        match self.sim.wait(until, |world| world.detached(self.pid)) {
            Some(true) => Ok(true),
            Some(false) => Err(HostError::new("ovs-vswitchd", "its start failed")),
            None => Ok(false),
        }
    }

    fn cancel(&mut self) {
        let _nothing = self.sim.look();
    }
}

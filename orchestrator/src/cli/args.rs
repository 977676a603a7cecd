//! What can be typed.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

use crate::journal::new_id;
use crate::report::Strategy;

/// Replaces the running Open vSwitch daemons of this host without losing a packet.
///
/// Exit codes: 0 done; 1 the command could not do it (no root, no such run, no run to abort); 2 wrong usage, or a
/// configuration that cannot be read; 10 refused, nothing touched; 11 a run is under way; 12 the client detached, the run
/// goes on (`ovs-graceful wait`); 20 failed or aborted before the point of no return, undone (an ovsdb-server that was
/// restarted stays restarted); 21 failed after it, or the old daemon ended by itself: an ovs-vswitchd, the one of before or
/// the new one, runs again, with its rules; 30 done, with differences; 40 needs a person.
#[derive(Debug, Parser)]
#[command(name = "ovs-graceful", version)]
pub struct Cli {
    /// The configuration.
    #[arg(long, global = true, value_name = "FILE", default_value = crate::config::PATH)]
    pub config: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Can this host do it, at which level, and what would be lost?
    Check {
        /// Print the answer as JSON.
        #[arg(long)]
        json: bool,
        /// Print as well what is lost in any run without a finding, and what that costs.
        #[arg(long, conflicts_with = "json")]
        lost: bool,
    },
    /// Replace the daemons.
    Restart(RestartArgs),
    /// Is all well? What a run is doing, how the last one ended, what is frozen or guarded, whether a restart is needed.
    ///
    /// Exit codes, for monitoring: 0 quiet; 11 a run is under way; 40 needs a person: a run was cut off, the last one ended
    /// with 40 and nothing has put the host right since, or flow-restore-wait is set without a run; 1 that could not be
    /// found out, or a daemon that is installed does not run; 2 the configuration cannot be read.
    Status {
        /// Print the answer as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Undo the run under way, if it still can be undone.
    Abort,
    /// Wait for a run, and end with its exit code.
    ///
    /// Without ID for the one that is under way. Ctrl-C ends the waiting (12) and leaves the run alone.
    Wait {
        /// The run's id; one that is over is answered at once.
        id: Option<String>,
        /// Print the report as JSON instead of the summary.
        #[arg(long)]
        json: bool,
    },
    /// Finish or undo an interrupted run; after one that ended with 40, look whether the host is well again.
    Recover,
    /// Emergency: bind the running daemon, replay, lift every freeze now.
    Thaw,
    /// Past runs and their reports.
    Runs {
        /// Print the answer as JSON.
        #[arg(long)]
        json: bool,
        /// One of them.
        #[command(subcommand)]
        command: Option<RunsCommand>,
    },
    /// Conntrack's zones, timeout policies and limits.
    Ct {
        /// What to do with them.
        #[command(subcommand)]
        command: CtCommand,
    },
    /// Called by units and package scriptlets.
    #[command(hide = true)]
    Hook {
        /// Which.
        #[command(subcommand)]
        command: HookCommand,
    },
}

/// How to replace the daemons.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct RestartArgs {
    /// Say what would be done; touch nothing.
    #[arg(long)]
    pub plan: bool,
    /// An ordinary restart, without ovs-graceful: new flows are lost meanwhile, and rules that a controller does not put
    /// back. What `systemctl restart` is without our drop-ins.
    #[arg(long, exclusive = true)]
    pub plain: bool,
    /// Do nothing where the running daemons, and the shared libraries they use, are those on disk.
    #[arg(long)]
    pub if_needed: bool,
    /// `standby`: the new ovs-vswitchd starts beside the old one; `stop-start`: after its end.
    #[arg(long, default_value_t = Strategy::Standby, value_parser = strategies())]
    pub strategy: Strategy,
    /// Take the kernel module out and put it in again in between, after an upgrade of it. Its flows cannot survive that;
    /// ports, OpenFlow rules, devices with their addresses, conntrack's limits and policies do.
    #[arg(long, conflicts_with = "strategy")]
    pub reload_module: bool,
    /// Leave ovsdb-server alone.
    #[arg(long)]
    pub no_ovsdb: bool,
    /// What ends the old ovs-vswitchd and starts the new one, where that runs in a container: `docker restart NAME`
    /// (run by /bin/sh, once everything is parked). ovsdb-server is left to it as well.
    #[arg(long, value_name = "CMD", conflicts_with_all = ["strategy", "reload_module", "if_needed"])]
    pub restart_command: Option<String>,
    /// A command that has to exit with 0 before the freeze is lifted (run by /bin/sh).
    #[arg(long, value_name = "CMD")]
    pub gate_command: Option<String>,
    /// Write the report to this file as well.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Print the report as JSON instead of the summary.
    #[arg(long)]
    pub json: bool,
    /// The unit whose reload or restart this is.
    #[arg(skip)]
    pub called_by: Option<String>,
}

/// The strategies by name, so that a shell can complete them.
fn strategies() -> impl TypedValueParser<Value = Strategy> {
    PossibleValuesParser::new(Strategy::ALL.map(Strategy::name)).try_map(|name| name.parse::<Strategy>())
}

impl Command {
    /// Was the answer asked for as JSON?
    pub fn wants_json(&self) -> bool {
        match self {
            Command::Check { json, .. } | Command::Status { json } | Command::Wait { json, .. } => *json,
            Command::Restart(args) => args.json,
            Command::Runs { json, command: None } => *json,
            Command::Runs { json, command: Some(RunsCommand::Show { json: inner, .. }) } => *json || *inner,
            Command::Ct { command: CtCommand::Show { json } | CtCommand::Diff { json, .. } } => *json,
            Command::Ct { command: CtCommand::Restore { .. } } => false,
            Command::Abort | Command::Recover | Command::Thaw | Command::Hook { .. } => false,
        }
    }

    /// Does it only answer? Then it has failed where its answer could not be written.
    pub fn only_answers(&self) -> bool {
        match self {
            Command::Check { .. } | Command::Status { .. } | Command::Runs { .. } => true,
            Command::Ct { command } => !matches!(command, CtCommand::Restore { .. }),
            Command::Restart(args) => args.plan,
            Command::Wait { .. } | Command::Abort | Command::Recover | Command::Thaw | Command::Hook { .. } => false,
        }
    }
}

impl RestartArgs {
    /// How the new daemon comes to be.
    pub fn chosen_strategy(&self) -> Strategy {
        match &self.restart_command {
            Some(_) => Strategy::StopStart,
            None if self.reload_module => Strategy::ReloadModule,
            None => self.strategy,
        }
    }
}

/// Which past run.
#[derive(Debug, Subcommand)]
pub enum RunsCommand {
    /// The report of one run.
    Show {
        /// Its id.
        id: String,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What to do with conntrack's zones, timeout policies and limits.
#[derive(Debug, Subcommand)]
pub enum CtCommand {
    /// What database and kernel say now.
    Show {
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// What is not as a run found it. Exit code 30 where there is anything.
    Diff {
        /// The run; without it the last one.
        run: Option<String>,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Put back the policies and limits that a run found and that are lost.
    Restore {
        /// The run; without it the last one.
        run: Option<String>,
    },
}

/// Called by units and package scriptlets.
#[derive(Debug, Subcommand)]
pub enum HookCommand {
    /// The supervisor of a run.
    Supervise(SuperviseArgs),
    /// ExecReload= of ovs-vswitchd.service while a run is under way: starts the new daemon when the supervisor says so.
    Reload {
        /// The unit's own ExecStart=.
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// ExecReload= of the unit that stands for both daemons, and of that of ovs-vswitchd: a run, or where that is switched
    /// off (`doors.enabled`, `doors.reload`) the package's own command.
    UnitReload {
        /// The unit.
        unit: String,
        /// The package's own ExecReload=. Without it that is ExecStart= with `restart` in place of `start`.
        #[arg(last = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// ExecStop= of the unit that stands for both daemons: a run where it is being restarted, else, or where that is
    /// switched off (`doors.enabled`, `doors.restart`) or refused, the package's own command.
    UnitStop {
        /// The unit.
        unit: String,
        /// The package's own ExecStop=.
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// ExecStop= of ovs-graceful-neighbours.service: where a run is about to replace the daemons, takes back the restarts of
    /// all units that hang on theirs.
    Neighbours,
    /// A generator of systemd: puts that unit behind all that hang on Open vSwitch's units.
    Generate {
        /// Where it writes; systemd names two more folders.
        into: PathBuf,
        /// Not used.
        #[arg(hide = true)]
        more: Vec<PathBuf>,
    },
    /// Before somebody ends the container of ovs-vswitchd to start another: begins a run, and ends when everything is
    /// parked. An exit code other than 0 means that nothing is.
    ContainerStop,
    /// Once the new container has been started: waits for the end of that run.
    ContainerStarted,
    /// policy-rc.d: may a maintainer script do this to a unit? 101 where it would take the daemons away before a run.
    Policy {
        /// The unit.
        unit: String,
        /// What is to be done.
        action: String,
    },
    /// prerm: ends what would go on without this program. Not while a run is under way, or was cut off.
    Removed,
    /// The files of Open vSwitch's package have changed: says what became of the daemons.
    Upgraded {
        /// Replace them first, where they are not those on disk: nobody else does. Switched off by `doors.enabled` or
        /// `doors.upgrade`.
        #[arg(long)]
        restart: bool,
    },
    /// ExecStopPost= of the supervisor's unit: recovers, unless systemd is about to start the supervisor again.
    Stopped,
    /// One look at the timeout policies that are guarded for live connections.
    Guard {
        /// Look until nothing is left: where there is no systemd with a timer.
        #[arg(long = "loop")]
        again: bool,
    },
    /// One try to bring a database that is served from memory back to its disk.
    WriteBack,
    /// The process that proves the freeze from outside.
    Canary,
}

/// What the supervisor of a run is started with.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct SuperviseArgs {
    /// The run's id (`journal::new_id`).
    #[arg(long)]
    pub id: String,
    /// How the new daemon comes to be.
    #[arg(long, default_value_t = Strategy::Standby)]
    pub strategy: Strategy,
    /// Do nothing where the running daemons are those on disk.
    #[arg(long)]
    pub if_needed: bool,
    /// Leave ovsdb-server alone.
    #[arg(long)]
    pub no_ovsdb: bool,
    /// Has to exit with 0 before the freeze is lifted; overrides `gates.command`.
    #[arg(long)]
    pub gate_command: Option<String>,
    /// Where the report goes besides the run's folder; an absolute path.
    #[arg(long)]
    pub report: Option<PathBuf>,
    /// The unit whose reload or restart this run is.
    #[arg(long)]
    pub called_by: Option<String>,
    /// Somebody else ends the old daemon and starts the new one.
    #[arg(long)]
    pub elsewhere: bool,
    /// The configuration, an absolute path. On the command line it is the global `--config`.
    #[arg(skip)]
    pub config: PathBuf,
}

impl SuperviseArgs {
    /// A new run of its own, of both daemons. `config` is an absolute path.
    pub fn new(strategy: Strategy, config: PathBuf) -> SuperviseArgs {
        SuperviseArgs {
            id: new_id(),
            strategy,
            if_needed: false,
            no_ovsdb: false,
            gate_command: None,
            report: None,
            called_by: None,
            elsewhere: false,
            config,
        }
    }

    /// The words of a command line that is parsed back to this: `program hook supervise …`.
    pub fn command_line(&self, program: &str) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec![program.into(), "--config".into(), self.config.clone().into()];
        words.extend(["hook", "supervise", "--id"].map(OsString::from));
        words.push(self.id.clone().into());
        words.push(format!("--strategy={}", self.strategy).into());
        words.extend(self.if_needed.then(|| "--if-needed".into()));
        words.extend(self.no_ovsdb.then(|| "--no-ovsdb".into()));
        // `=`: a command may begin with a dash.
        words.extend(self.gate_command.as_ref().map(|command| format!("--gate-command={command}").into()));
        if let Some(report) = &self.report {
            words.push("--report".into());
            words.push(report.clone().into());
        }
        words.extend(self.called_by.as_ref().map(|unit| format!("--called-by={unit}").into()));
        words.extend(self.elsewhere.then(|| "--elsewhere".into()));
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn the_supervisor_gets_what_the_client_was_told() {
        let args = SuperviseArgs {
            id: "run-1".into(),
            strategy: Strategy::StopStart,
            if_needed: true,
            no_ovsdb: true,
            gate_command: Some("--odd 'command' $HOME %n".into()),
            report: Some("/tmp/a b/report.json".into()),
            called_by: Some("openvswitch-switch.service".into()),
            elsewhere: true,
            config: "/etc/other.toml".into(),
        };
        for args in [args.clone(), SuperviseArgs { gate_command: None, report: None, if_needed: false, ..args }] {
            let cli = Cli::parse_from(args.command_line("ovs-graceful"));
            let Command::Hook { command: HookCommand::Supervise(mut parsed) } = cli.command else { panic!("no hook") };
            parsed.config = cli.config;
            assert_eq!(parsed, args);
        }
    }
}

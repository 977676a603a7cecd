//! `restart --plan`: what would be done.

use std::fmt::Write;

use serde::Serialize;

use super::RestartArgs;
use crate::config::Config;
use crate::machine::{GatePolicy, Phase};
use crate::report::{CheckReport, Level, Strategy};

/// What a restart would do here.
#[derive(Debug, Serialize)]
pub struct Plan {
    /// What Check says now.
    pub check: CheckReport,
    /// The phases, in order.
    pub steps: Vec<PlanStep>,
}

/// What a phase would do.
#[derive(Debug, Serialize)]
pub struct PlanStep {
    /// [`Phase::name`].
    pub phase: &'static str,
    /// In words.
    pub does: String,
    /// How long it may take, in milliseconds.
    pub limit_ms: u64,
    /// True where it can be undone.
    pub undoable: bool,
}

/// The plan for `args`. Where Check refuses there is none.
pub fn plan(check: CheckReport, args: &RestartArgs, config: &Config) -> Plan {
    let refused = check.exit_code() != crate::machine::ExitCode::Done;
    let phases: &[Phase] = if refused { &[Phase::Check] } else { &Phase::ALL };
    let step = |phase: &Phase| PlanStep {
        phase: phase.name(),
        does: does(*phase, check.level, args, config),
        limit_ms: config.limits.of(*phase).as_millis() as u64,
        undoable: !phase.past_no_return(),
    };
    let steps = phases.iter().map(step).collect();
    Plan { check, steps }
}

fn does(phase: Phase, level: Level, args: &RestartArgs, config: &Config) -> String {
    let frozen = level == Level::Full;
    match phase {
        Phase::Check if args.if_needed => "look at the host; end here where the daemons are those on disk".into(),
        Phase::Check => "look at the host".into(),
        Phase::Snapshot => "dump datapath, conntrack policies and limits, OpenFlow, learned addresses".into(),
        Phase::Arm => format!(
            "{}; {}",
            if frozen { "arm the freeze" } else { "no freeze at this level" },
            if args.no_ovsdb || args.restart_command.is_some() {
                "leave ovsdb-server alone"
            } else {
                "restart ovsdb-server"
            }
        ),
        Phase::Standby => match args.chosen_strategy() {
            Strategy::Standby => "set flow-restore-wait, start the new ovs-vswitchd beside the old one, stop it".into(),
            Strategy::StopStart | Strategy::ReloadModule => {
                "set flow-restore-wait, prepare the start of the new ovs-vswitchd".into()
            }
        },
        Phase::SwitchPrepare if args.reload_module => "remember the addresses and routes of internal devices".into(),
        Phase::SwitchPrepare => "take the upcalls over, drain the old ovs-vswitchd".into(),
        Phase::SwitchCommit if args.restart_command.is_some() => format!(
            "have the old ovs-vswitchd ended (point of no return) and the new one started by `{}`",
            args.restart_command.as_deref().unwrap_or_default()
        ),
        Phase::SwitchCommit => match args.chosen_strategy() {
            Strategy::Standby => "end the old ovs-vswitchd (point of no return), let the new one take over".into(),
            Strategy::StopStart => "end the old ovs-vswitchd (point of no return), start the new one".into(),
            Strategy::ReloadModule => "end the old ovs-vswitchd (point of no return; no switching until handover), \
                                       delete the datapath, unload and load the module, start the new ovs-vswitchd"
                .into(),
        },
        Phase::Restore if args.reload_module => {
            "put limits, OpenFlow and learned addresses back, and devices with their addresses and routes".into()
        }
        Phase::Handover if args.reload_module => "let the new ovs-vswitchd bind".into(),
        Phase::Restore => "put OpenFlow and learned addresses into the new ovs-vswitchd".into(),
        Phase::Handover => "remove what cannot survive, bind the new ovs-vswitchd, replay what was parked".into(),
        Phase::Gates => gates(args, config),
        Phase::Settle => "two full revalidations, thaw".into(),
        Phase::Verify => "compare before with after, write the report".into(),
    }
}

fn gates(args: &RestartArgs, config: &Config) -> String {
    let configured = (!config.gates.command.is_empty()).then_some(&config.gates.command);
    let command = args.gate_command.as_ref().or(configured);
    let gate = command.map_or_else(String::new, |command| format!(", and `{command}` to exit with 0"));
    let otherwise = match config.gates.on_timeout {
        GatePolicy::Proceed => "go on",
        GatePolicy::Back => "go back to the old version",
    };
    format!("wait for every bridge's rules{gate}; else {otherwise}")
}

/// The plan in words.
pub fn in_words(plan: &Plan) -> String {
    let mut out = plan.check.to_string();
    for step in &plan.steps {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "  {:<9} {} (at most {} s)", step.phase, step.does, step.limit_ms.div_ceil(1000));
    }
    out.push_str("Nothing was touched.");
    out
}

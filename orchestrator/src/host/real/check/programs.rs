//! The programs that a run works with, and the one that it can go back to.

use std::fs;
use std::time::Instant;

use crate::host::real::command;
use crate::host::surroundings::CheckOptions;
use crate::host::{Daemon, Daemons, Result, Versions};
use crate::report::{Findings, Name};

/// The programs of the package that a run works with.
pub(super) fn tools(until: Instant, found: &mut Findings) {
    for tool in ["ovs-ofctl", "ovsdb-tool"] {
        judge_tool(tool, command::run_well(tool, &["--version"], None, until).map(drop), found);
    }
}

fn judge_tool(tool: &str, ran: Result<()>, found: &mut Findings) {
    if let Err(error) = ran {
        let remedy =
            "`apt-get install --reinstall openvswitch-common openvswitch-switch` (RHEL: `dnf reinstall openvswitch`, \
                      whose name may have a version, as openvswitch3.1)";
        found.refuse(Name::Tools, tool, error.cause, remedy);
    }
}

/// What runs and what is installed, and whether a run could go back to what runs: what the run would keep is kept in the
/// folders that the run would use, tried, and removed.
pub(super) fn versions(
    daemons: &dyn Daemons,
    vswitchd: &Daemon,
    versions: Option<&Versions>,
    options: &CheckOptions,
    until: Instant,
    found: &mut Findings,
) {
    if let Some(Versions { running, installed }) = versions {
        found.ok(Name::Versions, "ovs-vswitchd", format!("{running} runs, {installed} is installed"));
    }
    let running = versions.map(|versions| Ok(versions.running.clone()));
    let Ok(running) = running.unwrap_or_else(|| daemons.running_version(vswitchd, until)) else { return };
    let object = vswitchd.exe.display();
    let error = match try_to_keep(daemons, vswitchd, &running, options, until) {
        Ok(()) => return found.ok(Name::OldBinary, object, "it can be kept and runs, so there is a way back"),
        Err(error) => error,
    };
    match versions.is_some_and(|versions| versions.running == versions.installed) {
        true => {
            let cause = format!("{}: going back would start the installed program, of the same version", error.cause);
            found.warn(Name::OldBinary, object, cause, &error.remedy);
        }
        false => {
            let cause = format!("{}: there would be no way back to the old version", error.cause);
            found.refuse(Name::OldBinary, object, cause, &error.remedy);
        }
    }
}

fn try_to_keep(
    daemons: &dyn Daemons,
    vswitchd: &Daemon,
    version: &str,
    options: &CheckOptions,
    until: Instant,
) -> Result<()> {
    let name = format!("check.{}", std::process::id());
    let folders = [&options.state_directory, &options.run_directory];
    let new: Vec<_> = folders.into_iter().filter(|folder| !folder.exists()).collect();
    let scratch = folders.map(|folder| folder.join(&name));
    let saved = daemons.save_program(vswitchd, version, &scratch, until);
    scratch.iter().for_each(|folder| drop(fs::remove_dir_all(folder)));
    new.iter().for_each(|folder| drop(fs::remove_dir(folder)));
    saved.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostError;

    #[test]
    fn a_tool_that_is_missing_is_named_with_its_package() {
        let mut found = Findings::default();
        judge_tool("ovs-ofctl", Ok(()), &mut found);
        judge_tool("ovsdb-tool", Err(HostError::new("ovsdb-tool", "it is not installed")), &mut found);
        let [one] = found.into_inner().try_into().unwrap();
        assert_eq!((one.name, one.object.as_str()), (Name::Tools, "ovsdb-tool"));
        assert!(one.remedy.contains("`apt-get install") && one.remedy.contains("openvswitch-switch"), "{one}");
    }
}

//! What stands on the command line of a daemon, and not in its unit: the next one is started without it.

use std::fs;

use crate::host::kept::printable;
use crate::host::{Daemon, Unit};
use crate::report::{Findings, Name};

/// Options that ovs-ctl gives every daemon of itself (`start_daemon`, utilities/ovs-lib.in; `do_start_ovsdb` and
/// `do_start_forwarding`, utilities/ovs-ctl.in). Levels of the log are looked after one by one.
const OF_OVS_CTL: [&str; 10] = [
    "-v",
    "--verbose",
    "--no-self-confinement",
    "--log-file",
    "--pidfile",
    "--unixctl",
    "--no-chdir",
    "--detach",
    "--monitor",
    "--user",
];

/// The same of ovs-vswitchd alone.
const OF_SWITCH: [&str; 1] = ["--mlockall"];

/// Looks at the running ovs-vswitchd, which `unit` owns.
pub(super) fn judge_switch(vswitchd: &Daemon, unit: &Unit, found: &mut Findings) {
    judge(vswitchd, &unit.name, &texts(unit), found);
}

fn judge(vswitchd: &Daemon, unit: &str, texts: &str, found: &mut Findings) {
    let remedy = "put it into the options of that unit (Debian: OVS_CTL_OPTS='--ovs-vswitchd-options=…' in \
                  /etc/default/openvswitch-switch), where it is wanted";
    let own = of_its_own(vswitchd, &OF_SWITCH, texts);
    tell(Name::OvsVswitchd, &format!("ovs-vswitchd (pid {})", vswitchd.id.pid), unit, &own, remedy, found);
}

/// Names each of these words of a running daemon's command line.
pub(super) fn tell(name: Name, daemon: &str, unit: &str, words: &[String], remedy: &str, found: &mut Findings) {
    for word in words.iter().map(|word| printable(word)) {
        found.warn(name, unit, format!("{daemon} runs with {word}, which this unit does not have"), remedy);
    }
}

/// Everything in which a unit can say how it starts its daemon.
pub(super) fn texts(unit: &Unit) -> String {
    let files = unit.environment_files.iter().chain(&unit.fragment).chain(&unit.drop_ins);
    let files = files.filter_map(|path| fs::read_to_string(path).ok());
    let lines = files.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
    let lines = lines.filter(|line| !line.trim_start().starts_with(['#', ';']));
    lines.chain(unit.exec_start.iter().cloned()).collect::<Vec<_>>().join("\n")
}

/// Is it a word of these texts, by its whole or by the name of a file?
pub(super) fn is_said(word: &str, texts: &str) -> bool {
    let mut words = texts.split(|c: char| c.is_whitespace() || "=\"'".contains(c));
    let name = word.rsplit('/').next().unwrap_or(word);
    words.any(|said| said == word || said == name)
}

/// The options of the command line that ovs-ctl does not give of itself (`more` are those of this daemon alone), and that
/// `texts` do not have.
pub(super) fn of_its_own(daemon: &Daemon, more: &[&str], texts: &str) -> Vec<String> {
    let is_usual = |word: &&String| OF_OVS_CTL.iter().chain(more).any(|usual| word.starts_with(usual));
    let unsaid = |word: &&String| {
        let value = word.split_once('=').map_or(word.as_str(), |(_, value)| value);
        word.starts_with("--") && !is_said(value, texts)
    };
    daemon.argv.iter().skip(1).filter(|word| !is_usual(word)).filter(unsaid).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::real::ovsdb_server::tests::server;

    #[test]
    fn an_option_that_only_the_running_daemon_has_is_named() {
        let argv =
            "ovs-vswitchd unix:/run/openvswitch/db.sock -vconsole:emer --mlockall --no-chdir --pidfile=/y --detach \
                    --enable-dummy --disable-system-route";
        let vswitchd = Daemon { argv: argv.split_whitespace().map(str::to_owned).collect(), ..server() };
        let mut found = Findings::default();
        judge(
            &vswitchd,
            "ovs-vswitchd.service",
            "OVS_CTL_OPTS='--ovs-vswitchd-options=--disable-system-route'",
            &mut found,
        );
        let found = found.into_inner();
        let [one] = &found[..] else { panic!("{found:?}") };
        assert!(one.name == Name::OvsVswitchd && one.cause.contains("--enable-dummy"), "{one:?}");
    }
}

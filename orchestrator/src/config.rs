//! `/etc/ovs-graceful/config.toml`: every time limit and bound, with its default and unit.
//!
//! A key that is not there has its default; a key that nobody knows is an error, because a misspelt limit is no
//! limit. `config.example.toml` holds all of them with their defaults (tested below).

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::guard::Terms;
use crate::machine::{GatePolicy, Options, Phase};

/// Where the configuration is.
pub const PATH: &str = "/etc/ovs-graceful/config.toml";

/// Why a configuration was not taken. Each message is whole: the cause is part of it, and there is no other `source`.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("configuration {path}: {why}; remedy: make it a file that root can read, or leave `--config` out")]
    Read {
        /// The file.
        path: String,
        /// The cause.
        why: io::Error,
    },
    /// It is not TOML, or has an unknown key or a value of the wrong type.
    #[error("configuration {path}: {why}\nremedy: correct that line; config.example.toml of the source, which the packages \
             install as {PATH}, has every key with its default and unit")]
    Parse {
        /// The file.
        path: String,
        /// The cause, with line and key.
        why: String,
    },
    /// A value is out of its bounds.
    #[error("configuration {path}: {key} {why}; remedy: correct it, or leave it out (the default is used)")]
    Value {
        /// The file.
        path: String,
        /// The key, for example `freeze.lease_ms`.
        key: &'static str,
        /// What it has to be.
        why: String,
    },
}

/// The configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Runs in general.
    pub run: RunConfig,
    /// How long each phase may take.
    pub limits: Limits,
    /// The freeze.
    pub freeze: FreezeConfig,
    /// The park.
    pub park: ParkConfig,
    /// The hand-over from the old daemon.
    pub switch: SwitchConfig,
    /// OpenFlow into the new daemon.
    pub restore: RestoreConfig,
    /// What has to be true before the freeze is lifted.
    pub gates: GatesConfig,
    /// Letting go.
    pub settle: SettleConfig,
    /// Timeout policies of live connections.
    pub guard: GuardConfig,
    /// What of the distribution's own commands leads to a run.
    pub doors: DoorsConfig,
}

/// What of the distribution's own commands leads to a run, where our drop-ins are installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DoorsConfig {
    /// Any of what follows; false: whatever that says, all is as without us.
    pub enabled: bool,
    /// `systemctl reload` of the unit that stands for both daemons; false: what the package wrote.
    pub reload: bool,
    /// `systemctl restart` of it, and what a package's upgrade makes of that; false: a plain stop and start.
    pub restart: bool,
    /// An upgrade of the package leaves the daemons alone until that restart; false: it stops them first, as it does
    /// without us. Says nothing where `restart` is false.
    pub upgrade: bool,
    /// What becomes of an upgrade or a restart that cannot be a run.
    pub refused: WhenRefused,
}

/// What becomes of an upgrade or a restart that is asked for by the distribution's own commands and cannot be a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenRefused {
    /// The daemons are stopped and started as without us.
    #[default]
    Plain,
    /// The daemons stay as they are.
    Keep,
}

impl Default for DoorsConfig {
    fn default() -> DoorsConfig {
        DoorsConfig { enabled: true, reload: true, restart: true, upgrade: true, refused: WhenRefused::default() }
    }
}

impl DoorsConfig {
    /// Is `systemctl reload` a run?
    pub fn reloads(&self) -> bool {
        self.enabled && self.reload
    }

    /// Is `systemctl restart`?
    pub fn restarts(&self) -> bool {
        self.enabled && self.restart
    }

    /// Where the configuration cannot be read: nobody knows whether a plain restart would be meant, and keeping the daemons
    /// loses nothing.
    pub fn unreadable() -> DoorsConfig {
        DoorsConfig { refused: WhenRefused::Keep, ..DoorsConfig::default() }
    }

    /// Does an upgrade of Open vSwitch's package leave the daemons to a run?
    pub fn upgrades(&self) -> bool {
        self.enabled && self.upgrade
    }
}

/// Runs in general.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// So many past runs are kept with their reports; older ones are removed.
    pub keep: u32,
}

impl Default for RunConfig {
    fn default() -> RunConfig {
        RunConfig { keep: 20 }
    }
}

/// How long each phase may take, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Check.
    pub check_ms: u64,
    /// Snapshot.
    pub snapshot_ms: u64,
    /// Arm, the restart of ovsdb-server included.
    pub arm_ms: u64,
    /// Standby, until the new daemon has read the database.
    pub standby_ms: u64,
    /// Switch up to the point of no return.
    pub switch_prepare_ms: u64,
    /// Switch after it, until the old daemon has ended and the new one answers.
    pub switch_commit_ms: u64,
    /// The same where somebody else ends the old daemon and starts the new one (docs/containers.md), or systemd, because
    /// the unit is being restarted (docs/systemd.md).
    pub elsewhere_ms: u64,
    /// One try of Restore.
    pub restore_ms: u64,
    /// Handover.
    pub handover_ms: u64,
    /// Gates, the gate command included.
    pub gates_ms: u64,
    /// Settle.
    pub settle_ms: u64,
    /// Verify.
    pub verify_ms: u64,
    /// The undo of one phase.
    pub undo_ms: u64,
    /// Going back to the old version.
    pub back_ms: u64,
    /// A thaw.
    pub thaw_ms: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            check_ms: 60_000,
            // Hundreds of bridges: four programs are started for each, and nothing waits for it.
            snapshot_ms: 180_000,
            arm_ms: 60_000,
            standby_ms: 60_000,
            // Learned addresses of hundreds of bridges take seconds of a daemon that is busy with them.
            switch_prepare_ms: 20_000,
            switch_commit_ms: 15_000,
            elsewhere_ms: 60_000,
            restore_ms: 60_000,
            handover_ms: 60_000,
            // Addresses that restore had no time for: 50,000 take a slow machine two minutes.
            gates_ms: 180_000,
            settle_ms: 90_000,
            verify_ms: 60_000,
            undo_ms: 30_000,
            back_ms: 90_000,
            thaw_ms: 10_000,
        }
    }
}

impl Limits {
    /// How long `phase` may take.
    pub fn of(&self, phase: Phase) -> Duration {
        Duration::from_millis(match phase {
            Phase::Check => self.check_ms,
            Phase::Snapshot => self.snapshot_ms,
            Phase::Arm => self.arm_ms,
            Phase::Standby => self.standby_ms,
            Phase::SwitchPrepare => self.switch_prepare_ms,
            Phase::SwitchCommit => self.switch_commit_ms,
            Phase::Restore => self.restore_ms,
            Phase::Handover => self.handover_ms,
            Phase::Gates => self.gates_ms,
            Phase::Settle => self.settle_ms,
            Phase::Verify => self.verify_ms,
        })
    }

    /// From now on a run's, in which somebody else starts the new daemon.
    pub fn with_restart_elsewhere(&mut self) {
        self.switch_commit_ms = self.elsewhere_ms;
    }

    /// How long the undo of one phase may take.
    pub fn undo(&self) -> Duration {
        Duration::from_millis(self.undo_ms)
    }

    /// How long going back may take.
    pub fn back(&self) -> Duration {
        Duration::from_millis(self.back_ms)
    }

    /// How long a thaw may take.
    pub fn thaw(&self) -> Duration {
        Duration::from_millis(self.thaw_ms)
    }
}

/// The freeze.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FreezeConfig {
    /// The freeze ends by itself so long after the last progress, in milliseconds.
    pub lease_ms: u64,
    /// The freeze ends in any case so long after Arm, in milliseconds.
    pub end_ms: u64,
}

impl FreezeConfig {
    /// The lease.
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    /// The absolute end, counted from Arm.
    pub fn end(&self) -> Duration {
        Duration::from_millis(self.end_ms)
    }
}

impl Default for FreezeConfig {
    fn default() -> FreezeConfig {
        FreezeConfig { lease_ms: 20_000, end_ms: 300_000 }
    }
}

/// The park.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParkConfig {
    /// So many packets are parked at most; more are counted as overflowed.
    pub max_packets: u64,
    /// So many bytes are parked at most.
    pub max_bytes: u64,
    /// Which packet is lost where there is no room for all.
    pub when_full: WhenFull,
    /// Receive buffer of each socket that upcalls wait in until they are read, bytes: the kernel's own bound of memory
    /// that is only taken while they do.
    pub socket_bytes: u32,
}

/// Which packet is lost where the park has no room for all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenFull {
    /// The one that comes.
    #[default]
    DropNewest,
    /// The one that has waited longest.
    DropOldest,
}

impl From<WhenFull> for dpfreeze::park::WhenFull {
    fn from(wish: WhenFull) -> Self {
        match wish {
            WhenFull::DropNewest => dpfreeze::park::WhenFull::DropNewest,
            WhenFull::DropOldest => dpfreeze::park::WhenFull::DropOldest,
        }
    }
}

impl Default for ParkConfig {
    fn default() -> ParkConfig {
        ParkConfig {
            max_packets: 500_000,
            max_bytes: 256 * 1024 * 1024,
            when_full: WhenFull::default(),
            socket_bytes: 64 * 1024 * 1024,
        }
    }
}

/// The hand-over from the old daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SwitchConfig {
    /// The old daemon's queues have to be empty and its handlers asleep twice, so many milliseconds apart.
    pub drain_poll_ms: u64,
    /// The old daemon gets SIGKILL where SIGTERM has not ended it after so many milliseconds.
    pub kill_after_ms: u64,
}

impl Default for SwitchConfig {
    fn default() -> SwitchConfig {
        SwitchConfig { drain_poll_ms: 5, kill_after_ms: 3_000 }
    }
}

/// OpenFlow into the new daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RestoreConfig {
    /// So often Restore is tried again.
    pub retries: u32,
    /// The limit of datapath flows that the new daemon starts with (`upcall/set-flow-limit`).
    pub flow_limit: u32,
    /// Controllers that bridges were connected to and whose rules ask them are waited for so long, in milliseconds.
    pub controllers_wait_ms: u64,
}

impl Default for RestoreConfig {
    fn default() -> RestoreConfig {
        RestoreConfig { retries: 2, flow_limit: 200_000, controllers_wait_ms: 2_000 }
    }
}

/// What has to be true before the freeze is lifted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatesConfig {
    /// What happens when a gate fails or does not open within `limits.gates_ms`.
    pub on_timeout: GatePolicy,
    /// A command that has to exit with 0; empty is none. `--gate-command` overrides it.
    pub command: String,
}

impl Default for GatesConfig {
    fn default() -> GatesConfig {
        GatesConfig { on_timeout: GatePolicy::Proceed, command: String::new() }
    }
}

/// Letting go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SettleConfig {
    /// So many full revalidations have to pass.
    pub revalidations: u32,
    /// Each may take so long, in milliseconds.
    pub revalidate_wait_ms: u64,
}

impl Default for SettleConfig {
    fn default() -> SettleConfig {
        SettleConfig { revalidations: 2, revalidate_wait_ms: 30_000 }
    }
}

/// Timeout policies of live connections, beyond the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuardConfig {
    /// So often is looked which connections are left, in milliseconds.
    pub interval_ms: u64,
    /// The guard ends by itself so long after the last look, in milliseconds.
    pub lease_ms: u64,
    /// A policy is let go after so long whatever lives under it, in seconds.
    pub max_age_s: u64,
}

impl Default for GuardConfig {
    fn default() -> GuardConfig {
        GuardConfig { interval_ms: 10_000, lease_ms: 120_000, max_age_s: 24 * 3600 }
    }
}

impl Config {
    /// Reads `path`. Where [`PATH`] is not there all is defaults; another file was named by somebody, and has to be there.
    ///
    /// # Errors
    /// Where it cannot be read, or is no configuration.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Config::parse(&text, &path.display().to_string()),
            Err(e) if e.kind() == io::ErrorKind::NotFound && path == Path::new(PATH) => Ok(Config::default()),
            Err(why) => Err(ConfigError::Read { path: path.display().to_string(), why }),
        }
    }

    /// For what must go on whatever the file says: the defaults where it cannot be read, and why.
    pub fn load_or_default(path: &Path) -> (Config, Option<ConfigError>) {
        match Config::load(path) {
            Ok(config) => (config, None),
            Err(error) => (Config::default(), Some(error)),
        }
    }

    /// Parses the text of a configuration; `path` is for the errors.
    ///
    /// # Errors
    /// Where it is no configuration.
    pub fn parse(text: &str, path: &str) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text)
            .map_err(|error| ConfigError::Parse { path: path.to_string(), why: in_words(&error.to_string()) })?;
        match config.out_of_bounds() {
            None => Ok(config),
            Some((key, why)) => Err(ConfigError::Value { path: path.to_string(), key, why }),
        }
    }

    /// How long a run may take at most: every phase to its limit, every try of Restore, and the longer of both ways back.
    pub fn longest_run(&self) -> Duration {
        let limits = &self.limits;
        let commit = limits.switch_commit_ms.max(limits.elsewhere_ms);
        let phases: u64 = Phase::ALL
            .into_iter()
            .map(|phase| match phase {
                Phase::SwitchCommit => commit,
                Phase::Restore => limits.restore_ms.saturating_mul(u64::from(self.restore.retries) + 1),
                other => limits.of(other).as_millis() as u64,
            })
            .fold(0, u64::saturating_add);
        let undone = Phase::ALL.into_iter().filter(|phase| !phase.past_no_return()).count() as u64;
        let back = limits.back_ms.max(limits.undo_ms.saturating_mul(undone));
        Duration::from_millis(phases.saturating_add(back).saturating_add(limits.thaw_ms))
    }

    /// What the machine has to know.
    pub fn machine_options(&self) -> Options {
        Options { gate_policy: self.gates.on_timeout, retries: self.restore.retries, ..Options::default() }
    }

    /// How timeout policies are guarded.
    pub fn guard_terms(&self) -> Terms {
        let GuardConfig { interval_ms, lease_ms, max_age_s } = self.guard;
        Terms { interval_ms, lease_ms, max_age_s }
    }

    /// Every number of the file, with what it may be at least and at most.
    fn bounds(&self) -> Vec<(&'static str, u64, u64, u64)> {
        const HOUR: u64 = 3_600_000;
        let limits = &self.limits;
        let mut all: Vec<(&'static str, u64, u64, u64)> = [
            ("limits.check_ms", limits.check_ms),
            ("limits.snapshot_ms", limits.snapshot_ms),
            ("limits.arm_ms", limits.arm_ms),
            ("limits.standby_ms", limits.standby_ms),
            ("limits.switch_prepare_ms", limits.switch_prepare_ms),
            ("limits.switch_commit_ms", limits.switch_commit_ms),
            ("limits.elsewhere_ms", limits.elsewhere_ms),
            ("limits.restore_ms", limits.restore_ms),
            ("limits.handover_ms", limits.handover_ms),
            ("limits.gates_ms", limits.gates_ms),
            ("limits.settle_ms", limits.settle_ms),
            ("limits.verify_ms", limits.verify_ms),
            ("limits.undo_ms", limits.undo_ms),
            ("limits.back_ms", limits.back_ms),
            ("limits.thaw_ms", limits.thaw_ms),
        ]
        .into_iter()
        .map(|(key, value)| (key, value, 100, HOUR))
        .collect();
        all.extend([
            ("run.keep", self.run.keep.into(), 1, 10_000),
            ("freeze.lease_ms", self.freeze.lease_ms, 1_000, HOUR),
            // A freeze that nothing lifts for an hour is what the absolute end is there to prevent.
            ("freeze.end_ms", self.freeze.end_ms, 1_000, HOUR),
            ("park.max_packets", self.park.max_packets, 1, 100_000_000),
            ("park.max_bytes", self.park.max_bytes, 64 << 10, 1 << 40),
            // SO_RCVBUFFORCE takes an int and doubles it (sock_setsockopt() in net/core/sock.c).
            ("park.socket_bytes", self.park.socket_bytes.into(), 64 << 10, 1 << 30),
            ("switch.drain_poll_ms", self.switch.drain_poll_ms, 1, 1_000),
            ("switch.kill_after_ms", self.switch.kill_after_ms, 1, HOUR),
            ("restore.retries", self.restore.retries.into(), 0, 100),
            ("restore.flow_limit", self.restore.flow_limit.into(), 1, 100_000_000),
            ("restore.controllers_wait_ms", self.restore.controllers_wait_ms, 0, HOUR),
            ("settle.revalidations", self.settle.revalidations.into(), 1, 100),
            ("settle.revalidate_wait_ms", self.settle.revalidate_wait_ms, 100, HOUR),
            ("guard.interval_ms", self.guard.interval_ms, 100, HOUR),
            ("guard.lease_ms", self.guard.lease_ms, 300, 24 * HOUR),
            ("guard.max_age_s", self.guard.max_age_s, 1, 366 * 24 * 3600),
        ]);
        all
    }

    fn out_of_bounds(&self) -> Option<(&'static str, String)> {
        if let Some((key, value, least, most)) =
            self.bounds().into_iter().find(|(_, value, least, most)| !(least..=most).contains(&value))
        {
            return Some((key, format!("has to be {least} to {most}, and is {value}")));
        }
        let whole = |key, why: &str| Some((key, why.to_owned()));
        if self.freeze.end_ms < self.freeze.lease_ms {
            return whole("freeze.end_ms", "has to be at least freeze.lease_ms");
        }
        let frozen = Phase::Arm..=Phase::Gates;
        let longest = Phase::ALL.into_iter().filter(|phase| frozen.contains(phase)).max_by_key(|p| self.limits.of(*p));
        if let Some(phase) = longest.filter(|phase| self.limits.of(*phase) > self.freeze.end()) {
            return Some((
                "freeze.end_ms",
                format!("has to be at least the limit of every frozen phase: {phase} has more"),
            ));
        }
        // One look may come late, and one may fail.
        if self.guard.lease_ms < self.guard.interval_ms.saturating_mul(3) {
            return whole("guard.lease_ms", "has to be at least three times guard.interval_ms");
        }
        if self.switch.kill_after_ms >= self.limits.switch_commit_ms {
            return whole("switch.kill_after_ms", "has to be less than limits.switch_commit_ms");
        }
        None
    }
}

/// What the parser says of a file, without the names that types have in Rust.
fn in_words(error: &str) -> String {
    let numbers = ["u64", "u32"].map(|kind| format!("expected {kind}"));
    let words = numbers.iter().fold(error.trim_end().to_owned(), |text, kind| {
        text.replace(kind, "expected a whole number, without a unit and without quotes")
    });
    words.replace("expected struct ", "expected a section `[…]` like ") + &its_section(error).unwrap_or_default()
}

/// Under which section a key belongs that the parser did not know where it stood.
fn its_section(error: &str) -> Option<String> {
    let key = error.split("unknown field `").nth(1)?.split('`').next()?;
    let defaults = toml::Table::try_from(Config::default()).ok()?;
    let sections: Vec<String> = defaults
        .iter()
        .filter(|(_, section)| section.get(key).is_some())
        .map(|(name, _)| format!("`[{name}]`"))
        .collect();
    (!sections.is_empty()).then(|| format!("\n`{key}` belongs under {}", sections.join(" or ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../config.example.toml");

    #[test]
    fn the_example_holds_every_key_with_its_default_and_a_comment() {
        assert_eq!(Config::parse(EXAMPLE, "example").unwrap(), Config::default());
        let example: toml::Table = toml::from_str(EXAMPLE).unwrap();
        let defaults = toml::Table::try_from(Config::default()).unwrap();
        assert_eq!(example, defaults, "a key is missing in the example");
        let lines: Vec<&str> = EXAMPLE.lines().collect();
        for pair in lines.windows(2) {
            if pair[1].contains(" = ") && !pair[1].starts_with('#') {
                assert!(pair[0].starts_with('#'), "no comment over `{}`", pair[1]);
            }
        }
    }

    #[test]
    fn no_file_is_all_defaults_and_one_key_changes_only_itself() {
        // Of the usual place; no machine that runs this test has one.
        if !Path::new(PATH).exists() {
            assert_eq!(Config::load(Path::new(PATH)).unwrap(), Config::default());
        }
        let config = Config::parse("[park]\nmax_packets = 9\n", "x").unwrap();
        let expected = ParkConfig { max_packets: 9, ..ParkConfig::default() };
        assert_eq!(config, Config { park: expected, ..Config::default() });
    }

    #[test]
    fn a_file_that_was_named_has_to_be_there() {
        let path = Path::new("/nonexistent/config.toml");
        let error = Config::load(path).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/config.toml"), "{error}");
        let (config, why) = Config::load_or_default(path);
        assert!(config == Config::default() && why.is_some());
    }

    #[test]
    fn an_error_is_told_once_and_in_words() {
        let error = Config::parse("[freeze]\nlease_ms = \"20 s\"\n", "/etc/x.toml").unwrap_err();
        let text = format!("{:#}", anyhow::Error::new(error));
        assert!(text.contains("whole number") && !text.contains("u64"), "{text}");
        assert_eq!(text.matches("lease_ms").count(), 1, "{text}");
        let error = Config::load(Path::new("/proc/self")).unwrap_err();
        let text = format!("{:#}", anyhow::Error::new(error));
        assert_eq!(text.matches("os error").count(), 1, "{text}");
    }

    #[test]
    fn a_run_takes_no_longer_than_all_its_limits() {
        // 60 s of each but snapshot and gates (180), switch (20 + 60 elsewhere), restore (3 times), settle (90); five undos of
        // 30 s are longer than the way back; 10 s of thaw.
        assert_eq!(Config::default().longest_run(), Duration::from_secs(1010 + 150 + 10));
        let config = Config::parse("[limits]\nsettle_ms = 91000\nback_ms = 200000\n", "x").unwrap();
        assert_eq!(config.longest_run(), Duration::from_secs(1011 + 200 + 10));
    }

    #[test]
    fn an_unknown_key_is_named() {
        for (text, key) in [
            ("[park]\nmax_packet = 9\n", "max_packet"),
            ("[parc]\nmax_packets = 9\n", "parc"),
            ("lease_ms = 1\n", "lease_ms"),
            ("[gates]\non_timeout = \"maybe\"\n", "maybe"),
            ("[freeze]\nlease_ms = \"20 s\"\n", "lease_ms"),
        ] {
            let error = Config::parse(text, "/etc/x.toml").unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("/etc/x.toml"), "{error}");
        }
    }

    #[test]
    fn a_key_outside_its_section_is_told_where_it_belongs() {
        let error = Config::parse("keep = 9\n", "x").unwrap_err().to_string();
        assert!(error.contains("`keep` belongs under `[run]`"), "{error}");
        let error = Config::parse("[park]\nlease_ms = 9\n", "x").unwrap_err().to_string();
        assert!(error.contains("`lease_ms` belongs under `[freeze]` or `[guard]`"), "{error}");
        let error = Config::parse("[park]\nmax_packet = 9\n", "x").unwrap_err().to_string();
        assert!(!error.contains("belongs"), "{error}");
    }

    #[test]
    fn the_file_of_the_packages_is_all_defaults_and_takes_one_key() {
        // As debian/rules and the RPM's spec make it.
        let commented = |line: &str| if line.is_empty() || line.starts_with(['#', '[']) { "" } else { "#" };
        let file: String = EXAMPLE.lines().map(|line| format!("{}{line}\n", commented(line))).collect();
        assert_eq!(Config::parse(&file, "x").unwrap(), Config::default());
        let config = Config::parse(&file.replace("\n#keep = 20\n", "\nkeep = 9\n"), "x").unwrap();
        assert_eq!(config, Config { run: RunConfig { keep: 9 }, ..Config::default() });
    }

    #[test]
    fn values_out_of_bounds_are_named() {
        for (text, key) in [
            ("[freeze]\nlease_ms = 0\n", "freeze.lease_ms"),
            ("[freeze]\nlease_ms = 9000\nend_ms = 8000\n", "freeze.end_ms"),
            ("[freeze]\nend_ms = 3600001\n", "freeze.end_ms"),
            ("[limits]\nrestore_ms = 0\n", "limits.restore_ms"),
            ("[switch]\nkill_after_ms = 15000\n", "switch.kill_after_ms"),
            ("[guard]\nlease_ms = 29999\n", "guard.lease_ms"),
            ("[limits]\nelsewhere_ms = 0\n", "limits.elsewhere_ms"),
            ("[limits]\ncheck_ms = 1\n", "limits.check_ms"),
            ("[limits]\nstandby_ms = 300001\n", "freeze.end_ms"),
            ("[settle]\nrevalidations = 0\n", "settle.revalidations"),
            ("[settle]\nrevalidations = 1000000\n", "settle.revalidations"),
            ("[switch]\ndrain_poll_ms = 99999999\n", "switch.drain_poll_ms"),
            ("[restore]\nretries = 4000000000\n", "restore.retries"),
            ("[park]\nsocket_bytes = 1\n", "park.socket_bytes"),
            ("[park]\nmax_bytes = 1\n", "park.max_bytes"),
            ("[guard]\nmax_age_s = 0\n", "guard.max_age_s"),
        ] {
            let error = Config::parse(text, "x").unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn what_the_machine_gets_is_what_was_written() {
        let config = Config::parse("[gates]\non_timeout = \"back\"\n[restore]\nretries = 7\n", "x").unwrap();
        assert_eq!(config.machine_options().gate_policy, GatePolicy::Back);
        assert_eq!(config.machine_options().retries, 7);
    }
}

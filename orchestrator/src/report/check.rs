//! The report of `ovs-graceful check`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Level;
use crate::machine::ExitCode;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// A run works, but something is outside the promise.
    Warning,
    /// A run refuses.
    Refused,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Severity::Ok => "ok",
            Severity::Warning => "warning",
            Severity::Refused => "refused",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at, in kebab-case; stable: `netdev-bridge`, `hw-offload`, `canary`, …
    pub name: String,
    /// How much it matters.
    pub severity: Severity,
    /// The object it was found on, for example `bridge br0`.
    pub object: String,
    /// What was found.
    pub cause: String,
    /// What the operator can do; empty where there is nothing to be done.
    pub remedy: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {}: {}: {}", self.severity, self.name, self.object, self.cause)?;
        if self.remedy.is_empty() {
            return Ok(());
        }
        write!(f, "\n         remedy: {}", self.remedy)
    }
}

/// Can this host do it, at which level, and what would be lost?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// How much of the promise this host can keep.
    pub level: Level,
    /// All that was looked at.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// The worst severity found.
    pub fn severity(&self) -> Severity {
        self.findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
    }

    /// 10 where a run would refuse, else 0.
    pub fn exit_code(&self) -> ExitCode {
        match self.severity() {
            Severity::Ok | Severity::Warning => ExitCode::Done,
            Severity::Refused => ExitCode::Refused,
        }
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        let answer = match self.severity() {
            Severity::Ok => "a run would lose nothing",
            Severity::Warning => "a run works; the warnings name what is outside its promise",
            Severity::Refused => "a run would refuse",
        };
        writeln!(f, "level {}: {answer}", self.level)
    }
}

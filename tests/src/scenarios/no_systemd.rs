//! Daemons that `ovs-ctl` started, outside any unit of theirs; and the stop-start strategy.

use anyhow::Result;

use super::{plain, Expect, Traffic};
use crate::command::shell;

/// plain with daemons that no unit knows.
pub struct NoSystemd;

impl Traffic for NoSystemd {
    fn name(&self) -> &'static str {
        "no_systemd"
    }

    fn about(&self) -> &'static str {
        "plain with daemons started by ovs-ctl, outside their units"
    }

    fn set_up(&self) -> Result<()> {
        // In a scope of their own, as a terminal's would be; not in the agent's cgroup.
        shell(
            "systemctl stop openvswitch-switch ovs-vswitchd ovsdb-server
             systemd-run -q --scope --unit=by-hand /usr/share/openvswitch/scripts/ovs-ctl --no-monitor \
                --system-id=random start",
        )?;
        plain::set_up()
    }

    fn expect(&self) -> Expect {
        Expect { in_units: false, ..Expect::default() }
    }
}

/// plain with `--strategy stop-start`.
pub struct StopStart;

impl Traffic for StopStart {
    fn name(&self) -> &'static str {
        "stop_start"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn about(&self) -> &'static str {
        "plain with --strategy stop-start"
    }

    fn extra_args(&self) -> &'static [&'static str] {
        &["--strategy", "stop-start"]
    }
}

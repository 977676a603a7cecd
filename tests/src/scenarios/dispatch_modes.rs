//! From one mode of dispatch to the other, on a kernel that has both: ovs-vswitchd of Debian 11 (OVS 2.15, per vport) and
//! the image's own (per CPU), in place of one another. Tools, database and kernel stay (hazards 16).

use anyhow::{bail, Result};

use super::{findings, plain, Traffic};
use crate::command::shell;
use crate::guest::Evidence;
use crate::outcome::Outcome;

/// From per CPU to per vport.
pub const DOWN: DispatchModes = DispatchModes { down: true };
/// From per vport to per CPU.
pub const UP: DispatchModes = DispatchModes { down: false };

/// See the module.
pub struct DispatchModes {
    down: bool,
}

/// The suite that the daemon of OVS 2.15 is taken from.
const OLDER: &str = "bullseye";
/// `OVS_DP_F_DISPATCH_UPCALL_PER_CPU`, linux/openvswitch.h
const PER_CPU: u32 = 1 << 3;

impl Traffic for DispatchModes {
    fn name(&self) -> &'static str {
        match self.down {
            true => "per_cpu_to_vport",
            false => "per_vport_to_cpu",
        }
    }

    fn by_hand(&self) -> bool {
        self.down
    }

    fn about(&self) -> &'static str {
        match self.down {
            true => "downgrade to OVS 2.15, from upcalls per CPU to upcalls per vport",
            false => "upgrade from OVS 2.15, from upcalls per vport to upcalls per CPU",
        }
    }

    fn older_daemon(&self) -> Option<&'static str> {
        Some(OLDER)
    }

    fn set_up(&self) -> Result<()> {
        shell("cp -p $(readlink -f /usr/sbin/ovs-vswitchd) /root/newer-vswitchd")?;
        // Libraries that this release does not have; the others are found here, too.
        shell("cp -d /lab/older/lib/* /usr/local/lib/ && ldconfig")?;
        // The newer one switches a datapath to dispatch per CPU by looking at it (dpif_netlink_open), and every miss of the
        // older daemon is lost from then on.
        shell("cp /lab/older/ovs-dpctl $(readlink -f /usr/bin/ovs-dpctl)")?;
        if !self.down {
            install("/lab/older/ovs-vswitchd")?;
            // A datapath that the newer daemon has made would go on dispatching per CPU, to nobody.
            shell("systemctl stop openvswitch-switch; ovs-dpctl del-dp system@ovs-system || true")?;
            shell("systemctl start openvswitch-switch")?;
        }
        plain::set_up()?;
        is_per_cpu(self.down)
    }

    fn before_action(&self, outcome: &mut Outcome) -> Result<()> {
        if !self.down {
            findings::dispatch_needs_bpf(outcome)?;
        }
        match self.down {
            true => install("/lab/older/ovs-vswitchd"),
            false => install("/root/newer-vswitchd"),
        }
    }

    fn judge(&self, _evidence: &Evidence, outcome: &mut Outcome) {
        let other_mode = is_per_cpu(!self.down);
        outcome.check("the other mode of dispatch", other_mode.is_ok(), format!("{other_mode:?}"));
    }
}

/// The running daemon keeps the file that it was started from.
fn install(daemon: &str) -> Result<()> {
    shell(&format!("f=$(readlink -f /usr/sbin/ovs-vswitchd); cp {daemon} $f.new && chmod 755 $f.new && mv $f.new $f"))
        .map(drop)
}

fn is_per_cpu(wanted: bool) -> Result<()> {
    match features(&shell("/lab/bin/dpfreeze snapshot /tmp/modes.json >&2; cat /tmp/modes.json")?) {
        Some(features) if (features & PER_CPU != 0) == wanted => Ok(()),
        other => bail!("user features of the datapath are {other:?}, per CPU wanted: {wanted}"),
    }
}

fn features(json: &str) -> Option<u32> {
    let at = json.find("\"user_features\"")?;
    let digits = json[at..].split_once(':')?.1.trim_start();
    digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

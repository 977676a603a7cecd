//! A port and a tunnel are removed from the database while the kernel refuses their deletion (hazards 7): the run
//! repeats it.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::{meanwhile, network, plain, Custom};
use crate::command::{shell, shell_lenient, wait_until};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct PortRemoved;

/// The kernel's ports of the two.
const DEVICES: [&str; 2] = ["v-ns4", "vxlan_sys_4789"];

fn present(text: &str) -> Vec<&'static str> {
    DEVICES.into_iter().filter(|device| text.contains(device)).collect()
}

fn kernel_ports() -> String {
    shell_lenient("ovs-dpctl show")
}

impl Custom for PortRemoved {
    fn name(&self) -> &'static str {
        "port_removed"
    }

    fn about(&self) -> &'static str {
        "a port and a tunnel are removed while their deletion is refused"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::attach("ns4", "br0", "", "")?;
        shell("ovs-vsctl add-port br0 t0 -- set interface t0 type=vxlan options:remote_ip=172.16.0.9 options:key=7")?;
        let there = || present(&kernel_ports()).len() == DEVICES.len();
        wait_until("the kernel has both ports", Duration::from_secs(10), Duration::from_millis(100), there)?;
        // While the gate command runs, the new daemon is bound, and port deletions are still refused.
        let seen = out.join("ports-at-gates");
        let gate = format!(
            "ovs-vsctl --no-wait del-port br0 v-ns4 -- del-port br0 t0; sleep 3; ovs-dpctl show > {}",
            seen.display()
        );
        let report = meanwhile::restart(&["--gate-command", &gate], out, outcome, |_, _| Ok(()))?;
        let at_gates = std::fs::read_to_string(seen).unwrap_or_default();
        outcome.check("the kernel kept both while deletions were refused", present(&at_gates) == DEVICES, at_gates);
        let refused = &report["refused"]["vport_del"];
        outcome.check("both deletions were refused", refused.as_u64() >= Some(2), refused);
        let now = kernel_ports();
        outcome.check("both have gone from the kernel", present(&now).is_empty(), now);
        let device = shell_lenient("ip -o link show vxlan_sys_4789 2>&1");
        outcome.check("the tunnel's device has gone", device.contains("does not exist"), device);
        let freed = shell_lenient("ip -o link show v-ns4");
        outcome.check("the other device is nobody's port", !freed.contains("master"), freed);
        Ok(())
    }
}

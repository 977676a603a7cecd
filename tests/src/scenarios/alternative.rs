//! The program that update-alternatives(1) has chosen, under another name, as Debian's openvswitch-switch-dpdk has it.

use anyhow::Result;
use serde_json::json;

use super::{plain, Traffic};
use crate::command::shell;
use crate::guest::{facts, Evidence};
use crate::outcome::Outcome;

/// See the module.
pub struct Alternative;

/// Its file, in the package of that name.
const PROGRAM: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";

impl Traffic for Alternative {
    fn name(&self) -> &'static str {
        "alternative"
    }

    fn about(&self) -> &'static str {
        "ovs-vswitchd is the alternative ovs-vswitchd-dpdk"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn set_up(&self) -> Result<()> {
        shell(&format!(
            "install -D -m 755 \"$(readlink -f /usr/sbin/ovs-vswitchd)\" {PROGRAM} \
             && echo {PROGRAM} >>/var/lib/dpkg/info/openvswitch-switch.list \
             && update-alternatives --install /usr/sbin/ovs-vswitchd ovs-vswitchd {PROGRAM} 200 \
             && systemctl restart openvswitch-switch"
        ))?;
        plain::set_up()
    }

    fn judge(&self, _evidence: &Evidence, outcome: &mut Outcome) {
        let daemons = facts::daemons("ovs-vswitchd");
        let is_it = daemons.iter().all(|daemon| daemon.executable == PROGRAM);
        outcome.check("it still is the alternative", daemons.len() == 1 && is_it, json!(daemons));
    }
}

//! A bridge with an OpenFlow controller and fail mode `secure`. `controller`: it looks on, the rules are not its own; the
//! daemon throws them away when it takes the controller up. `reactive`: it decides about each new flow's packet.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::Result;

use super::network::{self, UNWILDCARD};
use super::{plain, Traffic};
use crate::command::{shell, wait_until};
use crate::guest::controller::Controller;
use crate::guest::probe::Spec;
use crate::guest::{facts, Evidence};
use crate::outcome::Outcome;

/// See the module.
pub struct WithController {
    name: &'static str,
    about: &'static str,
    /// What becomes of a new flow's packet.
    new_flow: &'static str,
    reactive: bool,
}

/// It looks on.
pub const ATTENDED: WithController = WithController {
    name: "controller",
    about: "a bridge with a controller that looks on, fail mode secure",
    new_flow: "NORMAL",
    reactive: false,
};
/// It is asked.
pub const REACTIVE: WithController = WithController {
    name: "reactive",
    about: "a controller that decides about each new flow's packet",
    new_flow: "CONTROLLER:65535",
    reactive: true,
};

pub(super) const PORT: u16 = 6653;
/// A daemon tries again within 8 s.
const RECONNECTS: Duration = Duration::from_secs(20);

static CONTROLLER: OnceLock<Controller> = OnceLock::new();

/// Gives `br0` a controller that listens on [`PORT`], fail mode `secure`, and waits for their connection.
pub(super) fn connect() -> Result<()> {
    shell(&format!("ovs-vsctl set bridge br0 fail_mode=secure -- set-controller br0 tcp:127.0.0.1:{PORT}"))?;
    connected()
}

fn connected() -> Result<()> {
    wait_until("br0 has its controller", RECONNECTS, Duration::from_millis(200), || {
        // The daemon's word in the database is up to 5 s old.
        shell(&format!("grep -q ':{PORT:04X} 01 ' /proc/$(pidof ovs-vswitchd)/net/tcp")).is_ok()
    })
}

impl Traffic for WithController {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn by_hand(&self) -> bool {
        !self.reactive
    }

    /// A stock reload loses the rules of a bridge with a controller for good.
    fn stock_spoils(&self) -> bool {
        true
    }

    fn set_up(&self) -> Result<()> {
        CONTROLLER.set(Controller::start(PORT)?).map_err(|_| anyhow::anyhow!("it is set up once"))?;
        plain::set_up()?;
        connect()?;
        network::rules(
            "br0",
            &format!(
                "cookie=0xabc,priority=10,actions=NORMAL\n\
                 cookie=0xdef,priority=100,udp,tp_dst=9001,actions={UNWILDCARD},{}\n",
                self.new_flow
            ),
        )?;
        network::ping("ns1", "10.9.0.2")
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        plain::gentle_probes()
    }

    fn judge(&self, evidence: &Evidence, outcome: &mut Outcome) {
        let [_, daemons] = &evidence.daemons_after;
        outcome.check("the new daemon has its controller", connected().is_ok(), daemons);
        let asked = CONTROLLER.get().map_or(0, Controller::packets);
        outcome.check("the controller was asked, or not", (asked > 0) == self.reactive, asked);
        outcome.note("rules", facts::promised(&evidence.bridges));
    }
}

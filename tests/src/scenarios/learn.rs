//! Rules that make rules: the bridge learns addresses by `learn` actions. It speaks no OpenFlow above 1.3, whose
//! bundles are an extension.

use anyhow::Result;
use serde_json::json;

use super::network::{self, UNWILDCARD};
use super::{plain, Traffic};
use crate::command::{shell, shell_lenient};
use crate::guest::Evidence;
use crate::outcome::Outcome;

/// See the module.
pub struct Learn;

/// A rule for the way back to whoever sent the packet.
const LEARN: &str = "learn(table=1,priority=50,cookie=0x1ea,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],output:NXM_OF_IN_PORT[])";

fn learned() -> usize {
    let rules = shell_lenient("ovs-ofctl --no-stats dump-flows br0 table=1,cookie=0x1ea/-1");
    rules.lines().filter(|rule| rule.contains("output:")).count()
}

impl Traffic for Learn {
    fn name(&self) -> &'static str {
        "learn"
    }

    fn about(&self) -> &'static str {
        "rules that learn actions make"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn set_up(&self) -> Result<()> {
        plain::set_up()?;
        network::rules(
            "br0",
            &format!(
                "table=0,priority=10,actions={LEARN},resubmit(,1)\n\
                 table=0,priority=100,udp,tp_dst=9001,actions={UNWILDCARD},{LEARN},resubmit(,1)\n\
                 table=1,priority=10,actions=flood\n"
            ),
        )?;
        network::ping("ns1", "10.9.0.2")?;
        // What gave it the rules speaks 1.4, what reads them 1.0; a restart takes the highest.
        shell("ovs-vsctl set bridge br0 protocols=OpenFlow10,OpenFlow13").map(drop)
    }

    fn judge(&self, _evidence: &Evidence, outcome: &mut Outcome) {
        outcome.check("both addresses are learned", learned() == 2, json!(learned()));
    }
}

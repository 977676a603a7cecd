//! A select group by `dp_hash`: the datapath hashes each packet and recirculates it to the bucket.

use anyhow::Result;

use super::network::{self, UNWILDCARD};
use super::{plain, Expect, Traffic};
use crate::command::shell;
use crate::guest::probe::Spec;

/// See the module.
pub struct Group;

impl Traffic for Group {
    fn name(&self) -> &'static str {
        "group"
    }

    fn about(&self) -> &'static str {
        "a select group with dp_hash, misses behind its hash"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn set_up(&self) -> Result<()> {
        plain::set_up()?;
        shell(
            "ovs-ofctl -O OpenFlow15 add-group br0 'group_id=1,type=select,selection_method=dp_hash,\
             bucket=bucket_id:1,actions=set_field:4->nw_tos,NORMAL,\
             bucket=bucket_id:2,actions=set_field:8->nw_tos,NORMAL'",
        )?;
        network::rules(
            "br0",
            &format!(
                "priority=10,actions=NORMAL\n\
                 priority=100,udp,tp_dst=9000,actions=group:1\n\
                 priority=110,udp,tp_dst=9001,actions={UNWILDCARD},group:1\n"
            ),
        )?;
        network::ping("ns1", "10.9.0.2")
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        plain::gentle_probes()
    }

    fn expect(&self) -> Expect {
        Expect { keeps_flows: false, ..Expect::default() }
    }
}

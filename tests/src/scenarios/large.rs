//! What is larger than the MTU. Datagrams: `ct` puts their fragments together, the output takes them apart again. TCP:
//! the datapath gets packets of many segments (GSO), and a daemon one upcall for each segment.

use anyhow::Result;

use super::{conntrack, plain, Expect, Traffic};
use crate::guest::probe::{tcp, Spec};

/// See the module.
pub struct Large;

/// Three fragments.
const LENGTH: usize = 4000;

impl Traffic for Large {
    fn name(&self) -> &'static str {
        "large"
    }

    fn about(&self) -> &'static str {
        "datagrams of three fragments, and TCP 64 KiB at once, through ct"
    }

    fn set_up(&self) -> Result<()> {
        conntrack::Conntrack.set_up()
    }

    fn probes(&self) -> Vec<(String, Spec)> {
        let mut probes = plain::probes();
        for (_, probe) in &mut probes {
            match probe {
                Spec::Udp { length, interval_us, .. } => {
                    *length = LENGTH;
                    *interval_us *= 4;
                }
                Spec::Tcp { pace, .. } => *pace = tcp::BULKY,
                _ => {}
            }
        }
        probes
    }

    fn expect(&self) -> Expect {
        conntrack::Conntrack.expect()
    }
}

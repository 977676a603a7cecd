//! What is larger than the MTU. Datagrams: `ct` puts their fragments together, the output takes them apart again. TCP:
//! the datapath gets packets of many segments (GSO), and a daemon one upcall for each segment; iperf3 does the same.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::{conntrack, plain, Expect, Traffic};
use crate::guest::probe::{tcp, Place, Spec};

/// See the module.
pub struct Large;

/// Three fragments.
const LENGTH: usize = 4000;
/// Of iperf3: 128 KiB every 50 ms.
const BITS_PER_SECOND: u64 = 20_000_000;

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
        let (from, to) = (Place::named("ns1"), Place::named("ns2"));
        let address = Ipv4Addr::new(10, 9, 0, 2).into();
        probes.push(("iperf3".to_owned(), Spec::Iperf { from, to, address, bits_per_second: BITS_PER_SECOND }));
        probes
    }

    fn expect(&self) -> Expect {
        conntrack::Conntrack.expect()
    }
}

//! Watches a waiting ovs-vswitchd and lets it adopt the tunnel ports it finds: `tunnel_adoption PID SECONDS`.
//! Prints `attached` once the process is watched (wake it then), and the report at the end.

use std::time::Duration;

use anyhow::Context;
use dpfreeze::ovs::Ovs;
use dpfreeze::tunnel::{Adoption, Guard};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let pid: i32 = arguments.next().context("which process?")?.parse()?;
    let seconds: u64 = arguments.next().context("for how many seconds?")?.parse()?;
    let mut ovs = Ovs::open()?;
    let datapath = ovs.datapath("ovs-system")?.context("no datapath ovs-system")?;
    let guard = Guard::read(&mut ovs, datapath.ifindex)?;
    println!("guarded: {:?}", guard.backers);
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let start = stat.rsplit_once(')').and_then(|(_, r)| r.split_whitespace().nth(19)).context("stat")?.parse()?;
    let adoption = Adoption::attach(pid, start, guard, None)?;
    println!("attached");
    let all = adoption.wait(Duration::from_secs(seconds));
    println!("all adopted: {all}; {:#?}", adoption.finish());
    Ok(())
}

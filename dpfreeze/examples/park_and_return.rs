//! Takes the upcalls of a running Open vSwitch over for a while and gives them back: parking tried on the real thing.
//!
//! `park_and_return PID SECONDS [remove] [adopt]`: PID is the ovs-vswitchd; with `remove`, flows that a new daemon could
//! not keep are removed before the hand-back; with `adopt`, the daemon is stopped (SIGSTOP) with upcalls in its queues,
//! and they are taken out of its sockets. Prints one line for each step.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dpfreeze::ovs::Ovs;
use dpfreeze::park::{remove_doomed, Chosen, DrainWatch, Duplicates, Origins, Park, ParkLimits, ReplayInput};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let pid: u32 = args.next().context("which process?")?.parse()?;
    let seconds: f64 = args.next().context("for how long?")?.parse()?;
    let modes: Vec<String> = args.collect();
    let adopt = modes.iter().any(|m| m == "adopt");
    let remove = modes.iter().any(|m| m == "remove");
    let start = Instant::now();
    let say = |what: String| println!("{:7.1} ms  {what}", start.elapsed().as_secs_f64() * 1e3);

    let mut ovs = Ovs::open()?;
    let datapath = ovs.datapath("ovs-system")?.context("no datapath ovs-system")?;
    let old = datapath.cpu_port_ids().to_vec();
    let snapshot = ovs.flows(datapath.ifindex)?;
    say(format!("datapath {datapath:?}, {} flows", snapshot.len()));
    let mut limits = ParkLimits::default();
    if let Ok(packets) = std::env::var("PARK_PACKETS") {
        limits.packets = packets.parse()?;
    }
    let mut park = Park::open(limits)?;
    say(format!("own port ids {:?}, adopted {:?}", park.port_ids(), park.adopt(pid, &old)?));

    let daemon_process = Pid::from_raw(pid.try_into()?);
    if adopt {
        kill(daemon_process, Signal::SIGSTOP)?;
        std::thread::sleep(Duration::from_secs_f64(seconds / 2.0));
    }
    ovs.set_per_cpu_pids(&datapath, datapath.user_features, &park.port_ids())?;
    say("bound to us".into());
    if adopt {
        say(format!("{} bytes in the sockets of the stopped daemon", park.adopted_bytes()?));
        park.read_adopted()?;
    } else {
        let mut watch = DrainWatch::new(pid, &old);
        let drained = watch.wait(Duration::from_secs(2))?;
        say(format!("old daemon drained {drained}, {} handlers, queued {}", watch.handlers(), park.adopted_bytes()?));
    }

    std::thread::sleep(Duration::from_secs_f64(seconds));
    say(format!("{:?}", park.stats()));
    let mut dump = snapshot;
    if remove {
        let chosen = Chosen::now(&mut ovs, datapath.ifindex, &dump)?;
        let report = remove_doomed(&mut ovs, datapath.ifindex, chosen)?;
        say(format!(
            "removed {:?} of {} (dump {:?}, removal {:?}, slept {}, gone {}, errors {:?})",
            report.by_reason(),
            report.dump.len(),
            report.dump_time,
            report.removal_time,
            report.slept,
            report.already_gone,
            report.errors
        ));
        dump.extend(report.dump);
    }
    let origins = Origins::of(&dump);
    let daemon = Duplicates::of(pid, &old)?;
    park.release_adopted();
    kill(daemon_process, Signal::SIGCONT)?;
    say("ready to hand back".into());
    ovs.set_per_cpu_pids(&datapath, datapath.user_features, &old)?;
    say("bound to the daemon".into());
    let report = park.replay(&ReplayInput { origins: &origins, daemon: &daemon, limit: Duration::from_secs(20) })?;
    say(format!("{report:?}"));
    say(format!("{:?}", park.stats()));
    let after = ovs.datapath("ovs-system")?.context("no datapath ovs-system")?;
    say(format!(
        "lost {} missed {}",
        after.stats.lost - datapath.stats.lost,
        after.stats.missed - datapath.stats.missed
    ));
    Ok(())
}

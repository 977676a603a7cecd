//! A start without a standby: the database's lock holds the new daemon up until it is watched, where it would take away
//! something meanwhile. That is tunnel ports, of Open vSwitch before 3.2 (hazards 7, docs/tunnels.md), and qdiscs of others.

use std::time::Duration;

use dpfreeze::tunnel::is_backer;

use super::{devices, ports, Run, Stop};

/// The lock is ours a moment after the daemon before has ended.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Gets into the queue for the database's lock, before anybody else could be next: a daemon that is started now is to
/// wait behind us. Only where that is of use.
pub(super) fn hold_up(run: &mut Run) {
    let takes_for_stale = |version: &Option<String>| takes_tunnels_for_stale(version.as_deref());
    let old_ones = run.wish.elsewhere || takes_for_stale(&run.report.from.ovs) || takes_for_stale(&run.report.to.ovs);
    let has_tunnels = ports::wanted(&run.known.facts).iter().any(|name| is_backer(name));
    let at_stake = (old_ones && has_tunnels) || devices::has_kept(run);
    if run.wish.reloads_module() || !at_stake || run.known.switch_lock.is_some() {
        return;
    }
    match run.host.database.queue_for_switch_lock(run.deadline) {
        Ok(lock) => run.known.switch_lock = Some(lock),
        Err(error) => run.warn(not_kept(&error)),
    }
}

/// While a daemon is waited for: the server may have been replaced, and with it the queue.
pub(super) fn keep_place(run: &mut Run) {
    if let Some(lock) = &mut run.known.switch_lock {
        lock.is_ours();
    }
}

/// The new daemon is there and waits for the lock: it is watched from now on, and may have it.
pub(super) fn adopt(run: &mut Run) -> Result<(), Stop> {
    // Whatever becomes of it, the daemon waits no longer than to the end of this function.
    let Some(mut lock) = run.known.switch_lock.take() else { return Ok(()) };
    let new = run.new_daemon()?.clone();
    // Before it may have the lock.
    run.host.datapath.watch_standby(new.id)?;
    let version = match run.host.daemons.running_version(&new, run.deadline) {
        Ok(version) => Some(version),
        Err(error) => {
            run.warn(format!("which version runs now is not known: {error}"));
            None
        }
    };
    let stale = takes_tunnels_for_stale(version.as_deref());
    let policed = devices::policers(run);
    if !stale && !devices::has_kept(run) {
        return Ok(());
    }
    let end = run.deadline.min(run.now() + LOCK_PATIENCE);
    if !run.wait_until(end, |_| Ok(lock.is_ours()))? {
        run.warn(not_kept("the new ovs-vswitchd had the database's lock first"));
    } else if stale || !policed.is_empty() {
        if let Err(error) = run.host.datapath.adopt(new.id, stale, &policed) {
            run.warn(not_adopted(stale, !policed.is_empty(), error));
        }
    }
    Ok(())
}

fn not_kept(why: impl std::fmt::Display) -> String {
    format!("the new ovs-vswitchd may make its tunnel ports anew, and delete qdiscs of others, as without us: {why}")
}

/// It cannot be watched. What others have put on ports it cannot delete all the same: the freeze knows it.
pub(super) fn not_adopted(tunnels: bool, policing: bool, why: impl std::fmt::Display) -> String {
    let what = match (tunnels, policing) {
        (true, true) => "its tunnel ports and its policing",
        (false, true) => "its policing",
        _ => "its tunnel ports",
    };
    format!("the new ovs-vswitchd may make {what} anew, as without us: {why}")
}

/// Open vSwitch before 3.2 deletes the ports of its tunnels at its start and makes them again (hazards 7, docs/tunnels.md);
/// later ones note their numbers, and need not be watched. A version that cannot be read may be an old one.
pub(super) fn takes_tunnels_for_stale(version: Option<&str>) -> bool {
    let mut numbers = version.unwrap_or_default().split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < (3, 2),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_watched_is_named_and_nothing_else() {
        assert_eq!(
            not_adopted(false, true, "EPERM"),
            "the new ovs-vswitchd may make its policing anew, as without us: EPERM"
        );
        assert!(not_adopted(true, true, "EPERM").contains("tunnel ports and its policing"));
        assert!(!not_adopted(true, false, "EPERM").contains("qdisc"));
    }

    #[test]
    fn only_versions_before_3_2_take_tunnels_for_stale() {
        for old in ["3.1.0", "2.15.2", "3.1.0-2+deb12u1", "", "none"] {
            assert!(takes_tunnels_for_stale(Some(old)), "{old}");
        }
        for new in ["3.2.0", "3.5.0-1~bpo", "4.0", "10.1.2"] {
            assert!(!takes_tunnels_for_stale(Some(new)), "{new}");
        }
        assert!(takes_tunnels_for_stale(None));
    }
}

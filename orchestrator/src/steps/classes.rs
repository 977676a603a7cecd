//! What is refused in which phase: the table of the design in one place.

use dpfreeze::freeze::Classes;

/// From Arm on: what only a daemon that starts or stops would do.
pub fn armed() -> Classes {
    Classes::FLOW_FLUSH | Classes::DP_DEL | Classes::METER_DEL | Classes::CT_TIMEOUT_DEL | Classes::QDISC_DEL
}

/// From SwitchPrepare to the hand-over: the old daemon's work on flows and ports too, and the standby's binding.
pub fn switching() -> Classes {
    armed() | Classes::FLOW_DEL | Classes::FLOW_SET | Classes::VPORT_DEL | Classes::UPCALL_BIND
}

/// From the hand-over to Gates: the new daemon is bound, its revalidators may not yet delete or rewrite.
pub fn handed_over() -> Classes {
    switching() - Classes::UPCALL_BIND
}

/// In Settle: revalidators work again; nothing is flushed and no timeout policy goes before the thaw.
pub fn settling() -> Classes {
    armed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_daemon_may_work_on_flows_until_the_switch() {
        assert!(!armed().intersects(Classes::FLOW_DEL | Classes::FLOW_SET | Classes::VPORT_DEL | Classes::UPCALL_BIND));
    }

    #[test]
    fn flushes_are_refused_from_arm_to_settle() {
        for classes in [armed(), switching(), handed_over(), settling()] {
            assert!(classes.contains(Classes::FLOW_FLUSH | Classes::DP_DEL));
        }
    }

    #[test]
    fn nobody_is_kept_from_binding_after_the_hand_over() {
        assert!(!handed_over().contains(Classes::UPCALL_BIND));
        assert!(!settling().contains(Classes::UPCALL_BIND));
    }
}

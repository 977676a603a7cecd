//! What others have put on the devices of the ports, and a run cannot keep.

use dpfreeze::devices::{Device, Policer};

use crate::host::devices::{standing, Fate, Standing};
use crate::host::{DatabaseFacts, HostError};
use crate::report::{Findings, Level, Name};
use crate::steps::{Host, Wish};

/// Looks at the devices of the bridges. With a freeze the new daemon can be kept from deleting what is on them.
pub(super) fn look(host: &Host, facts: &DatabaseFacts, level: Level, wish: &Wish, found: &mut Findings) {
    let keeps = level == Level::Full && !wish.reloads_module();
    let standing = standing(host.devices.as_ref(), facts);
    if let Ok(standing) = &standing {
        judge_policing(standing, host.devices.policers(&standing.policed()), found);
    }
    judge(standing, keeps, found);
}

/// A policing of another form than that of today's Open vSwitch is not known, and so not kept.
fn judge_policing(standing: &Standing, kept: Result<Vec<Policer>, HostError>, found: &mut Findings) {
    let kept = kept.unwrap_or_default();
    let is_kept = |device: &Device| kept.iter().any(|policer| policer.ifindex == device.ifindex);
    let is_own =
        |device: &Device| !standing.fates(device).iter().any(|fate| matches!(fate, Fate::Lost { ingress: true, .. }));
    for device in standing.policed().values().filter(|device| is_own(device) && !is_kept(device)) {
        let cause = "its policing has a filter of a kind that is not watched (`basic`, of Open vSwitch before 2.17), and is made \
                     anew by the starting ovs-vswitchd: packets that leave by the port meanwhile are lost";
        let remedy = "none yet: it happens in any restart";
        found.warn(Name::IngressQdisc, format!("device {}", device.name), cause, remedy);
    }
}

fn judge(standing: Result<Standing, HostError>, keeps: bool, found: &mut Findings) {
    let again = "none yet: it is lost in any restart; make it again afterwards";
    let standing = match standing {
        Ok(standing) => standing,
        Err(error) => {
            let cause = format!("what others have put on them may be lost, and is not compared: {}", error.cause);
            return found.warn(Name::Qdisc, error.object, cause, "none: look at `tc qdisc show` before and after");
        }
    };
    for device in standing.devices.values() {
        let object = format!("device {}", device.name);
        for fate in standing.fates(device) {
            use dpfreeze::freeze::KeptQdisc::{Classes, Ingress, Policing, Root};
            let (name, cause) = match fate {
                Fate::Lost { ingress: true, why } => (Name::IngressQdisc, why),
                Fate::Lost { ingress: false, why } => (Name::Qdisc, why),
                // It is made anew, as it was.
                Fate::Kept(Policing) => continue,
                Fate::Kept(_) if keeps => continue,
                Fate::Kept(Ingress) => {
                    (Name::IngressQdisc, "its ingress qdisc is removed by the starting ovs-vswitchd".into())
                }
                Fate::Kept(Root) => (Name::Qdisc, "its root qdisc is removed by the starting ovs-vswitchd".into()),
                Fate::Kept(Classes) => (
                    Name::Qdisc,
                    "classes that the database does not have are removed by the starting ovs-vswitchd".into(),
                ),
            };
            found.warn(name, &object, cause, again);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::simulated::{Script, Sim, Variant, SHAPED};

    #[test]
    fn what_is_kept_is_not_warned_of() {
        let names = |keeps| {
            let sim = Sim::new(Variant::USUAL, Script::default());
            let host = sim.host();
            let facts = host.database.facts(host.clock.now()).unwrap();
            let mut found = Findings::default();
            judge(standing(host.devices.as_ref(), &facts), keeps, &mut found);
            found.into_inner().into_iter().map(|one| (one.name, one.object)).collect::<Vec<_>>()
        };
        assert_eq!(names(true), []);
        assert_eq!(names(false), [(Name::Qdisc, format!("device {SHAPED}"))]);
    }

    #[test]
    fn policing_that_is_made_anew_is_warned_of() {
        let sim = Sim::new(Variant::USUAL, Script::default());
        let host = sim.host();
        let facts = host.database.facts(host.clock.now()).unwrap();
        let standing = standing(host.devices.as_ref(), &facts).unwrap();
        let warned = |kept| {
            let mut found = Findings::default();
            judge_policing(&standing, kept, &mut found);
            found.into_inner().into_iter().map(|one| (one.name, one.object)).collect::<Vec<_>>()
        };
        assert_eq!(warned(host.devices.policers(&standing.policed())), []);
        let told = [(Name::IngressQdisc, format!("device {SHAPED}"))];
        assert_eq!(warned(Ok(Vec::new())), told);
        assert_eq!(warned(Err(HostError::new("filters", "EPERM"))), told);
    }

    #[test]
    fn what_cannot_be_read_is_warned_of() {
        let mut found = Findings::default();
        judge(Err(HostError::new("devices of the ports", "too many")), true, &mut found);
        let found = found.into_inner();
        assert!(found.len() == 1 && found[0].cause.ends_with("too many"), "{found:?}");
    }
}

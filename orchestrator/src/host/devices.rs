//! The devices of the bridges' ports, and what a starting ovs-vswitchd takes away from them: it takes every qdisc for its
//! own, and adapts the MTU of internal ports.

use std::collections::{BTreeMap, BTreeSet};

use dpfreeze::devices::{Device, Policer, Traffic, INGRESS, ROOT};
use dpfreeze::freeze::KeptQdisc;
use serde::{Deserialize, Serialize};

use super::{DatabaseFacts, Interface, Qos, Result};

/// Network devices.
pub trait Devices: Send + Sync {
    /// Those of these names that are there, by name.
    fn read(&self, names: &BTreeSet<String>) -> Result<BTreeMap<String, Device>>;
    /// The policing of those of these devices that Open vSwitch alone polices.
    fn policers(&self, devices: &BTreeMap<String, Device>) -> Result<Vec<Policer>>;
    /// Sets the MTU of one.
    fn set_mtu(&self, device: &Device, mtu: u32) -> Result<()>;
}

/// What the database asks for on a device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The bridge.
    pub bridge: String,
    /// It is an internal port, or a bridge's own.
    pub internal: bool,
    /// The QoS of its port.
    pub qos: Option<Qos>,
    /// What it receives is policed.
    pub policed: bool,
    /// An MTU.
    pub mtu: Option<i64>,
}

impl Asked {
    /// May Open vSwitch adapt its MTU (`ofport_is_mtu_overridden`, ofproto/ofproto.c)?
    fn may_be_adapted(&self) -> bool {
        self.internal && self.mtu.is_none()
    }
}

/// The devices of the bridges' ports as they stood, with what the database asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// By name.
    pub devices: BTreeMap<String, Device>,
    /// By name.
    pub asked: BTreeMap<String, Asked>,
}

/// What becomes of something that a device has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// The starting daemon can be kept from taking it away.
    Kept(KeptQdisc),
    /// The database asks for something else, and nothing can be done.
    Lost {
        /// The ingress qdisc, or the root qdisc and its classes.
        ingress: bool,
        /// Why, in words.
        why: String,
    },
}

/// The types of QoS with the qdisc that each makes (`tcs`, lib/netdev-linux.c).
const KINDS: [(&str, &str); 6] = [
    ("linux-htb", "htb"),
    ("linux-hfsc", "hfsc"),
    ("linux-sfq", "sfq"),
    ("linux-codel", "codel"),
    ("linux-fq_codel", "fq_codel"),
    ("linux-netem", "netem"),
];
/// Of them, those with classes.
const WITH_CLASSES: [&str; 2] = ["htb", "hfsc"];
/// `HTB_N_QUEUES`, `HFSC_N_QUEUES`: classes of other numbers than 1:1 to this one are not taken for queues, and left alone
/// (`htb_parse_tcmsg__`, `hfsc_parse_tcmsg__`). 1:fffe, the one above all queues, is one of those.
const MOST_QUEUES: u32 = 0xf000;
/// `TC_RESERVED_PRIORITY_POLICE` (lib/tc.h) with `matchall`; where the kernel lacks that, `tc_add_policer()` makes this.
const POLICER: [(&str, u16); 2] = [("matchall", 1), ("basic", 49)];

/// The types of interfaces that are devices of their name (`netdev_linux_class`, `netdev_internal_class`,
/// `netdev_tap_class`).
const DEVICES: [&str; 4] = ["", "system", "internal", "tap"];

/// What the database asks for, by device.
pub fn asked(facts: &DatabaseFacts) -> BTreeMap<String, Asked> {
    let mut all = BTreeMap::new();
    for bridge in facts.bridges.iter().filter(|bridge| bridge.is_of_kernel()) {
        for port in &bridge.ports {
            // A tunnel or patch port has no device of its own name, and one that is named so is a stranger's.
            let of_device = |one: &&Interface| DEVICES.contains(&one.kind.as_str()) || one.name == bridge.name;
            for interface in port.interfaces.iter().filter(of_device) {
                let asked = Asked {
                    bridge: bridge.name.clone(),
                    internal: interface.kind == "internal" || interface.name == bridge.name,
                    qos: port.qos.clone().filter(|qos| !qos.kind.is_empty()),
                    policed: interface.policed,
                    mtu: interface.mtu_request,
                };
                all.insert(interface.name.clone(), asked);
            }
        }
    }
    all
}

/// Reads the devices that these facts name.
///
/// # Errors
/// As [`Devices::read`].
pub fn standing(devices: &dyn Devices, facts: &DatabaseFacts) -> Result<Standing> {
    let asked = asked(facts);
    let devices = devices.read(&asked.keys().cloned().collect())?;
    Ok(Standing { devices, asked })
}

impl Standing {
    /// What a starting daemon must not delete, by the index of the device.
    pub fn kept(&self) -> Vec<(u32, KeptQdisc)> {
        let fates = self.devices.values().map(|device| (device.ifindex, self.fates(device)));
        let kept = |fate| if let Fate::Kept(what) = fate { Some(what) } else { None };
        let kept =
            fates.flat_map(|(ifindex, fates)| fates.into_iter().filter_map(kept).map(move |what| (ifindex, what)));
        kept.chain(self.policed().values().map(|device| (device.ifindex, KeptQdisc::Policing))).collect()
    }

    /// The devices that the database has policed, with an ingress qdisc.
    pub fn policed(&self) -> BTreeMap<String, Device> {
        let has_ingress = |device: &&Device| device.traffic.iter().any(|one| one.below() == INGRESS);
        let policed = |device: &&Device| self.asked.get(&device.name).is_some_and(|asked| asked.policed);
        let found = self.devices.values().filter(policed).filter(has_ingress);
        found.map(|device| (device.name.clone(), device.clone())).collect()
    }

    /// What becomes of what this device has.
    pub fn fates(&self, device: &Device) -> Vec<Fate> {
        let asked = self.asked.get(&device.name).cloned().unwrap_or_default();
        [fate_of_root(device, asked.qos.as_ref()), fate_of_ingress(device, asked.policed)]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Devices whose MTU is another one than it was, which the database does not ask for and which Open vSwitch would let
    /// stand: with what it was.
    pub fn other_mtus(&self, now: &Standing) -> Vec<(Device, u32)> {
        let same = |device: &&Device| self.same(device, now).is_some_and(|now| now.mtu != device.mtu);
        let found = self.devices.values().filter(same).filter(|device| {
            // Of other ports than internal ones Open vSwitch changes nothing that it is not asked for.
            let may = |standing: &Standing| standing.asked.get(&device.name).is_some_and(Asked::may_be_adapted);
            may(self) && may(now) && device.mtu <= now.largest_mtu(&device.name)
        });
        found.filter_map(|was| Some((now.devices.get(&was.name)?.clone(), was.mtu))).collect()
    }

    /// Is there an MTU that a daemon which starts may change?
    pub fn has_mtus_by_hand(&self) -> bool {
        self.asked.iter().any(|(name, asked)| {
            let is_less = |device: &Device| device.mtu < self.largest_mtu(name);
            asked.may_be_adapted() && self.devices.get(name).is_some_and(is_less)
        })
    }

    /// What an internal port may have: the smallest MTU of the ports of its bridge that are none
    /// (`find_min_mtu`, ofproto/ofproto.c). Of others Open vSwitch changes nothing.
    fn largest_mtu(&self, name: &str) -> u32 {
        let Some(asked) = self.asked.get(name).filter(|asked| asked.internal) else { return u32::MAX };
        let others =
            self.asked.iter().filter(|(_, one)| one.bridge == asked.bridge && (!one.internal || one.mtu.is_some()));
        others.filter_map(|(name, _)| Some(self.devices.get(name)?.mtu)).min().unwrap_or(u32::MAX)
    }

    /// This device now, where it is the same one.
    fn same<'a>(&self, device: &Device, now: &'a Standing) -> Option<&'a Device> {
        now.devices.get(&device.name).filter(|now| now.ifindex == device.ifindex)
    }

    /// What is gone, and was not meant to: in words.
    pub fn losses(&self, now: &Standing) -> Vec<String> {
        let mut lost: Vec<String> = Vec::new();
        for device in self.devices.values() {
            let Some(after) = self.same(device, now) else { continue };
            let (old, new) = (self.asked.get(&device.name), now.asked.get(&device.name));
            let (Some(old), Some(new)) = (old, new) else { continue };
            let meant = |one: &&Traffic| match one.below() {
                INGRESS => old.policed != new.policed,
                _ => old.qos != new.qos,
            };
            let gone: Vec<&Traffic> = device.traffic.difference(&after.traffic).filter(|one| !meant(one)).collect();
            if let Some(told) = told(&gone) {
                lost.push(format!("device {}: gone since the restart: {told}", device.name));
            }
        }
        let mtus = self.other_mtus(now);
        lost.extend(
            mtus.iter().map(|(now, was)| format!("device {}: its MTU was {was}, and is {}", now.name, now.mtu)),
        );
        lost
    }
}

/// So many are named; the rest is counted.
const NAMED: usize = 4;

/// Qdiscs take along what is on them: they are named first.
fn told(gone: &[&Traffic]) -> Option<String> {
    let named: Vec<String> = gone.iter().take(NAMED).map(ToString::to_string).collect();
    let more = gone.len().saturating_sub(NAMED);
    match (named.is_empty(), more) {
        (true, _) => None,
        (false, 0) => Some(named.join("; ")),
        (false, more) => Some(format!("{}; and {more} more", named.join("; "))),
    }
}

/// `iface_configure_qos` (vswitchd/bridge.c) with `netdev_linux_set_qos` (lib/netdev-linux.c): without QoS every root qdisc
/// is deleted, with one every other.
fn fate_of_root(device: &Device, qos: Option<&Qos>) -> Option<Fate> {
    let mut qdiscs = device.traffic.iter();
    let root = qdiscs.find_map(|one| match one {
        Traffic::Qdisc { kind, parent: ROOT, .. } => Some(kind),
        _ => None,
    })?;
    let Some(qos) = qos else { return Some(Fate::Kept(KeptQdisc::Root)) };
    // Any other type is `linux-noop`, or one that does not make anything.
    let (_, own) = KINDS.iter().find(|(kind, _)| *kind == qos.kind)?;
    if own != root {
        let why = format!("the database asks for {} there, and its qdisc is {root}", qos.kind);
        return Some(Fate::Lost { ingress: false, why });
    }
    // 1:0 is the kernel's own root class of hfsc.
    let known = |handle: u32| {
        let (major, minor) = (handle >> 16, handle & 0xffff);
        major != 1
            || !(1..=MOST_QUEUES).contains(&minor)
            || handle == 0x0001_0001
            || qos.queues.iter().any(|queue| i64::from(handle) == 0x0001_0001 + queue)
    };
    let others = device.traffic.iter().any(|one| matches!(one, Traffic::Class { handle, .. } if !known(*handle)));
    (others && WITH_CLASSES.contains(own)).then_some(Fate::Kept(KeptQdisc::Classes))
}

/// `netdev_linux_set_policing` (lib/netdev-linux.c): every ingress qdisc is deleted. One of the kind `clsact` is another
/// matter.
fn fate_of_ingress(device: &Device, policed: bool) -> Option<Fate> {
    let is_it = |one: &Traffic| matches!(one, Traffic::Qdisc { kind, parent: INGRESS, .. } if kind == "ingress");
    if !device.traffic.iter().any(is_it) {
        return None;
    }
    if !policed {
        return Some(Fate::Kept(KeptQdisc::Ingress));
    }
    let others = device.traffic.iter().any(|one| match one {
        Traffic::Filter { kind, preference, .. } if one.below() == INGRESS => {
            !POLICER.iter().any(|own| (own.0, own.1) == (kind, *preference))
        }
        _ => false,
    });
    let why = "Open vSwitch polices what it receives, and makes the ingress qdisc anew with its own filter alone";
    others.then(|| Fate::Lost { ingress: true, why: why.into() })
}

#[cfg(test)]
mod tests {
    use super::super::{Bridge, Port};
    use super::*;

    fn qdisc(kind: &str, handle: u32, parent: u32) -> Traffic {
        Traffic::Qdisc { kind: kind.into(), handle: handle << 16, parent }
    }

    fn class(minor: u32) -> Traffic {
        class_of("htb", 0x0001_0000 | minor)
    }

    fn class_of(kind: &str, handle: u32) -> Traffic {
        Traffic::Class { kind: kind.into(), handle, parent: 0x0001_fffe }
    }

    fn filter(kind: &str, preference: u16) -> Traffic {
        let (kind, parent) = (kind.into(), 0xffff_0000);
        Traffic::Filter { kind, parent, chain: 0, preference, protocol: 3, handle: 1 }
    }

    fn device(name: &str, mtu: u32, traffic: &[Traffic]) -> Device {
        Device { name: name.into(), ifindex: 7, mtu, traffic: traffic.iter().cloned().collect() }
    }

    fn standing(devices: &[Device], asked: Asked) -> Standing {
        let asked = devices.iter().map(|device| (device.name.clone(), asked.clone())).collect();
        Standing { devices: devices.iter().map(|one| (one.name.clone(), one.clone())).collect(), asked }
    }

    fn fates(traffic: &[Traffic], asked: Asked) -> Vec<Fate> {
        let device = device("v1", 1500, traffic);
        standing(std::slice::from_ref(&device), asked).fates(&device)
    }

    fn htb(queues: &[i64]) -> Asked {
        Asked { qos: Some(Qos { kind: "linux-htb".into(), queues: queues.to_vec() }), ..Asked::default() }
    }

    #[test]
    fn a_device_that_has_but_the_name_of_a_tunnel_is_a_stranger_s() {
        let port = |name: &str, kind: &str| {
            let interfaces = vec![Interface { name: name.into(), kind: kind.into(), ..Interface::default() }];
            Port { name: name.into(), interfaces, ..Port::default() }
        };
        let kinds =
            [("br0", "internal"), ("eth1", ""), ("v1", "system"), ("t0", "tap"), ("gre0", "gre"), ("p0", "patch")];
        let ports = kinds.map(|(name, kind)| port(name, kind)).to_vec();
        let bridge = Bridge { name: "br0".into(), ports, ..Bridge::default() };
        let facts = DatabaseFacts { bridges: vec![bridge], ..DatabaseFacts::default() };
        assert_eq!(asked(&facts).into_keys().collect::<Vec<_>>(), ["br0", "eth1", "t0", "v1"]);
    }

    #[test]
    fn what_nobody_asks_for_is_kept() {
        let both = [qdisc("tbf", 0x8001, ROOT), qdisc("ingress", 0xffff, INGRESS), filter("u32", 49152)];
        let kept = [Fate::Kept(KeptQdisc::Root), Fate::Kept(KeptQdisc::Ingress)];
        assert_eq!(fates(&both, Asked::default()), kept);
        assert_eq!(fates(&[qdisc("clsact", 0xffff, INGRESS)], Asked::default()), []);
        assert_eq!(fates(&[], Asked::default()), []);
    }

    #[test]
    fn classes_that_the_database_does_not_have_are_somebody_s() {
        let own = [qdisc("htb", 1, ROOT), class(0xfffe), class(1), class(6)];
        assert_eq!(fates(&own, htb(&[0, 5])), []);
        assert_eq!(fates(&own, htb(&[])), [Fate::Kept(KeptQdisc::Classes)]);
        let noop = Asked { qos: Some(Qos { kind: "linux-noop".into(), queues: vec![] }), ..Asked::default() };
        assert_eq!(fates(&own, noop), []);
    }

    #[test]
    fn the_kernel_s_root_class_and_classes_below_others_are_nobody_s() {
        let hfsc = Asked { qos: Some(Qos { kind: "linux-hfsc".into(), queues: vec![0] }), ..Asked::default() };
        let mut own = vec![qdisc("hfsc", 1, ROOT), class_of("hfsc", 0x0001_0000)];
        own.extend([0x0001_fffe, 0x0001_0001].map(|handle| class_of("hfsc", handle)));
        assert_eq!(fates(&own, hfsc.clone()), []);
        // Of a qdisc that somebody has hung below a queue: OVS looks at classes of the major number 1 alone.
        own.extend([qdisc("htb", 5, 0x0001_0001), class_of("htb", 0x0005_0001)]);
        assert_eq!(fates(&own, hfsc.clone()), []);
        own.push(class_of("hfsc", 0x0001_0007));
        assert_eq!(fates(&own, hfsc), [Fate::Kept(KeptQdisc::Classes)]);
    }

    #[test]
    fn what_the_database_asks_for_comes_in_its_place() {
        let found = fates(&[qdisc("tbf", 1, ROOT)], htb(&[]));
        assert!(matches!(&found[..], [Fate::Lost { ingress: false, why }] if why.contains("linux-htb")), "{found:?}");
        let policed = || Asked { policed: true, ..Asked::default() };
        let ingress = qdisc("ingress", 0xffff, INGRESS);
        for own in [filter("matchall", 1), filter("basic", 49)] {
            assert_eq!(fates(&[ingress.clone(), own], policed()), []);
        }
        let found = fates(&[ingress, filter("matchall", 1), filter("flower", 3)], policed());
        assert!(matches!(&found[..], [Fate::Lost { ingress: true, .. }]), "{found:?}");
    }

    #[test]
    fn what_is_gone_is_told_unless_it_was_meant_to_go() {
        let was = standing(&[device("v1", 1500, &[qdisc("tbf", 0x8001, ROOT)])], Asked::default());
        let none = [device("v1", 1500, &[])];
        assert_eq!(was.losses(&was), Vec::<String>::new());
        let lost = was.losses(&standing(&none, Asked::default()));
        assert_eq!(lost, ["device v1: gone since the restart: qdisc tbf 8001: root"]);
        assert_eq!(was.losses(&standing(&none, htb(&[]))), Vec::<String>::new());
        let another = Device { ifindex: 9, ..none[0].clone() };
        assert_eq!(was.losses(&standing(&[another], Asked::default())), Vec::<String>::new());
    }

    #[test]
    fn an_mtu_is_put_back_where_open_vswitch_would_let_it_stand() {
        let with = |mtu, least| {
            let mut found = standing(&[device("br0", mtu, &[]), device("v1", least, &[])], Asked::default());
            found.asked.entry("br0".into()).or_default().internal = true;
            found
        };
        let was = with(1400, 1500);
        assert_eq!(was.other_mtus(&with(1400, 1500)), []);
        let back: Vec<_> = was.other_mtus(&with(1500, 1500)).into_iter().map(|(now, was)| (now.name, was)).collect();
        assert_eq!(back, [("br0".to_owned(), 1400)]);
        // A port that came or changed meanwhile has less.
        assert_eq!(was.other_mtus(&with(1300, 1300)), []);
        let mut asked = with(1500, 1500);
        asked.asked.entry("br0".into()).or_default().mtu = Some(1500);
        assert_eq!(was.other_mtus(&asked), []);
    }
}

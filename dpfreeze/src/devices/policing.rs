//! The policing of Open vSwitch on a device: an ingress qdisc with one filter of its own (`netdev_linux_set_policing`,
//! lib/netdev-linux.c).

use nix::errno::Errno;

use super::traffic::{self, Traffic, RTM_GETTFILTER, TCMSG};
use super::{Device, CLSACT_INGRESS, INGRESS};
use crate::error::{Error, Result};
use crate::netlink::attr::{Attr, AttrBuf, Attrs};
use crate::netlink::message::{NLM_F_CREATE, NLM_F_EXCL};
use crate::netlink::{Protocol, Socket};

// linux/rtnetlink.h
pub(crate) const RTM_NEWQDISC: u16 = 36;
pub(crate) const RTM_DELQDISC: u16 = 37;
pub(crate) const RTM_GETQDISC: u16 = traffic::RTM_GETQDISC;
pub(crate) const RTM_NEWTFILTER: u16 = 44;
pub(crate) const RTM_GETTFILTER_OF: u16 = RTM_GETTFILTER;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
/// The handle of an ingress qdisc.
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// What `tc_add_matchall_policer()` asks for: `TC_RESERVED_PRIORITY_POLICE` and `ETH_P_ALL`, handle 1.
const PREFERENCE: u16 = 1;
const ALL_PROTOCOLS: u16 = 3;
const HANDLE: u32 = 1;
// linux/pkt_cls.h
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_POLICE_TBF: u16 = 1;
const TCA_POLICE_RATE64: u16 = 8;
const TCA_POLICE_PKTRATE64: u16 = 10;
const TCA_POLICE_PKTBURST64: u16 = 11;
/// Bytes of `struct tc_police` up to the rate in its `struct tc_ratespec`.
const POLICE: usize = 32;

/// The policing of a device, whose qdisc has the filter of Open vSwitch and no other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policer {
    /// The device.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// What is let through.
    pub rates: Vec<Rates>,
}

/// What one police action lets through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// What becomes of the rest (`TC_POLICE_SHOT`).
    action: i32,
    /// Ticks.
    burst: u32,
    /// Bytes.
    mtu: u32,
    /// Bytes a second.
    rate: u64,
    /// Packets a second, and ticks.
    packets: [u64; 2],
}

/// The policing of this device, if it is Open vSwitch's alone.
///
/// # Errors
/// As [`Socket::dump`].
pub fn policer(device: &Device) -> Result<Option<Policer>> {
    if !is_policed_alone(device) {
        return Ok(None);
    }
    let body = traffic::request(device.ifindex, INGRESS_HANDLE);
    let rates = Socket::open(Protocol::Route)?.dump_each(
        "filters",
        RTM_GETTFILTER,
        &body,
        || None,
        |found, payload| {
            let handle = payload.get(8..12).map(|bytes| bytes == HANDLE.to_ne_bytes());
            if handle == Some(true) {
                *found = rates(payload);
            }
            Ok(())
        },
    )?;
    Ok(rates.map(|rates| Policer { name: device.name.clone(), ifindex: device.ifindex, rates }))
}

fn is_policed_alone(device: &Device) -> bool {
    let mut own = false;
    for one in device.traffic.iter().filter(|one| one.below() == INGRESS) {
        match one {
            Traffic::Qdisc { kind, .. } if kind == "ingress" => {}
            Traffic::Filter { kind, chain: 0, preference: PREFERENCE, protocol: ALL_PROTOCOLS, handle, .. }
                if kind == "matchall" =>
            {
                own |= *handle == HANDLE;
            }
            _ => return false,
        }
    }
    own
}

/// What a matchall filter (`struct tcmsg` and attributes) polices by; None where it does anything else.
pub(crate) fn rates(payload: &[u8]) -> Option<Vec<Rates>> {
    let attrs = Attrs(payload.get(TCMSG..)?);
    if attrs.find(TCA_KIND).ok()??.string() != "matchall" {
        return None;
    }
    let actions = attrs.find(TCA_OPTIONS).ok()??.nested().find(TCA_MATCHALL_ACT).ok()??;
    let all: Option<Vec<Rates>> = actions.nested().map(|action| of_action(&action.ok()?)).collect();
    all.filter(|all| !all.is_empty())
}

fn of_action(action: &Attr<'_>) -> Option<Rates> {
    if action.nested().find(TCA_ACT_KIND).ok()??.string() != "police" {
        return None;
    }
    let options = action.nested().find(TCA_ACT_OPTIONS).ok()??.nested();
    let police = options.find(TCA_POLICE_TBF).ok()??.payload.first_chunk::<POLICE>()?;
    let word = |at: usize| u32::from_ne_bytes([police[at], police[at + 1], police[at + 2], police[at + 3]]);
    let wide = |kind| options.find(kind).ok().flatten().and_then(|attr| attr.u64().ok());
    Some(Rates {
        action: word(4) as i32,
        burst: word(12),
        mtu: word(16),
        rate: wide(TCA_POLICE_RATE64).unwrap_or(word(28).into()),
        packets: [TCA_POLICE_PKTRATE64, TCA_POLICE_PKTBURST64].map(|kind| wide(kind).unwrap_or_default()),
    })
}

/// What a starting ovs-vswitchd asks for about the policing of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asks {
    /// `RTM_DELQDISC` of its ingress qdisc.
    Delete,
    /// `RTM_NEWQDISC` of one.
    Add,
    /// `RTM_NEWTFILTER` there, with what it polices by.
    Police(Option<Vec<Rates>>),
}

/// What this message (type, and body after `struct nlmsghdr`) asks for, with the index of the device.
pub(crate) fn asks(kind: u16, body: &[u8]) -> Option<(u32, Asks)> {
    let head = body.first_chunk::<TCMSG>()?;
    let word = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let asks = match (kind, word(12)) {
        (RTM_DELQDISC, INGRESS) => Asks::Delete,
        (RTM_NEWQDISC, INGRESS) => Asks::Add,
        (RTM_NEWTFILTER, CLSACT_INGRESS) if word(8) == HANDLE => Asks::Police(rates(body)),
        _ => return None,
    };
    Some((word(4), asks))
}

/// Deletes the ingress qdisc of a device; one that has none is as it should be.
///
/// # Errors
/// As [`Socket::request`].
pub fn delete_ingress(ifindex: u32) -> Result<()> {
    match Socket::open(Protocol::Route)?.request("ingress qdisc", RTM_DELQDISC, 0, &ingress(ifindex)) {
        Err(Error::Netlink { errno: Errno::ENOENT | Errno::EINVAL, .. }) => Ok(()),
        deleted => deleted.map(drop),
    }
}

/// Deletes the ingress qdisc of a device and makes an empty one.
///
/// # Errors
/// As [`Socket::request`].
pub(crate) fn make_ingress_anew(ifindex: u32) -> Result<()> {
    delete_ingress(ifindex)?;
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    Socket::open(Protocol::Route)?.request("ingress qdisc", RTM_NEWQDISC, flags, &ingress(ifindex)).map(drop)
}

fn ingress(ifindex: u32) -> Vec<u8> {
    let head = [0, ifindex, INGRESS_HANDLE, INGRESS, 0];
    let head: Vec<u8> = head.iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
    [&head[..], AttrBuf::new().push_str(TCA_KIND, "ingress").as_bytes()].concat()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// `struct tcmsg` of a filter as `tc_add_matchall_policer()` asks for it, and its attributes.
    pub(crate) fn filter(ifindex: u32, rate: u32) -> Vec<u8> {
        let mut police = vec![0; 56];
        police[4..8].copy_from_slice(&2u32.to_ne_bytes());
        police[12..16].copy_from_slice(&777u32.to_ne_bytes());
        police[16..20].copy_from_slice(&65535u32.to_ne_bytes());
        police[28..32].copy_from_slice(&rate.to_ne_bytes());
        let mut options = AttrBuf::new();
        options.push(2, &[0; 1024]).push(TCA_POLICE_TBF, &police);
        let mut action = AttrBuf::new();
        action.push_str(TCA_ACT_KIND, "police").push_nested(TCA_ACT_OPTIONS, &options);
        let mut actions = AttrBuf::new();
        actions.push_nested(1, &action);
        let mut all = AttrBuf::new();
        all.push_nested(TCA_MATCHALL_ACT, &actions);
        let mut attrs = AttrBuf::new();
        attrs.push_str(TCA_KIND, "matchall").push_nested(TCA_OPTIONS, &all);
        let head = [0, ifindex, HANDLE, CLSACT_INGRESS, 0];
        let head: Vec<u8> = head.iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        [&head[..], attrs.as_bytes()].concat()
    }

    /// The same of a qdisc.
    pub(crate) fn qdisc(ifindex: u32) -> Vec<u8> {
        ingress(ifindex)
    }

    #[test]
    fn a_filter_says_what_it_polices_by() {
        let [one] = rates(&filter(7, 125_000)).unwrap().try_into().unwrap();
        let told = Rates { action: 2, burst: 777, mtu: 65535, rate: 125_000, packets: [0, 0] };
        assert_eq!(one, told);
        assert_ne!(rates(&filter(7, 1)), rates(&filter(7, 2)));
        assert_eq!((rates(&qdisc(7)), rates(&[])), (None, None));
    }

    #[test]
    fn what_a_daemon_asks_for_is_known_by_its_type_and_parent() {
        assert_eq!(asks(RTM_DELQDISC, &qdisc(7)), Some((7, Asks::Delete)));
        assert_eq!(asks(RTM_NEWQDISC, &qdisc(7)), Some((7, Asks::Add)));
        assert!(matches!(asks(RTM_NEWTFILTER, &filter(8, 1)), Some((8, Asks::Police(Some(_))))));
        assert_eq!((asks(RTM_GETQDISC, &qdisc(7)), asks(RTM_DELQDISC, &[0; 8])), (None, None));
    }

    #[test]
    fn policing_with_filters_of_others_is_not_ours_to_keep() {
        let ingress = Traffic::Qdisc { kind: "ingress".into(), handle: INGRESS_HANDLE, parent: INGRESS };
        let filter = |kind: &str, preference, handle| {
            let (kind, parent, protocol) = (kind.into(), INGRESS_HANDLE, ALL_PROTOCOLS);
            Traffic::Filter { kind, parent, chain: 0, preference, protocol, handle }
        };
        let alone = |filters: &[Traffic]| {
            let traffic: BTreeSet<Traffic> = filters.iter().cloned().chain([ingress.clone()]).collect();
            is_policed_alone(&Device { traffic, ..Device::default() })
        };
        let own = [filter("matchall", 1, 0), filter("matchall", 1, 1)];
        assert!(alone(&own) && !alone(&[]) && !alone(&own[..1]));
        assert!(!alone(&[own[0].clone(), own[1].clone(), filter("u32", 7, 1)]));
    }
}

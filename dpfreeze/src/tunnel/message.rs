//! Which requests of a starting daemon are turned into which question.

use super::Backer;
use crate::devices::policing::{self, Asks};
use crate::devices::{Policer, IFINFOMSG, IFLA_IFNAME, RTM_GETLINK};
use crate::error::Result;
use crate::netlink::attr::{align, Attrs};
use crate::netlink::message::{NLM_F_ACK, NLM_F_REQUEST};
use crate::ovs::Ovs;

// linux/netlink.h, struct nlmsghdr {u32 len; u16 type; u16 flags; u32 seq; u32 pid}
const NLMSG_HEADER: usize = 16;
const TYPE_AT: usize = 4;
// linux/rtnetlink.h
pub(super) const RTM_DELLINK: u16 = 17;
// linux/openvswitch.h
const OVS_VPORT_VERSION: u8 = 1;
const OVS_VPORT_CMD_NEW: u8 = 1;
const OVS_VPORT_CMD_DEL: u8 = 2;
const OVS_VPORT_CMD_GET: u8 = 3;
const OVS_VPORT_ATTR_PORT_NO: u16 = 1;
const OVS_VPORT_ATTR_NAME: u16 = 3;
/// genlmsghdr {u8 cmd; u8 version; u16 reserved} and ovs_header {int dp_ifindex}
const OVS_HEADERS: usize = 8;

/// What a guarded request asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// `OVS_VPORT_CMD_NEW` of a port that exists.
    AddPort,
    /// `OVS_VPORT_CMD_DEL`
    DeletePort,
    /// `RTM_DELLINK` of a port's device.
    DeleteDevice,
    /// `RTM_DELQDISC` of the ingress qdisc of a device that is policed.
    DeletePolicing,
    /// `RTM_NEWQDISC` of another one.
    AddPolicing,
    /// `RTM_NEWTFILTER` with the rates that the device is policed by.
    Police,
    /// The same with others: it passes, and finds an empty qdisc.
    PoliceOtherwise,
}

/// The ports whose deletion and addition are turned into questions, and the devices whose policing is.
#[derive(Clone, Debug)]
pub struct Guard {
    /// The datapath.
    pub dp_ifindex: u32,
    /// The generic netlink family `ovs_vport`.
    pub vport_family: u16,
    /// The ports.
    pub backers: Vec<Backer>,
    /// The devices.
    pub policed: Vec<Policer>,
}

/// One change to the bytes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// Where, from the beginning of what was looked at.
    pub at: usize,
    /// The new bytes.
    pub bytes: Vec<u8>,
    /// What the request was.
    pub request: Request,
    /// Index of the port in [`Guard::backers`], or of the device in [`Guard::policed`].
    pub of: usize,
}

impl Guard {
    /// The tunnel ports that datapath `ifindex` has now.
    ///
    /// # Errors
    /// As [`Ovs::vports`].
    pub fn read(ovs: &mut Ovs, ifindex: u32) -> Result<Guard> {
        let backers = super::backers(&ovs.vports(ifindex)?);
        Ok(Guard { backers, ..Guard::none(ovs, ifindex) })
    }

    /// None of them.
    pub fn none(ovs: &Ovs, ifindex: u32) -> Guard {
        let vport_family = ovs.families().vport;
        Guard { dp_ifindex: ifindex, vport_family, backers: Vec::new(), policed: Vec::new() }
    }

    /// How many ports and devices there are.
    pub(super) fn len(&self) -> usize {
        self.backers.len() + self.policed.len()
    }

    /// Is there nothing to guard?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What a change is about.
    pub(super) fn name(&self, change: &Change) -> &str {
        match change.request {
            Request::AddPort | Request::DeletePort | Request::DeleteDevice => &self.backers[change.of].name,
            _ => &self.policed[change.of].name,
        }
    }

    /// The changes that a buffer of netlink messages needs; none for nearly every buffer.
    pub(super) fn changes(&self, buffer: &[u8]) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut at = 0;
        while let Some(message) = message_at(buffer, at) {
            changes.extend(self.change(message).map(|c| Change { at: at + c.at, ..c }));
            at += align(message.len());
        }
        changes
    }

    fn change(&self, message: &[u8]) -> Option<Change> {
        let kind = u16::from_ne_bytes([message[TYPE_AT], message[TYPE_AT + 1]]);
        let body = &message[NLMSG_HEADER..];
        if kind == self.vport_family {
            self.vport_change(body)
        } else if kind == RTM_DELLINK {
            let name = name_in(body.get(IFINFOMSG..)?, IFLA_IFNAME)?;
            let bytes = RTM_GETLINK.to_ne_bytes().to_vec();
            Some(Change { at: TYPE_AT, bytes, request: Request::DeleteDevice, of: self.by_name(&name)? })
        } else {
            self.policing_change(kind, body)
        }
    }

    /// The attributes that make and delete a qdisc or filter are those that it is asked for by; the kernel skips the others.
    /// The flags of a request to make one would make a question a dump.
    fn policing_change(&self, kind: u16, body: &[u8]) -> Option<Change> {
        let (ifindex, asks) = policing::asks(kind, body)?;
        let of = self.policed.iter().position(|policer| policer.ifindex == ifindex)?;
        let question = |kind: u16| [kind.to_ne_bytes(), (NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes()].concat();
        let (request, bytes) = match asks {
            Asks::Delete => (Request::DeletePolicing, question(policing::RTM_GETQDISC)),
            Asks::Add => (Request::AddPolicing, question(policing::RTM_GETQDISC)),
            Asks::Police(rates) if rates.as_ref() == Some(&self.policed[of].rates) => {
                (Request::Police, question(policing::RTM_GETTFILTER_OF))
            }
            Asks::Police(_) => (Request::PoliceOtherwise, Vec::new()),
        };
        Some(Change { at: TYPE_AT, bytes, request, of })
    }

    fn vport_change(&self, body: &[u8]) -> Option<Change> {
        let (&[command, version, _, _, i0, i1, i2, i3], attrs) = body.split_first_chunk::<OVS_HEADERS>()?;
        if version != OVS_VPORT_VERSION || u32::from_ne_bytes([i0, i1, i2, i3]) != self.dp_ifindex {
            return None;
        }
        let (request, of) = match command {
            OVS_VPORT_CMD_NEW => (Request::AddPort, self.by_name(&name_in(attrs, OVS_VPORT_ATTR_NAME)?)?),
            OVS_VPORT_CMD_DEL => {
                let port_no = Attrs(attrs).find(OVS_VPORT_ATTR_PORT_NO).ok()??.u32().ok()?;
                (Request::DeletePort, self.backers.iter().position(|b| b.port_no == port_no)?)
            }
            _ => return None,
        };
        // The attributes that NEW and DEL carry are those that GET asks by; it skips the others.
        Some(Change { at: NLMSG_HEADER, bytes: vec![OVS_VPORT_CMD_GET], request, of })
    }

    fn by_name(&self, name: &str) -> Option<usize> {
        self.backers.iter().position(|b| b.name == name)
    }
}

/// The whole message that begins at `at`, or None if there is none.
fn message_at(buffer: &[u8], at: usize) -> Option<&[u8]> {
    let rest = buffer.get(at..)?;
    let length: [u8; 4] = *rest.first_chunk()?;
    let length = u32::from_ne_bytes(length) as usize;
    (length >= NLMSG_HEADER).then(|| rest.get(..length)).flatten()
}

fn name_in(attrs: &[u8], kind: u16) -> Option<String> {
    Some(Attrs(attrs).find(kind).ok()??.string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attr::AttrBuf;
    use proptest::prelude::*;

    const FAMILY: u16 = 31;

    fn guard() -> Guard {
        let backer = |name: &str, port_no| Backer { name: name.into(), port_no };
        let backers = vec![backer("vxlan_sys_4789", 4), backer("gre_sys", 5)];
        let rates = policing::rates(&policing::tests::filter(9, 125_000)).unwrap();
        let policed = vec![Policer { name: "v1".into(), ifindex: 9, rates }];
        Guard { dp_ifindex: 7, vport_family: FAMILY, backers, policed }
    }

    fn message(kind: u16, head: &[u8], attrs: &AttrBuf) -> Vec<u8> {
        let mut m = ((NLMSG_HEADER + head.len() + attrs.as_bytes().len()) as u32).to_ne_bytes().to_vec();
        m.extend(kind.to_ne_bytes());
        m.extend([5, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
        m.extend(head);
        m.extend(attrs.as_bytes());
        m
    }

    fn vport(command: u8, ifindex: u32, attrs: &AttrBuf) -> Vec<u8> {
        let mut head = vec![command, 1, 0, 0];
        head.extend(ifindex.to_ne_bytes());
        message(FAMILY, &head, attrs)
    }

    /// As dpif_netlink_port_add__ sends it: TYPE, NAME, UPCALL_PID.
    fn add(name: &str) -> Vec<u8> {
        let mut attrs = AttrBuf::new();
        attrs.push_u32(2, 1).push_str(OVS_VPORT_ATTR_NAME, name).push_u32(5, 0);
        vport(OVS_VPORT_CMD_NEW, 7, &attrs)
    }

    fn del(port_no: u32) -> Vec<u8> {
        let mut attrs = AttrBuf::new();
        attrs.push_u32(OVS_VPORT_ATTR_PORT_NO, port_no);
        vport(OVS_VPORT_CMD_DEL, 7, &attrs)
    }

    fn dellink(name: &str) -> Vec<u8> {
        let mut attrs = AttrBuf::new();
        attrs.push_str(IFLA_IFNAME, name);
        message(RTM_DELLINK, &[0; IFINFOMSG], &attrs)
    }

    fn one(buffer: &[u8]) -> (Request, usize, Vec<u8>) {
        let changes = guard().changes(buffer);
        assert_eq!(changes.len(), 1, "{changes:?}");
        let change = &changes[0];
        let mut after = buffer.to_vec();
        after[change.at..change.at + change.bytes.len()].copy_from_slice(&change.bytes);
        (change.request, change.of, after)
    }

    #[test]
    fn adding_a_guarded_port_becomes_the_question_for_it() {
        let before = add("gre_sys");
        let (request, backer, after) = one(&before);
        assert_eq!((request, backer), (Request::AddPort, 1));
        assert_eq!(after[16], OVS_VPORT_CMD_GET);
        assert_eq!((&after[..16], &after[17..]), (&before[..16], &before[17..]));
    }

    #[test]
    fn deletions_of_port_and_device_become_questions() {
        let (request, backer, after) = one(&del(4));
        assert_eq!((request, backer, after[16]), (Request::DeletePort, 0, OVS_VPORT_CMD_GET));
        let (request, backer, after) = one(&dellink("vxlan_sys_4789"));
        assert_eq!((request, backer, after[4..6].to_vec()), (Request::DeleteDevice, 0, 18u16.to_ne_bytes().to_vec()));
    }

    fn policing(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut m = ((NLMSG_HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        m.extend(kind.to_ne_bytes());
        m.extend([5, 6, 1, 0, 0, 0, 2, 0, 0, 0]);
        m.extend(body);
        m
    }

    #[test]
    fn policing_that_is_there_is_asked_for_in_place_of_being_made_anew() {
        use policing::tests::{filter, qdisc};
        let (deletion, addition) = (policing(37, &qdisc(9)), policing(36, &qdisc(9)));
        for (before, request, kind) in [
            (deletion, Request::DeletePolicing, 38u16),
            (addition, Request::AddPolicing, 38),
            (policing(44, &filter(9, 125_000)), Request::Police, 46),
        ] {
            let (found, of, after) = one(&before);
            assert_eq!((found, of, &after[4..6]), (request, 0, &kind.to_ne_bytes()[..]));
            assert_eq!(after[6..8], 5u16.to_ne_bytes(), "no flag that makes it a dump");
            assert_eq!((&after[..4], &after[8..]), (&before[..4], &before[8..]));
        }
        let before = policing(44, &filter(9, 99));
        assert_eq!(one(&before), (Request::PoliceOtherwise, 0, before.clone()));
        assert_eq!(guard().changes(&policing(37, &qdisc(8))), []);
    }

    #[test]
    fn everything_else_is_left_alone() {
        let mut other_datapath = del(4);
        other_datapath[20] = 8;
        let mut get = add("gre_sys");
        get[16] = OVS_VPORT_CMD_GET;
        let mut newer = add("gre_sys");
        newer[17] = 2;
        for m in [add("gre_sys2"), del(6), dellink("eth0"), other_datapath, get, newer, vec![], vec![1, 2, 3]] {
            assert_eq!(guard().changes(&m), []);
        }
    }

    #[test]
    fn messages_behind_others_are_found() {
        let mut buffer = dellink("eth0");
        buffer.resize(align(buffer.len()), 0);
        let second = buffer.len();
        buffer.extend(add("gre_sys"));
        assert_eq!(guard().changes(&buffer)[0].at, second + NLMSG_HEADER);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_write_outside(mut bytes: Vec<u8>, own in any::<bool>()) {
            if own && bytes.len() > 20 {
                let length = bytes.len() as u32;
                bytes[..4].copy_from_slice(&length.to_ne_bytes());
                bytes[4..6].copy_from_slice(&FAMILY.to_ne_bytes());
                bytes[17] = OVS_VPORT_VERSION;
            }
            for change in guard().changes(&bytes) {
                prop_assert!(change.at + change.bytes.len() <= bytes.len());
            }
        }
    }
}

//! The control handle: everything that is asked of the datapath or done to it.

use std::collections::{BTreeMap, HashSet};

use nix::errno::Errno;

use super::ct_limit::{self, ZoneLimit};
use super::meter::{self, Meter, MeterFeatures};
use super::{datapath, flow, header, vport, Datapath, Execute, Flow, FlowCounts, Vport};
use crate::error::{Error, Result};
use crate::netlink::attr::AttrBuf;
use crate::netlink::{family, Protocol, Socket};

/// How often a dump of flows that the table moved under is repeated.
const FLOW_DUMP_TRIES: u32 = 5;
/// Meter ids are given out from below; after this many that are not there, there are no more.
const METER_GAP: u32 = 1024;
/// Zones in one question or one setting. The answer has to fit into one message of a page.
const ZONES_PER_MESSAGE: usize = 128;
/// Conntrack zones are u16.
const ZONES: i32 = 1 << 16;

/// Ids of the families of Open vSwitch. They change when the module is loaded again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Families {
    /// `ovs_datapath`
    pub datapath: u16,
    /// `ovs_vport`
    pub vport: u16,
    /// `ovs_flow`
    pub flow: u16,
    /// `ovs_packet`
    pub packet: u16,
    /// `ovs_meter` (kernel 4.15 or later)
    pub meter: Option<u16>,
    /// `ovs_ct_limit` (kernel 4.18 or later, with nf_conncount)
    pub ct_limit: Option<u16>,
}

impl Families {
    /// Asks the kernel; loads no module.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the datapath is not in the kernel.
    pub fn resolve() -> Result<Self> {
        Self::choose(&family::families()?)
    }

    fn choose(ids: &BTreeMap<String, u16>) -> Result<Self> {
        let id = |name: &str| ids.get(name).copied();
        let needed = |name: &str| {
            id(name).ok_or_else(|| Error::Unsupported {
                what: format!("generic netlink family {name}"),
                why: "the kernel does not have it, because the module openvswitch is not loaded".into(),
                remedy: "load it with `modprobe openvswitch`, or start Open vSwitch".into(),
            })
        };
        Ok(Self {
            datapath: needed("ovs_datapath")?,
            vport: needed("ovs_vport")?,
            flow: needed("ovs_flow")?,
            packet: needed("ovs_packet")?,
            meter: id("ovs_meter"),
            ct_limit: id("ovs_ct_limit"),
        })
    }
}

/// The control handle: one generic netlink socket and the ids of the families.
#[derive(Debug)]
pub struct Ovs {
    socket: Socket,
    families: Families,
}

impl Ovs {
    /// Opens the handle.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the datapath is not in the kernel.
    pub fn open() -> Result<Self> {
        Ok(Self { families: Families::resolve()?, socket: Socket::open(Protocol::Generic)? })
    }

    /// The ids of the families.
    pub fn families(&self) -> Families {
        self.families
    }

    /// Port id of the handle's socket.
    pub fn port_id(&self) -> u32 {
        self.socket.port_id()
    }

    /// Every datapath of the network namespace.
    ///
    /// # Errors
    /// As [`Socket::dump`]; [`Error::Malformed`].
    pub fn datapaths(&mut self) -> Result<Vec<Datapath>> {
        let body = header::build(datapath::CMD_GET, datapath::VERSION, 0, &[]);
        let answers = self.socket.dump("dump of the datapaths", self.families.datapath, &body)?;
        answers.iter().map(|payload| Datapath::parse(payload)).collect()
    }

    /// The datapath of this name, or None.
    ///
    /// # Errors
    /// As [`Socket::request`]; [`Error::Malformed`].
    pub fn datapath(&mut self, name: &str) -> Result<Option<Datapath>> {
        let what = format!("OVS_DP_CMD_GET of {name}");
        let mut attrs = AttrBuf::new();
        attrs.push_str(datapath::ATTR_NAME, name);
        let body = header::build(datapath::CMD_GET, datapath::VERSION, 0, attrs.as_bytes());
        match self.socket.request(&what, self.families.datapath, 0, &body) {
            Ok(answers) => answers.first().map(|payload| Datapath::parse(payload)).transpose(),
            Err(Error::Netlink { errno: Errno::ENODEV, .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Sets the features of a datapath and the port ids that its upcalls go to, by CPU. Features that are not repeated
    /// are switched off by the kernel, so `features` says them all; `datapath.user_features` are those it has. Without
    /// [`super::Features::DISPATCH_UPCALL_PER_CPU`] in `features` the kernel ignores the port ids.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is no port id; as [`Socket::request`].
    pub fn set_per_cpu_pids(&mut self, datapath: &Datapath, features: u32, pids: &[u32]) -> Result<()> {
        let what = format!("OVS_DP_CMD_SET of {} (upcall port ids by CPU)", datapath.name);
        if pids.is_empty() {
            return Err(Error::Unsupported {
                what,
                why: "no port id was given, and the kernel takes no empty array".into(),
                remedy: "give one for each CPU; 0 sends no upcalls".into(),
            });
        }
        let bytes: Vec<u8> = pids.iter().flat_map(|pid| pid.to_ne_bytes()).collect();
        let mut attrs = AttrBuf::new();
        attrs.push_u32(datapath::ATTR_USER_FEATURES, features);
        attrs.try_push(datapath::ATTR_PER_CPU_PIDS, &bytes)?;
        self.set_datapath(&what, datapath.ifindex, &attrs)
    }

    /// Sets the features of a datapath, all of them; the port ids stay.
    ///
    /// # Errors
    /// As [`Socket::request`].
    pub fn set_features(&mut self, datapath: &Datapath, features: u32) -> Result<()> {
        let what = format!("OVS_DP_CMD_SET of {} (features)", datapath.name);
        let mut attrs = AttrBuf::new();
        attrs.push_u32(datapath::ATTR_USER_FEATURES, features);
        self.set_datapath(&what, datapath.ifindex, &attrs)
    }

    fn set_datapath(&mut self, what: &str, ifindex: u32, attrs: &AttrBuf) -> Result<()> {
        let body = header::build(datapath::CMD_SET, datapath::VERSION, ifindex, attrs.as_bytes());
        self.socket.request(what, self.families.datapath, 0, &body).map(drop)
    }

    /// Every port of a datapath.
    ///
    /// # Errors
    /// As [`Socket::dump`] (ENODEV: no such datapath); [`Error::Malformed`].
    pub fn vports(&mut self, ifindex: u32) -> Result<Vec<Vport>> {
        let body = header::build(vport::CMD_GET, vport::VERSION, ifindex, &[]);
        let what = format!("dump of the ports of datapath {ifindex}");
        let answers = self.socket.dump(&what, self.families.vport, &body)?;
        answers.iter().map(|payload| Vport::parse(payload)).collect()
    }

    /// Sets the port ids that the upcalls of a port go to where they are dispatched per vport; the kernel chooses among
    /// them by the packet's hash.
    ///
    /// # Errors
    /// As [`Socket::request`] (ENODEV: no such port; EINVAL: no port id was given).
    pub fn set_vport_pids(&mut self, ifindex: u32, port_no: u32, pids: &[u32]) -> Result<()> {
        let what = format!("OVS_VPORT_CMD_SET of port {port_no} of datapath {ifindex} (upcall port ids)");
        let bytes: Vec<u8> = pids.iter().flat_map(|pid| pid.to_ne_bytes()).collect();
        let mut attrs = AttrBuf::new();
        attrs.push_u32(vport::ATTR_PORT_NO, port_no);
        attrs.try_push(vport::ATTR_UPCALL_PID, &bytes)?;
        let body = header::build(vport::CMD_SET, vport::VERSION, ifindex, attrs.as_bytes());
        self.socket.request(&what, self.families.vport, 0, &body).map(drop)
    }

    /// Removes a port.
    ///
    /// # Errors
    /// As [`Socket::request`] (ENODEV: no such port).
    pub fn vport_del(&mut self, ifindex: u32, port_no: u32) -> Result<()> {
        let mut attrs = AttrBuf::new();
        attrs.push_u32(vport::ATTR_PORT_NO, port_no);
        let body = header::build(vport::CMD_DEL, vport::VERSION, ifindex, attrs.as_bytes());
        let what = format!("OVS_VPORT_CMD_DEL of port {port_no} of datapath {ifindex}");
        self.socket.request(&what, self.families.vport, 0, &body).map(drop)
    }

    /// Every flow of a datapath.
    ///
    /// The kernel does not mark a dump during which it rebuilt the flow table (`ovs_flow_cmd_dump` walks buckets, and
    /// a rebuilt table hashes anew): some flows then come twice and others not at all. Such a dump is repeated; so is
    /// one that has fewer flows than the datapath counted before and after it.
    ///
    /// # Errors
    /// [`Error::IncompleteDump`] if flows came twice in every try; as [`Socket::dump`]; [`Error::Malformed`].
    pub fn flows(&mut self, ifindex: u32) -> Result<Vec<Flow>> {
        self.dump_flows(ifindex, &flow::dump_all(ifindex))
    }

    /// How often each flow of a datapath has matched. The kernel leaves keys, masks and actions out of the answer,
    /// which is most of a dump.
    ///
    /// # Errors
    /// As [`Ovs::flows`].
    pub fn flow_counts(&mut self, ifindex: u32) -> Result<FlowCounts> {
        Ok(self.dump_flows(ifindex, &flow::dump_counts(ifindex))?.into_iter().collect())
    }

    fn dump_flows(&mut self, ifindex: u32, body: &[u8]) -> Result<Vec<Flow>> {
        let what = format!("dump of the flows of datapath {ifindex}");
        for last in (1..=FLOW_DUMP_TRIES).map(|n| n == FLOW_DUMP_TRIES) {
            let before = self.flow_count(ifindex)?;
            let answers = self.socket.dump(&what, self.families.flow, body)?;
            let after = self.flow_count(ifindex)?;
            let flows = answers.iter().map(|payload| Flow::parse(payload)).collect::<Result<Vec<_>>>()?;
            // Equal counts may hide as many new flows as old ones went, so this alone is no error in the end.
            let short = before == after && (flows.len() as u64) < before;
            if has_duplicates(&flows) || (short && !last) {
                continue;
            }
            return Ok(flows);
        }
        Err(Error::IncompleteDump { what, tries: FLOW_DUMP_TRIES, why: "the flow table was rebuilt meanwhile".into() })
    }

    fn flow_count(&mut self, ifindex: u32) -> Result<u64> {
        let what = format!("OVS_DP_CMD_GET of datapath {ifindex}");
        let body = header::build(datapath::CMD_GET, datapath::VERSION, ifindex, &[]);
        let answers = self.socket.request(&what, self.families.datapath, 0, &body)?;
        let answer = answers.first().ok_or_else(|| Error::malformed(what, "no answer beside the acknowledgement"))?;
        Ok(Datapath::parse(answer)?.stats.flows)
    }

    /// Removes flows by UFID, many in a sendmsg; the errno of each, in order (ENOENT: it was not there).
    ///
    /// # Errors
    /// As [`Socket::batch`].
    pub fn flow_del_ufids(&mut self, ifindex: u32, ufids: &[[u8; 16]]) -> Result<Vec<Option<Errno>>> {
        let bodies: Vec<Vec<u8>> = ufids.iter().map(|ufid| flow::delete_ufid(ifindex, ufid)).collect();
        self.socket.batch(&format!("OVS_FLOW_CMD_DEL in datapath {ifindex}"), self.families.flow, &bodies)
    }

    /// Removes flows that have no UFID by their keys; the errno of each, in order.
    ///
    /// # Errors
    /// [`Error::Malformed`] if a key is too long, and then nothing was removed; as [`Socket::batch`].
    pub fn flow_del_keys<K: AsRef<[u8]>>(&mut self, ifindex: u32, keys: &[K]) -> Result<Vec<Option<Errno>>> {
        let bodies =
            keys.iter().map(|key| flow::delete_key(ifindex, key.as_ref())).collect::<Result<Vec<Vec<u8>>>>()?;
        self.socket.batch(&format!("OVS_FLOW_CMD_DEL in datapath {ifindex}"), self.families.flow, &bodies)
    }

    /// Applies actions to packets, many in a sendmsg; the errno of each, in order.
    ///
    /// # Errors
    /// [`Error::Malformed`] if a packet is too long, and then none was executed; as [`Socket::batch`].
    pub fn execute(&mut self, ifindex: u32, packets: &[Execute<'_>]) -> Result<Vec<Option<Errno>>> {
        let bodies = packets.iter().map(|packet| packet.build(ifindex)).collect::<Result<Vec<_>>>()?;
        self.socket.batch(&format!("OVS_PACKET_CMD_EXECUTE in datapath {ifindex}"), self.families.packet, &bodies)
    }

    /// What the datapath can do with meters; None where the kernel has none.
    ///
    /// # Errors
    /// As [`Socket::request`]; [`Error::Malformed`].
    pub fn meter_features(&mut self, ifindex: u32) -> Result<Option<MeterFeatures>> {
        let Some(family) = self.families.meter else { return Ok(None) };
        let what = format!("OVS_METER_CMD_FEATURES of datapath {ifindex}");
        let answers = self.socket.request(&what, family, 0, &meter::ask_features(ifindex))?;
        answers.first().map(|payload| meter::parse_features(payload)).transpose()
    }

    /// The meters of a datapath. The kernel has no dump of them: the ids are asked for one by one from 0 (the daemon
    /// gives out the lowest free one) until 1,024 in a row are not there.
    ///
    /// # Errors
    /// [`Error::Netlink`] for any answer but ENOENT; as [`Socket::batch`]; [`Error::Malformed`].
    pub fn meters(&mut self, ifindex: u32) -> Result<Vec<Meter>> {
        let (Some(family), Some(features)) = (self.families.meter, self.meter_features(ifindex)?) else {
            return Ok(Vec::new());
        };
        let mut meters = Vec::new();
        let mut from = 0;
        let mut end = METER_GAP.min(features.max_meters);
        while from < end {
            meters.extend(self.meters_of(family, ifindex, from..end)?);
            let highest = meters.last().map_or(0, |m: &Meter| m.id);
            (from, end) = (end, highest.saturating_add(METER_GAP).min(features.max_meters));
        }
        Ok(meters)
    }

    /// Those of these meters that are there.
    fn meters_of(&mut self, family: u16, ifindex: u32, ids: impl IntoIterator<Item = u32>) -> Result<Vec<Meter>> {
        let what = format!("OVS_METER_CMD_GET in datapath {ifindex}");
        let bodies: Vec<Vec<u8>> = ids.into_iter().map(|id| meter::ask(ifindex, id)).collect();
        let mut meters = Vec::new();
        for answer in self.socket.exchange(&what, family, 0, &bodies)? {
            match answer.errno {
                None => meters.extend(answer.payloads.first().map(|p| Meter::parse(p)).transpose()?),
                Some(Errno::ENOENT) => {}
                Some(errno) => return Err(Error::Netlink { what, errno, text: answer.text }),
            }
        }
        Ok(meters)
    }

    /// Is one of these meters there?
    ///
    /// # Errors
    /// As [`Ovs::meters`].
    pub fn has_meters(&mut self, ifindex: u32, ids: &[u32]) -> Result<bool> {
        let Some(family) = self.families.meter else { return Ok(false) };
        Ok(!self.meters_of(family, ifindex, ids.iter().copied())?.is_empty())
    }

    /// Deletes the meters whose slots in the kernel's table an ovs-vswitchd needs when it starts: it sets two meters with
    /// ids of its own to find out whether meters work, and without a slot for them it goes without meters. Packets of a
    /// deleted meter's flows pass unmetered until it is set again. Returns how many there were.
    ///
    /// # Errors
    /// As [`Ovs::meters`].
    pub fn make_room_for_probes(&mut self, ifindex: u32) -> Result<usize> {
        let (Some(family), Some(features)) = (self.families.meter, self.meter_features(ifindex)?) else { return Ok(0) };
        let there = self.meters_of(family, ifindex, meter::in_place_of_probes(features.max_meters))?;
        let what = format!("OVS_METER_CMD_DEL in datapath {ifindex}");
        for meter in &there {
            self.socket.request(&what, family, 0, &meter::delete(ifindex, meter.id))?;
        }
        Ok(there.len())
    }

    /// The connection limits of the conntrack zones, the default ([`super::DEFAULT_ZONE`]) among them. Empty where the
    /// kernel has none.
    ///
    /// # Errors
    /// As [`Socket::request`]; [`Error::Malformed`].
    pub fn ct_limits(&mut self) -> Result<Vec<ZoneLimit>> {
        let Some(family) = self.families.ct_limit else { return Ok(Vec::new()) };
        let what = "OVS_CT_LIMIT_CMD_GET";
        match self.socket.request(what, family, 0, &ct_limit::ask_all()) {
            Ok(answers) => Ok(answers.first().map(|p| ct_limit::parse(p)).transpose()?.unwrap_or_default()),
            // The kernel answers with a single message of a page: some 300 zones.
            Err(Error::Netlink { errno: Errno::EMSGSIZE, .. }) => self.ct_limits_by_zone(family),
            Err(e) => Err(e),
        }
    }

    /// Asks for every zone there can be. A zone without a limit of its own answers with the default, so one whose own
    /// limit equals the default is not told apart; it means the same.
    fn ct_limits_by_zone(&mut self, family: u16) -> Result<Vec<ZoneLimit>> {
        let what = "OVS_CT_LIMIT_CMD_GET of every zone";
        let bodies: Vec<Vec<u8>> = (super::DEFAULT_ZONE..ZONES)
            .step_by(ZONES_PER_MESSAGE)
            .map(|from| ct_limit::ask(from..(from + ZONES_PER_MESSAGE as i32).min(ZONES)))
            .collect();
        let mut limits = Vec::new();
        for answer in self.socket.exchange(what, family, 0, &bodies)? {
            if let Some(errno) = answer.errno {
                return Err(Error::Netlink { what: what.into(), errno, text: answer.text });
            }
            limits.extend(answer.payloads.first().map(|p| ct_limit::parse(p)).transpose()?.unwrap_or_default());
        }
        let default = limits.iter().find(|l| l.zone == super::DEFAULT_ZONE).map_or(0, |l| l.limit);
        limits.retain(|l| l.zone == super::DEFAULT_ZONE || l.limit != default);
        Ok(limits)
    }

    /// Sets connection limits; counts are the kernel's.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel has none; as [`Socket::request`].
    pub fn set_ct_limits(&mut self, limits: &[ZoneLimit]) -> Result<()> {
        let family = self.ct_limit_family("OVS_CT_LIMIT_CMD_SET")?;
        for part in limits.chunks(ZONES_PER_MESSAGE) {
            self.socket.request("OVS_CT_LIMIT_CMD_SET", family, 0, &ct_limit::set(part))?;
        }
        Ok(())
    }

    /// Removes the connection limits of zones.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel has none; as [`Socket::request`].
    pub fn remove_ct_limits(&mut self, zones: &[i32]) -> Result<()> {
        let family = self.ct_limit_family("OVS_CT_LIMIT_CMD_DEL")?;
        for part in zones.chunks(ZONES_PER_MESSAGE) {
            self.socket.request("OVS_CT_LIMIT_CMD_DEL", family, 0, &ct_limit::remove(part))?;
        }
        Ok(())
    }

    fn ct_limit_family(&self, what: &str) -> Result<u16> {
        self.families.ct_limit.ok_or_else(|| Error::Unsupported {
            what: what.into(),
            why: "the kernel has no family ovs_ct_limit, because it is older than 4.18 or has no nf_conncount".into(),
            remedy: "load nf_conncount before openvswitch, or leave zone limits alone".into(),
        })
    }
}

fn has_duplicates(flows: &[Flow]) -> bool {
    let mut seen: HashSet<(&[u8], &[u8])> = HashSet::with_capacity(flows.len());
    !flows.iter().all(|flow| match &flow.ufid {
        Some(ufid) => seen.insert((ufid, &[])),
        None => seen.insert((&flow.key, &flow.mask)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_that_came_later_may_be_missing_and_the_first_four_not() {
        let names = ["ovs_datapath", "ovs_vport", "ovs_flow", "ovs_packet"];
        let mut ids: BTreeMap<String, u16> = names.iter().zip(30..).map(|(name, id)| (name.to_string(), id)).collect();
        let families = Families::choose(&ids).unwrap();
        assert_eq!((families.datapath, families.packet, families.meter, families.ct_limit), (30, 33, None, None));
        ids.remove("ovs_flow");
        let error = Families::choose(&ids).unwrap_err().to_string();
        assert!(error.contains("ovs_flow") && error.contains("modprobe openvswitch"), "{error}");
    }

    #[test]
    fn a_flow_that_came_twice_is_seen() {
        let flow = |ufid: Option<u8>, key: u8, mask: u8| Flow {
            ufid: ufid.map(|n| [n; 16]),
            key: vec![key],
            mask: vec![mask],
            ..Default::default()
        };
        assert!(!has_duplicates(&[flow(Some(1), 1, 1), flow(Some(2), 1, 1), flow(None, 1, 1), flow(None, 1, 2)]));
        assert!(has_duplicates(&[flow(Some(1), 1, 1), flow(Some(2), 2, 1), flow(Some(1), 3, 1)]));
        assert!(has_duplicates(&[flow(None, 1, 1), flow(None, 1, 1)]));
    }
}

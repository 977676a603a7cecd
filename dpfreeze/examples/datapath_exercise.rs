//! Exercises the control handle on a real datapath; run by hand or by a VM scenario, as root.
//!
//! `datapath_exercise show|flows|snapshot|diff A B|delete|rebind|limits|policies|execute|keys|vport-del NAME`

use std::error::Error;
use std::time::Instant;

use dpfreeze::conntrack::{create_timeout_policy, delete_timeout_policy, timeout_policies};
use dpfreeze::netlink::table;
use dpfreeze::ovs::{Datapath, Execute, Ovs, ZoneLimit, DEFAULT_ZONE};
use dpfreeze::snapshot::{capture, compare, Snapshot};

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["diff", before, after] = words[..] {
        return diff(before, after);
    }
    let mut ovs = Ovs::open()?;
    match words[..] {
        ["show"] => show(&mut ovs),
        ["flows"] => flows(&mut ovs),
        ["snapshot"] => Ok(serde_json::to_writer(std::io::stdout(), &capture(&mut ovs)?)?),
        ["delete"] => delete(&mut ovs),
        ["rebind"] => rebind(&mut ovs),
        ["limits"] => limits(&mut ovs),
        ["policies"] => policies(),
        ["execute"] => execute(&mut ovs),
        ["keys"] => keys(&mut ovs),
        ["vport-del", name] => vport_del(&mut ovs, name),
        _ => {
            Err("usage: show|flows|snapshot|diff A B|delete|rebind|limits|policies|execute|keys|vport-del NAME".into())
        }
    }
}

fn the_datapath(ovs: &mut Ovs) -> Result<Datapath, Box<dyn Error>> {
    Ok(ovs.datapath("ovs-system")?.ok_or("there is no datapath ovs-system")?)
}

fn show(ovs: &mut Ovs) -> Outcome {
    println!("{:?}", ovs.families());
    println!("no such datapath: {:?}", ovs.datapath("no-such")?);
    for datapath in ovs.datapaths()? {
        println!("{datapath:?} {:?} {:?}", datapath.features(), datapath.dispatch());
        for vport in ovs.vports(datapath.ifindex)? {
            println!("  port {}: {} {:?} {vport:?}", vport.port_no, vport.name, vport.kind());
        }
        println!("  {:?} {:?}", ovs.meter_features(datapath.ifindex)?, ovs.meters(datapath.ifindex)?);
        let rows = table::read()?;
        for pid in datapath.cpu_port_ids() {
            println!("  upcalls to {:?}", rows.iter().find(|row| row.protocol == 16 && row.port_id == *pid));
        }
    }
    println!("{:?}", ovs.ct_limits()?);
    Ok(())
}

/// One line a flow, as `ovs-dpctl dump-flows -m` has them: ufid, packets, bytes.
fn flows(ovs: &mut Ovs) -> Outcome {
    let datapath = the_datapath(ovs)?;
    let started = Instant::now();
    let flows = ovs.flows(datapath.ifindex)?;
    eprintln!("{} flows in {:?}", flows.len(), started.elapsed());
    for flow in flows {
        println!("{} packets:{} bytes:{} unknown:{}", flow.name(), flow.packets, flow.bytes, flow.unknown.len());
    }
    Ok(())
}

fn diff(before: &str, after: &str) -> Outcome {
    let read = |path| -> Result<Snapshot, Box<dyn Error>> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    for difference in compare(&read(before)?, &read(after)?) {
        println!("{difference}");
    }
    Ok(())
}

fn delete(ovs: &mut Ovs) -> Outcome {
    let datapath = the_datapath(ovs)?;
    let mut ufids: Vec<[u8; 16]> = ovs.flows(datapath.ifindex)?.iter().filter_map(|flow| flow.ufid).collect();
    // One that is not there, in the middle, must fail alone and in its place.
    let absent = ufids.len() / 2;
    ufids.insert(absent, [0xee; 16]);
    let started = Instant::now();
    let results = ovs.flow_del_ufids(datapath.ifindex, &ufids)?;
    let took = started.elapsed();
    let failed: Vec<_> = results.iter().enumerate().filter_map(|(i, e)| e.map(|e| (i, e))).collect();
    println!("deleted {} in {took:?}, absent at {absent}, failed {failed:?}", ufids.len() - 1);
    println!("left {}", ovs.flows(datapath.ifindex)?.len());
    Ok(())
}

fn rebind(ovs: &mut Ovs) -> Outcome {
    let datapath = the_datapath(ovs)?;
    ovs.set_per_cpu_pids(&datapath, datapath.user_features, &vec![ovs.port_id(); datapath.cpu_port_ids().len()])?;
    let ours = the_datapath(ovs)?;
    ovs.set_per_cpu_pids(&datapath, datapath.user_features, datapath.cpu_port_ids())?;
    let back = the_datapath(ovs)?;
    println!("bound {:?}", ours.cpu_port_ids() == vec![ovs.port_id(); datapath.cpu_port_ids().len()]);
    println!("back {:?}", back.per_cpu_pids == datapath.per_cpu_pids && back.user_features == datapath.user_features);
    Ok(())
}

fn limits(ovs: &mut Ovs) -> Outcome {
    println!("before {:?}", ovs.ct_limits()?);
    let few: Vec<ZoneLimit> = (1..=3).map(|zone| ZoneLimit { zone, limit: 10 * zone as u32, count: 0 }).collect();
    ovs.set_ct_limits(&few)?;
    println!("few {:?}", ovs.ct_limits()?);
    let many: Vec<ZoneLimit> = (0..2000).map(|zone| ZoneLimit { zone: zone * 32, limit: 7, count: 0 }).collect();
    ovs.set_ct_limits(&many)?;
    let started = Instant::now();
    let read = ovs.ct_limits()?;
    println!("many {} in {:?}, {:?}", read.len(), started.elapsed(), read.iter().find(|l| l.zone == DEFAULT_ZONE));
    ovs.remove_ct_limits(&many.iter().map(|l| l.zone).collect::<Vec<_>>())?;
    println!("removed {:?}", ovs.ct_limits()?);
    ovs.remove_ct_limits(&[1, 2, 3])?;
    println!("after {:?}", ovs.ct_limits()?);
    Ok(())
}

fn policies() -> Outcome {
    let found = timeout_policies()?;
    for policy in &found {
        println!("{policy:?} {:?}", policy.timeouts()?);
    }
    let mut copy = found.first().ok_or("there is no timeout policy")?.clone();
    copy.name = "ovsg_exercise".into();
    create_timeout_policy(&copy)?;
    println!("again {:?}", create_timeout_policy(&copy).map_err(|e| e.to_string()));
    let made = timeout_policies()?.into_iter().find(|p| p.name == copy.name).ok_or("not made")?;
    println!("same {}", made.same_meaning(&copy));
    delete_timeout_policy(&copy.name)?;
    println!("gone {:?}", delete_timeout_policy(&copy.name).map_err(|e| e.to_string()));
    println!("left {}", timeout_policies()?.len() == found.len());
    Ok(())
}

/// Executes packets with a recirculation into the flow table, good ones and a malformed one between them.
fn execute(ovs: &mut Ovs) -> Outcome {
    let datapath = the_datapath(ovs)?;
    let mut packet = vec![0xff; 12];
    packet.extend_from_slice(&[0x12, 0x35]);
    packet.resize(60, 0);
    // OVS_KEY_ATTR_IN_PORT 3 = port 0, OVS_KEY_ATTR_ETHERNET 4, OVS_KEY_ATTR_ETHERTYPE 6
    let mut key = dpfreeze::netlink::attr::AttrBuf::new();
    key.push_u32(3, 0).push(4, &[0xff; 12]).push(6, &[0x12, 0x35]);
    // OVS_ACTION_ATTR_RECIRC 7, id 0
    let mut recirculate = dpfreeze::netlink::attr::AttrBuf::new();
    recirculate.push_u32(7, 0);
    let good = Execute {
        packet: &packet,
        key: key.as_bytes(),
        actions: recirculate.as_bytes(),
        mru: None,
        hash: Some(1 << 32 | 5),
    };
    let bad = Execute { actions: &[8, 0, 0x7f, 0, 0, 0, 0, 0], ..good };
    let many: Vec<Execute<'_>> = (0..300).map(|i| if i == 150 { bad } else { good }).collect();
    let started = Instant::now();
    let results = ovs.execute(datapath.ifindex, &many)?;
    let failed: Vec<_> = results.iter().enumerate().filter_map(|(i, e)| e.map(|e| (i, e))).collect();
    println!("executed {} in {:?}, failed {failed:?}", results.len(), started.elapsed());
    let after = the_datapath(ovs)?;
    let touched = |d: &Datapath| d.stats.hit + d.stats.missed;
    println!("seen {}", touched(&after) - touched(&datapath));
    Ok(())
}

/// Removes the flows that have no UFID, by their keys.
fn keys(ovs: &mut Ovs) -> Outcome {
    let datapath = the_datapath(ovs)?;
    let before = ovs.flows(datapath.ifindex)?;
    let mut keys: Vec<Vec<u8>> = before.iter().filter(|f| f.ufid.is_none()).map(|f| f.key.clone()).collect();
    println!("{} flows, {} without UFID", before.len(), keys.len());
    keys.push(Vec::new());
    println!("removed {:?}", ovs.flow_del_keys(datapath.ifindex, &keys)?);
    println!("left {}", ovs.flows(datapath.ifindex)?.len());
    Ok(())
}

fn vport_del(ovs: &mut Ovs, name: &str) -> Outcome {
    let datapath = the_datapath(ovs)?;
    let vports = ovs.vports(datapath.ifindex)?;
    let port_no = vports.iter().find(|v| v.name == name).ok_or("no such port")?.port_no;
    ovs.vport_del(datapath.ifindex, port_no)?;
    println!("again: {:?}", ovs.vport_del(datapath.ifindex, port_no).map_err(|e| e.to_string()));
    println!("left: {}", ovs.vports(datapath.ifindex)?.iter().all(|v| v.name != name));
    ovs.set_features(&datapath, datapath.user_features & !1)?;
    println!("features {} {:?}", datapath.user_features, the_datapath(ovs)?.user_features);
    println!("pids stay {}", the_datapath(ovs)?.per_cpu_pids == datapath.per_cpu_pids);
    ovs.set_features(&datapath, datapath.user_features)?;
    println!("refused: {:?}", ovs.set_features(&datapath, 1 << 31).map_err(|e| e.to_string()));
    Ok(())
}

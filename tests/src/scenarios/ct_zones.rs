//! Zones as an operator's tool may leave them: one without a policy, and all that there can be, with one policy between
//! them. `ct show` tells them; a run takes them, or is undone where the daemon needs longer for them than a phase may
//! take. Nothing is lost either way.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};

use super::{aftermath, network, plain, Custom};
use crate::command::{shell, shell_lenient};
use crate::guest::{facts, say};
use crate::outcome::{Job, Outcome};

/// See the module.
pub struct CtZones;

/// All there can be.
const ZONES: usize = 65_536;
/// The one without a policy.
const BARE: usize = 77;

impl Custom for CtZones {
    fn name(&self) -> &'static str {
        "ct_zones"
    }

    fn by_hand(&self) -> bool {
        true
    }

    fn about(&self) -> &'static str {
        "65,536 conntrack zones, one of them without a policy"
    }

    fn run(&self, _job: &Job, out: &Path, outcome: &mut Outcome) -> Result<()> {
        plain::set_up()?;
        network::patient_veth()?;
        shell("ovs-vsctl -- --id=@d create Datapath datapath_version=0 -- set open_vswitch . datapaths:system=@d")?;
        say("making the zones");
        make_zones()?;
        shell("ovs-vsctl --timeout=120 set open_vswitch . external_ids:lab=waited")?;
        let shown = shell_lenient("ovs-graceful ct show --json");
        let zones = serde_json::from_str::<Value>(&shown).ok().and_then(|all| Some(all["zones"].as_array()?.len()));
        outcome.check("ct show tells every zone", zones == Some(ZONES), json!([zones, shown.len()]));
        let live = plain::start_probes()?;
        std::thread::sleep(Duration::from_secs(2));
        let before = facts::daemons("ovs-vswitchd");
        let begun = Instant::now();
        let log = out.join("run");
        let exit = shell_lenient(&format!("timeout 240 ovs-graceful restart > {} 2>&1; echo exit=$?", log.display()));
        outcome.note("seconds", begun.elapsed().as_secs());
        let said = shell_lenient(&format!("cat {}", log.display()));
        // An emulated ovs-vswitchd needs minutes for so many after ovsdb-server was restarted, stock or ours, and answers
        // nobody meanwhile.
        let busy = said.contains("busy configuring") || said.contains("no answer in time");
        let late = exit.trim() == "exit=20" && busy;
        outcome.check("done, or undone and said why", late || exit.trim() == "exit=0", json!([exit.trim(), said]));
        let same = facts::daemons("ovs-vswitchd") == before;
        outcome.check("the right ovs-vswitchd", same == late, &before);
        shell("ovs-vsctl --timeout=300 set open_vswitch . external_ids:lab=again")?;
        let diff = shell_lenient("ovs-graceful ct diff; echo exit=$?");
        outcome.check("ct diff: nothing", diff.contains("exit=0"), diff.chars().take(400).collect::<String>());
        aftermath::nothing_left("zones", outcome);
        aftermath::new_traffic_passes("zones", outcome);
        aftermath::no_unit_failed(outcome);
        aftermath::finish("zones", live, false, outcome).map(drop)
    }
}

/// One transaction (RFC 7047) over the database's socket: `ovs-vsctl` takes no command of this length.
fn make_zones() -> Result<()> {
    let policy = json!({"op": "insert", "table": "CT_Timeout_Policy", "uuid-name": "p",
        "row": {"timeouts": ["map", [["udp_single", 205], ["udp_multiple", 305]]]}});
    let mut operations = vec![json!("Open_vSwitch"), policy];
    let name = |zone: usize| format!("z{zone}");
    operations.extend((0..ZONES).map(|zone| {
        let row = if zone == BARE { json!({}) } else { json!({"timeout_policy": ["named-uuid", "p"]}) };
        json!({"op": "insert", "table": "CT_Zone", "uuid-name": name(zone), "row": row})
    }));
    let pairs: Vec<Value> = (0..ZONES).map(|zone| json!([zone, ["named-uuid", name(zone)]])).collect();
    operations.push(json!({"op": "update", "table": "Datapath", "where": [], "row": {"ct_zones": ["map", pairs]}}));
    let request = json!({"id": 1, "method": "transact", "params": operations}).to_string();
    let mut stream = UnixStream::connect("/run/openvswitch/db.sock").context("db.sock")?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 65_536];
    loop {
        let count = stream.read(&mut chunk).context("the answer of ovsdb-server")?;
        answer.extend_from_slice(chunk.get(..count).unwrap_or_default());
        // Not each time: it has megabytes.
        let may_be_all = answer.last() == Some(&b'}');
        if let Some(answer) = may_be_all.then(|| serde_json::from_slice::<Value>(&answer).ok()).flatten() {
            let failed = answer["result"].as_array().into_iter().flatten().find(|result| result.get("error").is_some());
            stream.shutdown(Shutdown::Both)?;
            return match failed {
                Some(failed) => bail!("ovsdb-server refused the zones: {failed}"),
                None => Ok(()),
            };
        }
        if count == 0 {
            bail!("ovsdb-server hung up");
        }
    }
}

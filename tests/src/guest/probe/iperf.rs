//! iperf3 over one TCP connection: the traffic that others measure networks with, in packets of many segments (GSO).

use std::fs::File;
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Place, Running};
use crate::command::wait_until;
use crate::outcome::{IperfOutcome, ProbeOutcome};

/// Where the client's JSON goes.
const RESULT: &str = "/run/lab-iperf3.json";
/// How long it may run: longer than any scenario.
const SECONDS: &str = "3600";
/// How long it may take to end once it is told to.
const PATIENCE: Duration = Duration::from_secs(20);

/// A measurement under way.
pub struct Iperf {
    client: Mutex<Child>,
    server: Child,
}

fn iperf3(place: &Place, arguments: &[&str]) -> Command {
    let mut command = match place {
        Place::Host => Command::new("iperf3"),
        Place::Namespace(name) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", name, "iperf3"]);
            command
        }
    };
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
    command
}

/// Sends `bits_per_second` from `from` to `address` in `to`.
pub fn start(from: &Place, to: &Place, address: IpAddr, bits_per_second: u64) -> Result<Iperf> {
    let mut server = iperf3(to, &["-s", "-1"]).stdout(Stdio::null()).spawn().context("cannot start iperf3")?;
    let (address, rate) = (address.to_string(), bits_per_second.to_string());
    let mut client = None;
    let connect = || {
        let arguments = ["-c", &address, "-b", &rate, "-t", SECONDS, "-i", "0.5", "--json"];
        let Ok(result) = File::create(RESULT) else { return false };
        let Ok(mut begun) = iperf3(from, &arguments).stdout(result).spawn() else { return false };
        // Until the server listens the client ends at once.
        std::thread::sleep(Duration::from_millis(500));
        let lives = matches!(begun.try_wait(), Ok(None));
        client = lives.then_some(begun);
        lives
    };
    let connected = wait_until("iperf3 has connected", PATIENCE, Duration::from_millis(200), connect);
    match (connected, client) {
        (Ok(()), Some(client)) => Ok(Iperf { client: Mutex::new(client), server }),
        (result, _) => {
            let _ = server.kill();
            Err(result.err().unwrap_or(anyhow!("iperf3 has not connected")))
        }
    }
}

/// What the client tells of every half second.
fn outcome(told: &Value) -> IperfOutcome {
    let intervals = told["intervals"].as_array().map_or(&[][..], Vec::as_slice);
    let mut outcome = IperfOutcome::default();
    let (mut silent, mut longest) = (0.0, 0.0_f64);
    for sum in intervals.iter().map(|interval| &interval["sum"]) {
        let (bytes, seconds) = (sum["bytes"].as_u64().unwrap_or(0), sum["seconds"].as_f64().unwrap_or(0.0));
        outcome.bytes += bytes;
        outcome.retransmitted += sum["retransmits"].as_u64().unwrap_or(0);
        outcome.seconds += seconds;
        silent = if bytes == 0 { silent + seconds } else { 0.0 };
        longest = longest.max(silent);
    }
    outcome.longest_silent_ms = longest * 1e3;
    // It was told to end.
    outcome.error = told["error"].as_str().filter(|error| !error.starts_with("interrupt")).map(str::to_owned);
    outcome
}

impl Running for Iperf {
    fn finish(self: Box<Self>) -> Result<ProbeOutcome> {
        let Iperf { client, mut server } = *self;
        let mut client = client.into_inner().map_err(|_| anyhow!("iperf3 was left by a thread that panicked"))?;
        // `ip netns exec` becomes the program that it runs.
        kill(Pid::from_raw(i32::try_from(client.id())?), Signal::SIGINT)?;
        let told = Instant::now();
        while client.try_wait()?.is_none() {
            if told.elapsed() > PATIENCE {
                client.kill()?;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = server.kill();
        let _ = server.wait();
        let text = std::fs::read_to_string(RESULT)?;
        let told = serde_json::from_str(&text).with_context(|| format!("iperf3 has said {text:?}"))?;
        Ok(ProbeOutcome::Iperf(outcome(&told)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn intervals_are_summed_up() {
        let interval =
            |bytes, retransmits| json!({ "sum": { "bytes": bytes, "retransmits": retransmits, "seconds": 0.5 } });
        let told = json!({
            "intervals": [interval(10, 0), interval(0, 1), interval(0, 2), interval(7, 0), interval(0, 0)],
            "error": "interrupt - the client has terminated",
        });
        let found = outcome(&told);
        assert_eq!((found.bytes, found.retransmitted, found.longest_silent_ms), (17, 3, 1000.0));
        assert_eq!((found.seconds, found.error), (2.5, None));
        assert_eq!(outcome(&json!({ "error": "unable to connect" })).error.as_deref(), Some("unable to connect"));
    }
}

//! The machine where every run begins: booted, both daemons of Open vSwitch up, none of our files in it, waiting for its
//! input. Kept once for each image as qemu's migration stream, so that no run boots. Where it cannot be kept, runs boot.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};

use crate::command::{run, wait_until};
use crate::image::Image;
use crate::places;
use crate::vm::{empty_disks, machine, KERNEL_ARGS, MACHINE};

/// A boot takes 10 s, five times as long on a slow machine.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// Writing two GiB at most.
const KEEP_LIMIT: Duration = Duration::from_secs(120);
/// What the guest says when it is there (`image/lab-run.sh`).
const THERE: &str = "lab: warm";

/// A machine that was kept.
#[derive(Debug)]
pub struct Warm {
    /// Its disk as it was then.
    pub disk: PathBuf,
    state: PathBuf,
}

impl Warm {
    /// For qemu's `-incoming`.
    pub fn incoming(&self) -> String {
        format!("exec:cat '{}'", self.state.display())
    }
}

/// The machine kept for `image` under this `qemu`, making it if there is none.
pub fn ensure(image: &Image, qemu: &str) -> Result<Option<Warm>> {
    let mut hasher = DefaultHasher::new();
    (qemu, MACHINE, KERNEL_ARGS).hash(&mut hasher);
    let folder = image.disk.with_file_name(format!("warm-{:016x}", hasher.finish()));
    let warm = Warm { disk: folder.join("disk.ext4"), state: folder.join("state") };
    let _lock = places::lock(&folder.with_extension("lock"), "that machine is being booted")?;
    let (complete, refused) = (folder.join("complete"), folder.join("refused"));
    if complete.exists() || refused.exists() {
        return Ok(complete.exists().then_some(warm));
    }
    println!("lab: booting once for all runs with {}", image.suite);
    fs::create_dir_all(&folder)?;
    match keep(image, &warm) {
        Ok(()) => {
            fs::write(complete, "")?;
            Ok(Some(warm))
        }
        Err(error) => {
            eprintln!(
                "lab: the machine cannot be kept, every run boots (remove {} to try again): {error:#}",
                refused.display()
            );
            fs::write(refused, format!("{error:#}\n"))?;
            Ok(None)
        }
    }
}

fn keep(image: &Image, warm: &Warm) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let [input, output, console, control] =
        ["in.tar", "out.raw", "console", "qmp"].map(|name| scratch.path().join(name));
    run(Command::new("cp").arg("--sparse=always").arg(&image.disk).arg(&warm.disk))?;
    empty_disks(&input, &output)?;
    let disk = format!("file={},if=virtio,format=raw,cache=unsafe", warm.disk.display());
    let mut command = machine(image, false, &disk, &input, &output, &console);
    command.args(["-append", KERNEL_ARGS, "-qmp"]).arg(format!("unix:{},server=on,wait=off", control.display()));
    command.stderr(File::create(scratch.path().join("stderr"))?);
    let mut qemu = command.spawn().context("cannot start qemu")?;
    let kept = stop_there(&mut qemu, &console, &control, &warm.state);
    // Whatever came of it, it is of no more use.
    let _already_gone = qemu.kill();
    let _already_known = qemu.wait();
    kept
}

fn stop_there(qemu: &mut Child, console: &Path, control: &Path, state: &Path) -> Result<()> {
    let said = || String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).contains(THERE);
    wait_until("the guest is where runs begin", BOOT_LIMIT, Duration::from_millis(100), || {
        said() || !matches!(qemu.try_wait(), Ok(None))
    })?;
    if !said() {
        bail!("qemu ended before the guest was up");
    }
    let mut control = Control::connect(control)?;
    control.call("qmp_capabilities", &json!({}))?;
    control.call("migrate-set-parameters", &json!({ "max-bandwidth": 8u64 << 30 }))?;
    control.call("migrate", &json!({ "uri": format!("exec:cat > '{}'", state.display()) }))?;
    let mut last = Value::Null;
    wait_until("qemu has written the machine's state", KEEP_LIMIT, Duration::from_millis(100), || {
        last = control.call("query-migrate", &json!({})).unwrap_or_default();
        matches!(last["status"].as_str(), Some("completed" | "failed") | None)
    })?;
    if last["status"] != "completed" {
        bail!("qemu did not write the machine's state: {last}");
    }
    // Or `cat` may be killed with the last bytes in its pipe.
    control.call("quit", &json!({}))?;
    qemu.wait()?;
    Ok(())
}

/// qemu's machine protocol (QMP): a line of JSON each way, with events in between.
struct Control {
    lines: BufReader<UnixStream>,
}

impl Control {
    fn connect(path: &Path) -> Result<Control> {
        let stream = UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Control { lines: BufReader::new(stream) })
    }

    fn call(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        self.lines.get_mut().write_all(format!("{line}\n").as_bytes())?;
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line)? == 0 {
                bail!("qemu hung up on {command}");
            }
            let answer: Value = serde_json::from_str(&line).context("qemu's answer")?;
            match (answer.get("error"), answer.get("return")) {
                (Some(error), _) => bail!("qemu refused {command}: {error}"),
                (None, Some(value)) => return Ok(value.clone()),
                // Its greeting, or an event.
                (None, None) => {}
            }
        }
    }
}

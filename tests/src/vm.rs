//! One VM from boot, or from where every run begins ([`crate::warm`]), to power-off: input as a tar on the second disk,
//! output as a tar on the third.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::command::{capture, run};
use crate::image::Image;
use crate::places;
use crate::warm::{self, Warm};

const QEMU: &str = "qemu-system-x86_64";
/// Size of the input disk, the same for all: a machine that goes on has the disks that it was kept with.
const INPUT_BYTES: u64 = 256 << 20;
/// Room for what a scenario brings back.
const OUTPUT_BYTES: u64 = 512 << 20;
/// The machine. Two CPUs, as the machines have that the lab runs on; without what TCG is slow at: with `-cpu max`
/// (XSAVE, AVX) a run takes a third longer. With AES a kernel takes PCLMULQDQ for granted: the one without the other
/// killed the test of aesni_intel, and every later user of the kernel's crypto waited for it.
pub const MACHINE: &str = "-machine q35 -accel tcg,thread=multi \
    -cpu qemu64,+rdrand,+rdseed,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+cx16,+fsgsbase,+bmi1,+bmi2,+invtsc \
    -smp 2 -m 2048 -display none -monitor none -no-reboot -nic none";
/// The CPUs of [`MACHINE`], in qemu's words.
pub const CPUS: &str = "2";
/// The kernel's command line.
pub const KERNEL_ARGS: &str = "console=ttyS0 root=/dev/vda rw quiet panic=-1 tsc=reliable mitigations=off";

/// What is asked of a VM.
#[derive(Debug)]
pub struct Boot<'a> {
    /// What to boot.
    pub image: &'a Image,
    /// Folder that the guest finds as `/lab`.
    pub input: &'a Path,
    /// Folder that receives what the guest leaves in `/out`, and `console`.
    pub output: &'a Path,
    /// More words for the kernel's command line; with any the machine boots.
    pub kernel_args: &'a str,
    /// Its CPUs in the words of qemu's `-smp`; with others than [`CPUS`] the machine boots.
    pub cpus: &'a str,
    /// Whether the guest may boot again; else a reset is the end.
    pub reboots: bool,
    /// When to give up.
    pub limit: Duration,
}

/// How a VM ended that did not fail as a machine.
#[derive(Debug)]
pub struct Ran {
    /// `qemu-system-x86_64 --version`, first line.
    pub qemu: String,
    /// From power-on to power-off.
    pub seconds: f64,
}

/// The machine itself failed: never a pass and never a loss.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A panic of the guest's kernel, its line on the console.
    #[error("the guest's kernel panicked (a lab error, neither pass nor loss): {0}")]
    Panic(String),
    /// qemu was ended by a signal of its own, such as an assertion of its (10.0.2 has one in `iotlb_to_section`).
    #[error("{QEMU} broke down (a lab error, neither pass nor loss): {0}")]
    Qemu(String),
}

/// The version line of qemu, and its major number.
pub fn qemu_version() -> Result<(String, u32)> {
    let text = capture(Command::new(QEMU).arg("--version"))
        .context("no usable qemu: install qemu-system-x86 (tests/demo and tests/all do)")?;
    let line = text.lines().next().unwrap_or_default().to_owned();
    let digits = line.split("version ").nth(1).unwrap_or_default();
    let major = digits.split('.').next().and_then(|d| d.parse().ok()).unwrap_or(0);
    Ok((line, major))
}

/// Boots, waits for the end, unpacks the output. A machine that breaks down is tried once more.
pub fn boot(job: &Boot) -> Result<Ran> {
    let first = boot_once(job);
    match first {
        Err(error) if error.is::<Broken>() => {
            eprintln!("lab: {error:#}; once more");
            fs::rename(job.output.join("console"), job.output.join("console-of-the-first"))?;
            boot_once(job)
        }
        other => other,
    }
}

fn boot_once(job: &Boot) -> Result<Ran> {
    let (qemu, major) = qemu_version()?;
    if major < 10 {
        eprintln!("lab: {qemu}: older than 10, newer guest kernels may panic under it");
    }
    fs::create_dir_all(job.output)?;
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    let input = scratch.path().join("in.tar");
    let output = scratch.path().join("out.raw");
    run(Command::new("tar").arg("cf").arg(&input).arg("-C").arg(job.input).arg("."))?;
    empty_disks(&input, &output)?;
    let console = job.output.join("console");
    let warm = match (job.kernel_args, job.cpus) {
        ("", CPUS) => warm::ensure(job.image, &qemu)?,
        _ => None,
    };
    let started = Instant::now();
    let mut child = start(job, warm.as_ref(), &input, &output, &console)?;
    let end = wait(&mut child, &console, job.limit);
    let seconds = started.elapsed().as_secs_f64();
    end?;
    run(Command::new("tar").arg("xf").arg(&output).arg("-C").arg(job.output))
        .with_context(|| format!("the guest left no output; its console is {}", console.display()))?;
    Ok(Ran { qemu, seconds })
}

/// Gives both disks their size; what `input` holds stays.
pub fn empty_disks(input: &Path, output: &Path) -> Result<()> {
    let file = File::options().create(true).append(true).open(input)?;
    let length = file.metadata()?.len();
    if length > INPUT_BYTES {
        bail!("the input is {length} bytes, more than its disk has ({INPUT_BYTES}): raise INPUT_BYTES");
    }
    file.set_len(INPUT_BYTES)?;
    File::create(output)?.set_len(OUTPUT_BYTES)?;
    Ok(())
}

/// qemu with the lab's machine and these disks.
pub fn machine(image: &Image, reboots: bool, disk: &str, input: &Path, output: &Path, console: &Path) -> Command {
    machine_with(CPUS, image, reboots, disk, [input, output, console])
}

/// [`machine`] with these CPUs; the files are input, output and console.
fn machine_with(cpus: &str, image: &Image, reboots: bool, disk: &str, [input, output, console]: [&Path; 3]) -> Command {
    let drive = |path: &Path, extra: &str| format!("file={},if=virtio,format=raw,{extra}", path.display());
    let mut command = Command::new(QEMU);
    let machine = MACHINE.replace(&format!("-smp {CPUS}"), &format!("-smp {cpus}"));
    command.args(machine.split(' ').filter(|word| !reboots || *word != "-no-reboot"));
    command.arg("-serial").arg(format!("file:{}", console.display()));
    command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initrd);
    command.arg("-drive").arg(disk);
    command.arg("-drive").arg(drive(input, "readonly=on"));
    command.arg("-drive").arg(drive(output, "cache=unsafe"));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    // One that outlived a lab that was killed would take the cores of the next.
    // SAFETY: between fork and exec only prctl(2) is called.
    unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
    command
}

fn start(job: &Boot, warm: Option<&Warm>, input: &Path, output: &Path, console: &Path) -> Result<Child> {
    let disk = warm.map_or(&job.image.disk, |warm| &warm.disk);
    let disk = format!("file={},if=virtio,format=raw,snapshot=on,cache=unsafe", disk.display());
    let mut command = machine_with(job.cpus, job.image, job.reboots, &disk, [input, output, console]);
    command.arg("-append").arg(format!("{KERNEL_ARGS} {}", job.kernel_args).trim());
    if let Some(warm) = warm {
        command.arg("-incoming").arg(warm.incoming());
    }
    command.stderr(File::create(job.output.join("qemu-stderr"))?);
    command.spawn().with_context(|| format!("cannot start {QEMU}"))
}

fn wait(child: &mut Child, console: &Path, limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            if let Some(line) = panic_line(console) {
                return Err(Broken::Panic(line).into());
            }
            if let Some(signal) = status.signal() {
                let words = fs::read_to_string(console.with_file_name("qemu-stderr")).unwrap_or_default();
                return Err(Broken::Qemu(format!("signal {signal}: {}", words.trim())).into());
            }
            if !status.success() {
                bail!("{QEMU} ended with {status}; see qemu-stderr beside {}", console.display());
            }
            return Ok(());
        }
        if Instant::now() >= end {
            let _ = child.kill();
            let _ = child.wait();
            if let Some(line) = panic_line(console) {
                return Err(Broken::Panic(line).into());
            }
            bail!(
                "the VM did not end within {} s (a lab error); its console is {}",
                limit.as_secs(),
                console.display()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn panic_line(console: &Path) -> Option<String> {
    let text = fs::read(console).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.lines().find(|l| l.contains("Kernel panic") || l.contains("BUG: unable to handle")).map(str::to_owned)
}

/// A fresh folder for the results of one run: `target/lab/out/NAME`.
pub fn fresh_output(name: &str) -> Result<PathBuf> {
    let folder = places::workspace().join("target/lab/out").join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

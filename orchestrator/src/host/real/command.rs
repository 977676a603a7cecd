//! Runs a program with a deadline and bounded output: argv only, never a shell.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{killpg, Signal};
use nix::unistd::Pid;

use super::container::{self, Root};
use super::credentials::Credentials;
use super::jsonrpc::remaining;
use super::program::Folder;
use crate::host::{Context, HostError, Result};

/// More output than this is an error, bytes: 20,000 rules are about 3 MB.
const OUTPUT_MAX: usize = 256 << 20;
/// More than this is no answer to `--version`, bytes.
const ANSWER_MAX: usize = 64 << 10;
/// Nor is what takes longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// What a program said.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// Runs `program` with `arguments` until it ends or `until` passes, feeding it `input`. The environment is ours with
/// `LC_ALL=C`. A program that does not end well is no error here: see [`run_well`].
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S], input: Option<&[u8]>, until: Instant) -> Result<Output> {
    let mut child = start(program, arguments, if input.is_some() { Stdio::piped() } else { Stdio::null() })?;
    finish(&mut child, program, input, OUTPUT_MAX, until)
}

/// A program that is asked for its version.
pub(super) struct Question {
    /// Nobody but root can have put it there.
    pub program: PathBuf,
    /// The root directory that it is in, where that is not ours.
    pub root: Option<Arc<Root>>,
    /// The folder that it is in, where not everybody can reach that.
    pub folder: Option<Folder>,
    /// Where its shared objects are, before all others.
    pub library_path: Option<String>,
    /// As whom it runs.
    pub credentials: Credentials,
}

impl Question {
    /// What it says to `--version`. Its environment is a fixed one; what it may say, and how long, is limited.
    pub fn ask(self, until: Instant) -> Result<String> {
        let name = self.program.display().to_string();
        let Question { program, root, folder, library_path, credentials } = self;
        let mut command = Command::new(&program);
        command.arg("--version").env_clear().env("PATH", container::PROGRAM_DIRECTORIES).env("LC_ALL", "C");
        command.envs(library_path.map(|path| ("LD_LIBRARY_PATH", path))).current_dir("/").process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let prepare = move || {
            root.as_ref().map_or(Ok(()), |root| root.enter())?;
            folder.as_ref().map_or(Ok(()), Folder::keep_open)?;
            credentials.take_on()
        };
        // SAFETY: `prepare` makes system calls only and neither allocates nor locks.
        unsafe { command.pre_exec(prepare) };
        let mut child = command.spawn().map_err(|e| HostError::new(&name, format!("cannot be run: {e}")))?;
        let output = finish(&mut child, &name, None, ANSWER_MAX, until.min(Instant::now() + ANSWER_LIMIT))?;
        well(&name, &["--version"], output)
    }
}

/// Starts `program` with pipes for its outputs: ours, or where this host has none that of the daemons' container.
pub(super) fn start<S: AsRef<OsStr>>(program: &str, arguments: &[S], stdin: Stdio) -> Result<Child> {
    start_as(None, program, arguments, stdin)
}

fn start_as<S: AsRef<OsStr>>(
    credentials: Option<Credentials>,
    program: &str,
    arguments: &[S],
    stdin: Stdio,
) -> Result<Child> {
    let cannot = |e: std::io::Error| HostError::new(program, format!("cannot be run: {e}"));
    let (path, root) = container::of_program(program).map_err(cannot)?;
    let mut command = Command::new(path);
    command.arg0(program).args(arguments).env("LC_ALL", "C");
    command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
    if root.is_some() || credentials.is_some() {
        let prepare = move || {
            root.as_ref().map_or(Ok(()), |root| root.enter())?;
            credentials.as_ref().map_or(Ok(()), Credentials::take_on)
        };
        // SAFETY: `prepare` makes system calls only and neither allocates nor locks.
        unsafe { command.pre_exec(prepare) };
    }
    // A Ctrl-C at the terminal is for us, not for what we run.
    command.process_group(0);
    command.spawn().map_err(cannot)
}

/// Feeds a started program what is left of its input, then waits for its end; ends it where that fails.
fn finish(child: &mut Child, program: &str, input: Option<&[u8]>, most: usize, until: Instant) -> Result<Output> {
    let result = converse(child, program, input, most, until);
    if result.is_err() {
        end(child);
    }
    result
}

/// Ends a started program: the whole group, because a script may have started what holds our pipes open.
pub(super) fn end(child: &mut Child) {
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    let _ = child.wait();
}

/// [`run`], and an error with the program's own words where it does not end with status 0.
pub fn run_well<S: AsRef<OsStr>>(
    program: &str,
    arguments: &[S],
    input: Option<&[u8]>,
    until: Instant,
) -> Result<String> {
    let output = run(program, arguments, input, until)?;
    well(program, arguments, output)
}

/// [`run_well`] without input, as somebody else where `credentials` say so.
pub(super) fn run_well_as<S: AsRef<OsStr>>(
    credentials: Option<Credentials>,
    program: &str,
    arguments: &[S],
    until: Instant,
) -> Result<String> {
    let mut child = start_as(credentials, program, arguments, Stdio::null())?;
    let output = finish(&mut child, program, None, OUTPUT_MAX, until)?;
    well(program, arguments, output)
}

fn well<S: AsRef<OsStr>>(program: &str, arguments: &[S], output: Output) -> Result<String> {
    if output.status.success() {
        return Ok(output.stdout);
    }
    let words: Vec<OsString> = arguments.iter().map(|a| a.as_ref().to_owned()).collect();
    let said = output.stderr.trim();
    let said = if said.is_empty() { output.stdout.trim() } else { said };
    let said: String = said.chars().take(2000).collect();
    let words = words.join(OsStr::new(" "));
    Err(HostError::new(format!("{program} {}", words.to_string_lossy()), format!("{}: {said}", output.status)))
}

/// Feeds the program and reads both outputs as they come, so that no pipe fills up.
fn converse(child: &mut Child, program: &str, input: Option<&[u8]>, most: usize, until: Instant) -> Result<Output> {
    let (mut stdin, mut stdout, mut stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let mut input = input.unwrap_or_default();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while stdout.is_some() || stderr.is_some() {
        if input.is_empty() {
            stdin = None;
        }
        let ready = wait_ready(&stdin, &stdout, &stderr, until).about(program)?;
        let Some((write, read_out, read_err)) = ready else {
            return Err(HostError::timeout(program, "waiting for it to end"));
        };
        if write {
            match stdin.as_mut().map(|pipe| pipe.write(&input[..input.len().min(4096)])) {
                Some(Ok(n)) => input = &input[n..],
                _ => input = &[],
            }
        }
        if read_out && !take(&mut stdout, &mut out).about(program)? {
            stdout = None;
        }
        if read_err && !take(&mut stderr, &mut err).about(program)? {
            stderr = None;
        }
        if out.len() + err.len() > most {
            return Err(HostError::new(program, format!("it printed more than {most} bytes")));
        }
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let status = wait_child(child, program, until)?;
    Ok(Output { status, stdout: text(&out), stderr: text(&err) })
}

/// Waits for the child itself: outputs may close before it ends.
fn wait_child(child: &mut Child, program: &str, until: Instant) -> Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait().about(program)? {
            return Ok(status);
        }
        if remaining(until).is_none() {
            return Err(HostError::timeout(program, "waiting for it to end"));
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Rounded up: a time limit of 0 ms would spin through the last millisecond.
pub(super) fn poll_timeout(left: Duration) -> PollTimeout {
    PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
}

/// Which of the three pipes can be used now; `None` where `until` passes first.
fn wait_ready(
    stdin: &Option<impl AsFd>,
    stdout: &Option<impl AsFd>,
    stderr: &Option<impl AsFd>,
    until: Instant,
) -> nix::Result<Option<(bool, bool, bool)>> {
    let mut fds = Vec::new();
    fds.extend(stdin.as_ref().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLOUT)));
    fds.extend(stdout.as_ref().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
    fds.extend(stderr.as_ref().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
    let Some(left) = remaining(until) else { return Ok(None) };
    match poll(&mut fds, poll_timeout(left)) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(e) => return Err(e),
    }
    let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
    let mut next = |present: bool| present && ready.next().unwrap_or(false);
    Ok(Some((next(stdin.is_some()), next(stdout.is_some()), next(stderr.is_some()))))
}

/// Reads once; false at the end.
fn take(pipe: &mut Option<impl Read>, into: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut chunk = [0; 65536];
    let n = match pipe.as_mut() {
        Some(pipe) => pipe.read(&mut chunk)?,
        None => 0,
    };
    into.extend_from_slice(&chunk[..n]);
    Ok(n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn large_input_and_output_do_not_deadlock() {
        let text = "0123456789abcde\n".repeat(100_000);
        assert_eq!(run_well("cat", &[] as &[&str], Some(text.as_bytes()), soon()).unwrap(), text);
    }

    #[test]
    fn failures_carry_the_words_of_the_program() {
        let error = run_well("ls", &["/nonexistent-x"], None, soon()).unwrap_err().to_string();
        assert!(error.contains("/nonexistent-x") && error.contains("exit status: 2"), "{error}");
        let error = run_well("no-such-program-x", &["a"], None, soon()).unwrap_err().to_string();
        assert!(error.contains("cannot be run"), "{error}");
    }

    #[test]
    fn a_program_that_hangs_is_ended_at_the_deadline() {
        let begin = Instant::now();
        let error = run("sleep", &["30"], None, begin + Duration::from_millis(100)).unwrap_err();
        assert!(error.timed_out && begin.elapsed() < Duration::from_secs(5), "{error}");
    }

    #[test]
    fn a_program_that_ignores_its_input_is_no_error() {
        assert_eq!(run_well("true", &[] as &[&str], Some(&vec![b'x'; 1 << 20]), soon()).unwrap(), "");
    }
}

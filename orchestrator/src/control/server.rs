//! The supervisor's end of the socket.

use std::io::{self, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::protocol::REQUEST_LINE;
use super::protocol::{
    read_line, to_line, write_line, HookCommand, HookEvent, Progress, Reply, Request, Status, Vitals,
};
use super::AbortGate;

/// So many clients at a time; more are turned away.
const MAX_CLIENTS: usize = 32;

/// So many lines may wait for a client that does not read; then it is dropped.
const MAX_QUEUE: usize = 1024;

/// So many progress events are kept for clients that come late.
const MAX_HISTORY: usize = 512;

/// The stack of a client's threads, in bytes: small, because the supervisor locks its memory.
const STACK: usize = 128 * 1024;

/// How often the accepting thread looks whether it should end.
const ACCEPT_POLL: Duration = Duration::from_millis(100);

/// How long a client may block a write before it is dropped.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// The supervisor's socket and the threads behind it.
pub struct Server {
    shared: Arc<Shared>,
    hooks: Mutex<Receiver<HookLink>>,
    accepting: Option<JoinHandle<()>>,
    path: PathBuf,
}

struct Shared {
    started: Instant,
    gate: AbortGate,
    stop: AtomicBool,
    status: Mutex<Known>,
    audience: Mutex<Audience>,
    new_hooks: Sender<HookLink>,
}

/// What `status` is answered from.
struct Known {
    /// What was told; the rest is filled in when somebody asks.
    status: Status,
    /// When what is being done began.
    began: Instant,
    vitals: Vitals,
}

#[derive(Default)]
struct Audience {
    history: Vec<Arc<[u8]>>,
    subscribers: Vec<SyncSender<Arc<[u8]>>>,
    writers: Vec<JoinHandle<()>>,
    clients: usize,
}

/// The log has what subscribers are told; notes and warnings are logged where they arise.
fn log(progress: &Progress) {
    match progress {
        Progress::Hello { id, .. } => tracing::info!("run {id}"),
        Progress::PhaseBegun { phase, at_ms } => tracing::info!("{phase}: begins at {at_ms} ms"),
        Progress::PhaseEnded { phase, duration_ms, ok: true } => tracing::info!("{phase}: done in {duration_ms} ms"),
        Progress::PhaseEnded { phase, duration_ms, ok: false } => {
            tracing::warn!("{phase}: did not end as it should, after {duration_ms} ms");
        }
        Progress::PointOfNoReturn => tracing::info!("point of no return"),
        Progress::Undoing { phase } => tracing::warn!("{phase}: being undone"),
        Progress::GoingBack { why } => tracing::warn!("going back to the old version: {why}"),
        Progress::Note { .. } | Progress::Warning { .. } => {}
        Progress::Finished { exit_code, report } => tracing::info!("exit {exit_code}: {}", report.reason),
    }
}

/// A panic in one client's thread must not take the run with it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// Listens on `path` (mode 0600; a socket that a dead supervisor left is replaced: hold the run lock first) for
    /// the run `id`. Peers must have the effective uid of this process, which is root outside tests.
    pub fn bind(path: &Path, id: &str) -> io::Result<Server> {
        let listener = listen(path)?;
        let (new_hooks, hooks) = mpsc::channel();
        let status = Status {
            id: id.to_string(),
            pid: std::process::id(),
            phase: None,
            doing: "starting".to_string(),
            can_abort: true,
            ..Status::default()
        };
        let known = Known { status, began: Instant::now(), vitals: Vitals::default() };
        let shared = Arc::new(Shared {
            started: Instant::now(),
            gate: AbortGate::new(),
            stop: AtomicBool::new(false),
            status: Mutex::new(known),
            audience: Mutex::default(),
            new_hooks,
        });
        let server = Arc::clone(&shared);
        let accepting = thread("control-accept", move || accept_all(&listener, &server))?;
        let server = Server { shared, hooks: Mutex::new(hooks), accepting: Some(accepting), path: path.to_path_buf() };
        server.tell(&Progress::Hello { id: id.to_string(), pid: std::process::id() });
        Ok(server)
    }

    /// Decides between abort and point of no return.
    pub fn gate(&self) -> &AbortGate {
        &self.shared.gate
    }

    /// Tells every subscriber, now and later. Never blocks: a subscriber that does not read is dropped.
    pub fn tell(&self, progress: &Progress) {
        log(progress);
        self.shared.note_status(progress);
        let Ok(line) = to_line(progress) else { return };
        let line: Arc<[u8]> = line.into();
        let mut audience = lock(&self.shared.audience);
        if audience.history.len() < MAX_HISTORY || matches!(progress, Progress::Finished { .. }) {
            audience.history.push(Arc::clone(&line));
        }
        audience.subscribers.retain(|subscriber| subscriber.try_send(Arc::clone(&line)).is_ok());
    }

    /// What `status` answers beyond what [`Server::tell`] says: level, parked packets, lease, time limit.
    pub fn update(&self, vitals: &Vitals) {
        lock(&self.shared.status).vitals = *vitals;
    }

    /// Waits for a `hook reload` to connect; `None` where `until` passes first. Hooks come in the order in which
    /// they connected.
    pub fn wait_hook(&self, until: Instant) -> Option<HookLink> {
        lock(&self.hooks).recv_timeout(until.saturating_duration_since(Instant::now())).ok()
    }

    /// Stops listening, lets subscribers have what is queued for them (for `patience` at most), removes the socket. A run
    /// that is over at once waits for the client that has started it, or nobody would be told why.
    pub fn close(mut self, patience: Duration) {
        let until = Instant::now() + patience;
        while lock(&self.shared.audience).writers.is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.stop();
        let writers = {
            let mut audience = lock(&self.shared.audience);
            audience.subscribers.clear();
            std::mem::take(&mut audience.writers)
        };
        for writer in writers {
            while !writer.is_finished() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
            // Already gone is as good as removed.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn status(&self) -> Status {
        let known = lock(&self.status);
        let vitals = known.vitals;
        let milliseconds = |duration: Duration| duration.as_millis() as u64;
        // What is left over from the phase before says nothing about this one.
        let limit = vitals.deadline.and_then(|deadline| deadline.checked_duration_since(known.began));
        let left = vitals.frozen_until.map(|until| until.saturating_duration_since(Instant::now()));
        Status {
            elapsed_ms: milliseconds(self.started.elapsed()),
            can_abort: !self.gate.committed() && !self.gate.abort_requested(),
            committed: self.gate.committed(),
            phase_ms: known.status.phase.map(|_| milliseconds(known.began.elapsed())),
            limit_ms: limit.map(milliseconds),
            level: vitals.level,
            parked: vitals.parked,
            most_parked: vitals.most_parked,
            overflowed: vitals.overflowed,
            lease_ms: left.map(milliseconds),
            ..known.status.clone()
        }
    }

    fn note_status(&self, progress: &Progress) {
        let mut known = lock(&self.status);
        let (phase, doing) = match progress {
            Progress::PhaseBegun { phase, .. } => (Some(*phase), "doing"),
            Progress::Undoing { phase } => (Some(*phase), "undoing"),
            Progress::GoingBack { .. } => (known.status.phase, "going back"),
            Progress::Finished { .. } => (known.status.phase, "finished"),
            Progress::Hello { .. }
            | Progress::PhaseEnded { .. }
            | Progress::PointOfNoReturn
            | Progress::Note { .. }
            | Progress::Warning { .. } => return,
        };
        known.status.phase = phase;
        known.status.doing = doing.to_string();
        known.began = Instant::now();
        known.vitals.deadline = None;
    }

    fn abort(&self) -> Reply {
        if lock(&self.status).status.doing == "finished" {
            return Reply::Over;
        }
        match self.gate.request_abort() {
            Ok(()) => Reply::Accepted,
            Err(_) => Reply::Refused {
                why: "the run is past the point of no return: it goes forward, or back to the old version by itself"
                    .to_string(),
            },
        }
    }

    /// Queues all that was told so far and then what comes.
    fn subscribe(&self, stream: UnixStream) -> io::Result<()> {
        let (sender, lines) = mpsc::sync_channel::<Arc<[u8]>>(MAX_QUEUE);
        let mut audience = lock(&self.audience);
        for line in &audience.history {
            if sender.try_send(Arc::clone(line)).is_err() {
                return Err(io::Error::other("more history than queue"));
            }
        }
        let writer = thread("control-write", move || write_all(stream, &lines))?;
        audience.writers.retain(|writer| !writer.is_finished());
        audience.writers.push(writer);
        audience.subscribers.push(sender);
        Ok(())
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name.to_string()).stack_size(STACK).spawn(body)
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    // The directory is 0700 already, and every peer is asked who it is: the mode is the third lock.
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn accept_all(listener: &UnixListener, shared: &Arc<Shared>) {
    let timeout = PollTimeout::try_from(ACCEPT_POLL).unwrap_or(PollTimeout::MAX);
    while !shared.stop.load(Ordering::SeqCst) {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut fds, timeout), Ok(ready) if ready > 0) {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => take_in(stream, shared),
            // Out of descriptors: do not spin on a listener that stays readable.
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => std::thread::sleep(ACCEPT_POLL),
            Err(_) => {}
        }
    }
}

fn take_in(stream: UnixStream, shared: &Arc<Shared>) {
    let Ok(peer) = getsockopt(&stream, PeerCredentials) else { return };
    if peer.uid() != nix::unistd::geteuid().as_raw() {
        tracing::warn!(uid = peer.uid(), pid = peer.pid(), "run.sock: a peer that is not root was turned away");
        return;
    }
    if stream.set_nonblocking(false).is_err() || stream.set_write_timeout(Some(WRITE_LIMIT)).is_err() {
        return;
    }
    {
        let mut audience = lock(&shared.audience);
        if audience.clients >= MAX_CLIENTS {
            return;
        }
        audience.clients += 1;
    }
    let server = Arc::clone(shared);
    let served = thread("control-client", move || {
        if let Err(e) = serve(stream, peer.pid(), &server) {
            tracing::debug!(pid = peer.pid(), "run.sock: client dropped: {e}");
        }
        lock(&server.audience).clients -= 1;
    });
    if served.is_err() {
        lock(&shared.audience).clients -= 1;
    }
}

fn serve(stream: UnixStream, pid: i32, shared: &Arc<Shared>) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut hook: Option<Sender<HookEvent>> = None;
    let mut writer = stream;
    while let Some(request) = read_line::<Request>(&mut reader, REQUEST_LINE)? {
        match request {
            Request::Subscribe => shared.subscribe(writer.try_clone()?)?,
            Request::Status => write_line(&mut writer, &Reply::Status(shared.status()))?,
            Request::Abort => write_line(&mut writer, &shared.abort())?,
            Request::Thaw => {
                shared.gate.request_thaw();
                write_line(&mut writer, &Reply::Accepted)?;
            }
            Request::Hook => hook = Some(open_hook(writer.try_clone()?, pid, shared)?),
            Request::Spawned { pid } => tell_hook(hook.as_ref(), HookEvent::Spawned { pid })?,
            Request::ChildExited { status } => tell_hook(hook.as_ref(), HookEvent::ChildExited { status })?,
        }
    }
    Ok(())
}

fn open_hook(stream: UnixStream, pid: i32, shared: &Shared) -> io::Result<Sender<HookEvent>> {
    let (sender, events) = mpsc::channel();
    tell_hook(Some(&sender), HookEvent::Connected { pid })?;
    let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the run takes no hooks any more");
    shared.new_hooks.send(HookLink { pid, stream, events }).map_err(gone)?;
    Ok(sender)
}

fn tell_hook(hook: Option<&Sender<HookEvent>>, event: HookEvent) -> io::Result<()> {
    let hook = hook.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a hook"))?;
    hook.send(event).map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the run has let the hook go"))
}

fn write_all(mut stream: UnixStream, lines: &Receiver<Arc<[u8]>>) {
    while let Ok(line) = lines.recv() {
        if stream.write_all(&line).is_err() {
            break;
        }
    }
    // Both halves: the client sees the end, and so does the thread that reads from it.
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

/// The `hook reload` process that waits in the unit's cgroup.
#[derive(Debug)]
pub struct HookLink {
    pid: i32,
    stream: UnixStream,
    events: Receiver<HookEvent>,
}

impl HookLink {
    /// Its process, as the kernel says (`SO_PEERCRED`).
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Tells it what to do. An error means that it has gone.
    pub fn send(&mut self, command: HookCommand) -> io::Result<()> {
        write_line(&mut self.stream, &command)
    }

    /// What it says next; `None` where `until` passes first. The first event is [`HookEvent::Connected`].
    pub fn recv(&mut self, until: Instant) -> Option<HookEvent> {
        match self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Disconnected) => Some(HookEvent::Closed),
            Err(RecvTimeoutError::Timeout) => None,
        }
    }
}

impl Drop for HookLink {
    fn drop(&mut self) {
        // A hook that nobody talks to any more sees the end of the stream and exits with 1.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

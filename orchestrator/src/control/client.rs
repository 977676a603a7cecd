//! The client's end of the socket, and the hook's.

use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::protocol::{read_line, write_line, AbortAnswer, HookCommand, Progress, Reply, Request, Status, EVENT_LINE};

/// How long an answer may take. The supervisor's socket threads have nothing else to do.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A connection to the supervisor of the run under way.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Connection {
    /// Connects; `None` where no supervisor listens.
    pub fn open(path: &Path) -> io::Result<Option<Connection>> {
        let writer = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None)
            }
            Err(e) => return Err(e),
        };
        writer.set_read_timeout(Some(ANSWER_LIMIT))?;
        writer.set_write_timeout(Some(ANSWER_LIMIT))?;
        Ok(Some(Connection { reader: BufReader::new(writer.try_clone()?), writer }))
    }

    /// What the run is doing.
    pub fn status(&mut self) -> io::Result<Status> {
        match self.ask(&Request::Status)? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks the run to undo itself.
    pub fn abort(&mut self) -> io::Result<AbortAnswer> {
        match self.ask(&Request::Abort)? {
            Reply::Accepted => Ok(AbortAnswer::Accepted),
            Reply::Refused { why } => Ok(AbortAnswer::Refused { why }),
            Reply::Over => Ok(AbortAnswer::Over),
            other @ Reply::Status(_) => Err(unexpected(&other)),
        }
    }

    /// Asks for the emergency thaw.
    pub fn thaw(&mut self) -> io::Result<()> {
        match self.ask(&Request::Thaw)? {
            Reply::Accepted => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Every progress event so far, then each as it comes.
    pub fn subscribe(mut self) -> io::Result<Subscription> {
        write_line(&mut self.writer, &Request::Subscribe)?;
        self.writer.set_read_timeout(None)?;
        Ok(Subscription { reader: self.reader })
    }

    fn ask(&mut self, request: &Request) -> io::Result<Reply> {
        write_line(&mut self.writer, request)?;
        read_line(&mut self.reader, EVENT_LINE)?.ok_or_else(ended)
    }
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the supervisor closed the connection")
}

fn unexpected(reply: &Reply) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("unexpected answer {reply:?}"))
}

/// The progress of a run.
#[derive(Debug)]
pub struct Subscription {
    reader: BufReader<UnixStream>,
}

impl Subscription {
    /// The next event; `None` where the supervisor has closed the connection.
    pub fn next_event(&mut self) -> io::Result<Option<Progress>> {
        read_line(&mut self.reader, EVENT_LINE)
    }
}

/// The hook's end: what ExecReload started.
#[derive(Debug)]
pub struct HookClient {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl HookClient {
    /// Connects and says what it is; `None` where no run is under way.
    pub fn open(path: &Path) -> io::Result<Option<HookClient>> {
        let Some(Connection { reader, mut writer }) = Connection::open(path)? else { return Ok(None) };
        writer.set_read_timeout(None)?;
        write_line(&mut writer, &Request::Hook)?;
        Ok(Some(HookClient { reader, writer }))
    }

    /// The next command; `None` where the run has gone.
    pub fn next_command(&mut self) -> io::Result<Option<HookCommand>> {
        read_line(&mut self.reader, EVENT_LINE)
    }

    /// A second handle that can write while [`HookClient::next_command`] waits.
    pub fn reporter(&self) -> io::Result<HookReporter> {
        Ok(HookReporter { writer: self.writer.try_clone()? })
    }
}

/// Tells the supervisor what became of the command.
#[derive(Debug)]
pub struct HookReporter {
    writer: UnixStream,
}

impl HookReporter {
    /// The command runs as process `pid`.
    pub fn spawned(&mut self, pid: i32) -> io::Result<()> {
        write_line(&mut self.writer, &Request::Spawned { pid })
    }

    /// The command has ended with `status`.
    pub fn child_exited(&mut self, status: i32) -> io::Result<()> {
        write_line(&mut self.writer, &Request::ChildExited { status })
    }
}

//! The agent's end of a child: starting it, talking to it until a deadline, and ending it, whatever it does.

use std::io::{self, BufReader, PipeReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::protocol::{Request, Response, read_frame, write_frame};
use crate::world::User;

/// Of what the module writes to standard error, the end is kept, octets.
const LAST_WORDS: usize = 1024;
/// How long a child that is told to end may take to close its session with the device.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a killed child may take to go; one that waits in the kernel for a device may take for ever.
const DEATH: Duration = Duration::from_secs(2);
/// The agent's own conversation with systemd (sd_listen_fds(3), sd_notify(3)) is not for a module.
const AGENTS_OWN: [&str; 6] =
    ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];

/// A running child.
pub(super) struct ChildProcess {
    child: Child,
    /// Readable as soon as the child has ended; `None` on kernels before 5.3.
    handle: Option<OwnedFd>,
    stream: BufReader<DeadlineStream>,
    errors: PipeReader,
    last_words: Vec<u8>,
    started: Instant,
}

/// Why a child did not answer.
pub(super) enum Silence {
    /// The deadline has passed.
    Late,
    /// It hung up.
    Ended,
    /// What it said makes no sense.
    Nonsense(String),
}

impl ChildProcess {
    /// Starts `program` as a child for the backend of this name, which shows in ps(1).
    pub(super) fn start(
        program: &Path,
        name: &str,
        user: Option<User>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let (errors, words) = io::pipe()?;
        // A module that writes more than anybody reads loses it, instead of waiting for ever.
        rustix::fs::fcntl_setfl(&errors, OFlags::NONBLOCK)?;
        rustix::fs::fcntl_setfl(&words, OFlags::NONBLOCK)?;
        let mut command = Command::new(program);
        command
            .arg0("pintle")
            .args(["plugin-host", name])
            .current_dir("/")
            .envs(environment)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::from(words));
        for variable in AGENTS_OWN {
            command.env_remove(variable);
        }
        if let Some(user) = user {
            command.uid(user.uid).gid(user.gid);
        }
        let child = command.spawn()?;
        let handle = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).ok();
        let stream = BufReader::new(DeadlineStream { stream: ours, deadline: Instant::now() });
        Ok(Self { child, handle, stream, errors, last_words: Vec::new(), started: Instant::now() })
    }

    /// How long it has been running.
    pub(super) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// How it has ended, if it has.
    pub(super) fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        Some(self.describe(status))
    }

    /// One call.
    pub(super) fn exchange(&mut self, request: &Request, deadline: Instant) -> Result<Response, Silence> {
        let silence = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Silence::Late,
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => Silence::Ended,
            _ => Silence::Nonsense(error.to_string()),
        };
        let stream = self.stream.get_mut();
        stream.deadline = deadline;
        write_frame(stream, request).map_err(silence)?;
        let response = read_frame(&mut self.stream).map_err(silence)?.ok_or(Silence::Ended)?;
        self.listen();
        Ok(response)
    }

    /// Waits for the end of a child that hung up, and kills it if it only pretends. Answers how it ended, or `None` if
    /// it does not go.
    pub(super) fn bury(&mut self) -> Option<String> {
        self.wait(FAREWELL);
        self.kill()
    }

    /// Kills it. Answers how it ended, or `None` if it does not go.
    pub(super) fn kill(&mut self) -> Option<String> {
        let _ = self.child.kill();
        self.wait(DEATH);
        match self.child.try_wait() {
            Ok(Some(status)) => Some(self.describe(status)),
            Ok(None) => None,
            Err(error) => Some(format!("ended in a way that is not known ({error})")),
        }
    }

    /// Waits until it has ended, and whether it has within this time.
    fn wait(&mut self, time: Duration) -> bool {
        let Some(handle) = &self.handle else {
            // Without a handle there is no waiting with an end.
            return matches!(self.child.try_wait(), Ok(Some(_))) || {
                std::thread::sleep(time / 10);
                matches!(self.child.try_wait(), Ok(Some(_)))
            };
        };
        let timeout =
            Timespec { tv_sec: i64::try_from(time.as_secs()).unwrap_or(0), tv_nsec: i64::from(time.subsec_nanos()) };
        let ended = || poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&timeout));
        matches!(rustix::io::retry_on_intr(ended), Ok(1..)) && matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Keeps the end of what it wrote to standard error.
    fn listen(&mut self) {
        let mut octets = [0; LAST_WORDS];
        while let Ok(read @ 1..) = self.errors.read(&mut octets) {
            self.last_words.extend_from_slice(&octets[..read]);
            let surplus = self.last_words.len().saturating_sub(LAST_WORDS);
            self.last_words.drain(..surplus);
        }
    }

    fn describe(&mut self, status: ExitStatus) -> String {
        let mut text = match (status.signal(), status.code()) {
            (Some(signal), _) => format!("was killed by signal {signal}{}", signal_name(signal)),
            (None, Some(code)) => format!("ended with exit code {code}"),
            (None, None) => "ended".to_owned(),
        };
        self.listen();
        let words = String::from_utf8_lossy(&self.last_words);
        let last: String =
            words.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim().chars().take(200).collect();
        if !last.is_empty() {
            text += &format!(", and its last words were {last:?}");
        }
        text
    }
}

impl Drop for ChildProcess {
    /// Hangs up, so that the child closes its session with the device and ends; and kills it if it does not.
    fn drop(&mut self) {
        let _ = self.stream.get_ref().stream.shutdown(Shutdown::Both);
        if !matches!(self.child.try_wait(), Ok(Some(_))) && !self.wait(FAREWELL) {
            let _ = self.child.kill();
            self.wait(DEATH);
        }
    }
}

/// The name of a signal, in brackets.
fn signal_name(signal: i32) -> &'static str {
    use rustix::process::Signal;
    match Signal::from_named_raw(signal) {
        Some(Signal::SEGV) => " (SIGSEGV)",
        Some(Signal::ABORT) => " (SIGABRT)",
        Some(Signal::KILL) => " (SIGKILL)",
        Some(Signal::BUS) => " (SIGBUS)",
        Some(Signal::ILL) => " (SIGILL)",
        Some(Signal::FPE) => " (SIGFPE)",
        Some(Signal::TERM) => " (SIGTERM)",
        Some(Signal::SYS) => " (SIGSYS)",
        Some(Signal::TRAP) => " (SIGTRAP)",
        Some(Signal::PIPE) => " (SIGPIPE)",
        Some(Signal::XCPU) => " (SIGXCPU)",
        _ => "",
    }
}

/// A socket whose every read and write ends at one deadline.
struct DeadlineStream {
    stream: UnixStream,
    deadline: Instant,
}

impl DeadlineStream {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Read for DeadlineStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer)
    }
}

impl Write for DeadlineStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

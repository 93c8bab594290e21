//! The agent's side of a child process: start it, exchange messages with a deadline, and stop it, whatever it does.

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

/// How much of the end of the module's standard error is kept, in bytes.
const STDERR_TAIL: usize = 1024;
/// How long a child may take to close its session with the device and exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a killed child may take to exit. If it is blocked in the kernel by a device, it may never exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);
/// systemd's variables for the agent (sd_listen_fds(3), sd_notify(3)), which a module must not use.
const SYSTEMD_VARIABLES: [&str; 6] =
    ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];

/// A running child.
pub(super) struct ChildProcess {
    child: Child,
    /// Readable once the child has exited; `None` on kernels before 5.3.
    handle: Option<OwnedFd>,
    stream: BufReader<DeadlineStream>,
    errors: PipeReader,
    stderr_tail: Vec<u8>,
    started: Instant,
}

/// Why a child did not respond.
pub(super) enum CallFailure {
    /// The deadline has passed.
    DeadlineExceeded,
    /// It closed the connection.
    Disconnected,
    /// Its response could not be parsed.
    Malformed(String),
}

impl ChildProcess {
    /// Starts `program` as a child for the backend with this name, which is visible in ps(1).
    pub(super) fn start(
        program: &Path,
        name: &str,
        user: Option<User>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let (errors, stderr_writer) = io::pipe()?;
        // Nonblocking, so that a module that writes more than is read loses output instead of blocking forever.
        rustix::fs::fcntl_setfl(&errors, OFlags::NONBLOCK)?;
        rustix::fs::fcntl_setfl(&stderr_writer, OFlags::NONBLOCK)?;
        let mut command = Command::new(program);
        command
            .arg0("pintle")
            .args(["plugin-host", name])
            .current_dir("/")
            .envs(environment)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::from(stderr_writer));
        for variable in SYSTEMD_VARIABLES {
            command.env_remove(variable);
        }
        if let Some(user) = user {
            command.uid(user.uid).gid(user.gid);
        }
        let child = command.spawn()?;
        let handle = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).ok();
        let stream = BufReader::new(DeadlineStream { stream: ours, deadline: Instant::now() });
        Ok(Self { child, handle, stream, errors, stderr_tail: Vec::new(), started: Instant::now() })
    }

    pub(super) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// How it exited, or `None` if it is running.
    pub(super) fn exited(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        Some(self.describe(status))
    }

    /// Sends a request and waits for the response until `deadline`.
    pub(super) fn exchange(&mut self, request: &Request, deadline: Instant) -> Result<Response, CallFailure> {
        let call_failure = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => CallFailure::DeadlineExceeded,
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => {
                CallFailure::Disconnected
            }
            _ => CallFailure::Malformed(error.to_string()),
        };
        let stream = self.stream.get_mut();
        stream.deadline = deadline;
        write_frame(stream, request).map_err(call_failure)?;
        let response = read_frame(&mut self.stream).map_err(call_failure)?.ok_or(CallFailure::Disconnected)?;
        self.read_stderr();
        Ok(response)
    }

    /// Waits for a child that closed its connection to exit, and kills it if it does not. Returns how it exited, or
    /// `None` if it still runs.
    pub(super) fn reap(&mut self) -> Option<String> {
        self.wait(EXIT_TIMEOUT);
        self.kill()
    }

    /// Kills the child. Returns how it exited, or `None` if it still runs.
    pub(super) fn kill(&mut self) -> Option<String> {
        let _ = self.child.kill();
        self.wait(KILL_TIMEOUT);
        match self.child.try_wait() {
            Ok(Some(status)) => Some(self.describe(status)),
            Ok(None) => None,
            Err(error) => Some(format!("exited with an unknown status ({error})")),
        }
    }

    /// Waits for the child to exit, for at most this time; returns whether it has.
    fn wait(&mut self, time: Duration) -> bool {
        let Some(handle) = &self.handle else {
            // Without a pidfd, waiting with a timeout is not possible.
            return matches!(self.child.try_wait(), Ok(Some(_))) || {
                std::thread::sleep(time / 10);
                matches!(self.child.try_wait(), Ok(Some(_)))
            };
        };
        let timeout =
            Timespec { tv_sec: i64::try_from(time.as_secs()).unwrap_or(0), tv_nsec: i64::from(time.subsec_nanos()) };
        let exited = || poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&timeout));
        matches!(rustix::io::retry_on_intr(exited), Ok(1..)) && matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Reads standard error, and keeps the end of it.
    fn read_stderr(&mut self) {
        let mut bytes = [0; STDERR_TAIL];
        while let Ok(read @ 1..) = self.errors.read(&mut bytes) {
            self.stderr_tail.extend_from_slice(&bytes[..read]);
            let surplus = self.stderr_tail.len().saturating_sub(STDERR_TAIL);
            self.stderr_tail.drain(..surplus);
        }
    }

    fn describe(&mut self, status: ExitStatus) -> String {
        let mut text = match (status.signal(), status.code()) {
            (Some(signal), _) => format!("was killed by signal {signal}{}", signal_name(signal)),
            (None, Some(code)) => format!("exited with code {code}"),
            (None, None) => "exited".to_owned(),
        };
        self.read_stderr();
        let text_tail = String::from_utf8_lossy(&self.stderr_tail);
        let last: String = text_tail
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or_default()
            .trim()
            .chars()
            .take(200)
            .collect();
        if !last.is_empty() {
            text += &format!(", after writing {last:?} to standard error");
        }
        text
    }
}

impl Drop for ChildProcess {
    /// Closes the connection, so that the child closes its session with the device and exits. Kills it if it does
    /// not.
    fn drop(&mut self) {
        let _ = self.stream.get_ref().stream.shutdown(Shutdown::Both);
        if !matches!(self.child.try_wait(), Ok(Some(_))) && !self.wait(EXIT_TIMEOUT) {
            let _ = self.child.kill();
            self.wait(KILL_TIMEOUT);
        }
    }
}

/// A signal's name in brackets, with a leading space.
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

/// A socket with one deadline for all reads and writes.
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

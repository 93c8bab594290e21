//! kubectl streams that echo their input: `exec` and `port-forward`.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use pintle_test_support::{cluster_binary, eventually};

use crate::device::DEADLINE;
use crate::device::served::Served;

/// The user that may exec into pods.
pub(crate) const OPERATOR: &str = "operator";

/// kubectl as the operator, with piped standard streams.
pub(crate) struct Kubectl(Child);

impl Kubectl {
    fn start(served: &Served, websockets: bool, arguments: &[&str]) -> Self {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(cluster_binary())
            .args(["kubectl", "--as", OPERATOR, "--kubeconfig"])
            .arg(served.kubeconfig())
            .args(arguments)
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets.to_string())
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets.to_string())
            .env("HOME", served.node.scratch.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        Self(command.spawn().expect("kubectl starts"))
    }

    fn input(&mut self) -> ChildStdin {
        self.0.stdin.take().expect("taken once")
    }

    fn output(&mut self) -> ChildStdout {
        self.0.stdout.take().expect("taken once")
    }

    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        eventually("kubectl exits", DEADLINE, || self.0.try_wait().expect("a child can be waited for"))
    }
}

impl Drop for Kubectl {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends bytes through a stream and compares what comes back, in rounds, until stopped.
pub(crate) struct Echo {
    rounds: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), String>>,
}

impl Echo {
    fn start(mut to: impl Write + Send + 'static, mut from: impl Read + Send + 'static) -> Self {
        let (rounds, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (counted, stopped) = (Arc::clone(&rounds), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            // All byte values, some of which look like line endings or end-of-file characters, in rounds of different
            // lengths.
            while !stopped.load(Ordering::Relaxed) {
                let round = counted.load(Ordering::Relaxed);
                let sent: Vec<u8> = (0..=round % 4096).map(|place| (place * 7 + round) as u8).collect();
                let mut received = vec![0; sent.len()];
                to.write_all(&sent).and_then(|()| to.flush()).map_err(|error| format!("round {round}: {error}"))?;
                from.read_exact(&mut received).map_err(|error| format!("round {round}: {error}"))?;
                if sent != received {
                    return Err(format!("round {round} came back changed"));
                }
                counted.fetch_add(1, Ordering::Relaxed);
            }
            drop(to);
            // Nothing else arrives.
            let mut rest = Vec::new();
            from.read_to_end(&mut rest).map_err(|error| error.to_string())?;
            if rest.is_empty() { Ok(()) } else { Err(format!("{} extra bytes", rest.len())) }
        });
        Self { rounds, stop, thread }
    }

    /// A stream of `kubectl exec` that runs an echo.
    pub(crate) fn exec(served: &Served, websockets: bool) -> (Kubectl, Self) {
        let mut kubectl = Kubectl::start(served, websockets, &["exec", "--stdin", "echo", "--", "cat"]);
        let echo = Self::start(kubectl.input(), kubectl.output());
        (kubectl, echo)
    }

    /// A stream of `kubectl port-forward`, with a client of the port.
    pub(crate) fn port_forward(served: &Served, websockets: bool) -> (Kubectl, Self) {
        let mut kubectl = Kubectl::start(served, websockets, &["port-forward", "pod/echo", ":7"]);
        let (lines, mut output) = (mpsc::channel(), BufReader::new(kubectl.output()));
        std::thread::spawn(move || {
            let mut line = String::new();
            while output.read_line(&mut line).is_ok_and(|count| count > 0) {
                let _ = lines.0.send(std::mem::take(&mut line));
            }
        });
        let line = lines.1.recv_timeout(DEADLINE).expect("kubectl says where it listens");
        let address = line.strip_prefix("Forwarding from ").and_then(|rest| rest.split(' ').next());
        let stream = TcpStream::connect(address.unwrap_or_else(|| panic!("{line}"))).expect("it listens");
        let other = stream.try_clone().expect("a descriptor can be duplicated");
        (kubectl, Self::start(ClosesOnDrop(stream), other))
    }

    /// Waits until 20 more rounds are complete.
    #[track_caller]
    pub(crate) fn wait_for_rounds(&self, what: &str) {
        const ROUNDS: u64 = 20;
        let before = self.rounds.load(Ordering::Relaxed);
        eventually(what, DEADLINE, || {
            let rounds = self.rounds.load(Ordering::Relaxed);
            assert!(!self.thread.is_finished(), "it ended after {rounds} rounds: {what}");
            (rounds >= before + ROUNDS).then_some(())
        });
    }

    /// Waits until the stream has closed by itself.
    #[track_caller]
    pub(crate) fn wait_until_closed(&self, what: &str) {
        eventually(what, DEADLINE, || self.thread.is_finished().then_some(()));
    }

    /// Stops it, and returns the number of rounds.
    #[track_caller]
    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the thread did not panic").expect("all came back");
        self.rounds.load(Ordering::Relaxed)
    }
}

/// The writing half of a connection; dropping it closes that direction.
struct ClosesOnDrop(TcpStream);

impl Write for ClosesOnDrop {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        self.0.write(buffer)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

impl Drop for ClosesOnDrop {
    fn drop(&mut self) {
        let _ = self.0.shutdown(std::net::Shutdown::Write);
    }
}

//! Processes that cannot outlive the test.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::condition::holds_within;

/// A command: program, arguments, environment, and the file for its output.
#[derive(Clone, Debug)]
pub struct ProcessCommand {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: BTreeMap<OsString, OsString>,
    output: PathBuf,
    private_mounts: bool,
}

impl ProcessCommand {
    /// Runs `program` with standard output and standard error appended to the file `output`.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            environment: BTreeMap::new(),
            output: output.into(),
            private_mounts: false,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn arguments<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Adds `--name=value`.
    #[must_use]
    pub fn flag(self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let mut argument = OsString::from(format!("--{name}="));
        argument.push(value.as_ref());
        self.argument(argument)
    }

    /// Sets an environment variable, overriding the test process's.
    #[must_use]
    pub fn environment(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.insert(name.into(), value.into());
        self
    }

    /// Runs the process in its own mount namespace, so that its mounts end with it. Needs root.
    #[must_use]
    pub fn private_mounts(mut self) -> Self {
        self.private_mounts = true;
        self
    }

    /// Starts the process.
    #[must_use]
    pub fn start(&self) -> TestProcess {
        // Named after the log, since the program may be a multi-call binary.
        let name = self.output.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let output_start = std::fs::metadata(&self.output).map_or(0, |metadata| metadata.len()) as usize;
        let child = spawn(self.command()).unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        TestProcess { name, child, status: None, output: self.output.clone(), output_start }
    }

    fn command(&self) -> Command {
        let output = File::options()
            .append(true)
            .create(true)
            .open(&self.output)
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", self.output.display()));
        let error_output = output.try_clone().expect("a descriptor can be duplicated");
        // Both programs exec the next one, so the pid and the parent death signal are kept.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if self.private_mounts {
            command.args(["unshare", "--mount", "--propagation", "private"]);
        }
        command
            .arg(&self.program)
            .args(&self.arguments)
            .envs(&self.environment)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(error_output)
            .process_group(0);
        command
    }
}

/// Spawns on a thread that lives as long as the test process. The kernel sends the parent death signal when the
/// *thread* that forked exits, and libtest runs every test on its own thread.
fn spawn(command: Command) -> std::io::Result<Child> {
    type SpawnRequest = (Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<SpawnRequest>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, orders) = mpsc::channel::<SpawnRequest>();
        thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, answer) in orders {
                    let _ = answer.send(command.spawn());
                }
            })
            .expect("a thread can be made");
        Mutex::new(sender)
    });
    let (answer, child) = mpsc::channel();
    let request = (command, answer);
    lock(spawner).send(request).expect("the spawner lives as long as the test process");
    child.recv().expect("the spawner answers every request")
}

/// A running process in its own process group; the group is killed on drop.
#[derive(Debug)]
pub struct TestProcess {
    name: String,
    child: Child,
    status: Option<ExitStatus>,
    output: PathBuf,
    output_start: usize,
}

impl TestProcess {
    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The file for its output.
    #[must_use]
    pub fn output_path(&self) -> &Path {
        &self.output
    }

    /// Its output so far, without that of earlier processes in the same file.
    #[must_use]
    pub fn output(&self) -> String {
        let bytes = std::fs::read(&self.output).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(self.output_start..).unwrap_or_default()).into_owned()
    }

    /// Its exit status, or `None` while it runs.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("a child can be waited for");
        }
        self.status
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.exit_status().is_none()
    }

    /// Waits until it exits by itself.
    #[track_caller]
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        match holds_within(deadline, || self.exit_status()) {
            Some(status) => status,
            None => panic!("{} still runs after {deadline:?}\n{}", self.name, last_lines(&self.output)),
        }
    }

    /// Sends SIGTERM and waits; sends SIGKILL to the group after `grace`.
    pub fn terminate(&mut self, grace: Duration) -> ExitStatus {
        self.signal(Signal::TERM);
        self.signal(Signal::CONT); // a stopped process handles SIGTERM only after it continues
        match holds_within(grace, || self.exit_status()) {
            Some(status) => status,
            None => self.kill(),
        }
    }

    /// Sends SIGKILL to its whole group, and waits.
    pub fn kill(&mut self) -> ExitStatus {
        if let Some(status) = self.exit_status() {
            return status;
        }
        let _ = kill_process_group(self.pid(), Signal::KILL);
        let status = self.child.wait().expect("a child can be waited for");
        self.status = Some(status);
        status
    }

    /// Stops it with SIGSTOP: its connections stay open, but it does not respond.
    pub fn pause(&mut self) {
        self.signal(Signal::STOP);
    }

    /// Continues it after [`TestProcess::pause`].
    pub fn resume(&mut self) {
        self.signal(Signal::CONT);
    }

    /// Sends a signal to the process, unless it has exited.
    pub fn signal(&mut self, signal: Signal) {
        // Checked first, so that a reused process id is never signalled.
        if self.is_running() {
            let _ = kill_process(self.pid(), signal);
        }
    }

    /// Panics with the end of its output if it has exited.
    #[track_caller]
    pub fn assert_running(&mut self) {
        if let Some(status) = self.exit_status() {
            let ended = match (status.code(), status.signal()) {
                (Some(code), _) => format!("exited with code {code}"),
                (None, signal) => format!("was killed by signal {}", signal.unwrap_or_default()),
            };
            panic!("{} {ended}\n{}", self.name, last_lines(&self.output));
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for TestProcess {
    fn drop(&mut self) {
        // Kills the group even if the process has exited: its children may still run.
        let _ = kill_process_group(self.pid(), Signal::KILL);
        self.kill();
    }
}

/// A process that can be stopped and restarted with the same ports and files.
#[derive(Debug)]
pub struct Service {
    command: ProcessCommand,
    process: Mutex<Option<TestProcess>>,
}

impl Service {
    pub(crate) fn start_new(command: ProcessCommand) -> Self {
        let service = Self { command, process: Mutex::new(None) };
        service.start();
        service
    }

    /// Starts it unless it is running. The caller has to wait until it is ready.
    pub fn start(&self) {
        let mut process = lock(&self.process);
        if process.as_mut().is_none_or(|process| !process.is_running()) {
            *process = Some(self.command.start());
        }
    }

    /// Sends SIGTERM, and SIGKILL after `grace`.
    pub fn stop(&self, grace: Duration) {
        if let Some(mut process) = lock(&self.process).take() {
            process.terminate(grace);
        }
    }

    /// Kills it with SIGKILL.
    pub fn kill(&self) {
        drop(lock(&self.process).take());
    }

    /// Stops it with SIGSTOP: its connections stay open, but it does not respond.
    pub fn pause(&self) {
        if let Some(process) = lock(&self.process).as_mut() {
            process.pause();
        }
    }

    /// Continues it after [`Service::pause`].
    pub fn resume(&self) {
        if let Some(process) = lock(&self.process).as_mut() {
            process.resume();
        }
    }

    /// Its process id, if it runs.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        lock(&self.process).as_mut().and_then(|process| process.is_running().then(|| process.id()))
    }

    /// Its output since the beginning of the test.
    #[must_use]
    pub fn output(&self) -> String {
        read_lossy(&self.command.output)
    }

    /// Whether its output since it was last started contains `text`.
    #[must_use]
    pub fn has_printed(&self, text: &str) -> bool {
        lock(&self.process).as_ref().is_some_and(|process| process.output().contains(text))
    }

    /// Panics with the end of its output if it is not running.
    #[track_caller]
    pub fn assert_running(&self) {
        match lock(&self.process).as_mut() {
            Some(process) => process.assert_running(),
            None => panic!("{} was stopped", self.command.program.display()),
        }
    }

    pub(crate) fn last_lines(&self) -> String {
        last_lines(&self.command.output)
    }
}

/// Ignores poisoning, so that a test's first panic is the one that is reported.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn read_lossy(path: &Path) -> String {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// The end of a log, for panic messages.
pub(crate) fn last_lines(path: &Path) -> String {
    let output = read_lossy(path);
    let lines: Vec<&str> = output.lines().collect();
    let from = lines.len().saturating_sub(25);
    format!("--- the end of {}:\n{}\n---", path.display(), lines[from..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ScratchDirectory;

    fn shell(scratch: &ScratchDirectory, script: &str) -> TestProcess {
        ProcessCommand::new("/bin/sh", scratch.join("output")).arguments(["-c", script]).start()
    }

    fn is_alive(id: u32) -> bool {
        // A zombie still has a directory in /proc, but an empty command line.
        std::fs::read(format!("/proc/{id}/cmdline")).is_ok_and(|line| !line.is_empty())
    }

    #[test]
    fn a_process_outlives_its_threads_but_not_its_handle() {
        let scratch = ScratchDirectory::new();
        let mut process = thread::scope(|scope| {
            let started = scope.spawn(|| shell(&scratch, "sleep 1000 & echo $!; wait"));
            started.join().expect("the thread does not panic")
        });
        let grandchild = crate::eventually("the shell prints a pid", Duration::from_secs(10), || {
            process.output().trim().parse::<u32>().ok()
        });
        process.assert_running();
        let id = process.id();
        drop(process);
        assert!(!is_alive(id));
        crate::eventually("the grandchild is gone", Duration::from_secs(10), || (!is_alive(grandchild)).then_some(()));
    }

    #[test]
    fn a_process_that_ignores_sigterm_is_killed() {
        let scratch = ScratchDirectory::new();
        let mut process = shell(&scratch, "trap '' TERM; echo ready; while :; do sleep 0.1; done");
        crate::eventually("the trap is set", Duration::from_secs(10), || {
            process.output().contains("ready").then_some(())
        });
        assert_eq!(process.terminate(Duration::from_millis(200)).signal(), Some(9));
        assert_eq!(shell(&scratch, "exit 3").wait(Duration::from_secs(10)).code(), Some(3));
    }
}

//! A proxy's processes, and their resource usage.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::time::ClockId;
use nix::unistd::Pid;

/// How long a proxy may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A process and its children. Dropping it stops them.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

/// Memory in MiB.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    pub(crate) resident: f64,
    /// With each shared page divided by the number of processes that share it (PSS).
    pub(crate) proportional: f64,
    /// Memory that is not backed by a file, so the kernel cannot drop and reread it.
    pub(crate) anonymous: f64,
}

impl Process {
    /// Starts a process with its output in `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Self {
        let output = std::fs::File::create(log).expect("a log");
        let errors = output.try_clone().expect("a log");
        let child = command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn();
        Self { child: child.unwrap_or_else(|error| panic!("{command:?}: {error}")), log: log.to_owned() }
    }

    /// Waits until `condition` holds for the log.
    pub(crate) fn wait_until(&mut self, what: &str, mut condition: impl FnMut(&str) -> bool) {
        let deadline = Instant::now() + START_TIMEOUT;
        while !condition(&self.log()) {
            let ended = self.child.try_wait().expect("its state");
            assert!(ended.is_none() && Instant::now() < deadline, "{what}: {ended:?}, {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The CPU time of all its processes so far, including exited threads.
    pub(crate) fn cpu(&self) -> Duration {
        let time = |process: &u32| {
            let process = Pid::from_raw(i32::try_from(*process).expect("a process"));
            Some(Duration::from(ClockId::pid_cpu_clock_id(process).ok()?.now().ok()?))
        };
        self.tree().iter().filter_map(time).sum()
    }

    /// The memory of all its processes.
    pub(crate) fn memory(&self) -> Memory {
        let mut memory = Memory { resident: 0.0, proportional: 0.0, anonymous: 0.0 };
        for process in self.tree() {
            let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).expect("its memory");
            let field = |name: &str| {
                let line = rollup.lines().find(|line| line.starts_with(name)).expect("a field");
                line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).expect("a number") / 1024.0
            };
            memory.resident += field("Rss:");
            memory.proportional += field("Pss:");
            memory.anonymous += field("Anonymous:");
        }
        memory
    }

    /// The process and its descendants.
    fn tree(&self) -> Vec<u32> {
        let all: Vec<(u32, u32)> = std::fs::read_dir("/proc")
            .expect("/proc")
            .filter_map(|entry| {
                let process: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
                let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
                // The name before it may contain anything (proc_pid_stat(5)).
                let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
                Some((process, parent))
            })
            .collect();
        let mut tree = vec![self.child.id()];
        let mut next = 0;
        while let Some(parent) = tree.get(next).copied() {
            tree.extend(all.iter().filter(|(_, of)| *of == parent).map(|(process, _)| *process));
            next += 1;
        }
        tree
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let id = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        let _ = id.map(|id| rustix::process::kill_process(id, rustix::process::Signal::TERM));
        let deadline = Instant::now() + Duration::from_secs(3);
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

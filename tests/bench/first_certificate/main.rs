//! Benchmarks pintle's first certificate against client-go's certificate manager. Run with
//! `tests/bench/first_certificate/run`.
//!
//! Each round runs every program once, as a whole process, against one real control plane: it reads a bootstrap
//! kubeconfig, generates a P-256 key, has its request approved and signed, and publishes the pair. Ratios are
//! computed within a round, so that other load on the machine affects both sides. Nothing is asserted.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use pintle_test_support::{BootstrapCredential, ControlPlane, Options, ScratchDirectory};

/// The path of the program built from `client_go/`.
const CLIENT_GO: &str = "PINTLE_BENCH_CLIENT_GO";
/// The path of another pintle for comparison, such as one from before a change.
const OTHER: &str = "PINTLE_BENCH_OTHER";
const ROUNDS: usize = 25;
const DEADLINE: Duration = Duration::from_secs(60);

/// A program, and how to get its arguments.
struct Program {
    name: &'static str,
    path: PathBuf,
    arguments: fn(&Bed, &Path, &str) -> Vec<String>,
}

struct Bed {
    bootstrap_kubeconfig: String,
    scratch: ScratchDirectory,
}

/// A process's times in milliseconds.
#[derive(Clone, Copy)]
struct Figures {
    /// From its start until the pair is current.
    published: f64,
    /// From its start until it exits. By then, pintle has also tested the certificate and cleaned up.
    exited: f64,
    /// CPU time in user space and kernel.
    cpu: f64,
}

/// A row's title and figure.
type Row = (&'static str, fn(&Figures) -> f64);

fn main() {
    let control_plane = ControlPlane::start(Options { audit: false, ..Options::default() });
    let bed = Bed {
        bootstrap_kubeconfig: control_plane
            .bootstrap_kubeconfig(BootstrapCredential::SecretToken)
            .display()
            .to_string(),
        scratch: ScratchDirectory::new(),
    };
    let programs = programs();
    let mut rounds: Vec<Vec<Figures>> = Vec::new();
    // The first round warms the caches and is not counted.
    for round in 0..=ROUNDS {
        let mut figures: Vec<(usize, Figures)> = Vec::new();
        for turn in 0..programs.len() {
            let index = (round + turn) % programs.len();
            figures.push((index, measure(&bed, &programs[index], &format!("round-{round}-{index}"))));
        }
        figures.sort_by_key(|(index, _)| *index);
        rounds.push(figures.into_iter().map(|(_, figures)| figures).collect());
    }
    print(&programs, &rounds[1..]);
}

fn programs() -> Vec<Program> {
    let client_go = std::env::var_os(CLIENT_GO).expect("tests/bench/first_certificate/run names client-go's program");
    let mut programs = vec![
        Program { name: "client-go", path: client_go.into(), arguments: arguments_of_client_go },
        Program { name: "pintle", path: env!("CARGO_BIN_EXE_pintle").into(), arguments: arguments_of_pintle },
    ];
    if let Some(other) = std::env::var_os(OTHER) {
        programs.push(Program { name: "pintle other", path: other.into(), arguments: arguments_of_pintle });
    }
    programs
}

fn arguments_of_client_go(bed: &Bed, directory: &Path, node: &str) -> Vec<String> {
    let pairs = directory.join("pki").display().to_string();
    vec![bed.bootstrap_kubeconfig.clone(), pairs, node.to_owned()]
}

fn arguments_of_pintle(bed: &Bed, directory: &Path, node: &str) -> Vec<String> {
    let flag = |name: &str, file: &str| format!("--{name}={}", directory.join(file).display());
    vec![
        "run".to_owned(),
        "--once".to_owned(),
        format!("--node-name={node}"),
        format!("--bootstrap-kubeconfig={}", bed.bootstrap_kubeconfig),
        flag("config", "config.toml"),
        flag("kubeconfig", "kubeconfig"),
        flag("cert-dir", "pki"),
        flag("state-dir", "state"),
    ]
}

fn measure(bed: &Bed, program: &Program, node: &str) -> Figures {
    let directory = bed.scratch.join(node);
    std::fs::create_dir_all(directory.join("pki")).expect("a directory");
    std::fs::write(directory.join("config.toml"), "").expect("a file");
    let log = std::fs::File::create(directory.join("log")).expect("a file");
    let current = directory.join("pki/kubelet-client-current.pem");
    let mut command = Command::new(&program.path);
    command.args((program.arguments)(bed, &directory, node)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let (cpu, started) = (cpu_of_children(), Instant::now());
    let mut process = command.spawn().expect("it starts");
    let mut published = None;
    let status = loop {
        if published.is_none() && current.exists() {
            published = Some(started.elapsed());
        }
        if let Some(status) = process.try_wait().expect("it can be waited for") {
            break status;
        }
        assert!(started.elapsed() < DEADLINE, "{} takes too long", program.name);
        std::thread::sleep(Duration::from_micros(200));
    };
    let exited = started.elapsed();
    let said = || std::fs::read_to_string(directory.join("log")).unwrap_or_default();
    assert!(status.success(), "{} failed: {}", program.name, said());
    // It may have been published between the last check and the exit.
    let published = published.or_else(|| current.exists().then_some(exited)).expect("there is a pair");
    Figures { published: milliseconds(published), exited: milliseconds(exited), cpu: cpu_of_children() - cpu }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// CPU time of all children that have exited and been waited for, in milliseconds.
fn cpu_of_children() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("the kernel keeps account");
    let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(u64::try_from(microseconds).unwrap_or_default()).as_secs_f64() * 1000.0
}

fn print(programs: &[Program], rounds: &[Vec<Figures>]) {
    print!("{:<42}", format!("median of {} rounds, ms", rounds.len()));
    for program in programs {
        print!("{:>14}", program.name);
    }
    for program in &programs[1..] {
        print!("{:>26}", format!("{} / client-go", program.name));
    }
    println!();
    let rows: [Row; 3] = [
        ("from start to the current pair", |figures| figures.published),
        ("from start to exit", |figures| figures.exited),
        ("CPU of the whole process", |figures| figures.cpu),
    ];
    for (title, figure) in rows {
        print!("{title:<42}");
        for index in 0..programs.len() {
            print!("{:>14.1}", median(rounds.iter().map(|round| figure(&round[index]))));
        }
        for index in 1..programs.len() {
            print!("{:>26.2}", median(rounds.iter().map(|round| figure(&round[index]) / figure(&round[0]))));
        }
        println!();
    }
}

fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

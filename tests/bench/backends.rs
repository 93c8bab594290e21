//! Benchmarks key generation and signing of the backends, in the agent's process and in a child process.
//!
//! Run with `cargo bench --profile dist --bench backends`. Devices whose software is not installed are skipped.
//! Nothing is asserted: what matters is the difference between the two columns on one machine.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pintle::config::ProcessIsolation;
use pintle::keys::ModuleConfiguration;
use pintle::keys::isolation::IsolatedBackend;
use pintle_backend_file::FileBackend;
use pintle_plugins_api::{KeyAlgorithm, KeyBackend, KeyId};

const SIGNATURES: usize = 2000;
const KEYS: usize = 30;
const PIN: &str = "31415926";
/// Set in the process that measures: modules read their configuration from the environment, which is set for it
/// first.
const DIRECTORY: &str = "PINTLE_BENCH_DIRECTORY";

fn main() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        let directory = tempfile::tempdir().expect("a directory");
        let status = Command::new(std::env::current_exe().expect("this program"))
            .env(DIRECTORY, directory.path())
            .env("SOFTHSM2_CONF", directory.path().join("softhsm2.conf"))
            .status()
            .expect("this program starts again");
        std::process::exit(status.code().unwrap_or(1));
    };
    println!("{:<22}{:>12}{:>12}{:>12}{:>12}{:>14}", "", "in-process", "", "isolated", "", "difference");
    println!("{:<22}{:>12}{:>12}{:>12}{:>12}{:>14}", "", "p50", "p99", "p50", "p99", "of p50");
    let mut file = FileBackend::open(&directory.join("keys")).expect("the file backend");
    print("file", &measure(&mut file, KeyAlgorithm::EcdsaP256), None);
    if let Some(token) = token(&directory) {
        compare("softhsm", &token, KeyAlgorithm::EcdsaP256);
    }
    match tpm(&directory) {
        Some((module, mut process)) => {
            compare("swtpm", &module, KeyAlgorithm::EcdsaP256);
            process.kill().expect("swtpm can be stopped");
            process.wait().expect("swtpm stops");
        }
        None => println!("skipped: swtpm (needs swtpm, and cargo build --profile dist -p pintle-backend-tpm)"),
    }
}

fn compare(name: &str, module: &ModuleConfiguration, algorithm: KeyAlgorithm) {
    let mut isolated = IsolatedBackend::new(name, module.clone(), ProcessIsolation::default())
        .expect("a backend")
        .with_program(env!("CARGO_BIN_EXE_pintle"));
    let isolated = measure(&mut isolated, algorithm);
    let mut opened = module.open().expect("the module opens in this process");
    print(name, &measure(opened.as_mut(), algorithm), Some(&isolated));
}

/// Sorted durations of key generation and of signing.
struct Times {
    generate: Vec<Duration>,
    sign: Vec<Duration>,
}

fn measure(backend: &mut dyn KeyBackend, algorithm: KeyAlgorithm) -> Times {
    let ids: Vec<_> = (0..KEYS).map(|number| KeyId::new(format!("bench_{number}")).expect("an id")).collect();
    let time = |work: &mut dyn FnMut()| {
        let started = Instant::now();
        work();
        started.elapsed()
    };
    backend.list().expect("it answers");
    let mut generate: Vec<_> =
        ids.iter().map(|id| time(&mut || drop(backend.generate(id, algorithm).expect("a key")))).collect();
    // A TLS 1.3 client signs 130 bytes with SHA-256 (RFC 8446, section 4.4.3).
    let message = [0x5a; 130];
    let scheme = algorithm.schemes()[0];
    let mut sign: Vec<_> = (0..SIGNATURES)
        .map(|_| time(&mut || drop(backend.sign(&ids[0], scheme, &message).expect("a signature"))))
        .collect();
    for id in &ids {
        backend.delete(id).expect("deleted");
    }
    generate.sort();
    sign.sort();
    Times { generate, sign }
}

fn print(name: &str, here: &Times, isolated: Option<&Times>) {
    let at = |times: &[Duration], percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    let microseconds = |time: Duration| format!("{:.0} µs", time.as_secs_f64() * 1e6);
    for (what, pick) in
        [("generate", (|times| &times.generate) as fn(&Times) -> &Vec<Duration>), ("sign", |times| &times.sign)]
    {
        let here = pick(here);
        let mut line = format!(
            "{:<22}{:>12}{:>12}",
            format!("{name} {what}"),
            microseconds(at(here, 50)),
            microseconds(at(here, 99))
        );
        if let Some(isolated) = isolated.map(pick) {
            let difference = (at(isolated, 50).as_secs_f64() - at(here, 50).as_secs_f64()) * 1e6;
            line += &format!(
                "{:>12}{:>12}{:>14}",
                microseconds(at(isolated, 50)),
                microseconds(at(isolated, 99)),
                format!("{difference:+.0} µs")
            );
        }
        println!("{line}");
    }
}

/// A SoftHSM token; `None` if SoftHSM is not installed.
fn token(directory: &Path) -> Option<ModuleConfiguration> {
    let module = ["/usr/lib/softhsm", "/usr/lib/x86_64-linux-gnu/softhsm", "/usr/lib/aarch64-linux-gnu/softhsm"]
        .iter()
        .map(|directory| Path::new(directory).join("libsofthsm2.so"))
        .find(|path| path.exists())?;
    std::fs::create_dir(directory.join("tokens")).expect("a directory");
    let settings = format!("directories.tokendir={}\nlog.level=ERROR\n", directory.join("tokens").display());
    std::fs::write(directory.join("softhsm2.conf"), settings).expect("softhsm2.conf");
    let status = Command::new("softhsm2-util")
        .args(["--init-token", "--free", "--label", "bench", "--pin", PIN, "--so-pin", PIN])
        .stdout(Stdio::null())
        .status()
        .ok()?;
    assert!(status.success(), "softhsm2-util makes a token");
    let pin = directory.join("pin");
    std::fs::write(&pin, PIN).expect("the PIN's file");
    std::fs::set_permissions(&pin, std::os::unix::fs::PermissionsExt::from_mode(0o400)).expect("its mode");
    Some(ModuleConfiguration::Pkcs11 {
        uri: "pkcs11:token=bench".to_owned(),
        module: Some(module),
        pin_file: Some(pin),
    })
}

/// A software TPM and its plugin; `None` if either is not installed.
fn tpm(directory: &Path) -> Option<(ModuleConfiguration, Child)> {
    let plugin = Path::new(env!("CARGO_BIN_EXE_pintle")).with_file_name("libpintle_backend_tpm.so");
    plugin.exists().then_some(())?;
    let state = directory.join("tpm");
    std::fs::create_dir(&state).expect("a directory");
    let free = |port| Some(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()?.local_addr().ok()?.port());
    let port = (0..100).find_map(|_| free(0).filter(|port| *port < u16::MAX && free(port + 1).is_some()))?;
    let process = Command::new("swtpm")
        .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"])
        .arg(format!("dir={}", state.display()))
        .arg("--server")
        .arg(format!("type=tcp,port={port},bindaddr=127.0.0.1"))
        .arg("--ctrl")
        .arg(format!("type=tcp,port={},bindaddr=127.0.0.1", port + 1))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port + 1)).is_err() {
        assert!(Instant::now() < deadline, "swtpm starts");
        std::thread::sleep(Duration::from_millis(20));
    }
    let configuration = serde_json::json!({
        "tcti": format!("swtpm:host=127.0.0.1,port={port}"),
        "directory": directory.join("tpm-keys"),
        "make_directory": true,
    });
    let module = ModuleConfiguration::Plugin {
        library: plugin.display().to_string(),
        configuration: configuration.to_string(),
        pin: false,
    };
    Some((module, process))
}

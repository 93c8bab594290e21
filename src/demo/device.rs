//! A temporary key device for the demo: a SoftHSM token, or a software TPM.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::identity::StartError;
use crate::keys::plugin_trust;

/// The backend for the demo's keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// In files, as in a kubelet.
    #[default]
    File,
    /// In a PKCS#11 token.
    Pkcs11,
    /// In a TPM 2.0.
    Tpm,
}

/// Not a secret: the token lives for a minute, in a directory that only its owner can enter.
const PIN: &str = "throwaway";
/// Where distributions install SoftHSM's module.
const SOFTHSM_DIRECTORIES: [&str; 6] = [
    "/usr/lib/softhsm",
    "/usr/lib/x86_64-linux-gnu/softhsm",
    "/usr/lib/aarch64-linux-gnu/softhsm",
    "/usr/lib64/pkcs11",
    "/usr/lib64/softhsm",
    "/usr/local/lib/softhsm",
];
const TPM_PLUGIN: &str = "libpintle_backend_tpm.so";
/// How long swtpm may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The demo's key device. Dropping it stops and removes the device.
pub struct Device {
    /// Its part of the configuration file, TOML.
    pub configuration: String,
    /// A description for the user.
    pub sentence: String,
    tpm: Option<Child>,
    /// The directory of a copied plugin, if it had to be copied.
    _plugin: Option<TempDir>,
}

impl Device {
    /// Creates the device. Its files are placed in `directory`.
    ///
    /// # Errors
    /// If a program or library is missing; the hint names its package.
    pub fn set_up(backend: Backend, directory: &Path) -> Result<Self, StartError> {
        match backend {
            Backend::File => Ok(Self {
                configuration: String::new(),
                sentence: "The private keys are in files; try --backend pkcs11 or --backend tpm.".to_owned(),
                tpm: None,
                _plugin: None,
            }),
            Backend::Pkcs11 => Self::token(directory),
            Backend::Tpm => Self::tpm(directory),
        }
    }

    fn token(directory: &Path) -> Result<Self, StartError> {
        let module = SOFTHSM_DIRECTORIES
            .iter()
            .map(|directory| Path::new(directory).join("libsofthsm2.so"))
            .find(|path| path.exists())
            .ok_or_else(|| missing("SoftHSM's module libsofthsm2.so", "softhsm2"))?;
        let failed = |error: io::Error| StartError {
            detail: format!("cannot set up the token in {}: {error}", directory.display()),
            hint: "the demo needs a writable temporary directory; see TMPDIR".to_owned(),
        };
        let (tokens, file, pin) = (directory.join("tokens"), directory.join("softhsm2.conf"), directory.join("pin"));
        std::fs::create_dir(&tokens).map_err(failed)?;
        let settings = format!("directories.tokendir = {}\nlog.level = ERROR\n", tokens.display());
        std::fs::write(&file, settings).map_err(failed)?;
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(&pin)
            .and_then(|mut file| io::Write::write_all(&mut file, PIN.as_bytes()))
            .map_err(failed)?;
        let output = Command::new("softhsm2-util")
            .args(["--init-token", "--free", "--label", "pintle-demo", "--pin", PIN, "--so-pin", PIN])
            .env("SOFTHSM2_CONF", &file)
            .stdin(Stdio::null())
            .output()
            .map_err(|_| missing("softhsm2-util", "softhsm2"))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            return Err(StartError {
                detail: format!("softhsm2-util cannot create a token: {words}"),
                hint: "check whether softhsm2-util --show-slots works".to_owned(),
            });
        }
        let configuration = format!(
            "backend = \"token\"\n[backends.token]\ntype = \"pkcs11\"\nuri = \"pkcs11:token=pintle-demo\"\n\
             module = {}\npin-file = {}\nisolation = {{ environment = {{ SOFTHSM2_CONF = {} }} }}\n",
            quoted(&module),
            quoted(&pin),
            quoted(&file)
        );
        let sentence = "The private keys are made in a SoftHSM token and stay there; a child process, pintle \
                        plugin-host, holds its PKCS#11 module."
            .to_owned();
        Ok(Self { configuration, sentence, tpm: None, _plugin: None })
    }

    fn tpm(directory: &Path) -> Result<Self, StartError> {
        let plugin = tpm_plugin().or_else(built_tpm_plugin).ok_or_else(|| StartError {
            detail: format!("the TPM plugin {TPM_PLUGIN} is not installed"),
            hint:
                "apt-get install pintle-tpm; in the source tree, with Debian's libtss2-dev and pkg-config: cargo build \
                   --release -p pintle-backend-tpm"
                    .to_owned(),
        })?;
        let (plugin, copy) = loadable(plugin)?;
        let (state, keys) = (directory.join("tpm-state"), directory.join("tpm-keys"));
        for path in [&state, &keys] {
            std::fs::DirBuilder::new().mode(0o700).create(path).map_err(|error| StartError {
                detail: format!("cannot store the TPM's state in {}: {error}", path.display()),
                hint: "the demo needs a writable temporary directory; see TMPDIR".to_owned(),
            })?;
        }
        // Another process may take the free port before swtpm does.
        let mut started = Ok(None);
        for _ in 0..10 {
            started = start_tpm(&state);
            if !matches!(started, Ok(None)) {
                break;
            }
        }
        let (process, port) = started?.ok_or_else(|| StartError {
            detail: "swtpm did not start".to_owned(),
            hint: "check whether swtpm socket --tpm2 works, and whether its ports are free".to_owned(),
        })?;
        let configuration = format!(
            "backend = \"tpm\"\n[backends.tpm]\ntype = \"tpm\"\ntcti = \"swtpm:host=127.0.0.1,port={port}\"\n\
             directory = {}\nlibrary = {}\n",
            quoted(&keys),
            quoted(&plugin)
        );
        let sentence = format!(
            "The private keys are made in a software TPM (swtpm, port {port}) and can be used by it alone; a child \
             process, pintle plugin-host, holds the plugin."
        );
        Ok(Self { configuration, sentence, tpm: Some(process), _plugin: copy })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(tpm) = &mut self.tpm {
            let _ = tpm.kill();
            let _ = tpm.wait();
        }
    }
}

/// The path of the installed plugin, or of the one built next to this executable.
fn tpm_plugin() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.join(TPM_PLUGIN)));
    [Some(Path::new("/usr/lib/pintle/plugins").join(TPM_PLUGIN)), beside]
        .into_iter()
        .flatten()
        .find(|path| path.exists())
}

/// The path to load the plugin from. pintle does not load a plugin that other users could replace, as in a source
/// tree below /tmp, so such a plugin is copied to a private directory.
fn loadable(plugin: PathBuf) -> Result<(PathBuf, Option<TempDir>), StartError> {
    let Err(refused) = plugin_trust().check(&plugin.display().to_string()) else { return Ok((plugin, None)) };
    let own = ["XDG_RUNTIME_DIR", "HOME"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    for directory in own.chain([PathBuf::from("/run")]) {
        let Ok(copy) = tempfile::Builder::new().prefix(".pintle-demo-").tempdir_in(directory) else { continue };
        let path = copy.path().join(TPM_PLUGIN);
        let copied = std::fs::copy(&plugin, &path)
            .and_then(|_| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)));
        if copied.is_ok() && plugin_trust().check(&path.display().to_string()).is_ok() {
            return Ok((path, Some(copy)));
        }
    }
    Err(StartError { detail: refused.to_string(), hint: refused.hint.unwrap_or_default() })
}

/// Under `cargo run`, builds the plugin if it is missing: it is a separate library that this program does not depend
/// on, so cargo has not built it.
fn built_tpm_plugin() -> Option<PathBuf> {
    let (cargo, tree) = (std::env::var_os("CARGO")?, std::env::var_os("CARGO_MANIFEST_DIR")?);
    let program = std::env::current_exe().ok()?;
    let profile = program.parent()?.file_name()?.to_str()?;
    eprintln!("Building the TPM plugin (cargo build -p pintle-backend-tpm).");
    let mut build = Command::new(cargo);
    build
        .args(["build", "--quiet", "--package", "pintle-backend-tpm", "--manifest-path"])
        .arg(Path::new(&tree).join("Cargo.toml"));
    if profile == "release" {
        build.arg("--release");
    }
    build.status().ok()?.success().then(tpm_plugin)?
}

/// Starts swtpm on a free port and the next one, which is its control channel; `None` if either is taken.
fn start_tpm(state: &Path) -> Result<Option<(Child, u16)>, StartError> {
    let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).and_then(|listener| listener.local_addr());
    let Ok(port) = free(0).map(|address| address.port()) else {
        return Ok(None);
    };
    let Some(control) = port.checked_add(1).filter(|control| free(*control).is_ok()) else {
        return Ok(None);
    };
    let mut process = Command::new("swtpm")
        .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"])
        .arg(format!("dir={}", state.display()))
        .arg("--server")
        .arg(format!("type=tcp,port={port},bindaddr=127.0.0.1"))
        .arg("--ctrl")
        .arg(format!("type=tcp,port={control},bindaddr=127.0.0.1"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|_| missing("swtpm", "swtpm"))?;
    let deadline = Instant::now() + START_TIMEOUT;
    while Instant::now() < deadline && matches!(process.try_wait(), Ok(None)) {
        if TcpStream::connect((Ipv4Addr::LOCALHOST, control)).is_ok() {
            return Ok(Some((process, port)));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = process.kill();
    let _ = process.wait();
    Ok(None)
}

fn missing(what: &str, package: &str) -> StartError {
    StartError {
        detail: format!("{what} is not installed"),
        hint: format!("apt-get install {package}; or omit --backend to keep the keys in files"),
    }
}

/// Formats a path as a TOML string.
fn quoted(path: &Path) -> String {
    toml::Value::String(path.display().to_string()).to_string()
}

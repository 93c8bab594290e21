//! `pintle backend`: inspect and test key backends.

use pintle_plugins_api::conformance::{self, Harness, THROWAWAY_PREFIX};
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, Resource};

use super::table::table;
use super::{CliError, Exit, print};
use crate::config::{Config, Flags};
use crate::keys::checks::Checks;
use crate::keys::inventory::{self, BackendEntry};
use crate::keys::{self, Keyring};
use crate::node::control::{self, ControlError, Request, Response};

/// The commands under `pintle backend`.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Show the configured backends: whether they respond, how many keys they hold, and how much space is in use
    List {
        #[command(flatten)]
        flags: Box<Flags>,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Test a backend with throwaway keys, and show what works and how long it takes
    Check {
        #[command(flatten)]
        flags: Box<Flags>,
        /// The backend's name in the configuration
        name: String,
        /// Number of concurrent users of the device
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
        callers: u8,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::List { flags, json } => list(&Config::load(&flags)?, json),
            Self::Check { flags, name, callers, json } => check(&Config::load(&flags)?, &name, callers.into(), json),
        }
    }
}

fn list(config: &Config, json: bool) -> Result<Exit, CliError> {
    let backends = match ask(config)? {
        Some(backends) => backends,
        None => open_and_ask(config)?,
    };
    let all_up = backends.iter().all(|backend| backend.error.is_none());
    if json {
        print(&super::json(&backends)?)?;
    } else {
        let header = ["NAME", "TYPE", "ISOLATION", "STATE", "KEYS", "NEW-KEYS"].map(str::to_owned).to_vec();
        let rows = backends.iter().map(|backend| {
            vec![
                backend.name.clone(),
                backend.kind.clone(),
                backend.isolation.clone(),
                backend.error.as_ref().map_or_else(|| "up".to_owned(), |error| error.kind.to_string()),
                backend.keys.map(|keys| keys.to_string()).unwrap_or_default(),
                if backend.new_keys { "yes" } else { "" }.to_owned(),
            ]
        });
        print(&table(&std::iter::once(header).chain(rows).collect::<Vec<_>>()))?;
        for backend in &backends {
            print(&usage_line(&backend.name, &backend.usage))?;
        }
        for (name, error) in backends.iter().filter_map(|backend| Some((&backend.name, backend.error.as_ref()?))) {
            print(&problem_lines(name, error))?;
        }
    }
    Ok(if all_up { Exit::Ok } else { Exit::Problem })
}

/// The line about resource usage below a table; empty if the device does not report any.
pub(super) fn usage_line(name: &str, resources: &[Resource]) -> String {
    let resources: Vec<_> = resources.iter().map(Resource::to_string).collect();
    if resources.is_empty() { String::new() } else { format!("  {name}: {}\n", resources.join(", ")) }
}

/// The lines about a backend's error below a table.
pub(super) fn problem_lines(name: &str, error: &BackendError) -> String {
    let hint = error.hint.as_ref().map(|hint| format!("  hint: {hint}\n")).unwrap_or_default();
    format!("  {name}: {error}\n{hint}")
}

/// Asks the running agent for its backends; `None` if no agent is running.
fn ask(config: &Config) -> Result<Option<Vec<BackendEntry>>, CliError> {
    match control::ask(&config.node.control_socket(), Request::Backends) {
        Ok(Response::Backends { backends }) => Ok(Some(backends)),
        Err(ControlError::NotRunning) => Ok(None),
        answer => Err(super::unexpected(answer)),
    }
}

fn open_and_ask(config: &Config) -> Result<Vec<BackendEntry>, CliError> {
    let keyring = open_all(config)?;
    Ok(super::runtime()?.block_on(inventory::backends(config, &keyring)))
}

/// Opens all backends; for use when no agent is running.
pub(super) fn open_all(config: &Config) -> Result<Keyring, CliError> {
    Keyring::start(keys::openers(&config.node)).map_err(|error| {
        CliError::new(Exit::Problem, format!("cannot start a backend's thread: {error}"), "check ulimit -u")
    })
}

fn check(config: &Config, name: &str, callers: usize, json: bool) -> Result<Exit, CliError> {
    if !config.node.backends.contains_key(name) {
        let known: Vec<_> = config.node.backends.keys().map(String::as_str).collect();
        let detail = format!("no backend {name:?} is configured; configured backends: {}", known.join(", "));
        return Err(CliError::new(Exit::Usage, detail, format!("add a table [backends.{name}]")));
    }
    // If the agent's token has rejected the PIN, a check would use up another attempt.
    let refused = ask(config)?.into_iter().flatten().find(|backend| backend.name == name).and_then(|known| known.error);
    if let Some(error) = refused.filter(|error| error.kind == BackendErrorKind::Locked) {
        let detail = format!("backend {name:?} is not tested, because the running agent reports: {error}");
        return Err(CliError::new(Exit::Problem, detail, error.hint.unwrap_or_default()));
    }
    let failed = |error: BackendError| CliError::new(Exit::Problem, &error, error.hint.clone().unwrap_or_default());
    // Marks the check's keys, so that `keys prune` leaves them alone.
    let _check = Checks::begin(&config.node.state_dir);
    let algorithms = algorithms(config, name).map_err(failed)?;
    let report = conformance::run(&mut OwnDevice { config, name, callers, algorithms });
    if json {
        print(&super::json(&report)?)?;
    } else {
        print(&format!("{report}\n"))?;
    }
    Ok(if report.passed() { Exit::Ok } else { Exit::Problem })
}

/// Finds the algorithms that the device supports, by generating a key of each.
fn algorithms(config: &Config, name: &str) -> Result<Vec<KeyAlgorithm>, BackendError> {
    let mut backend = keys::open(&config.node, name)?;
    // A module that cannot be opened may also report Unsupported, which would be mistaken for an algorithm's.
    backend.list()?;
    let mut algorithms = Vec::new();
    for algorithm in KeyAlgorithm::ALL {
        let bytes = [THROWAWAY_PREFIX, b"probe/", algorithm.name().as_bytes()].concat();
        let id =
            KeyId::new(bytes).map_err(|error| BackendError::new(BackendErrorKind::Unsupported, error.to_string()))?;
        match backend.generate(&id, algorithm) {
            Ok(_) => {
                algorithms.push(algorithm);
                backend.delete(&id)?;
            }
            Err(error) if error.kind == BackendErrorKind::Unsupported => {}
            Err(error) => {
                // The key may have been created despite the error.
                let _ = backend.delete(&id);
                return Err(error);
            }
        }
    }
    if algorithms.is_empty() {
        return Err(BackendError::new(
            BackendErrorKind::Unsupported,
            "the backend supports none of pintle's key algorithms",
        ));
    }
    Ok(algorithms)
}

/// The operator's own device. The check does only what the agent does.
struct OwnDevice<'a> {
    config: &'a Config,
    name: &'a str,
    callers: usize,
    algorithms: Vec<KeyAlgorithm>,
}

impl Harness for OwnDevice<'_> {
    fn open(&mut self) -> Result<Box<dyn KeyBackend>, BackendError> {
        keys::open(&self.config.node, self.name)
    }

    fn algorithms(&self) -> Vec<KeyAlgorithm> {
        self.algorithms.clone()
    }

    fn callers(&self) -> usize {
        self.callers
    }
}

//! `pintle backend`: what holds the keys.

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
    /// Show the configured backends: whether they answer, how many keys they hold, and what room there is
    List {
        #[command(flatten)]
        flags: Box<Flags>,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Try a backend out with throwaway keys, and show what works and how long it takes
    Check {
        #[command(flatten)]
        flags: Box<Flags>,
        /// The backend's name in the configuration
        name: String,
        /// How many users the device serves at once
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
        callers: u8,
        /// JSON instead of a table
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
            print(&usage(&backend.name, &backend.usage))?;
        }
        for (name, error) in backends.iter().filter_map(|backend| Some((&backend.name, backend.error.as_ref()?))) {
            print(&trouble(name, error))?;
        }
    }
    Ok(if all_up { Exit::Ok } else { Exit::Problem })
}

/// The line below a table about the room in a backend's device; empty if there is nothing to say.
pub(super) fn usage(name: &str, resources: &[Resource]) -> String {
    let resources: Vec<_> = resources.iter().map(Resource::to_string).collect();
    if resources.is_empty() { String::new() } else { format!("  {name}: {}\n", resources.join(", ")) }
}

/// The lines below a table about what does not work.
pub(super) fn trouble(name: &str, error: &BackendError) -> String {
    let hint = error.hint.as_ref().map(|hint| format!("  hint: {hint}\n")).unwrap_or_default();
    format!("  {name}: {error}\n{hint}")
}

/// The running agent's backends; `None` if none runs.
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

/// All backends, where no agent has them open.
pub(super) fn open_all(config: &Config) -> Result<Keyring, CliError> {
    Keyring::start(keys::openers(&config.node)).map_err(|error| {
        CliError::new(Exit::Problem, format!("a backend's thread cannot be started: {error}"), "see ulimit -u")
    })
}

fn check(config: &Config, name: &str, callers: usize, json: bool) -> Result<Exit, CliError> {
    if !config.node.backends.contains_key(name) {
        let known: Vec<_> = config.node.backends.keys().map(String::as_str).collect();
        let detail = format!("no backend {name:?} is configured; there are: {}", known.join(", "));
        return Err(CliError::new(Exit::Usage, detail, format!("add a table [backends.{name}]")));
    }
    // A PIN that the agent's own token refused would be shown to it once more.
    let refused = ask(config)?.into_iter().flatten().find(|backend| backend.name == name).and_then(|known| known.error);
    if let Some(error) = refused.filter(|error| error.kind == BackendErrorKind::Locked) {
        let detail = format!("the running agent's backend {name:?} is not tried: {error}");
        return Err(CliError::new(Exit::Problem, detail, error.hint.unwrap_or_default()));
    }
    let failed = |error: BackendError| CliError::new(Exit::Problem, &error, error.hint.clone().unwrap_or_default());
    // Its keys are not what `keys prune` looks for.
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

/// The algorithms that the device makes keys of: it is asked for one of each.
fn algorithms(config: &Config, name: &str) -> Result<Vec<KeyAlgorithm>, BackendError> {
    let mut backend = keys::open(&config.node, name)?;
    // A module that cannot be opened may say Unsupported too, and that is not about algorithms.
    backend.list()?;
    let mut algorithms = Vec::new();
    for algorithm in KeyAlgorithm::ALL {
        let octets = [THROWAWAY_PREFIX, b"probe/", algorithm.name().as_bytes()].concat();
        let id =
            KeyId::new(octets).map_err(|error| BackendError::new(BackendErrorKind::Unsupported, error.to_string()))?;
        match backend.generate(&id, algorithm) {
            Ok(_) => {
                algorithms.push(algorithm);
                backend.delete(&id)?;
            }
            Err(error) if error.kind == BackendErrorKind::Unsupported => {}
            Err(error) => {
                // It may have been made all the same.
                let _ = backend.delete(&id);
                return Err(error);
            }
        }
    }
    if algorithms.is_empty() {
        return Err(BackendError::new(
            BackendErrorKind::Unsupported,
            "it makes keys of no algorithm that pintle knows",
        ));
    }
    Ok(algorithms)
}

/// The operator's own device: nothing is done to it but what the agent does.
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

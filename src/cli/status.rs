//! `pintle status`.

use pintle_agent_core::UnixTime;

use super::{CliError, Exit, print};
use crate::config::{Config, Flags, IdentityConfig};
use crate::identity::report::status_of;
use crate::node::control::{self, ControlError, Request, Response};
use crate::store::Journal;
use crate::telemetry::{IdentityStatus, ProxyStatus, Status};
use crate::world::clock;

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Output {
    /// One row per identity.
    Table,
    /// One row per identity, with more columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// The arguments of `pintle status`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let config = Config::load(&self.flags)?;
        let status = read(&config)?;
        let broken = |error: &dyn std::fmt::Display| CliError::new(Exit::Problem, error, "");
        match self.output {
            Output::Table => print(&table(&status, false))?,
            Output::Wide => print(&table(&status, true))?,
            Output::Json => {
                print(&(serde_json::to_string_pretty(&status).map_err(|error| broken(&error))? + "\n"))?;
            }
            Output::Yaml => print(&serde_saphyr::to_string(&status).map_err(|error| broken(&error))?)?,
        }
        let now = clock::now();
        // The exit code reports whether valid certificates are in use, not whether a rotation has problems.
        let all_valid = !status.identities.is_empty() && status.identities.iter().all(|identity| identity.is_good(now));
        Ok(if all_valid { Exit::Ok } else { Exit::Problem })
    }
}

/// The running agent's status; from disk if no agent is running.
pub(super) fn read(config: &Config) -> Result<Status, CliError> {
    match control::ask(&config.node.control_socket(), Request::Status) {
        Ok(Response::Status { status }) => Ok(status),
        Ok(answer) => Err(CliError::new(Exit::Problem, format!("the agent answered {answer:?}"), "restart the agent")),
        Err(ControlError::NotRunning) => from_disk(config),
        Err(error) => Err(CliError::new(Exit::Problem, &error, error.hint())),
    }
}

fn from_disk(config: &Config) -> Result<Status, CliError> {
    let states = config.identities.iter().map(journalled).collect::<Result<Vec<_>, _>>()?;
    if states.iter().all(Option::is_none) {
        return Err(CliError::new(
            Exit::Usage,
            format!("no agent is running, and {} contains no journal", config.node.state_dir.display()),
            "start it with pintle run, or specify its --state-dir",
        ));
    }
    let identities = states.into_iter().zip(&config.identities);
    let identities = identities.map(|(state, identity)| status_of(&state.unwrap_or_default(), identity));
    Ok(Status { identities: identities.collect(), backends: Vec::new() })
}

/// Reads the identity's journal; `None` if there is none.
pub(super) fn journalled(config: &IdentityConfig) -> Result<Option<pintle_agent_core::State>, CliError> {
    let journal = Journal::new(config.journal(), config.template());
    journal.load().map_err(|error| {
        let detail = format!("the journal {} cannot be used: {error}", journal.path().display());
        CliError::new(Exit::Problem, detail, error.hint())
    })
}

fn table(status: &Status, wide: bool) -> String {
    let several = status.identities.len() > 1;
    let time = |time: Option<UnixTime>| time.map(|time| time.to_string()).unwrap_or_default();
    let mut header = vec!["IDENTITY", "EXPIRES", "RESIDUAL", "ROTATES-AT", "KEY", "STATE", "SIGNER"];
    if wide {
        header.extend(["SERIAL", "ROTATIONS", "KEY-ID", "PAIR"]);
    }
    if several {
        header[0] = "SUBJECT";
        header.insert(0, "IDENTITY");
    }
    let mut rows = vec![header.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for identity in &status.identities {
        let key = identity.key.as_ref();
        let mut row = vec![
            identity.subject.clone(),
            time(identity.not_after),
            identity.not_after.map(time_left).unwrap_or_default(),
            time(identity.rotates_at),
            key.map(|key| format!("{}/{}", key.backend, key.algorithm)).unwrap_or_default(),
            identity.state.word().to_owned(),
            identity.signer_name.clone(),
        ];
        if wide {
            let key_id = key.map(|key| key.id.clone()).unwrap_or_default();
            row.extend([identity.serial.clone(), identity.rotations.to_string(), key_id, identity.pair.clone()]);
        }
        if several {
            row.insert(0, identity.identity.clone());
        }
        rows.push(row);
    }
    let mut text = String::new();
    for (index, line) in super::table::table(&rows).lines().enumerate() {
        text += line;
        text.push('\n');
        if let Some(identity) = index.checked_sub(1).map(|index| &status.identities[index]) {
            text += &problem_lines(identity);
            if let Some(proxy) = identity.proxy.as_ref().filter(|proxy| !proxy.reason.is_empty()) {
                text += &format!("  proxy {}: {}\n", proxy.address, proxy.reason);
            }
            if let Some(proxy) = identity.proxy.as_ref().filter(|_| wide) {
                text += &connections(proxy);
            }
        }
    }
    for backend in status.backends.iter().filter(|backend| !backend.up) {
        text += &format!("  backend {}: {}\n", backend.name, backend.reason);
        if !backend.hint.is_empty() {
            text += &format!("  hint: {}\n", backend.hint);
        }
    }
    text
}

/// The lines about the credential proxy.
fn connections(proxy: &ProxyStatus) -> String {
    let statistics = &proxy.statistics;
    let open: u64 = statistics.open_connections.values().sum();
    let mut text = format!(
        "  proxy {}: {open} connections, {} handshakes, {} B to the API server, {} B from it\n",
        proxy.address, statistics.server_handshakes, statistics.bytes_to_server, statistics.bytes_to_client
    );
    for (serial, count) in &statistics.open_connections {
        let earlier = if *serial == proxy.serial { "" } else { " (earlier certificate)" };
        text += &format!("    serial {serial}{earlier}: {count} connections\n");
    }
    for (reason, count) in &statistics.failures {
        text += &format!("    failed, {reason}: {count}\n");
    }
    text
}

/// The lines below an identity's row that explain its state.
fn problem_lines(identity: &IdentityStatus) -> String {
    let mut text = String::new();
    if !identity.reason.is_empty() {
        let retry = identity.retry_at.map(|at| format!("; retrying at {at}")).unwrap_or_default();
        text += &format!("  {}{retry}\n", identity.reason);
    }
    if !identity.hint.is_empty() {
        text += &format!("  hint: {}\n", identity.hint);
    }
    text
}

/// The remaining time, in the largest unit that gives a precise number.
fn time_left(end: UnixTime) -> String {
    let left = end.since(clock::now()).as_secs();
    match left {
        0 => "expired".to_owned(),
        1..=119 => format!("{left}s"),
        120..=7199 => format!("{}m", left / 60),
        7200..=172_799 => format!("{}h", left / 3600),
        _ => format!("{}d", left / 86_400),
    }
}

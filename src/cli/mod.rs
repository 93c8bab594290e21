//! The command line: one file per command.

mod backend;
mod config;
mod credential;
mod demo;
mod exit_code;
mod generate;
mod inspect;
mod keys;
mod kubeconfig;
mod migrate;
mod needs_renewal;
mod plugin_host;
mod rotate;
mod run;
mod status;
mod table;

use std::fmt;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::identity::StartError;
use crate::node::ServeError;
use crate::node::control::{ControlError, Response};

pub use exit_code::Exit;

/// Keeps a Kubernetes node's certificates rotating, with the private key in a file, a PKCS#11 token or a TPM.
#[derive(Parser)]
#[command(name = "pintle", version, max_term_width = 100, after_help = exit_code::TABLE)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent: obtain the node's certificates and keep renewing them
    Run(run::Arguments),
    /// Show the node's identities, from the running agent or from disk
    Status(status::Arguments),
    /// Rotate now
    Rotate(rotate::Arguments),
    /// Report in the exit code whether the certificate is due for renewal: 0 yes, 1 no, 2 there is none
    NeedsRenewal(needs_renewal::Arguments),
    /// Describe a certificate, a certification request or a pair
    Inspect(inspect::Arguments),
    /// List and test key backends
    #[command(subcommand)]
    Backend(backend::Command),
    /// List the keys in all backends, and destroy those that are no longer used
    #[command(subcommand)]
    Keys(keys::Command),
    /// Move an identity's key to another backend by rotating it
    Migrate(migrate::Arguments),
    /// Print a kubeconfig that authenticates as an identity: through the credential proxy, with the pair, or as an
    /// exec plugin
    Kubeconfig(kubeconfig::Arguments),
    /// Pass the pair to a client, as an exec credential plugin (client.authentication.k8s.io/v1)
    Credential(credential::Arguments),
    /// Check the configuration
    #[command(subcommand)]
    Config(config::Command),
    /// Demonstrate the agent against an embedded control plane: no cluster, no privileges, no network
    Demo(demo::Arguments),
    /// Run a backend module in a child process of the agent
    #[command(hide = true)]
    PluginHost(plugin_host::Arguments),
    /// Print a completion script for a shell
    Completions(generate::Completions),
    /// Write the manual pages
    Man(generate::Man),
}

/// A command's error: one line says what failed, and one what to do next.
#[derive(Debug)]
pub struct CliError {
    detail: String,
    hint: String,
    exit: Exit,
}

impl CliError {
    fn new(exit: Exit, detail: impl fmt::Display, hint: impl Into<String>) -> Self {
        Self { detail: detail.to_string(), hint: hint.into(), exit }
    }
}

impl From<crate::config::ConfigError> for CliError {
    fn from(error: crate::config::ConfigError) -> Self {
        Self::new(Exit::Usage, &error, error.hint.clone())
    }
}

impl From<StartError> for CliError {
    fn from(error: StartError) -> Self {
        Self::new(Exit::Problem, &error, error.hint.clone())
    }
}

impl From<ServeError> for CliError {
    fn from(error: ServeError) -> Self {
        match error {
            ServeError::Start(error) => error.into(),
            ServeError::Unfinished(identities) => {
                let named = identities.len() > 1;
                let hints =
                    identities.iter().filter(|identity| !identity.hint.is_empty()).map(|identity| match named {
                        true => format!("{}: {}", identity.identity, identity.hint),
                        false => identity.hint.clone(),
                    });
                let hint = hints.collect::<Vec<_>>().join("; ");
                let error = ServeError::Unfinished(identities);
                let otherwise = "run it again, or use a longer --timeout";
                Self::new(Exit::Problem, &error, if hint.is_empty() { otherwise.to_owned() } else { hint })
            }
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(arguments) => arguments.run(),
        Command::Status(arguments) => arguments.run(),
        Command::Rotate(arguments) => arguments.run(),
        Command::NeedsRenewal(arguments) => arguments.run(),
        Command::Inspect(arguments) => arguments.run(),
        Command::Backend(command) => command.run(),
        Command::Keys(command) => command.run(),
        Command::Migrate(arguments) => arguments.run(),
        Command::Kubeconfig(arguments) => arguments.run(),
        Command::Credential(arguments) => arguments.run(),
        Command::Config(command) => command.run(),
        Command::Demo(arguments) => arguments.run(),
        Command::PluginHost(arguments) => arguments.run(),
        Command::Completions(arguments) => arguments.run(),
        Command::Man(arguments) => arguments.run(),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("error: {}", error.detail);
            if !error.hint.is_empty() {
                eprintln!("hint: {}", error.hint);
            }
            error.exit.into()
        }
    }
}

/// Writes to standard output. A closed pipe is not an error.
///
/// # Errors
/// If the output cannot be written, for example to a full disk: it must not look complete.
fn print(text: &str) -> Result<(), CliError> {
    use std::io::Write;
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            let detail = format!("standard output cannot be written: {error}");
            Err(CliError::new(Exit::Problem, detail, "free some space, or write to another file"))
        }
        _ => Ok(()),
    }
}

/// Formats a value as JSON for scripts.
fn json(value: &impl serde::Serialize) -> Result<String, CliError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CliError::new(Exit::Problem, error, ""))?;
    Ok(text + "\n")
}

/// The error for a response that the command does not expect.
fn unexpected(answer: Result<Response, ControlError>) -> CliError {
    match answer {
        Ok(Response::Failed { reason, hint }) => CliError::new(Exit::Problem, reason, hint),
        Ok(Response::Refused { reason }) => {
            CliError::new(Exit::Problem, reason, "run the pintle that the agent was started from")
        }
        Ok(answer) => CliError::new(Exit::Problem, format!("the agent answered {answer:?}"), "restart the agent"),
        Err(error) => CliError::new(Exit::Problem, &error, error.hint()),
    }
}

/// A runtime with few threads, for a command that needs one.
fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| CliError::new(Exit::Problem, format!("cannot start a thread: {error}"), "check ulimit -u"))
}

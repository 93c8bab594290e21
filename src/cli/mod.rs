//! The command line: one file for each command.

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

/// Keeps a Kubernetes node's identity turning, with the private key in a file, a PKCS#11 token or a TPM.
#[derive(Parser)]
#[command(name = "pintle", version, max_term_width = 100, after_help = exit_code::TABLE)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent: get the node's certificate, and renew it for ever
    Run(run::Arguments),
    /// Show the node's identities, from the running agent or from disk
    Status(status::Arguments),
    /// Rotate now
    Rotate(rotate::Arguments),
    /// Tell by the exit code whether the certificate is due: 0 it is, 1 it is not, 2 there is none
    NeedsRenewal(needs_renewal::Arguments),
    /// Say in words what is in a certificate, a certification request or a pair
    Inspect(inspect::Arguments),
    /// Show and try out what holds the keys
    #[command(subcommand)]
    Backend(backend::Command),
    /// Show the keys in all backends, and destroy those that nobody needs
    #[command(subcommand)]
    Keys(keys::Command),
    /// Move an identity's key to another backend, by an ordinary rotation
    Migrate(migrate::Arguments),
    /// Print a kubeconfig that speaks as an identity: through the credential proxy, with the pair, or as an exec plugin
    Kubeconfig(kubeconfig::Arguments),
    /// Hand the pair to a client, as an exec credential plugin (client.authentication.k8s.io/v1)
    Credential(credential::Arguments),
    /// Work on the configuration
    #[command(subcommand)]
    Config(config::Command),
    /// Show the agent at work against an embedded control plane: no cluster, no privileges, no network
    Demo(demo::Arguments),
    /// Hold a module, in a child that the agent starts
    #[command(hide = true)]
    PluginHost(plugin_host::Arguments),
    /// Print a completion script for a shell
    Completions(generate::Completions),
    /// Write the manual pages
    Man(generate::Man),
}

/// What went wrong, as a person at a terminal is told: one line what, one line what to do next.
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
                let otherwise = "run it again, perhaps with a longer --timeout";
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

/// Writes to standard output. Who reads it may have seen enough: that is no error.
///
/// # Errors
/// If it cannot be written: a full disk must not look like an answer.
fn print(text: &str) -> Result<(), CliError> {
    use std::io::Write;
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            let detail = format!("standard output cannot be written: {error}");
            Err(CliError::new(Exit::Problem, detail, "make room, or write it elsewhere"))
        }
        _ => Ok(()),
    }
}

/// A value as JSON for scripts.
fn json(value: &impl serde::Serialize) -> Result<String, CliError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CliError::new(Exit::Problem, error, ""))?;
    Ok(text + "\n")
}

/// What a running agent answered instead of what it was asked for.
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

/// The runtime of a command that needs one: few threads, since there is little to do at once.
fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(|error| {
        CliError::new(Exit::Problem, format!("the system has no threads left: {error}"), "see ulimit -u, and free some")
    })
}

//! Runs the demo: the real agent and an embedded control plane, and prints the events of both.

use std::io::{IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use pintle_agent_core::UnixTime;
use tokio::sync::{broadcast, watch};

use super::control_plane::{self, ControlPlane, Observation};
use super::device::{Backend, Device};
use crate::config::{Config, Flags};
use crate::identity::StartError;
use crate::node::{self, ServeError, Until};
use crate::proxy::ActivatedSockets;
use crate::telemetry::{Event, Log, Record, Telemetry};

/// The demo's settings.
pub struct Options {
    /// The lifetime of the certificates.
    pub cluster_signing_duration: Duration,
    /// Whether requests wait for manual approval.
    pub manual_approval: bool,
    /// Whether to continue after two rotations.
    pub keep: bool,
    /// Where the keys are stored.
    pub backend: Backend,
}

/// The demo stops after this many rotations.
const DEMONSTRATED_ROTATIONS: u32 = 2;
/// The width of the drawing of a certificate's lifetime, in characters.
const WIDTH: usize = 60;

/// Runs the demo until it is complete or interrupted.
///
/// # Errors
/// If the temporary directory cannot be created, or the control plane or the agent cannot start.
pub async fn run(options: Options) -> Result<(), ServeError> {
    let problem = |error: &dyn std::fmt::Display| StartError {
        detail: error.to_string(),
        hint: "the demo needs a temporary directory and a loopback port".to_owned(),
    };
    // Private, even though the credentials in it are for a throwaway cluster.
    let directory = tempfile::Builder::new()
        .prefix("pintle-demo-")
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir()
        .map_err(|error| problem(&error))?;
    let device = Device::set_up(options.backend, directory.path())?;
    let control_plane = control_plane::start(control_plane::Options {
        cluster_signing_duration: options.cluster_signing_duration,
        manual_approval: options.manual_approval,
        approval_delay: Duration::from_millis(700),
    })
    .await
    .map_err(|error| problem(&error))?;

    let path = directory.path();
    let bootstrap = path.join("bootstrap-kubeconfig");
    std::fs::write(&bootstrap, control_plane.bootstrap_kubeconfig()).map_err(|error| problem(&error))?;
    let admin = control_plane.admin_kubeconfig().map_err(|error| problem(&error))?;
    std::fs::write(path.join("admin-kubeconfig"), admin).map_err(|error| problem(&error))?;
    let config = Config::load(&Flags {
        config: Some(write_configuration(path, &device.configuration).map_err(|error| problem(&error))?),
        kubeconfig: Some(path.join("kubeconfig")),
        bootstrap_kubeconfig: Some(bootstrap),
        cert_dir: Some(path.join("pki")),
        state_dir: Some(path.join("state")),
        node_name: Some("demo-node".to_owned()),
        ..Flags::default()
    })
    .map_err(|error| problem(&error))?;
    std::fs::create_dir_all(&config.node.state_dir).map_err(|error| problem(&error))?;

    let telemetry = Telemetry::new(Log::silent());
    let (stop, stopped) = watch::channel(false);
    let mut signalled = node::stopped_by_signals()?;
    let printer = Printer::new(&options, path);
    printer.introduce(&control_plane, &device.sentence);
    let printed_all = printer.print_events(telemetry.events(), control_plane.observe());
    let printing = tokio::spawn(async move {
        tokio::select! {
            () = printed_all => {}
            _ = signalled.wait_for(|signalled| *signalled) => {}
        }
        // Stops the agent, and with it the demo.
        let _ = stop.send(true);
    });
    node::serve(config, &telemetry, Until::Stopped, stopped, ActivatedSockets::default()).await?;
    printing.abort();
    Ok(())
}

/// Replaces the machine's configuration file.
fn write_configuration(directory: &Path, backends: &str) -> std::io::Result<std::path::PathBuf> {
    let path = directory.join("config.toml");
    std::fs::write(&path, format!("# All other settings are flags.\n{backends}"))?;
    Ok(path)
}

struct Printer {
    started: Instant,
    colour: bool,
    keep: bool,
    manual_approval: bool,
    kubectl: String,
    pair: String,
    rotations: u32,
}

impl Printer {
    fn new(options: &Options, directory: &Path) -> Self {
        Self {
            started: Instant::now(),
            colour: std::io::stdout().is_terminal(),
            keep: options.keep,
            manual_approval: options.manual_approval,
            kubectl: format!("kubectl --kubeconfig {}", directory.join("admin-kubeconfig").display()),
            pair: directory.join("pki/kubelet-client-current.pem").display().to_string(),
            rotations: 0,
        }
    }

    fn introduce(&self, control_plane: &ControlPlane, keys: &str) {
        self.say(&format!(
            "An embedded control plane listens on {}, and the agent gets a bootstrap token for it.\n\
             The agent is the one that `pintle run` runs; only the server is embedded.\n{keys}\n",
            control_plane.server_url()
        ));
        if self.keep || self.manual_approval {
            self.say(&format!(
                "Inspect it from another terminal:\n  {kubectl} get csr\n  openssl x509 -noout -subject \
                 -dates -in {pair}\n",
                kubectl = self.kubectl,
                pair = self.pair
            ));
        }
    }

    /// Prints events until the demo is complete.
    async fn print_events(
        mut self,
        mut events: broadcast::Receiver<Record>,
        mut observations: broadcast::Receiver<Observation>,
    ) {
        loop {
            tokio::select! {
                // The control plane's observations are printed before the agent's reaction to them.
                biased;
                observation = observations.recv() => match observation {
                    Ok(observation) => self.control_plane(&observation),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                event = events.recv() => match event {
                    Ok(Record { event, .. }) => {
                        if self.agent(&event) && !self.keep {
                            self.say(
                                "\nTwo rotations, each with a new key; the demo is complete. Try --keep or \
                                 --manual-approval.",
                            );
                            return;
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            }
        }
    }

    fn control_plane(&self, observation: &Observation) {
        let line = match observation {
            Observation::Created { name, requester, .. } => format!("CSR {name} created by {requester}: Pending"),
            Observation::Approved { name, .. } => format!("CSR {name}: Approved"),
            Observation::Issued { name, serial, .. } => format!("CSR {name}: Issued, serial {serial}"),
            Observation::Denied { name, message } => format!("CSR {name}: Denied ({message})"),
            Observation::Failed { name, message } => format!("CSR {name}: Failed ({message})"),
            Observation::Authenticated { user, serial: Some(serial), .. } => {
                format!("new connection: {user}, certificate serial {serial}")
            }
            Observation::Authenticated { user, .. } => format!("new connection: {user}"),
            _ => return,
        };
        self.line("control plane", "36", &line);
    }

    /// Prints an event of the agent. Returns whether the demo is complete.
    fn agent(&mut self, event: &Event) -> bool {
        match event {
            Event::RotationStarted { reason } => {
                let title = match self.rotations {
                    0 => "Bootstrap".to_owned(),
                    number => format!("Rotation {number}"),
                };
                self.say(&format!("\n{title}: a certificate is needed, {reason}"));
                return false;
            }
            Event::RequestPending { request, approved: false } if self.manual_approval => {
                self.line("agent", "33", &event.sentence());
                self.say(&format!("  approve it: {} certificate approve {request}", self.kubectl));
                return false;
            }
            Event::RequestPending { .. } | Event::CertificateIssued { .. } | Event::Started { .. } | Event::Stopped => {
                return false;
            }
            _ => {}
        }
        self.line("agent", if event.level() == crate::telemetry::Level::Info { "32" } else { "33" }, &event.sentence());
        if let Event::Holding { opens, rotates_at, not_after, .. } = event {
            self.draw(*opens, *rotates_at, *not_after);
            self.rotations += 1;
        }
        self.rotations > DEMONSTRATED_ROTATIONS
    }

    /// Draws the certificate's remaining lifetime, with its rotation window and the scheduled rotation.
    fn draw(&self, opens: UnixTime, rotates_at: UnixTime, not_after: UnixTime) {
        let time = UnixTime::as_milliseconds;
        let now = crate::world::clock::now().as_milliseconds();
        let life = (time(not_after) - now).max(1);
        let place =
            |at: i64| usize::try_from((at - now).clamp(0, life) * WIDTH as i64 / life).unwrap_or(0).min(WIDTH - 1);
        let (opens, rotates) = (place(time(opens)), place(time(rotates_at)));
        let closes = place(now + life * 9 / 10);
        let bar: String = (0..WIDTH)
            .map(|column| match column {
                column if column == rotates => '▼',
                column if (opens..closes).contains(&column) => '▒',
                _ => '─',
            })
            .collect();
        #[allow(clippy::cast_precision_loss, reason = "milliseconds of a demo's certificate")]
        let seconds = |milliseconds: i64| milliseconds as f64 / 1000.0;
        self.say(&format!(
            "          now ├{bar}┤ expires in {:.0} s; rotates in {:.0} s",
            seconds(life),
            seconds(time(rotates_at) - now)
        ));
    }

    fn line(&self, source: &str, colour: &str, text: &str) {
        let at = self.started.elapsed().as_secs_f64();
        if self.colour {
            self.say(&format!("{at:5.1} s  \u{1b}[{colour}m{source:<13}\u{1b}[0m  {text}"));
        } else {
            self.say(&format!("{at:5.1} s  {source:<13}  {text}"));
        }
    }

    fn say(&self, text: &str) {
        // The terminal may be closed at any time.
        let _ = writeln!(std::io::stdout().lock(), "{text}");
    }
}

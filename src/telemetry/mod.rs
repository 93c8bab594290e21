//! What the agent tells the world: events, declared once, that feed the log, the status and whoever else listens.

mod event;
mod lines;
mod log;
pub mod metrics;
mod notify;
mod proxy;
mod status;

pub use event::{Event, Level};
pub use log::{Format, Log};
pub use notify::Notifier;
pub use proxy::{FailureReason, ProxyStatus, Statistics};
pub use status::{BackendStatus, IdentityStatus, KeyStatus, State, Status};

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::{broadcast, watch};

/// How many events a slow listener may fall behind before it loses some.
const BACKLOG: usize = 256;

/// Where events go.
pub struct Telemetry {
    log: Log,
    events: broadcast::Sender<Event>,
    status: watch::Sender<Status>,
    notifier: Notifier,
    /// How the credential proxy of each identity stands, by the identity's name.
    proxies: Mutex<BTreeMap<String, ProxyGauge>>,
}

/// Tells how a credential proxy stands right now; `None` once it has ended.
pub type ProxyGauge = Box<dyn Fn() -> Option<ProxyStatus> + Send>;

impl Telemetry {
    /// Events go to this log, and to the service manager where there is one.
    pub fn new(log: Log) -> Self {
        Self {
            log,
            events: broadcast::Sender::new(BACKLOG),
            status: watch::Sender::new(Status::default()),
            notifier: Notifier::from_environment(),
            proxies: Mutex::default(),
        }
    }

    /// Tells that something happened.
    pub fn emit(&self, event: Event) {
        self.log.write(&event);
        // Nobody needs to listen.
        let _ = self.events.send(event);
    }

    /// Waits, for a short while, until the log is written: to be called before the process ends.
    pub fn flush(&self) {
        self.log.flush();
    }

    /// All events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Replaces the status of one identity.
    pub fn set_status(&self, identity: IdentityStatus) {
        self.notifier.status(&self.with_proxy(identity.clone()));
        self.status.send_modify(|status| {
            match status.identities.iter_mut().find(|known| known.identity == identity.identity) {
                Some(known) => *known = identity,
                None => status.identities.push(identity),
            }
        });
    }

    /// Has this tell how the credential proxy of an identity stands whenever somebody wants to know.
    pub fn watch_proxy(&self, identity: &str, gauge: ProxyGauge) {
        self.proxies.lock().unwrap_or_else(PoisonError::into_inner).insert(identity.to_owned(), gauge);
    }

    /// The status as of now, with what changes too often to be told of each time.
    pub fn current_status(&self) -> Status {
        let mut status = self.status.borrow().clone();
        status.identities = status.identities.into_iter().map(|identity| self.with_proxy(identity)).collect();
        status
    }

    fn with_proxy(&self, identity: IdentityStatus) -> IdentityStatus {
        let proxies = self.proxies.lock().unwrap_or_else(PoisonError::into_inner);
        IdentityStatus { proxy: proxies.get(&identity.identity).and_then(|gauge| gauge()), ..identity }
    }

    /// The status, as it is and as it changes.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Tells the service manager's watchdog that the agent is alive.
    pub fn alive(&self) {
        self.notifier.alive();
    }
}

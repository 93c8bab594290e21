//! What the agent tells the world: events, declared once, that feed the log, the status and whoever else listens.

mod event;
#[allow(clippy::disallowed_methods, reason = "a standard error that blocks must keep only this thread waiting")]
mod lines;
mod log;
pub mod metrics;
mod notify;
mod proxy;
mod rfc3339;
mod status;

pub use event::{Event, Level};
pub use log::{Format, Log};
pub use notify::Notifier;
pub use proxy::{FailureReason, ProxyStatus, Statistics};
pub use status::{BackendStatus, IdentityStatus, KeyStatus, Phase, State, Status};

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{broadcast, watch};

/// How many events a slow listener may fall behind before it loses some.
const BACKLOG: usize = 256;

/// Where events go: those of the node, or of one of its identities.
#[derive(Clone)]
pub struct Telemetry {
    shared: Arc<Shared>,
    /// The identity whose events these are; `None` for the node's own.
    identity: Option<Arc<str>>,
}

/// What all identities of the node tell the world with.
struct Shared {
    log: Log,
    events: broadcast::Sender<Record>,
    status: watch::Sender<Status>,
    notifier: Notifier,
    /// How the credential proxy of each identity stands, by the identity's name.
    proxies: Mutex<BTreeMap<Arc<str>, ProxyGauge>>,
}

/// An event, and the identity that it is about.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The identity's name; `None` if the event is about the node.
    pub identity: Option<Arc<str>>,
    /// What happened.
    pub event: Event,
}

/// Tells how a credential proxy stands right now; `None` once it has ended.
pub type ProxyGauge = Box<dyn Fn() -> Option<ProxyStatus> + Send>;

impl Telemetry {
    /// Events go to this log, and to the service manager where there is one.
    pub fn new(log: Log) -> Self {
        let shared = Shared {
            log,
            events: broadcast::Sender::new(BACKLOG),
            status: watch::Sender::new(Status::default()),
            notifier: Notifier::from_environment(),
            proxies: Mutex::default(),
        };
        Self { shared: Arc::new(shared), identity: None }
    }

    /// The telemetry of one identity, which stands in the status from now on. The node is not ready before this identity
    /// is, and is not alive unless this identity is.
    pub fn for_identity(&self, status: IdentityStatus) -> Self {
        let identity: Arc<str> = status.identity.as_str().into();
        self.shared.notifier.expect(&identity);
        let identity = Self { shared: Arc::clone(&self.shared), identity: Some(identity) };
        identity.update_status(status);
        identity
    }

    /// Tells that something happened.
    pub fn emit(&self, event: Event) {
        let record = Record { identity: self.identity.clone(), event };
        let several = self.shared.status.borrow().identities.len() > 1;
        self.shared.log.write(&record, several);
        // Nobody needs to listen.
        let _ = self.shared.events.send(record);
    }

    /// Waits, for a short while, until the log is written: to be called before the process ends.
    pub fn flush(&self) {
        self.shared.log.flush();
    }

    /// All events of the node and its identities from now on.
    pub fn events(&self) -> broadcast::Receiver<Record> {
        self.shared.events.subscribe()
    }

    /// Replaces the status of this identity.
    pub fn set_status(&self, status: IdentityStatus) {
        self.shared.notifier.told(&status.identity);
        self.update_status(status);
        self.shared.notifier.status(&self.current_status());
    }

    fn update_status(&self, identity: IdentityStatus) {
        self.shared.status.send_modify(|status| {
            match status.identities.iter_mut().find(|known| known.identity == identity.identity) {
                Some(known) => *known = identity,
                None => status.identities.push(identity),
            }
        });
    }

    /// Has this tell how the credential proxy of this identity stands whenever somebody wants to know.
    pub fn watch_proxy(&self, gauge: ProxyGauge) {
        if let Some(identity) = &self.identity {
            let mut proxies = self.shared.proxies.lock().unwrap_or_else(PoisonError::into_inner);
            proxies.insert(Arc::clone(identity), gauge);
        }
    }

    /// The status as of now, with what changes too often to be told of each time.
    pub fn current_status(&self) -> Status {
        let mut status = self.shared.status.borrow().clone();
        let proxies = self.shared.proxies.lock().unwrap_or_else(PoisonError::into_inner);
        for identity in &mut status.identities {
            identity.proxy = proxies.get(identity.identity.as_str()).and_then(|gauge| gauge());
        }
        status
    }

    /// The status, as it is and as it changes.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// Tells the service manager's watchdog that this identity's loop is alive.
    pub fn alive(&self) {
        if let Some(identity) = &self.identity {
            self.shared.notifier.alive(identity);
        }
    }
}

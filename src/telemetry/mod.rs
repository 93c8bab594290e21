//! Telemetry: events, declared once, that feed the log, the status, the service manager and subscribers.

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

/// The number of events that a slow subscriber may lag behind before it loses some.
const BACKLOG: usize = 256;

/// A handle for emitting events about the node, or about one of its identities.
#[derive(Clone)]
pub struct Telemetry {
    shared: Arc<Shared>,
    /// The identity that the events are about; `None` for the node.
    identity: Option<Arc<str>>,
}

/// Shared by all identities of the node.
struct Shared {
    log: Log,
    events: broadcast::Sender<Record>,
    status: watch::Sender<Status>,
    notifier: Notifier,
    /// The credential proxies by identity name.
    proxies: Mutex<BTreeMap<Arc<str>, ProxyGauge>>,
}

/// An event, and the identity that it is about.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// `None` if the event is about the node.
    pub identity: Option<Arc<str>>,
    /// What happened.
    pub event: Event,
}

/// Reads the current status of a credential proxy; `None` once the proxy is gone.
pub type ProxyGauge = Box<dyn Fn() -> Option<ProxyStatus> + Send>;

impl Telemetry {
    /// Telemetry that writes to this log, and notifies the service manager if there is one.
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

    /// The telemetry of one identity, which is part of the status from now on. The node is ready once all its
    /// identities are, and alive while all of them are.
    pub fn for_identity(&self, status: IdentityStatus) -> Self {
        let identity: Arc<str> = status.identity.as_str().into();
        self.shared.notifier.expect(&identity);
        let identity = Self { shared: Arc::clone(&self.shared), identity: Some(identity) };
        identity.update_status(status);
        identity
    }

    /// Emits an event.
    pub fn emit(&self, event: Event) {
        let record = Record { identity: self.identity.clone(), event };
        let several = self.shared.status.borrow().identities.len() > 1;
        self.shared.log.write(&record, several);
        // Fails only if there are no subscribers.
        let _ = self.shared.events.send(record);
    }

    /// Waits until the log is written, but at most a second. Call before the process exits.
    pub fn flush(&self) {
        self.shared.log.flush();
    }

    /// Subscribes to the events of the node and all its identities.
    pub fn events(&self) -> broadcast::Receiver<Record> {
        self.shared.events.subscribe()
    }

    /// Replaces the status of this identity.
    pub fn set_status(&self, status: IdentityStatus) {
        self.shared.notifier.mark_published(&status.identity);
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

    /// Adds the status of this identity's credential proxy to the status, read whenever the status is requested.
    pub fn watch_proxy(&self, gauge: ProxyGauge) {
        if let Some(identity) = &self.identity {
            let mut proxies = self.shared.proxies.lock().unwrap_or_else(PoisonError::into_inner);
            proxies.insert(Arc::clone(identity), gauge);
        }
    }

    /// The current status, including values that change too often to be published with each change.
    pub fn current_status(&self) -> Status {
        let mut status = self.shared.status.borrow().clone();
        let proxies = self.shared.proxies.lock().unwrap_or_else(PoisonError::into_inner);
        for identity in &mut status.identities {
            identity.proxy = proxies.get(identity.identity.as_str()).and_then(|gauge| gauge());
        }
        status
    }

    /// The status, updated at each change.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// Reports to the service manager's watchdog that this identity's loop is running.
    pub fn alive(&self) {
        if let Some(identity) = &self.identity {
            self.shared.notifier.alive(identity);
        }
    }
}

//! The body of a watch: a stream of JSON documents, one per change.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, Stream};
use hyper::body::{Bytes, Frame};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::cluster::Cluster;
use super::object::{name_of, now};
use super::registry::ChangeKind;
use super::status::Failure;
use super::table::{IncludeObject, table};

/// How long a watch lasts if the client does not say (kube-apiserver: 30 to 60 minutes).
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1800);

/// The parameters of a watch.
pub(super) struct WatchRequest {
    /// Send the changes after this version. `None` or 0 starts with an ADDED event for each existing object.
    pub(super) resource_version: Option<u64>,
    /// The fieldSelector for metadata.name and spec.signerName.
    pub(super) selector: Selector,
    /// Send tables, with this part of each object in the rows.
    pub(super) table: Option<IncludeObject>,
    /// The parameter timeoutSeconds.
    pub(super) timeout: Option<Duration>,
    /// The parameter sendInitialEvents: send a bookmark after the existing objects.
    pub(super) initial_events: bool,
}

/// Selects objects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Selector {
    pub(super) name: Option<String>,
    pub(super) signer_name: Option<String>,
}

impl Selector {
    pub(super) fn matches(&self, object: &CertificateSigningRequest) -> bool {
        self.name.as_ref().is_none_or(|name| Some(name) == object.metadata.name.as_ref())
            && self.signer_name.as_ref().is_none_or(|signer| *signer == object.spec.signer_name)
    }
}

struct Watch {
    cluster: Arc<Cluster>,
    request: WatchRequest,
    changes: watch::Receiver<u64>,
    version: u64,
    ready: VecDeque<Bytes>,
    columns_sent: bool,
    deadline: Instant,
    ended: bool,
}

pub(super) fn watch(
    cluster: Arc<Cluster>,
    request: WatchRequest,
) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + 'static {
    let mut watch = Watch {
        changes: cluster.registry.subscribe(),
        version: 0,
        ready: VecDeque::new(),
        columns_sent: false,
        deadline: Instant::now() + request.timeout.unwrap_or(DEFAULT_TIMEOUT),
        ended: false,
        cluster,
        request,
    };
    match watch.request.resource_version {
        Some(version) if version > 0 && !watch.request.initial_events => watch.version = version,
        _ => {
            let (version, objects) = watch.cluster.registry.list();
            watch.version = version;
            for object in objects.iter().filter(|object| watch.request.selector.matches(object)).collect::<Vec<_>>() {
                watch.push("ADDED", object);
            }
            if watch.request.initial_events {
                watch.push_bookmark();
            }
        }
    }
    stream::unfold(watch, |mut watch| async move { watch.next().await.map(|bytes| (Ok(Frame::data(bytes)), watch)) })
}

impl Watch {
    async fn next(&mut self) -> Option<Bytes> {
        let mut faults = self.cluster.faults.subscribe();
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                // While the server hangs, watches stay open and send nothing.
                let _ = faults.wait_for(|faults| !faults.hang).await;
                return Some(bytes);
            }
            if self.ended {
                return None;
            }
            self.changes.borrow_and_update();
            match self.cluster.registry.changes_after(self.version) {
                Ok(changes) => {
                    for change in changes {
                        self.version = change.version;
                        if self.request.selector.matches(&change.object) {
                            let kind = match change.kind {
                                ChangeKind::Added => "ADDED",
                                ChangeKind::Modified => "MODIFIED",
                                ChangeKind::Deleted => "DELETED",
                            };
                            self.push(kind, &change.object);
                        }
                    }
                }
                Err(failure) => self.push_error(&failure),
            }
            if !self.ready.is_empty() {
                continue;
            }
            tokio::select! {
                changed = self.changes.changed() => self.ended |= changed.is_err(),
                () = tokio::time::sleep_until(self.deadline) => self.ended = true,
            }
        }
    }

    fn push(&mut self, kind: &str, object: &CertificateSigningRequest) {
        let document = match self.request.table {
            None => json!(object),
            Some(include) => {
                let version = object.metadata.resource_version.clone().unwrap_or_default();
                table([object], &version, include, !self.columns_sent, now().0.as_second())
            }
        };
        self.columns_sent = true;
        self.push_event(kind, &document);
    }

    fn push_bookmark(&mut self) {
        let mut bookmark = CertificateSigningRequest::default();
        bookmark.metadata.resource_version = Some(self.version.to_string());
        bookmark.metadata.annotations = Some([("k8s.io/initial-events-end".to_owned(), "true".to_owned())].into());
        debug_assert!(name_of(&bookmark).is_empty());
        self.push_event("BOOKMARK", &json!(bookmark));
    }

    fn push_error(&mut self, failure: &Failure) {
        self.push_event("ERROR", &failure.to_json());
        self.ended = true;
    }

    fn push_event(&mut self, kind: &str, document: &Value) {
        self.ready.push_back(Bytes::from(format!("{}\n", json!({ "type": kind, "object": document }))));
    }
}

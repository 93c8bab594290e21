//! The stored CertificateSigningRequests, and their changes for watchers: the counterpart of etcd and the watch
//! cache.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use tokio::sync::watch;

use super::status::Failure;

/// The number of changes kept. A watch from an older resourceVersion gets 410 Expired.
const HISTORY: usize = 4096;

/// A stored object. Its metadata.resourceVersion is that of its last change.
pub(super) type Stored = Arc<CertificateSigningRequest>;

/// The type of a change, as in a watch event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChangeKind {
    Added,
    Modified,
    Deleted,
}

/// One change.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) kind: ChangeKind,
    pub(super) object: Stored,
}

/// All objects, with a total order of changes.
pub(super) struct Registry {
    state: Mutex<State>,
    version: watch::Sender<u64>,
}

struct State {
    version: u64,
    objects: BTreeMap<String, Stored>,
    history: VecDeque<Change>,
    /// Changes up to this one have been discarded.
    discarded_to: u64,
}

impl Registry {
    pub(super) fn new() -> Self {
        let state = State { version: 1, objects: BTreeMap::new(), history: VecDeque::new(), discarded_to: 0 };
        Self { state: Mutex::new(state), version: watch::Sender::new(1) }
    }

    /// Stores a new object under its name.
    ///
    /// # Errors
    /// 409 AlreadyExists.
    pub(super) fn create(&self, object: CertificateSigningRequest) -> Result<Stored, Failure> {
        let mut state = self.lock();
        let name = object.metadata.name.clone().unwrap_or_default();
        if state.objects.contains_key(&name) {
            return Err(Failure::already_exists(&name));
        }
        Ok(self.record(&mut state, ChangeKind::Added, object))
    }

    /// # Errors
    /// 404 NotFound.
    pub(super) fn get(&self, name: &str) -> Result<Stored, Failure> {
        self.lock().objects.get(name).cloned().ok_or_else(|| Failure::not_found(name))
    }

    /// The resourceVersion of the collection, and all objects sorted by name.
    pub(super) fn list(&self) -> (u64, Vec<Stored>) {
        let state = self.lock();
        (state.version, state.objects.values().cloned().collect())
    }

    /// Changes an object in place; returns the object before and after. As in kube-apiserver, an update without an
    /// effect is not a change.
    ///
    /// # Errors
    /// 404 NotFound, and errors of `change`. Then nothing is stored.
    pub(super) fn update(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateSigningRequest) -> Result<(), Failure>,
    ) -> Result<(Stored, Stored), Failure> {
        let mut state = self.lock();
        let before = state.objects.get(name).cloned().ok_or_else(|| Failure::not_found(name))?;
        let mut object = (*before).clone();
        change(&mut object)?;
        if object == *before {
            return Ok((Arc::clone(&before), before));
        }
        let after = self.record(&mut state, ChangeKind::Modified, object);
        Ok((before, after))
    }

    /// Deletes an object; with `uid`, only if the object has this UID.
    ///
    /// # Errors
    /// 404 NotFound, and 409 Conflict if the UID differs.
    pub(super) fn delete(&self, name: &str, uid: Option<&str>) -> Result<Stored, Failure> {
        let mut state = self.lock();
        let object = state.objects.get(name).cloned().ok_or_else(|| Failure::not_found(name))?;
        let current = object.metadata.uid.as_deref().unwrap_or_default();
        if let Some(expected) = uid.filter(|uid| *uid != current) {
            let why = format!("Precondition failed: UID in precondition: {expected}, UID in object meta: {current}");
            return Err(Failure::conflict(name, why));
        }
        Ok(self.record(&mut state, ChangeKind::Deleted, (*object).clone()))
    }

    /// The changes after `version`, oldest first.
    ///
    /// # Errors
    /// 410 Expired if some of them have been discarded.
    pub(super) fn changes_after(&self, version: u64) -> Result<Vec<Change>, Failure> {
        let state = self.lock();
        if version < state.discarded_to {
            return Err(Failure::expired(version, state.discarded_to));
        }
        Ok(state.history.iter().filter(|change| change.version > version).cloned().collect())
    }

    /// Notified at each change.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn record(&self, state: &mut State, kind: ChangeKind, mut object: CertificateSigningRequest) -> Stored {
        state.version += 1;
        object.metadata.resource_version = Some(state.version.to_string());
        let name = object.metadata.name.clone().unwrap_or_default();
        let object = Arc::new(object);
        match kind {
            ChangeKind::Added | ChangeKind::Modified => state.objects.insert(name, Arc::clone(&object)),
            ChangeKind::Deleted => state.objects.remove(&name),
        };
        state.history.push_back(Change { version: state.version, kind, object: Arc::clone(&object) });
        while state.history.len() > HISTORY {
            if let Some(change) = state.history.pop_front() {
                state.discarded_to = change.version;
            }
        }
        self.version.send_replace(state.version);
        object
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held, so a poisoned registry would still be consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails when something unexpected happens")]
mod tests {
    use super::*;

    fn named(name: &str) -> CertificateSigningRequest {
        let mut object = CertificateSigningRequest::default();
        object.metadata.name = Some(name.to_owned());
        object
    }

    #[test]
    fn changes_are_kept_in_order_until_discarded() {
        let registry = Registry::new();
        registry.create(named("a")).unwrap();
        assert_eq!(registry.create(named("a")).unwrap_err().reason, "AlreadyExists");
        registry
            .update("a", |object| {
                object.spec.signer_name = "x".to_owned();
                Ok(())
            })
            .unwrap();
        registry.delete("a", None).unwrap();
        let kinds: Vec<_> = registry.changes_after(1).unwrap().iter().map(|change| change.kind).collect();
        assert_eq!(kinds, [ChangeKind::Added, ChangeKind::Modified, ChangeKind::Deleted]);
        for number in 0..HISTORY {
            registry.create(named(&number.to_string())).unwrap();
        }
        assert_eq!(registry.changes_after(1).unwrap_err().code, 410);
        assert!(registry.changes_after(registry.list().0).unwrap().is_empty());
    }

    #[test]
    fn an_update_without_an_effect_is_not_a_change() {
        let registry = Registry::new();
        registry.create(named("a")).unwrap();
        let version = registry.list().0;
        registry.update("a", |_| Ok(())).unwrap();
        assert_eq!(registry.list().0, version);
    }

    #[test]
    fn delete_checks_the_uid() {
        let registry = Registry::new();
        let mut object = named("a");
        object.metadata.uid = Some("one".to_owned());
        registry.create(object).unwrap();
        assert_eq!(registry.delete("a", Some("two")).unwrap_err().code, 409);
        assert!(registry.delete("a", Some("one")).is_ok());
        assert_eq!(registry.delete("a", None).unwrap_err().code, 404);
    }
}

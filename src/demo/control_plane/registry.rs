//! The stored CertificateSigningRequests, and the changes that watchers follow: what etcd and the watch cache are to
//! kube-apiserver.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use tokio::sync::watch;

use super::status::Failure;

/// How many changes are remembered; a watch from further back gets 410 Expired.
const HISTORY: usize = 4096;

/// A stored object; its metadata.resourceVersion is that of the change that made it.
pub(super) type Stored = Arc<CertificateSigningRequest>;

/// What happened to an object, in a watch's words.
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

/// All objects, in one order of changes.
pub(super) struct Registry {
    state: Mutex<State>,
    version: watch::Sender<u64>,
}

struct State {
    version: u64,
    objects: BTreeMap<String, Stored>,
    history: VecDeque<Change>,
    /// Changes up to this one are forgotten.
    forgotten: u64,
}

impl Registry {
    pub(super) fn new() -> Self {
        let state = State { version: 1, objects: BTreeMap::new(), history: VecDeque::new(), forgotten: 0 };
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

    /// The resourceVersion of the collection, and all objects by name.
    pub(super) fn list(&self) -> (u64, Vec<Stored>) {
        let state = self.lock();
        (state.version, state.objects.values().cloned().collect())
    }

    /// Changes an object in place. A change that changes nothing is no change, as in kube-apiserver. Returns the object
    /// before and after.
    ///
    /// # Errors
    /// 404 NotFound, and whatever `change` says; nothing is stored then.
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

    /// Removes an object; with `uid`, only if it is that one.
    ///
    /// # Errors
    /// 404 NotFound, 409 Conflict when the uid is another.
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
    /// 410 Expired when some of them are forgotten.
    pub(super) fn changes_after(&self, version: u64) -> Result<Vec<Change>, Failure> {
        let state = self.lock();
        if version < state.forgotten {
            return Err(Failure::expired(version, state.forgotten));
        }
        Ok(state.history.iter().filter(|change| change.version > version).cloned().collect())
    }

    /// Wakes at each change.
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
                state.forgotten = change.version;
            }
        }
        self.version.send_replace(state.version);
        object
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held, and a poisoned registry would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]
mod tests {
    use super::*;

    fn named(name: &str) -> CertificateSigningRequest {
        let mut object = CertificateSigningRequest::default();
        object.metadata.name = Some(name.to_owned());
        object
    }

    #[test]
    fn changes_are_remembered_in_order_until_they_are_forgotten() {
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
    fn an_update_that_changes_nothing_is_no_change() {
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

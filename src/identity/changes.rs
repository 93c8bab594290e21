//! Files of others that may be replaced while the agent runs: the bootstrap kubeconfig, and the authority.

use pintle_agent_core::Event;

use super::Agent;
use super::start::read_authorities;
use crate::kubernetes::port::Caller;
use crate::store::FileStamp;

impl Agent {
    /// The first event: what was written while no agent ran is not to wait for a back-off that began before.
    pub(super) fn first_event(&self) -> Event {
        let files = self.ports.files.as_ref();
        let saved = files.metadata(self.journal.path()).map(|journal| journal.modified);
        // A file that is moved keeps the time of its content, and not this one.
        let changed = |path| FileStamp::of(files, path).map(|stamp| stamp.changed());
        match (&self.config.bootstrap_kubeconfig, saved) {
            (Some(path), Ok(saved)) if changed(path).is_some_and(|changed| changed >= saved) => Event::LocalChange,
            _ => Event::Woke,
        }
    }

    /// Whether the bootstrap credential is another than the one that failed; told once for each change.
    pub(super) fn bootstrap_changed(&mut self) -> bool {
        let changed = self.state.back_off().is_some() && self.ports.api.bootstrap_changed();
        if changed {
            self.ports.api.forget(&Caller::Bootstrap);
        }
        changed
    }

    /// Reads the authority of issued certificates anew. While its file is away or torn, the last one stays in force.
    pub(super) fn reread_authorities(&mut self) {
        let files = self.ports.files.as_ref();
        if let Some(Ok(authorities)) = self.config.client_ca_file.as_ref().map(|path| read_authorities(files, path)) {
            self.authorities = Some(authorities);
        }
    }
}

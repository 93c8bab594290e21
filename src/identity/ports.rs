//! The ports through which an identity's life reaches the world. Behind them are the clock, the disk, the API server and
//! the devices of this machine, or those of a simulation.

use std::io;
use std::sync::Arc;

use futures::future::BoxFuture;
use pintle_agent_core::Credential;

use crate::keys::Keyring;
use crate::kubernetes::port::ApiServer;
use crate::world::{Clock, Files};

/// All of them.
#[derive(Clone)]
pub struct Ports {
    /// Time, and waiting.
    pub clock: Arc<dyn Clock>,
    /// The disk.
    pub files: Arc<dyn Files>,
    /// The API server.
    pub api: Arc<dyn ApiServer>,
    /// The backends.
    pub keyring: Keyring,
    /// Eight random hexadecimal digits, by which an installation tells its keys from those of others.
    pub installation: Arc<dyn Fn() -> io::Result<String> + Send + Sync>,
    /// The credential proxy, if there is one.
    pub proxy: Option<Arc<dyn LocalProxy>>,
}

/// The credential proxy, as the identity whose credential it uses sees it.
pub trait LocalProxy: Send + Sync {
    /// Has new connections speak as this credential, to the cluster as its kubeconfig describes it now.
    ///
    /// # Errors
    /// Why they do not, for a person; they then go on as before, and it is to be tried again.
    fn speak_as<'a>(&'a self, credential: &'a Credential) -> BoxFuture<'a, Result<(), String>>;

    /// Whether new connections speak as this credential, or as nobody.
    fn is_free_of_others(&self, credential: &Credential) -> bool;

    /// Returns once no connection speaks as anybody but the one that new connections speak as.
    fn wait_until_only_current(&self) -> BoxFuture<'_, ()>;
}

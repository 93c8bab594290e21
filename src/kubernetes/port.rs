//! The API server as an identity's rotation sees it: what it is asked, as whom, and what can come back.
//!
//! [`Api`] is the real one; the simulation has another.

use std::sync::Arc;

use futures::future::BoxFuture;
use pintle_agent_core::rotation::{ApiFailure, SubmittedRequest};
use pintle_agent_core::{Credential, Template};
use pintle_plugins_api::PublicKey;

use super::Api;
use super::certificate_signing_requests::{Outcome, Standing, Watched};

/// As whom the API server is asked.
#[derive(Clone, Debug)]
pub enum Caller {
    /// As the bootstrap credential.
    Bootstrap,
    /// As the owner of this certificate and its key.
    Certificate(Credential),
}

/// The way to the API server.
pub trait ApiServer: Send + Sync {
    /// A client that speaks as this caller and as nobody else: one of an earlier call, unless it was forgotten.
    ///
    /// # Errors
    /// `NoCredential` where there is no kubeconfig, credential or key to speak with.
    fn connect<'a>(&'a self, caller: &'a Caller) -> BoxFuture<'a, Result<Arc<dyn ApiClient>, ApiFailure>>;

    /// Begins to make ready what a later [`connect`](Self::connect) as this caller takes, without waiting for it.
    fn prepare(&self, _caller: &Caller) {}

    /// Closes the connections as this caller and reads its credential anew at the next call. A bootstrap credential
    /// whose file is gone stays: it may be the only one (case C23).
    fn forget(&self, caller: &Caller);

    /// Whether the bootstrap credential was replaced since it was last read; each change is told of once.
    fn bootstrap_changed(&self) -> bool;

    /// Closes the connections as any other caller: they are not needed while this one is in use (case C19).
    fn keep_only(&self, caller: &Caller);
}

/// A client for one API server and one credential. Each call is one request, or a watch.
pub trait ApiClient: Send + Sync {
    /// The minor version of the Kubernetes 1 that answers; `None` if it does not say.
    fn server_minor(&self) -> BoxFuture<'_, Result<Option<u32>, ApiFailure>>;

    /// Creates the CertificateSigningRequest of this name; `None` if there is one of that name.
    fn submit<'a>(
        &'a self,
        name: &'a str,
        certification_request: &'a str,
        template: &'a Template,
        usages: &'a [&'a str],
    ) -> BoxFuture<'a, Result<Option<SubmittedRequest>, ApiFailure>>;

    /// What stands under this name, if anything does; ours is for this key and signer.
    fn find<'a>(
        &'a self,
        name: &'a str,
        public_key: &'a PublicKey,
        signer_name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Standing>, ApiFailure>>;

    /// What has become of the request.
    fn outcome<'a>(&'a self, request: &'a SubmittedRequest) -> BoxFuture<'a, Result<Outcome, ApiFailure>>;

    /// Waits until something happens to the request that stands so, or for some minutes at most.
    fn watch<'a>(
        &'a self,
        request: &'a SubmittedRequest,
        approved: bool,
        resource_version: &'a str,
    ) -> BoxFuture<'a, Result<Watched, ApiFailure>>;

    /// As whom the API server knows the caller, where it says so. Any answer but `Unauthorized` shows that it accepts
    /// the credential.
    fn who_am_i(&self) -> BoxFuture<'_, Result<Option<String>, ApiFailure>>;

    /// How many seconds the API server's clock was ahead of this machine's at its last answer.
    fn clock_ahead(&self) -> Option<i64>;
}

impl ApiClient for Api {
    fn server_minor(&self) -> BoxFuture<'_, Result<Option<u32>, ApiFailure>> {
        Box::pin(self.server_minor())
    }

    fn submit<'a>(
        &'a self,
        name: &'a str,
        certification_request: &'a str,
        template: &'a Template,
        usages: &'a [&'a str],
    ) -> BoxFuture<'a, Result<Option<SubmittedRequest>, ApiFailure>> {
        Box::pin(self.submit(name, certification_request, template, usages))
    }

    fn find<'a>(
        &'a self,
        name: &'a str,
        public_key: &'a PublicKey,
        signer_name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Standing>, ApiFailure>> {
        Box::pin(self.find(name, public_key, signer_name))
    }

    fn outcome<'a>(&'a self, request: &'a SubmittedRequest) -> BoxFuture<'a, Result<Outcome, ApiFailure>> {
        Box::pin(self.outcome(request))
    }

    fn watch<'a>(
        &'a self,
        request: &'a SubmittedRequest,
        approved: bool,
        resource_version: &'a str,
    ) -> BoxFuture<'a, Result<Watched, ApiFailure>> {
        Box::pin(self.watch(request, approved, resource_version))
    }

    fn who_am_i(&self) -> BoxFuture<'_, Result<Option<String>, ApiFailure>> {
        Box::pin(self.who_am_i())
    }

    fn clock_ahead(&self) -> Option<i64> {
        self.clock_ahead()
    }
}

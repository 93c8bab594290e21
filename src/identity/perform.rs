//! Performing the actions, each of which may be repeated without harm.

use std::sync::Arc;
use std::time::Duration;

use pintle_agent_core::issued::accept;
use pintle_agent_core::request::RequestError;
use pintle_agent_core::rotation::{ApiFailure, Authority, Candidate, Observation, PublishError, SubmittedRequest};
use pintle_agent_core::{Action, Credential, Event, Phase};
use pintle_plugins_api::{BackendError, BackendErrorKind};

use super::Agent;
use super::pair::{check_or_restore_key, write_pair};
use crate::keys::{CALL_DEADLINE, GENERATE_DEADLINE};
use crate::kubernetes::certificate_signing_requests::{Outcome, Standing, Watched};
use crate::kubernetes::port::{ApiClient, Caller};
use crate::telemetry;

/// A watch is given up after this time and the request looked at anew: its connection does not survive a suspend.
const WATCH_LIMIT: Duration = Duration::from_secs(300);

impl Agent {
    pub(super) async fn perform(&mut self, action: Action) -> Event {
        match action {
            Action::Wait { .. } => Event::Woke,
            Action::Generate { key, algorithm } => {
                let id = key.id.clone();
                let generate = async {
                    let backend = self.ports.keyring.backend(&key.backend)?;
                    backend.call(GENERATE_DEADLINE, move |backend| backend.generate(&id, algorithm)).await
                };
                // While the backend works, what it takes to ask for a certificate is made ready.
                let prepare = async { self.ports.api.prepare(&self.caller(self.state.authority(self.now()))) };
                let (generated, ()) = futures::join!(generate, prepare);
                match generated {
                    Ok(public_key) => {
                        let algorithm = public_key.algorithm().to_string();
                        self.telemetry.emit(telemetry::Event::KeyGenerated { key: key.to_string(), algorithm });
                        Event::Generated(public_key)
                    }
                    Err(error) => Event::GenerateFailed(error),
                }
            }
            Action::Submit { next, authority } => self.submit(&next, authority).await,
            Action::Observe { next, request, authority } => self.observe(&next, &request, authority).await,
            Action::Prove { credential } => self.prove(&credential).await,
            Action::Publish { credential } => self.publish(&credential).await,
            Action::Retire { keys } => self.retire(keys).await,
        }
    }

    async fn submit(&mut self, next: &Candidate, authority: Authority) -> Event {
        let api = match self.api(authority).await {
            Ok(api) => api,
            Err(failure) => return self.api_failed(authority, failure).await,
        };
        let template = &next.template;
        let name = template.request_name(&next.public_key, next.attempt);
        let created = async {
            let (server_minor, request) = futures::join!(api.server_minor(), self.certification_request(next));
            let usages = template.usages(next.public_key.algorithm(), server_minor.unwrap_or(None));
            let created = api.submit(&name, &request?, template, &usages).await.map_err(Refusal::Api)?;
            let standing = match created {
                Some(request) => Some(Standing::Ours(request)),
                // Created before a crash, or by somebody else.
                None => api.find(&name, &next.public_key, &template.signer_name).await.map_err(Refusal::Api)?,
            };
            let gone = || format!("it has no certificates.k8s.io/v1, or {name} was just deleted");
            standing.ok_or_else(|| Refusal::Api(ApiFailure::Server(gone())))
        };
        let created = created.await;
        self.note_clock(api.clock_ahead());
        match created {
            Ok(Standing::NotOurs) => Event::NameTaken,
            Ok(Standing::Ours(request)) => {
                self.telemetry.emit(telemetry::Event::RequestSubmitted {
                    request: request.name.clone(),
                    authority: Self::authority_word(authority),
                });
                self.note_pending(&request, false);
                // From no version on, a watch begins with the request as it is.
                self.watchable = Some((request.clone(), String::new()));
                Event::Submitted(request)
            }
            Err(Refusal::Backend(error)) => Event::SigningFailed(error),
            Err(Refusal::Api(failure)) => self.api_failed(authority, failure).await,
        }
    }

    async fn certification_request(&self, next: &Candidate) -> Result<String, Refusal> {
        let (template, public_key, id) = (next.template.clone(), next.public_key.clone(), next.key.id.clone());
        let backend = self.ports.keyring.backend(&next.key.backend).map_err(Refusal::Backend)?;
        let request = backend.call(CALL_DEADLINE, move |backend| {
            let backend = std::cell::RefCell::new(backend);
            template
                .certification_request(&public_key, |scheme, message| backend.borrow_mut().sign(&id, scheme, message))
                .map_err(|error| match error {
                    RequestError::Sign(error) => error,
                    RequestError::Template(detail) => BackendError::new(BackendErrorKind::Unsupported, detail),
                })
        });
        request.await.map_err(Refusal::Backend)
    }

    async fn observe(&mut self, next: &Candidate, request: &SubmittedRequest, authority: Authority) -> Event {
        let api = match self.api(authority).await {
            Ok(api) => api,
            Err(failure) => return self.api_failed(authority, failure).await,
        };
        if let Some((_, version)) = self.watchable.take_if(|(watchable, _)| watchable == request) {
            return self.watch(api.as_ref(), next, request, &version, authority).await;
        }
        let outcome = match api.outcome(request).await {
            Ok(outcome) => outcome,
            Err(failure) => return self.api_failed(authority, failure).await,
        };
        self.note_clock(api.clock_ahead());
        Event::Observed(self.observation(next, request, outcome))
    }

    fn observation(&mut self, next: &Candidate, request: &SubmittedRequest, outcome: Outcome) -> Observation {
        match outcome {
            Outcome::Issued(chain) => {
                self.reread_authorities();
                let authorities = self.authorities.as_deref();
                let key = next.key.clone();
                let accepted = accept(&chain, &next.template, key, &next.public_key, authorities, self.now());
                if let Ok(issued) = &accepted {
                    self.telemetry.emit(telemetry::Event::CertificateIssued {
                        request: request.name.clone(),
                        serial: issued.serial().to_owned(),
                        not_after: issued.not_after().to_string(),
                    });
                }
                Observation::Issued(accepted)
            }
            Outcome::Denied(detail) => Observation::Denied(detail),
            Outcome::Failed(detail) => Observation::Failed(detail),
            Outcome::Gone => Observation::Gone,
            Outcome::Pending { approved, resource_version } => {
                self.note_pending(request, approved);
                self.watchable = Some((request.clone(), resource_version));
                Observation::Pending
            }
        }
    }

    /// Notes that the request is pending, so that the status says it before the wait begins.
    fn note_pending(&mut self, request: &SubmittedRequest, approved: bool) {
        let known = Some((request.name.clone(), approved));
        if self.reporter.pending != known {
            self.reporter.pending = known;
            self.telemetry.emit(telemetry::Event::RequestPending { request: request.name.clone(), approved });
        }
    }

    /// Watches a request that is pending, from this version of it on, as long as nothing else happens.
    async fn watch(
        &mut self,
        api: &dyn ApiClient,
        next: &Candidate,
        request: &SubmittedRequest,
        version: &str,
        authority: Authority,
    ) -> Event {
        let approved = self.reporter.pending == Some((request.name.clone(), true));
        let clock = Arc::clone(&self.ports.clock);
        let started = clock.monotonic();
        let mut watch = api.watch(request, approved, version);
        let mut is_saved = false;
        let watched = loop {
            tokio::select! {
                biased;
                watched = &mut watch => break watched,
                Some(command) = self.commands.recv() => return self.handle_command(command).await,
                () = clock.sleep_until(None) => {}
            }
            if !is_saved {
                // It was not decided at once: from now on the journal says that it stands at the API server.
                is_saved =
                    self.save_journal(&Action::Observe { next: next.clone(), request: request.clone(), authority });
            }
            // A request can be pending for days, during which everything else is looked at as ever.
            self.telemetry.alive();
            let known = self.probe.trouble().cloned();
            let event = self.observe_environment().await;
            // The status has to say what is wrong, or no longer wrong, before the watch goes on.
            let is_news = self.probe.trouble() != known.as_ref();
            if event != Event::Woke || is_news || clock.monotonic() - started > WATCH_LIMIT {
                return event;
            }
        };
        drop(watch);
        match watched {
            Ok(Watched::Outcome(outcome)) => Event::Observed(self.observation(next, request, outcome)),
            // The request is looked at anew by the next action.
            Ok(Watched::Nothing) => Event::Observed(Observation::Pending),
            // May get, may not watch, or not from the object's version: then it is looked at every few seconds.
            Ok(Watched::Expired) | Err(ApiFailure::Forbidden(_)) => {
                clock.sleep_until(Some(clock.now() + Duration::from_secs(5))).await;
                Event::Observed(Observation::Pending)
            }
            Err(failure) => self.api_failed(authority, failure).await,
        }
    }

    async fn publish(&mut self, credential: &Credential) -> Event {
        let failed = |error| Event::PublishFailed(PublishError::Backend(error));
        if let Err(error) = self.check_key_of(credential).await {
            return failed(error);
        }
        if let Err(error) = write_pair(&self.ports, &self.pairs, &self.telemetry, credential).await {
            return Event::PublishFailed(error);
        }
        if let Err(detail) = self.ensure_kubeconfig() {
            let hint = format!("make room, or make {} writable", self.config.kubeconfig.display());
            return Event::PublishFailed(PublishError::Disk { detail, hint });
        }
        if let Phase::Publishing { .. } = self.state.phase() {
            self.reporter.rotations += 1;
        }
        self.ports.api.keep_only(&Caller::Certificate(credential.clone()));
        Event::Published
    }

    /// Whether the credential's key is in its backend; a key under its id that is not the one is a `Conflict`.
    pub(super) async fn check_key_of(&self, credential: &Credential) -> Result<(), BackendError> {
        if check_or_restore_key(&self.ports.keyring, &self.pairs, &self.telemetry, credential).await? {
            return Ok(());
        }
        let detail = format!("key {} is not the one that the certificate is for", credential.key());
        Err(BackendError::new(BackendErrorKind::Conflict, detail))
    }

    pub(super) async fn api(&self, authority: Authority) -> Result<Arc<dyn ApiClient>, ApiFailure> {
        self.ports.api.connect(&self.caller(authority)).await
    }

    fn caller(&self, authority: Authority) -> Caller {
        match (authority, self.state.held()) {
            (Authority::Held, Some(held)) => Caller::Certificate(held.clone()),
            _ => Caller::Bootstrap,
        }
    }

    async fn api_failed(&mut self, authority: Authority, failure: ApiFailure) -> Event {
        self.ports.api.forget(&self.caller(authority));
        // A handshake that the key did not sign looks like a server that cannot be reached.
        if authority == Authority::Held && self.held_key_is_lost().await {
            return Event::HeldRefused { key_lost: true };
        }
        let failure = match (&failure, self.backend_left_behind()) {
            (ApiFailure::Unreachable(_), Some(error)) if authority == Authority::Held => {
                ApiFailure::NoCredential(format!("the key in use cannot sign: {error}"))
            }
            _ => failure,
        };
        Event::ApiFailed { authority, failure }
    }

    /// What was wrong with the backend of the key in use at the last call, where new keys are made in another one: it is
    /// not waited for (case C34).
    fn backend_left_behind(&self) -> Option<BackendError> {
        let name = &self.state.held()?.key().backend;
        if *name == self.policy.backend {
            return None;
        }
        self.ports.keyring.backend(name).map_or_else(Some, |backend| backend.health())
    }
}

/// Why there is no request.
enum Refusal {
    Backend(BackendError),
    Api(ApiFailure),
}

//! The state shared by the server and the controllers: objects, CAs, faults, and the rules for changing objects.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestStatus,
};
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::{broadcast, watch};

use super::authentication::{ClientVerifier, User, hexadecimal};
use super::certificate_authority::{CertificateAuthority, random_bytes};
use super::object::{APPROVED, DENIED, FAILED, conditions_of, has_condition, name_of};
use super::registry::{Registry, Stored};
use super::status::Failure;
use super::strategy::{check_preconditions, complete_conditions, prepare_for_create, validate};
use super::{Faults, Observation, Options};

/// The CA for client certificates, and what is derived from it.
struct ClientTrust {
    authority: Arc<CertificateAuthority>,
    verifier: Arc<ClientVerifier>,
    tls: Arc<ServerConfig>,
}

/// The control plane's state.
pub(super) struct Cluster {
    pub(super) options: Options,
    pub(super) registry: Registry,
    pub(super) faults: watch::Sender<Faults>,
    observations: broadcast::Sender<Observation>,
    /// Held from a change until it is reported: the signer may act on an approval before the approver's call returns.
    writing: Mutex<()>,
    provider: Arc<CryptoProvider>,
    serving_authority: CertificateAuthority,
    serving_pair: (CertificateDer<'static>, PrivateKeyDer<'static>),
    client_trust: RwLock<ClientTrust>,
    bootstrap_token: String,
}

impl Cluster {
    pub(super) fn new(options: Options) -> io::Result<Self> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let serving_authority = CertificateAuthority::generate("pintle-demo-serving-ca")?;
        let serving_pair = serving_authority.issue_serving_pair()?;
        let client_trust = RwLock::new(ClientTrust::new(&provider, &serving_pair)?);
        Ok(Self {
            options,
            registry: Registry::new(),
            faults: watch::Sender::new(Faults::default()),
            observations: broadcast::Sender::new(1024),
            writing: Mutex::default(),
            provider,
            serving_authority,
            serving_pair,
            client_trust,
            bootstrap_token: random_bootstrap_token()?,
        })
    }

    pub(super) fn serving_authority_pem(&self) -> &str {
        self.serving_authority.certificate_pem()
    }

    pub(super) fn bootstrap_token(&self) -> &str {
        &self.bootstrap_token
    }

    pub(super) fn client_authority(&self) -> Arc<CertificateAuthority> {
        Arc::clone(&self.client_trust.read().unwrap_or_else(PoisonError::into_inner).authority)
    }

    pub(super) fn client_verifier(&self) -> Arc<ClientVerifier> {
        Arc::clone(&self.client_trust.read().unwrap_or_else(PoisonError::into_inner).verifier)
    }

    pub(super) fn tls(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.client_trust.read().unwrap_or_else(PoisonError::into_inner).tls)
    }

    pub(super) fn replace_client_authority(&self) -> io::Result<()> {
        let trust = ClientTrust::new(&self.provider, &self.serving_pair)?;
        *self.client_trust.write().unwrap_or_else(PoisonError::into_inner) = trust;
        Ok(())
    }

    pub(super) fn observe(&self) -> broadcast::Receiver<Observation> {
        self.observations.subscribe()
    }

    pub(super) fn report(&self, observation: Observation) {
        // Fails only if nobody is subscribed.
        let _ = self.observations.send(observation);
    }

    /// Consumes one occurrence of a counted fault; returns whether `take` found one.
    pub(super) fn take_fault(&self, mut take: impl FnMut(&mut Faults) -> bool) -> bool {
        self.faults.send_if_modified(|faults| take(faults))
    }

    /// Validates and stores a new request of `user`, as kube-apiserver does with the admission plugins
    /// NodeRestriction and CertificateSubjectRestriction. If `dry_run` is set, nothing is stored.
    pub(super) fn create(
        &self,
        sent: CertificateSigningRequest,
        user: &User,
        dry_run: bool,
    ) -> Result<Stored, Failure> {
        let object = prepare_for_create(sent, user)?;
        validate(&object, user)?;
        if dry_run {
            return Ok(Arc::new(object));
        }
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let stored = self.registry.create(object)?;
        self.report(Observation::Created {
            name: name_of(&stored),
            signer_name: stored.spec.signer_name.clone(),
            requester: user.name.clone(),
        });
        Ok(stored)
    }

    /// Updates the Approved and Denied conditions from `sent`. /approval changes nothing else.
    pub(super) fn update_approval(&self, name: &str, sent: &CertificateSigningRequest) -> Result<Stored, Failure> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, after) = self.registry.update(name, |object| {
            check_preconditions(object, sent)?;
            let decided = |condition: &CertificateSigningRequestCondition| {
                condition.type_ == APPROVED || condition.type_ == DENIED
            };
            let mut conditions: Vec<_> = conditions_of(object).iter().filter(|each| !decided(each)).cloned().collect();
            conditions.extend(conditions_of(sent).iter().filter(|each| decided(each)).cloned());
            complete_conditions(name, &mut conditions)?;
            let has = |conditions: &[CertificateSigningRequestCondition], type_: &str| {
                conditions.iter().any(|condition| condition.type_ == type_)
            };
            for type_ in [APPROVED, DENIED] {
                if has(conditions_of(object), type_) && !has(&conditions, type_) {
                    let why = format!("Forbidden: may not remove a condition of type {type_:?}");
                    return Err(Failure::invalid(name, "status.conditions", why));
                }
            }
            if has(&conditions, APPROVED) && has(&conditions, DENIED) {
                let why = "Invalid value: \"Denied\": Approved and Denied conditions are mutually exclusive";
                return Err(Failure::invalid(name, "status.conditions", why));
            }
            object.status.get_or_insert_default().conditions = Some(conditions);
            Ok(())
        })?;
        self.report_new_conditions(&before, &after);
        Ok(after)
    }

    /// Updates the certificate, and the conditions other than Approved and Denied, from `sent`.
    pub(super) fn update_status(&self, name: &str, sent: &CertificateSigningRequest) -> Result<Stored, Failure> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, after) = self.registry.update(name, |object| {
            check_preconditions(object, sent)?;
            let certificate = sent.status.as_ref().and_then(|status| status.certificate.clone());
            let current = object.status.as_ref().and_then(|status| status.certificate.clone());
            let is_set = |certificate: &Option<ByteString>| certificate.as_ref().is_some_and(|pem| !pem.0.is_empty());
            if is_set(&current) && certificate != current {
                let why = "Forbidden: may not be changed once it is set";
                return Err(Failure::invalid(name, "status.certificate", why));
            }
            if let Some(pem) = certificate.as_ref().filter(|pem| !pem.0.is_empty()) {
                let blocks = pem::parse_many(&pem.0).unwrap_or_default();
                if blocks.is_empty() || blocks.iter().any(|block| block.tag() != "CERTIFICATE") {
                    let why = "Invalid value: only CERTIFICATE PEM blocks are allowed";
                    return Err(Failure::invalid(name, "status.certificate", why));
                }
            }
            let decided = |condition: &CertificateSigningRequestCondition| {
                condition.type_ == APPROVED || condition.type_ == DENIED
            };
            let mut conditions: Vec<_> = conditions_of(object).iter().filter(|each| decided(each)).cloned().collect();
            conditions.extend(conditions_of(sent).iter().filter(|each| !decided(each)).cloned());
            complete_conditions(name, &mut conditions)?;
            object.status = Some(CertificateSigningRequestStatus { certificate, conditions: Some(conditions) });
            Ok(())
        })?;
        self.report_new_conditions(&before, &after);
        Ok(after)
    }

    pub(super) fn delete(&self, name: &str, uid: Option<&str>) -> Result<Stored, Failure> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let object = self.registry.delete(name, uid)?;
        self.report(Observation::Deleted { name: name.to_owned() });
        Ok(object)
    }

    fn report_new_conditions(&self, before: &CertificateSigningRequest, after: &CertificateSigningRequest) {
        let name = name_of(after);
        for condition in conditions_of(after) {
            if has_condition(before, &condition.type_) {
                continue;
            }
            let (name, message) = (name.clone(), condition.message.clone().unwrap_or_default());
            match condition.type_.as_str() {
                APPROVED => self.report(Observation::Approved { name, message }),
                DENIED => self.report(Observation::Denied { name, message }),
                FAILED => self.report(Observation::Failed { name, message }),
                _ => {}
            }
        }
    }
}

impl ClientTrust {
    fn new(
        provider: &Arc<CryptoProvider>,
        (certificate, key): &(CertificateDer<'static>, PrivateKeyDer<'static>),
    ) -> io::Result<Self> {
        let authority = Arc::new(CertificateAuthority::generate("pintle-demo-client-ca")?);
        let verifier = Arc::new(ClientVerifier::new(authority.certificate(), provider)?);
        let mut tls = ServerConfig::builder_with_provider(Arc::clone(provider))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_client_cert_verifier(verifier.at_the_handshake(provider))
            .with_single_cert(vec![certificate.clone()], key.clone_key())
            .map_err(io::Error::other)?;
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self { authority, verifier, tls: Arc::new(tls) })
    }
}

/// A token in the format of `kubeadm token generate`: `[a-z0-9]{6}.[a-z0-9]{16}`.
fn random_bootstrap_token() -> io::Result<String> {
    let digits = hexadecimal(&random_bytes::<11>()?);
    Ok(format!("{}.{}", &digits[..6], &digits[6..]))
}

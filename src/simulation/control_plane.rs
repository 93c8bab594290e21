//! A control plane that can do everything a real one was seen to do.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pintle_agent_core::rotation::{ApiFailure, SubmittedRequest};
use pintle_agent_core::{Credential, Template, UnixTime};
use pintle_plugins_api::PublicKey;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SerialNumber,
};
use rustls::pki_types::PrivatePkcs8KeyDer;

use super::random::Random;
use crate::kubernetes::certificate_signing_requests::{Outcome, Standing};

/// How far kube-controller-manager backdates what it signs.
const BACKDATE: Duration = Duration::from_secs(300);
const MINUTE: Duration = Duration::from_secs(60);

/// What answers, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Server {
    #[default]
    Answers,
    /// Refuses connections.
    Down,
    /// Accepts them and says nothing: each call ends at its own time limit.
    Silent,
    /// 429 with Retry-After.
    Throttles,
    /// 500.
    Fails,
    /// 401 to everybody, as while its authorities are being loaded.
    Unauthorized,
    /// 403 for CertificateSigningRequests.
    Forbidden,
    /// What is not JSON.
    Garbage,
    /// A watch ends at once.
    DropsWatches,
    /// Reads are from a moment ago: what was created is not there yet, what was issued is pending.
    Stale,
}

/// What the approver does with a request that it sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Approver {
    #[default]
    Approves,
    Denies,
    /// Nobody looks.
    Absent,
}

/// What the signer does with an approved request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Signer {
    #[default]
    Signs,
    Absent,
    Fails,
    WrongKey,
    WrongSubject,
    NotYetValid,
    AlreadyExpired,
    Garbage,
}

/// A certificate that was issued.
pub(super) struct Issued {
    pub(super) authority: usize,
    pub(super) not_before: UnixTime,
    pub(super) not_after: UnixTime,
}

struct Request {
    uid: String,
    public_key: Vec<u8>,
    template: Template,
    created: UnixTime,
    state: RequestState,
    version: u64,
}

#[derive(Clone, PartialEq)]
enum RequestState {
    Pending,
    Approved,
    Denied,
    Failed,
    Issued(String),
}

/// API server, approver, signer and cleaner.
pub(super) struct ControlPlane {
    pub(super) server: Server,
    pub(super) approver: Approver,
    pub(super) signer: Signer,
    /// The life of what is signed.
    pub(super) life: Duration,
    pub(super) bootstrap_accepted: bool,
    authorities: Vec<Issuer<'static, KeyPair>>,
    /// Which of them signs.
    pub(super) signing: usize,
    /// Which of them the API server trusts.
    pub(super) trusted: BTreeSet<usize>,
    /// By the leaf's fingerprint.
    pub(super) issued: BTreeMap<[u8; 32], Issued>,
    requests: BTreeMap<String, Request>,
    serial: u64,
    /// When requests were created, for the rate.
    pub(super) created: Vec<(String, UnixTime)>,
}

/// A key of which only the public half is known.
struct Requested<'a>(&'a PublicKey);

impl PublicKeyData for Requested<'_> {
    fn der_bytes(&self) -> &[u8] {
        // An Ed25519 key is the last 32 bytes of its SubjectPublicKeyInfo.
        &self.0.as_der()[12..]
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ED25519
    }
}

fn authority(number: u8) -> Issuer<'static, KeyPair> {
    let prefix = [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    let private_key = PrivatePkcs8KeyDer::from([prefix.as_slice(), &[number; 32]].concat());
    let key = KeyPair::from_pkcs8_der_and_sign_algo(&private_key, &rcgen::PKCS_ED25519).expect("an Ed25519 key");
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, format!("authority {number}"));
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Issuer::new(parameters, key)
}

impl ControlPlane {
    pub(super) fn new(life: Duration) -> Self {
        Self {
            server: Server::Answers,
            approver: Approver::Approves,
            signer: Signer::Signs,
            life,
            bootstrap_accepted: true,
            authorities: vec![authority(0), authority(1)],
            signing: 0,
            trusted: BTreeSet::from([0]),
            issued: BTreeMap::new(),
            requests: BTreeMap::new(),
            serial: 0,
            created: Vec::new(),
        }
    }

    /// What it answers to any request that is not about requests, as far as that does not depend on who asks.
    pub(super) fn condition(&self, about_requests: bool) -> Result<(), ApiFailure> {
        match self.server {
            Server::Down | Server::Silent => Err(ApiFailure::Unreachable("connection refused".to_owned())),
            Server::Throttles => Err(ApiFailure::Throttled {
                detail: "429 Too Many Requests".to_owned(),
                retry_after: Some(Duration::from_secs(30)),
            }),
            Server::Fails => Err(ApiFailure::Server("500 Internal Server Error".to_owned())),
            Server::Unauthorized => Err(ApiFailure::Unauthorized("401 Unauthorized".to_owned())),
            Server::Forbidden if about_requests => Err(ApiFailure::Forbidden("403 Forbidden".to_owned())),
            Server::Garbage => Err(ApiFailure::Server("its answer is not valid JSON".to_owned())),
            _ => Ok(()),
        }
    }

    /// Whether it accepts this certificate: its authority is trusted and it is valid by the server's clock.
    pub(super) fn accepts(&self, credential: &Credential, now: UnixTime) -> bool {
        self.issued.get(credential.fingerprint()).is_some_and(|issued| {
            self.trusted.contains(&issued.authority) && issued.not_before <= now && now < issued.not_after
        })
    }

    /// Lets approver, signer and cleaner do what they have had time for.
    pub(super) fn settle(&mut self, now: UnixTime, random: &mut Random) {
        let (approver, signer) = (self.approver, self.signer);
        let names: Vec<String> = self.requests.keys().cloned().collect();
        for name in names {
            let Some(request) = self.requests.get(&name) else { continue };
            let age = now.since(request.created);
            let next = match (&request.state, approver, signer) {
                (RequestState::Pending, Approver::Denies, _) => Some(RequestState::Denied),
                (RequestState::Pending, Approver::Approves, _) => Some(RequestState::Approved),
                (RequestState::Approved, _, Signer::Fails) => Some(RequestState::Failed),
                (RequestState::Approved, _, Signer::Absent) => None,
                (RequestState::Approved, _, _) => {
                    let (public_key, template) = (request.public_key.clone(), request.template.clone());
                    self.sign(&public_key, &template, now).map(RequestState::Issued)
                }
                _ => None,
            };
            let finished = matches!(
                self.requests[&name].state,
                RequestState::Denied | RequestState::Failed | RequestState::Issued(_)
            );
            // As kube-controller-manager's cleaner: an hour after a decision, a day without one.
            let deleted = age > if finished { MINUTE * 60 } else { MINUTE * 60 * 24 };
            if deleted {
                self.requests.remove(&name);
            } else if let (Some(next), Some(request)) = (next, self.requests.get_mut(&name)) {
                request.version += 1 + random.below(3);
                request.state = next;
            }
        }
    }

    fn sign(&mut self, public_key: &[u8], template: &Template, now: UnixTime) -> Option<String> {
        if self.signer == Signer::Garbage {
            return Some("-----BEGIN CERTIFICATE-----\nnot base64\n-----END CERTIFICATE-----\n".to_owned());
        }
        self.serial += 1;
        let (not_before, not_after) = match self.signer {
            Signer::NotYetValid => (now + MINUTE * 20, now + MINUTE * 20 + self.life),
            Signer::AlreadyExpired => (now - BACKDATE, now - MINUTE),
            _ => (now - BACKDATE, now + self.life),
        };
        let mut parameters = CertificateParams::default();
        for organization in &template.organizations {
            parameters.distinguished_name.push(DnType::OrganizationName, organization.as_str());
        }
        let common_name =
            if self.signer == Signer::WrongSubject { "system:node:other" } else { template.common_name.as_str() };
        parameters.distinguished_name.push(DnType::CommonName, common_name);
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        parameters.serial_number = Some(SerialNumber::from(self.serial));
        let time = |at: UnixTime| std::time::UNIX_EPOCH + Duration::from_secs(at.as_seconds().max(0).unsigned_abs());
        parameters.not_before = time(not_before).into();
        parameters.not_after = time(not_after).into();
        let mut public_key = public_key.to_vec();
        if self.signer == Signer::WrongKey {
            let last = public_key.len() - 1;
            public_key[last] ^= 1;
        }
        let requested = PublicKey::from_der(public_key.clone()).ok()?;
        let certificate = parameters.signed_by(&Requested(&requested), &self.authorities[self.signing]).ok()?;
        let fingerprint = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate.der());
        let issued = Issued { authority: self.signing, not_before, not_after };
        self.issued.insert(fingerprint.as_ref().try_into().ok()?, issued);
        Some(certificate.pem())
    }

    pub(super) fn submit(
        &mut self,
        name: &str,
        public_key: &PublicKey,
        template: &Template,
        now: UnixTime,
    ) -> Option<SubmittedRequest> {
        if self.requests.contains_key(name) {
            return None;
        }
        self.serial += 1;
        let uid = format!("uid-{}", self.serial);
        self.created.push((template.common_name.clone(), now));
        let request = Request {
            uid: uid.clone(),
            public_key: public_key.as_der().to_vec(),
            template: template.clone(),
            created: now,
            state: RequestState::Pending,
            version: 1,
        };
        self.requests.insert(name.to_owned(), request);
        Some(SubmittedRequest { name: name.to_owned(), uid })
    }

    pub(super) fn find(&self, name: &str, public_key: &PublicKey, signer_name: &str) -> Option<Standing> {
        let request = self.requests.get(name)?;
        let ours = request.public_key == public_key.as_der() && request.template.signer_name == signer_name;
        let submitted = SubmittedRequest { name: name.to_owned(), uid: request.uid.clone() };
        Some(if ours { Standing::Ours(submitted) } else { Standing::NotOurs })
    }

    pub(super) fn outcome(&self, request: &SubmittedRequest) -> Outcome {
        let Some(found) = self.requests.get(&request.name).filter(|found| found.uid == request.uid) else {
            return Outcome::Gone;
        };
        let pending = |approved| Outcome::Pending { approved, resource_version: found.version.to_string() };
        match &found.state {
            RequestState::Issued(_) if self.server == Server::Stale => pending(true),
            RequestState::Issued(chain) => Outcome::Issued(chain.clone()),
            RequestState::Denied => Outcome::Denied("SimulatedDenial: the approver denies everything".to_owned()),
            RequestState::Failed => Outcome::Failed("SimulatedFailure: the signer fails".to_owned()),
            RequestState::Approved => pending(true),
            RequestState::Pending => pending(false),
        }
    }

    /// Somebody deletes every request.
    pub(super) fn delete_requests(&mut self) {
        self.requests.clear();
    }
}

//! Who sent a request: by client certificate (CN is the user, O the groups) or by bearer token.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{DistinguishedName, Error};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::status::Failure;
use crate::tls::{ClientCertificates, Verifier};

/// The key in `extra` that names the credential (kube-apiserver 1.31 and later).
const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";

/// An authenticated user, as SelfSubjectReview shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) groups: Vec<String>,
    pub(super) extra: BTreeMap<String, Vec<String>>,
    /// The client leaf's serial number in upper-case hexadecimal.
    pub(super) serial: Option<String>,
}

impl User {
    pub(super) fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|each| each == group)
    }

    /// `X509SHA256=…` of the client leaf.
    pub(super) fn credential_id(&self) -> Option<&String> {
        self.extra.get(CREDENTIAL_ID).and_then(|values| values.first())
    }
}

/// Verifies client certificates at the handshake (possession of the key only) and on every request (chain, usage
/// and validity).
///
/// kube-apiserver asks for a client certificate at the handshake but verifies the chain when it authenticates a
/// request: an expired or foreign certificate is answered with 401 and not with a TLS alert.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
}

impl ClientVerifier {
    pub(super) fn new(authority: &CertificateDer<'static>, provider: &Arc<CryptoProvider>) -> io::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone()).map_err(io::Error::other)?;
        let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
            .allow_unauthenticated()
            .build()
            .map_err(io::Error::other)?;
        Ok(Self { chain })
    }

    /// What the handshake needs of it.
    pub(super) fn at_the_handshake(self: &Arc<Self>, provider: &CryptoProvider) -> Arc<dyn ClientCertVerifier> {
        Arc::new(Verifier::new(AnyClient(Arc::clone(self)), provider))
    }

    /// The user of a certificate chain, if it is valid now.
    fn user(&self, certificates: &[CertificateDer<'static>], now: SystemTime) -> Option<User> {
        let (leaf, intermediates) = certificates.split_first()?;
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        self.chain.verify_client_cert(leaf, intermediates, UnixTime::since_unix_epoch(now)).ok()?;
        let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
        let subject = certificate.subject();
        let name = subject.iter_common_name().last()?.as_str().ok()?.to_owned();
        let mut groups: Vec<String> =
            subject.iter_organization().filter_map(|value| value.as_str().ok()).map(str::to_owned).collect();
        groups.push("system:authenticated".to_owned());
        let digest = hexadecimal(digest::digest(&digest::SHA256, leaf).as_ref());
        Some(User {
            name,
            groups,
            extra: BTreeMap::from([(CREDENTIAL_ID.to_owned(), vec![format!("X509SHA256={digest}")])]),
            serial: Some(hexadecimal(certificate.raw_serial()).to_uppercase()),
        })
    }
}

/// Any certificate is good at the handshake: [`authenticate`] verifies the chain on each request.
#[derive(Debug)]
struct AnyClient(Arc<ClientVerifier>);

impl ClientCertificates for AnyClient {
    fn check(&self, _: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime) -> Result<(), Error> {
        Ok(())
    }

    fn is_mandatory(&self) -> bool {
        false
    }

    fn authorities(&self) -> &[DistinguishedName] {
        self.0.chain.root_hint_subjects()
    }
}

/// The user of a request: None is nobody (no credential was offered).
///
/// # Errors
/// 401 when a credential was offered and none of those offered is valid.
pub(super) fn authenticate(
    verifier: &ClientVerifier,
    certificates: &[CertificateDer<'static>],
    authorization: Option<&str>,
    bootstrap_token: &str,
    now: SystemTime,
) -> Result<Option<User>, Failure> {
    if let Some(user) = verifier.user(certificates, now) {
        return Ok(Some(user));
    }
    let bearer = authorization.and_then(|value| value.split_once(' '));
    match bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")) {
        Some((_, token)) if equal_in_constant_time(token.trim(), bootstrap_token) => {
            Ok(Some(bootstrap_user(bootstrap_token)))
        }
        Some(_) => Err(Failure::unauthorized()),
        None if !certificates.is_empty() => Err(Failure::unauthorized()),
        None => Ok(None),
    }
}

/// kubernetes plugin/pkg/auth/authenticator/token/bootstrap: the token's id is in the name.
fn bootstrap_user(token: &str) -> User {
    let id = token.split_once('.').map_or(token, |(id, _)| id);
    User {
        name: format!("system:bootstrap:{id}"),
        groups: vec!["system:bootstrappers".to_owned(), "system:authenticated".to_owned()],
        extra: BTreeMap::new(),
        serial: None,
    }
}

fn equal_in_constant_time(left: &str, right: &str) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(left.as_bytes(), right.as_bytes()).is_ok()
}

/// Lower-case hexadecimal.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

//! How an API server is verified: by the authorities of a kubeconfig, as kubectl does it.
//!
//! webpki refuses some servers that Go's `crypto/x509` accepts, and that clusters really have: those whose certificate is
//! itself among the authorities, be it self-signed with `CA:TRUE` or any leaf. Such a certificate is trusted, as in Go, if
//! it is valid now, good for servers, and for the name of this one (case C42).

use std::sync::Arc;

use pintle_agent_core::pem_block::PemBlocks;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, Error, RootCertStore};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::tls::{ServerCertificates, Verifier};

/// The certificates that servers are verified by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Authorities(Vec<CertificateDer<'static>>);

impl Authorities {
    /// The certificates in a PEM text. As in Go, others may stand beside them that cannot be parsed.
    ///
    /// # Errors
    /// If none can be.
    pub(super) fn parse(pem: &[u8]) -> Result<Self, String> {
        let certificates = PemBlocks::of(pem).certificates().map_err(|error| error.to_string())?;
        let is_certificate = |der: &Vec<u8>| X509Certificate::from_der(der).is_ok_and(|(rest, _)| rest.is_empty());
        let certificates: Vec<_> = certificates.into_iter().filter(is_certificate).map(CertificateDer::from).collect();
        if certificates.is_empty() {
            return Err("none of its CERTIFICATE blocks is an X.509 certificate".to_owned());
        }
        Ok(Self(certificates))
    }

    /// Verifies servers by them.
    pub(super) fn verifier(&self) -> Arc<dyn ServerCertVerifier> {
        let provider =
            CryptoProvider::get_default().cloned().unwrap_or_else(|| Arc::new(aws_lc_rs::default_provider()));
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.0.iter().cloned());
        // It has no roots if webpki can use none of them; only the exact certificates are accepted then.
        let by_chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build().ok();
        Arc::new(Verifier::new(Trusted { by_chain, exact: self.0.clone() }, &provider))
    }
}

/// Accepts every server, for `insecure-skip-tls-verify`. The certificate is not even parsed: webpki refuses X.509 v1.
pub(super) fn no_verification() -> Arc<dyn ServerCertVerifier> {
    let provider = CryptoProvider::get_default().cloned().unwrap_or_else(|| Arc::new(aws_lc_rs::default_provider()));
    Arc::new(Verifier::without_signatures(Any, &provider))
}

#[derive(Debug)]
struct Trusted {
    by_chain: Option<Arc<WebPkiServerVerifier>>,
    exact: Vec<CertificateDer<'static>>,
}

impl ServerCertificates for Trusted {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let by_chain = match &self.by_chain {
            Some(verifier) => verifier.verify_server_cert(end_entity, intermediates, server_name, &[], now).map(drop),
            None => Err(CertificateError::UnknownIssuer.into()),
        };
        match by_chain {
            Err(_) if self.exact.iter().any(|known| known == end_entity) => check_exact(end_entity, server_name, now),
            verdict => verdict,
        }
    }
}

/// Every certificate is good.
#[derive(Debug)]
struct Any;

impl ServerCertificates for Any {
    fn check(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: UnixTime,
    ) -> Result<(), Error> {
        Ok(())
    }
}

/// What Go's `Certificate.Verify` checks of a leaf that is one of the roots: its critical extensions, its validity, its
/// names, and that it is good for servers.
fn check_exact(end_entity: &CertificateDer<'_>, server_name: &ServerName<'_>, now: UnixTime) -> Result<(), Error> {
    // This refuses critical extensions that nobody understands.
    let parsed = ParsedCertificate::try_from(end_entity)?;
    let (_, certificate) =
        X509Certificate::from_der(end_entity).map_err(|_| Error::from(CertificateError::BadEncoding))?;
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if now < certificate.validity().not_before.timestamp() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > certificate.validity().not_after.timestamp() {
        return Err(CertificateError::Expired.into());
    }
    match certificate.extended_key_usage() {
        Ok(None) => {}
        Ok(Some(usage)) if usage.value.server_auth || usage.value.any => {}
        _ => return Err(CertificateError::InvalidPurpose.into()),
    }
    rustls::client::verify_server_name(&parsed, server_name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

    fn parameters(change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
        let mut parameters = CertificateParams::new(vec!["api.example".to_owned()]).expect("a name");
        change(&mut parameters);
        parameters
    }

    fn self_signed(change: impl FnOnce(&mut CertificateParams)) -> rcgen::Certificate {
        parameters(change).self_signed(&KeyPair::generate().expect("a key")).expect("a certificate")
    }

    fn authority(parameters: &mut CertificateParams) {
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }

    fn verify(authorities: &str, server: &rcgen::Certificate, name: &str, seconds: u64) -> Result<(), Error> {
        let verifier = Authorities::parse(authorities.as_bytes()).expect("certificates").verifier();
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        verifier.verify_server_cert(server.der(), &[], &name, &[], now).map(drop)
    }

    /// 2026, within the validity that rcgen gives by default.
    const NOW: u64 = 1_780_000_000;

    #[test]
    fn c42_a_servers_own_certificate_among_the_authorities_is_trusted_as_go_does() {
        let leaf = self_signed(|_| {});
        let with_authority = self_signed(authority);
        let of_another = {
            let key = KeyPair::generate().expect("a key");
            let issuer = Issuer::new(parameters(authority), key);
            parameters(|_| {}).signed_by(&KeyPair::generate().expect("a key"), &issuer).expect("a certificate")
        };
        for server in [&leaf, &with_authority, &of_another] {
            assert_eq!(verify(&server.pem(), server, "api.example", NOW), Ok(()));
            assert!(verify(&server.pem(), server, "other.example", NOW).is_err(), "another name");
            assert!(verify(&server.pem(), server, "127.0.0.1", NOW).is_err(), "an address that is not in it");
            assert!(verify(&server.pem(), server, "api.example", 1).is_err(), "too early");
            assert!(verify(&server.pem(), server, "api.example", 1 << 40).is_err(), "expired");
            let other = self_signed(authority);
            assert!(verify(&other.pem(), server, "api.example", NOW).is_err(), "another certificate");
        }
        let client = self_signed(|parameters| {
            parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        });
        assert!(verify(&client.pem(), &client, "api.example", NOW).is_err(), "no server's certificate");
        let critical = self_signed(|parameters| {
            let mut extension = rcgen::CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
            extension.set_criticality(true);
            parameters.custom_extensions.push(extension);
        });
        assert!(verify(&critical.pem(), &critical, "api.example", NOW).is_err(), "an unknown critical extension");
    }

    #[test]
    fn c42_a_bad_certificate_in_a_bundle_does_not_spoil_the_others() {
        let key = KeyPair::generate().expect("a key");
        let root = parameters(authority).self_signed(&key).expect("a certificate");
        let issuer = Issuer::new(parameters(authority), key);
        let server =
            parameters(|_| {}).signed_by(&KeyPair::generate().expect("a key"), &issuer).expect("a certificate");
        let bad = "-----BEGIN CERTIFICATE-----\nMAAA\n-----END CERTIFICATE-----\n";
        let torn = "-----BEGIN CERTIFICATE-----\nMA*A\n-----END CERTIFICATE-----\n";
        for bundle in [format!("{bad}{}", root.pem()), format!("{}{torn}", root.pem()), format!("{torn}{}", root.pem())]
        {
            assert_eq!(verify(&bundle, &server, "api.example", NOW), Ok(()));
        }
        for none in [bad, torn, "", "no PEM"] {
            assert!(Authorities::parse(none.as_bytes()).is_err(), "{none}");
        }
    }
}

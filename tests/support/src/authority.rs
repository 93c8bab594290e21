//! Certificates for the control plane, its administrator and manually created identities.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;

use crate::scratch::write_private;

/// Longer than any test.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// The files of a certificate and its private key, both PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificatePair {
    /// The chain, leaf first.
    pub certificate: PathBuf,
    /// The private key, PKCS#8, mode 0600.
    pub key: PathBuf,
}

/// A CA whose files are in one directory.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: PathBuf,
    files: CertificatePair,
}

impl Authority {
    /// Creates a CA with this common name, valid for a day, with the files `NAME.crt` and `NAME.key` in `directory`.
    #[must_use]
    pub fn new(name: &str, directory: &Path) -> Self {
        let mut params = parameters(name, &[], DAY);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = new_key();
        let key_pem = key.serialize_pem();
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate authority can sign itself");
        let files = write_pair(directory, name, &issuer.pem(), &key_pem);
        Self { issuer, directory: directory.to_owned(), files }
    }

    /// The CA's own certificate and key.
    #[must_use]
    pub fn files(&self) -> &CertificatePair {
        &self.files
    }

    pub(crate) fn certificate_pem(&self) -> String {
        self.issuer.pem()
    }

    pub(crate) fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// Issues a client certificate with CN=`common_name` and one O per organization, which expires after `lifetime`.
    #[must_use]
    pub fn issue_client(&self, common_name: &str, organizations: &[&str], lifetime: Duration) -> CertificatePair {
        let mut params = parameters(common_name, organizations, lifetime);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params, common_name)
    }

    /// Issues a server certificate for 127.0.0.1, localhost and `kubernetes`.
    #[must_use]
    pub fn issue_server(&self, common_name: &str) -> CertificatePair {
        let mut params = parameters(common_name, &[], DAY);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names = vec![
            SanType::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()),
            SanType::DnsName("localhost".try_into().expect("a DNS name")),
            SanType::DnsName("kubernetes".try_into().expect("a DNS name")),
        ];
        self.issue(params, common_name)
    }

    fn issue(&self, mut params: CertificateParams, name: &str) -> CertificatePair {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key = new_key();
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate authority can sign");
        // Numbered, because a test may issue two certificates for the same name.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("{}-{}", name.replace([':', '/'], "-"), NUMBER.fetch_add(1, Ordering::Relaxed));
        write_pair(&self.directory, &name, &certificate.pem(), &key.serialize_pem())
    }
}

pub(crate) fn new_key() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a P-256 key can be made")
}

fn parameters(common_name: &str, organizations: &[&str], lifetime: Duration) -> CertificateParams {
    let mut subject = DistinguishedName::new();
    for organization in organizations {
        subject.push(DnType::OrganizationName, *organization);
    }
    subject.push(DnType::CommonName, common_name);
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = subject;
    params.not_before = OffsetDateTime::from(now - Duration::from_secs(300)); // as Kubernetes' signer does
    params.not_after = OffsetDateTime::from(now + lifetime);
    params
}

fn write_pair(directory: &Path, name: &str, certificate: &str, key: &str) -> CertificatePair {
    let pair = CertificatePair {
        certificate: directory.join(format!("{name}.crt")),
        key: directory.join(format!("{name}.key")),
    };
    write_private(&pair.certificate, certificate.as_bytes());
    write_private(&pair.key, key.as_bytes());
    pair
}

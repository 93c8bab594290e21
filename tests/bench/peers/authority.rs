//! The benchmark's own CA, for the common server and for the node certificate that all proxies use.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PublicKeyData, SubjectPublicKeyInfo,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// The node name in the node certificate.
pub(crate) const NODE: &str = "bench";

/// An authority of P-256 keys.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate, and its private key unless that is in a device.
pub(crate) struct Pair {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) pem: String,
    pub(crate) key: Option<KeyPair>,
}

impl Pair {
    /// The private key; panics if it is in a device.
    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        let key = self.key.as_ref().expect("a key that is in no device").serialize_der();
        PrivateKeyDer::try_from(key).expect("PKCS#8")
    }

    /// Writes certificate and key to one file each.
    pub(crate) fn write(&self, directory: &Path) -> (PathBuf, PathBuf) {
        let (certificate, key) = (directory.join("node.crt"), directory.join("node.key"));
        std::fs::write(&certificate, &self.pem).expect("a file");
        std::fs::write(&key, self.key_pem()).expect("a file");
        (certificate, key)
    }

    fn key_pem(&self) -> String {
        self.key.as_ref().map(KeyPair::serialize_pem).unwrap_or_default()
    }

    /// The kubelet's format: the chain, then the key unless it is in a device.
    pub(crate) fn published(&self) -> String {
        format!("{}{}", self.pem, self.key_pem())
    }
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut parameters = parameters("benchmark CA");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(parameters, KeyPair::generate().expect("a key")).expect("an authority"))
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// The common server's pair.
    pub(crate) fn server(&self) -> Pair {
        let mut parameters = parameters("server");
        parameters.subject_alt_names = vec![
            rcgen::SanType::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()),
            rcgen::SanType::DnsName("localhost".try_into().expect("a name")),
        ];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue_new(parameters)
    }

    /// The node's pair.
    pub(crate) fn node(&self) -> Pair {
        self.issue_new(node_parameters())
    }

    /// A node certificate for a key in a device, given as SubjectPublicKeyInfo.
    pub(crate) fn node_of(&self, public_key: &[u8]) -> Pair {
        let public_key = SubjectPublicKeyInfo::from_der(public_key).expect("a public key");
        self.issue(node_parameters(), &public_key, None)
    }

    fn issue_new(&self, parameters: CertificateParams) -> Pair {
        let key = KeyPair::generate().expect("a key");
        let public_key = SubjectPublicKeyInfo::from_der(&key.subject_public_key_info()).expect("a public key");
        self.issue(parameters, &public_key, Some(key))
    }

    fn issue(&self, parameters: CertificateParams, public_key: &SubjectPublicKeyInfo, key: Option<KeyPair>) -> Pair {
        let certificate = parameters.signed_by(public_key, &self.0).expect("a certificate");
        Pair { certificate: certificate.der().clone(), pem: certificate.pem(), key }
    }
}

fn node_parameters() -> CertificateParams {
    let mut parameters = parameters(&format!("system:node:{NODE}"));
    parameters.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    parameters
}

fn parameters(name: &str) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.use_authority_key_identifier_extension = true;
    let now = SystemTime::now();
    parameters.not_before = (now - Duration::from_secs(300)).into();
    parameters.not_after = (now + Duration::from_secs(365 * 24 * 3600)).into();
    parameters
}

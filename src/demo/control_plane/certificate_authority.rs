//! In-memory certificate authorities.

use std::io;
use std::time::{Duration, SystemTime};

use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

/// Lifetime of a CA certificate. Long, because only leaves expire in the demo.
const LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

/// How far kube-controller-manager backdates certificates, so that clients with a slow clock accept them.
pub(super) const BACKDATE: Duration = Duration::from_secs(300);

/// A self-signed CA and its key.
pub(super) struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    not_after: SystemTime,
}

/// A client certificate and its key, both PEM.
pub(super) struct ClientPair {
    pub(super) certificate_pem: String,
    pub(super) key_pem: Zeroizing<String>,
}

impl CertificateAuthority {
    /// Generates a P-256 key and a self-signed certificate.
    pub(super) fn generate(common_name: &str) -> io::Result<Self> {
        let now = SystemTime::now();
        let not_after = now + LIFETIME;
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished_name(common_name, &[])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(random_serial_number()?);
        params.not_before = (now - BACKDATE).into();
        params.not_after = not_after.into();
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let certificate = params.self_signed(&key).map_err(io::Error::other)?;
        Ok(Self {
            certificate: certificate.der().clone(),
            certificate_pem: certificate.pem(),
            issuer: Issuer::new(params, key),
            not_after,
        })
    }

    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub(super) fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Signs a leaf for `[not_before, not_after]`, but not beyond the CA's own notAfter (kubernetes
    /// pkg/controller/certificates/authority). The serial number is random.
    pub(super) fn sign(
        &self,
        mut params: CertificateParams,
        public_key: &impl PublicKeyData,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> io::Result<rcgen::Certificate> {
        params.not_before = not_before.into();
        params.not_after = not_after.min(self.not_after).into();
        params.serial_number = Some(random_serial_number()?);
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.signed_by(public_key, &self.issuer).map_err(io::Error::other)
    }

    /// Issues a serving certificate for 127.0.0.1, ::1 and localhost.
    pub(super) fn issue_serving_pair(&self) -> io::Result<(CertificateDer<'static>, PrivateKeyDer<'static>)> {
        let names = ["localhost", "kubernetes", "kubernetes.default", "127.0.0.1", "::1"].map(str::to_owned);
        let mut params = CertificateParams::new(names).map_err(io::Error::other)?;
        params.distinguished_name = distinguished_name("kube-apiserver", &[])?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let now = SystemTime::now();
        let certificate = self.sign(params, &key, now - BACKDATE, self.not_after)?;
        Ok((certificate.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    }

    /// Issues a client certificate (CN = user, O = group) for a new key.
    pub(super) fn issue_client_pair(&self, user: &str, groups: &[&str], life: Duration) -> io::Result<ClientPair> {
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished_name(user, groups)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let now = SystemTime::now();
        let certificate = self.sign(params, &key, now - BACKDATE, now + life)?;
        Ok(ClientPair { certificate_pem: certificate.pem(), key_pem: Zeroizing::new(key.serialize_pem()) })
    }
}

fn distinguished_name(common_name: &str, organizations: &[&str]) -> io::Result<DistinguishedName> {
    let mut name = DistinguishedName::new();
    match organizations {
        [] => {}
        [organization] => name.push(DnType::OrganizationName, *organization),
        _ => return Err(io::Error::new(io::ErrorKind::Unsupported, "a subject with more than one organization")),
    }
    name.push(DnType::CommonName, common_name);
    Ok(name)
}

/// Random bytes from the cryptographic provider.
pub(super) fn random_bytes<const LENGTH: usize>() -> io::Result<[u8; LENGTH]> {
    let mut bytes = [0; LENGTH];
    SystemRandom::new().fill(&mut bytes).map_err(|_| io::Error::other("the random number generator failed"))?;
    Ok(bytes)
}

/// 126 random bits below a set one: positive and never zero (RFC 5280, section 4.1.2.2).
fn random_serial_number() -> io::Result<SerialNumber> {
    let mut bytes = random_bytes::<16>()?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

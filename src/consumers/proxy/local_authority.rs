//! The authority of the local side: for each boot, one certificate for the listener and one for its only client.
//!
//! The authority's own key is used twice and thrown away, so nobody can issue a third certificate. The files live on a
//! file system that ends with the boot (/run), name the boot they belong to, and are made anew in another one; within a
//! boot they stay, so that a kubelet need not be restarted with pintle.

use std::io;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

use crate::config::User;
use crate::consumers::kubeconfig::ClientFiles;
use crate::store::durable;

/// A new identifier at each boot (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The listener's credential, and the one certificate that it accepts.
pub(super) struct LocalAuthority {
    pub(super) server_certificate: CertificateDer<'static>,
    pub(super) server_key: PrivateKeyDer<'static>,
    pub(super) client_certificate: CertificateDer<'static>,
}

impl LocalAuthority {
    /// The authority of this boot: the one in the directory if it is, a new one otherwise. The client's files belong to
    /// `user`.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub(super) fn open(directory: &Path, user: User) -> io::Result<Self> {
        let boot = std::fs::read_to_string(BOOT_ID)?;
        Self::of_boot(directory, user, boot.trim())
    }

    fn of_boot(directory: &Path, user: User, boot: &str) -> io::Result<Self> {
        create_directory(directory)?;
        match Self::read(directory, user, boot) {
            Some(authority) => Ok(authority),
            None => Self::create(directory, user, boot),
        }
    }

    /// The listener's own file, which only root can read; it is written last, and its first line names the boot and the
    /// user that all of the files are for.
    fn listener_file(directory: &Path) -> PathBuf {
        directory.join("listener.pem")
    }

    fn first_line(user: User, boot: &str) -> String {
        format!("boot {boot} user {}", user.uid)
    }

    fn read(directory: &Path, user: User, boot: &str) -> Option<Self> {
        let text = Zeroizing::new(std::fs::read_to_string(Self::listener_file(directory)).ok()?);
        if text.lines().next()? != Self::first_line(user, boot) {
            return None;
        }
        let files = ClientFiles::in_directory(directory);
        if ![&files.certificate_authority, &files.certificate, &files.key].iter().all(|path| path.is_file()) {
            return None;
        }
        let mut certificates = CertificateDer::pem_slice_iter(text.as_bytes()).filter_map(Result::ok);
        Some(Self {
            server_certificate: certificates.next()?,
            client_certificate: certificates.next()?,
            server_key: PrivateKeyDer::from_pem_slice(text.as_bytes()).ok()?,
        })
    }

    fn create(directory: &Path, user: User, boot: &str) -> io::Result<Self> {
        let listener = Self::listener_file(directory);
        // First of all, so that no crash leaves it beside other files than its own.
        match std::fs::remove_file(&listener) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let authority_key = new_key()?;
        let mut authority = parameters("pintle local authority");
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let authority_certificate = authority.self_signed(&authority_key).map_err(io::Error::other)?;
        let issuer = Issuer::new(authority, authority_key);

        let mut server = parameters("pintle credential proxy");
        server.subject_alt_names = vec![
            rcgen::SanType::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()),
            rcgen::SanType::IpAddress(std::net::Ipv6Addr::LOCALHOST.into()),
            rcgen::SanType::DnsName("localhost".try_into().map_err(io::Error::other)?),
        ];
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let server_key = new_key()?;
        let server = server.signed_by(&server_key, &issuer).map_err(io::Error::other)?;

        let mut client = parameters("pintle local client");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let client_key = new_key()?;
        let client = client.signed_by(&client_key, &issuer).map_err(io::Error::other)?;

        let files = ClientFiles::in_directory(directory);
        durable::replace(&files.certificate_authority, authority_certificate.pem().as_bytes(), 0o644)?;
        let client_key = Zeroizing::new(client_key.serialize_pem());
        for (path, content) in [(&files.certificate, client.pem().as_bytes()), (&files.key, client_key.as_bytes())] {
            durable::replace(path, content, 0o600)?;
            std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid))?;
        }
        let server_key_pem = Zeroizing::new(server_key.serialize_pem());
        let text = Zeroizing::new(format!(
            "{}\n{}{}{}",
            Self::first_line(user, boot),
            server.pem(),
            *server_key_pem,
            client.pem()
        ));
        durable::replace(&listener, text.as_bytes(), 0o600)?;
        Ok(Self {
            server_certificate: server.der().clone(),
            server_key: PrivateKeyDer::try_from(server_key.serialize_der()).map_err(io::Error::other)?,
            client_certificate: client.der().clone(),
        })
    }
}

fn new_key() -> io::Result<KeyPair> {
    // P-256: every client takes it, and nothing signs faster.
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(io::Error::other)
}

fn parameters(common_name: &str) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, common_name);
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // They end with the boot. A clock that is wrong at boot (case C06) must not keep the kubelet out, and RFC 5280,
    // section 4.1.2.5, has this notAfter for "no end that is known".
    parameters.not_before = date_time_ymd(1970, 1, 1);
    parameters.not_after = date_time_ymd(9999, 12, 31);
    parameters
}

/// Makes the directory, which all may enter: the files in it have modes of their own.
pub(super) fn create_directory(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_lasts_for_a_boot_and_no_longer() {
        let directory = tempfile::tempdir().expect("a directory");
        let directory = directory.path().join("client");
        let user = User { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() };
        let first = LocalAuthority::of_boot(&directory, user, "one").expect("made");
        let again = LocalAuthority::of_boot(&directory, user, "one").expect("read");
        assert_eq!(first.client_certificate, again.client_certificate);
        assert_eq!(first.server_key, again.server_key);
        let next = LocalAuthority::of_boot(&directory, user, "two").expect("made anew");
        assert_ne!(first.client_certificate, next.client_certificate);
        for name in ["client.key", "client.crt", "listener.pem"] {
            let mode = std::fs::metadata(directory.join(name)).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        std::fs::remove_file(directory.join("client.key")).expect("removed");
        let after = LocalAuthority::of_boot(&directory, user, "two").expect("made anew");
        assert_ne!(next.client_certificate, after.client_certificate);
    }
}

//! The CA of the local side: issues one server and one client certificate per boot.
//!
//! The CA's key signs these two certificates and is discarded, so no further certificate can be issued. The files are
//! on a file system that does not survive a reboot (/run), and name the boot that they belong to. Within a boot they
//! are reused, so that the kubelet need not be restarted with pintle. Files of another boot, files that another user
//! could have modified, and files that do not match each other are replaced.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use zeroize::Zeroizing;

use super::ClientFiles;
use crate::store::durable;
use crate::world::{SystemFiles, User};

/// Changes at every boot (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The listener's certificate and key, and the only client certificate that it accepts.
pub(super) struct LocalAuthority {
    pub(super) server_certificate: CertificateDer<'static>,
    pub(super) server_key: PrivateKeyDer<'static>,
    pub(super) client_certificate: CertificateDer<'static>,
}

impl LocalAuthority {
    /// Reads this boot's files from the directory, or creates them. The client's files are owned by `user`.
    ///
    /// # Errors
    /// If the files cannot be read or written, or others can write to the directory.
    pub(super) fn open(directory: &Path, user: User) -> io::Result<Self> {
        let boot = std::fs::read_to_string(BOOT_ID)?;
        Self::open_for_boot(directory, user, boot.trim())
    }

    fn open_for_boot(directory: &Path, user: User, boot: &str) -> io::Result<Self> {
        create_directory(directory)?;
        check_directory(directory)?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
        match Self::read(directory, user, boot)? {
            Some(authority) => Ok(authority),
            None => Self::create(directory, user, boot),
        }
    }

    /// The listener's credential, readable by root only. It is written last, and its first line names the boot and
    /// the user that all files are for.
    fn listener_file(directory: &Path) -> PathBuf {
        directory.join("listener.pem")
    }

    fn first_line(user: User, boot: &str) -> String {
        format!("boot {boot} user {}", user.uid)
    }

    /// Reads the files in the directory; `None` if they are incomplete, or of another boot or user.
    fn read(directory: &Path, user: User, boot: &str) -> io::Result<Option<Self>> {
        let us = rustix::process::geteuid().as_raw();
        let Some(listener) = read_trusted(&Self::listener_file(directory), us, 0o600)? else { return Ok(None) };
        if listener.lines().next() != Some(&Self::first_line(user, boot)) {
            return Ok(None);
        }
        let files = ClientFiles::in_directory(directory);
        let authority = read_trusted(&files.certificate_authority, us, 0o644)?;
        let certificate = read_trusted(&files.certificate, user.uid, 0o600)?;
        let key = read_trusted(&files.key, user.uid, 0o600)?;
        let (Some(authority), Some(certificate), Some(key)) = (authority, certificate, key) else { return Ok(None) };
        Ok(Self::parse_matching(&listener, &authority, &certificate, &key))
    }

    /// Parses the files; `None` unless they match each other.
    fn parse_matching(listener: &str, authority: &str, certificate: &str, key: &str) -> Option<Self> {
        let mut certificates = CertificateDer::pem_slice_iter(listener.as_bytes()).filter_map(Result::ok);
        let found = Self {
            server_certificate: certificates.next()?,
            client_certificate: certificates.next()?,
            server_key: PrivateKeyDer::from_pem_slice(listener.as_bytes()).ok()?,
        };
        let issuer = certificates.next()?;
        let is = |text: &str, wanted: &CertificateDer<'_>| {
            CertificateDer::from_pem_slice(text.as_bytes()).is_ok_and(|found| found == *wanted)
        };
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).ok()?;
        let fits = is(authority, &issuer)
            && is(certificate, &found.client_certificate)
            && is_key_of(key, &found.client_certificate)
            && is_key_of(found.server_key.clone_key(), &found.server_certificate);
        fits.then_some(found)
    }

    fn create(directory: &Path, user: User, boot: &str) -> io::Result<Self> {
        let listener = Self::listener_file(directory);
        // Removed first, so that a crash never leaves it next to files that do not match it.
        match fs::remove_file(&listener) {
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
        durable::replace(&SystemFiles, &files.certificate_authority, authority_certificate.pem().as_bytes(), 0o644)?;
        let client_key = Zeroizing::new(client_key.serialize_pem());
        for (path, content) in [(&files.certificate, client.pem().as_bytes()), (&files.key, client_key.as_bytes())] {
            durable::replace_for(&SystemFiles, path, content, 0o600, Some(user))?;
        }
        let server_key_pem = Zeroizing::new(server_key.serialize_pem());
        let text = Zeroizing::new(format!(
            "{}\n{}{}{}{}",
            Self::first_line(user, boot),
            server.pem(),
            *server_key_pem,
            client.pem(),
            authority_certificate.pem()
        ));
        durable::replace(&SystemFiles, &listener, text.as_bytes(), 0o600)?;
        Ok(Self {
            server_certificate: server.der().clone(),
            server_key: PrivateKeyDer::try_from(server_key.serialize_der()).map_err(io::Error::other)?,
            client_certificate: client.der().clone(),
        })
    }
}

fn new_key() -> io::Result<KeyPair> {
    // P-256: every client supports it, and no other key type signs faster.
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(io::Error::other)
}

fn parameters(common_name: &str) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, common_name);
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // They are replaced at every boot. A clock that is wrong at boot (case C06) must not lock out the kubelet. RFC
    // 5280, section 4.1.2.5, defines this notAfter as "no well-defined expiration date".
    parameters.not_before = date_time_ymd(1970, 1, 1);
    parameters.not_after = date_time_ymd(9999, 12, 31);
    parameters
}

fn is_key_of(key: PrivateKeyDer<'static>, certificate: &CertificateDer<'static>) -> bool {
    CertifiedKey::from_der(vec![certificate.clone()], key, &aws_lc_rs::default_provider()).is_ok()
}

/// Reads a file that is owned by this user and has no permissions beyond `mode`; `None` if there is no such file.
fn read_trusted(path: &Path, owner: u32, mode: u32) -> io::Result<Option<Zeroizing<String>>> {
    let read = fs::symlink_metadata(path).and_then(|found| {
        let trusted = found.is_file() && found.uid() == owner && found.mode() & 0o777 & !mode == 0;
        trusted.then(|| fs::read_to_string(path).map(Zeroizing::new)).transpose()
    });
    match read {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => Ok(None),
        read => read,
    }
}

/// Creates the directory and its missing parents with mode 0755, whatever the umask: the files in it have modes of
/// their own.
pub(super) fn create_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    if let Some(parent) = directory.parent() {
        create_directory(parent)?;
    }
    // Never writable by others, not even briefly.
    fs::DirBuilder::new().mode(0o700).create(directory)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
}

/// Refuses a directory in which another user could place a certificate.
fn check_directory(directory: &Path) -> io::Result<()> {
    let us = rustix::process::geteuid().as_raw();
    let refused = |path: &Path, why: String| {
        Err(io::Error::new(io::ErrorKind::NotADirectory, format!("{} {why}", path.display())))
    };
    let found = fs::symlink_metadata(directory)?;
    if !found.is_dir() || found.uid() != us {
        return refused(directory, format!("belongs to user {}, or is not a directory", found.uid()));
    }
    if found.mode() & 0o022 != 0 {
        return refused(directory, format!("is writable by others: its mode is {:o}", found.mode() & 0o7777));
    }
    // With write access to the parent, a user can replace the directory; with the sticky bit (/tmp), only their own.
    let above = durable::directory_of(directory);
    let found = fs::metadata(above)?;
    if found.uid() != us && found.uid() != 0 {
        return refused(above, format!("belongs to user {}", found.uid()));
    }
    if found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0 {
        return refused(above, format!("is writable by others: its mode is {:o}", found.mode() & 0o7777));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn current_user() -> User {
        User { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() }
    }

    #[test]
    fn files_are_reused_within_a_boot_only() {
        let directory = tempfile::tempdir().expect("a directory");
        let directory = directory.path().join("client");
        let user = current_user();
        let first = LocalAuthority::open_for_boot(&directory, user, "one").expect("made");
        let again = LocalAuthority::open_for_boot(&directory, user, "one").expect("read");
        assert_eq!(first.client_certificate, again.client_certificate);
        assert_eq!(first.server_key, again.server_key);
        let next = LocalAuthority::open_for_boot(&directory, user, "two").expect("created again");
        assert_ne!(first.client_certificate, next.client_certificate);
        for name in ["client.key", "client.crt", "listener.pem"] {
            let mode = std::fs::metadata(directory.join(name)).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        std::fs::remove_file(directory.join("client.key")).expect("removed");
        let after = LocalAuthority::open_for_boot(&directory, user, "two").expect("created again");
        assert_ne!(next.client_certificate, after.client_certificate);
    }

    #[test]
    fn files_that_do_not_match_are_replaced() {
        let directory = tempfile::tempdir().expect("a directory");
        let open = |name: &str| {
            LocalAuthority::open_for_boot(&directory.path().join(name), current_user(), "one").expect("open")
        };
        let (_, mut before) = (open("other"), open("client").client_certificate);
        for name in ["client.key", "client.crt", "ca.crt", "listener.pem"] {
            let path = directory.path().join("client").join(name);
            let others = fs::read(directory.path().join("other").join(name)).expect("readable");
            for content in [Vec::new(), vec![0xff], others] {
                if name == "listener.pem" && content.len() > 1 {
                    continue; // The other files have to match this one.
                }
                fs::write(&path, &content).expect("written");
                let after = open("client").client_certificate;
                assert_ne!(before, after, "{name}: {} bytes", content.len());
                assert_eq!(open("client").client_certificate, after, "{name}");
                before = after;
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("ours");
            let after = open("client").client_certificate;
            assert_ne!(before, after, "{name}: others could write it");
            before = after;
        }
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let runtime = directory.path().join("client");
        let refused = || {
            let opened = LocalAuthority::open_for_boot(&runtime, current_user(), "one");
            opened.err().is_some_and(|error| error.kind() == io::ErrorKind::NotADirectory)
        };
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("ours");
        assert!(!refused());
        mode(&runtime, 0o777);
        assert!(refused());
        mode(&runtime, 0o755);
        mode(directory.path(), 0o777);
        assert!(refused());
        mode(directory.path(), 0o1777);
        assert!(!refused());
        if current_user().uid == 0 {
            std::os::unix::fs::chown(&runtime, Some(65534), None).expect("as root");
            assert!(refused());
        }
        fs::remove_dir_all(&runtime).expect("removed");
        std::os::unix::fs::symlink("elsewhere", &runtime).expect("linked");
        fs::create_dir(directory.path().join("elsewhere")).expect("made");
        assert!(refused());
    }
}

//! What came back from the signer, and why it may be used or not (RFC 5280).

mod checks;
mod rejection;

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use pintle_plugins_api::{KeyId, PublicKey};
use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::pem_block::PemBlocks;
use crate::{Template, UnixTime};
use checks::{check_authority, check_names, check_subject, check_usages};

pub use rejection::Rejection;

/// Where a key is: the backend, and the key's id within it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyName {
    /// The name under which the backend is configured.
    pub backend: String,
    /// The key's id within the backend.
    pub id: KeyId,
}

impl fmt::Display for KeyName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.backend, self.id)
    }
}

/// A certificate that may be used, with the key that it is for.
///
/// [`accept`] is the only way to make one; a journal's are parsed anew as they are read.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Credential {
    key: KeyName,
    chain: Arc<[Vec<u8>]>,
    leaf: Arc<Leaf>,
    installed_at: UnixTime,
}

/// What a leaf says of itself, whether or not it may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// SHA-256 of its DER.
    pub fingerprint: [u8; 32],
    /// Its serial number, upper-case hexadecimal.
    pub serial: String,
    /// Its subject, as text (RFC 4514 order is not promised).
    pub subject: String,
    /// Its SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
    /// The beginning of its validity, inclusive.
    pub not_before: UnixTime,
    /// The end of its validity.
    pub not_after: UnixTime,
}

impl Credential {
    /// The key that the leaf is for.
    pub fn key(&self) -> &KeyName {
        &self.key
    }

    /// The chain, each certificate as DER, the leaf first.
    pub fn chain(&self) -> &[Vec<u8>] {
        &self.chain
    }

    /// The chain as PEM, the leaf first.
    pub fn chain_pem(&self) -> String {
        self.chain.iter().map(|der| encode_pem(der)).collect()
    }

    /// SHA-256 of the leaf's DER: what an API server calls `X509SHA256` in a credential id.
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.leaf.fingerprint
    }

    /// The leaf's serial number in upper-case hexadecimal, as `openssl x509 -serial` prints it.
    pub fn serial(&self) -> &str {
        &self.leaf.serial
    }

    /// The leaf's subject, as text (RFC 4514 order is not promised).
    pub fn subject(&self) -> &str {
        &self.leaf.subject
    }

    /// The leaf's SubjectPublicKeyInfo, DER.
    pub fn public_key(&self) -> &[u8] {
        &self.leaf.public_key
    }

    /// The beginning of the leaf's validity, inclusive.
    pub fn not_before(&self) -> UnixTime {
        self.leaf.not_before
    }

    /// The end of the leaf's validity.
    pub fn not_after(&self) -> UnixTime {
        self.leaf.not_after
    }

    /// When it was installed: the usable life counts from here, see [`crate::policy::Window`].
    pub fn installed_at(&self) -> UnixTime {
        self.installed_at
    }

    /// The same credential, installed at this time.
    #[must_use]
    pub fn installed(mut self, at: UnixTime) -> Self {
        self.installed_at = at;
        self
    }

    /// Whether the validity is over.
    pub fn has_expired(&self, now: UnixTime) -> bool {
        now >= self.leaf.not_after
    }

    #[cfg(test)]
    pub(crate) fn simulated(number: u64, not_before: UnixTime, not_after: UnixTime) -> Self {
        let mut fingerprint = [0; 32];
        // As evenly spread as a hash: the rotation window's deadline depends on it.
        fingerprint[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        let key =
            KeyName { backend: "simulated".to_owned(), id: KeyId::new(number.to_be_bytes()).expect("eight bytes") };
        let leaf = Leaf {
            fingerprint,
            serial: format!("{number:X}"),
            subject: String::new(),
            public_key: Vec::new(),
            not_before,
            not_after,
        };
        Self { key, chain: Arc::new([]), leaf: Arc::new(leaf), installed_at: not_before }
    }

    #[cfg(test)]
    pub(crate) fn with_key(mut self, key: KeyName) -> Self {
        self.key = key;
        self
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "Credential({} serial {} until {} key {})",
            self.leaf.subject, self.leaf.serial, self.leaf.not_after, self.key
        )
    }
}

/// A credential as a journal holds it.
#[derive(Serialize, Deserialize)]
struct Stored {
    key: KeyName,
    /// PEM, the leaf first.
    chain: String,
    installed_at: UnixTime,
}

impl From<Credential> for Stored {
    fn from(credential: Credential) -> Self {
        Self { chain: credential.chain_pem(), key: credential.key, installed_at: credential.installed_at }
    }
}

impl TryFrom<Stored> for Credential {
    type Error = Rejection;

    fn try_from(stored: Stored) -> Result<Self, Rejection> {
        let chain = parse_chain(&stored.chain)?;
        let leaf = Leaf::read(&parse(&chain[0])?);
        Ok(Self { key: stored.key, chain: chain.into(), leaf: Arc::new(leaf), installed_at: stored.installed_at })
    }
}

/// Takes what a signer answered for a credential, or says why not.
///
/// `chain` is PEM, the leaf first. It must be for `public_key`, which `key` names; its subject must be the requested one
/// and its names and usages cover those requested; it must be valid at `now`. Where `authorities` (DER certificates) are
/// known, one of them must have signed the leaf, directly or through the rest of the chain.
///
/// # Errors
/// The first [`Rejection`] in the order of its variants.
pub fn accept(
    chain: &str,
    requested: &Template,
    key: KeyName,
    public_key: &PublicKey,
    authorities: Option<&[Vec<u8>]>,
    now: UnixTime,
) -> Result<Credential, Rejection> {
    let chain = parse_chain(chain)?;
    let certificate = parse(&chain[0])?;
    let leaf = Leaf::read(&certificate);
    if leaf.public_key != public_key.as_der() {
        return Err(Rejection::OtherKey);
    }
    check_subject(&certificate, requested)?;
    check_names(&certificate, requested)?;
    check_usages(&certificate)?;
    if now >= leaf.not_after {
        return Err(Rejection::Expired(leaf.not_after));
    }
    if now < leaf.not_before {
        return Err(Rejection::NotYetValid(leaf.not_before));
    }
    if let Some(authorities) = authorities {
        check_authority(&chain, authorities)?;
    }
    Ok(Credential { key, chain: chain.into(), leaf: Arc::new(leaf), installed_at: now })
}

/// The node's name in the subject of a chain's leaf (`CN=system:node:NAME`), if it is a node's.
pub fn node_name_of(chain: &str) -> Option<String> {
    let chain = parse_chain(chain).ok()?;
    let leaf = parse(&chain[0]).ok()?;
    let common_name = leaf.subject().iter_common_name().next()?.as_str().ok()?;
    common_name.strip_prefix("system:node:").map(str::to_owned)
}

/// The public key of a chain's leaf.
///
/// # Errors
/// `Unreadable` if there is no leaf or its key is of an unknown kind.
pub fn public_key_of(chain: &str) -> Result<PublicKey, Rejection> {
    PublicKey::from_der(Leaf::of(chain)?.public_key).map_err(|error| Rejection::Unreadable(error.to_string()))
}

impl Leaf {
    /// The leaf of a chain, PEM; other blocks, such as a private key, are passed over.
    ///
    /// # Errors
    /// `Unreadable` if there is no leaf.
    pub fn of(chain: &str) -> Result<Self, Rejection> {
        Ok(Self::read(&parse(&parse_chain(chain)?[0])?))
    }

    fn read(leaf: &X509Certificate<'_>) -> Self {
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest(&SHA256, leaf.as_raw()).as_ref());
        let serial = leaf.raw_serial().iter().map(|byte| format!("{byte:02X}")).collect::<String>();
        Self {
            fingerprint,
            // DER puts a zero byte before a number whose first bit is set.
            serial: serial.strip_prefix("00").filter(|rest| !rest.is_empty()).unwrap_or(&serial).to_owned(),
            subject: leaf.subject().to_string(),
            public_key: leaf.public_key().raw.to_vec(),
            not_before: UnixTime::from_seconds(leaf.validity().not_before.timestamp()),
            // notAfter is inclusive (RFC 5280, section 4.1.2.5), but the API server refuses within that second.
            not_after: UnixTime::from_seconds(leaf.validity().not_after.timestamp()),
        }
    }
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, Rejection> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(Rejection::Unreadable("there are more bytes after the certificate".to_owned())),
        Err(_) => Err(Rejection::Unreadable("it is not an X.509 certificate in DER".to_owned())),
    }
}

/// The DER certificates of a PEM text; other PEM blocks, such as a private key, are passed over. What Go reads is read: the
/// API server stores what a signer gives it, blank lines and all.
fn parse_chain(text: &str) -> Result<Vec<Vec<u8>>, Rejection> {
    PemBlocks::of(text).certificates().map_err(|error| Rejection::Unreadable(error.to_string()))
}

fn encode_pem(der: &[u8]) -> String {
    crate::pem_block::encode("CERTIFICATE", der).as_str().to_owned()
}

#[cfg(test)]
mod tests;

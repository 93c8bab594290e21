//! Events of the control plane, which the demo prints and tests wait for.

use k8s_openapi::jiff::Timestamp;

/// An event of the control plane. Serial numbers are upper-case hexadecimal, as printed by `openssl x509 -serial`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Observation {
    /// A CertificateSigningRequest was created, and is Pending.
    Created {
        /// metadata.name.
        name: String,
        /// spec.signerName.
        signer_name: String,
        /// The user who created it.
        requester: String,
    },
    /// A request was approved, automatically or manually.
    Approved {
        /// metadata.name.
        name: String,
        /// The condition's message.
        message: String,
    },
    /// A request was denied, automatically or manually.
    Denied {
        /// metadata.name.
        name: String,
        /// The condition's message.
        message: String,
    },
    /// The signer could not sign an approved request.
    Failed {
        /// metadata.name.
        name: String,
        /// The condition's message.
        message: String,
    },
    /// The signer issued a leaf.
    Issued {
        /// metadata.name.
        name: String,
        /// The leaf's serial number.
        serial: String,
        /// The leaf's notBefore.
        not_before: Timestamp,
        /// The leaf's notAfter.
        not_after: Timestamp,
    },
    /// A request was deleted.
    Deleted {
        /// metadata.name.
        name: String,
    },
    /// The first request on a connection was authenticated.
    Authenticated {
        /// The user's name.
        user: String,
        /// The client leaf's serial number; None for a bearer token.
        serial: Option<String>,
        /// `X509SHA256=` and the SHA-256 of the client leaf's DER in lower-case hexadecimal; `None` for a bearer
        /// token.
        credential_id: Option<String>,
    },
    /// A request failed.
    Refused {
        /// `None` if the request was not authenticated.
        user: Option<String>,
        /// The HTTP method.
        method: String,
        /// The path, without the query.
        path: String,
        /// The HTTP status code.
        code: u16,
    },
}

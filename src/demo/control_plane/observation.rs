//! What the control plane saw and did, for the demo to print and for tests to wait on.

use k8s_openapi::jiff::Timestamp;

/// One thing that happened. Serial numbers are upper-case hexadecimal, as `openssl x509 -serial` prints them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Observation {
    /// A CertificateSigningRequest was stored; it is Pending.
    Created {
        /// metadata.name.
        name: String,
        /// spec.signerName.
        signer_name: String,
        /// The user who sent it.
        requester: String,
    },
    /// A request was approved, by the approver or by a person.
    Approved {
        /// metadata.name.
        name: String,
        /// The condition's message.
        message: String,
    },
    /// A request was denied, by the approver or by a person.
    Denied {
        /// metadata.name.
        name: String,
        /// The condition's message.
        message: String,
    },
    /// The signer refused an approved request.
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
    /// The first request of a connection was authenticated.
    Authenticated {
        /// The user's name.
        user: String,
        /// The client leaf's serial number; None for a bearer token.
        serial: Option<String>,
        /// `X509SHA256=` and the SHA-256 of the client leaf's DER in lower-case hexadecimal; None for a bearer token.
        credential_id: Option<String>,
    },
    /// A request was answered with an error.
    Refused {
        /// The user's name; None before authentication.
        user: Option<String>,
        /// The HTTP method.
        method: String,
        /// The path, without the query.
        path: String,
        /// The HTTP status code.
        code: u16,
    },
}

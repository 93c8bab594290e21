//! What happened.

use std::fmt;
use std::time::Duration;

use pintle_plugins_api::{BackendError, PublicKey};

use super::{Authority, SubmittedRequest};
use crate::{Credential, KeyName, Rejection};

/// What happened since the last step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Nothing but time has passed; also the first event after a start.
    Woke,
    /// An operator asks for a rotation now.
    RotationRequested,
    /// The policy of this step is another than that of the last one: another backend for new keys, or another
    /// configuration.
    PolicyChanged,
    /// The template in the policy of this step is another than that of the last one.
    TemplateChanged,
    /// The node has lost the addresses that its certificate must name: the policy of this step has no template.
    AddressesMissing,
    /// Something else wrote a good pair and made it the current one.
    PairReplaced(FoundPair),
    /// Something on this machine changed that a failure may have waited for, such as the bootstrap credential.
    LocalChange,
    /// A backend that did not answer answers again.
    BackendFound,
    /// The API server refused the held credential, or its key did not sign.
    HeldRefused {
        /// The backend says that the key is gone for good.
        key_lost: bool,
    },
    /// The held credential's key, which was lost, signs again: the device was restored.
    HeldKeyFound,
    /// The key exists, and this is its public half.
    Generated(PublicKey),
    /// The backend did not make the key.
    GenerateFailed(BackendError),
    /// The backend did not sign the request.
    SigningFailed(BackendError),
    /// The request stands at the API server.
    Submitted(SubmittedRequest),
    /// Somebody else's request has the name of the one that was to be made.
    NameTaken,
    /// The API server did not do what was asked.
    ApiFailed {
        /// As whom it was asked.
        authority: Authority,
        /// What it answered.
        failure: ApiFailure,
    },
    /// The request was looked at.
    Observed(Observation),
    /// The API server accepted the credential of [`Action::Prove`](super::Action::Prove).
    Proven,
    /// The key of the credential that is to be proven did not sign.
    ProofKeyFailed(BackendError),
    /// The pair is on disk and current.
    Published,
    /// The pair could not be written.
    PublishFailed(PublishError),
    /// Old keys were destroyed, or not.
    Retired {
        /// The keys that are gone.
        destroyed: Vec<KeyName>,
        /// What could not be destroyed or removed, and why; each error names its key.
        failed: Vec<BackendError>,
    },
}

/// A pair on disk that the journal did not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundPair {
    /// The credential in it, for a key that a backend has.
    pub credential: Credential,
    /// Whether the key is one of this installation's own, which may be destroyed when it is replaced. A key that
    /// something else made is used, and left alone.
    pub key_is_ours: bool,
}

/// Why a pair could not be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublishError {
    /// The backend does not have the key, or does not say how a consumer names it. A key under the id that is not the
    /// one the certificate is for is a `Conflict`.
    Backend(BackendError),
    /// The file system, or what is in it.
    Disk {
        /// What failed.
        detail: String,
        /// What a person can do about it; empty where there is nothing to say.
        hint: String,
    },
}

/// What the API server shows of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// Nobody has decided yet.
    Pending,
    /// A certificate is there: good, or not, as [`crate::issued::accept`] finds.
    Issued(Result<Credential, Rejection>),
    /// An approver denied it, for this reason.
    Denied(String),
    /// The signer gave up, for this reason.
    Failed(String),
    /// It is deleted, or another object has its name.
    Gone,
}

/// Why the API server did not do what was asked, by what follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiFailure {
    /// No answer.
    Unreachable(String),
    /// It does not know who asks (401).
    Unauthorized(String),
    /// It knows who asks, and they may not (403).
    Forbidden(String),
    /// Too much is asked of it (429, or 503 with Retry-After).
    Throttled {
        /// What it said.
        detail: String,
        /// How long it wants to be left alone.
        retry_after: Option<Duration>,
    },
    /// It finds the request itself wrong (400, 422).
    Invalid(String),
    /// Any other answer.
    Server(String),
    /// There is nobody to ask as: no certificate that is good, and no bootstrap credential.
    NoCredential(String),
}

impl ApiFailure {
    /// What a person can do about it; empty where waiting is all there is to do.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Unauthorized(_) => {
                "check that the bootstrap token has not expired, and that the API server trusts the authority that signed \
                 the certificate"
            }
            Self::Forbidden(_) => {
                "bind system:node-bootstrapper to the bootstrap credential's group, and the clusterroles \
                 system:certificates.k8s.io:certificatesigningrequests:nodeclient and :selfnodeclient as for any kubelet"
            }
            Self::Invalid(_) => "check node name and expiration-seconds",
            Self::NoCredential(_) => {
                "put a kubeconfig that can be used where --bootstrap-kubeconfig points; it is noticed by itself"
            }
            Self::Unreachable(_) | Self::Throttled { .. } | Self::Server(_) => "",
        }
    }
}

impl fmt::Display for ApiFailure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(detail) => write!(formatter, "the API server cannot be reached: {detail}"),
            Self::Unauthorized(detail) => write!(formatter, "the API server does not accept the credential: {detail}"),
            Self::Forbidden(detail) => write!(formatter, "the API server forbids it: {detail}"),
            Self::Throttled { detail, retry_after: Some(after) } => {
                write!(formatter, "the API server asks to wait for {} s: {detail}", after.as_secs())
            }
            Self::Throttled { detail, .. } => write!(formatter, "the API server asks to wait: {detail}"),
            Self::Invalid(detail) => write!(formatter, "the API server finds the request invalid: {detail}"),
            Self::Server(detail) => write!(formatter, "the API server failed: {detail}"),
            Self::NoCredential(detail) => formatter.write_str(detail),
        }
    }
}

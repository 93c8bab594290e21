//! What to do next.

use pintle_plugins_api::KeyAlgorithm;

use super::{Candidate, SubmittedRequest};
use crate::{Credential, KeyName, UnixTime};

/// The one thing to do next. Each may be repeated without harm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing before this time, or before something else happens. Answered with [`Event::Woke`](super::Event::Woke).
    Wait {
        /// When to wake; `None` if only an event can end the wait.
        until: Option<UnixTime>,
        /// What is waited for.
        waiting: Waiting,
    },
    /// Generate this key, or find it made. Answered with `Generated` or `GenerateFailed`.
    Generate {
        /// The key's name.
        key: KeyName,
        /// What kind of key.
        algorithm: KeyAlgorithm,
    },
    /// Create the CertificateSigningRequest of this candidate, or find it created. Answered with `Submitted`,
    /// `NameTaken`, `SigningFailed` or `ApiFailed`.
    Submit {
        /// The key, the template and the attempt, which determine the request's name.
        next: Candidate,
        /// As whom.
        authority: Authority,
    },
    /// Watch the request until something happens to it. Answered with `Observed` or `ApiFailed`.
    Observe {
        /// The key and the template that the certificate must be for.
        next: Candidate,
        /// Which request.
        request: SubmittedRequest,
        /// As whom.
        authority: Authority,
    },
    /// Ask the API server for anything as this credential, over a new connection. Answered with `Proven`,
    /// `ProofKeyFailed` or `ApiFailed` as [`Authority::Issued`].
    Prove {
        /// Whether the API server accepts this one. It is not the held one, unless that was published unproven.
        credential: Credential,
    },
    /// Write the pair and make it the current one. Answered with `Published` or `PublishFailed`.
    Publish {
        /// What to publish.
        credential: Credential,
    },
    /// Destroy these keys and old pairs. Answered with `Retired`.
    Retire {
        /// The keys to destroy, each independently of the others; those already absent are destroyed.
        keys: Vec<KeyName>,
    },
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// The rotation window of the held credential.
    UntilRotation,
    /// The end of a wait after a failure.
    BackOff,
    /// Nothing: rotation is off, and the held credential is used until it expires.
    RotationOff,
    /// A person: the backend has lost the key in use, and enrolling again by itself is not allowed.
    KeyLost,
    /// The node's addresses: without them it is not known what to ask for.
    AddressesMissing,
}

/// As whom the API server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authority {
    /// As the held credential.
    Held,
    /// As the bootstrap credential.
    Bootstrap,
    /// As the credential of [`Action::Prove`]: a refusal says nothing about the held one.
    Issued,
}

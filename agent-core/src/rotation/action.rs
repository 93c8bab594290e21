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
    /// `SigningFailed` or `ApiFailed`.
    Submit {
        /// The key and the attempt, which determine the request's name.
        next: Candidate,
        /// As whom.
        authority: Authority,
    },
    /// Watch the request until something happens to it. Answered with `Observed` or `ApiFailed`.
    Observe {
        /// The key that the certificate must be for.
        next: Candidate,
        /// Which request.
        request: SubmittedRequest,
        /// As whom.
        authority: Authority,
    },
    /// Write the pair and make it the current one. Answered with `Published` or `PublishFailed`.
    Publish {
        /// What to publish.
        issued: Credential,
    },
    /// Ask the API server for anything as the held identity, over a new connection. Answered with `Proven` or
    /// `ApiFailed`.
    Prove,
    /// Destroy these keys and old pairs. Answered with `Retired` or `RetireFailed`.
    Retire {
        /// The keys to destroy; those already absent are destroyed.
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
    /// Nothing: rotation is off, and the held credential is used until it ends.
    RotationOff,
    /// A person: the backend has lost the key in use, and enrolling again by itself is not allowed.
    KeyLost,
}

/// As whom the API server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authority {
    /// As the held credential.
    Held,
    /// As the bootstrap credential.
    Bootstrap,
}

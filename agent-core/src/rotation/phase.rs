//! What is going on, and what belongs to it.

use pintle_plugins_api::PublicKey;
use serde::{Deserialize, Serialize};

use crate::{Credential, KeyName, Template, UnixTime};

/// What is going on, in the order of a rotation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The credential in use is good; or there is none, and getting one begins.
    #[default]
    Holding,
    /// A key of this name is chosen, and perhaps made.
    Generating {
        /// The name of the key.
        key: KeyName,
    },
    /// The key exists, and a certificate for it is perhaps requested.
    Requesting {
        /// What is asked for.
        next: Candidate,
    },
    /// The request stands at the API server.
    Awaiting {
        /// What was asked for.
        next: Candidate,
        /// The request as the API server knows it.
        request: SubmittedRequest,
    },
    /// The certificate has come; whether the API server accepts it is not known yet. Nobody else has it.
    Proving {
        /// What was asked for.
        next: Candidate,
        /// What was issued.
        issued: Credential,
        /// How often the API server has refused it (401). One that was refused is not published unproven.
        refusals: u32,
        /// The API server was asked, and gave no answer that says whether it accepts the certificate.
        unanswered: bool,
    },
    /// The certificate is perhaps written.
    Publishing {
        /// What was asked for.
        next: Candidate,
        /// What was issued.
        issued: Credential,
        /// Whether the API server has accepted it.
        proven: bool,
    },
    /// What is published, or perhaps is, cannot be used after all: the held credential, which was in use before, is
    /// perhaps published again.
    Restoring {
        /// What cannot be used; its key lives until nobody reads it any more.
        dropped: Credential,
        /// Why not.
        reason: String,
        /// That key is gone from its backend.
        key_lost: bool,
    },
    /// The held credential is proven, if it was not before; then the keys on the list are destroyed.
    Retiring {
        /// Some could not be destroyed.
        attempted: bool,
        /// How often the API server has refused the held credential, which was published unproven.
        refusals: u32,
    },
}

impl Phase {
    pub(super) const RETIRING: Self = Self::Retiring { attempted: false, refusals: 0 };

    /// One word, as status and logs have it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Holding => "holding",
            Self::Generating { .. } => "generating",
            Self::Requesting { .. } => "requesting",
            Self::Awaiting { .. } => "awaiting",
            Self::Proving { .. } => "proving",
            Self::Publishing { .. } => "publishing",
            Self::Restoring { .. } => "restoring",
            Self::Retiring { .. } => "retiring",
        }
    }

    /// How often a certificate for the next key has been requested, this time included.
    pub(super) fn attempt(&self) -> u32 {
        match self {
            Self::Requesting { next }
            | Self::Awaiting { next, .. }
            | Self::Proving { next, .. }
            | Self::Publishing { next, .. } => next.attempt,
            _ => 1,
        }
    }

    /// The key that is being made, requested or published, and is not in use yet.
    pub fn next_key(&self) -> Option<&KeyName> {
        match self {
            Self::Generating { key } => Some(key),
            Self::Requesting { next }
            | Self::Awaiting { next, .. }
            | Self::Proving { next, .. }
            | Self::Publishing { next, .. } => Some(&next.key),
            Self::Restoring { dropped, .. } => Some(dropped.key()),
            Self::Holding | Self::Retiring { .. } => None,
        }
    }
}

/// The next key of an identity, what it is for, and how often a certificate for it has been requested.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Where the key is.
    pub key: KeyName,
    /// Its public half.
    pub public_key: PublicKey,
    /// What is asked for, and what the answer is checked against; the configuration may have changed since.
    pub template: Template,
    /// 1 for the first request; one more for each that was refused.
    pub attempt: u32,
}

/// A CertificateSigningRequest as the API server knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubmittedRequest {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`: another object of the same name is another request.
    pub uid: String,
}

/// A credential that was in use, and may have to be again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Previous {
    pub(super) credential: Credential,
    pub(super) template: Option<Template>,
    /// The API server refused this one too.
    pub(super) refused: bool,
    /// An operator had asked for a rotation.
    pub(super) rotation_requested: bool,
}

/// The same answer of a signer, again and again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rejections {
    /// [`Rejection::kind`](crate::Rejection::kind), or what stands for a proof that was refused.
    pub(super) kind: String,
    pub(super) in_a_row: u32,
}

/// What failed, and until when nothing is tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackOff {
    /// Failures in a row within the phase; no fewer than refusals of this candidate and discarded keys.
    pub failures: u32,
    /// When it is tried again.
    pub until: UnixTime,
    /// What failed, for a person.
    pub reason: String,
    /// What a person can do about it; empty where there is nothing to say.
    pub hint: String,
    /// Whether only something on this machine can mend it (a file to appear, room on the disk): then it is tried again
    /// as soon as something here changes.
    pub local: bool,
    /// Whether another bootstrap credential may mend it: then it is tried again as soon as there is one.
    #[serde(default)]
    pub bootstrap: bool,
}

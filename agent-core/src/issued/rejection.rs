//! Why an issued certificate is not taken.

use std::fmt;

use crate::UnixTime;

/// Why a certificate is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// It is not a chain of PEM certificates.
    Unreadable(String),
    /// It is for another key.
    OtherKey,
    /// Its subject is not the one requested.
    OtherSubject {
        /// What was asked for.
        requested: String,
        /// What came back.
        issued: String,
    },
    /// It lacks names or usages that were requested.
    Missing(String),
    /// It has expired already.
    Expired(UnixTime),
    /// It begins in the future: either this machine's clock is behind, or the signer's is ahead. It may be used later.
    NotYetValid(UnixTime),
    /// No certificate of the configured authority has signed it.
    Untrusted(String),
}

impl Rejection {
    /// One word for what is wrong: the same of two certificates in a row is the signer's doing, and waiting for a third
    /// is of little use.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "unreadable",
            Self::OtherKey => "other-key",
            Self::OtherSubject { .. } => "other-subject",
            Self::Missing(_) => "missing",
            Self::Expired(_) => "expired",
            Self::NotYetValid(_) => "not-yet-valid",
            Self::Untrusted(_) => "untrusted",
        }
    }

    /// What a person can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "check what the signer writes to status.certificate of the request",
            Self::OtherKey => {
                "find out which controller signs these requests: it answered with another key's certificate"
            }
            Self::OtherSubject { .. } | Self::Missing(_) => {
                "check the signer: it must issue the subject, names and usages that the request asks for"
            }
            Self::Expired(_) => {
                "set --cluster-signing-duration of kube-controller-manager to at least 10m: a signer that counts it from \
                 five minutes ago issues certificates that have already expired; or set this machine's clock if it is ahead"
            }
            Self::NotYetValid(_) => "check the clocks of this machine and of the signer; it is looked at again",
            Self::Untrusted(_) => {
                "check that the file of --client-ca-file holds the authority of the signer, as kube-apiserver's does"
            }
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(detail) => write!(formatter, "the certificate cannot be read: {detail}"),
            Self::OtherKey => formatter.write_str("the certificate is for another public key"),
            Self::OtherSubject { requested, issued } => {
                write!(formatter, "the certificate is for {issued:?}, requested was {requested:?}")
            }
            Self::Missing(what) => write!(formatter, "the certificate lacks {what}"),
            Self::Expired(at) => write!(formatter, "the certificate has already expired, at {at}"),
            Self::NotYetValid(at) => write!(formatter, "the certificate is not valid before {at}"),
            Self::Untrusted(detail) => write!(formatter, "the certificate is not signed by the authority: {detail}"),
        }
    }
}

impl std::error::Error for Rejection {}

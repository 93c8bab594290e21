//! The control socket: how `pintle status` and `pintle rotate` reach the running agent.
//!
//! One JSON line goes in, one JSON line comes out, over a unix socket in the state directory that only its owner can
//! open.

mod client;
mod server;

use serde::{Deserialize, Serialize};

use crate::telemetry::Status;

pub use client::{ControlError, ask};
pub use server::serve;

/// What is asked of a running agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// How things stand.
    Status,
    /// Rotate now.
    Rotate {
        /// Whether to answer only when the new certificate is in use, or when it failed.
        wait: bool,
    },
}

/// What a running agent answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Response {
    /// How things stand; after a rotation that was waited for, how they stand after it.
    Status {
        /// The status.
        status: Status,
    },
    /// The rotation has been asked for.
    Accepted,
    /// The rotation that was waited for has failed for now; the agent goes on trying.
    Failed {
        /// What failed.
        reason: String,
        /// What a person can do about it.
        hint: String,
    },
    /// The request made no sense to this version of pintle.
    Refused {
        /// Why.
        reason: String,
    },
}

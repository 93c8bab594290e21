//! The control socket: how `pintle status`, `pintle rotate` and others reach the running agent.
//!
//! One JSON line goes in, one JSON line comes out, over a unix socket in the state directory that only its owner can
//! open.

mod client;
pub mod metrics;
mod server;

use serde::{Deserialize, Serialize};

use crate::keys::inventory::{BackendEntry, Inventory};
use crate::telemetry::Status;

pub use client::{ControlError, ask};
pub use server::{Server, serve};

/// What is asked of a running agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// How things stand.
    Status,
    /// Rotate now.
    Rotate {
        /// The identity; the only one if it is not named.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        identity: Option<String>,
        /// Whether to answer only when the new certificate is in use, or when it failed.
        wait: bool,
    },
    /// Which backends there are, and whether they answer.
    Backends,
    /// Which keys are in them.
    Keys,
    /// Destroy the keys that this installation made and nobody needs.
    Prune {
        /// Whether only to tell which.
        dry_run: bool,
    },
    /// Destroy the keys of these names. An agent that does not know this request refuses it, where it would overlook
    /// names in the other one.
    PruneNamed {
        /// `ID` or `BACKEND:ID`.
        names: Vec<String>,
        /// Whether only to tell which.
        dry_run: bool,
    },
    /// Move an identity's key to another backend.
    Migrate {
        /// The identity; the only one if it is not named.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        identity: Option<String>,
        /// The backend.
        to: String,
        /// Whether only to tell what would be done.
        dry_run: bool,
        /// Whether to answer only when the new certificate is in use, or when it failed.
        wait: bool,
    },
}

/// What a running agent answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Response {
    /// How things stand; after a rotation that was waited for, how its identity stands after it.
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
    /// The backends.
    Backends {
        /// One entry for each.
        backends: Vec<BackendEntry>,
    },
    /// The keys that there are; after a pruning, those that it destroyed.
    Keys {
        /// The keys.
        inventory: Inventory,
    },
    /// The migration has begun, or would begin.
    Migration {
        /// The key in use, `backend:id`; empty if there is none.
        from: String,
        /// The backend in which the next one is made.
        to: String,
        /// Its algorithm.
        algorithm: String,
        /// Whether there is anything to move: if not, the key in use is there already.
        moves: bool,
    },
    /// The request made no sense to this version of pintle.
    Refused {
        /// Why.
        reason: String,
    },
}

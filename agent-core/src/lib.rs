//! The rotation of a node's identity as a pure function: no async, no files, no clock, no randomness.
//!
//! [`rotation::step`] takes the state, what happened and the time, and answers with the next state and the one thing to
//! do next. The state is the journal: whoever drives the core saves it before it acts, and every action may be repeated.
//!
//! - [`rotation`]: the state machine
//! - [`policy`]: when to rotate and when to try again
//! - [`request`]: what is asked of the signer, as a PKCS#10 certification request
//! - [`issued`]: what came back, and why it may be used or not
//! - [`pem_block`]: PEM as Go reads it
//! - [`text`]: sanitizes untrusted text for logs and terminals
//! - [`time`]: a point in time that says its unit

pub mod issued;
pub mod pem_block;
pub mod policy;
pub mod request;
pub mod rotation;
pub mod text;
pub mod time;

pub use issued::{Credential, KeyName, Rejection};
pub use policy::Policy;
pub use request::Template;
pub use rotation::{Action, Event, Phase, State, step};
pub use time::UnixTime;

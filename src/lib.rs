//! pintle keeps a Kubernetes node's identity turning.
//!
//! Everything in this package touches the world; what decides is [`pintle_agent_core`].

// The operating system is reached through `world`; clippy.toml lists what that means.
#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::disallowed_types))]

#[allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a command has its own terminal and files, and no rotation runs through it"
)]
pub mod cli;
pub mod config;
pub mod consumers;
#[allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "its control plane and its device are a world of their own"
)]
pub mod demo;
pub mod identity;
pub mod keys;
pub mod kubernetes;
pub mod node;
pub mod parse_error;
#[allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "it has sockets and tasks of its own; the loop reaches it through identity::ports::LocalProxy"
)]
pub mod proxy;
#[cfg(test)]
mod simulation;
pub mod store;
pub mod telemetry;
pub mod tls;
#[allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "it is what the others reach the operating system through"
)]
pub mod world;

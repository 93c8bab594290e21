//! pintle keeps a Kubernetes node's identity turning.
//!
//! Everything in this package touches the world; what decides is [`pintle_agent_core`].

pub mod cli;
pub mod config;
pub mod consumers;
pub mod demo;
pub mod identity;
pub mod keys;
pub mod kubernetes;
pub mod node;
pub mod parse_error;
pub mod proxy;
#[cfg(test)]
mod simulation;
pub mod store;
pub mod telemetry;
pub mod world;

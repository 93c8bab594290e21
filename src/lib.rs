//! pintle keeps a Kubernetes node's identity turning.
//!
//! Everything in this package touches the world; what decides is [`pintle_agent_core`].

pub mod agent;
pub mod cli;
pub mod clock;
pub mod config;
pub mod consumers;
pub mod control;
pub mod demo;
pub mod keys;
pub mod kubernetes;
pub mod store;
pub mod telemetry;

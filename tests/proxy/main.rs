//! The credential proxy between real clients and a real TLS server (case C18, C19).

#![allow(clippy::unwrap_used, reason = "a test fails when something unexpected happens")]

mod access;
mod agent;
mod bed;
mod client;
mod faults;
mod flow;
mod go_clients;
mod outages;
mod rotation;
mod transparency;

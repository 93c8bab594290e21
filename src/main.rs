//! The pintle agent.
fn main() {}

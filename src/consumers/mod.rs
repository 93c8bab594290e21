//! Who uses a credential, and what they need for it.

pub mod kubeconfig;
mod local_server;
pub mod proxy;

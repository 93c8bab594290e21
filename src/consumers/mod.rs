//! Who uses a credential, and what they need for it.

pub mod kubeconfig;
pub(crate) mod local_server;

//! Who uses a credential, and what they need for it.

pub mod kubeconfig;

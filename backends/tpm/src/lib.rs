//! Keys in a TPM 2.0 (TCG Trusted Platform Module Library, revision 1.59).
//!
//! A TPM has no room for keys: it gives them out encrypted under a key that never leaves it, and takes them back for
//! each use. Here they are files, one a key, that only the TPM that made them can use.
//!
//! This crate is a plugin: pintle loads `libpintle_backend_tpm.so` over the same C ABI as any other one, so that pintle
//! itself runs where no libtss2 is installed.
//!
//! - [`backend`](TpmBackend): the key backend
//! - `configuration`: its JSON configuration
//! - `device`: one connection to the TPM, its slots, and which errors pass
//! - `template`: what is asked of the TPM, and what its public keys and signatures are in X.509's terms
//! - `key_file`: the `TSS2 PRIVATE KEY` format
//! - `directory`: the files

mod backend;
mod configuration;
mod device;
mod directory;
mod key_file;
mod template;

pub use backend::TpmBackend;
pub use configuration::Configuration;

pintle_plugins_api::export_backend!(backend::open);

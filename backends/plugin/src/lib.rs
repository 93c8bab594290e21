//! Any shared object that speaks pintle's C ABI (`pintle_backend.h`), as a key backend.
//!
//! - `trusted_file`: opens a shared object that nobody but its owner can have changed
//! - `module`: loads it, once, and checks the table that it answers with
//! - `context`: calls its functions and believes only lengths and numbers that can be true
//! - `backend`: a [`KeyBackend`](pintle_plugins_api::KeyBackend) on top, which believes keys and signatures only when
//!   they fit each other

mod backend;
mod context;
mod module;
mod trusted_file;

pub use backend::PluginBackend;
pub use trusted_file::Trust;

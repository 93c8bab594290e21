//! What `pintle demo` runs the real agent against: everything here is embedded, throw-away and loopback only.

pub mod control_plane;
pub mod device;
pub mod story;

//! `pintle demo`: the real agent against an embedded control plane, all of it temporary and on loopback.

pub mod control_plane;
pub mod device;
pub mod run;

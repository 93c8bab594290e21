//! The whole agent in a simulated world: the very loop of an identity, over a simulated clock, disk, API server and
//! backends. A seed reproduces everything.

mod control_plane;
mod device;
mod disk;
mod random;
mod time;

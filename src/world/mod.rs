//! The world outside the program, behind ports: time, files, users, randomness.
//!
//! Only what is here asks the operating system for the time, the disk or a task; everything that an identity's rotation
//! runs through gets it as an argument, so that the same code runs in a simulation.

pub mod clock;
pub mod files;
mod lock;
pub mod random;
pub mod task;
mod user;

pub use clock::{Clock, SystemClock};
pub use files::{Files, SystemFiles};
pub use lock::LockFile;
pub use user::User;

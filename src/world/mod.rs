//! The outside world behind interfaces: time, files, users, randomness.
//!
//! Only this module asks the operating system for time, files or tasks. The code of a rotation receives them as
//! arguments, so that the same code runs in the simulation.

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

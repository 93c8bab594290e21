//! The world outside the program, behind ports: time, files, users.

pub mod clock;
mod user;

pub use user::User;

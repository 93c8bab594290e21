//! The driver.
pub mod clock;

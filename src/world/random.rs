//! Randomness.

use aws_lc_rs::rand;

/// Eight random hexadecimal digits that identify an installation's keys on a shared device.
///
/// # Errors
/// If the system's random number generator fails.
pub fn installation() -> Result<String, aws_lc_rs::error::Unspecified> {
    let mut bytes = [0; 4];
    rand::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

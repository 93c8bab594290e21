//! Randomness.

use aws_lc_rs::rand;

/// Eight random hexadecimal digits, by which an installation tells its keys from those of others on a shared device.
///
/// # Errors
/// If the system gives no randomness.
pub fn installation() -> Result<String, aws_lc_rs::error::Unspecified> {
    let mut bytes = [0; 4];
    rand::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

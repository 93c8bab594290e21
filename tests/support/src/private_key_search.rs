//! Searches files and process memory for private keys.
//!
//! Every test that expects no key needs a positive control: a test in which the same search finds one.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;

use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};

/// A description of a key and its location.
pub type Finding = String;

/// Finds structures that contain a private key: PEM of any label except `TSS2 PRIVATE KEY` (which only its own TPM
/// can load), SEC 1 `ECPrivateKey` (RFC 5915, also inside PKCS#8), and PKCS#1 `RSAPrivateKey` (RFC 8017).
#[must_use]
pub fn private_key_structures(bytes: &[u8], place: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (offset, window) in bytes.windows(11).enumerate() {
        let rest = &bytes[offset..];
        let what = match window[0] {
            b'-' if window == b"-----BEGIN " => pem_label(rest),
            0x02 if window.starts_with(&[2, 1, 1, 4, 32]) => ec(rest, 32),
            0x02 if window.starts_with(&[2, 1, 1, 4, 48]) => ec(rest, 48),
            // Version 0, then a modulus of 2048, 3072 or 4096 bits.
            0x02 if window.starts_with(&[2, 1, 0, 2, 0x82]) && (1..=2).contains(&window[5]) && window[7] == 0 => {
                matches!(window[6], 1 | 0x81).then(|| "RSAPrivateKey".to_owned())
            }
            _ => None,
        };
        findings.extend(what.map(|what| format!("{what} at {offset:#x} of {place}")));
    }
    findings
}

/// The label, if the content of a private key follows it: programs also contain such labels as text.
fn pem_label(bytes: &[u8]) -> Option<String> {
    let line = &bytes[..bytes.len().min(64)];
    let line = &line[..line.iter().position(|byte| *byte == b'\n')?];
    let label = std::str::from_utf8(line).ok()?.strip_prefix("-----BEGIN ")?.trim_end().strip_suffix("-----")?;
    let content = bytes.get(line.len() + 1..line.len() + 33)?;
    let base64 = content.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+/=\r\n".contains(byte));
    (label.ends_with("PRIVATE KEY") && label != "TSS2 PRIVATE KEY" && base64).then(|| format!("PEM {label:?}"))
}

fn ec(bytes: &[u8], length: usize) -> Option<String> {
    let private_key = bytes.get(5..5 + length)?;
    is_high_entropy(private_key).then(|| "ECPrivateKey".to_owned())
}

/// Whether bytes may be a key, as opposed to text, zeros, pointers or a counter.
fn is_high_entropy(bytes: &[u8]) -> bool {
    bytes.iter().collect::<BTreeSet<_>>().len() >= bytes.len() / 2
        && bytes.iter().any(|byte| !byte.is_ascii())
        && bytes.chunks_exact(8).all(|limb| limb[6..] != [0, 0] && limb[6..] != [0xff, 0xff] && limb[..2] != [0, 0])
}

/// Searches all files below a directory.
#[must_use]
pub fn private_keys_in_files(directory: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => findings.extend(private_keys_in_files(&path)),
            Ok(kind) if kind.is_file() => {
                let content = std::fs::read(&path).unwrap_or_default();
                findings.extend(private_key_structures(&content, &path.display().to_string()));
            }
            _ => {}
        }
    }
    findings
}

/// Searches the writable memory of a process for structures, and for the bare scalar of a P-256 key as AWS-LC stores
/// it: 32 bytes, little-endian, 8-byte aligned. `public_key` is its public half, a DER SubjectPublicKeyInfo.
///
/// # Errors
/// If the memory cannot be read. Only root can, because the agent is not dumpable.
pub fn private_keys_in_memory(process: u32, public_key: &[u8]) -> io::Result<Vec<Finding>> {
    let point = &public_key[public_key.len() - 65..];
    let memory = File::open(format!("/proc/{process}/mem"))?;
    let mut findings = Vec::new();
    let mut searched = 0;
    for line in BufReader::new(File::open(format!("/proc/{process}/maps"))?).lines() {
        let line = line?;
        let mut fields = line.split_whitespace();
        let (Some(range), Some(permissions)) = (fields.next(), fields.next()) else { continue };
        if !permissions.starts_with("rw") {
            continue;
        }
        let ends: Vec<u64> = range.split('-').filter_map(|end| u64::from_str_radix(end, 16).ok()).collect();
        let mut bytes = vec![0; usize::try_from(ends[1] - ends[0]).expect("a mapping fits")];
        // A mapping that has been unmapped since, or that belongs to a device, is skipped.
        if memory.read_exact_at(&mut bytes, ends[0]).is_err() {
            continue;
        }
        searched += bytes.len();
        let place = format!("memory of process {process}, {line}");
        findings.extend(private_key_structures(&bytes, &place));
        for (index, window) in bytes.windows(32).step_by(8).enumerate() {
            if is_high_entropy(window) && is_private_half(window, point) {
                findings.push(format!("private scalar at {:#x} of {place}", index * 8));
            }
        }
    }
    assert!(searched > 1 << 19, "only {searched} bytes of memory were searched");
    Ok(findings)
}

/// Whether this is the scalar (little-endian) for this point.
fn is_private_half(scalar: &[u8], point: &[u8]) -> bool {
    let scalar: Vec<u8> = scalar.iter().rev().copied().collect();
    PrivateKey::from_private_key(&ECDH_P256, &scalar)
        .ok()
        .and_then(|key| key.compute_public_key().ok())
        .is_some_and(|public| public.as_ref() == point)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::new_key;

    #[test]
    fn keys_are_found_in_every_form_and_in_memory_and_other_data_is_not() {
        let key = new_key();
        let pem = key.serialize_pem();
        assert_eq!(private_key_structures(pem.as_bytes(), "here").len(), 1, "{pem}");
        assert!(!private_key_structures(key.serialized_der(), "here").is_empty());
        let sealed = pem.replace("PRIVATE KEY", "TSS2 PRIVATE KEY");
        assert_eq!(private_key_structures(sealed.as_bytes(), "here"), Vec::<Finding>::new());
        assert_eq!(private_key_structures(b"-----BEGIN PRIVATE KEY-----\n%s\n", "here"), Vec::<Finding>::new());

        let public = |key: &rcgen::KeyPair| rcgen::PublicKeyData::subject_public_key_info(key);
        let scalars = |key: &[u8]| {
            let findings = private_keys_in_memory(std::process::id(), key).expect("our own memory can be read");
            findings.iter().filter(|finding| finding.starts_with("private scalar")).count()
        };
        assert!(scalars(&public(&key)) > 0);
        // Generated after the first search: a search reads memory into buffers, which may still contain copies of all
        // earlier keys.
        let other = new_key();
        let lost = public(&other);
        drop(other);
        assert_eq!(scalars(&lost), 0, "AWS-LC wipes what it frees");
    }
}

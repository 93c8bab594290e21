//! Looking for private keys where none may be: in files, and in the memory of a process.
//!
//! Every test that finds nothing must have, as its positive control, one in which the same search finds the key.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;

use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};

/// What was found, and where.
pub type Finding = String;

/// Structures that hold a private key: PEM of any label but `TSS2 PRIVATE KEY` (which only its own TPM can open), SEC 1
/// `ECPrivateKey` (RFC 5915, also inside PKCS#8), and PKCS#1 `RSAPrivateKey` (RFC 8017).
#[must_use]
pub fn private_key_structures(octets: &[u8], place: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (offset, window) in octets.windows(11).enumerate() {
        let rest = &octets[offset..];
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

/// The label, if a private key's content follows it: a program also has such labels as text.
fn pem_label(octets: &[u8]) -> Option<String> {
    let line = &octets[..octets.len().min(64)];
    let line = &line[..line.iter().position(|octet| *octet == b'\n')?];
    let label = std::str::from_utf8(line).ok()?.strip_prefix("-----BEGIN ")?.trim_end().strip_suffix("-----")?;
    let content = octets.get(line.len() + 1..line.len() + 33)?;
    let base64 = content.iter().all(|octet| octet.is_ascii_alphanumeric() || b"+/=\r\n".contains(octet));
    (label.ends_with("PRIVATE KEY") && label != "TSS2 PRIVATE KEY" && base64).then(|| format!("PEM {label:?}"))
}

fn ec(octets: &[u8], length: usize) -> Option<String> {
    let private_key = octets.get(5..5 + length)?;
    is_random(private_key).then(|| "ECPrivateKey".to_owned())
}

/// Whether octets may be a key, and not text, zeros, pointers or a counter.
fn is_random(octets: &[u8]) -> bool {
    octets.iter().collect::<BTreeSet<_>>().len() >= octets.len() / 2
        && octets.iter().any(|octet| !octet.is_ascii())
        && octets.chunks_exact(8).all(|limb| limb[6..] != [0, 0] && limb[6..] != [0xff, 0xff] && limb[..2] != [0, 0])
}

/// Searches every file below a directory.
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

/// Searches everything that a process can write to: structures, and the bare scalar of the P-256 key whose public half
/// (a DER SubjectPublicKeyInfo) is given, as AWS-LC keeps it: 32 octets, the least significant first, at a multiple of
/// eight.
///
/// # Errors
/// If the memory cannot be read; it takes root, because the agent is not dumpable.
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
        let mut octets = vec![0; usize::try_from(ends[1] - ends[0]).expect("a mapping fits")];
        // What was unmapped meanwhile, or belongs to a device, is nobody's memory.
        if memory.read_exact_at(&mut octets, ends[0]).is_err() {
            continue;
        }
        searched += octets.len();
        let place = format!("memory of process {process}, {line}");
        findings.extend(private_key_structures(&octets, &place));
        for (index, window) in octets.windows(32).step_by(8).enumerate() {
            if is_random(window) && is_private_half(window, point) {
                findings.push(format!("private scalar at {:#x} of {place}", index * 8));
            }
        }
    }
    assert!(searched > 1 << 20, "only {searched} octets of memory were searched");
    Ok(findings)
}

/// Whether this is the scalar, least significant octet first, of this point.
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
    fn a_key_is_found_in_each_form_and_in_this_process_and_others_are_not() {
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
        // Made after the first search: a search reads this process's memory into buffers in the same memory, so copies
        // of every key that lived meanwhile may outlast it.
        let other = new_key();
        let lost = public(&other);
        drop(other);
        assert_eq!(scalars(&lost), 0, "AWS-LC wipes what it frees");
    }
}

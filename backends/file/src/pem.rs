//! The PEM text of one PKCS#8 key (RFC 7468, section 10), without copies of the key that outlive their use.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

/// Every key file begins so.
pub(crate) const BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const END: &str = "-----END PRIVATE KEY-----";
/// Characters of base64 in a line (RFC 7468, section 2).
const LINE: usize = 64;

/// The text of a DER PKCS#8 key.
pub(crate) fn encode(pkcs8: &[u8]) -> Zeroizing<String> {
    // Of its full size from the start: a buffer that grows leaves its content behind.
    let mut encoded = Zeroizing::new(vec![0; pkcs8.len().div_ceil(3) * 4]);
    // The buffer has the length that base64 has (RFC 4648, section 4), so this cannot fail.
    let length = STANDARD.encode_slice(pkcs8, &mut encoded).unwrap_or_default();
    let lines = length.div_ceil(LINE);
    let mut text = Zeroizing::new(String::with_capacity(BEGIN.len() + END.len() + 2 + length + lines));
    text.push_str(BEGIN);
    text.push('\n');
    for line in encoded[..length].chunks(LINE) {
        text.extend(line.iter().map(|byte| char::from(*byte)));
        text.push('\n');
    }
    text.push_str(END);
    text.push('\n');
    text
}

/// The DER of the key; `None` if the text is not exactly one PKCS#8 PEM block.
pub(crate) fn decode(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let text = std::str::from_utf8(text).ok()?.trim();
    let body = text.strip_prefix(BEGIN)?.strip_suffix(END)?;
    let mut encoded = Zeroizing::new(String::with_capacity(body.len()));
    encoded.extend(body.chars().filter(|character| !character.is_ascii_whitespace()));
    let mut der = Zeroizing::new(vec![0; base64::decoded_len_estimate(encoded.len())]);
    let length = STANDARD.decode_slice(encoded.as_bytes(), &mut der).ok()?;
    der.truncate(length);
    Some(der)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        for length in [0, 1, 47, 48, 49, 1700] {
            let der: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
            let text = encode(&der);
            assert!(text.lines().all(|line| line.len() <= LINE), "{length}");
            assert_eq!(decode(text.as_bytes()).expect("PEM").as_slice(), der, "{length}");
        }
    }

    #[test]
    fn buffers_do_not_grow() {
        let text = encode(&[7; 1217]);
        assert_eq!(text.capacity(), text.len());
    }

    #[test]
    fn anything_else_is_refused() {
        let text = encode(&[7; 100]);
        for cut in 0..text.len() - 1 {
            assert!(decode(&text.as_bytes()[..cut]).is_none(), "cut at {cut}");
        }
        for other in [&b""[..], &[0; 241], b"\xff", b"-----BEGIN EC PRIVATE KEY-----\n-----END EC PRIVATE KEY-----\n"] {
            assert!(decode(other).is_none());
        }
        assert!(decode([text.as_bytes(), text.as_bytes()].concat().as_slice()).is_none(), "two blocks");
    }
}

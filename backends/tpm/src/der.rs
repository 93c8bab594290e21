//! As much of DER (ITU-T X.690) as key files, public keys and signatures need.

pub(crate) const BOOLEAN: u8 = 0x01;
pub(crate) const INTEGER: u8 = 0x02;
pub(crate) const BIT_STRING: u8 = 0x03;
pub(crate) const OCTET_STRING: u8 = 0x04;
pub(crate) const NULL: u8 = 0x05;
pub(crate) const OBJECT_IDENTIFIER: u8 = 0x06;
pub(crate) const SEQUENCE: u8 = 0x30;
/// Context-specific, constructed, number 0.
pub(crate) const EXPLICIT_0: u8 = 0xa0;

/// An element: tag, length, content.
pub(crate) fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut octets = vec![tag];
    let length = content.len().to_be_bytes();
    let significant = &length[length.iter().position(|octet| *octet != 0).unwrap_or(length.len() - 1)..];
    if content.len() >= 0x80 {
        // At most the 8 octets of a usize.
        octets.push(0x80 | significant.len() as u8);
    }
    octets.extend_from_slice(significant);
    octets.extend_from_slice(content);
    octets
}

/// An INTEGER that is not negative, from big-endian octets of any length: those that a TPM gives may begin with zeros,
/// and may be shorter than the field.
pub(crate) fn unsigned_integer(magnitude: &[u8]) -> Vec<u8> {
    let start = magnitude.iter().position(|octet| *octet != 0).unwrap_or(magnitude.len());
    let magnitude = &magnitude[start..];
    let mut content = Vec::with_capacity(magnitude.len() + 1);
    if magnitude.first().is_none_or(|first| *first >= 0x80) {
        content.push(0);
    }
    content.extend_from_slice(magnitude);
    element(INTEGER, &content)
}

/// Takes one element with this tag from the front of `input`; `None` if that is not what is there.
pub(crate) fn take<'a>(input: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    let (&[found, first], rest) = input.split_first_chunk::<2>()?;
    if found != tag {
        return None;
    }
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => (usize::from(*rest.first()?), rest.get(1..)?),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), rest.get(2..)?),
        // A key file is far smaller than 64 KiB.
        _ => return None,
    };
    // DER has one encoding of each length, the shortest.
    if (first == 0x81 && length < 0x80) || (first == 0x82 && length < 0x100) {
        return None;
    }
    let (content, rest) = rest.split_at_checked(length)?;
    *input = rest;
    Some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_of_every_length_are_taken_as_they_were_made() {
        for length in [0, 1, 127, 128, 255, 256, 65535] {
            let content = vec![7; length];
            let octets = element(OCTET_STRING, &content);
            let mut input = octets.as_slice();
            assert_eq!(take(&mut input, OCTET_STRING), Some(content.as_slice()), "{length}");
            assert!(input.is_empty());
            for shorter in 0..octets.len().min(200) {
                assert_eq!(take(&mut &octets[..shorter], OCTET_STRING), None, "{shorter} of {length}");
            }
        }
        assert_eq!(take(&mut &[OCTET_STRING, 0x81, 1, 7][..], OCTET_STRING), None, "not the shortest length");
        assert_eq!(take(&mut &[OCTET_STRING, 0x80][..], OCTET_STRING), None, "no definite length");
    }

    #[test]
    fn integers_are_minimal_and_not_negative() {
        assert_eq!(unsigned_integer(&[0, 0, 0x7f]), [INTEGER, 1, 0x7f]);
        assert_eq!(unsigned_integer(&[0, 0x80]), [INTEGER, 2, 0, 0x80]);
        assert_eq!(unsigned_integer(&[]), [INTEGER, 1, 0]);
    }
}

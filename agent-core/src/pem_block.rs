//! PEM blocks as Go's `encoding/pem` finds them, which is how the API server, the kubelet and kubectl read PEM.
//!
//! Blank lines, spaces within lines, CRLF, headers and text around the blocks are accepted, and a damaged block is passed
//! over. An error says only where a block is damaged: the text may be a private key.

use std::fmt;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use zeroize::Zeroizing;

/// Go's `base64.StdEncoding`: padding is required, and the unused bits of the last character may be anything.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::RequireCanonical),
);
const BEGIN: &[u8] = b"-----BEGIN ";
const END: &[u8] = b"\n-----END ";
const DASHES: &[u8] = b"-----";

/// One block. Its content may be a private key, so it is wiped, and has no `Debug`.
pub struct PemBlock {
    /// What stands after BEGIN, such as `CERTIFICATE`.
    pub label: String,
    /// The decoded content.
    pub content: Zeroizing<Vec<u8>>,
}

impl PemBlock {
    /// The block as PEM, without whatever stood around it.
    pub fn to_pem(&self) -> Zeroizing<String> {
        encode(&self.label, &self.content)
    }
}

/// This content as a PEM block, in lines of 64 characters (RFC 7468). It may be a private key, so no copy of it is left
/// behind.
pub fn encode(label: &str, content: &[u8]) -> Zeroizing<String> {
    let encoded = Zeroizing::new(BASE64.encode(content));
    let lines = encoded.len() + encoded.len() / 64 + 1;
    let mut pem = Zeroizing::new(String::with_capacity(lines + 2 * label.len() + 32));
    pem.push_str("-----BEGIN ");
    pem.push_str(label);
    pem.push_str("-----\n");
    for (index, character) in encoded.char_indices() {
        pem.push(character);
        if index % 64 == 63 || index + 1 == encoded.len() {
            pem.push('\n');
        }
    }
    pem.push_str("-----END ");
    pem.push_str(label);
    pem.push_str("-----\n");
    pem
}

/// The blocks of a text.
pub struct PemBlocks {
    /// Those that can be decoded, in their order.
    pub blocks: Vec<PemBlock>,
    /// The line, counted from 1, in which the first block begins that cannot be decoded.
    pub damaged: Option<usize>,
}

impl PemBlocks {
    /// The blocks of this text, which need not be UTF-8.
    pub fn of(text: impl AsRef<[u8]>) -> Self {
        let text = text.as_ref();
        let (mut blocks, mut begins, mut at) = (Vec::new(), Vec::new(), 0);
        while let Some(found) = next_block(text, at) {
            blocks.push(found.block);
            begins.push(found.begin);
            at = found.end;
        }
        let mut line_begin = 0;
        let damaged = text.split(|byte| *byte == b'\n').position(|line| {
            let begin = line_begin;
            line_begin += line.len() + 1;
            line.starts_with(b"-") && contains(line, b"BEGIN ") && !begins.contains(&begin)
        });
        Self { blocks, damaged: damaged.map(|line| line + 1) }
    }

    /// The contents of the blocks with this label.
    pub fn with_label(&self, label: &str) -> Vec<Vec<u8>> {
        let blocks = self.blocks.iter().filter(|block| block.label == label);
        blocks.map(|block| block.content.to_vec()).collect()
    }

    /// The DER of the certificates.
    ///
    /// # Errors
    /// [`NoBlock`] if there is none.
    pub fn certificates(&self) -> Result<Vec<Vec<u8>>, NoBlock> {
        let certificates = self.with_label("CERTIFICATE");
        if certificates.is_empty() {
            return Err(NoBlock { label: "CERTIFICATE", damaged: self.damaged });
        }
        Ok(certificates)
    }

    /// The first private key, by its label: PKCS#8, SEC 1 or PKCS#1.
    pub fn private_key(&self) -> Option<&PemBlock> {
        let is_key = |label: &str| matches!(label, "PRIVATE KEY" | "EC PRIVATE KEY" | "RSA PRIVATE KEY");
        self.blocks.iter().find(|block| is_key(&block.label))
    }
}

/// That a PEM text lacks a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoBlock {
    label: &'static str,
    damaged: Option<usize>,
}

impl fmt::Display for NoBlock {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "no {} block", self.label)?;
        match self.damaged {
            Some(line) => write!(formatter, ", and the PEM block that begins in line {line} is damaged"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for NoBlock {}

/// A block, where it begins, and where the text after it does.
struct Found {
    block: PemBlock,
    begin: usize,
    end: usize,
}

/// `pem.Decode` of Go, from this place on: the first END line, and the last BEGIN line before it.
fn next_block(text: &[u8], mut at: usize) -> Option<Found> {
    loop {
        let end = at + find(&text[at..], END)?;
        let begin = rfind(&text[at..end], BEGIN).map(|begin| at + begin);
        if let Some(begin) = begin.filter(|begin| *begin == at || text[begin - 1] == b'\n') {
            match block(text, begin, end) {
                Verdict::Found(found) => return Some(found),
                Verdict::Damaged => {}
                Verdict::Unfinished => return None,
            }
        }
        at = end + END.len();
    }
}

enum Verdict {
    Found(Found),
    Damaged,
    /// Its headers go on beyond its end.
    Unfinished,
}

/// The block between a BEGIN and the line break before an END.
fn block(text: &[u8], begin: usize, end: usize) -> Verdict {
    let (label, mut body) = line(text, begin + BEGIN.len());
    let Some(label) = label.strip_suffix(DASHES) else { return Verdict::Damaged };
    let mut headers = false;
    loop {
        if body >= text.len() {
            return Verdict::Unfinished;
        }
        let (header, next) = line(text, body);
        if !header.contains(&b':') {
            break;
        }
        (headers, body) = (true, next);
    }
    let after_end = end + END.len();
    if body > after_end {
        return Verdict::Unfinished;
    }
    if headers && body > end {
        return Verdict::Damaged;
    }
    let (last, next) = line(text, after_end);
    if last != [label, DASHES].concat() {
        return Verdict::Damaged;
    }
    let mut encoded = Zeroizing::new(Vec::with_capacity(end.saturating_sub(body)));
    if body < end {
        encoded.extend(text[body..end].iter().filter(|byte| !b" \t\r\n".contains(byte)));
    }
    let mut content = Zeroizing::new(vec![0; base64::decoded_len_estimate(encoded.len())]);
    let Ok(length) = BASE64.decode_slice(&*encoded, &mut content) else { return Verdict::Damaged };
    content.truncate(length);
    let label = String::from_utf8_lossy(label).into_owned();
    Verdict::Found(Found { block: PemBlock { label, content }, begin, end: next })
}

/// The line from here on without what is blank at its end, and where the next one begins.
fn line(text: &[u8], at: usize) -> (&[u8], usize) {
    let rest = &text[at.min(text.len())..];
    let (line, next) = match rest.iter().position(|byte| *byte == b'\n') {
        Some(length) => (rest[..length].strip_suffix(b"\r").unwrap_or(&rest[..length]), at + length + 1),
        None => (rest, at + rest.len()),
    };
    let blank = line.iter().rev().take_while(|byte| b" \t".contains(byte)).count();
    (&line[..line.len() - blank], next)
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

fn rfind(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).rposition(|window| window == wanted)
}

fn contains(text: &[u8], wanted: &[u8]) -> bool {
    find(text, wanted).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "-----BEGIN X-----\nAAECAwQF\nBgcICQoL\n-----END X-----\n";

    fn found(text: &str) -> Vec<(String, Vec<u8>)> {
        PemBlocks::of(text).blocks.into_iter().map(|block| (block.label, block.content.to_vec())).collect()
    }

    #[test]
    fn what_go_decodes_is_decoded() {
        let whole = vec![("X".to_owned(), (0..12).collect::<Vec<u8>>())];
        for text in [
            PLAIN.to_owned(),
            PLAIN.replace('\n', "\r\n"),
            PLAIN.replace('\n', "\n\n"),
            PLAIN.replace("\nBgc", "\n\nBgc"),
            PLAIN.replace("\n-----END", "\n\n-----END"),
            PLAIN.replace("AQF\n", "AQF \t\n  "),
            PLAIN.trim_end().to_owned(),
            format!("Issued by example.\n{PLAIN}the end\n"),
            format!("-----BEGIN of the note-----\n{PLAIN}"),
            format!("-----BEGIN Y-----\nAAAA\n{PLAIN}"),
            PLAIN.replace("\nAAEC", "\nProc-Type: 4\nx: y\n\nAAEC"),
            format!("{PLAIN}\0\0\0"),
        ] {
            assert_eq!(found(&text), whole, "{text}");
        }
        assert_eq!(found(&PLAIN.repeat(2)).len(), 2);
        assert_eq!(found("-----BEGIN X-----\n-----END X-----\n"), [("X".to_owned(), Vec::new())]);
    }

    #[test]
    fn what_is_encoded_is_as_others_encode_it_and_is_not_copied() {
        for length in [0, 1, 47, 48, 49, 96, 1000] {
            let content: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
            let configuration = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
            let expected = pem::encode_config(&pem::Pem::new("X Y", content.as_slice()), configuration);
            let encoded = encode("X Y", &content);
            assert_eq!(*encoded, expected, "{length}");
            // 32 bytes for the frame's dashes and words, and one more line break: it did not grow.
            assert!(encoded.capacity() <= encoded.len() + 32, "{length}");
            assert_eq!(*PemBlocks::of(&*encoded).blocks[0].to_pem(), expected, "{length}");
        }
    }

    #[test]
    fn what_go_passes_over_is_passed_over_and_its_line_is_known() {
        for (text, line) in [
            (PLAIN.replace("-----BEGIN", "----BEGIN"), Some(1)),
            (PLAIN.replace("-----END", "----END"), Some(1)),
            (PLAIN.replace("END X-----", "END X----"), Some(1)),
            (PLAIN.replace("END X", "END Y"), Some(1)),
            (PLAIN.replace("BEGIN X-----", "BEGIN X----"), Some(1)),
            (PLAIN.replace("AAEC", "AA*C"), Some(1)),
            (PLAIN.replace("ICQoL", "ICQo"), Some(1)),
            (format!("a\n\n{}", &PLAIN[..30]), Some(3)),
            ("no PEM".to_owned(), None),
            (String::new(), None),
            ("-----BEGIN X-----\na: b\n".to_owned(), Some(1)),
        ] {
            let blocks = PemBlocks::of(&text);
            assert_eq!((blocks.blocks.len(), blocks.damaged), (0, line), "{text}");
        }
        let behind = PemBlocks::of(format!("{PLAIN}{}{PLAIN}", PLAIN.replace("AAEC", "AA*C")));
        assert_eq!((behind.blocks.len(), behind.damaged), (2, Some(5)));
        assert_eq!(
            behind.certificates().expect_err("there is none").to_string(),
            "no CERTIFICATE block, and the PEM block that begins in line 5 is damaged"
        );
    }
}

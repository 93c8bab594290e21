//! Tracks streams in HTTP/2 by frame headers alone (RFC 9113, section 4.1).

use std::collections::HashMap;

/// The length of the client's connection preface, in bytes (RFC 9113, section 3.4).
const PREFACE: usize = 24;
/// GOAWAY with the highest stream identifier and NO_ERROR: the client opens no new streams on this connection, and no
/// stream is refused, not even one in flight (RFC 9113, section 6.8).
const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0];

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const GOAWAY_TYPE: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;

const CLIENT_ENDED: u8 = 1;
const SERVER_ENDED: u8 = 2;

/// The state of an HTTP/2 connection.
#[derive(Default)]
pub(in crate::proxy) struct Http2 {
    preface: usize,
    client: Frames,
    server: Frames,
    /// The open streams, and which sides have closed each.
    streams: HashMap<u32, u8>,
    highest_stream: u32,
    settings_seen: bool,
    going_away: bool,
}

impl Http2 {
    pub(super) fn observe_client(&mut self, mut bytes: &[u8]) {
        let preface = bytes.len().min(PREFACE - self.preface);
        self.preface += preface;
        bytes = &bytes[preface..];
        while !bytes.is_empty() {
            let Some(frame) = self.client.advance(&mut bytes) else { continue };
            if frame.kind == HEADERS && frame.stream > self.highest_stream {
                self.highest_stream = frame.stream;
                self.streams.insert(frame.stream, 0);
            }
            self.end(&frame, CLIENT_ENDED);
        }
    }

    /// Where in `bytes` to insert a GOAWAY, if `announce` is set and these bytes have a place for it.
    pub(super) fn observe_server(&mut self, bytes: &[u8], announce: bool) -> Option<usize> {
        let mut position = (announce && self.may_announce()).then_some(0);
        let mut rest = bytes;
        while !rest.is_empty() {
            if let Some(frame) = self.server.advance(&mut rest) {
                match frame.kind {
                    SETTINGS => self.settings_seen = true,
                    GOAWAY_TYPE => self.going_away = true,
                    _ => self.end(&frame, SERVER_ENDED),
                }
            }
            if position.is_none() && announce && self.may_announce() {
                position = Some(bytes.len() - rest.len());
            }
        }
        self.going_away |= position.is_some();
        position
    }

    /// Whether to send the GOAWAY now, while the server sends nothing.
    pub(super) fn announce(&mut self) -> bool {
        let may = self.may_announce();
        self.going_away |= may;
        may
    }

    pub(super) fn announcement() -> &'static [u8] {
        &GOAWAY
    }

    pub(super) fn is_announced(&self) -> bool {
        self.going_away
    }

    pub(super) fn is_idle(&self) -> bool {
        self.streams.is_empty() && self.client.at_boundary()
    }

    /// True between two frames, but not within a header block (RFC 9113, section 4.3), before the server's preface
    /// (section 3.4), or after the server's own GOAWAY, whose last stream must not be raised (section 6.8).
    ///
    /// Also not before the first request: some clients report a new connection that goes away unused as an error.
    fn may_announce(&self) -> bool {
        self.settings_seen && self.highest_stream > 0 && !self.going_away && self.server.at_boundary()
    }

    fn end(&mut self, frame: &Frame, side: u8) {
        let ends = match frame.kind {
            DATA | HEADERS => frame.flags & END_STREAM != 0,
            RST_STREAM => {
                self.streams.remove(&frame.stream);
                return;
            }
            _ => false,
        };
        if ends && let Some(ended) = self.streams.get_mut(&frame.stream) {
            *ended |= side;
            if *ended == CLIENT_ENDED | SERVER_ENDED {
                self.streams.remove(&frame.stream);
                if self.streams.is_empty() {
                    self.streams.shrink_to(8);
                }
            }
        }
    }
}

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
}

/// The parser state of one direction.
#[derive(Default)]
struct Frames {
    header: [u8; 9],
    filled: usize,
    payload_left: usize,
    in_header_block: bool,
}

impl Frames {
    fn at_boundary(&self) -> bool {
        self.filled == 0 && self.payload_left == 0 && !self.in_header_block
    }

    /// Consumes some of `bytes`; returns a frame once its header is complete.
    fn advance(&mut self, bytes: &mut &[u8]) -> Option<Frame> {
        if self.payload_left > 0 {
            let taken = self.payload_left.min(bytes.len());
            self.payload_left -= taken;
            *bytes = &bytes[taken..];
            return None;
        }
        let taken = bytes.len().min(self.header.len() - self.filled);
        self.header[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
        self.filled += taken;
        *bytes = &bytes[taken..];
        if self.filled < self.header.len() {
            return None;
        }
        self.filled = 0;
        let [length_2, length_1, length_0, kind, flags, stream @ ..] = self.header;
        self.payload_left = u32::from_be_bytes([0, length_2, length_1, length_0]) as usize;
        match kind {
            HEADERS | PUSH_PROMISE | CONTINUATION => self.in_header_block = flags & END_HEADERS == 0,
            _ => {}
        }
        Some(Frame { kind, flags, stream: u32::from_be_bytes(stream) & 0x7fff_ffff })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, length: usize) -> Vec<u8> {
        let mut bytes = (length as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.resize(9 + length, 0xff);
        bytes
    }

    fn started() -> Http2 {
        let mut http2 = Http2::default();
        http2.observe_client(&[0; PREFACE]);
        assert_eq!(http2.observe_server(&frame(SETTINGS, 0, 0, 6), false), None);
        http2
    }

    #[test]
    fn goaway_is_sent_between_frames_but_not_in_a_header_block() {
        let mut http2 = started();
        assert!(!http2.announce(), "before the first request");
        http2.observe_client(&frame(HEADERS, END_HEADERS, 1, 3));
        let mut bytes = frame(HEADERS, 0, 1, 10);
        bytes.extend(frame(CONTINUATION, END_HEADERS, 1, 5));
        let position = bytes.len();
        bytes.extend(frame(DATA, END_STREAM, 1, 100));
        assert!(http2.observe_server(&bytes[..4], false).is_none());
        assert!(!http2.announce(), "within a frame's header");
        assert_eq!(http2.observe_server(&bytes[4..], true), Some(position - 4));
        assert!(!http2.announce(), "only once");
    }

    #[test]
    fn no_goaway_before_the_server_preface_or_after_the_servers_own() {
        let request = [vec![0; PREFACE], frame(HEADERS, END_HEADERS, 1, 3)].concat();
        let mut http2 = Http2::default();
        http2.observe_client(&request);
        assert!(!http2.announce());
        http2.observe_server(&frame(SETTINGS, 0, 0, 6), false);
        http2.observe_server(&frame(GOAWAY_TYPE, 0, 0, 8), false);
        assert!(!http2.announce() && http2.is_announced());
    }

    #[test]
    fn streams_are_counted_however_reads_split_frames() {
        let mut http2 = started();
        let mut request = frame(HEADERS, END_HEADERS, 1, 3);
        request.extend(frame(DATA, END_STREAM, 1, 30));
        request.extend(frame(HEADERS, END_HEADERS | END_STREAM, 3, 0));
        for byte in &request {
            http2.observe_client(std::slice::from_ref(byte));
        }
        assert_eq!(http2.streams.len(), 2);
        let mut answer = frame(HEADERS, END_HEADERS, 1, 3);
        answer.extend(frame(DATA, END_STREAM, 1, 0));
        answer.extend(frame(RST_STREAM, 0, 3, 4));
        for byte in &answer {
            http2.observe_server(std::slice::from_ref(byte), false);
        }
        assert!(http2.is_idle());
    }
}

//! Tracks message boundaries in HTTP/1.1 (RFC 9112, section 6).

use std::collections::VecDeque;

/// Makes the client open a new connection for its next request (RFC 9112, section 9.6).
const CLOSE: &[u8] = b"Connection: close\r\n";
/// Lines are buffered up to this many bytes; the rest is not needed.
const LINE: usize = 256;

/// The state of an HTTP/1.1 connection.
#[derive(Default)]
pub(in crate::proxy) struct Http1 {
    request: Message,
    response: Message,
    /// Requests whose response is not complete yet.
    outstanding: VecDeque<Method>,
    /// The bytes cannot be parsed as HTTP, for example after an upgrade. Only the connection's close is observed.
    opaque: bool,
    announced: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    Head,
    Connect,
    Other,
}

/// The parser state of one direction.
#[derive(Default)]
struct Message {
    part: Part,
    line: Vec<u8>,
    length: Option<u64>,
    chunked: bool,
    status: u16,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Part {
    #[default]
    StartLine,
    Headers,
    Body(u64),
    ChunkSize,
    /// The remaining bytes of a chunk, including the CRLF after it.
    Chunk(u64),
    Trailers,
    UntilClose,
}

impl Message {
    /// Consumes body bytes and returns their number, or `None` if a line comes next.
    fn skip(&mut self, available: usize) -> Option<usize> {
        let (Part::Body(left) | Part::Chunk(left)) = self.part else {
            return (self.part == Part::UntilClose).then_some(available);
        };
        let taken = left.min(available as u64);
        self.part = match self.part {
            Part::Body(_) if left == taken => Part::StartLine,
            Part::Body(_) => Part::Body(left - taken),
            _ if left == taken => Part::ChunkSize,
            _ => Part::Chunk(left - taken),
        };
        Some(taken as usize)
    }

    /// Consumes bytes of a line; returns their number and whether the line is complete.
    fn take_line(&mut self, bytes: &[u8]) -> (usize, bool) {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(bytes.len(), |end| end + 1);
        let room = LINE.saturating_sub(self.line.len());
        self.line.extend_from_slice(&bytes[..taken.min(room)]);
        (taken, end.is_some())
    }

    /// As bytes: a header need not be UTF-8 (RFC 9110, section 5.5), and a long line is truncated anywhere.
    fn text(&self) -> &[u8] {
        self.line.trim_ascii_end()
    }

    /// Reads the headers that determine the body's length.
    fn note_header(&mut self) {
        let text = self.text();
        let Some(colon) = text.iter().position(|byte| *byte == b':') else { return };
        let (name, value) = (&text[..colon], text[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            self.length = number(value, 10);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.chunked = value.to_ascii_lowercase().ends_with(b"chunked");
        }
    }

    fn begin(&mut self) {
        self.part = Part::Headers;
        (self.length, self.chunked) = (None, false);
    }

    /// Handles a chunk size or trailer line. Returns whether it completes the message, or `None` if it is malformed.
    fn chunk_line(&mut self) -> Option<bool> {
        if self.part == Part::Trailers {
            let last = self.text().is_empty();
            if last {
                self.part = Part::StartLine;
            }
            return Some(last);
        }
        let size = self.text().split(|byte| *byte == b';').next().unwrap_or_default();
        let size = number(size.trim_ascii(), 16)?;
        self.part = if size == 0 { Part::Trailers } else { Part::Chunk(size.checked_add(2)?) };
        Some(false)
    }
}

fn number(digits: &[u8], radix: u32) -> Option<u64> {
    u64::from_str_radix(str::from_utf8(digits).ok()?, radix).ok()
}

/// Whether a byte may occur in a token, and so in a method (RFC 9110, section 5.6.2).
fn is_token(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)
}

impl Http1 {
    pub(super) fn observe_client(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.opaque {
            if let Some(taken) = self.request.skip(bytes.len()) {
                bytes = &bytes[taken..];
                continue;
            }
            let (taken, whole) = self.request.take_line(bytes);
            bytes = &bytes[taken..];
            if whole {
                self.request_line();
                self.request.line.clear();
            }
        }
    }

    fn request_line(&mut self) {
        let request = &mut self.request;
        match request.part {
            Part::StartLine if request.text().is_empty() => {}
            Part::StartLine => {
                let method = match request.text().split(|byte| *byte == b' ').next() {
                    Some(b"HEAD") => Method::Head,
                    Some(b"CONNECT") => Method::Connect,
                    Some(method) if method.iter().all(is_token) => Method::Other,
                    _ => return self.become_opaque(),
                };
                request.begin();
                self.outstanding.push_back(method);
            }
            Part::Headers if !request.text().is_empty() => request.note_header(),
            Part::Headers => {
                request.part = match (request.chunked, request.length) {
                    (true, _) => Part::ChunkSize,
                    (false, Some(length)) if length > 0 => Part::Body(length),
                    _ => Part::StartLine,
                };
            }
            _ => {
                if request.chunk_line().is_none() {
                    self.become_opaque();
                }
            }
        }
    }

    /// Where in `bytes` to insert the announcement, if `announce` is set and these bytes have a place for it.
    pub(super) fn observe_server(&mut self, bytes: &[u8], announce: bool) -> Option<usize> {
        let (mut position, mut rest) = (None, bytes);
        while !rest.is_empty() && !self.opaque {
            if let Some(taken) = self.response.skip(rest.len()) {
                rest = &rest[taken..];
                if self.response.part == Part::StartLine {
                    self.answered();
                }
                continue;
            }
            let (taken, whole) = self.response.take_line(rest);
            rest = &rest[taken..];
            if !whole {
                continue;
            }
            let began = self.response.part == Part::StartLine;
            self.response_line();
            self.response.line.clear();
            // Only in the response to the last outstanding request: the client would discard later responses.
            let last = began && self.response.status >= 200 && self.outstanding.len() == 1;
            if last && announce && !self.announced && !self.opaque {
                self.announced = true;
                position = Some(bytes.len() - rest.len());
            }
        }
        position
    }

    fn response_line(&mut self) {
        let response = &mut self.response;
        match response.part {
            Part::StartLine if response.text().is_empty() => {}
            Part::StartLine => {
                let text = response.text().strip_prefix(b"HTTP/1.");
                let status = text.and_then(|text| number(text.get(2..5)?, 10)?.try_into().ok());
                let Some(status): Option<u16> = status.filter(|_| !self.outstanding.is_empty()) else {
                    return self.become_opaque();
                };
                response.begin();
                response.status = status;
            }
            Part::Headers if !response.text().is_empty() => response.note_header(),
            Part::Headers => {
                let method = self.outstanding.front().copied().unwrap_or(Method::Other);
                match (method, response.status) {
                    (_, 101) | (Method::Connect, 200..=299) => self.become_opaque(),
                    (_, 100..=199) => response.part = Part::StartLine,
                    (Method::Head, _) | (_, 204 | 304) => {
                        response.part = Part::StartLine;
                        self.answered();
                    }
                    _ => match (response.chunked, response.length) {
                        (true, _) => response.part = Part::ChunkSize,
                        (false, Some(0)) => {
                            response.part = Part::StartLine;
                            self.answered();
                        }
                        (false, Some(length)) => response.part = Part::Body(length),
                        (false, None) => response.part = Part::UntilClose,
                    },
                }
            }
            _ => match response.chunk_line() {
                Some(true) => self.answered(),
                Some(false) => {}
                None => self.become_opaque(),
            },
        }
    }

    fn answered(&mut self) {
        self.outstanding.pop_front();
    }

    fn become_opaque(&mut self) {
        *self = Self { opaque: true, ..Self::default() };
    }

    pub(super) fn announcement() -> &'static [u8] {
        CLOSE
    }

    pub(super) fn is_announced(&self) -> bool {
        self.announced
    }

    pub(super) fn is_idle(&self) -> bool {
        !self.opaque
            && self.outstanding.is_empty()
            && self.request.part == Part::StartLine
            && self.request.line.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that the client receives when the server sends `answer` in pieces of this size.
    fn through(http1: &mut Http1, answer: &str, piece: usize, announce: bool) -> String {
        let mut seen = Vec::new();
        for bytes in answer.as_bytes().chunks(piece) {
            match http1.observe_server(bytes, announce) {
                Some(position) => {
                    seen.extend_from_slice(&bytes[..position]);
                    seen.extend_from_slice(CLOSE);
                    seen.extend_from_slice(&bytes[position..]);
                }
                None => seen.extend_from_slice(bytes),
            }
        }
        String::from_utf8(seen).expect("text")
    }

    #[test]
    fn the_announcement_is_a_header_of_the_next_response() {
        for piece in [1, 2, 7, 1000] {
            let mut http1 = Http1::default();
            http1.observe_client(
                b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            );
            let answer = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nHTTP/";
            let expected =
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nHTTP/";
            assert_eq!(through(&mut http1, answer, piece, true), expected);
            assert!(http1.is_idle() && http1.is_announced());
        }
    }

    #[test]
    fn message_boundaries_are_found() {
        for piece in [1, 3, 1000] {
            let mut http1 = Http1::default();
            http1.observe_client(
                b"HEAD / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\nPUT / HTTP/1.1\r\nContent-Length: 4\r\n\r\nGET ",
            );
            assert_eq!(http1.outstanding.len(), 3);
            through(&mut http1, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", piece, true);
            assert!(!http1.is_announced(), "more requests are outstanding");
            through(&mut http1, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", piece, false);
            through(&mut http1, "A;x=y\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n", piece, false);
            through(&mut http1, "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", piece, false);
            assert!(http1.is_idle(), "{piece}");
            http1.observe_client(b"GET / HT");
            assert!(!http1.is_idle());
        }
    }

    #[test]
    fn any_method_and_non_utf8_headers_are_parsed() {
        for long in [0, 210, 211, 212] {
            let mut http1 = Http1::default();
            let padding = "x".repeat(long);
            http1
                .observe_client(format!("M-SEARCH / HTTP/1.1\r\nX-Name: é{padding}ééééééééééééééééééé\r\n").as_bytes());
            http1.observe_client(b"X-Latin: \xe9\r\nContent-Length: 4\r\n\r\nbody");
            http1.observe_server(b"HTTP/1.1 200 \xe9\r\nX: \xff\r\nContent-Length: 5\r\n\r\n01234", false);
            assert!(http1.is_idle(), "{long}");
        }
    }

    #[test]
    fn bytes_after_an_upgrade_are_not_changed() {
        let mut http1 = Http1::default();
        http1.observe_client(b"GET /exec HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n");
        let answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\nHTTP/1.1 200 OK\r\n\r\n";
        assert_eq!(through(&mut http1, answer, 5, true), answer);
        assert!(!http1.is_idle());
    }
}

//! Calls the functions of an open plugin and believes only lengths and numbers that can be true.
#![allow(unsafe_code, reason = "this is the host's side of a C ABI; every block says why it is sound")]

use std::ptr;

use pintle_plugins_api::abi::{PINTLE_BUFFER_TOO_SMALL, PINTLE_OK, PintleBuffer, PintleBytes, PintleContext};
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyAlgorithm, KeyId, SignatureScheme};

use crate::module::Functions;

/// More bytes than any public key or signature has that pintle can use (RSA 4096: 550), and than most references.
const USUAL_CAPACITY: usize = 4096;

/// More bytes than any answer needs; a plugin that asks for more is broken. It bounds what a host allocates.
const MAXIMUM_CAPACITY: usize = 1 << 20;

/// An error's text, both lines together, is cut off here.
const ERROR_TEXT_CAPACITY: usize = 2048;

/// An open plugin. It is closed when dropped.
#[derive(Debug)]
pub(crate) struct Context {
    /// How errors name the plugin.
    name: String,
    functions: Functions,
    context: *mut PintleContext,
}

// SAFETY: the ABI allows successive calls from different threads, and every call takes `&mut self`.
unsafe impl Send for Context {}

impl Context {
    /// Opens the plugin with its configuration, a JSON object.
    pub(crate) fn open(name: String, functions: Functions, configuration: &str) -> Result<Self, BackendError> {
        let mut context = ptr::null_mut();
        let mut text = vec![0; ERROR_TEXT_CAPACITY];
        let mut buffer = buffer(&mut text);
        // SAFETY: all arguments are valid during the call.
        let code = unsafe { (functions.open)(bytes(configuration.as_bytes()), &mut context, &mut buffer) };
        if code == PINTLE_OK && context.is_null() {
            return Err(broken(&name, "open", "succeeded without a context"));
        }
        if code == PINTLE_OK {
            return Ok(Self { name, functions, context });
        }
        Err(failure(&name, "open", code, text.get(..buffer.length).unwrap_or_default()))
    }

    pub(crate) fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<Vec<u8>, BackendError> {
        let (function, context, id) = (self.functions.generate, self.context, bytes(id.as_bytes()));
        // SAFETY: the context is open, nothing else uses it now, and all arguments are valid during the call.
        self.answer("generate", |buffer| unsafe { function(context, id, algorithm as i32, buffer) })
    }

    pub(crate) fn public_key(&mut self, id: &KeyId) -> Result<Vec<u8>, BackendError> {
        let (function, context, id) = (self.functions.public_key, self.context, bytes(id.as_bytes()));
        // SAFETY: as in `generate`.
        self.answer("public_key", |buffer| unsafe { function(context, id, buffer) })
    }

    pub(crate) fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, digest: &[u8]) -> Result<Vec<u8>, BackendError> {
        let (function, context, id) = (self.functions.sign, self.context, bytes(id.as_bytes()));
        // SAFETY: as in `generate`.
        self.answer("sign", |buffer| unsafe { function(context, id, scheme as i32, bytes(digest), buffer) })
    }

    pub(crate) fn delete(&mut self, id: &KeyId) -> Result<(), BackendError> {
        // SAFETY: as in `generate`.
        let code = unsafe { (self.functions.delete_key)(self.context, bytes(id.as_bytes())) };
        if code == PINTLE_OK { Ok(()) } else { Err(self.failure("delete_key", code)) }
    }

    /// The ids as the plugin wrote them: each one byte with the length, and the id.
    pub(crate) fn list(&mut self) -> Result<Vec<u8>, BackendError> {
        let (function, context) = (self.functions.list, self.context);
        // SAFETY: as in `generate`.
        self.answer("list", |buffer| unsafe { function(context, buffer) })
    }

    /// The lines about what the device can run out of; none if the plugin does not have the function.
    pub(crate) fn usage(&mut self) -> Result<Vec<u8>, BackendError> {
        let (function, context) = (self.functions.usage, self.context);
        // SAFETY: as in `generate`.
        function.map_or(Ok(Vec::new()), |function| self.answer("usage", |buffer| unsafe { function(context, buffer) }))
    }

    /// The number of the kind, and the text.
    pub(crate) fn reference(&mut self, id: &KeyId) -> Result<(i32, Vec<u8>), BackendError> {
        let (function, context, id) = (self.functions.reference, self.context, bytes(id.as_bytes()));
        let mut kind = 0;
        // SAFETY: as in `generate`.
        let text = self.answer("reference", |buffer| unsafe { function(context, id, &mut kind, buffer) })?;
        Ok((kind, text))
    }

    /// An error that says that the plugin broke its promises.
    pub(crate) fn broken(&self, function: &str, what: &str) -> BackendError {
        broken(&self.name, function, what)
    }

    /// Calls a function that fills a buffer, and once more if it wants a larger one.
    fn answer(
        &mut self,
        function: &str,
        mut call: impl FnMut(&mut PintleBuffer) -> i32,
    ) -> Result<Vec<u8>, BackendError> {
        let mut capacity = USUAL_CAPACITY;
        loop {
            let mut bytes = vec![0; capacity];
            let mut buffer = buffer(&mut bytes);
            let code = call(&mut buffer);
            // Nothing else is believed of what the plugin may have written into the structure.
            let length = buffer.length;
            match code {
                PINTLE_OK if length <= capacity => {
                    bytes.truncate(length);
                    return Ok(bytes);
                }
                PINTLE_OK => {
                    return Err(self.broken(function, &format!("answered {length} bytes in a buffer of {capacity}")));
                }
                // A list may grow between two calls, so a second time is no contradiction.
                PINTLE_BUFFER_TOO_SMALL if length > capacity && length <= MAXIMUM_CAPACITY => {
                    capacity = length.next_power_of_two();
                }
                PINTLE_BUFFER_TOO_SMALL => {
                    return Err(self.broken(function, &format!("asked for a buffer of {length} bytes")));
                }
                code => return Err(self.failure(function, code)),
            }
        }
    }

    /// The error with this code, in the plugin's words.
    fn failure(&mut self, function: &str, code: i32) -> BackendError {
        let mut text = vec![0; ERROR_TEXT_CAPACITY];
        let mut buffer = buffer(&mut text);
        // SAFETY: the context is open, nothing else uses it now, and the buffer is valid during the call.
        let answer = unsafe { (self.functions.last_error)(self.context, &mut buffer) };
        let length = if answer == PINTLE_OK { buffer.length } else { 0 };
        failure(&self.name, function, code, text.get(..length).unwrap_or_default())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is open and not used again.
        unsafe { (self.functions.close)(self.context) }
    }
}

fn bytes(bytes: &[u8]) -> PintleBytes {
    PintleBytes { pointer: bytes.as_ptr(), length: bytes.len() }
}

fn buffer(bytes: &mut [u8]) -> PintleBuffer {
    PintleBuffer { pointer: bytes.as_mut_ptr(), capacity: bytes.len(), length: 0 }
}

fn failure(name: &str, function: &str, code: i32, text: &[u8]) -> BackendError {
    let Some(kind) = BackendErrorKind::from_code(code) else {
        return broken(name, function, &format!("answered {code}, which is no error code"));
    };
    let text = String::from_utf8_lossy(text);
    let mut lines = text.lines().map(printable);
    let detail = match lines.next() {
        Some(detail) if !detail.is_empty() => detail,
        _ => format!("{function} failed"),
    };
    let error = BackendError::new(kind, format!("plugin {name}: {detail}"));
    match lines.next() {
        Some(hint) if !hint.is_empty() => error.with_hint(hint),
        _ => error,
    }
}

/// A plugin's line, without what could forge a line of a log or move a terminal's cursor.
pub(crate) fn printable(line: &str) -> String {
    // The marks that change the direction of text are formatting characters, not control characters.
    let forbidden = |character: char| {
        character.is_control() || matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    line.replace(forbidden, " ").trim().to_owned()
}

fn broken(name: &str, function: &str, what: &str) -> BackendError {
    BackendError::new(BackendErrorKind::Corrupt, format!("plugin {name} is faulty: {function} {what}"))
        .with_hint("report it to the plugin's vendor")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_text_becomes_one_printable_line_and_a_hint() {
        let error = failure("x", "sign", -4, b"device\x1b[2J asleep\xff\r\nwake \x07it\nmore");
        assert_eq!(error.kind, BackendErrorKind::Unavailable);
        assert_eq!(error.detail, "plugin x: device [2J asleep\u{fffd}");
        assert_eq!(error.hint.as_deref(), Some("wake  it"));
        assert_eq!(failure("x", "sign", -1, b"").detail, "plugin x: sign failed");
        assert_eq!(failure("x", "sign", -5, "a\u{202e}b".as_bytes()).detail, "plugin x: a b");
    }

    #[test]
    fn unknown_codes_are_the_plugins_fault() {
        for code in [1, 7, -8, i32::MIN, i32::MAX] {
            assert_eq!(failure("x", "sign", code, b"").kind, BackendErrorKind::Corrupt, "{code}");
        }
    }
}

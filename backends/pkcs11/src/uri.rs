//! `pkcs11:` URIs (RFC 7512): which token, which module, which PIN.

use std::path::PathBuf;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use pintle_plugins_api::{BackendError, KeyId};

use crate::misconfigured;

/// The unreserved characters (RFC 3986, section 2.3) stand for themselves in every attribute.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// What a token says of itself in CK_TOKEN_INFO, without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenIdentity {
    /// The label, up to 32 bytes.
    pub(crate) label: String,
    /// The manufacturer's name.
    pub(crate) manufacturer: String,
    /// The model's name.
    pub(crate) model: String,
    /// The serial number; some modules give the same one to every token.
    pub(crate) serial: String,
}

/// A `pkcs11:` URI that names a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TokenUri {
    label: Option<String>,
    manufacturer: Option<String>,
    model: Option<String>,
    serial: Option<String>,
    slot: Option<u64>,
    /// `module-path`: absolute.
    pub(crate) module_path: Option<PathBuf>,
    /// `pin-source`: a path, absolute or a name in the credentials directory.
    pub(crate) pin_source: Option<PathBuf>,
}

/// The name of an attribute, if it looks like one: a value that stands in the wrong place may be a PIN.
fn shown(name: &str) -> &str {
    let is_name = name.chars().all(|character| character.is_ascii_lowercase() || character == '-');
    if is_name { name } else { "an attribute" }
}

impl TokenUri {
    /// Parses the URI. Errors name attributes, never their values: one of them may be a PIN.
    pub(crate) fn parse(text: &str) -> Result<Self, BackendError> {
        let hint = "such as pkcs11:token=node-keys?module-path=/usr/lib/softhsm/libsofthsm2.so";
        let rest = match text.split_at_checked("pkcs11:".len()) {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("pkcs11:") => rest,
            _ => return Err(misconfigured("not a pkcs11: URI (RFC 7512)").with_hint(hint)),
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut uri = Self::default();
        let mut seen = Vec::new();
        for (attribute, in_path) in path
            .split(';')
            .map(|attribute| (attribute, true))
            .chain(query.split('&').map(|attribute| (attribute, false)))
            .filter(|(attribute, _)| !attribute.is_empty())
        {
            let (name, value) = attribute.split_once('=').ok_or_else(|| {
                misconfigured("an attribute of the pkcs11: URI has no value (RFC 7512, section 2.3)").with_hint(hint)
            })?;
            if seen.contains(&name) {
                return Err(misconfigured(format!("the pkcs11: URI says {} twice", shown(name))));
            }
            seen.push(name);
            if in_path { uri.path_attribute(name, value)? } else { uri.query_attribute(name, value)? }
        }
        if uri.label.is_none() && uri.serial.is_none() && uri.slot.is_none() {
            return Err(misconfigured("the pkcs11: URI names no token").with_hint("add token=, serial= or slot-id="));
        }
        Ok(uri)
    }

    fn path_attribute(&mut self, name: &str, value: &str) -> Result<(), BackendError> {
        match name {
            "token" => self.label = Some(text(name, value)?),
            "manufacturer" => self.manufacturer = Some(text(name, value)?),
            "model" => self.model = Some(text(name, value)?),
            "serial" => self.serial = Some(text(name, value)?),
            "slot-id" => {
                let number = value.parse().map_err(|_| misconfigured("slot-id of the pkcs11: URI is not a number"))?;
                self.slot = Some(number);
            }
            "id" | "object" | "type" => {
                return Err(misconfigured(format!("the pkcs11: URI names an object by {name}"))
                    .with_hint("name the token only: pintle chooses the ids of its keys"));
            }
            // An attribute that is not understood must not be taken as a match (RFC 7512, section 2.5).
            other => {
                return Err(misconfigured(format!("the pkcs11: URI has {}, which is not supported", shown(other))));
            }
        }
        Ok(())
    }

    fn query_attribute(&mut self, name: &str, value: &str) -> Result<(), BackendError> {
        match name {
            "pin-value" => {
                return Err(misconfigured("a PIN in the pkcs11: URI is refused: it would show in configurations")
                    .with_hint("put the PIN in a file of mode 0400 and name it with pin-source=file:/path"));
            }
            "pin-source" => {
                let source = text(name, value)?;
                let path = source.strip_prefix("file:").unwrap_or(&source);
                // file:/path and file:///path are the same file (RFC 8089, appendix B).
                let path = path.strip_prefix("//").filter(|path| path.starts_with('/')).unwrap_or(path);
                if path.is_empty() || path.starts_with('|') || path.starts_with("//") || path.contains('\0') {
                    return Err(misconfigured("pin-source of the pkcs11: URI is not a file")
                        .with_hint("such as pin-source=file:/etc/pintle/pin"));
                }
                self.pin_source = Some(path.into());
            }
            "module-path" => {
                let path = PathBuf::from(text(name, value)?);
                if !path.is_absolute() {
                    return Err(misconfigured("module-path of the pkcs11: URI is not absolute"));
                }
                self.module_path = Some(path);
            }
            "module-name" => {
                return Err(misconfigured("module-name in the pkcs11: URI: pintle does not search for modules")
                    .with_hint("name the module's file by module-path alone"));
            }
            // Vendors may add attributes to the query, and those who do not know them ignore them (RFC 7512, 2.4).
            _ => {}
        }
        Ok(())
    }

    /// Whether this URI means the token in this slot. `identity` is `None` if what the token says of itself cannot be
    /// read; such a token is only meant by its slot.
    pub(crate) fn matches(&self, slot: u64, identity: Option<&TokenIdentity>) -> bool {
        if self.slot.is_some_and(|wanted| wanted != slot) {
            return false;
        }
        let agrees = |wanted: &Option<String>, actual: &str| wanted.as_ref().is_none_or(|wanted| wanted == actual);
        match identity {
            Some(identity) => {
                agrees(&self.label, &identity.label)
                    && agrees(&self.manufacturer, &identity.manufacturer)
                    && agrees(&self.model, &identity.model)
                    && agrees(&self.serial, &identity.serial)
            }
            None => self.slot.is_some(),
        }
    }

    /// The URI of a private key in this token, for OpenSSL and its like.
    pub(crate) fn of_key(&self, identity: Option<&TokenIdentity>, id: &KeyId) -> String {
        let encode = |value: &str| percent_encode(value.as_bytes(), ENCODED).to_string();
        let label = identity.map(|identity| identity.label.clone()).or_else(|| self.label.clone());
        let mut attributes = Vec::new();
        attributes.extend(label.map(|label| format!("token={}", encode(&label))));
        attributes.extend(self.serial.as_ref().map(|serial| format!("serial={}", encode(serial))));
        // RFC 7512, section 2.3: every byte of an id should be percent-encoded.
        let bytes: String = id.as_bytes().iter().map(|byte| format!("%{byte:02X}")).collect();
        attributes.push(format!("id={bytes}"));
        attributes.push("type=private".to_owned());
        format!("pkcs11:{}", attributes.join(";"))
    }

    /// The token, in words for messages.
    pub(crate) fn name(&self) -> String {
        match (&self.label, &self.serial, self.slot) {
            (Some(label), _, _) => format!("token {label:?}"),
            (None, Some(serial), _) => format!("the token with serial {serial:?}"),
            (None, None, Some(slot)) => format!("the token in slot {slot}"),
            (None, None, None) => "the token".to_owned(),
        }
    }
}

fn text(name: &str, value: &str) -> Result<String, BackendError> {
    percent_decode_str(value)
        .decode_utf8()
        .map(|text| text.into_owned())
        .map_err(|_| misconfigured(format!("{name} of the pkcs11: URI is not UTF-8")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(label: &str, serial: &str) -> TokenIdentity {
        TokenIdentity {
            label: label.into(),
            manufacturer: "maker".into(),
            model: "model".into(),
            serial: serial.into(),
        }
    }

    #[test]
    fn a_uri_with_everything_is_understood() {
        let uri = TokenUri::parse(
            "PKCS11:token=node%20keys;serial=01;slot-id=7?module-path=/usr/lib/m.so&pin-source=file:/etc/pin&x-vendor=1",
        )
        .expect("valid");
        assert!(uri.matches(7, Some(&identity("node keys", "01"))));
        assert!(!uri.matches(8, Some(&identity("node keys", "01"))));
        assert!(!uri.matches(7, Some(&identity("node keys", "02"))));
        assert!(uri.matches(7, None));
        assert_eq!(uri.module_path, Some("/usr/lib/m.so".into()));
        assert_eq!(uri.pin_source, Some("/etc/pin".into()));
    }

    #[test]
    fn each_spelling_of_a_pin_source_is_the_same_file() {
        for source in ["file:/etc/pin", "file:///etc/pin", "/etc/pin", "file:%2Fetc%2Fpin"] {
            let uri = TokenUri::parse(&format!("pkcs11:token=a?pin-source={source}")).expect(source);
            assert_eq!(uri.pin_source, Some("/etc/pin".into()), "{source}");
        }
        for source in ["|cat /etc/pin", "file:", "file://host/etc/pin"] {
            assert!(TokenUri::parse(&format!("pkcs11:token=a?pin-source={source}")).is_err(), "{source}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (text, says) in [
            ("token=a", "not a pkcs11: URI"),
            ("pkcs11:", "names no token"),
            ("pkcs11:model=m", "names no token"),
            ("pkcs11:token=a;token=b", "token twice"),
            ("pkcs11:token", "no value"),
            ("pkcs11:token=%FF", "not UTF-8"),
            ("pkcs11:token=a;id=%01", "names an object"),
            ("pkcs11:token=a;colour=blue", "not supported"),
            ("pkcs11:slot-id=first", "not a number"),
            ("pkcs11:token=a?module-path=m.so", "not absolute"),
            ("pkcs11:token=a?module-name=m&module-path=/m.so", "module-name"),
        ] {
            let error = TokenUri::parse(text).expect_err(text);
            assert!(error.detail.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_pin_in_the_uri_is_refused_and_not_repeated() {
        let error = TokenUri::parse("pkcs11:token=a?pin-value=931648").expect_err("refused");
        assert!(!format!("{error:?}").contains("931648"));
    }

    #[test]
    fn the_uri_of_a_key_names_it_by_its_bytes() {
        let uri = TokenUri::parse("pkcs11:token=a%3Bb;serial=9").expect("valid");
        let id = KeyId::new(*b"\0k/").expect("valid");
        assert_eq!(uri.of_key(None, &id), "pkcs11:token=a%3Bb;serial=9;id=%00%6B%2F;type=private");
    }
}

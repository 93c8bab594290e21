//! Query parameters, selectors and media types.

use std::borrow::Cow;

use super::super::status::Failure;
use super::super::watching::Selector;

/// A parsed query.
#[derive(Debug, Default)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Parses `application/x-www-form-urlencoded`. Malformed escapes are kept as they are.
    pub(super) fn parse(query: &str) -> Self {
        let decode = |text: &str| {
            let spaced = text.replace('+', " ");
            percent_decode(&spaced).into_owned()
        };
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .map(|(key, value)| (decode(key), decode(value)))
                .collect(),
        )
    }

    /// The value of a key; an empty one counts as missing.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let found = self.0.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// A boolean as Kubernetes parses it: `true` and `1`.
    pub(super) fn is_true(&self, key: &str) -> bool {
        matches!(self.get(key), Some("true" | "1"))
    }

    /// The value as a number.
    ///
    /// # Errors
    /// 400 if it is not a number.
    pub(super) fn number(&self, key: &str) -> Result<Option<u64>, Failure> {
        let parse =
            |text: &str| text.parse().map_err(|_| Failure::bad_request(format!("{key}: invalid value {text:?}")));
        self.get(key).map(parse).transpose()
    }

    /// The fieldSelector. A labelSelector is rejected as unsupported.
    ///
    /// # Errors
    /// 400 for a selector that is not supported.
    pub(super) fn selector(&self) -> Result<Selector, Failure> {
        if self.get("labelSelector").is_some() {
            return Err(Failure::bad_request("labelSelector is not supported by this control plane"));
        }
        let mut selector = Selector::default();
        for term in self.get("fieldSelector").into_iter().flat_map(|terms| terms.split(',')) {
            let unsupported = || Failure::bad_request(format!("field label not supported: {term}"));
            let (field, value) = term.split_once('=').ok_or_else(unsupported)?;
            let value = Some(value.trim_start_matches('=').to_owned());
            match field {
                "metadata.name" => selector.name = value,
                "spec.signerName" => selector.signer_name = value,
                _ => return Err(unsupported()),
            }
        }
        Ok(selector)
    }
}

fn percent_decode(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut position = 0;
    while let Some(byte) = bytes.get(position) {
        let escaped = bytes.get(position + 1..position + 3).and_then(|digits| std::str::from_utf8(digits).ok());
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(value) if *byte == b'%' => {
                decoded.push(value);
                position += 3;
            }
            _ => {
                decoded.push(*byte);
                position += 1;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&decoded).into_owned())
}

/// The format of the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Representation {
    /// The object or list itself.
    Object,
    /// `meta.k8s.io/v1 Table`.
    Table,
}

/// The first supported media type of `Accept`.
///
/// # Errors
/// 406 if there is none (a client that accepts only protobuf).
pub(super) fn representation(accept: &str) -> Result<Representation, Failure> {
    if accept.trim().is_empty() {
        return Ok(Representation::Object);
    }
    for clause in accept.split(',') {
        let mut parts = clause.split(';').map(str::trim);
        let media_type = parts.next().unwrap_or_default();
        if !["application/json", "application/*", "*/*"].contains(&media_type) {
            continue;
        }
        let parameters: Vec<(&str, &str)> = parts.filter_map(|part| part.split_once('=')).collect();
        let parameter = |key: &str| parameters.iter().find(|(name, _)| *name == key).map(|(_, value)| *value);
        match parameter("as") {
            None => return Ok(Representation::Object),
            Some("Table") if parameter("g") == Some("meta.k8s.io") && parameter("v") == Some("v1") => {
                return Ok(Representation::Table);
            }
            Some(_) => {}
        }
    }
    Err(Failure::not_acceptable())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails when something unexpected happens")]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("watch=1&fieldSelector=metadata.name%3Dcsr-a&timeoutSeconds=x&odd=%zz+a");
        assert!(query.is_true("watch"));
        assert_eq!(query.selector().unwrap().name.as_deref(), Some("csr-a"));
        assert_eq!(query.number("timeoutSeconds").unwrap_err().code, 400);
        assert_eq!(query.number("resourceVersion").unwrap(), None);
        assert_eq!(query.get("odd"), Some("%zz a"));
        assert_eq!(Query::parse("fieldSelector=status.phase=x").selector().unwrap_err().code, 400);
    }

    #[test]
    fn the_first_supported_media_type_is_chosen() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(representation(kubectl).unwrap(), Representation::Table);
        let discovery = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        assert_eq!(representation(discovery).unwrap(), Representation::Object);
        assert_eq!(
            representation("application/vnd.kubernetes.protobuf,application/json").unwrap(),
            Representation::Object
        );
        assert_eq!(representation("application/vnd.kubernetes.protobuf").unwrap_err().code, 406);
        assert_eq!(representation("*/*").unwrap(), Representation::Object);
    }
}

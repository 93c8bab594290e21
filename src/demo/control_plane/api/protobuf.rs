//! Request bodies in `application/vnd.kubernetes.protobuf`, which kubectl and the kubelet send for built-in types
//! whatever the server supports. Responses are always JSON, which these clients accept.
//!
//! Field numbers are those of the generated.proto files of k8s.io/api and k8s.io/apimachinery 0.36. Fields that are
//! not in these tables are ignored.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

/// The magic number before `runtime.Unknown`.
const MAGIC: &[u8] = b"k8s\0";

/// The type of a field, which decides its JSON representation.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Bytes,
    Integer,
    Time,
    Message(Schema),
    TextList,
    MessageList(Schema),
    /// `map<string, string>`.
    TextMap,
}

/// Field number, JSON name and type of each field.
type Schema = &'static [(u64, &'static str, Kind)];

const UNKNOWN: Schema = &[(1, "typeMeta", Kind::Message(TYPE_META)), (2, "raw", Kind::Bytes)];
const TYPE_META: Schema = &[(1, "apiVersion", Kind::Text), (2, "kind", Kind::Text)];
const OBJECT_META: Schema = &[
    (1, "name", Kind::Text),
    (2, "generateName", Kind::Text),
    (5, "uid", Kind::Text),
    (6, "resourceVersion", Kind::Text),
    (11, "labels", Kind::TextMap),
    (12, "annotations", Kind::TextMap),
];
const TEXT_MAP_ENTRY: Schema = &[(1, "key", Kind::Text), (2, "value", Kind::Text)];
const CERTIFICATE_SIGNING_REQUEST: Schema = &[
    (1, "metadata", Kind::Message(OBJECT_META)),
    (2, "spec", Kind::Message(SPEC)),
    (3, "status", Kind::Message(STATUS)),
];
const SPEC: Schema = &[
    (1, "request", Kind::Bytes),
    (5, "usages", Kind::TextList),
    (7, "signerName", Kind::Text),
    (8, "expirationSeconds", Kind::Integer),
];
const STATUS: Schema = &[(1, "conditions", Kind::MessageList(CONDITION)), (2, "certificate", Kind::Bytes)];
const CONDITION: Schema = &[
    (1, "type", Kind::Text),
    (2, "reason", Kind::Text),
    (3, "message", Kind::Text),
    (4, "lastUpdateTime", Kind::Time),
    (5, "lastTransitionTime", Kind::Time),
    (6, "status", Kind::Text),
];
const SELF_SUBJECT_ACCESS_REVIEW: Schema = &[(2, "spec", Kind::Message(ACCESS_REVIEW_SPEC))];
const ACCESS_REVIEW_SPEC: Schema = &[(1, "resourceAttributes", Kind::Message(RESOURCE_ATTRIBUTES))];
const RESOURCE_ATTRIBUTES: Schema = &[
    (1, "namespace", Kind::Text),
    (2, "verb", Kind::Text),
    (3, "group", Kind::Text),
    (4, "version", Kind::Text),
    (5, "resource", Kind::Text),
    (6, "subresource", Kind::Text),
    (7, "name", Kind::Text),
];
const DELETE_OPTIONS: Schema = &[(2, "preconditions", Kind::Message(PRECONDITIONS))];
const PRECONDITIONS: Schema = &[(1, "uid", Kind::Text), (2, "resourceVersion", Kind::Text)];

/// Converts an object to JSON; `None` if it is malformed or of an unsupported kind.
pub(super) fn to_json(body: &[u8]) -> Option<Value> {
    let envelope = message(body.strip_prefix(MAGIC)?, UNKNOWN)?;
    let type_meta = &envelope["typeMeta"];
    let raw = STANDARD.decode(envelope["raw"].as_str().unwrap_or_default()).ok()?;
    let schema = match type_meta["kind"].as_str()? {
        "CertificateSigningRequest" => CERTIFICATE_SIGNING_REQUEST,
        "SelfSubjectAccessReview" => SELF_SUBJECT_ACCESS_REVIEW,
        "SelfSubjectReview" => &[],
        "DeleteOptions" => DELETE_OPTIONS,
        _ => return None,
    };
    let mut document = message(&raw, schema)?;
    document["apiVersion"] = type_meta["apiVersion"].clone();
    document["kind"] = type_meta["kind"].clone();
    Some(document)
}

fn message(mut input: &[u8], schema: Schema) -> Option<Value> {
    let mut document = Map::new();
    while !input.is_empty() {
        let (number, field) = field(&mut input)?;
        let Some((_, name, kind)) = schema.iter().find(|(known, ..)| *known == number) else { continue };
        let name = (*name).to_owned();
        let append = |document: &mut Map<String, Value>, value: Value| {
            if let Value::Array(list) = document.entry(name.clone()).or_insert_with(|| json!([])) {
                list.push(value);
            }
        };
        match (kind, field) {
            (Kind::Text, Field::Bytes(bytes)) => {
                document.insert(name, text(bytes)?);
            }
            (Kind::Bytes, Field::Bytes(bytes)) => {
                document.insert(name, json!(STANDARD.encode(bytes)));
            }
            (Kind::Integer, Field::Integer(number)) => {
                // Two's complement: a negative number is a varint of ten bytes.
                document.insert(name, json!(number.cast_signed()));
            }
            (Kind::Time, Field::Bytes(bytes)) => {
                let seconds = message(bytes, &[(1, "seconds", Kind::Integer)])?["seconds"].as_i64();
                // Go encodes the zero time as an empty message.
                if let Some(seconds) = seconds {
                    document.insert(name, json!(Timestamp::from_second(seconds).ok()?.to_string()));
                }
            }
            (Kind::Message(schema), Field::Bytes(bytes)) => {
                document.insert(name, message(bytes, schema)?);
            }
            (Kind::TextList, Field::Bytes(bytes)) => append(&mut document, text(bytes)?),
            (Kind::MessageList(schema), Field::Bytes(bytes)) => append(&mut document, message(bytes, schema)?),
            (Kind::TextMap, Field::Bytes(bytes)) => {
                let entry = message(bytes, TEXT_MAP_ENTRY)?;
                if let Value::Object(map) = document.entry(name).or_insert_with(|| json!({})) {
                    map.insert(entry["key"].as_str().unwrap_or_default().to_owned(), entry["value"].clone());
                }
            }
            _ => return None,
        }
    }
    Some(Value::Object(document))
}

fn text(bytes: &[u8]) -> Option<Value> {
    std::str::from_utf8(bytes).ok().map(|text| json!(text))
}

enum Field<'a> {
    Integer(u64),
    /// Length-delimited, or of a fixed length (which no known field has).
    Bytes(&'a [u8]),
}

/// Parses the next field's number and value.
fn field<'a>(input: &mut &'a [u8]) -> Option<(u64, Field<'a>)> {
    let key = varint(input)?;
    let length = match key & 7 {
        0 => return Some((key >> 3, Field::Integer(varint(input)?))),
        1 => 8,
        2 => usize::try_from(varint(input)?).ok()?,
        5 => 4,
        _ => return None,
    };
    let (bytes, rest) = input.split_at_checked(length)?;
    *input = rest;
    Some((key >> 3, Field::Bytes(bytes)))
}

fn varint(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = input.split_first()?;
        *input = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails when something unexpected happens")]
mod tests {
    use super::*;

    fn bytes(number: u8, content: &[u8]) -> Vec<u8> {
        let mut encoded = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
        encoded.extend_from_slice(content);
        encoded
    }

    fn envelope(kind: &str, object: &[u8]) -> Vec<u8> {
        let type_meta = [bytes(1, b"certificates.k8s.io/v1"), bytes(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), bytes(1, &type_meta), bytes(2, object)].concat()
    }

    #[test]
    fn an_approval_is_decoded() {
        let time = [bytes(4, &[]), bytes(5, &[8, 1])].concat();
        let condition = [bytes(1, b"Approved"), bytes(6, b"True"), time].concat();
        let metadata = [bytes(1, b"csr-1"), bytes(12, &[bytes(1, b"a"), bytes(2, b"b")].concat())].concat();
        let spec = [bytes(5, b"client auth"), bytes(5, b"x"), vec![8 << 3, 0xd8, 4]].concat();
        let object = [bytes(1, &metadata), bytes(2, &spec), bytes(3, &bytes(1, &condition))].concat();
        assert_eq!(
            to_json(&envelope("CertificateSigningRequest", &object)).unwrap(),
            json!({
                "apiVersion": "certificates.k8s.io/v1",
                "kind": "CertificateSigningRequest",
                "metadata": { "name": "csr-1", "annotations": { "a": "b" } },
                "spec": { "usages": ["client auth", "x"], "expirationSeconds": 600 },
                "status": { "conditions": [{
                    "type": "Approved", "status": "True", "lastTransitionTime": "1970-01-01T00:00:01Z",
                }] },
            })
        );
    }

    #[test]
    fn truncated_messages_do_not_panic() {
        let whole = envelope("CertificateSigningRequest", &bytes(1, &bytes(1, b"csr-1")));
        assert!(to_json(&whole).is_some());
        assert!(to_json(&envelope("Pod", &[])).is_none());
        assert!(to_json(b"{}").is_none());
        // A truncated message is rejected or, if truncated between two fields, lacks the later ones; it never panics.
        for length in 0..whole.len() {
            let _ = to_json(&whole[..length]);
        }
        assert!(to_json(&[MAGIC, &[0xff; 12]].concat()).is_none());
    }
}

//! Server-side printing: `meta.k8s.io/v1 Table`, whose columns kubectl prints unchanged.

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use serde_json::{Value, json};

use super::object::{APPROVED, DENIED, FAILED, has_condition, is_issued};

/// What a row contains besides its cells (the query parameter includeObject).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IncludeObject {
    None,
    Metadata,
    Object,
}

impl IncludeObject {
    /// The default is the metadata.
    pub(super) fn from_query(value: Option<&str>) -> Self {
        match value {
            Some("None") => Self::None,
            Some("Object") => Self::Object,
            _ => Self::Metadata,
        }
    }
}

/// A table of objects. As in kube-apiserver, only the first event of a watch has columns (`with_columns`).
pub(super) fn table<'a>(
    objects: impl IntoIterator<Item = &'a CertificateSigningRequest>,
    resource_version: &str,
    include: IncludeObject,
    with_columns: bool,
    now_seconds: i64,
) -> Value {
    let rows: Vec<Value> = objects.into_iter().map(|object| row(object, include, now_seconds)).collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": { "resourceVersion": resource_version },
        "columnDefinitions": if with_columns { columns() } else { Value::Null },
        "rows": rows,
    })
}

fn columns() -> Value {
    let column = |name: &str, format: &str, description: &str| json!({ "name": name, "type": "string", "format": format, "description": description, "priority": 0 });
    json!([
        column("Name", "name", "The name of the request."),
        column("Age", "", "The time since the request was created."),
        column("SignerName", "", "The name of the requested signer."),
        column("Requestor", "", "The user who made the request."),
        column("RequestedDuration", "", "The requested lifetime of the certificate."),
        column("Condition", "", "The current state of the request."),
    ])
}

fn row(object: &CertificateSigningRequest, include: IncludeObject, now_seconds: i64) -> Value {
    let none = || "<none>".to_owned();
    let created = object.metadata.creation_timestamp.as_ref();
    let age = created.map_or_else(|| "<unknown>".to_owned(), |time| human_duration(now_seconds - time.0.as_second()));
    let requested = object.spec.expiration_seconds.map_or_else(none, |seconds| human_duration(seconds.into()));
    let cells = json!([
        object.metadata.name,
        age,
        Some(&object.spec.signer_name).filter(|name| !name.is_empty()).cloned().unwrap_or_else(none),
        object.spec.username.clone().unwrap_or_default(),
        requested,
        condition(object),
    ]);
    match include {
        IncludeObject::None => json!({ "cells": cells }),
        IncludeObject::Object => json!({ "cells": cells, "object": object }),
        IncludeObject::Metadata => json!({
            "cells": cells,
            "object": {
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": object.metadata,
            },
        }),
    }
}

/// `Pending`, `Approved` or `Denied`, then `,Failed` and `,Issued` where they apply.
fn condition(object: &CertificateSigningRequest) -> String {
    let mut words = vec![match () {
        () if has_condition(object, DENIED) => "Denied",
        () if has_condition(object, APPROVED) => "Approved",
        () => "Pending",
    }];
    if has_condition(object, FAILED) {
        words.push("Failed");
    }
    if is_issued(object) {
        words.push("Issued");
    }
    words.join(",")
}

/// A duration with at most two units, as kubectl prints ages: 119s, 2m5s, 10m, 3h1m, 8h, 2d3h.
fn human_duration(seconds: i64) -> String {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 3600;
    const DAY: i64 = 86_400;
    const YEAR: i64 = 365 * DAY;
    let two =
        |unit: i64, letter: char, lesser: i64, lesser_letter: char| match (seconds / unit, seconds % unit / lesser) {
            (whole, 0) => format!("{whole}{letter}"),
            (whole, rest) => format!("{whole}{letter}{rest}{lesser_letter}"),
        };
    match seconds {
        ..-1 => "<invalid>".to_owned(),
        // Up to a second in the future is clock skew.
        -1 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        120..600 => two(MINUTE, 'm', 1, 's'),
        600..10_800 => format!("{}m", seconds / MINUTE),
        10_800..28_800 => two(HOUR, 'h', MINUTE, 'm'),
        28_800..172_800 => format!("{}h", seconds / HOUR),
        172_800..691_200 => two(DAY, 'd', HOUR, 'h'),
        691_200..63_072_000 => format!("{}d", seconds / DAY),
        63_072_000..252_288_000 => two(YEAR, 'y', DAY, 'd'),
        _ => format!("{}y", seconds / YEAR),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_printed_as_kubectl_prints_them() {
        let cases = [
            (-5, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (600, "10m"),
            (10_860, "3h1m"),
            (28_800, "8h"),
            (2 * 86_400 + 3 * 3600, "2d3h"),
            (8 * 86_400 + 3600, "8d"),
            (365 * 86_400, "365d"),
            (3 * 365 * 86_400 + 86_400, "3y1d"),
            (10 * 365 * 86_400, "10y"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(human_duration(seconds), expected, "{seconds} seconds");
        }
    }
}

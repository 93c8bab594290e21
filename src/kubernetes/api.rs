//! One connection's worth of the API server: requests go out, answers or [`ApiFailure`]s come back.

use std::sync::Mutex;
use std::time::Duration;

use futures::StreamExt;
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt, BodyStream};
use kube::client::Body;
use pintle_agent_core::rotation::ApiFailure;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::without_secrets;

/// A client for one API server and one credential.
pub struct Api {
    client: kube::Client,
    /// The API server's clock as of its last answer, and this machine's clock at that moment, in seconds since 1970.
    clock: Mutex<Option<(i64, i64)>>,
}

/// Every answer but that of a watch must be there within this time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// An answer longer than this is not what was asked for.
const MAXIMUM_ANSWER: usize = 4 << 20;

impl Api {
    pub(super) fn new(client: kube::Client) -> Self {
        Self { client, clock: Mutex::new(None) }
    }

    /// How many seconds the API server's clock was ahead of this machine's at its last answer.
    pub fn clock_ahead(&self) -> Option<i64> {
        let (theirs, ours) = (*self.clock.lock().unwrap_or_else(std::sync::PoisonError::into_inner))?;
        Some(theirs - ours)
    }

    /// The answer to a GET.
    ///
    /// # Errors
    /// Those of [`ApiFailure`]; `Ok(None)` if there is no such object.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, ApiFailure> {
        let (status, content) = self.send(Method::GET, path, Vec::new()).await?;
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        parse(&content).map(Some)
    }

    /// The answer to a POST of this object.
    ///
    /// # Errors
    /// Those of [`ApiFailure`]; `Ok(None)` if an object of that name exists, or the path does not.
    pub async fn create<T: DeserializeOwned>(
        &self,
        path: &str,
        object: &impl Serialize,
    ) -> Result<Option<T>, ApiFailure> {
        let content = serde_json::to_vec(object).map_err(|error| ApiFailure::Invalid(error.to_string()))?;
        let (status, content) = self.send(Method::POST, path, content).await?;
        if matches!(status, StatusCode::CONFLICT | StatusCode::NOT_FOUND) {
            return Ok(None);
        }
        parse(&content).map(Some)
    }

    /// Waits until a watch shows any event, or the server or the time ends it.
    ///
    /// # Errors
    /// Those of [`ApiFailure`].
    pub async fn watch_once(&self, path: &str, limit: Duration) -> Result<(), ApiFailure> {
        let request = self.request(Method::GET, path, Vec::new())?;
        let response =
            within(ANSWER_TIMEOUT, async { self.client.send(request).await.map_err(|error| unreachable(&error)) })
                .await?;
        let (parts, body) = response.into_parts();
        self.note_clock(&parts.headers);
        if !parts.status.is_success() {
            let content = collect(body).await?;
            return Err(failure(parts.status, &parts.headers, &content));
        }
        let mut frames = BodyStream::new(body);
        match tokio::time::timeout(limit, frames.next()).await {
            Ok(Some(Err(error))) => Err(unreachable(&error)),
            // An event, the end of the watch, or of our patience: in each case the object is looked at again.
            _ => Ok(()),
        }
    }

    async fn send(&self, method: Method, path: &str, content: Vec<u8>) -> Result<(StatusCode, Vec<u8>), ApiFailure> {
        let request = self.request(method, path, content)?;
        let (parts, content) = within(ANSWER_TIMEOUT, async {
            let response = self.client.send(request).await.map_err(|error| unreachable(&error))?;
            let (parts, body) = response.into_parts();
            Ok((parts, collect(body).await?))
        })
        .await?;
        self.note_clock(&parts.headers);
        if parts.status.is_success() || matches!(parts.status, StatusCode::NOT_FOUND | StatusCode::CONFLICT) {
            Ok((parts.status, content))
        } else {
            Err(failure(parts.status, &parts.headers, &content))
        }
    }

    fn request(&self, method: Method, path: &str, content: Vec<u8>) -> Result<http::Request<Body>, ApiFailure> {
        http::Request::builder()
            .method(method)
            .uri(path)
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, concat!("pintle/", env!("CARGO_PKG_VERSION")))
            .body(Body::from(content))
            .map_err(|error| ApiFailure::Invalid(error.to_string()))
    }

    fn note_clock(&self, headers: &http::HeaderMap) {
        let date = headers.get(header::DATE).and_then(|date| date.to_str().ok());
        let theirs =
            date.and_then(|date| jiff::fmt::rfc2822::parse(date).ok()).map(|date| date.timestamp().as_second());
        if let Some(theirs) = theirs {
            let ours = crate::clock::now().as_seconds();
            *self.clock.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some((theirs, ours));
        }
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, ApiFailure>>) -> Result<T, ApiFailure> {
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(ApiFailure::Unreachable(format!("no answer within {} s", limit.as_secs()))))
}

async fn collect(body: Body) -> Result<Vec<u8>, ApiFailure> {
    let limited = http_body_util::Limited::new(body, MAXIMUM_ANSWER);
    let collected = limited.collect().await.map_err(|error| ApiFailure::Unreachable(error.to_string()))?;
    Ok(collected.to_bytes().to_vec())
}

fn parse<T: DeserializeOwned>(content: &[u8]) -> Result<T, ApiFailure> {
    serde_json::from_slice(content).map_err(|error| ApiFailure::Server(format!("its answer makes no sense: {error}")))
}

/// The causes of an error in one line: what went wrong deep down (refused, expired, unknown issuer) is what helps.
fn unreachable(error: &(dyn std::error::Error + 'static)) -> ApiFailure {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // A kubeconfig's credential that cannot be had any more (a failing exec plugin) is no fault of the network.
        if let Some(error) = cause.downcast_ref() {
            return ApiFailure::NoCredential(without_secrets::credential(error, None));
        }
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    ApiFailure::Unreachable(text)
}

/// What an answer other than success means.
fn failure(status: StatusCode, headers: &http::HeaderMap, content: &[u8]) -> ApiFailure {
    let answer: Option<kube::core::Status> = serde_json::from_slice(content).ok();
    let detail = match &answer {
        Some(answer) if !answer.message.is_empty() => answer.message.clone(),
        _ => String::from_utf8_lossy(&content[..content.len().min(200)]).trim().to_owned(),
    };
    let detail = format!("{status}: {detail}");
    let retry_after =
        headers.get(header::RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok()).map(Duration::from_secs);
    match status {
        StatusCode::UNAUTHORIZED => ApiFailure::Unauthorized(detail),
        StatusCode::FORBIDDEN if detail.contains("\"system:anonymous\"") => ApiFailure::Unauthorized(detail),
        StatusCode::FORBIDDEN => ApiFailure::Forbidden(detail),
        StatusCode::TOO_MANY_REQUESTS => ApiFailure::Throttled { detail, retry_after },
        StatusCode::SERVICE_UNAVAILABLE if retry_after.is_some() => ApiFailure::Throttled { detail, retry_after },
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => ApiFailure::Invalid(detail),
        _ => ApiFailure::Server(detail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An exec plugin is run again when its token ends, in the middle of a request.
    #[test]
    fn a_credential_that_cannot_be_renewed_is_told_without_its_secrets() {
        let output = std::process::Command::new("sh").args(["-c", "echo hunter2; exit 3"]).output().expect("it runs");
        let error = kube::client::AuthError::AuthExecRun { cmd: "env hunter2".to_owned(), out: Box::new(output) };
        let failure = unreachable(&kube::Error::Service(Box::new(error)));
        assert!(
            matches!(&failure, ApiFailure::NoCredential(detail) if detail.ends_with("exit status: 3")),
            "{failure}"
        );
    }

    #[test]
    fn answers_are_told_apart_by_what_follows_from_them() {
        let headers = http::HeaderMap::from_iter([(header::RETRY_AFTER, http::HeaderValue::from_static("7"))]);
        let throttled = failure(StatusCode::TOO_MANY_REQUESTS, &headers, b"Too many requests");
        assert!(matches!(throttled, ApiFailure::Throttled { retry_after: Some(after), .. } if after.as_secs() == 7));
        let anonymous = br#"{"kind":"Status","message":"User \"system:anonymous\" cannot get path"}"#;
        let answered = failure(StatusCode::FORBIDDEN, &http::HeaderMap::new(), anonymous);
        assert!(matches!(answered, ApiFailure::Unauthorized(_)), "{answered:?}");
        assert!(matches!(failure(StatusCode::FORBIDDEN, &http::HeaderMap::new(), b"no"), ApiFailure::Forbidden(_)));
    }
}

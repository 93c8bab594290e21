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

use super::credential_error;
use crate::parse_error;
use crate::world::clock::monotonic;
use crate::world::task::timeout;

/// A client for one API server and one credential.
pub struct Api {
    client: kube::Client,
    /// The proxy on the way, as errors name it.
    proxy: Option<String>,
    /// The API server's clock as of its last answer, and this machine's clock at that moment, in seconds since 1970.
    clock: Mutex<Option<(i64, i64)>>,
}

/// Every answer but that of a watch must be there within this time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A watch that shows nothing and ends before this time would be opened again and again.
const SHORTEST_WATCH: Duration = Duration::from_secs(5);
/// An answer longer than this is not what was asked for.
const MAXIMUM_ANSWER: usize = 4 << 20;

/// What a watch has shown.
#[derive(Debug, PartialEq, Eq)]
pub enum Watched {
    /// That the object is to be looked at again.
    Changed,
    /// That nothing can be watched from a version as old as the one asked for.
    Expired,
}

/// An event of a watch.
#[derive(serde::Deserialize)]
struct WatchEvent {
    #[serde(rename = "type")]
    kind: String,
    object: serde_json::Value,
}

impl Api {
    pub(super) fn new(client: kube::Client, proxy: Option<String>) -> Self {
        Self { client, proxy, clock: Mutex::new(None) }
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
            // A load balancer whose API servers are away says 404 as well, and knows of no object.
            let answer = status_of(&content).filter(|answer| answer.reason == "NotFound");
            return answer.map(|_| None).ok_or_else(|| failure(status, &http::HeaderMap::new(), &content));
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
    /// Those of [`ApiFailure`], also where the server says it in an event; and a watch that the server ends at once.
    pub async fn watch_once(&self, path: &str, limit: Duration) -> Result<Watched, ApiFailure> {
        let request = self.request(Method::GET, path, Vec::new())?;
        let response =
            within(ANSWER_TIMEOUT, async { self.client.send(request).await.map_err(|error| self.unreachable(&error)) })
                .await?;
        let (parts, body) = response.into_parts();
        self.note_clock(&parts.headers);
        if !parts.status.is_success() {
            let content = collect(body).await?;
            return expired(parts.status).map_or_else(|| Err(failure(parts.status, &parts.headers, &content)), Ok);
        }
        let started = monotonic();
        match timeout(limit, first_line(body)).await {
            Ok(line) => watched(&line?, monotonic() - started),
            // The end of our patience: the object is looked at again.
            Err(_) => Ok(Watched::Changed),
        }
    }

    async fn send(&self, method: Method, path: &str, content: Vec<u8>) -> Result<(StatusCode, Vec<u8>), ApiFailure> {
        let request = self.request(method, path, content)?;
        let (parts, content) = within(ANSWER_TIMEOUT, async {
            let response = self.client.send(request).await.map_err(|error| self.unreachable(&error))?;
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

    /// As [`unreachable`], with the proxy that may be why.
    fn unreachable(&self, error: &(dyn std::error::Error + 'static)) -> ApiFailure {
        match (unreachable(error), &self.proxy) {
            (ApiFailure::Unreachable(detail), Some(proxy)) => {
                ApiFailure::Unreachable(format!("through {proxy}: {detail}"))
            }
            (failure, _) => failure,
        }
    }

    fn note_clock(&self, headers: &http::HeaderMap) {
        let date = headers.get(header::DATE).and_then(|date| date.to_str().ok());
        let theirs =
            date.and_then(|date| jiff::fmt::rfc2822::parse(date).ok()).map(|date| date.timestamp().as_second());
        if let Some(theirs) = theirs {
            let ours = crate::world::clock::now().as_seconds();
            *self.clock.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some((theirs, ours));
        }
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, ApiFailure>>) -> Result<T, ApiFailure> {
    timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(ApiFailure::Unreachable(format!("no answer within {} s", limit.as_secs()))))
}

async fn collect(body: Body) -> Result<Vec<u8>, ApiFailure> {
    let limited = http_body_util::Limited::new(body, MAXIMUM_ANSWER);
    let collected = limited.collect().await.map_err(|error| ApiFailure::Unreachable(error.to_string()))?;
    Ok(collected.to_bytes().to_vec())
}

/// A watch's first event, as far as it comes.
async fn first_line(body: Body) -> Result<Vec<u8>, ApiFailure> {
    let (mut frames, mut line) = (BodyStream::new(body), Vec::new());
    while !line.contains(&b'\n') && line.len() < MAXIMUM_ANSWER {
        match frames.next().await {
            Some(Ok(frame)) => line.extend_from_slice(frame.data_ref().map_or(&[], AsRef::as_ref)),
            Some(Err(error)) => return Err(unreachable(&error)),
            None => break,
        }
    }
    line.truncate(line.iter().position(|octet| *octet == b'\n').unwrap_or(line.len()));
    Ok(line)
}

/// What a watch has shown that ended, or whose first event came, after this time.
fn watched(line: &[u8], after: Duration) -> Result<Watched, ApiFailure> {
    if line.is_empty() {
        let early = || ApiFailure::Server("it ends a watch at once, and without an event".to_owned());
        return if after < SHORTEST_WATCH { Err(early()) } else { Ok(Watched::Changed) };
    }
    let event: WatchEvent = parse(line)?;
    if event.kind != "ERROR" {
        return Ok(Watched::Changed);
    }
    let code = event.object["code"].as_u64().and_then(|code| StatusCode::from_u16(u16::try_from(code).ok()?).ok());
    let code = code.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let content = event.object.to_string();
    expired(code).map_or_else(|| Err(failure(code, &http::HeaderMap::new(), content.as_bytes())), Ok)
}

/// An object that nobody has touched for some minutes has a version that the server no longer watches from.
fn expired(status: StatusCode) -> Option<Watched> {
    (status == StatusCode::GONE).then_some(Watched::Expired)
}

fn parse<T: DeserializeOwned>(content: &[u8]) -> Result<T, ApiFailure> {
    serde_json::from_slice(content)
        .map_err(|error| ApiFailure::Server(format!("its answer cannot be used: {}", parse_error::json(&error))))
}

/// The causes of an error in one line: what went wrong deep down (refused, expired, unknown issuer) is what helps.
fn unreachable(error: &(dyn std::error::Error + 'static)) -> ApiFailure {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // A kubeconfig's credential that cannot be had any more (a failing exec plugin) is no fault of the network.
        if let Some(error) = cause.downcast_ref() {
            return ApiFailure::NoCredential(credential_error::credential(error, None));
        }
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    ApiFailure::Unreachable(text)
}

/// The Status with which an API server itself explains an answer.
fn status_of(content: &[u8]) -> Option<kube::core::Status> {
    serde_json::from_slice(content).ok()
}

/// What an answer other than success means.
fn failure(status: StatusCode, headers: &http::HeaderMap, content: &[u8]) -> ApiFailure {
    let answer = status_of(content);
    let detail = match &answer {
        Some(answer) if !answer.message.is_empty() => answer.message.clone(),
        _ => String::from_utf8_lossy(&content[..content.len().min(200)]).trim().to_owned(),
    };
    let detail = format!("{status}: {detail}");
    let in_header = headers.get(header::RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
    let in_status = || answer?.details.map(|details| u64::from(details.retry_after_seconds)).filter(|after| *after > 0);
    let retry_after = in_header.or_else(in_status).map(Duration::from_secs);
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

    /// An API server that gives this answer to whatever it is asked.
    fn answering(status: StatusCode, answer: &'static str) -> Api {
        let service = tower::service_fn(move |_: http::Request<Body>| async move {
            http::Response::builder().status(status).body(Body::from(answer.as_bytes().to_vec()))
        });
        Api::new(kube::Client::new(service, "default"), None)
    }

    #[tokio::test]
    async fn a_watch_that_shows_nothing_is_not_taken_for_a_change() {
        let watch = async |status, answer| answering(status, answer).watch_once("/", Duration::from_secs(60)).await;
        let ok = StatusCode::OK;
        assert_eq!(watch(ok, "{\"type\":\"MODIFIED\",\"object\":{}}\n{").await, Ok(Watched::Changed));
        assert!(matches!(watch(ok, "").await, Err(ApiFailure::Server(_))));
        assert!(matches!(watch(ok, "<html>").await, Err(ApiFailure::Server(_))));
        let throttled = r#"{"type":"ERROR","object":{"code":429,"message":"no","details":{"retryAfterSeconds":7}}}"#;
        let after = Some(Duration::from_secs(7));
        assert!(
            matches!(watch(ok, throttled).await, Err(ApiFailure::Throttled { retry_after, .. }) if retry_after == after)
        );
        let expired = r#"{"type":"ERROR","object":{"code":410,"message":"too old resource version"}}"#;
        assert_eq!(watch(ok, expired).await, Ok(Watched::Expired));
        assert_eq!(watch(StatusCode::GONE, "").await, Ok(Watched::Expired));
        assert_eq!(watched(b"", Duration::from_secs(60)), Ok(Watched::Changed));
    }

    #[tokio::test]
    async fn only_an_api_server_says_that_there_is_no_such_object() {
        let get = async |answer| answering(StatusCode::NOT_FOUND, answer).get::<serde_json::Value>("/x").await;
        let missing = r#"{"kind":"Status","reason":"NotFound","message":"x not found","code":404}"#;
        assert_eq!(get(missing).await, Ok(None));
        for other in ["<html>default backend - 404</html>", "", r#"{"message":"no route"}"#] {
            assert!(matches!(get(other).await, Err(ApiFailure::Server(_))), "{other}");
        }
    }

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

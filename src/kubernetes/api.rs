//! One connection's worth of the API server: requests go out, answers or [`ApiFailure`]s come back.

use std::marker::PhantomData;
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

/// An event of a watch, and the object as it is since.
#[derive(Debug, PartialEq, Eq)]
pub enum WatchEvent<T> {
    /// It was created or has changed.
    Changed(T),
    /// It is deleted.
    Deleted,
    /// Nothing can be watched from a version as old as the one asked for.
    Expired,
    /// The server has ended the watch.
    Ended,
}

/// A watch that is open.
pub struct Watch<T> {
    frames: BodyStream<Body>,
    /// What has arrived of the line that comes next.
    arrived: Vec<u8>,
    opened: Duration,
    shown: bool,
    object: PhantomData<fn() -> T>,
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

    /// Opens a watch; `None` if nothing can be watched from a version as old as the one asked for.
    ///
    /// # Errors
    /// Those of [`ApiFailure`].
    pub async fn open_watch<T: DeserializeOwned>(&self, path: &str) -> Result<Option<Watch<T>>, ApiFailure> {
        let request = self.request(Method::GET, path, Vec::new())?;
        let response =
            within(ANSWER_TIMEOUT, async { self.client.send(request).await.map_err(|error| self.unreachable(&error)) })
                .await?;
        let (parts, body) = response.into_parts();
        self.note_clock(&parts.headers);
        if parts.status == StatusCode::GONE {
            return Ok(None);
        }
        if !parts.status.is_success() {
            let content = collect(body).await?;
            return Err(failure(parts.status, &parts.headers, &content));
        }
        Ok(Some(Watch::new(body)))
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

impl<T: DeserializeOwned> Watch<T> {
    fn new(body: Body) -> Self {
        let frames = BodyStream::new(body);
        Self { frames, arrived: Vec::new(), opened: monotonic(), shown: false, object: PhantomData }
    }

    /// Waits for the next event.
    ///
    /// # Errors
    /// Those of [`ApiFailure`], also where the server says it in an event; and a watch that the server ends at once.
    pub async fn next(&mut self) -> Result<WatchEvent<T>, ApiFailure> {
        /// As it is sent. What an object is, is for its type to say.
        #[derive(serde::Deserialize)]
        struct Sent {
            #[serde(rename = "type")]
            kind: String,
            object: serde_json::Value,
        }
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return ended(self.shown, monotonic() - self.opened);
            }
            let Sent { kind, object } = parse(&line)?;
            self.shown = true;
            return match kind.as_str() {
                "BOOKMARK" => continue,
                "DELETED" => Ok(WatchEvent::Deleted),
                "ERROR" => {
                    let code = object["code"].as_u64().and_then(|code| u16::try_from(code).ok());
                    let code = code.and_then(|code| StatusCode::from_u16(code).ok());
                    match code.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR) {
                        // An object that nobody has touched for some minutes has a version that the server no longer
                        // watches from.
                        StatusCode::GONE => Ok(WatchEvent::Expired),
                        code => Err(failure(code, &http::HeaderMap::new(), object.to_string().as_bytes())),
                    }
                }
                _ => serde_json::from_value(object).map(WatchEvent::Changed).map_err(|error| unusable(&error)),
            };
        }
    }

    /// The next line; empty at the end.
    async fn line(&mut self) -> Result<Vec<u8>, ApiFailure> {
        let mut searched = 0;
        loop {
            if let Some(length) = self.arrived[searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.arrived.split_off(searched + length + 1);
                let mut line = std::mem::replace(&mut self.arrived, rest);
                line.pop();
                return Ok(line);
            }
            searched = self.arrived.len();
            if searched > MAXIMUM_ANSWER {
                return Err(ApiFailure::Server("an event of its watch is too long".to_owned()));
            }
            match self.frames.next().await {
                Some(Ok(frame)) => self.arrived.extend_from_slice(frame.data_ref().map_or(&[], AsRef::as_ref)),
                Some(Err(error)) => return Err(unreachable(&error)),
                None => return Ok(std::mem::take(&mut self.arrived)),
            }
        }
    }
}

/// What it means that a watch has ended, after an event or without one, and after this time.
fn ended<T>(shown: bool, after: Duration) -> Result<WatchEvent<T>, ApiFailure> {
    if shown || after >= SHORTEST_WATCH {
        return Ok(WatchEvent::Ended);
    }
    Err(ApiFailure::Server("it ends a watch at once, and without an event".to_owned()))
}

fn parse<T: DeserializeOwned>(content: &[u8]) -> Result<T, ApiFailure> {
    serde_json::from_slice(content).map_err(|error| unusable(&error))
}

fn unusable(error: &serde_json::Error) -> ApiFailure {
    ApiFailure::Server(format!("its answer cannot be used: {}", parse_error::json(error)))
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
    async fn a_watch_shows_its_events_one_by_one_and_nothing_else_is_taken_for_one() {
        let watch = async |status, answer| match answering(status, answer).open_watch::<serde_json::Value>("/").await? {
            Some(mut watch) => watch.next().await,
            None => Ok(WatchEvent::Expired),
        };
        let ok = StatusCode::OK;
        let changed = |object| Ok(WatchEvent::Changed(object));
        assert_eq!(watch(ok, "{\"type\":\"MODIFIED\",\"object\":{}}\n{").await, changed(serde_json::json!({})));
        let after_a_bookmark = "{\"type\":\"BOOKMARK\",\"object\":{}}\n{\"type\":\"ADDED\",\"object\":1}\n";
        assert_eq!(watch(ok, after_a_bookmark).await, changed(serde_json::json!(1)));
        assert_eq!(watch(ok, "{\"type\":\"DELETED\",\"object\":{}}\n").await, Ok(WatchEvent::Deleted));
        assert!(matches!(watch(ok, "").await, Err(ApiFailure::Server(_))));
        assert!(matches!(watch(ok, "<html>").await, Err(ApiFailure::Server(_))));
        let throttled = r#"{"type":"ERROR","object":{"code":429,"message":"no","details":{"retryAfterSeconds":7}}}"#;
        let after = Some(Duration::from_secs(7));
        assert!(
            matches!(watch(ok, throttled).await, Err(ApiFailure::Throttled { retry_after, .. }) if retry_after == after)
        );
        let expired = r#"{"type":"ERROR","object":{"code":410,"message":"too old resource version"}}"#;
        assert_eq!(watch(ok, expired).await, Ok(WatchEvent::Expired));
        assert_eq!(watch(StatusCode::GONE, "").await, Ok(WatchEvent::Expired));
    }

    #[tokio::test]
    async fn a_watch_ends_after_an_event_or_some_time_without_a_failure() {
        let event = "{\"type\":\"MODIFIED\",\"object\":{}}\n";
        let opened = answering(StatusCode::OK, event).open_watch::<serde_json::Value>("/").await;
        let mut watch = opened.expect("answered").expect("open");
        assert!(matches!(watch.next().await, Ok(WatchEvent::Changed(_))));
        assert_eq!(watch.next().await, Ok(WatchEvent::Ended));
        assert_eq!(ended::<()>(false, SHORTEST_WATCH), Ok(WatchEvent::Ended));
        assert!(ended::<()>(false, Duration::ZERO).is_err());
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

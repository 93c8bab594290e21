//! Handles HTTP requests: faults, authentication, then the resource that the path names.

mod certificate_signing_requests;
mod discovery;
mod negotiation;
mod protobuf;
mod reviews;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::SystemTime;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::Value;

use self::negotiation::Query;
use super::Observation;
use super::authentication::{User, authenticate};
use super::cluster::Cluster;
use super::connection::Connection;
use super::status::Failure;

/// Limit on a request body, in bytes; kube-apiserver's.
const MAXIMUM_BODY: usize = 3 * 1024 * 1024;

const JSON: &str = "application/json";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

/// The body of a response: a document or a watch.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A request, parsed as far as all resources need it.
struct Call {
    cluster: Arc<Cluster>,
    user: User,
    method: Method,
    path: String,
    query: Query,
    accept: String,
    content_type: String,
    body: Incoming,
}

/// Handles a request. Errors become responses too.
pub(super) async fn answer(
    cluster: Arc<Cluster>,
    connection: &Connection,
    request: Request<Incoming>,
) -> Response<Body> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut user = None;
    let answered = dispatch(Arc::clone(&cluster), connection, request, &mut user).await;
    answered.unwrap_or_else(|failure| {
        cluster.report(Observation::Refused { user, method: method.to_string(), path, code: failure.code });
        refusal(&failure)
    })
}

async fn dispatch(
    cluster: Arc<Cluster>,
    connection: &Connection,
    request: Request<Incoming>,
    known_user: &mut Option<String>,
) -> Result<Response<Body>, Failure> {
    let path = request.uri().path().to_owned();
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    apply_faults(&cluster, &segments).await?;

    let header = |name| request.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let verifier = cluster.client_verifier();
    let authenticated = authenticate(
        &verifier,
        &connection.certificates,
        header(AUTHORIZATION),
        cluster.bootstrap_token(),
        SystemTime::now(),
    )?;
    let Some(user) = authenticated else {
        // What the role system:public-info-viewer allows for everyone; any other anonymous request gets 401.
        return match segments.as_slice() {
            ["version" | "livez" | "readyz" | "healthz"] if request.method() == Method::GET => public(&segments),
            _ => Err(Failure::unauthorized()),
        };
    };
    *known_user = Some(user.name.clone());
    if connection.first_authentication() {
        cluster.report(Observation::Authenticated {
            user: user.name.clone(),
            serial: user.serial.clone(),
            credential_id: user.credential_id().cloned(),
        });
    }

    let text = |name| header(name).unwrap_or_default().to_owned();
    let call = Call {
        accept: text(hyper::header::ACCEPT),
        content_type: text(CONTENT_TYPE),
        query: Query::parse(request.uri().query().unwrap_or_default()),
        method: request.method().clone(),
        body: request.into_body(),
        path: path.clone(),
        cluster,
        user,
    };
    match segments.as_slice() {
        ["version" | "livez" | "readyz" | "healthz"] => public(&segments),
        ["apis", "certificates.k8s.io", "v1", "certificatesigningrequests", object @ ..] => {
            certificate_signing_requests::answer(call, object).await
        }
        ["apis", "authentication.k8s.io", "v1", "selfsubjectreviews"] => reviews::self_subject_review(call).await,
        ["apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews"] => {
            reviews::self_subject_access_review(call).await
        }
        _ => match discovery::document(&segments) {
            Some(_) if call.method != Method::GET => {
                Err(Failure::forbidden_path(&call.user.name, &call.method.as_str().to_lowercase(), &call.path))
            }
            Some(document) => json(StatusCode::OK, &document),
            None => Err(Failure::no_such_path()),
        },
    }
}

/// Applies the faults that do not depend on the resource.
async fn apply_faults(cluster: &Cluster, segments: &[&str]) -> Result<(), Failure> {
    let mut faults = cluster.faults.subscribe();
    let _ = faults.wait_for(|faults| !faults.hang).await;
    if !segments.starts_with(&["apis", "certificates.k8s.io", "v1", "certificatesigningrequests"]) {
        return Ok(());
    }
    let take_one = |left: &mut u32| {
        let some = *left > 0;
        *left = left.saturating_sub(1);
        some
    };
    if cluster.take_fault(|faults| take_one(&mut faults.internal_errors)) {
        return Err(Failure::internal_error("fault injection: internal_errors"));
    }
    if cluster.take_fault(|faults| take_one(&mut faults.too_many_requests)) {
        return Err(Failure::too_many_requests(cluster.faults.borrow().retry_after));
    }
    Ok(())
}

fn public(segments: &[&str]) -> Result<Response<Body>, Failure> {
    match segments {
        ["version"] => json(StatusCode::OK, &discovery::version()),
        _ => respond(StatusCode::OK, "text/plain; charset=utf-8", whole("ok")),
    }
}

impl Call {
    /// The body as JSON; an empty body is null.
    ///
    /// # Errors
    /// 413 if it is too large, 415 if its media type is neither protobuf nor one of `accepted` (a missing one counts
    /// as JSON), and 400 if it is malformed.
    async fn read(&mut self, accepted: &[&str]) -> Result<Value, Failure> {
        let collected = Limited::new(&mut self.body, MAXIMUM_BODY).collect().await;
        let bytes = collected.map_err(|_| Failure::request_entity_too_large())?.to_bytes();
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        match self.content_type.split(';').next().unwrap_or_default().trim() {
            PROTOBUF if accepted.contains(&JSON) => {
                protobuf::to_json(&bytes).ok_or_else(|| Failure::bad_request("the body is not a known protobuf object"))
            }
            media_type if media_type.is_empty() || accepted.contains(&media_type) => serde_json::from_slice(&bytes)
                .map_err(|error| Failure::bad_request(format!("the body is not JSON: {error}"))),
            _ => Err(Failure::unsupported_media_type(&accepted.join(", "))),
        }
    }
}

fn json(code: StatusCode, document: &Value) -> Result<Response<Body>, Failure> {
    respond(code, JSON, whole(document.to_string()))
}

/// A streaming response.
fn streaming(
    frames: impl futures::Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + 'static,
) -> Result<Response<Body>, Failure> {
    respond(StatusCode::OK, JSON, StreamBody::new(frames).boxed_unsync())
}

fn whole(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed_unsync()
}

fn respond(code: StatusCode, content_type: &'static str, body: Body) -> Result<Response<Body>, Failure> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    Ok(response)
}

fn refusal(failure: &Failure) -> Response<Body> {
    let mut response = Response::new(whole(failure.to_json().to_string()));
    *response.status_mut() = StatusCode::from_u16(failure.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(JSON));
    if let Some(after) = failure.retry_after {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(after.as_secs()));
    }
    response
}

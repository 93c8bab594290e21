//! The page that Prometheus asks for: `GET /metrics`, where the configuration says so.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use super::Server;
use crate::telemetry::metrics;
use crate::world::clock::now;
use crate::world::task;

/// Clients that send no request within this time are disconnected.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The number of clients served at once.
const AT_ONCE: usize = 16;

/// Listens at this address and answers until the runtime ends.
///
/// # Errors
/// If the address cannot be listened on.
pub async fn serve(address: SocketAddr, server: Server) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    task::spawn(async move {
        let places = std::sync::Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
        while let Ok(place) = std::sync::Arc::clone(&places).acquire_owned().await {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of descriptors, most likely: others will be closed.
                task::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let server = server.clone();
            task::spawn(async move {
                let answer = service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&request, &server))));
                let mut connection = hyper::server::conn::http1::Builder::new();
                connection.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIMEOUT);
                // Once answered, a client makes room for the next one.
                connection.keep_alive(false);
                // The client may have gone away.
                let _ = connection.serve_connection(TokioIo::new(stream), answer).await;
                drop(place);
            });
        }
    });
    Ok(())
}

fn answer(request: &Request<Incoming>, server: &Server) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            let content_type = header::HeaderValue::from_static(metrics::MEDIA_TYPE);
            response.headers_mut().insert(header::CONTENT_TYPE, content_type);
            *response.body_mut() = Full::from(metrics::text(&server.status(), now()));
        }
        (_, "/metrics") => *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED,
        _ => *response.status_mut() = StatusCode::NOT_FOUND,
    }
    response
}

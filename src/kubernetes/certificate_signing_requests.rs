//! CertificateSigningRequests, `certificates.k8s.io/v1`.

use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use pintle_agent_core::Template;
use pintle_agent_core::rotation::{ApiFailure, SubmittedRequest};
use pintle_plugins_api::PublicKey;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;

use super::Api;
use super::api::WatchEvent;
use crate::world::task::timeout;

const PATH: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
/// A watch is opened anew after this time: a connection that died silently, as in a suspended machine, must not hold up
/// a certificate for ever.
const WATCH_LIMIT: Duration = Duration::from_secs(240);

/// A request that is approved is usually signed this soon, and then seen by the same watch.
const SIGNING_TIME: Duration = Duration::from_secs(1);

/// What stands at the API server under the name of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Standing {
    /// The request.
    Ours(SubmittedRequest),
    /// Another's, for another key or signer: whoever may create one may call it what they like.
    NotOurs,
}

/// What a watch has shown.
#[derive(Debug, PartialEq, Eq)]
pub enum Watched {
    /// What has become of the request.
    Outcome(Outcome),
    /// Nothing, for some minutes.
    Nothing,
    /// That nothing can be watched from a version as old as the one asked for.
    Expired,
}

/// What has become of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nobody has decided; or an approver has, and the signer has not signed yet.
    Pending {
        /// Whether it is approved.
        approved: bool,
        /// The version of the object, from which a watch goes on.
        resource_version: String,
    },
    /// The certificate chain, PEM.
    Issued(String),
    /// An approver denied it.
    Denied(String),
    /// The signer gave up.
    Failed(String),
    /// It is deleted, or another object has its name.
    Gone,
}

impl Api {
    /// The minor version of the Kubernetes 1 that answers.
    ///
    /// # Errors
    /// Those of [`ApiFailure`].
    pub async fn server_minor(&self) -> Result<Option<u32>, ApiFailure> {
        #[derive(serde::Deserialize)]
        struct Version {
            minor: String,
        }
        let version: Option<Version> = self.get("/version").await?;
        // Some distributions write "21+".
        let digits = |version: Version| version.minor.chars().take_while(char::is_ascii_digit).collect::<String>();
        Ok(version.and_then(|version| digits(version).parse().ok()))
    }

    /// Creates the request of this name; `None` if there is one of that name.
    ///
    /// # Errors
    /// Those of [`ApiFailure`].
    pub async fn submit(
        &self,
        name: &str,
        certification_request: &str,
        template: &Template,
        usages: &[&str],
    ) -> Result<Option<SubmittedRequest>, ApiFailure> {
        let object = CertificateSigningRequest {
            metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
            spec: CertificateSigningRequestSpec {
                request: ByteString(certification_request.as_bytes().to_vec()),
                signer_name: template.signer_name.clone(),
                usages: Some(usages.iter().map(|usage| (*usage).to_owned()).collect()),
                expiration_seconds: template.expiration_seconds,
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        };
        let created: Option<CertificateSigningRequest> = self.create(PATH, &object).await?;
        created.map(submitted).transpose()
    }

    /// What stands under this name, if anything does; ours is for this key and signer.
    ///
    /// # Errors
    /// Those of [`ApiFailure`].
    pub async fn find(
        &self,
        name: &str,
        public_key: &PublicKey,
        signer_name: &str,
    ) -> Result<Option<Standing>, ApiFailure> {
        let found: Option<CertificateSigningRequest> = self.get(&format!("{PATH}/{name}")).await?;
        let Some(found) = found else { return Ok(None) };
        let ours = found.spec.signer_name == signer_name && is_for(&found.spec.request.0, public_key);
        if ours { submitted(found).map(Standing::Ours).map(Some) } else { Ok(Some(Standing::NotOurs)) }
    }

    /// What has become of the request.
    ///
    /// # Errors
    /// Those of [`ApiFailure`].
    pub async fn outcome(&self, request: &SubmittedRequest) -> Result<Outcome, ApiFailure> {
        let found: Option<CertificateSigningRequest> = self.get(&format!("{PATH}/{}", request.name)).await?;
        Ok(found.map_or(Outcome::Gone, |found| outcome_of(found, &request.uid)))
    }

    /// Waits until something happens to the request that stands so, or for some minutes at most.
    ///
    /// # Errors
    /// Those of [`ApiFailure`]; `Forbidden` where the credential may get a request and not watch it.
    pub async fn watch(
        &self,
        request: &SubmittedRequest,
        approved: bool,
        resource_version: &str,
    ) -> Result<Watched, ApiFailure> {
        let path = format!(
            "{PATH}?watch=true&fieldSelector=metadata.name%3D{}&resourceVersion={resource_version}&timeoutSeconds={}",
            request.name,
            WATCH_LIMIT.as_secs()
        );
        let Some(mut watch) = self.open_watch::<CertificateSigningRequest>(&path).await? else {
            return Ok(Watched::Expired);
        };
        // When the server or our patience ends the watch, the request is looked at again.
        let (mut last, mut patience) = (Watched::Nothing, WATCH_LIMIT + Duration::from_secs(10));
        while let Ok(event) = timeout(patience, watch.next()).await {
            match event? {
                WatchEvent::Expired => return Ok(Watched::Expired),
                WatchEvent::Ended => break,
                WatchEvent::Deleted => return Ok(Watched::Outcome(Outcome::Gone)),
                WatchEvent::Changed(object) => {
                    let outcome = outcome_of(object, &request.uid);
                    match outcome {
                        Outcome::Pending { approved: true, .. } if !approved => patience = SIGNING_TIME,
                        Outcome::Pending { .. } => continue,
                        _ => return Ok(Watched::Outcome(outcome)),
                    }
                    last = Watched::Outcome(outcome);
                }
            }
        }
        Ok(last)
    }

    /// As whom the API server knows the one who asks, where it says so (since Kubernetes 1.28). Any answer at all shows
    /// that it accepts the credential: it refuses a certificate that it cannot verify with 401 on every path.
    ///
    /// # Errors
    /// Those of [`ApiFailure`].
    pub async fn who_am_i(&self) -> Result<Option<String>, ApiFailure> {
        let path = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
        let review: Result<Option<SelfSubjectReview>, _> = self.create(path, &SelfSubjectReview::default()).await;
        match review {
            Ok(Some(review)) => {
                let user = review.status.and_then(|status| status.user_info?.username);
                match user {
                    Some(user) if user == "system:anonymous" => {
                        Err(ApiFailure::Unauthorized("it took the certificate for nobody's".to_owned()))
                    }
                    user => Ok(user),
                }
            }
            Ok(None) => self.server_minor().await.map(|_| None),
            Err(ApiFailure::Forbidden(_)) => Ok(None),
            Err(failure) => Err(failure),
        }
    }
}

/// Whether this certification request (PEM) is for this key.
fn is_for(certification_request: &[u8], public_key: &PublicKey) -> bool {
    let Ok(block) = pem::parse(certification_request) else { return false };
    X509CertificationRequest::from_der(block.contents())
        .is_ok_and(|(_, request)| request.certification_request_info.subject_pki.raw == public_key.as_der())
}

fn submitted(object: CertificateSigningRequest) -> Result<SubmittedRequest, ApiFailure> {
    match (object.metadata.name, object.metadata.uid) {
        (Some(name), Some(uid)) => Ok(SubmittedRequest { name, uid }),
        _ => Err(ApiFailure::Server("it answered with an object without name and uid".to_owned())),
    }
}

fn outcome_of(object: CertificateSigningRequest, uid: &str) -> Outcome {
    if object.metadata.uid.as_deref() != Some(uid) {
        return Outcome::Gone;
    }
    let status = object.status.unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    let condition =
        |kind: &str| conditions.iter().find(|condition| condition.type_ == kind && condition.status != "False");
    let words = |kind: &str| {
        condition(kind).map(|condition| {
            let reason = condition.reason.clone().unwrap_or_default();
            match &condition.message {
                Some(message) if !message.is_empty() => format!("{reason}: {message}"),
                _ => reason,
            }
        })
    };
    if let Some(detail) = words("Denied") {
        return Outcome::Denied(detail);
    }
    if let Some(certificate) = status.certificate.filter(|certificate| !certificate.0.is_empty()) {
        return Outcome::Issued(String::from_utf8_lossy(&certificate.0).into_owned());
    }
    if let Some(detail) = words("Failed") {
        return Outcome::Failed(detail);
    }
    Outcome::Pending {
        approved: condition("Approved").is_some(),
        resource_version: object.metadata.resource_version.unwrap_or_default(),
    }
}
